# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Log evidence against closed forms and quadrature, with the errors that it states."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from clouds import z_score
from jax import random
from oracles import cauchy_prior, exact_cauchy, exact_regression, regression
from scipy import stats

from numpyro_smcopt import log_evidence
from numpyro_smcopt.reporting import proposal_mixture, replicates, report_texts
from numpyro_smcopt.reporting.effort import TEMPERED_REPLICATES

pytestmark = pytest.mark.slow

SEEDS = range(10)
STANDARD_ERRORS = 4.0
# As improbable where the standard error is that of so few independent populations
TEMPERED_ERRORS = stats.t(TEMPERED_REPLICATES - 1).isf(stats.norm.sf(STANDARD_ERRORS))


def shifted_regression(x, y, location, scale, shift):
    regression(x, y, location, scale)
    numpyro.factor("shift", shift)


def regression_data(num_coefficients):
    rng = np.random.default_rng(1)
    x = rng.normal(size=(100, num_coefficients))
    x[:, 0] = 1.0
    beta = np.array([0.3, 1.0, -0.2, 0.5, -1.0]) if num_coefficients == 5 else rng.normal(size=num_coefficients)
    return x, x @ beta + rng.normal(size=100)


def two_modes(num, sd):
    x = numpyro.sample("x", dist.Normal(0.0, 3.0).expand([num]).to_event(1))
    log_densities = [dist.Normal(mode, sd).log_prob(x).sum() for mode in (3.0, -3.0)]
    numpyro.factor("likelihood", jnp.logaddexp(*log_densities) - np.log(2.0))


def exact_two_modes(num, sd):
    return num * stats.norm(0.0, np.sqrt(9.0 + sd**2)).logpdf(3.0)


def estimates(model, *args, num_particles=1000, seeds=SEEDS):
    found = [log_evidence(model, *args, rng_key=random.key(seed), num_particles=num_particles) for seed in seeds]
    return found, np.array([f.log_evidence for f in found]), np.array([f.log_evidence_std for f in found])


def test_first_number_of_the_bank_of_peers():
    """The regression on which peers were measured: log evidence -167.9057."""
    assert exact_regression(*regression_data(5), 0.0, 3.0) == pytest.approx(-167.9057, abs=1e-4)


@pytest.mark.parametrize("location, scale", [(0.0, 3.0), (10.0, 1.0)], ids=["centred prior", "off-centre prior"])
def test_gaussian_posterior_has_no_monte_carlo_error(location, scale):
    x, y = regression_data(5)
    found, values, errors = estimates(regression, x, y, location, scale)
    np.testing.assert_allclose(values, exact_regression(x, y, location, scale), atol=2e-3)
    assert np.all(errors < 1e-3)
    assert all(f.num_particles == 1152 for f in found)


def test_fifty_coefficients():
    x, y = regression_data(50)
    _, values, errors = estimates(regression, x, y, 0.0, 3.0, seeds=range(3))
    np.testing.assert_allclose(values, exact_regression(x, y, 0.0, 3.0), atol=5e-3)
    assert np.all(errors < 5e-3)


def test_blocks_of_different_widths():
    """Schools with one to twelve classes; a block is padded to the width of the largest."""
    school = np.repeat(np.arange(4), [1, 2, 4, 12])
    y = np.random.default_rng(2).normal(size=len(school)) + np.array([1.0, -2.0, 0.5, 0.0])[school]

    def nested(y):
        with numpyro.plate("schools", 4):
            u = numpyro.sample("u", dist.Normal(0.0, 1.5))
        with numpyro.plate("classes", len(school)):
            v = numpyro.sample("v", dist.Normal(u[school], 0.5))
            numpyro.sample("y", dist.Normal(v, 0.7), obs=y)

    covariance = 2.25 * (school[:, None] == school) + (0.25 + 0.49) * np.eye(len(school))
    exact = stats.multivariate_normal(np.zeros(len(school)), covariance).logpdf(y)
    assert log_evidence(nested, y, num_particles=1000).log_evidence == pytest.approx(exact, abs=2e-3)


