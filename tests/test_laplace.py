# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximation: exact where the target is Gaussian."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import partition
from compiling import compile_fast, compile_tuned
from scipy import stats
from scipy.optimize import minimize

from numpyro_smcopt import laplace

pytestmark = pytest.mark.slow

# Blocks of unequal size: coordinates {0, 3}, {1} and {2, 4, 5}.
GROUPS = [[0, 3], [1], [2, 4, 5]]


def gaussian(seed=0):
    rng = np.random.default_rng(seed)
    precision = np.zeros((6, 6))
    for group in GROUPS:
        root = rng.normal(size=(len(group), len(group)))
        precision[np.ix_(group, group)] = root @ root.T + 0.3 * np.eye(len(group))
    center = 100 * rng.normal(size=6)

    def terms(x):
        away = x - jnp.asarray(center, x.dtype)
        pieces = [away[jnp.array(g)] @ precision[np.ix_(g, g)].astype(x.dtype) @ away[jnp.array(g)] / 2 for g in GROUPS]
        return jnp.stack([*pieces, jnp.asarray(1.5, x.dtype)])

    return terms, precision, center


def quartic(x):
    a, b, c = x
    return jnp.stack([jnp.cosh(a - 1.0), (a - c) ** 4 / 4 + 2 * a, c**2, jnp.exp(b) - 3 * b])


@pytest.mark.parametrize("joint", [False, True], ids=["blocks", "joint"])
def test_mode_and_hessian_of_a_gaussian_are_exact(joint):
    terms, precision, center = gaussian()
    with jax.enable_x64(True):
        blocks = partition(terms, 6, joint)
        assert blocks.members.shape == ((1, 6) if joint else (3, 3))
        mode = compile_fast(lambda x: laplace.find_mode(terms, x, blocks))(jnp.zeros(6))
        np.testing.assert_allclose(mode.x, center, atol=1e-8)
        np.testing.assert_allclose(mode.terms, terms(jnp.asarray(center)), atol=1e-8)
        assert mode.step < 1e-8
        dense = np.zeros((6, 6))
        members = np.asarray(blocks.members)
        for block, group in zip(np.asarray(mode.hessian), members, strict=True):
            inside = group < 6
            np.testing.assert_array_equal(block[~inside], np.eye(len(group))[~inside])  # padding
            dense[np.ix_(group[inside], group[inside])] = block[np.ix_(inside, inside)]
        np.testing.assert_allclose(dense, precision, atol=1e-10)
        factor, inverse, half_log_det = laplace.factors(mode.hessian)
        np.testing.assert_allclose(
            factor @ jnp.swapaxes(factor, 1, 2) @ mode.hessian,
            np.broadcast_to(np.eye(members.shape[1]), mode.hessian.shape),
            atol=1e-9,
        )
        np.testing.assert_allclose(
            factor @ inverse, np.broadcast_to(np.eye(members.shape[1]), mode.hessian.shape), atol=1e-12
        )
        np.testing.assert_allclose(half_log_det.sum(), np.linalg.slogdet(precision)[1] / 2, rtol=1e-12)


def test_hessian_blocks_are_those_of_jax_and_split_into_prior_and_rest():
    with jax.enable_x64(True):
        blocks = partition(quartic, 3)
        x = jnp.array([0.4, 0.2, -0.7])
        energy = lambda x: jnp.sum(quartic(x))  # noqa: E731
        exact = np.asarray(jax.hessian(energy)(x))
        found = laplace.hessian_blocks(jax.grad(energy), x, blocks)
        np.testing.assert_allclose(found[0], exact[np.ix_([0, 2], [0, 2])], atol=1e-12)
        np.testing.assert_allclose(found[1], [[exact[1, 1], 0], [0, 1]], atol=1e-12)
        mask = np.array([True, False, True, False])
        halves = laplace.curvature(quartic, x, jnp.asarray(mask), blocks)
        prior = np.asarray(jax.hessian(lambda x: jnp.sum(quartic(x)[mask]))(x))
        np.testing.assert_allclose(halves.prior[0], prior[np.ix_([0, 2], [0, 2])], atol=1e-12)
        np.testing.assert_allclose(halves.prior[0] + halves.rest[0], found[0], atol=1e-12)
        np.testing.assert_allclose(halves.prior[1] + 1.0 * halves.rest[1], found[1], atol=1e-12)
        np.testing.assert_allclose(halves.prior[1, 1], [0, 1], atol=1e-12)


