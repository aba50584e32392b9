# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From an exploration at the estimate to a report: errors, intervals, boundaries, and warnings with their remedies."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np
from numpyro.distributions import biject_to

from numpyro_smcopt.reporting.exploration import Exploration, LaplacePoint, about_draws
from numpyro_smcopt.reporting.laplace_fit import CONVERGED, LaplaceFit, laplace_fit
from numpyro_smcopt.reporting.programs import Slopes
from numpyro_smcopt.reporting.report import Boundary, Report, acts_elementwise, coordinate_names, ravel, unravel
from numpyro_smcopt.reporting.standard_errors import Curvature, curvature_of, mean_and_error
from numpyro_smcopt.types import Params

FLAT = 0.05  # information on a log or logit scale, below which a maximum is looked for at the boundary
FAR = 3.0  # how far towards the boundary that is, on that scale
RISE = 0.01  # nats that the likelihood may fall on the way, or rise on the way back, beyond its error
PROFILE_DROP = 4.0  # nats down to which the profile likelihood is followed
PROFILE_POINTS = 12
PROFILE_TARGET = 0.3  # where the first interesting point of the profile is
TINY_DROP = 1e-4  # in nats, less is noise
SHORTEST_STEP, LONGEST_STEP = 0.15, 2.0
JUMP, JUMP_ERRORS = 0.1, 6.0  # in root information, and in standard errors
LAPLACE_OFF = 0.1  # nats
LAPLACE_AWAY = 0.5  # standard errors between our estimate and Laplace's that are worth a warning
MOVING = 0.1  # standard errors from the maximum, beyond which theta is said to be moving
NOISY = 0.05  # relative error of a standard error that is worth a warning

ExploreFn = Callable[[Params, bool], Exploration]
"""Explores at other constrained parameters, with the same randomness; False: the density jumps in the latents."""

LaplaceFn = Callable[[Params], LaplacePoint | str]
"""Laplace's approximation at other constrained parameters, or in words why there is none."""


def make_report(
    params: Params,
    explore: ExploreFn,
    laplace_at: LaplaceFn,
    num_observations: int,
    complete: np.ndarray | None = None,
) -> Report:
    """Explore at the estimate and say what is known.

    Args:
        params: The estimate, constrained.
        explore: Explores at given parameters.
        laplace_at: Evaluates Laplace's approximation there.
        num_observations: For BIC.
        complete: [P, P] complete-data information with latents that stay, see `curvature_of`.
    """
    params = jax.device_get(params)
    found = explore(params, True)
    continuous = not _jumps(found)
    if not continuous:
        found = explore(params, False)
    names, theta_names = coordinate_names(params), coordinate_names(found.fixed.theta)
    warnings = about_draws(found) + _about_laplace(found)
    boundaries: dict[int, Boundary] = {}
    if found.slopes is None:
        curvature = _unknown(len(theta_names))
        warnings.append(f"There are no standard errors: {len(theta_names)} parameters need too large a matrix.")
    else:
        boundaries = _boundaries(found, lambda params: explore(params, continuous), complete)
        held = np.isin(np.arange(len(theta_names)), list(boundaries))
        slopes = found.slopes
        curvature = curvature_of(*_arrays(slopes), theta_names, held, complete)
        warnings += _about_curvature(curvature, boundaries, theta_names)

    # Delta method
    jacobian = np.asarray(found.fixed.jacobian, float)
    known = ~np.any((jacobian != 0) & ~curvature.identified, 1)
    covariance = np.where(known[:, None] & known, jacobian @ curvature.covariance @ jacobian.T, np.nan)
    away, blur = mean_and_error(curvature.steps @ jacobian.T)
    standard_errors = np.sqrt(np.diag(covariance))
    sandwich = None
    if found.outer is not None:
        middle = curvature.covariance @ np.asarray(found.outer, float) @ curvature.covariance
        sandwich = np.where(known[:, None] & known, jacobian @ middle @ jacobian.T, np.nan)
    mc_errors = np.where(known, np.hypot(away, blur), np.nan)
    by_laplace = _fit_by_laplace(found, curvature, laplace_at)
    warnings += _about_laplace_fit(by_laplace, found, curvature, theta_names)
    return Report(
        params=params,
        standard_errors=unravel(standard_errors, params),
        covariance=covariance,
        mc_errors=unravel(mc_errors, params),
        names=names,
        log_evidence=found.log_evidence,
        log_evidence_std=found.std,
        num_parameters=len(theta_names) - curvature.num_singular,
        num_observations=num_observations,
        samples=found.samples,
        log_weights=found.log_weights,
        ess=float(np.min(found.ess)),
        diagnostics={
            "score_z": unravel(curvature.score_z, found.fixed.theta),
            "standard_error_noise": unravel(curvature.noise, found.fixed.theta),
            "laplace_log_evidence": found.laplace,
            "laplace_params": by_laplace.params,
            "laplace_distance": unravel(by_laplace.distance, found.fixed.theta),
            "laplace_fit": by_laplace.status,
            "distance": unravel(_distance(curvature), found.fixed.theta),
            "pareto_k": found.pareto_k,
            "tempered": found.tempered,
            "acceptance_rate": found.acceptance,
            "unique_ancestors": found.num_ancestors,
        },
        warnings=tuple(warnings),
        theta=found.fixed.theta,
        theta_covariance=curvature.covariance,
        constraints=found.fixed.constraints,
        boundaries={theta_names[k]: boundary for k, boundary in boundaries.items()},
        sandwich_covariance=sandwich,
    )


