# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Blocks: groups of latents that are independent of one another given ``theta``.

Two coordinates of ``x`` belong together if some energy term depends on both; the blocks are the connected components
of that graph. Given ``theta`` the target factorises, ``pi_theta(x) = prod_b pi_theta(x_b)``, so weights, resampling,
accept-reject and step sizes may act on each block by itself, and log evidence is a sum over blocks.

The blocks are *found*, not declared: coordinates are disturbed and the terms that react are recorded. One kind of
disturbance is not enough (a NaN can be swallowed, a derivative can vanish by symmetry, a threshold can be far away), so
several are tried and their union is taken. A wrong block would bias the answer silently; `dependence_violated` checks a
whole partition with a few directional derivatives, whenever data have changed.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.sums import NO_SUMS, Sums, find_sums
from numpyro_smcopt.types import Array

PROBE_MASKS = 32  # sets of coordinates that are disturbed per compiled call
KINDS = 7  # of disturbance, each of which takes one row of a call
FAR = 1e4  # beyond the thresholds that a model compares its latents with
SEARCH_LIMIT = 3e8  # disturbances times K that a search may take
TABLE_WIDTH_LIMIT = 24  # terms per block up to which sums are unrolled gathers (several times faster than scatters)


ProbeFn = Callable[[np.ndarray, np.ndarray], tuple[Any, Any]]
"""Points and tangents, both [R, D], to energy terms and their directional derivatives, both [R, K]."""


