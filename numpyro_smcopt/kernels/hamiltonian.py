# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Hamiltonian Monte Carlo: leapfrog steps of the energy ``U(x) + |p|^2 / 2`` in the coordinates ``x = L z``.

    p <- p - (eps/2) L^T grad U(x),    x <- x + eps L p,    p <- p - (eps/2) L^T grad U(x),

accepted with probability ``min(1, exp(H_0 - H_1))``; the momentum is then discarded. The step size is jittered at every
move: with a fixed trajectory length near-Gaussian latents come back on themselves at length pi, and nothing mixes while
the acceptance looks perfect.

Source: Neal 2011, sections 2.3 and 3.2.
"""

import dataclasses

import jax.numpy as jnp
from jax import lax

from numpyro_smcopt.kernels import preconditioners
from numpyro_smcopt.kernels.base import InvariantKernel, Point, Potential, Step, accept
from numpyro_smcopt.kernels.preconditioners import Preconditioning
from numpyro_smcopt.random_numbers import RandomNumbers
from numpyro_smcopt.types import Array


@dataclasses.dataclass(frozen=True)
class HMC(InvariantKernel):
    """Hamiltonian Monte Carlo with a jittered step size.

    Args:
        step_size: ``eps``, in the coordinates of the preconditioner.
        num_leapfrog: Leapfrog steps per move.
        jitter: The step size of a move is uniform on ``[(1 - jitter) eps, eps]``, drawn per particle and block.
        target: Mean acceptance that ``eps`` is adapted to; ``None`` keeps ``eps``.
        preconditioning: How the preconditioner is found; by default Hessian factors per block where affordable.
    """

    step_size: float = 0.9
    num_leapfrog: int = 3
    jitter: float = 0.8
    target: float | None = 0.75
    preconditioning: Preconditioning = preconditioners.dense

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        if self.num_leapfrog < 1:
            raise ValueError(f"num_leapfrog must be a positive integer, got {self.num_leapfrog}.")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"jitter must lie in [0, 1), got {self.jitter}.")

    @property
    def num_evaluations(self) -> int:  # type: ignore[override]
        """Evaluations of the potential per move."""
        return self.num_leapfrog

    def num_uniforms(self, num_latents: int, num_blocks: int) -> int:
        """See `InvariantKernel.num_uniforms`."""
        del num_latents
        return 2 * num_blocks

    def move(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """See `InvariantKernel.move`."""
        blocks, L = potential.blocks, step.preconditioner
        uniform = random_numbers.uniform.reshape(2, blocks.num_blocks)
        eps = blocks.to_coordinates(step.size * (1 - self.jitter * uniform[0]))

        def leapfrog(state: tuple[Point, Array, Array], _: None) -> tuple[tuple[Point, Array, Array], None]:
            here, slope, p = state
            p = p - eps / 2 * slope
            here = potential.evaluate(here.x + L.apply(eps * p, blocks))
            slope = L.apply_transpose(here.grad, blocks)
            return (here, slope, p - eps / 2 * slope), None

        start = point, L.apply_transpose(point.grad, blocks), random_numbers.normal
        (proposal, _, end), _ = lax.scan(leapfrog, start, None, length=self.num_leapfrog)
        log_ratio = 0.5 * blocks.sum_coordinates(random_numbers.normal**2 - end**2)
        return accept(jnp.log(uniform[1]), log_ratio, point, proposal, blocks)
