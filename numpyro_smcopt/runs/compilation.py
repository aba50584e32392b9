# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How programs are compiled.

`jax.jit` with options of XLA's compiler for CPUs that make a wrong result right and halve the time to compile. Options
that an installed jaxlib does not know are left out, and other devices get none. A program that will be needed soon can
be compiled in the background.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

CPU_OPTIONS = {
    # jaxlib 0.10.2 lets a library fuse reductions, which miscomputes `c - sum(w * c, axis, keepdims=True)` from about
    # 20,000 numbers on: a user's model, mapped over particles, may well contain that.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Together they halve the time to compile; what comes out runs as fast.
    "xla_backend_optimization_level": 1,
    "xla_cpu_use_fusion_emitters": False,
}


COMPILATIONS_AT_ONCE = 2


class Program:
    """``function(static, *arguments)`` compiled for every ``static`` and every shape of the arguments.

    Args:
        function: Its first argument is hashable, the others are pytrees of arrays.
    """

    def __init__(self, function: Callable) -> None:
        self._plain = jax.jit(function, static_argnums=0)
        self._tuned = jax.jit(function, static_argnums=0, compiler_options=compiler_options())
        self._pending: list[Future] = []

    def __call__(self, static: Any, *arguments: Any) -> Any:
        """Compile if need be, and run."""
        if _is_inside(arguments):
            return self._plain(static, *arguments)
        # What went wrong in the background will go wrong again here, where it is raised.
        wait(self._pending)
        self._pending = []
        return self._tuned(static, *arguments)

    def prepare(self, static: Any, *arguments: Any) -> Any:
        """Start to compile in the background; shapes and types may stand for arrays.

        Returns:
            Shapes and types of the result.
        """
        # Models are traced where they were called: NumPyro's handlers and JAX's settings belong to a thread.
        traced = self._tuned.trace(static, *arguments)
        self._pending.append(_background().submit(traced.lower().compile))
        return traced.out_info

    def eval_shape(self, static: Any, *arguments: Any) -> Any:
        """Shapes and types of the result."""
        return self._tuned.eval_shape(static, *arguments)

    def trace(self, static: Any, *arguments: Any) -> Any:
        """The traced program, see `jax.jit`."""
        return self._tuned.trace(static, *arguments)


class Programs:
    """Compiled functions of the targets of one model, by name.

    Args:
        make_target: ``(arrays, static) -> Target``.
    """

    def __init__(self, make_target: Callable[[Any, Any], Any]) -> None:
        self.make_target = make_target
        self._kept: dict[Any, Program] = {}

    def __getstate__(self) -> dict[str, Any]:
        """Everything but what was compiled."""
        return {"make_target": self.make_target, "_kept": {}}

    def __call__(self, name: Any, function: Callable, keep: bool = True) -> Program:
        """``function(target, *arguments)`` compiled as ``(static, arrays, *arguments)``, once for every name."""
        if keep and name in self._kept:
            return self._kept[name]

        def bound(static: Any, arrays: Any, *arguments: Any) -> Any:
            return function(self.make_target(arrays, static), *arguments)

        program = Program(bound)
        if keep:
            self._kept[name] = program
        return program


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COMPILATIONS_AT_ONCE, thread_name_prefix="compile")


@functools.cache
def compiler_options() -> dict[str, Any]:
    """Those of `CPU_OPTIONS` that the installed jaxlib knows; none for other devices than CPUs."""
    if jax.default_backend() != "cpu":
        return {}
    if _accepted(CPU_OPTIONS):
        return CPU_OPTIONS
    return {name: value for name, value in CPU_OPTIONS.items() if _accepted({name: value})}


def _is_inside(arguments: Any) -> bool:
    """Whether a transformation of the user surrounds a call, who then compiles the whole: options are not allowed."""
    # Inside of `jit` even a constant that is put on the device is traced; inside of `vmap` and `grad` arguments are.
    leaves = [jax.device_put(0), *jax.tree.leaves(arguments)]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _accepted(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True
