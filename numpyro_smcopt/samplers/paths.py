# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Paths of a discretised diffusion, and exact gradients through them.

    Y_{t+1} = Y_t + h_t b_theta(s_t, Y_t) + sigma_t sqrt(h_t) xi_t,     t = 0..T-1,     Y_0 ~ p_0

on a grid ``s_0 < ... < s_T`` with ``h_t = s_{t+1} - s_t``. The divergence of the law of the path from that with another
drift is exact (Girsanov; the initial laws are equal) and bounds that of ``Y_T``:

    KL = E sum_t r_t,      r_t = h_t / (2 sigma_t^2) |b_theta(s_t, Y_t) - b_ref(s_t, Y_t)|^2

A loss ``E[c(Y_T)] + beta KL`` has two gradients. The *adjoint* differentiates the recursion itself, backwards from
``a_T = grad c(Y_T)``,

    g += d_theta [ h_t b_t . a_{t+1} + beta r_t ],      a_t = a_{t+1} + d_y [ h_t b_t . a_{t+1} + beta r_t ].

The *score function* needs no gradient of c:

    E[ (k - mean k) sum_t h_t (d_theta b_t)^T xi_t / (sigma_t sqrt(h_t)) ] + beta E sum_t d_theta r_t,
    k = c(Y_T) + beta sum_t r_t,

with ``N - 1`` instead of N. Source: Marion et al. 2024, section 4; Li et al. 2020 for the adjoint of the limit.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax, random

from numpyro_smcopt.random_numbers import draw_normals
from numpyro_smcopt.types import Array, Theta

Drift = Callable[[Theta, Array, Array], Array]
"""``(theta, time [], y [...]) -> [...]``, for one particle."""


class Grid(NamedTuple):
    """The discretisation; arrays [T], or scalars for one step of it.

    Attributes:
        number: t, by which the noise of the step is drawn.
        time: ``s_t``.
        step: ``h_t``.
        noise: ``sigma_t``.
    """

    number: Array
    time: Array
    step: Array
    noise: Array


class Dynamics(NamedTuple):
    """A diffusion to simulate.

    Attributes:
        drift: The drift.
        reference: The drift of the reference, or None.
        grid: The discretisation.
    """

    drift: Drift
    reference: Callable[[Array, Array], Array] | None
    grid: Grid

    def moved(self, theta: Theta, here: Grid, y: Array) -> tuple[Array, Array]:
        """``h_t b_t`` and ``r_t`` of one particle at the step ``here``."""
        drift = self.drift(theta, here.time, y)
        if self.reference is None:
            return here.step * drift, jnp.zeros((), y.dtype)
        difference = drift - self.reference(here.time, y)
        return here.step * drift, here.step / (2 * here.noise**2) * jnp.sum(difference**2)

    def advance(self, theta: Theta, here: Grid, y: Array, rng_key: Array) -> tuple[Array, Array]:
        """One step of a batch [N, ...], and ``r_t`` [N]."""
        moved, rate = jax.vmap(lambda one: self.moved(theta, here, one))(y)
        return y + moved + here.noise * jnp.sqrt(here.step) * step_noise(rng_key, here, y), rate


def step_noise(rng_key: Array, here: Grid, y: Array) -> Array:
    """``xi_t`` of a batch [N, ...] whose key this is: the same whenever the step is simulated again."""
    return draw_normals(random.fold_in(rng_key, here.number), y.shape, y.dtype)


def simulate(dynamics: Dynamics, theta: Theta, y: Array, rng_key: Array) -> tuple[Array, Array, Array]:
    """A batch from ``Y_0`` to ``Y_T``.

    Args:
        dynamics: What is simulated.
        theta: Parameters.
        y: [N, ...] ``Y_0``.
        rng_key: The key of the batch.

    Returns:
        ``Y_T``; the path [T, N, ...], ``Y_0`` to ``Y_{T-1}``; and ``sum_t r_t`` [N].
    """

    def body(carry: tuple[Array, Array], here: Grid) -> tuple[tuple[Array, Array], Array]:
        y, cost = carry
        new, rate = dynamics.advance(theta, here, y, rng_key)
        return (new, cost + rate), y

    (end, cost), path = lax.scan(body, (y, jnp.zeros(y.shape[0], y.dtype)), dynamics.grid)
    return end, path, cost


class Ends(NamedTuple):
    """The start of the gradient of a loss, at the ends of the paths.

    Attributes:
        adjoint: [N, ...] ``a_T``; None for the score function.
        coefficients: [N] of the scores of the paths; None for the adjoint.
        kl: [N] of ``sum_t r_t``.
    """

    adjoint: Array | None
    coefficients: Array | None
    kl: Array