def test_a_constant_factor_shifts_the_evidence_by_itself():
    x, y = regression_data(5)
    for shift in (-1000.0, 140.0):
        found = log_evidence(shifted_regression, x, y, 0.0, 3.0, shift, num_particles=1000)
        assert found.log_evidence - shift == pytest.approx(exact_regression(x, y, 0.0, 3.0), abs=2e-3)


def test_heavy_tailed_prior():
    y = np.array([2.0, 3.5, 1.0, 4.0])
    _, values, errors = estimates(cauchy_prior, y)
    deviations = values - exact_cauchy(y)
    assert np.sqrt(np.mean(deviations**2)) < 0.01
    assert np.all(abs(deviations) < STANDARD_ERRORS * errors + 1e-4)


def test_two_modes_are_both_found():
    found, values, errors = estimates(two_modes, 2, 0.3)
    # Few draws hit the second mode, which shows in the tail of their weights.
    assert all(f.tempered and f.num_particles == 3072 for f in found)  # more than the 1,000 that were asked for
    deviations = values - exact_two_modes(2, 0.3)
    assert np.sqrt(np.mean(deviations**2)) < 0.1
    assert np.all(abs(deviations) < TEMPERED_ERRORS * errors), deviations / errors
    # The spread is what is stated: chi-squared limits that a right statement exceeds once in 10,000 times
    spread = np.sum((deviations - deviations.mean()) ** 2) / np.mean(errors**2)
    assert stats.chi2(len(SEEDS) - 1).ppf(5e-5) < spread < stats.chi2(len(SEEDS) - 1).isf(5e-5)
    # Both modes in the right proportion, by weight
    share = [np.sum(np.exp(f.log_weights)[f.samples["x"][:, 0] > 0]) for f in found]
    assert abs(np.mean(share) - 0.5) < 0.1
    # A Laplace approximation sees one of them.
    assert np.mean([f.laplace for f in found]) == pytest.approx(exact_two_modes(2, 0.3) - np.log(2.0), abs=0.05)


def test_tempered_populations_are_as_many_as_were_asked_for(monkeypatch):
    monkeypatch.setattr(replicates, "FEWEST_EFFECTIVE", np.inf)
    for asked, used in ((3000, 3072), (6000, 6144)):
        found = log_evidence(two_modes, 2, 0.3, num_particles=asked)
        assert found.tempered and found.num_particles == used
        assert abs(found.log_evidence - exact_two_modes(2, 0.3)) < TEMPERED_ERRORS * found.log_evidence_std


@pytest.mark.parametrize("missed", [False, True], ids=["from the mixture", "from the prior"])
def test_tempering_where_the_mixture_does_not_suffice(monkeypatch, missed):
    if missed:
        monkeypatch.setattr(replicates, "MISSED", 0.0)  # the mixture is never believed
    else:
        monkeypatch.setattr(replicates, "FEWEST_EFFECTIVE", np.inf)
    found, values, errors = estimates(two_modes, 2, 0.3, seeds=range(8))
    assert all(f.tempered for f in found)
    deviations = values - exact_two_modes(2, 0.3)
    assert np.sqrt(np.mean(deviations**2)) < 0.15
    assert np.all(abs(deviations) < TEMPERED_ERRORS * errors), deviations / errors
    for f in found:
        np.testing.assert_allclose(f.log_weights, -np.log(len(f.log_weights)), rtol=1e-5)
        assert np.std(abs(f.samples["x"]) - 3.0) == pytest.approx(0.3, rel=0.1)
    assert abs(np.mean([np.mean(f.samples["x"][:, 0] > 0) for f in found]) - 0.5) < 0.1


def moments(weight, ratio):
    """What `replicates.weigh_replicates` sums up, from weights [R, N, B] and ratios [R, N, B, C - 1]."""
    v = np.concatenate([np.ones_like(weight)[..., None], weight[..., None], ratio], -1)
    return np.einsum("rnbi,rnbj->rbij", v, v) / v.shape[1]


