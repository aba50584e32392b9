# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Rules for the logarithms that are carried beside numbers, operation by operation; see `log_scale`.

A rule has the equation of a program, its operands and its first result, and says what is known of the result.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.types import Array

MOST_CATEGORIES = 64  # up to which one minus a probability is the sum of the others

# Operations that only arrange their first operand; the other operands say how.
ARRANGING = {"reshape", "squeeze", "expand_dims", "transpose", "rev", "copy", "copy_p", "slice", "broadcast_in_dim"}
ARRANGING |= {"gather", "dynamic_slice", "convert_element_type", "reduce_precision", "stop_gradient"}

# Operations that serve any floating type, as long as all operands have the same.
WIDENABLE = {"add", "sub", "mul", "div", "neg", "sign", "abs", "exp", "exp2", "log", "log1p", "expm1", "lgamma"}
WIDENABLE |= {"digamma", "max", "min", "pow", "integer_pow", "sqrt", "rsqrt", "square", "tanh", "logistic", "erf"}
WIDENABLE |= {"reduce_sum", "reduce_max", "reduce_min", "reduce_prod", "cumsum", "select_n", "concatenate", "stack"}
WIDENABLE |= {"pad", "eq", "ne", "lt", "le", "gt", "ge", "is_finite", "clamp"} | ARRANGING

Thunk = Callable[[], Array]


class Number(NamedTuple):
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
        """Its logarithm, computed from it if it is not known otherwise."""
        return jnp.log(self.value) if self.log is None else self.log()

    def logarithm_of_rest(self) -> Array:
        """The logarithm of one minus it, likewise."""
        return jnp.log1p(-self.value) if self.log1m is None else self.log1m()

    @property
    def is_known(self) -> bool:
        """True if it has a logarithm, or what it is the negative of has one of one minus it."""
        return self.log is not None or self.minus is not None and self.minus.log1m is not None

    @property
    def size(self) -> Thunk | None:
        """The logarithm of the absolute value, if it is known without computing the number."""
        if self.constant:
            return lambda: jnp.log(jnp.abs(self.value))
        return self.log if self.positive else self.log_size

    @property
    def known_below_one(self) -> bool:
        """True if it is below one, constants included."""
        return self.below_one or self.constant is not None and self.constant < 1

    @property
    def known_positive(self) -> bool:
        """True if it is positive, constants included."""
        return self.positive or self.constant is not None and self.constant > 0


def constant_number(value: Any) -> Number:
    """A constant of a program."""
    known = not isinstance(value, jax.core.Tracer) and np.size(value) == 1
    known = known and jnp.issubdtype(jnp.result_type(value), np.number)
    return Number(value, constant=float(np.asarray(value).ravel()[0]) if known else None)


def bind(equation: Any, values: list, widen: bool = False) -> list:
    """The results of an operation, in double precision if any of its operands is; conversions too, with ``widen``."""
    primitive, params = equation.primitive, equation.params
    types = [v.aval.dtype for v in equation.invars]
    given = [jnp.result_type(value) for value in values]
    if given != types:
        if primitive.name in WIDENABLE:
            widest = jnp.dtype("float64")
            values = [
                as_dtype(value, widest) if jnp.issubdtype(kind, jnp.floating) else value
                for value, kind in zip(values, given, strict=True)
            ]
            if params.get("new_dtype") == jnp.float32:
                params = params | {"new_dtype": widest}
        else:
            values = [as_dtype(value, kind) for value, kind in zip(values, types, strict=True)]
    if widen and params.get("new_dtype") == jnp.float32 and not jnp.issubdtype(given[0], jnp.floating):
        params = params | {"new_dtype": jnp.dtype("float64")}
    found = primitive.bind(*values, **primitive.get_bind_params(params))
    return list(found) if primitive.multiple_results else [found]


def as_dtype(value: Any, kind: Any) -> Any:
    """The value as one of another type."""
    return value if jnp.result_type(value) == kind else lax.convert_element_type(value, kind)


