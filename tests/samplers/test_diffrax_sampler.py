# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Diffusions solved by diffrax: an Ornstein-Uhlenbeck process with known mean and path divergence."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

from numpyro_smcopt import ImplicitDiffusion
from numpyro_smcopt.objectives import PathKL, Reward

pytestmark = pytest.mark.slow

diffrax = pytest.importorskip("diffrax")
DiffraxSampler = pytest.importorskip("numpyro_smcopt.samplers.diffrax_sampler").DiffraxSampler

TIMES = np.linspace(0.0, 1.0, 8) ** 1.5
SIGMA, REFERENCE = 0.8, 0.5
SLOPE = 1 - np.exp(-1.0)  # d E[Y_1] / d theta
OBJECTIVE = Reward(lambda sample: sample["y"], 0.3, PathKL(reference_params={"theta": REFERENCE}))


def linear():
    theta = numpyro.param("theta", 1.2)
    return lambda t, y: theta - y


def test_gradient_and_loss_of_a_known_process():
    sampler = DiffraxSampler(0.0, 1.0, dist.Normal(0.0, 1.0), SIGMA, dt0=0.1)
    optimizer = ImplicitDiffusion(linear, optax.sgd(0.0), OBJECTIVE, sampler=sampler, num_particles=100)
    state = optimizer.init(random.key(0))
    gap = 0.3 * (1.2 - REFERENCE) / SIGMA**2
    # The drift is linear, so the gradient has no noise; the error of the solver is of second order, 0.1^2 / 6 e^-1.
    np.testing.assert_allclose(state.assessed.gradient[0], gap - SLOPE, atol=1e-3)
    error = 1.1 / np.sqrt(100)
    assert abs(state.assessed.loss - (gap * (1.2 - REFERENCE) / 2 - 1.2 * SLOPE)) < 4 * error


@pytest.mark.parametrize(
    "controller", [diffrax.StepTo(TIMES), diffrax.PIDController(1e-2, 1e-2)], ids=["grid", "adaptive"]
)
def test_steps_of_a_grid_and_adaptive_steps(controller):
    sampler = DiffraxSampler(0.0, 1.0, dist.Normal(0.0, 1.0), SIGMA, stepsize_controller=controller)
    optimizer = ImplicitDiffusion(linear, optax.sgd(0.0), OBJECTIVE, sampler=sampler, num_particles=100)
    state = optimizer.init(random.key(0))
    gap = 0.3 * (1.2 - REFERENCE) / SIGMA**2
    np.testing.assert_allclose(state.assessed.gradient[0], gap - SLOPE, atol=5e-3)  # 0.2^2 / 6 e^-1 for the grid


def test_a_grid_takes_no_first_step():
    with pytest.raises(ValueError, match="dt0 is 0.1, but stepsize_controller"):
        DiffraxSampler(0.0, 1.0, dist.Normal(), dt0=0.1, stepsize_controller=diffrax.StepTo(TIMES))


def test_time_runs_forwards():
    with pytest.raises(ValueError, match="t0 must come before t1"):
        DiffraxSampler(1.0, 0.0, dist.Normal(0.0, 1.0))
