# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Reports against exact likelihoods: standard errors, intervals, boundaries, singular directions."""

import dataclasses
import pickle
import warnings

import flax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.contrib.module import random_flax_module
from numpyro.distributions import constraints
from oracles import random_intercepts_log_likelihood
from scipy import optimize, stats

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.reporting.standard_errors import curvature_of

pytestmark = pytest.mark.slow

NUM_GROUPS, PER_GROUP = 12, 4


def random_intercepts(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", y.shape[1]):
        b = numpyro.sample("b", dist.Normal(0.0, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(mean + b, sigma), obs=y)


def exact_loss(flat, y):
    """Minus the log likelihood of (mean, log sd, log sigma)."""
    return -random_intercepts_log_likelihood(y, flat[0], np.exp(flat[1]), np.exp(flat[2]))


def hessian(function, at, step=1e-4):
    size, eye = len(at), step * np.eye(len(at))
    value = lambda i, j, a, b: function(at + a * eye[i] + b * eye[j])  # noqa: E731
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    entry = lambda i, j: sum(a * b * value(i, j, a, b) for a, b in signs) / (4 * step**2)  # noqa: E731
    return np.array([[entry(i, j) for j in range(size)] for i in range(size)])


def intercept_data(sd):
    rng = np.random.default_rng(3)
    return 1.0 + sd * rng.standard_normal(NUM_GROUPS) + 0.8 * rng.standard_normal((PER_GROUP, NUM_GROUPS))


@pytest.fixture(scope="module")
def fitted():
    y = intercept_data(0.7)
    optimizer = SMCOptimizer(random_intercepts)
    result = optimizer.run(random.key(0), 300, y, progress_bar=False)
    return y, optimizer, result, optimizer.summarize(random.key(1), result.state)


def test_standard_errors_and_covariance_are_exact(fitted):
    y, _, _, report = fitted
    best = optimize.minimize(exact_loss, np.array([1.0, -0.3, -0.3]), args=(y,), tol=1e-10).x
    here = np.array([report.theta[name] for name in ("mean", "sd", "sigma")], float)
    np.testing.assert_allclose(here, best, atol=1e-3)
    jacobian = np.diag([1.0, *np.exp(here[1:])])
    covariance = jacobian @ np.linalg.inv(hessian(lambda flat: exact_loss(flat, y), here)) @ jacobian
    assert report.names == ("mean", "sd", "sigma")
    scale = np.sqrt(np.diag(covariance))
    np.testing.assert_allclose(
        report.covariance / scale / scale[:, None], covariance / scale / scale[:, None], atol=0.02
    )
    for k, name in enumerate(report.names):
        assert report.standard_errors[name] == pytest.approx(scale[k], rel=0.01)
    assert report.log_evidence == pytest.approx(-exact_loss(here, y), abs=1e-3)
    # The distance to the maximum is known, too.
    distance = abs(best - here) * np.diag(jacobian)
    assert all(report.mc_errors[name] < 1e-3 for name in report.names)
    assert all(report.mc_errors[name] > 0.3 * distance[k] for k, name in enumerate(report.names))
    assert report.warnings == ()


def test_criteria(fitted):
    y, _, _, report = fitted
    assert report.num_parameters == 3 and report.num_observations == y.size
    assert report.aic == pytest.approx(-2 * report.log_evidence + 6)
    assert report.bic == pytest.approx(-2 * report.log_evidence + 3 * np.log(y.size))
    uncounted = dataclasses.replace(report, num_observations=0)  # all data in `numpyro.factor`
    assert np.isnan(uncounted.bic) and "BIC" in report.to_text() and "BIC" not in uncounted.to_text()


def test_intervals_are_built_on_the_unconstrained_scale(fitted):
    _, _, _, report = fitted
    for level in (0.9, 0.95):
        intervals, z = report.confidence_intervals(level), stats.norm.ppf((1 + level) / 2)
        mean, sd = report.params["mean"], report.params["sd"]
        expected = mean + z * report.standard_errors["mean"] * np.array([-1, 1])
        np.testing.assert_allclose(intervals["mean"], expected, rtol=1e-5)
        ratio = np.exp(z * report.standard_errors["sd"] / sd)
        np.testing.assert_allclose(intervals["sd"], [sd / ratio, sd * ratio], rtol=1e-5)
    with pytest.raises(ValueError, match="level must lie strictly between 0 and 1"):
        report.confidence_intervals(95)


def test_samples_are_draws_from_the_posterior(fitted):
    y, _, _, report = fitted
    sd, sigma = float(report.params["sd"]), float(report.params["sigma"])
    precision = 1 / sd**2 + PER_GROUP / sigma**2
    mean = (y - report.params["mean"]).sum(0) / sigma**2 / precision
    b = np.asarray(report.samples["b"])
    assert b.shape == (len(report.log_weights), NUM_GROUPS)
    standardised = (b - mean) * np.sqrt(precision)
    assert stats.kstest(standardised.ravel(), "norm").pvalue > 1e-3
    # Blocks are independent of one another.
    assert np.max(abs(np.corrcoef(standardised.T) - np.eye(NUM_GROUPS))) < 5 / np.sqrt(len(b))


def test_samples_pass_the_dkw_test(fitted):
    """The empirical distribution functions of all groups lie within the band of Dvoretzky, Kiefer, Wolfowitz, Massart.

    The draws are resampled from a weighted cloud, so their effective number is taken. Failure rate 1e-3 in all.
    """
    y, optimizer, result, report = fitted
    sd, sigma = (float(report.params[name]) for name in ("sd", "sigma"))
    precision = 1 / sd**2 + PER_GROUP / sigma**2
    mean = (y - report.params["mean"]).sum(0) / sigma**2 / precision
    band = lambda num: np.sqrt(np.log(2 * NUM_GROUPS / 1e-3) / (2 * num))  # noqa: E731
    particles = optimizer.get_samples(result.state, rng_key=random.key(5))["b"]
    for draws, num in ((report.samples["b"], len(report.log_weights)), (particles, len(particles))):
        for group in range(NUM_GROUPS):
            exact = stats.norm(mean[group], precision**-0.5)
            assert stats.kstest(np.asarray(draws)[:, group], exact.cdf).statistic < band(num)
    # A posterior that is a tenth too wide or a third of a deviation off would not pass.
    assert stats.kstest(exact.rvs(1024, random_state=0) + 0.33 * precision**-0.5, exact.cdf).statistic > band(1024)


def test_sandwich_is_that_of_exact_scores(fitted):
    y, optimizer, result, report = fitted
    robust = optimizer.summarize(random.key(1), result.state, sandwich=True)
    here = np.array([report.theta[name] for name in ("mean", "sd", "sigma")], float)
    step = 1e-5 * np.eye(3)
    group_loss = lambda flat, g: exact_loss(flat, y[:, g : g + 1])  # noqa: E731
    scores = np.array(
        [[(group_loss(here + e, g) - group_loss(here - e, g)) / 2e-5 for e in step] for g in range(NUM_GROUPS)]
    )
    inverse = np.linalg.inv(hessian(lambda flat: exact_loss(flat, y), here))
    jacobian = np.diag([1.0, *np.exp(here[1:])])
    exact = np.sqrt(np.diag(jacobian @ inverse @ scores.T @ scores @ inverse @ jacobian))
    np.testing.assert_allclose([robust.sandwich_standard_errors[n] for n in robust.names], exact, rtol=0.02)
    assert np.max(abs(exact / np.sqrt(np.diag(report.covariance)) - 1)) > 0.1  # they do differ
    with pytest.raises(ValueError, match="sandwich=True"):
        _ = report.sandwich_standard_errors


def test_a_second_report_compiles_nothing_and_has_its_own_noise(fitted, compilations):
    _, optimizer, result, report = fitted
    with compilations() as seen:
        other = optimizer.summarize(random.key(2), result.state)
    assert seen == []
    assert other.standard_errors["sd"] == pytest.approx(report.standard_errors["sd"], rel=0.02)
    assert other.standard_errors["sd"] != report.standard_errors["sd"]


def test_report_is_plain_data_and_prints(fitted, capsys):
    _, _, _, report = fitted
    again = pickle.loads(pickle.dumps(report))
    np.testing.assert_array_equal(again.confidence_intervals()["sd"], report.confidence_intervals()["sd"])
    report.print_summary()
    printed = capsys.readouterr().out
    assert all(word in printed for word in ("estimate", "std. error", "MC error", "97.5%", "sigma", "log evidence"))


def test_theta_that_is_not_at_the_maximum_is_noticed(fitted):
    y, optimizer, result, report = fitted
    moved = {**result.state.params, "mean": result.state.params["mean"] + 0.1}
    other = optimizer.summarize(random.key(1), result.state._replace(params=moved))
    assert any("theta is not at the maximum: mean" in warning for warning in other.warnings)
    # How far it is has been estimated: a Newton step of a nearly quadratic function.
    assert other.mc_errors["mean"] == pytest.approx(0.1, rel=0.1)


@pytest.mark.parametrize("shift", [0.0, 0.3])
def test_laplace_is_exact_for_gaussians_wherever_one_starts(fitted, shift):
    y, optimizer, result, report = fitted
    moved = {**result.state.params, "mean": result.state.params["mean"] + shift}
    other = optimizer.summarize(random.key(1), result.state._replace(params=moved)) if shift else report
    assert other.diagnostics["laplace_fit"] == "maximum"
    exact = optimize.minimize(exact_loss, np.zeros(3), (y,), tol=1e-8).x
    for value, name, best in zip(exact, report.params, (exact[0], *np.exp(exact[1:])), strict=True):
        found = other.diagnostics["laplace_params"][name]
        assert abs(found - best) < 0.02 * report.standard_errors[name], (name, value)
    assert not any("fit by Laplace's approximation would differ" in warning for warning in other.warnings)


def test_maximum_on_the_boundary():
    y = intercept_data(0.0)
    y = y - 0.6 * (y.mean(0) - y.mean())  # groups that are more alike than chance
    optimizer = SMCOptimizer(random_intercepts)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "theta was still moving")
        result = optimizer.run(random.key(0), 300, y, progress_bar=False)
    report = optimizer.summarize(random.key(1), result.state)
    assert np.isnan(report.standard_errors["sd"]) and list(report.boundaries) == ["sd"]
    assert any("sd is at the boundary of its support (0)" in warning for warning in report.warnings)
    # The others: with sd = 0 it is a normal sample.
    sigma = y.std()
    assert report.standard_errors["mean"] == pytest.approx(sigma / np.sqrt(y.size), rel=0.02)
    assert report.standard_errors["sigma"] == pytest.approx(sigma / np.sqrt(2 * y.size), rel=0.02)

    # The one-sided limit is where the profile likelihood has fallen by 1.353.
    def profile(log_sd):
        loss = lambda rest: exact_loss(np.array([rest[0], log_sd, rest[1]]), y)  # noqa: E731
        return optimize.minimize(loss, [y.mean(), np.log(sigma)]).fun

    limit = optimize.brentq(lambda log_sd: profile(log_sd) - profile(-20.0) - 1.6449**2 / 2, -5.0, 1.0)
    low, high = report.confidence_intervals()["sd"]
    assert low == 0.0 and high == pytest.approx(np.exp(limit), rel=0.05)
    assert np.all(np.isfinite(report.confidence_intervals()["mean"]))


def test_without_latents_it_is_maximum_likelihood():
    def model(x, y):
        slope = numpyro.param("slope", 0.0)
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(slope * x, sigma), obs=y)

    rng = np.random.default_rng(0)
    x = rng.standard_normal(40)
    y = 2 * x + rng.standard_normal(40)
    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 200, x, y, progress_bar=False)
    report = optimizer.summarize(random.key(1), result.state)
    slope = np.sum(x * y) / np.sum(x**2)
    sigma = np.sqrt(np.mean((y - slope * x) ** 2))
    assert report.standard_errors["slope"] == pytest.approx(sigma / np.sqrt(np.sum(x**2)), rel=1e-3)
    assert report.standard_errors["sigma"] == pytest.approx(sigma / np.sqrt(80), rel=1e-3)
    assert report.log_evidence == pytest.approx(stats.norm(slope * x, sigma).logpdf(y).sum(), abs=1e-3)
    assert report.diagnostics["laplace_fit"] == "none: there are no latents"


