# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`SMCOptimizer`: line by line the paper's algorithm, closed-form maxima, and what it survives.

Monte Carlo comparisons allow 4 standard errors, except where the project's goals are the bound.
"""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from compiling import compile_tuned
from jax import random
from numpyro.distributions import constraints
from oracles import random_intercepts_fit, random_intercepts_log_likelihood
from scipy.special import logsumexp

from numpyro_smcopt import SMCOptimizer, Status, find_blocks, one_block
from numpyro_smcopt.kernels import HMC, MALA, ULA, RandomWalk, preconditioners
from numpyro_smcopt.objectives import Reward
from numpyro_smcopt.population import budget, tempering
from numpyro_smcopt.population.evaluate import evaluator
from numpyro_smcopt.potential import make_target
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.resampling import multinomial, residual, stratified, systematic
from numpyro_smcopt.runs import loop

pytestmark = pytest.mark.slow

STANDARD_ERRORS = 4.0
SCHEMES = (systematic, stratified, multinomial, residual)


def fixed_steps(length):
    """An optimiser that adds the same to theta at every update, whatever the gradient: a fixed path."""
    return optax.GradientTransformation(
        lambda theta: (), lambda g, state, theta=None: (jnp.full_like(g, length), state)
    )


# The paper's algorithm on a two-dimensional mixture: x is one of two Gaussians at +-m with weights that theta holds,
# y ~ N(x, I).


def mixture(y):
    m = numpyro.param("m", jnp.array([1.0, -0.5]))
    s = numpyro.param("s", 0.3)
    means = dist.MultivariateNormal(jnp.stack([m, -m]), 0.5 * jnp.eye(2))
    x = numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=jnp.stack([s, 0.0 * s])), means))
    numpyro.sample("y", dist.Normal(x, 1.0).to_event(1), obs=y)


OBSERVED = np.array([0.8, 0.4])


class Mixture:
    """Energy and gradients of `mixture`, by hand; theta = (m_1, m_2, s)."""

    @staticmethod
    def energy_and_gradients(theta, x):
        """x [N, 2] to [N], [N, 2] and [N, 3]."""
        m, s = theta[:2], theta[2]
        plus, minus = x - m, x + m
        log_share = np.array([s, 0.0]) - np.logaddexp(s, 0.0)
        joint = np.stack([-(plus**2).sum(1), -(minus**2).sum(1)]) - np.log(np.pi) + log_share[:, None]  # variance 1/2
        log_prior = logsumexp(joint, axis=0)
        share = np.exp(joint - log_prior)
        energy = -log_prior + ((OBSERVED - x) ** 2).sum(1) / 2 + np.log(2 * np.pi)
        grad_x = 2 * (share[0][:, None] * plus + share[1][:, None] * minus) + x - OBSERVED
        grad_m = -2 * (share[0][:, None] * plus - share[1][:, None] * minus)
        grad_s = np.exp(log_share[0]) - share[0]
        return energy, grad_x, np.concatenate([grad_m, grad_s[:, None]], 1)


class Descent:
    def __init__(self, rate):
        self.rate = rate

    def __call__(self, theta, g):
        return theta - self.rate * g


class Adam(Descent):
    first, second, k = 0.0, 0.0, 0

    def __call__(self, theta, g):
        self.k += 1
        self.first = 0.9 * self.first + 0.1 * g
        self.second = 0.999 * self.second + 0.001 * g**2
        corrected = self.second / (1 - 0.999**self.k)
        return theta - self.rate * self.first / (1 - 0.9**self.k) / (np.sqrt(corrected) + 1e-8)


def systematic_ancestors(weights, offset):
    ends = np.cumsum(weights) * len(weights) / weights.sum()
    return np.searchsorted(ends, np.arange(len(weights)) + offset, side="right").clip(max=len(weights) - 1)


class PlainAlgorithm:
    """Algorithm 1 of arXiv 2601.22003 in NumPy, with the random numbers given."""

    def __init__(self, theta, x, optimiser, kernel, h, threshold):
        self.theta, self.x, self.optimiser, self.kernel, self.h, self.threshold = (
            theta,
            x,
            optimiser,
            kernel,
            h,
            threshold,
        )
        self.log_weights = np.full(len(x), -np.log(len(x)))
        self.log_evidence, self.num_resampled = 0.0, 0

    def step(self, xi, uniform, offset):
        h, x, old = self.h, self.x, self.theta
        energy, grad, score = Mixture.energy_and_gradients(old, x)
        new = self.theta = self.optimiser(old, np.exp(self.log_weights) @ score)
        if self.kernel == "ula":  # move, weigh, resample
            moved = x - h * grad + np.sqrt(2 * h) * xi
            energy_new, grad_new, _ = Mixture.energy_and_gradients(new, moved)
            self.weigh(
                energy
                - energy_new
                + np.sum((moved - x) * (grad + grad_new), 1) / 2
                + h / 4 * np.sum(grad**2 - grad_new**2, 1)
            )
            self.x = moved
            self.resample(offset)
        else:  # weigh, resample, move
            self.weigh(energy - Mixture.energy_and_gradients(new, x)[0])
            self.resample(offset)
            x = self.x
            energy, grad, _ = Mixture.energy_and_gradients(new, x)
            proposal = x - h * grad + np.sqrt(2 * h) * xi
            energy_new, grad_new, _ = Mixture.energy_and_gradients(new, proposal)
            forward = np.sum((proposal - x + h * grad) ** 2, 1) / (4 * h)
            backward = np.sum((x - proposal + h * grad_new) ** 2, 1) / (4 * h)
            accepted = np.log(uniform) < energy - energy_new + forward - backward
            self.x = np.where(accepted[:, None], proposal, x)

    def weigh(self, log_increment):
        log_weights = self.log_weights + log_increment
        self.log_evidence += logsumexp(log_weights)
        self.log_weights = log_weights - logsumexp(log_weights)
        self.ess = 1 / np.sum(np.exp(2 * self.log_weights))

    def resample(self, offset):
        if self.ess < self.threshold * len(self.x):
            self.x = self.x[systematic_ancestors(np.exp(self.log_weights), offset)]
            self.log_weights = np.full(len(self.x), -np.log(len(self.x)))
            self.num_resampled += 1


@pytest.mark.parametrize(("kernel", "optim"), [("ula", "adam"), ("mala", "sgd")])
def test_with_an_explicit_optimiser_it_is_the_papers_algorithm(kernel, optim):
    num, h, steps, threshold = 40, 0.2, 12, {"ula": 0.8, "mala": 0.9}[kernel]
    with jax.enable_x64(True):
        moves = {"ula": ULA(h, target=None), "mala": MALA(h, target=None, preconditioning=preconditioners.none)}[kernel]
        optimizer = SMCOptimizer(
            mixture,
            {"adam": optax.adam(0.1), "sgd": optax.sgd(0.3)}[optim],
            kernel=moves,
            num_particles=num,
            ess_threshold=threshold,
            partition=one_block,
        )
        y = jnp.asarray(OBSERVED)
        state = optimizer.init(random.key(0), y)
        theta = np.concatenate([state.theta["m"], [state.theta["s"]]])
        np.testing.assert_array_equal(theta, [1.0, -0.5, 0.3])
        np.testing.assert_array_equal(state.log_weights, -np.log(num) * np.ones((num, 1)))
        rule = {"adam": Adam(0.1), "sgd": Descent(0.3)}[optim]
        plain = PlainAlgorithm(theta, np.asarray(state.points.x), rule, kernel, h, threshold)
        start = float(state.log_evidence_start)

        for _ in range(steps):
            # The update splits its key into: what follows, the move, the objective, one per block.
            keys = random.split(state.rng_key, 4)
            noise = draw_random_numbers(keys[1], state.points.x, int(kernel == "mala"))
            uniform = np.asarray(noise.uniform[:, 0]) if kernel == "mala" else None
            plain.step(np.asarray(noise.normal), uniform, float(random.uniform(keys[3], (), jnp.float64)))
            state, loss = optimizer.update(state, y)

            close = lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-9)  # noqa: E731
            close(np.concatenate([state.theta["m"], [state.theta["s"]]]), plain.theta)
            close(state.params["m"], plain.theta[:2])
            close(state.points.x, plain.x)
            close(state.points.terms.sum(1), Mixture.energy_and_gradients(plain.theta, plain.x)[0])
            close(state.points.grad, Mixture.energy_and_gradients(plain.theta, plain.x)[1])
            close(state.log_weights[:, 0], plain.log_weights)
            close(state.diagnostics["ess"] * num, plain.ess)
            close(state.log_evidence_change, plain.log_evidence)
            close(loss, -(start + plain.log_evidence))
    assert 0 < plain.num_resampled < steps  # both branches were taken


# The default: balanced groups y_ij ~ N(x_i, sigma), x_i ~ N(mean, sd), whose maximum has a closed form.


def groups(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", y.shape[1]):
        x = numpyro.sample("x", dist.Normal(mean, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(x, sigma), obs=y)


def test_default_reaches_the_closed_form_maximum_with_blocks_and_jointly():
    """Bounds: the project's goals, 0.005 nats and 0.07 standard errors. 20 groups of 4; the start is far away."""
    m, n = 4, 20
    rng = np.random.default_rng(1)
    y = 50 + 6 * rng.normal(size=n) + 3 * rng.normal(size=(m, n))
    exact, standard_errors = random_intercepts_fit(y)
    best = random_intercepts_log_likelihood(y, **exact)
    data = jnp.asarray(y, jnp.float32)
    for partition in (find_blocks, one_block):
        result = SMCOptimizer(groups, partition=partition, num_particles=128).run(
            random.key(3), 600, data, progress_bar=False
        )
        assert result.state.blocks.num_blocks == (n if partition is find_blocks else 1)
        assert result.status is Status.FINISHED
        found = {name: float(value) for name, value in result.params.items()}
        assert random_intercepts_log_likelihood(y, **found) > best - 0.005, found
        for name in exact:
            assert abs(found[name] - exact[name]) < 0.07 * standard_errors[name], (name, found, exact)
        # The running log evidence is that of the last iterate. Its error: at most that of as many independent weighings
        # as there were updates, each with the variance that its ESS shows.
        last = {name: float(value[-1]) for name, value in result.trajectory.items()}
        assert abs(-result.losses[-1] - random_intercepts_log_likelihood(y, **last)) < 1.0


