# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What is drawn from a fit: samples on the scale of the model, the weighted view of NumPyro's SVI, log likelihoods.

Clouds are given their weights by hand, so that forgetting them would show. Monte Carlo comparisons allow 5 standard
errors.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import Predictive, log_likelihood
from numpyro.infer.reparam import LocScaleReparam

from numpyro_smcopt import SMCOptimizer, latents_to_params, one_block
from numpyro_smcopt.kernels import RandomWalk

pytestmark = pytest.mark.slow

GROUP = np.repeat(np.arange(3), 2)
Y = np.array([1.2, 0.4, -0.3, 0.6, 2.9, 3.4], np.float32)
NUM = 64


def grouped(group, y=None, num_groups=3):
    mean = numpyro.param("mean", 0.5)
    with numpyro.plate("groups", num_groups):
        b = numpyro.sample("b", dist.Normal(mean, 1.0))
    numpyro.deterministic("largest", jnp.max(b))
    with numpyro.plate("data", len(group)):
        numpyro.sample("y", dist.Normal(b[group], 0.5), obs=y)


def start(model, *args, **settings):
    # Cheap to compile: neither a warm start nor gradients in the moves.
    optimizer = SMCOptimizer(model, optax.sgd(0.1), num_particles=NUM, kernel=RandomWalk(), **settings)
    return optimizer, optimizer.init(random.key(0), *args)


@pytest.fixture(scope="module", params=["joint", "blocks"])
def tilted(request):
    """An optimiser, and a state whose weights are far from equal: ``w_i ~ exp(x_i)`` per block."""
    settings = {"partition": one_block} if request.param == "joint" else {}
    optimizer, state = start(grouped, GROUP, Y, **settings)
    assert state.blocks.num_blocks == (1 if request.param == "joint" else 3)
    log_weights = jax.nn.log_softmax(state.blocks.sum_coordinates(2.0 * state.points.x), 0)
    return optimizer, state._replace(log_weights=log_weights)


def expected(state):
    """Weighted mean and standard deviation [3] of ``b``."""
    weights = np.exp(np.asarray(state.blocks.to_coordinates(state.log_weights), float))
    x = np.asarray(state.points.x, float)
    mean = (weights * x).sum(0)
    assert np.all(np.abs(mean - x.mean(0)) > 0.05)  # the weights matter
    return mean, np.sqrt((weights * (x - mean) ** 2).sum(0))


def test_samples_are_drawn_by_weight(tilted):
    optimizer, state = tilted
    mean, sd = expected(state)
    samples = optimizer.get_samples(state, rng_key=random.key(1), num_samples=100 * NUM)
    np.testing.assert_array_less(np.abs(samples["b"].mean(0) - mean), 5 * sd / np.sqrt(100 * NUM))
    np.testing.assert_array_equal(samples["largest"], samples["b"].max(1))
    # In random order: neighbours are not copies of the same particle more often than chance has it.
    first = np.asarray(samples["b"][:, 0])
    repeats = np.mean(first[1:] == first[:-1])
    weights = np.exp(np.asarray(state.log_weights[:, 0], float))
    chance = (weights**2).sum()
    assert abs(repeats - chance) < 5 * np.sqrt(chance / len(first))


def test_the_guide_draws_by_weight(tilted):
    optimizer, state = tilted
    mean, sd = expected(state)
    view = optimizer.as_svi(state)
    num = 4000
    predictive = Predictive(
        grouped,
        guide=view.guide,
        params=optimizer.get_params(state),
        num_samples=num,
        return_sites=["b", "largest", "y"],
    )
    drawn = predictive(random.key(2), np.array([0, 1, 2, 2]))  # other data, the same groups
    assert drawn["y"].shape == (num, 4)
    np.testing.assert_array_less(np.abs(drawn["b"].mean(0) - mean), 5 * sd / np.sqrt(num))
    np.testing.assert_array_equal(drawn["largest"], drawn["b"].max(1))
    error = np.sqrt(sd[[0, 1, 2, 2]] ** 2 + 0.25) / np.sqrt(num)
    np.testing.assert_array_less(np.abs(drawn["y"].mean(0) - mean[[0, 1, 2, 2]]), 5 * error)
    assert set(drawn["b"][:, 0].tolist()) <= set(state.points.x[:, 0].tolist())


