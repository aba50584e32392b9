# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Starts of several runs that would all begin at the same values: dispersed around those of the first."""

import contextlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import dispersal
from numpyro_smcopt.dispersal import Around, Elsewhere
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.potential import Target
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.first_state import start
from numpyro_smcopt.types import Array, Params

NEARER = 3  # times that a run which cannot start is brought nearer to the first


def start_dispersed(
    algorithm: Algorithm,
    bound: BoundTarget,
    keys: list[Array],
    k: int,
    init_params: Params | None,
    around: Around | None,
    double: bool,
) -> Any:
    """The state at the start of run k > 0; values that the model draws with its key are left alone.

    Args:
        algorithm: What runs.
        bound: The model with its data.
        keys: [R] of the runs.
        k: Which of them.
        init_params: Constrained starting values of all runs.
        around: Where it starts; None if nothing is to be dispersed.
        double: See `first_state.start`.

    Raises:
        ValueError: If it cannot start.
    """
    bound = bound.looking(Elsewhere(0))
    if around is None:
        return start(algorithm, bound, keys[k], init_params, None, double)
    shift = around.units * dispersal.normals(len(keys), len(around.units))[k - 1]
    for _ in range(NEARER):
        place = np.asarray(around.center + shift, jnp.result_type(float))
        params = bound.call("disperse", _disperse, [keys[0], keys[k]], init_params or {}, place)
        with contextlib.suppress(ValueError):
            return start(algorithm, bound, keys[k], params, None, double)
        shift = shift / 2
    return start(algorithm, bound, keys[k], init_params, None, double)


def _disperse(target: Target, keys: list[Array], init_params: Params, place: Array) -> Params:
    """Constrained: the flat ``place [P]``; values that differ between the two keys are those of the last."""
    first, here = (target.initial_params(random.split(key)[0], init_params)[1] for key in keys)
    _, unravel = ravel_pytree(here)
    moved = lambda a, b, other: jnp.where(jnp.all(a == b), other, b)  # noqa: E731
    return target.constrain_params(jax.tree.map(moved, first, here, unravel(place)))