# One small model, compiled once, in double precision.


def shifted(y, shift):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    numpyro.factor("shift", shift)


SMALL = np.array([1.0, 2.0, 4.5])


def test_log_evidence_shifts_exactly_and_chunks_and_bars_change_nothing(monkeypatch, capfd):
    with jax.enable_x64(True):
        optimizer = SMCOptimizer(
            shifted, optax.adam(0.05), kernel=RandomWalk(), num_particles=30, partition=one_block, ess_threshold=0.95
        )
        run = lambda shift, bar=False: optimizer.run(  # noqa: E731
            random.key(0), 23, jnp.asarray(SMALL), shift, progress_bar=bar
        )
        plain, other = run(0.0), run(-7.5)
        assert plain.diagnostics["num_resampled"].sum() > 0
        np.testing.assert_allclose(other.losses - plain.losses, 7.5, rtol=0, atol=1e-9)
        np.testing.assert_allclose(other.state.points.x, plain.state.points.x, rtol=0, atol=1e-9)
        np.testing.assert_allclose(other.state.theta["mean"], plain.state.theta["mean"], rtol=0, atol=1e-9)

        with_bar = run(0.0, bar=True)
        assert "23/23" in capfd.readouterr().err
        monkeypatch.setattr(loop, "CHUNK", 5)
        del optimizer._programs._kept[("run", True)]
        in_chunks = run(0.0)
        for again in (with_bar, in_chunks):
            jax.tree.map(np.testing.assert_array_equal, plain._replace(state=None), again._replace(state=None))
            np.testing.assert_array_equal(plain.state.points.x, again.state.points.x)
            np.testing.assert_array_equal(random.key_data(plain.state.rng_key), random.key_data(again.state.rng_key))


