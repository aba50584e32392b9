# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Resampling: replace a weighted cloud by copies of its particles, with equal weights.

A scheme draws ancestors ``a_1, ..., a_N`` such that the number of offspring ``O_j = #{i : a_i = j}`` satisfies ::

    E[O_j] = N w_j                                        O_j = 0 whenever w_j = 0

Systematic and stratified resampling lay the particles on the line [0, N], the ``j``-th on an interval of length
``N w_j``, throw one point in each ``[i, i + 1)`` and count, in ``O(N)``; multinomial and residual make independent
draws, in ``O(N log N)``. Stratified and residual never have a larger variance than multinomial; systematic has the
smallest in most problems, though not in all.
Source: Douc, Cappe and Moulines, "Comparison of resampling schemes for particle filtering" (2005).

A scheme knows one block: map it over the columns of log weights [N, B] with ``jax.vmap``.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
from jax import random

# The total weight in integer units. Integers make the cumulative sum exact: it never decreases, is flat over particles
# of weight zero and ends on the total. In floating point none of these holds (a sum by tree rounds c_j and c_{j-1}
# differently), and each failure can select a particle of weight zero. Weights below 2^-31 count as zero.
_UNITS = 2**30


class ResamplingScheme(Protocol):
    """The signature that all schemes share."""

    def __call__(self, rng_key: jax.Array, log_weights: jax.Array) -> jax.Array:
        """Draw the ancestors.

        Args:
            rng_key: A key.
            log_weights: [N], not necessarily normalised; NaN and infinite entries have weight zero.

        Returns:
            [N] of int32, the ancestor of each new particle; if no particle has weight, the identity.

        Raises:
            ValueError: If the log weights have not exactly one axis.
        """
        ...


def systematic(rng_key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Points ``i + u`` with one uniform ``u``; offspring within 1 of ``N w_j``. See `ResamplingScheme`."""
    weights = _weights(log_weights)
    ends = _interval_ends(weights)
    offset = random.uniform(rng_key, (), ends.dtype)
    return _identity_if_dead(log_weights, _fill_slots(ends, jnp.ceil(ends - offset)))


def stratified(rng_key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """Points ``i + u_i`` with independent uniforms; offspring within 2 of ``N w_j``. See `ResamplingScheme`."""
    weights = _weights(log_weights)
    ends = _interval_ends(weights)
    offsets = random.uniform(rng_key, ends.shape, ends.dtype)
    whole = jnp.floor(ends)
    # Of the points before an end all but the last are in full strata; that one may lie on either side of it.
    in_last_stratum = offsets.at[whole.astype(jnp.int32)].get(mode="fill", fill_value=1.0)
    points_before = whole + (in_last_stratum < ends - whole)
    return _identity_if_dead(log_weights, _fill_slots(ends, points_before))


def multinomial(rng_key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """``N`` independent draws with probabilities ``w``, unsorted. See `ResamplingScheme`."""
    return _identity_if_dead(log_weights, _independent_draws(rng_key, _weights(log_weights)))


def residual(rng_key: jax.Array, log_weights: jax.Array) -> jax.Array:
    """``floor(N w_j)`` copies of each, the rest drawn from what is left over. See `ResamplingScheme`."""
    weights = _weights(log_weights)
    expected = weights * (weights.shape[0] / jnp.sum(weights))
    copies = jnp.floor(expected)
    remainders = expected - copies
    remainders = jnp.where(jnp.any(remainders > 0.0), remainders, weights)  # if none remain, no draw is used
    slot_ends = jnp.cumsum(copies.astype(jnp.int32), dtype=jnp.int32)
    # All N draws are made, so that shapes stay fixed; those that the copies leave room for are used.
    draws = _independent_draws(rng_key, remainders)
    is_copy = jnp.arange(weights.shape[0]) < slot_ends[-1]
    return _identity_if_dead(log_weights, jnp.where(is_copy, _ancestor_of_slot(slot_ends), draws))


def _weights(log_weights: jax.Array) -> jax.Array:
    """Weights [N] whose largest is 1, or that are all 1 if no particle has weight."""
    if log_weights.ndim != 1:
        raise ValueError(
            f"resampling: expected log_weights of shape [N], got {log_weights.shape}; map over blocks with jax.vmap."
        )
    log_weights = jnp.where(jnp.isfinite(log_weights), log_weights, -jnp.inf)
    top = jnp.max(log_weights)
    return jnp.where(top > -jnp.inf, jnp.exp(log_weights - top), 1.0)


def _cumulative_units(weights: jax.Array) -> jax.Array:
    units = jnp.round(weights * (_UNITS / jnp.sum(weights))).astype(jnp.int32)
    return jnp.cumsum(units, dtype=jnp.int32)


def _interval_ends(weights: jax.Array) -> jax.Array:
    """Ends of the intervals on [0, N]; that of the last particle with weight, and all after it, exactly at N."""
    num_particles = weights.shape[0]
    cumulative = _cumulative_units(weights)
    ends = cumulative.astype(weights.dtype) * (num_particles / cumulative[-1].astype(weights.dtype))
    return jnp.where(cumulative == cumulative[-1], num_particles, ends)


def _fill_slots(ends: jax.Array, points_before: jax.Array) -> jax.Array:
    # Every point lies before N, even if N - u rounds to N - 1.
    num_particles = ends.shape[0]
    return _ancestor_of_slot(jnp.where(ends < num_particles, points_before, num_particles).astype(jnp.int32))


def _ancestor_of_slot(slot_ends: jax.Array) -> jax.Array:
    """Slot ``i`` belongs to the first particle whose slots end after ``i``, in ``O(N)``; to ``N`` if there is none."""
    ended_at = jnp.zeros_like(slot_ends).at[slot_ends].add(1, mode="drop", indices_are_sorted=True)
    return jnp.cumsum(ended_at, dtype=jnp.int32)


def _independent_draws(rng_key: jax.Array, weights: jax.Array) -> jax.Array:
    cumulative = _cumulative_units(weights)
    uniforms = random.uniform(rng_key, weights.shape, weights.dtype)
    points = jnp.floor(uniforms * cumulative[-1].astype(weights.dtype)).astype(jnp.int32)
    # The first particle whose cumulative units exceed a point below the total has weight.
    points = jnp.minimum(points, cumulative[-1] - 1)
    return jnp.searchsorted(cumulative, points, side="right").astype(jnp.int32)


def _identity_if_dead(log_weights: jax.Array, ancestors: jax.Array) -> jax.Array:
    identity = jnp.arange(log_weights.shape[0], dtype=jnp.int32)
    return jnp.where(jnp.any(jnp.isfinite(log_weights)), ancestors, identity)
