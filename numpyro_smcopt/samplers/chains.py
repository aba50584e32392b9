# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Persistent Markov chains that follow theta, the "infinite-time" sampler.

At every update, after ``theta_k`` has become ``theta'``, each particle makes a few moves of a kernel. With unadjusted
Langevin (`kernels.ULA`) and the two published orders,

    gradient of the old theta (Marion et al. 2024):   x' = x - h grad_x U_theta_k(x) + sqrt(2h) xi
    gradient of the new theta (their code):           x' = x - h grad_x U_theta'(x)  + sqrt(2h) xi

the first of which needs a single evaluation per update: that of ``x'`` at ``theta'``, which serves the next gradient in
theta and the next move. Kernels that accept or reject know only the second.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import Blocks, Partition, one_block
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import HMC, MALA, Kernel, Point, Potential, Step, is_kernel
from numpyro_smcopt.objectives import Cloud, Objective, Scene
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.evaluate import added_up, blocks_are_wrong, equal_draws, evaluator, gather
from numpyro_smcopt.population.first_cloud import first_cloud, first_step, starts_from_prior
from numpyro_smcopt.population.gradients import default_theta_step, step_context, surrogate_gradient
from numpyro_smcopt.population.independent_blocks import independent_blocks
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.samplers.base import Assessed, Sampler
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.types import Array, Theta
from numpyro_smcopt.weights import conditional_ess, incremental_log_weight, reweight, uniform_log_weights

RELAXATION = 2.0  # time in which a cloud of unit scale forgets where it was; half of that if all moves were accepted

Schedule = Callable[[Array], Array]
"""The number of an update to a factor, as in `optax.schedules`."""


class ChainState(NamedTuple):
    """Particles of `Chains`.

    Attributes:
        points: [N, ...] evaluated at the present theta.
        log_weights: [N, B] equal.
        step: Step sizes and preconditioner.
        elapsed: [] the last update's moves, in the particles' own time.
        log_evidence_start: [] ``log Z`` at the start, or zero if the prior cannot be sampled.
        log_evidence_change: [] running estimate of its change since.
    """

    points: Point
    log_weights: Array
    step: Step
    elapsed: Array
    log_evidence_start: Array
    log_evidence_change: Array


