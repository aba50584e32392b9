# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Log weights of a particle cloud, and the one formula that changes them.

A weighted cloud ``(x_i, w_i)``, ``w_i = exp(a_i)``, ``sum_i w_i = 1`` stands for a law ``pi``. When the energy changes
from ``U`` to ``U'`` (and the particles move from ``x`` to ``x'``), it stands for the new law after ::

    log G_i = U(x_i) - U'(x'_i) + log_ratio_i        log Z'/Z = log sum_i w_i G_i        w'_i = w_i G_i / sum_j w_j G_j

where ``log_ratio = log q(x | x') - log q(x' | x)`` is zero for a move that leaves the new law invariant.

Log weights have shape [N, B] or [N], letters as in `types`; they are normalised over N, block by block.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike, DTypeLike

from numpyro_smcopt.blocks import Blocks


def uniform_log_weights(num_particles: int, num_blocks: int | None = None, dtype: DTypeLike | None = None) -> jax.Array:
    """Equal log weights ``-log N``, of shape [N, B], or [N] without ``num_blocks``.

    Args:
        num_particles: N.
        num_blocks: B.
        dtype: A floating type; by default JAX's own (``float32``, or ``float64`` if that is enabled).
    """
    shape = (num_particles,) if num_blocks is None else (num_particles, num_blocks)
    # A full without a type would be weakly typed, and the first update would then compile twice.
    return jnp.full(shape, -math.log(num_particles), dtype=jnp.result_type(float) if dtype is None else dtype)


def effective_sample_size(log_weights: jax.Array) -> jax.Array:
    """``(sum_i w_i)^2 / sum_i w_i^2`` over the leading axis: [N, ...] to [...], within ``[1, N]``.

    The log weights need not be normalised. An entry that is NaN or infinite has weight zero; if all have, the result
    is 0.
    """
    alive = jnp.isfinite(log_weights)
    dead = ~jnp.any(alive, axis=0)
    _, ess = _log_sum_and_ess(_or_equal(dead, jnp.where(alive, log_weights, -jnp.inf)))
    return jnp.where(dead, 0.0, ess)


def conditional_ess(log_weights: jax.Array, log_increment: jax.Array) -> jax.Array:
    """``(sum_i w_i G_i)^2 / sum_i w_i G_i^2``: what one reweighting keeps of the effective particles, in [0, 1].

    The conditional effective sample size of Zhou, Johansen and Aston 2016, as a fraction. Unlike the effective sample
    size it does not charge a step for the weights that it was given.

    Args:
        log_weights: [N, B] normalised.
        log_increment: [N, B] ``log G``; NaN and infinity count as ``G = 0``.

    Returns:
        [B]; 0 where nothing is left.
    """
    log_increment = jnp.where(jnp.isfinite(log_increment), log_increment, -jnp.inf)
    top = jnp.max(jnp.where(jnp.isfinite(log_weights), log_increment, -jnp.inf), axis=0)
    log_increment -= jnp.where(jnp.isfinite(top), top, 0.0)  # else two huge logarithms would cancel
    first = jax.nn.logsumexp(log_weights + log_increment, axis=0)
    second = jax.nn.logsumexp(log_weights + 2 * log_increment, axis=0)
    alive = jnp.isfinite(first)
    return jnp.where(alive, jnp.clip(jnp.exp(2 * jnp.where(alive, first, 0.0) - second), 0.0, 1.0), 0.0)


class Reweighted(NamedTuple):
    """Result of `reweight`. For log weights of shape [N] the axis B is absent throughout.

    Attributes:
        log_weights: [N, B] normalised.
        log_mean: [B] log of the weighted mean of ``exp(log_increment)``: the increment of the log evidence.
        ess: [B] effective sample size of the new weights, in particles; 0 where the block collapsed.
        num_nonfinite: [] how many weights, over all blocks, were lost to an increment that is NaN or infinite.
        collapsed: [B] of bool: no particle of the block was left with a positive weight.
    """

    log_weights: jax.Array
    log_mean: jax.Array
    ess: jax.Array
    num_nonfinite: jax.Array
    collapsed: jax.Array


def reweight(log_weights: jax.Array, log_increment: jax.Array) -> Reweighted:
    """Multiply the weights by ``exp(log_increment)`` and normalise, block by block.

    An increment that is NaN or infinite takes all weight from its particle, and is counted; a particle without weight
    stays without, whatever its increment. A block in which no weight is left gets equal weights and ``log_mean`` 0,
    and says so in ``collapsed``: what follows it is no estimate.

    Args:
        log_weights: [N, B] or [N].
        log_increment: Of the same shape, from `incremental_log_weight`.

    Raises:
        ValueError: If the shapes differ.
    """
    if log_weights.shape != log_increment.shape:
        raise ValueError(
            f"reweight: expected log_increment of the shape of log_weights, {log_weights.shape}, "
            f"got {log_increment.shape}."
        )
    alive = jnp.isfinite(log_weights)
    kept = alive & jnp.isfinite(log_increment)
    collapsed = ~jnp.any(kept, axis=0)
    old = _or_equal(collapsed, jnp.where(alive, log_weights, -jnp.inf))
    new = _or_equal(collapsed, jnp.where(kept, log_weights + log_increment, -jnp.inf))
    # Summing the old weights, though they sum to one, removes their rounding: -log N is off by the same amount
    # after every resampling, which would add up over a run, and with it an increment of 0 changes nothing, exactly.
    log_sums, ess = _log_sum_and_ess(jnp.stack([old, new], axis=1))
    return Reweighted(
        log_weights=new - log_sums[1],
        log_mean=log_sums[1] - log_sums[0],
        ess=jnp.where(collapsed, 0.0, ess[1]),
        num_nonfinite=jnp.sum(alive & ~kept, dtype=jnp.int32),
        collapsed=collapsed,
    )


