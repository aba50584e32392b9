# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Energies that single precision cannot hold, against closed forms and quadrature.

The Monte Carlo errors are those that are stated, four of them allowed, beside .003 nats for what is exact.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import biject_to, constraints

from numpyro_smcopt import SMCOptimizer, log_evidence
from numpyro_smcopt.potential import make_target
from numpyro_smcopt.potential.log_scale import keep_logarithms
from numpyro_smcopt.reporting.report_texts import about_spacing

log_gamma = np.vectorize(math.lgamma, otypes=[float])


def log_beta(a, b):
    return log_gamma(a) + log_gamma(b) - log_gamma(a + b)


def log_beta_binomial(n, y, a, b):
    """The log probability of y of n successes, whose probability is Beta(a, b)."""
    n, y = np.asarray(n, float), np.asarray(y, float)
    choose = log_gamma(n + 1) - log_gamma(y + 1) - log_gamma(n - y + 1)
    return float(np.sum(choose + log_beta(y + a, n - y + b) - log_beta(a, b)))


def log_gamma_poisson(y, k, rate):
    """The log probability of counts whose means are Gamma(k, rate)."""
    y = np.asarray(y, float)
    odds = k * math.log(rate) - (y + k) * math.log1p(rate)
    return float(np.sum(log_gamma(y + k) - log_gamma(k) - log_gamma(y + 1) + odds))


def binomials(n, y, a=1.0, b=1.0):
    with numpyro.plate("groups", len(y)):
        p = numpyro.sample("p", dist.Beta(a, b))
        numpyro.sample("y", dist.Binomial(n, p), obs=y)


def counts(y, k=1.0, rate=1.0):
    with numpyro.plate("groups", len(y)):
        z = numpyro.sample("z", dist.Gamma(k, rate))
        numpyro.sample("y", dist.Poisson(z), obs=y)


def check(found, exact):
    assert abs(found.log_evidence - exact) < 0.003 + 4 * found.log_evidence_std
    assert found.log_evidence_std < 0.05


INTEGERS = np.int32


@pytest.mark.parametrize(
    "n, y",
    [([5_000_000], [3849]), ([20_000_000], [3849]), ([2000, 2000, 20_000_000, 20_000_000], [1, 20, 3849, 90_000])],
)
def test_binomials_of_millions_have_an_evidence_below_one(n, y):
    n, y = np.array(n, INTEGERS), np.array(y, INTEGERS)
    check(log_evidence(binomials, n, y), -float(np.sum(np.log1p(n.astype(float)))))


@pytest.mark.parametrize("k", [0.005, 0.02, 0.05])
def test_a_rate_may_be_smaller_than_any_number(k):
    y = np.array([0, 0, 3, 0], INTEGERS)
    check(log_evidence(counts, y, k), log_gamma_poisson(y, k, 1.0))


@pytest.mark.parametrize("a, b, y", [(0.1, 0.1, 10), (0.1, 0.1, 0), (0.1, 0.1, 9), (0.5, 0.02, 10)])
def test_neither_end_of_a_probability_is_lost(a, b, y):
    check(log_evidence(binomials, np.array([10]), np.array([y]), a, b), log_beta_binomial(10, y, a, b))


def test_counts_of_ten_millions():
    y = np.array([10_000_000, 10_020_000], INTEGERS)
    check(log_evidence(counts, y, 2.0, 2e-7), log_gamma_poisson(y, 2.0, 2e-7))


def test_negative_binomials_of_ten_millions_without_latents():
    y = np.array([10_000_000, 9_000_000, 12_000_000], INTEGERS)

    def model(y):
        mean = numpyro.param("mean", 1e7, constraint=constraints.positive)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.GammaPoisson(30.0, 30.0 / mean), obs=y)

    optimizer = SMCOptimizer(model)
    state = optimizer.init(random.key(0), y)
    report = optimizer.summarize(random.key(1), state, y)
    mean = float(state.params["mean"])
    assert report.log_evidence == pytest.approx(log_gamma_poisson(y, 30.0, 30.0 / mean), abs=0.003)


