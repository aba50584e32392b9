# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Budgets of the defaults: numbers that follow from the size of a model, so that nobody has to choose them.

"Work" is the number of array elements that one energy of one particle computes.
"""

import math

import numpy as np

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
    """True if every particle keeps its gradient in theta, so that none is taken of the cloud.

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
    """Number of particles that the information is formed from."""
    enough = 2 ** math.ceil(math.log2(max(INFORMATION_DRAWS / num_blocks, 16)))
    payable = 2 ** math.floor(math.log2(max(LARGEST_INFORMATION_WORK / (num_params * work), 4)))
    return min(enough, payable, num_particles)


def refresh_interval(num_particles: int, num_blocks: int, num_params: int, work: int, num_evaluations: int) -> int:
    """Updates between two evaluations of the information; ``num_evaluations`` is how many one move takes."""
    # In units of the evaluations of one update; an information costs about three per direction.
    used = num_for_information(num_particles, num_blocks, num_params, work)
    cost = 3 * num_params * used / num_particles
    return max(SHORTEST_REFRESH, math.ceil(cost / (INFORMATION_SHARE * (2 + num_evaluations))))
