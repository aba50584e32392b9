# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Random-walk Metropolis, ``x' = x + sqrt(2h) L xi`` with ``xi ~ N(0, I)``: needs no gradient to move."""

import dataclasses

import jax.numpy as jnp

from numpyro_smcopt.kernels import preconditioners
from numpyro_smcopt.kernels.base import InvariantKernel, Point, Potential, Step, accept
from numpyro_smcopt.kernels.preconditioners import Preconditioning
from numpyro_smcopt.random_numbers import RandomNumbers
from numpyro_smcopt.types import Array


@dataclasses.dataclass(frozen=True)
class RandomWalk(InvariantKernel):
    """Random-walk Metropolis.

    Args:
        step_size: ``h``, in the coordinates of the preconditioner; the proposal has variance ``2h``.
        target: Mean acceptance that ``h`` is adapted to; ``None`` keeps ``h``.
        preconditioning: How the preconditioner is found; by default a scale per coordinate from the cloud.
    """

    step_size: float = 0.5
    target: float | None = 0.234
    preconditioning: Preconditioning = preconditioners.diagonal
    num_evaluations: int = dataclasses.field(default=1, init=False)

    def move(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """See `InvariantKernel.move`."""
        blocks = potential.blocks
        shift = step.preconditioner.apply(
            jnp.sqrt(2 * blocks.to_coordinates(step.size)) * random_numbers.normal, blocks
        )
        proposal = potential.evaluate(point.x + shift)
        # The move needs no gradient, but what follows does: without a finite one the proposal is rejected.
        finite = jnp.isfinite(blocks.sum_coordinates(proposal.grad))
        return accept(jnp.log(random_numbers.uniform), jnp.where(finite, 0.0, jnp.nan), point, proposal, blocks)
