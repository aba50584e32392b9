# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Objectives: what is masked, refused and declared by a user; their gradients are compared in `test_contracts`."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from quartics import (
    EXACT_LOSSES,
    GRID,
    THETA,
    bump,
    estimates,
    exact_clouds,
    expect,
    loss_and_gradient,
    model,
    reference_quantiles,
)
from scipy.special import logsumexp

from numpyro_smcopt import SMCOptimizer, kernels
from numpyro_smcopt.objectives import (
    Cloud,
    EnergyBasedLikelihood,
    ForwardKL,
    Objective,
    ReverseKL,
    Reward,
    Scene,
    expectation,
)
from numpyro_smcopt.potential import make_target
from numpyro_smcopt.weights import weighted_mean

pytestmark = pytest.mark.slow


def normal():
    mean = numpyro.param("mean", 0.0)
    numpyro.sample("x", dist.Normal(mean, 1.0))


def observed(y):
    mean = numpyro.param("mean", 0.0)
    x = numpyro.sample("x", dist.Normal(mean, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def two_sites():
    mean = numpyro.param("mean", 0.0)
    numpyro.sample("a", dist.Normal(mean, 1.0))
    numpyro.sample("b", dist.Normal(mean, 1.0))


class Spread(Objective):
    """Variance of the latent, which is not linear in the law."""

    def estimate(self, scene, cloud):
        x = scene.samples(cloud.x)["x"]
        return expectation((x - weighted_mean(cloud.log_weights[:, 0], x)) ** 2, cloud)


def variance(theta):
    return expect(theta, GRID**2) - expect(theta, GRID) ** 2


def test_an_objective_of_a_user_is_a_small_class():
    gradients, _ = map(np.asarray, estimates(Spread(), *exact_clouds(random.key(0), 200, 2000)))
    exact = (variance(THETA + 1e-4) - variance(THETA - 1e-4)) / 2e-4
    assert abs(gradients.mean() - exact) < 4 * gradients.std() / np.sqrt(200)
    assert abs(exact) > 0.1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_particles_without_a_finite_reward_are_left_out(bad):
    """As if the law were cut off there."""
    x, log_weights = exact_clouds(random.key(1), 20, 2000)
    cut = Reward(lambda sample: jnp.where(sample["x"] > 1.5, bad, bump(sample)))
    masked = estimates(cut, x, log_weights)
    without = estimates(Reward(bump), x, jnp.where(x > 1.5, -jnp.inf, log_weights))
    assert np.mean(x > 1.5) > 0.02
    np.testing.assert_allclose(masked[0], without[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(masked[1], without[1], rtol=1e-5)


def test_a_large_constant_reward_changes_nothing():
    """Centred twice: float32 keeps three digits of the reward beside 1e4, and all of its covariance's sign."""
    clouds = exact_clouds(random.key(2), 200, 500)
    plain, _ = map(np.asarray, estimates(Reward(bump), *clouds))
    shifted, _ = map(np.asarray, estimates(Reward(lambda sample: bump(sample) + 1e3), *clouds))
    np.testing.assert_allclose(shifted, plain, atol=2e-4)


def test_function_of_a_sample_is_minimised_in_expectation():
    loss_fn = lambda sample: (sample["x"] - 1.5) ** 2  # noqa: E731
    result = SMCOptimizer(normal, objective=loss_fn, kernel=kernels.MALA()).run(random.key(0), 150, progress_bar=False)
    assert abs(result.params["mean"] - 1.5) < 0.05
    assert abs(result.losses[-1] - 1.0) < 0.2  # what is left is the variance


def test_energy_based_likelihood_fits_a_normal_and_knows_its_loss():
    data = (0.8 + 1.3 * np.random.default_rng(0).standard_normal(500)).astype(np.float32)

    def gaussian():
        mean = numpyro.param("mean", 0.0)
        log_scale = numpyro.param("log_scale", 0.0)
        x = numpyro.sample("x", dist.Normal(0.0, 5.0))
        numpyro.factor("energy", -0.5 * ((x - mean) * jnp.exp(-log_scale)) ** 2 + 0.5 * (x / 5.0) ** 2)

    optimizer = SMCOptimizer(gaussian, objective=EnergyBasedLikelihood(data), kernel=kernels.MALA(), num_particles=4000)
    result = optimizer.run(random.key(0), 200, progress_bar=False)
    assert abs(result.params["mean"] - data.mean()) < 0.05
    assert abs(np.exp(result.params["log_scale"]) - data.std()) < 0.05
    best = np.log(data.std()) + 0.5 * np.log(2 * np.pi) + 0.5
    # The start knows log Z up to about sqrt(stages / N) = 0.03.
    assert abs(np.mean(result.losses[-20:]) - best) < 0.1


def test_loss_belongs_to_the_theta_it_is_recorded_with():
    """One step late, the reward of theta' would stand beside theta; theta moves by 0.2 per update here."""
    optimizer = SMCOptimizer(
        normal, optax.sgd(0.2), objective=Reward(lambda sample: sample["x"]), kernel=kernels.MALA(), num_particles=4000
    )
    result = optimizer.run(random.key(0), 20, progress_bar=False)
    means = np.asarray(result.trajectory["mean"])
    assert np.all(np.diff(means[1:]) > 0.15)
    assert np.max(np.abs(result.diagnostics["reward"] - means)) < 0.1
    np.testing.assert_allclose(result.losses, -result.diagnostics["reward"])


def test_unstable_first_step_of_an_unadjusted_kernel_is_rescued():
    """Two modes of sd 0.1 that no particle leaves: a step five times beyond stability must not cost a mode."""

    def narrow():
        logit = numpyro.param("logit", 0.0)
        components = dist.Normal(jnp.array([-2.0, 2.0]), 0.1)
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logit * jnp.array([0.0, 1.0])), components))

    draws = np.random.default_rng(0).choice([-2.0, 2.0], 2000) + 0.1 * np.random.default_rng(1).standard_normal(2000)
    reward = Reward(lambda sample: jnp.where(sample["x"] > 0, 1.0, 0.0), 0.5, ForwardKL(draws))
    # The share of the particles that start in a mode is the share that stays: its error is 0.5 / sqrt(N) = 0.0056.
    optimizer = SMCOptimizer(narrow, optax.adam(0.1), reward, kernel=kernels.ULA(0.1), num_particles=8000)
    result = optimizer.run(random.key(0), 150, progress_bar=False)
    assert result.diagnostics["acceptance_rate"][0] == 0.0 and result.diagnostics["acceptance_rate"][-1] == 1.0
    q = np.mean(draws > 0)  # p = 0.5 q / (nu - 1) with 0.5 q / (nu - 1) + 0.5 (1 - q) / nu = 1
    nu = np.max(np.roots([1.0, -1.5, 0.5 * (1 - q)]))
    assert abs(jax.nn.sigmoid(result.params["logit"]) - 0.5 * q / (nu - 1)) < 0.02
    assert abs(result.losses[-1] - result.losses[-30]) < 0.05


def test_data_are_no_constants_of_the_program(compilations):
    """A batch is drawn anew at every update, and the state goes on under other data after one look at them."""
    data = np.random.default_rng(0).standard_normal(300).astype(np.float32)
    first = SMCOptimizer(normal, optax.sgd(0.1), EnergyBasedLikelihood(data, batch_size=50), kernel=kernels.MALA())
    result = first.run(random.key(0), 5, progress_bar=False)
    with compilations() as compiled:
        first.run(random.key(1), 5, progress_bar=False)
    assert not compiled
    shifted = SMCOptimizer(normal, optax.sgd(0.1), EnergyBasedLikelihood(data + 3.0), kernel=kernels.MALA())
    moved = shifted.run(None, 60, init_state=result.state, progress_bar=False)
    assert abs(moved.params["mean"] - 3.0 - data.mean()) < 0.3


def test_warns_of_masked_particles():
    reward = Reward(lambda sample: jnp.where(sample["x"] > 1.0, jnp.nan, sample["x"]))
    optimizer = SMCOptimizer(normal, optax.sgd(0.1), reward, kernel=kernels.MALA(), num_particles=100)
    with pytest.warns(UserWarning, match="NaN or infinite at [0-9]+ particles"):
        result = optimizer.run(random.key(0), 3, progress_bar=False)
    assert np.all(result.diagnostics["num_masked"] > 0) and np.all(np.isfinite(result.losses))


# Bad input


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Reward(3.0), TypeError, "reward_fn must be a function"),
        (lambda: Reward(bump, kl_weight=0.1), ValueError, "no reference"),
        (lambda: Reward(bump, kl_weight=-1.0, kl=ForwardKL(np.ones(3))), ValueError, "kl_weight"),
        (lambda: Reward(bump, kl_weight=0.1, kl="reverse"), TypeError, "kl must be"),
        (lambda: ForwardKL(None), ValueError, "reference_samples"),
        (lambda: ForwardKL(np.array([0.0, np.nan])), ValueError, "reference_samples holds 1"),
        (lambda: ForwardKL({"x": np.ones(3), "y": np.ones(4)}), ValueError, "as many for every site"),
        (lambda: ReverseKL(), ValueError, "either reference_energy"),
        (lambda: ReverseKL(reference_energy=1.0), TypeError, "reference_energy must be a function"),
        (lambda: EnergyBasedLikelihood("data"), TypeError, "data must be an array"),
        (lambda: EnergyBasedLikelihood(np.zeros((0, 2))), ValueError, "at least one sample"),
        (lambda: EnergyBasedLikelihood(np.ones(3), batch_size=0), ValueError, "batch_size"),
        (lambda: SMCOptimizer(normal, objective="reward"), TypeError, "objective must be"),
    ],
)
def test_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model_fn", "objective", "message"),
    [
        (lambda: observed(0.3), Reward(bump), "site 'y' has observations"),
        (lambda: observed(0.3), EnergyBasedLikelihood(np.ones(3)), "site 'y' has observations"),
        (lambda: numpyro.factor("f", numpyro.param("a", 1.0)), Reward(bump), "latent sites"),
        (normal, Reward(lambda sample: jnp.ones(2) * sample["x"]), r"reward_fn must return one number.*\(2,\)"),
        (normal, Reward(bump, 0.1, ReverseKL(lambda sample: jnp.ones(2))), "reference_energy must return one number"),
        (normal, Reward(bump, 0.1, ReverseKL(reference_params={"other": 1.0})), r"reference_params must hold.*'mean'"),
        (normal, Reward(bump, 0.1, ReverseKL(reference_params={"mean": np.ones(2)})), r"reference_params\['mean'\]"),
        (normal, EnergyBasedLikelihood({"z": np.ones(3)}), r"data has the sites \['z'\]"),
        (normal, EnergyBasedLikelihood(np.ones((3, 2))), "data of site 'x' has shape"),
        (two_sites, EnergyBasedLikelihood(np.ones(3)), "data is one array"),
        (normal, Reward(lambda sample: jnp.nan * sample["x"]), "Reward is nan at the start"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_the_start(model_fn, objective, message):
    optimizer = SMCOptimizer(model_fn, objective=objective, kernel=kernels.MALA(), num_particles=10)
    with pytest.raises(ValueError, match=message):
        optimizer.init(random.key(0))


def test_factors_are_no_observations():
    assert np.isfinite(
        SMCOptimizer(model, optax.sgd(0.1), Reward(bump), kernel=kernels.MALA(), num_particles=50)
        .init(random.key(0))
        .diagnostics["loss"]
    )


def test_gradient_descends_the_divergence():
    """The sign: against the gradient of the forward divergence, the divergence falls."""
    loss, gradient = loss_and_gradient("forward_kl")
    estimated = float(np.mean(estimates(ForwardKL(reference_quantiles()), *exact_clouds(random.key(3), 50, 2000))[0]))
    assert np.sign(estimated) == np.sign(gradient)
    assert EXACT_LOSSES["forward_kl"](THETA - 0.05 * estimated) < loss - 1e-3


HEXAGON = 4.0 * np.stack([np.cos(np.pi / 3 * np.arange(6)), np.sin(np.pi / 3 * np.arange(6))], 1)
LOGITS = np.tile([1.5, 0.0], 3)
SHARES = np.exp(LOGITS) / np.exp(LOGITS).sum()


def hexagon():
    logits = numpyro.param("logits", jnp.asarray(LOGITS, jnp.float32))
    components = dist.Normal(jnp.asarray(HEXAGON, jnp.float32), 1.0).to_event(1)
    numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), components))