def _jumps(found: Exploration) -> bool:
    """Whether the scores with and without transport differ, so that the density cannot be continuous in the latents."""
    if found.slopes is None:
        return False
    score, _, complete = _arrays(found.slopes)
    gap, error = mean_and_error(score - np.asarray(found.slopes.plain_score))
    size = np.sqrt(np.abs(np.diag(complete)))
    return bool(np.any((abs(gap) > JUMP_ERRORS * error) & (abs(gap) > JUMP * size)))


def _arrays(slopes: Slopes) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    score, _, information, complete = map(np.asarray, slopes)
    return score, information, complete


def _distance(curvature: Curvature) -> np.ndarray:
    """[P] signed way to the maximum in standard errors; NaN where there is none."""
    deviation = np.sqrt(np.diag(curvature.covariance))
    unknown = np.full(len(deviation), np.nan)
    return np.divide(curvature.steps.mean(0), deviation, out=unknown, where=curvature.identified & (deviation > 0))


def _unknown(size: int) -> Curvature:
    nothing = np.full(size, np.nan)
    return Curvature(
        np.zeros((size, size)), np.zeros(size, bool), np.zeros((1, size)), nothing, nothing, (), 0, (), False
    )


# -- boundaries ----------------------------------------------------------------------------------------------------
def _boundaries(
    found: Exploration, explore: Callable[[Params], Exploration], complete: np.ndarray | None
) -> dict[int, Boundary]:
    """Coordinates whose maximum lies on the boundary of their support, by number.

    On its log or logit scale such a parameter has no information left, and the likelihood does not fall any more on the
    way to the boundary.
    """
    slopes, flat = found.slopes, ravel(found.fixed.theta)
    assert slopes is not None
    constraints = found.fixed.constraints
    alone = {name: acts_elementwise(constraint) for name, constraint in constraints.items()}
    elementwise = {
        name: jax.tree.map(lambda leaf, name=name: np.full(np.shape(leaf), alone[name]), tree)
        for name, tree in found.fixed.theta.items()
    }
    can_be = found.fixed.bounded & (ravel(elementwise) > 0)
    information = np.diag(slopes.information.mean(0))
    boundaries = {}
    for k in np.flatnonzero(can_be & (np.abs(information) <= FLAT)):
        for side in (-1.0, 1.0):
            beyond = flat.copy()
            beyond[k] += side * FAR
            there = explore(constrained(beyond, found))
            if there.log_evidence >= found.log_evidence - RISE - 3 * np.hypot(there.std, found.std):
                boundaries[int(k)] = _profile(int(k), -side, found, explore, complete)
                break
    return boundaries


def constrained(flat: np.ndarray, found: Exploration) -> Params:
    """A flat theta [P] on the scale of the model."""
    theta = unravel(flat, found.fixed.theta)
    like = found.fixed.theta
    return {
        name: jax.tree.map(
            lambda v, o, c=constraint: np.asarray(biject_to(c)(v.astype(o.dtype))), theta[name], like[name]
        )
        for name, constraint in found.fixed.constraints.items()
    }


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
        there = explore(constrained(theta, found))
        slopes = there.slopes
        assert slopes is not None
        curvature = curvature_of(*_arrays(slopes), [""] * len(flat), held, complete)
        score = slopes.score.mean(0)
        follow = -curvature.covariance @ score
        return theta + follow, float(there.log_evidence - score @ follow / 2)

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
    values = np.asarray([ravel(constrained(theta, found))[k] for theta in thetas])
    drops = np.maximum.accumulate(max(heights) - np.asarray(heights))
    limit = ravel(constrained(np.where(held, -direction * np.inf, flat), found))[k]
    top, rise = int(np.argmax(heights)), 0.0
    if heights[top] - heights[0] > RISE:
        there = explore(constrained(thetas[top], found))
        rise = there.log_evidence - heights[0] - 3 * float(np.hypot(there.std, found.std))
    return Boundary(float(limit), values, drops, (float(values[top]), rise) if rise > RISE else None)