# A fixed path through the whole object


def test_running_log_evidence_is_unbiased_on_a_fixed_path_with_every_resampling_scheme():
    """Blocks, HMC, resampling; from exact draws of the posterior at theta = 0 to theta = 1."""
    num, steps, replicates = 24, 4, 250
    settings = {"num_particles": num, "kernel": HMC(0.7, target=None), "ess_threshold": 0.95}
    y = jnp.asarray(SMALL, jnp.float32)
    first = SMCOptimizer(shifted, fixed_steps(1 / steps), **settings).init(random.key(0), y, 0.0)
    assert first.blocks.num_blocks == 3
    shape = (len(SCHEMES), replicates)
    precision = 1.0 + 1 / 0.25
    draws = y / 0.25 / precision + random.normal(random.key(2), (*shape, num, 3)) / np.sqrt(precision)
    terms = jnp.concatenate([(draws**2 + np.log(2 * np.pi)) / 2, 2 * (y - draws) ** 2 + np.log(np.pi / 2) / 2], -1)
    terms = jnp.concatenate([terms, jnp.zeros((*shape, num, 1))], -1)
    points = first.points._replace(x=draws, terms=terms, grad=draws - 4 * (y - draws))
    one = jax.tree.map(lambda v: v[0, 0], points)
    again = jax.vmap(evaluator(make_target(shifted, (y, 0.0), {}), first.theta))(one.x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4), one, again)

    def run(which, points, key):
        scheme = lambda key, log_weights: jax.lax.switch(which, SCHEMES, key, log_weights)  # noqa: E731
        optimizer = SMCOptimizer(shifted, fixed_steps(1 / steps), resampling=scheme, **settings)
        state = first._replace(points=points, rng_key=key)
        state = jax.lax.fori_loop(0, steps, lambda _, state: optimizer.update(state, y, 0.0)[0], state)
        weights = jnp.exp(state.blocks.to_coordinates(state.log_weights))
        means = jnp.sum(weights * state.points.x, 0)
        return jnp.exp(state.log_evidence_change), means, state.theta["mean"], state.diagnostics["num_resampled"]

    runs = compile_tuned(jax.vmap(jax.vmap(run, in_axes=(None, 0, 0))))
    found = runs(jnp.arange(len(SCHEMES)), points, random.split(random.key(1), shape))
    evidence, means, theta, num_resampled = map(np.asarray, found)
    np.testing.assert_allclose(theta, 1.0, rtol=1e-6)
    assert np.all(num_resampled.mean(1) > 0.5)
    exact = np.exp(np.sum(SMALL**2 - (SMALL - 1) ** 2) / (2 * 1.25))
    error = evidence.std(1) / np.sqrt(replicates)
    assert np.all(error < 0.05 * exact)
    assert np.all(abs(evidence.mean(1) - exact) < STANDARD_ERRORS * error), (evidence.mean(1), exact, error)
    exact_means = (1.0 + SMALL / 0.25) / precision
    weighted = means * evidence[..., None] / exact  # blocks are independent, so the whole evidence serves each of them
    error = weighted.std(1) / np.sqrt(replicates)
    assert np.all(abs(weighted.mean(1) - exact_means) < STANDARD_ERRORS * error)