def test_mode_of_a_target_that_is_not_quadratic_has_no_gradient():
    with jax.enable_x64(True):
        blocks = partition(quartic, 3)
        mode = compile_fast(lambda x: laplace.find_mode(quartic, x, blocks))(jnp.array([12.0, -20.0, -9.0]))
        gradient = blocks.gather(jax.grad(lambda x: jnp.sum(quartic(x)))(mode.x), 0.0)
        covariance = np.linalg.inv(mode.hessian)
        # In posterior standard deviations
        assert np.all(np.einsum("bi,bij,bj->b", gradient, covariance, gradient) < (2 * laplace.NEWTON_TOLERANCE) ** 2)
        assert mode.step <= laplace.NEWTON_TOLERANCE


def test_fixed_normals_have_exact_moments_within_blocks():
    terms, _, _ = gaussian()
    draws = laplace.fixed_normals(32, partition(terms, 6))
    np.testing.assert_allclose(draws.mean(0), 0.0, atol=1e-12)
    covariance = draws.T @ draws / 32
    for group in GROUPS:
        np.testing.assert_allclose(covariance[np.ix_(group, group)], np.eye(len(group)), atol=1e-12)


# A Gaussian random intercept: y_ij ~ N(x_i, sigma), x_i ~ N(mean, sd). Laplace's approximation is exact.


def test_expansion_and_warm_start_on_a_random_intercept_far_away():
    m, n = 5, 20
    rng = np.random.default_rng(0)
    y = 1500 + 40 * rng.normal(size=n) + 50 * rng.normal(size=(m, n))
    data = jnp.asarray(y, jnp.float32)

    def terms(theta, x):
        mean, log_sd, log_sigma = theta
        prior = (x - mean) ** 2 * jnp.exp(-2 * log_sd) / 2 + log_sd
        return jnp.concatenate([prior, ((data - x) ** 2 * jnp.exp(-2 * log_sigma) / 2 + log_sigma).ravel()])

    def loss(theta):  # minus the log marginal likelihood, up to (D + K) / 2 log(2 pi)
        mean, log_sd, log_sigma = np.asarray(theta, float)
        total = np.exp(2 * log_sigma) + m * np.exp(2 * log_sd)
        within, between = np.sum((y - y.mean(0)) ** 2), m * np.sum((y.mean(0) - mean) ** 2)
        return n * ((m - 1) * log_sigma + np.log(total) / 2) + within * np.exp(-2 * log_sigma) / 2 + between / total / 2

    sigma2 = np.sum((y - y.mean(0)) ** 2) / (n * (m - 1))
    between = m * np.mean((y.mean(0) - y.mean()) ** 2)
    sd2 = (between - sigma2) / m
    exact = np.array([y.mean(), np.log(sd2) / 2, np.log(sigma2) / 2])
    variance_sd2 = 2 * (between**2 / n + sigma2**2 / (n * (m - 1))) / m**2
    standard_errors = np.array(
        [np.sqrt(between / (m * n)), np.sqrt(variance_sd2) / (2 * sd2), 1 / np.sqrt(2 * n * (m - 1))]
    )

    start = jnp.zeros(3)
    blocks = partition(lambda x: terms(start, x), n)
    normals = jnp.asarray(laplace.fixed_normals(64, blocks), jnp.float32)
    expand = compile_tuned(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, 1))

    # The expansion at a place in the middle is exact: value, gradient and observed information.
    middle = exact + [10.0, 0.3, -0.2]
    here = expand(jnp.asarray(middle, jnp.float32), jnp.zeros(n))
    np.testing.assert_allclose(np.sum(here.mode.terms) + here.half_log_det, loss(middle), rtol=1e-5)
    numerical = [(loss(middle + d) - loss(middle - d)) / 2e-4 for d in 1e-4 * np.eye(3)]
    np.testing.assert_allclose(here.gradient, numerical, rtol=2e-3, atol=2e-3)

    found = laplace.warm_start(expand, start, jnp.zeros(n), np.array([False, True, True]))
    theta = np.asarray(found.theta, float)
    assert found.converged and found.iterations < 40
    assert np.all(abs(theta - exact) < 0.3 * standard_errors), (theta - exact) / standard_errors
    assert loss(theta) - loss(exact) < 0.03