@dataclasses.dataclass(frozen=True)
class Chains(Sampler):
    """Persistent Markov chains.

    Args:
        kernel: How a particle moves. `kernels.MALA`, the default, has no bias from its step size and adapts it; the
            algorithm as published moves by ``kernels.ULA(step_size, target=None)``.
        moves_per_update: Moves per step of theta: more let the particles keep up with a faster theta.
        gradient_of_new_theta: For kernels that do not accept or reject: whether the first move of an update follows the
            gradient at the new theta, at the cost of one more evaluation, or the old one, which is known.
        schedule: Factor of the step size as a function of the number of the update, for instance
            ``lambda k: (1 + k) ** -0.5``.
        init_strategy: A strategy such as `numpyro.infer.init_to_uniform` for particles that cannot be drawn from the
            prior, or shall not be.
        partition: How independent blocks are found, for the marginal likelihood; other objectives need one block.

    Raises:
        TypeError: If the kernel is none.
        ValueError: If ``moves_per_update`` is not a positive integer.
    """

    kernel: Kernel = MALA()
    moves_per_update: int = 1
    gradient_of_new_theta: bool = False
    schedule: Schedule | None = None
    init_strategy: Callable | None = None
    partition: Partition = find_blocks
    has_energy = True

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not is_kernel(self.kernel):
            raise TypeError(f"kernel must be an object from numpyro_smcopt.kernels such as ULA(), got {self.kernel!r}.")
        moves = self.moves_per_update
        if isinstance(moves, bool) or not isinstance(moves, int) or moves < 1:
            raise ValueError(f"moves_per_update must be a positive integer, got {moves!r}.")

    def check(self, target: Target, theta: Theta, objective: Objective) -> None:
        """See `Sampler.check`."""
        del theta, objective
        if not target.sites.latents:
            raise ValueError(
                "The model has no latent sites, so there is nothing to sample. Declare the samples with "
                "`numpyro.sample` and the energy with `numpyro.factor(name, -energy)`; or, if the model returns the "
                "drift of a diffusion, pass sampler=samplers.EulerMaruyama(...)."
            )

    def find_blocks(self, rng_key: Array, bound: BoundTarget, theta: Theta, objective: Objective) -> Blocks:
        """See `Sampler.find_blocks`."""
        partition = one_block if objective.whole_particles else self.partition
        return independent_blocks(rng_key, bound, theta, partition, self.init_strategy)

    def first_particles(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        blocks: Blocks,
        mode: Array,
        objective: Objective,
        num_particles: int | None,
    ) -> tuple[ChainState, Tempered]:
        """See `Sampler.first_particles`."""
        work, likelihood = target.work(theta), objective.is_likelihood
        num = num_particles or budget.default_num_particles(work, control_variates=likelihood)
        target, blocks = added_up(target, blocks)
        kernel = self.kernel if self.kernel.invariant else HMC()
        cloud = first_cloud(rng_key, target, theta, blocks, mode, kernel, num, init_strategy=self.init_strategy)
        points = cloud.points
        _, flat, _ = flat_terms(target, theta)
        evaluations = self.moves_per_update * self.kernel.num_evaluations
        if budget.carries_scores(num, flat.size, blocks.num_blocks, target.work(theta), evaluations):
            points = jax.vmap(evaluator(target, theta, scores=True))(points.x)
        zero = jnp.zeros((), points.x.dtype)
        known = starts_from_prior(target, self.init_strategy)
        free = -blocks.sum_free_terms(points.terms[0])
        particles = ChainState(
            points=points,
            log_weights=uniform_log_weights(num, blocks.num_blocks, points.x.dtype),
            step=first_step(self.kernel, cloud.step, kernel),
            elapsed=zero,
            log_evidence_start=jnp.sum(cloud.log_evidence) + free if known else zero,
            log_evidence_change=zero,
        )
        return particles, cloud._replace(points=points)

    def theta_step(self, target: Target, theta: Theta, particles: ChainState, objective: Objective) -> ThetaStep:
        """See `Sampler.theta_step`."""
        evaluations = self.moves_per_update * self.kernel.num_evaluations
        num, num_blocks = particles.log_weights.shape
        return default_theta_step(objective, target, theta, num, num_blocks, evaluations)

    def step_context(
        self, target: Target, theta: Theta, particles: ChainState, blocks: Blocks, num_updates: Array
    ) -> StepContext:
        """See `Sampler.step_context`."""
        target, blocks = added_up(target, blocks)
        _, flat, _ = flat_terms(target, theta)
        around = step_context(target, theta, flat, particles.points, particles.log_weights, blocks, num_updates)
        # Particles without weights have to follow: theta goes as far in a time of relaxation as one step may go. In the
        # coordinates of the preconditioner the cloud has unit scale.
        at_first = self.moves_per_update * jnp.mean(particles.step.size)
        time = jnp.where(particles.elapsed > 0, particles.elapsed, at_first)
        return around._replace(elapsed=particles.elapsed, reach=jnp.minimum(1.0, time / RELAXATION))

    def advance(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        particles: ChainState,
        blocks: Blocks,
        num_updates: Array,
        objective: Objective,
        controls: dict[str, Array],
    ) -> tuple[ChainState, dict[str, Array]]:
        """See `Sampler.advance`."""
        del objective
        target, blocks = added_up(target, blocks)
        points, num = particles.points, particles.points.x.shape[0]
        adjusted = self.kernel.invariant
        evaluate = evaluator(target, theta, points.score is not None)
        factor = 1.0 if self.schedule is None else self.schedule(num_updates)
        step = particles.step._replace(size=controls["step_size"] * factor)

        # How far theta has moved, in weights that the particles are not given
        if adjusted or self.gradient_of_new_theta:
            here = jax.vmap(evaluate)(points.x)
        else:
            here = points._replace(terms=jax.vmap(lambda x: target.terms(theta, x))(points.x))
        change = incremental_log_weight(points.terms, here.terms, blocks.sum_terms)
        weighed = reweight(particles.log_weights, change)
        free = jnp.mean(blocks.sum_free_terms(points.terms - here.terms))

        # Move
        move = lambda noise, p: self.kernel.move(noise, p, Potential(evaluate, blocks), step)  # noqa: E731
        num_uniforms = self.kernel.num_uniforms(points.x.shape[1], blocks.num_blocks)

        def body(k: Array, carry: tuple[Point, Array]) -> tuple[Point, Array]:
            old, _ = carry
            new, told = jax.vmap(move)(draw_random_numbers(random.fold_in(rng_key, k), old.x, num_uniforms), old)
            if adjusted:
                return new, jnp.mean(told, 0)
            change = incremental_log_weight(old.terms, new.terms, blocks.sum_terms, told)
            # Of those that met a finite energy: the others are not for the step size to answer for.
            met = jnp.maximum(jnp.mean(jnp.isfinite(change), 0), 1 / num)
            return new, conditional_ess(particles.log_weights, change) / met

        moved, quality = lax.fori_loop(0, self.moves_per_update, body, (here, jnp.zeros_like(step.size)))
        moved, num_lost = _replace_lost(moved, points, blocks)

        # Adapt
        size = self.kernel.adapt(controls["step_size"], quality, num_updates)
        preconditioner = self.kernel.preconditioning.adapt(step.preconditioner, moved.x, particles.log_weights, blocks)
        gained = jnp.sum(weighed.log_mean) + free
        particles = particles._replace(
            points=moved,
            step=Step(size, preconditioner),
            elapsed=jnp.mean(step.size) * self.moves_per_update,
            log_evidence_change=particles.log_evidence_change + jnp.where(jnp.isfinite(gained), gained, 0.0),
        )
        ess = weighed.ess / num
        diagnostics = {
            "log_evidence": particles.log_evidence_start + particles.log_evidence_change,
            "ess": jnp.min(ess),
            "mean_ess": jnp.mean(ess),
            "acceptance_rate": jnp.mean(quality) if adjusted else jnp.ones_like(ess[0]),
            "mean_step_size": jnp.mean(particles.step.size),
            "num_nonfinite": num_lost,
            "block_acceptance" if adjusted else "block_step_ess": quality,
        }
        return particles, diagnostics

    def assess(
        self, rng_key: Array, target: Target, theta: Theta, particles: ChainState, blocks: Blocks, objective: Objective
    ) -> Assessed:
        """See `Sampler.assess`."""
        target, blocks = added_up(target, blocks)
        change = particles.log_evidence_change
        log_evidence = particles.log_evidence_start + change
        cloud = Cloud(*particles.points[:3], particles.log_weights, blocks, log_evidence, change)
        estimate = objective.estimate(Scene(target, theta, target.attached, rng_key), cloud)
        terms_fn, flat, unravel = flat_terms(target, theta)
        gradient = surrogate_gradient(terms_fn, flat, unravel, particles.points, estimate, blocks)
        curvature = jnp.asarray(estimate.curvature, gradient.dtype)
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return Assessed(gradient, estimate.loss, curvature, estimate.diagnostics, masked)

    def adopt(
        self, rng_key: Array, target: Target, theta: Theta, particles: ChainState, blocks: Blocks
    ) -> tuple[ChainState, Array]:
        """See `Sampler.adopt`."""
        target, blocks = added_up(target, blocks)
        points = particles.points
        again = jax.vmap(evaluator(target, theta, points.score is not None))(points.x)
        return particles._replace(points=again), blocks_are_wrong(rng_key, target, theta, points.x, blocks)

    def controls(self, particles: ChainState) -> dict[str, Array]:
        """See `Sampler.controls`."""
        return {"step_size": particles.step.size}

    def draw(
        self, rng_key: Array, target: Target, theta: Theta, particles: ChainState, blocks: Blocks, num: int
    ) -> dict[str, Array]:
        """See `Sampler.draw`."""
        x = equal_draws(rng_key, particles.points.x, particles.log_weights, blocks, num)
        return jax.vmap(lambda one: target.constrain_latents(theta, one))(x)

    def size(self, particles: ChainState) -> int:
        """See `Sampler.size`."""
        return particles.log_weights.shape[0]


