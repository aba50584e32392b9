# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How theta moves: the scale-free step on a noisy quadratic, and optimisers of others as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
import pytest
from compiling import compile_tuned
from jax import random
from jax.example_libraries import optimizers

from numpyro_smcopt.information import Fisher, Information, fisher_information
from numpyro_smcopt.theta_step import (
    FisherStep,
    NaturalStep,
    OptimizerStep,
    StepContext,
    as_theta_step,
    inverse_metric,
)

P = 4


def quadratic():
    """Complete information H, missing information F (strongly correlated), the optimum."""
    rng = np.random.default_rng(0)
    root = rng.normal(size=(P, P))
    complete = root @ root.T + 0.2 * np.eye(P)
    half = np.linalg.cholesky(complete)
    rotation = np.linalg.qr(rng.normal(size=(P, P)))[0]
    missing = half @ rotation @ np.diag([0.8, 0.5, 0.3, 0.0]) @ rotation.T @ half.T
    return complete, missing, 10 * rng.normal(size=P)


def walk(units, num_steps=400, noise=1.0, dtype=float, step=NaturalStep()):  # noqa: B008
    """Iterates and running answers [T, P] in units of the plain problem; theta = units * plain theta."""
    complete, missing, optimum = quadratic()
    observed = complete - missing
    half = np.linalg.cholesky(missing + 1e-9 * np.eye(P))
    scaled = lambda matrix: jnp.asarray(matrix / units / units[:, None], dtype)  # noqa: E731

    def body(carry, key):
        theta, state = carry
        plain = theta / jnp.asarray(units, dtype)
        gradient = jnp.asarray(observed) @ (plain - jnp.asarray(optimum)) + noise * jnp.asarray(half) @ random.normal(
            key, (P,), dtype
        )
        around = StepContext(
            (gradient / jnp.asarray(units)).astype(dtype),
            jnp.zeros((), dtype),
            lambda: Information(scaled(complete), scaled(missing), jnp.asarray(0.01, dtype)),
        )
        theta, state = step.update(state, theta, around)
        return (theta, state), (
            theta / jnp.asarray(units, dtype),
            step.estimate(state, theta) / jnp.asarray(units, dtype),
        )

    start = jnp.zeros(P, dtype)
    _, paths = compile_tuned(lambda keys: jax.lax.scan(body, (start, step.init(start)), keys))(
        random.split(random.key(1), num_steps)
    )
    return (*map(np.asarray, paths), optimum, observed, missing)


UNITS = np.array([1e-6, 1.0, 1e6, 1e3])


def test_natural_step_reaches_the_optimum_and_averages():
    with jax.enable_x64(True):
        path, answers, optimum, observed, missing = walk(np.ones(P), 2000)
    # One step M^-1 g with the noise of one particle (covariance F) errs by I^-1 F I^-1; the answer must average.
    covariance = np.linalg.inv(observed) @ missing @ np.linalg.inv(observed)
    distance = lambda theta: np.sqrt((theta - optimum) @ observed @ (theta - optimum))  # noqa: E731
    single = np.sqrt(np.trace(observed @ covariance))
    assert distance(np.zeros(P)) > 4 * single  # it had to walk
    assert distance(answers[-1]) < 0.15 * single, (distance(answers[-1]), single)
    # ... more than the iterates do: the mean over the last quarter of squared distances
    spread = lambda theta: np.mean([distance(t) ** 2 for t in theta[1500:]])  # noqa: E731
    assert spread(answers) < spread(path)


@pytest.mark.parametrize(("dtype", "tolerance"), [(float, 1e-6), (np.float32, 2e-2)])
def test_natural_step_takes_the_same_path_in_any_units(dtype, tolerance):
    with jax.enable_x64(True):
        plain = walk(np.ones(P), dtype=dtype)
        other = walk(UNITS, dtype=dtype)
    for a, b in zip(plain[:2], other[:2], strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=tolerance)


def test_natural_step_is_newtons_where_nothing_is_noisy():
    """Without a bound on its length, one step of M = H - F from anywhere is exact on a quadratic."""
    with jax.enable_x64(True):
        path, _, optimum, _, _ = walk(np.ones(P), 3, noise=0.0, step=NaturalStep(target_ess=1e-300))
    np.testing.assert_allclose(path[0], optimum, atol=1e-4)


