# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Operations on all particles of a cloud at once: evaluate, resample block by block, draw, check the blocks."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt.block_search import dependence_violated
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import Point
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.resampling import ResamplingScheme, systematic
from numpyro_smcopt.types import Array, FlatTermsFn, Theta
from numpyro_smcopt.weights import uniform_log_weights

GUARDS = 4  # particles at which new data are checked for new dependences


def added_up(target: Target, blocks: Blocks) -> tuple[Target, Blocks]:
    """The target and its partition with sums of energy terms in the place of the terms, see `sums`.

    Raises:
        ValueError: If the target has not the shapes of the partition.
    """
    have = blocks.of_coordinate.shape[0], blocks.of_term.shape[0]
    need = target.sites.num_latents, target.sites.num_terms
    if have != need:
        raise ValueError(
            f"The state has {have[0]} latents and {have[1]} energy terms, but with these arguments the model has "
            f"{need[0]} and {need[1]}. Data of another shape need a new init."
        )
    return target.adding_up(blocks.sums), blocks.of_sums


def evaluator(target: Target, theta: Theta, scores: bool = False) -> Callable[[Array], Point]:
    """``x [D] -> Point``: one evaluation of energy terms, their gradient in x, and with ``scores`` the one in theta."""
    terms_fn, flat, _ = flat_terms(target, theta)
    return evaluator_at(terms_fn, flat, scores)


def evaluator_at(terms_fn: FlatTermsFn, theta: Array, scores: bool = False) -> Callable[[Array], Point]:
    """`evaluator`, of ``terms_fn`` at a flat ``theta [P]``."""

    def evaluate(x: Array) -> Point:
        if scores:
            terms, vjp = jax.vjp(terms_fn, theta, x)
            score, grad = vjp(jnp.ones_like(terms))
            return Point(x, terms, grad, score)
        terms, vjp = jax.vjp(lambda x: terms_fn(theta, x), x)
        return Point(x, terms, vjp(jnp.ones_like(terms))[0])

    return evaluate


def evaluate_together(terms_fn: FlatTermsFn, theta: Array, x: Array) -> tuple[Point, Callable]:
    """The points [N, ...] of a cloud ``x [N, D]``, and the way back from cotangents [N, K] of their terms to theta.

    One forward pass serves the weights and both gradients.
    """
    all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
    terms, vjp = jax.vjp(all_terms, theta, x)
    return Point(x, terms, vjp(jnp.ones_like(terms))[1]), lambda cotangents: vjp(cotangents)[0]


def replace_dead(points: Point, log_weights: Array, blocks: Blocks) -> Point:
    """Particles [N, ...] of which those without weight stand at the heaviest one of their block.

    Their own places may have no finite energy or gradient, and zero times NaN is NaN. Without weight they stay.
    """
    dead = ~jnp.isfinite(log_weights)
    own = jnp.arange(log_weights.shape[0], dtype=jnp.int32)[:, None]
    ancestors = jnp.where(dead, jnp.argmax(log_weights, 0).astype(jnp.int32), own)
    return changed_if(jnp.any(dead), lambda points: gather(points, ancestors, blocks), points)


def resample_blocks(
    rng_keys: Array,
    points: Point,
    log_weights: Array,
    ess: Array,
    blocks: Blocks,
    scheme: ResamplingScheme,
    threshold: Array,
) -> tuple[Point, Array, Array]:
    """Resample the blocks whose effective sample size is low.

    Args:
        rng_keys: [B] one key per block.
        points: [N, ...] particles.
        log_weights: [N, B] their normalised log weights.
        ess: [B] their effective sample size.
        blocks: The partition.
        scheme: Draws the ancestors of one block.
        threshold: [] fraction of the particles below which the ESS is low.

    Returns:
        Particles, log weights, and how many blocks were resampled.
    """
    num_particles, num_blocks = log_weights.shape
    low = ess < threshold * num_particles

    def draw(cloud: tuple[Point, Array]) -> tuple[Point, Array]:
        points, log_weights = cloud
        drawn = jax.vmap(scheme, in_axes=(0, 1), out_axes=1)(rng_keys, log_weights)
        ancestors = jnp.where(low, drawn, jnp.arange(num_particles, dtype=drawn.dtype)[:, None])
        equal = uniform_log_weights(num_particles, num_blocks, log_weights.dtype)
        return gather(points, ancestors, blocks), jnp.where(low, equal, log_weights)

    points, log_weights = changed_if(jnp.any(low), draw, (points, log_weights))
    return points, log_weights, jnp.sum(low, dtype=jnp.int32)


def gather(points: Point, ancestors: Array, blocks: Blocks) -> Point:
    """The points [N, ...] with every block taken from its ancestor, ``ancestors [N, B]``."""
    if blocks.num_blocks == 1:
        return jax.tree.map(lambda v: v.at[ancestors[:, 0]].get(mode="clip"), points)
    take = lambda v, index: jnp.take_along_axis(v, index, 0, mode="clip")  # noqa: E731
    own = jnp.arange(ancestors.shape[0], dtype=ancestors.dtype)[:, None]
    of_x, of_term = blocks.to_coordinates(ancestors), blocks.to_terms(ancestors, own)
    return Point(take(points.x, of_x), take(points.terms, of_term), take(points.grad, of_x))


def equal_draws(rng_key: Array, x: Array, log_weights: Array, blocks: Blocks, num: int) -> Array:
    """[num, D] draws from a weighted cloud ``x [N, D]``, independent over blocks, in random order."""
    num_particles = x.shape[0]
    rounds = -(-num // num_particles)

    def of_block(key: Array, log_weights: Array) -> Array:
        keys = random.split(key, rounds + 1)
        ancestors = jax.vmap(lambda k: systematic(k, log_weights))(keys[1:])
        return random.permutation(keys[0], ancestors.ravel())[:num]

    keys = random.split(rng_key, blocks.num_blocks)
    ancestors = jax.vmap(of_block, in_axes=(0, 1), out_axes=1)(keys, log_weights)
    return jnp.take_along_axis(x, blocks.to_coordinates(ancestors), 0)


def one_draw(rng_key: Array, x: Array, log_weights: Array, blocks: Blocks) -> Array:
    """[D] one draw from a weighted cloud ``x [N, D]``, independent over blocks."""
    ancestors = random.categorical(rng_key, log_weights, axis=0)
    return jnp.take_along_axis(x, blocks.to_coordinates(ancestors)[None], 0)[0]


def blocks_are_wrong(rng_key: Array, target: Target, theta: Theta, x: Array, blocks: Blocks) -> Array:
    """[] bool: whether the data of ``target`` contradict the partition, looked at from some of the particles [N, D]."""
    terms_fn, flat, _ = flat_terms(target, theta)
    keys, chosen = random.split(rng_key, GUARDS), x[jnp.arange(GUARDS) % x.shape[0]]
    violated = lambda key, x: dependence_violated(lambda x: terms_fn(flat, x), x, blocks, key)  # noqa: E731
    return jnp.any(jax.vmap(violated)(keys, chosen))
