# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How particles move with momentum: velocities, a metric, a pace, and what it costs in bias.

Unadjusted moves of step size h inflate the variance along a direction of curvature c to ``(1/c) / (1 - c h / 2)``,
with or without momentum. The largest curvature of a block is the largest eigenvalue of ``S = Cov(s)``, s being the
gradient in the coordinates of the metric, except that S is inflated by the same factor:

    m = top eigenvalue of S = c / (1 - c h / 2),       hence       c h / 2 = (m h / 2) / (1 + m h / 2)

m comes from a power iteration that takes one step an update, with forgetting. A step size that is not given is chosen
for a tolerated bias ``c h / 2``, and the momentum is critical for a direction of unit variance, ``z = 4 h``.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt.adaptation import adapt_size
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels.base import Potential
from numpyro_smcopt.kernels.preconditioners import Preconditioner, Preconditioning
from numpyro_smcopt.kernels.underdamped import (
    MetropolisUnderdamped,
    Moved,
    Pace,
    VelocityKernel,
    exponential,
    pace,
    stability_limit,
    uncorrected,
)
from numpyro_smcopt.theta_momentum import Number
from numpyro_smcopt.types import Array

FORGETTING = 0.02  # smallest weight of the newest cloud in the power iteration
FIRST_STEP = 0.05  # before anything is known of the curvature
FIRST_ADJUSTED_STEP, ADJUSTED_DAMPING = 1.0, 0.5


class CloudState(NamedTuple):
    """State of `LatentStep`.

    Attributes:
        velocity: [N, D] velocities, in the coordinates of the metric.
        pace: Step sizes and momenta of the blocks, [B], for the next update.
        metric: The map from those coordinates to ``x``.
        direction: [D] a unit vector per block, towards the largest curvature.
        moment: [B] second moment of the gradient along it.
        curvature: [B] curvature along it, by regression of the gradient on the place.
    """

    velocity: Array
    pace: Pace
    metric: Preconditioner
    direction: Array
    moment: Array
    curvature: Array


