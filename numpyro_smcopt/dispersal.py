# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Places to start from once more: dispersed on the unconstrained scale, in units that the curvature knows.

``sqrt(n / H_kk)`` is the standard error that one of n observations would leave in coordinate k: of a mean it is what
lies between observations, of a scale about a doubling.
"""

import dataclasses
from typing import NamedTuple

import numpy as np

RESTARTS = 6
WIDEST = 1.0  # unit of a log or logit scale, at most
LARGEST = 10.0  # unit of other coordinates, relative to the larger of one and themselves, at most
FAR = 30.0  # units from the start, beyond which it says nothing of where maxima lie
MULTIPLES = (1.0, 3.0)  # of the units, in turn: what lies between maxima is not known


class Around(NamedTuple):
    """Where to start from once more.

    Attributes:
        center: [P] unconstrained.
        units: [P].
    """

    center: np.ndarray
    units: np.ndarray


@dataclasses.dataclass
class Elsewhere:
    """Other places that a start is told to look at, and what it learns about where they lie.

    Attributes:
        restarts: From how many places the warm start looks for a higher maximum, at most.
        around: Where they lie, once that is known.
    """

    restarts: int = RESTARTS
    around: Around | None = None


def around(
    start: np.ndarray, end: np.ndarray, at_start: np.ndarray, at_end: np.ndarray, num: int, bounded: np.ndarray
) -> Around:
    """Around the start of a walk; in coordinates in which it was far away, around the end.

    Args:
        start: [P] unconstrained.
        end: [P] likewise.
        at_start: [P] complete-data information of each coordinate there.
        at_end: [P] likewise.
        num: Observations behind it.
        bounded: [P] bool, which coordinates come from a constrained parameter.
    """
    near, far = (_units(v / max(num, 1), end, bounded) for v in (at_start, np.maximum(at_start, at_end)))
    stays = np.abs(end - start) <= FAR * near
    return Around(np.where(stays, start, end), np.where(stays, near, far))


def _units(information: np.ndarray, theta: np.ndarray, bounded: np.ndarray) -> np.ndarray:
    """[P] units, from the information [P] of one observation."""
    known = np.isfinite(information) & (information > 0)
    units = 1 / np.sqrt(np.where(known, information, 1.0))
    return np.where(bounded, np.minimum(units, WIDEST), np.minimum(units, LARGEST * np.maximum(1.0, np.abs(theta))))


def normals(num: int, size: int) -> np.ndarray:
    """[num, P] normal numbers of several widths, the same in every run."""
    return np.resize(MULTIPLES, num)[:, None] * np.random.default_rng(6).standard_normal((num, size))
