# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Names for arrays and functions: the glossary of the package.

One letter, one meaning, in every docstring:

    N   particles                      n, m   index of a particle
    D   latent coordinates (unconstrained) of one particle
    K   energy terms: one per site and batch element, log-Jacobians included
    F   sums of energy terms, each within one site and block
    B   blocks of latents that are independent given theta
    M   coordinates of the largest block
    P   coordinates of theta (unconstrained)
    T   iterations

``theta`` is a dictionary of pytrees on unconstrained space, ``params`` the same on the constrained scale of the
model, ``x`` one particle as a flat vector ``[D]``, and the energy is ``U_theta(x) = -log p_theta(x, y)``.
"""

from collections.abc import Callable
from typing import Any, TypeAlias

import jax

Array: TypeAlias = jax.Array
"""A JAX array (or tracer)."""

Theta: TypeAlias = dict[str, Any]
"""``{param site: pytree of arrays}`` on unconstrained space."""

Params: TypeAlias = dict[str, Any]
"""``{param site: pytree of arrays}`` on the constrained scale of the model."""

TermsFn: TypeAlias = Callable[[Array], Array]
"""One particle ``[D]`` to its energy terms ``[K]``."""

Model: TypeAlias = Callable[..., Any]
"""A callable that contains NumPyro primitives."""
