# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A user of SVI finds everything where it was: loops, jit, changing data, resuming, pickling, Predictive.

Monte Carlo comparisons allow 5 standard errors.
"""

import pickle
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import Predictive
from oracles import balanced_groups, normal_fit

from numpyro_smcopt import SMCOptimizer, Status
from numpyro_smcopt.kernels import MALA

pytestmark = pytest.mark.slow

GROUP = np.repeat(np.arange(3), 4)
Y = np.array([1.2, 0.4, 1.9, 0.8, -0.3, 0.6, -1.0, 0.1, 2.9, 3.4, 2.2, 3.0], np.float32)
OTHER_Y = np.float32(1.5) - Y[::-1]
OTHER_GROUP = np.roll(GROUP, 1)
traced = []


def grouped(group, y=None, num_groups=3):
    traced.append(num_groups)
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("groups", num_groups):
        b = numpyro.sample("b", dist.Normal(mean, 1.0))
    numpyro.deterministic("largest", jnp.max(b))
    with numpyro.plate("data", len(group)):
        numpyro.sample("y", dist.Normal(b[group], 0.5), obs=y)


def same(one, other, **tolerance):
    """Two trees are equal, PRNG keys included."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = random.key_data(a), random.key_data(b)
        np.testing.assert_allclose(a, b, **{"rtol": 0, **tolerance})


# -- the default optimiser, run ----------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def fitted():
    optimizer = SMCOptimizer(grouped)
    return optimizer, optimizer.run(random.key(0), 300, GROUP, Y, progress_bar=False)


def test_the_estimate_is_the_maximum_of_the_marginal_likelihood(fitted):
    _, result = fitted
    mean, standard_error, log_likelihood, _, _ = balanced_groups(Y.reshape(3, 4), 1.0, 0.25)
    assert result.status == Status.FINISHED and result.params.keys() == {"mean"}
    assert abs(result.params["mean"] - mean) < 0.1 * standard_error
    # Over seeds the loss has a standard deviation of 0.27: that of the tempered start.
    assert abs(-result.losses[-1] - log_likelihood) < 5 * 0.27


def test_samples_are_the_posterior_of_the_latents(fitted):
    optimizer, result = fitted
    _, _, _, effects, variance = balanced_groups(Y.reshape(3, 4), 1.0, 0.25)
    samples = optimizer.get_samples(result.state, rng_key=random.key(1))
    assert samples.keys() == {"b", "largest"}
    np.testing.assert_array_equal(samples["largest"], samples["b"].max(1))
    num = len(samples["b"])
    np.testing.assert_array_less(np.abs(samples["b"].mean(0) - effects), 5 * np.sqrt(2 * variance / num))
    np.testing.assert_array_less(np.abs(samples["b"].var(0) / variance - 1), 5 * np.sqrt(4 / num))


def test_predictive_takes_samples_and_params(fitted):
    optimizer, result = fitted
    samples = optimizer.get_samples(result.state, num_samples=500)
    predictive = Predictive(grouped, posterior_samples=samples, params=result.params)
    drawn = predictive(random.key(2), GROUP)["y"]
    _, _, _, effects, variance = balanced_groups(Y.reshape(3, 4), 1.0, 0.25)
    assert drawn.shape == (500, 12)
    # 500 draws from 128 particles: the particles set the error.
    error = np.sqrt((2 * variance / result.state.log_weights.shape[0]) + 0.25 / 500)
    np.testing.assert_array_less(np.abs(drawn.mean(0) - effects[GROUP]), 5 * error)