# What it survives


def truncated():
    """N(0, 1) on x < c, as an energy that is NaN beyond; the prior cannot be sampled."""
    c = numpyro.param("c", 2.0)
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.factor("energy", jnp.where(x < c, -(x**2) / 2, jnp.nan))


def test_particles_without_a_finite_energy_are_survived_and_counted_and_an_improper_start_is_relative():
    num, steps = 4000, 8
    optimizer = SMCOptimizer(
        truncated, fixed_steps(-0.25), kernel=RandomWalk(1.0), num_particles=num, ess_threshold=1.0
    )
    state = optimizer.init(random.key(0))
    x = np.asarray(state.points.x[:, 0])
    assert bool(state.relative) and float(state.log_evidence_start) == 0.0
    cdf = lambda c: dist.Normal().cdf(c)  # noqa: E731
    density = lambda c: np.exp(-(c**2) / 2) / np.sqrt(2 * np.pi)  # noqa: E731
    assert abs(x.mean() + density(2.0) / cdf(2.0)) < STANDARD_ERRORS * x.std() / np.sqrt(num)
    with pytest.warns(UserWarning, match="not finite for [0-9]+ particles"):
        result = optimizer.run(random.key(0), steps, init_state=state, progress_bar=False)
    path = 2.0 - 0.25 * np.arange(steps + 1)
    survive = np.asarray(cdf(path[1:]) / cdf(path[:-1]))
    lost = np.asarray(result.diagnostics["num_nonfinite"])
    np.testing.assert_allclose(lost, num * (1 - survive), atol=5 * np.sqrt(num * (1 - survive).max()))
    np.testing.assert_allclose(result.diagnostics["ess"][0], survive[0], atol=0.02)
    # Were the clouds independent, the error of log Z would be sqrt(sum (1 - p) / (p N)) = 0.015.
    error = np.sqrt(np.sum((1 - survive) / survive) / num)
    assert abs(-result.losses[-1] - np.log(cdf(path[-1]) / cdf(2.0))) < STANDARD_ERRORS * error
    for leaf in jax.tree.leaves((result.params, result.state.points, result.losses)):
        assert np.all(np.isfinite(leaf))
    assert np.all(np.asarray(result.state.points.x) < path[-1])
    assert result.status is Status.FINISHED


