# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models whose prior draws are mostly impossible given the data, against closed forms and quadrature."""

import math

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy import stats

from numpyro_smcopt import SMCOptimizer, log_evidence
from numpyro_smcopt.blocks import make_blocks
from numpyro_smcopt.population.possible_points import possible_points


def log_integral(log_density, low, high, num=20_001):
    """The logarithm of an integral by Simpson's rule, of a density of columns [num, 1] to [num, 1] or [num]."""
    grid = np.linspace(low, high, num)
    logs = np.ravel(log_density(grid[:, None]))
    weights = np.full(num, 2.0)
    weights[1::2], weights[[0, -1]] = 4.0, 1.0
    top = logs[np.isfinite(logs)].max()
    return math.log(np.sum(weights * np.exp(logs - top)) * (grid[1] - grid[0]) / 3) + top


def check(found, exact, beside=0.003):
    assert abs(found.log_evidence - exact) < beside + 4 * found.log_evidence_std


def response_times(num_groups, seed=0):
    """Response times [groups, 12], the fastest of which a shift from the prior exceeds with probability .98 to .1."""
    rng = np.random.default_rng(seed)
    times = np.exp(rng.normal(-1.0, 0.5, (num_groups, 12)))
    fastest = stats.gamma(4, scale=1 / 20).ppf(np.linspace(0.02, 0.9, num_groups))
    return (fastest[:, None] + times - times.min(1, keepdims=True)).astype(np.float32)


def shifted(y):
    mu = numpyro.param("mu", -0.8)
    with numpyro.plate("groups", len(y), dim=-2):
        shift = numpyro.sample("shift", dist.Gamma(4.0, 20.0))
        with numpyro.plate("trials", y.shape[1], dim=-1):
            numpyro.factor("y", dist.LogNormal(mu, 0.5, validate_args=False).log_prob(y - shift))


def exact_shifted(y, mu):
    prior, law = stats.gamma(4, scale=1 / 20), stats.lognorm(0.5, scale=math.exp(mu))

    def of_group(row):
        log_density = lambda shift: prior.logpdf(shift) + law.logpdf(row - shift).sum(1, keepdims=True)  # noqa: E731
        return log_integral(log_density, 0.0, float(row.min()), 2001)

    return sum(of_group(row.astype(float)) for row in y)


def test_thirty_groups_that_are_never_possible_all_at_once():
    y = response_times(30)
    optimizer = SMCOptimizer(shifted)
    state = optimizer.init(random.key(0), y)
    report = optimizer.summarize(random.key(1), state, y)
    check(report, exact_shifted(y, float(state.params["mu"])))
    assert state.blocks.num_blocks == 30


def test_groups_that_share_a_latent_are_mended_one_by_one():
    y = response_times(12)

    def model(y):
        mu = numpyro.sample("mu", dist.Normal(-1.0, 0.3))
        with numpyro.plate("groups", len(y), dim=-2):
            shift = numpyro.sample("shift", dist.Gamma(4.0, 20.0))
            with numpyro.plate("trials", y.shape[1], dim=-1):
                numpyro.factor("y", dist.LogNormal(mu, 0.5, validate_args=False).log_prob(y - shift))

    grid = np.linspace(-2.0, 0.0, 41)
    logs = np.array([exact_shifted(y, mu) + stats.norm(-1.0, 0.3).logpdf(mu) for mu in grid])
    exact = math.log(np.sum(np.exp(logs - logs.max())) * (grid[1] - grid[0])) + logs.max()
    check(log_evidence(model, y), exact, beside=0.02)


def test_a_uniform_density_jumps_where_its_bound_is_a_latent():
    y = np.float32([0.3, 2.0, 3.7, 1.1, 2.9])

    def model(y):
        bound = numpyro.sample("bound", dist.Pareto(1.0, 1.5))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Uniform(0.0, bound), obs=y)

    # A Pareto prior is conjugate.
    exact = math.log(1.5 / (1.5 + 5)) - (1.5 + 5) * math.log(float(y.max()))
    check(log_evidence(model, y), exact, beside=0.01)