def backward(dynamics: Dynamics, theta: Theta, path: Array, rng_key: Array, ends: Ends) -> Theta:
    """The gradient of a loss, from the path [T, N, ...] of a batch.

    Args:
        dynamics: What was simulated.
        theta: Where the gradient is taken.
        path: ``Y_0`` to ``Y_{T-1}``.
        rng_key: The key of the batch.
        ends: What the loss says at the ends.
    """
    start = _start(theta, path[0], ends)
    return _sweep(dynamics, theta, dynamics.grid, path, rng_key, ends, start)[1]


def checkpointed_backward(
    dynamics: Dynamics, theta: Theta, y: Array, rng_key: Array, ends_of: Callable[[Array, Array], tuple[Ends, Any]]
) -> tuple[Theta, Any]:
    """Simulate and differentiate with about ``2 sqrt(T)`` states in memory: segments are simulated twice.

    Args:
        dynamics: What is simulated.
        theta: Parameters.
        y: [N, ...] ``Y_0``.
        rng_key: The key of the batch.
        ends_of: ``Y_T`` and ``sum_t r_t`` to `Ends`, and whatever else is wanted of them.

    Returns:
        The gradient, and what else ``ends_of`` returned.
    """
    segments = _segments(dynamics.grid)

    def forward(carry: tuple[Array, Array], grid: Grid) -> tuple[tuple[Array, Array], Array]:
        y, cost = carry
        end, _, more = simulate(dynamics._replace(grid=grid), theta, y, rng_key)
        return (end, cost + more), y

    (end, cost), checkpoints = lax.scan(forward, (y, jnp.zeros(y.shape[0], y.dtype)), segments)
    ends, rest = ends_of(end, cost)

    def back(carry: tuple[Array, Theta], segment: tuple[Grid, Array]) -> tuple[tuple[Array, Theta], None]:
        grid, y = segment
        path = simulate(dynamics._replace(grid=grid), theta, y, rng_key)[1]
        return _sweep(dynamics, theta, grid, path, rng_key, ends, carry), None

    start = _start(theta, y, ends)
    (_, gradient), _ = lax.scan(back, start, (segments, checkpoints), reverse=True)
    return gradient, rest


def _segments(grid: Grid) -> Grid:
    """The steps as [segments, steps of one], filled up by steps of length zero at the end."""
    num = grid.time.shape[0]
    length = math.isqrt(num - 1) + 1
    missing = -num % length
    filled = grid._replace(step=jnp.pad(grid.step, (0, missing)))
    padded = [jnp.pad(leaf, (0, num + missing - leaf.shape[0]), mode="edge") for leaf in filled]
    return Grid(*(leaf.reshape(-1, length) for leaf in padded))


def _start(theta: Theta, y: Array, ends: Ends) -> tuple[Array, Theta]:
    return jnp.zeros_like(y) if ends.adjoint is None else ends.adjoint, jax.tree.map(jnp.zeros_like, theta)


def _sweep(
    dynamics: Dynamics,
    theta: Theta,
    grid: Grid,
    path: Array,
    rng_key: Array,
    ends: Ends,
    carry: tuple[Array, Theta],
) -> tuple[Array, Theta]:
    """Backwards over some steps: the adjoint [N, ...] and the gradient so far."""

    def body(carry: tuple[Array, Theta], at: tuple[Grid, Array]) -> tuple[tuple[Array, Theta], None]:
        (adjoint, gradient), (here, y) = carry, at
        moved = lambda theta, y: jax.vmap(lambda one: dynamics.moved(theta, here, one))(y)  # noqa: E731
        _, vjp = jax.vjp(moved, theta, y)
        if ends.coefficients is None:
            of_theta, of_y = vjp((adjoint, ends.kl))
            adjoint = adjoint + of_y
        else:
            # The score differentiates the density of a path, not the path: nothing flows back to earlier states.
            scale = jnp.where(here.step > 0, 1 / (here.noise * jnp.sqrt(here.step)), 0.0)
            coefficients = ends.coefficients.reshape(-1, *(1 for _ in y.shape[1:]))
            of_theta, _ = vjp((coefficients * scale * step_noise(rng_key, here, y), ends.kl))
        return (adjoint, jax.tree.map(jnp.add, gradient, of_theta)), None

    carry, _ = lax.scan(body, carry, (grid, path), reverse=True)
    return carry
