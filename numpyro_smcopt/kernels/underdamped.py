# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Underdamped Langevin dynamics by exponential integrators, in two numbers: a step size and a momentum.

    dx = eta u dt,      du = -gamma eta u dt - grad U(x) dt + sqrt(2 gamma) dW

over one time step ``dt``, with the gradient frozen, depends on ``(dt, gamma, eta)`` only through

    h = dt / gamma              the step size: how far gradient descent or Langevin would go
    z = gamma eta dt            how much of the velocity is forgotten;  the momentum is  mu = exp(-z)

and in units in which the mass is one (``p = sqrt(eta) u``, standard normal at equilibrium) it reads

    x' = x + a p - b grad U(x) + xv xi_1 + xx xi_2
    p' = mu p    - a grad U(x) + vv xi_1

    a  = E sqrt(h/z)        b  = h (z - E)/z              with  E = 1 - mu
    vv = sqrt(1 - mu^2)     xv = E sqrt(h tanh(z/2)/z)    xx = sqrt(2 h (z - 2 tanh(z/2))/z)

The textbook forms of ``b`` and ``xx`` cancel to nothing for small z. All of them are sums of positive numbers in
``t = tanh(z/2)`` and ``q = 1 - tanh(z/2)/(z/2)``, the latter from the continued fraction of the tangent:

    E = 2t/(1 + t)          b = h (q + t)/(1 + t)         xx = sqrt(2 h q)

``z = inf`` (no momentum) is Langevin: ``a = xv = 0``, ``b = h``, ``xx = sqrt(2 h)``. Without noise the same numbers
move a parameter; variants differ in where the gradient is taken and in how far the velocity carries, in numbers only.

The accept-reject kernel takes the leapfrog step that diffuses as far, so both kernels mean the same by ``(h, mu)``.

Source: Cheng, Chatterji, Bartlett and Jordan 2018 (the integrator); Lim, Kuntz, Power and Johansen, "Momentum
Particle Maximum Likelihood", ICML 2024, arXiv 2312.07335 (both blocks, and the gradient taken ahead).
"""

import abc
import dataclasses
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr

from numpyro_smcopt.kernels.base import Potential, decide
from numpyro_smcopt.kernels.preconditioners import Preconditioner
from numpyro_smcopt.types import Array

LEVELS = 9  # of the continued fraction: relative error below 1e-16 for z < 2
SERIES_UP_TO = 2.0


class Integrator(NamedTuple):
    """One step of a block with a velocity ``p``: numbers, or arrays that broadcast.

        ahead = x + lookahead p,     g = gradient at ahead
        x' = x + carry p - drift g + xv xi_1 + xx xi_2
        p' = decay p - kick g + vv xi_1

    Attributes:
        lookahead: How far ahead of ``x`` the gradient is taken.
        carry: How far the velocity carries.
        drift: How far the gradient pushes at once.
        decay: What is left of the velocity, ``mu``.
        kick: How much velocity the gradient gives.
        vv: Noise of the velocity.
        xv: The part of it that reaches ``x``.
        xx: Noise of ``x`` alone.
    """

    lookahead: Array
    carry: Array
    drift: Array
    decay: Array
    kick: Array
    vv: Array
    xv: Array
    xx: Array


class Pace(NamedTuple):
    """How a block goes.

    Attributes:
        step_size: ``h``, [] or [B].
        momentum: ``mu``, of the same shape.
        damping: ``z = -log(mu)``, which a momentum near one would round.
        integrator: The numbers that follow.
    """

    step_size: Array
    momentum: Array
    damping: Array
    integrator: Integrator


class IntegratorFn(Protocol):
    """Makes an `Integrator`; `exponential`, `uncorrected` and `nesterov` are three."""

    def __call__(self, step_size: Array, damping: Array) -> Integrator:
        """Numbers for the step size ``h`` and the damping ``z = -log(momentum)``."""


def exponential(step_size: Array, damping: Array) -> Integrator:
    """The exponential integrator with the gradient taken ahead (gradient correction), as published.

    Computed by NumPy, in double precision, if both arguments are of NumPy or Python; else traced.

    Args:
        step_size: ``h > 0``.
        damping: ``z`` in (0, inf].
    """
    xp = _numpy_of(step_size, damping)
    t, q, inverse = xp.tanh(damping / 2), _one_minus_tanh_ratio(damping), 1 / damping
    E = 2 * t / (1 + t)
    a, root = E * xp.sqrt(step_size * inverse), xp.sqrt(step_size)
    return Integrator(
        lookahead=a,
        carry=a,
        drift=step_size * (q + t) / (1 + t),
        decay=xp.exp(-damping),
        kick=a,
        vv=xp.sqrt(-xp.expm1(-2 * damping)),
        xv=root * E * xp.sqrt(t * inverse),
        xx=root * xp.sqrt(2 * q),
    )


def uncorrected(step_size: Array, damping: Array) -> Integrator:
    """The exponential integrator with the gradient taken at the present place (no gradient correction).

    No more stable than gradient descent, see `stability_limit`.
    """
    integrator = exponential(step_size, damping)
    return integrator._replace(lookahead=0 * integrator.lookahead)


def nesterov(step_size: Array, damping: Array) -> Integrator:
    """Nesterov's accelerated gradient with the asymptotic rate ``h``: learning rate ``(1 - mu) h``, momentum ``mu``.

        w' = mu w - (1 - mu) h grad(theta + mu w),      theta' = theta + w'

    Source: Nesterov 1983, in the form of Sutskever et al. 2013.
    """
    xp = _numpy_of(step_size, damping)
    mu, rate = xp.exp(-damping), -xp.expm1(-damping) * step_size
    root = xp.sqrt(rate)
    zero = 0 * rate
    return Integrator(mu * root, mu * root, rate, mu, root, zero, zero, zero)


def stability_limit(integrator: Integrator) -> Array:
    """The largest curvature of a quadratic on which the steps of a parameter do not diverge.

    The step is linear in ``(x, p)``, with a determinant and a trace that are linear in the curvature; both eigenvalues
    stay inside the unit circle as long as ``1 + trace + det > 0`` and ``det < 1``.
    """
    look, carry, drift, decay, kick = integrator[:5]
    xp = _numpy_of(*integrator[:5])
    turning = drift * (1 + decay) + 2 * kick * look - kick * carry
    growing = kick * carry - kick * look - drift * decay
    tiny = xp.finfo(xp.result_type(turning, np.float32)).tiny
    flips = xp.where(turning > 0, 2 * (1 + decay) / xp.maximum(turning, tiny), np.inf)
    grows = xp.where(growing > 0, (1 - decay) / xp.maximum(growing, tiny), np.inf)
    return xp.minimum(flips, grows)


def damping_ratio(step_size: Array, damping: Array, curvature: Array) -> Array:
    """``gamma eta / (2 sqrt(eta curvature)) = sqrt(z / (4 h curvature))``: 1 is critical, less oscillates."""
    xp = _numpy_of(step_size, damping, curvature)
    return xp.sqrt(damping / (4 * step_size * curvature))


def leapfrog_step(step_size: Array, damping: Array) -> Array:
    """The leapfrog step of Hamiltonian moves that diffuse as far as Langevin steps of size ``h``.

    One leapfrog step of length ``eps`` after the velocity has been refreshed to ``mu p + sqrt(1 - mu^2) xi`` diffuses
    like ``eps^2 / 2 (1 + mu)/(1 - mu)``; with ``eps^2 = 2 h tanh(z/2)`` that is ``h``, whatever the momentum. Without
    momentum the accepted moves are those of MALA.
    """
    xp = _numpy_of(step_size, damping)
    return xp.sqrt(2 * step_size * xp.tanh(damping / 2))


def pace(integrator_fn: IntegratorFn, step_size: Any, damping: Any) -> Pace:
    """A `Pace`; computed in double precision, before anything is compiled, if the arguments are not JAX's."""
    xp = _numpy_of(step_size, damping)
    return Pace(step_size, xp.exp(-xp.asarray(damping)), damping, integrator_fn(step_size, damping))


