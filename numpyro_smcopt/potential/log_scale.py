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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Literal

from numpyro_smcopt.types import Array

MOST_CATEGORIES = 64  # up to which one minus a probability is the sum of the others

CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "closed_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}

# Operations that only arrange their first operand; the other operands say how.
ARRANGING = {"reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p", "slice", "broadcast_in_dim"}
ARRANGING |= {"gather", "dynamic_slice", "convert_element_type", "reduce_precision", "stop_gradient"}

# Operations that serve any floating type, as long as all operands have the same.
WIDENABLE = {"add", "sub", "mul", "div", "neg", "sign", "abs", "exp", "exp2", "log", "log1p", "expm1", "lgamma"}
WIDENABLE |= {"digamma", "max", "min", "pow", "integer_pow", "sqrt", "rsqrt", "square", "tanh", "logistic", "erf"}
WIDENABLE |= {
    "reduce_sum",
    "reduce_max",
    "reduce_min",
    "reduce_prod",
    "cumsum",
    "select_n",
    "concatenate",
    "stack",
    "pad",
}
WIDENABLE |= {"eq", "ne", "lt", "le", "gt", "ge", "is_finite", "clamp"} | ARRANGING

Thunk = Callable[[], Array]


class _Number(NamedTuple):
    """A value of a program, and what is known of it without computing.

    Attributes:
        value: The value.
        log: Its logarithm; None if nothing is known.
        log1m: The logarithm of one minus it, likewise.
        positive: Whether it is positive for certain; else its ``log`` is only right if it is.
        below_one: Whether it is less than one for certain.
        constant: Its value if that is one known number.
        log_size: The logarithm of its absolute value, where its sign may be either.
        minus: The number that it is the negative of.
        total: The number that it is the sum of, and over which axes.
        simplex: The logarithms of all probabilities that it is one or some of, and along which axis they add up to one.
        part: What has become of a simplex: "all" of it, "head" without the last, or "cumulated" head.
    """

    value: Any
    log: Thunk | None = None
    log1m: Thunk | None = None
    positive: bool = False
    below_one: bool = False
    constant: float | None = None
    log_size: Thunk | None = None
    minus: Any = None
    total: Any = None
    simplex: tuple[Thunk, int] | None = None
    part: str = ""

    def logarithm(self) -> Array:
        return jnp.log(self.value) if self.log is None else self.log()

    def logarithm_of_rest(self) -> Array:
        return jnp.log1p(-self.value) if self.log1m is None else self.log1m()

    @property
    def is_known(self) -> bool:
        return self.log is not None or self.minus is not None and self.minus.log1m is not None

    @property
    def size(self) -> Thunk | None:
        """The logarithm of the absolute value, if it is known without computing the number."""
        if self.constant:
            return lambda: jnp.log(jnp.abs(self.value))
        return self.log if self.positive else self.log_size

    @property
    def known_below_one(self) -> bool:
        return self.below_one or self.constant is not None and self.constant < 1

    @property
    def known_positive(self) -> bool:
        return self.positive or self.constant is not None and self.constant > 0


class _Mode:
    """Whether constants are widened, and how many logarithms have been taken from those that were carried."""

    def __init__(self, widen: bool) -> None:
        self.widen, self.num_used = widen, 0

    def constant(self, value: Any) -> _Number:
        """A constant of the program."""
        real = jnp.issubdtype(jnp.result_type(value), jnp.floating)
        return _constant(_as(value, jnp.dtype("float64")) if self.widen and real else value)


def keep_logarithms(function: Callable, *arguments: Any, widen: bool = False) -> Any:
    """The result of a function, computed from logarithms where these are known.

    Args:
        function: Of pytrees of arrays, to an array.
        *arguments: Its arguments.
        widen: Whether constants, and integers that become real numbers, are widened to double precision.
    """
    program = jax.make_jaxpr(function)(*arguments)
    (number,) = _run(program, [_Number(value) for value in jax.tree.leaves(arguments)], _Mode(widen))
    return _as(number.value, program.out_avals[0].dtype)


