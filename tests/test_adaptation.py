# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Rules that adapt step sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_smcopt.adaptation import (
    LARGEST_SIZE,
    SMALLEST_SIZE,
    DualAveraging,
    RobbinsMonro,
    adapt_size,
    adapt_unadjusted_size,
)


def test_without_a_target_the_size_stays():
    size = jnp.array([0.3, 2.0])
    np.testing.assert_array_equal(adapt_size(size, jnp.array([0.0, 1.0]), None, 0), size)


def test_size_finds_the_target_per_block_from_any_unit():
    """Noisy acceptances ``exp(-size / unit)``: the right sizes are ``-log(0.6) unit``."""
    unit = jnp.array([1e-3, 1.0, 100.0])

    def step(size, k):
        observed = jnp.exp(-size / unit) + 0.05 * random.normal(random.fold_in(random.key(0), k), (3,))
        size = adapt_size(size, observed, 0.6, k)
        return size, size

    sizes = np.asarray(jax.lax.scan(step, jnp.full(3, 0.5), jnp.arange(800))[1])
    # At a rate of 0.03 the noise of log size has standard deviation about 0.05 * sqrt(0.03 / (2 * 0.3)) = 0.01.
    np.testing.assert_allclose(sizes[400:].mean(0), -np.log(0.6) * unit, rtol=0.02)
    np.testing.assert_allclose(sizes[-1], -np.log(0.6) * unit, rtol=0.06)


def test_size_stays_within_bounds():
    size = jnp.array([2e-6, 900.0])
    for _ in range(20):
        size = adapt_size(size, jnp.array([0.0, 1.0]), 0.5, 0)
    np.testing.assert_allclose(size, [SMALLEST_SIZE, LARGEST_SIZE], rtol=1e-6)


def test_unadjusted_size_finds_the_target_from_either_side():
    """What a move keeps of the effective particles is ``exp(-(h / unit)^3)``; far too large a step keeps nothing."""
    unit = jnp.array([1e-3, 1.0, 30.0])
    size = jnp.full(3, 0.3)
    for k in range(120):
        size = adapt_unadjusted_size(size, jnp.exp(-((size / unit) ** 3)), 0.95, k)
    np.testing.assert_allclose(size, (-np.log(0.95)) ** (1 / 3) * unit, rtol=0.1)
    np.testing.assert_array_equal(adapt_unadjusted_size(size, jnp.zeros(3), None, 0), size)


@pytest.mark.parametrize(
    "rule", [DualAveraging(0.6, warmup=200), RobbinsMonro(0.6)], ids=lambda rule: type(rule).__name__
)
def test_a_rule_finds_the_target_per_block(rule):
    """Acceptances as above, in 100 blocks of each unit; the noise of their logarithms is about 0.05."""
    unit = jnp.repeat(jnp.array([1e-3, 1.0, 100.0]), 100)

    def step(state, k):
        observed = jnp.exp(-rule.value(state) / unit)
        noise = 0.05 * random.normal(random.fold_in(random.key(0), k), observed.shape)
        return rule.update(state, observed + noise), None

    last, _ = jax.lax.scan(step, rule.init(jnp.full(300, 0.5)), jnp.arange(800))
    off = np.log(np.asarray(rule.value(last)) / (-np.log(0.6) * np.asarray(unit))).reshape(3, 100)
    np.testing.assert_allclose(off.mean(1), 0.0, atol=0.05)  # less than the noise of one
    assert np.max(abs(off)) < 0.3


@pytest.mark.parametrize("wrong", [{"target": 1.5}, {"warmup": 0}, {"gamma": -1.0}, {"kappa": 0}])
def test_dual_averaging_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        DualAveraging(**wrong)
