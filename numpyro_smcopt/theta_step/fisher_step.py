# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The natural gradient, without a learning rate: the default for losses other than the marginal likelihood.

    theta' = theta - (gain / curvature) V^-1 g,      V = Cov_pi( grad_theta U )

It knows the units of the parameters from the Fisher information ``V`` and those of the loss from its ``curvature``
relative to ``V``. ``V`` is that of the particles: in units of its diagonal its eigenvalues are uncertain by about
``P / N``, and where there are more parameters than particles, they see no more than a part of it. That much is added to
the diagonal, in the step and in what bounds its length. A coordinate on which the law does not depend stays. What a
step leaves of the effective particles is tried before it is made, for a network is linear over short distances only.
Where particles have no weights and have to follow, the steps of one relaxation time together are that short.
Gain, length and average follow the rules of `theta_step.base`. Source: Amari 1998.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.theta_step.base import StepContext, averaged, gain, shortened
from numpyro_smcopt.types import Array

TOLERANCE = 1.5  # the power of ``target_ess`` that a step may come to; to first order it is one
SHORT = 0.1  # share of the variance that a step may have, below which it is not tried
MOST_HALVINGS = 12


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

    def anew(self) -> "FisherState":
        """The state under other data; see `NaturalState.anew`."""
        none: Any = np.zeros_like(self.reversals)
        return self._replace(reversals=none)


@dataclasses.dataclass(frozen=True)
class FisherStep:
    """The natural gradient, scale-free; see the head of this file.

    Args:
        target_ess: Fraction of effective particles that a step of theta may cost, to first order.
        floor: Smallest eigenvalue of the Fisher information in units of its diagonal; ``P / N`` is added.
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

    def update(self, state: FisherState, theta: Array, context: StepContext) -> tuple[Array, FisherState]:
        """See `ThetaStep.update`."""
        # Metric
        newest, weight = context.fisher(), jnp.maximum(1.0 / (state.num_updates + 1), self.forgetting)
        usable = jnp.all(jnp.isfinite(newest.matrix))
        mixed = state.fisher + weight.astype(theta.dtype) * (newest.matrix - state.fisher)
        fisher = jnp.where(usable, mixed, state.fisher)
        known = (jnp.diag(newest.matrix) > 0) & (jnp.diag(fisher) > 0)
        ridge = (self.floor + theta.shape[0] / newest.draws).astype(theta.dtype)

        # Direction
        scale = jnp.where(known, 1 / jnp.sqrt(jnp.where(known, jnp.diag(fisher), 1.0)), 0.0)
        metric = fisher * scale[:, None] * scale + jnp.diag(jnp.where(known, ridge, 1.0))
        natural = scale * jnp.linalg.solve(metric, scale * context.gradient)
        direction = -natural / jnp.maximum(context.curvature, 1e-30)
        direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0.0)

        # Gain
        reversals = state.reversals + (jnp.vdot(context.gradient, state.last) > 0).astype(jnp.int32)
        step = gain(reversals, self.patience).astype(theta.dtype) * direction

        # Length and average
        spread = step @ fisher @ step + ridge * (step**2 @ jnp.diag(fisher))
        step = shortened(step, spread, self.target_ess, context.reach)
        step = self._tried(step, spread, context)
        theta = theta + context.admit(step)
        average = averaged(state.average, theta, reversals)
        return theta, FisherState(state.num_updates + 1, reversals, fisher, direction, average)

    def _tried(self, step: Array, spread: Array, context: StepContext) -> Array:
        """The step, halved until it leaves what it should. Short steps do, and are not tried."""

        def goes_on(carry: tuple[Array, Array]) -> Array:
            halvings, step = carry
            return (halvings < MOST_HALVINGS) & (context.conditional_ess(step) < self.target_ess**TOLERANCE)

        def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
            return carry[0] + 1, carry[1] / 2

        long = spread > -SHORT * jnp.log(self.target_ess)
        start = jnp.where(long, 0, MOST_HALVINGS), step
        return lax.while_loop(goes_on, halve, start)[1]

    def estimate(self, state: FisherState, theta: Array) -> Array:
        """See `ThetaStep.estimate`."""
        del theta
        return state.average
