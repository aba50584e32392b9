# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maxima at infinity or on an edge, against likelihoods that SciPy computes: named, not counted, with an interval."""

import warnings

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy import optimize, special, stats

from numpyro_smcopt import SMCOptimizer

ONE_SIDED = stats.norm.ppf(0.95) ** 2 / 2  # nats that the profile falls to the end of an interval
positive = constraints.positive
param = numpyro.param


def report_of(model, *data, num_steps=150):
    optimizer = SMCOptimizer(model)
    with warnings.catch_warnings():
        # What a run that goes to an edge may say of itself is not at issue here.
        warnings.filterwarnings(
            "ignore", "theta was still|.* updates were refused|The likelihood has sev|The particles hardly"
        )
        result = optimizer.run(random.key(0), num_steps, *data, progress_bar=False)
    return optimizer.summarize(random.key(1), result.state)


def profile_end(loss, supremum, start, bracket):
    """Where ``min_rest loss(value, rest)`` exceeds its infimum ``-supremum`` by as much as an interval allows."""
    rest = lambda value: optimize.minimize(lambda r: loss(value, r), start, method="Nelder-Mead").fun  # noqa: E731
    return optimize.brentq(lambda value: rest(value) + supremum - ONE_SIDED, *bracket, xtol=1e-3)


def logistic(x, y):
    intercept, slope = param("intercept", 0.0), param("slope", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=intercept + slope * x), obs=y)


def logistic_loss(intercept, slope, x, y):
    logits = intercept + slope * x
    return np.sum(np.logaddexp(0, logits) - y * logits)


@pytest.mark.parametrize("unit", [1.0, 1e-5])
def test_a_dummy_of_one_row(unit):
    rng = np.random.default_rng(0)
    x, y = np.zeros(40), (rng.uniform(size=40) < 0.4) * 1.0
    x[3], y[3] = unit, 1.0
    report = report_of(logistic, x, y)
    others = np.delete(y, 3).mean()
    supremum = np.sum(stats.bernoulli(others).logpmf(np.delete(y, 3).astype(int)))
    assert list(report.boundaries) == ["slope"] and report.boundaries["slope"].bound == np.inf
    assert report.num_parameters == 1 and np.isnan(report.standard_errors["slope"])
    assert any("slope -> +infinity" in note for note in report.warnings)
    assert report.log_evidence == pytest.approx(supremum, abs=1e-3)
    assert report.standard_errors["intercept"] == pytest.approx((39 * others * (1 - others)) ** -0.5, rel=0.01)
    loss = lambda slope, rest: logistic_loss(rest[0], slope * unit, x / unit, y)  # noqa: E731
    end = profile_end(lambda s, r: loss(s / unit, r), supremum, [0.0], (-5.0, 10.0)) / unit
    low, high = report.confidence_intervals()["slope"]
    assert low == pytest.approx(end, abs=0.03 / unit) and high == np.inf


def test_complete_separation_by_a_year():
    rng = np.random.default_rng(1)
    year = np.sort(rng.uniform(1980, 2010, 30)).round(2)
    y = (year > year[14]) * 1.0
    report = report_of(logistic, year, y)
    bounds = {name: boundary.bound for name, boundary in report.boundaries.items()}
    assert bounds == {"intercept": -np.inf, "slope": np.inf} and -0.1 < report.log_evidence <= 0.0
    centred = year - year.mean()
    end = profile_end(lambda s, r: logistic_loss(r[0], s, centred, y), 0.0, [0.0], (0.05, 20.0))
    assert report.confidence_intervals()["slope"][0] == pytest.approx(end, rel=0.05)


def test_an_ordinary_null_effect_is_none():
    x = 1e7 * np.repeat([-1.0, 1.0], 20)
    y = np.tile([0.0, 1.0], 20)
    report = report_of(logistic, x, y)
    assert not report.boundaries and report.num_parameters == 2


def zero_inflated(y, way):
    gate = param("gate", jnp.array([0.5, 0.5]), constraint=constraints.simplex) if way == "simplex" else None
    gate = param("gate", 0.5, constraint=constraints.unit_interval) if gate is None else gate[0]
    rate = param("rate", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.ZeroInflatedPoisson(gate, rate), obs=y)


