# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Programs: what they compute, below a user's transformations, and with compilers that know fewer options."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_smcopt.runs import compilation
from numpyro_smcopt.runs.compilation import Program, compiler_options


def test_a_sum_that_is_subtracted_from_its_summand():
    """Compiled by jaxlib 0.10.2 without options, it is off by half of a standard deviation."""
    rng = np.random.default_rng(0)
    values = rng.standard_normal((6, 64, 200)).astype(np.float32)
    weights = rng.dirichlet(np.ones(64), 200).T.astype(np.float32)
    centred = Program(lambda static, w, c: c - jnp.sum(w * c, 1, keepdims=True))(None, weights, values)
    exact = values - np.sum(weights * values.astype(float), 1, keepdims=True)
    np.testing.assert_allclose(centred, exact, atol=1e-5)


def test_transformations_may_surround_a_program():
    program = Program(lambda power, x: x**power)
    x = jnp.arange(1.0, 4.0)
    np.testing.assert_array_equal(program(2, x), x**2)
    np.testing.assert_array_equal(jax.vmap(lambda one: program(2, one))(x), x**2)
    np.testing.assert_array_equal(jax.jit(lambda x: program(2, x))(x), x**2)
    np.testing.assert_array_equal(jax.jit(lambda: program(2, x))(), x**2)  # everything in it is a constant
    assert jax.grad(lambda one: program(3, one))(2.0) == 12.0


@pytest.fixture
def fresh_options():
    compiler_options.cache_clear()
    yield
    compiler_options.cache_clear()


def test_options_that_the_compiler_does_not_know_are_left_out(monkeypatch, fresh_options):
    known = {"xla_backend_optimization_level": 1}
    monkeypatch.setattr(compilation, "CPU_OPTIONS", {"xla_no_such_option": True, **known})
    assert compiler_options() == known
    np.testing.assert_array_equal(Program(lambda static, x: x + 1)(None, jnp.ones(2)), [2, 2])


def test_other_devices_get_no_options(monkeypatch, fresh_options):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert compiler_options() == {}


def test_a_prepared_program_is_compiled_and_traced_once(compilations):
    traced = []

    def function(static, x):
        traced.append(static)
        return {"double": 2 * x["a"] @ x["b"]}

    program = Program(function)
    shapes = {"a": jax.ShapeDtypeStruct((3, 4), np.float32), "b": jax.ShapeDtypeStruct((4,), np.float32)}
    out = program.prepare("s", shapes)
    assert out["double"].shape == (3,) and out["double"].dtype == np.float32
    arrays = {"a": np.ones((3, 4), np.float32), "b": jax.device_put(np.ones(4, np.float32))}
    np.testing.assert_array_equal(program("s", arrays)["double"], [8.0] * 3)
    with compilations() as compiled:
        program("s", arrays)
    assert compiled == [] and traced == ["s"]
