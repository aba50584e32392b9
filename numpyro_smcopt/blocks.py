# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks: groups of latents that are independent of one another given ``theta``.

Two coordinates of ``x`` belong together if some energy term depends on both; the blocks are the connected components
of that graph. Given ``theta`` the target factorises, ``pi_theta(x) = prod_b pi_theta(x_b)``, so weights, resampling,
accept-reject and step sizes may act on each block by itself, and log evidence is a sum over blocks.

They are found by `block_search.find_blocks`; this file holds what a partition is and does.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt.term_sums import NO_SUMS, Sums, find_sums
from numpyro_smcopt.types import Array

TABLE_WIDTH_LIMIT = 24  # terms per block up to which sums are unrolled gathers (several times faster than scatters)


ProbeFn = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
"""Points and tangents, both [J, D], to energy terms and their directional derivatives, both [J, K]."""


class Blocks(NamedTuple):
    """A partition of latent coordinates and energy terms.

    Attributes:
        of_coordinate: [D] block of each coordinate.
        of_term: [K] block of each term; B for terms that depend on no latent.
        members: [B, M] coordinates of each block, padded with D.
        slots: [D] where each coordinate stands in the flattened ``members``.
        terms: [B, ...] terms of each block, padded with K; [B, 0] if the blocks are too large for a table.
        table_of_sums: ``terms`` of `of_sums`, where terms are added up.
        sums: How terms may be added up.
    """

    of_coordinate: Array
    of_term: Array
    members: Array
    slots: Array
    terms: Array
    table_of_sums: Array | None = None
    sums: Sums = NO_SUMS

    @property
    def of_sums(self) -> "Blocks":
        """The same partition with `sums` of energy terms in the place of the terms."""
        if self.table_of_sums is None:
            return self
        owners = self.sums.owners(self.of_term)
        return self._replace(of_term=owners, terms=self.table_of_sums, table_of_sums=None, sums=NO_SUMS)

    @property
    def num_blocks(self) -> int:
        """B."""
        return self.members.shape[0]

    @property
    def width(self) -> int:
        """M, the size of the largest block."""
        return self.members.shape[1]

    def sum_terms(self, values: Array) -> Array:
        """[..., K] to [..., B]: sum over the terms of each block; with one block, over all terms."""
        if self.num_blocks == 1:
            return values.sum(-1, keepdims=True)
        if self.terms.shape[1]:
            return _take_padded(values, self.terms, 0.0).sum(-1)
        return _segment_sum(values, self.of_term, self.num_blocks + 1)[..., :-1]

    def sum_free_terms(self, values: Array) -> Array:
        """[..., K] to [...]: sum over the terms that depend on no latent (none with one block: see `sum_terms`)."""
        if self.num_blocks == 1:
            return jnp.zeros(values.shape[:-1], values.dtype)
        return jnp.sum(jnp.where(self.of_term == self.num_blocks, values, 0), -1)

    def sum_coordinates(self, values: Array) -> Array:
        """[..., D] to [..., B]: sum over the coordinates of each block."""
        if self.num_blocks == 1:
            return values.sum(-1, keepdims=True)
        return self.gather(values, 0.0).sum(-1)

    def gather(self, values: Array, fill: float) -> Array:
        """[..., D] to [..., B, M]: the coordinates of each block side by side, padded with ``fill``."""
        if self.members.size == self.of_coordinate.size:  # nothing is padded
            return values[..., self.members]
        return _take_padded(values, self.members, fill)

    def scatter(self, values: Array) -> Array:
        """[..., B, M] to [..., D]: undo `gather`."""
        return values.reshape(*values.shape[:-2], -1)[..., self.slots]

    def to_coordinates(self, values: Array) -> Array:
        """[..., B] to [..., D]: the value of each coordinate's block."""
        if self.num_blocks == 1:
            return jnp.broadcast_to(values, (*values.shape[:-1], self.of_coordinate.shape[0]))
        return values[..., self.of_coordinate]

    def to_terms(self, values: Array, free: Array | float) -> Array:
        """[..., B] to [..., K]: the value of each term's block, ``free`` for terms that depend on no latent."""
        if self.num_blocks == 1:
            return jnp.broadcast_to(values, (*values.shape[:-1], self.of_term.shape[0]))
        padded = jnp.concatenate([values, jnp.broadcast_to(free, (*values.shape[:-1], 1))], -1)
        return padded[..., self.of_term]


