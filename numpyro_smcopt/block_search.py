# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The search for independent blocks of latents.

The blocks are *found*, not declared: coordinates are disturbed and the terms that react are recorded. One kind of
disturbance is not enough (a NaN can be swallowed, a derivative can vanish by symmetry, a threshold can be far away), so
several are tried and their union is taken. A wrong block would bias the answer silently; `dependence_violated` checks a
whole partition with a few directional derivatives, whenever data have changed.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.blocks import Blocks, ProbeFn, make_blocks, one_block, table
from numpyro_smcopt.types import Array

PROBE_MASKS = 32  # sets of coordinates that are disturbed per compiled call
KINDS = 7  # of disturbance, each of which takes one row of a call
FAR = 1e4  # beyond the thresholds that a model compares its latents with
SEARCH_LIMIT = 3e8  # disturbances times K that a search may take


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
    """Number of points that `find_blocks` has evaluated at once."""
    return KINDS * _masks_per_call(num_coordinates)


def _masks_per_call(num_coordinates: int) -> int:
    return max(1, min(PROBE_MASKS, num_coordinates))


class _Prober:
    """The terms that react when sets of coordinates are disturbed: masks ``[J, D]`` to ``[J, K]``."""

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
        """[J, K] of bool."""
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
    members = table(units, num_units, num)  # [units, M]
    if members.shape[1] * num_terms > SEARCH_LIMIT:
        return make_blocks(units, of_term, num_units)
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
    return make_blocks(of_coordinate, compact[of_term], len(roots))


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


def dependence_violated(terms_fn: Callable[[Array], Array], x: Array, blocks: Blocks, rng_key: Array) -> Array:
    """True if some term depends on a latent outside its block.

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
