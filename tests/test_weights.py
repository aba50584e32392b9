# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Log weights: closed forms, invariances, and what infinities and float32 may not do.

Monte Carlo comparisons allow 5 standard errors: a correct program fails one with probability 6e-7, were the seeds not
fixed.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import partition
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import random
from scipy.special import logsumexp

from numpyro_smcopt.weights import (
    block_moments,
    conditional_ess,
    effective_sample_size,
    incremental_log_weight,
    reweight,
    small_sample_factor,
    uniform_log_weights,
    weighted_mean,
    weighted_variance,
)

STANDARD_ERRORS = 5.0
INF, NAN = np.inf, np.nan
checked = settings(max_examples=60, deadline=None, derandomize=True)

ess_compiled = jax.jit(effective_sample_size)
reweight_compiled = jax.jit(reweight)


def log_weight_arrays(min_particles=1):
    """[N, B] with some weights zero."""
    entries = st.one_of(st.floats(-20, 0, width=32), st.just(-INF))
    shapes = st.tuples(st.sampled_from([n for n in (1, 2, 5, 17) if n >= min_particles]), st.sampled_from([1, 3]))
    return shapes.flatmap(lambda shape: arrays(np.float32, shape, elements=entries))


# Uniform weights


@pytest.mark.parametrize(("num_blocks", "shape"), [(None, (7,)), (3, (7, 3))])
def test_uniform_log_weights_sum_to_one(num_blocks, shape):
    log_weights = uniform_log_weights(7, num_blocks)
    assert log_weights.shape == shape and log_weights.dtype == jnp.zeros(()).dtype and not log_weights.weak_type
    np.testing.assert_allclose(np.exp(log_weights).sum(0), 1.0, rtol=1e-6)


def test_uniform_log_weights_take_a_type():
    assert uniform_log_weights(7, dtype=jnp.float16).dtype == jnp.float16


# Effective sample size


@pytest.mark.parametrize(
    ("log_weights", "expected"),
    [
        ([0.0] * 10, 10.0),
        ([-1000.0] * 10, 10.0),  # equal, and far from normalised
        ([0.0] * 4 + [-INF] * 6, 4.0),
        ([-INF, 3.0, -INF], 1.0),
        ([NAN, 0.0, 0.0, INF, -INF], 2.0),
        ([-INF, -INF], 0.0),
        ([NAN, NAN], 0.0),
        (np.log([0.5, 0.25, 0.25]), 1 / 0.375),
    ],
)
def test_effective_sample_size_known_values(log_weights, expected):
    np.testing.assert_allclose(effective_sample_size(jnp.asarray(log_weights)), expected, rtol=1e-6)


@given(log_weights=log_weight_arrays(), shift=st.floats(-50, 50, width=32), seed=st.integers(0, 99))
@checked
def test_effective_sample_size_ignores_shift_and_order(log_weights, shift, seed):
    ess = np.asarray(ess_compiled(log_weights))
    alive = np.isfinite(log_weights)
    assert np.all((ess >= 1) & (ess <= len(log_weights)) | ~alive.any(0) & (ess == 0))
    np.testing.assert_allclose(ess_compiled(log_weights + np.float32(shift)), ess, rtol=1e-4)
    order = np.random.default_rng(seed).permutation(len(log_weights))
    np.testing.assert_allclose(ess_compiled(log_weights[order]), ess, rtol=1e-6)


def test_effective_sample_size_never_exceeds_the_number_of_particles():
    # Weights equal up to rounding: unclipped, the ratio is 1e-7 above N for about half of them.
    log_weights = 1e-6 * random.normal(random.key(0), (1001, 200))
    assert jnp.max(effective_sample_size(log_weights)) <= 1001


# Reweighting