# -- Laplace's maximum ---------------------------------------------------------------------------------------------
class _ByLaplace(NamedTuple):
    """Constrained parameters, [P] their distance from the estimate in standard errors, and what they are in words."""

    params: Params
    distance: np.ndarray
    status: str


def _fit_by_laplace(found: Exploration, curvature: Curvature, laplace_at: LaplaceFn) -> _ByLaplace:
    flat, here = ravel(found.fixed.theta), found.laplace_point
    deviation = np.sqrt(np.diag(curvature.covariance))
    if isinstance(here, str) or not np.any(deviation > 0):
        unknown = np.full(len(flat), np.nan)
        reason = here if isinstance(here, str) else "no parameter has a standard error"
        missing = jax.tree.map(lambda leaf: np.full(np.shape(leaf), np.nan), constrained(flat, found))
        return _ByLaplace(missing, unknown, f"none: {reason}")
    fit: LaplaceFit = laplace_fit(here, curvature.covariance, lambda theta: laplace_at(constrained(theta, found)))
    unknown = np.full(len(flat), np.nan)
    distance = np.divide(fit.theta - flat, deviation, out=unknown, where=curvature.identified & (deviation > 0))
    status = "maximum" if fit.converged else "still rising"
    return _ByLaplace(constrained(fit.theta, found), distance, status)


# -- warnings ------------------------------------------------------------------------------------------------------
def _about_laplace(found: Exploration) -> list[str]:
    error = found.laplace - found.log_evidence
    if not abs(error) > LAPLACE_OFF + 4 * found.std:
        return []
    return [
        f"A Laplace approximation of the log marginal likelihood would be off by {error:+.2f} here: estimates that "
        "rest on one may differ from these."
    ]


def _some(descriptions: Sequence[str]) -> str:
    return "; ".join(descriptions[:5]) + ("; ..." if len(descriptions) > 5 else "")


def _about_laplace_fit(
    by_laplace: _ByLaplace, found: Exploration, curvature: Curvature, names: Sequence[str]
) -> list[str]:
    """Beyond the Monte Carlo error of the estimate and what the walk of `laplace_fit` leaves."""
    away, blur = mean_and_error(curvature.steps)
    deviation = np.sqrt(np.diag(curvature.covariance))
    with np.errstate(invalid="ignore", divide="ignore"):
        least = LAPLACE_AWAY + np.hypot(away, blur) / deviation + CONVERGED
        differs = np.flatnonzero(np.abs(by_laplace.distance) > least)
    if not len(differs):
        return []
    worst = sorted(differs.tolist(), key=lambda k: -abs(by_laplace.distance[k]))
    shown = ", ".join(f"{names[k]} by {by_laplace.distance[k]:+.1f}" for k in worst[:4])
    more = f" and {len(worst) - 4} more" if len(worst) > 4 else ""
    open_end = "" if by_laplace.status == "maximum" else "at least "
    return [
        "A maximum likelihood fit by Laplace's approximation would differ, in standard errors: "
        f"{open_end}{shown}{more}. See report.diagnostics['laplace_params']."
    ]


def _about_curvature(curvature: Curvature, boundaries: dict[int, Boundary], names: Sequence[str]) -> list[str]:
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
    if curvature.indefinite:
        warnings.append(
            "The likelihood curves upwards in some direction: this is no maximum. Run more updates, or from another "
            "start."
        )
    elif curvature.singular:
        warnings.append(
            f"The data do not determine {_some(curvature.singular)}: these have no standard errors. Fix them, or "
            "constrain them."
        )
    if curvature.hidden and not curvature.indefinite:
        warnings.append(
            f"How well the data determine {_some(curvature.hidden)} is lost in Monte Carlo noise: these have no "
            "standard errors. Reparametrise the latents, so that they depend less on one another."
        )
    away, blur = mean_and_error(curvature.steps)
    deviation = np.sqrt(np.diag(curvature.covariance))
    moving = curvature.identified & (np.abs(away) > MOVING * deviation) & (np.abs(away) > 3 * blur)
    if np.any(moving):
        worst = max(np.flatnonzero(moving).tolist(), key=lambda k: abs(away[k]) / deviation[k])
        warnings.append(
            f"theta is not at the maximum: {names[worst]} is {abs(away[worst]) / deviation[worst]:.1f} standard errors "
            "away. Go on with more updates, run(..., init_state=result.state)."
        )
    noisy = curvature.identified & (curvature.noise > NOISY)
    if np.any(noisy):
        worst = max(np.flatnonzero(noisy).tolist(), key=lambda k: curvature.noise[k])
        warnings.append(
            f"Standard errors have Monte Carlo errors of up to {100 * curvature.noise[worst]:.0f}% ({names[worst]})."
        )
    return warnings
