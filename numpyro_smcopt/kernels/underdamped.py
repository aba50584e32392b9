# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Underdamped Langevin dynamics of one particle, by the integrators of `kernels.integrators`.

The accept-reject kernel takes the leapfrog step that diffuses as far, so both kernels mean the same by ``(h, mu)``.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.scipy.special import ndtr

from numpyro_smcopt.kernels.base import Potential, decide
from numpyro_smcopt.kernels.integrators import Integrator, numpy_of
from numpyro_smcopt.kernels.preconditioners import Preconditioner
from numpyro_smcopt.types import Array


class Moved(NamedTuple):
    """A particle that was moved with its velocity.

    Attributes:
        x: [D] the particle.
        velocity: [D] its velocity, in the coordinates in which the preconditioner is the identity.
        slope: [D] gradient in those coordinates, where the particle stood.
        terms: [K] its energy terms there.
        acceptance: [B] acceptance probability.
    """

    x: Array
    velocity: Array
    slope: Array
    terms: Array
    acceptance: Array


class VelocityKernel(abc.ABC):
    """Moves one particle that has a velocity; the velocity is standard normal at equilibrium.

    Attributes:
        target: Mean acceptance that step sizes are adapted to where they are not given; None for unadjusted moves.
    """

    target: float | None = None

    @abc.abstractmethod
    def num_normals(self, num_latents: int, num_blocks: int) -> int:
        """The number of standard normal numbers that one move of one particle takes."""

    @abc.abstractmethod
    def move(
        self, normals: Array, x: Array, velocity: Array, potential: Potential, metric: Preconditioner, pace: Integrator
    ) -> Moved:
        """Move one particle.

        Args:
            normals: Standard normal numbers, as many as `num_normals` says.
            x: [D] the particle.
            velocity: [D] its velocity.
            potential: The target.
            metric: The map to ``x`` from the coordinates of the velocity.
            pace: [B] the step of every block.
        """


@dataclasses.dataclass(frozen=True)
class Underdamped(VelocityKernel):
    """The exponential integrator, as published: one gradient per move, and a bias.

    The stationary variance along a direction of curvature ``c`` is that of unadjusted Langevin with the same step size,
    ``(1/c) / (1 - c h / 2)``, or slightly less: momentum does not take the bias away.
    """

    def num_normals(self, num_latents: int, num_blocks: int) -> int:
        """See `VelocityKernel.num_normals`."""
        del num_blocks
        return 2 * num_latents

    def move(
        self, normals: Array, x: Array, velocity: Array, potential: Potential, metric: Preconditioner, pace: Integrator
    ) -> Moved:
        """See `VelocityKernel.move`."""
        blocks, L = potential.blocks, metric
        here = potential.evaluate(x)
        slope = L.apply_transpose(here.grad, blocks)
        by = jax.tree.map(blocks.to_coordinates, pace)
        first, second = normals[: x.shape[0]], normals[x.shape[0] :]
        shift = by.carry * velocity - by.drift * slope + by.xv * first + by.xx * second
        velocity = by.decay * velocity - by.kick * slope + by.vv * first
        return Moved(x + L.apply(shift, blocks), velocity, slope, here.terms, jnp.ones(blocks.num_blocks, x.dtype))


@dataclasses.dataclass(frozen=True)
class MetropolisUnderdamped(VelocityKernel):
    """The same diffusion with accept-reject: no bias, two gradients per move.

    The velocity is refreshed to ``mu p + sqrt(1 - mu^2) xi``, one leapfrog step is proposed and accepted or rejected
    block by block; a rejected velocity turns round. The leapfrog step is `leapfrog_step`, so step size and momentum
    mean what they mean for `Underdamped`; without momentum this is MALA. Much larger step sizes pay here.

    Args:
        target: Mean acceptance that step sizes are adapted to where they are not given.

    Source: Horowitz 1991.
    """

    target: float | None = 0.9

    def num_normals(self, num_latents: int, num_blocks: int) -> int:
        """See `VelocityKernel.num_normals`."""
        return num_latents + num_blocks

    def move(
        self, normals: Array, x: Array, velocity: Array, potential: Potential, metric: Preconditioner, pace: Integrator
    ) -> Moved:
        """See `VelocityKernel.move`."""
        blocks, L = potential.blocks, metric
        eps = blocks.to_coordinates(leapfrog_step(pace.step_size, pace.damping))
        decay, vv = blocks.to_coordinates(pace.decay), blocks.to_coordinates(pace.vv)
        fresh, for_uniform = normals[: x.shape[0]], normals[x.shape[0] :]
        log_uniform = jnp.log(jnp.maximum(ndtr(for_uniform), jnp.finfo(x.dtype).tiny))

        # Refresh
        begin = decay * velocity + vv * fresh

        # Leapfrog
        here = potential.evaluate(x)
        slope = L.apply_transpose(here.grad, blocks)
        half = begin - eps / 2 * slope
        there = potential.evaluate(x + L.apply(eps * half, blocks))
        end = half - eps / 2 * L.apply_transpose(there.grad, blocks)

        # Accept or turn round
        log_ratio = 0.5 * blocks.sum_coordinates(begin**2 - end**2)
        accepted, log_accept = decide(log_uniform, log_ratio, here, there, blocks)
        of_x = blocks.to_coordinates(accepted)
        velocity = jnp.where(of_x, end, -begin)
        return Moved(jnp.where(of_x, there.x, x), velocity, slope, here.terms, jnp.exp(log_accept))


def leapfrog_step(step_size: Array, damping: Array) -> Array:
    """The leapfrog step of Hamiltonian moves that diffuse as far as Langevin steps of size ``h``.

    One leapfrog step of length ``eps`` after the velocity has been refreshed to ``mu p + sqrt(1 - mu^2) xi`` diffuses
    like ``eps^2 / 2 (1 + mu)/(1 - mu)``; with ``eps^2 = 2 h tanh(z/2)`` that is ``h``, whatever the momentum. Without
    momentum the accepted moves are those of MALA.
    """
    xp = numpy_of(step_size, damping)
    return xp.sqrt(2 * step_size * xp.tanh(damping / 2))
