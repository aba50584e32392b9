# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One contract for all resampling schemes: expected offspring N w, never an ancestor without weight.

Monte Carlo comparisons allow 5 standard errors: a correct program fails one with probability 6e-7, were the seeds not
fixed; there are about 60 of them.
"""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from jax import random

from numpyro_smcopt import resampling
from numpyro_smcopt.resampling import multinomial, residual, stratified, systematic
from numpyro_smcopt.weights import uniform_log_weights

STANDARD_ERRORS = 5.0
INF, NAN = np.inf, np.nan
BELOW_ONE = np.nextafter(np.float32(1), np.float32(0))

# A new scheme is added here, with the bound on |offspring - N w| that it guarantees.
SCHEMES = {"systematic": systematic, "stratified": stratified, "multinomial": multinomial, "residual": residual}
OFFSPRING_BOUNDS = {"systematic": (-1.0, 1.0), "stratified": (-2.0, 2.0), "residual": (-1.0, INF)}

compiled = {name: jax.jit(scheme) for name, scheme in SCHEMES.items()}
each_scheme = pytest.mark.parametrize("name", SCHEMES)
checked = settings(max_examples=40, deadline=None, derandomize=True)


def count(ancestors, num_particles):
    """Offspring of each particle: [..., N] to [..., N]."""
    return np.apply_along_axis(np.bincount, -1, np.asarray(ancestors), minlength=num_particles)


def normalized(log_weights):
    log_weights = np.where(np.isfinite(log_weights), np.asarray(log_weights, np.float64), -INF)
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


# What every scheme does


@each_scheme
def test_expected_offspring_is_proportional_to_the_weights(name):
    num_draws, weights = 4000, np.array([0.05, 0.0, 0.31, 0.02, 0.0, 0.2, 0.42, 0.0])
    num_particles = len(weights)
    with np.errstate(divide="ignore"):
        log_weights = jnp.asarray(np.log(weights) + 3.0, jnp.float32)
    keys = random.split(random.key(1), num_draws)
    offspring = count(jax.jit(jax.vmap(SCHEMES[name], in_axes=(0, None)))(keys, log_weights), num_particles)
    np.testing.assert_array_equal(offspring.sum(-1), num_particles)
    np.testing.assert_array_equal(offspring[:, weights == 0], 0)
    alive = weights > 0
    # Never less than that of Bernoulli offspring, floor or ceiling of N w.
    part = np.mod(num_particles * weights[alive], 1)
    standard_error = np.maximum(offspring[:, alive].std(0), np.sqrt(part * (1 - part))) / np.sqrt(num_draws)
    error = offspring[:, alive].mean(0) - num_particles * weights[alive]
    assert np.all(abs(error) < STANDARD_ERRORS * standard_error)
    # No more spread than independent draws have; the variance of a variance over 4000 draws is a few percent.
    independent = num_particles * weights[alive] * (1 - weights[alive])
    assert np.all(offspring[:, alive].var(0) < 1.2 * independent)
    if name == "multinomial":
        assert np.all(offspring[:, alive].var(0) > 0.8 * independent)


@each_scheme
def test_expected_offspring_of_many_particles(name):
    """A linear statistic at N = 2000: the mean of f under the resampled clouds is that under the weights."""
    num_particles, num_draws = 2000, 200
    log_weights = 2.0 * random.normal(random.key(0), (num_particles,))
    values = np.cos(np.arange(num_particles))
    keys = random.split(random.key(1), num_draws)
    means = values[np.asarray(jax.jit(jax.vmap(SCHEMES[name], in_axes=(0, None)))(keys, log_weights))].mean(-1)
    weights = normalized(log_weights)
    expected = weights @ values
    independent = np.sqrt(weights @ (values - expected) ** 2 / num_particles)
    standard_error = means.std(ddof=1) / np.sqrt(num_draws)
    assert standard_error < 1.3 * independent / np.sqrt(num_draws)
    assert abs(means.mean() - expected) < STANDARD_ERRORS * standard_error


@st.composite
def log_weight_vectors(draw):
    num_particles = draw(st.sampled_from([1, 2, 7, 64]))  # few sizes: each is compiled
    entries = st.one_of(st.floats(-20, 5, width=32), st.sampled_from([-INF, INF, NAN]))
    return draw(arrays(np.float32, num_particles, elements=entries))


@each_scheme
@given(log_weights=log_weight_vectors(), seed=st.integers(0, 2**16))
@checked
def test_ancestors_have_weight(name, log_weights, seed):
    ancestors = np.asarray(compiled[name](random.key(seed), log_weights))
    num_particles = len(log_weights)
    assert ancestors.dtype == np.int32 and ancestors.shape == (num_particles,)
    if not np.any(np.isfinite(log_weights)):
        np.testing.assert_array_equal(ancestors, np.arange(num_particles))
        return
    assert np.all(np.isfinite(log_weights[ancestors]))
    if name in OFFSPRING_BOUNDS:
        low, high = OFFSPRING_BOUNDS[name]
        excess = count(ancestors, num_particles) - num_particles * normalized(log_weights)
        assert np.all((low - 1e-4 < excess) & (excess < high + 1e-4))


@each_scheme
def test_ancestors_do_not_depend_on_the_scale_of_the_weights(name):
    log_weights = jnp.round(random.normal(random.key(0), (64,)) * 8) / 8  # so that the shift is exact
    for shift in (-512.0, 64.0):
        for seed in range(5):
            key = random.key(seed)
            np.testing.assert_array_equal(compiled[name](key, log_weights + shift), compiled[name](key, log_weights))


@each_scheme
def test_exact_cases(name):
    run, key = compiled[name], random.key(0)
    np.testing.assert_array_equal(run(key, jnp.array([-INF, 0.0, -INF, -INF])), [1, 1, 1, 1])
    np.testing.assert_array_equal(run(key, jnp.array([NAN, NAN, 2.0, INF])), [2, 2, 2, 2])
    np.testing.assert_array_equal(run(key, jnp.array([-INF, NAN, INF, -INF])), [0, 1, 2, 3])
    np.testing.assert_array_equal(run(key, jnp.zeros(1)), [0])
    if name != "multinomial":
        np.testing.assert_array_equal(run(key, uniform_log_weights(4)), [0, 1, 2, 3])
        # In float32 49 * (1 / 49) is just below 1, which would be no copy of any.
        np.testing.assert_array_equal(run(key, uniform_log_weights(49)), np.arange(49))
        halves = jnp.log(jnp.array([0.5, 0.0, 0.5, 0.0]))
        np.testing.assert_array_equal(run(key, halves), [0, 0, 2, 2])


@each_scheme
def test_blocks_are_mapped_over(name):
    log_weights = 2.0 * random.normal(random.key(0), (64, 3)).at[0].set(-INF)
    keys = random.split(random.key(1), 3)
    together = jax.jit(jax.vmap(SCHEMES[name], in_axes=(0, 1), out_axes=1))(keys, log_weights)
    for block in range(3):
        np.testing.assert_array_equal(together[:, block], compiled[name](keys[block], log_weights[:, block]))


@each_scheme
def test_double_precision(name):
    with jax.enable_x64(True):
        log_weights = jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))
        ancestors = SCHEMES[name](random.key(0), log_weights)
        assert log_weights.dtype == jnp.float64 and ancestors.dtype == jnp.int32
        assert np.all(count(ancestors, 4)[1] == 0)


@each_scheme
@pytest.mark.parametrize("shape", [(), (4, 2)])
def test_only_one_block_is_taken(name, shape):
    with pytest.raises(ValueError, match=r"expected log_weights of shape \[N\], got"):
        SCHEMES[name](random.key(0), jnp.zeros(shape))


# Adverse rounding


def naive_systematic(uniform, log_weights):
    """The textbook in float32, as shipped by others: it serves to show that the cases below are hard."""
    num_particles = log_weights.shape[0]
    cdf = jnp.cumsum(jax.nn.softmax(log_weights))
    points = (jnp.arange(num_particles) + uniform) / num_particles
    return jnp.clip(jnp.searchsorted(cdf, points, side="right"), 0, num_particles - 1)


def adverse_uniforms(log_weights):
    """The ends of [0, 1), and every offset that puts a point on an end of an interval."""
    num_particles = len(log_weights)
    ends = num_particles * np.cumsum(normalized(log_weights))
    float_ends = num_particles * np.asarray(jnp.cumsum(jax.nn.softmax(log_weights)), np.float64)
    on_ends = np.mod(np.concatenate([ends, float_ends]), 1).astype(np.float32)
    beside = [np.nextafter(on_ends, np.float32(0)), np.nextafter(on_ends, np.float32(1))]
    uniforms = np.unique(np.concatenate([[0.0, BELOW_ONE], on_ends, *beside]).astype(np.float32))
    return jnp.asarray(uniforms[uniforms < 1])


def picks_without_weight(scheme, uniforms, log_weights):
    """For each uniform, how many ancestors have no weight."""
    return np.isneginf(log_weights)[np.asarray(scheme(uniforms, log_weights))].sum(-1)


@pytest.mark.parametrize("trailing", [0, 300])
@each_scheme
def test_no_rounding_selects_a_particle_without_weight(name, trailing, monkeypatch):
    """Half of the particles have no weight, and maybe the last 300. The uniforms are handed in as keys."""
    uniform = SimpleNamespace(uniform=lambda key, shape, dtype: jnp.broadcast_to(key, shape).astype(dtype))
    monkeypatch.setattr(resampling, "random", uniform)
    log_weights = 2.0 * random.normal(random.key(1000), (1000,))
    without = np.array(random.bernoulli(random.key(5), 0.5, (1000,)))
    without[-1] = trailing > 0
    without[1000 - trailing :] = True
    log_weights = jnp.where(without, -INF, log_weights)
    uniforms = adverse_uniforms(log_weights)

    naive = jax.jit(jax.vmap(naive_systematic, in_axes=(0, None)))
    assert picks_without_weight(naive, uniforms, log_weights).any()  # the case is hard

    adverse = jax.jit(jax.vmap(lambda u, a: SCHEMES[name](u, a), in_axes=(0, None)))
    assert not picks_without_weight(adverse, uniforms, log_weights).any()
    if name == "systematic":
        offspring = count(adverse(uniforms, log_weights), 1000)
        assert np.all(abs(offspring - 1000 * normalized(log_weights)) < 1 + 1e-3)


# An independent implementation


def test_offspring_agree_with_blackjax():
    blackjax_resampling = pytest.importorskip("blackjax.smc.resampling")
    log_weights = random.normal(random.key(0), (50,))
    weights, keys = jax.nn.softmax(log_weights), random.split(random.key(1), 2000)
    for name in SCHEMES:
        theirs = jax.vmap(lambda key, name=name: getattr(blackjax_resampling, name)(key, weights, 50))(keys)
        ours = jax.vmap(lambda key, name=name: SCHEMES[name](key, log_weights))(keys)
        ours, theirs = count(ours, 50), count(theirs, 50)
        standard_error = np.sqrt((ours.var(0) + theirs.var(0)) / len(keys))
        assert np.all(abs(ours.mean(0) - theirs.mean(0)) <= STANDARD_ERRORS * standard_error + 1e-6), name
