# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Random-walk Metropolis, ``x' = x + sqrt(2h) L xi`` with ``xi ~ N(0, I)``: needs no gradient to move."""

import dataclasses

import jax.numpy as jnp
from jax import random

from numpyro_smcopt.kernels import preconditioners
from numpyro_smcopt.kernels.base import InvariantKernel, Point, Potential, Step, accept
from numpyro_smcopt.kernels.preconditioners import Preconditioning
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

    def move(self, rng_key: Array, point: Point, potential: Potential, step: Step) -> tuple[Point, Array]:
        """See `InvariantKernel.move`."""
        key_move, key_accept = random.split(rng_key)
        blocks = potential.blocks
        noise = random.normal(key_move, point.x.shape, point.x.dtype)
        shift = step.preconditioner.apply(jnp.sqrt(2 * blocks.to_coordinates(step.size)) * noise, blocks)
        proposal = potential.evaluate(point.x + shift)
        log_uniform = jnp.log(random.uniform(key_accept, step.size.shape, step.size.dtype))
        return accept(log_uniform, jnp.zeros_like(step.size), point, proposal, blocks)
