# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Programs that keep the logarithms of positive numbers, so that neither tail is lost.

A rate ``exp(x)`` is 0 below x = -103 in single precision and a probability ``sigmoid(x)`` is 1 above x = 17, and a
density that then takes the logarithm of the rate, or of one minus the probability, knows nothing of x any more: a
Gamma(.02) prior has a sixth of its mass there. `keep_logarithms` repeats a program and carries beside each number that
is positive by construction its logarithm, and that of one minus it, wherever these follow from how it was made. Where
the program takes such a logarithm it gets the one that was carried. What nobody asks for is not computed.

Numbers of single precision are widened on the way where the program meets those of double precision, so that constants
of a model take part in what it computes in double precision.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Literal

from numpyro_smcopt.potential.log_rules import RULES, Number, as_dtype, bind, constant_number, one_minus

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}


class _Mode:
    """Mode of a trace: whether constants are widened, and the number of carried logarithms that were taken."""

    def __init__(self, widen: bool) -> None:
        self.widen, self.num_used = widen, 0

    def constant(self, value: Any) -> Number:
        """A constant of the program."""
        real = jnp.issubdtype(jnp.result_type(value), jnp.floating)
        return constant_number(as_dtype(value, jnp.dtype("float64")) if self.widen and real else value)


def keep_logarithms(function: Callable, *arguments: Any, widen: bool = False) -> Any:
    """The result of a function, computed from logarithms where these are known.

    Args:
        function: Of pytrees of arrays, to an array.
        *arguments: Its arguments.
        widen: Whether constants, and integers that become real numbers, are widened to double precision.
    """
    program = jax.make_jaxpr(function)(*arguments)
    (number,) = _run(program, [Number(value) for value in jax.tree.leaves(arguments)], _Mode(widen))
    return as_dtype(number.value, program.out_avals[0].dtype)


def _run(program: Any, arguments: list[Number], mode: _Mode) -> list[Number]:
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, map(mode.constant, program.consts), strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda v: constant_number(v.val) if isinstance(v, Literal) else env[v]  # noqa: E731
    for equation in _needed(jaxpr):
        env.update(zip(equation.outvars, _apply(equation, [read(v) for v in equation.invars], mode), strict=True))
    return [read(v) for v in jaxpr.outvars]


def _needed(jaxpr: Any) -> list[Any]:
    """The operations on which the results depend; a model also draws values and makes keys that nobody looks at."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for equation in reversed(jaxpr.eqns):
        if equation.effects or not wanted.isdisjoint(equation.outvars):
            wanted.update(v for v in equation.invars if not isinstance(v, Literal))
            kept.append(equation)
    return kept[::-1]


def _apply(equation: Any, inputs: list[Number], mode: _Mode) -> list[Number]:
    name = equation.primitive.name
    if name in CALLS and (name != "custom_jvp_call" or any(number.is_known for number in inputs)):
        before = mode.num_used
        outputs = _run(equation.params[CALLS[name]], inputs, mode)
        # What has a derivative of its own keeps it, unless a logarithm has been replaced inside.
        if name != "custom_jvp_call" or mode.num_used > before:
            return outputs
    if name in ("log", "log1p"):
        number = inputs[0] if name == "log" else one_minus(inputs[0].minus)
        if number is not None and number.log is not None:
            mode.num_used += 1
            return [Number(number.log())]
    values = bind(equation, [number.value for number in inputs], mode.widen)
    outputs = [Number(value) for value in values]
    if name in RULES and jnp.issubdtype(jnp.result_type(values[0]), jnp.floating):
        outputs[0] = RULES[name](equation, inputs, values[0])
    return outputs
