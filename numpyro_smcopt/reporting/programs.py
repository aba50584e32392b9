# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The programs behind a report: fresh particles at a fixed theta, and what they tell of the marginal likelihood.

`draw_program` fits the reference, draws from it, weighs, and differentiates. `temper_program` is compiled only if those
draws do not suffice. `wide_program` is for models whose blocks are too large for Hessians, `exact_program` for models
without latents.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions.constraints import Constraint

from numpyro_smcopt.algorithms.start import first_cloud
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import InvariantKernel
from numpyro_smcopt.reporting.islands import Islands, Tally, temper_island, weigh_islands
from numpyro_smcopt.reporting.reference import Reference, fit_reference
from numpyro_smcopt.reporting.transport import Transport, laplace_transport, moved_terms
from numpyro_smcopt.target import Target, flat_terms
from numpyro_smcopt.types import Array, Params, Theta
from numpyro_smcopt.uncertainty import louis_information
from numpyro_smcopt.weights import effective_sample_size

NUM_SAMPLES = 1024  # where blocks are resampled; a power of two, for the strides
WEIGHTED_ISLANDS = 5  # that keep their weights, where there is one block


class Slopes(NamedTuple):
    """Derivatives of minus the log marginal likelihood along P directions of the flat theta, from each of R islands.

    Attributes:
        score: [R, P] gradient, with transport.
        plain_score: [R, P] the same without transport: an independent check of the transport.
        information: [R, P, P] Hessian.
        complete: [P, P] complete-data information, with transport.
    """

    score: Array
    plain_score: Array
    information: Array
    complete: Array


class Fixed(NamedTuple):
    """What does not depend on particles.

    Attributes:
        theta: The estimate, unconstrained.
        jacobian: [Q, P] derivative of the flat constrained parameters in the flat unconstrained ones.
        bounded: [P] which coordinates belong to a constrained parameter.
        constraints: By param site.
    """

    theta: Theta
    jacobian: Array
    bounded: Array
    constraints: dict[str, Constraint]


class Drawn(NamedTuple):
    """What `draw_program` returns; see the classes of the fields.

    Attributes:
        fixed: See `Fixed`.
        reference: See `Reference`.
        transport: See `Transport`; None if the latents do not move along.
        tally: See `Tally`.
        at_probes: [N, B] log weights of the particles of the cloud.
        worst_log_weights: [R N] log weights of the block with the fewest effective draws.
        slopes: See `Slopes`.
        laplace_score: [P] see `_laplace_score`, in the same directions; None without transport.
        outer: [P, P] see `_outer_scores`, in the same directions.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    fixed: Fixed
    reference: Reference
    transport: Transport | None
    tally: Tally
    at_probes: Array
    worst_log_weights: Array
    slopes: Slopes | None
    laplace_score: Array | None
    outer: Array | None
    samples: dict[str, Array]
    log_weights: Array


def draw_program(num_informing: int, transported: bool, sandwich: bool) -> Callable[..., Drawn]:
    """A program that draws from the reference.

    Args:
        num_informing: Islands that derivatives are taken from; 0 for none.
        transported: Whether the latents move along with theta in derivatives.
        sandwich: Whether the outer product of the scores is wanted.

    Returns:
        ``(target, rng_key, uniforms, order, params, frame, x, log_weights, blocks) -> Drawn``: randomness from
        `reference.draw_uniforms` and [2, B] uniforms for resampling, the estimate, the directions of derivatives as
        columns [P, P], and a cloud of the posterior.
    """

    def program(
        target: Target,
        rng_key: Array,
        uniforms: Array,
        order: Array,
        params: Params,
        frame: Array,
        x: Array,
        log_weights: Array,
        blocks: Blocks,
    ) -> Drawn:
        fixed = _fixed(target, rng_key, params)
        terms_fn, flat, _ = flat_terms(target, fixed.theta)
        reference = fit_reference(lambda x: terms_fn(flat, x), x, log_weights, blocks)
        islands, tally, at_probes = weigh_islands(rng_key, uniforms, target, fixed.theta, reference, blocks, x)
        transport = slopes = laplace_score = outer = None
        if num_informing:
            along, here = _along(target, fixed.theta, frame)
            if transported:
                transport = laplace_transport(along, here, reference, blocks)
                laplace_score = _laplace_score(along, here, reference, transport)
            some = jax.tree.map(lambda v: v[:num_informing], islands)
            slopes = _differentiate(target, fixed.theta, frame, reference, transport, blocks, some)
            if sandwich:
                outer = _outer_scores(target, fixed.theta, frame, reference, transport, blocks, islands)
        every = islands.log_weights.reshape(-1, blocks.num_blocks)
        worst = every[:, jnp.argmin(effective_sample_size(every))]
        samples = _posterior_samples(target, fixed.theta, order, blocks, islands)
        return Drawn(fixed, reference, transport, tally, at_probes, worst, slopes, laplace_score, outer, *samples)

    return program


class Tempered(NamedTuple):
    """What `temper_program` and `wide_program` return.

    Attributes:
        log_evidence: [R, B] estimates, relative to the Laplace approximation if there is a reference.
        acceptance: [R] mean acceptances of the last moves.
        num_unfinished: [R] blocks that did not reach temperature one.
        num_ancestors: [R] draws at the start that have descendants, in the worst block.
        free: [] log density of the terms that depend on no latent; 0 if there is a reference.
        slopes: See `Slopes`.
        outer: [P, P] see `_outer_scores`, in the same directions.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    log_evidence: Array
    acceptance: Array
    num_unfinished: Array
    num_ancestors: Array
    free: Array
    slopes: Slopes | None
    outer: Array | None
    samples: dict[str, Array]
    log_weights: Array


