# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Kernels against formulas written out in NumPy, and against closed forms of unadjusted Langevin.

What all kernels promise is in `test_contracts`. Monte Carlo comparisons allow 4 standard errors.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import (
    FAST_KEYS,
    follow,
    identity,
    move_all,
    noise_for,
    partition,
    potential_of,
    skewed_map,
    step_of,
    z_score,
)
from compiling import compile_fast, compile_tuned
from jax import random
from scipy import stats

from numpyro_smcopt.kernels import HMC, MALA, ULA, Point, Preconditioner, RandomWalk
from numpyro_smcopt.kernels.base import accept
from numpyro_smcopt.random_numbers import draw_random_numbers

STANDARD_ERRORS = 4.0


def quartic_terms(theta, x):
    """Three coordinates: 0 and 2 coupled, 1 by itself; not symmetric, not quadratic."""
    a, b, c = x
    return jnp.stack([theta * a**4 / 8, (a - c) ** 2 / 2, theta * (b - theta) ** 2, jnp.cosh(c - 0.3), 0.1 * b**4])


def quartic_energy(theta, x):
    a, b, c = np.moveaxis(np.asarray(x), -1, 0)
    return theta * a**4 / 8 + (a - c) ** 2 / 2 + theta * (b - theta) ** 2 + np.cosh(c - 0.3) + 0.1 * b**4


def quartic_gradient(theta, x):
    a, b, c = np.moveaxis(np.asarray(x), -1, 0)
    return np.stack([theta * a**3 / 2 + a - c, 2 * theta * (b - theta) + 0.4 * b**3, c - a + np.sinh(c - 0.3)], axis=-1)


NUM = 50


def moved(kernel, size, preconditioner=None, thetas=(0.7, 0.7)):
    """Start [N, D], next points, second result [N], normals [N, D] and uniforms [N, 2]: one joint block."""
    old, new = (lambda x, t=t: quartic_terms(t, x) for t in thetas)
    blocks = partition(old, 3, joint=True)
    start = 1.3 * random.normal(random.key(0), (NUM, 3))
    noise = noise_for(kernel, random.key(1), start, blocks)
    step = step_of(size, blocks, identity(3) if preconditioner is None else preconditioner)
    old, new = potential_of(old, blocks), potential_of(new, blocks)
    points, extra = compile_fast(jax.vmap(lambda noise, x: kernel.move(noise, old.evaluate(x), new, step)))(
        noise, start
    )
    return tuple(map(np.asarray, (start, points.x, extra[:, 0], noise.normal, noise.uniform)))


@pytest.mark.parametrize("preconditioned", [False, True])
def test_log_ratio_of_ula_is_that_of_the_gaussian_densities(preconditioned):
    """Spec, check 2; the backward kernel belongs to the new target."""
    h, thetas = 0.15, (0.7, 0.9)
    with jax.enable_x64(True):
        precond = skewed_map(partition(lambda x: quartic_terms(0.7, x), 3, joint=True)) if preconditioned else None
        x, y, log_ratio, _, _ = moved(ULA(), h, precond, thetas)
    matrix = np.asarray(precond.factor[0] * precond.scale) if preconditioned else np.eye(3)
    covariance = matrix @ matrix.T

    def log_density(to, start, theta):
        mean = start - h * quartic_gradient(theta, start) @ covariance
        return np.array(
            [stats.multivariate_normal.logpdf(a, m, 2 * h * covariance) for a, m in zip(to, mean, strict=True)]
        )

    np.testing.assert_allclose(
        log_ratio, log_density(x, y, thetas[1]) - log_density(y, x, thetas[0]), rtol=0, atol=1e-12
    )
    if not preconditioned:  # and the closed form of the specification, section 2.2
        old, new = quartic_gradient(thetas[0], x), quartic_gradient(thetas[1], y)
        closed = np.sum((y - x) * (old + new) / 2 + h / 4 * (old**2 - new**2), 1)
        np.testing.assert_allclose(log_ratio, closed, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["mala", "random_walk", "hmc"])