def test_the_guide_has_no_site_but_the_latents_and_wants_randomness(tilted):
    optimizer, state = tilted
    view = optimizer.as_svi(state)
    trace = handlers.trace(handlers.seed(view.guide, 0)).get_trace(GROUP)
    assert list(trace) == ["b"]
    with pytest.warns(UserWarning, match="outside of `seed`"), pytest.raises(ValueError, match="needs randomness"):
        view.guide(GROUP)


def test_the_model_of_the_view_is_at_the_estimate(tilted):
    optimizer, state = tilted
    view = optimizer.as_svi(state)
    trace = handlers.trace(handlers.seed(view.model, 0)).get_trace(GROUP)
    np.testing.assert_array_equal(trace["b"]["fn"].base_dist.loc, optimizer.get_params(state)["mean"])


def test_samples_follow_the_current_theta():
    def model(y):
        top = numpyro.param("top", 3.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            x = numpyro.sample("x", dist.Uniform(-top, top))
            numpyro.deterministic("share", x / top)
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    optimizer, state = start(model, Y)
    moved = state._replace(theta={"top": state.theta["top"] + 1.0})
    one, other = (optimizer.get_samples(s, rng_key=random.key(1)) for s in (state, moved))
    np.testing.assert_allclose(other["x"], np.e * one["x"], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(other["share"], one["share"], rtol=1e-4, atol=1e-4)


def test_sites_that_hang_on_a_discrete_latent_have_no_samples():
    def model(y):
        share = numpyro.param("share", 0.3, constraint=constraints.unit_interval)
        centre = numpyro.sample("centre", dist.Normal(0.0, 2.0))
        numpyro.deterministic("twice", 2 * centre)
        with numpyro.plate("data", len(y)):
            which = numpyro.sample("which", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            numpyro.deterministic("mean", jnp.where(which, centre, -1.0))
            numpyro.sample("y", dist.Normal(jnp.where(which, centre, -1.0), 1.0), obs=y)

    optimizer, state = start(model, Y)
    samples = optimizer.get_samples(state)
    assert samples.keys() == {"centre", "twice"}
    with pytest.raises(ValueError, match="discrete latents.*infer_discrete=True"):
        optimizer.log_likelihood(state.params, samples)


# -- log likelihood ----------------------------------------------------------------------------------------------------
def reparametrised(group, y):
    handlers.reparam(grouped, config={"b": LocScaleReparam(0)})(group, y)


@functools.partial(latents_to_params, sites=["mean"])
def with_prior(group, y):
    mean = numpyro.sample("mean", dist.Normal(0.0, 1.0))
    b = numpyro.sample("b", dist.Normal(mean, 1.0).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(b[group], 0.5), obs=y)


@pytest.mark.parametrize("model", [grouped, reparametrised, with_prior])
def test_log_likelihood_is_that_of_numpyro(model):
    optimizer, state = start(model, GROUP, Y)
    samples, params = optimizer.get_samples(state, num_samples=7), optimizer.get_params(state)
    found = optimizer.log_likelihood(params, samples)
    assert found.keys() == {"y"} and found["y"].shape == (7, 6)
    at_estimate = handlers.seed(handlers.substitute(model, data=params), 0)
    theirs = log_likelihood(at_estimate, samples, GROUP, Y)["y"]
    np.testing.assert_allclose(found["y"], theirs, rtol=1e-5, atol=1e-5)


def test_log_likelihood_wants_all_latents():
    optimizer, state = start(grouped, GROUP, Y)
    with pytest.raises(ValueError, match=r"lacks the latent sites \['b'\]"):
        optimizer.log_likelihood(state.params, {"largest": jnp.zeros(3)})


def test_log_likelihood_without_latents():
    def model(y):
        mean = numpyro.param("mean", 0.5)
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    optimizer, state = start(model, Y)
    found = optimizer.log_likelihood(state.params, optimizer.get_samples(state))
    np.testing.assert_allclose(
        found["y"], [dist.Normal(optimizer.get_params(state)["mean"], 1.0).log_prob(Y)], rtol=1e-6
    )
