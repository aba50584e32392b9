# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From a state to a report: fresh particles at the estimate, and standard errors, intervals and checks from them."""

import dataclasses
from typing import Any

import jax
import numpy as np

from numpyro_smcopt.kernels import HMC
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.budget import LARGEST_INFORMATION
from numpyro_smcopt.population.first_cloud import starts_from_prior
from numpyro_smcopt.population.self_check import as_precise_as_needed
from numpyro_smcopt.potential import Target
from numpyro_smcopt.reporting.boundaries import ANCHORED_FALL, Recession, anchored, find_recessions
from numpyro_smcopt.reporting.coordinates import coordinate_names, ravel, unravel
from numpyro_smcopt.reporting.evidence_at import EvidenceAt, Exploration, complete_information
from numpyro_smcopt.reporting.flat_directions import about_directions
from numpyro_smcopt.reporting.laplace_fit import laplace_fit
from numpyro_smcopt.reporting.replicates import Draws
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.reporting.report_texts import (
    about_contradiction,
    about_curvature,
    about_draws,
    about_laplace,
    about_laplace_fit,
    about_spacing,
    differ,
)
from numpyro_smcopt.reporting.standard_errors import ROUNDING, Curvature, curvature_of, mean_and_error, no_curvature
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.types import Array, Params

JUMP, JUMP_ERRORS = 0.1, 6.0  # in root information, and in standard errors


def summarize(algorithm: Algorithm, rng_key: Array, bound: BoundTarget, state: Any, sandwich: bool) -> Report:
    """See `ParticleAlgorithm.summarize`."""
    if sandwich and state.blocks.num_blocks == 1 and state.points.x.shape[1]:
        raise ValueError(
            "A sandwich covariance needs independent units, but all latents of this model depend on one another. "
            "Leave sandwich=True out."
        )
    at = _evidence_at(algorithm, rng_key, bound, state)
    if 0 < ravel(state.theta).size <= LARGEST_INFORMATION:
        carried = algorithm.complete_information(state)
        complete = None if carried is None else np.asarray(carried, float)
        if complete is None or not np.any(complete):
            complete = complete_information(rng_key, at.start, state.params, at.cloud, at.blocks)
        at = dataclasses.replace(at, complete=complete, sandwich=sandwich)
    report = build_report(jax.device_get(state.params), at)
    return dataclasses.replace(report, warnings=(*report.warnings, *_contradictions(at, state, report.log_evidence)))


def _contradictions(at: EvidenceAt, state: Any, log_evidence: float) -> list[str]:
    """The note if the run and the report, which both estimate the log evidence, do not agree."""
    running = state.diagnostics.get("log_evidence")
    if running is None or not starts_from_prior(at.start.target, at.init_strategy):
        return []
    running, num_blocks = float(running), state.blocks.num_blocks
    if not differ(running, log_evidence, num_blocks):
        return []
    # That may be because theta itself, of which the run speaks, is not yet where its average is.
    there = at(at.start.call("constrain", Target.constrain_params, state.theta), False).evidence
    return about_contradiction(running, there.log_evidence) if differ(running, there.log_evidence, num_blocks) else []


def log_evidence_at(algorithm: Algorithm, rng_key: Array, bound: BoundTarget, state: Any) -> tuple[float, float]:
    """Log evidence at the estimate of a state, and its error."""
    found = _evidence_at(algorithm, rng_key, bound, state)(state.params).evidence
    return found.log_evidence, found.log_evidence_std


def _evidence_at(algorithm: Algorithm, rng_key: Array, bound: BoundTarget, state: Any) -> EvidenceAt:
    cloud, own = Draws(state.points.x, state.log_weights), getattr(algorithm, "kernel", None)
    # The kernel of the algorithm, or one that serves any model
    kernel = own if own is not None and own.invariant else HMC()
    strategy = algorithm.init_strategy
    blocks = as_precise_as_needed(bound, state.theta, cloud.x, state.blocks)
    return EvidenceAt(rng_key, bound.at(state.theta), cloud, blocks, kernel, init_strategy=strategy)


def _count_observations(start: BoundTarget) -> int:
    """Number of observations that the likelihood counts, which masks and weights may decide."""
    known = start.target.sites.num_observations
    if known is not None:
        return known
    return round(float(start.call("observations", Target.count_observations, start.theta)))