@pytest.mark.parametrize("way", ["simplex", "unit_interval"])
def test_zero_inflation_without_excess_zeros(way):
    y = np.maximum(np.random.default_rng(3).poisson(3.0, 60), 1)
    y[:2] = 0
    report = report_of(zero_inflated, y, way)
    supremum = stats.poisson(y.mean()).logpmf(y).sum()

    def loss(gate, rest):
        rate = np.exp(rest[0])
        zeros = np.log(gate + (1 - gate) * np.exp(-rate))
        return -np.where(y == 0, zeros, np.log1p(-gate) + stats.poisson(rate).logpmf(y)).sum()

    end = profile_end(loss, supremum, [np.log(y.mean())], (1e-6, 0.5))
    first = "gate[0]" if way == "simplex" else "gate"
    bounds = {name: boundary.bound for name, boundary in report.boundaries.items()}
    assert bounds == ({first: 0.0, "gate[1]": 1.0} if way == "simplex" else {first: 0.0})
    assert report.num_parameters == 1 and report.log_evidence == pytest.approx(supremum, abs=2e-3)
    low, high = report.boundaries[first].interval(0.95)
    assert low == 0.0 and high == pytest.approx(end, rel=0.05)
    assert report.standard_errors["rate"] == pytest.approx(np.sqrt(y.mean() / 60), rel=0.01)


def test_an_empty_middle_category():
    rng = np.random.default_rng(4)
    y, x = rng.choice([0, 1, 3], p=[0.3, 0.3, 0.4], size=80), rng.normal(size=80)

    def model(x, y):
        slope = param("slope", 0.0)
        cutpoints = param("cutpoints", jnp.array([-1.0, 0.0, 1.0]), constraint=constraints.ordered_vector)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.OrderedLogistic(slope * x, cutpoints), obs=y)

    def loss(theta):
        cuts = np.array([-np.inf, theta[0], theta[1], np.inf])
        k = np.minimum(y, 2)
        return -np.log(special.expit(cuts[k + 1] - theta[2] * x) - special.expit(cuts[k] - theta[2] * x)).sum()

    best = optimize.minimize(loss, [-1.0, 0.0, 0.0], tol=1e-10)
    report = report_of(model, x, y)
    assert list(report.boundaries) == ["cutpoints[2] - cutpoints[1]"]
    assert report.boundaries["cutpoints[2] - cutpoints[1]"].bound == 0.0 and report.num_parameters == 3
    assert report.log_evidence == pytest.approx(-best.fun, abs=1e-3)
    assert not any("do not determine" in note for note in report.warnings)
    found = report.standard_errors["cutpoints"]
    assert found[1] == pytest.approx(found[2], rel=1e-3)
    step = 1e-3 * np.eye(3)
    gradient = lambda t: np.array([(loss(t + e) - loss(t - e)) / 2e-3 for e in step])  # noqa: E731
    hessian = np.stack([(gradient(best.x + e) - gradient(best.x - e)) / 2e-3 for e in step])
    np.testing.assert_allclose(found[:2], np.sqrt(np.diag(np.linalg.inv(hessian)))[:2], rtol=0.02)


@pytest.mark.xfail(reason="the log evidence ends 4 nats below that of the Poisson limit; not yet understood")
def test_counts_without_overdispersion():
    y = np.repeat([4, 5, 5, 6, 5, 6], 10)

    def model(y):
        mean = param("mean", 1.0, constraint=positive)
        concentration = param("concentration", 1.0, constraint=positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.NegativeBinomial2(mean, concentration), obs=y)

    def loss(log_concentration, rest):
        c, m = np.exp(log_concentration), np.exp(rest[0])
        return -stats.nbinom(c, c / (c + m)).logpmf(y).sum()

    supremum = stats.poisson(y.mean()).logpmf(y).sum()
    end = np.exp(profile_end(loss, supremum, [np.log(y.mean())], (0.0, 12.0)))
    report = report_of(model, y)
    assert report.boundaries["concentration"].bound == np.inf and report.num_parameters == 1
    # In single precision the densities have no digits left nearer to the limit.
    assert report.log_evidence == pytest.approx(supremum, abs=0.3)
    low, high = report.confidence_intervals()["concentration"]
    assert low == pytest.approx(end, rel=0.1) and high == np.inf
    assert report.params["mean"] == pytest.approx(y.mean(), rel=0.02)
    assert report.standard_errors["mean"] == pytest.approx(np.sqrt(y.mean() / 60), rel=0.03)


# -- correlations of one -------------------------------------------------------------------------------------------
NUM_GROUPS, PER_GROUP = 12, 6
TIMES = np.linspace(-1, 1, PER_GROUP)


def collinear_groups():
    """Intercepts and slopes of groups whose least squares estimates lie on a line."""
    rng = np.random.default_rng(6)
    design = np.stack([np.ones(PER_GROUP), TIMES], 1)
    noise = rng.normal(size=(PER_GROUP, NUM_GROUPS))
    noise -= design @ np.linalg.lstsq(design, noise, rcond=None)[0]
    z = rng.normal(size=NUM_GROUPS)
    return (design @ np.array([1 + 1.2 * z, 0.5 + 0.9 * z]) + noise).T


