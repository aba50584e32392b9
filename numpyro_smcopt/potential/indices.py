# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Indices among the data that point beyond an axis: JAX takes them for the last element, in silence.

The program of the energy is read once on the host, equation by equation, and nothing is compiled: integers that follow
from the data are computed by NumPy until they index something. What is so found is refused only if it matters: with
other indices in its place the energy is compiled and evaluated, and a row that is masked changes no term.
"""

import contextlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt.types import Array, warn_outside

LARGEST, LARGEST_FLOAT = 20_000_000, 100_000  # elements of an array that is followed
ELEMENTWISE: dict[str, Callable] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "max": np.maximum, "min": np.minimum,
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
    "and": np.bitwise_and, "or": np.bitwise_or, "not": np.invert, "floor": np.floor, "abs": np.abs, "sign": np.sign,
    "clamp": lambda low, x, high: np.clip(x, low, high), "rem": np.fmod, "is_finite": np.isfinite,
    "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
}  # fmt: skip
STRUCTURAL: dict[str, Callable] = {
    "reshape": lambda v, p: v.reshape(p["new_sizes"]),
    "squeeze": lambda v, p: np.squeeze(v, tuple(p["dimensions"])),
    "expand_dims": lambda v, p: np.expand_dims(v, p["dimensions"]),
    "transpose": lambda v, p: np.transpose(v, p["permutation"]),
    "rev": lambda v, p: np.flip(v, p["dimensions"]),
    "slice": lambda v, p: v[tuple(map(slice, p["start_indices"], p["limit_indices"], p["strides"] or [1] * v.ndim))],
    "broadcast_in_dim": lambda v, p: _broadcast(v, p["shape"], p["broadcast_dimensions"]),
    **dict.fromkeys(("copy", "copy_p", "stop_gradient", "optimization_barrier"), lambda v, p: v),
}
CALLS = ("jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "remat", "checkpoint")


class Followed(NamedTuple):
    """Knowledge about a variable of a program.

    Attributes:
        value: Its value, if it follows from data; with a leading axis of steps if ``stepwise``.
        argument: The name of the argument that it comes from.
        places: Which element of the argument each element comes from.
        names: Sites that it depends on.
        beyond: What points outside of an axis in it, if negative indices have been made to count from the end.
        stepwise: Whether it is a number that takes one value after the other, in a scan.
    """

    value: Any = None
    argument: str | None = None
    places: Any = None
    names: frozenset[str] = frozenset()
    beyond: "tuple[Beyond, ...] | None" = None
    stepwise: bool = False


class Beyond(NamedTuple):
    """Indices that point outside of an axis.

    Attributes:
        variable: The variable of the program that holds them.
        bad: Which elements of it do.
        value: The first of them.
        argument: The argument that it comes from, with its place there.
        length: Of the axis.
        smallest: Of all indices.
        stepwise: Whether they come one after the other, in a scan.
        names: Sites that are indexed.
    """

    variable: Any
    bad: np.ndarray
    value: Any
    argument: str | None
    length: int
    smallest: int
    stepwise: bool
    names: frozenset[str] = frozenset()


UNKNOWN = Followed()


def check_indices(program: Any, name_of: Callable[[Any], str | None], params: list[str], latents: np.ndarray) -> None:
    """Raise if data index beyond an axis where a term of the energy depends on it; warn where that cannot be seen.

    Args:
        program: The energy as a closed jaxpr, whose constants are the data.
        name_of: The name of the argument that an array is; None if it is none.
        params: The site of each leaf of theta.
        latents: [D] the site of each coordinate of a particle.

    Raises:
        ValueError: The message names the argument, the element, and the site that is indexed.
    """
    inputs = [Followed(names=frozenset([name])) for name in params]
    reader = _Reader(name_of)
    reader.follow(program.jaxpr, program.consts, [*inputs, Followed(places=latents, names=frozenset(latents))])
    for beyond in reader.found:
        if beyond.stepwise:
            warn_outside(_told(beyond, frozenset(latents)) + " (In a scan it cannot be seen whether this is masked.)")
        elif _matters(program, beyond, _generic(program)):
            raise ValueError(_told(beyond, frozenset(latents)))


def _generic(program: Any) -> list[Array]:
    rng = np.random.default_rng(0)
    return [jnp.asarray(rng.normal(size=v.aval.shape), v.aval.dtype) for v in program.jaxpr.invars]


def _told(beyond: Beyond, latents: frozenset[str]) -> str:
    names = sorted(beyond.names & latents) or sorted(beyond.names)
    where = f" of '{names[0]}'" if names else ""
    source = f"Model argument {beyond.argument}," if beyond.argument else "An array that is bound into the model"
    told = f"{source} holds {beyond.value}, which indexes an axis{where} of length {beyond.length}"
    if beyond.value < 0:
        return (
            f"{told}: negative indices count from the end, so this one means element {beyond.length + beyond.value}, "
            "in silence. If it marks a missing label, leave the row out or mask it (numpyro.handlers.mask); if not, "
            f"write {beyond.length + beyond.value}."
        )
    advice = "Do the labels start at 1? Subtract 1." if beyond.smallest == 1 else "Number the labels anew."
    return f"{told}: indices count from 0, and JAX takes one beyond the end for the last, in silence. {advice}"


def _matters(program: Any, beyond: Beyond, inputs: list[Array]) -> bool:
    """True if some term of the energy changes with the element that such indices point to."""
    others = sorted({0, 1 % beyond.length, beyond.length - 1})
    terms = [np.asarray(jax.jit(_evaluator(program, beyond, other))(inputs)[0]) for other in others]
    return any(not np.array_equal(terms[0], other, equal_nan=True) for other in terms[1:])


def _inner(params: dict) -> tuple[Any, Any]:
    """The program that an equation calls, and its constants."""
    inner = next(params[key] for key in ("jaxpr", "call_jaxpr", "fun_jaxpr") if key in params)
    return getattr(inner, "jaxpr", inner), getattr(inner, "consts", ())


# -- reading a program -------------------------------------------------------------------------------------------------
class _Reader:
    """Follows data through a program, and notes what indexes beyond an axis.

    Args:
        name_of: See `check_indices`.
    """

    def __init__(self, name_of: Callable[[Any], str | None]) -> None:
        self.name_of = name_of
        self.found: list[Beyond] = []

    def follow(self, jaxpr: Any, consts: Any, inputs: list[Followed]) -> list[Followed]:
        """Knowledge about the results of a program."""
        known = dict(zip(jaxpr.constvars, map(self._of_data, consts), strict=True))
        known.update(zip(jaxpr.invars, inputs, strict=True))
        makers: dict[Any, Any] = {}

        def look(variable: Any) -> Followed:
            if hasattr(variable, "val"):
                return Followed(np.asarray(variable.val, variable.aval.dtype))
            return known.get(variable, UNKNOWN)

        for equation in jaxpr.eqns:
            name, given = equation.primitive.name, [look(v) for v in equation.invars]
            outputs = self._outputs(equation, name, given)
            if len(given) == 3 and (name == "select_n" or equation.params.get("name") == "_where"):
                order = (0, 1, 2) if name == "select_n" else (0, 2, 1)
                outputs = [_normalised(equation, order, given[order[1]], makers, outputs[0])]
            known.update(zip(equation.outvars, outputs, strict=True))
            makers.update((v, equation) for v in equation.outvars)
        return [look(v) for v in jaxpr.outvars]

    def _of_data(self, value: Any) -> Followed:
        if isinstance(value, jax.core.Tracer) or jax.dtypes.issubdtype(value.dtype, jax.dtypes.extended):
            return UNKNOWN
        if np.size(value) > (LARGEST_FLOAT if jnp.issubdtype(value.dtype, jnp.floating) else LARGEST):
            return UNKNOWN
        known, name = np.asarray(value), self.name_of(value)
        return Followed(known, name, np.arange(known.size).reshape(known.shape) if name else None)

    def _outputs(self, equation: Any, name: str, given: list[Followed]) -> list[Followed]:
        params, shape = equation.params, getattr(equation.outvars[0].aval, "shape", ()) if equation.outvars else ()
        if name in CALLS and len(_inner(params)[0].invars) == len(given):
            return self.follow(*_inner(params), given)
        if name == "scan":
            inner, first, last = params["jaxpr"], params["num_consts"], params["num_consts"] + params["num_carry"]
            carried = [Followed(names=v.names) for v in given[first:last]]
            self.follow(inner.jaxpr, inner.consts, [*given[:first], *carried, *map(_one_by_one, given[last:])])
        self._look_for_indices(equation, name, given)
        names = frozenset[str]().union(*(v.names for v in given))
        if name == "slice" and given[0].value is None and given[0].places is not None:  # some latents of all
            places = STRUCTURAL[name](given[0].places, params)
            return [Followed(places=places, names=frozenset(places))]
        if int(np.prod(shape)) <= LARGEST and all(v.value is not None for v in given) and len(equation.outvars) == 1:
            with contextlib.suppress(TypeError, ValueError):  # what NumPy does in another way stays unknown
                if (new := _computed(name, params, given, shape)) is not None:
                    return [new._replace(names=names)]
        return [Followed(names=names)] * len(equation.outvars)

    def _look_for_indices(self, equation: Any, name: str, given: list[Followed]) -> None:
        if name == "gather":
            axes, sizes = equation.params["dimension_numbers"].start_index_map, equation.params["slice_sizes"]
            lengths = np.subtract(equation.invars[0].aval.shape, sizes)[list(axes)] + 1
            self._look_at(equation, given[0], given[1], lengths)
        elif name.startswith("scatter") and given[1].beyond:  # what is beyond the end is left out, as JAX says
            self._look_at(equation, given[0], given[1], np.zeros(1))
        elif name == "dynamic_slice":
            lengths = np.subtract(equation.invars[0].aval.shape, equation.params["slice_sizes"]) + 1
            for index, length in zip(given[1:], lengths, strict=True):
                self._look_at(equation, given[0], index, np.array(length))

    def _look_at(self, equation: Any, operand: Followed, index: Followed, lengths: np.ndarray) -> None:
        """Note the indices of one equation that point beyond an axis, given how many there are by column."""
        if index.value is None or not lengths.size:
            return
        # What is sliced is clipped; if there are many slices, that has a mode, which else says that a user wants it.
        # Beyond the end `jnp.take` finds NaN.
        mode, fill = str(equation.params.get("mode", "PROMISE")), equation.params.get("fill_value")
        slices = equation.primitive.name == "gather" and not equation.params["dimension_numbers"].collapsed_slice_dims
        asked = "CLIP" in mode and not slices or "FILL" in mode and fill == fill
        issues = index.beyond or ()
        if index.beyond is None and index.places is not None:  # not made to count from the end: unsigned, for instance
            value = index.value if index.stepwise or not lengths.ndim else index.value.reshape(-1, lengths.size)
            bad = ((value < 0) | (value >= lengths)).reshape(index.value.shape)
            if bad.any():
                issues = (_beyond(equation.invars[1], bad, index, int(lengths.max())),)
        self.found += [v._replace(names=operand.names) for v in issues if not asked or v.value < 0]


def _computed(name: str, params: dict, given: list[Followed], shape: tuple[int, ...]) -> Followed | None:
    """The value of an equation all of whose inputs are known."""
    stepwise = any(v.stepwise for v in given)
    source = next((v for v in given if v.places is not None), UNKNOWN)
    if name == "iota":
        axis = np.arange(params["shape"][params["dimension"]])
        return Followed(_broadcast(axis, params["shape"], (params["dimension"],)).astype(params["dtype"]))
    if name == "convert_element_type":
        with np.errstate(invalid="ignore"):
            return given[0]._replace(value=given[0].value.astype(params["new_dtype"]))
    if name in ELEMENTWISE:
        values = [v.value if v.stepwise or not stepwise else v.value.reshape(()) for v in given]
        with np.errstate(all="ignore"):
            value = np.asarray(ELEMENTWISE[name](*values))
        places = source.places if source.places is not None and source.places.shape == value.shape else None
        return Followed(value, source.argument, places, stepwise=stepwise)
    if stepwise:
        single = name in STRUCTURAL and int(np.prod(shape)) == 1
        return given[0] if single else None
    if name in STRUCTURAL:
        apply = lambda v: None if v is None else STRUCTURAL[name](v, params)  # noqa: E731
        return given[0]._replace(value=apply(given[0].value), places=apply(given[0].places))
    if name == "concatenate":
        join = lambda arrays: np.concatenate(arrays, params["dimension"])  # noqa: E731
        places = join([v.places if v.places is not None else np.full(v.value.shape, -1) for v in given])
        noticed = [v.beyond for v in given if v.beyond is not None]
        beyond = tuple(sum(noticed, ())) if noticed else None
        return Followed(join([v.value for v in given]), source.argument, places, beyond=beyond)
    return None


def _broadcast(value: np.ndarray, shape: tuple[int, ...], dimensions: tuple[int, ...]) -> np.ndarray:
    inner = [1] * len(shape)
    for dimension, size in zip(dimensions, value.shape, strict=True):
        inner[dimension] = size
    return np.broadcast_to(value.reshape(inner), shape)


def _one_by_one(v: Followed) -> Followed:
    """The numbers of an array one after the other, as a scan sees them."""
    if v.value is None or v.value.ndim != 1:
        return Followed(names=v.names)
    return v._replace(stepwise=True)


# -- indices -----------------------------------------------------------------------------------------------------------
def _normalised(equation: Any, order: tuple[int, ...], index: Followed, makers: dict, output: Followed) -> Followed:
    """Notice where negative indices are made to count from the end: ``where(i < 0, i + length, i)``."""
    which, raw, wrapped = (equation.invars[k] for k in order)
    maker, adder = (None if hasattr(v, "val") else makers.get(v) for v in (which, wrapped))
    if index.value is None or output.value is None or maker is None or adder is None:
        return output
    if maker.primitive.name != "lt" or adder.primitive.name != "add" or not hasattr(adder.invars[1], "val"):
        return output
    if maker.invars[0] is not raw or adder.invars[0] is not raw:
        return output
    length = int(adder.invars[1].val)
    bad = np.logical_or(index.value >= length, index.value < (-length if index.places is None else 0))
    found = (_beyond(equation.outvars[0], bad, index, length),) if bad.any() else ()
    return output._replace(beyond=found)


def _beyond(variable: Any, bad: np.ndarray, index: Followed, length: int) -> Beyond:
    first = np.flatnonzero(np.ravel(bad))[0]
    place = -1 if index.places is None else int(np.ravel(index.places)[first])
    argument = None if place < 0 else f"{index.argument}, element {place}"
    return Beyond(variable, bad, np.ravel(index.value)[first], argument, length, int(index.value.min()), index.stepwise)


# -- with other indices ------------------------------------------------------------------------------------------------
def _evaluator(program: Any, beyond: Beyond, other: int) -> Callable[[list[Array]], list[Array]]:
    """The program with another index in the place of those that point beyond an axis."""

    def run(jaxpr: Any, consts: Any, inputs: Any) -> list[Array]:
        values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *inputs], strict=True))
        read = lambda v: v.val if hasattr(v, "val") else values[v]  # noqa: E731
        for equation in jaxpr.eqns:
            given = [read(v) for v in equation.invars]
            if equation.primitive.name == "gather" and equation.invars[1] is beyond.variable:
                given[1] = replaced(given[1])
            if equation.primitive.name in CALLS:
                out = run(*_inner(equation.params), given)
            else:
                bound = equation.primitive.get_bind_params(equation.params)
                subfunctions, params = bound if isinstance(bound, tuple) else ((), bound)  # before JAX 0.10
                out = equation.primitive.bind(*subfunctions, *given, **params)
                out = out if equation.primitive.multiple_results else [out]
            values.update(zip(equation.outvars, out, strict=True))
            if equation.outvars[0] is beyond.variable:
                values[beyond.variable] = replaced(values[beyond.variable])
        return [read(v) for v in jaxpr.outvars]

    def replaced(value: Array) -> Array:
        return (
            jnp.where(beyond.bad, jnp.asarray(other, value.dtype), value) if value.shape == beyond.bad.shape else value
        )

    return lambda inputs: run(program.jaxpr, program.consts, inputs)