def temper_program(kernel: InvariantKernel, informing: bool, sandwich: bool) -> Callable[..., Tempered]:
    """A program that tempers islands.

    Returns:
        ``(target, rng_keys, uniforms, order, frame, drawn, blocks, missed) -> Tempered``.
    """

    def program(
        target: Target,
        rng_keys: Array,
        uniforms: Array,
        order: Array,
        frame: Array,
        drawn: Drawn,
        blocks: Blocks,
        missed: Array,
    ) -> Tempered:
        theta, reference = drawn.fixed.theta, drawn.reference
        one = lambda v: temper_island(v[0], v[1], target, theta, reference, blocks, missed, kernel)  # noqa: E731
        done = lax.map(one, (rng_keys, uniforms))
        islands = Islands(done.x, jnp.zeros((*done.x.shape[:2], blocks.num_blocks), done.x.dtype))
        place = target, theta, frame, reference, drawn.transport, blocks, islands
        slopes, outer = _differentiate(*place) if informing else None, _outer_scores(*place) if sandwich else None
        samples = _posterior_samples(target, theta, order, blocks, islands)
        free = jnp.zeros((), done.x.dtype)
        about = done.log_evidence, done.acceptance, done.num_unfinished, done.num_ancestors
        return Tempered(*about, free, slopes, outer, *samples)

    return program


def wide_program(
    kernel: InvariantKernel,
    num_particles: int,
    informing: bool,
    sandwich: bool,
    init_strategy: Callable | None,
) -> Callable[..., tuple[Fixed, Tempered]]:
    """A program that tempers islands from the prior, for blocks that are too large for Hessians.

    Returns:
        ``(target, rng_keys, order, params, frame, mode, blocks) -> (Fixed, Tempered)``.
    """

    def program(
        target: Target, rng_keys: Array, order: Array, params: Params, frame: Array, mode: Array, blocks: Blocks
    ) -> tuple[Fixed, Tempered]:
        fixed = _fixed(target, rng_keys[0], params)
        terms_fn, flat, _ = flat_terms(target, fixed.theta)

        def one(key: Array) -> tuple[Array, ...]:
            cloud = first_cloud(
                key, target, fixed.theta, blocks, mode, kernel, num_particles, init_strategy=init_strategy
            )
            about = jnp.mean(cloud.acceptance), jnp.sum(cloud.unfinished), jnp.min(cloud.num_ancestors)
            return cloud.points.x, cloud.log_evidence, *about

        x, log_evidence, acceptance, num_unfinished, num_ancestors = lax.map(one, rng_keys)
        islands = Islands(x, jnp.zeros((*x.shape[:2], blocks.num_blocks), x.dtype))
        place = target, fixed.theta, frame, None, None, blocks, islands
        slopes, outer = _differentiate(*place) if informing else None, _outer_scores(*place) if sandwich else None
        samples = _posterior_samples(target, fixed.theta, order, blocks, islands)
        free = -blocks.sum_free_terms(terms_fn(flat, x[0, 0]))
        about = log_evidence, acceptance, num_unfinished, num_ancestors
        return fixed, Tempered(*about, free, slopes, outer, *samples)

    return program


