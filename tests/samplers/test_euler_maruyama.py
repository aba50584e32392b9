# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Diffusions in finitely many steps: their gradients against forward sensitivities and closed forms, and faults."""

import re

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from compiling import compile_fast, compile_tuned
from jax import random
from jax.flatten_util import ravel_pytree
from numpyro.contrib.module import flax_module

from numpyro_smcopt import ImplicitDiffusion, SMCOptimizer
from numpyro_smcopt.objectives import ForwardKL, PathKL, Reward
from numpyro_smcopt.random_numbers import draw_normals
from numpyro_smcopt.samplers import EulerMaruyama, Gradient, Paths
from numpyro_smcopt.samplers.paths import Dynamics, Ends, Grid, backward, checkpointed_backward, simulate

pytestmark = pytest.mark.slow

# The recursion by itself, with a random drift network


def net(theta, t, y):
    return theta["b"] @ jnp.tanh(theta["a"] @ y + theta["c"] * t) - 0.3 * y


def random_theta(seed):
    keys = random.split(random.key(seed), 3)
    return {
        "a": random.normal(keys[0], (5, 2)) / 2,
        "b": random.normal(keys[1], (2, 5)) / 2,
        "c": random.normal(keys[2], (5,)),
    }


def grid(num):
    times = np.linspace(0.0, 1.0, num + 1) ** 1.5
    noise = 0.5 + times[:-1]
    return Grid(jnp.arange(num), *(jnp.asarray(v) for v in (times[:-1], np.diff(times), noise)))


def reward(y):
    return jnp.sin(y[0]) * jnp.exp(-0.1 * y[1] ** 2)


def ends_of_adjoint(beta, y, cost):
    num = y.shape[0]
    adjoint = jax.grad(lambda y: -jnp.mean(jax.vmap(reward)(y)))(y)
    return Ends(adjoint, None, jnp.full(num, beta / num)), -jnp.mean(jax.vmap(reward)(y)) + beta * jnp.mean(cost)


@pytest.mark.parametrize("num_steps", [1, 7, 12])
def test_adjoint_is_the_forward_sensitivity(num_steps):
    """Equal to the derivative of the recursion, carried forward, to 1e-10 in double precision."""
    beta = 0.7
    with jax.enable_x64(True):
        theta, pretrained = random_theta(0), random_theta(1)
        dynamics = Dynamics(net, lambda t, y: net(pretrained, t, y), grid(num_steps))
        y, key = random.normal(random.key(2), (6, 2)), random.key(3)

        def loss(theta):
            """The spec's formulas, step by step."""
            here, cost = y, 0.0
            for t in range(num_steps):
                time, h, sigma = (leaf[t] for leaf in dynamics.grid[1:])
                drift = jax.vmap(lambda one: net(theta, time, one))(here)  # noqa: B023
                gap = drift - jax.vmap(lambda one: net(pretrained, time, one))(here)  # noqa: B023
                cost = cost + h / (2 * sigma**2) * jnp.sum(gap**2, 1)
                xi = draw_normals(random.fold_in(key, t), here.shape, here.dtype)
                here = here + h * drift + sigma * jnp.sqrt(h) * xi
            return jnp.mean(beta * cost - jax.vmap(reward)(here))

        flat, unravel = ravel_pytree(theta)
        exact, forward = loss(theta), jax.jacfwd(lambda t: loss(unravel(t)))(flat)

        @compile_fast
        def stored(theta):
            end, path, cost = simulate(dynamics, theta, y, key)
            ends, value = ends_of_adjoint(beta, end, cost)
            return backward(dynamics, theta, path, key, ends), value

        @compile_fast
        def checkpointed(theta):
            return checkpointed_backward(dynamics, theta, y, key, lambda *a: ends_of_adjoint(beta, *a))

        for found in (stored, checkpointed):
            gradient, value = found(theta)
            np.testing.assert_allclose(value, exact, rtol=1e-12)
            np.testing.assert_allclose(ravel_pytree(gradient)[0], forward, rtol=1e-9, atol=1e-12)


def test_checkpoints_are_few():
    """The memory of a simulation and its gradient grows like the root of the number of steps."""

    def largest(num_steps):
        dynamics = Dynamics(net, None, grid(num_steps))
        y = jax.ShapeDtypeStruct((1000, 2), jnp.float32)
        ends_of = lambda *a: ends_of_adjoint(0, *a)  # noqa: E731
        program = jax.make_jaxpr(lambda theta, y: checkpointed_backward(dynamics, theta, y, random.key(0), ends_of))
        return max(int(found) for found in re.findall(r"f32\[(\d+),1000,2\]", str(program(random_theta(0), y))))

    assert largest(100) == 10 and largest(101) == 11


