# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maxima on the boundary of a support: found, followed along their profile, and put into words."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import jax
import numpy as np

from numpyro_smcopt.reporting.coordinates import acts_elementwise, ravel
from numpyro_smcopt.reporting.evidence_at import Exploration
from numpyro_smcopt.reporting.standard_errors import curvature_of
from numpyro_smcopt.types import Params

FLAT = 0.05  # information on a log or logit scale, below which a maximum is looked for at the boundary
FAR = 3.0  # how far towards the boundary that is, on that scale
RISE = 0.01  # nats that the likelihood may fall on the way, or rise on the way back, beyond its error
PROFILE_DROP = 4.0  # nats down to which the profile likelihood is followed
PROFILE_POINTS = 12
PROFILE_TARGET = 0.3  # where the first interesting point of the profile is
TINY_DROP = 1e-4  # in nats, less is noise
SHORTEST_STEP, LONGEST_STEP = 0.15, 2.0


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A coordinate whose maximum lies on the boundary of its support.

    Attributes:
        bound: The boundary, on the constrained scale.
        values: [J] constrained values, from near the boundary on.
        drops: [J] by how much the profile log likelihood lies below its maximum there.
        higher: Where the likelihood is higher than at the boundary, a constrained value, and by how many nats at least;
            None if it is not.
    """

    bound: float
    values: np.ndarray
    drops: np.ndarray
    higher: tuple[float, float] | None = None

    def limit(self, level: float) -> float:
        """End of the one-sided interval: the likelihood ratio there is significant at ``1 - level``.

        On the boundary the statistic is an equal mixture of 0 and a chi-squared with one degree of freedom (Self and
        Liang 1987).
        """
        drop = NormalDist().inv_cdf(max(level, 0.5)) ** 2 / 2
        if drop > self.drops[-1]:
            return math.nan
        # The drop is quadratic in a scale near zero.
        return float(np.interp(np.sqrt(drop), np.sqrt(self.drops), self.values))

    def interval(self, level: float) -> list[float]:
        """Both ends of the one-sided interval; NaN where the profile does not reach so far."""
        other = self.limit(level)
        return sorted([self.bound, other]) if np.isfinite(other) else [np.nan] * 2


def find_boundaries(
    found: Exploration, explore: Callable[[Params], Exploration], complete: np.ndarray | None
) -> dict[int, Boundary]:
    """Coordinates whose maximum lies on the boundary of their support, by number.

    On its log or logit scale such a parameter has no information left, and the likelihood does not fall any more on the
    way to the boundary.

    Args:
        found: The exploration at the estimate, with derivatives.
        explore: The same at other constrained parameters.
        complete: [P, P] complete-data information with latents that stay, see `standard_errors.curvature_of`.
    """
    derivatives, here, flat = found.derivatives, found.evidence, ravel(found.fixed.theta)
    assert derivatives is not None
    constraints = found.fixed.constraints
    alone = {name: acts_elementwise(constraint) for name, constraint in constraints.items()}
    elementwise = {
        name: jax.tree.map(lambda leaf, name=name: np.full(np.shape(leaf), alone[name]), tree)
        for name, tree in found.fixed.theta.items()
    }
    can_be = found.fixed.bounded & (ravel(elementwise) > 0)
    information = np.diag(derivatives.information.mean(0))
    boundaries = {}
    for k in np.flatnonzero(can_be & (np.abs(information) <= FLAT)):
        for side in (-1.0, 1.0):
            beyond = flat.copy()
            beyond[k] += side * FAR
            there = explore(found.fixed.constrained(beyond)).evidence
            if there.log_evidence >= here.log_evidence - RISE - 3 * np.hypot(
                there.log_evidence_std, here.log_evidence_std
            ):
                boundaries[int(k)] = _profile(int(k), -side, found, explore, complete)
                break
    return boundaries


def _profile(
    k: int,
    direction: float,
    found: Exploration,
    explore: Callable[[Params], Exploration],
    complete: np.ndarray | None,
) -> Boundary:
    """Follow the profile likelihood away from the boundary, the other parameters adjusted by one Newton step."""
    flat = ravel(found.fixed.theta)
    held = np.arange(len(flat)) == k

    def at(value: float) -> tuple[np.ndarray, float]:
        theta = np.where(held, value, flat)
        there = explore(found.fixed.constrained(theta))
        derivatives = there.derivatives
        assert derivatives is not None
        curvature = curvature_of(
            derivatives.score, derivatives.information, derivatives.complete, [""] * len(flat), held, complete
        )
        score = derivatives.score.mean(0)
        follow = -curvature.covariance @ score
        return theta + follow, float(there.evidence.log_evidence - score @ follow / 2)

    here, thetas, heights = float(flat[k]), [], []
    for _ in range(PROFILE_POINTS):
        theta, height = at(here)
        thetas.append(theta)
        heights.append(height)
        drop = max(heights) - height
        if not np.isfinite(drop) or drop > PROFILE_DROP:
            break
        # Near the boundary the drop grows like the square of a scale, that is by 2 on its logarithm.
        wanted = np.log(max(PROFILE_TARGET, 2 * drop) / max(drop, TINY_DROP)) / 2
        here += direction * float(np.clip(wanted, SHORTEST_STEP, LONGEST_STEP))
    values = np.asarray([ravel(found.fixed.constrained(theta))[k] for theta in thetas])
    drops = np.maximum.accumulate(max(heights) - np.asarray(heights))
    limit = ravel(found.fixed.constrained(np.where(held, -direction * np.inf, flat)))[k]
    top, rise = int(np.argmax(heights)), 0.0
    if heights[top] - heights[0] > RISE:
        there = explore(found.fixed.constrained(thetas[top])).evidence
        rise = (
            there.log_evidence
            - heights[0]
            - 3 * float(np.hypot(there.log_evidence_std, found.evidence.log_evidence_std))
        )
    return Boundary(float(limit), values, drops, (float(values[top]), rise) if rise > RISE else None)


def about_boundaries(boundaries: dict[int, Boundary], names: Sequence[str]) -> list[str]:
    """The notes of a report about them."""
    warnings = []
    for k, boundary in boundaries.items():
        warnings.append(
            f"{names[k]} is at the boundary of its support ({boundary.bound:g}): it has a one-sided interval and no "
            "standard error; the other standard errors hold it there."
        )
        if boundary.higher is not None:
            warnings.append(
                f"That is not the maximum: the log likelihood is higher by at least {boundary.higher[1]:.2f} where "
                f"{names[k]} is {boundary.higher[0]:.3g}. Start there, with init_params."
            )
    return warnings
