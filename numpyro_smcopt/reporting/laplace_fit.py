# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The maximum of Laplace's approximation of the likelihood, which lme4's `glmer` and TMB report by default.

The walk begins at the estimate. The gradient of the approximation is exact there and the information is known, so one
Newton step says whether the two maxima differ. Only if they do is the approximation evaluated elsewhere, by a program
that is compiled already, and the information corrected on the way (BFGS).
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# Lengths are the largest over the coordinates, in standard errors.
CLOSE = 0.1  # of a Newton step that needs no second one: what it lacks is of its square
CONVERGED = 0.01
LONGEST = 2.0
FURTHEST = 20.0
MOST_EVALUATIONS = 25
SHORTER = 4.0
WORSE = 1e-3  # nats, less is rounding


class LaplacePoint(NamedTuple):
    """Laplace's approximation of the log marginal likelihood at a theta; arrays of the host.

    Attributes:
        theta: [P] flat and unconstrained.
        terms: [K] energy terms at the mode of the latents.
        log_volumes: [B] what the blocks add: ``D_b / 2 log(2 pi) - 1/2 log det H_b``.
        score: [P] gradient of minus the approximation.
        missing: Why there is none, if there is none; the arrays are then empty.
    """

    theta: np.ndarray
    terms: np.ndarray
    log_volumes: np.ndarray
    score: np.ndarray
    missing: str = ""


def no_laplace(reason: str) -> LaplacePoint:
    """The lack of an approximation, and the reason for it."""
    nothing = np.zeros(0)
    return LaplacePoint(nothing, nothing, nothing, nothing, reason)


def laplace_fit(
    here: LaplacePoint, covariance: np.ndarray, evaluate: Callable[[np.ndarray], LaplacePoint]
) -> tuple[np.ndarray, bool]:
    """Walk from the estimate to the maximum of Laplace's approximation.

    Args:
        here: The approximation at the estimate.
        covariance: [P, P] of the estimate; coordinates whose rows are zero stay.
        evaluate: The approximation at a flat ``theta [P]``.

    Returns:
        [P] the maximum, flat and unconstrained, or the last iterate if there is none nearby; and whether it is one.
    """
    start, inverse, fraction = here.theta, covariance, 1.0
    deviation = np.sqrt(np.diag(covariance))
    length = lambda step: np.max(np.abs(step[deviation > 0]) / deviation[deviation > 0], initial=0.0)  # noqa: E731
    for k in range(MOST_EVALUATIONS):
        step = -inverse @ here.score
        if length(step) < (CLOSE if k == 0 else CONVERGED):
            return here.theta + step, True
        step *= fraction * min(1.0, LONGEST / length(step))
        if length(here.theta + step - start) > FURTHEST:
            break
        there = evaluate(here.theta + step)
        if there.missing or _change(here, there) > WORSE:
            fraction /= SHORTER
            continue
        turn, fraction = there.score - here.score, 1.0
        if step @ turn > 0:
            left = np.eye(len(step)) - np.outer(step, turn) / (step @ turn)
            inverse = left @ inverse @ left.T + np.outer(step, step) / (step @ turn)
        here = there
    return here.theta, False


def _change(here: LaplacePoint, there: LaplacePoint) -> float:
    """Of minus the log likelihood. The terms are subtracted first: totals of a million observations would cancel."""
    return float(np.sum(there.terms - here.terms) - np.sum(there.log_volumes - here.log_volumes))
