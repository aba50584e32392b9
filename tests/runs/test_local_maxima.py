# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Likelihoods with several maxima: a run looks for higher ground and says so, and several runs tell what they found."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from scipy import optimize, stats

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.runs.maxima import distinct_maxima

positive, param = constraints.positive, numpyro.param


def run_of(model, *data, **options):
    """A run of a few updates, and what it warned of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = SMCOptimizer(model).run(random.key(0), 40, *data, progress_bar=False, **options)
    return result, [str(warning.message) for warning in caught]


# -- a single run --------------------------------------------------------------------------------------------------
RNG = np.random.default_rng(5)
CLUSTERS = np.concatenate([RNG.normal(-4, 1, 40), RNG.normal(0, 0.8, 50), RNG.normal(5, 1, 30)])


def mixture(y, means, shared):
    means = param("means", means)
    sd = param("sd", jnp.ones(()) if shared else jnp.ones(means.shape), constraint=positive)
    shares = param("shares", jnp.ones(means.shape) / len(means), constraint=constraints.simplex)
    with numpyro.plate("data", len(y)):
        components = dist.Normal(means, sd)
        numpyro.sample("y", dist.MixtureSameFamily(dist.Categorical(probs=shares), components), obs=y)


def mixture_log_likelihood(params):
    densities = stats.norm(np.asarray(params["means"]), np.asarray(params["sd"])).pdf(CLUSTERS[:, None])
    return np.log(densities @ np.asarray(params["shares"], float)).sum()


def by_em(means, shared):
    """The maximum of the likelihood by expectation maximisation from good places."""
    sd, shares = np.ones(len(means)), np.ones(len(means)) / len(means)
    for _ in range(500):
        weights = shares * stats.norm(means, sd).pdf(CLUSTERS[:, None])
        weights /= weights.sum(1, keepdims=True)
        size = weights.sum(0)
        means, shares = weights.T @ CLUSTERS / size, size / size.sum()
        square = (weights * (CLUSTERS[:, None] - means) ** 2).sum(0)
        sd = np.sqrt(np.full(len(means), square.sum() / size.sum()) if shared else square / size)
    return mixture_log_likelihood({"means": means, "sd": sd, "shares": shares})


@pytest.mark.parametrize(("shared", "start"), [(True, [4.5, 5.0, 5.5]), (False, [4.9, 5.0, 5.1])])
def test_a_mixture_that_starts_in_one_of_its_clusters(shared, start):
    result, said = run_of(mixture, CLUSTERS, jnp.array(start), shared)
    best = by_em(np.array([-4.0, 0.0, 5.0]), shared)
    assert mixture_log_likelihood(result.params) == pytest.approx(best, abs=0.1)
    # From the second start the walk itself may cross to the best one, by a path that hangs on rounding.
    assert sum("several maxima" in message for message in said) in ((1,) if shared else (0, 1))


TIMES = np.linspace(0, 10, 60)
WAVE = 2 * np.sin(1.2 * TIMES + 0.4) + 0.5 * np.random.default_rng(6).normal(size=60)


def wave(t, y):
    frequency = param("frequency", 2.0, constraint=positive)
    a, b, sigma = param("a", 1.0), param("b", 0.0), param("sigma", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(a * jnp.sin(frequency * t) + b * jnp.cos(frequency * t), sigma), obs=y)


def test_a_frequency():
    def rest(frequency):
        design = np.stack([np.sin(frequency * TIMES), np.cos(frequency * TIMES)], 1)
        return np.sum((WAVE - design @ np.linalg.lstsq(design, WAVE, rcond=None)[0]) ** 2)

    result, said = run_of(wave, TIMES, WAVE)
    best = optimize.minimize_scalar(rest, bounds=(1.0, 1.4), method="bounded").x
    assert result.params["frequency"] == pytest.approx(best, abs=0.005)
    assert any("several maxima" in message for message in said)


def test_one_maximum_is_not_said_to_be_several():
    def model(y):
        mean, sigma = param("mean", 30.0), param("sigma", 1.0, constraint=positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mean, sigma), obs=y)

    result, said = run_of(model, CLUSTERS)
    assert result.params["mean"] == pytest.approx(CLUSTERS.mean(), abs=0.01) and not said


# -- several runs --------------------------------------------------------------------------------------------------
def decay(t, y):
    """Two rates that may swap."""
    size = param("size", jnp.ones(2), constraint=positive)
    rate = param("rate", jnp.array([0.8, 1.2]), constraint=positive)
    sigma = param("sigma", 0.3, constraint=positive)
    with numpyro.plate("data", len(y)):
        mean = size[0] * jnp.exp(-rate[0] * t) + size[1] * jnp.exp(-rate[1] * t)
        numpyro.sample("y", dist.LogNormal(jnp.log(mean), sigma), obs=y)


def factor(y):
    """One factor, integrated out; its sign is free."""
    loadings = param("loadings", jnp.array([0.5, 0.5, 0.5, 0.5]))
    noise = param("noise", jnp.ones(4), constraint=positive)
    covariance = jnp.outer(loadings, loadings) + jnp.diag(noise**2)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.MultivariateNormal(jnp.zeros(4), covariance), obs=y)


def change(t, y):
    """A level that changes once."""
    place = param("place", 20.0, constraint=constraints.interval(0.0, 80.0))
    before, after = param("before", 0.0), param("after", 1.0)
    sigma = param("sigma", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        mean = before + (after - before) * jax.nn.sigmoid((t - place) / 4)
        numpyro.sample("y", dist.Normal(mean, sigma), obs=y)


def data_of(model):
    rng = np.random.default_rng(8)
    if model is decay:
        t = np.linspace(0.1, 6, 40)
        return t, (6 * np.exp(-2 * t) + 3 * np.exp(-0.25 * t)) * np.exp(0.05 * rng.normal(size=40))
    if model is factor:
        loadings = np.array([1.0, 0.8, -0.9, 0.7])
        return (rng.normal(size=(60, 1)) * loadings + 0.6 * rng.normal(size=(60, 4)),)
    t = np.arange(80.0)
    return t, np.where(t < 55, 1.0, 3.0) + 0.7 * rng.normal(size=80)


@pytest.mark.parametrize("model", [decay, factor])
def test_labels_and_signs_make_no_second_maximum(model):
    data = data_of(model)
    several, _ = run_of(model, *data, num_runs=3)
    assert len(several.runs.maxima) == 1 and sorted(several.runs.maxima[0].runs) == [0, 1, 2]
    assert several.runs.maxima[0].log_evidence == -several.runs.losses[several.runs.best]


def test_runs_are_dispersed_and_the_highest_maximum_is_found():
    def loss(place):
        step = 1 / (1 + np.exp(-(data[0] - place) / 4))
        design = np.stack([1 - step, step], 1)
        return np.sum((data[1] - design @ np.linalg.lstsq(design, data[1], rcond=None)[0]) ** 2)

    data = data_of(change)
    several, _ = run_of(change, *data, num_runs=5)
    best = optimize.minimize_scalar(loss, bounds=(50.0, 60.0), method="bounded").x
    assert several.params["place"] == pytest.approx(best, abs=0.5)
    heights = [maximum.log_evidence for maximum in several.runs.maxima]
    assert heights == sorted(heights, reverse=True) and several.runs.maxima[0].params is several.params


def test_given_starts_are_kept():
    starts = {"frequency": np.array([1.1, 2.0, 3.0])}
    several, said = run_of(wave, TIMES, WAVE, num_runs=3, init_params=starts)
    ends = [float(one.params["frequency"]) for one in several.runs.results]
    assert several.runs.best == 0 and abs(ends[1] - ends[0]) > 0.3 and not any("several maxima" in s for s in said)
    assert len(several.runs.maxima) > 1 and several.runs.maxima[0].runs[0] == 0


def test_maxima_are_told_apart_by_height_and_by_numbers():
    one = {"means": np.array([-1.0, 2.0]), "sd": np.array(0.5)}
    swapped = {"means": np.array([2.0, -1.0]), "sd": np.array(0.5)}
    turned = {"means": np.array([1.0, 2.0]), "sd": np.array(0.5)}
    other = {"means": np.array([-1.0, 4.0]), "sd": np.array(0.5)}
    losses, errors = np.array([10.0, 10.01, 12.0, 10.0, 9.0]), np.zeros(5)
    found = distinct_maxima(losses, errors, [one, swapped, one, other, turned])
    assert [maximum.runs for maximum in found] == [(4,), (0, 1), (3,), (2,)]
    assert [maximum.log_evidence for maximum in found] == [-9.0, -10.0, -10.0, -12.0]
    noisy = distinct_maxima(losses, np.full(5, 2.0), [one, swapped, one, other, turned])
    assert [sorted(maximum.runs) for maximum in noisy] == [[0, 1, 2, 4], [3]]
