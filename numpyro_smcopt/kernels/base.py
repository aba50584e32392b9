# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The interface of Markov kernels: a move of ONE particle; the library vmaps over particles.

There are two abstract kinds (del Moral, Doucet and Jasra 2006, section 3.3):

*Invariant kernels* leave ``pi_theta`` invariant. They are used as *weigh, resample, then move*; the log-weight
increment is ``U_old(x) - U_new(x)`` at the old position.

*Weighted kernels* do not. They are used as *move, weigh, resample*; besides the new particle they return the log ratio
``log q(x | x') - log q(x' | x)`` of the backward and the forward kernel, and the increment is
``U_old(x) - U_new(x') + log_ratio``.

A kernel never sees a model: it takes a `Potential`. Its randomness is an argument, drawn for the whole cloud at once.
Where the latents fall into independent blocks, it accepts, rejects and scales block by block through
`Potential.blocks`; with one block that is the textbook algorithm.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from numpyro_smcopt.adaptation import adapt_size, adapt_unadjusted_size
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels.preconditioners import Preconditioner, Preconditioning
from numpyro_smcopt.random_numbers import RandomNumbers
from numpyro_smcopt.types import Array


class Point(NamedTuple):
    """A place and what is known there, so that nothing is computed twice.

    Attributes:
        x: [D] the particle.
        terms: [K] its energy terms.
        grad: [D] gradient of the energy in ``x``.
        score: [P] gradient of the energy in theta, or ``None`` where it is not carried.
    """

    x: Array
    terms: Array
    grad: Array
    score: Array | None = None


class Potential(NamedTuple):
    """The energy of one particle at one ``theta``.

    Attributes:
        evaluate: ``x [D] -> Point``.
        blocks: The partition of coordinates and terms.
    """

    evaluate: Callable[[Array], Point]
    blocks: Blocks


class Step(NamedTuple):
    """Length and shape of a move.

    Attributes:
        size: [B] step size of each block, in the coordinates in which the preconditioner is the identity.
        preconditioner: The map from those coordinates to ``x``.
    """

    size: Array
    preconditioner: Preconditioner


class Kernel(abc.ABC):
    """A Markov kernel; write an `InvariantKernel` or a `WeightedKernel`.

    Attributes:
        invariant: Whether it leaves its target invariant: particles are weighed first and move afterwards.
        step_size: Where the step size starts (or stays).
        target: What the step size is adapted to; ``None`` keeps it.
        preconditioning: How the preconditioner is found.
        num_evaluations: Evaluations of the potential per move.
    """

    invariant: bool
    step_size: float
    target: float | None
    preconditioning: Preconditioning
    num_evaluations: int

    def num_uniforms(self, num_latents: int, num_blocks: int) -> int:
        """Uniform random numbers that one move of one particle takes: by default one per block if it accepts moves."""
        del num_latents
        return num_blocks if self.invariant else 0

    @abc.abstractmethod
    def move(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """Move one particle.

        Args:
            random_numbers: The randomness of the move.
            point: The particle, evaluated under ``potential``; for a weighted kernel under the *old* one, which drives
                the move.
            potential: The target; of a weighted kernel the *new* one, to which its backward kernel belongs.
            step: Step sizes and preconditioner, the same for both directions.

        Returns:
            The new point under ``potential`` and, for each block [B], the acceptance probability (invariant kernels) or
            ``log q(x | x') - log q(x' | x)`` (weighted ones).
        """

    @abc.abstractmethod
    def weigh(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """The point at which a particle of the old target is weighed under the new one, and its log ratio.

        Args:
            random_numbers: The randomness of the move.
            point: The particle, evaluated under the old potential.
            potential: The new target.
            step: Step sizes and preconditioner.

        Returns:
            The point under the new potential and ``log q(x | x') - log q(x' | x)`` of each block, [B].
        """

    @abc.abstractmethod
    def adapt(self, size: Array, observed: Array, num_updates: Array) -> Array:
        """Step sizes [B] after a move of which ``observed`` [B] was accepted, or is left of the effective particles."""


class InvariantKernel(Kernel):
    """A kernel that leaves the target invariant (accept-reject); ``target`` is the mean acceptance."""

    invariant = True

    def weigh(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """The particle as it stands: it moves afterwards."""
        del random_numbers
        return potential.evaluate(point.x), jnp.zeros_like(step.size)

    def adapt(self, size: Array, observed: Array, num_updates: Array) -> Array:
        """See `adaptation.adapt_size`."""
        return adapt_size(size, observed, self.target, num_updates)


class WeightedKernel(Kernel):
    """A kernel that does not leave the target invariant and says by how much.

    ``target`` is the fraction of the effective particles that a move shall keep.
    """

    invariant = False

    def weigh(
        self, random_numbers: RandomNumbers, point: Point, potential: Potential, step: Step
    ) -> tuple[Point, Array]:
        """The particle after its move."""
        return self.move(random_numbers, point, potential, step)

    def adapt(self, size: Array, observed: Array, num_updates: Array) -> Array:
        """See `adaptation.adapt_unadjusted_size`."""
        return adapt_unadjusted_size(size, observed, self.target, num_updates)


def is_kernel(value: Any) -> bool:
    """True if ``value``, a kernel from here or one that offers the same, can move particles with an energy."""
    needed = "move", "weigh", "adapt", "num_uniforms"
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in needed)


def accept(log_uniform: Array, log_ratio: Array, old: Point, new: Point, blocks: Blocks) -> tuple[Point, Array]:
    """Metropolis-Hastings: accept or reject block by block.

    Args:
        log_uniform: [B] logarithms of uniform random numbers.
        log_ratio: [B] log ratio of backward to forward proposal densities (momenta included).
        old: The current point.
        new: The proposal.
        blocks: The partition.

    Returns:
        The next point and the acceptance probabilities, [B]. A proposal whose energy or ratio is not finite is
        rejected.
    """
    accepted, log_accept = decide(log_uniform, log_ratio, old, new, blocks)
    if blocks.num_blocks == 1:
        chosen = _where(accepted[0], new, old)
    else:
        of_x, of_term = blocks.to_coordinates(accepted), blocks.to_terms(accepted, False)
        chosen = Point(
            jnp.where(of_x, new.x, old.x),
            jnp.where(of_term, new.terms, old.terms),
            jnp.where(of_x, new.grad, old.grad),
        )
    return chosen, jnp.exp(log_accept)


def decide(log_uniform: Array, log_ratio: Array, old: Point, new: Point, blocks: Blocks) -> tuple[Array, Array]:
    """The blocks that `accept` accepts, [B] bool, and the logarithms of their acceptance probabilities, [B]."""
    # Terms are subtracted before they are summed: two large totals would cancel in float32.
    log_accept = blocks.sum_terms(old.terms - new.terms) + log_ratio
    log_accept = jnp.where(jnp.isfinite(log_accept), jnp.minimum(log_accept, 0.0), -jnp.inf)
    return log_uniform < log_accept, log_accept


def _where(accepted: Array, new: Point, old: Point) -> Point:
    return jax.tree.map(lambda a, b: jnp.where(accepted, a, b), new, old)
