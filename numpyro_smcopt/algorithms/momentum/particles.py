# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Motion of the particles with momentum: velocities, a metric, a pace, and its cost in bias.

Unadjusted moves of step size h inflate the variance along a direction of curvature c to ``(1/c) / (1 - c h / 2)``,
with or without momentum. The largest curvature of a block is the largest eigenvalue of ``V = Cov(s)``, s being the
gradient in the coordinates of the metric, except that V is inflated by the same factor:

    m = top eigenvalue of V = c / (1 - c h / 2),       hence       c h / 2 = (m h / 2) / (1 + m h / 2)

m comes from a power iteration that takes one step an update, with forgetting, after a few on the first cloud. A step
size that is not given is chosen for a tolerated bias ``c h / 2``, and the momentum is critical for a direction of unit
variance, ``z = 4 h``.

m is what the cloud says on average, and says late: where the curvature differs from place to place, grows, or has a
direction that the power iteration has not found, a chosen step may be too long for some particles. Moves diverge beyond
``c h = 2`` (for some momenta a little later), and a motion that does turns to the direction that makes it. So the
curvature that the particles meet on their way,

    k = sum (s' - s) . (z' - z) / sum |z' - z|^2        over the particles, and the updates with forgetting

is that of the unstable direction as soon as there is one; a chosen step never exceeds half of the limit that k gives.
k knows only where particles went, so a chosen step grows slowly: a particle that a long step throws up a wall raises m,
m shortens the steps, and with short steps it stays there.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.adaptation import adapt_size
from numpyro_smcopt.algorithms.momentum.theta import Number, at_update
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import HMC, preconditioners
from numpyro_smcopt.kernels.base import Point, Potential
from numpyro_smcopt.kernels.integrators import Integrator, exponential, stability_limit, uncorrected
from numpyro_smcopt.kernels.preconditioners import Preconditioner, Preconditioning
from numpyro_smcopt.kernels.underdamped import Moved, VelocityKernel
from numpyro_smcopt.population import tempering
from numpyro_smcopt.population.first_cloud import first_cloud, prior_cloud
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import Target
from numpyro_smcopt.random_numbers import draw_normals
from numpyro_smcopt.types import Array, Theta

FORGETTING = 0.02  # smallest weight of the newest cloud in the power iteration
FIRST_STEP = 0.05  # before anything is known of the curvature
FIRST_ADJUSTED_STEP, ADJUSTED_DAMPING = 1.0, 0.5
STABILITY_LIMIT = 2.0  # of curvature times step size: the smallest over all momenta, for moves without look-ahead
MARGIN = 2.0  # that a chosen step size keeps from it
LARGEST_TOLERANCE = STABILITY_LIMIT / MARGIN / 2  # a bias that is reached at that margin
FIRST_ITERATIONS = 10  # of the power iteration, on the first cloud
SECANT_FORGETTING = 0.1  # weight of the newest secants
GROWTH = 1.1  # of a chosen step size in one update, so that secants meet what the cloud did not, before steps are long


class Secants(NamedTuple):
    """Curvature between the places where the particles stand from update to update.

    Attributes:
        place: [N, D] where they stood, in the coordinates of the metric but for its scale, which changes.
        slope: [N, D] gradient there, likewise; zeros where there is none that the next could be compared with.
        bend: [B] running sum of changes of the gradient times those of the place.
        path: [B] running sum of the squares of those of the place, with the scale.
    """

    place: Array
    slope: Array
    bend: Array
    path: Array


class CloudState(NamedTuple):
    """State of `LatentStep`.

    Attributes:
        velocity: [N, D] velocities, in the coordinates of the metric.
        pace: Step sizes and momenta of the blocks, [B], for the next update.
        metric: The map from those coordinates to ``x``.
        direction: [D] a unit vector per block, towards the largest curvature.
        moment: [B] second moment of the gradient along it.
        curvature: [B] curvature along it, by regression of the gradient on the place.
        secants: What keeps a chosen step size of unadjusted moves stable; None for others.
    """

    velocity: Array
    pace: Integrator
    metric: Preconditioner
    direction: Array
    moment: Array
    curvature: Array
    secants: Secants | None