@given(log_weights=log_weight_arrays(), seed=st.integers(0, 2**16), scale=st.floats(0, 30))
@checked
def test_reweight_normalises_and_keeps_dead_particles_dead(log_weights, seed, scale):
    rng = np.random.default_rng(seed)
    increment = (scale * rng.standard_normal(log_weights.shape)).astype(np.float32)
    increment[rng.random(increment.shape) < 0.2] = rng.choice([NAN, INF, -INF])
    new = reweight_compiled(log_weights, increment)
    kept = np.isfinite(log_weights) & np.isfinite(increment)
    collapsed = ~kept.any(0)
    np.testing.assert_array_equal(new.collapsed, collapsed)
    np.testing.assert_array_equal(np.isfinite(new.log_weights), kept | collapsed)
    np.testing.assert_allclose(np.exp(np.float64(new.log_weights)).sum(0), 1.0, rtol=2e-5)
    assert new.num_nonfinite == (np.isfinite(log_weights) & ~np.isfinite(increment)).sum()
    old_weights = np.exp(np.float64(log_weights))
    new_weights = old_weights * np.exp(np.where(kept, np.float64(increment), -INF))
    ratio = np.where(collapsed, 1.0, new_weights.sum(0)) / np.where(collapsed, 1.0, old_weights.sum(0))
    np.testing.assert_allclose(new.log_mean, np.log(ratio), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(new.ess, np.where(collapsed, 0, ess_compiled(new.log_weights)), rtol=1e-4)


def test_reweight_gives_nonfinite_increments_no_weight_and_counts_them():
    old = jnp.log(jnp.array([[0.25, 0.5], [0.25, 0.5], [0.25, 0.0], [0.25, 0.0]]))
    # In the second block the NaN and the infinity meet particles that have no weight to lose.
    new = reweight_compiled(old, jnp.array([[NAN, 0.0], [INF, 0.0], [0.0, NAN], [jnp.log(3.0), INF]]))
    np.testing.assert_allclose(jnp.exp(new.log_weights), [[0, 0.5], [0, 0.5], [0.25, 0], [0.75, 0]], rtol=1e-6)
    np.testing.assert_allclose(new.log_mean, [0.0, 0.0], atol=1e-6)
    np.testing.assert_allclose(new.ess, [1.6, 2.0], rtol=1e-6)
    assert new.num_nonfinite == 2 and not new.collapsed.any()


@pytest.mark.parametrize("increment", [-INF, NAN, INF])
def test_reweight_replaces_a_collapsed_block_by_equal_weights(increment):
    old = jnp.log(jnp.array([[0.2, 0.5], [0.8, 0.5]]))
    new = reweight_compiled(old, jnp.array([[increment, 0.0], [increment, 0.0]]))
    np.testing.assert_allclose(jnp.exp(new.log_weights), 0.5, rtol=1e-6)
    np.testing.assert_array_equal(new.log_mean, 0.0)
    np.testing.assert_allclose(new.ess, [0.0, 2.0], rtol=1e-6)
    np.testing.assert_array_equal(new.collapsed, [True, False])
    assert new.num_nonfinite == 2


def test_reweight_by_zero_adds_nothing_to_the_evidence():
    # float32 holds -log 100 with an error that would add up over a run.
    new = reweight(uniform_log_weights(100, 3), jnp.zeros((100, 3)))
    np.testing.assert_array_equal(new.log_mean, 0.0)


def test_reweight_treats_blocks_separately_and_vmaps():
    key_old, key_new = random.split(random.key(0))
    old = jax.nn.log_softmax(random.normal(key_old, (9, 4)), axis=0)
    increment = random.normal(key_new, (9, 4)).at[:, 1].set(-INF)
    together = reweight_compiled(old, increment)
    separately = jax.jit(jax.vmap(reweight, in_axes=1, out_axes=-1))(old, increment)
    for field in ("log_weights", "log_mean", "ess", "collapsed"):
        np.testing.assert_allclose(getattr(together, field), getattr(separately, field), rtol=1e-6, err_msg=field)
    assert together.num_nonfinite == separately.num_nonfinite.sum() == 9


def test_reweight_has_finite_gradients():
    def total(increment):
        new = reweight(uniform_log_weights(3, 3), increment)
        return jnp.sum(new.log_mean) + jnp.sum(new.ess) + jnp.sum(jnp.exp(new.log_weights)[0])

    gradient = jax.jit(jax.grad(total))(jnp.array([[NAN, 0.3, -INF], [0.2, 0.1, -INF], [-INF, 0.0, INF]]))
    assert jnp.all(jnp.isfinite(gradient))
    np.testing.assert_array_equal(gradient[:, 2], 0.0)
    # d log_mean / d increment is the new weight.
    increment = jnp.array([0.5, -1.0, 0.0])
    slope = jax.grad(lambda inc: reweight(uniform_log_weights(3), inc).log_mean)(increment)
    np.testing.assert_allclose(slope, jax.nn.softmax(increment), rtol=1e-6)


def test_reweight_rejects_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match=r"expected log_increment of the shape of log_weights, \(3, 3\), got \(3,\)"):
        reweight(uniform_log_weights(3, 3), jnp.zeros(3))


