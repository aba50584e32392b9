# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Names for arrays and functions: the glossary of the package.

One letter, one meaning, in every docstring:

    N   particles
    D   latent coordinates (unconstrained) of one particle
    K   energy terms: one per site and batch element, log-Jacobians included, or sums of them within a block
    B   blocks of latents that are independent given theta
    M   coordinates of the largest block
    P   coordinates of theta (unconstrained)
    Q   coordinates of the parameters (constrained)
    T   updates of a run, or steps of a path
    R   independent replicates: runs, or sets of draws in a report
    S   draws from the posterior
    C   control variates: functions of known mean, such as the components of a mixture
    J   points that are given or tried: data, reference samples, disturbances

and one symbol, one meaning, in every equation:

    U   energy                         F   loss, which is minimised: -log Z for a likelihood
    H   Hessian of the energy          V   covariance
    I   observed information, H - V    L   factor of a covariance: x = L z, with z roughly round
    Z   marginal likelihood            G   factor on an unnormalised weight

``theta`` is a dictionary of pytrees on unconstrained space, ``params`` the same on the constrained scale of the
model, ``x`` one particle as a flat vector ``[D]``, and the energy is ``U_theta(x) = -log p_theta(x, y)``.
"""

import sys
import warnings
from collections.abc import Callable
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np

Array: TypeAlias = jax.Array
"""A JAX array (or tracer)."""

Theta: TypeAlias = dict[str, Any]
"""``{param site: pytree of arrays}`` on unconstrained space."""

Params: TypeAlias = dict[str, Any]
"""``{param site: pytree of arrays}`` on the constrained scale of the model."""

TermsFn: TypeAlias = Callable[[Array], Array]
"""One particle ``[D]`` to its energy terms ``[K]``."""

FlatTermsFn: TypeAlias = Callable[[Array, Array], Array]
"""A flat theta ``[P]`` and one particle ``[D]`` to its energy terms ``[K]``."""

Model: TypeAlias = Callable[..., Any]
"""A callable that contains NumPyro primitives."""


class State(Protocol):
    """The state of any algorithm: a NamedTuple of arrays with these fields, and others.

    A state of particles with an energy also has ``points`` ([N, ...], with ``x [N, D]``) and ``log_weights`` ([N, B]);
    samples, reports and the evidence are made of them.
    """

    @property
    def theta(self) -> Theta:
        """The iterate, unconstrained."""

    @property
    def params(self) -> Params:
        """The estimate, constrained."""

    @property
    def blocks(self) -> Any:
        """The partition of the latents, a `blocks.Blocks`."""

    @property
    def num_updates(self) -> Array:
        """[] updates so far."""

    @property
    def wrong_blocks(self) -> Array:
        """[] bool, whether the data contradict the partition."""

    @property
    def fingerprint(self) -> Array:
        """[] uint32, the mark of the data."""

    @property
    def diagnostics(self) -> dict[str, Array]:
        """Of the last update, of the same names from the start on; ``"loss"`` is one of them."""

    @property
    def mutable_state(self) -> dict:
        """State of handlers."""

    @property
    def rng_key(self) -> Array:
        """Randomness of what follows."""

    @property
    def _replace(self) -> Callable[..., Any]:
        """Of a NamedTuple."""


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


def warn_outside(message: str) -> None:
    """Warn at the line of the user's call, however deep in the package that is noticed."""
    package = __name__.partition(".")[0]
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)