@dataclasses.dataclass(frozen=True)
class LatentStep:
    """Moves the particles; see the head of this file.

    Args:
        kernel: Moves one particle.
        step_size: ``h``, or a schedule of the number of updates, or None.
        damping: ``z = -log(momentum)``, likewise.
        preconditioning: How the metric is found, shared by all particles.
        tolerance: The bias ``c h / 2`` that a chosen step size may cause, `LARGEST_TOLERANCE` at most.
    """

    kernel: VelocityKernel
    step_size: Number
    damping: Number
    preconditioning: Preconditioning
    tolerance: float

    @property
    def adjusted(self) -> bool:
        """True if moves are accepted or rejected, so that there is no bias."""
        return self.kernel.target is not None

    @property
    def chooses(self) -> bool:
        """True if step sizes are chosen for a tolerated bias."""
        return self.step_size is None and not self.adjusted

    def first(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        blocks: Blocks,
        mode: Array,
        num_particles: int,
        init_strategy: Callable | None,
    ) -> Tempered:
        """The first particles, and their metric; see `first_cloud` for the arguments."""
        plain = self.preconditioning == preconditioners.none
        if self.step_size is None:
            # At the posterior from the first update on, with a metric that is known to fit.
            kernel = HMC(preconditioning=self.preconditioning)
            cloud = first_cloud(
                rng_key, target, theta, blocks, mode, kernel, num_particles, init_strategy=init_strategy
            )
            metric = tempering.identity_like(mode, None) if plain else cloud.step.preconditioner
        else:
            # As published: from the prior.
            cloud = prior_cloud(rng_key, target, theta, blocks, num_particles, init_strategy)
            metric = tempering.identity_like(mode, None)
            metric = metric if plain else tempering.rescaled(metric, cloud.points.x, blocks)
        return cloud._replace(step=cloud.step._replace(preconditioner=metric))

    def init(self, velocity: Array, metric: Preconditioner, points: Point, blocks: Blocks) -> CloudState:
        """The state at the start, from normal velocities [N, D] and the points [N, ...] that `first` found."""
        num_updates, ones = jnp.zeros((), jnp.int32), jnp.ones(blocks.num_blocks, velocity.dtype)
        some = np.random.default_rng(0).standard_normal(velocity.shape[1])  # special in no way
        direction, _ = _normalised(jnp.asarray(some, velocity.dtype), blocks)
        if not self.chooses:
            size = ones * (FIRST_ADJUSTED_STEP if self.adjusted else FIRST_STEP)
            return CloudState(velocity, self._pace(num_updates, size), metric, direction, ones, ones, None)
        slope = jax.vmap(lambda grad: metric.apply_transpose(grad, blocks))(points.grad)
        slope = jnp.where(jnp.isfinite(slope), slope, 0.0)
        centred = _centred(slope)
        iterate = lambda _, found: _normalised(_image(centred, found[0], blocks), blocks)  # noqa: E731
        direction, moment = lax.fori_loop(0, FIRST_ITERATIONS, iterate, (direction, ones))
        secants = Secants(_unfactored(points.x, metric, blocks), slope / metric.scale, 0 * ones, 0 * ones)
        size = jnp.minimum(self._unbiased_size(moment, 0 * ones), FIRST_STEP)  # that cloud has no bias
        return CloudState(velocity, self._pace(num_updates, size), metric, direction, moment, ones, secants)

    def move(self, rng_key: Array, x: Array, state: CloudState, pace: Integrator, potential: Potential) -> Moved:
        """One move of every particle [N, D]; see `VelocityKernel.move`."""
        num_normals = self.kernel.num_normals(x.shape[1], potential.blocks.num_blocks)
        normals = draw_normals(rng_key, (len(x), num_normals), x.dtype)
        one = lambda n, x, v: self.kernel.move(n, x, v, potential, state.metric, pace)  # noqa: E731
        return jax.vmap(one)(normals, x, state.velocity)

    def update(
        self, state: CloudState, pace: Integrator, before: Array, moved: Moved, blocks: Blocks, num_updates: Array
    ) -> tuple[CloudState, Array]:
        """The next state, and where the particles [N, D] stand: moves that proved unstable are taken back.

        ``before [N, D]`` is where they stood, and ``num_updates []`` counts the moves before this one.
        """
        # Curvature
        scale, place = state.metric.scale, _unfactored(before, state.metric, blocks)
        direction, moment, curvature = self._curvature(state, place / scale, moved, blocks, num_updates)
        secants = None
        if state.secants is not None:
            secants = _followed(state.secants, place, moved.slope / scale, scale, blocks)
            # Not those of a step size that a handler put there.
            unstable = (_stability(secants, pace) > 1) & (pace.step_size == state.pace.step_size)
            unstable = blocks.to_coordinates(unstable)
            x, velocity = jnp.where(unstable, before, moved.x), jnp.where(unstable, state.velocity, moved.velocity)
            moved = moved._replace(x=x, velocity=velocity)

        # Pace
        if self.adjusted:
            size = adapt_size(pace.step_size, jnp.mean(moved.acceptance, 0), self.kernel.target, num_updates)
        else:
            size = self._unbiased_size(moment, pace.step_size)
            if secants is not None:
                stability = _stability(secants, pace)
                stable = pace.step_size / (MARGIN * jnp.where(stability > 0, stability, 1.0))
                size = jnp.where(stability > 0, jnp.minimum(size, stable), size)
                size = jnp.minimum(size, GROWTH * state.pace.step_size)

        # Metric
        log_weights = jnp.full((len(before), blocks.num_blocks), -np.log(len(before)), before.dtype)
        metric = self.preconditioning.adapt(state.metric, moved.x, log_weights, blocks)
        following = self._pace(num_updates + 1, size)
        return CloudState(moved.velocity, following, metric, direction, moment, curvature, secants), moved.x

    def _unbiased_size(self, moment: Array, step_size: Array) -> Array:
        """[B] step sizes that cause the tolerated bias, from the second moments that ``step_size`` led to."""
        largest = moment / (1 + moment * step_size / 2)
        return 2 * self.tolerance / jnp.maximum(largest, 1e-6)

    def _curvature(
        self, state: CloudState, place: Array, moved: Moved, blocks: Blocks, num_updates: Array
    ) -> tuple[Array, Array, Array]:
        clouds = num_updates + (2.0 if self.chooses else 1.0)  # the first one counts where it was looked at
        rate = jnp.maximum(1.0 / clouds, FORGETTING).astype(place.dtype)
        centred = _centred(moved.slope)
        old = blocks.to_coordinates(state.moment) * state.direction
        image = _image(centred, state.direction, blocks)
        direction, moment = _normalised(old + rate * (image - old), blocks)

        slope = blocks.sum_coordinates(centred * state.direction)  # [N, B]
        place = blocks.sum_coordinates((place - jnp.mean(place, 0)) * state.direction)
        spread = jnp.maximum(jnp.mean(place**2, 0), 1e-30)
        curvature = state.curvature + rate * (jnp.mean(place * slope, 0) / spread - state.curvature)
        sound = jnp.isfinite(moment) & jnp.isfinite(curvature)
        keep = lambda new, old: jnp.where(sound, new, old)  # noqa: E731
        direction = jnp.where(blocks.to_coordinates(sound), direction, state.direction)
        return direction, keep(moment, state.moment), keep(curvature, state.curvature)

    def _pace(self, num_updates: Array, size: Array) -> Integrator:
        """The pace of the update after ``num_updates``; ``size [B]`` is what was found, if none is given."""
        given, damping = at_update(self.step_size, num_updates), at_update(self.damping, num_updates)
        step_size = size if given is None else given
        if damping is None:
            damping = ADJUSTED_DAMPING if self.adjusted else 4 * step_size
        full = lambda value: jnp.broadcast_to(jnp.asarray(value, size.dtype), size.shape)  # noqa: E731
        return jax.tree.map(full, exponential(step_size, damping))

    def diagnose(self, state: CloudState, pace: Integrator) -> dict[str, Array]:
        """Bias of the latent variance, and the step size as a fraction of the largest stable one; worst blocks."""
        if self.adjusted:
            zero = jnp.zeros((), pace.step_size.dtype)
            return {"latent_bias": zero, "latent_stability": zero}
        half = state.moment * pace.step_size / 2
        limit = stability_limit(uncorrected(pace.step_size, pace.damping))
        stability = state.curvature / limit
        if state.secants is not None:
            stability = jnp.maximum(stability, _stability(state.secants, pace))
        return {"latent_bias": jnp.max(half / (1 + half)), "latent_stability": jnp.max(stability)}


