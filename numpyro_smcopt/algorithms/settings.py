# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What may be given to an algorithm and to its runs: checks whose errors name the argument and what was got."""

from typing import Any

import numpy as np

from numpyro_smcopt.convergence import EarlyStop


def positive(name: str, number: Any) -> int:
    """A positive integer, or a ValueError that names the argument."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        shape = getattr(number, "shape", ())
        got = f"an array of shape {shape}" if shape else repr(number)  # data, where the number was left out
        raise ValueError(f"{name} must be a positive integer, got {got}.")
    return int(number)


def whole_or_none(name: str, number: Any) -> int | None:
    """`positive`, or None where the algorithm is to choose."""
    return None if number is None else positive(name, number)


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number; a TypeError names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def check_functions(**arguments: Any) -> None:
    """Refuse arguments that are neither None nor functions; a TypeError names the argument."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}.")


def stopping_rule(early_stop: Any) -> EarlyStop | None:
    """When a run is to end before its time: the rule that was given, the default one for True, None for False."""
    if not isinstance(early_stop, bool | EarlyStop):
        raise TypeError(f"early_stop must be True, False or an EarlyStop, got {early_stop!r}.")
    if isinstance(early_stop, EarlyStop):
        return early_stop
    return EarlyStop() if early_stop else None
