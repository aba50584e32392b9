# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Arguments of a model: arrays are traced, everything else is static."""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.potential.conversions import as_array, checked, strong, unusable
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
        TypeError: If an argument is neither an array nor hashable, or has missing or masked elements.
        ValueError: If numbers do not fit into 32 bits, see `conversions.as_array`.
    """
    for place, column in columns(args, kwargs):
        checked(column, f"Model argument {place}")
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays: list[Array] = []
    static: list[Any] = []
    names = functools.cache(lambda: argument_names(args, kwargs))
    name = lambda k: f"Model argument {names()[k]}"  # noqa: E731
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, np.generic | np.ndarray) and np.ndim(leaf) == 0 and leaf.dtype.kind in "biu":
            leaf = leaf.item()
        if isinstance(leaf, jax.Array):
            arrays.append(strong(leaf))
            leaf = _TRACED
        elif isinstance(leaf, float | complex) or hasattr(leaf, "__array__") and not isinstance(leaf, str | bytes):
            arrays.append(as_array(leaf, name(k)))
            leaf = _TRACED
        try:
            hash(leaf)
        except TypeError as error:
            raise TypeError(unusable(name(k), f"a {type(leaf).__name__}")) from error
        static.append(leaf)
    return arrays, StaticArguments(treedef, tuple(static), tuple(map(type, static)))


def columns(args: tuple, kwargs: dict) -> list[tuple[str, Any]]:
    """Lists of numbers among the arguments, and their names."""
    given = dict(enumerate(args)), kwargs  # the tuple of all arguments is no column
    leaves = jax.tree_util.tree_leaves_with_path(given, is_leaf=_is_column)
    return [(_keystr(path), leaf) for path, leaf in leaves if _is_column(leaf)]


def _is_column(value: Any) -> bool:
    """True for a list of numbers, whose elements reach the model one by one."""
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(one, int | float) for one in value)


def argument_names(args: tuple, kwargs: dict) -> list[str]:
    """The names of the leaves of the arguments."""
    return [_keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path((args, kwargs))]


def _keystr(path: tuple) -> str:
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