def test_at_the_reference_the_path_divergence_and_its_gradient_vanish():
    theta = random_theta(0)
    dynamics = Dynamics(net, lambda t, y: net(theta, t, y), grid(5))
    y = random.normal(random.key(2), (6, 2))
    end, path, cost = simulate(dynamics, theta, y, random.key(3))
    np.testing.assert_array_equal(cost, 0.0)
    ends = Ends(jnp.zeros_like(end), None, jnp.ones(6))
    for leaf in jax.tree.leaves(backward(dynamics, theta, path, random.key(3), ends)):
        np.testing.assert_array_equal(leaf, 0.0)


# The sampler: Y_0 ~ N(0, 1), drift theta - y; the end is normal with known mean, and the path divergence is known.

TIMES = np.linspace(0.0, 1.0, 11)
SIGMA, REFERENCE = 0.8, 0.5


def linear():
    theta = numpyro.param("theta", 1.2)
    return lambda t, y: theta - y


MEAN_SLOPE = 1 - (1 - 0.1) ** 10  # d E[Y_T] / d theta
OBJECTIVE = Reward(lambda sample: sample["y"], 0.3, PathKL(reference_params={"theta": REFERENCE}))


def exact_loss(theta):
    return -theta * MEAN_SLOPE + 0.3 * (theta - REFERENCE) ** 2 / (2 * SIGMA**2)


def sampler(**settings):
    return EulerMaruyama(TIMES, dist.Normal(0.0, 1.0), SIGMA, **settings)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"paths": Paths.CHECKPOINTED},
        {"paths": Paths.STORED},
        {"paths": Paths.STORED, "num_batches": 5},
        {"gradient": Gradient.SCORE_FUNCTION},
        {"gradient": Gradient.SCORE_FUNCTION, "paths": Paths.CHECKPOINTED},
        {"gradient": Gradient.SCORE_FUNCTION, "paths": Paths.STORED, "num_batches": 2},
    ],
    ids=str,
)
def test_gradients_are_unbiased(settings):
    """Batches of eight, so that a covariance that divides by N would be off by an eighth; theta stands still."""
    optimizer = ImplicitDiffusion(linear, optax.sgd(0.0), OBJECTIVE, sampler=sampler(**settings), num_particles=8)
    state = optimizer.init(random.key(0))

    @compile_tuned
    def many(state):
        def body(state, _):
            state, loss = optimizer.update(state)
            return state, (state.assessed.gradient[0], loss)

        return jax.lax.scan(body, state, None, length=4000)[1]

    gradients, losses = map(np.asarray, many(state))
    batches = gradients.reshape(-1, 10).mean(1)  # the batches of a queue are independent, whatever their order
    exact = (exact_loss(1.2 + 1e-4) - exact_loss(1.2 - 1e-4)) / 2e-4
    error = max(batches.std() / np.sqrt(len(batches)), 2e-6)
    assert abs(batches.mean() - exact) < 4 * error, (batches.mean(), exact, error)
    assert abs(losses.mean() - exact_loss(1.2)) < 4 * losses.std() / np.sqrt(len(losses))
    if settings.get("gradient") is Gradient.SCORE_FUNCTION:
        assert error < 0.1 * abs(exact)


