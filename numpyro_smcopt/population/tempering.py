# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From the prior to the posterior at a fixed ``theta``, by adaptive tempering.

    pi_beta(x) ~ p_theta(x) p_theta(y | x)^beta,      0 = beta_0 < beta_1 < ... < beta_S = 1

Where a term of the likelihood is not finite it counts as a height that no datum reaches by chance
(`Target.relaxed`): impossible draws are allowed at first, fewer and fewer data contradict them, and those that are left
over in the end are thrown out. So a start needs no luck, and the estimate stays what it is.

Each stage raises beta as far as the effective sample size allows, weighs, resamples and moves. Independent blocks have
their own temperatures and pass the stages side by side. The product of the mean weights estimates ``p_theta(y)``
without bias for a fixed schedule. Source: del Moral, Doucet and Jasra 2006; adaptive temperatures as in Jasra et al.
2011.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels.base import Kernel, Point, Potential, Step
from numpyro_smcopt.kernels.preconditioners import Curvature, Preconditioner
from numpyro_smcopt.population.evaluate import gather
from numpyro_smcopt.potential.precision import IMPOSSIBLE, PLATEAU
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.resampling import systematic
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import effective_sample_size, reweight, uniform_log_weights

MAX_STAGES = 300
COLDEST = 1e-15
BISECTIONS = 40
SMALLEST_INCREMENT = 1e-12
MOST_CONTRADICTED = 0.5  # share of the particles
HIGHEST_STEP = 2.0  # nats for each datum
ADAPTATION_RATE = 0.5


class Tempered(NamedTuple):
    """A cloud at temperature one.

    Attributes:
        points: [N, ...] equally weighted particles with their energy terms and gradients.
        log_evidence: [B] estimate of the log evidence of each block.
        step: Step sizes and preconditioner that served the last moves.
        num_stages: [] stages used.
        unfinished: [B] bool, which blocks did not reach temperature one; their energies are still tempered.
        acceptance: [B] mean acceptance of the last move.
        num_ancestors: [B] how many of the N draws at the start have descendants at the end.
    """

    points: Point
    log_evidence: Array
    step: Step
    num_stages: Array
    unfinished: Array
    acceptance: Array
    num_ancestors: Array