def one_minus(number: Number | None) -> Number | None:
    """Of one minus a number only the logarithms."""
    if number is None or number.log1m is None:
        return None
    return Number(None, log=number.log1m, log1m=number.log, positive=number.below_one, below_one=number.positive)


def _strong(*numbers: Number) -> bool:
    """True if numbers are positive for certain, and the logarithm of one of them is known."""
    return all(number.known_positive for number in numbers) and any(number.log is not None for number in numbers)


def _exp(equation: Any, inputs: list[Number], value: Any) -> Number:
    x = inputs[0].value
    return Number(value, lambda: x, lambda: jnp.log(-jnp.expm1(x)), positive=True)


def _logistic(equation: Any, inputs: list[Number], value: Any) -> Number:
    x = inputs[0].value
    return Number(value, lambda: jax.nn.log_sigmoid(x), lambda: jax.nn.log_sigmoid(-x), positive=True, below_one=True)


def _neg(equation: Any, inputs: list[Number], value: Any) -> Number:
    return Number(value, minus=inputs[0], log_size=inputs[0].size)


def _abs(equation: Any, inputs: list[Number], value: Any) -> Number:
    size = inputs[0].size
    return Number(value) if size is None else Number(value, size, positive=True)


def _sub(equation: Any, inputs: list[Number], value: Any) -> Number:
    one, other = inputs
    if one.constant != 1:
        return Number(value)
    if other.part == "cumulated" and other.simplex is not None:  # what is left of a stick that has been broken
        logs, axis = other.simplex

        def left() -> Array:
            rest = lax.slice_in_dim(logs(), 1, None, axis=axis)
            return lax.cumlogsumexp(rest, axis, reverse=True)

        return Number(value, left, positive=True)
    found = one_minus(other)
    return Number(value) if found is None else found._replace(value=value)


def _add(equation: Any, inputs: list[Number], value: Any) -> Number:
    a, b = inputs
    if not _strong(a, b):
        return Number(value)
    return Number(value, lambda: jnp.logaddexp(a.logarithm(), b.logarithm()), positive=True)


def _mul(equation: Any, inputs: list[Number], value: Any) -> Number:
    return _product(inputs, value, 1)


def _div(equation: Any, inputs: list[Number], value: Any) -> Number:
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


def _product(inputs: list[Number], value: Any, sign: int) -> Number:
    a, b = inputs
    first, second, size = a.size, b.size, None
    if first is not None and second is not None:
        size = lambda: first() + sign * second()  # noqa: E731
    # One factor of unknown sign is that of the product: wherever its logarithm exists, it is this one.
    if not any(number.log is not None and number.positive for number in inputs):
        return Number(value, log_size=size)
    positive = a.known_positive and b.known_positive
    return Number(value, lambda: a.logarithm() + sign * b.logarithm(), positive=positive, log_size=size)


def _power(equation: Any, inputs: list[Number], value: Any) -> Number:
    base = inputs[0]
    if not base.positive or base.log is None:
        return Number(value)
    exponent = inputs[1].value if len(inputs) > 1 else equation.params.get("y", 2)
    return Number(value, lambda: exponent * base.logarithm(), positive=True)


def _root(equation: Any, inputs: list[Number], value: Any) -> Number:
    base, half = inputs[0], 0.5 if equation.primitive.name == "sqrt" else -0.5
    return Number(value) if base.log is None else Number(value, lambda: half * base.logarithm(), positive=base.positive)


def _max(equation: Any, inputs: list[Number], value: Any) -> Number:
    number, bound = inputs if inputs[1].constant is not None else inputs[::-1]
    if number.log is None or bound.constant is None:
        return Number(value)
    # The smallest number that is not zero is no bound but a guard, which the logarithm does not need.
    if 0 < bound.constant <= np.finfo(np.float32).tiny:
        return number._replace(value=value)
    return Number(value)


def _min(equation: Any, inputs: list[Number], value: Any) -> Number:
    number, bound = inputs if inputs[1].constant is not None else inputs[::-1]
    if number.log is None or bound.constant is None:
        return Number(value)
    if 1 - 2 * jnp.finfo(value.dtype).eps <= bound.constant <= 1 and number.log1m is not None:
        return number._replace(value=value)
    return Number(value)


