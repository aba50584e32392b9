# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Exponential integrators of a motion with friction, in two numbers: a step size and a momentum.

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

Source: Cheng, Chatterji, Bartlett and Jordan 2018 (the integrator); Lim, Kuntz, Power and Johansen, "Momentum
Particle Maximum Likelihood", ICML 2024, arXiv 2312.07335 (both blocks, and the gradient taken ahead).
"""

from types import ModuleType
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt.types import Array

LEVELS = 9  # of the continued fraction: relative error below 1e-16 for z < 2
SERIES_UP_TO = 2.0


class Integrator(NamedTuple):
    """One step of a block with a velocity ``p``: numbers, or arrays that broadcast, of shape [] or [B].

        ahead = x + lookahead p,     g = gradient at ahead
        x' = x + carry p - drift g + xv xi_1 + xx xi_2
        p' = decay p - kick g + vv xi_1

    Attributes:
        step_size: ``h``.
        damping: ``z = -log(mu)``, which a momentum near one would round.
        lookahead: Distance ahead of ``x`` at which the gradient is taken.
        carry: Distance that the velocity carries.
        drift: Distance that the gradient pushes at once.
        decay: Share that is left of the velocity, ``mu``.
        kick: Velocity that the gradient gives.
        vv: Noise of the velocity.
        xv: The part of it that reaches ``x``.
        xx: Noise of ``x`` alone.
    """

    step_size: Array
    damping: Array
    lookahead: Array
    carry: Array
    drift: Array
    decay: Array
    kick: Array
    vv: Array
    xv: Array
    xx: Array

    @property
    def momentum(self) -> Array:
        """``mu``."""
        return self.decay


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
    xp = numpy_of(step_size, damping)
    t, q, inverse = xp.tanh(damping / 2), _one_minus_tanh_ratio(damping), 1 / damping
    E = 2 * t / (1 + t)
    a, root = E * xp.sqrt(step_size * inverse), xp.sqrt(step_size)
    return Integrator(
        step_size=step_size,
        damping=damping,
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
    xp = numpy_of(step_size, damping)
    mu, rate = xp.exp(-damping), -xp.expm1(-damping) * step_size
    root = xp.sqrt(rate)
    zero = 0 * rate
    return Integrator(step_size, damping, mu * root, mu * root, rate, mu, root, zero, zero, zero)


def stability_limit(integrator: Integrator) -> Array:
    """The largest curvature of a quadratic on which the steps of a parameter do not diverge.

    The step is linear in ``(x, p)``, with a determinant and a trace that are linear in the curvature; both eigenvalues
    stay inside the unit circle as long as ``1 + trace + det > 0`` and ``det < 1``.
    """
    _, _, look, carry, drift, decay, kick, *_ = integrator
    xp = numpy_of(*integrator)
    turning = drift * (1 + decay) + 2 * kick * look - kick * carry
    growing = kick * carry - kick * look - drift * decay
    tiny = xp.finfo(xp.result_type(turning, np.float32)).tiny
    flips = xp.where(turning > 0, 2 * (1 + decay) / xp.maximum(turning, tiny), np.inf)
    grows = xp.where(growing > 0, (1 - decay) / xp.maximum(growing, tiny), np.inf)
    return xp.minimum(flips, grows)


def damping_ratio(step_size: Array, damping: Array, curvature: Array) -> Array:
    """``gamma eta / (2 sqrt(eta curvature)) = sqrt(z / (4 h curvature))``: 1 is critical, less oscillates."""
    xp = numpy_of(step_size, damping, curvature)
    return xp.sqrt(damping / (4 * step_size * curvature))


def controlled(integrator_fn: IntegratorFn, old: Integrator, step_size: Array, momentum: Array) -> Integrator:
    """The step under controlled values: what was precomputed where they are what it was computed for."""
    fresh = integrator_fn(step_size, jnp.where(momentum == old.decay, old.damping, -jnp.log(momentum)))
    same = (momentum == old.decay) & (step_size == old.step_size)
    return jax.tree.map(lambda kept, new: jnp.where(same, kept, new), old, fresh)


def _one_minus_tanh_ratio(z: Array) -> Array:
    """``q(z) = 1 - tanh(z/2)/(z/2)``, in [0, 1], without cancellation."""
    xp = numpy_of(z)
    half = z / 2
    near = xp.minimum(half, SERIES_UP_TO / 2) ** 2  # both branches see sound numbers
    c = 1 / (2.0 * LEVELS + 1)
    for odd in range(2 * LEVELS - 1, 1, -2):
        c = 1 / (odd + near * c)
    far = xp.maximum(half, SERIES_UP_TO / 2)
    return xp.where(half < SERIES_UP_TO / 2, near * c / (1 + near * c), 1 - xp.tanh(far) / far)


def numpy_of(*values: Any) -> ModuleType:
    """JAX where a value is an array of JAX, else NumPy, which computes in double precision before all compilation."""
    return jnp if any(isinstance(value, jax.Array) for value in values) else np
