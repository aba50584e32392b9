# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Tempering from prior to posterior, against conjugate closed forms; 4 standard errors over replicates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import partition, z_score
from compiling import compile_tuned
from jax import random
from scipy import stats

from numpyro_smcopt import laplace
from numpyro_smcopt.kernels import HMC, Step
from numpyro_smcopt.population import tempering

pytestmark = pytest.mark.slow

STANDARD_ERRORS = 4.0
NUM_REPLICATES, NUM_PARTICLES = 200, 128

# x ~ N(0, I) in three dimensions. y_1 ~ N(x_1, 0.5) is possible for x_1 > 0 only; y_2 ~ N(x_0 + x_2, 0.1); and one
# observation depends on no latent.
Y_1, Y_2, FREE = 0.3, 2.5, 0.7
PRIOR = np.array([True, True, True, False, False, False])


def log_normal(x, variance):
    return -(x**2) / (2 * variance) - np.log(2 * np.pi * variance) / 2


def terms(x):
    possible = jnp.where(x[1] > 0, -log_normal(Y_1 - x[1], 0.25), jnp.inf)
    rest = jnp.stack([-log_normal(Y_2 - x[0] - x[2], 0.01), possible, jnp.asarray(FREE, x.dtype)])
    return jnp.concatenate([-log_normal(x, 1.0), rest])


MEAN_1, SD_1 = Y_1 / 1.25, np.sqrt(0.2)
TRUNCATED = stats.truncnorm(-MEAN_1 / SD_1, np.inf, MEAN_1, SD_1)
EVIDENCE = np.exp([log_normal(Y_2, 2.01), log_normal(Y_1, 1.25) + np.log(stats.norm.cdf(MEAN_1 / SD_1))])
GAIN = Y_2 / 2.01
# E[x], E[x^2], and E[x_0 x_2]
MOMENTS = np.array(
    [
        GAIN,
        TRUNCATED.mean(),
        GAIN,
        1 - 1 / 2.01 + GAIN**2,
        TRUNCATED.moment(2),
        1 - 1 / 2.01 + GAIN**2,
        -1 / 2.01 + GAIN**2,
    ]
)


@functools.cache
def program(joint, curved):
    blocks = partition(lambda x: terms(jnp.abs(x)), 3, joint)
    assert blocks.num_blocks == (1 if joint else 2)
    kernel = HMC(0.5, num_leapfrog=3)
    mode = jnp.array([GAIN, MEAN_1, GAIN])
    curvature = laplace.curvature(terms, mode, jnp.asarray(PRIOR), blocks) if curved else None
    step = Step(jnp.full(blocks.num_blocks, kernel.step_size), tempering.identity_like(mode, curvature))

    @compile_tuned
    def run(keys, starts, beta):
        def one(key, x):
            beta_of_blocks = jnp.full(blocks.num_blocks, beta)
            done = tempering.temper(
                key, terms, x, jnp.asarray(PRIOR), blocks, kernel, step, curvature, beta_of_blocks, final_moves=25
            )
            x = done.points.x
            moments = jnp.concatenate([x.mean(0), (x**2).mean(0), (x[:, 0] * x[:, 2]).mean()[None]])
            return done._replace(points=done.points._replace(x=x[:3], terms=done.points.terms[:3], grad=None)), moments

        return jax.vmap(one)(keys, starts)

    return run


KEYS = random.split(random.key(0), NUM_REPLICATES)


@pytest.mark.parametrize(("joint", "curved"), [(False, True), (True, False)], ids=["blocks", "joint"])
def test_evidence_is_unbiased_and_the_cloud_is_the_posterior(joint, curved):
    prior = random.normal(random.key(1), (NUM_REPLICATES, NUM_PARTICLES, 3))
    done, moments = program(joint, curved)(KEYS, prior, 0.0)
    assert not np.any(done.unfinished) and np.min(done.num_stages) >= 4
    exact = np.prod(EVIDENCE) * np.exp(-FREE) if joint else EVIDENCE
    ratios = np.exp(np.asarray(done.log_evidence, float)) / exact
    assert np.all(ratios.std(0) < 0.5)  # else four standard errors would forgive much
    assert np.all(abs(z_score(ratios, 1.0)) < STANDARD_ERRORS), z_score(ratios, 1.0)
    scores = z_score(moments, MOMENTS)
    assert np.all(abs(scores) < STANDARD_ERRORS), scores
    # At temperature one the points hold their energies, and the step size has been adapted.
    np.testing.assert_allclose(done.points.terms[0], jax.vmap(terms)(done.points.x[0]), rtol=1e-5)
    assert 0.5 < np.mean(done.acceptance) < 0.95
    # Every stage resamples, so fewer and fewer of the first draws have descendants.
    assert np.all((done.num_ancestors > 1) & (done.num_ancestors < 0.8 * NUM_PARTICLES))


def test_from_temperature_one_it_is_a_burn_in():
    """The start is anywhere; there is no evidence to be had, and nothing is weighed."""
    start = random.uniform(random.key(2), (NUM_REPLICATES, NUM_PARTICLES, 3), minval=0.1, maxval=2.0)
    done, moments = program(False, True)(KEYS, start, 1.0)
    np.testing.assert_array_equal(done.num_stages, 1)
    np.testing.assert_array_equal(done.log_evidence, 0.0)
    np.testing.assert_array_equal(done.num_ancestors, NUM_PARTICLES)
    assert not np.any(done.unfinished)
    scores = z_score(moments, MOMENTS)
    assert np.all(abs(scores) < STANDARD_ERRORS), scores


def test_impossible_data_are_reported_as_unfinished():
    impossible = lambda x: jnp.stack([x[0] ** 2 / 2, jnp.inf + 0 * x[0]])  # noqa: E731
    blocks = partition(lambda x: x**2, 1, joint=True)
    blocks = blocks._replace(of_term=jnp.zeros(2, jnp.int32))
    step = Step(jnp.ones(1), tempering.identity_like(jnp.zeros(1), None))
    done = tempering.temper(
        random.key(0), impossible, random.normal(random.key(1), (8, 1)), jnp.array([True, False]), blocks, HMC(), step,
        None, jnp.zeros(1),
    )  # fmt: skip
    assert bool(done.unfinished)
