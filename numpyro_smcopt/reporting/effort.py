# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Numbers of draws of a report, so that its cost follows from the size of the model.

"Work" is the number of array elements that one energy of one particle computes.
"""

import math
from typing import NamedTuple

import numpy as np

from numpyro_smcopt.population.budget import LARGEST_INFORMATION
from numpyro_smcopt.reporting import proposal_mixture

DRAWS_WORK = 1e9  # array elements that the draws of a report may cost
DERIVATIVES_WORK = 3e8  # draws times parameters times work that its derivatives may cost beyond the fewest replicates
INFORMATION_WORK = 3e9  # the same for second derivatives: what the fewest replicates may cost
SCORES_WORK = 1e9  # draws times work that its scores may cost
FREEDOM = 40  # independent blocks of draws for every parameter, so that an inverse is not biased by their noise
FEWEST_REPLICATES, MOST_REPLICATES = 8, 64
TEMPERED_REPLICATES = 16  # of fewer the spread, and with it the stated error, is itself uncertain
WIDE_REPLICATES = 8
TRANSPORT_WORK = 1e10  # array elements of the transport of the latents, which is differentiated three times


def num_replicates(work: int) -> int:
    """Independent sets of draws behind a report; even, so that they can be halved."""
    return 2 * int(np.clip(DRAWS_WORK / (2 * proposal_mixture.SIZE * work), FEWEST_REPLICATES / 2, MOST_REPLICATES / 2))


class DerivativeDraws(NamedTuple):
    """The draws behind the derivatives of a report.

    Attributes:
        replicates: How many replicates they come from; 0 if there are no derivatives.
        score: Draws of each replicate that first derivatives are averages over.
        information: Draws of each replicate that second derivatives are taken from, one pass for every parameter.
        outer: Whether the outer product of the scores of independent units is wanted, too.
    """

    replicates: int
    score: int
    information: int
    outer: bool = False


def num_informing(num_replicates: int, num_params: int, work: int) -> int:
    """Number of replicates that derivatives are taken from; none if there are too many parameters."""
    if not 0 < num_params <= LARGEST_INFORMATION:
        return 0
    return int(
        np.clip(DERIVATIVES_WORK / (proposal_mixture.SIZE * num_params * work), FEWEST_REPLICATES, num_replicates)
    )


def derivative_draws(
    num_replicates: int, size: int, num_params: int, num_blocks: int, work: int, outer: bool = False
) -> DerivativeDraws:
    """Number of draws, of ``num_replicates`` replicates of ``size`` draws each, that derivatives are taken from.

    What depends on independent blocks, as the missing information does, is known from a few draws of many blocks.
    """
    if num_replicates == 0:
        return DerivativeDraws(0, 0, 0)
    free = FREEDOM * num_params / (num_replicates * num_blocks) + 1
    information = _some_of(size, max(free, INFORMATION_WORK / (num_replicates * num_params * work)))
    score = _some_of(size, max(information, SCORES_WORK / (num_replicates * work)))
    return DerivativeDraws(num_replicates, score, information, outer)


def _some_of(size: int, wanted: float) -> int:
    """A power of two, or all."""
    power = 2 ** math.ceil(math.log2(max(wanted, 2)))
    return power if 2 * power <= size else size
