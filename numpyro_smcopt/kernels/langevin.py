# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Langevin moves, ``x' = x - h L L^T grad U(x) + sqrt(2h) L xi`` with ``xi ~ N(0, I)``.

In the coordinates ``z`` with ``x = L z`` the noise that would lead back from ``x'`` to ``x`` is

    xi' = -xi + sqrt(h/2) L^T (grad U(x) + grad U'(x')),

so that ``log q(x | x') - log q(x' | x) = (|xi|^2 - |xi'|^2) / 2`` needs no inverse of ``L`` and cancels nothing.

Source: Roberts and Tweedie 1996 (MALA); Cuin, Tang, Carbone and Akyildiz 2026 (weights of ULA with the new theta in
the backward kernel); Carbone et al. 2023 (the same weights from Jarzynski's equality).
"""

import dataclasses

import jax.numpy as jnp

from numpyro_smcopt.kernels import preconditioners
from numpyro_smcopt.kernels.base import InvariantKernel, Point, Potential, Step, WeightedKernel, accept
from numpyro_smcopt.kernels.preconditioners import Preconditioning
from numpyro_smcopt.random_numbers import RandomNumbers
from numpyro_smcopt.types import Array


@dataclasses.dataclass(frozen=True)
class ULA(WeightedKernel):
    """Unadjusted Langevin, with weights.

    Args:
        step_size: ``h``, in the coordinates of the preconditioner.
        target: Fraction of the effective particles that a move shall keep, to which ``h`` is adapted; ``None`` keeps
            ``h``.
        preconditioning: How the preconditioner is found; by default the identity.

    The weights remove the discretisation bias. They degenerate with dimension: at fixed theta the ESS fraction of one
    move is ``exp(-d h^3 / 2)`` on ``d`` round coordinates.
    """

    step_size: float = 0.1
    target: float | None = 0.95
    preconditioning: Preconditioning = preconditioners.none
    num_evaluations: int = dataclasses.field(default=1, init=False)

    def move(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """See `WeightedKernel.move`."""
        return _langevin(random_numbers.normal, point, potential, step)


@dataclasses.dataclass(frozen=True)
class MALA(InvariantKernel):
    """Metropolis-adjusted Langevin.

    Args:
        step_size: ``h``, in the coordinates of the preconditioner.
        target: Mean acceptance that ``h`` is adapted to; ``None`` keeps ``h``.
        preconditioning: How the preconditioner is found; by default a scale per coordinate from the cloud.
    """

    step_size: float = 0.1
    target: float | None = 0.574
    preconditioning: Preconditioning = preconditioners.diagonal
    num_evaluations: int = dataclasses.field(default=1, init=False)

    def move(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """See `InvariantKernel.move`."""
        proposal, log_ratio = _langevin(random_numbers.normal, point, potential, step)
        return accept(jnp.log(random_numbers.uniform), log_ratio, point, proposal, potential.blocks)


def _langevin(xi: Array, point: Point, potential: Potential, step: Step) -> tuple[Point, Array]:
    """Proposal and log ratio of backward to forward density, [B]."""
    blocks, L = potential.blocks, step.preconditioner
    h = blocks.to_coordinates(step.size)
    slope = L.apply_transpose(point.grad, blocks)
    proposal = potential.evaluate(point.x + L.apply(jnp.sqrt(2 * h) * xi - h * slope, blocks))
    backward = -xi + jnp.sqrt(h / 2) * (slope + L.apply_transpose(proposal.grad, blocks))
    return proposal, 0.5 * blocks.sum_coordinates(xi**2 - backward**2)
