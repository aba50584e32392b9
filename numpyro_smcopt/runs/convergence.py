# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Convergence of a run: theta stationary, and known as well as it needs to be, both within Monte Carlo error.

Of the tail of a run (its last half) the iterates ``theta_k`` and the gradients ``g_k`` are averaged over batches. The
spread of the batch means says how well the mean of the tail is known, whatever the correlation within a batch; what
correlation between batches hides is made up for by comparing batches of two lengths (Flegal and Jones 2010; Vats and
Flegal 2022). Two questions are asked:

*Does theta still move?* The score statistic ``z_j = mean(g_j) / se(mean(g_j))`` is compared with the quantile of
Student's t that noise alone exceeds in one of a thousand runs (`LEVEL`, divided by the number of parameters).

*How much is left to be gained?* With ``I`` the information, the mean of the iterates is expected to fall short of the
minimum of the loss by

    shortfall = ( mean(g)^T I^-1 mean(g)  +  tr(I^-1 V_g)  +  tr(I V_theta) ) / 2,

``V`` being covariances of the means of the tail: what the mean gradient still promises, what is not known of it, and
how far the mean iterate was shaken. For the marginal likelihood this is in nats, whatever the units of the parameters.
"""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np

NUM_BATCHES = 10
SHORTEST_RUN = 200
LEVEL = 1e-3  # probability that noise alone looks like motion


SMALL_PROMISE = 1e-3  # nats


@dataclasses.dataclass(frozen=True)
class EarlyStop:
    """The rule that ends a run before the number of updates that it was asked for.

    A run ends when, at two looks in a row, theta does not move beyond its noise and the expected shortfall of the loss
    is below a tolerance; see the head of this file. The first look is at update 200.

    Args:
        tolerance: The shortfall, for the marginal likelihood in nats. (The sampling error of the data costs half a nat
            per parameter, on average.)
        every: Updates between two looks. A look costs one evaluation of the information, where the step of theta does
            not know it anyway.
    """

    tolerance: float = 1e-3
    every: int = 50

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if not self.tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {self.tolerance!r}.")
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a positive integer, got {self.every!r}.")

    def arrived(self, theta: np.ndarray, gradient: np.ndarray, inverse_information: np.ndarray) -> bool:
        """True if the run may end; arguments as for `look`."""
        lengths = (len(theta), len(theta) - self.every)
        return min(lengths) >= SHORTEST_RUN and all(
            self._near(look(theta[:length], gradient[:length], inverse_information)) for length in lengths
        )

    def _near(self, seen: "Look | None") -> bool:
        return seen is not None and not seen.moving and seen.shortfall < self.tolerance


class Look(NamedTuple):
    """Findings from the tail of a run.

    Attributes:
        z: The largest score statistic of a parameter.
        moving: Whether noise hardly explains it.
        promise: What the mean gradient promises to gain, ``mean(g)^T M^-1 mean(g) / 2``.
        shortfall: What the mean iterate is expected to fall short of the minimum by, noise included.
    """

    z: float
    moving: bool
    promise: float
    shortfall: float


def look(theta: np.ndarray, gradient: np.ndarray, inverse_information: np.ndarray) -> Look | None:
    """Look at the tail of a run.

    Args:
        theta: [T, P] iterates on unconstrained space.
        gradient: [T, P] gradient estimates there.
        inverse_information: [P, P] ``M^-1``, symmetric and positive.

    Returns:
        None if the run is shorter than two batches of every half.
    """
    if len(theta) < 2 * NUM_BATCHES:
        return None
    # Coordinates in which the information is the identity.
    values, vectors = np.linalg.eigh(np.asarray(inverse_information, float))
    half = vectors * np.sqrt(np.maximum(values, 1e-12 * max(values.max(), 1e-300)))
    mean, of_gradient = _mean_and_variances(gradient)
    _, of_whitened = _mean_and_variances(gradient @ half)
    _, of_theta = _mean_and_variances(theta @ np.linalg.inv(half).T)
    promise = 0.5 * float(np.sum((half.T @ mean) ** 2))
    error = np.sqrt(of_gradient)
    z = float(np.max(np.divide(np.abs(mean), error, out=np.zeros_like(mean), where=error > 0)))
    moving = z > _student_quantile(LEVEL / (2 * len(mean)), NUM_BATCHES - 1)
    return Look(z, moving, promise, promise + 0.5 * float(np.sum(of_whitened) + np.sum(of_theta)))


def r_hat(paths: np.ndarray) -> np.ndarray:
    """Potential scale reduction of independent runs, from the last half of their iterates.

    With ``W`` the mean over the runs of the variance within a tail of length ``n``, and ``V`` the variance of the means
    of the tails, it is ``sqrt((n - 1) / n + V / W)``: how much wider the iterates of all runs are spread than those of
    one. The iterates of a run that arrived are spread by the noise of its gradients, those of one that still moves by
    its motion; either way a value near one says that the runs differ by no more than a single one wavers. Differences
    smaller than the rounding of the iterates count as none.

    Args:
        paths: [T, R, ...] iterates of R runs.

    Returns:
        [...] of every coordinate; NaN for fewer than four iterates or two runs.

    Source: Gelman and Rubin 1992.
    """
    tail = np.asarray(paths[len(paths) - len(paths) // 2 :], float)
    length, num_runs = tail.shape[:2]
    if length < 2 or num_runs < 2:
        return np.full(tail.shape[2:], np.nan)
    rounding = 4 * np.finfo(paths.dtype).eps * np.max(np.abs(tail), (0, 1))
    within = np.mean(np.var(tail, 0, ddof=1), 0)
    floor = np.maximum(rounding**2, np.finfo(float).tiny)
    return np.sqrt((length - 1) / length + np.var(np.mean(tail, 0), 0, ddof=1) / np.maximum(within, floor))


def _mean_and_variances(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [P] of the tail of ``values [T, P]`` and the variance [P] of that mean."""
    length = len(values) // 2 // NUM_BATCHES
    means = np.asarray(values[-length * NUM_BATCHES :], float).reshape(NUM_BATCHES, length, -1).mean(1)
    pairs = means.reshape(NUM_BATCHES // 2, 2, -1).mean(1)
    short, long = means.var(0, ddof=1) / len(means), pairs.var(0, ddof=1) / len(pairs)
    # The bias of a batch variance is inverse to the length of the batches: this takes it out, or else leaves it.
    return means.mean(0), np.maximum(2 * long - short, np.maximum(short, long))


def _student_quantile(level: float, freedom: int) -> float:
    """The quantile that Student's t exceeds with probability ``level``."""
    scale = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)
    # t = sqrt(freedom) tan(angle): the tail is an integral of cos(angle)^(freedom - 1) up to a right angle.
    angles = np.linspace(0.0, math.pi / 2, 20_001)
    density = scale * math.sqrt(freedom) * np.cos(angles) ** (freedom - 1)
    tail = np.cumsum((density[1:] + density[:-1])[::-1])[::-1] * (angles[1] - angles[0]) / 2
    return math.sqrt(freedom) * math.tan(float(np.interp(-level, -tail, angles[:-1])))


def stopping_rule(early_stop: Any) -> EarlyStop | None:
    """The rule for an early end: the one that was given, the default one for True, None for False."""
    if not isinstance(early_stop, bool | EarlyStop):
        raise TypeError(f"early_stop must be True, False or an EarlyStop, got {early_stop!r}.")
    if isinstance(early_stop, EarlyStop):
        return early_stop
    return EarlyStop() if early_stop else None


def theta_moves(seen: Look | None) -> str | None:
    """The gradient of the tail of a run is not zero within its noise, and promises something."""
    if seen is None or not seen.moving or seen.promise < SMALL_PROMISE:
        return None
    return (
        f"theta was still moving at the end of the run: its gradient is {seen.z:.0f} standard errors from zero and "
        f"promises another {seen.promise:.2g} nats. Go on with more steps, run(..., init_state=result.state), unless "
        "the maximum lies on a boundary (a scale that goes to zero)."
    )
