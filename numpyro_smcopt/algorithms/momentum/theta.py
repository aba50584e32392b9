# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Motion of ``theta`` with momentum: a velocity, a metric, a pace, and an average.

    ahead  = theta + lookahead v,       g = metric(gradient at ahead)
    theta' = theta + carry v - drift g,   v' = decay v - kick g

with the numbers of an `Integrator`. The metric is any optax transformation, or, by default and where it can be
afforded, the inverse of the complete-data information ``H``: a gradient step of length one is then a step of the EM
algorithm, in any units. What EM lacks is speed where much information is missing, and that is what momentum gives:
with ``lambda`` the smallest eigenvalue of the observed information relative to ``H`` (the largest is at most one),

    z = sqrt(8 lambda / 4),     h = z / (4 lambda)

is critical damping for the slowest direction, and leaves a factor of two of stability in the fastest one of theta and
latents together (whose eigenvalues reach two, where those of theta alone reach one). The slowest direction then
converges at the rate ``sqrt(lambda / 2)`` a step where EM has ``lambda``.

The answer is an average of the iterates whose weights grow like ``k^a``, so that it forgets the approach without a
horizon to be given (Shamir and Zhang 2013).
"""

import abc
import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.information import Information
from numpyro_smcopt.kernels.integrators import Integrator, IntegratorFn, damping_ratio, exponential, stability_limit
from numpyro_smcopt.theta_step import StepContext, inverse_metric, running_mean
from numpyro_smcopt.types import Array, Theta

LARGEST_CURVATURE = 4.0  # twice what theta and latents together can have in the metric of the complete information
SMALLEST_SHARE = 0.003  # of observed information that the pace is chosen for
MARGIN = 3.0  # of the stability limit, for a step size that goes with a given momentum
FORGETTING = 0.1  # smallest weight of the newest information in the running mean
LONGEST_STEP = 0.25  # variance of the change of energy that one step may cause in a block
LOOK_EVERY, LOOK_AT_FIRST = 10, 20  # updates between looks at the curvature along the velocity
MOST_DAMPED = 100.0

Number = float | Callable[[Array], Array] | None
"""A constant, a schedule of the number of updates, or None: chosen from the model."""


# -- metrics -------------------------------------------------------------------------------------------------------
class Metric(abc.ABC):
    """Turns a gradient into a direction."""

    @abc.abstractmethod
    def init(self, theta: Theta) -> Any:
        """The state at the start."""

    @abc.abstractmethod
    def apply(self, state: Any, theta: Theta, context: StepContext, num_updates: Array) -> tuple[Array, Any]:
        """Direction [P] and the next state."""

    @abc.abstractmethod
    def curvature(self, state: Any, velocity: Array, direction: Array, context: StepContext) -> Array:
        """[2] curvature along the velocity, in the metric.

        First that of the energy with the particles standing still, which makes a step unstable; then that of the loss
        with the particles following, which makes it oscillate.
        """

    def spread(self, state: Any, step: Array) -> Array | float:
        """[] variance of the change of energy that a step [P] makes in a block; zero where it is not known."""
        del state, step
        return 0.0

    def slowest(self, state: Any) -> Array | None:
        """[] smallest share of observed in complete information; None where it is not known."""
        del state
        return None


class InformationState(NamedTuple):
    """State of `InformationMetric`: a running mean of the information, its inverse [P, P] and slowest share []."""

    information: Information
    inverse: Array
    share: Array


@dataclasses.dataclass(frozen=True)
class InformationMetric(Metric):
    """The inverse of the running complete-data information: natural steps of EM, without units.

    Args:
        refresh_every: Updates between two evaluations of the information.
    """

    refresh_every: int = 5

    def init(self, theta: Theta) -> InformationState:
        """See `Metric.init`."""
        flat, _ = ravel_pytree(theta)
        matrix, one = jnp.zeros((flat.size, flat.size), flat.dtype), jnp.ones((), flat.dtype)
        return InformationState(Information(matrix, matrix, one), matrix, one)

    def apply(
        self, state: InformationState, theta: Theta, context: StepContext, num_updates: Array
    ) -> tuple[Array, InformationState]:
        """See `Metric.apply`."""
        del theta

        def refreshed(state: InformationState) -> InformationState:
            renewals = num_updates // self.refresh_every
            information, usable = running_mean(state.information, context.information(), renewals, FORGETTING)
            inverse = jnp.where(usable, inverse_metric(information, 1.0), state.inverse)
            # Shares of observed information, from a symmetric root of the inverse.
            values, vectors = jnp.linalg.eigh(inverse)
            root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
            shares = 1 - jnp.linalg.eigvalsh(root.T @ information.missing @ root)
            known = usable & jnp.all(jnp.isfinite(shares))
            return InformationState(information, inverse, jnp.where(known, shares[-1], state.share))

        state = lax.cond(num_updates % self.refresh_every == 0, refreshed, lambda state: state, state)
        return state.inverse @ context.gradient, state

    def curvature(self, state: InformationState, velocity: Array, direction: Array, context: StepContext) -> Array:
        """See `Metric.curvature`."""
        del direction, context
        velocity = _scaled(velocity)
        complete = velocity @ state.information.complete @ velocity
        missing = velocity @ state.information.missing @ velocity
        usable = complete > 0
        return jnp.where(usable, jnp.stack([jnp.ones_like(complete), 1 - missing / jnp.where(usable, complete, 1)]), 0)

    def spread(self, state: InformationState, step: Array) -> Array:
        """See `Metric.spread`."""
        return state.information.largest_share * (step @ state.information.missing @ step)

    def slowest(self, state: InformationState) -> Array:
        """See `Metric.slowest`."""
        return state.share


@dataclasses.dataclass(frozen=True)
class TransformMetric(Metric):
    """Any optax transformation of the gradient that keeps its sign, such as `optax.scale_by_rms()`.

    Args:
        transformation: The transformation; it sees the tree of unconstrained parameters.
    """

    transformation: optax.GradientTransformation

    def init(self, theta: Theta) -> Any:
        """See `Metric.init`."""
        return self.transformation.init(theta)

    def apply(self, state: Any, theta: Theta, context: StepContext, num_updates: Array) -> tuple[Array, Any]:
        """See `Metric.apply`."""
        del num_updates
        _, unravel = ravel_pytree(theta)
        direction, state = self.transformation.update(unravel(context.gradient), state, theta)
        return ravel_pytree(direction)[0], state

    def curvature(self, state: Any, velocity: Array, direction: Array, context: StepContext) -> Array:
        """See `Metric.curvature`; the transformation is taken to be a scale per coordinate."""
        del state
        usable = jnp.abs(direction) > 0
        scale = jnp.abs(jnp.where(usable, context.gradient / jnp.where(usable, direction, 1.0), 0.0))
        velocity = _scaled(velocity)
        length = jnp.sum(scale * velocity**2)
        complete, missing = context.along(velocity)
        both = jnp.stack([complete, complete - missing])
        return jnp.where(length > 0, both / jnp.maximum(length, 1e-30), 0.0)


def _scaled(velocity: Array) -> Array:
    """The velocity [P] with a largest coordinate of one: its own square might overflow."""
    return velocity / jnp.maximum(jnp.max(jnp.abs(velocity)), 1e-30)


# -- steps ---------------------------------------------------------------------------------------------------------
class MotionState(NamedTuple):
    """State of `MomentumStep`.

    Attributes:
        velocity: [P] in units of mass one.
        pace: The numbers of the next update.
        metric: State of the metric.
        average: [P] the running average of theta.
        curvature: [2] along the velocity, when it was last looked at; see `Metric.curvature`.
        num_updates: [] so far.
        num_restarts: [] of them lost the velocity.
    """

    velocity: Array
    pace: Integrator
    metric: Any
    average: Array
    curvature: Array
    num_updates: Array
    num_restarts: Array


@dataclasses.dataclass(frozen=True)
class MomentumStep:
    """Moves theta; see the head of this file.

    Args:
        metric: Turns the gradient into a direction.
        step_size: ``h``, or a schedule of the number of updates, or None.
        damping: ``z = -log(momentum)``, likewise.
        scheme: Makes the numbers of a step; `exponential`, `uncorrected` or `nesterov`.
        averaging: Exponent of the growing weights of the average; None for the last iterate.
        restart: Whether the velocity is dropped where it leads uphill beyond the noise of the gradient.
    """

    metric: Metric
    step_size: Number = None
    damping: Number = None
    scheme: IntegratorFn = exponential
    averaging: float | None = 7.0
    restart: bool = False

    def init(self, theta: Theta) -> MotionState:
        """The state at the start: no velocity."""
        flat, _ = ravel_pytree(theta)
        zero, metric, none = jnp.zeros((), jnp.int32), self.metric.init(theta), jnp.zeros(2, flat.dtype)
        return MotionState(jnp.zeros_like(flat), self._pace(metric, zero, flat.dtype), metric, flat, none, zero, zero)

    def update(
        self,
        state: MotionState,
        pace: Integrator,
        theta: Theta,
        context: StepContext,
        num_particles: int,
        noise: Array | None = None,
    ) -> tuple[Array, MotionState]:
        """The next theta [P] and state; ``noise`` are standard normal numbers [2, P], or None."""
        flat, _ = ravel_pytree(theta)
        velocity, restarts = state.velocity, state.num_restarts
        if self.restart:
            uphill = context.gradient @ velocity > 2 * jnp.sqrt(context.spread(velocity) / num_particles)
            velocity, restarts = jnp.where(uphill, 0.0, velocity), restarts + uphill.astype(jnp.int32)

        # Direction
        direction, metric = self.metric.apply(state.metric, theta, context, state.num_updates)
        direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0.0)

        # Step, no longer than the particles can follow
        step = pace.carry * velocity - pace.drift * direction
        velocity = pace.decay * velocity - pace.kick * direction
        if noise is not None:
            noise = noise / math.sqrt(num_particles)
            step = step + pace.xv * noise[0] + pace.xx * noise[1]
            velocity = velocity + pace.vv * noise[0]
        spread = self.metric.spread(metric, step)
        shorter = jnp.sqrt(jnp.minimum(1.0, LONGEST_STEP / jnp.maximum(spread, 1e-30)))
        step, velocity = shorter * step, shorter * velocity

        # Curvature
        num = state.num_updates + 1
        curvature = lax.cond(
            (num % LOOK_EVERY == 0) | (num <= LOOK_AT_FIRST),
            lambda v: self.metric.curvature(metric, v, direction, context),
            lambda v: state.curvature,
            velocity,
        )

        # Average
        flat = flat + step
        weight = 1.0 if self.averaging is None else (1 + self.averaging) / (num + self.averaging)
        average = state.average + jnp.asarray(weight, flat.dtype) * (flat - state.average)
        following = self._pace(metric, num, flat.dtype)
        return flat, MotionState(velocity, following, metric, average, curvature, num, restarts)

    def _pace(self, metric: Any, num_updates: Array, dtype: Any) -> Integrator:
        """The numbers of the update after ``num_updates``."""
        step_size, damping = at_update(self.step_size, num_updates), at_update(self.damping, num_updates)
        share = self.metric.slowest(metric)
        if share is not None:
            share = jnp.clip(share, SMALLEST_SHARE, 1.0)
            if damping is None:
                damping = jnp.sqrt(8 * share / LARGEST_CURVATURE)
            if step_size is None:
                unit = self.scheme(jnp.ones_like(share), jnp.asarray(damping, share.dtype))
                step_size = jnp.minimum(damping / (4 * share), stability_limit(unit) / MARGIN)
        return jax.tree.map(lambda value: jnp.asarray(value, dtype), self.scheme(step_size, damping))

    def diagnose(self, state: MotionState, pace: Integrator) -> dict[str, Array]:
        """Damping ratio along the velocity, and the step size as a fraction of the largest stable one."""
        complete, observed = state.curvature
        usable = observed > 0
        ratio = damping_ratio(pace.step_size, pace.damping, jnp.where(usable, observed, 1.0))
        return {
            "damping": jnp.where(usable, jnp.minimum(ratio, MOST_DAMPED), MOST_DAMPED),
            "stability": jnp.maximum(complete, 0.0) / stability_limit(pace),
            "num_restarts": state.num_restarts,
        }


def at_update(number: Number, num_updates: Array) -> Any:
    """A number, or what a schedule says after ``num_updates``."""
    return number(num_updates) if callable(number) else number
