# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximation of the latents: modes, curvatures, and a warm start for ``theta``.

    pi_theta(x) ~ N(x_hat, H^-1),    x_hat = argmin U_theta,    H = d2U/dx2 (x_hat)
    -log p_theta(y) ~ U_theta(x_hat) + 1/2 log det H - D/2 log(2 pi)

Blocks make it cheap: the Hessians of all blocks come from as many Hessian-vector products as the largest block has
coordinates, and modes are found by one damped Newton iteration per block, all at once.

The warm start walks to the neighbourhood of the maximum with the step of `theta_step`, the particles being draws from
the approximation, and ``-log p`` above deciding how far to go. It costs no accuracy (the particles have the last word)
and makes far starting points harmless.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.tempering import Curvature
from numpyro_smcopt.types import Array
from numpyro_smcopt.uncertainty import Information, louis_information

MAX_NUMBERS = 4_000_000  # B M^2 up to which Hessian blocks are affordable
MAX_WIDTH = 1200
COLUMNS_AT_ONCE = 128
NEWTON_ITERATIONS = 100
NEWTON_TOLERANCE = 1e-2  # length of the last Newton step, in posterior standard deviations
WARM_ITERATIONS = 80
LONGEST_STEP = 2.0  # for parameters on a log or logit scale, whose natural unit is one
SMALLEST_EIGENVALUE = 1e-6  # of the observed information, relative to the complete one
DAMPING = 0.1  # of scales, relative to the complete information
GOOD_ENOUGH = 1e-3  # predicted decrease, in nats, at which the particles take over


def affordable(blocks: Blocks) -> bool:
    """Whether the Hessian blocks fit."""
    num, width = blocks.members.shape
    return width <= MAX_WIDTH and num * width**2 <= MAX_NUMBERS


def hessian_blocks(gradient_fn: Callable[[Array], Array], x: Array, blocks: Blocks) -> Array:
    """[..., B, M, M] Hessians of the blocks; padded with the identity.

    Args:
        gradient_fn: ``x [D] -> [..., D]``, one or several gradients of energies.
        x: [D].
        blocks: The partition.
    """
    num, width = blocks.members.shape
    columns = blocks.members.T  # [M, B]: the m-th coordinate of every block is disturbed at once

    def column(members: Array) -> Array:
        direction = jnp.zeros_like(x).at[members].set(1.0, mode="drop")
        return blocks.gather(jax.jvp(gradient_fn, (x,), (direction,))[1], 0.0)

    mapped = jax.vmap(column) if width <= COLUMNS_AT_ONCE else partial(lax.map, column, batch_size=COLUMNS_AT_ONCE)
    hessian = jnp.moveaxis(mapped(columns), 0, -1)  # [..., B, M, M]
    padding = blocks.members == x.shape[0]
    return hessian + jnp.where(padding, 1.0, 0.0)[..., None] * jnp.eye(width, dtype=x.dtype)


def curvature(terms_fn: Callable[[Array], Array], x: Array, prior_mask: Array, blocks: Blocks) -> Curvature:
    """Hessian blocks of prior and remainder at ``x``, for `tempering.temper`."""

    def gradients(x: Array) -> Array:
        _, vjp = jax.vjp(terms_fn, x)
        share = prior_mask.astype(x.dtype)
        return jnp.stack([vjp(share)[0], vjp(1 - share)[0]])

    both = hessian_blocks(gradients, x, blocks)
    padding = jnp.where(blocks.members == x.shape[0], 1.0, 0.0)[..., None] * jnp.eye(blocks.width, dtype=x.dtype)
    return Curvature(both[0], both[1] - padding)


class Mode(NamedTuple):
    """The mode of a target.

    Attributes:
        x: [D] the mode.
        terms: [K] energy terms there.
        hessian: [B, M, M] the curvature there.
        step: [] length of the last Newton step, in standard deviations (the largest over blocks).
    """

    x: Array
    terms: Array
    hessian: Array
    step: Array


