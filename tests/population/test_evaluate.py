# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Resampling block by block: whose effective sample size is low takes its ancestors, with all that is known of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import partition, potential_of
from jax import random

from numpyro_smcopt.population.evaluate import resample_blocks
from numpyro_smcopt.resampling import multinomial, residual, stratified, systematic
from numpyro_smcopt.weights import effective_sample_size, uniform_log_weights

INF = np.inf
SCHEMES = (systematic, stratified, multinomial, residual)
# Effective sample sizes 3.33, 4 and 1 of 4
LOG_WEIGHTS = jnp.log(jnp.array([[0.4, 0.25, 1.0], [0.3, 0.25, 0.0], [0.2, 0.25, 0.0], [0.1, 0.25, 0.0]]))
KEYS = random.split(random.key(0), 3)


def terms(x):
    """Coordinates 0 and 3 together, 1 and 2 by themselves; the last term depends on none."""
    return jnp.stack([x[1] ** 2, x[0] * x[3] ** 2, jnp.cosh(x[2]), jnp.asarray(7.0, x.dtype), x[3]])


BLOCKS = partition(terms, 4)
CLOUD = jax.vmap(potential_of(terms, BLOCKS).evaluate)(random.normal(random.key(1), (4, 4)))


@jax.jit
def resampled(log_weights, threshold):
    return resample_blocks(KEYS, CLOUD, log_weights, effective_sample_size(log_weights), BLOCKS, systematic, threshold)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_block_takes_coordinates_terms_and_gradients_of_the_ancestors_that_the_scheme_draws(scheme):
    of_x, of_terms = np.asarray(BLOCKS.of_coordinate), np.asarray(BLOCKS.of_term)
    assert BLOCKS.num_blocks == 3 and of_x[0] == of_x[3] == of_terms[1] == of_terms[4] and of_terms[3] == 3
    points, log_weights, num = resample_blocks(
        KEYS, CLOUD, LOG_WEIGHTS, effective_sample_size(LOG_WEIGHTS), BLOCKS, scheme, 0.9
    )
    own, low = np.arange(4), [True, False, True]
    ancestors = [scheme(KEYS[b], LOG_WEIGHTS[:, b]) if low[b] else own for b in range(3)]
    for d in range(4):
        np.testing.assert_array_equal(points.x[:, d], CLOUD.x[ancestors[of_x[d]], d])
        np.testing.assert_array_equal(points.grad[:, d], CLOUD.grad[ancestors[of_x[d]], d])
    for k in range(5):
        np.testing.assert_array_equal(points.terms[:, k], CLOUD.terms[[*ancestors, own][of_terms[k]], k])
    equal = uniform_log_weights(4, 3)
    np.testing.assert_array_equal(log_weights, np.where(low, equal, LOG_WEIGHTS))
    assert num == 2


def test_one_block_takes_whole_particles_with_their_scores():
    blocks = partition(terms, 4, joint=True)
    cloud = CLOUD._replace(score=random.normal(random.key(2), (4, 2)))
    log_weights = LOG_WEIGHTS[:, 2:]  # all on the first
    points, _, num = resample_blocks(KEYS[:1], cloud, log_weights, jnp.ones(1), blocks, systematic, 0.5)
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, np.stack([old[0]] * 4)), points, cloud)
    assert num == 1


def test_the_threshold_may_be_traced_and_acts_on_each_block():
    for threshold, low in ((0.0, [False] * 3), (0.5, [False, False, True]), (1.0, [True, False, True])):
        points, log_weights, num = resampled(LOG_WEIGHTS, threshold)
        np.testing.assert_array_equal(log_weights, np.where(low, uniform_log_weights(4, 3), LOG_WEIGHTS))
        third = int(np.flatnonzero(np.asarray(BLOCKS.of_coordinate) == 2)[0])
        np.testing.assert_array_equal(points.x[:, third], CLOUD.x[[0, 0, 0, 0] if low[2] else [0, 1, 2, 3], third])
        assert num == sum(low)
    assert resampled._cache_size() == 1


def test_a_block_without_any_weight_stays_in_place_with_equal_weights():
    points, log_weights, num = resampled(jnp.full((4, 3), -INF), 0.5)
    jax.tree.map(np.testing.assert_array_equal, points, CLOUD)
    np.testing.assert_array_equal(log_weights, uniform_log_weights(4, 3))
    assert num == 3
