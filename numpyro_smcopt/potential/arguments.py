# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of a model: arrays are traced, everything else is static."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.types import Array


class StaticArguments(NamedTuple):
    """The part of a model's arguments that a compiled program is built for: hashable."""

    treedef: Any
    leaves: tuple  # one entry per leaf; `_TRACED` marks a leaf that is an array
    types: tuple[type, ...]  # of the leaves, because 1 == True


class _Traced:
    """The type of the marker of array leaves; one instance, printed as an array."""

    def __repr__(self) -> str:
        return "<array>"


_TRACED = _Traced()


def split_arguments(args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
    """Separate the arrays among the arguments of a model from the rest.

    Arrays and Python floats become traced arguments of the compiled programs, so new values of the same shapes do not
    recompile. Integers (plate sizes), booleans, strings, ``None`` and functions are static; so are integers and
    booleans of NumPy, also as arrays of dimension zero.

    Returns:
        The arrays, and the hashable remainder for `join_arguments`.

    Raises:
        TypeError: If an argument is neither an array nor hashable, or an array with masked elements.
        ValueError: If a number does not fit into 32 bits, where JAX computes with these.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays: list[Array] = []
    static: list[Any] = []
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, np.generic | np.ndarray) and np.ndim(leaf) == 0 and leaf.dtype.kind in "biu":
            leaf = leaf.item()
        _refuse_silent_loss(leaf, args, kwargs, k)
        try:
            if isinstance(leaf, bool | int | str | bytes):
                static.append(leaf)
            elif isinstance(leaf, float | complex | jax.Array) or hasattr(leaf, "__array__"):
                with np.errstate(over="raise"):  # of double precision that becomes single
                    arrays.append(as_array(leaf))
                static.append(_TRACED)
            else:
                hash(leaf)
                static.append(leaf)
        except FloatingPointError as error:
            raise ValueError(
                f"Model argument {_place(args, kwargs, k)} has numbers that do not fit into single precision. Rescale "
                "them, or enable double precision (`jax.config.update('jax_enable_x64', True)`)."
            ) from error
        except TypeError as error:
            where = _place(args, kwargs, k)
            found = getattr(leaf, "dtype", "")
            raise TypeError(
                f"Model argument {where} is {f'an array of dtype {found}' if found else f'a {type(leaf).__name__}'}, "
                "which is neither an array that JAX can hold nor hashable. Pass arrays of numbers, numbers, strings, "
                "functions or (nested) tuples, lists and dicts of them; encode labels as integers (for instance with "
                "`numpy.unique(..., return_inverse=True)`)."
            ) from error
    return arrays, StaticArguments(treedef, tuple(static), tuple(map(type, static)))


def _refuse_silent_loss(leaf: Any, args: tuple, kwargs: dict, k: int) -> None:
    """Raise if JAX would drop the mask of an array, or the upper half of its integers."""
    if not isinstance(leaf, np.ndarray):
        return
    if np.ma.is_masked(leaf):
        raise TypeError(
            f"Model argument {_place(args, kwargs, k)} is an array with masked elements, and JAX knows no masks. Leave "
            "the elements out, or pass values and mask as two arrays and use `numpyro.handlers.mask` in the model."
        )
    if (
        leaf.dtype.kind in "iu"
        and leaf.dtype.itemsize == 8
        and leaf.size
        and jax.dtypes.canonicalize_dtype(leaf.dtype) != leaf.dtype
    ):
        limits = np.iinfo(np.int32 if leaf.dtype.kind == "i" else np.uint32)
        if leaf.max() > limits.max or leaf.min() < limits.min:
            raise ValueError(
                f"Model argument {_place(args, kwargs, k)} has integers that do not fit into 32 bits. Pass them as "
                "floats, or enable double precision (`jax.config.update('jax_enable_x64', True)`)."
            )


def _place(args: tuple, kwargs: dict, k: int) -> str:
    """The name of the k-th leaf of the arguments."""
    path = jax.tree_util.tree_flatten_with_path((args, kwargs))[0][k][0]
    return ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])


def join_arguments(arrays: Sequence[Array], static: StaticArguments) -> tuple[tuple, dict]:
    """Undo `split_arguments`."""
    rest = iter(arrays)
    return jax.tree.unflatten(static.treedef, [next(rest) if leaf is _TRACED else leaf for leaf in static.leaves])


def fingerprint(arrays: Sequence[Array]) -> Array:
    """[] uint32 that changes when the data do; position counts, so a permutation changes it too."""
    total = jnp.zeros((), jnp.uint32)
    for k, value in enumerate(arrays):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = random.key_data(value)
        if jnp.issubdtype(value.dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
        else:
            bits = value.astype(jnp.uint32)
        places = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        total = total * jnp.uint32(31) + jnp.sum(
            (bits ^ (bits >> 15)) * (jnp.uint32(2) * places + jnp.uint32(2 * k + 1)), dtype=jnp.uint32
        )
    return total


def strong(value: Array) -> Array:
    """Drop the weak type of an array (a weak type costs a second trace); PRNG keys pass unchanged."""
    if not jax.typeof(value).weak_type:
        return value
    return jax.lax.convert_element_type(value, jnp.result_type(value))


def as_array(leaf: Any) -> Array:
    """An array of a strong type."""
    # To put an array of NumPy on the device compiles nothing, as `jnp.asarray` would.
    return strong(leaf) if isinstance(leaf, jax.Array) else jax.device_put(np.asarray(leaf))
