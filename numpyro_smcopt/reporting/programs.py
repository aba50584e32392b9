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
import numpy as np
from jax import lax
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import along_each, louis_information
from numpyro_smcopt.kernels import InvariantKernel
from numpyro_smcopt.population.start import first_cloud
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.reporting.coordinates import unravel
from numpyro_smcopt.reporting.effort import SlopeDraws
from numpyro_smcopt.reporting.islands import Islands, Tally, temper_island, weigh_islands
from numpyro_smcopt.reporting.reference import Reference, fit_reference
from numpyro_smcopt.reporting.transport import Moved, Transport, laplace_transport, moved_terms
from numpyro_smcopt.traces import traced_once
from numpyro_smcopt.types import Array, Params, Theta
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

    def constrained(self, flat: np.ndarray) -> Params:
        """A flat theta [P] on the scale of the model."""
        theta = unravel(flat, self.theta)
        return {
            name: jax.tree.map(
                lambda v, o, c=constraint: np.asarray(biject_to(c)(v.astype(o.dtype))), theta[name], self.theta[name]
            )
            for name, constraint in self.constraints.items()
        }


class Drawn(NamedTuple):
    """What `draw_program` returns; see the classes of the fields.

    Attributes:
        fixed: See `Fixed`.
        reference: See `Reference`.
        transport: See `Transport`; None if the latents do not move along.
        laplace_score: [P] see `_laplace_score`, in the directions of the slopes; None without transport.
        tally: See `Tally`.
        at_probes: [N, B] log weights of the particles of the cloud.
        worst_log_weights: [R N] log weights of the block with the fewest effective draws.
        slopes: See `Slopes`.
        outer: [P, P] see `_outer_scores`, in the same directions.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    fixed: Fixed
    reference: Reference
    transport: Transport | None
    laplace_score: Array | None
    tally: Tally
    at_probes: Array
    worst_log_weights: Array
    slopes: Slopes | None
    outer: Array | None
    samples: dict[str, Array]
    log_weights: Array


def draw_program(draws: SlopeDraws, transported: bool, sandwich: bool) -> Callable[..., Drawn]:
    """A program that draws from the reference.

    Args:
        draws: What derivatives are taken from.
        transported: Whether the latents move along with theta in derivatives.
        sandwich: Whether the outer product of the scores is wanted.

    Returns:
        ``(target, wanted, rng_key, uniforms, picks, order, params, frame, x, log_weights, blocks) -> Drawn``: whether
        draws are wanted (otherwise what comes from them is zero, and only the rest is of use), randomness from
        `reference.draw_uniforms` and `draw_picks` and [2, B] uniforms for resampling, the estimate, the directions of
        derivatives as columns [P, P], and a cloud of the posterior.
    """

    def program(
        target: Target,
        wanted: Array,
        rng_key: Array,
        uniforms: Array,
        picks: Array,
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
        transport = laplace_score = None
        if draws.islands and transported:
            along, here = _along(target, fixed.theta, frame)
            transport = laplace_transport(along, here, reference, blocks)
            laplace_score = _laplace_score(along, here, reference, transport)

        def explored() -> tuple:
            islands, tally, at_probes = weigh_islands(rng_key, uniforms, target, fixed.theta, reference, blocks, x)
            some = jax.tree.map(lambda v: v[: draws.islands], islands)
            place = target, fixed.theta, frame, reference, transport, blocks, some, draws, picks
            slopes = _differentiate(*place) if draws.islands else None
            outer = _outer_scores(*place) if draws.islands and sandwich else None
            every = islands.log_weights.reshape(-1, blocks.num_blocks)
            worst = every[:, jnp.argmin(effective_sample_size(every))]
            samples = _posterior_samples(target, fixed.theta, order, blocks, islands)
            return tally, at_probes, worst, slopes, outer, *samples

        explore, shapes = traced_once(explored)
        nothing = lambda: jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)  # noqa: E731
        found = lax.cond(wanted, explore, nothing)
        return Drawn(fixed, reference, transport, laplace_score, *found)

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


def temper_program(kernel: InvariantKernel, draws: SlopeDraws, sandwich: bool) -> Callable[..., Tempered]:
    """A program that tempers islands.

    Returns:
        ``(target, rng_keys, uniforms, picks, order, frame, drawn, blocks, missed) -> Tempered``.
    """

    def program(
        target: Target,
        rng_keys: Array,
        uniforms: Array,
        picks: Array,
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
        place = target, theta, frame, reference, drawn.transport, blocks, islands, draws, picks
        slopes = _differentiate(*place) if draws.islands else None
        outer = _outer_scores(*place) if sandwich else None
        samples = _posterior_samples(target, theta, order, blocks, islands)
        free = jnp.zeros((), done.x.dtype)
        about = done.log_evidence, done.acceptance, done.num_unfinished, done.num_ancestors
        return Tempered(*about, free, slopes, outer, *samples)

    return program


def wide_program(
    kernel: InvariantKernel,
    num_particles: int,
    draws: SlopeDraws,
    sandwich: bool,
    init_strategy: Callable | None,
) -> Callable[..., tuple[Fixed, Tempered]]:
    """A program that tempers islands from the prior, for blocks that are too large for Hessians.

    Returns:
        ``(target, rng_keys, picks, order, params, frame, mode, blocks) -> (Fixed, Tempered)``.
    """

    def program(
        target: Target,
        rng_keys: Array,
        picks: Array,
        order: Array,
        params: Params,
        frame: Array,
        mode: Array,
        blocks: Blocks,
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
        place = target, fixed.theta, frame, None, None, blocks, islands, draws, picks
        slopes = _differentiate(*place) if draws.islands else None
        outer = _outer_scores(*place) if sandwich else None
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


def draw_picks(rng: np.random.Generator, draws: SlopeDraws, size: int, num_blocks: int) -> np.ndarray:
    """[R, n, B] uniforms that pick the draws of islands of ``size`` for derivatives; n = 0 if they take all."""
    fewer = [num for num in (draws.score, draws.information) if num < size]
    return rng.uniform(size=(draws.islands, max(fewer, default=0), num_blocks))


def _differentiate(
    target: Target,
    theta: Theta,
    frame: Array,
    reference: Reference | None,
    transport: Transport | None,
    blocks: Blocks,
    islands: Islands,
    draws: SlopeDraws,
    picks: Array,
) -> Slopes:
    way, work = _way(target, theta, frame, reference, transport, blocks), target.work(theta)
    some, few = (_picked(islands, picks, num, blocks) for num in (draws.score, draws.information))

    def scores(island: Islands) -> tuple[Array, Array]:
        log_weights = jax.nn.log_softmax(island.log_weights, 0)
        coefficients = blocks.to_terms(jnp.exp(log_weights), 1 / island.x.shape[0])
        energy = lambda at: jnp.sum(coefficients * jax.vmap(lambda x: way.terms_fn(at, x))(island.x))  # noqa: E731
        gradient = jax.grad(energy)(way.here)
        # Where nothing has moved yet, the gradient in theta alone is that without transport.
        plain = along_each(way.directions.theta, gradient.theta)
        return along_each(way.directions, gradient) - jnp.sum(way.volume, 1), plain

    def informations(island: Islands) -> tuple[Array, Array]:
        log_weights = jax.nn.log_softmax(island.log_weights, 0)
        place = way.terms_fn, way.here, island.x, log_weights, blocks, work
        _, found = louis_information(*place, directions=way.directions)
        return found.complete - found.missing, found.complete

    score, plain = lax.map(scores, some)
    information, complete = lax.map(informations, few)
    return Slopes(score, plain, information, complete.mean(0))


def _picked(islands: Islands, picks: Array, num: int, blocks: Blocks) -> Islands:
    """``num`` draws of each island, resampled block by block, with equal weights; all of them as they are if it has no
    more. Independent draws, not systematic ones: their covariances would be too large.
    """
    if num == islands.x.shape[1]:
        return islands

    def of_island(island: Islands, heights: Array) -> Array:
        chosen = _resampled(jax.nn.softmax(island.log_weights, 0), heights)
        return jnp.take_along_axis(island.x, blocks.to_coordinates(chosen), 0)

    x = jax.vmap(of_island)(islands, picks[:, :num])
    return Islands(x, jnp.zeros((*x.shape[:2], blocks.num_blocks), x.dtype))


def _resampled(weights: Array, heights: Array) -> Array:
    """[S, B] which draws lie at heights [S, B] of the cumulative weights [N, B] of each block."""
    ends = jnp.cumsum(weights, 0)
    ends = ends / ends[-1]
    search = jax.vmap(lambda ends, heights: jnp.searchsorted(ends, heights, side="right"), in_axes=1, out_axes=1)
    return jnp.minimum(search(ends, heights), weights.shape[0] - 1)


def _laplace_score(terms_fn: Callable, flat: Array, reference: Reference, transport: Transport) -> Array:
    """[P] gradient of minus Laplace's approximation of the log marginal likelihood: no draws, and so no noise.

    Along the mode the energy does not change but by theta itself, and the transport knows how the curvature does.
    """
    at_mode = jax.grad(lambda t: jnp.sum(terms_fn(t, reference.center)))(flat)
    return at_mode - jnp.sum(transport.log_volume_slopes(), 1)


class _Way(NamedTuple):
    """How theta, and the latents along with it, may move.

    Attributes:
        terms_fn: ``(Moved, x [D]) -> [K]``.
        here: Where theta is.
        directions: [P] of them.
        volume: [P, B] slopes of the log volume of each block.
    """

    terms_fn: Callable
    here: Moved
    directions: Moved
    volume: Array


def _way(
    target: Target,
    theta: Theta,
    frame: Array,
    reference: Reference | None,
    transport: Transport | None,
    blocks: Blocks,
) -> _Way:
    terms_fn, flat, _ = flat_terms(target, theta)
    columns, volume = frame.T, jnp.zeros((frame.shape[1], blocks.num_blocks), frame.dtype)
    if reference is None or transport is None:
        none, nowhere = jnp.zeros(0, flat.dtype), jnp.zeros((frame.shape[1], 0), flat.dtype)
        still = lambda moved, x: terms_fn(moved.theta, x)  # noqa: E731
        return _Way(still, Moved(flat, none, none), Moved(columns, nowhere, nowhere), volume)
    here = Moved(flat, jnp.zeros_like(transport.shift[0]), jnp.zeros_like(transport.gain[0]))
    directions = Moved(columns, transport.shift, transport.gain)
    return _Way(moved_terms(terms_fn, reference, blocks), here, directions, transport.log_volume_slopes())


def _outer_scores(
    target: Target,
    theta: Theta,
    frame: Array,
    reference: Reference | None,
    transport: Transport | None,
    blocks: Blocks,
    islands: Islands,
    draws: SlopeDraws,
    picks: Array,
) -> Array:
    """[P, P] ``sum_u s_u s_u^T`` over the independent units: blocks, and terms that depend on no latent.

    The two factors come from different islands, so that their Monte Carlo noise adds no bias.
    """
    way = _way(target, theta, frame, reference, transport, blocks)
    free = blocks.of_term == blocks.num_blocks
    # Fewer islands than `_differentiate` has, and one derivative less: that pays for more draws.
    num = min(draws.score, 4 * draws.information)

    def of_island(island: Islands) -> Array:
        weights = jax.nn.softmax(island.log_weights, 0)

        def of_units(direction: Moved) -> Array:
            every = lambda at: jax.vmap(lambda x: way.terms_fn(at, x))(island.x)  # noqa: E731
            _, slopes = jax.jvp(every, (way.here,), (direction,))
            of_blocks = jnp.sum(weights * blocks.sum_terms(slopes), 0)
            return jnp.concatenate([of_blocks, jnp.where(free, slopes[0], 0.0)])

        scores = lax.map(of_units, way.directions)
        return scores.at[:, : blocks.num_blocks].add(-way.volume)

    first, second = lax.map(of_island, jax.tree.map(lambda v: v[:2], _picked(islands, picks, num, blocks)))
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
        chosen = _resampled(jnp.exp(log_weights), heights)
        x = jnp.take_along_axis(x, blocks.to_coordinates(chosen), 0)
        weights = jnp.full(num, -math.log(num), x.dtype)
    return jax.vmap(lambda one: target.constrain_latents(theta, one))(x), weights