def test_warm_start_on_crossed_effects_that_are_confounded_with_the_mean():
    # 30 latents in one block, too many for draws of exact moments; 99.6% of the information on the mean is missing.
    rng = np.random.default_rng(1)
    rows, columns = np.repeat(np.arange(24), 6), np.tile(np.arange(6), 24)
    y = 23 + 0.8 * rng.normal(size=24)[rows] + 1.8 * rng.normal(size=6)[columns] + 0.5 * rng.normal(size=144)
    data = jnp.asarray(y, jnp.float32)

    def terms(theta, x):
        mean, *log_sds = theta
        away = jnp.concatenate([x[:24], x[24:], data - mean - x[:24][rows] - x[24:][columns]])
        scales = jnp.repeat(jnp.stack(log_sds), np.array([24, 6, 144]), total_repeat_length=174)
        return away**2 * jnp.exp(-2 * scales) / 2 + scales

    def loss(theta):  # minus the log marginal likelihood: balanced, so the eigenvectors of the covariance are known
        row, column, noise = np.exp(2 * np.asarray(theta[1:], float))
        table = y.reshape(24, 6)
        by_row, by_column = table.mean(1) - table.mean(), table.mean(0) - table.mean()
        rest = table - table.mean() - by_row[:, None] - by_column
        parts = [
            (1, 144 * (table.mean() - theta[0]) ** 2, noise + 6 * row + 24 * column),
            (23, 6 * np.sum(by_row**2), noise + 6 * row),
            (5, 24 * np.sum(by_column**2), noise + 24 * column),
            (115, np.sum(rest**2), noise),
        ]
        return sum(size * np.log(variance) + square / variance for size, square, variance in parts) / 2

    blocks = partition(lambda x: terms(jnp.zeros(4), x), 30)
    assert blocks.num_blocks == 1
    normals = jnp.asarray(laplace.fixed_normals(64, blocks), jnp.float32)
    expand = compile_tuned(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, 1))
    found = laplace.warm_start(expand, jnp.array([20.0, 0.0, 0.0, 0.0]), jnp.zeros(30), np.array([False] + 3 * [True]))
    best = minimize(loss, [23.0, 0.0, 0.0, 0.0], method="BFGS")
    assert found.converged and found.iterations < 20
    assert loss(found.theta) - best.fun < 0.01


def test_warm_start_gives_up_without_a_usable_approximation():
    blocks = partition(lambda x: x**2, 1, joint=True)
    bad = lambda theta, x: jnp.stack([jnp.nan * x[0] + theta[0]])  # noqa: E731
    expand = lambda theta, x: laplace.expand(bad, theta, x, jnp.array([[1.0], [-1.0]]), blocks, 1)  # noqa: E731
    assert laplace.warm_start(expand, jnp.zeros(1), jnp.zeros(1), np.array([False])) is None


