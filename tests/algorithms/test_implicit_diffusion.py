# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`ImplicitDiffusion` with Markov chains: against the published recursions in NumPy, closed forms and faults."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from compiling import compile_tuned
from jax import random
from oracles import balanced_groups

from numpyro_smcopt import ImplicitDiffusion, kernels
from numpyro_smcopt.objectives import EnergyBasedLikelihood, ForwardKL, ReverseKL, Reward
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.results import Status
from numpyro_smcopt.samplers import Chains
from numpyro_smcopt.theta_step import GradientFlow

pytestmark = pytest.mark.slow


def normal():
    mean = numpyro.param("mean", 0.3)
    numpyro.sample("x", dist.Normal(mean, 1.0))


def gaussian_energy():
    """Mean and scale, as an energy on a broad base measure."""
    mean = numpyro.param("mean", 0.0)
    log_scale = numpyro.param("log_scale", 0.0)
    x = numpyro.sample("x", dist.Normal(0.0, 5.0))
    numpyro.factor("energy", -0.5 * ((x - mean) * jnp.exp(-log_scale)) ** 2 + 0.5 * (x / 5.0) ** 2)


def groups(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("groups", y.shape[0]):
        b = numpyro.sample("b", dist.Normal(mean, 1.0))
        with numpyro.plate("rows", y.shape[1]):
            numpyro.sample("y", dist.Normal(b, 1.0), obs=y.T)


TUNING = Reward(lambda sample: sample["x"], kl_weight=0.5, kl=ReverseKL(reference_params={"mean": 0.0}))  # best at 2


@pytest.mark.parametrize("new_theta", [False, True])
def test_it_is_the_published_recursion(new_theta):
    """theta by the unweighted covariance with N - 1, particles by the gradient of the old or the new theta."""
    num, h, rate = 7, 0.2, 0.3
    with jax.enable_x64(True):
        sampler = Chains(kernels.ULA(h, target=None), moves_per_update=2, gradient_of_new_theta=new_theta)
        optimizer = ImplicitDiffusion(normal, optax.sgd(rate), TUNING, sampler=sampler, num_particles=num)
        state = optimizer.init(random.key(0))
        theta, x = float(state.theta["mean"]), np.asarray(state.points.x[:, 0])
        for _ in range(6):
            # F = -E[x] + 0.5 KL(model || N(0, 1)); U_theta - U_0 = -theta x + const, grad U = theta - x
            values = x - 0.5 * theta * x
            covariance = np.sum((values - values.mean()) * (theta - x)) / (num - 1)
            new = theta - rate * covariance
            key = random.split(state.rng_key, 3)[1]
            for k in range(2):
                xi = np.asarray(draw_random_numbers(random.fold_in(key, k), jnp.zeros((num, 1)), 0).normal)[:, 0]
                driving = new if new_theta or k else theta
                x = x - h * (x - driving) + np.sqrt(2 * h) * xi
            theta = new
            state, loss = optimizer.update(state)
            np.testing.assert_allclose(state.theta["mean"], theta, atol=1e-12)
            np.testing.assert_allclose(state.points.x[:, 0], x, atol=1e-12)
            np.testing.assert_allclose(state.points.grad[:, 0], x - theta, atol=1e-12)
            np.testing.assert_allclose(state.diagnostics["reward"], x.mean(), atol=1e-12)  # of the new theta


@pytest.mark.parametrize("sampler", [None, kernels.HMC(), Chains(kernels.ULA(0.05, target=None), moves_per_update=3)])
def test_reward_is_tuned_without_a_learning_rate(sampler):
    optimizer = ImplicitDiffusion(normal, objective=TUNING, sampler=sampler, num_particles=1000)
    result = optimizer.run(random.key(0), 250, progress_bar=False)
    assert result.status is Status.FINISHED
    assert abs(result.params["mean"] - 2.0) < 0.1
    assert abs(np.mean(result.diagnostics["reward"][-50:]) - 2.0) < 0.1
    samples = optimizer.get_samples(result.state)["x"]
    assert samples.shape == (1000,) and abs(samples.mean() - 2.0) < 0.2


def test_energy_based_likelihood_is_persistent_contrastive_divergence():
    data = (0.8 + 1.3 * np.random.default_rng(0).standard_normal(500)).astype(np.float32)
    optimizer = ImplicitDiffusion(gaussian_energy, objective=EnergyBasedLikelihood(data), num_particles=2000)
    result = optimizer.run(random.key(0), 300, progress_bar=False)
    assert abs(result.params["mean"] - data.mean()) < 0.1
    assert abs(np.exp(result.params["log_scale"]) - data.std()) < 0.1


WIDTH = 12
SIZES = (2, WIDTH, WIDTH, 1)


def network(weights, x):
    for k in range(2):
        x = jax.nn.silu(x @ weights[f"w{k}"] + weights[f"b{k}"])
    return (x @ weights["w2"])[..., 0] + weights["b2"]


def network_energy():
    """205 parameters, few enough for the Fisher information."""
    rng = np.random.default_rng(0)
    start = {f"w{k}": rng.standard_normal(SIZES[k : k + 2]) / np.sqrt(SIZES[k]) for k in range(3)}
    start |= {"b0": np.zeros(WIDTH), "b1": np.zeros(WIDTH), "b2": 0.0}
    weights = {name: numpyro.param(name, jnp.asarray(value, jnp.float32)) for name, value in start.items()}
    x = numpyro.sample("x", dist.Normal(0.0, 3.0).expand([2]).to_event(1))
    numpyro.factor("minus_energy", -network(weights, x))


def test_a_small_energy_network_is_trained_steadily():
    """Points around a circle: theta that runs ahead of the particles swings. Judged on a grid, log Z included."""
    angle = 2 * np.pi * np.arange(180) / 180
    circle, sd = 3.0 * np.stack([np.cos(angle), np.sin(angle)], 1), 0.25
    axis = 6 * (2 * (np.arange(120) + 0.5) / 120 - 1)
    grid = np.stack(np.meshgrid(axis, axis), -1)
    truth = np.mean([np.exp(-np.sum((grid - p) ** 2, -1) / (2 * sd**2)) for p in circle], 0) / (2 * np.pi * sd**2)

    def divergence(params):
        logs = -np.asarray(network(params, jnp.asarray(grid, jnp.float32)), float) - np.sum(grid**2, -1) / 18
        log_z = logs.max() + np.log(np.sum(np.exp(logs - logs.max())) * 0.1**2)
        return np.sum(truth * (np.log(np.maximum(truth, 1e-300)) - logs + log_z)) * 0.1**2

    rng = np.random.default_rng(1)
    data = (circle[rng.integers(180, size=1000)] + sd * rng.standard_normal((1000, 2))).astype(np.float32)
    optimizer = ImplicitDiffusion(network_energy, objective=EnergyBasedLikelihood(data), num_particles=200)
    state, found = optimizer.init(random.key(0)), []
    assert divergence(state.params) > 1.0
    for _ in range(4):
        state = optimizer.run(random.key(0), 100, init_state=state, progress_bar=False).state
        found.append(divergence(state.params))
    assert max(found[1:]) < 0.3 and found[-1] < 0.2, found


def test_marginal_likelihood_is_particle_gradient_descent():
    y = np.random.default_rng(1).normal(1.5, 1.3, (8, 3)).astype(np.float32)
    result = ImplicitDiffusion(groups).run(random.key(0), 300, y, progress_bar=False)
    assert abs(result.params["mean"] - balanced_groups(y, 1.0, 1.0)[0]) < 0.02


def test_time_scales_and_schedules():
    """In the particles' own time, theta falls by the ratio; the schedule slows both."""
    reward = Reward(lambda sample: 2.0 * sample["x"])  # gradient -2
    sampler = Chains(kernels.ULA(0.02, target=None), moves_per_update=2, schedule=lambda k: 1.0 / (1.0 + k))
    optimizer = ImplicitDiffusion(normal, GradientFlow(0.5), reward, sampler=sampler, num_particles=20_000)
    result = optimizer.run(random.key(0), 4, progress_bar=False)
    steps = np.diff(np.asarray(result.trajectory["mean"]), prepend=0.3)
    # The first step knows of no move yet.
    np.testing.assert_allclose(steps, 0.5 * 2.0 * 0.04 * np.array([0.0, 1.0, 1 / 2, 1 / 3]), atol=2e-3)


def test_particles_that_leave_for_infinity_are_counted_and_replaced():
    def steep():
        mean = numpyro.param("mean", 0.0)
        x = numpyro.sample("x", dist.Normal(0.0, 1.0))
        numpyro.factor("wall", -((x - mean) ** 4))

    optimizer = ImplicitDiffusion(
        steep,
        optax.sgd(1e-3),
        Reward(lambda sample: jnp.tanh(sample["x"])),
        sampler=kernels.ULA(2.0, target=None),
        num_particles=50,
    )
    with pytest.warns(UserWarning, match="not finite"):
        result = optimizer.run(random.key(0), 30, progress_bar=False)
    assert np.all(np.isfinite(result.losses)) and np.all(np.isfinite(result.state.points.x))
    assert result.diagnostics["num_nonfinite"].sum() > 0


def test_runs_are_pure_resumable_and_compile_once(tmp_path, compilations):
    make = lambda: ImplicitDiffusion(normal, optax.adam(0.1), TUNING, num_particles=32)  # noqa: E731
    optimizer = make()
    whole = optimizer.run(random.key(0), 60, progress_bar=False, checkpoint=tmp_path / "run", checkpoint_every=20)
    with compilations() as compiled:
        again = optimizer.run(random.key(0), 60, progress_bar=False)
    assert not compiled
    np.testing.assert_array_equal(whole.losses, again.losses)
    half = optimizer.run(random.key(0), 25, progress_bar=False)
    state = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, half.state._replace(rng_key=None))))
    rest = make().run(None, 35, init_state=state._replace(rng_key=half.state.rng_key), progress_bar=False)
    np.testing.assert_array_equal(np.concatenate([half.losses, rest.losses]), whole.losses)
    resumed = make().resume(tmp_path / "run", num_steps=70, progress_bar=False)
    np.testing.assert_array_equal(resumed.losses[:60], whole.losses)
    state, loss = optimizer.update(half.state)
    assert loss == whole.losses[25] and optimizer.evaluate(half.state) == half.losses[-1]


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ImplicitDiffusion(normal, sampler="ula"), TypeError, "sampler must be"),
        (lambda: ImplicitDiffusion(normal, num_particles=0), ValueError, "num_particles must be a positive integer"),
        (lambda: ImplicitDiffusion(normal, objective=3.0), TypeError, "objective must be"),
        (lambda: Chains(kernel="mala"), TypeError, "kernel must be"),
        (lambda: Chains(moves_per_update=0), ValueError, "moves_per_update"),
        (lambda: GradientFlow(-1.0), ValueError, "ratio must be positive"),
    ],
)
def test_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "objective", "message"),
    [
        (lambda: numpyro.factor("f", -numpyro.param("a", 1.0)), TUNING, "latent sites"),
        (lambda: groups(jnp.ones((2, 2))), TUNING, "site 'y' has observations"),
        (normal, Reward(lambda sample: sample["x"] * jnp.nan), "Reward is nan at the start"),
        (normal, Reward(lambda sample: sample["x"], 0.1, ForwardKL(np.ones((3, 2)))), "reference_samples of site 'x'"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_the_start(model, objective, message):
    with pytest.raises(ValueError, match=message):
        ImplicitDiffusion(model, objective=objective, num_particles=8).init(random.key(0))


def by_label(label, y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("groups", 3):
        b = numpyro.sample("b", dist.Normal(mean, 1.0))
    with numpyro.plate("data", len(label)):
        numpyro.sample("y", dist.Normal(b[label], 1.0), obs=y)


def test_data_of_another_grouping_are_refused_and_the_right_ones_go_on():
    """The groups were found to be independent, and with other labels moves would be accepted for the wrong ones."""
    label, y = np.repeat(np.arange(3), 4), np.random.default_rng(0).standard_normal(12).astype(np.float32)
    optimizer = ImplicitDiffusion(by_label, num_particles=8)
    state = optimizer.init(random.key(0), label, y)
    with pytest.raises(ValueError, match="latents depend on one another in another way"):
        optimizer.update(state, np.roll(label, 1), y)
    jitted = compile_tuned(optimizer.update)
    disturbed, loss = jitted(state, np.roll(label, 1), y)
    assert np.isnan(loss)
    for a, b in zip(*(jax.tree.leaves(jitted(s, label, y)[0].points) for s in (disturbed, state)), strict=True):
        np.testing.assert_array_equal(a, b)
