# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Hundreds of malformed inputs: each is accepted because it is right, or refused in words.

A refusal is clear if it is a TypeError, ValueError or OSError that the package itself raises, or an error of the
user's model to which the package added what the model was run with. What would be compiled is only traced, except in
the last part.
"""

import datetime
import math
import re
import traceback

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jax import random
from models import unknown_spread
from numpyro.distributions import constraints

import numpyro_smcopt
from numpyro_smcopt import ImplicitDiffusion, MomentumParticleMLE, RunResult, SMCOptimizer
from numpyro_smcopt.kernels import RandomWalk
from numpyro_smcopt.runs.compilation import Program

PACKAGE = numpyro_smcopt.__path__[0]
Y = np.array([0.5, -1.0, 2.0], np.float32)
KEY = random.key(0)
MOST, LEAST = float(np.finfo(np.float32).max), float(np.finfo(np.float32).tiny)


def many(examples):
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture],
    )


class Accepted(Exception):
    """Everything was right as far as can be told without computing."""


@pytest.fixture
def nothing_compiles(monkeypatch):
    """The first program that would be compiled and run is traced instead."""

    def trace(self, static, *arguments):
        self.eval_shape(static, *arguments)
        raise Accepted

    monkeypatch.setattr(Program, "__call__", trace)


def refusal(call):
    """The message of a clear refusal, or None if the input is accepted."""
    try:
        call()
    except Accepted:
        return None
    except (TypeError, ValueError, OSError) as error:
        message, notes = str(error), " ".join(getattr(error, "__notes__", ()))
        ours = traceback.extract_tb(error.__traceback__)[-1].filename.startswith(PACKAGE)
        assert (ours and len(message) > 25) or "The model was run with" in notes, repr(error)
        return message + notes
    raise AssertionError("nothing was about to be computed")


def as_long_as_the_data(y):
    unknown_spread(y, len(y))


# -- data --------------------------------------------------------------------------------------------------------------
DTYPES = ["f2", "f4", "f8", "i1", "i4", "i8", "u1", "u8", "?", "c8", "O", "U3", "S3", "M8[D]", "m8[s]", "V4"]
shapes = st.lists(st.integers(0, 4), max_size=3).map(tuple)


@given(dtype=st.sampled_from(DTYPES), shape=shapes, model=st.sampled_from([unknown_spread, as_long_as_the_data]))
@many(110)
def test_arrays_of_any_type_and_shape(dtype, shape, model, nothing_compiles):
    y = np.zeros(shape, dtype)
    plate = (3,) if model is unknown_spread else shape[:1]
    fits = bool(plate) and plate != (0,) and y.size > 0 and y.dtype.kind in "fiub"
    if fits:
        try:
            fits = math.prod(np.broadcast_shapes(shape, plate)) <= max(y.size, plate[0])
        except ValueError:
            fits = False
    message = refusal(lambda: SMCOptimizer(model).init(KEY, y))
    assert (message is None) == fits, message


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(),
    st.complex_numbers(),
    st.text(max_size=3),
    st.binary(max_size=3),
    st.lists(st.floats(-1, 1), max_size=3),
    st.dictionaries(st.text(max_size=2), st.floats(-1, 1), max_size=2),
    st.just(len),
    st.just(object()),
    st.just(datetime.date(2000, 1, 1)),
    st.just(np.ma.array([1.0, 2.0, 3.0], mask=[False, True, False])),
    st.just(np.array([1, 2**40, 3])),
    st.just(random.key(0)),
    st.just([[1.0], [2.0, 3.0]]),
)


@pytest.mark.filterwarnings("ignore:.*single precision takes for 0:UserWarning")
@given(y=junk, n=st.one_of(st.just(3), junk))
@many(80)
def test_arguments_that_are_no_arrays(y, n, nothing_compiles):
    message = refusal(lambda: SMCOptimizer(unknown_spread).init(KEY, y, n))
    number = isinstance(y, bool | int | float) or y is None  # None makes a latent of the site
    number = number and not (isinstance(y, float) and (MOST < abs(y) < math.inf or 0 < abs(y) < LEAST))
    size = isinstance(n, int) and n > 0
    assert (message is None) == (number and size), message


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]), "masked elements.*numpyro.handlers.mask"),
        (np.array([1, 2**40, 3]), "do not fit into 32 bits"),
        (np.array([1.0, 1e300, 3.0]), "do not fit into single precision"),
    ],
)
def test_what_jax_would_lose_silently(array, words):
    with pytest.raises((TypeError, ValueError), match=words):
        SMCOptimizer(unknown_spread).init(KEY, array)


# -- models ------------------------------------------------------------------------------------------------------------
def twice(y):
    mean = numpyro.param("mean", 0.0)
    for _ in range(2):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def like_its_parameter(y):
    x = numpyro.sample("x", dist.Normal(numpyro.param("x", 0.0), 1.0))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def starts_at_a_word(y):
    numpyro.sample("y", dist.Normal(numpyro.param("mean", "zero"), 1.0).expand([3]).to_event(1), obs=y)


@pytest.mark.parametrize(
    ("model", "args", "words"),
    [
        (twice, (Y,), "Two sites of the model are called 'x'"),
        (like_its_parameter, (Y,), "Two sites of the model are called 'x'"),
        (starts_at_a_word, (Y,), "initial value of param site 'mean' is a str"),
        (as_long_as_the_data, (Y[:0],), r"plate of the model has no elements.*args\[0\]: float32\[0\]"),
        (unknown_spread, (Y, -1), r"plate of the model has no elements.*args\[1\]: -1"),
        (lambda y: numpyro.sample("y", dist.Normal(numpyro.param("a", 0.0), 1.0), obs=y), (Y[:0],), "no observations"),
        (unknown_spread, (), "cannot be called with no arguments: missing a required argument: 'y'"),
        (unknown_spread, (Y, 3, 4), "cannot be called with .*: too many positional arguments"),
        (lambda y: 1 / 0, (Y,), r"The model was run with args\[0\]: float32\[3\]"),
    ],
)
def test_models_that_cannot_be_run(model, args, words, nothing_compiles):
    with pytest.raises((TypeError, ValueError, ZeroDivisionError)) as caught:
        SMCOptimizer(model).init(KEY, *args)
    said = " ".join([str(caught.value), *getattr(caught.value, "__notes__", ())])
    assert re.search(words, said), said


# -- arguments of the objects ------------------------------------------------------------------------------------------
ARGUMENTS = {
    SMCOptimizer: (
        "optim", "objective", "kernel", "num_particles", "resampling", "ess_threshold", "init_strategy", "partition",
        "handlers", "unknown",
    ),
    MomentumParticleMLE: (
        "step_size", "momentum", "latent_step_size", "latent_momentum", "num_particles", "objective", "gamma", "eta",
        "time_step", "scheme", "preconditioner", "preconditioning", "kernel", "averaging", "bias_tolerance", "handlers",
        "init_strategy", "partition", "unknown",
    ),
    ImplicitDiffusion: ("optim", "objective", "sampler", "num_particles", "handlers", "unknown"),
}  # fmt: skip
arguments = st.sampled_from([(kind, name) for kind, names in ARGUMENTS.items() for name in names])
FUNCTIONS = {"step_size", "momentum", "latent_step_size", "latent_momentum", "resampling", "init_strategy", "partition",
             "scheme", "objective"}  # fmt: skip


@given(argument=arguments, value=junk)
@many(120)
def test_arguments_of_the_objects(argument, value, nothing_compiles):
    (kind, name), options = argument, {argument[1]: value}
    message = refusal(lambda: kind(unknown_spread, **options).init(KEY, Y))
    empty = name == "handlers" and isinstance(value, list) and not value
    if message is None:
        number = isinstance(value, int | float)
        assert value is None or number or (value is len and name in FUNCTIONS) or empty, value
    elif name == "handlers":
        assert "handlers must be a list of NumPyro handlers" in message


OF_RUN = ["rng_key", "num_steps", "init_params", "init_state", "checkpoint", "early_stop", "num_runs"]


@given(name=st.sampled_from(OF_RUN), value=junk)
@many(80)
def test_arguments_of_run(name, value, nothing_compiles, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call = {"rng_key": KEY, "num_steps": 10, "progress_bar": False} | {name: value}
    message = refusal(lambda: SMCOptimizer(unknown_spread).run(call.pop("rng_key"), call.pop("num_steps"), Y, **call))
    if message is None:
        right = {
            "rng_key": lambda v: hasattr(v, "dtype") and jax.dtypes.issubdtype(v.dtype, jax.dtypes.prng_key),
            "num_steps": lambda v: isinstance(v, int) and v > 0 and not isinstance(v, bool),
            "init_params": lambda v: v is None or v == {},
            "init_state": lambda v: v is None,
            "checkpoint": lambda v: v is None or isinstance(v, str),
            "early_stop": lambda v: isinstance(v, bool),
            "num_runs": lambda v: isinstance(v, int) and v > 0 and not isinstance(v, bool),
        }
        assert right[name](value), value


@pytest.mark.parametrize("key", [None, 0, "0", np.zeros(3, np.uint32), np.zeros(2), random.split(KEY, 2)])
def test_keys(key):
    with pytest.raises(TypeError, match=r"rng_key must be a single key such as jax.random.key\(0\), got"):
        SMCOptimizer(unknown_spread).init(key, Y)


METHODS = ("update", "evaluate", "get_params", "get_samples", "get_weighted_samples", "summarize", "as_svi", "run")


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ARGUMENTS)
def test_states(method, kind):
    optimizer = kind(unknown_spread)
    own = kind.state_type(*[None] * len(kind.state_type._fields))
    call = {
        "summarize": lambda state: optimizer.summarize(KEY, state, Y),
        "run": lambda state: optimizer.run(None, 3, Y, init_state=state),
        "get_params": optimizer.get_params,
    }.get(method, lambda state: getattr(optimizer, method)(state, Y))
    for state, advice in (
        (None, "NoneType"),
        ({"theta": 1}, "dict"),
        (RunResult(None, own, None, None, None, None), "Pass result.state"),
        ((own, 1.0), "update returns a state and a loss"),
    ):
        if method == "run" and state is None:
            continue  # which starts anew
        with pytest.raises(TypeError, match=rf"state must be a state of {kind.__name__}.*{advice}"):
            call(state)


def test_the_state_of_another_model():
    def other(y):
        centre = numpyro.param("centre", 0.0)
        spread = numpyro.param("sd", 1.0, constraint=constraints.positive)
        with numpyro.plate("data", 3):
            x = numpyro.sample("x", dist.Normal(centre, spread))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    state = small().init(KEY, Y)
    with pytest.raises(ValueError, match=r"The state has the parameters \['mean', 'sd'\], but the model .*'centre'"):
        SMCOptimizer(other, optax.sgd(0.1), kernel=RandomWalk(), num_particles=16).update(state, Y)


# -- numbers that are not finite: one shape, so everything is compiled once --------------------------------------------
def small():
    return SMCOptimizer(unknown_spread, optax.sgd(0.01), kernel=RandomWalk(), num_particles=16)


ONE = small()
numbers = st.one_of(
    st.floats(-5, 5, width=32),
    st.sampled_from([np.nan, np.inf, -np.inf, 3e38, -3e38, 1e30, 1e-40, -0.0, 1e3, -1e6]),
)


@pytest.mark.filterwarnings("ignore::UserWarning")  # far data: tempering does not arrive, and says so
@given(y=st.lists(numbers, min_size=3, max_size=3))
@example(y=[0.0, 0.0, 1e3])  # the step of theta overflows
@example(y=[0.0, 0.0, -1e6])  # a high energy, but not an impossible one
@many(60)
def test_data_are_named_if_not_finite_and_never_leave_a_nan(y):
    y = np.array(y, np.float32)
    try:
        state = ONE.init(KEY, y)
    except ValueError as error:
        assert "Site 'y' has no finite log density" in str(error) and np.any(~np.isfinite(y) | (abs(y) > 1e15))
        return
    assert np.all(np.isfinite(y)) and np.all(abs(y) < 1e30)
    for _ in range(2):
        state, loss = ONE.update(state, y)
        assert np.isfinite(loss)
    for leaf in jax.tree.leaves((state.theta, state.params, state.points, state.diagnostics)):
        assert jnp.all(jnp.isfinite(leaf))
