# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Replacement of particles without weights whose moves led where something is not finite.

Block by block, a lost particle takes the place of one that lives, as that one stood before the move, and starts from
rest. Where too many blocks have lost all of their particles it is theta that went astray.
"""

import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels.underdamped import Moved
from numpyro_smcopt.types import Array

LARGEST_LOSS = 0.25  # share of the particles, block by block, that may meet a potential that is not finite


def living(blocks: Blocks, terms: Array, moved: Moved) -> Array:
    """[N, B] bool: in which blocks of which particles nothing is lost.

    Args:
        blocks: The partition.
        terms: [N, K] energy terms where the gradient of theta was taken.
        moved: The moves [N, ...], all of whose energies, gradients, places and velocities must be finite.
    """
    parts = [blocks.sum_terms(value) for value in (terms, moved.terms)]
    parts += [blocks.sum_coordinates(value) for value in (moved.slope, moved.x, moved.velocity)]
    return jnp.all(jnp.stack([jnp.isfinite(part) for part in parts]), 0)


def theta_is_possible(blocks: Blocks, alive: Array, terms: Array) -> Array:
    """[] bool: whether terms that depend on theta only are finite, and some particle of most blocks lives."""
    free = jnp.all(jnp.isfinite(terms[0]) | (blocks.of_term != blocks.num_blocks))
    return free & (jnp.sum(~jnp.any(alive, 0)) <= LARGEST_LOSS * alive.shape[1])


def replaced(blocks: Blocks, alive: Array, before: Array, moved: Moved) -> Moved:
    """The moves, in which blocks that are lost took the place of others, as it was before.

    Args:
        blocks: The partition.
        alive: [N, B], see `living`.
        before: [N, D] where the particles stood.
        moved: The moves.
    """

    def replace(moved: Moved) -> Moved:
        num = alive.shape[0]
        order = jnp.argsort(~alive, 0, stable=True)  # the living first
        places = jnp.arange(num)[:, None] % jnp.maximum(jnp.sum(alive, 0), 1)
        heir = blocks.to_coordinates(jnp.take_along_axis(order, places, 0))
        lost, nobody = blocks.to_coordinates(~alive), blocks.to_coordinates(~jnp.any(alive, 0))
        inherited = jnp.where(nobody, before, jnp.take_along_axis(before, heir, 0))
        return moved._replace(
            x=jnp.where(lost, inherited, moved.x),
            velocity=jnp.where(lost, 0.0, moved.velocity),
            slope=jnp.where(lost, 0.0, moved.slope),
        )

    return changed_if(~jnp.all(alive), replace, moved)