def _run(program: Any, arguments: list[_Number], mode: _Mode) -> list[_Number]:
    jaxpr = program.jaxpr
    env = dict(zip(jaxpr.constvars, map(mode.constant, program.consts), strict=True))
    env.update(zip(jaxpr.invars, arguments, strict=True))
    read = lambda v: _constant(v.val) if isinstance(v, Literal) else env[v]  # noqa: E731
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


def _constant(value: Any) -> _Number:
    known = not isinstance(value, jax.core.Tracer) and np.size(value) == 1
    known = known and jnp.issubdtype(jnp.result_type(value), np.number)
    return _Number(value, constant=float(np.asarray(value).ravel()[0]) if known else None)


def _apply(equation: Any, inputs: list[_Number], mode: _Mode) -> list[_Number]:
    name = equation.primitive.name
    if name in CALLS and (name != "custom_jvp_call" or any(number.is_known for number in inputs)):
        before = mode.num_used
        outputs = _run(equation.params[CALLS[name]], inputs, mode)
        # What has a derivative of its own keeps it, unless a logarithm has been replaced inside.
        if name != "custom_jvp_call" or mode.num_used > before:
            return outputs
    if name in ("log", "log1p"):
        number = inputs[0] if name == "log" else _one_minus(inputs[0].minus)
        if number is not None and number.log is not None:
            mode.num_used += 1
            return [_Number(number.log())]
    values = _bind(equation, [number.value for number in inputs], mode.widen)
    outputs = [_Number(value) for value in values]
    if name in RULES and jnp.issubdtype(jnp.result_type(values[0]), jnp.floating):
        outputs[0] = RULES[name](equation, inputs, values[0])
    return outputs