def incremental_log_weight(
    old_terms: jax.Array,
    new_terms: jax.Array,
    sum_terms: Callable[[jax.Array], jax.Array],
    log_ratio: ArrayLike = 0.0,
) -> jax.Array:
    """``log G = U(x) - U'(x') + log_ratio`` from the unsummed energies: [..., K] to [..., B].

    The terms are subtracted *before* they are summed. With a million observations the two totals are near 1e6, where
    neighbouring ``float32`` numbers are 0.06 apart: their difference is noise. The differences of the terms are small,
    and so is the rounding of their sum.

    Args:
        old_terms: [..., K] terms of the old energy at the old position.
        new_terms: [..., K] terms of the new energy, at the old position too if the move leaves the new law invariant,
            else at the new position.
        sum_terms: Sums the terms of each block, [..., K] to [..., B].
        log_ratio: [..., B] log of the backward over the forward kernel density; 0 for an invariant move.
    """
    return sum_terms(old_terms - new_terms) + log_ratio


def weighted_mean(log_weights: jax.Array, values: jax.Array) -> jax.Array:
    """``sum_i w_i f_i``: log weights [N] and values [N, ...] give [...].

    An entry of weight zero is absent, even if its value is NaN or infinite. Without any weight the result is NaN.

    Raises:
        ValueError: If the shapes do not fit.
    """
    weights, values = _aligned(log_weights, values)
    return jnp.sum(weights * values, axis=0)


def weighted_variance(log_weights: jax.Array, values: jax.Array) -> jax.Array:
    """``c2 sum_i w_i (f_i - <f>)^2`` with `small_sample_factor` ``c2``: [N] and [N, ...] give [...].

    Absent entries as in `weighted_mean`. With all the weight on one particle the result is 0.

    Raises:
        ValueError: If the shapes do not fit.
    """
    _, values = _aligned(log_weights, values)
    deviations = values - weighted_mean(log_weights, values)
    return small_sample_factor(log_weights) * weighted_mean(log_weights, deviations**2)


def block_moments(log_weights: jax.Array, values: jax.Array, blocks: Blocks) -> tuple[jax.Array, jax.Array]:
    """`weighted_mean` and `weighted_variance` of every coordinate under the weights of its block, both [D].

    Args:
        log_weights: [N, B] normalised.
        values: [N, D].
        blocks: The partition.
    """
    of_block = jnp.exp(log_weights)
    weights, factor = blocks.to_coordinates(of_block), jax.vmap(_small_sample_factor, in_axes=1)(of_block)
    values = jnp.where(weights > 0.0, values, 0.0)
    mean = jnp.sum(weights * values, axis=0)
    return mean, blocks.to_coordinates(factor) * jnp.sum(weights * (values - mean) ** 2, axis=0)


def small_sample_factor(log_weights: jax.Array) -> jax.Array:
    """``c2 = 1 / (1 - sum_i w_i^2)``: log weights [N] give [].

    It makes a weighted covariance unbiased when the weights are fixed (``N / (N - 1)`` for equal weights), and
    approximately so when they are random. With all the weight on one particle it is 1: there is nothing to correct.
    """
    return _small_sample_factor(_normalized_weights(log_weights))


def _small_sample_factor(weights: jax.Array) -> jax.Array:
    gap = jnp.sum(weights * (1.0 - weights))
    known = gap > 2.0 * jnp.finfo(gap.dtype).eps
    return jnp.where(known, 1.0 / jnp.where(known, gap, 1.0), 1.0)


def _log_sum_and_ess(log_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    # Every column holds at least one finite entry, and no NaN. One exponential serves both results.
    top = jax.lax.stop_gradient(jnp.max(log_weights, axis=0))
    weights = jnp.exp(log_weights - top)
    total = jnp.sum(weights, axis=0)
    ess = jnp.clip(total**2 / jnp.sum(weights**2, axis=0), 1.0, log_weights.shape[0])
    return top + jnp.log(total), ess


def _or_equal(dead: jax.Array, log_weights: jax.Array) -> jax.Array:
    # Equal weights in the dead columns: no arithmetic on infinities there, in values or in gradients.
    return jnp.where(dead, 0.0, log_weights)


def _normalized_weights(log_weights: jax.Array) -> jax.Array:
    return jax.nn.softmax(jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf), axis=0)


def _aligned(log_weights: jax.Array, values: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weights in the dimensions of the values, and the values, with 0 for those that have no weight."""
    if log_weights.ndim != 1 or values.ndim < 1 or values.shape[0] != log_weights.shape[0]:
        raise ValueError(
            "expected log_weights of shape [N] and values of shape [N, ...], "
            f"got {log_weights.shape} and {values.shape}; map over blocks with jax.vmap."
        )
    weights = _normalized_weights(log_weights).reshape(-1, *(1,) * (values.ndim - 1))
    return weights, jnp.where(weights > 0.0, values, 0.0)  # 0 * inf is NaN
