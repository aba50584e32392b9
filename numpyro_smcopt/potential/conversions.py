# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The one door through which data become arrays of JAX: what would be lost on the way is refused or told in words.

Arrays of NumPy, columns of pandas, polars and xarray, lists and Python numbers pass the same checks.
"""

from typing import Any

import jax
import numpy as np

from numpyro_smcopt.types import Array, warn_outside

LOST = 1e-3  # rounding relative to the range of a column, from which on it is refused
MERGED = 0.1  # share of the distinct values of a column that become equal, from which on it is told
LARGEST_SORT = 300_000  # numbers among which equal ones are looked for
ROUND_OFF = 1e-11  # range relative to size, below which a column is constant but for round-off
MISSING = ("NAType", "NaTType", "NoneType")
DOUBLE = "enable double precision (`jax.config.update('jax_enable_x64', True)`)"


def as_array(value: Any, name: str) -> Array:
    """An array of JAX with a strong type.

    Args:
        value: An array of JAX, which passes as it is, or anything that NumPy takes for an array of numbers.
        name: What the user calls it.

    Raises:
        TypeError: If it does not consist of numbers, or has missing or masked elements.
        ValueError: If numbers do not fit into 32 bits, or lose what tells them apart, where JAX computes with these.
    """
    if isinstance(value, jax.Array):
        return strong(value)
    # To put an array of NumPy on the device compiles nothing, as `jnp.asarray` would.
    return jax.device_put(checked(value, name))


def strong(value: Array) -> Array:
    """Drop the weak type of an array (a weak type costs a second trace); PRNG keys pass unchanged."""
    if not jax.typeof(value).weak_type:
        return value
    return jax.lax.convert_element_type(value, jax.numpy.result_type(value))


def checked(value: Any, name: str) -> np.ndarray:
    """An array of NumPy that JAX can hold without loss; raises as `as_array` does."""
    if np.ma.is_masked(value):
        raise TypeError(
            f"{name} is an array with masked elements, the first at {_place(np.ma.getmaskarray(value))}, and JAX knows "
            "no masks. Leave the elements out, or pass values and mask as two arrays and use `numpyro.handlers.mask` "
            "in the model."
        )
    if (nulls := _nulls(value)).any():
        raise TypeError(_missing(name, _place(nulls)))
    try:
        array = np.asarray(value)
    except (TypeError, ValueError) as error:  # a data set, an array of sets
        raise TypeError(unusable(name, f"a {type(value).__name__}")) from error
    if array.dtype.kind == "O":
        array = _of_objects(array, name)
    if array.dtype in (np.longdouble, np.clongdouble):
        array = array.astype(np.float64 if array.dtype.kind == "f" else np.complex128)
    narrow = jax.dtypes.canonicalize_dtype(array.dtype) if array.dtype.kind in "iufc" else array.dtype
    if narrow == array.dtype and (array.dtype.kind in "biufc" or jax.dtypes.issubdtype(narrow, np.inexact)):
        return array
    if array.dtype.kind in "iu":
        _check_integers(array, narrow, name)
    elif array.dtype.kind == "f":
        _check_floats(array, narrow, name)
    elif array.dtype.kind == "c":
        _check_floats(array.real, np.dtype(np.float32), name)
        _check_floats(array.imag, np.dtype(np.float32), name)
    else:
        found = f"an array of dtype {array.dtype}" if hasattr(value, "dtype") else f"a {type(value).__name__}"
        raise TypeError(unusable(name, found))
    return array


def unusable(name: str, what: str) -> str:
    """The refusal of what is neither an array of numbers nor hashable."""
    return (
        f"{name} is {what}, which is neither an array that JAX can hold nor hashable. Pass arrays of numbers, numbers, "
        "strings, functions or (nested) tuples, lists and dicts of them; encode labels as integers (for instance with "
        "`numpy.unique(..., return_inverse=True)`), and times as numbers since the first (divided by a "
        "`numpy.timedelta64`)."
    )


def _nulls(value: Any) -> np.ndarray:
    """Marks of what a column of pandas or polars calls missing, and NumPy would call NaN."""
    if hasattr(value, "isna"):
        kinds = np.ravel(np.asarray(value.dtypes if hasattr(value, "dtypes") else value.dtype, object))
        return np.zeros(0, bool) if all(isinstance(kind, np.dtype) for kind in kinds) else np.asarray(value.isna())
    if hasattr(value, "is_null"):
        return np.asarray(value.is_null())
    if hasattr(value, "null_count") and hasattr(value, "get_columns"):
        return np.stack([np.asarray(column.is_null()) for column in value.get_columns()], 1)
    return np.zeros(0, bool)


def _missing(name: str, place: str) -> str:
    return (
        f"{name} has a missing value at {place}. Leave the rows out, or pass values and a mask as two arrays and use "
        "`numpyro.handlers.mask` in the model."
    )


def _of_objects(array: np.ndarray, name: str) -> np.ndarray:
    """Numbers that came as objects (nullable integers, columns of a mixed table) as numbers."""
    kinds = np.array([type(one).__name__ in MISSING for one in array.ravel()], bool).reshape(array.shape)
    if kinds.any():
        raise TypeError(_missing(name, _place(kinds)))
    try:
        numbers = np.array(array.tolist())
    except (ValueError, OverflowError):
        numbers = array
    if numbers.dtype.kind == "O" and all(isinstance(one, int) for one in array.ravel()):
        raise ValueError(_too_long(name, array.ravel()[0], "its elements"))
    if numbers.dtype.kind not in "biufc" or numbers.shape != array.shape:
        raise TypeError(unusable(name, f"an array of dtype {array.dtype}"))
    return numbers


def _check_integers(array: np.ndarray, narrow: Any, name: str) -> None:
    limits = np.iinfo(narrow)
    if array.size and (array.max() > limits.max or array.min() < limits.min):
        bad = (array > limits.max) | (array < limits.min)
        raise ValueError(_too_long(name, array[bad][0], _place(bad)))


def _too_long(name: str, value: Any, place: str) -> str:
    return (
        f"{name} has integers that do not fit into 32 bits, such as {value} at {place}. Number the labels anew "
        f"(`numpy.unique(..., return_inverse=True)`), pass amounts as floats, or {DOUBLE}."
    )


def _check_floats(array: np.ndarray, narrow: Any, name: str) -> None:
    """Refuse a column that single precision cannot tell from others; warn of one that it blurs."""
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        rounded = array.astype(narrow)
        finite = np.isfinite(array)
        size = np.abs(rounded)
        large, small = (size == np.inf) & finite, (size < np.finfo(narrow).tiny) & (array != 0)
    if large.any():
        raise ValueError(
            f"{name} has numbers that do not fit into single precision, such as {array[large][0]:.6g} at "
            f"{_place(large)}. Rescale them, or {DOUBLE}."
        )
    remedy = f"Rescale them, or {DOUBLE}."
    if small.any():
        told = f"{name} has numbers that single precision takes for 0, such as {array[small][0]:.6g} at {_place(small)}"
        if not np.any(finite & ~small & (array != 0)):
            raise ValueError(f"{told}. {remedy}")
        warn_outside(f"{told}. {remedy}")
    if array.shape[:1] in ((), (0,), (1,)) or not finite.any():
        return
    columns, kept = array.reshape(len(array), -1), finite.reshape(len(array), -1)
    with np.errstate(over="ignore", invalid="ignore"):
        top = np.max(columns, 0, where=kept, initial=-np.inf)
        bottom = np.min(columns, 0, where=kept, initial=np.inf)
        spread = top - bottom
        lost = np.max(np.abs(columns - rounded.reshape(columns.shape)), 0, where=kept, initial=0.0)
    for column in np.flatnonzero(spread > ROUND_OFF * np.maximum(np.abs(top), np.abs(bottom))):
        share = _merged(columns[:, column], kept[:, column], narrow) if lost[column] > 0 else 0.0
        if lost[column] <= LOST * spread[column] and share <= MERGED:
            continue
        which = f" (column {column})" if columns.shape[1] > 1 else ""
        values = columns[kept[:, column], column]
        told = (
            f"{name}{which} loses digits in single precision: its values go from {values.min():.12g} to "
            f"{values.max():.12g}, and rounding moves them by up to {lost[column]:.3g}"
            + (f", so {100 * share:.0f} % of the distinct ones become equal" if share else "")
            + f". Subtract the origin (x - x.min(), for instance), or {DOUBLE}."
        )
        if lost[column] > LOST * spread[column]:
            raise ValueError(told)
        warn_outside(told)


def _merged(column: np.ndarray, kept: np.ndarray, narrow: Any) -> float:
    """Share of the distinct values of a column that become equal to others."""
    if column.size > LARGEST_SORT:
        return 0.0
    values = np.unique(column[kept])
    return 1 - np.unique(values.astype(narrow)).size / max(values.size, 1)


def _place(bad: np.ndarray) -> str:
    """Place of the first marked element."""
    index = [int(k) for k in np.argwhere(np.asarray(bad))[0]]
    return f"row {index[0]}" if len(index) == 1 else f"element {index}" if index else "its only element"