def test_a_second_run_and_a_resumed_run_compile_nothing(fitted, compilations):
    optimizer, result = fitted
    optimizer.run(random.key(1), 60, GROUP, Y, progress_bar=False, init_state=result.state)  # compiles `adopt`
    with compilations() as compiled:
        other = optimizer.run(random.key(3), 300, GROUP, OTHER_Y, progress_bar=False)
        traced.clear()  # `init` reads the model, and so does a look for labels in other data; `run` does not
        optimizer.run(random.key(1), 70, GROUP, OTHER_Y, progress_bar=False, init_state=other.state)
        assert traced == []
        back = optimizer.run(random.key(1), 70, GROUP, Y, progress_bar=False, init_state=other.state)
    assert compiled == []
    # The average of the iterates has forgotten the other data.
    mean, standard_error, *_ = balanced_groups(Y.reshape(3, 4), 1.0, 0.25)
    assert abs(back.params["mean"] - mean) < 0.1 * standard_error
    mean, standard_error, *_ = balanced_groups(OTHER_Y.reshape(3, 4), 1.0, 0.25)
    assert abs(other.params["mean"] - mean) < 0.1 * standard_error


def test_a_resumed_run_is_an_uninterrupted_one(fitted):
    optimizer, result = fitted
    first = optimizer.run(random.key(0), 130, GROUP, Y, progress_bar=False)
    second = optimizer.run(random.key(9), 170, GROUP, Y, progress_bar=False, init_state=first.state)
    same(second.state, result.state)
    np.testing.assert_array_equal(np.concatenate([first.losses, second.losses]), result.losses)


def test_a_state_serves_a_fresh_object(fitted):
    optimizer, result = fitted
    state = pickle.loads(pickle.dumps(result.state))
    fresh = pickle.loads(pickle.dumps(optimizer))
    same(state, result.state)
    same(fresh.get_params(state), result.params)
    with pytest.raises(ValueError, match=r"has not seen the model's arguments.*get_samples\(state, \*args"):
        fresh.get_samples(state)
    key = random.key(4)
    same(fresh.get_samples(state, GROUP, Y, rng_key=key), optimizer.get_samples(result.state, rng_key=key))


def test_data_of_another_shape_need_a_new_start(fitted):
    optimizer, result = fitted
    with pytest.raises(ValueError, match="3 latents and 15 energy terms.*has 3 and 14.*need a new init"):
        optimizer.run(random.key(0), 1, GROUP[:11], Y[:11], progress_bar=False, init_state=result.state)


def test_another_grouping_is_refused_by_a_resumed_run(fitted):
    optimizer, result = fitted
    with pytest.raises(ValueError, match="latents depend on one another in another way.*Start anew with init"):
        optimizer.run(random.key(0), 1, OTHER_GROUP, Y, progress_bar=False, init_state=result.state)


# -- a user's own loop -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def loop():
    """A cheap optimiser with its first state, and its update under the user's jit."""
    optimizer = SMCOptimizer(grouped, optax.sgd(0.05), kernel=MALA(), num_particles=32, num_groups=3)
    return optimizer, optimizer.init(random.key(0), GROUP, Y), jax.jit(optimizer.update)


def test_a_jitted_update_is_the_eager_one(loop):
    optimizer, state, jitted = loop
    eager_state, jitted_state = state, state
    for y in [Y, OTHER_Y, OTHER_Y, Y]:
        eager_state, eager_loss = optimizer.update(eager_state, GROUP, y)
        jitted_state, jitted_loss = jitted(jitted_state, GROUP, y)
        same(eager_loss, jitted_loss, rtol=1e-5)
    same(eager_state, jitted_state, rtol=1e-4, atol=1e-5)


def test_update_leaves_its_argument_alone_and_repeats_itself(loop):
    optimizer, state, _ = loop
    copy = pickle.loads(pickle.dumps(state))
    same(optimizer.update(state, GROUP, OTHER_Y), optimizer.update(state, GROUP, OTHER_Y))
    same(state, copy)


def test_updates_with_other_data_compile_nothing(loop, compilations):
    optimizer, state, jitted = loop
    optimizer.update(state, GROUP, Y), jitted(state, GROUP, Y)
    traced.clear()
    with compilations() as compiled:
        for k in range(3):
            state, _ = optimizer.update(state, GROUP, Y + np.float32(k))
            jitted(state, GROUP, Y + np.float32(k))
    assert compiled == [] and traced == []