def as_sampler(sampler: Any) -> Sampler:
    """A sampler as it is, `Chains` of a kernel, or by default ``Chains()``.

    Raises:
        TypeError: If it is neither.
    """
    if sampler is None:
        return Chains()
    if is_kernel(sampler):
        return Chains(sampler)
    if isinstance(sampler, type) or not all(hasattr(sampler, name) for name in Sampler.__abstractmethods__):
        raise TypeError(
            "sampler must be an object from numpyro_smcopt.samplers such as Chains(), or a kernel such as MALA(); "
            f"got {sampler!r}."
        )
    return sampler


def _replace_lost(moved: Point, before: Point, blocks: Blocks) -> tuple[Point, Array]:
    """Blocks that left for infinity (an unstable step size) start again where others are; how many they were."""
    sound = jnp.isfinite(blocks.sum_terms(moved.terms) + blocks.sum_free_terms(moved.terms)[:, None])
    sound &= jnp.isfinite(blocks.sum_coordinates(moved.x)) & jnp.isfinite(blocks.sum_coordinates(moved.grad))
    num, num_sound = len(sound), jnp.sum(sound, 0)

    def mend(points: Point) -> Point:
        own = jnp.arange(num)[:, None]
        donors = jnp.take_along_axis(jnp.argsort(~sound, 0, stable=True), own % jnp.maximum(num_sound, 1), 0)
        found, nobody = gather(points, jnp.where(sound, own, donors), blocks), num_sound == 0
        of_x, of_term = blocks.to_coordinates(nobody), blocks.to_terms(nobody, jnp.all(nobody)[None])
        score = found.score
        if score is not None and before.score is not None:
            score = jnp.where(nobody, before.score, score)
        return Point(
            jnp.where(of_x, before.x, found.x),
            jnp.where(of_term, before.terms, found.terms),
            jnp.where(of_x, before.grad, found.grad),
            score,
        )

    return changed_if(~jnp.all(sound), mend, moved), jnp.sum(~sound, dtype=jnp.int32)