def exact_program(sandwich: bool) -> Callable[..., tuple]:
    """A program for models without latents.

    Returns:
        ``(target, rng_key, params, frame) -> (Fixed, energy terms [K], Slopes, outer [P, P] or None, samples)``.
    """

    def program(target: Target, rng_key: Array, params: Params, frame: Array) -> tuple:
        fixed = _fixed(target, rng_key, params)
        along, here = _along(target, fixed.theta, frame)
        nowhere = jnp.zeros(0, here.dtype)
        loss = lambda u: jnp.sum(along(u, nowhere))  # noqa: E731
        score, information = jax.grad(loss)(here), jax.hessian(loss)(here)
        slopes = Slopes(score[None], score[None], information[None], information)
        outer = None
        if sandwich:
            each = jax.jacfwd(lambda u: along(u, nowhere))(here)
            outer = jnp.matmul(each.T, each, precision="highest")
        sites = jax.tree.map(lambda v: v[None], target.constrain_latents(fixed.theta, nowhere))
        return fixed, along(here, nowhere), slopes, outer, (sites, jnp.zeros(1, here.dtype))

    return program


def complete_information(
    target: Target, rng_key: Array, params: Params, x: Array, log_weights: Array, blocks: Blocks
) -> Array:
    """[P, P] the complete-data information at an estimate, from particles [N, D] and their log weights [N, B]."""
    theta = _fixed(target, rng_key, params).theta
    terms_fn, flat, _ = flat_terms(target, theta)
    log_weights = jax.nn.log_softmax(log_weights, 0)
    return louis_information(terms_fn, flat, x, log_weights, blocks, target.work(theta))[1].complete


def _fixed(target: Target, rng_key: Array, params: Params) -> Fixed:
    _, theta = target.initial_params(rng_key, params)
    flat, unravel = ravel_pytree(theta)
    constrained = lambda t: ravel_pytree(target.constrain_params(unravel(t)))[0]  # noqa: E731
    return Fixed(
        theta,
        jax.jacobian(constrained)(flat),
        jnp.asarray(target.bounded_coordinates(theta)),
        target.param_constraints(theta),
    )


def _along(target: Target, theta: Theta, frame: Array) -> tuple[Callable[[Array, Array], Array], Array]:
    """Energy terms ``(u [P], x [D]) -> [K]`` at ``theta + frame u``, and the origin of u.

    Derivatives in u are combined observation by observation, before they are summed. Those in theta, of an intercept
    and the slope of a year, say, would have to be combined afterwards, where they cancel.
    """
    terms_fn, flat, _ = flat_terms(target, theta)
    return lambda u, x: terms_fn(flat + jnp.matmul(frame, u, precision="highest"), x), jnp.zeros_like(flat)


def _differentiate(
    target: Target,
    theta: Theta,
    frame: Array,
    reference: Reference | None,
    transport: Transport | None,
    blocks: Blocks,
    islands: Islands,
) -> Slopes:
    along, here = _along(target, theta, frame)
    moved, volume = _moving(along, here, reference, transport, blocks)
    volume = jnp.sum(volume, 1)
    work = target.work(theta)

    def of_island(island: Islands) -> tuple[Array, Array, Array, Array]:
        log_weights = jax.nn.log_softmax(island.log_weights, 0)
        score, found = louis_information(moved, here, island.x, log_weights, blocks, work)
        coefficients = blocks.to_terms(jnp.exp(log_weights), 1 / island.x.shape[0])
        energy = lambda u: jnp.sum(coefficients * jax.vmap(lambda x: along(u, x))(island.x))  # noqa: E731
        information = found.complete - found.missing
        return score - volume, jax.grad(energy)(here), information, found.complete

    score, plain, information, complete = lax.map(of_island, islands)
    return Slopes(score, plain, information, complete.mean(0))