def build_report(params: Params, at: EvidenceAt) -> Report:
    """Explore at the estimate and put together what is known.

    Args:
        params: The estimate, constrained.
        at: The log evidence as a function of the parameters.
    """
    found = at(params)
    continuous = not _jumps(found)
    if not continuous:
        found = at(params, False)
    names, theta_names = coordinate_names(params), coordinate_names(found.fixed.theta)
    found, curvature, recessions, about = _at_the_maximum(found, at, continuous, theta_names)
    fixed, evidence = found.fixed, found.evidence
    laplace_fitted, about_laplace_maximum = _fit_by_laplace(found, curvature, at, theta_names)
    jacobian = np.asarray(fixed.jacobian, float)
    at_edge = {name: boundary for recession in recessions for name, boundary in recession.numbers.items()}
    moves = np.any([np.zeros(len(theta_names), bool), *(recession.moves for recession in recessions)], 0)
    known = ~np.any((jacobian != 0) & ~curvature.identified & ~moves, 1) & ~np.isin(names, list(at_edge))
    by_delta = lambda v: np.where(known[:, None] & known, jacobian @ v @ jacobian.T, np.nan)  # noqa: E731
    covariance, sandwich = by_delta(curvature.covariance), None
    if found.derivatives is not None and found.derivatives.outer is not None:
        sandwich = by_delta(curvature.covariance @ found.derivatives.outer @ curvature.covariance)
    away, blur = mean_and_error(curvature.steps @ jacobian.T)
    mc_errors = np.sqrt(away**2 + blur**2 + np.sum((jacobian @ _rounding(found, curvature)) ** 2, 1))
    deviations = np.sqrt(np.diag(covariance))
    values = ravel(params).astype(np.result_type(np.float32, *jax.tree.leaves(params)))
    told = about_draws(evidence) + about_spacing(values, deviations, names)
    of_theta = lambda v: unravel(v, fixed.theta)  # noqa: E731
    return Report(
        params=params,
        standard_errors=unravel(deviations, params),
        covariance=covariance,
        mc_errors=unravel(np.where(known, mc_errors, np.nan), params),
        names=names,
        log_evidence=evidence.log_evidence,
        log_evidence_std=evidence.log_evidence_std,
        num_parameters=len(theta_names) - curvature.num_singular - len(recessions),
        num_observations=_count_observations(at.start),
        samples=evidence.samples,
        log_weights=evidence.log_weights,
        ess=evidence.ess,
        diagnostics={
            "score_z": of_theta(curvature.score_z),
            "standard_error_noise": of_theta(curvature.noise),
            "distance": of_theta(curvature.in_standard_errors(curvature.steps.mean(0))),
            "laplace_log_evidence": evidence.laplace,
            **laplace_fitted,
            "pareto_k": evidence.pareto_k,
            "tempered": evidence.tempered,
            "acceptance_rate": evidence.acceptance_rate,
            "unique_ancestors": evidence.unique_ancestors,
        },
        warnings=tuple(told + about_laplace(evidence) + about + about_laplace_maximum),
        theta=fixed.theta,
        theta_covariance=curvature.covariance,
        constraints=fixed.constraints,
        boundaries=at_edge,
        sandwich_covariance=sandwich,
        num_at_edge=len(recessions),
    )


def _jumps(found: Exploration) -> bool:
    """True if the scores with and without transport differ, so that the density cannot be continuous in the latents."""
    if found.derivatives is None:
        return False
    gap, error = mean_and_error(found.derivatives.score - found.derivatives.plain_score)
    size = np.sqrt(np.abs(np.diag(found.derivatives.complete)))
    return bool(np.any((abs(gap) > JUMP_ERRORS * error) & (abs(gap) > JUMP * size)))


def _rounding(found: Exploration, curvature: Curvature) -> np.ndarray:
    """[P, P] how far the maximum is off by the rounding of each coordinate of the score, in single precision."""
    if found.derivatives is None:
        return curvature.covariance
    spread = np.sqrt(np.abs(np.diag(found.derivatives.complete)))
    return curvature.covariance * np.where(np.isfinite(spread), ROUNDING * spread, 0.0)


def _at_the_maximum(
    found: Exploration, at: EvidenceAt, continuous: bool, names: tuple[str, ...]
) -> tuple[Exploration, Curvature, list[Recession], list[str]]:
    """Where the maximum is explored, what is known of it, where theta runs off, and what is to be said of both."""
    if found.derivatives is None:
        without = f"There are no standard errors: {len(names)} parameters need too large a matrix."
        return found, no_curvature(len(names)), [], [without]
    # Where a density has lost its digits, the complete-data information has lost its own.
    afresh = lambda params: dataclasses.replace(  # noqa: E731
        at, complete=complete_information(at.rng_key, at.start, params, at.cloud, at.blocks)
    )
    near = anchored(found, lambda params: afresh(params)(params, continuous))
    at = at if near is found else afresh(near.fixed.constrained(ravel(near.fixed.theta)))
    recessions = find_recessions(near, lambda params: at(params, continuous), at.complete)
    # The estimate itself is nearer to the limit, where it has kept its digits.
    if recessions and not abs(near.evidence.log_evidence - found.evidence.log_evidence) < ANCHORED_FALL:
        found = near
    derivatives = found.derivatives
    assert derivatives is not None
    held = np.isin(np.arange(len(names)), [recession.coordinate for recession in recessions])
    noisy = derivatives.score, derivatives.information, derivatives.complete
    curvature = curvature_of(*noisy, names, held, at.complete)
    curvature = curvature.without(np.any([held, *(recession.moves for recession in recessions)], 0))
    about = [sentence for recession in recessions for sentence in recession.describe()]
    if not any(boundary.endless for recession in recessions for boundary in recession.numbers.values()):
        about += about_directions(curvature.singular, curvature.hidden, curvature.indefinite)
        about += about_curvature(curvature, names)
    return found, curvature, recessions, about


def _fit_by_laplace(
    found: Exploration, curvature: Curvature, at: EvidenceAt, names: tuple[str, ...]
) -> tuple[dict[str, Any], list[str]]:
    """Diagnostics of maximum likelihood by Laplace's approximation, and what is to be said of it."""
    here, fixed = found.laplace, found.fixed
    missing = here.missing or ("" if np.any(curvature.standard_errors > 0) else "no parameter has a standard error")
    theta = flat = ravel(fixed.theta)
    distance, status, about = np.full(len(flat), np.nan), f"none: {missing}", []
    if not missing:
        evaluate = lambda theta: at.laplace(fixed.constrained(theta))  # noqa: E731
        theta, converged = laplace_fit(here, curvature.covariance, evaluate)
        distance = curvature.in_standard_errors(theta - flat)
        status = "maximum" if converged else "still rising"
        about = about_laplace_fit(distance, converged, curvature, names)
    params = fixed.constrained(theta)
    if missing:
        params = jax.tree.map(lambda leaf: np.full(np.shape(leaf), np.nan), params)
    distances = unravel(distance, fixed.theta)
    return {"laplace_params": params, "laplace_distance": distances, "laplace_fit": status}, about
