# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Functions that are traced once where a program needs them many times.

To run Python code (a NumPyro model through its handlers, or a whole update) takes JAX far longer than to repeat the
operations that the code was found to consist of, and most of the time of a first fit is tracing and compilation.
"""

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
