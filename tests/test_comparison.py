# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Comparisons of models, against SciPy and by simulation of the boundary law."""

import math
import types

import numpy as np
import pytest
from scipy import stats

from numpyro_smcopt import LogEvidence, compare, likelihood_ratio_test
from numpyro_smcopt.comparison import chi_squared_tail


def bayesian(log_evidence, std):
    return LogEvidence(log_evidence, std, {}, np.zeros(1), 1.0, math.nan, False, 0)


def fit(log_evidence, num_parameters, std=0.01):
    return types.SimpleNamespace(log_evidence=log_evidence, log_evidence_std=std, num_parameters=num_parameters)


def test_tail_of_chi_squared():
    for degrees in range(1, 12):
        for value in (1e-3, 0.5, 3.84, 20.0, 200.0):
            expected = stats.chi2.sf(value, degrees)
            assert chi_squared_tail(value, degrees) == pytest.approx(expected, rel=1e-10)
    assert chi_squared_tail(0.0, 1) == chi_squared_tail(-1.0, 3) == 1.0
    assert chi_squared_tail(1e-9, 0) == 0.0


def test_models_are_sorted_and_differences_carry_their_errors():
    table = compare({"small": bayesian(-12.0, 0.03), "large": bayesian(-10.0, 0.04), "third": bayesian(-11.0, 0.0)})
    assert [row.name for row in table] == ["large", "third", "small"]
    assert [row.difference for row in table] == [0.0, 1.0, 2.0]
    assert [row.difference_std for row in table] == pytest.approx([0.0, 0.04, 0.05])
    assert all(math.isnan(row.aic) for row in table)
    assert "large" in repr(table) and "-10.000" in repr(table)
    with pytest.raises(ValueError, match="at least one model"):
        compare({})


def test_likelihood_ratio_against_chi_squared():
    found = likelihood_ratio_test(fit(-100.0, 3), fit(-97.0, 5))
    assert found.statistic == pytest.approx(6.0) and found.degrees_of_freedom == 2
    assert found.p_value == pytest.approx(stats.chi2.sf(6.0, 2))
    assert found.statistic_std == pytest.approx(2 * math.hypot(0.01, 0.01))


def test_boundary_weights():
    one = likelihood_ratio_test(fit(-100.0, 3), fit(-98.0, 4), num_boundary=1)
    assert one.p_value == pytest.approx(stats.chi2.sf(4.0, 1) / 2)
    slope = likelihood_ratio_test(fit(-100.0, 3), fit(-98.0, 5), num_boundary=1)
    assert slope.p_value == pytest.approx((stats.chi2.sf(4.0, 1) + stats.chi2.sf(4.0, 2)) / 2)
    # Two independent variances: the statistic is a sum of squares of what is positive.
    draws = np.maximum(np.random.default_rng(0).standard_normal((200_000, 2)), 0.0)
    two = likelihood_ratio_test(fit(-100.0, 3), fit(-98.0, 5), num_boundary=2)
    exceeded = np.mean((draws**2).sum(1) > 4.0)
    assert two.p_value == pytest.approx(exceeded, abs=4 * np.sqrt(exceeded / 200_000))


def test_what_cannot_be_tested_is_refused():
    with pytest.raises(ValueError, match="must have more parameters"):
        likelihood_ratio_test(fit(-1.0, 3), fit(-1.0, 3))
    with pytest.raises(ValueError, match="num_boundary must lie between 0 and the 1 added"):
        likelihood_ratio_test(fit(-1.0, 3), fit(-1.0, 4), num_boundary=2)