def find_mode(terms_fn: Callable[[Array], Array], x: Array, blocks: Blocks) -> Mode:
    """Minimise the energy by Newton's method with Levenberg-Marquardt damping, block by block.

    Args:
        terms_fn: ``x [D] -> [K]``.
        x: [D] where to start.
        blocks: The partition.
    """
    eye = jnp.eye(blocks.width, dtype=x.dtype)

    def energy_and_terms(x: Array) -> tuple[Array, Array]:
        terms = terms_fn(x)
        return jnp.sum(terms), terms

    gradient_and_terms = jax.grad(energy_and_terms, has_aux=True)

    def newton(gradient: Array, hessian: Array, damping: Array) -> tuple[Array, Array]:
        diagonal = jnp.maximum(jnp.abs(jnp.diagonal(hessian, axis1=1, axis2=2)), 1e-6)
        factor = jnp.linalg.cholesky(hessian + damping[:, None, None] * diagonal[:, :, None] * eye)
        whitened = jax.scipy.linalg.solve_triangular(factor, blocks.gather(gradient, 0.0)[..., None], lower=True)
        step = -jax.scipy.linalg.solve_triangular(factor, whitened, lower=True, trans=1)[..., 0]
        return step, jnp.sqrt(jnp.sum(whitened[..., 0] ** 2, -1))

    def body(carry: tuple) -> tuple:
        here, candidate, damping, length, k = carry
        x, terms, gradient, hessian = here
        new_gradient, new_terms = gradient_and_terms(candidate)
        new_hessian = hessian_blocks(lambda x: gradient_and_terms(x)[0], candidate, blocks)

        # Accept or refuse, block by block. Near the mode rounding decides; a step that short is taken on trust.
        change = blocks.sum_terms(new_terms - terms)
        better = (k == 0) | (change < 0) | ((length < 0.3) & (change < 0.1))
        of_x, of_term = blocks.to_coordinates(better), blocks.to_terms(better, True)
        x, gradient = jnp.where(of_x, candidate, x), jnp.where(of_x, new_gradient, gradient)
        terms, hessian = jnp.where(of_term, new_terms, terms), jnp.where(better[:, None, None], new_hessian, hessian)
        relaxed = jnp.where(damping < 1e-3, 0.0, damping / 5)
        damping = jnp.where(k == 0, 0.0, jnp.where(better, relaxed, jnp.maximum(4 * damping, 1e-2)))

        # Next candidate. A block whose Hessian is indefinite stays and is damped more.
        step, length = newton(gradient, hessian, damping)
        sane = jnp.all(jnp.isfinite(step), -1)
        candidate = x + blocks.scatter(jnp.where(sane[:, None], step, 0.0))
        damping = jnp.where(sane, damping, jnp.maximum(4 * damping, 1e-2))
        length = jnp.where(sane, length, jnp.inf)
        return (x, terms, gradient, hessian), candidate, damping, length, k + 1

    def going(carry: tuple) -> Array:
        _, _, damping, length, k = carry
        return jnp.any((length > NEWTON_TOLERANCE) | (damping >= 1e-2)) & (k < NEWTON_ITERATIONS)

    zeros = jnp.zeros(blocks.num_blocks, x.dtype)
    hessian = jnp.zeros((blocks.num_blocks, blocks.width, blocks.width), x.dtype)
    here = (x, jnp.zeros(blocks.of_term.shape[0], x.dtype), jnp.zeros_like(x), hessian)
    here, _, damping, length, _ = lax.while_loop(going, body, (here, x, zeros, zeros + jnp.inf, 0))
    return Mode(here[0], here[1], here[3], jnp.max(jnp.where(damping < 1e-2, length, jnp.inf)))


def factors(hessian: Array) -> tuple[Array, Array, Array]:
    """``F`` with ``H^-1 = F F^T``, its inverse, and half the log determinant of ``H``, per block.

    Args:
        hessian: [B, M, M]; where it is not positive definite the results are NaN.

    Returns:
        [B, M, M], [B, M, M] and [B].
    """
    lower = jnp.linalg.cholesky(hessian)
    eye = jnp.broadcast_to(jnp.eye(hessian.shape[-1], dtype=hessian.dtype), hessian.shape)
    factor = jax.scipy.linalg.solve_triangular(lower, eye, lower=True, trans=1)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(lower, axis1=1, axis2=2)), -1)
    return factor, jnp.swapaxes(lower, 1, 2), half_log_det


class Expansion(NamedTuple):
    """Everything the warm start needs to know at one ``theta``.

    Attributes:
        mode: The mode of the latents.
        half_log_det: [] ``1/2 log det H``.
        gradient: [P] expected gradient under the approximation.
        information: Complete and missing information under the approximation.
    """

    mode: Mode
    half_log_det: Array
    gradient: Array
    information: Information


def expand(
    terms_fn: Callable[[Array, Array], Array], theta: Array, x: Array, normals: Array, blocks: Blocks, work: int
) -> Expansion:
    """Laplace approximation at ``theta``, and the gradient and information that draws from it give.

    Args:
        terms_fn: ``(theta [P], x [D]) -> [K]``.
        theta: [P].
        x: [D] where to start looking for the mode.
        normals: [N, D] fixed standard normal draws, so that the result is a smooth function of theta.
        blocks: The partition.
        work: Array elements that one energy computes.
    """
    mode = find_mode(lambda one: terms_fn(theta, one), x, blocks)
    factor, _, half_log_det = factors(mode.hessian)
    shift = blocks.scatter(jnp.einsum("bij,nbj->nbi", factor, blocks.gather(normals, 0.0)))
    draws = mode.x + shift
    log_weights = jnp.full((draws.shape[0], blocks.num_blocks), -np.log(draws.shape[0]), draws.dtype)
    gradient, information = louis_information(terms_fn, theta, draws, log_weights, blocks, work, matched=True)
    return Expansion(mode, jnp.sum(half_log_det), gradient, information)