def test_a_density_with_a_jump_is_noticed():
    """Latents must not move across a jump along with theta: without the notice the information would be wrong."""

    def model(num):
        mean = numpyro.param("mean", 0.3)
        with numpyro.plate("data", num):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
            numpyro.factor("side", jnp.where(x > 0, jnp.log(0.9), jnp.log(0.1)))
        numpyro.sample("y", dist.Normal(mean, 0.5), obs=0.0)

    loss = lambda m: -20 * np.log(0.1 + 0.8 * stats.norm.cdf(m)) - stats.norm(m, 0.5).logpdf(0.0)  # noqa: E731
    best = optimize.minimize_scalar(loss, bounds=(-3, 5), method="bounded", options={"xatol": 1e-8}).x
    optimizer = SMCOptimizer(model)
    state = optimizer.init(random.key(0), 20)
    report = optimizer.summarize(random.key(1), state._replace(params={"mean": jnp.asarray(best, jnp.float32)}))
    exact = 1 / np.sqrt((loss(best + 1e-3) - 2 * loss(best) + loss(best - 1e-3)) / 1e-6)
    assert report.standard_errors["mean"] == pytest.approx(exact, rel=0.05)
    assert report.log_evidence == pytest.approx(-loss(best), abs=4 * report.log_evidence_std)
    assert report.diagnostics["laplace_fit"] == "none: the density jumps in the latents"
    assert np.isnan(report.diagnostics["laplace_params"]["mean"])