def test_updates_follow_the_data(loop):
    _, state, jitted = loop
    for _ in range(150):
        state, _ = jitted(state, GROUP, OTHER_Y)
    mean, standard_error, *_ = balanced_groups(OTHER_Y.reshape(3, 4), 1.0, 0.25)
    assert abs(state.params["mean"] - mean) < 0.2 * standard_error


def test_another_grouping_is_refused_by_update(loop):
    optimizer, state, _ = loop
    with pytest.raises(ValueError, match="latents depend on one another in another way"):
        optimizer.update(state, OTHER_GROUP, Y)


def test_another_grouping_in_a_jitted_loop_is_no_silent_matter(loop):
    optimizer, state, jitted = loop
    state, loss = jitted(state, OTHER_GROUP, Y)
    assert np.isnan(loss)
    with pytest.raises(ValueError, match="latents depend on one another in another way"):
        optimizer.get_params(state)


def test_after_another_grouping_the_right_data_go_on_as_if_nothing_had_been(loop):
    optimizer, state, jitted = loop
    disturbed, _ = jitted(state, OTHER_GROUP, Y)
    for y in [Y, OTHER_Y]:
        same(jitted(disturbed, GROUP, y), jitted(state, GROUP, y))
    optimizer.get_params(jitted(disturbed, GROUP, Y)[0])


def test_evaluate_is_minus_the_log_evidence_of_the_data_given(loop):
    optimizer, state, _ = loop
    here = optimizer.evaluate(state, GROUP, Y)
    np.testing.assert_allclose(here, state.diagnostics["loss"], rtol=1e-5)
    assert abs(optimizer.evaluate(state, GROUP, Y + np.float32(0.2)) - here) > 0.1


def test_weighted_samples_come_with_log_weights(loop):
    optimizer, state, _ = loop
    samples, log_weights = optimizer.get_weighted_samples(state, GROUP, Y)
    assert samples["b"].shape == (32, 3) and log_weights.shape == (32,)
    np.testing.assert_allclose(np.exp(log_weights).sum(), 1.0, rtol=1e-5)


# -- ends of the range -------------------------------------------------------------------------------------------------
def test_a_model_without_latents_is_fitted_by_maximum_likelihood():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", len(y)):
            numpyro.sample("y", dist.Normal(mean, sd), obs=y)

    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 200, Y, progress_bar=False)
    mean, sd, log_likelihood = normal_fit(Y)
    np.testing.assert_allclose([result.params["mean"], result.params["sd"]], [mean, sd], rtol=1e-3)
    np.testing.assert_allclose(-result.losses[-1], log_likelihood, rtol=1e-4)
    assert optimizer.get_samples(result.state) == {}


def test_particles_that_lose_their_potential_are_survived_and_counted():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0).expand([12]).to_event(1), obs=y)
        numpyro.factor("cliff", jnp.where((x > 1.1) & (mean != 0), jnp.nan, 0.0))

    optimizer = SMCOptimizer(model, optax.sgd(0.01), kernel=MALA(), num_particles=32)
    state = optimizer.init(random.key(0), Y)
    beyond = int(np.sum(state.points.x > 1.1))
    assert 5 < beyond < 27
    state, loss = optimizer.update(state, Y)
    assert state.diagnostics["num_nonfinite"] == beyond and np.isfinite(loss)
    for _ in range(5):
        state, loss = optimizer.update(state, Y)
        assert np.isfinite(loss) and np.isfinite(state.params["mean"])
    samples, log_weights = optimizer.get_weighted_samples(state)
    assert np.all(samples["x"][np.isfinite(log_weights)] <= 1.1)


def test_importing_the_package_touches_no_device():
    code = (
        "import numpyro_smcopt, jax; from jax._src import xla_bridge; "
        "assert not xla_bridge.backends_are_initialized(); assert jax.live_arrays() == []"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