def below(c):
    """`truncated` with a bound that is data."""
    mean = numpyro.param("mean", 0.0)
    x = numpyro.sample("x", dist.Normal(mean, 1.0))
    numpyro.factor("bound", jnp.where(x < c, 0.0, jnp.nan))


def test_particles_lost_to_new_data_are_counted_once():
    optimizer = SMCOptimizer(below, optax.sgd(1e-3), kernel=RandomWalk(0.1), num_particles=200, ess_threshold=0.0)
    state = optimizer.init(random.key(0), 3.0)
    lost = int(np.sum(state.points.x[:, 0] >= 0.5))
    assert lost > 20
    state, _ = optimizer.update(state, 0.5)
    assert state.diagnostics["num_nonfinite"] == lost
    state, _ = optimizer.update(state, 0.5)
    assert state.diagnostics["num_nonfinite"] == 0


def test_a_start_that_tempering_cannot_finish_is_reported_at_the_users_line(monkeypatch):
    monkeypatch.setattr(tempering, "MAX_STAGES", 3)
    optimizer = SMCOptimizer(shifted, optax.sgd(1e-3), num_particles=16, ess_threshold=0.0)
    with pytest.warns(UserWarning, match=r"3 stages of tempering.*\(1 of 3 independent blocks.*init_params") as caught:
        state = optimizer.init(random.key(0), jnp.asarray([0.0, 0.1, 60.0], jnp.float32), 0.0)
    assert caught[0].filename == __file__
    # The energies are those of the temperature that was reached, so the next weights lead on from there.
    assert state.log_evidence_start > -(60.0**2) / 2.5
    new, _ = optimizer.update(state, jnp.asarray([0.0, 0.1, 60.0], jnp.float32), 0.0)
    assert new.log_evidence_change < -100


def test_an_optimiser_that_sends_theta_to_nan_is_refused_and_counted():
    step = lambda g, state, theta=None: (jnp.where(g[0] > -0.2, jnp.nan, -0.1 * g), state)  # noqa: E731
    optimizer = SMCOptimizer(
        shifted, optax.GradientTransformation(lambda theta: (), step), kernel=RandomWalk(0.3), num_particles=20,
        partition=one_block,
    )  # fmt: skip
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = optimizer.run(random.key(0), 150, jnp.asarray(SMALL), 0.0, progress_bar=False)
    assert any("updates were refused" in str(warning.message) for warning in caught)
    theta = np.concatenate([[0.0], result.trajectory["mean"]])
    assert np.all(np.isfinite(theta)) and np.all(np.isfinite(result.losses))
    refused = int(result.state.num_refused)
    assert refused == np.sum(np.diff(theta) == 0) and 5 < refused < 150
    assert abs(theta[-1] - SMALL.mean()) < 1.0  # it went on in between
    assert np.all(np.diff(theta) >= 0)  # steps against the rule were not taken
    assert (result.status is Status.WEIGHTS_COLLAPSED) == (refused > 150 / 4)


