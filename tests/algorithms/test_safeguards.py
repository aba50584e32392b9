# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Faults are injected into the potential, its gradients and the optimiser; the fit arrives, or says that it did not.

The exact estimate of the model below is the mean of the data, with standard error ``sqrt(1.25 / 8)``.
"""

import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer, Status
from numpyro_smcopt.kernels import MALA, ULA
from numpyro_smcopt.kernels.integrators import exponential
from numpyro_smcopt.population.safeguards import RECOVERY, SHORTER, SHORTEST, SLOWER, next_backoff

pytestmark = pytest.mark.slow

Y = (3 + 1.2 * np.random.default_rng(0).normal(size=8)).astype(np.float32)
STANDARD_ERROR = np.sqrt(1.25 / 8)


def fault(x, mean, rate):
    """NaN, inf or -inf at a share ``rate`` of all pairs of numbers, as if at random; else 0."""
    bits = jax.lax.bitcast_convert_type(mean, jnp.uint32) * jnp.uint32(2654435761)
    bits ^= jax.lax.bitcast_convert_type(x, jnp.uint32)
    for shift in (16, 15, 16):
        bits = (bits ^ (bits >> shift)) * jnp.uint32(0x45D9F3B + shift)
    bits ^= bits >> 16
    kinds = jnp.array([jnp.nan, jnp.inf, -jnp.inf])
    return jnp.where(bits / 2.0**32 < rate, kinds[bits % 3], 0.0)


def model(y, rate):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
        numpyro.factor("fault", fault(x, mean, rate) * x)  # times x: the gradient is not finite either


CASES = {
    "default": {},
    "adam_mala": {"optim": optax.adam(0.05), "kernel": MALA()},
    "adam_ula": {"optim": optax.adam(0.05), "kernel": ULA()},
}


def no_nan(state):
    for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]:
        if not jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            assert not np.any(np.isnan(leaf)), jax.tree_util.keystr(path)
    kept = ("points", "theta", "params", "step", "theta_state", "motion", "cloud", "particles", "assessed")
    for leaf in jax.tree.leaves([getattr(state, name, None) for name in kept]):
        assert np.all(np.isfinite(leaf))


def updated(optimizer, state, num):
    """The states before and after each of ``num`` updates, none with a NaN."""
    for _ in range(num):
        old = state
        state, _ = optimizer.update(old, Y)
        no_nan(state)
        yield old, state


@pytest.mark.parametrize("name", CASES)
def test_fits_arrive_or_say_that_they_did_not(name):
    optimizer = SMCOptimizer(model, num_particles=64, **CASES[name])
    for rate in (0.01, 0.1):
        with pytest.warns(UserWarning, match=r"not finite for \d+ particles; they lost their weight and the run went"):
            result = optimizer.run(random.key(1), 400, Y, rate, progress_bar=False)
        lost = np.sum(result.diagnostics["num_nonfinite"])
        # Each of 8 blocks of 64 particles meets about one fault in 1 / rate evaluations.
        assert 0.5 * rate < lost / (400 * 8 * 64) < 1.5 * rate
        assert result.status is Status.FINISHED
        assert abs(result.params["mean"] - Y.mean()) < 0.1 * STANDARD_ERROR
        no_nan(result.state)

    # Half of all evaluations, from a sound start.
    state = optimizer.init(random.key(1), Y, 0.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = optimizer.run(random.key(1), 100, Y, 0.5, progress_bar=False, init_state=state)
    assert result.status in (Status.NON_FINITE, Status.WEIGHTS_COLLAPSED)
    no_nan(result.state)


UNWEIGHTED = {
    "momentum": lambda: MomentumParticleMLE(
        model, num_particles=64, step_size=0.01, momentum=0.9, latent_step_size=0.05, latent_momentum=0.5
    ),
    "implicit": lambda: ImplicitDiffusion(model, optax.adam(0.05), sampler=ULA(), num_particles=64),
}


@pytest.mark.parametrize("name", UNWEIGHTED)
def test_fits_without_weights_arrive_or_say_that_they_did_not(name):
    optimizer = UNWEIGHTED[name]()
    state = optimizer.init(random.key(1), Y, 0.0)
    for rate, status in ((0.01, Status.FINISHED), (0.1, Status.FINISHED), (0.5, Status.NON_FINITE)):
        with pytest.warns(UserWarning) as record:
            result = optimizer.run(None, 400, Y, rate, progress_bar=False, init_state=state)
        told = " ".join(str(warning.message) for warning in record)
        assert re.search(r"not finite for \d+ particles; they took the place of others", told)
        assert len(record) == 1 or status is Status.NON_FINITE
        # Each of 8 blocks of 64 particles meets a fault where it stood, or where it went.
        assert 0.7 * rate < np.sum(result.diagnostics["num_nonfinite"]) / (400 * 8 * 64) < 2.2 * rate
        assert result.status is status
        if rate < 0.5:
            assert abs(result.params["mean"] - Y.mean()) < 0.1 * STANDARD_ERROR
        no_nan(result.state)


def test_an_unweighted_gradient_that_is_not_finite_is_no_part_of_the_state():
    def rough(y):
        mean = numpyro.param("mean", 0.5)
        numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.factor("rough", jnp.sqrt(jnp.square(mean - 0.5)) * 0.0)

    optimizer = ImplicitDiffusion(rough, optax.sgd(0.1), lambda sample: sample["x"], num_particles=16)
    state = optimizer.init(random.key(0), Y)
    assert not state.usable
    new, loss = optimizer.update(state, Y)
    assert new.theta["mean"] == 0.5 and new.diagnostics["num_refused"] == 1 and np.isfinite(loss)
    np.testing.assert_allclose(new.step_backoff, SLOWER, rtol=1e-6)
    for leaf in jax.tree.leaves((new.assessed, new.diagnostics, new.params)):
        assert np.all(np.isfinite(leaf))


@pytest.mark.parametrize("name", ["default", *UNWEIGHTED])
def test_a_start_where_all_evaluations_fail_is_refused_in_words(name):
    optimizer = SMCOptimizer(model, num_particles=64) if name == "default" else UNWEIGHTED[name]()
    with pytest.raises(ValueError, match=r"'fault' has no finite log .* any starting point: 8 of its 8.*start .* else"):
        optimizer.init(random.key(1), Y, 1.0)


@pytest.mark.parametrize(("name", "status"), [("default", Status.WEIGHTS_COLLAPSED), ("implicit", Status.NON_FINITE)])
def test_a_start_where_half_of_all_evaluations_fail_is_possible_block_by_block(name, status):
    optimizer = SMCOptimizer(model, num_particles=64) if name == "default" else UNWEIGHTED[name]()
    state = optimizer.init(random.key(1), Y, 0.5)
    no_nan(state)
    # It is no sound run for that, and says so.
    with pytest.warns(UserWarning) as record:
        result = optimizer.run(random.key(1), 100, Y, 0.5, progress_bar=False, init_state=state)
    assert re.search(r"not finite for \d+ particles", " ".join(str(warning.message) for warning in record))
    assert result.status is status
    no_nan(result.state)


def test_a_start_without_a_particle_that_is_sound_in_all_blocks_is_refused_in_words():
    # Of 64 particles without weights, each sound with probability 2^-8.
    with pytest.raises(ValueError, match=r"not finite at any starting point.*Start .* elsewhere"):
        UNWEIGHTED["momentum"]().init(random.key(1), Y, 0.5)


def wall(y):
    """Beyond 2.5 the model is nowhere finite, and the estimate lies beyond it."""
    mean = numpyro.param("mean", 0.0)
    x = numpyro.sample("x", dist.Normal(mean, 1.0).expand([8]).to_event(1))
    numpyro.sample("y", dist.Normal(x, 0.5).to_event(1), obs=y)
    numpyro.factor("wall", jnp.where(mean > 2.5, jnp.nan, 0.0))


@pytest.mark.parametrize("kernel", [MALA(), ULA()], ids=["mala", "ula"])
def test_a_step_into_a_wall_is_refused_and_tried_shorter_and_blames_no_particle(kernel):
    optimizer = SMCOptimizer(wall, optax.sgd(0.3), kernel=kernel, num_particles=32)
    refused = []
    for old, state in updated(optimizer, optimizer.init(random.key(0), Y), 30):
        if state.diagnostics["num_refused"]:
            refused.append(float(old.step_backoff))
            assert state.theta["mean"] == old.theta["mean"] and state.diagnostics["num_nonfinite"] == 0
            np.testing.assert_allclose(state.step_backoff, max(SHORTER * old.step_backoff, SHORTEST), rtol=1e-6)
            if isinstance(kernel, MALA):  # rejuvenated at the last good theta
                assert np.any(state.points.x != old.points.x)
    assert len(refused) > 2 and refused[0] == 1.0 and min(refused) < 0.5
    assert 2.0 < state.theta["mean"] <= 2.5


def overflowing(y):
    spread = numpyro.param("sd", 1.0, constraint=constraints.positive)
    numpyro.sample("x", dist.Normal(0.0, spread).expand([3]).to_event(1))
    numpyro.sample("y", dist.Normal(0.0, spread).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize("name", ["default", *UNWEIGHTED])
def test_a_step_to_where_a_parameter_is_not_finite_is_refused_and_tried_shorter(name):
    """The gradient at the start is about -1e6, so a step of 0.01 ends at 1e4, whose exponential overflows."""
    y = np.full(3, 600.0, np.float32)
    optimizer = {
        "default": lambda: SMCOptimizer(overflowing, optax.sgd(0.01), kernel=MALA(), num_particles=16),
        "momentum": lambda: MomentumParticleMLE(
            overflowing, step_size=0.01, momentum=0.5, latent_step_size=0.01, latent_momentum=0.5, num_particles=16
        ),
        "implicit": lambda: ImplicitDiffusion(overflowing, optax.sgd(0.01), sampler=ULA(), num_particles=16),
    }[name]()
    state, num_refused = optimizer.init(random.key(0), y), 0
    for _ in range(4):
        old, (state, _) = state, optimizer.update(state, y)
        no_nan(state)
        if state.diagnostics["num_refused"]:
            num_refused += 1
            assert state.theta["sd"] == old.theta["sd"]
            np.testing.assert_allclose(state.step_backoff, SHORTER * old.step_backoff, rtol=1e-6)
    assert num_refused >= 3


def test_a_gradient_that_is_not_finite_skips_theta_and_slows_it():
    def rough(y):
        mean = numpyro.param("mean", 0.5)
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        # The value is 0 and its slope in the parameter 0 * inf.
        numpyro.factor("rough", jnp.sqrt(jnp.square(mean - 0.5)) * 0.0)
        numpyro.sample("y", dist.Normal(x, 1.0).expand([8]).to_event(1), obs=y)

    optimizer = SMCOptimizer(rough, optax.sgd(0.1), kernel=MALA(), num_particles=16)
    state = optimizer.init(random.key(0), Y)
    new, loss = optimizer.update(state, Y)
    assert new.theta["mean"] == 0.5 and new.diagnostics["num_refused"] == 1 and np.isfinite(loss)
    np.testing.assert_allclose(new.step_backoff, SLOWER, rtol=1e-6)
    assert np.any(new.points.x != state.points.x)
    # Only the carried scores, which are that gradient particle by particle, say that it is not finite.
    no_nan(new._replace(points=new.points._replace(score=None)))


def test_momentum_starts_from_rest_with_shorter_steps_after_a_gradient_that_was_not_finite():
    def rough(y, smooth):
        mean = numpyro.param("mean", 0.0)
        # Where smooth is 0, the value is 0 and its slope in the parameter 0 * inf.
        numpyro.factor("rough", jnp.sqrt((1 + jnp.square(mean)) * smooth) * 0.0)
        numpyro.sample("y", dist.Normal(mean, 1.0).expand([8]).to_event(1), obs=y)

    step_size, momentum = 0.02, 0.7
    optimizer = MomentumParticleMLE(rough, step_size=step_size, momentum=momentum)
    state = optimizer.init(random.key(0), Y, 1.0)
    state, _ = optimizer.update(state, Y, 1.0)
    moving = state._replace(theta={"mean": jnp.zeros(())})
    state, loss = optimizer.update(moving, Y, 0.0)
    assert state.theta["mean"] == 0.0 and state.diagnostics["num_refused"] == 1 and np.isfinite(loss)
    assert np.all(moving.motion.velocity != 0) and np.all(state.motion.velocity == 0)
    no_nan(state)

    mean, velocity, step_backoff = 0.0, 0.0, SLOWER
    for _ in range(3):
        np.testing.assert_allclose(state.step_backoff, step_backoff, rtol=1e-6)
        by = exponential(step_backoff * step_size, -np.log(momentum))
        gradient = np.sum(mean + by.lookahead * velocity - Y)
        mean, velocity = mean + by.carry * velocity - by.drift * gradient, by.decay * velocity - by.kick * gradient
        state, _ = optimizer.update(state, Y, 1.0)
        np.testing.assert_allclose(state.theta["mean"], mean, rtol=1e-5)
        step_backoff = min(RECOVERY * step_backoff, 1.0)


def test_momentum_is_taken_back_from_where_no_particle_has_an_energy():
    optimizer = MomentumParticleMLE(
        wall, step_size=0.1, momentum=0.5, latent_step_size=0.05, latent_momentum=0.3, num_particles=32
    )
    backoffs = []
    for old, state in updated(optimizer, optimizer.init(random.key(0), Y), 60):
        assert state.theta["mean"] <= 2.5
        if state.diagnostics["num_refused"]:
            backoffs.append(float(state.step_backoff / old.step_backoff))
            assert state.theta["mean"] == old.theta["mean"] and np.all(state.motion.velocity == 0)
    assert min(backoffs) < 0.3 and state.theta["mean"] > 2.0  # a step there, and a look there


def test_step_backoff_is_bounded_and_given_up():
    step_backoff = jnp.ones(())
    for _ in range(20):
        step_backoff = next_backoff(step_backoff, jnp.asarray(False), jnp.asarray(True))
    assert step_backoff == SHORTEST
    for _ in range(80):
        step_backoff = next_backoff(step_backoff, jnp.asarray(True), jnp.asarray(True))
    assert step_backoff == 1.0