def _clamp(equation: Any, inputs: list[Number], value: Any) -> Number:
    low, number, high = inputs
    return _min(equation, [_max(equation, [number, low], value), high], value)


def _arranged(equation: Any, inputs: list[Number], value: Any) -> Number:
    number, rest = inputs[0], [other.value for other in inputs[1:]]
    if equation.primitive.name == "convert_element_type" and not jnp.issubdtype(number.value.dtype, jnp.floating):
        return Number(value, constant=number.constant)
    same = lambda thunk: None if thunk is None else lambda: bind(equation, [thunk(), *rest])[0]  # noqa: E731
    found = Number(value, same(number.log), same(number.log1m), number.positive, number.below_one, number.constant)
    found = found._replace(total=_same_total(equation, number), log_size=same(number.log_size))
    if number.simplex is not None and equation.primitive.name == "slice" and _is_head(equation.params, number):
        found = found._replace(simplex=number.simplex, part="head")
    return found


def _same_total(equation: Any, number: Number) -> Any:
    """A sum that is put beside what it is the sum of is still that sum."""
    return number.total if equation.primitive.name in ("broadcast_in_dim", "reshape", "expand_dims") else None


def _is_head(params: dict, number: Number) -> bool:
    """True if a slice of a simplex is all but its last element."""
    shape, axis = number.value.shape, number.simplex[1] if number.simplex is not None else 0
    cut = [size - end for end, size in zip(params["limit_indices"], shape, strict=True)]
    first = not any(params["start_indices"]) and params["strides"] is None
    return number.part == "all" and first and cut == [int(k == axis) for k in range(len(shape))]


def _cumsum(equation: Any, inputs: list[Number], value: Any) -> Number:
    number = inputs[0]
    ahead = number.simplex is not None and number.part == "head" and equation.params["axis"] == number.simplex[1]
    if ahead and not equation.params["reverse"]:
        return Number(value, simplex=number.simplex, part="cumulated")
    return Number(value)


def _cumprod(equation: Any, inputs: list[Number], value: Any) -> Number:
    number, params = inputs[0], equation.params
    if number.log is None or not number.positive:
        return Number(value)
    return Number(value, lambda: lax.cumsum(number.logarithm(), params["axis"], params["reverse"]), positive=True)


def _reduced(equation: Any, inputs: list[Number], value: Any) -> Number:
    number, axes = inputs[0], equation.params["axes"]
    if number.log is None or not number.positive:
        return Number(value)
    if equation.primitive.name == "reduce_prod":
        return Number(value, lambda: jnp.sum(number.logarithm(), axes), positive=True)
    total = number.value, axes
    return Number(value, lambda: jax.nn.logsumexp(number.logarithm(), axes), positive=True, total=total)


def _together(equation: Any, inputs: list[Number], value: Any) -> Number:
    """Of several numbers of which one is selected, or which are put side by side."""
    chosen = inputs[1:] if equation.primitive.name == "select_n" else inputs
    # A logarithm that is not selected must exist all the same, else its derivative is NaN.
    if not _strong(*chosen):
        return Number(value)
    before = [inputs[0].value] if equation.primitive.name == "select_n" else []

    def logs() -> Array:
        return bind(equation, [*before, *(as_dtype(number.logarithm(), value.dtype) for number in chosen)])[0]

    log1m = None
    if all(number.log1m is not None or 0 < (number.constant or 0) < 1 for number in chosen):

        def log1m() -> Array:
            return bind(equation, [*before, *(as_dtype(number.logarithm_of_rest(), value.dtype) for number in chosen)])[
                0
            ]

    return Number(value, logs, log1m, positive=True, below_one=all(number.known_below_one for number in chosen))


def _gamma(equation: Any, inputs: list[Number], value: Any) -> Number:
    params = equation.params | {"log_space": True}
    operands = [number.value for number in inputs]
    return Number(value, lambda: equation.primitive.bind(*operands, **params), positive=True)


RULES: dict[str, Callable[[Any, list[Number], Any], Number]] = {
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
