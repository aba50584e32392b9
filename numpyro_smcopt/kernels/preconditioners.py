# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Linear maps ``x = L z`` under which a target looks round, and how they are found.

``L = L_H diag(s)``: ``L_H`` an optional factor per block (``L_H L_H^T = H^-1`` of a Hessian), ``s`` a scale per
coordinate that follows the spread of the weighted particles with forgetting.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import block_moments

SMALLEST_SCALE = 1e-12


class Curvature(NamedTuple):
    """Hessian blocks of the two halves of the energy, both [B, M, M]; padded with the identity in ``prior``."""

    prior: Array
    rest: Array


class Preconditioner(NamedTuple):
    """``L = L_H diag(s)`` for one particle.

    Attributes:
        scale: [D] the diagonal ``s``.
        factor: [B, M, M] the factors ``L_H``, or ``None`` for the identity.
        inverse: [B, M, M] their inverses.
    """

    scale: Array
    factor: Array | None = None
    inverse: Array | None = None

    def apply(self, z: Array, blocks: Blocks) -> Array:
        """``L z`` of ``z [D]``."""
        return _multiply(self.factor, self.scale * z, blocks)

    def apply_transpose(self, gradient: Array, blocks: Blocks) -> Array:
        """``L^T g`` of ``g [D]``: a gradient in ``x`` becomes one in ``z``."""
        return self.scale * _multiply(
            None if self.factor is None else jnp.swapaxes(self.factor, 1, 2), gradient, blocks
        )

    def unfactor(self, x: Array, blocks: Blocks) -> Array:
        """``L_H^-1 x`` of ``x [D]``: the coordinates whose spread is ``s``."""
        return _multiply(self.inverse, x, blocks)


def _multiply(factor: Array | None, v: Array, blocks: Blocks) -> Array:
    if factor is None:
        return v
    if blocks.num_blocks == 1:
        return factor[0] @ v
    return blocks.scatter(jnp.einsum("bij,bj->bi", factor, blocks.gather(v, 0.0)))


@dataclasses.dataclass(frozen=True)
class Preconditioning:
    """A rule by which a preconditioner is found and kept up to date.

    Args:
        forgetting: Weight of the newest cloud in the running variances; 0 keeps ``s`` as it was at the start.
        dense: Whether to use Hessian factors per block where they are affordable.
    """

    forgetting: float = 0.03
    dense: bool = False

    def adapt(self, preconditioner: Preconditioner, x: Array, log_weights: Array, blocks: Blocks) -> Preconditioner:
        """Follow the spread of the cloud.

        Args:
            preconditioner: The present one.
            x: [N, D] particles.
            log_weights: [N, B] their normalised log weights.
            blocks: The partition.
        """
        if self.forgetting == 0.0:
            return preconditioner
        variance = cloud_variance(preconditioner, x, log_weights, blocks)
        running = preconditioner.scale**2 * (1 - self.forgetting) + self.forgetting * variance
        usable = jnp.isfinite(running) & (running > SMALLEST_SCALE**2)
        return preconditioner._replace(scale=jnp.where(usable, jnp.sqrt(running), preconditioner.scale))


def cloud_variance(preconditioner: Preconditioner, x: Array, log_weights: Array, blocks: Blocks) -> Array:
    """[D] weighted variance of the coordinates ``L_H^-1 x`` over the particles."""
    z = jax.vmap(lambda one: preconditioner.unfactor(one, blocks))(x)
    return block_moments(log_weights, z, blocks)[1]


none = Preconditioning(forgetting=0.0)
"""The identity: particles move in the coordinates of the model."""

diagonal = Preconditioning()
"""A scale per coordinate, from the cloud."""

dense = Preconditioning(dense=True)
"""Hessian factors per block where affordable, and a scale per coordinate from the cloud."""