def temper(
    rng_key: Array,
    terms_fn: Callable[[Array], Array],
    x: Array,
    prior_mask: Array,
    blocks: Blocks,
    kernel: Kernel,
    step: Step,
    curvature: Curvature | None,
    beta: Array,
    *,
    impossible: Array | bool = False,
    target_ess: float = 0.5,
    moves: int = 2,
    final_moves: int = 10,
) -> Tempered:
    """Bring draws from the prior to the posterior.

    Args:
        rng_key: Randomness.
        terms_fn: ``x [D] -> [K]``.
        x: [N, D] draws from the prior.
        prior_mask: [K] bool, the terms that belong to the prior.
        blocks: The partition.
        kernel: Moves the particles.
        step: Where step sizes and preconditioner start; the preconditioner has factors if ``curvature`` is given.
        curvature: Hessian blocks, from which every stage forms its own preconditioner, if affordable.
        beta: [B] inverse temperatures to start from: 0 for draws from the prior; 1 for a mere burn-in.
        impossible: [B] bool, in which blocks some of the draws are; in others a high energy is what it is.
        target_ess: Fraction of effective particles that a stage keeps.
        moves: Moves per stage.
        final_moves: Moves at temperature one.
    """
    num_particles, num_uniforms = x.shape[0], kernel.num_uniforms(x.shape[1], blocks.num_blocks)
    equal = uniform_log_weights(num_particles, blocks.num_blocks, x.dtype)

    def share(beta: Array) -> Array:
        # Not quite zero, so that the terms can be had back from their share.
        beta = jnp.maximum(beta, COLDEST)
        return jnp.where(prior_mask, 1.0, blocks.to_terms(beta, jnp.ones((), x.dtype))).astype(x.dtype)

    def stage(carry: tuple) -> tuple:
        points, beta, log_evidence, step, _, lines, k, _ = carry
        key_resample, key_move = random.split(random.fold_in(rng_key, k))
        last = jnp.all(beta >= 1.0) | (k == MAX_STAGES - 1)

        # Move
        shares = share(beta)

        def evaluate(one: Array) -> Point:
            terms, vjp = jax.vjp(terms_fn, one)
            grad = vjp(shares)[0]
            # A plateau has no slope. (Any force leaves a move valid, see `kernels`.)
            on_plateau = jnp.any(terms > IMPOSSIBLE)
            return Point(one, shares * terms, jnp.where(on_plateau & ~jnp.isfinite(grad), 0.0, grad))

        preconditioner = at_temperature(step.preconditioner, curvature, beta, blocks)

        def move(j: Array, carry: tuple) -> tuple:
            points, size, _ = carry
            drawn = draw_random_numbers(random.fold_in(key_move, j), points.x, num_uniforms)
            # The spread is taken anew for every move: a cloud that starts in the wrong place says nothing of it.
            now, potential = Step(size, rescaled(preconditioner, points.x, blocks)), Potential(evaluate, blocks)
            points = jax.vmap(evaluate)(points.x)
            points, acceptance = jax.vmap(lambda drawn, p: kernel.move(drawn, p, potential, now))(drawn, points)
            acceptance = acceptance.mean(0)
            if kernel.target is not None:
                size = size * jnp.exp(ADAPTATION_RATE * (acceptance - kernel.target))
            return points, size, acceptance

        num_moves = jnp.where(last, final_moves, moves)
        points, size, acceptance = lax.fori_loop(0, num_moves, move, (points, step.size, jnp.zeros_like(beta)))
        step = Step(size, rescaled(preconditioner, points.x, blocks))

        # Weigh
        rest = blocks.sum_terms(jnp.where(prior_mask, 0.0, points.terms / shares))
        rest = jnp.where(jnp.isfinite(rest), rest, jnp.inf)
        # Where most are contradicted by data, these go first, little by little: a few moves at each height.
        contradicted = impossible & (jnp.mean(rest > IMPOSSIBLE, 0, dtype=rest.dtype) > MOST_CONTRADICTED)
        room = jnp.where(contradicted, jnp.minimum(1 - beta, HIGHEST_STEP / PLATEAU), 1 - beta)
        increment = _next_increment(rest, jnp.where(last, 0.0, room), target_ess)
        weighed = reweight(equal, -increment * rest)

        # Resample
        keys = random.split(key_resample, blocks.num_blocks)
        ancestors = jax.vmap(systematic, in_axes=(0, 1), out_axes=1)(keys, weighed.log_weights)
        x = jnp.take_along_axis(points.x, blocks.to_coordinates(ancestors), 0)
        points = points._replace(x=jnp.where(last, points.x, x))
        lines = jnp.where(last, lines, jnp.take_along_axis(lines, ancestors, 0))
        beta = jnp.minimum(beta + increment, 1.0)
        return points, beta, log_evidence + weighed.log_mean, step, acceptance, lines, k + 1, last

    zeros = jnp.zeros(blocks.num_blocks, x.dtype)
    points = Point(x, jnp.zeros((num_particles, prior_mask.shape[0]), x.dtype), jnp.zeros_like(x))
    lines = jnp.broadcast_to(jnp.arange(num_particles, dtype=jnp.int32)[:, None], equal.shape)
    carry = (points, beta, zeros, step, zeros, lines, 0, jnp.asarray(False))
    points, beta, log_evidence, step, acceptance, lines, k, _ = lax.while_loop(lambda carry: ~carry[7], stage, carry)
    points, possible = _possible(points, jnp.where(prior_mask, 1.0, share(beta)), blocks, impossible)
    log_evidence += jnp.log(possible)
    alive = jax.vmap(lambda lines: jnp.zeros(num_particles, jnp.int32).at[lines].set(1).sum(), in_axes=1)(lines)
    return Tempered(points, log_evidence, step, jnp.asarray(k), beta < 1.0, acceptance, alive)


