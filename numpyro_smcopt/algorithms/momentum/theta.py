# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How ``theta`` moves with momentum: a velocity, a metric, a pace, and an average.

    ahead  = theta + lookahead v,       g = P(gradient at ahead)
    theta' = theta + carry v - drift g,   v' = decay v - kick g

with the numbers of an `Integrator`. The metric ``P`` is any optax transformation, or, by default and where it can be
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

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.information import Information
from numpyro_smcopt.kernels.underdamped import (
    IntegratorFn,
    Pace,
    damping_ratio,
    exponential,
    pace,
    stability_limit,
)
from numpyro_smcopt.theta_step import inverse_metric
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


class Around(NamedTuple):
    """What a step may ask; functions, so that only what is asked for is computed.

    Attributes:
        gradient: [P] estimate of the gradient of the loss, at the place where it is taken.
        information: () -> complete and missing information.
        along: ``v [P]`` -> complete and missing information along it, [] and [].
        slope_error: ``v [P]`` -> [] standard error of ``gradient . v``.
    """

    gradient: Array
    information: Callable[[], Information]
    along: Callable[[Array], tuple[Array, Array]]
    slope_error: Callable[[Array], Array]


class Curvature(NamedTuple):
    """Curvature along the velocity, in the metric.

    Attributes:
        complete: [] of the energy, with the particles standing still: what makes a step unstable.
        observed: [] of the loss, with the particles following: what makes a step oscillate.
    """

    complete: Array
    observed: Array


# -- metrics -------------------------------------------------------------------------------------------------------
class Metric(Protocol):
    """Turns a gradient into a direction."""

    def init(self, theta: Theta) -> Any:
        """The state at the start."""

    def apply(self, state: Any, theta: Theta, around: Around) -> tuple[Array, Any]:
        """Direction [P] and the next state."""

    def curvature(self, state: Any, velocity: Array, direction: Array, around: Around) -> Curvature:
        """Curvature along the velocity."""


class InformationState(NamedTuple):
    """State of `InformationMetric`: a running mean of the information, and what follows from it."""

    num_updates: Array
    information: Information
    inverse: Array
    slowest: Array


@dataclasses.dataclass(frozen=True)
class InformationMetric:
    """The inverse of the running complete-data information: natural steps of EM, without units.

    Args:
        refresh_every: Updates between two evaluations of the information.
    """

    refresh_every: int = 5

    def init(self, theta: Theta) -> InformationState:
        """See `Metric.init`."""
        flat, _ = ravel_pytree(theta)
        matrix, one = jnp.zeros((flat.size, flat.size), flat.dtype), jnp.ones((), flat.dtype)
        return InformationState(jnp.zeros((), jnp.int32), Information(matrix, matrix, one), matrix, one)

    def apply(self, state: InformationState, theta: Theta, around: Around) -> tuple[Array, InformationState]:
        """See `Metric.apply`."""
        del theta
        due = state.num_updates % self.refresh_every == 0
        state = lax.cond(due, lambda state: self._refreshed(state, around), lambda state: state, state)
        return state.inverse @ around.gradient, state._replace(num_updates=state.num_updates + 1)

    def _refreshed(self, state: InformationState, around: Around) -> InformationState:
        new = around.information()
        usable = jnp.all(jnp.isfinite(new.complete)) & jnp.all(jnp.isfinite(new.missing))
        weight = jnp.maximum(1.0 / (state.num_updates // self.refresh_every + 1), FORGETTING)
        mix = lambda a, b: jnp.where(usable, a + weight.astype(a.dtype) * (b - a), a)  # noqa: E731
        information = jax.tree.map(mix, state.information, new)
        inverse = jnp.where(usable, inverse_metric(information, 1.0), state.inverse)
        # Shares of observed information, from a symmetric root of the inverse.
        values, vectors = jnp.linalg.eigh(inverse)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))
        shares = 1 - jnp.linalg.eigvalsh(root.T @ information.missing @ root)
        slowest = jnp.where(usable & jnp.all(jnp.isfinite(shares)), shares[-1], state.slowest)
        return state._replace(information=information, inverse=inverse, slowest=slowest)

    def curvature(self, state: InformationState, velocity: Array, direction: Array, around: Around) -> Curvature:
        """See `Metric.curvature`."""
        del direction, around
        velocity = velocity / jnp.maximum(jnp.max(jnp.abs(velocity)), 1e-30)
        complete = velocity @ state.information.complete @ velocity
        missing = velocity @ state.information.missing @ velocity
        usable = complete > 0
        observed = jnp.where(usable, 1 - missing / jnp.where(usable, complete, 1.0), 0.0)
        return Curvature(usable.astype(observed.dtype), observed)


@dataclasses.dataclass(frozen=True)
class TransformMetric:
    """Any optax transformation of the gradient that keeps its sign, such as `optax.scale_by_rms()`.

    Args:
        transformation: The transformation; it sees the tree of unconstrained parameters.
    """

    transformation: optax.GradientTransformation

    def init(self, theta: Theta) -> Any:
        """See `Metric.init`."""
        return self.transformation.init(theta)

    def apply(self, state: Any, theta: Theta, around: Around) -> tuple[Array, Any]:
        """See `Metric.apply`."""
        _, unravel = ravel_pytree(theta)
        direction, state = self.transformation.update(unravel(around.gradient), state, theta)
        return ravel_pytree(direction)[0], state

    def curvature(self, state: Any, velocity: Array, direction: Array, around: Around) -> Curvature:
        """See `Metric.curvature`; the transformation is taken to be a scale per coordinate."""
        del state
        usable = jnp.abs(direction) > 0
        scale = jnp.abs(jnp.where(usable, around.gradient / jnp.where(usable, direction, 1.0), 0.0))
        velocity = velocity / jnp.maximum(jnp.max(jnp.abs(velocity)), 1e-30)  # its square might overflow
        length = jnp.sum(scale * velocity**2)
        complete, missing = around.along(velocity)
        relative = lambda value: jnp.where(length > 0, value / jnp.maximum(length, 1e-30), 0.0)  # noqa: E731
        return Curvature(relative(complete), relative(complete - missing))


