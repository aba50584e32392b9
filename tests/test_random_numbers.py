# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers: against the exact quantiles of their bits, and as samples."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from scipy import special, stats

from numpyro_smcopt import random_numbers
from numpyro_smcopt.random_numbers import draw_normals, draw_random_numbers


def test_numbers_are_the_quantiles_of_their_bits():
    """Every 30,000th pattern of 32 bits, and the ends."""
    bits = np.arange(0, 2**32, 30_011, dtype=np.uint64)
    bits = np.concatenate([bits, np.arange(0, 10**6, 512), 2**32 - 1 - np.arange(0, 10**6, 512)]).astype(np.uint32)
    probability = ((bits >> 9) + 0.5) / 2**23
    np.testing.assert_array_equal(jax.jit(random_numbers._uniforms)(bits), probability)
    normal = jax.jit(random_numbers._normals)(bits)
    np.testing.assert_allclose(normal, special.ndtri(probability), rtol=4e-7)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_noise_is_normal_and_uniform_and_uncorrelated(dtype):
    num = 20_000
    with jax.enable_x64(True):
        drawn = draw_random_numbers(random.key(0), jnp.zeros((num, 2), dtype), 4)
        more = draw_normals(random.key(0), (num, 3), dtype)
    assert drawn.normal.dtype == drawn.uniform.dtype == more.dtype == dtype
    assert drawn.normal.shape == (num, 2) and drawn.uniform.shape == (num, 4)
    numbers = np.concatenate([drawn.normal, drawn.uniform], 1)
    for k in range(6):
        assert stats.kstest(numbers[:, k], "norm" if k < 2 else "uniform").pvalue > 1e-4
    assert stats.kstest(np.ravel(more), "norm").pvalue > 1e-4
    assert np.all(abs(np.corrcoef(numbers.T) - np.eye(6)) < 5 / np.sqrt(num))
    lagged = np.corrcoef(numbers[:-1].T, numbers[1:].T)[:6, 6:]  # neighbouring particles
    assert np.all(abs(lagged) < 5 / np.sqrt(num))


def test_a_kernel_without_uniforms_gets_none():
    assert draw_random_numbers(random.key(0), jnp.zeros((5, 3)), 0).uniform.shape == (5, 0)


@pytest.mark.parametrize("key", [random.key, random.PRNGKey, lambda seed: random.key(seed, impl="rbg")])
@pytest.mark.parametrize("shape", [(1,), (2,), (7, 3), (4, 8)])
def test_bits_and_keys_are_those_of_jax(key, shape):
    with jax.threefry_partitionable(False):
        np.testing.assert_array_equal(random_numbers._bits(key(3), shape), random.bits(key(3), shape, jnp.uint32))
    ours, theirs = random_numbers.split(key(3), shape[0]), random.split(key(3), shape[0])
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(random.key_data(ours), random.key_data(theirs))


@pytest.mark.parametrize("partitionable", [False, True])
def test_keys_are_those_of_jax_with_either_option(partitionable):
    with jax.threefry_partitionable(partitionable):
        ours, theirs = (random.key_data(split(random.key(1), 3)) for split in (random_numbers.split, random.split))
    np.testing.assert_array_equal(ours, theirs)
