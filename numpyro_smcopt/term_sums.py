# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Energy terms added up, as far as nobody needs them apart.

A model has a term for each of its observations. A cloud that keeps all of them goes through memory many times in every
update, which took several times longer than to compute them. Weights and moves need the terms of a block together, so
the terms of a site are added up along those axes of its batch on which the block does not depend, as soon as they are
computed: such a sum is a part of the loop that makes the terms.

Sums stay short. Changes of energy are differences of sums (`weights.incremental_log_weight`). In ``float32`` a sum of
256 ordinary terms is off by about 1e-5 and all sums of a million terms together by less than 0.01, while one sum of a
million terms is a multiple of 0.06 and leaves nothing of a difference.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from numpyro_smcopt.types import Array

LARGEST_SUM = 256  # terms
SMALLEST_SPLIT = 16  # of an axis that is too long for one sum; if there is no such divisor, sums may be larger
LARGEST_AT_ALL = 1024


class SiteSum(NamedTuple):
    """The terms of one site, seen as an array of ``shape``, are added up over ``axes``."""

    shape: tuple[int, ...]
    axes: tuple[int, ...]

    @property
    def kept(self) -> tuple[int, ...]:
        """Shape of the sums."""
        return tuple(size for axis, size in enumerate(self.shape) if axis not in self.axes)

    def add(self, terms: Array) -> Array:
        """Terms in any shape to sums."""
        return terms.reshape(self.shape).sum(self.axes).ravel()

    def owners(self, of_terms: Any) -> Any:
        """The blocks of the terms to those of the sums; of NumPy or JAX."""
        return of_terms.reshape(self.shape).min(self.axes).ravel()


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums of a target's terms; a pytree without leaves, known when a program is compiled.

    Args:
        sites: One for each entry of `Sites.terms`; none if nothing is added up.
        double: Whether terms are computed in double precision and come in two halves, see `potential.Target`.
    """

    sites: tuple[SiteSum, ...] = ()
    double: bool = False

    def owners(self, of_terms: Any) -> Any:
        """The blocks of the sums from those of the terms, [K]; of NumPy or JAX."""
        numpy = np if isinstance(of_terms, np.ndarray) else jax.numpy
        ends = np.cumsum([math.prod(site.shape) for site in self.sites])[:-1].tolist()
        pieces = numpy.split(of_terms, ends)
        return numpy.concatenate([site.owners(piece) for site, piece in zip(self.sites, pieces, strict=True)])


NO_SUMS = Sums()


def find_sums(of_term: np.ndarray, shapes: Sequence[tuple[int, ...]], num_blocks: int) -> Sums:
    """The terms that can be added up.

    A term that depends on no latent, such as one that is masked out, may be added to those of any block: it is the same
    for all particles, and so is what it does to their weights.

    Args:
        of_term: [K] the block of each term; B, more than any other, for terms that depend on no latent.
        shapes: Of the sites' terms, which make up K in this order.
        num_blocks: B.
    """
    ends = np.cumsum([math.prod(shape) for shape in shapes])[:-1].tolist()
    pieces = np.split(of_term, ends) if shapes else []
    return Sums(tuple(_of_site(piece.reshape(shape), num_blocks) for piece, shape in zip(pieces, shapes, strict=True)))


def _of_site(owners: np.ndarray, free: int) -> SiteSum:
    for axis in reversed(range(owners.ndim)):
        owners = _unrolled(owners, axis)
    # From the last axis on: terms that are neighbours in memory are added up at the least cost.
    shape, num = list(owners.shape), 1
    axes: list[int] = []
    for axis in reversed(range(owners.ndim)):
        together = np.broadcast_to(owners.min(axis, keepdims=True), owners.shape)
        if np.any((owners != together) & (owners != free)):
            continue
        owners = together
        length = _largest_part(shape[axis], LARGEST_SUM // num)
        if length == 1:
            continue
        if length < shape[axis]:
            shape[axis : axis + 1] = [shape[axis] // length, length]
            axes, axis = [later + 1 for later in axes], axis + 1
        axes.append(axis)
        num *= length
    return SiteSum(tuple(shape), tuple(sorted(axes)))


def _unrolled(owners: np.ndarray, axis: int) -> np.ndarray:
    """The array with an axis split in two where its blocks come in runs of one length, or again and again."""
    rows = np.moveaxis(owners, axis, 0).reshape(owners.shape[axis], -1)
    num = len(rows)
    changes = np.flatnonzero(np.any(rows[1:] != rows[:1], 1))
    returns = np.flatnonzero(np.all(rows[1:] == rows[:1], 1))
    if not len(changes) or not len(returns):
        return owners
    run, period = 1 + int(changes[0]), 1 + int(returns[0])
    for inner, repeated in ((run, 1), (period, 0)):
        if 1 < inner < num and num % inner == 0:
            split = rows.reshape(num // inner, inner, -1)
            if np.array_equal(split, np.broadcast_to(split.take([0], repeated), split.shape)):
                shape = (*owners.shape[:axis], num // inner, inner, *owners.shape[axis + 1 :])
                return owners.reshape(shape)
    return owners


def _largest_part(length: int, most: int) -> int:
    """The largest divisor of ``length`` that is at most ``most``; a larger one if it is too small to be of use."""
    divisors = [k for k in range(1, min(length, LARGEST_AT_ALL) + 1) if length % k == 0]
    fitting = max([k for k in divisors if k <= most], default=1)
    larger = [k for k in divisors if k > most]
    alone = most == LARGEST_SUM
    return min(larger) if alone and fitting < SMALLEST_SPLIT and larger else fitting
