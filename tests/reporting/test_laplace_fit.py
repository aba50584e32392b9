# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood by Laplace's approximation, beside ours: against an optimiser and quadrature written here."""

import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy import optimize
from scipy.special import expit, logsumexp

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.reporting.laplace_fit import FURTHEST, LaplacePoint, laplace_fit, no_laplace

pytestmark = pytest.mark.slow

GROUPS, SIZE = 150, 3


def binary_groups(successes):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", len(successes)):
        b = numpyro.sample("b", dist.Normal(0.0, sd))
        numpyro.sample("successes", dist.Binomial(SIZE, logits=mean + b), obs=successes)


def joint(b, flat, y):
    """Log density of groups up to a constant: [..., G] for b [..., G]; flat holds mean and log sd."""
    eta = flat[0] + b
    return y * eta - SIZE * np.logaddexp(0.0, eta) - 0.5 * b**2 * np.exp(-2 * flat[1]) - flat[1]


def laplace_loss(flat, y):
    precision, b = np.exp(-2 * flat[1]), np.zeros(len(y))
    for _ in range(50):
        share = expit(flat[0] + b)
        curvature = SIZE * share * (1 - share) + precision
        b = b + (y - SIZE * share - precision * b) / curvature
    share = expit(flat[0] + b)
    return -np.sum(joint(b, flat, y) - 0.5 * np.log(SIZE * share * (1 - share) + precision))


def exact_loss(flat, y):
    nodes, weights = np.polynomial.hermite_e.hermegauss(60)
    b = np.exp(flat[1]) * nodes[:, None]
    prior = -0.5 * nodes[:, None] ** 2 - flat[1]
    return -np.sum(logsumexp(joint(b, flat, y) - prior, 0, weights[:, None]))


@pytest.fixture(scope="module")
def fitted():
    rng = np.random.default_rng(0)
    y = rng.binomial(SIZE, expit(0.5 + 2.0 * rng.standard_normal(GROUPS))).astype(np.float32)
    optimizer = SMCOptimizer(binary_groups)
    result = optimizer.run(random.key(0), 200, y, progress_bar=False)
    return y, optimizer, result, optimizer.summarize(random.key(1), result.state)


def test_few_binary_observations_per_group_are_where_laplace_is_wrong(fitted, compilations):
    y, optimizer, result, report = fitted
    exact, laplace = (optimize.minimize(loss, [0.0, 0.5], (y,), tol=1e-10).x for loss in (exact_loss, laplace_loss))
    errors = np.sqrt(np.diag(report.theta_covariance))
    found = np.array([report.params["mean"], np.log(report.params["sd"])])
    assert np.all(abs(found - exact) < 0.05 * errors)
    by_laplace = report.diagnostics["laplace_params"]
    flat = np.array([by_laplace["mean"], np.log(by_laplace["sd"])])
    assert np.all(abs(flat - laplace) < 0.02 * errors), (flat, laplace)
    assert report.diagnostics["laplace_fit"] == "maximum"
    away = (laplace - exact) / errors
    assert away[1] < -0.6  # so that it should be said
    assert report.diagnostics["laplace_distance"]["sd"] == pytest.approx(away[1], abs=0.07)
    (note,) = (w for w in report.warnings if "fit by Laplace's approximation would differ" in w)
    assert f"sd by {report.diagnostics['laplace_distance']['sd']:+.1f}" in note and note in report.to_text()
    assert ("mean by" in note) == (abs(away[0]) > 0.5)
    with compilations() as seen:
        optimizer.summarize(random.key(2), result.state)
    assert seen == []


def test_the_walk():
    """A function that is no parabola; one that has no minimum; one that cannot be evaluated."""

    def point(theta):
        a, b = theta
        return LaplacePoint(
            theta,
            np.array([np.exp(a) - a, np.cosh(b - 3.0)]),
            np.array([0.0]),
            np.array([np.exp(a) - 1, np.sinh(b - 3.0)]),
        )

    theta, converged = laplace_fit(point(np.array([-2.0, 0.5])), np.diag([1.0, 0.2]), point)
    assert converged
    np.testing.assert_allclose(theta, [0.0, 3.0], atol=0.02)
    held, _ = laplace_fit(point(np.array([-2.0, 0.5])), np.diag([1.0, 0.0]), point)
    np.testing.assert_allclose(held, [0.0, 0.5], atol=0.02)

    slope = lambda theta: LaplacePoint(theta, np.exp(theta), np.array([0.0]), np.exp(theta))  # noqa: E731
    endless, converged = laplace_fit(slope(np.zeros(1)), np.eye(1), slope)
    assert not converged and -FURTHEST < endless[0] < -1.0
    stuck, converged = laplace_fit(slope(np.zeros(1)), np.eye(1), lambda theta: no_laplace("no mode"))
    assert not converged and stuck[0] == 0.0