def test_natural_step_costs_no_more_ess_than_it_may():
    complete, missing, optimum = quadratic()
    share, target = 0.5, 0.8
    step = NaturalStep(target_ess=target)
    information = Information(jnp.asarray(complete), jnp.asarray(missing), jnp.asarray(share))
    gradient = jnp.asarray((complete - missing) @ (-100 * optimum))
    theta, _ = step.update(
        step.init(jnp.zeros(P)), jnp.zeros(P), StepContext(gradient, jnp.zeros(()), lambda: information)
    )
    np.testing.assert_allclose(share * theta @ missing @ theta, -np.log(target), rtol=1e-4)


LIMITED = as_theta_step(optax.sgd(1e6), target_ess=0.8)


@pytest.mark.parametrize("step", [FisherStep(), LIMITED], ids=["fisher", "limited"])
def test_steps_that_particles_must_follow_are_shorter(step):
    """Without weights a step may have a part of the length that the effective sample size allows."""
    complete, _, optimum = quadratic()
    matrix = jnp.asarray(complete, jnp.float32)

    def moved(reach):
        around = StepContext(
            jnp.asarray(-1e3 * optimum, jnp.float32),
            jnp.zeros(()),
            fisher=lambda: Fisher(matrix, jnp.asarray(1e9)),
            spread=lambda step: step @ matrix @ step,
            conditional_ess=lambda step: jnp.ones(()),
            reach=reach,
        )
        return np.asarray(step.update(step.init(jnp.zeros(P)), jnp.zeros(P), around)[0], float)

    whole, part = moved(1.0), moved(0.05)
    ridge = step.floor * np.diag(complete) if isinstance(step, FisherStep) else 0.0
    assert whole @ complete @ whole + np.sum(ridge * whole**2) == pytest.approx(-np.log(0.8), rel=1e-3)
    np.testing.assert_allclose(part, 0.05 * whole, rtol=1e-4)


def test_inverse_metric_is_floored_and_never_indefinite():
    complete, missing, _ = quadratic()
    with jax.enable_x64(True):
        good = inverse_metric(Information(complete, missing, jnp.ones(())), 0.1)
        np.testing.assert_allclose(good, np.linalg.inv(complete - missing), rtol=1e-8)
        # More missing than complete: relative eigenvalues 1 - 3 * (.8, .5, .3, 0) = (-1.4, -.5, .1, 1)
        floored = np.asarray(inverse_metric(Information(complete, 3 * missing, jnp.ones(())), 0.25))
    half = np.linalg.cholesky(complete)
    np.testing.assert_allclose(np.linalg.eigvalsh(half.T @ floored @ half), [1, 4, 4, 4], rtol=1e-8)


@pytest.mark.parametrize(
    "first",
    [False, True],
    ids=["later", "first"],
)
def test_natural_step_survives_what_is_not_finite(first):
    complete, missing, optimum = quadratic()
    step = NaturalStep(refresh_every=1)
    good = Information(*map(jnp.asarray, (complete, missing, 0.1)))
    bad = jax.tree.map(lambda v: jnp.nan * v, good)
    gradient = jnp.asarray(-(complete - missing) @ optimum)
    theta, state = jnp.zeros(P), step.init(jnp.zeros(P))
    if not first:
        theta, state = step.update(state, theta, StepContext(gradient, jnp.zeros(()), lambda: good))
    before = theta
    theta, state = step.update(state, theta, StepContext(gradient, jnp.zeros(()), lambda: bad))
    assert np.all(np.isfinite(theta)) and np.max(abs(theta - before)) < 1e3
    before = theta
    theta, state = step.update(state, theta, StepContext(jnp.nan * gradient, jnp.zeros(()), lambda: good))
    np.testing.assert_array_equal(theta, before)
    theta, state = step.update(state, theta, StepContext(gradient, jnp.zeros(()), lambda: good))
    assert np.all(np.isfinite(theta)) and np.any(theta != before)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(state))


# Optimisers of others


def adam_by_hand(theta, gradients, rate):
    first = second = 0.0
    for k, g in enumerate(gradients, 1):
        first, second = 0.9 * first + 0.1 * g, 0.999 * second + 0.001 * g**2
        theta = theta - rate * first / (1 - 0.9**k) / (np.sqrt(second / (1 - 0.999**k)) + 1e-8)
    return theta