def test_a_rotation_is_named_and_what_it_leaves_alone_is_exact():
    """Probabilistic principal components at their maximum in closed form (Tipping and Bishop 1999)."""
    num, noise = 60, 0.5

    def model(y):
        loadings = numpyro.param("loadings", jnp.ones((3, 2)))
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        with numpyro.plate("rows", num):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("y", dist.Normal(z @ loadings.T, sigma).to_event(1), obs=y)

    rng = np.random.default_rng(0)
    y = rng.standard_normal((num, 2)) @ rng.standard_normal((2, 3)) + noise * rng.standard_normal((num, 3))
    values, vectors = np.linalg.eigh(y.T @ y / num)
    turn = np.array([[np.cos(0.5), -np.sin(0.5)], [np.sin(0.5), np.cos(0.5)]])
    loadings = vectors[:, 1:] * np.sqrt(values[1:] - values[0]) @ turn
    optimizer = SMCOptimizer(model)
    state = optimizer.init(random.key(0), y)
    found = {"loadings": jnp.asarray(loadings, jnp.float32), "sigma": jnp.asarray(np.sqrt(values[0]), jnp.float32)}
    report = optimizer.summarize(random.key(1), state._replace(params=found))
    assert any("do not determine a combination of loadings" in warning for warning in report.warnings)
    assert report.num_parameters == 6 and np.all(np.isnan(report.standard_errors["loadings"]))
    # sigma^2 is estimated from the one direction that has noise only.
    assert report.standard_errors["sigma"] == pytest.approx(np.sqrt(values[0] / (2 * num)), rel=0.02)
    covariance = loadings @ loadings.T + values[0] * np.eye(3)
    exact = stats.multivariate_normal(np.zeros(3), covariance).logpdf(y).sum()
    assert report.log_evidence == pytest.approx(exact, abs=1e-2)