def hexagon_draws(sd, num=100_000):
    rng = np.random.default_rng(0)
    return HEXAGON[rng.choice(6, p=SHARES, size=num)] + sd * rng.standard_normal((num, 2))


def hexagon_log_density(x, sd):
    square = np.sum((x[:, None] - HEXAGON) ** 2, -1)
    return logsumexp(np.log(SHARES) - square / (2 * sd**2), 1) - np.log(2 * np.pi * sd**2)


@pytest.mark.parametrize(("sd", "divergence"), [(1.0, 0.0), (2.0, 0.9116)])
def test_forward_divergence_knows_the_variance_of_its_reference(sd, divergence):
    """The model as its own reference has none; with twice the standard deviation it is known by quadrature."""
    target, theta = make_target(hexagon, (), {}), {"logits": jnp.asarray(LOGITS, jnp.float32)}
    draws = hexagon_draws(sd)
    scene = Scene(target, theta, jnp.asarray(draws, jnp.float32), random.key(0))
    cloud = Cloud(jnp.zeros((2, 2)), jnp.zeros((2, 1)), jnp.zeros((2, 2)), jnp.full((2, 1), -np.log(2)), None)
    excess = float(ForwardKL(draws).estimate(scene, cloud).loss) + hexagon_log_density(draws, sd).mean()
    gaps = hexagon_log_density(draws, sd) - hexagon_log_density(draws, 1.0)
    assert abs(excess - divergence) < 4 * gaps.std() / np.sqrt(len(gaps)) + 1e-4


def test_energies_far_from_every_component_are_those_of_a_sum_of_logarithms():
    """Where the densities of the components underflow, in single precision beyond a distance of 14."""
    target, theta = make_target(hexagon, (), {}), {"logits": jnp.asarray(LOGITS, jnp.float32)}
    far = np.array([[40.0, 30.0], [0.0, -1000.0]])
    energy, grad = jax.vmap(jax.value_and_grad(lambda x: target.energy_of(theta, {"x": x})))(jnp.asarray(far))
    np.testing.assert_allclose(energy, -hexagon_log_density(far, 1.0), rtol=1e-5)
    assert np.all(np.isfinite(grad)) and np.all(np.linalg.norm(grad, axis=1) > 40)


def test_pickled_objective_optimises_alike():
    objective = Reward(bump, 0.5, ReverseKL(reference_params={"theta": 0.2}))
    again = pickle.loads(pickle.dumps(objective))
    jax.tree.map(np.testing.assert_array_equal, objective.arrays, again.arrays)
    assert again.kl_weight == 0.5