def test_gradient_of_the_expansion_is_that_of_its_value_for_skewed_latents():
    # y_i ~ Poisson(exp(x_i)), x_i ~ N(mean, sd); L(theta) by differences of its value.
    counts = jnp.array([0.0, 0.0, 1.0, 2.0, 0.0, 5.0])

    def terms(theta, x):
        mean, log_sd = theta
        prior = (x - mean) ** 2 * jnp.exp(-2 * log_sd) / 2 + log_sd
        return jnp.concatenate([prior, jnp.exp(x) - counts * x])

    with jax.enable_x64(True):
        theta = jnp.array([-0.5, -0.2])
        blocks = partition(lambda x: terms(theta, x), 6)
        normals = jnp.asarray(laplace.fixed_normals(4096, blocks))
        expand = compile_fast(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, 1))

        def value(theta):
            there = expand(theta, jnp.zeros(6))
            return float(jnp.sum(there.mode.terms) + there.half_log_det)

        numerical = [(value(theta + d) - value(theta - d)) / 2e-3 for d in 1e-3 * jnp.eye(2)]
        found = expand(theta, jnp.zeros(6)).gradient
        # What is left is of second order in the skewness. Draws around the mode miss the slope in the mean by 0.6.
        np.testing.assert_allclose(found, numerical, atol=0.1)


def test_warm_start_leaves_a_plateau_where_a_scale_is_too_small_to_matter():
    # y_ij ~ N(x_i, sigma), x_i ~ N(0, sd), from sd = exp(-6): the slope in log sd is about 1e-3 there.
    m, n = 8, 40
    rng = np.random.default_rng(3)
    y = 1.5 * rng.normal(size=n) + 2 * rng.normal(size=(m, n))
    data = jnp.asarray(y, jnp.float32)

    def terms(theta, x):
        log_sd, log_sigma = theta
        prior = x**2 * jnp.exp(-2 * log_sd) / 2 + log_sd
        return jnp.concatenate([prior, ((data - x) ** 2 * jnp.exp(-2 * log_sigma) / 2 + log_sigma).ravel()])

    sigma2 = np.sum((y - y.mean(0)) ** 2) / (n * (m - 1))
    sd2 = np.mean(y.mean(0) ** 2) - sigma2 / m
    start = jnp.array([-6.0, 0.0])
    blocks = partition(lambda x: terms(start, x), n)
    normals = jnp.asarray(laplace.fixed_normals(64, blocks), jnp.float32)
    expand = compile_tuned(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, 1))
    found = laplace.warm_start(expand, start, jnp.zeros(n), np.array([True, True]))
    np.testing.assert_allclose(found.theta, [np.log(sd2) / 2, np.log(sigma2) / 2], atol=0.02)


def test_importance_weights_take_most_of_the_error_from_the_value():
    # Three binary answers of each person: logit P(y = 1) = slope x, x ~ N(0, 1), by quadrature.
    ones, (nodes, weights) = np.repeat([0, 1, 2, 3], [30, 10, 5, 15]), np.polynomial.hermite_e.hermegauss(60)

    def terms(log_slope, x):
        eta = jnp.exp(log_slope) * x
        return jnp.concatenate([x**2 / 2 + np.log(2 * np.pi) / 2, 3 * jnp.logaddexp(0.0, eta) - ones * eta])

    def exact(log_slope):
        eta = np.exp(log_slope) * nodes
        likelihood = np.exp(np.outer(ones, eta) - 3 * np.logaddexp(0.0, eta))
        return -np.sum(np.log(likelihood @ weights / np.sqrt(2 * np.pi)))

    blocks = partition(lambda x: terms(0.0, x), len(ones))
    normals = jnp.asarray(laplace.fixed_normals(64, blocks), jnp.float32)
    expand = compile_tuned(lambda theta, x: laplace.expand(lambda t, x: terms(t[0], x), theta, x, normals, blocks, 1))
    for log_slope in (0.0, 1.5):
        there = expand(jnp.array([log_slope]), jnp.zeros(len(ones)))
        value = np.sum(there.mode.terms) + there.half_log_det - len(ones) / 2 * np.log(2 * np.pi)
        assert abs(value - there.log_mean - exact(log_slope)) < 0.4 * abs(value - exact(log_slope))