def test_noise_of_the_score_function_grows_with_the_time_but_not_with_the_steps():
    """Drift ``theta - y`` and reward y: reward and score are Gaussian, and so known is the variance of a covariance."""
    num, sigma, replicates, most_steps = 20, 0.7, 1000, 20
    steps = EulerMaruyama(np.arange(most_steps + 1), dist.Normal(0.5, 0.5), sigma, Gradient.SCORE_FUNCTION)
    objective = Reward(lambda sample: sample["y"])

    @compile_tuned
    def gradients(grid, keys):
        def one(key):
            dynamics = Dynamics(lambda theta, t, y: theta - y, None, grid)
            y, theta = 0.5 + 0.5 * random.normal(key, (num,)), jnp.array(0.5)
            end, path, cost = simulate(dynamics, theta, y, random.fold_in(key, 1))
            ends, _ = steps._ends(objective, end, cost)
            return backward(dynamics, theta, path, random.fold_in(key, 1), ends)

        return jax.lax.map(one, keys)

    variances = []
    for end, num_steps in [(1.0, 5), (1.0, 20), (4.0, 20)]:
        h = end / num_steps
        length = jnp.where(jnp.arange(most_steps) < num_steps, h, 0.0)  # the last steps lead nowhere
        grid = Grid(jnp.arange(most_steps), jnp.cumsum(length) - length, length, jnp.full(most_steps, sigma))
        found = np.asarray(gradients(grid, random.split(random.key(0), replicates)), float)

        # y_T = (1 - h)^T y_0 + ... + sigma sqrt(h) sum_t (1 - h)^(T - 1 - t) xi_t; score = sqrt(h) / sigma sum_t xi_t
        decay = (1 - h) ** np.arange(num_steps)
        of_reward = (0.5 * (1 - h) ** num_steps) ** 2 + sigma**2 * h * np.sum(decay**2)
        slope, of_score = h * np.sum(decay), end / sigma**2
        variance = (of_reward * of_score + slope**2) / (num - 1)
        assert abs(found.mean() + slope) < 4 * np.sqrt(variance / replicates)
        squares = (found + slope) ** 2
        assert abs(squares.mean() - variance) < 4 * squares.std() / np.sqrt(replicates)
        variances.append((squares.mean(), squares.std() / np.sqrt(replicates)))
    few, many, long = variances
    assert many[0] < 1.2 * few[0]  # exact: 0.92
    assert long[0] - 4 * long[1] > 2.0 * (many[0] + 4 * many[1])  # exact: 3.46


@pytest.mark.parametrize("num_batches", [1, 10])
def test_queue_tunes_a_sampler(num_batches):
    settings = {} if num_batches == 1 else {"paths": Paths.STORED, "num_batches": num_batches}
    optimizer = ImplicitDiffusion(linear, optax.adam(0.05), OBJECTIVE, sampler=sampler(**settings), num_particles=100)
    result = optimizer.run(random.key(0), 200, progress_bar=False)
    best = REFERENCE + MEAN_SLOPE * SIGMA**2 / 0.3
    assert abs(result.params["theta"] - best) < 0.05
    assert abs(result.losses[-50:].mean() - exact_loss(best)) < 0.05
    y = optimizer.get_samples(result.state, num_samples=4000)["y"]
    assert abs(y.mean() - best * MEAN_SLOPE) < 0.05


def test_batches_of_a_queue_are_different_and_in_their_places():
    settings = {"paths": Paths.STORED, "num_batches": 5}
    optimizer = ImplicitDiffusion(linear, optax.sgd(0.0), OBJECTIVE, sampler=sampler(**settings), num_particles=3)
    state = optimizer.init(random.key(0))
    waiting, ready = state.particles
    assert len(np.unique(np.asarray(waiting.y))) == waiting.y.size
    for place in range(5):
        assert np.all(np.any(np.asarray(waiting.path[place]) != 0, 1) == (np.arange(10) < 2 * place))
    new, _ = optimizer.update(state)
    np.testing.assert_array_equal(new.particles.ready.path[:8], waiting.path[4][:8])
    np.testing.assert_array_equal(new.particles.waiting.path[1:, :0], waiting.path[:-1, :0])
    np.testing.assert_array_equal(new.particles.waiting.path[3][:4], waiting.path[2][:4])


def test_masked_rewards_are_counted():
    cut = Reward(lambda sample: jnp.where(sample["y"] > 0.5, jnp.nan, jnp.sqrt(0.5 - sample["y"])))
    optimizer = ImplicitDiffusion(linear, optax.adam(0.01), cut, sampler=sampler(), num_particles=100)
    with pytest.warns(UserWarning, match="left out"):
        result = optimizer.run(random.key(0), 10, progress_bar=False)
    assert np.all(np.isfinite(result.losses)) and np.all(result.diagnostics["num_masked"] > 10)
    assert np.isfinite(result.params["theta"]) and int(result.state.num_refused) == 0


