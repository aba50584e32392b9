# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Parts of a program that run now and then."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

from numpyro_smcopt.types import Array

T = TypeVar("T")


def changed_if(needed: Array, change: Callable[[T], T], value: T) -> T:
    """``change(value)`` if it is needed, else ``value``, which then costs nothing.

    XLA copies whatever passes through the branches of a `jax.lax.cond`, every particle in every update for the sake of
    what hardly ever happens; through a loop that makes no turn it does not. Has no derivative in reverse mode.

    Args:
        needed: [] bool.
        change: Shapes and types must remain.
        value: A pytree of arrays.
    """
    turn = lambda carry: (jnp.zeros_like(carry[0]), change(carry[1]))  # noqa: E731
    return jax.lax.while_loop(lambda carry: carry[0], turn, (needed, value))[1]