def controlled(integrator_fn: IntegratorFn, old: Pace, step_size: Array, momentum: Array) -> Pace:
    """The pace under controlled values: what was precomputed where they are what it was computed for."""
    damping = jnp.where(momentum == old.momentum, old.damping, -jnp.log(momentum))
    same = (momentum == old.momentum) & (step_size == old.step_size)
    fresh = integrator_fn(step_size, damping)
    integrator = Integrator(*(jnp.where(same, a, b) for a, b in zip(old.integrator, fresh, strict=True)))
    return Pace(step_size, momentum, damping, integrator)


# -- moves of one particle -----------------------------------------------------------------------------------------
class Moved(NamedTuple):
    """What a move with a velocity leaves.

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
    """Moves one particle that has a velocity; the velocity is standard normal at equilibrium."""

    @abc.abstractmethod
    def num_normals(self, num_latents: int, num_blocks: int) -> int:
        """How many standard normal numbers one move of one particle takes."""

    @abc.abstractmethod
    def move(
        self,
        normals: Array,
        x: Array,
        velocity: Array,
        potential: Potential,
        metric: Preconditioner,
        pace: Pace,
    ) -> Moved:
        """Move one particle.

        Args:
            normals: Standard normal numbers, as many as `num_normals` says.
            x: [D] the particle.
            velocity: [D] its velocity.
            potential: The target.
            metric: The map to ``x`` from the coordinates of the velocity.
            pace: Step sizes and momenta, [B].
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
        self,
        normals: Array,
        x: Array,
        velocity: Array,
        potential: Potential,
        metric: Preconditioner,
        pace: Pace,
    ) -> Moved:
        """See `VelocityKernel.move`."""
        blocks, L = potential.blocks, metric
        here = potential.evaluate(x)
        slope = L.apply_transpose(here.grad, blocks)
        by = Integrator(*(blocks.to_coordinates(number) for number in pace.integrator))
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

    target: float = 0.9

    def num_normals(self, num_latents: int, num_blocks: int) -> int:
        """See `VelocityKernel.num_normals`."""
        return num_latents + num_blocks

    def move(
        self,
        normals: Array,
        x: Array,
        velocity: Array,
        potential: Potential,
        metric: Preconditioner,
        pace: Pace,
    ) -> Moved:
        """See `VelocityKernel.move`."""
        blocks, L = potential.blocks, metric
        eps = blocks.to_coordinates(leapfrog_step(pace.step_size, pace.damping))
        decay, vv = blocks.to_coordinates(pace.integrator.decay), blocks.to_coordinates(pace.integrator.vv)
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


def _one_minus_tanh_ratio(z: Array) -> Array:
    """``q(z) = 1 - tanh(z/2)/(z/2)``, in [0, 1], without cancellation."""
    xp = _numpy_of(z)
    half = z / 2
    near = xp.minimum(half, SERIES_UP_TO / 2) ** 2  # both branches see sound numbers
    c = 1 / (2.0 * LEVELS + 1)
    for odd in range(2 * LEVELS - 1, 1, -2):
        c = 1 / (odd + near * c)
    far = xp.maximum(half, SERIES_UP_TO / 2)
    return xp.where(half < SERIES_UP_TO / 2, near * c / (1 + near * c), 1 - xp.tanh(far) / far)


def _numpy_of(*values: Any) -> ModuleType:
    return jnp if any(isinstance(value, jax.Array) for value in values) else np