def fixed_normals(num: int, blocks: Blocks) -> np.ndarray:
    """[num, D] antithetic standard normals, the same in every run; within a block their second moments are exact.

    Exact moments matter where most of the information on a parameter is missing (an intercept that is confounded with
    its random effects): it is the small difference of two large numbers. Blocks too large for that get unit variances.
    """
    members = np.asarray(blocks.members)
    num_coordinates = len(blocks.of_coordinate)
    half = np.random.default_rng(20).standard_normal((num // 2, num_coordinates))
    draws = np.concatenate([half, -half])
    draws /= np.sqrt(np.mean(draws**2, 0))
    if 1 < blocks.width <= num // 4:
        inside = members < num_coordinates
        padded = np.where(inside, draws[:, np.minimum(members, num_coordinates - 1)], 0.0)  # [num, B, M]
        covariance = np.einsum("nbi,nbj->bij", padded, padded) / num + np.eye(blocks.width) * ~inside[:, None]
        white = np.einsum("bij,nbj->nbi", np.linalg.inv(np.linalg.cholesky(covariance)), padded)
        draws[:, members[inside]] = white[:, inside]
    return draws


class WarmStart(NamedTuple):
    """Where a warm start arrived.

    Attributes:
        theta: [P].
        mode: [D] mode of the latents there.
        iterations: Expansions used.
        converged: Whether the predicted gain of a further step became negligible.
    """

    theta: Array
    mode: Array
    iterations: int
    converged: bool


def warm_start(
    expand_fn: Callable[[Array, Array], Expansion], theta: Array, x: Array, bounded: np.ndarray
) -> WarmStart | None:
    """Walk towards the maximum of the Laplace approximation of the marginal likelihood.

    Args:
        expand_fn: ``(theta [P], x [D]) -> Expansion``, compiled.
        theta: [P] where to start.
        x: [D] where to start looking for the mode.
        bounded: [P] which coordinates of theta come from a constrained parameter.

    Returns:
        Where it ended, or None if there is no usable approximation at the start.
    """
    here = jax.device_get(expand_fn(theta, x))
    if not _usable(here):
        return None
    flat = np.asarray(theta)
    fraction, converged, k = 1.0, False, 1
    while k < WARM_ITERATIONS:
        step = fraction * _direction(here, bounded)
        predicted = -float(step @ here.gradient)
        if not np.isfinite(predicted) or predicted < GOOD_ENOUGH * fraction:
            converged = bool(np.isfinite(predicted))
            break
        there = jax.device_get(expand_fn(jnp.asarray(flat + step, flat.dtype), jnp.asarray(here.mode.x)))
        k += 1
        # The terms are subtracted first: totals of a million observations would cancel.
        change = np.sum(there.mode.terms.astype(float) - here.mode.terms) + there.half_log_det - here.half_log_det
        if _usable(there) and change < 0.0:
            flat, here, fraction = (flat + step).astype(flat.dtype), there, min(1.0, 2 * fraction)
        else:
            fraction /= 4
            if fraction < 1e-4:
                break
    return WarmStart(jnp.asarray(flat), jnp.asarray(here.mode.x), k, converged)


def _usable(expansion: Expansion) -> bool:
    numbers = (expansion.mode.terms, expansion.half_log_det, expansion.gradient, *expansion.information)
    return bool(expansion.mode.step < 10 * NEWTON_TOLERANCE) and all(np.all(np.isfinite(v)) for v in numbers)


def _direction(here: Expansion, bounded: np.ndarray) -> np.ndarray:
    # On the host and in double precision: a handful of small matrices is not worth a program.
    complete, missing = (np.asarray(v, float) for v in here.information[:2])
    diagonal = np.maximum(np.abs(np.diag(complete)), 1e-30)
    # What is missing on scales is only known up to noise: damp them.
    scale = 1 / np.sqrt(diagonal)
    observed = (complete - missing + np.diag(DAMPING * bounded * diagonal)) * scale[:, None] * scale
    values, vectors = np.linalg.eigh(observed)
    step = -scale * (
        vectors @ ((vectors.T @ (scale * here.gradient)) / np.maximum(np.abs(values), SMALLEST_EIGENVALUE))
    )
    longest = np.max(np.abs(step[bounded]), initial=0.0)
    return step * min(1.0, LONGEST_STEP / max(longest, 1e-30))