def test_a_mode_that_the_mixture_misses_is_noticed():
    """Particles of the posterior lie where the mixture hardly goes: they would weigh too much."""
    rng = np.random.default_rng(0)
    weight = np.exp(0.1 * rng.standard_normal((8, 192, 1)))
    found = moments(weight, np.zeros((8, 192, 1, 3)))
    probes = np.full((50, 1), -np.log(50))
    inside, outside = np.zeros((50, 1)), np.where(np.arange(50) < 40, 0.0, 8.0)[:, None]
    assert replicates.combine_weighed(found, inside, probes).trustworthy
    assert not replicates.combine_weighed(found, outside, probes).trustworthy


def test_draws_of_the_mixture_are_independent_across_coordinates():
    """Each draw has the right joint law: a lattice that is shifted too little does not."""
    uniforms = jnp.asarray(np.random.default_rng(0).uniform(size=(4000, 2, 4)), jnp.float32)
    draws = np.asarray(jax.vmap(lambda u: proposal_mixture._lattice(u, 16))(uniforms))  # [4000, 16, 4]
    for values in (draws[:, 0], draws[:, 5]):
        products = np.stack([values[:, i] * values[:, j] for i in range(4) for j in range(i)], 1)
        assert np.all(abs(z_score(products, 0.0)) < STANDARD_ERRORS)
        assert stats.kstest(values.ravel(), "norm").pvalue > 1e-3
    # One coordinate by itself is covered evenly: independent draws would have 0.25 here.
    assert draws.mean(1).std() < 0.12


def test_params_are_required_and_checked():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(mean, 1.0)), 1.0), obs=y)

    with pytest.raises(ValueError, match=r"lacks \['mean'\]"):
        log_evidence(model, 1.0)
    with pytest.raises(ValueError, match="no param sites"):
        log_evidence(model, 1.0, params={"mean": 0.0, "typo": 1.0})
    found = log_evidence(model, 1.0, params={"mean": 0.5}, num_particles=1000)
    assert found.log_evidence == pytest.approx(stats.norm(0.5, np.sqrt(2.0)).logpdf(1.0), abs=1e-4)


def test_no_latents():
    def model(y):
        numpyro.sample("y", dist.Normal(0.5, 1.0).expand([3]).to_event(1), obs=y)

    y = np.array([0.0, 1.0, 2.0])
    found = log_evidence(model, y)
    assert found.log_evidence == pytest.approx(stats.norm(0.5, 1.0).logpdf(y).sum(), abs=1e-5)
    assert found.log_evidence_std == 0.0


def test_slopes_of_other_replicates_leave_no_bias():
    """Cross-fitting: with few replicates and a noisy slope the mean over many repetitions is right."""
    rng = np.random.default_rng(0)
    num, draws = 20_000, 12

    # w = 1 + r_0 + 0.3 r_1 + noise, r of mean zero. The blocks of one call are the repetitions.
    ratio = rng.exponential(size=(4, draws, num, 3)) - 1
    weight = 1 + ratio[..., 0] + 0.3 * ratio[..., 1] + 0.1 * rng.standard_normal((4, draws, num))
    found = replicates.combine_weighed(moments(weight, ratio), np.zeros((1, num)), np.zeros((1, num)))
    estimate = np.exp(found.log_evidence)
    assert abs(estimate.mean() - 1.0) < STANDARD_ERRORS * estimate.std() / np.sqrt(num)
    assert estimate.std() < 0.5 * weight.mean((0, 1)).std()


def test_a_key_gives_the_same_answer_and_another_key_another():
    y = np.array([2.0, 3.5, 1.0, 4.0])
    first, again, other = (log_evidence(cauchy_prior, y, rng_key=random.key(k), num_particles=1000) for k in (1, 1, 2))
    assert first.log_evidence == again.log_evidence != other.log_evidence


def test_few_draws_are_said(monkeypatch):
    monkeypatch.setattr(report_texts, "FEW_DRAWS", 1e9)
    with pytest.warns(UserWarning, match="effective draws in the worst block"):
        log_evidence(cauchy_prior, np.array([2.0, 3.5, 1.0, 4.0]), num_particles=1000)