def test_a_leaf_that_a_prior_has_replaced_is_no_parameter():
    def model(x, y):
        net = random_flax_module("net", flax.linen.Dense(1), {"kernel": dist.Normal()}, input_shape=(1,))
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(net(x)[:, 0], 1.0), obs=y)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((20, 1))
    y = 2.0 + x[:, 0] + rng.standard_normal(20)
    optimizer = SMCOptimizer(model)
    report = optimizer.summarize(random.key(1), optimizer.init(random.key(0), x, y))
    assert report.names == ("net$params.bias[0]",) and report.num_parameters == 1
    # The kernel integrated out, the bias is the mean of a normal sample with known covariance.
    precision = np.linalg.inv(x @ x.T + np.eye(20)).sum()
    np.testing.assert_allclose(report.standard_errors["net$params"]["bias"], [precision**-0.5], rtol=1e-3)


def test_parameters_in_a_tree_have_standard_errors():
    def model(x, y):
        line = numpyro.param("line", {"intercept": 0.0, "slopes": jnp.zeros(2)})
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(line["intercept"] + x @ line["slopes"], sigma), obs=y)

    rng = np.random.default_rng(0)
    x = rng.standard_normal((30, 2))
    y = 2.0 + x[:, 0] + rng.standard_normal(30)
    design = np.column_stack([np.ones(30), x])
    best = np.linalg.lstsq(design, y, rcond=None)[0]
    sigma = np.std(y - design @ best)
    exact = sigma * np.sqrt(np.diag(np.linalg.inv(design.T @ design)))
    params = {"line": {"intercept": best[0], "slopes": best[1:]}, "sigma": sigma}
    optimizer = SMCOptimizer(model)
    report = optimizer.summarize(random.key(1), optimizer.init(random.key(0), x, y, init_params=params))
    assert report.names == ("line.intercept", "line.slopes[0]", "line.slopes[1]", "sigma")
    found = report.standard_errors["line"]
    np.testing.assert_allclose([found["intercept"], *found["slopes"]], exact, rtol=1e-3)


