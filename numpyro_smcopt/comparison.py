# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models beside one another: differences of log evidence with their errors, AIC, BIC, likelihood-ratio tests."""

import math
from collections.abc import Mapping
from typing import NamedTuple

from numpyro_smcopt.evidence import LogEvidence
from numpyro_smcopt.reporting.report import Report


class ComparedModel(NamedTuple):
    """One model of a comparison.

    Attributes:
        name: Its name.
        log_evidence: Its log evidence; at the estimate, if it has parameters.
        difference: That of the best model minus this one's.
        difference_std: Monte Carlo standard deviation of the difference.
        aic: Akaike's criterion; NaN for a model without estimated parameters.
        bic: The Bayesian information criterion; NaN likewise.
    """

    name: str
    log_evidence: float
    difference: float
    difference_std: float
    aic: float
    bic: float


class Comparison(tuple[ComparedModel, ...]):
    """The models, the one with the largest log evidence first; prints as a table."""

    def __repr__(self) -> str:
        width = max([len(model.name) for model in self] + [5])
        lines = [f"{'model':<{width}}  {'log evidence':>12}  {'behind':>9}  {'MC error':>8}  {'AIC':>10}  {'BIC':>10}"]
        for m in self:
            lines.append(
                f"{m.name:<{width}}  {m.log_evidence:>12.3f}  {m.difference:>9.3f}  {m.difference_std:>8.2g}  "
                f"{_criterion(m.aic):>10}  {_criterion(m.bic):>10}"
            )
        return "\n".join(lines)


def compare(models: Mapping[str, Report | LogEvidence]) -> Comparison:
    """Put models of the same data beside one another.

    The log evidence of a Bayesian model (no param sites) is penalised for its complexity; that of a fit is a maximised
    likelihood and is not, so among fits AIC or BIC decide, or `likelihood_ratio_test` where they are nested.

    Args:
        models: Reports, or results of `log_evidence`, by name.

    Raises:
        ValueError: If there is none.
    """
    if not models:
        raise ValueError("compare needs at least one model, got none.")
    best = max(models.values(), key=lambda model: model.log_evidence)
    rows = [
        ComparedModel(
            name,
            model.log_evidence,
            best.log_evidence - model.log_evidence,
            0.0 if model is best else math.hypot(best.log_evidence_std, model.log_evidence_std),
            getattr(model, "aic", math.nan),
            getattr(model, "bic", math.nan),
        )
        for name, model in models.items()
    ]
    return Comparison(sorted(rows, key=lambda row: row.difference))


class LikelihoodRatio(NamedTuple):
    """A likelihood-ratio test.

    Attributes:
        statistic: ``2 (log p_alternative - log p_null)``.
        statistic_std: Its Monte Carlo standard deviation.
        degrees_of_freedom: Difference of the numbers of parameters.
        p_value: Probability of a larger statistic under the null.
    """

    statistic: float
    statistic_std: float
    degrees_of_freedom: int
    p_value: float


def likelihood_ratio_test(null: Report, alternative: Report, num_boundary: int = 0) -> LikelihoodRatio:
    """Test a model against a larger one that contains it.

    A variance component that is zero under the null lies on the boundary of its support, where the statistic is not
    chi-squared: with q of them it is taken as a mixture of chi-squared laws with k - q, ..., k degrees of freedom and
    binomial weights. That is exact for one variance (equal weights of 0 and 1), and for a random slope added to a
    random intercept (a variance and a covariance: k = 2, q = 1, equal weights of 1 and 2); for several variances it
    holds where their estimates are independent (Self and Liang 1987; Stram and Lee 1994).

    Args:
        null: The smaller model.
        alternative: The larger one, fitted to the same data.
        num_boundary: q, how many of the parameters that the larger model adds are zero variances under the null.

    Raises:
        ValueError: If the larger model does not add parameters, or fewer than ``num_boundary``.
    """
    # Parameters at an edge are not counted by a criterion, but the hypotheses are about them, too.
    larger, smaller = (fit.num_parameters + getattr(fit, "num_at_edge", 0) for fit in (alternative, null))
    degrees = larger - smaller
    if degrees < 1:
        raise ValueError(f"The alternative must have more parameters than the null, got {larger} and {smaller}.")
    if not 0 <= num_boundary <= degrees:
        raise ValueError(f"num_boundary must lie between 0 and the {degrees} added parameters, got {num_boundary}.")
    statistic = 2 * (alternative.log_evidence - null.log_evidence)
    std = 2 * math.hypot(alternative.log_evidence_std, null.log_evidence_std)
    weights = [math.comb(num_boundary, j) / 2**num_boundary for j in range(num_boundary + 1)]
    p_value = sum(w * chi_squared_tail(statistic, degrees - num_boundary + j) for j, w in enumerate(weights))
    return LikelihoodRatio(statistic, std, degrees, p_value)


def chi_squared_tail(value: float, degrees: int) -> float:
    """Probability that a chi-squared variable with ``degrees >= 0`` degrees of freedom exceeds ``value``."""
    if value <= 0:
        return 1.0
    if degrees == 0:
        return 0.0
    half = value / 2
    # From one or two degrees upwards, two at a time.
    start = 2 - degrees % 2
    tail = math.erfc(math.sqrt(half)) if start == 1 else math.exp(-half)
    for k in range(start, degrees, 2):
        tail += math.exp(k / 2 * math.log(half) - half - math.lgamma(k / 2 + 1))
    return min(tail, 1.0)


def _criterion(value: float) -> str:
    return "-" if math.isnan(value) else f"{value:.2f}"
