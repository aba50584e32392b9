# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Calibrated weights against closed forms, quadrature and the plain weighted mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smcopt import control_variates
from numpyro_smcopt.blocks import Blocks, one_block
from numpyro_smcopt.weights import uniform_log_weights

calibrated_weights = jax.jit(control_variates.calibrated_weights)


def singles(num_coordinates):
    """Blocks of one coordinate and one term each."""
    index = jnp.arange(num_coordinates)
    return Blocks(index, index, index[:, None], index, index[:, None])


def pairs(num_blocks):
    index = jnp.arange(2 * num_blocks)
    return Blocks(index // 2, index // 2, index.reshape(-1, 2), index, index.reshape(-1, 2))


def test_first_and_second_moments_of_gaussians_have_no_monte_carlo_error():
    """Correlated pairs, 64 particles each: means, variances and covariances are exact, whatever the draws."""
    precision = jnp.array([[2.0, 0.8], [0.8, 1.0]])
    covariance, mean = jnp.linalg.inv(precision), jnp.array([5.0, -3.0])
    noise = random.normal(random.key(0), (64, 3, 2)) @ jnp.linalg.cholesky(covariance).T
    x = (mean + noise).reshape(64, 6)
    grad = (noise @ precision).reshape(64, 6)
    weights = calibrated_weights(x, grad, uniform_log_weights(64, 3), pairs(3))
    draws = x.reshape(64, 3, 2)
    np.testing.assert_allclose(weights.sum(0), 1.0, atol=1e-5)
    got = jnp.einsum("nb,nbi->bi", weights, draws)
    np.testing.assert_allclose(got, jnp.broadcast_to(mean, (3, 2)), atol=1e-3)
    second = jnp.einsum("nb,nbi,nbj->bij", weights, draws - mean, draws - mean)
    np.testing.assert_allclose(second, jnp.broadcast_to(covariance, (3, 2, 2)), atol=2e-3)
    plain = jnp.abs(draws.mean(0) - mean).max()
    assert plain > 0.03  # the plain mean does have an error


def test_wrong_weights_and_a_lagging_cloud_are_corrected_for_gaussians():
    x = 0.4 + 1.3 * random.normal(random.key(1), (128, 1))  # not draws of N(0, 1) at all
    weights = calibrated_weights(x, x, uniform_log_weights(128, 1), singles(1))
    np.testing.assert_allclose(weights[:, 0] @ x[:, 0], 0.0, atol=1e-3)
    np.testing.assert_allclose(weights[:, 0] @ x[:, 0] ** 2, 1.0, atol=2e-3)


def test_no_bias_of_order_one_over_n_on_a_skewed_target():
    """log of Gamma(2): 2,000 clouds of 32, within 4 standard errors, and with less variance than plain means.

    Regressing and correcting with the same particles would be off by several standard errors.
    """
    num_clouds, num = 2_000, 32
    x = jnp.log(random.gamma(random.key(2), 2.0, (num, num_clouds)))
    grad = jnp.exp(x) - 2.0
    blocks = singles(num_clouds)
    weights = calibrated_weights(x, grad, uniform_log_weights(num, num_clouds), blocks)
    values = {"x": x, "square": x**2, "root": jnp.exp(x / 2)}
    # What the variates explain; the square is mostly its long left tail, and 16 particles regress it badly.
    smaller = {"x": 0.6, "square": 0.9, "root": 0.6}
    digamma, trigamma = 1 - np.euler_gamma, np.pi**2 / 6 - 1
    exact = {"x": digamma, "square": trigamma + digamma**2, "root": 1.3293403881791370}  # Gamma(5/2)
    for name, value in values.items():
        estimates = np.asarray((weights * value).sum(0))
        error = estimates.std() / np.sqrt(num_clouds)
        assert abs(estimates.mean() - exact[name]) < 4 * error, name
        assert estimates.std() < smaller[name] * np.asarray(value.mean(0)).std(), name


def test_unequal_weights_are_taken_into_account():
    """Draws of N(0.5, 1) weighted to N(0, 1); third moment 0 within 4 standard errors over 500 clouds."""
    num_clouds, num = 500, 128
    x = 0.5 + random.normal(random.key(3), (num, num_clouds))
    log_weights = jax.nn.log_softmax(-(x**2) / 2 + (x - 0.5) ** 2 / 2, axis=0)
    weights = calibrated_weights(x, x, log_weights, singles(num_clouds))
    third = np.asarray((weights * x**3).sum(0))
    assert abs(third.mean()) < 4 * third.std() / np.sqrt(num_clouds)


def test_few_particles_fall_back_to_plain_weights():
    x = random.normal(random.key(4), (4, 1))
    log_weights = jax.nn.log_softmax(random.normal(random.key(5), (4, 1)), axis=0)
    np.testing.assert_array_equal(calibrated_weights(x, x, log_weights, singles(1)), jnp.exp(log_weights))


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_particle_without_weight_poisons_nothing(bad):
    x = random.normal(random.key(6), (64, 2))
    log_weights = uniform_log_weights(64, 2).at[3, 0].set(-jnp.inf)
    log_weights = jax.nn.log_softmax(log_weights, axis=0)
    weights = calibrated_weights(x.at[3, 0].set(bad), x.at[3, 0].set(bad), log_weights, singles(2))
    assert np.all(np.isfinite(weights))
    alive = np.delete(np.asarray(weights[:, 0]) * np.asarray(x[:, 0]), 3)
    np.testing.assert_allclose(alive.sum(), 0.0, atol=0.3)


def test_centring_at_the_mean_of_the_particles_leaves_no_bias():
    """60 blocks of 20 coordinates, 32 particles each: the trace of the second moments within 4 standard errors."""
    num_blocks, width, num = 60, 20, 32
    index = jnp.arange(num_blocks * width)
    members = index.reshape(num_blocks, width)
    blocks = Blocks(index // width, index // width, members, index, jnp.zeros((num_blocks, 0), int))
    x = random.normal(random.key(8), (num, num_blocks * width))
    weights = calibrated_weights(x, x, uniform_log_weights(num, num_blocks), blocks)
    traces = np.asarray((weights[:, :, None] * x.reshape(num, num_blocks, width) ** 2).sum((0, 2)))
    assert abs(traces.mean() - width) < 4 * traces.std() / np.sqrt(num_blocks)


def test_a_large_block_uses_what_it_can_afford():
    """100 coordinates, 128 particles: one variate, the sum of the squares in units of the target."""
    blocks = one_block(None, np.zeros((2, 100)), 1, np.zeros(100, int))
    x = random.normal(random.key(7), (128, 100))
    weights = calibrated_weights(x, x, uniform_log_weights(128, 1), blocks)
    error = abs(float(weights[:, 0] @ (x**2).sum(1)) - 100)
    assert error < 0.3 * abs(float((x**2).sum(1).mean()) - 100)