def test_acceptance_is_that_of_the_textbook(name):
    theta = 0.7
    with jax.enable_x64(True):
        kernel, size = {
            "mala": (MALA(), 0.4),
            "random_walk": (RandomWalk(), 0.5),
            "hmc": (HMC(num_leapfrog=3, jitter=0.5), 0.9),
        }[name]
        x, y, acceptance, xi, uniform = moved(kernel, size)
    energy, gradient = (lambda x: quartic_energy(theta, x)), (lambda x: quartic_gradient(theta, x))
    if name == "mala":
        proposal = x - size * gradient(x) + np.sqrt(2 * size) * xi
        there = np.sum((proposal - x + size * gradient(x)) ** 2, 1) / (4 * size)
        back = np.sum((x - proposal + size * gradient(proposal)) ** 2, 1) / (4 * size)
        log_accept = energy(x) - energy(proposal) - back + there
    elif name == "random_walk":
        proposal = x + np.sqrt(2 * size) * xi
        log_accept = energy(x) - energy(proposal)
    else:
        eps = size * (1 - 0.5 * uniform[:, :1])
        proposal, p = x, xi
        for _ in range(3):
            p = p - eps / 2 * gradient(proposal)
            proposal = proposal + eps * p
            p = p - eps / 2 * gradient(proposal)
        log_accept = energy(x) + np.sum(xi**2, 1) / 2 - energy(proposal) - np.sum(p**2, 1) / 2
    probability = np.exp(np.minimum(log_accept, 0))
    np.testing.assert_allclose(acceptance, probability, rtol=1e-10, atol=1e-14)
    accepted = uniform[:, -1] < probability
    assert 5 < accepted.sum() < NUM - 5
    np.testing.assert_allclose(y, np.where(accepted[:, None], proposal, x), rtol=0, atol=1e-11)


def test_proposals_without_a_finite_energy_are_rejected():
    blocks = partition(lambda x: x**2, 2)
    point = lambda a, b: Point(*(jnp.array([a, b]) for _ in range(3)))  # noqa: E731
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        chosen, probability = accept(jnp.array([-1e9, -1e9]), jnp.zeros(2), point(1.0, 2.0), point(bad, 1.5), blocks)
        np.testing.assert_array_equal(chosen.x, [1.0, 1.5])
        np.testing.assert_array_equal(chosen.grad, [1.0, 1.5])
        np.testing.assert_array_equal(probability, [0.0, 1.0])


def test_float32_keeps_the_acceptance_under_a_large_energy():
    """A million terms of size one: the acceptance is formed from differences of terms."""
    terms = lambda x: (x[0] - jnp.linspace(-1, 1, 1_000_000, dtype=x.dtype)) ** 2 / 2 + 1.0  # noqa: E731
    blocks = partition(lambda x: terms(x)[:2], 1, joint=True)
    sizes = 1e-6 * random.normal(random.key(0), (8, 1))
    kernel = RandomWalk()

    @compile_fast
    def move(noise, x):
        potential = potential_of(terms, blocks)
        return kernel.move(noise, potential.evaluate(x), potential, step_of(5e-7, blocks, identity(1)))[1][0]

    noise = draw_random_numbers(random.key(1), sizes, 1)
    probabilities = np.array([move(jax.tree.map(lambda v, k=k: v[k], noise), x) for k, x in enumerate(sizes)])
    starts = np.asarray(sizes[:, 0], np.float64)
    shifts = np.sqrt(2 * 5e-7) * np.asarray(noise.normal[:, 0], np.float64)
    proposals = np.asarray(np.float32(starts) + np.float32(shifts), np.float64)
    exact = np.exp(np.minimum(0, 1e6 * (starts**2 - proposals**2) / 2))
    assert np.ptp(exact) > 0.3
    np.testing.assert_allclose(probabilities, exact, atol=0.02)


# Unadjusted Langevin


def round_terms(x):
    return x**2 / 2


def test_spread_of_the_weights_of_ula_at_fixed_theta():
    """Spec, check 5: ``sd(log G) = sqrt(d/2) h^1.5``, hence ``ESS/N = exp(-d h^3 / 2)``."""
    d, h, num = 100, 0.05, 20_000
    blocks = partition(lambda x: round_terms(x)[:1], d, joint=True)
    potential = potential_of(round_terms, blocks)
    points = jax.vmap(potential.evaluate)(random.normal(random.key(0), (num, d)))
    move = compile_tuned(
        lambda key, points: move_all(ULA(), key, points, potential, step_of(h, blocks, identity(d)))[1]
    )
    log_weights = np.asarray(move(random.key(1), points), np.float64)[:, 0]
    np.testing.assert_allclose(log_weights.std(), np.sqrt(d / 2) * h**1.5, rtol=0.03)
    weights = np.exp(log_weights)
    np.testing.assert_allclose(weights.mean() ** 2 / np.mean(weights**2), np.exp(-d * h**3 / 2), rtol=0.01)