def test_log_means_add_up_to_an_unbiased_evidence():
    """U = x^2/2 becomes c + (x - m)^2/2 in four steps: Z'/Z = exp(-c). Between the steps the weights are kept, so the
    log means must telescope; the mean over clouds is then compared with the exact ratio.
    """
    num_clouds, num_particles, constant = 4000, 16, 3.0
    x = random.normal(random.key(0), (num_particles, num_clouds))

    def terms(step):  # [N, B, K]
        return jnp.stack([0.5 * (x - 0.2 * step) ** 2, jnp.full_like(x, constant * step / 4)], axis=-1)

    log_weights, log_evidence = uniform_log_weights(num_particles, num_clouds), jnp.zeros(num_clouds)
    for step in range(4):
        increment = incremental_log_weight(terms(step), terms(step + 1), lambda t: t.sum(-1))
        new = reweight_compiled(log_weights, increment)
        log_weights, log_evidence = new.log_weights, log_evidence + new.log_mean
    direct = jax.nn.logsumexp((terms(0) - terms(4)).sum(-1), axis=0) - jnp.log(num_particles)
    np.testing.assert_allclose(log_evidence, direct, atol=1e-5)
    ratio = np.exp(np.asarray(log_evidence, np.float64) + constant)
    standard_error = ratio.std(ddof=1) / np.sqrt(num_clouds)
    assert abs(ratio.mean() - 1.0) < STANDARD_ERRORS * standard_error
    assert standard_error < 0.01  # else the line above says nothing


# Increments


def test_incremental_log_weight_sums_each_block_and_adds_the_log_ratio():
    old, new = jnp.arange(12.0).reshape(2, 6), jnp.ones((2, 6))
    increment = incremental_log_weight(old, new, lambda t: t.reshape(2, 3, 2).sum(-1), jnp.array([1.0, 2.0, 3.0]))
    np.testing.assert_allclose(increment, [[0, 5, 10], [12, 17, 22]])


def test_incremental_log_weight_keeps_its_digits_over_a_million_terms():
    """In float32 the totals are near 5e6, where numbers are 0.5 apart; the ESS must still be that of float64."""
    num_terms, num_particles = 1_000_000, 16
    rng = np.random.default_rng(0)
    data, shift, log_scale = rng.standard_normal(num_terms), 3e-4, 4.0
    positions = 3e-3 * rng.standard_normal(num_particles)
    exact, naive, ours = [], [], []
    for x in positions:
        old, new = (log_scale + 0.5 * np.log(2 * np.pi) + 0.5 * (data - mean) ** 2 for mean in (x, x + shift))
        exact.append((old - new).sum())
        old, new = jnp.asarray(old, jnp.float32), jnp.asarray(new, jnp.float32)
        naive.append(float(jnp.sum(old) - jnp.sum(new)))
        ours.append(float(incremental_log_weight(old, new, jnp.sum)))
    exact_ess, naive_ess, our_ess = (float(effective_sample_size(jnp.asarray(a))) for a in (exact, naive, ours))
    assert 2.0 < exact_ess < 0.95 * num_particles
    assert max(abs(np.subtract(ours, exact))) < 2e-3
    assert abs(our_ess / exact_ess - 1) < 1e-3
    # The test can fail: totals subtracted after the sum do.
    assert max(abs(np.subtract(naive, exact))) > 0.2
    assert abs(naive_ess / exact_ess - 1) > 0.01


# Weighted moments


def test_weighted_moments_agree_with_numpy():
    rng = np.random.default_rng(0)
    weights, values = rng.dirichlet(np.ones(8)), rng.standard_normal((8, 3))
    log_weights = jnp.asarray(np.log(weights) + 5.0)  # need not be normalised
    # numpy's reliability weights carry the factor 1 / (1 - sum w^2).
    expected = np.diag(np.cov(values, rowvar=False, aweights=weights))
    np.testing.assert_allclose(weighted_mean(log_weights, jnp.asarray(values)), weights @ values, rtol=1e-5)
    np.testing.assert_allclose(weighted_variance(log_weights, jnp.asarray(values)), expected, rtol=1e-4)
    np.testing.assert_allclose(weighted_variance(log_weights, jnp.asarray(values[:, 0])), expected[0], rtol=1e-4)


@pytest.mark.parametrize("weights", [[0.2] * 5, [0.4, 0.3, 0.15, 0.1, 0.05]])
def test_weighted_variance_is_unbiased_with_five_particles(weights):
    num_clouds = 20_000
    values = 2.0 * random.normal(random.key(0), (num_clouds, 5))
    log_weights = jnp.log(jnp.array(weights))
    variances = np.asarray(jax.jit(jax.vmap(weighted_variance, in_axes=(None, 0)))(log_weights, values), np.float64)
    standard_error = variances.std() / np.sqrt(num_clouds)
    assert abs(variances.mean() - 4.0) < STANDARD_ERRORS * standard_error
    # Without the factor it is a fifth or more too small, which this many clouds must notice.
    uncorrected = variances / float(small_sample_factor(log_weights))
    assert abs(uncorrected.mean() - 4.0) > STANDARD_ERRORS * standard_error