OPTIMISERS = {
    "optax": lambda: optax.adam(0.1),
    "numpyro": lambda: numpyro.optim.Adam(0.1),
    "jax": lambda: optimizers.adam(0.1),
    "wrapped": lambda: as_theta_step(optax.adam(0.1)),
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers_of_every_kind_do_what_they_do_by_themselves(name):
    step = as_theta_step(OPTIMISERS[name]())
    assert isinstance(step, OptimizerStep)
    gradients = np.array([[1.0, -2.0], [0.5, 0.1], [-3.0, 0.2]])
    start = np.array([0.3, 4.0])
    theta, state = jnp.asarray(start), step.init(jnp.asarray(start))
    for g in gradients:
        theta, state = step.update(state, theta, StepContext(jnp.asarray(g), jnp.zeros(()), lambda: 1 / 0))
    np.testing.assert_allclose(theta, adam_by_hand(start, gradients, 0.1), rtol=1e-4)
    np.testing.assert_array_equal(step.estimate(state, theta), theta)


def test_an_optimiser_that_looks_at_the_loss_gets_it():
    scale = optax.GradientTransformationExtraArgs(
        lambda params: (), lambda g, state, params=None, *, value, **extra: (-value * g, state)
    )
    step = as_theta_step(scale)
    theta, _ = step.update(
        step.init(jnp.zeros(2)), jnp.zeros(2), StepContext(jnp.ones(2), jnp.asarray(3.0), lambda: 1 / 0)
    )
    np.testing.assert_array_equal(theta, [-3.0, -3.0])


def test_natural_step_passes_through():
    step = NaturalStep(floor=0.2)
    assert as_theta_step(step) is step


def test_minimize_is_refused_with_a_way_out():
    with pytest.raises(TypeError, match="Minimize.*optax"):
        as_theta_step(numpyro.optim.Minimize())


@pytest.mark.parametrize("wrong", ["adam", 0.01, lambda g: g, optax.adam, None])
def test_other_things_are_refused(wrong):
    with pytest.raises(TypeError, match="Got (str|float|function|NoneType)"):
        as_theta_step(wrong)


# The natural gradient where the particles do not know all of the Fisher information


def fisher_step(scores, gradient, kept=lambda step: jnp.ones(())):
    """The first step from zero, with particles of these scores [N, P]."""
    log_weights = jnp.full(len(scores), -np.log(len(scores)))
    around = StepContext(
        jnp.asarray(gradient),
        jnp.zeros(()),
        fisher=lambda: fisher_information(jnp.asarray(scores), log_weights),
        conditional_ess=kept,
    )
    theta, rule = jnp.zeros(len(gradient)), FisherStep()
    return np.asarray(rule.update(rule.init(theta), theta, around)[0])


def test_coordinates_on_which_the_law_does_not_depend_stay():
    """The last bias of a network: the scores are one and the same, so their variance is rounding, and the gradient."""
    scores = np.random.default_rng(0).standard_normal((1000, 3)).astype(np.float32)
    scores[:, 1] = 0.7
    gradient = np.array([0.01, 1e-7, -0.02], np.float32)
    step = fisher_step(scores, gradient)
    assert step[1] == 0.0
    fisher = np.cov(scores[:, [0, 2]].T)
    ridge = (0.01 + 3 / 1000) * np.diag(np.diag(fisher))
    np.testing.assert_allclose(step[[0, 2]], -np.linalg.solve(fisher + ridge, gradient[[0, 2]]), rtol=1e-3)


def test_steps_are_bounded_in_directions_that_the_particles_do_not_see():
    """Twenty particles, forty parameters: in half of the directions their variance is zero, that of the law is one."""
    rng = np.random.default_rng(1)
    scores = rng.standard_normal((20, 40)).astype(np.float32)
    unseen = np.linalg.svd(scores - scores.mean(0))[2][-1]
    step = fisher_step(scores, 100 * unseen.astype(np.float32))
    assert step @ step < 2 * -np.log(0.8)  # the variance over the law of what the step does to the energy
    assert step @ unseen < -0.1


def test_steps_that_leave_too_few_particles_are_halved():
    """A law that is not linear in theta: what a step does grows with the fourth power of its length."""
    scores = np.random.default_rng(2).standard_normal((1000, 2)).astype(np.float32)
    gradient = np.array([5.0, 0.0], np.float32)
    whole = fisher_step(scores, gradient)
    short = fisher_step(scores, gradient, lambda step: jnp.exp(-1e4 * jnp.sum(step**2) ** 2))
    np.testing.assert_allclose(short, whole / 8, rtol=1e-6)
    assert np.exp(-1e4 * np.sum(short**2) ** 2) > 0.8**1.5 > np.exp(-1e4 * np.sum((2 * short) ** 2) ** 2)