@pytest.mark.slow
def test_jarzynski():
    """Spec, check 6: from N(0, 1) to N(0, 4); the weights make up for the particles that lag behind."""
    num_replicates, num_particles = 400, 100
    schedule = jnp.linspace(1.0, 0.25, 31)
    terms = lambda precision, x: precision * x**2 / 2  # noqa: E731
    blocks = partition(lambda x: terms(1.0, x), 1, joint=True)
    step = step_of(0.1, blocks, identity(1))

    @compile_tuned
    @jax.vmap
    def replicate(key):
        key_start, key_path = random.split(key)
        x = random.normal(key_start, (num_particles, 1))
        x, log_weights, log_z = follow(key_path, ULA(), terms, schedule, x, blocks, step, ess_threshold=0.0)
        z = jnp.exp(log_z[0])
        return z, z * jnp.sum(jnp.exp(log_weights) * x**2), jnp.mean(x**2)

    z, weighted, unweighted = map(np.asarray, replicate(random.split(random.key(2, impl=FAST_KEYS), num_replicates)))
    assert abs(z_score(z, 2.0)) < STANDARD_ERRORS
    assert abs(z_score(weighted, 2.0 * 4.0)) < STANDARD_ERRORS
    assert z_score(unweighted, 3.5) < -STANDARD_ERRORS


@pytest.mark.slow
def test_log_evidence_agrees_with_and_without_resampling():
    """Spec, check 7: one estimate resamples at every step, one never."""
    schedule = jnp.array([1.0, 1.4, 2.0, 3.0, 4.0])
    terms = lambda precision, x: precision * x**2 / 2  # noqa: E731
    blocks = partition(lambda x: terms(1.0, x), 1, joint=True)
    step = step_of(0.3, blocks, identity(1))

    @compile_tuned
    @jax.vmap
    def replicate(key, threshold):
        key_start, key_path = random.split(key)
        x = random.normal(key_start, (50, 1))
        return jnp.exp(follow(key_path, MALA(), terms, schedule, x, blocks, step, threshold)[2][0])

    keys = random.split(random.key(5, impl=FAST_KEYS), 1000)
    keys = jnp.concatenate([keys, keys])
    estimates = np.asarray(replicate(keys, jnp.repeat(jnp.array([0.0, 1.0]), 1000))).reshape(2, 1000)
    assert np.all(abs(z_score(estimates, 0.5, axis=1)) < STANDARD_ERRORS)
    assert np.all(estimates[0] != estimates[1])  # they are two estimators


# Settings


@pytest.mark.parametrize("wrong", [{"num_leapfrog": 0}, {"jitter": 1.0}, {"jitter": -0.1}])
def test_hmc_refuses_impossible_settings(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        HMC(**wrong)


def test_hmc_jitters_the_step_size_per_particle_and_block():
    """With flat terms nothing is rejected and every coordinate moves by ``eps`` times its momentum."""
    flat = lambda x: 0.0 * x  # noqa: E731
    blocks = partition(lambda x: x**2, 2)
    assert blocks.num_blocks == 2
    potential, kernel = potential_of(flat, blocks), HMC(num_leapfrog=1, jitter=0.8)
    step = step_of(1.0, blocks, Preconditioner(jnp.array([1.0, 3.0])))._replace(size=jnp.array([1.0, 0.1]))
    start = jnp.zeros((4000, 2))
    noise = draw_random_numbers(random.key(0), start, 4)
    moves = jax.vmap(lambda noise, x: kernel.move(noise, potential.evaluate(x), potential, step)[0].x)(noise, start)
    eps = np.asarray(moves / noise.normal) / [1.0, 0.3]
    assert stats.kstest(eps[:, 0], stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4
    assert stats.kstest(eps[:, 1], stats.uniform(0.2, 0.8).cdf).pvalue > 1e-4
    assert abs(np.corrcoef(eps.T)[0, 1]) < 5 / np.sqrt(4000)