@pytest.mark.parametrize("moment", [weighted_mean, weighted_variance])
def test_particles_without_weight_are_absent(moment):
    log_weights = jnp.asarray(np.log([0.2, 1.0, 0.5, 0.3], dtype=np.float32))
    values = jnp.array([[1.0, 2.0], [0.0, 0.0], [0.0, -1.0], [4.0, 0.5]])
    present = np.array([0, 2, 3])
    expected = moment(log_weights[present], values[present])
    compiled = jax.jit(moment)
    gradient = jax.jit(jax.grad(lambda *args: jnp.sum(moment(*args)), argnums=(0, 1)))
    for absent_value in (NAN, INF, -INF):
        for no_weight in (-INF, NAN, -200.0):  # exp(-200) is 0 in float32
            args = log_weights.at[1].set(no_weight), values.at[1].set(absent_value)
            np.testing.assert_allclose(compiled(*args), expected, rtol=1e-5)
            assert all(np.all(np.isfinite(part)) for part in gradient(*args))
    assert not np.any(np.isfinite(compiled(log_weights, values.at[1].set(NAN))))  # with weight it counts


def test_one_particle_with_all_the_weight_has_no_spread():
    log_weights, values = jnp.array([-INF, 0.0, -200.0]), jnp.array([1e3, 2.0, -1e3])
    assert weighted_variance(log_weights, values) == 0.0
    assert jnp.all(jnp.isfinite(jax.grad(weighted_variance, argnums=1)(log_weights, values)))
    assert small_sample_factor(log_weights) == 1.0


def test_moments_without_any_weight_are_undefined():
    assert jnp.isnan(weighted_mean(jnp.array([-INF, -INF]), jnp.array([1.0, 2.0])))


@pytest.mark.parametrize(("weights_shape", "values_shape"), [((3,), (4, 2)), ((3, 2), (3, 2)), ((3,), ())])
def test_moments_reject_shapes_that_do_not_fit(weights_shape, values_shape):
    with pytest.raises(ValueError, match=r"expected log_weights of shape \[N\] and values of shape \[N, ...\], got"):
        weighted_mean(jnp.zeros(weights_shape), jnp.zeros(values_shape))


def test_double_precision_is_kept():
    with jax.enable_x64(True):
        log_weights = uniform_log_weights(5, 2)
        new = reweight(log_weights, jnp.ones((5, 2)))
        moments = weighted_variance(log_weights[:, 0], jnp.ones((5, 3)))
        for array in (log_weights, new.log_weights, new.log_mean, new.ess, moments, effective_sample_size(log_weights)):
            assert array.dtype == jnp.float64
        assert new.num_nonfinite.dtype == jnp.int32
        np.testing.assert_allclose(new.log_mean, 1.0, rtol=1e-14)


def test_conditional_ess_charges_a_step_for_itself_only():
    """Gaussian increments of variance v keep ``exp(-v)``, whatever the weights were before."""
    rng = np.random.default_rng(0)
    log_weights = jax.nn.log_softmax(jnp.asarray(rng.normal(size=(200_000, 2)) * [0.0, 1.5]), axis=0)
    increment = jnp.asarray(rng.normal(size=(200_000, 2)) * 0.5 + 7.0)
    np.testing.assert_allclose(conditional_ess(log_weights, increment), np.exp(-0.25), rtol=0.02)
    assert effective_sample_size(log_weights + increment)[1] < 0.2 * 200_000


def test_conditional_ess_of_lost_particles():
    log_weights = jnp.log(jnp.full((4, 3), 0.25))
    increment = jnp.array(
        [[0.0, jnp.nan, -jnp.inf], [0.0, jnp.nan, jnp.inf], [0.0, 5.0, jnp.nan], [0.0, 5.0, -jnp.inf]]
    )
    np.testing.assert_allclose(conditional_ess(log_weights, increment), [1.0, 0.5, 0.0], rtol=1e-6)


def test_block_moments_are_weighted_moments_of_every_coordinate():
    rng = np.random.default_rng(5)
    terms = lambda x: jnp.stack([x[0] * x[2], x[1], x[3]])  # noqa: E731
    blocks = partition(terms, 4)
    of_coordinate = np.asarray(blocks.of_coordinate)
    log_weights, values = np.log(rng.dirichlet(np.ones(9), 3).T), rng.normal(3.0, 2.0, (9, 4))
    log_weights[2, 1] = -np.inf
    log_weights -= logsumexp(log_weights, axis=0)
    values[2, of_coordinate == 1] = np.nan
    mean, variance = block_moments(jnp.asarray(log_weights, jnp.float32), jnp.asarray(values, jnp.float32), blocks)
    for d, block in enumerate(of_coordinate):
        one = jnp.asarray(log_weights[:, block], jnp.float32), jnp.asarray(values[:, d], jnp.float32)
        np.testing.assert_allclose(mean[d], weighted_mean(*one), rtol=1e-5)
        np.testing.assert_allclose(variance[d], weighted_variance(*one), rtol=1e-4)
