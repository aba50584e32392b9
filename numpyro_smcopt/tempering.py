# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From the prior to the posterior at a fixed ``theta``, by adaptive tempering.

    pi_beta(x) ~ p_theta(x) p_theta(y | x)^beta,      0 = beta_0 < beta_1 < ... < beta_S = 1

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
from numpyro_smcopt.kernels.base import InvariantKernel, Point, Potential, Step
from numpyro_smcopt.kernels.preconditioners import Preconditioner, cloud_variance
from numpyro_smcopt.resampling import systematic
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import effective_sample_size, reweight, uniform_log_weights

MAX_STAGES = 300
BISECTIONS = 40
SMALLEST_INCREMENT = 1e-12
ADAPTATION_RATE = 0.5


class Tempered(NamedTuple):
    """A cloud at temperature one.

    Attributes:
        x: [N, D] particles with equal weights.
        log_evidence: [B] estimate of the log evidence of each block.
        step: Step sizes and preconditioner that served the last moves.
        num_stages: [] stages used.
        unfinished: [] bool, whether some block did not reach temperature one.
        acceptance: [B] mean acceptance of the last move.
    """

    x: Array
    log_evidence: Array
    step: Step
    num_stages: Array
    unfinished: Array
    acceptance: Array


class Curvature(NamedTuple):
    """Hessian blocks of the two halves of the energy, both [B, M, M]; padded with the identity in ``prior``."""

    prior: Array
    rest: Array


def temper(
    rng_key: Array,
    terms_fn: Callable[[Array], Array],
    x: Array,
    prior_mask: Array,
    blocks: Blocks,
    kernel: InvariantKernel,
    step: Step,
    curvature: Curvature | None,
    *,
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
        step: Where step sizes and preconditioner start.
        curvature: Hessian blocks, from which every stage forms its own preconditioner, if affordable.
        target_ess: Fraction of effective particles that a stage keeps.
        moves: Moves per stage.
        final_moves: Moves at temperature one.
    """
    num_particles = x.shape[0]
    equal = uniform_log_weights(num_particles, blocks.num_blocks, x.dtype)

    def tempered(beta: Array) -> Potential:
        share = jnp.where(prior_mask, 1.0, blocks.to_terms(beta, 1.0)).astype(x.dtype)

        def evaluate(one: Array) -> Point:
            terms, vjp = jax.vjp(terms_fn, one)
            return Point(one, share * terms, vjp(share)[0])

        return Potential(evaluate, blocks)

    def precondition(beta: Array, step: Step, x: Array) -> Step:
        return step._replace(preconditioner=at_temperature(step.preconditioner, curvature, beta, x, equal, blocks))

    def move(beta: Array, step: Step, x: Array, rng_key: Array, num: Array) -> tuple[Step, Array, Array]:
        potential = tempered(beta)

        def once(k: Array, carry: tuple) -> tuple:
            size, x, _ = carry
            keys = random.split(random.fold_in(rng_key, k), num_particles)
            points = jax.vmap(potential.evaluate)(x)
            now = Step(size, step.preconditioner)
            points, acceptance = jax.vmap(lambda key, p: kernel.move(key, p, potential, now))(keys, points)
            acceptance = acceptance.mean(0)
            if kernel.target is not None:
                size = size * jnp.exp(ADAPTATION_RATE * (acceptance - kernel.target))
            return size, points.x, acceptance

        size, x, acceptance = lax.fori_loop(0, num, once, (step.size, x, jnp.zeros(blocks.num_blocks, x.dtype)))
        return Step(size, step.preconditioner), x, acceptance

    def stage(carry: tuple) -> tuple:
        x, beta, log_evidence, step, _, k = carry
        key_resample, key_move = random.split(random.fold_in(rng_key, k))
        # Weigh
        rest = blocks.sum_terms(jnp.where(prior_mask, 0.0, jax.vmap(terms_fn)(x)))
        rest = jnp.where(jnp.isfinite(rest), rest, jnp.inf)
        increment = _next_increment(rest, 1 - beta, target_ess)
        weighed = reweight(equal, -increment * rest)
        # Resample
        keys = random.split(key_resample, blocks.num_blocks)
        ancestors = jax.vmap(systematic, in_axes=(0, 1), out_axes=1)(keys, weighed.log_weights)
        x = jnp.take_along_axis(x, blocks.to_coordinates(ancestors), 0)
        # Move
        beta = jnp.minimum(beta + increment, 1.0)
        step = precondition(beta, step, x)
        done = jnp.all(beta >= 1.0)
        step, x, acceptance = move(beta, step, x, key_move, jnp.where(done, final_moves, moves))
        return x, beta, log_evidence + weighed.log_mean, step, acceptance, k + 1

    zeros = jnp.zeros(blocks.num_blocks, x.dtype)
    going = lambda carry: jnp.any(carry[1] < 1.0) & (carry[5] < MAX_STAGES)  # noqa: E731
    # The tree of `step` must not change on the way: form its preconditioner once before.
    carry = (x, zeros, zeros, precondition(zeros, step, x), zeros, 0)
    x, beta, log_evidence, step, acceptance, k = lax.while_loop(going, stage, carry)
    return Tempered(x, log_evidence, step, jnp.asarray(k), jnp.any(beta < 1.0), acceptance)


def at_temperature(
    old: Preconditioner, curvature: Curvature | None, beta: Array, x: Array, log_weights: Array, blocks: Blocks
) -> Preconditioner:
    """The preconditioner at inverse temperatures ``beta [B]``: Hessian factors, and scales from the cloud."""
    if curvature is None:
        plain = Preconditioner(jnp.ones_like(old.scale))
    else:
        hessian = curvature.prior + beta[:, None, None] * curvature.rest
        lower = jnp.linalg.cholesky(hessian)
        eye = jnp.broadcast_to(jnp.eye(hessian.shape[-1], dtype=hessian.dtype), hessian.shape)
        factor = jax.scipy.linalg.solve_triangular(lower, eye, lower=True, trans=1)
        # A block that is not convex at its mode is left to the scales.
        convex = jnp.all(jnp.isfinite(factor), (1, 2))[:, None, None]
        inverse = jnp.where(convex, jnp.swapaxes(lower, 1, 2), eye)
        plain = Preconditioner(jnp.ones_like(old.scale), jnp.where(convex, factor, eye), inverse)
    scale = jnp.sqrt(cloud_variance(plain, x, log_weights, blocks))
    return plain._replace(scale=jnp.where(jnp.isfinite(scale) & (scale > 1e-8), scale, old.scale))


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