def test_warm_start_leaves_a_plateau_that_only_joint_steps_lead_away_from():
    # y_i = level - u_i + e_i, u_i half-normal: at a small scale of u, a larger one alone is worse, because the level
    # would have to rise with it; ordinary least squares is a stationary point (Waldman 1982).
    rng = np.random.default_rng(20)
    y = 1.0 + 0.3 * rng.normal(size=150) - np.abs(0.9 * rng.normal(size=150))
    data = jnp.asarray(y, jnp.float32)

    def terms(theta, x):
        level, log_u, log_e = theta
        prior = jnp.exp(2 * (x - log_u)) / 2 - x + log_u - np.log(2 / np.pi) / 2
        residual = (data - level + jnp.exp(x)) * jnp.exp(-log_e)
        return jnp.concatenate([prior, residual**2 / 2 + log_e + np.log(2 * np.pi) / 2])

    def loss(theta):
        level, u, e = theta[0], np.exp(theta[1]), np.exp(theta[2])
        total = np.hypot(u, e)
        scaled = -(y - level) / total
        return -np.sum(np.log(2) + stats.norm.logpdf(scaled) - np.log(total) + stats.norm.logcdf(scaled * u / e))

    best = minimize(loss, np.array([1.0, 0.0, -1.0])).fun
    assert loss(np.array([y.mean(), -9.0, np.log(y.std())])) - best > 2.0  # least squares
    start = jnp.zeros(3)
    blocks = partition(lambda x: terms(start, x), 150)
    normals = jnp.asarray(laplace.fixed_normals(64, blocks), jnp.float32)
    expand = compile_tuned(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, 1))
    for place in (start, jnp.array([y.mean(), -5.0, np.log(y.std())], jnp.float32)):
        found = laplace.warm_start(expand, place, jnp.zeros(150), np.array([False, True, True]))
        assert found.theta[1] > -1.0, found.theta


def test_warm_start_finds_many_loadings_from_nowhere():
    # Y_i ~ N(W x_i, sigma): 37 parameters that are far from quadratic, of which one (a rotation) is not identified.
    rng = np.random.default_rng(4)
    num, size, width = 100, 18, 2
    y = rng.normal(size=(num, width)) * np.array([6.0, 2.0]) @ rng.normal(size=(width, size))
    y += 0.7 * rng.normal(size=(num, size))
    data = jnp.asarray(y, jnp.float32)

    def terms(theta, x):
        w, log_sigma = theta[:-1].reshape(size, width), theta[-1]
        rest = (data - x.reshape(num, width) @ w.T) ** 2 * jnp.exp(-2 * log_sigma) / 2 + log_sigma
        return jnp.concatenate([x**2 / 2, rest.ravel()])

    def loss(theta):
        w, sigma = np.asarray(theta[:-1], float).reshape(size, width), np.exp(float(theta[-1]))
        covariance = w @ w.T + sigma**2 * np.eye(size)
        return num / 2 * (np.linalg.slogdet(covariance)[1] + np.trace(np.linalg.solve(covariance, y.T @ y / num)))

    values, vectors = np.linalg.eigh(y.T @ y / num)  # Tipping and Bishop 1999
    sigma2 = values[:-width].mean()
    best = loss(np.append((vectors[:, -width:] * np.sqrt(values[-width:] - sigma2)).ravel(), np.log(sigma2) / 2))

    start = jnp.asarray(np.append(0.1 * rng.normal(size=size * width), 0.0), jnp.float32)
    blocks = partition(lambda x: terms(start, x), num * width)
    assert blocks.num_blocks == num
    normals = jnp.asarray(laplace.fixed_normals(32, blocks), jnp.float32)
    expand = compile_fast(lambda theta, x: laplace.expand(terms, theta, x, normals, blocks, num * size))
    found = laplace.warm_start(expand, start, jnp.zeros(num * width), np.arange(len(start)) == size * width)
    assert loss(found.theta) - best < 0.1, loss(found.theta) - best
    assert found.iterations < 30, found.iterations
