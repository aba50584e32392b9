# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A target bound to data, with compiled programs of it: what code on the host asks for numbers."""

import copy
from collections.abc import Callable
from functools import cached_property
from typing import Any

from numpyro_smcopt.dispersal import Elsewhere
from numpyro_smcopt.potential import StaticArguments, Target
from numpyro_smcopt.types import Array, Theta


class BoundTarget:
    """The model with its arguments, as programs see it.

    Args:
        programs: Compiles ``function(target, *arguments)`` under a name; what comes back is called as
            ``(static, arrays, *arguments)``, see `runs.compilation.Programs`.
        arrays: Traced arguments of the model.
        static: Its static arguments.

    Attributes:
        theta: Parameters of which the shapes count; None unless `at` has set them.
        elsewhere: Other places that a warm start looks at.
    """

    def __init__(self, programs: Any, arrays: list[Array], static: StaticArguments) -> None:
        self.programs, self.arrays, self.static = programs, arrays, static
        self.theta: Any = None
        self.elsewhere = Elsewhere()

    @cached_property
    def target(self) -> Target:
        """The target; not to be evaluated eagerly, only to be asked for its sites and sizes."""
        return self.programs.make_target(self.arrays, self.static)

    def at(self, theta: Theta) -> "BoundTarget":
        """The same with parameters."""
        bound = copy.copy(self)
        bound.theta = theta
        return bound

    def looking(self, elsewhere: Elsewhere) -> "BoundTarget":
        """The same, but that a warm start looks at other places."""
        bound = copy.copy(self)
        bound.elsewhere = elsewhere
        return bound

    def call(self, name: Any, function: Callable, *arguments: Any, often: bool = False) -> Any:
        """Compile ``function(target, *arguments)`` under ``name``, if need be, and call it.

        What is called ``often`` is optimised, and agrees to the last digit with what a run computes.
        """
        return self.programs(name, function, often=often)(self.static, self.arrays, *arguments)

    def prepare(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """Begin to compile what `call` will call; shapes and types of its result. Those do for the arguments, too."""
        return self.programs(name, function).prepare(self.static, self.arrays, *arguments)

    def eval_shape(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """Shapes and types of what `call` would return."""
        return self.programs(name, function).eval_shape(self.static, self.arrays, *arguments)