def _bind(equation: Any, values: list, widen: bool = False) -> list:
    """The results of an operation, in double precision if any of its operands is; conversions too, with ``widen``."""
    primitive, params = equation.primitive, equation.params
    types = [v.aval.dtype for v in equation.invars]
    given = [jnp.result_type(value) for value in values]
    if given != types:
        if primitive.name in WIDENABLE:
            widest = jnp.dtype("float64")
            values = [
                _as(value, widest) if jnp.issubdtype(kind, jnp.floating) else value
                for value, kind in zip(values, given, strict=True)
            ]
            if params.get("new_dtype") == jnp.float32:
                params = params | {"new_dtype": widest}
        else:
            values = [_as(value, kind) for value, kind in zip(values, types, strict=True)]
    if widen and params.get("new_dtype") == jnp.float32 and not jnp.issubdtype(given[0], jnp.floating):
        params = params | {"new_dtype": jnp.dtype("float64")}
    found = primitive.bind(*values, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def _as(value: Any, kind: Any) -> Any:
    return value if jnp.result_type(value) == kind else lax.convert_element_type(value, kind)


# -- what becomes of logarithms ------------------------------------------------------------------------------------
def _one_minus(number: _Number | None) -> _Number | None:
    """Of one minus a number only the logarithms."""
    if number is None or number.log1m is None:
        return None
    return _Number(None, log=number.log1m, log1m=number.log, positive=number.below_one, below_one=number.positive)


def _strong(*numbers: _Number) -> bool:
    """Whether numbers are positive for certain, and the logarithm of one of them is known."""
    return all(number.known_positive for number in numbers) and any(number.log is not None for number in numbers)


def _exp(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    x = inputs[0].value
    return _Number(value, lambda: x, lambda: jnp.log(-jnp.expm1(x)), positive=True)


def _logistic(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    x = inputs[0].value
    return _Number(value, lambda: jax.nn.log_sigmoid(x), lambda: jax.nn.log_sigmoid(-x), positive=True, below_one=True)


def _neg(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    return _Number(value, minus=inputs[0], log_size=inputs[0].size)


def _abs(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    size = inputs[0].size
    return _Number(value) if size is None else _Number(value, size, positive=True)


def _sub(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    one, other = inputs
    if one.constant != 1:
        return _Number(value)
    if other.part == "cumulated" and other.simplex is not None:  # what is left of a stick that has been broken
        logs, axis = other.simplex

        def left() -> Array:
            rest = lax.slice_in_dim(logs(), 1, None, axis=axis)
            return lax.cumlogsumexp(rest, axis, reverse=True)

        return _Number(value, left, positive=True)
    found = _one_minus(other)
    return _Number(value) if found is None else found._replace(value=value)


def _add(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    a, b = inputs
    if not _strong(a, b):
        return _Number(value)
    return _Number(value, lambda: jnp.logaddexp(a.logarithm(), b.logarithm()), positive=True)


def _mul(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    return _product(inputs, value, 1)


def _div(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    found, total = _product(inputs, value, -1), inputs[1].total
    if total is None or total[0] is not inputs[0].value or len(total[1]) != 1:
        return found
    (axis,), num = total[1], value.shape[total[1][0]]
    if num > MOST_CATEGORIES:
        return found

    def others() -> Array:
        spread = jnp.moveaxis(found.logarithm(), axis, -1)
        left_out = jnp.where(jnp.eye(num, dtype=bool), -jnp.inf, spread[..., None, :])
        return jnp.moveaxis(jax.nn.logsumexp(left_out, -1), -1, axis)

    return found._replace(log1m=others, below_one=True, simplex=(found.logarithm, axis), part="all")


def _product(inputs: list[_Number], value: Any, sign: int) -> _Number:
    a, b = inputs
    first, second, size = a.size, b.size, None
    if first is not None and second is not None:
        size = lambda: first() + sign * second()  # noqa: E731
    # One factor of unknown sign is that of the product: wherever its logarithm exists, it is this one.
    if not any(number.log is not None and number.positive for number in inputs):
        return _Number(value, log_size=size)
    positive = a.known_positive and b.known_positive
    return _Number(value, lambda: a.logarithm() + sign * b.logarithm(), positive=positive, log_size=size)


def _power(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    base = inputs[0]
    if not base.positive or base.log is None:
        return _Number(value)
    exponent = inputs[1].value if len(inputs) > 1 else equation.params.get("y", 2)
    return _Number(value, lambda: exponent * base.logarithm(), positive=True)


def _root(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    base, half = inputs[0], 0.5 if equation.primitive.name == "sqrt" else -0.5
    return (
        _Number(value) if base.log is None else _Number(value, lambda: half * base.logarithm(), positive=base.positive)
    )


def _max(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number, bound = inputs if inputs[1].constant is not None else inputs[::-1]
    if number.log is None or bound.constant is None:
        return _Number(value)
    # The smallest number that is not zero is no bound but a guard, which the logarithm does not need.
    if 0 < bound.constant <= np.finfo(np.float32).tiny:
        return number._replace(value=value)
    return _Number(value)


def _min(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number, bound = inputs if inputs[1].constant is not None else inputs[::-1]
    if number.log is None or bound.constant is None:
        return _Number(value)
    if 1 - 2 * jnp.finfo(value.dtype).eps <= bound.constant <= 1 and number.log1m is not None:
        return number._replace(value=value)
    return _Number(value)


def _clamp(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    low, number, high = inputs
    return _min(equation, [_max(equation, [number, low], value), high], value)


def _arranged(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number, rest = inputs[0], [other.value for other in inputs[1:]]
    if equation.primitive.name == "convert_element_type" and not jnp.issubdtype(number.value.dtype, jnp.floating):
        return _Number(value, constant=number.constant)
    same = lambda thunk: None if thunk is None else lambda: _bind(equation, [thunk(), *rest])[0]  # noqa: E731
    found = _Number(value, same(number.log), same(number.log1m), number.positive, number.below_one, number.constant)
    found = found._replace(total=_same_total(equation, number), log_size=same(number.log_size))
    if number.simplex is not None and equation.primitive.name == "slice" and _is_head(equation.params, number):
        found = found._replace(simplex=number.simplex, part="head")
    return found


def _same_total(equation: Any, number: _Number) -> Any:
    """A sum that is put beside what it is the sum of is still that sum."""
    return number.total if equation.primitive.name in ("broadcast_in_dim", "reshape", "expand_dims") else None


def _is_head(params: dict, number: _Number) -> bool:
    """Whether a slice of a simplex is all but its last element."""
    shape, axis = number.value.shape, number.simplex[1] if number.simplex is not None else 0
    cut = [size - end for end, size in zip(params["limit_indices"], shape, strict=True)]
    first = not any(params["start_indices"]) and params["strides"] is None
    return number.part == "all" and first and cut == [int(k == axis) for k in range(len(shape))]


def _cumsum(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number = inputs[0]
    ahead = number.simplex is not None and number.part == "head" and equation.params["axis"] == number.simplex[1]
    if ahead and not equation.params["reverse"]:
        return _Number(value, simplex=number.simplex, part="cumulated")
    return _Number(value)


def _cumprod(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number, params = inputs[0], equation.params
    if number.log is None or not number.positive:
        return _Number(value)
    return _Number(value, lambda: lax.cumsum(number.logarithm(), params["axis"], params["reverse"]), positive=True)


def _reduced(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    number, axes = inputs[0], equation.params["axes"]
    if number.log is None or not number.positive:
        return _Number(value)
    if equation.primitive.name == "reduce_prod":
        return _Number(value, lambda: jnp.sum(number.logarithm(), axes), positive=True)
    total = number.value, axes
    return _Number(value, lambda: jax.nn.logsumexp(number.logarithm(), axes), positive=True, total=total)


def _together(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    """Of several numbers of which one is selected, or which are put side by side."""
    chosen = inputs[1:] if equation.primitive.name == "select_n" else inputs
    # A logarithm that is not selected must exist all the same, else its derivative is NaN.
    if not _strong(*chosen):
        return _Number(value)
    before = [inputs[0].value] if equation.primitive.name == "select_n" else []

    def logs() -> Array:
        return _bind(equation, [*before, *(_as(number.logarithm(), value.dtype) for number in chosen)])[0]

    log1m = None
    if all(number.log1m is not None or 0 < (number.constant or 0) < 1 for number in chosen):

        def log1m() -> Array:
            return _bind(equation, [*before, *(_as(number.logarithm_of_rest(), value.dtype) for number in chosen)])[0]

    return _Number(value, logs, log1m, positive=True, below_one=all(number.known_below_one for number in chosen))


def _gamma(equation: Any, inputs: list[_Number], value: Any) -> _Number:
    params = equation.params | {"log_space": True}
    operands = [number.value for number in inputs]
    return _Number(value, lambda: equation.primitive.bind(*operands, **params), positive=True)


RULES: dict[str, Callable[[Any, list[_Number], Any], _Number]] = {
    "exp": _exp,
    "logistic": _logistic,
    "neg": _neg,
    "abs": _abs,
    "sub": _sub,
    "add": _add,
    "mul": _mul,
    "div": _div,
    "pow": _power,
    "integer_pow": _power,
    "square": _power,
    "sqrt": _root,
    "rsqrt": _root,
    "max": _max,
    "min": _min,
    "clamp": _clamp,
    "cumsum": _cumsum,
    "cumprod": _cumprod,
    "reduce_sum": _reduced,
    "reduce_prod": _reduced,
    "select_n": _together,
    "concatenate": _together,
    "stack": _together,
    "pad": _together,
    "random_gamma": _gamma,
    **dict.fromkeys(ARRANGING, _arranged),
}
