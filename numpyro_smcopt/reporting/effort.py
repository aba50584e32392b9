# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How many draws a report takes, so that what it costs follows from the size of the model.

"Work" is the number of array elements that one energy of one particle computes.
"""

import math
from typing import NamedTuple

import numpy as np

from numpyro_smcopt.population.budget import LARGEST_INFORMATION
from numpyro_smcopt.reporting import reference

DRAWS_WORK = 1e9  # array elements that the draws of a report may cost
SLOPES_WORK = 3e8  # draws times parameters times work that its derivatives may cost beyond the fewest islands
INFORMATION_WORK = 3e9  # the same for second derivatives: what the fewest islands may cost
SCORES_WORK = 1e9  # draws times work that its scores may cost
FREEDOM = 40  # independent blocks of draws for every parameter, so that an inverse is not biased by their noise
FEWEST_ISLANDS, MOST_ISLANDS = 8, 64
TEMPERED_ISLANDS = 16  # of fewer the spread, and with it the stated error, is itself uncertain
WIDE_ISLANDS = 8
TRANSPORT_WORK = 1e10  # array elements of the transport of the latents, which is differentiated three times


def num_islands(work: int) -> int:
    """Independent sets of draws behind a report; even, so that they can be halved."""
    return 2 * int(np.clip(DRAWS_WORK / (2 * reference.SIZE * work), FEWEST_ISLANDS / 2, MOST_ISLANDS / 2))


class SlopeDraws(NamedTuple):
    """The draws behind the derivatives of a report.

    Attributes:
        islands: How many islands they come from; 0 if there are no derivatives.
        score: Draws of each island that first derivatives are averages over.
        information: Draws of each island that second derivatives are taken from, one pass for every parameter.
    """

    islands: int
    score: int
    information: int


def num_informing(num_islands: int, num_params: int, work: int) -> int:
    """How many islands derivatives are taken from; none if there are too many parameters."""
    if not 0 < num_params <= LARGEST_INFORMATION:
        return 0
    return int(np.clip(SLOPES_WORK / (reference.SIZE * num_params * work), FEWEST_ISLANDS, num_islands))


def slope_draws(num_islands: int, size: int, num_params: int, num_blocks: int, work: int) -> SlopeDraws:
    """How many draws of ``num_islands`` islands of ``size`` draws each derivatives are taken from.

    What depends on independent blocks, as the missing information does, is known from a few draws of many blocks.
    """
    if num_islands == 0:
        return SlopeDraws(0, 0, 0)
    free = FREEDOM * num_params / (num_islands * num_blocks) + 1
    information = _some_of(size, max(free, INFORMATION_WORK / (num_islands * num_params * work)))
    score = _some_of(size, max(information, SCORES_WORK / (num_islands * work)))
    return SlopeDraws(num_islands, score, information)


def _some_of(size: int, wanted: float) -> int:
    """A power of two, or all."""
    power = 2 ** math.ceil(math.log2(max(wanted, 2)))
    return power if 2 * power <= size else size
