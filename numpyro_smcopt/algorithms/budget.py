# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What the defaults may cost: numbers that follow from the size of a model, so that nobody has to choose them.

"Work" is the number of array elements that one energy of one particle computes.
"""

import math
from typing import NamedTuple

import numpy as np

from numpyro_smcopt.reporting import reference

WORK_PER_EVALUATION = 1_500_000  # array elements that the default number of particles aims at
FEWEST_PARTICLES, MOST_PARTICLES = 32, 128
MOST_WITHOUT_CONTROL_VARIATES = 1024  # where nothing else takes the noise out of a gradient
FEWEST_WITHOUT_INFORMATION = 8  # particles without weights, where theta is too large for an information matrix
GRADIENT_DRAWS = 2048  # particles times blocks that such a theta needs: more of them are better spent on more updates
LARGEST_INFORMATION = 500  # coordinates of theta up to which an information matrix is affordable
INFORMATION_DRAWS = 2048  # particles times blocks from which the information is formed
LARGEST_INFORMATION_WORK = 2e9  # array elements of one information
INFORMATION_SHARE = 0.5  # of the time that an update may spend on it, on average
SHORTEST_REFRESH = 5  # updates between two evaluations of the information
LARGEST_SCORES = 20_000_000  # particles times coordinates of theta up to which scores are carried
DRAWS_WORK = 1e9  # array elements that the draws of a report may cost
SLOPES_WORK = 3e8  # draws times parameters times work that its derivatives may cost beyond the fewest islands
INFORMATION_WORK = 3e9  # the same for second derivatives: what the fewest islands may cost
SCORES_WORK = 1e9  # draws times work that its scores may cost
FREEDOM = 40  # independent blocks of draws for every parameter, so that an inverse is not biased by their noise
FEWEST_ISLANDS, MOST_ISLANDS = 8, 64
TEMPERED_ISLANDS = 16  # of fewer the spread, and with it the stated error, is itself uncertain
WIDE_ISLANDS = 8
TRANSPORT_WORK = 1e10  # array elements of the transport of the latents, which is differentiated three times


def default_num_particles(work: int, *, control_variates: bool = True, fewest: int = FEWEST_PARTICLES) -> int:
    """Fewer particles for larger models, a power of two; more where no control variates make the most of each."""
    fitting = WORK_PER_EVALUATION / work
    most = MOST_PARTICLES if control_variates else MOST_WITHOUT_CONTROL_VARIATES
    return int(np.clip(2 ** round(math.log2(fitting)), fewest, most))


def fewest_without_information(num_blocks: int) -> int:
    """The smallest default number of unweighted particles for a large theta; independent blocks stand in for them."""
    enough = 2 ** math.ceil(math.log2(GRADIENT_DRAWS / max(num_blocks, 1)))
    return int(np.clip(enough, FEWEST_WITHOUT_INFORMATION, FEWEST_PARTICLES))


def fewest_with_weights(num_blocks: int) -> int:
    """The smallest default number of weighted particles.

    The bias of weighted means falls with their number, and only independent blocks average it out: with 32 particles a
    stochastic volatility of 945 latents in one block ended 0.2 standard errors off, with 128 it is 0.04.
    """
    return int(np.clip(MOST_PARTICLES // num_blocks, FEWEST_PARTICLES, MOST_PARTICLES))


def carries_scores(num_particles: int, num_params: int, num_blocks: int, work: int, num_evaluations: int) -> bool:
    """Whether every particle keeps its gradient in theta, so that none is taken of the cloud.

    That spares a pass over all particles where a move evaluates each but once. A gradient of many coordinates from
    little work, as of a network, costs more to keep than that: 200 ms an update instead of 12 with 2000 particles and
    8600 coordinates.

    Args:
        num_particles: N.
        num_params: P.
        num_blocks: B.
        work: See the head of this file.
        num_evaluations: Evaluations of a particle per update.
    """
    affordable = num_params <= work and num_particles * num_params <= LARGEST_SCORES
    return num_evaluations == 1 and num_blocks == 1 and affordable


def num_for_information(num_particles: int, num_blocks: int, num_params: int, work: int) -> int:
    """How many of the particles the information is formed from."""
    enough = 2 ** math.ceil(math.log2(max(INFORMATION_DRAWS / num_blocks, 16)))
    payable = 2 ** math.floor(math.log2(max(LARGEST_INFORMATION_WORK / (num_params * work), 4)))
    return min(enough, payable, num_particles)


def refresh_interval(num_particles: int, num_blocks: int, num_params: int, work: int, num_evaluations: int) -> int:
    """Updates between two evaluations of the information; ``num_evaluations`` is how many one move takes."""
    # In units of the evaluations of one update; an information costs about three per direction.
    used = num_for_information(num_particles, num_blocks, num_params, work)
    cost = 3 * num_params * used / num_particles
    return max(SHORTEST_REFRESH, math.ceil(cost / (INFORMATION_SHARE * (2 + num_evaluations))))


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