def slopes_marginal(y, way):
    """Random intercepts and slopes, integrated out by hand."""
    sigma, mean = param("sigma", 1.0, constraint=positive), param("mean", jnp.zeros(2))
    if way in ("corr_cholesky", "corr_matrix"):
        sd = param("sd", jnp.ones(2), constraint=positive)
        found = param("corr", jnp.eye(2), constraint=getattr(constraints, way))
        covariance = (found @ found.T if way == "corr_cholesky" else found) * sd * sd[:, None]
    elif way == "lower_cholesky":
        factor = param("factor", jnp.eye(2), constraint=constraints.lower_cholesky)
        covariance = factor @ factor.T
    else:
        a, c, d = param("a", 1.0, constraint=positive), param("c", 0.1), param("d", 1.0, constraint=positive)
        factor = jnp.array([[a, 0.0], [c, d]])
        covariance = factor @ factor.T
    design = np.stack([np.ones(PER_GROUP), TIMES], 1)
    covariance = design @ covariance @ design.T + sigma**2 * jnp.eye(PER_GROUP)
    with numpyro.plate("groups", len(y)):
        numpyro.sample("y", dist.MultivariateNormal(design @ mean, covariance), obs=y)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        ("corr_cholesky", {"correlation corr[1,0]": 1.0, "corr[1,0]": 1.0, "corr[1,1]": 0.0}),
        ("corr_matrix", {"correlation corr[1,0]": 1.0, "corr[0,1]": 1.0, "corr[1,0]": 1.0}),
        ("lower_cholesky", {"correlation factor[1,0]": 1.0, "factor[1,1]": 0.0}),
        ("loadings", {"d": 0.0}),
    ],
)
def test_a_correlation_of_one_written_four_ways(way, expected):
    y = collinear_groups()
    report = report_of(slopes_marginal, y, way)
    assert {name: boundary.bound for name, boundary in report.boundaries.items()} == expected
    design = np.stack([np.ones(PER_GROUP), TIMES], 1)

    def loss(theta):  # with a correlation of one
        loadings = design @ theta[2:4]
        covariance = np.outer(loadings, loadings) + np.exp(2 * theta[4]) * np.eye(PER_GROUP)
        return -stats.multivariate_normal(design @ theta[:2], covariance).logpdf(y).sum()

    best = optimize.minimize(loss, [1.0, 0.5, 1.2, 0.9, -0.1], tol=1e-9)
    assert report.num_parameters == 5 and report.log_evidence == pytest.approx(-best.fun, abs=5e-3)
    assert report.params["sigma"] == pytest.approx(np.exp(best.x[4]), rel=1e-2)
    assert np.all(np.isfinite(report.standard_errors["mean"]))


# -- further edges -------------------------------------------------------------------------------------------------
def test_a_component_that_empties():
    rng = np.random.default_rng(7)
    y = np.where(rng.uniform(size=50) < 0.5, -4.0, 0.0) + 0.8 * rng.normal(size=50)
    places = np.array([-4.0, 0.0, 4.0])

    def model(y):
        shares = param("shares", jnp.ones(3) / 3, constraint=constraints.simplex)
        with numpyro.plate("data", len(y)):
            components = dist.Normal(jnp.asarray(places), 1.0)
            numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(probs=shares), components), obs=y)

    densities = stats.norm(places[:, None], 1.0).pdf(y)
    two = optimize.minimize_scalar(
        lambda w: -np.log(w * densities[0] + (1 - w) * densities[1]).sum(), bounds=(0, 1), method="bounded"
    )
    report = report_of(model, y)
    assert {name: boundary.bound for name, boundary in report.boundaries.items()} == {"shares[2]": 0.0}
    assert report.num_parameters == 1 and report.log_evidence == pytest.approx(-two.fun, abs=2e-3)

    def loss(share, rest):
        w = special.expit(rest[0])
        return -np.log((1 - share) * (w * densities[0] + (1 - w) * densities[1]) + share * densities[2]).sum()

    end = profile_end(loss, -two.fun, [0.0], (1e-6, 0.5))
    assert report.confidence_intervals()["shares"][2][1] == pytest.approx(end, rel=0.05)
    assert np.all(np.isfinite(report.standard_errors["shares"][:2]))


def test_a_group_without_events():
    rng = np.random.default_rng(8)
    group = np.arange(40) % 4
    y = np.where(group == 2, 0, rng.poisson(4.0, 40))

    def model(group, y):
        level = param("level", jnp.zeros(4))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Poisson(jnp.exp(level[0] + jnp.where(group > 0, level[group], 0.0))), obs=y)

    report = report_of(model, group, y)
    assert {name: boundary.bound for name, boundary in report.boundaries.items()} == {"level[2]": -np.inf}
    assert report.num_parameters == 3
    means = np.array([y[group == g].mean() for g in range(4)])
    low, high = report.boundaries["level[2]"].interval(0.95)
    # The other groups determine the first level; ten zeros are likely enough up to a rate of 1.35 / 10.
    assert low == -np.inf and high == pytest.approx(np.log(ONE_SIDED / 10 / means[0]), abs=0.05)
    exact = np.sqrt(1 / (10 * means[0]) + 1 / (10 * means[3]))
    assert report.standard_errors["level"][3] == pytest.approx(exact, rel=0.01)


