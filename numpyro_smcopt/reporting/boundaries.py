# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maxima that no finite theta reaches: found in unconstrained space, and followed along their profile.

A scale that goes to zero, a share that empties, a correlation of one, the coefficient of a group without events: on the
unconstrained scale they are all one thing, a direction of recession, along which theta runs off while the likelihood
rises by less and less. It has no information left there, and what there is falls off on the way.
"""

import dataclasses
import math
from collections.abc import Callable
from statistics import NormalDist
from typing import NamedTuple

import jax
import numpy as np

from numpyro_smcopt.reporting.coordinates import ravel
from numpyro_smcopt.reporting.derivatives import Derivatives
from numpyro_smcopt.reporting.edges import ROUNDING, mixes_units, numbers_at_edge
from numpyro_smcopt.reporting.evidence_at import Exploration
from numpyro_smcopt.reporting.standard_errors import Curvature, curvature_of
from numpyro_smcopt.types import Params

FLAT = 0.05  # information on a log or logit scale, below which a maximum is looked for at the boundary
FAR = 3.0  # how far towards the boundary that is, on that scale
RUNNING = 0.3  # length of a Newton step on that scale that says the same: an exponential approach has one of length 1
WIDE, SURELY_WIDE = 1.0, 0.1  # standard errors from zero, below which a free coordinate may run off: if its Newton
# step leads away from zero, and in any case
AWAY = 0.02  # Newton step of such a coordinate away from zero, relative to itself
NEAREST, FARTHEST = 0.05, 0.3  # how far a free coordinate is moved further, relative to itself
FADED = 0.8  # of the information may be left one unit nearer to an edge, where it falls off like an exponential
RISE = 0.01  # nats that the likelihood may fall on the way, or rise on the way back, beyond its error
ENDLESS, STEADY = 1.0, 0.7  # nats gained, and the part of them gained once more further on, without an upper bound
PROFILE_DROP = 4.0  # nats down to which the profile likelihood is followed
PROFILE_POINTS = 30
PROFILE_LOOK = 0.5  # nats, at which distance a parabola is told from a plateau
LEAST_FALL, MOST_FALL = 0.2, 0.8  # nats from point to point, beyond which steps grow and shrink
FIRST_STEP, SHORTEST_STEP = 1.0, 0.1  # in units of a log or logit scale
TINY_GAIN = 1e-6  # nats, of a slope that says nothing
ANCHORS = (7.0, 10.0)  # on a log or logit scale, beyond which a number without information may have lost its digits
NUDGES, NOISES = (0.0, 1e-5, 2e-5, 3e-5), 3.0  # relative to theta, and ranges of the likelihood over them
ANCHORED_RISE, ANCHORED_FALL = 1.0, 0.2  # nats that are more than the digits lost, and that may lack there
ARRIVED = 0.5  # nats
SHARE = 0.05  # of a standard error, by which a number that runs off moves over one unit of the way

ExploreFn = Callable[[Params], Exploration]


@dataclasses.dataclass(frozen=True)
class Boundary:
    """A number whose maximum lies on the boundary of its support, or at infinity.

    Attributes:
        bound: The boundary, on the constrained scale.
        values: [J] constrained values, from near the boundary on.
        drops: [J] by how much the profile log likelihood lies below its maximum there.
        higher: Where the likelihood is higher than at the boundary, a constrained value, and by how many nats at least;
            None if it is not.
        endless: Whether the likelihood has no upper bound on the way there.
    """

    bound: float
    values: np.ndarray
    drops: np.ndarray
    higher: tuple[float, float] | None = None
    endless: bool = False

    def limit(self, level: float) -> float:
        """End of the one-sided interval: the likelihood ratio there is significant at ``1 - level``.

        On the boundary the statistic is an equal mixture of 0 and a chi-squared with one degree of freedom (Self and
        Liang 1987).
        """
        drop = NormalDist().inv_cdf(max(level, 0.5)) ** 2 / 2
        if drop > self.drops[-1] or self.endless:
            return math.nan
        # The drop is quadratic in a scale near zero.
        return float(np.interp(np.sqrt(drop), np.sqrt(self.drops), self.values))

    def interval(self, level: float) -> list[float]:
        """Both ends of the one-sided interval; NaN where the profile does not reach so far."""
        other = self.limit(level)
        return sorted([self.bound, other]) if np.isfinite(other) else [np.nan] * 2


@dataclasses.dataclass(frozen=True)
class Recession:
    """A direction of recession.

    Attributes:
        coordinate: Of theta, the one by which the way is measured.
        moves: [P] bool, coordinates of theta that do not settle on the way.
        numbers: What arrives at an edge, by name: ``"sd"``, ``"correlation L[1,0]"``.
        gain: Nats by which the likelihood is higher nearer to the edge.
    """

    coordinate: int
    moves: np.ndarray
    numbers: dict[str, Boundary]
    gain: float

    def describe(self) -> list[str]:
        """What a report says of it."""
        where = " and ".join(f"{name} -> {_limit(boundary.bound)}" for name, boundary in self.numbers.items())
        first, names = next(iter(self.numbers.values())), " and ".join(self.numbers)
        are, have = ("is", "has") if len(self.numbers) == 1 else ("are", "have")
        if first.endless:
            return [
                f"The likelihood has no upper bound: it grows without end as {where}, so there is no maximum "
                "likelihood estimate, and the log evidence means nothing. Look for data that the model can fit "
                "exactly, such as a constant response, and bound the scale away from zero."
            ]
        if np.isfinite(first.bound):
            found = [
                f"{names} {are} at the boundary of {'its' if len(self.numbers) == 1 else 'their'} support "
                f"({', '.join(f'{boundary.bound:g}' for boundary in self.numbers.values())}): {where}. "
                f"Such numbers have a one-sided interval and no standard error and do not count as parameters; the "
                "other standard errors hold them there."
            ]
        else:
            found = [
                f"{names} {have} no finite estimate: the likelihood rises to its limit as {where}. There is a "
                "one-sided interval and no standard error, and it does not count as a parameter; the other standard "
                "errors hold it there."
            ]
        if self.gain > ARRIVED:
            found.append(
                f"The estimate has not arrived there: the log likelihood rises by {self.gain:.2f} on the way. Go on "
                "with more updates, or start nearer, with init_params."
            )
        if first.higher is not None:
            found.append(
                f"That is not the maximum: the log likelihood is higher by at least {first.higher[1]:.2f} where "
                f"{next(iter(self.numbers))} is {first.higher[0]:.3g}. Start there, with init_params."
            )
        return found


def anchored(found: Exploration, explore: ExploreFn) -> Exploration:
    """An exploration where single precision serves, if coordinates without information have run off beyond.

    At a scale of 1e-30 or a concentration of 1e20 there are no digits left that a density could be computed from.
    """
    flat, bounded = ravel(found.fixed.theta), np.asarray(found.fixed.bounded, bool)
    information = np.diag(_derivatives(found).information.mean(0))
    away = bounded & (np.abs(flat) > ANCHORS[0])
    if not np.any(away):
        return found
    places = [explore(found.fixed.constrained(np.where(away, np.sign(flat) * far, flat))) for far in ANCHORS]
    heights = [place.evidence.log_evidence for place in places]
    # The nearer one has more digits, but in small units a scale may not be at its edge there.
    best = int(heights[1] > heights[0] + ANCHORED_RISE)
    sound = np.isfinite(heights[best]) and np.all(np.isfinite(_derivatives(places[best]).information))
    lost = np.all(~(np.abs(information[away]) > FLAT)) or not np.isfinite(found.evidence.log_evidence)
    return places[best] if sound and (lost or heights[best] >= found.evidence.log_evidence - ANCHORED_FALL) else found


def find_recessions(found: Exploration, explore: ExploreFn, complete: np.ndarray | None) -> list[Recession]:
    """Directions along which theta runs off while the likelihood falls nowhere.

    Args:
        found: The exploration at the estimate, with derivatives.
        explore: The same at other constrained parameters.
        complete: [P, P] complete-data information with latents that stay, see `standard_errors.curvature_of`.
    """
    search = _Search(found, explore, complete)
    for k in search.candidates():
        if not search.moves[k]:
            search.try_coordinate(k)
    return search.recessions


class _ProfilePoint(NamedTuple):
    """Theta [P] on the profile, the log likelihood there, and the way on [P]."""

    theta: np.ndarray
    height: float
    along: np.ndarray


class _Search:
    """Recessions found so far, and the curvature with them held."""

    def __init__(self, found: Exploration, explore: ExploreFn, complete: np.ndarray | None) -> None:
        self.found, self.explore, self.complete = found, explore, complete
        self.flat = ravel(found.fixed.theta)
        self.held, self.moves = (np.zeros(len(self.flat), bool) for _ in range(2))
        self.recessions: list[Recession] = []

    def candidates(self) -> list[int]:
        """Coordinates that may have run off: those without information first."""
        information = np.diag(_derivatives(self.found).information.mean(0))
        curvature = self._curvature(self.found, self.held)
        deviation = np.sqrt(np.maximum(np.diag(curvature.covariance), 0))
        step, bounded = curvature.steps.mean(0), np.asarray(self.found.fixed.bounded, bool)
        weak = (np.abs(information) <= FLAT) | (deviation**2 > 1 / FLAT) | (np.abs(step) > RUNNING)
        weak |= np.abs(_derivatives(self.found).score.mean(0)) > np.maximum(information, FLAT)
        away = (step * np.sign(self.flat) > AWAY * np.abs(self.flat)) | (information <= 0) | ~curvature.identified
        near_zero = np.abs(self.flat) / np.where(deviation > 0, deviation, np.inf)
        running = (deviation > 0) & ((near_zero < WIDE) & away | (near_zero < SURELY_WIDE))
        running |= (information <= 0) & (self.flat != 0)
        chosen = np.flatnonzero(np.where(bounded, weak, running))
        return sorted(chosen.tolist(), key=lambda k: (not bounded[k], abs(information[k])))

    def try_coordinate(self, k: int) -> None:
        """Look to both sides of a coordinate, the others following, and keep what is a recession."""
        along, unit = self._along(self.found, k), self._unit(k)
        slope = -float(_derivatives(self.found).score.mean(0) @ along)
        uphill = float(np.sign(slope if abs(slope) * unit > TINY_GAIN else self.flat[k])) or 1.0
        for side in (uphill, -uphill) if self.found.fixed.bounded[k] else (float(np.sign(self.flat[k])),):
            ahead, endless = self._look_ahead(k, side * unit * along)
            recession = None if ahead is None else self._follow(k, side, unit, endless, ahead)
            if recession is not None:
                self.recessions.append(recession)
                self.held[k] = True
                self.moves |= recession.moves
                return

    def _look_ahead(self, k: int, along: np.ndarray) -> tuple[float | None, bool]:
        """How many units ahead the likelihood is higher, None if it falls; and whether it grows without end."""
        near = self.explore(self.found.fixed.constrained(self.flat + along))
        gain, error = self._gain(near)
        if not gain >= -RISE - error:
            return None, False
        here, beyond = (float(along @ _derivatives(v).information.mean(0) @ along) for v in (self.found, near))
        fades, climbs = beyond <= FADED * here, gain > RISE + error
        if not self.found.fixed.bounded[k]:
            return (1.0 if climbs else 0.0) if fades else None, False
        if climbs and fades and gain < ENDLESS:
            return 1.0, False
        # A scale that is weakly determined falls further on.
        further, error = self._gain(self.explore(self.found.fixed.constrained(self.flat + FAR * along)))
        if not further >= -RISE - error:
            return (0.0 if further >= -self._noise(self.flat + FAR * along) else None), False
        if gain > ENDLESS + error and further - gain > STEADY * (FAR - 1) * gain - error:
            return (FAR, True) if self._climbs_on(k, along, gain) else (None, False)
        return FAR if further > RISE + error else 0.0, False

    def _climbs_on(self, k: int, along: np.ndarray, gain: float) -> bool:
        """Whether the likelihood grows as fast as here where a scale or its inverse is next to nothing."""
        rest = max(FAR, ANCHORS[-1] - float(np.sign(along[k]) * self.flat[k]))
        places = (self.flat + way * along for way in (rest, rest + 1))
        one, other = (self._gain(self.explore(self.found.fixed.constrained(place)))[0] for place in places)
        return bool(other - one > STEADY * gain)

    def _noise(self, flat: np.ndarray) -> float:
        """Nats that rounding may take there: what the likelihood changes by over next to nothing."""
        near = [self._gain(self.explore(self.found.fixed.constrained(flat * (1 + shift))))[0] for shift in NUDGES]
        return NOISES * float(np.ptp(near))

    def _gain(self, there: Exploration) -> tuple[float, float]:
        """Nats above the estimate, and three standard errors of them."""
        one, other = there.evidence, self.found.evidence
        error = 3 * float(np.hypot(one.log_evidence_std, other.log_evidence_std))
        return float(one.log_evidence - other.log_evidence), error

    def _unit(self, k: int) -> float:
        """A unit of a coordinate: one on a log or logit scale; others are moved relative to themselves."""
        if self.found.fixed.bounded[k]:
            return 1.0
        step = abs(float(self._curvature(self.found, self.held).steps.mean(0)[k]))
        return float(np.clip(step, NEAREST * abs(self.flat[k]), FARTHEST * abs(self.flat[k])))

    def _curvature(self, there: Exploration, held: np.ndarray) -> Curvature:
        derivatives = _derivatives(there)
        names = [""] * len(self.flat)
        return curvature_of(
            derivatives.score, derivatives.information, derivatives.complete, names, held, self.complete
        )

    def _along(self, there: Exploration, k: int) -> np.ndarray:
        """[P] the way of the profile over coordinate k, per unit of it."""
        held = self.held | (np.arange(len(self.flat)) == k)
        following = -self._curvature(there, held).covariance @ _derivatives(there).information.mean(0)[:, k]
        return np.where(np.arange(len(self.flat)) == k, 1.0, following)

    def _follow(self, k: int, side: float, unit: float, endless: bool, ahead: float) -> Recession | None:
        """Follow the profile likelihood back from the edge, the other parameters adjusted by Newton steps.

        Args:
            k: The coordinate.
            side: In which direction of it the edge lies.
            unit: What a step of one is.
            endless: Whether there is no upper bound, and no profile.
            ahead: How many units nearer to the edge the likelihood is higher.
        """
        held = self.held | (np.arange(len(self.flat)) == k)
        near, first = self._curvature(self.found, held), self._along(self.found, k)
        way, step = -ahead, FIRST_STEP
        here = self._profile_point(self.flat + side * unit * ahead * first, held, k)
        ways, points = [way], [here]
        for _ in range(0 if endless else PROFILE_POINTS):
            there = self._profile_point(here.theta - side * unit * step * here.along, held, k)
            best = max(point.height for point in points)
            drop, fall = best - there.height, here.height - there.height
            if np.isfinite(drop):
                ways, points = [*ways, way + step], [*points, there]
            if step > SHORTEST_STEP and not fall < MOST_FALL:
                step /= 3
                continue
            if not drop < PROFILE_DROP:
                break
            way, here = way + step, there
            step *= 2.0 if fall < LEAST_FALL else 1.0
        order = np.argsort(ways)
        thetas, heights = [points[i].theta for i in order], np.array([points[i].height for i in order])
        drops = np.maximum.accumulate(np.max(heights) - heights)
        if endless:
            thetas, drops = [*thetas, self.flat], np.zeros(2)
            return self._recession(k, side * unit * first, near, thetas, drops, None, endless, 0.0)
        if drops[-1] <= RISE:
            return None  # flat on both sides: nothing runs off
        if not self._is_logarithmic(k):
            # A parabola in odd units falls on both sides.
            back = float(np.interp(PROFILE_LOOK, drops, np.sort(ways)))
            beyond = self.explore(self.found.fixed.constrained(self.flat + side * unit * max(back, ahead) * first))
            gain, error = self._gain(beyond)
            if not gain >= -RISE - error:
                return None
        gain_ahead = float(heights[0] - self.found.evidence.log_evidence)
        top, higher = int(np.argmax(heights)), None
        if heights[top] - heights[0] > RISE:
            gain, error = self._gain(self.explore(self.found.fixed.constrained(thetas[top])))
            rise = gain + self.found.evidence.log_evidence - heights[0] - error
            higher = (top, rise) if rise > RISE else None
        return self._recession(k, side * unit * first, near, thetas, drops, higher, endless, gain_ahead)

    def _is_logarithmic(self, k: int) -> bool:
        """Whether a unit of a coordinate is a factor, whatever the units of the parameter."""
        fixed = self.found.fixed
        mixing = {name: jax.tree.map(lambda v, c=c: np.full(np.shape(v), mixes_units(c)), fixed.theta[name])
                  for name, c in fixed.constraints.items()}  # fmt: skip
        return bool(fixed.bounded[k]) and not ravel(mixing)[k]

    def _profile_point(self, theta: np.ndarray, held: np.ndarray, k: int) -> "_ProfilePoint":
        there = self.explore(self.found.fixed.constrained(theta))
        score = _derivatives(there).score.mean(0)
        follow = -self._curvature(there, held).covariance @ score
        return _ProfilePoint(
            theta + follow, float(there.evidence.log_evidence - score @ follow / 2), self._along(there, k)
        )

    def _recession(
        self,
        k: int,
        towards: np.ndarray,
        near: Curvature,
        thetas: list[np.ndarray],
        drops: np.ndarray,
        higher: tuple[int, float] | None,
        endless: bool,
        gain: float,
    ) -> Recession:
        """Put a recession into numbers: ``towards [P]`` is a unit of the way, ``near`` the curvature of the rest."""
        fixed, jacobian = self.found.fixed, np.asarray(self.found.fixed.jacobian, float)
        deviation = np.sqrt(np.maximum(np.diag(near.covariance), 0))
        moves = (np.abs(towards) > SHARE * deviation) & (towards != 0)
        towards = np.where(moves, towards, 0.0)
        others = np.sqrt(np.maximum(np.diag(jacobian @ near.covariance @ jacobian.T), 0))
        path = np.stack([ravel(fixed.constrained(theta)) for theta in thetas])
        moved = np.ptp(path, 0) > ROUNDING * np.max(np.abs(path), 0)
        running = np.where(others > 0, np.abs(jacobian @ towards) > SHARE * others, moved)
        numbers = {}
        for name, bound, values in numbers_at_edge(fixed, towards, running, thetas):
            at_top = None if higher is None else (float(values[higher[0]]), higher[1])
            numbers[name] = Boundary(bound, values, drops, at_top, endless)
        return Recession(k, moves, numbers, gain)


def _derivatives(found: Exploration) -> Derivatives:
    assert found.derivatives is not None
    return found.derivatives


def _limit(bound: float) -> str:
    return f"{bound:g}" if np.isfinite(bound) else ("+infinity" if bound > 0 else "-infinity")