def test_gamma_responses_with_an_inverse_link():
    y = np.float32([[0.5, 0.7, 0.4], [2.0, 1.2, 3.0], [0.9, 1.4, 1.0]])

    def model(y):
        with numpyro.plate("groups", len(y), dim=-2):
            u = numpyro.sample("u", dist.Normal(0.0, 1.0))
            with numpyro.plate("rows", y.shape[1], dim=-1):
                numpyro.sample("y", dist.Gamma(3.0, 3.0 * (0.6 + u)), obs=y)

    def of_group(row):
        def log_density(u):
            law = stats.gamma(3.0, scale=1 / (3.0 * (0.6 + u)))
            return stats.norm.logpdf(u) + law.logpdf(row).sum(1, keepdims=True)

        return log_integral(log_density, -0.6 + 1e-9, 8.0)

    check(log_evidence(model, y), sum(of_group(row.astype(float)) for row in y))


def test_a_potential_with_regions_that_are_not_a_number():
    def model():
        x = numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1))
        numpyro.factor("wells", jnp.sum(jnp.log(jnp.sqrt(x - 0.5) * jnp.sqrt(2.0 - x))))

    def log_density(x):
        with np.errstate(divide="ignore"):
            return stats.norm.logpdf(x) + np.log((x - 0.5) * (2.0 - x)) / 2

    check(log_evidence(model), 3 * log_integral(log_density, 0.5, 2.0), beside=0.01)


def test_a_lower_end_below_all_data():
    y = np.float32([2.1, 2.6, 3.3, 2.2])

    def model(y):
        end = numpyro.sample("end", dist.Normal(0.0, 2.0))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.TruncatedNormal(2.0, 1.0, low=end), obs=y)

    def log_density(end):
        inside = stats.norm(2.0, 1.0)
        return stats.norm(0.0, 2.0).logpdf(end) + np.sum(inside.logpdf(y) - inside.logsf(end), 1, keepdims=True)

    check(log_evidence(model, y), log_integral(log_density, -16.0, float(y.min())), beside=0.01)


def test_the_number_of_tickets():
    y = np.int32([14, 3, 27])

    def model(y):
        last = numpyro.sample("last", dist.Exponential(0.02))
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Uniform(0.0, last), obs=y.astype(float))

    exact = log_integral(lambda v: math.log(0.02) - 0.02 * v - 3 * np.log(v), 27.0, 2000.0, 200_001)
    check(log_evidence(model, y), exact, beside=0.01)


def test_three_parameters_of_a_weibull_with_a_threshold():
    y = np.float32([[3.1, 3.4, 4.0, 5.2], [1.2, 1.9, 1.5, 1.3]])

    def model(y):
        scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
        with numpyro.plate("groups", len(y), dim=-2):
            threshold = numpyro.sample("threshold", dist.Normal(2.5, 1.5))
            with numpyro.plate("rows", y.shape[1], dim=-1):
                numpyro.factor("y", dist.Weibull(scale, 1.5, validate_args=False).log_prob(y - threshold))

    optimizer = SMCOptimizer(model)
    state = optimizer.init(random.key(0), y)
    report = optimizer.summarize(random.key(1), state, y)

    def of_group(row):
        prior, law = stats.norm(2.5, 1.5), stats.weibull_min(1.5, scale=float(state.params["scale"]))
        log_density = lambda t: prior.logpdf(t) + law.logpdf(row - t).sum(1, keepdims=True)  # noqa: E731
        return log_integral(log_density, -9.5, float(row.min()))

    check(report, sum(of_group(row.astype(float)) for row in y))


def test_an_impossible_datum_is_refused_by_its_row():
    y = response_times(3)
    y[1, 4] = -0.5  # before any shift
    with pytest.raises(ValueError, match="Site 'y' has no finite log density.*row 1, 4"):
        SMCOptimizer(shifted).init(random.key(0), y)


def test_points_are_mended_unit_by_unit():
    rng = np.random.default_rng(2)

    def finite_terms(x):
        return np.concatenate([x[:, 1:] > 1.5, x[:, :1] < 3], axis=1)

    points, ever = possible_points(
        lambda k: rng.normal(size=(32, 21)), finite_terms, lambda points: one_block_of(21, 21), np.arange(21)
    )
    assert ever.all()
    assert finite_terms(points).all()
    assert not np.array_equal(points[0], points[1])


def one_block_of(num_coordinates, num_terms):
    return make_blocks(np.zeros(num_coordinates, int), np.zeros(num_terms, int), 1)
