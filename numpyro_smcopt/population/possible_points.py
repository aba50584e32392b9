# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Points at which every datum is possible, put together where no draw from the prior is such a point.

If each of 30 groups is possible with probability 1/2, all are at once with probability 1e-9. Blocks are drawn by
themselves therefore, and kept by themselves; what cannot be told apart into blocks is mended group by group.
"""

from collections.abc import Callable
from typing import TypeAlias

import numpy as np

from numpyro_smcopt.blocks import Blocks

ROUNDS = 16  # of draws
MENDINGS = 300  # of a point
ROWS = 64  # changes that are tried at a time

FiniteFn: TypeAlias = Callable[[np.ndarray], np.ndarray]
"""Points [R, D] to which of their terms are finite, [R, K]."""


def possible_points(
    draw: Callable[[int], np.ndarray],
    finite_terms: FiniteFn,
    find: Callable[[np.ndarray], Blocks],
    units: np.ndarray,
) -> tuple[np.ndarray | None, np.ndarray]:
    """Two points, or None; and which terms have been finite anywhere, [K].

    Args:
        draw: The number of a round to candidates [C, D].
        finite_terms: See `FiniteFn`.
        find: Finds blocks, from two points that are as good as possible.
        units: [D] a guess of which coordinates belong together.
    """
    pool, finite = np.zeros((0, len(units))), np.zeros((0, 0), bool)
    blocks = None
    for k in range(ROUNDS):
        drawn = draw(k)
        found = finite_terms(drawn)
        pool = np.concatenate([pool.astype(drawn.dtype), drawn])
        finite = np.concatenate([finite, found]) if len(finite) else found
        good = np.flatnonzero(finite.all(1))
        if len(good) > 1:
            return pool[good[:2]], np.logical_or.reduce(finite)
        if blocks is None:
            blocks = find(pool[np.argsort(-finite.sum(1), kind="stable")[:2]])
        points = _assembled(pool, finite, blocks)
        if points is not None and finite_terms(points).all():
            return points, np.logical_or.reduce(finite)
    points, mended = _mended(pool, finite, finite_terms, units)
    return points, np.logical_or.reduce(finite) | mended


def _assembled(pool: np.ndarray, finite: np.ndarray, blocks: Blocks) -> np.ndarray | None:
    """Two points [2, D] whose blocks come from candidates that are possible there; None if some block has none."""
    of_term, of_coordinate = np.asarray(blocks.of_term), np.asarray(blocks.of_coordinate)
    bad = np.zeros((len(pool), blocks.num_blocks + 1), int)
    for row, terms in zip(bad, finite, strict=True):
        row += np.bincount(of_term[~terms], minlength=blocks.num_blocks + 1)
    order = np.argsort(bad[:, :-1], 0, kind="stable")  # [C, B]
    if np.any(bad[order[0], np.arange(blocks.num_blocks)]):
        return None
    # The second point is another one where there is another one.
    second = np.where(bad[order[1], np.arange(blocks.num_blocks)] == 0, order[1], order[0])
    columns = np.arange(len(of_coordinate))
    return np.stack([pool[rows[of_coordinate], columns] for rows in (order[0], second)])


def _mended(
    pool: np.ndarray, finite: np.ndarray, finite_terms: FiniteFn, units: np.ndarray
) -> tuple[np.ndarray | None, np.ndarray]:
    """The two best candidates after as many changes as they need, unit by unit; and which terms have been finite."""
    rng, ever, points = np.random.default_rng(0), np.zeros(finite.shape[1], bool), []
    if not len(units):
        return None, ever
    for start in np.argsort(-finite.sum(1), kind="stable")[:2]:
        x, num_bad = pool[start], int((~finite[start]).sum())
        for _ in range(MENDINGS):
            if num_bad == 0:
                break
            chosen, donors = rng.choice(units, ROWS), rng.integers(len(pool), size=ROWS)
            rows = np.where(units == chosen[:, None], pool[donors], x)
            found = finite_terms(rows)
            ever |= found.any(0)
            counts = (~found).sum(1)
            together, best = x.copy(), np.argsort(counts, kind="stable")
            for row in best[counts[best] < num_bad][::-1]:  # the best change of a unit is the last one
                together = np.where(units == chosen[row], rows[row], together)
            tried = np.stack([together, rows[best[0]]])
            counts = (~finite_terms(tried)).sum(1)
            if counts.min() <= num_bad:
                x, num_bad = tried[np.argmin(counts)], int(counts.min())
        if num_bad:
            return None, ever
        points.append(x)
    return np.stack(points), np.ones_like(ever)