def _possible(points: Point, shares: Array, blocks: Blocks, impossible: Array | bool) -> tuple[Point, Array]:
    """The particles [N, ...], of which possible ones take the place of the others; [B] the share of the possible ones.

    Where none is left the terms in question are NaN, and the share is one; but where all draws were possible, data that
    all particles find as unlikely as the impossible are merely far away.
    """
    high = ~(points.terms / shares < IMPOSSIBLE)
    bad = blocks.sum_terms(high.astype(shares.dtype)) > 0
    far = jnp.all(bad, 0) & jnp.logical_not(impossible)
    bad, on_plateau = bad & ~far, high & ~blocks.to_terms(far, jnp.asarray(False))
    on_plateau |= ~jnp.isfinite(points.terms)
    num = jnp.sum(~bad, 0)

    def replace(points: Point) -> Point:
        order = jnp.argsort(bad, 0, stable=True)  # those that are possible first
        places = jnp.arange(bad.shape[0])[:, None] % jnp.maximum(num, 1)
        own = jnp.arange(bad.shape[0])[:, None]
        heirs = jnp.where(bad, jnp.take_along_axis(order, places, 0), own).astype(jnp.int32)
        points = points._replace(terms=jnp.where(on_plateau, jnp.nan, points.terms))
        return gather(points, heirs, blocks)

    return changed_if(jnp.any(bad), replace, points), jnp.where(num == 0, 1.0, num / bad.shape[0]).astype(shares.dtype)


def at_temperature(old: Preconditioner, curvature: Curvature | None, beta: Array, blocks: Blocks) -> Preconditioner:
    """The Hessian factors at inverse temperatures ``beta [B]``, with the scales of ``old``."""
    if curvature is None:
        return Preconditioner(old.scale)
    hessian = curvature.prior + beta[:, None, None] * curvature.rest
    lower = jnp.linalg.cholesky(hessian)
    eye = jnp.broadcast_to(jnp.eye(hessian.shape[-1], dtype=hessian.dtype), hessian.shape)
    factor = jax.scipy.linalg.solve_triangular(lower, eye, lower=True, trans=1)
    # A block that is not convex at its mode is left to the scales.
    convex = jnp.all(jnp.isfinite(factor), (1, 2))[:, None, None]
    inverse = jnp.where(convex, jnp.swapaxes(lower, 1, 2), eye)
    return Preconditioner(old.scale, jnp.where(convex, factor, eye), inverse)


def rescaled(preconditioner: Preconditioner, x: Array, blocks: Blocks) -> Preconditioner:
    """Scales from the spread of the cloud ``x [N, D]``; where it has none they stay."""
    scale = jnp.std(jax.vmap(lambda one: preconditioner.unfactor(one, blocks))(x), 0)
    usable = jnp.isfinite(scale) & (scale > 1e-8)
    return preconditioner._replace(scale=jnp.where(usable, scale, preconditioner.scale))


def identity_like(x: Array, curvature: Curvature | None) -> Preconditioner:
    """The identity on ``x [D]``, with the fields that the preconditioners of `temper` have."""
    if curvature is None:
        return Preconditioner(jnp.ones_like(x))
    eye = jnp.broadcast_to(jnp.eye(curvature.rest.shape[-1], dtype=x.dtype), curvature.rest.shape)
    return Preconditioner(jnp.ones_like(x), eye, eye)


def _next_increment(energy: Array, room: Array, target_ess: float) -> Array:
    """Largest increments ``delta [B]`` within ``room [B]`` whose weights ``exp(-delta energy [N, B])`` keep the ESS."""
    goal = target_ess * energy.shape[0]
    ess = lambda delta: effective_sample_size(-delta * energy)  # noqa: E731
    tiny = jnp.asarray(SMALLEST_INCREMENT, energy.dtype)
    low, high = jnp.full_like(room, jnp.log(tiny)), jnp.log(jnp.maximum(room, tiny))

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = (low + high) / 2
        fine = ess(jnp.exp(middle)) >= goal
        return jnp.where(fine, middle, low), jnp.where(fine, high, middle)

    low, _ = lax.fori_loop(0, BISECTIONS, halve, (low, high))
    whole = ess(room) >= goal
    return jnp.where(room <= 0, 0.0, jnp.where(whole, room, jnp.minimum(jnp.exp(low), room)))
