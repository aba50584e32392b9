# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What all siblings of a kind promise. To put a new kernel, scheme, objective or preconditioning to the test, add it
to a dictionary here.

Monte Carlo comparisons allow 4 standard errors: a correct program fails one with probability 6e-5, were the seeds not
fixed; there are about 90 of them.
"""

import dataclasses
import functools
import inspect
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from clouds import (
    FAST_KEYS,
    follow,
    identity,
    move_all,
    noise_for,
    partition,
    potential_of,
    skewed_map,
    step_of,
    z_score,
)
from compiling import compile_fast, compile_tuned
from jax import random
from numpyro import handlers
from quartics import (
    EXACT_LOSSES,
    REFERENCE,
    bump,
    estimates,
    exact_clouds,
    loss_and_gradient,
    quartic,
    reference_quantiles,
    weighted_clouds,
)
from scipy.special import digamma, polygamma

from numpyro_smcopt import ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer, Status
from numpyro_smcopt.algorithms.base import ParticleAlgorithm
from numpyro_smcopt.kernels import (
    HMC,
    MALA,
    ULA,
    InvariantKernel,
    Preconditioning,
    RandomWalk,
    WeightedKernel,
    preconditioners,
)
from numpyro_smcopt.kernels.preconditioners import Preconditioner
from numpyro_smcopt.objectives import (
    Cloud,
    EnergyBasedLikelihood,
    ForwardKL,
    MarginalLikelihood,
    ReverseKL,
    Reward,
    term_coefficients,
)
from numpyro_smcopt.random_numbers import RandomNumbers
from numpyro_smcopt.resampling import multinomial, residual, stratified, systematic

STANDARD_ERRORS = 4.0

# Step sizes at which accept-reject kernels reject often.
KERNELS = {"ula": ULA(0.15), "mala": MALA(0.5), "hmc": HMC(1.0, num_leapfrog=3), "random_walk": RandomWalk(0.7)}
SCHEMES = {"systematic": systematic, "stratified": stratified, "multinomial": multinomial, "residual": residual}
OBJECTIVES = {
    "marginal_likelihood": MarginalLikelihood(control_variates=False),
    "marginal_likelihood_calibrated": MarginalLikelihood(),
    "reward": Reward(bump),
    "forward_kl": ForwardKL(reference_quantiles()),
    "reverse_kl_of_params": ReverseKL(reference_params={"theta": REFERENCE}),
    "reverse_kl_of_energy": ReverseKL(reference_energy=lambda sample: quartic(REFERENCE, sample["x"])),
    "reward_with_reverse_kl": Reward(bump, 0.3, ReverseKL(reference_params={"theta": REFERENCE})),
    "reward_with_forward_kl": Reward(bump, 0.3, ForwardKL(lambda key: {"x": reference_quantiles()})),
    "reward_that_knows_theta": Reward(lambda sample: bump(sample) * sample["twice_theta"]),
    "energy_based_likelihood": EnergyBasedLikelihood({"x": reference_quantiles()}),
}
ALGORITHMS = {
    "implicit": lambda model, **options: ImplicitDiffusion(model, optax.sgd(0.05), num_particles=16, **options),
    "smc": lambda model, **options: SMCOptimizer(model, optax.sgd(0.05), num_particles=16, **options),
    "momentum": lambda model, **options: MomentumParticleMLE(
        model, step_size=0.05, momentum=0.5, latent_step_size=0.1, num_particles=16, **options
    ),
}
PRECONDITIONINGS = {"none": preconditioners.none, "diagonal": preconditioners.diagonal, "dense": preconditioners.dense}

each_kernel = pytest.mark.parametrize("name", KERNELS)
each_algorithm = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "smc" else pytest.mark.slow) for name in ALGORITHMS]
)


@dataclasses.dataclass(frozen=True)
class Unadjusted(InvariantKernel):
    """A kernel that claims to be invariant and is not: the contracts must notice."""

    step_size: float = 0.4
    target: float | None = None
    preconditioning: Preconditioning = preconditioners.none
    num_evaluations: int = 1

    def move(self, noise, point, potential, step):
        new, log_ratio = ULA().move(noise, point, potential, step)
        return new, jnp.ones_like(log_ratio)


def step_size(kernel):
    return kernel.step_size


# A path of Gaussians with known normalising constants: coordinate 1 by itself, coordinates 0 and 2 together, and a term
# that depends on no latent.

MEANS = np.array([0.0, 0.15, 0.3, 0.35, 0.2, 0.0])
PRECISIONS = np.array([1.0, 1.1, 1.25, 1.5, 1.6, 1.9])
RATIOS = np.array([PRECISIONS[-1] ** -1.0, PRECISIONS[-1] ** -0.5])  # of the pair, of the single coordinate
FREE = np.array([0.0, 0.1, 0.3, 0.2, 0.4, 0.5])
NUM_REPLICATES, NUM_PARTICLES = 1000, 64


def path_terms(target, x):
    mean, precision, free = target
    a, b, c = x - mean
    return jnp.stack(
        [precision * 0.375 * a**2, precision * b**2 / 2, free + 0 * mean, precision * (c + a / 2) ** 2 / 2]
    )


@functools.cache
def path_statistics(kernel, joint, scheme=systematic, preconditioned=True, ess_threshold=0.8):
    """Estimates [R, ...], each unbiased: Z, Z E[x] and Z E[x^2], divided by the truth of Z."""
    schedule = tuple(map(jnp.asarray, (MEANS, PRECISIONS, FREE)))
    blocks = partition(lambda x: path_terms(tuple(v[1] for v in schedule), x), 3, joint)
    assert blocks.num_blocks == (1 if joint else 2)
    cholesky = np.linalg.cholesky(np.linalg.inv([[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]]))  # precision of the first target
    step = step_of(step_size(kernel), blocks, skewed_map(blocks) if preconditioned else identity(3))

    @compile_tuned
    def replicate(keys, share_of_ratio):
        def one(key):
            key_start, key_path = random.split(key)
            x = random.normal(key_start, (NUM_PARTICLES, 3)) @ cholesky.T
            x, log_weights, log_z = follow(
                key_path, kernel, path_terms, schedule, x, blocks, step, ess_threshold, scheme, share_of_ratio
            )
            weights = jnp.exp(blocks.to_coordinates(log_weights))
            return jnp.exp(log_z), jnp.sum(weights * x, 0), jnp.sum(weights * x**2, 0)

        return jax.vmap(one)(keys)

    def run(share_of_ratio=1.0):
        ratios, means, squares = map(
            np.asarray, replicate(random.split(random.key(1, impl=FAST_KEYS), NUM_REPLICATES), share_of_ratio)
        )
        truth = np.array([np.prod(RATIOS) * np.exp(-FREE[-1])]) if joint else RATIOS
        of_x = np.asarray(blocks.to_coordinates(ratios / truth))
        return ratios / truth, of_x * means, of_x * squares

    return run


def path_scores(estimates):
    """Standard errors by which the estimates are off: normalising constants, and moments of the three coordinates."""
    ratios, means, squares = estimates
    variances = np.diag(np.linalg.inv([[1, 0, 0.5], [0, 1, 0], [0.5, 0, 1]])) / PRECISIONS[-1]
    return np.concatenate(
        [z_score(ratios, 1.0), z_score(means, MEANS[-1]), z_score(squares, variances + MEANS[-1] ** 2)]
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "joint"), [*((name, False) for name in KERNELS), ("hmc", True), ("ula", True)])
def test_weights_of_kernel_are_unbiased_on_a_gaussian_path(name, joint):
    scores = path_scores(path_statistics(KERNELS[name], joint)())
    assert np.all(abs(scores) < STANDARD_ERRORS), scores


@pytest.mark.slow
@pytest.mark.parametrize("name", SCHEMES)
def test_resampling_scheme_keeps_weights_unbiased_on_a_gaussian_path(name):
    """Resampled at every step, whatever the ESS."""
    run = path_statistics(KERNELS["random_walk"], False, SCHEMES[name], preconditioned=False, ess_threshold=1.0)
    scores = path_scores(run())
    assert np.all(abs(scores) < STANDARD_ERRORS), scores


@pytest.mark.slow
def test_path_notices_weights_without_the_kernel_densities():
    run = path_statistics(KERNELS["ula"], True)
    assert np.all(abs(path_scores(run())) < STANDARD_ERRORS)
    wrong = run(share_of_ratio=0.0)
    assert np.max(abs(path_scores(wrong))) > STANDARD_ERRORS
    # These weights have no variance, so the standard errors above flatter them: nearly all estimates are too large.
    assert 0.4 < np.mean(run()[0] > 1) < 0.6 and np.mean(wrong[0] > 1) > 0.9


# A skewed target: logarithms of gamma variables, U(x) = exp(x) - a x, which no symmetric error leaves alone.

SHAPES = np.array([1.0, 2.5])
CLOUD = 20_000


def skewed_terms(x):
    return jnp.concatenate([jnp.exp(x), -jnp.asarray(SHAPES, x.dtype) * x])


def skewed_statistics(kernel, size=None, joint=True):
    """A function (start, number of moves) -> draws of f times their weights, [N, 6], for f = x, x^2, exp(x)."""
    blocks = partition(skewed_terms, 2, joint)
    step = step_of(step_size(kernel) if size is None else size, blocks, identity(2))
    potential = potential_of(skewed_terms, blocks)

    @compile_tuned
    def run(x, num_moves, rng_key):
        def body(k, carry):
            points, log_weights = carry
            points, change, _ = move_all(kernel, random.fold_in(rng_key, k), points, potential, step)
            return points, log_weights + change

        start = jax.vmap(potential.evaluate)(x), jnp.zeros((x.shape[0], blocks.num_blocks))
        points, log_weights = jax.lax.fori_loop(0, num_moves, body, start)
        x, weights = points.x, jnp.exp(blocks.to_coordinates(log_weights))
        return jnp.concatenate([weights * x, weights * x**2, weights * jnp.exp(x)], 1)

    return lambda x, num_moves, seed: run(jnp.asarray(x, jnp.float32), num_moves, random.key(seed))


def exact_draws(seed):
    return np.log(np.random.default_rng(seed).gamma(SHAPES, size=(CLOUD, 2)))


EXACT = np.concatenate([digamma(SHAPES), polygamma(1, SHAPES) + digamma(SHAPES) ** 2, SHAPES])


@each_kernel
def test_kernel_keeps_a_skewed_target_and_finds_it(name):
    kernel = KERNELS[name]
    statistics = skewed_statistics(kernel)
    kept = z_score(statistics(exact_draws(0), 3, 1), EXACT)
    assert np.all(abs(kept) < STANDARD_ERRORS), kept
    if isinstance(kernel, InvariantKernel):
        found = z_score(statistics(np.full((CLOUD, 2), 2.0), 150, 2), EXACT)
        assert np.all(abs(found) < STANDARD_ERRORS), found


def test_skewed_target_notices_a_kernel_that_is_not_invariant():
    scores = z_score(skewed_statistics(Unadjusted())(exact_draws(0), 3, 1), EXACT)
    assert np.max(abs(scores)) > STANDARD_ERRORS + 3, scores


# One particle


@each_kernel
def test_one_particle_is_a_row_of_a_cloud(name):
    kernel = KERNELS[name]
    blocks = partition(skewed_terms, 2)
    potential, step = potential_of(skewed_terms, blocks), step_of(step_size(kernel), blocks, skewed_map(blocks))
    points = jax.vmap(potential.evaluate)(random.normal(random.key(0), (5, 2)))
    noise = noise_for(kernel, random.key(1), points.x, blocks)
    move = lambda noise, point: kernel.move(noise, point, potential, step)  # noqa: E731
    cloud = compile_fast(jax.vmap(move))(noise, points)
    single = compile_fast(move)
    for k in range(5):
        mine, row, expected = jax.tree.map(lambda v, k=k: v[k], (noise, points, cloud))
        alone = single(mine, row)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6), alone, expected)


# Blocks


@each_kernel
def test_blocks_move_as_separate_runs_would(name):
    """Accept, reject and weigh block by block: with the same random numbers, each block moves as if it were alone."""
    kernel = KERNELS[name]
    target = (jnp.asarray(0.2), jnp.asarray(1.3), jnp.asarray(0.0))
    terms = lambda x: path_terms(target, x)  # noqa: E731
    blocks = partition(terms, 3)
    precond = skewed_map(blocks)
    size = jnp.asarray([1.6, 2.5]) * step_size(kernel)
    num = 60
    start = 1.5 * random.normal(random.key(0), (num, 3))
    noise = noise_for(kernel, random.key(3), start, blocks)
    potential = potential_of(terms, blocks)
    points = jax.vmap(potential.evaluate)(start)
    together, extra = compile_fast(
        jax.vmap(lambda noise, p: kernel.move(noise, p, potential, step_of(1.0, blocks, precond)._replace(size=size)))
    )(noise, points)

    changed = []
    for block, members, own in ((0, [0, 2], [0, 3]), (1, [1], [1])):
        members = jnp.asarray(members)
        of_block = RandomNumbers(noise.normal[:, members], noise.uniform.reshape(num, -1, 2)[..., block])
        rest = lambda x, members=members: jnp.zeros(3).at[members].set(x)  # noqa: E731
        alone_terms = lambda x, own=own, rest=rest: terms(rest(x))[jnp.asarray(own)]  # noqa: E731
        alone_blocks = partition(alone_terms, len(members), joint=True)
        width = len(members)
        alone = Preconditioner(precond.scale[members], *(f[block : block + 1, :width, :width] for f in precond[1:]))
        potential_alone = potential_of(alone_terms, alone_blocks)
        step = step_of(1.0, alone_blocks, alone)._replace(size=size[block : block + 1])
        moved, extra_alone = compile_fast(
            jax.vmap(
                lambda noise, x, p=potential_alone, s=step: kernel.move(noise, p.evaluate(x), p, s)  # noqa: B023
            )
        )(of_block, start[:, members])
        np.testing.assert_allclose(together.x[:, members], moved.x, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together.terms[:, jnp.asarray(own)], moved.terms, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(together.grad[:, members], moved.grad, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(extra[:, block], extra_alone[:, 0], rtol=1e-4, atol=1e-5)
        changed.append(np.any(np.asarray(moved.x != start[:, members]), 1))
    if isinstance(kernel, InvariantKernel):  # else nothing was told apart
        assert np.any(changed[0] & ~changed[1]) and np.any(changed[1] & ~changed[0])


# Preconditioners


@pytest.mark.parametrize(("name", "joint"), [*((name, False) for name in KERNELS), ("hmc", True)])
def test_preconditioned_move_is_the_plain_move_of_the_transformed_target(name, joint):
    """With ``x = L z``, moving ``x`` under ``L`` is moving ``z`` under ``U(L z)``."""
    kernel = KERNELS[name]
    with jax.enable_x64(True):
        target = (jnp.asarray(0.2), jnp.asarray(1.3), jnp.asarray(0.0))
        terms = lambda x: path_terms(target, x)  # noqa: E731
        blocks = partition(terms, 3, joint)
        precond = skewed_map(blocks)
        matrix = jax.vmap(lambda e: precond.apply(e, blocks), out_axes=1)(jnp.eye(3))
        assert abs(np.linalg.det(matrix) - 1) > 0.05 and np.count_nonzero(np.asarray(matrix)) > 3
        np.testing.assert_allclose(  # the transpose is the transpose, the inverse the inverse
            jax.vmap(lambda e: precond.apply_transpose(e, blocks), out_axes=1)(jnp.eye(3)), matrix.T, atol=1e-14
        )
        unfactored = jax.vmap(lambda e: precond.unfactor(e, blocks), 1, 1)(matrix)
        np.testing.assert_allclose(unfactored, np.diag(precond.scale), atol=1e-14)

        plain, moved = potential_of(terms, blocks), potential_of(lambda z: terms(matrix @ z), blocks)
        z = random.normal(random.key(0), (30, 3))
        noise = noise_for(kernel, random.key(1), z, blocks)
        in_x, extra_x = compile_fast(
            jax.vmap(
                lambda noise, z: kernel.move(
                    noise, plain.evaluate(matrix @ z), plain, step_of(step_size(kernel), blocks, precond)
                )
            )
        )(noise, z)
        in_z, extra_z = compile_fast(
            jax.vmap(
                lambda noise, z: kernel.move(
                    noise, moved.evaluate(z), moved, step_of(step_size(kernel), blocks, identity(3))
                )
            )
        )(noise, z)
        np.testing.assert_allclose(in_x.x, in_z.x @ matrix.T, atol=1e-12)
        np.testing.assert_allclose(extra_x, extra_z, atol=1e-12)


@pytest.mark.parametrize("name", PRECONDITIONINGS)
def test_preconditioning_follows_the_cloud_or_stays(name):
    preconditioning = PRECONDITIONINGS[name]
    blocks = partition(skewed_terms, 2)
    spread = jnp.array([3.0, 0.2])
    x = 5.0 + spread * random.normal(random.key(0), (4000, 2))
    # Importance weights halve the variance of the second block only: N(0, 1) against N(0, 1/2).
    z = (x[:, 1] - 5.0) / spread[1]
    log_weights = jax.nn.log_softmax(jnp.stack([jnp.zeros(4000), -(z**2) / 2], 1), axis=0)
    now = identity(2)
    adapt = compile_fast(lambda p: preconditioning.adapt(p, x, log_weights, blocks))
    once = adapt(now)
    if preconditioning.forgetting == 0.0:
        np.testing.assert_array_equal(once.scale, now.scale)
        return
    share, truth = preconditioning.forgetting, np.array([9.0, 0.02])
    np.testing.assert_allclose(once.scale**2, 1 - share + share * truth, rtol=0.1 * share * 9)
    for _ in range(300):
        now = adapt(now)
    np.testing.assert_allclose(now.scale**2, truth, rtol=4 * np.sqrt(2 / 2000))


# Objectives


@pytest.mark.parametrize("name", [name for name in OBJECTIVES if "marginal" in name])
def test_gradient_of_marginal_likelihood_is_right_in_blocks(name):
    """x_j ~ N(theta, 1), y_j ~ N(x_j, 1): the posterior is known, and so is the loss; particles are weighted."""
    objective = OBJECTIVES[name]
    y, theta = jnp.array([0.3, 1.2, -0.4]), jnp.asarray(0.7)
    num = 40_000

    def terms(theta, x):
        return jnp.concatenate([(x - theta) ** 2 / 2, (y - x) ** 2 / 2, (0.5 * theta**2)[None]])

    exact = float(jnp.sum(theta - y) / 2 + theta)
    for joint in (True, False):
        blocks = partition(lambda x: terms(theta, x), 3, joint)
        # Draws from N(mean + 0.3, 0.6) with weights for N(mean, 0.5), per block.
        mean = (y + theta) / 2
        x = mean + 0.3 + jnp.sqrt(0.6) * random.normal(random.key(0), (num, 3))
        log_ratio = -((x - mean) ** 2) + (x - mean - 0.3) ** 2 / 1.2
        log_weights = jax.nn.log_softmax(blocks.sum_coordinates(log_ratio), axis=0)

        @compile_fast
        @jax.grad
        def estimate(theta, x, log_weights, blocks=blocks):
            energy = jax.vmap(lambda x: terms(theta, x))(x)
            grad = jax.vmap(jax.grad(lambda x: jnp.sum(terms(jnp.asarray(0.7), x))))(x)
            cloud = Cloud(x, energy, grad, log_weights, blocks)
            coefficients = term_coefficients(objective.estimate(None, cloud), blocks)
            return jnp.sum(jax.lax.stop_gradient(coefficients) * energy)

        gradient = float(estimate(theta, x, log_weights))
        weights, slopes = np.exp(log_weights), np.asarray(blocks.sum_coordinates(theta - x))
        error = np.sqrt(np.sum((weights * (slopes - np.sum(weights * slopes, 0))) ** 2))
        assert error < 0.03
        assert abs(gradient - exact) < STANDARD_ERRORS * error, (gradient, exact, error)
        if "calibrated" in name:
            continue  # the control variates correct what wrong weights do to a Gaussian
        # Without the weights it must not pass.
        wrong = float(estimate(theta, x, jnp.full_like(log_weights, -np.log(num))))
        assert abs(wrong - exact) > 5 * STANDARD_ERRORS * error


@pytest.mark.slow
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradient_and_loss_of_objective_agree_with_quadrature(name, weighted):
    """Without weights the clouds have five particles: a covariance that divides by N would be off by a fifth."""
    draws = weighted_clouds(random.key(0), 40, 4000) if weighted else exact_clouds(random.key(0), 60_000, 5)
    gradients, losses = map(np.asarray, estimates(OBJECTIVES[name], *draws))
    exact_loss, exact_gradient = loss_and_gradient(name)

    def score(values, exact):  # the quantiles that stand for the reference are good to 4e-4
        return (values.mean(dtype=float) - exact) / np.hypot(values.std() / np.sqrt(len(values)), 4e-4 / 3)

    assert abs(score(gradients, exact_gradient)) < STANDARD_ERRORS, (gradients.mean(), exact_gradient)
    if "marginal" not in name:  # the log evidence of a cloud is given to it
        assert abs(score(losses, exact_loss)) < STANDARD_ERRORS, (losses.mean(), exact_loss)
    if weighted and "calibrated" not in name:
        unweighted, _ = map(np.asarray, estimates(OBJECTIVES[name], draws[0], jnp.zeros_like(draws[1])))
        assert abs(score(unweighted, exact_gradient)) > 2 * STANDARD_ERRORS


# Algorithms


def pairs(y):
    mean = numpyro.param("mean", 0.5)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def assert_same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = random.key_data(a), random.key_data(b)
        np.testing.assert_array_equal(a, b)


@each_algorithm
def test_algorithm_runs_stops_and_goes_on(name, compilations):
    """A run in pieces is a run, in a fresh object too; the bar changes nothing; a second run compiles nothing."""
    y = np.array([1.0, -0.5, 2.0], np.float32)
    optimizer = ALGORITHMS[name](pairs)
    whole = optimizer.run(random.key(0), 60, y, progress_bar=False)
    first = optimizer.run(random.key(0), 7, y, progress_bar=True)
    fresh = ALGORITHMS[name](pairs)
    second = fresh.run(None, 53, y, progress_bar=False, init_state=pickle.loads(pickle.dumps(first.state)))
    assert_same(second.state, whole.state)
    np.testing.assert_array_equal(np.concatenate([first.losses, second.losses]), whole.losses)
    with compilations() as compiled:
        other = optimizer.run(random.key(1), 60, -y, progress_bar=False)
    assert compiled == []
    # The promises that do not depend on the algorithm.
    assert whole.status == Status.FINISHED and whole.params.keys() == {"mean"}
    assert abs(whole.params["mean"] - y.mean()) < 0.5 and other.params["mean"] < whole.params["mean"]
    common = {"loss", "ess", "mean_ess", "acceptance_rate", "grad_norm", "num_nonfinite"}
    assert common <= whole.diagnostics.keys()
    assert all(values.shape == (60,) and np.all(np.isfinite(values)) for values in whole.diagnostics.values())
    assert whole.trajectory["mean"].shape == (60,)
    samples = fresh.get_samples(second.state, num_samples=40)
    assert samples["x"].shape == (40, 3)
    np.testing.assert_array_equal(fresh.get_params(second.state)["mean"], whole.params["mean"])
    assert np.isfinite(optimizer.evaluate(whole.state, y))
    with pytest.raises(ValueError, match="num_steps must be a positive integer"):
        optimizer.run(random.key(0), 0, y)


@each_algorithm
def test_algorithm_updates_purely_and_announces_its_sites(name):
    y = np.array([1.0, -0.5, 2.0])
    with jax.enable_x64(True):
        optimizer = ALGORITHMS[name](pairs)
        state = optimizer.init(random.key(0), y)
        samples = optimizer.get_samples(state)["x"]
        assert state.theta["mean"].dtype == samples.dtype == np.float64
        with handlers.trace() as trace:
            once, loss = optimizer.update(state, y)
        again, _ = optimizer.update(state, y)
        assert_same(once, again)
        announced = {site.removeprefix("smcopt/"): msg["value"] for site, msg in trace.items()}
        assert once.diagnostics.keys() | {"step_size"} <= announced.keys()
        assert float(announced["loss"]) == float(loss) == float(once.diagnostics["loss"])
        with handlers.substitute(data={"smcopt/step_size": 1e-12}):
            still, _ = optimizer.update(state, y)
        moved_by = {  # what the step size is of: theta or the particles
            "momentum": lambda new: np.abs(new.theta["mean"] - state.theta["mean"]),
            "smc": lambda new: np.max(np.abs(optimizer.get_samples(new)["x"] - samples)),
            "implicit": lambda new: np.max(np.abs(optimizer.get_samples(new)["x"] - samples)),
        }[name]
        assert 0 < moved_by(still) < 1e-3 * moved_by(once)


def test_the_dictionaries_are_complete():
    import numpyro_smcopt
    from numpyro_smcopt import kernels, objectives, resampling

    def made_from(room, *bases):  # a protocol answers no issubclass
        return {v for v in vars(room).values() if isinstance(v, type) and v not in bases and {*bases} & {*v.__mro__}}

    assert {type(k) for k in KERNELS.values()} == made_from(kernels, InvariantKernel, WeightedKernel)
    of_samples = made_from(objectives, objectives.Objective) - {objectives.PathKL}  # paths: test_euler_maruyama
    assert {type(k) for k in OBJECTIVES.values()} == of_samples
    assert set(OBJECTIVES) == set(EXACT_LOSSES)
    found = [v for v in vars(preconditioners).values() if isinstance(v, Preconditioning)]
    assert set(PRECONDITIONINGS.values()) == set(found)
    assert {type(make(pairs)) for make in ALGORITHMS.values()} == made_from(numpyro_smcopt, ParticleAlgorithm)
    found = {name for name, v in vars(resampling).items() if inspect.isfunction(v) and not name.startswith("_")}
    assert set(SCHEMES) == found