class Blocks(NamedTuple):
    """A partition of latent coordinates and energy terms.

    Attributes:
        of_coordinate: [D] block of each coordinate.
        of_term: [K] block of each term; B for terms that depend on no latent.
        members: [B, M] coordinates of each block, padded with D.
        slots: [D] where each coordinate stands in the flattened ``members``.
        terms: [B, S] terms of each block, padded with K; S = 0 if the blocks are too large for a table.
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
    return _blocks(np.zeros(points.shape[-1], int), np.zeros(num_terms, int), 1)


def find_blocks(probe: ProbeFn, points: np.ndarray, num_terms: int, units: np.ndarray) -> Blocks:
    """Find the independent blocks of a target.

    Args:
        probe: Evaluates the energy terms and their directional derivatives for a batch of points.
        points: [2, D] two generic points with finite energy, for instance draws from the prior.
        num_terms: K.
        units: [D] a guess of which coordinates belong together (from plates). If it is right, a few disturbances of
            many units at once verify it and find the blocks; if not, every coordinate is disturbed by itself.

    Returns:
        The finest partition that can be afforded. One block if none can be established.
    """
    num, arguments = points.shape[-1], (probe, points, num_terms, units)
    if num == 0:
        return one_block(*arguments)
    react = _Prober(probe, points)
    of_term = _decode_units(react, units, num_terms)
    found = None if of_term is None else _search(react, units, of_term)
    if found is None:
        found = _search(react, np.zeros(num, int), np.zeros(num_terms, int))
    return one_block(*arguments) if found is None else found


def probe_rows(num_coordinates: int) -> int:
    """How many points `find_blocks` has evaluated at once."""
    return KINDS * _masks_per_call(num_coordinates)


def _masks_per_call(num_coordinates: int) -> int:
    return max(1, min(PROBE_MASKS, num_coordinates))


class _Prober:
    """Which terms react when sets of coordinates are disturbed: masks ``[R, D]`` to ``[R, K]``."""

    def __init__(self, probe: ProbeFn, points: np.ndarray) -> None:
        num = points.shape[-1]
        self.size = _masks_per_call(num)
        self._probe, self._points = probe, np.asarray(points)
        rng = np.random.default_rng(0)
        self._push = np.asarray(rng.uniform(1.0, 2.0, num), self._points.dtype)
        self._away = FAR * np.asarray(rng.choice([-1, 1], num) * self._push, self._points.dtype)
        rows = np.repeat(self._points, [KINDS * self.size - 1, 1], axis=0)
        values, _ = self._evaluate(rows, np.zeros_like(rows))
        self._base = values[[0, -1]]

    def __call__(self, masks: np.ndarray) -> np.ndarray:
        """[R, K] of bool."""
        out = []
        for start in range(0, len(masks), self.size):
            chunk = masks[start : start + self.size]
            padded = np.concatenate([chunk, np.zeros((self.size - len(chunk), masks.shape[1]), bool)])
            out.append(self._react(padded)[: len(chunk)])
        return np.concatenate(out)

    def _react(self, masks: np.ndarray) -> np.ndarray:
        first, second = self._points
        push, everywhere = masks * self._push, np.ones_like(masks)
        # Near by, twice; beyond all thresholds, up and down; NaN; and where all other latents are beyond thresholds.
        rows = [
            first + push,
            second - 1.3 * push,
            first + FAR * push,
            first - FAR * push,
            np.where(masks, np.nan, first),
            first + everywhere * self._away,
            first - everywhere * self._away,
        ]
        values, slopes = self._evaluate(np.concatenate(rows), np.tile(push, (KINDS, 1)))
        values = values.reshape(KINDS, len(masks), -1)
        slopes = slopes.reshape(KINDS, len(masks), -1)
        # A structural zero of the derivative is exact; values of one batch may differ by rounding.
        moved = np.any(slopes[:2] != 0, 0) | np.any((slopes[5:] != 0) & np.isfinite(slopes[5:]), 0)
        moved |= _far(values[1], self._base[1])
        return moved | np.any([_far(values[k], self._base[0]) for k in (0, 2, 3, 4)], 0)

    def _evaluate(self, rows: np.ndarray, tangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        values, slopes = self._probe(rows, np.asarray(tangents, rows.dtype))
        return np.asarray(values), np.asarray(slopes)


def _far(values: np.ndarray, base: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        return ~(np.abs(values - base) <= 1e-3 * (1 + np.abs(base))) & np.isfinite(base)


def _search(react: _Prober, units: np.ndarray, of_term: np.ndarray) -> Blocks | None:
    """The blocks within independent units, found by disturbing one coordinate of every unit at a time.

    Args:
        react: See `_Prober`.
        units: [D] unit of each coordinate.
        of_term: [K] the only unit that a term may depend on; one more than the last for terms that depend on none.

    Returns:
        The blocks; the units themselves if a search is too expensive; None if a term depends on something else.
    """
    num, num_terms, num_units = len(units), len(of_term), int(units.max()) + 1
    members = _table(units, num_units, num)  # [units, M]
    if members.shape[1] * num_terms > SEARCH_LIMIT:
        return _blocks(units, of_term, num_units)
    members = np.concatenate([members, np.full((1, members.shape[1]), num)])
    coordinates, terms = [], []
    for start in range(0, members.shape[1], react.size):
        chosen = members[:, start : start + react.size]
        masks = np.zeros((chosen.shape[1], num + 1), bool)
        masks[np.arange(chosen.shape[1]), chosen] = True
        rows, columns = np.nonzero(react(masks[:, :num]))
        coordinates.append(chosen[of_term[columns], rows])
        terms.append(columns)
    edges = np.concatenate(coordinates), np.concatenate(terms)
    return None if np.any(edges[0] == num) else _from_edges(*edges, num, num_terms)


def _from_edges(coordinates: np.ndarray, terms: np.ndarray, num: int, num_terms: int) -> Blocks:
    """Connected components of the bipartite graph, by passing on the smallest label until nothing changes."""
    label = np.arange(num)
    while True:
        of_term = np.full(num_terms, num)
        np.minimum.at(of_term, terms, label[coordinates])
        new = label.copy()
        np.minimum.at(new, coordinates, of_term[terms])
        new = new[new]
        if np.array_equal(new, label):
            break
        label = new
    roots, of_coordinate = np.unique(label, return_inverse=True)
    compact = np.full(num + 1, len(roots))
    compact[roots] = np.arange(len(roots))
    return _blocks(of_coordinate, compact[of_term], len(roots))


def _decode_units(react: _Prober, units: np.ndarray, num_terms: int) -> np.ndarray | None:
    """Unit of each term from a binary code, or None if some term depends on several units.

    Disturbing all units whose r-th bit is one, and then all whose r-th bit is zero, a term of a single unit reacts to
    exactly one of the two, and the answers spell the unit's number: log2(units) disturbances instead of one per unit.
    """
    num_units = int(units.max()) + 1
    bits = max(1, int(np.ceil(np.log2(max(num_units, 2)))))
    ones = ((units[None, :] >> np.arange(bits)[:, None]) & 1).astype(bool)  # [bits, D]
    reacted = react(np.concatenate([ones, ~ones]))
    high, low = reacted[:bits], reacted[bits:]
    if np.any(high & low):
        return None
    free = ~np.any(high | low, 0)
    if np.any(~free & ~np.all(high | low, 0)):
        return None
    unit = (high * (1 << np.arange(bits))[:, None]).sum(0)
    return np.where(free, num_units, unit)


def add_up(blocks: Blocks, shapes: Sequence[tuple[int, ...]]) -> Blocks:
    """The partition with what can be added up.

    Args:
        blocks: A partition, not traced.
        shapes: Of the sites' terms, in order.
    """
    of_term = np.asarray(blocks.of_term)
    sums = find_sums(of_term, shapes, blocks.num_blocks)
    table = _table_of_terms(sums.owners(of_term), blocks.num_blocks)
    return blocks._replace(table_of_sums=_on_device(table), sums=sums)


def _blocks(of_coordinate: np.ndarray, of_term: np.ndarray, num: int) -> Blocks:
    members = _table(of_coordinate, num, len(of_coordinate))
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
    terms = _table(of_term, num, len(of_term))
    if num == 1 or terms.shape[1] > TABLE_WIDTH_LIMIT or terms.size > 3 * max(len(of_term), 1):
        return np.zeros((num, 0), int)
    return terms


def _table(owner: np.ndarray, num: int, fill: int) -> np.ndarray:
    """[num, width] the indices that belong to each owner, padded with ``fill``; owners beyond ``num`` are left out."""
    index = np.flatnonzero(owner < num)
    index = index[np.argsort(owner[index], kind="stable")]
    counts = np.bincount(owner[index], minlength=num)[:num]
    table = np.full((num, max(counts.max(initial=0), 1)), fill)
    start = np.cumsum(counts) - counts
    table[owner[index], np.arange(len(index)) - start[owner[index]]] = index
    return table


def dependence_violated(terms_fn: Callable[[Array], Array], x: Array, blocks: Blocks, rng_key: Array) -> Array:
    """Whether some term depends on a latent outside its block.

    Along a direction that moves some of the blocks, the terms of the others must have no derivative.

    Args:
        terms_fn: ``x [D] -> [K]`` at the current ``theta`` and data.
        x: [D] one particle.
        blocks: The partition that is to be checked.
        rng_key: How far every coordinate moves.

    Returns:
        [] bool. The blocks are told apart by the bits of their numbers: of two blocks, one moves while the other stands
        still in some direction, so a wrong dependence is noticed wherever its derivative does not vanish.
    """
    if blocks.num_blocks == 1:
        return jnp.array(False)
    numbers, bits = jnp.arange(blocks.num_blocks), jnp.arange((blocks.num_blocks - 1).bit_length())
    ones = ((numbers >> bits[:, None]) & 1).astype(bool)
    size = random.uniform(rng_key, x.shape, x.dtype, 0.5, 1.5)
    _, slope_along = jax.linearize(terms_fn, x)

    def violated(moving: Array) -> Array:
        slope = slope_along(jnp.where(blocks.to_coordinates(moving), size, 0.0))
        return jnp.any((slope != 0) & jnp.isfinite(slope) & ~blocks.to_terms(moving, jnp.asarray(False)))

    return jnp.any(jax.lax.map(violated, jnp.concatenate([ones, ~ones])))