def test_divergence_from_a_pretrained_network():
    """A network of flax, tuned from its pretrained parameters; the divergence by hand along the path that was made."""
    network = flax.linen.Dense(2)
    pretrained = {"net$params": network.init(random.key(1), jnp.ones(3))["params"]}

    def model():
        net = flax_module("net", network, jnp.ones(3))
        return lambda t, y: net(jnp.append(y, t))

    start = dist.Normal(0.0, 1.0).expand([2]).to_event(1)
    objective = Reward(lambda sample: sample["y"][0], 0.5, PathKL(reference_params=pretrained))
    settings = EulerMaruyama(TIMES, start, SIGMA, paths=Paths.STORED)
    optimizer = ImplicitDiffusion(model, optax.sgd(1.0), objective, sampler=settings, num_particles=50)
    state = optimizer.init(random.key(0), init_params=pretrained)
    assert state.diagnostics["path_kl"] == 0 and state.diagnostics["loss"] == -state.diagnostics["reward"]
    state, _ = optimizer.update(state)
    moved = jax.tree.map(np.subtract, state.params, pretrained)["net$params"]
    path, times = np.asarray(state.particles.ready.path), np.broadcast_to(TIMES[:-1, None, None], (10, 50, 1))
    gaps = np.concatenate([path, times], 2) @ moved["kernel"] + moved["bias"]
    expected = np.sum(0.1 / (2 * SIGMA**2) * gaps**2, (0, 2)).mean()
    np.testing.assert_allclose(state.diagnostics["path_kl"], expected, rtol=1e-5)
    np.testing.assert_allclose(state.diagnostics["loss"], 0.5 * expected - state.diagnostics["reward"], rtol=1e-5)


# Bad input

IMAGE = dist.Normal(0.0, 1.0).expand([3]).to_event(1)


def wrong_drift():
    theta = numpyro.param("theta", 1.2)
    return lambda t, y: theta * jnp.ones(2)


def with_latents():
    theta = numpyro.param("theta", 1.2)
    numpyro.sample("x", dist.Normal(theta, 1.0))


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: EulerMaruyama([0.0, 1.0, 1.0], IMAGE), ValueError, "times must be a grid"),
        (lambda: EulerMaruyama([0.0], IMAGE), ValueError, "times must be a grid"),
        (lambda: EulerMaruyama(TIMES, 3.0), TypeError, "initial must be"),
        (lambda: EulerMaruyama(TIMES, IMAGE, -1.0), ValueError, "noise_scale"),
        (lambda: EulerMaruyama(TIMES, IMAGE, paths=Paths.STORED, num_batches=11), ValueError, "num_batches is 11.*10"),
        (lambda: EulerMaruyama(TIMES, IMAGE, paths=Paths.STORED, num_batches=3), ValueError, "must divide"),
        (lambda: EulerMaruyama(TIMES, IMAGE, num_batches=2), ValueError, "Paths.STORED"),
        (lambda: EulerMaruyama(TIMES, IMAGE, gradient="adjoint"), TypeError, "gradient must be one of"),
    ],
)
def test_arguments_are_refused_by_name(make, error, message):
    with pytest.raises(error, match=message):
        make()


@pytest.mark.parametrize(
    ("model", "objective", "settings", "message"),
    [
        (wrong_drift, Reward(lambda sample: sample["y"].sum()), {}, "drift that the model returns has shape"),
        (lambda: None, Reward(lambda sample: sample["y"].sum()), {}, "no numpyro.param site"),
        (lambda: numpyro.param("theta", 1.0), Reward(lambda sample: sample["y"].sum()), {}, "must return a drift"),
        (with_latents, Reward(lambda sample: sample["y"].sum()), {}, r"no sample sites, but it has \['x'\]"),
        (linear, Reward(lambda sample: sample["y"]), {}, "reward_fn must return one number"),
        (linear, None, {}, "objective of EulerMaruyama is Reward"),
        (linear, Reward(lambda s: s["y"].sum(), 0.1, ForwardKL(np.ones(3))), {}, "objective of EulerMaruyama"),
        (linear, Reward(lambda s: s["y"].sum(), 0.1, PathKL({"other": 1.0})), {}, "reference_params must hold"),
        (linear, Reward(lambda s: s["y"].sum(), 0.1, PathKL({"theta": 1.0})), {"noise_scale": 0.0}, "noise_scale"),
    ],
)
def test_models_that_do_not_fit_are_refused_at_the_start(model, objective, settings, message):
    optimizer = ImplicitDiffusion(model, objective=objective, sampler=EulerMaruyama(TIMES, IMAGE, **settings))
    with pytest.raises(ValueError, match=message):
        optimizer.init(random.key(0))


def test_path_divergence_of_a_law_without_paths_is_refused():
    objective = Reward(lambda sample: sample["x"], 0.1, PathKL({"theta": 1.0}))
    with pytest.raises(ValueError, match="ForwardKL or ReverseKL"):
        SMCOptimizer(with_latents, objective=objective).init(random.key(0))