def _take_padded(values: Array, index: Array, fill: float) -> Array:
    # Appending one entry and clipping compiles to a fraction of what `mode="fill"` does.
    padded = jnp.concatenate([values, jnp.full((*values.shape[:-1], 1), fill, values.dtype)], -1)
    return jnp.take(padded, index, axis=-1, mode="clip")


def _segment_sum(values: Array, segments: Array, num: int) -> Array:
    flat = values.reshape(-1, values.shape[-1])
    sums = jax.vmap(lambda row: jax.ops.segment_sum(row, segments, num))(flat)
    return sums.reshape(*values.shape[:-1], num)


class Partition(Protocol):
    """Finds the blocks of a target; `find_blocks` and `one_block` are two."""

    def __call__(self, probe: ProbeFn, points: np.ndarray, num_terms: int, units: np.ndarray) -> Blocks:
        """See `find_blocks`."""


def one_block(probe: ProbeFn, points: np.ndarray, num_terms: int, units: np.ndarray) -> Blocks:
    """All latents in one block: the plain algorithm, as the papers mean it. See `find_blocks`."""
    del probe, units
    return make_blocks(np.zeros(points.shape[-1], int), np.zeros(num_terms, int), 1)


def add_up(blocks: Blocks, shapes: Sequence[tuple[int, ...]]) -> Blocks:
    """The partition with what can be added up.

    Args:
        blocks: A partition, not traced; it may be `doubled`.
        shapes: Of the sites' terms, in order.
    """
    of_term = np.asarray(blocks.of_term)
    double = len(of_term) > sum(map(math.prod, shapes))
    sums = find_sums(of_term, (*shapes, *shapes) if double else shapes, blocks.num_blocks)
    sums = dataclasses.replace(sums, double=double)
    table = _table_of_terms(sums.owners(of_term), blocks.num_blocks)
    return blocks._replace(table_of_sums=_on_device(table), sums=sums)


def doubled(blocks: Blocks) -> Blocks:
    """The same partition of terms that come in two halves, see `potential.Target`; nothing is added up."""
    of_coordinate, of_term = np.asarray(blocks.of_coordinate), np.asarray(blocks.of_term)
    return make_blocks(of_coordinate, np.tile(of_term, 2), blocks.num_blocks)


def make_blocks(of_coordinate: np.ndarray, of_term: np.ndarray, num: int) -> Blocks:
    """A partition from the block of each coordinate [D] and of each term [K], ``num`` for terms of no block."""
    members = table(of_coordinate, num, len(of_coordinate))
    terms = _table_of_terms(of_term, num)
    slots = np.empty(len(of_coordinate), int)
    filled = members < len(of_coordinate)
    slots[members[filled]] = np.flatnonzero(filled)
    tables: Any = map(_on_device, (of_coordinate, of_term, members, slots, terms))
    return Blocks(*tables)


def _on_device(table: np.ndarray) -> Array:
    return jax.device_put(np.asarray(table, np.int32))


def _table_of_terms(of_term: np.ndarray, num: int) -> np.ndarray:
    """See `Blocks.terms`."""
    terms = table(of_term, num, len(of_term))
    if num == 1 or terms.shape[1] > TABLE_WIDTH_LIMIT or terms.size > 3 * max(len(of_term), 1):
        return np.zeros((num, 0), int)
    return terms


def table(owner: np.ndarray, num: int, fill: int) -> np.ndarray:
    """[num, width] the indices that belong to each owner, padded with ``fill``; owners beyond ``num`` are left out."""
    index = np.flatnonzero(owner < num)
    index = index[np.argsort(owner[index], kind="stable")]
    counts = np.bincount(owner[index], minlength=num)[:num]
    table = np.full((num, max(counts.max(initial=0), 1)), fill)
    start = np.cumsum(counts) - counts
    table[owner[index], np.arange(len(index)) - start[owner[index]]] = index
    return table