# Rounding


def million(z, y):
    slope = numpyro.param("slope", 0.0)
    x = numpyro.sample("x", dist.Normal(numpyro.param("mean", 0.0), 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x + slope * z, 1000.0), obs=y)


def test_ess_in_float32_agrees_with_float64_over_a_million_observations():
    rng = np.random.default_rng(0)
    z = rng.normal(size=1_000_000).astype(np.float32) + np.float32(0.5)
    y = (1000 * rng.normal(size=1_000_000)).astype(np.float32)
    optimizer = SMCOptimizer(
        million, fixed_steps(2.0), kernel=RandomWalk(0.3), num_particles=8, partition=one_block, ess_threshold=0.0
    )
    state = optimizer.init(random.key(0), z, y)
    new, _ = optimizer.update(state, z, y)
    assert new.points.terms.dtype == jnp.float32
    x, old_theta, theta = (
        jax.tree.map(lambda v: np.asarray(v, float), v) for v in (state.points.x, state.theta, new.theta)
    )
    assert theta["slope"] == 2.0 and theta["mean"] == 2.0

    def energy(theta, x):  # up to a constant
        residual = y - x[:, :1] - theta["slope"] * z.astype(float)
        return np.array([np.sum(r**2) for r in residual]) / 2e6 + (x[:, 0] - theta["mean"]) ** 2 / 2

    increment = energy(old_theta, x) - energy(theta, x)
    weights = np.exp(increment - increment.max())
    exact = weights.sum() ** 2 / np.sum(weights**2) / 8
    assert 0.2 < exact < 0.9
    np.testing.assert_allclose(new.diagnostics["ess"], exact, rtol=0.01)
    np.testing.assert_allclose(new.log_evidence_change, np.log(np.mean(np.exp(increment))), atol=0.01)

    # Totals first, differences after: noise that would fail the test above.
    target = make_target(million, (jnp.asarray(z), jnp.asarray(y)), {})
    total = jax.jit(lambda theta, x: jax.lax.map(lambda one: jnp.sum(target.terms(theta, one)), x))
    naive = np.asarray(total(state.theta, state.points.x), float) - np.asarray(total(new.theta, state.points.x), float)
    weights = np.exp(naive - naive.max())
    assert abs(weights.sum() ** 2 / np.sum(weights**2) / 8 / exact - 1) > 0.01


def test_gradients_of_single_particles_are_kept_only_where_they_are_short():
    """A network has more weights than the energy of a particle has numbers: its gradients are taken of the cloud."""

    def network():
        inner = numpyro.param("inner", 0.1 * random.normal(random.key(0), (40, 2)))
        outer = numpyro.param("outer", 0.1 * random.normal(random.key(1), (40, 40)))
        x = numpyro.sample("x", dist.Normal(0.0, 1.0).expand([2]).to_event(1))
        numpyro.factor("energy", -jnp.sum(jnp.tanh(outer @ jnp.tanh(inner @ x))))

    sizes = {"num_blocks": 1, "num_evaluations": 1}
    assert budget.carries_scores(16, 3, work=270, **sizes) and not budget.carries_scores(16, 1680, work=200, **sizes)
    assert make_target(network, (), {}).work(make_target(network, (), {}).initial_params(random.key(0), {})[1]) < 400
    reward = Reward(lambda sample: jnp.tanh(sample["x"][0]))
    state = SMCOptimizer(network, optax.sgd(0.1), reward, kernel=MALA(), num_particles=16).init(random.key(0))
    assert state.points.score is None


def test_joint_weights_have_more_particles():
    """Of the same work; the bias of weighted means is averaged out over independent blocks only."""

    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("groups", y.shape[1]):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
            with numpyro.plate("members", y.shape[0]):
                numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    def num_particles(num_groups, size):
        target = make_target(model, (np.zeros((size, num_groups), np.float32),), {})
        return SMCOptimizer(model)._num_particles_for(target, {"mean": jnp.zeros(())}, num_groups)

    assert (num_particles(1, 20_000), num_particles(100, 200)) == (128, 32)
