# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A likelihood of a user's own, which inherits from nothing of ours, is treated as one."""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

from numpyro_smcopt import EarlyStop, ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer
from numpyro_smcopt.objectives import Estimate, as_objective
from numpyro_smcopt.theta_step import NaturalStep, as_theta_step

pytestmark = pytest.mark.slow

Y = np.random.default_rng(0).normal(3.0, np.sqrt(2.0), 40).astype(np.float32)  # the maximum is at their mean


def model(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("things", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def log_likelihood(mean):
    return float(np.sum(-0.25 * (Y - mean) ** 2 - 0.5 * np.log(4 * np.pi)))


class Duck:
    """Fisher's identity, without control variates."""

    is_likelihood = True
    whole_particles = False
    arrays = ()

    def default_step(self, refresh_every):
        return as_theta_step(optax.adam(1e-2)) if refresh_every is None else NaturalStep(refresh_every=refresh_every)

    def check(self, target, theta):
        pass

    def estimate(self, scene, cloud):
        weights = jnp.exp(cloud.log_weights)
        free = jnp.full(len(cloud.x), 1 / len(cloud.x))
        return Estimate(weights, free, -jnp.asarray(cloud.log_evidence))


def test_its_run_starts_near_the_maximum_takes_natural_steps_and_stops_early():
    optimizer = SMCOptimizer(model, objective=Duck(), num_particles=64)
    start = optimizer.init(random.key(0), Y)
    assert abs(optimizer.get_params(start)["mean"] - Y.mean()) < 0.05  # the warm start; the site says 0
    result = optimizer.run(random.key(0), 3000, Y, progress_bar=False, early_stop=EarlyStop(0.01))
    assert result.state.theta_state.metric.shape == (1, 1)
    # The observed information of the mean is n / 2.
    np.testing.assert_allclose(result.state.theta_state.metric, 2 / len(Y), rtol=0.2)
    assert len(result.losses) < 3000
    assert abs(result.params["mean"] - Y.mean()) < 0.05
    assert abs(result.losses[-1] + log_likelihood(Y.mean())) < 0.5  # minus the running log evidence


def test_its_runs_are_ranked_by_log_evidence():
    result = SMCOptimizer(model, objective=Duck(), num_particles=64).run(
        random.key(1), 60, Y, progress_bar=False, num_runs=2
    )
    exact = [-log_likelihood(own.params["mean"]) for own in result.runs.results]
    np.testing.assert_allclose(result.runs.losses, exact, atol=5 * np.max(result.runs.loss_errors) + 1e-3)
    assert np.all(np.isfinite(result.runs.loss_errors))


@pytest.mark.parametrize("algorithm", [MomentumParticleMLE, ImplicitDiffusion])
def test_other_algorithms_take_it_for_a_likelihood(algorithm):
    optimizer = algorithm(model, objective=Duck(), num_particles=64)
    assert abs(optimizer.get_params(optimizer.init(random.key(0), Y))["mean"] - Y.mean()) < 0.05
    result = optimizer.run(random.key(0), 200, Y, progress_bar=False)
    assert abs(result.params["mean"] - Y.mean()) < 0.1


def test_what_it_lacks_is_named():
    class Half:
        is_likelihood = True

        def estimate(self, scene, cloud):
            raise AssertionError

    with pytest.raises(TypeError, match=r"has no whole_particles, arrays, default_step, check"):
        as_objective(Half())
