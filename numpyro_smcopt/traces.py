# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Functions that are traced once where a program needs them many times.

To run Python code (a NumPyro model through its handlers, or a whole update) takes JAX far longer than to repeat the
operations that the code was found to consist of, and most of the time of a first fit is tracing and compilation.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import jaxpr_as_fun


def traced_once(function: Callable, *like: Any) -> tuple[Callable, Any]:
    """A function that repeats what ``function`` does, and the shapes and types of its result.

    Args:
        function: May close over tracers; must not depend on anything that changes within the program being traced.
        *like: Pytrees of arrays or `jax.ShapeDtypeStruct`, like the arguments that it will be called with.
    """
    jaxpr, shapes = jax.make_jaxpr(function, return_shape=True)(*like)
    call, treedef = jaxpr_as_fun(jaxpr), jax.tree.structure(shapes)
    return lambda *arguments: jax.tree.unflatten(treedef, call(*jax.tree.leaves(arguments))), shapes


def num_elements(program: Any) -> int:
    """Number of array elements that a program computes on the way to its results."""
    total, needed = 0, set(map(id, program.outvars))
    for equation in reversed(program.eqns):
        if needed.isdisjoint(map(id, equation.outvars)):
            continue  # the value with which a param site is declared, say
        needed.update(map(id, equation.invars))
        inner = [
            v for v in jax.tree.leaves(list(equation.params.values())) if hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ]
        repeats = equation.params.get("length", 1)
        total += repeats * sum(num_elements(getattr(v, "jaxpr", v)) for v in inner)
        total += sum(math.prod(v.aval.shape) for v in equation.outvars if not inner)
    return total
