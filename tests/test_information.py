# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Louis' identity against the exact information; 4 standard errors over replicates."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import partition, z_score
from compiling import compile_fast, compile_tuned
from jax import random

from numpyro_smcopt import information
from numpyro_smcopt.information import louis_information

pytestmark = pytest.mark.slow

STANDARD_ERRORS = 4.0
NUM = 50
OBSERVED = np.linspace(-2.0, 3.0, NUM) ** 2 / 3
THETA = np.array([0.8, 0.2])  # not the maximum: the mean score must be kept


# x_i ~ N(mean, exp(log_sd)), y_i ~ N(x_i, 1): marginally y_i ~ N(mean, exp(2 log_sd) + 1).


def terms(theta, x):
    mean, log_sd = theta
    prior = (x - mean) ** 2 * jnp.exp(-2 * log_sd) / 2 + log_sd
    return jnp.concatenate(
        [prior, (jnp.asarray(OBSERVED, x.dtype) - x) ** 2 / 2, 0.5 * theta**2]
    )  # a penalty, no latents


def exact_loss(theta):
    variance = jnp.exp(2 * theta[1]) + 1
    return (
        jnp.sum((jnp.asarray(OBSERVED) - theta[0]) ** 2 / variance + jnp.log(variance)) / 2
        + 0.25 * jnp.sum(theta**2) * 2
    )


def posterior(theta):
    variance = 1 / (1 + np.exp(-2 * theta[1]))
    return variance * (OBSERVED + theta[0] * np.exp(-2 * theta[1])), variance


def draw(seed, replicates, num_particles, weighted):
    """Particles [R, N, D] of the posterior and their log weights per coordinate."""
    mean, variance = posterior(THETA)
    normals = np.random.default_rng(seed).normal(size=(replicates, num_particles, NUM))
    if not weighted:
        return mean + np.sqrt(variance) * normals, np.zeros_like(normals)
    x = mean + 0.2 + np.sqrt(1.3 * variance) * normals
    return x, -((x - mean) ** 2) / (2 * variance) + normals**2 / 2


def informations(x, log_weights, joint):
    """Gradients [R, P], complete and missing informations [R, P, P], shares [R]."""
    theta = jnp.asarray(THETA, jnp.float32)
    blocks = partition(lambda x: terms(theta, x), NUM, joint)
    assert blocks.num_blocks == (1 if joint else NUM)

    def one(args):
        x, log_weights = args
        log_weights = jax.nn.log_softmax(blocks.sum_coordinates(log_weights), axis=0)
        return louis_information(terms, theta, x, log_weights, blocks)

    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(log_weights, jnp.float32))
    gradient, information = compile_tuned(lambda a: jax.lax.map(one, a))(arrays)
    return map(np.asarray, (gradient, *information))


def test_compiled_information_is_that_of_numpy():
    """At a size from which on XLA once got the centring wrong."""
    x, log_weights = draw(3, 1, 400, True)
    _, _, missing, _ = informations(x, log_weights, False)
    x, log_weights = x[0], log_weights[0]
    weights = np.exp(log_weights) / np.sum(np.exp(log_weights), 0)
    slopes = np.stack([-(x - THETA[0]), -((x - THETA[0]) ** 2)]) * np.exp(-2 * THETA[1])
    centred = slopes - np.sum(weights * slopes, 1, keepdims=True)
    exact = np.einsum("nb,pnb,qnb,b->pq", weights, centred, centred, 1 / (1 - np.sum(weights**2, 0)))
    np.testing.assert_allclose(missing[0], exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("joint", "weighted"), [(True, False), (False, False), (False, True)])
def test_information_is_the_exact_hessian_of_the_marginal_likelihood(joint, weighted):
    num_particles, replicates = (400, 50) if weighted else (100, 100)
    gradient, complete, missing, share = informations(*draw(0, replicates, num_particles, weighted), joint)
    theta = jnp.asarray(THETA, jnp.float32)
    truth = np.asarray(compile_fast(jax.hessian(exact_loss))(theta))
    scores = z_score((complete - missing).reshape(replicates, 4), truth.ravel())
    assert np.all(abs(scores) < STANDARD_ERRORS), scores
    assert np.all(abs(z_score(gradient, np.asarray(compile_fast(jax.grad(exact_loss))(theta)))) < STANDARD_ERRORS)
    np.testing.assert_allclose(missing, missing.transpose(0, 2, 1), rtol=1e-5)
    if joint:
        np.testing.assert_allclose(share, 1.0)
    else:
        assert np.all((share > 1.0 / NUM) & (share < 0.3))
    # The factor c2 matters: without it the missing information would be too small by 1/N.
    if joint:
        biased = complete[:, 0, 0] - missing[:, 0, 0] * (1 - 1 / num_particles)
        assert abs(z_score(biased, truth[0, 0])) > abs(scores[0])


def test_errors_have_the_size_that_the_theory_says():
    """Spec, section 6: I_obs = 25 with n = 50, sd 0.5 per datum against 3.6 jointly at N = 100."""
    theta, num_particles = jnp.zeros(1), 100
    y = jnp.asarray(OBSERVED - OBSERVED.mean(), jnp.float32)
    toy = lambda theta, x: jnp.concatenate([(x - theta[0]) ** 2 / 2, (y - x) ** 2 / 2])  # noqa: E731
    x = y / 2 + random.normal(random.key(0), (200, num_particles, NUM)) / jnp.sqrt(2.0)
    for joint, predicted in ((True, 25 * np.sqrt(2 / 99)), (False, 25 * np.sqrt(2 / (50 * 99)))):
        blocks = partition(lambda x: toy(theta, x), NUM, joint)
        equal = jnp.full((num_particles, blocks.num_blocks), -np.log(num_particles))
        of = compile_tuned(
            lambda x, equal=equal, blocks=blocks: jax.lax.map(
                lambda x: louis_information(toy, theta, x, equal, blocks)[1], x
            )
        )
        information = of(x)
        np.testing.assert_allclose(information.complete, 50.0, rtol=1e-5)
        observed = np.asarray(information.complete - information.missing)[:, 0, 0]
        assert abs(z_score(observed, 25.0)) < STANDARD_ERRORS
        np.testing.assert_allclose(observed.std(), predicted, rtol=4 / np.sqrt(400))


def test_directions_in_batches_give_the_same(monkeypatch):
    x, _ = draw(1, 1, 20, False)
    theta = jnp.asarray(THETA, jnp.float32)
    blocks = partition(lambda x: terms(theta, x), NUM)
    equal = jnp.full((20, NUM), -np.log(20))
    at_once = louis_information(terms, theta, jnp.asarray(x[0], jnp.float32), equal, blocks)
    monkeypatch.setattr(information, "DIRECTIONS_AT_ONCE_BUDGET", 20.0 * (2 * NUM + 2))  # one at a time
    singly = louis_information(terms, theta, jnp.asarray(x[0], jnp.float32), equal, blocks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), at_once, singly)


def test_particles_without_weight_are_absent():
    x, _ = draw(2, 1, 20, False)
    x = jnp.asarray(x[0], jnp.float32)
    theta = jnp.asarray(THETA, jnp.float32)
    blocks = partition(lambda x: terms(theta, x), NUM)
    equal = jnp.full((19, NUM), -np.log(19))
    without = louis_information(terms, theta, x[:19], equal, blocks)
    far = x.at[19].set(1e3)
    with_one = louis_information(terms, theta, far, jnp.concatenate([equal, jnp.full((1, NUM), -jnp.inf)]), blocks)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), without, with_one)