def test_tails_that_are_normal():
    y = stats.norm.ppf((np.arange(40) + 0.5) / 40)

    def model(y):
        mean, sigma = param("mean", 0.0), param("sigma", 1.0, constraint=positive)
        df = param("df", 5.0, constraint=constraints.greater_than(1.0))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.StudentT(df, mean, sigma), obs=y)

    report = report_of(model, y)
    assert report.boundaries["df"].bound == np.inf and report.num_parameters == 2
    assert report.log_evidence == pytest.approx(stats.norm(0, y.std()).logpdf(y).sum(), abs=0.1)
    assert report.params["sigma"] == pytest.approx(y.std(), rel=0.02)


def test_a_unit_root_is_at_the_upper_end():
    y = np.cumsum(0.1 + 0.3 * np.random.default_rng(9).normal(size=50))

    def model(y):
        root = param("root", 0.0, constraint=constraints.interval(-1.0, 1.0))
        sigma = param("sigma", 1.0, constraint=positive)
        with numpyro.plate("data", len(y) - 1):
            numpyro.sample("y", dist.Normal(root * y[:-1], sigma), obs=y[1:])

    report = report_of(model, y)
    assert report.boundaries["root"].bound == 1.0 and report.num_parameters == 1
    square = lambda root: np.sum((y[1:] - root * y[:-1]) ** 2)  # noqa: E731
    end = optimize.brentq(lambda root: 24.5 * np.log(square(root) / square(1.0)) - ONE_SIDED, 0.0, 1.0)
    assert report.confidence_intervals()["root"][0] == pytest.approx(end, abs=0.005)


def test_an_item_that_all_solve():
    """With latents: a Rasch model."""
    rng = np.random.default_rng(10)
    ability = rng.normal(size=60)
    y = (rng.uniform(size=(60, 4)) < special.expit(2 * ability[:, None] - np.array([-1.0, 0.0, 0.5, 1.0]))) * 1.0
    y[:, 1] = 1.0

    def model(y):
        difficulty = param("difficulty", jnp.zeros(4))
        sd = param("sd", 1.0, constraint=positive)
        with numpyro.plate("persons", len(y)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("y", dist.Bernoulli(logits=sd * z[:, None] - difficulty).to_event(1), obs=y)

    nodes, weights = np.polynomial.hermite_e.hermegauss(40)

    def loss(theta, items=(0, 2, 3)):
        logits = np.exp(theta[-1]) * nodes[:, None, None] - theta[:-1]
        each = np.sum(y[:, items] * logits - np.logaddexp(0, logits), -1)
        return -np.log(weights @ np.exp(each) / np.sqrt(2 * np.pi)).sum()

    best = optimize.minimize(loss, [-1.0, 0.5, 1.0, 0.5], tol=1e-9)
    report = report_of(model, y)
    assert {name: boundary.bound for name, boundary in report.boundaries.items()} == {"difficulty[1]": -np.inf}
    assert report.num_parameters == 4
    assert report.log_evidence == pytest.approx(-best.fun, abs=0.02 + 3 * report.log_evidence_std)
    assert np.isfinite(report.standard_errors["difficulty"]).tolist() == [True, False, True, True]


# -- no upper bound ------------------------------------------------------------------------------------------------
def normal(y):
    mean, sigma = param("mean", 0.0), param("sigma", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def exact_replicates(y):
    mean, sd = param("mean", 0.0), param("sd", 1.0, constraint=positive)
    sigma = param("sigma", 1.0, constraint=positive)
    with numpyro.plate("groups", y.shape[1]):
        b = numpyro.sample("b", dist.Normal(mean, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(b, sigma), obs=y)


DRAWN = np.random.default_rng(11).normal(size=8)


@pytest.mark.parametrize(
    ("model", "y"), [(normal, np.full(20, 3.0)), (exact_replicates, np.tile(DRAWN, (3, 1)))], ids=["constant", "twins"]
)
def test_a_likelihood_without_bound(model, y):
    report = report_of(model, y, num_steps=60)
    assert report.boundaries["sigma"].bound == 0.0 and report.boundaries["sigma"].endless
    assert any("no upper bound" in note and "sigma -> 0" in note for note in report.warnings)
    assert np.all(np.isnan(report.confidence_intervals()["sigma"]))
