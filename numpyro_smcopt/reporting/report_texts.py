# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Notes of a report on the numbers in it: faults and special cases, each with its remedy.

Boundaries and directions that are not determined speak for themselves, in `boundaries` and `flat_directions`.
"""

from collections.abc import Sequence

import numpy as np

from numpyro_smcopt.reporting.evidence_at import LogEvidence
from numpyro_smcopt.reporting.laplace_fit import CONVERGED
from numpyro_smcopt.reporting.standard_errors import Curvature, mean_and_error

NOISY_EVIDENCE = 0.5  # nats
FEW_DRAWS = 40.0
LAPLACE_OFF = 0.1  # nats
LAPLACE_AWAY = 0.5  # standard errors between our estimate and Laplace's that are worth a warning
MOVING = 0.1  # standard errors from the maximum, beyond which theta is said to be moving
COARSE = 0.1  # standard errors between an estimate and the next number
NOISY = 0.05  # relative error of a standard error that is worth a warning
CONTRADICTION, BLOCK_DRIFT = 5.0, 0.1  # nats between a run and a report, and how they grow with the blocks


def about_draws(found: LogEvidence) -> list[str]:
    """Of the draws behind a log evidence."""
    warnings = []
    if found.num_unfinished:
        warnings.append(
            f"{found.num_unfinished} tempered populations did not reach the posterior: the log evidence and everything "
            "else here is of no use. Rescale the model, or reparametrise it."
        )
    if np.isnan(found.log_evidence_std):
        warnings.append(
            "The prior of the latents cannot be drawn from and their blocks are too large for a reference "
            "distribution, so there is no log evidence."
        )
    if found.ess < FEW_DRAWS:
        warnings.append(
            f"Only {found.ess:.0f} effective draws in the worst block of latents: errors may be larger than stated. "
            "Reparametrise the model, or compare with another key."
        )
    if found.log_evidence_std > NOISY_EVIDENCE:
        warnings.append(f"The log evidence is uncertain by {found.log_evidence_std:.1f} nats.")
    return warnings


def differ(running: float, log_evidence: float, num_blocks: int) -> bool:
    """True if two estimates of a log evidence contradict each other; one has gathered the errors of a whole run."""
    return abs(running - log_evidence) > CONTRADICTION * (1 + BLOCK_DRIFT * np.sqrt(num_blocks))


def about_contradiction(running: float, log_evidence: float) -> list[str]:
    """Of a run and a report that contradict each other."""
    return [
        f"The run found the log evidence {running:.2f} where these draws find {log_evidence:.2f}: one of the two is "
        "wrong. Look for a latent whose density does not integrate to one (a distribution or a factor of your own), or "
        "summarize a longer run."
    ]


def about_spacing(params: np.ndarray, deviations: np.ndarray, names: Sequence[str]) -> list[str]:
    """Of estimates [P] that their type rounds more than they are uncertain."""
    with np.errstate(invalid="ignore"):
        coarse = np.flatnonzero(np.spacing(np.abs(params)) > COARSE * np.where(deviations > 0, deviations, np.inf))
    return [
        f"{names[k]} is near {params[k]:.4g}, where numbers of {params.dtype} are {np.spacing(np.abs(params[k])):.2g} "
        f"apart, and its standard error is {deviations[k]:.2g}: it is rounded. Subtract a constant from it and from "
        "the data, or enable double precision (`jax.config.update('jax_enable_x64', True)`)."
        for k in coarse[:1]
    ]


def about_laplace(found: LogEvidence) -> list[str]:
    """Of an approximation that is off."""
    error = found.laplace - found.log_evidence
    if not abs(error) > LAPLACE_OFF + 4 * found.log_evidence_std:
        return []
    return [
        f"A Laplace approximation of the log marginal likelihood would be off by {error:+.2f} here: estimates that "
        "rest on one may differ from these."
    ]


def about_laplace_fit(distance: np.ndarray, converged: bool, curvature: Curvature, names: Sequence[str]) -> list[str]:
    """Of the maximum of the approximation.

    Args:
        distance: [P] from the estimate to it, in standard errors.
        converged: Whether it was found.
        curvature: What is known of ours.
        names: [P] of the coordinates.
    """
    # Beyond the Monte Carlo error of the estimate and what the walk of `laplace_fit` leaves
    with np.errstate(invalid="ignore", divide="ignore"):
        least = LAPLACE_AWAY + np.hypot(*mean_and_error(curvature.steps)) / curvature.standard_errors + CONVERGED
        differs = np.flatnonzero(np.abs(distance) > least)
    if not len(differs):
        return []
    worst = sorted(differs.tolist(), key=lambda k: -abs(distance[k]))
    shown = ", ".join(f"{names[k]} by {distance[k]:+.1f}" for k in worst[:4])
    more = f" and {len(worst) - 4} more" if len(worst) > 4 else ""
    return [
        "A maximum likelihood fit by Laplace's approximation would differ, in standard errors: "
        f"{'' if converged else 'at least '}{shown}{more}. See report.diagnostics['laplace_params']."
    ]


def about_curvature(curvature: Curvature, names: Sequence[str]) -> list[str]:
    """Of a theta that is not at the maximum, and of noisy standard errors."""
    warnings = []
    away, blur = mean_and_error(curvature.steps)
    deviation = curvature.standard_errors
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