@dataclasses.dataclass(frozen=True)
class LatentStep:
    """Moves the particles; see the head of this file.

    Args:
        kernel: Moves one particle.
        step_size: ``h``, or a schedule of the number of updates, or None.
        damping: ``z = -log(momentum)``, likewise.
        preconditioning: How the metric is found, shared by all particles.
        tolerance: The bias ``c h / 2`` that a chosen step size may cause.
    """

    kernel: VelocityKernel
    step_size: Number
    damping: Number
    preconditioning: Preconditioning
    tolerance: float

    @property
    def adjusted(self) -> bool:
        """Whether moves are accepted or rejected, so that there is no bias."""
        return isinstance(self.kernel, MetropolisUnderdamped)

    def init(self, velocity: Array, metric: Preconditioner, blocks: Blocks) -> CloudState:
        """The state at the start.

        Args:
            velocity: [N, D] standard normal numbers.
            metric: The first metric.
            blocks: The partition.
        """
        some = np.random.default_rng(0).standard_normal(velocity.shape[1])  # special in no way
        direction, _ = _normalised(jnp.asarray(some, velocity.dtype), blocks)
        ones = jnp.ones(blocks.num_blocks, velocity.dtype)
        first = FIRST_ADJUSTED_STEP if self.adjusted else FIRST_STEP
        going = self._pace(jnp.zeros((), jnp.int32), first * ones)
        return CloudState(velocity, going, metric, direction, ones, ones)

    def move(self, normals: Array, x: Array, state: CloudState, going: Pace, potential: Potential) -> Moved:
        """One move of every particle [N, D]; see `VelocityKernel.move`."""

        def one(normals: Array, x: Array, velocity: Array) -> Moved:
            return self.kernel.move(normals, x, velocity, potential, state.metric, going)

        return jax.vmap(one)(normals, x, state.velocity)

    def update(
        self, state: CloudState, going: Pace, before: Array, moved: Moved, blocks: Blocks, num_updates: Array
    ) -> CloudState:
        """The next state.

        Args:
            state: The present state.
            going: The pace of the move.
            before: [N, D] where the particles stood.
            moved: The move.
            blocks: The partition.
            num_updates: [] moves before this one.
        """
        # Curvature
        direction, moment, curvature = self._curvature(state, before, moved, blocks, num_updates)

        # Pace
        if self.adjusted:
            acceptance, target = jnp.mean(moved.acceptance, 0), self.kernel.target  # type: ignore[attr-defined]
            size = adapt_size(going.step_size, acceptance, target, num_updates)
        else:
            largest = moment / (1 + moment * going.step_size / 2)
            size = 2 * self.tolerance / jnp.maximum(largest, 1e-6)

        # Metric
        log_weights = jnp.full((len(before), blocks.num_blocks), -np.log(len(before)), before.dtype)
        metric = self.preconditioning.adapt(state.metric, moved.x, log_weights, blocks)
        going = self._pace(num_updates + 1, size)
        return CloudState(moved.velocity, going, metric, direction, moment, curvature)

    def _curvature(
        self, state: CloudState, before: Array, moved: Moved, blocks: Blocks, num_updates: Array
    ) -> tuple[Array, Array, Array]:
        rate = jnp.maximum(1.0 / (num_updates + 1.0), FORGETTING).astype(before.dtype)
        # Around the mean: a cloud that lags behind theta has a gradient, but no more curvature than before.
        num = before.shape[0]
        centred = moved.slope - jnp.mean(moved.slope, 0) if num > 1 else moved.slope
        slope = blocks.sum_coordinates(centred * state.direction)  # [N, B]
        image = jnp.einsum("nd,nd->d", centred, blocks.to_coordinates(slope)) / max(num - 1, 1)
        old = blocks.to_coordinates(state.moment) * state.direction
        direction, moment = _normalised(old + rate * (image - old), blocks)

        z = jax.vmap(lambda x: state.metric.unfactor(x, blocks))(before) / state.metric.scale
        place = blocks.sum_coordinates((z - jnp.mean(z, 0)) * state.direction)
        spread = jnp.maximum(jnp.mean(place**2, 0), 1e-30)
        curvature = state.curvature + rate * (jnp.mean(place * slope, 0) / spread - state.curvature)
        sound = jnp.isfinite(moment) & jnp.isfinite(curvature)
        keep = lambda new, old: jnp.where(sound, new, old)  # noqa: E731
        direction = jnp.where(blocks.to_coordinates(sound), direction, state.direction)
        return direction, keep(moment, state.moment), keep(curvature, state.curvature)

    def _pace(self, num_updates: Array, size: Array) -> Pace:
        """The pace of the update after ``num_updates``; ``size [B]`` is what was found, if none is given."""
        given = self.step_size(num_updates) if callable(self.step_size) else self.step_size
        damping = self.damping(num_updates) if callable(self.damping) else self.damping
        step_size = size if given is None else given
        if damping is None:
            damping = ADJUSTED_DAMPING if self.adjusted else 4 * step_size
        going = pace(exponential, step_size, damping)
        return jax.tree.map(lambda value: jnp.broadcast_to(jnp.asarray(value, size.dtype), size.shape), going)

    def diagnose(self, state: CloudState, going: Pace) -> dict[str, Array]:
        """Bias of the latent variance, and the step size as a fraction of the largest stable one; worst blocks."""
        if self.adjusted:
            zero = jnp.zeros((), going.step_size.dtype)
            return {"latent_bias": zero, "latent_stability": zero}
        half = state.moment * going.step_size / 2
        limit = stability_limit(uncorrected(going.step_size, going.damping))
        return {"latent_bias": jnp.max(half / (1 + half)), "latent_stability": jnp.max(state.curvature / limit)}


def _normalised(vector: Array, blocks: Blocks) -> tuple[Array, Array]:
    """A unit vector per block, and the lengths [B]."""
    length = jnp.sqrt(blocks.sum_coordinates(vector**2))
    usable = blocks.to_coordinates(length) > 0
    return jnp.where(usable, vector / jnp.where(usable, blocks.to_coordinates(length), 1.0), 0.0), length
