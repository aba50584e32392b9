# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Early stopping: on what is known of the answer, never on noise."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from scipy.stats import t

from numpyro_smcopt import EarlyStop, SMCOptimizer, Status, one_block
from numpyro_smcopt.kernels import MALA
from numpyro_smcopt.runs.convergence import _student_quantile, look

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("level", [5e-4, 1e-5, 1e-6])
def test_quantile_of_students_t(level):
    np.testing.assert_allclose(_student_quantile(level, 9), t.isf(level, 9), rtol=1e-5)


def descent(seed, num_steps, noise, correlation, gain):
    """Stochastic approximation of the minimum of |theta|^2 / 2 from (5, 5), with autocorrelated noise."""
    rng = np.random.default_rng(seed)
    theta, error, reversals, last = np.full(2, 5.0), noise * rng.normal(size=2), 0, np.zeros(2)
    path = np.empty((2, num_steps, 2))
    for k in range(num_steps):
        error = correlation * error + np.sqrt(1 - correlation**2) * noise * rng.normal(size=2)
        gradient = theta + error
        reversals += gradient @ last > 0
        last = -gradient
        theta = theta - gain * (1 + reversals / 5) ** -0.7 * gradient
        path[:, k] = theta, gradient
    return path


@pytest.mark.parametrize(
    ("noise", "correlation", "gain", "tolerance", "num_stopped"),
    [
        (0.1, 0.0, 1.0, 1e-3, 100),
        (0.5, 0.0, 1.0, 1e-3, 100),
        (0.1, 0.9, 1.0, 1e-3, 100),
        (0.1, 0.0, 0.02, 1e-3, 100),
        (0.1, 0.9, 0.02, 1e-3, 100),
        (0.5, 0.0, 0.02, 1e-3, 0),  # 1500 steps are too few for so much noise
        (0.5, 0.0, 0.02, 2e-2, 100),
    ],
)
def test_what_is_missing_when_it_stops_is_what_it_says(noise, correlation, gain, tolerance, num_stopped):
    """100 seeds: on average no more than the tolerance, and of two parameters hardly ever ten times as much."""
    rule, missing = EarlyStop(tolerance), []
    for seed in range(100):
        theta, gradient = descent(seed, 1500, noise, correlation, gain)
        for length in range(200, 1501, 50):
            if rule.arrived(theta[:length], gradient[:length], np.eye(2)):
                missing.append(0.5 * np.sum(theta[length // 2 : length].mean(0) ** 2))
                break
    assert len(missing) == num_stopped
    if num_stopped:
        error = np.std(missing) / np.sqrt(num_stopped)
        assert np.mean(missing) < tolerance + 4 * error and np.max(missing) < 10 * tolerance


def test_motion_is_told_from_noise():
    theta, gradient = descent(0, 300, 0.1, 0.0, 0.002)
    assert look(theta, gradient, np.eye(2)).moving
    assert not EarlyStop(tolerance=1e9).arrived(theta, gradient, np.eye(2))
    moving = [look(*descent(seed, 1000, 0.5, 0.9, 1.0), np.eye(2)).moving for seed in range(100)]
    assert sum(moving) <= 1  # a level of one in a thousand
    assert look(theta[:19], gradient[:19], np.eye(2)) is None


# -- runs: y ~ Poisson(exp(x)), x ~ N(mean, 1), whose likelihood is had by quadrature ----------------------------------
Y = np.array([0.0, 1.0, 3.0, 7.0, 2.0, 1.0], np.float32)


def counts(y):
    mean = numpyro.param("mean", 3.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Poisson(jnp.exp(x)), obs=y)


def log_likelihood(mean):
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    x = mean + nodes
    with np.errstate(under="ignore"):
        return np.log(np.exp(Y[:, None] * x - np.exp(x)) @ weights).sum()


@pytest.fixture(scope="module")
def best():
    grid = np.linspace(-1, 2, 3001)
    return max(map(log_likelihood, grid))


def test_a_hundred_runs_stop_at_the_maximum_and_none_on_noise(best):
    optimizer = SMCOptimizer(counts, optax.adam(0.05), kernel=MALA(), num_particles=64, partition=one_block)
    state = optimizer.init(random.key(0), Y)
    rule, gaps, lengths = EarlyStop(tolerance=0.01), [], []
    for seed in range(100):
        run = optimizer.run(
            random.key(0), 2000, Y, progress_bar=False, init_state=state._replace(rng_key=random.key(seed)),
            early_stop=rule,
        )  # fmt: skip
        assert run.status in (Status.CONVERGED, Status.FINISHED)
        lengths.append(len(run.losses))
        if run.status is Status.CONVERGED:
            assert lengths[-1] < 2000 and lengths[-1] % rule.every == 0
            # With an optimiser of the user the answer is the last iterate; the rule speaks of the mean of the tail.
            gaps.append(best - log_likelihood(np.mean(run.trajectory["mean"][lengths[-1] // 2 :])))
    assert len(gaps) > 50
    assert np.mean(gaps) < rule.tolerance and np.max(gaps) < 10 * rule.tolerance


def test_none_of_a_hundred_runs_on_their_way_stops(best):
    """At the first look the mean of the tail still lacks more than the tolerance."""
    optimizer = SMCOptimizer(counts, optax.sgd(1.5e-3), kernel=MALA(), num_particles=64, partition=one_block)
    state = optimizer.init(random.key(0), Y, init_params={"mean": 1.0})
    for seed in range(100):
        run = optimizer.run(
            random.key(0), 250, Y, progress_bar=False, init_state=state._replace(rng_key=random.key(seed)),
            early_stop=EarlyStop(tolerance=0.01),
        )  # fmt: skip
        assert best - log_likelihood(np.mean(run.trajectory["mean"][125:])) > 0.02
        assert run.status is Status.FINISHED


def test_the_default_stops_early_resumes_and_is_off_unless_asked_for(best, tmp_path):
    optimizer = SMCOptimizer(counts)
    run = optimizer.run(random.key(1), 1000, Y, progress_bar=False, early_stop=True, checkpoint=tmp_path / "run")
    assert run.status is Status.CONVERGED and 200 <= len(run.losses) < 1000
    assert best - log_likelihood(float(run.params["mean"])) < 0.005
    restored = SMCOptimizer(counts)
    for _ in range(2):  # to ask again changes nothing
        again = restored.resume(tmp_path / "run", Y, progress_bar=False)
        np.testing.assert_array_equal(again.losses, run.losses)
        assert again.status is Status.CONVERGED
    whole = optimizer.run(random.key(1), 300, Y, progress_bar=False)
    assert whole.status is Status.FINISHED and len(whole.losses) == 300


def test_a_run_that_did_not_arrive_is_told_from_one_that_did():
    slow = SMCOptimizer(counts, optax.sgd(1e-4), kernel=MALA(), num_particles=64)
    run = slow.run(random.key(0), 300, Y, progress_bar=False, early_stop=True)
    assert run.status is Status.FINISHED and len(run.losses) == 300


@pytest.mark.parametrize(
    ("option", "kind", "message"),
    [
        ("yes", TypeError, "early_stop must be True, False or an EarlyStop, got 'yes'"),
        ({"tolerance": -1.0}, ValueError, "tolerance must be positive, got -1.0"),
        ({"every": 0}, ValueError, "every must be a positive integer, got 0"),
    ],
)
def test_options_are_checked(option, kind, message):
    with pytest.raises(kind, match=message):
        stop = EarlyStop(**option) if isinstance(option, dict) else option
        SMCOptimizer(counts).run(random.key(0), 10, Y, early_stop=stop)
