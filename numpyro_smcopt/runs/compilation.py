# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Compilation of programs.

`jax.jit` with options of XLA's compiler for CPUs that make a wrong result right and halve the time to compile. What
runs a few times on small arrays is not optimised at all, which halves it again. Options that an installed jaxlib does
not know are left out, and other devices get none. A program that will be needed soon is compiled in the background.
"""

import functools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax

from numpyro_smcopt.potential import double_allowed
from numpyro_smcopt.traces import num_elements

CPU_OPTIONS = {
    # jaxlib 0.10.2 lets a library fuse reductions, which miscomputes `c - sum(w * c, axis, keepdims=True)` from about
    # 20,000 numbers on: a user's model, mapped over particles, may well contain that.
    "xla_cpu_experimental_ynn_fusion_type": "",
    # Together they halve the time to compile; what comes out runs as fast.
    "xla_backend_optimization_level": 1,
    "xla_cpu_use_fusion_emitters": False,
}
UNOPTIMISED = {"xla_backend_optimization_level": 0, "xla_cpu_parallel_codegen_split_count": 1}
# Array elements, loops of known length included, up to which a program is not worth optimising: without optimisation
# the first cloud of a model takes 8 times as long to make, and 1.2 to 1.6 CPU seconds less to compile.
SMALL = 1e8
COMPILATIONS_AT_ONCE = 2


class Program:
    """``function(static, *arguments)`` compiled for every ``static`` and every shape of the arguments.

    Args:
        function: Its first argument is hashable, the others are pytrees of arrays.
        often: Whether it will run so often that it is optimised however small it is.
    """

    def __init__(self, function: Callable, often: bool = False) -> None:
        self._plain = jax.jit(function, static_argnums=0)
        # They share what is traced.
        self._tuned = jax.jit(function, static_argnums=0, compiler_options=compiler_options())
        self._small = self._tuned
        if not often:
            self._small = jax.jit(function, static_argnums=0, compiler_options=compiler_options(small=True))
        self._sizes: dict[int, tuple[Any, int]] = {}
        self._pending: list[Future] = []

    def __call__(self, static: Any, *arguments: Any) -> Any:
        """Compile if need be, and run."""
        with double_allowed(arguments):
            if _is_inside(arguments):
                return self._plain(static, *arguments)
            # What went wrong in the background will go wrong again here, where it is raised.
            wait(self._pending)
            self._pending = []
            return self._compiler(static, *arguments)(static, *arguments)

    def _compiler(self, static: Any, *arguments: Any) -> Any:
        """The jitted function whose options fit these arguments."""
        if self._small is self._tuned:
            return self._tuned
        program = self._tuned.trace(static, *arguments).jaxpr
        if id(program) not in self._sizes:  # the program itself is kept, so that its address is not given away
            self._sizes[id(program)] = program, num_elements(program.jaxpr)
        return self._small if self._sizes[id(program)][1] <= SMALL else self._tuned

    def prepare(self, static: Any, *arguments: Any) -> Any:
        """Start to compile in the background; shapes and types may stand for arrays.

        Returns:
            Shapes and types of the result.
        """
        # Models are traced where they were called: NumPyro's handlers and JAX's settings belong to a thread.
        with double_allowed(arguments):
            traced = self._compiler(static, *arguments).trace(static, *arguments)
            self._pending.append(_background().submit(traced.lower().compile))
        return traced.out_info

    def eval_shape(self, static: Any, *arguments: Any) -> Any:
        """Shapes and types of the result."""
        with double_allowed(arguments):
            return self._tuned.eval_shape(static, *arguments)

    def trace(self, static: Any, *arguments: Any) -> Any:
        """The traced program, see `jax.jit`."""
        with double_allowed(arguments):
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

    def __call__(self, name: Any, function: Callable, keep: bool = True, often: bool = False) -> Program:
        """``function(target, *arguments)`` compiled as ``(static, arrays, *arguments)``, once for every name.

        For ``often`` see `Program`; what is not to be kept is compiled anew the next time.
        """
        if keep and name in self._kept:
            return self._kept[name]

        def bound(static: Any, arrays: Any, *arguments: Any) -> Any:
            return function(self.make_target(arrays, static).as_partitioned(arguments), *arguments)

        bound.__name__ = name if isinstance(name, str) else name[0]  # for profiles, and the cache of compiled programs
        program = Program(bound, often)
        if keep:
            self._kept[name] = program
        return program


@functools.cache
def _background() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(COMPILATIONS_AT_ONCE, thread_name_prefix="compile")


@functools.cache
def compiler_options(small: bool = False) -> dict[str, Any]:
    """Those of `CPU_OPTIONS` (and `UNOPTIMISED`) that the installed jaxlib knows; none for other devices than CPUs."""
    if jax.default_backend() != "cpu":
        return {}
    wanted = CPU_OPTIONS | UNOPTIMISED if small else CPU_OPTIONS
    return wanted if _accepted(wanted) else {name: v for name, v in wanted.items() if _accepted({name: v})}


def _is_inside(arguments: Any) -> bool:
    """True if a transformation of the user surrounds a call, who then compiles the whole: options are not allowed."""
    # Inside of `jit` even a constant that is put on the device is traced; inside of `vmap` and `grad` arguments are.
    leaves = [jax.device_put(0), *jax.tree.leaves(arguments)]
    return any(isinstance(leaf, jax.core.Tracer) for leaf in leaves)


def _accepted(options: dict[str, Any]) -> bool:
    try:
        jax.jit(lambda: 0, compiler_options=options).lower().compile()
    except (jax.errors.JaxRuntimeError, ValueError):
        return False
    return True