def _laplace_score(terms_fn: Callable, flat: Array, reference: Reference, transport: Transport) -> Array:
    """[P] gradient of minus Laplace's approximation of the log marginal likelihood: no draws, and so no noise.

    Along the mode the energy does not change but by theta itself, and the transport knows how the curvature does.
    """
    at_mode = jax.grad(lambda t: jnp.sum(terms_fn(t, reference.center)))(flat)
    return at_mode - jnp.sum(transport.log_volume_slopes(), 1)


def _moving(
    along: Callable, here: Array, reference: Reference | None, transport: Transport | None, blocks: Blocks
) -> tuple[Callable, Array]:
    """Energy terms at latents that move along, and the slopes of the log volume of each block, [P, B]."""
    if reference is None or transport is None:
        return along, jnp.zeros((here.shape[0], blocks.num_blocks), here.dtype)
    return moved_terms(along, here, reference, transport, blocks), transport.log_volume_slopes()


def _outer_scores(
    target: Target,
    theta: Theta,
    frame: Array,
    reference: Reference | None,
    transport: Transport | None,
    blocks: Blocks,
    islands: Islands,
) -> Array:
    """[P, P] ``sum_u s_u s_u^T`` over the independent units: blocks, and terms that depend on no latent.

    The two factors come from different islands, so that their Monte Carlo noise adds no bias.
    """
    along, here = _along(target, theta, frame)
    moved, volume = _moving(along, here, reference, transport, blocks)
    free = blocks.of_term == blocks.num_blocks

    def of_island(island: Islands) -> Array:
        weights = jax.nn.softmax(island.log_weights, 0)

        def of_units(direction: Array) -> Array:
            every = lambda u: jax.vmap(lambda x: moved(u, x))(island.x)  # noqa: E731
            _, slopes = jax.jvp(every, (here,), (direction,))
            of_blocks = jnp.sum(weights * blocks.sum_terms(slopes), 0)
            return jnp.concatenate([of_blocks, jnp.where(free, slopes[0], 0.0)])

        scores = lax.map(of_units, jnp.eye(here.shape[0], dtype=here.dtype))
        return scores.at[:, : blocks.num_blocks].add(-volume)

    first, second = lax.map(of_island, jax.tree.map(lambda v: v[:2], islands))
    product = jnp.matmul(first, second.T, precision="highest")
    return (product + product.T) / 2


def _posterior_samples(
    target: Target, theta: Theta, order: Array, blocks: Blocks, islands: Islands
) -> tuple[dict[str, Array], Array]:
    """Draws of all latents, constrained, and their log weights: equal where blocks had weights of their own."""
    x = islands.x.reshape(-1, islands.x.shape[-1])
    log_weights = jax.nn.log_softmax(islands.log_weights.reshape(x.shape[0], -1), 0)
    if blocks.num_blocks == 1:
        num = min(WEIGHTED_ISLANDS, islands.x.shape[0]) * islands.x.shape[1]
        x, weights = x[:num], jax.nn.log_softmax(log_weights[:num, 0])
    else:
        num = NUM_SAMPLES
        # Systematic resampling, block by block. Odd strides visit the slots in another order in every block.
        strides, shifts = (2 * jnp.floor(order[0] * (num // 2)) + 1).astype(jnp.int32), order[1]
        slots = (jnp.arange(num)[:, None] * strides) % num
        heights = (slots.astype(x.dtype) / num + shifts) % 1
        ends = jnp.cumsum(jnp.exp(log_weights), 0)
        ends = ends / ends[-1]
        search = jax.vmap(lambda ends, heights: jnp.searchsorted(ends, heights, side="right"), in_axes=1, out_axes=1)
        chosen = jnp.minimum(search(ends, heights), x.shape[0] - 1)
        x = jnp.take_along_axis(x, blocks.to_coordinates(chosen), 0)
        weights = jnp.full(num, -math.log(num), x.dtype)
    return jax.vmap(lambda one: target.constrain_latents(theta, one))(x), weights
