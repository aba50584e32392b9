# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Theta near the maximum of the Laplace approximation, for a first cloud that need not travel."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt import dispersal, faults, laplace
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.budget import LARGEST_INFORMATION, num_for_information
from numpyro_smcopt.potential import Target
from numpyro_smcopt.types import Array, Theta

WARM_DRAWS = 64
RESTART_WORK = 5e6  # array elements that an expansion may compute, if others are to follow for restarts
NEWTON_STEPS = 10  # of a mode, as a rule


def warm_start(bound: BoundTarget, theta: Theta, blocks: Blocks) -> tuple[Theta, np.ndarray] | None:
    """Theta near the maximum of the Laplace approximation, and the mode [D] of the latents there.

    Args:
        bound: The target.
        theta: Where to set out.
        blocks: The partition.

    Returns:
        None where that is not affordable or does not exist.
    """
    flat, unravel = _ravel(theta)
    if not laplace.affordable(blocks) or flat.size > LARGEST_INFORMATION:
        return None
    num_draws = num_for_information(WARM_DRAWS, 1, flat.size, bound.target.work(theta))
    normals = laplace.fixed_normals(num_draws, blocks).astype(flat.dtype)

    def expand(target: Target, flat: Array, x: Array, normals: Array, blocks: Blocks) -> laplace.Expansion:
        terms_fn = lambda t, x: target.terms(unravel(t), x)  # noqa: E731
        return laplace.expand(terms_fn, flat, x, normals, blocks, target.work(unravel(flat)))

    expand_fn = lambda flat, x: bound.call("expand", expand, flat, x, normals, blocks)  # noqa: E731
    bounded, origin = bound.target.bounded_coordinates(theta), np.zeros(len(blocks.of_coordinate), flat.dtype)
    cheap = bound.target.work(theta) * (num_draws * flat.size + NEWTON_STEPS * blocks.width) < RESTART_WORK
    restarts = dispersal.normals(bound.elsewhere.restarts if cheap else 0, flat.size)
    sites = bound.target.sites
    num_observations = sites.num_observations or sites.num_terms  # masks may decide how many are observed
    found = laplace.warm_start(expand_fn, flat, origin, bounded, restarts, num_observations)
    if found is not None:
        bound.elsewhere.around = found.around
        faults.warn_of([faults.higher_ground(found.gain)])
    return None if found is None else (unravel(found.theta), found.mode)


def _ravel(theta: Theta) -> tuple[np.ndarray, Callable[[Any], Theta]]:
    """`ravel_pytree` on the host, where nothing compiles; the way back serves traced vectors too."""
    leaves, treedef = jax.tree.flatten(theta)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()

    def unravel(flat: Any) -> Theta:
        pieces = (np if isinstance(flat, np.ndarray) else jnp).split(flat, ends)
        shaped = [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    return np.concatenate([np.ravel(leaf) for leaf in leaves]), unravel