# -- steps ---------------------------------------------------------------------------------------------------------
class MotionState(NamedTuple):
    """State of `MomentumStep`.

    Attributes:
        velocity: [P] in units of mass one.
        pace: Step size, momentum and what follows from them, for the next update.
        metric: State of the metric.
        average: [P] the running average of theta.
        curvature: Along the velocity, when it was last looked at.
        num_updates: [] so far.
        num_restarts: [] of them lost the velocity.
    """

    velocity: Array
    pace: Pace
    metric: Any
    average: Array
    curvature: Curvature
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
        zero, metric = jnp.zeros((), jnp.int32), self.metric.init(theta)
        flatness = Curvature(*jnp.zeros((2,), flat.dtype))
        return MotionState(
            jnp.zeros_like(flat), self._pace(metric, zero, flat.dtype), metric, flat, flatness, zero, zero
        )

    def update(
        self, state: MotionState, going: Pace, theta: Theta, around: Around, noise: Array | None = None
    ) -> tuple[Array, MotionState]:
        """The next theta and state.

        Args:
            state: The present state.
            going: The pace, under the control of handlers.
            theta: The tree of parameters.
            around: What is known ahead of it.
            noise: [2, P] normal numbers with the variance of one particle's share, or None.
        """
        flat, _ = ravel_pytree(theta)
        by = going.integrator
        velocity, restarts = state.velocity, state.num_restarts
        if self.restart:
            uphill = self._uphill(velocity, around)
            velocity, restarts = jnp.where(uphill, 0.0, velocity), restarts + uphill.astype(jnp.int32)

        # Direction
        direction, metric = self.metric.apply(state.metric, theta, around)
        usable = jnp.all(jnp.isfinite(direction))
        direction = jnp.where(usable, direction, 0.0)

        # Step
        step = by.carry * velocity - by.drift * direction
        velocity = by.decay * velocity - by.kick * direction
        if noise is not None:
            step = step + by.xv * noise[0] + by.xx * noise[1]
            velocity = velocity + by.vv * noise[0]

        # Length
        if isinstance(metric, InformationState):
            spread = metric.information.largest_share * (step @ metric.information.missing @ step)
            shorter = jnp.sqrt(jnp.minimum(1.0, LONGEST_STEP / jnp.maximum(spread, 1e-30)))
            step, velocity = shorter * step, shorter * velocity

        # Curvature
        num = state.num_updates + 1
        curvature = lax.cond(
            (num % LOOK_EVERY == 0) | (num <= LOOK_AT_FIRST),
            lambda v: self.metric.curvature(metric, v, direction, around),
            lambda v: state.curvature,
            velocity,
        )

        # Average
        flat = flat + step
        weight = 1.0 if self.averaging is None else (1 + self.averaging) / (num + self.averaging)
        average = state.average + jnp.asarray(weight, flat.dtype) * (flat - state.average)
        following = self._pace(metric, num, flat.dtype)
        return flat, MotionState(velocity, following, metric, average, curvature, num, restarts)

    def _uphill(self, velocity: Array, around: Around) -> Array:
        """Whether the loss grows along the velocity, by more than two standard errors of the gradient."""
        slope, error = around.gradient @ velocity, around.slope_error(velocity)
        return slope > 2 * error

    def _pace(self, metric: Any, num_updates: Array, dtype: Any) -> Pace:
        """The pace of the update after ``num_updates``."""
        step_size = self.step_size(num_updates) if callable(self.step_size) else self.step_size
        damping = self.damping(num_updates) if callable(self.damping) else self.damping
        if isinstance(metric, InformationState):
            share = jnp.clip(metric.slowest, SMALLEST_SHARE, 1.0)
            if damping is None:
                damping = jnp.sqrt(8 * share / LARGEST_CURVATURE)
            if step_size is None:
                unit = self.scheme(jnp.ones_like(share), jnp.asarray(damping, share.dtype))
                step_size = jnp.minimum(damping / (4 * share), stability_limit(unit) / MARGIN)
        return jax.tree.map(lambda value: jnp.asarray(value, dtype), pace(self.scheme, step_size, damping))

    def diagnose(self, state: MotionState, going: Pace) -> dict[str, Array]:
        """Damping ratio along the velocity, and the step size as a fraction of the largest stable one."""
        complete, observed = state.curvature
        usable = observed > 0
        ratio = damping_ratio(going.step_size, going.damping, jnp.where(usable, observed, 1.0))
        return {
            "damping": jnp.where(usable, jnp.minimum(ratio, MOST_DAMPED), MOST_DAMPED),
            "stability": jnp.maximum(complete, 0.0) / stability_limit(going.integrator),
        }

    def estimate(self, state: MotionState) -> Array:
        """[P] the answer so far."""
        return state.average