def _normalised(vector: Array, blocks: Blocks) -> tuple[Array, Array]:
    """A unit vector per block, and the lengths [B]."""
    length = jnp.sqrt(blocks.sum_coordinates(vector**2))
    usable = blocks.to_coordinates(length) > 0
    return jnp.where(usable, vector / jnp.where(usable, blocks.to_coordinates(length), 1.0), 0.0), length


def _centred(slope: Array) -> Array:
    """Gradients [N, D] around their mean: a cloud that lags behind theta has one, but no more curvature than before."""
    return slope - jnp.mean(slope, 0) if slope.shape[0] > 1 else slope


def _image(centred: Array, direction: Array, blocks: Blocks) -> Array:
    """[D] what the covariance of the centred gradients [N, D] makes of a direction, block by block."""
    along = blocks.sum_coordinates(centred * direction)
    return jnp.einsum("nd,nd->d", centred, blocks.to_coordinates(along)) / max(len(centred) - 1, 1)


def _unfactored(x: Array, metric: Preconditioner, blocks: Blocks) -> Array:
    """Particles [N, D] in the coordinates of the metric, but for its scale."""
    return jax.vmap(lambda one: metric.unfactor(one, blocks))(x)


def _followed(old: Secants, place: Array, slope: Array, scale: Array, blocks: Blocks) -> Secants:
    """The secants, with those to the new places [N, D], in the metric with the scale [D]."""
    step, change = place - old.place, slope - old.slope
    # Without a gradient, before or now, nothing walked: a particle that was lost and replaced, a cloud under new data.
    walked = blocks.sum_coordinates(slope**2) * blocks.sum_coordinates(old.slope**2) > 0

    def mixed(before: Array, now: Array) -> Array:
        now = jnp.where(walked, blocks.sum_coordinates(now), 0.0)
        now = jnp.sum(jnp.where(jnp.isfinite(now), now, 0.0), 0)
        return (1 - SECANT_FORGETTING) * before + now

    return Secants(place, slope, mixed(old.bend, step * change), mixed(old.path, (step / scale) ** 2))


def forgotten(state: CloudState, new: Array) -> CloudState:
    """The state under a target that is ``new`` ([] bool), whose gradients are not to be compared with those before."""
    if state.secants is None:
        return state
    return state._replace(secants=state.secants._replace(slope=jnp.where(new, 0.0, state.secants.slope)))


def _stability(secants: Secants, pace: Integrator) -> Array:
    """[B] step sizes as fractions of the limit that the curvature of the secants sets."""
    curvature = jnp.where(secants.path > 0, secants.bend / jnp.where(secants.path > 0, secants.path, 1.0), 0.0)
    return pace.step_size * curvature / STABILITY_LIMIT