def test_a_run_and_its_report():
    n, y = np.array([2000, 2000, 20_000_000, 20_000_000], INTEGERS), np.array([1, 20, 3849, 90_000], INTEGERS)

    def model(n, y):
        a = numpyro.param("a", 1.0, constraint=constraints.positive)
        with numpyro.plate("groups", len(y)):
            p = numpyro.sample("p", dist.Beta(a, 50.0))
            numpyro.sample("y", dist.Binomial(n, p), obs=y)

    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 150, n, y, progress_bar=False)
    exact = log_beta_binomial(n, y, float(result.params["a"]), 50.0)
    assert -float(result.losses[-1]) == pytest.approx(exact, abs=0.5)
    report = optimizer.summarize(random.key(1), result.state, n, y)
    assert abs(report.log_evidence - exact) < 0.003 + 4 * report.log_evidence_std
    assert result.state.blocks.sums.double


def test_binomials_of_millions_with_a_normal_logit():
    n, y = np.array([10_000_000, 8_000_000], INTEGERS), np.array([31_000, 20_000], INTEGERS)

    def model(n, y):
        with numpyro.plate("groups", len(y)):
            x = numpyro.sample("x", dist.Normal(-6.0, 1.0))
            numpyro.sample("y", dist.Binomial(n, logits=x), obs=y)

    def exact(n, y):
        grid = np.linspace(-8, -4, 400_001)
        choose = log_gamma(n + 1) - log_gamma(y + 1) - log_gamma(n - y + 1)
        logs = choose + y * grid - n * np.logaddexp(0, grid) - (grid + 6) ** 2 / 2 - math.log(2 * math.pi) / 2
        return float(np.log(np.sum(np.exp(logs - logs.max())) * (grid[1] - grid[0])) + logs.max())

    check(log_evidence(model, n, y), sum(exact(float(a), float(b)) for a, b in zip(n, y, strict=True)))


def test_one_term_of_many_observations():
    y = np.random.default_rng(0).normal(3.0, 1.0, 200_000).astype(np.float32)

    def model(y):
        z = numpyro.sample("z", dist.Normal(0.0, 10.0))
        numpyro.factor("data", jnp.sum(dist.Normal(z, 1.0).log_prob(y)) - 1e8)

    data = y.astype(float)
    num, mean = len(y), data.mean()
    within = -num / 2 * math.log(2 * math.pi) - np.sum((data - mean) ** 2) / 2 - math.log(num) / 2
    between = math.log(2 * math.pi) / 2 - math.log(2 * math.pi * (100 + 1 / num)) / 2 - mean**2 / (2 * (100 + 1 / num))
    check(log_evidence(model, y), within + between - 1e8)


def test_probabilities_of_categories_that_never_occur():
    y = np.array([7, 0, 0], INTEGERS)
    weights = np.array([0.5, 0.03, 0.03])

    def model(y):
        p = numpyro.sample("p", dist.Dirichlet(jnp.asarray(weights, jnp.float32)))
        numpyro.sample("y", dist.Multinomial(7, p), obs=y)

    total = weights.sum()
    exact = log_gamma(total) - log_gamma(total + 7) + np.sum(log_gamma(weights + y) - log_gamma(weights))
    check(log_evidence(model, y), float(exact))


def test_a_latent_that_single_precision_cannot_tell_apart_is_refused():
    def model(y):
        z = numpyro.sample("z", dist.Normal(1e7, 0.1))
        numpyro.sample("y", dist.Normal(z, 0.1), obs=y)

    with pytest.raises(ValueError, match=r"Latent site 'z' is near 1e\+07.*offset"):
        log_evidence(model, 1e7)


def test_an_estimate_that_is_rounded_more_than_it_is_uncertain_is_named():
    params, deviations = np.float32([1e7, 250.0]), np.array([0.03, 0.03])
    (warning,) = about_spacing(params, deviations, ("mean", "slope"))
    assert warning.startswith(
        "mean is near 1e+07, where numbers of float32 are 1 apart, and its standard error is 0.03"
    )


