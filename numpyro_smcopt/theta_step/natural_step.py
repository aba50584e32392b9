# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The step towards a maximum of the marginal likelihood, without a learning rate.

    theta' = theta - gain * I^-1 g

It knows the units of the parameters from the information in the particles: ``I`` is Louis' observed information
``H - V`` (see `information`), formed where ``H`` is the identity and with its eigenvalues floored, so that a noisy or
indefinite estimate still gives a descent direction no longer than a few EM steps. Gain, length and average follow the
rules of `theta_step.base`; the variance that limits the length comes from ``V``, split over blocks as on average over
theta.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.information import Information
from numpyro_smcopt.theta_step.base import StepContext, averaged, gain, shortened
from numpyro_smcopt.types import Array

TOO_FEW_REVERSALS = 10
SMALL_GAIN = 1e-8  # nats that the last step was worth at most
SMALL_GRADIENT = 1e-3  # relative to the largest of the run


class NaturalState(NamedTuple):
    """State of `NaturalStep`.

    Attributes:
        num_updates: [] so far.
        reversals: [] how often a gradient disagreed with the step before it.
        information: Running complete and missing information.
        metric: [P, P] ``I^-1``.
        last: [P] the last direction.
        average: [P] the running average of theta.
    """

    num_updates: Array
    reversals: Array
    information: Information
    metric: Array
    last: Array
    average: Array

    def anew(self) -> "NaturalState":
        """The state under other data: at full speed, and its average forgets where it was before."""
        none: Any = np.zeros_like(self.reversals)  # of NumPy, so that nothing is compiled
        return self._replace(reversals=none)

    def still_moving(self, grad_norm: Array) -> bool:
        """True if hardly any gradient of a run, of which the norms [T] are given, disagreed with the step before it."""
        # Without noise the gradient vanishes at the maximum, and nothing reverses: rounding is left.
        last, complete = np.asarray(self.last, float), np.asarray(self.information.complete, float)
        arrived = grad_norm[-1] <= SMALL_GRADIENT * np.max(grad_norm) or last @ complete @ last < SMALL_GAIN
        return not arrived and int(self.reversals) < min(TOO_FEW_REVERSALS, len(grad_norm) / 10)


@dataclasses.dataclass(frozen=True)
class NaturalStep:
    """The scale-free step; see the head of this file.

    Args:
        target_ess: Fraction of effective particles that a step of theta may cost a block, to first order.
        refresh_every: Updates between two evaluations of the information.
        floor: Smallest eigenvalue of ``I`` relative to the complete information.
        forgetting: Smallest weight of the newest information in the running mean.
        patience: Reversals after which the gain starts to fall.
    """

    target_ess: float = 0.8
    refresh_every: int = 5
    floor: float = 0.1
    forgetting: float = 0.1
    patience: float = 5.0

    def init(self, theta: Array) -> NaturalState:
        """See `ThetaStep.init`."""
        zero, matrix = jnp.zeros((), jnp.int32), jnp.zeros((theta.shape[0],) * 2, theta.dtype)
        information = Information(matrix, matrix, jnp.ones((), theta.dtype))
        return NaturalState(zero, zero, information, matrix, jnp.zeros_like(theta), theta)

    def update(self, state: NaturalState, theta: Array, context: StepContext) -> tuple[Array, NaturalState]:
        """See `ThetaStep.update`."""
        # Metric
        information, metric = self._refresh(state, context)

        # Direction
        direction = -metric @ context.gradient
        direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0.0)

        # Gain
        reversals = state.reversals + (jnp.vdot(context.gradient, state.last) > 0).astype(jnp.int32)
        step = gain(reversals, self.patience).astype(theta.dtype) * direction

        # Length
        spread = information.largest_share * (step @ information.missing @ step)

        # Average
        theta = theta + context.admit(shortened(step, spread, self.target_ess))
        average = averaged(state.average, theta, reversals)
        return theta, NaturalState(state.num_updates + 1, reversals, information, metric, direction, average)

    def estimate(self, state: NaturalState, theta: Array) -> Array:
        """See `ThetaStep.estimate`."""
        del theta
        return state.average

    def _refresh(self, state: NaturalState, context: StepContext) -> tuple[Information, Array]:
        def renew(_: None) -> tuple[Information, Array]:
            renewals = state.num_updates // self.refresh_every
            information, usable = running_mean(state.information, context.information(), renewals, self.forgetting)
            # Without any usable information theta stays where it is.
            return information, jnp.where(usable, inverse_metric(information, self.floor), state.metric)

        return lax.cond(
            state.num_updates % self.refresh_every == 0, renew, lambda _: (state.information, state.metric), None
        )


def running_mean(old: Information, new: Information, renewals: Array, forgetting: float) -> tuple[Information, Array]:
    """The running mean of information with one more, and whether that was finite ([] bool): else it is the old mean.

    Args:
        old: The mean so far.
        new: The newest.
        renewals: [] how many the mean is of.
        forgetting: Smallest weight of the newest.
    """
    usable = jnp.all(jnp.isfinite(new.complete)) & jnp.all(jnp.isfinite(new.missing))
    weight = jnp.maximum(1.0 / (renewals + 1), forgetting)
    mix = lambda a, b: jnp.where(usable, a + weight.astype(a.dtype) * (b - a), a)  # noqa: E731
    return jax.tree.map(mix, old, new), usable


def inverse_metric(information: Information, floor: float) -> Array:
    """``I^-1 [P, P]`` with ``I = H - V``, floored.

    Args:
        information: ``H`` and ``V``.
        floor: Smallest eigenvalue of ``H^-1/2 (H - V) H^-1/2``.
    """
    complete, missing = information.complete, information.missing
    scale = 1 / jnp.sqrt(jnp.maximum(jnp.abs(jnp.diag(complete)), 1e-30))
    values, vectors = jnp.linalg.eigh(complete * scale[:, None] * scale)
    whiten = (vectors / jnp.sqrt(jnp.maximum(jnp.abs(values), 1e-3))) @ vectors.T * scale  # H^-1/2, up to a rotation
    values, vectors = jnp.linalg.eigh(jnp.eye(len(scale), dtype=complete.dtype) - whiten @ missing @ whiten.T)
    half = vectors.T @ whiten
    return (half.T / jnp.maximum(values, floor)) @ half
