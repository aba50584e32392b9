# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From an exploration at the estimate to a report: errors, intervals, boundaries, and warnings with their remedies."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from numpyro_smcopt.reporting.boundaries import Boundary, about_boundaries, find_boundaries
from numpyro_smcopt.reporting.coordinates import coordinate_names, ravel, unravel
from numpyro_smcopt.reporting.exploration import Exploration, LaplacePoint, about_draws
from numpyro_smcopt.reporting.flat_directions import about_directions
from numpyro_smcopt.reporting.laplace_fit import CONVERGED, LaplaceFit, laplace_fit
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.reporting.standard_errors import Curvature, curvature_of, mean_and_error
from numpyro_smcopt.types import Params

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
        boundaries = find_boundaries(found, lambda params: explore(params, continuous), complete)
        held = np.isin(np.arange(len(theta_names)), list(boundaries))
        slopes = found.slopes
        curvature = curvature_of(slopes.score, slopes.information, slopes.complete, theta_names, held, complete)
        warnings += about_boundaries(boundaries, theta_names)
        warnings += about_directions(curvature.singular, curvature.hidden, curvature.indefinite)
        warnings += _about_curvature(curvature, theta_names)

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
    gap, error = mean_and_error(found.slopes.score - found.slopes.plain_score)
    size = np.sqrt(np.abs(np.diag(found.slopes.complete)))
    return bool(np.any((abs(gap) > JUMP_ERRORS * error) & (abs(gap) > JUMP * size)))


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
        missing = jax.tree.map(lambda leaf: np.full(np.shape(leaf), np.nan), found.fixed.constrained(flat))
        return _ByLaplace(missing, unknown, f"none: {reason}")
    fit: LaplaceFit = laplace_fit(
        here,
        curvature.covariance,
        lambda theta: laplace_at(found.fixed.constrained(theta)),
    )
    unknown = np.full(len(flat), np.nan)
    distance = np.divide(fit.theta - flat, deviation, out=unknown, where=curvature.identified & (deviation > 0))
    status = "maximum" if fit.converged else "still rising"
    return _ByLaplace(found.fixed.constrained(fit.theta), distance, status)


# -- warnings ------------------------------------------------------------------------------------------------------
def _about_laplace(found: Exploration) -> list[str]:
    error = found.laplace - found.log_evidence
    if not abs(error) > LAPLACE_OFF + 4 * found.std:
        return []
    return [
        f"A Laplace approximation of the log marginal likelihood would be off by {error:+.2f} here: estimates that "
        "rest on one may differ from these."
    ]


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


def _about_curvature(curvature: Curvature, names: Sequence[str]) -> list[str]:
    warnings = []
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