@pytest.mark.parametrize("latent", [True, False])
def test_a_year_and_its_intercept_are_told_apart(latent):
    """(sd / mean)^2 / 2 = 1e-5 of the information on each is its own."""
    rng = np.random.default_rng(4)
    group = np.repeat(np.arange(12), 8)
    year = rng.integers(1990, 2021, group.size).astype(float)
    y = 0.1 * (year - 2005) + latent * rng.standard_normal(12)[group] + rng.standard_normal(group.size)
    design = np.stack([np.ones_like(year), year], 1)

    def model(design, y):
        beta = numpyro.param("beta", jnp.zeros(design.shape[1]))
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive) if latent else 0.0
        sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
        with numpyro.plate("groups", 12):
            b = numpyro.sample("b", dist.Normal(0.0, sd)) if latent else jnp.zeros(12)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(design @ beta + b[group], sigma), obs=y)

    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 30, design, y, progress_bar=False)
    report = optimizer.summarize(random.key(1), result.state, sandwich=True)
    assert not report.warnings and report.num_parameters == 3 + latent
    noise, between = float(report.params["sigma"]) ** 2, float(report.params["sd"]) ** 2 if latent else 0.0
    covariance = noise * np.eye(len(y)) + between * (group[:, None] == group)
    exact = np.linalg.inv(design.T @ np.linalg.solve(covariance, design))
    rows = [report.names.index(name) for name in ("beta[0]", "beta[1]")]
    np.testing.assert_allclose(report.covariance[np.ix_(rows, rows)], exact, rtol=5e-3)
    assert np.all(np.abs(report.diagnostics["distance"]["beta"]) < 0.02)

    # Scores of the units at the best coefficients, exactly
    residual = y - design @ (exact @ design.T @ np.linalg.solve(covariance, y))
    units = group if latent else np.arange(len(y))
    each = design * np.linalg.solve(covariance, residual)[:, None]
    scores = np.stack([each[units == u].sum(0) for u in np.unique(units)])
    robust = np.sqrt(np.diag(exact @ scores.T @ scores @ exact))
    np.testing.assert_allclose(report.sandwich_standard_errors["beta"], robust, rtol=0.03)

    if latent:
        return
    # A copy of the year in other units adds nothing.
    twice = np.concatenate([design, 0.3 * design[:, 1:]], 1)
    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 30, twice, y, progress_bar=False)
    report = optimizer.summarize(random.key(1), result.state)
    assert report.num_parameters == 3 + latent
    assert np.isnan(report.standard_errors["beta"]).tolist() == [False, True, True]
    assert report.standard_errors["beta"][0] == pytest.approx(np.sqrt(exact[0, 0]), rel=5e-3)
    assert any("beta[1], beta[2]" in note or "beta[2], beta[1]" in note for note in report.warnings)