def test_an_ordinary_model_stays_in_single_precision():
    def model(y):
        mean = numpyro.param("mean", 250.0)
        with numpyro.plate("rows", len(y)):
            z = numpyro.sample("z", dist.Normal(mean, 20.0))
            numpyro.sample("y", dist.Normal(z, 30.0), obs=y)

    y = np.linspace(200, 400, 50).astype(np.float32)
    assert not SMCOptimizer(model).init(random.key(0), y).blocks.sums.double


def test_halves_add_up_to_terms_and_have_their_slopes():
    n, y = np.array([20_000_000], INTEGERS), np.array([3849], INTEGERS)
    target = make_target(binomials, (jnp.asarray(n), jnp.asarray(y)), {})
    x = jnp.array([-8.5])
    single, double = target.terms({}, x), target.in_double().terms({}, x)
    p = 1 / (1 + math.exp(8.5))
    choose = log_gamma(2e7 + 1) - log_gamma(3850) - log_gamma(2e7 - 3849 + 1)
    log_likelihood = float(choose) + 3849 * math.log(p) + (2e7 - 3849) * math.log1p(-p)
    first, second = np.split(np.asarray(double, float), 2)
    position = [name for name, _, _ in target.sites.terms].index("y")
    assert abs(first + second)[position] == pytest.approx(-log_likelihood, rel=1e-10)
    assert abs(float(single[position]) + log_likelihood) > 1


LIMITS = np.float32([-200.0, -30.0, 0.3, 25.0, 60.0])


@pytest.mark.parametrize(
    "function, exact",
    [
        (lambda x: dist.Gamma(0.02, 1.0).log_prob(jnp.exp(x)) + x, lambda x: 0.02 * x - np.exp(x) - log_gamma(0.02)),
        (lambda x: dist.Poisson(jnp.exp(x)).log_prob(3), lambda x: 3 * x - np.exp(x) - math.log(6)),
        (
            lambda x: dist.Beta(0.1, 0.1).log_prob(biject_to(constraints.unit_interval)(x)),
            lambda x: 0.9 * (np.logaddexp(0, x) + np.logaddexp(0, -x)) - log_beta(0.1, 0.1),
        ),
        (
            lambda x: dist.Binomial(10, biject_to(constraints.unit_interval)(x)).log_prob(9),
            lambda x: math.log(10) - 9 * np.logaddexp(0, -x) - np.logaddexp(0, x),
        ),
        (
            lambda x: jnp.log(3.0 * jnp.exp(x) ** 2 / (1.0 + jnp.exp(x))),
            lambda x: math.log(3) + 2 * x - np.logaddexp(0, x),
        ),
    ],
)
def test_logarithms_of_what_is_too_small_or_too_near_one(function, exact):
    with numpyro.validation_enabled(False):
        found = keep_logarithms(function, jnp.asarray(LIMITS))
        slopes = jax.vmap(jax.grad(lambda x: keep_logarithms(function, x)))(jnp.asarray(LIMITS))
    values = LIMITS.astype(float)
    np.testing.assert_allclose(found, exact(values), rtol=2e-6, atol=2e-6)
    steps = (exact(values + 1e-4) - exact(values - 1e-4)) / 2e-4
    np.testing.assert_allclose(slopes, steps, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "prior",
    [dist.Gamma(0.02, 2.0), dist.InverseGamma(0.02, 1.0), dist.Beta(0.02, 0.05), dist.LogNormal(0.0, 80.0)],
    ids=lambda prior: type(prior).__name__,
)
def test_draws_from_a_prior_reach_as_far_as_it_does(prior):
    target = make_target(lambda: numpyro.sample("z", prior), (), {})
    x = np.asarray(jax.vmap(lambda key: target.draw_prior(key, {}))(random.split(random.key(1), 4000)), float)[:, 0]
    assert np.all(np.isfinite(x))
    grid = np.linspace(-2000, 2000, 40_001)
    density = np.exp(-np.asarray(jax.vmap(lambda one: target.terms({}, one).sum())(jnp.float32(grid)[:, None]), float))
    masses = np.cumsum(density) * (grid[1] - grid[0])
    assert masses[-1] == pytest.approx(1.0, abs=0.01)
    shares = np.interp(np.quantile(x, [0.1, 0.5, 0.9]), grid, masses)
    np.testing.assert_allclose(shares, [0.1, 0.5, 0.9], atol=0.03)
