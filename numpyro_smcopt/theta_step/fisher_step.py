# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The natural gradient, without a learning rate: the default for losses other than the marginal likelihood.

    theta' = theta - (gain / curvature) G^-1 g,      G = Cov_pi( grad_theta U )

It knows the units of the parameters from the Fisher information ``G`` and those of the loss from its ``curvature``
relative to ``G``. Gain, length and average follow the rules of `theta_step.base`. Source: Amari 1998.
"""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from numpyro_smcopt.theta_step.base import Surroundings, averaged, gain, shortened
from numpyro_smcopt.types import Array


class FisherState(NamedTuple):
    """State of `FisherStep`.

    Attributes:
        num_updates: [] so far.
        reversals: [] how often a gradient disagreed with the step before it.
        fisher: [P, P] running Fisher information.
        last: [P] the last direction.
        average: [P] the running average of theta.
    """

    num_updates: Array
    reversals: Array
    fisher: Array
    last: Array
    average: Array


@dataclasses.dataclass(frozen=True)
class FisherStep:
    """The natural gradient, scale-free; see the head of this file.

    Args:
        target_ess: Fraction of effective particles that a step of theta may cost, to first order.
        floor: Smallest eigenvalue of the Fisher information in units of its diagonal.
        forgetting: Smallest weight of the newest Fisher information in the running mean.
        patience: Reversals after which the gain starts to fall.
    """

    target_ess: float = 0.8
    floor: float = 1e-2
    forgetting: float = 0.1
    patience: float = 5.0

    def init(self, theta: Array) -> FisherState:
        """See `ThetaStep.init`."""
        zero, matrix = jnp.zeros((), jnp.int32), jnp.zeros((theta.shape[0],) * 2, theta.dtype)
        return FisherState(zero, zero, matrix, jnp.zeros_like(theta), theta)

    def update(self, state: FisherState, theta: Array, around: Surroundings) -> tuple[Array, FisherState]:
        """See `ThetaStep.update`."""
        # Metric
        newest, weight = around.fisher(), jnp.maximum(1.0 / (state.num_updates + 1), self.forgetting)
        usable = jnp.all(jnp.isfinite(newest))
        fisher = jnp.where(usable, state.fisher + weight.astype(theta.dtype) * (newest - state.fisher), state.fisher)

        # Direction
        scale = 1 / jnp.sqrt(jnp.maximum(jnp.diag(fisher), 1e-30))
        metric = fisher * scale[:, None] * scale + self.floor * jnp.eye(len(scale), dtype=theta.dtype)
        natural = scale * jnp.linalg.solve(metric, scale * around.gradient)
        direction = -natural / jnp.maximum(around.curvature, 1e-30)
        direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0.0)

        # Gain
        reversals = state.reversals + (jnp.vdot(around.gradient, state.last) > 0).astype(jnp.int32)
        step = gain(reversals, self.patience).astype(theta.dtype) * direction

        # Length and average
        theta = theta + around.admit(shortened(step, step @ fisher @ step, self.target_ess))
        average = averaged(state.average, theta, reversals)
        return theta, FisherState(state.num_updates + 1, reversals, fisher, direction, average)

    def estimate(self, state: FisherState, theta: Array) -> Array:
        """See `ThetaStep.estimate`."""
        del theta
        return state.average
