# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From scores and information with Monte Carlo noise to a covariance: which directions are known, and how well.

    Cov(theta_hat) = I^-1        distance to the maximum = -I^-1 score

A direction whose information cannot be told from zero is not inverted but named: a rotation of loadings, two
parameters of which only the sum matters, a leaf that a prior has replaced. Zero is judged where the complete-data
information is the identity. In units of its diagonal alone the intercept and the slope of a year would pass for one
parameter: ``(sd / mean)^2 / 2`` of the information, 1e-5, is all that tells them apart, and all that is needed.

Everything happens on the host, in double precision; the information comes from independent replicates, whose spread is
its Monte Carlo error.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from numpyro_smcopt.information import RESOLVED, whitening
from numpyro_smcopt.reporting.flat_directions import PART, describe_direction, judge_directions

ROUNDING = 1e-6  # error of a score in single precision, in units of its spread under the complete-data information


class Curvature(NamedTuple):
    """The maximum as far as it is known, in P unconstrained coordinates.

    Attributes:
        covariance: [P, P]; zero in the rows of coordinates that are not identified.
        identified: [P] of bool.
        steps: [R, P] the way to the maximum as each replicate sees it, ``-I^-1 score``.
        score_z: [P] mean score over its error, that of Monte Carlo and of rounding; 0 where both vanish.
        noise: [P] relative Monte Carlo standard deviation of the standard errors.
        singular: Descriptions of the directions without information.
        hidden: Descriptions of further directions, whose information may be large but is lost in Monte Carlo noise.
        indefinite: Whether the information is significantly negative in some direction.
    """

    covariance: np.ndarray
    identified: np.ndarray
    steps: np.ndarray
    score_z: np.ndarray
    noise: np.ndarray
    singular: tuple[str, ...]
    hidden: tuple[str, ...]
    indefinite: bool

    @property
    def num_singular(self) -> int:
        """Number of directions without information."""
        return len(self.singular)

    @property
    def standard_errors(self) -> np.ndarray:
        """[P], 0 where there are none."""
        return np.sqrt(np.diag(self.covariance))

    def in_standard_errors(self, way: np.ndarray) -> np.ndarray:
        """[P] a way in theta, NaN where there is no standard error."""
        usable = self.identified & (self.standard_errors > 0)
        return np.divide(way, self.standard_errors, out=np.full(len(way), np.nan), where=usable)

    def without(self, coordinates: np.ndarray) -> "Curvature":
        """The same, but for coordinates [P bool] that are not to have an estimate."""
        keep = ~coordinates
        covariance, steps = self.covariance * keep * keep[:, None], self.steps * keep
        return self._replace(covariance=covariance, identified=self.identified & keep, steps=steps)


def no_curvature(size: int) -> Curvature:
    """Nothing is known of ``size`` coordinates."""
    unknown = np.full(size, np.nan)
    nothing = np.zeros((size, size)), np.zeros(size, bool), np.zeros((1, size))
    return Curvature(*nothing, unknown, unknown, (), (), False)


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
        score: [R, P] gradient of minus the log likelihood, from each of R replicates.
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
    mean_score, complete = score.mean(0), np.asarray(complete, float)
    diagonal = np.abs(np.diag(complete))
    settled = np.diag(diagonal) if settled is None else np.asarray(settled, float)
    held = np.zeros(size, bool) if held is None else held
    dead = (diagonal <= 0) | ~np.isfinite(diagonal)
    used = np.flatnonzero(~held & ~dead & np.all(np.isfinite(information), axis=(0, 2)))

    # In coordinates u, theta = frame u, with the complete-data information for a unit
    pairs = np.ix_(used, used)
    frame = _unit_frame(settled[pairs], complete[pairs])
    values, vectors, noise = _noisy_spectrum(frame.T @ information[:, used][:, :, used] @ frame)
    singular, hidden, indefinite = judge_directions(values, noise, float(np.linalg.norm(frame.T @ mean_score[used])))
    of_used = [names[i] for i in used.tolist()]
    directions = frame @ vectors
    components = directions / np.sqrt(np.sum(directions**2, 1, keepdims=True))
    describe = lambda which: [describe_direction(components[:, k], of_used) for k in np.flatnonzero(which)]  # noqa: E731
    unseen = [f"{names[i]} does not reach the density" for i in np.flatnonzero(dead & ~held).tolist()]
    undetermined = (*unseen, *describe(singular & ~hidden))

    identified, covariance = np.zeros(size, bool), np.zeros((size, size))
    identified[used] = np.sum(components[:, singular] ** 2, 1) < PART
    covariance[pairs] = (directions[:, ~singular] / values[~singular]) @ directions[:, ~singular].T
    # d(I^-1) = -I^-1 dI I^-1, and a standard error is half as sensitive as a variance.
    spread = np.sum(covariance * ((information - information.mean(0)) @ covariance), 1)
    with np.errstate(invalid="ignore", divide="ignore"):
        se_noise = np.where(identified, mean_and_error(spread)[1] / (2 * np.diag(covariance)), np.nan)
        score_error = np.hypot(mean_and_error(score)[1], ROUNDING * np.sqrt(diagonal))
        score_z = np.where(mean_score != 0, mean_score / score_error, 0.0)
    covariance = np.where(identified[:, None] & identified, covariance, 0.0)
    steps, hidden_too = -score @ covariance, tuple(describe(hidden))
    return Curvature(covariance, identified, steps, score_z, se_noise, undetermined, hidden_too, indefinite)


def _unit_frame(settled: np.ndarray, complete: np.ndarray) -> np.ndarray:
    """[P, P] columns along which the complete-data information is one, with latents that stay and that move along."""
    frame = whitening(settled)
    whole = np.diag(frame.T @ settled @ frame)
    return frame / np.sqrt(np.maximum(np.abs(np.diag(frame.T @ complete @ frame)), RESOLVED * np.abs(whole)))


def _noisy_spectrum(matrices: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Eigenvalues [P] and eigenvectors [P, P] of the mean of matrices [R, P, P], and the errors of the former."""
    matrices = (matrices + matrices.transpose(0, 2, 1)) / 2
    values, vectors = np.linalg.eigh(matrices.mean(0))
    return values, vectors, mean_and_error(np.sum(vectors * (matrices @ vectors), 1))[1]


def mean_and_error(values: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Mean over R independent values [R, ...] and its standard error, which is 0 for a single one."""
    values = np.asarray(values)
    num = len(values)
    error = values.std(0, ddof=1) / np.sqrt(num) if num > 1 else np.zeros(values.shape[1:])
    return values.mean(0), error
