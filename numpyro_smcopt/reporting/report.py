# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The report of a fit: estimates with their errors, log evidence, samples, diagnostics. Plain data on the host."""

import dataclasses
import math
from statistics import NormalDist
from typing import Any

import jax
import numpy as np
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint

from numpyro_smcopt.reporting.boundaries import Boundary
from numpyro_smcopt.reporting.coordinates import acts_elementwise, ravel, unravel
from numpyro_smcopt.types import Array, Params, Theta

FAR_FROM_MAXIMUM = 0.05  # standard errors, from which on it is of interest whether the distance is noise
DRAWS = 20_000  # for intervals of parameters whose transform mixes coordinates


@dataclasses.dataclass(frozen=True)
class Report:
    """The report that `summarize` returns.

    Attributes:
        params: The estimate, constrained; NumPy arrays.
        standard_errors: Like ``params``: standard errors on the constrained scale, by the delta method. NaN where a
            parameter is not identified or lies on the boundary of its support.
        covariance: [Q, Q] of the constrained parameters, in the order of ``names``; NaN in the same places.
        mc_errors: Like ``params``: how far the estimate is from the exact maximum, as a root mean square, rounding
            included. This is the error of the computation, which more updates remove; the standard errors are those
            of the data.
        names: [Q] ``"beta[0]"`` and so on, the coordinates of ``params`` in the order of ``covariance``.
        log_evidence: Log marginal likelihood at the estimate.
        log_evidence_std: Its Monte Carlo standard deviation.
        num_parameters: Free parameters; directions that are not identified, or lead to a boundary, left out.
        num_observations: Batch elements of the observed sites.
        samples: Latent and deterministic sites at the estimate, [S, ...] each.
        log_weights: [S] normalised log weights of the samples; equal where the latents fall into several blocks.
        ess: Effective number of independent draws behind the report, in the worst block.
        diagnostics: Numbers behind the warnings. ``score_z``, like ``theta``: the score at the estimate over its error,
            that of Monte Carlo and of rounding. ``distance``, like ``theta``: the way from the estimate to the maximum,
            in standard errors. ``standard_error_noise``, like ``theta``: relative Monte Carlo error of the standard
            errors. ``laplace_log_evidence``: Laplace's approximation of ``log_evidence``; NaN if there is none.
            ``laplace_params``, like ``params``: where maximum likelihood by Laplace's approximation ends, and
            ``laplace_distance``, like ``theta``: how far that is from the estimate, in standard errors; NaN if there is
            no such fit. ``laplace_fit`` says what they are: ``"maximum"``; ``"still rising"`` if none was found nearby;
            or ``"none: "`` and the reason. ``pareto_k``: tail index of the importance weights in the worst block; NaN
            if there are none, minus infinity without a tail. ``tempered``: whether populations were tempered instead;
            then ``unique_ancestors`` counts the first draws that have descendants, in the worst block of the worst
            population, and ``acceptance_rate`` is that of the last moves.
        warnings: What is wrong or special, and what to do about it.
        theta: The estimate, unconstrained.
        theta_covariance: [P, P] covariance of the flat ``theta``.
        constraints: Constraint of each param site.
        boundaries: What lies on the boundary of its support or at infinity, by name: coordinates of ``params``, and
            differences, correlations and standard deviations, as ``"correlation L[1,0]"``.
        sandwich_covariance: [Q, Q] robust covariance ``I^-1 (sum_u s_u s_u^T) I^-1``, if it was asked for: the units u
            are the independent blocks, and the observations that depend on no latent (Huber 1967; White 1982).
        num_at_edge: Directions of theta that lead to a boundary or to infinity.
    """

    params: Params
    standard_errors: Params
    covariance: np.ndarray
    mc_errors: Params
    names: tuple[str, ...]
    log_evidence: float
    log_evidence_std: float
    num_parameters: int
    num_observations: int
    samples: dict[str, Array]
    log_weights: Array
    ess: float
    diagnostics: dict[str, Any]
    warnings: tuple[str, ...]
    theta: Theta
    theta_covariance: np.ndarray
    constraints: dict[str, Constraint]
    boundaries: dict[str, Boundary]
    sandwich_covariance: np.ndarray | None = None
    num_at_edge: int = 0

    @property
    def sandwich_standard_errors(self) -> Params:
        """Like ``standard_errors``, but right also where the model is not, given many independent units.

        Raises:
            ValueError: If the report was made without ``sandwich=True``.
        """
        if self.sandwich_covariance is None:
            raise ValueError("Ask for robust errors: summarize(..., sandwich=True).")
        return unravel(np.sqrt(np.diag(self.sandwich_covariance)), self.params)

    @property
    def aic(self) -> float:
        """``-2 log p + 2 k``; smaller is better."""
        return -2 * self.log_evidence + 2 * self.num_parameters

    @property
    def bic(self) -> float:
        """``-2 log p + k log n``, n being the number of observations; smaller is better.

        NaN if the data enter by `numpyro.factor` alone, where nothing can be counted.
        """
        if not self.num_observations:
            return math.nan
        return -2 * self.log_evidence + self.num_parameters * math.log(self.num_observations)

    def confidence_intervals(self, level: float = 0.95) -> Params:
        """Intervals like ``params``, each leaf [..., 2]: built on the unconstrained scale, where the likelihood is
        closest to a Gaussian, and mapped back, so they respect the support.

        A parameter on the boundary gets the one-sided interval that starts there; one that is not identified NaN.

        Args:
            level: Coverage, between 0 and 1.

        Raises:
            ValueError: If ``level`` is not between 0 and 1.
        """
        if not 0.0 < level < 1.0:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}.")
        flat = ravel(self.theta)
        variance = np.diag(self.theta_covariance)
        width = NormalDist().inv_cdf((1 + level) / 2) * np.sqrt(np.where(variance > 0, variance, np.nan))
        low, high = (unravel(end, self.theta) for end in (flat - width, flat + width))
        draws = np.random.default_rng(0).multivariate_normal(flat, self.theta_covariance, DRAWS, method="eigh")
        draws = jax.tree.map(lambda v: np.moveaxis(v, -1, 0), unravel(draws.T, self.theta))
        tails = [(1 - level) / 2, (1 + level) / 2]
        intervals = {}
        for name, constraint in self.constraints.items():
            transform = biject_to(constraint)
            if acts_elementwise(constraint):
                ends = [jax.tree.map(transform, end[name]) for end in (low, high)]
                # A decreasing transform swaps the ends.
                both = jax.tree.map(lambda a, b: np.sort(np.stack([a, b], -1), -1), *ends)
            else:
                both = jax.tree.map(lambda v, t=transform: np.moveaxis(np.quantile(t(v), tails, 0), 0, -1), draws[name])
            intervals[name] = both
        flat_ends = ravel(intervals, 2)
        flat_ends[~np.isfinite(ravel(self.standard_errors))] = np.nan
        for k, name in enumerate(self.names):
            if name in self.boundaries:
                flat_ends[k] = self.boundaries[name].interval(level)
        return unravel(flat_ends, self.params)

    def print_summary(self, level: float = 0.95) -> None:
        """Print estimates with errors and intervals, the log evidence, and what is to be known about them.

        Args:
            level: Coverage of the intervals.
        """
        print(self.to_text(level))

    def to_text(self, level: float = 0.95) -> str:
        """The text that `print_summary` prints."""
        tail = 50 * (1 - level)
        header = ["", "estimate", "std. error", "MC error", f"{tail:.1f}%", f"{100 - tail:.1f}%"]
        columns = [ravel(v) for v in (self.params, self.standard_errors, self.mc_errors)]
        ends = ravel(self.confidence_intervals(level), 2)
        rows = [[name, *values] for name, *values in zip(self.names, *columns, *ends.T, strict=True)]
        texts = [header] + [[row[0], *(_number(v, row[2]) for v in row[1:])] for row in rows]
        widths = [max(len(text[k]) for text in texts) for k in range(len(header))]
        lines = ["", *("  ".join(f"{v:>{w}}" for v, w in zip(text, widths, strict=True)) for text in texts)]
        counted = f"BIC {self.bic:.2f}   " if self.num_observations else ""
        lines += [
            "",
            f"log evidence  {self.log_evidence:.3f} (MC error {self.log_evidence_std:.2g})",
            f"AIC {self.aic:.2f}   {counted}{self.num_parameters} parameters, "
            f"{self.num_observations} observations, {self.ess:.0f} effective draws",
            *self._checks(),
        ]
        lines += [f"Note: {warning}" for warning in self.warnings]
        return "\n".join(lines)

    def _checks(self) -> list[str]:
        """A line: is theta at the maximum, and did the draws suffice?"""
        about, parts = self.diagnostics, []
        distance, score_z = ravel(about["distance"]), ravel(about["score_z"])
        if np.any(np.isfinite(distance)):
            k = int(np.nanargmax(np.abs(distance)))
            # A distance that does not matter is not made alarming by being known exactly.
            beyond = f" (score z {score_z[k]:.1f})" if abs(distance[k]) > FAR_FROM_MAXIMUM else ""
            parts.append(f"{abs(distance[k]):.1g} standard errors from the maximum{beyond}")
        if np.isfinite(self.ess) and np.isfinite(about["laplace_log_evidence"]):
            parts.append(f"Laplace approximation {about['laplace_log_evidence']:.3f}")
        if about["tempered"]:
            parts.append(f"tempered, {about['unique_ancestors']:.0f} unique ancestors")
        elif np.isfinite(about["pareto_k"]):
            parts.append(f"Pareto k {about['pareto_k']:.2f}")
        return ["   ".join(parts)] if parts else []


def _number(value: float, scale: float) -> str:
    """Three digits of the standard error, or four of the value."""
    if not np.isfinite(value):
        return "-" if np.isnan(value) else f"{value}"
    size = scale if np.isfinite(scale) and scale > 0 else abs(value)
    digits = int(np.clip(2 - np.floor(np.log10(size)), 0, 8)) if size > 0 else 2
    return f"{value:.{digits}f}"