# -- the algebra ---------------------------------------------------------------------------------------------------
def replicates_around(information, noise, seed=0, num=16):
    rng = np.random.default_rng(seed)
    jitter = noise * rng.standard_normal((num, *information.shape))
    return information + (jitter + jitter.transpose(0, 2, 1)) / 2


def test_unidentified_combination_is_named_and_the_rest_is_right():
    """Only a + b and c are determined."""
    design = np.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    information = design.T @ np.diag([4.0, 9.0]) @ design
    scores = np.zeros((16, 3))
    found = curvature_of(scores, replicates_around(information, 1e-3), np.diag([5.0, 5.0, 10.0]), "abc")
    assert found.singular == ("a combination of a, b",) or found.singular == ("a combination of b, a",)
    assert found.num_singular == 1 and not found.indefinite
    np.testing.assert_array_equal(found.identified, [False, False, True])
    assert found.covariance[2, 2] == pytest.approx(1 / 9, rel=0.01)


def test_a_direction_that_is_lost_in_noise_is_not_said_to_be_undetermined():
    found = curvature_of(np.zeros((16, 1)), replicates_around(np.array([[0.2]]), 2.0), np.diag([10.0]), "a")
    assert found.hidden == ("a",) and not found.singular and found.num_singular == 0 and not found.indefinite
    assert not found.identified


def test_units_do_not_matter():
    rng = np.random.default_rng(0)
    root = rng.standard_normal((3, 3))
    information, units = root @ root.T + np.eye(3), np.array([1e-6, 1.0, 1e5])
    complete = 2 * np.diag(np.diag(information))
    scores = rng.standard_normal((16, 3))
    plain = curvature_of(scores, replicates_around(information, 1e-3), complete, "abc")
    scaled = replicates_around(information, 1e-3) / units / units[:, None]
    other = curvature_of(scores / units, scaled, complete / units / units[:, None], "abc")
    np.testing.assert_allclose(other.covariance / units / units[:, None], plain.covariance, rtol=1e-8)
    np.testing.assert_allclose(other.steps / units, plain.steps, rtol=1e-8)


def test_a_direction_that_curves_upwards_is_no_maximum():
    found = curvature_of(np.zeros((16, 2)), replicates_around(np.diag([4.0, -1.0]), 1e-3), np.diag([5.0, 5.0]), "ab")
    assert found.indefinite and found.singular == ("b",)


def test_noise_of_the_standard_errors_is_stated_rightly():
    estimates, stated = [], []
    for seed in range(300):
        found = curvature_of(np.zeros((16, 1)), replicates_around(np.array([[4.0]]), 0.4, seed), np.diag([8.0]), "a")
        estimates.append(np.sqrt(found.covariance[0, 0]))
        stated.append(found.noise[0])
    assert np.mean(stated) == pytest.approx(np.std(estimates) / 0.5, rel=0.2)
