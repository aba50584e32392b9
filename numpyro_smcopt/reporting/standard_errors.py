# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From scores and information with Monte Carlo noise to a covariance: which directions are known, and how well.

    Cov(theta_hat) = I^-1        distance to the maximum = -I^-1 score

A direction whose information cannot be told from zero is not inverted but named: a rotation of loadings, two
parameters of which only the sum matters, a leaf that a prior has replaced. Zero is judged where the complete-data
information is the identity. In units of its diagonal alone the intercept and the slope of a year would pass for one
parameter: ``(sd / mean)^2 / 2`` of the information, 1e-5, is all that tells them apart, and all that is needed.

Everything happens on the host, in double precision; the information comes from independent islands, whose spread is
its Monte Carlo error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numpyro_smcopt.reporting.flat_directions import PART, describe_direction, judge_directions

RESOLVED = 1e-6  # eigenvalue of the complete-data information, relative to its largest: less is rounding
ROUNDING = 1e-6  # error of a score in single precision, in units of its spread under the complete-data information


class Curvature(NamedTuple):
    """What is known of the maximum, in P unconstrained coordinates.

    Attributes:
        covariance: [P, P]; zero in the rows of coordinates that are not identified.
        identified: [P] of bool.
        steps: [R, P] the way to the maximum as each island sees it, ``-I^-1 score``.
        score_z: [P] mean score over its error, that of Monte Carlo and of rounding; 0 where both vanish.
        noise: [P] relative Monte Carlo standard deviation of the standard errors.
        singular: Descriptions of the directions without information.
        num_singular: How many there are.
        hidden: Descriptions of further directions, whose information may be large but is lost in Monte Carlo noise.
        indefinite: Whether the information is significantly negative in some direction.
    """

    covariance: np.ndarray
    identified: np.ndarray
    steps: np.ndarray
    score_z: np.ndarray
    noise: np.ndarray
    singular: tuple[str, ...]
    num_singular: int
    hidden: tuple[str, ...]
    indefinite: bool


def curvature_of(
    score: ArrayLike,
    information: ArrayLike,
    complete: ArrayLike,
    names: Sequence[str],
    held: np.ndarray | None = None,
    settled: np.ndarray | None = None,
) -> Curvature:
    """Invert what can be inverted.

    Args:
        score: [R, P] gradient of minus the log likelihood, from each of R islands.
        information: [R, P, P] its Hessian.
        complete: [P, P] complete-data information, which sets the scale; with latents that move along with theta, if
            the derivatives were taken so.
        names: [P] of the coordinates.
        held: [P] of bool, coordinates that are held at a boundary.
        settled: [P, P] complete-data information with latents that stay, in whose terms directions are judged; by
            default the diagonal of ``complete``.
    """
    score, information = np.asarray(score, float), np.asarray(information, float)
    size = score.shape[1]
    mean_score, mean = score.mean(0), information.mean(0)
    complete = np.asarray(complete, float)
    diagonal = np.abs(np.diag(complete))
    settled = np.diag(diagonal) if settled is None else np.asarray(settled, float)
    held = np.zeros(size, bool) if held is None else held
    dead = (diagonal <= 0) | ~np.isfinite(diagonal)
    used = np.flatnonzero(~held & ~dead & np.all(np.isfinite(information), axis=(0, 2)))

    # In coordinates u, theta = frame u, with the complete-data information for a unit
    pairs = np.ix_(used, used)
    frame = whitening(settled[pairs])
    whole = np.diag(frame.T @ settled[pairs] @ frame)
    frame /= np.sqrt(np.maximum(np.abs(np.diag(frame.T @ complete[pairs] @ frame)), RESOLVED * np.abs(whole)))
    scaled = frame.T @ information[:, used][:, :, used] @ frame
    scaled = (scaled + scaled.transpose(0, 2, 1)) / 2
    values, vectors = np.linalg.eigh(scaled.mean(0))
    each = np.sum(vectors * (scaled @ vectors), 1)
    noise = mean_and_error(each)[1]
    singular, hidden, indefinite = judge_directions(values, noise, float(np.linalg.norm(frame.T @ mean_score[used])))
    of_used = [names[i] for i in used.tolist()]
    directions = frame @ vectors
    components = directions / np.sqrt(np.sum(directions**2, 1, keepdims=True))
    describe = lambda which: [describe_direction(components[:, k], of_used) for k in np.flatnonzero(which)]  # noqa: E731

    kept = ~singular
    inverse = (directions[:, kept] / values[kept]) @ directions[:, kept].T
    parts = np.sum(components[:, singular] ** 2, 1)
    identified = np.zeros(size, bool)
    identified[used] = parts < PART
    covariance = np.zeros((size, size))
    covariance[pairs] = inverse
    # d(C) = -C dI C, and a standard error is half as sensitive as a variance.
    spread = np.sum(covariance * ((information - mean) @ covariance), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        se_noise = mean_and_error(spread)[1] / (2 * np.diag(covariance))
        score_error = np.hypot(mean_and_error(score)[1], ROUNDING * np.sqrt(diagonal))
        score_z = np.where(mean_score != 0, mean_score / score_error, 0.0)
    usable = identified[:, None] & identified
    return Curvature(
        np.where(usable, covariance, 0.0),
        identified,
        -score @ np.where(usable, covariance, 0.0),
        score_z,
        np.where(identified, se_noise, np.nan),
        tuple(
            [f"{names[i]} does not reach the density" for i in np.flatnonzero(dead & ~held).tolist()]
            + describe(singular & ~hidden)
        ),
        int(np.sum(singular & ~hidden) + np.sum(dead & ~held)),
        tuple(describe(hidden)),
        indefinite,
    )


def whitening(information: np.ndarray) -> np.ndarray:
    """[P, P] ``F`` with ``F^T H F`` near the identity for a complete-data information ``H [P, P]``.

    It is the root of the inverse that is symmetric up to units, so that each column stays as near to the coordinate of
    its number as it can. Columns are long but finite where ``H`` has no rank, and of unit length where it is zero.
    """
    information = np.where(np.isfinite(information), information, 0.0)
    size = np.sqrt(np.abs(np.diag(information)))
    scale = 1 / np.where(size > 0, size, 1.0)
    correlation = np.where(size[:, None] * size > 0, information * scale[:, None] * scale, np.eye(len(size)))
    values, vectors = np.linalg.eigh((correlation + correlation.T) / 2)
    floored = np.maximum(np.abs(values), RESOLVED * np.max(np.abs(values), initial=0.0))
    return scale[:, None] * (vectors / np.sqrt(floored)) @ vectors.T


def mean_and_error(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean over R independent values [R, ...] and its standard error, which is 0 for a single one."""
    values = np.asarray(values)
    num = len(values)
    error = values.std(0, ddof=1) / np.sqrt(num) if num > 1 else np.zeros(values.shape[1:])
    return values.mean(0), error
