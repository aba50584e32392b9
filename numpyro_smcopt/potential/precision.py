# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Double precision inside of programs of single precision.

The logarithm of 20,000,000! is 3e8, where neighbouring numbers of single precision are 32 apart. Terms that contain
such numbers are computed in double precision, and leave it as two numbers of single precision each.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.types import Array

PLATEAU = 1e10  # nats that stand for an energy that is not finite, see `Target.relaxed`
IMPOSSIBLE = 1e9  # beyond which an energy can only be that
EXPLICIT = "jax_explicit_x64_dtypes"


def double_may_be_needed() -> bool:
    """True if numbers are of single precision, and some may be of double precision all the same."""
    return not jax.config.read("jax_enable_x64") and hasattr(jax.config, EXPLICIT)


def double_precision(wanted: bool) -> Any:
    """A context in which new numbers are of double precision."""
    return jax.enable_x64(True) if wanted else contextlib.nullcontext()


def partitioned_in_double(arguments: Any) -> bool:
    """True if there is a partition of terms in double precision among the arguments of a program, a pytree."""
    is_partition = lambda leaf: isinstance(leaf, Blocks)  # noqa: E731
    leaves = jax.tree.leaves(arguments, is_leaf=is_partition)
    return any(is_partition(leaf) and leaf.sums.double for leaf in leaves)


@contextlib.contextmanager
def double_allowed(arguments: Any) -> Iterator[None]:
    """A context in which programs with such arguments can be differentiated, mapped and so on."""
    if not partitioned_in_double(arguments) or not hasattr(jax.config, EXPLICIT):
        yield
        return
    before = getattr(jax.config, EXPLICIT)
    jax.config.update(EXPLICIT, "allow")
    try:
        yield
    finally:
        jax.config.update(EXPLICIT, before)


def widened(tree: Any) -> Any:
    """A pytree whose arrays of real numbers are of double precision."""

    def widen(leaf: Any) -> Any:
        is_real = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(jnp.float64) if is_real else leaf

    return jax.tree.map(widen, tree)


def halves(terms: Array) -> Array:
    """[2 K] of single precision: the terms [K], and what they lack after that."""
    first = terms.astype(jnp.float32)
    exact = lax.stop_gradient(terms)
    second = (exact - lax.stop_gradient(first).astype(terms.dtype)).astype(jnp.float32)
    return jnp.concatenate([first, jnp.where(jnp.isfinite(first), second, 0.0)])
