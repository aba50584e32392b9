# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Observed information from weighted particles, by Louis' identity.

    I(theta) = H - V,      H = E_pi[ d2U/dtheta2 ],      V = sum_b Cov_pi( dU_b/dtheta )

``H`` is the information of the complete data, ``V`` what is missing because the latents are not observed; the
covariance falls apart into the independent blocks. Source: Louis 1982.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import small_sample_factor

DIRECTIONS_AT_ONCE_BUDGET = 3e7  # numbers held by one batch of directional derivatives
RESOLVED = 1e-6  # eigenvalue of a complete-data information, relative to its largest: less is rounding
ROUNDING = 32.0  # in units of the precision: the relative spread of a score below which it has none


class Information(NamedTuple):
    """Complete and missing information of a flat ``theta``.

    Attributes:
        complete: [P, P] ``H``.
        missing: [P, P] ``V``.
        largest_share: [] the largest share of a single block in the missing information, relative to ``H``.
    """

    complete: Array
    missing: Array
    largest_share: Array


class Fisher(NamedTuple):
    """Fisher information of a flat ``theta``, estimated.

    Attributes:
        matrix: [P, P]; rows and columns of coordinates on which the law does not depend are zero.
        draws: [] how many particles of equal weight it is worth.
    """

    matrix: Array
    draws: Array


def louis_information(
    terms_fn: Callable[[Any, Array], Array],
    theta: Any,
    x: Array,
    log_weights: Array,
    blocks: Blocks,
    work: int = 1,
    *,
    directions: Any = None,
    matched: bool = False,
) -> tuple[Array, Information]:
    """Expected gradient [P] of the energy, and complete and missing information, at ``theta``.

    Args:
        terms_fn: ``(theta [P], x [D]) -> [K]``.
        theta: [P] flat unconstrained parameters; a pytree if there are ``directions``.
        x: [N, D] particles.
        log_weights: [N, B] their normalised log weights.
        blocks: The partition.
        work: Array elements that one energy computes; decides how many directions fit into memory at once.
        directions: Like ``theta`` with a leading axis [P]: what is differentiated along; by default its coordinates.
        matched: Whether the particles have exactly the right second moments, so that their covariances need no
            small-sample factor.
    """
    num_particles, num_terms = x.shape[0], blocks.of_term.shape[0]
    weights = jnp.exp(log_weights)
    of_term = blocks.to_terms(weights, 1 / num_particles)

    def energies_and_gradient(t: Any) -> tuple[Array, Array]:
        def of_particle(one: Array, coefficients: Array) -> tuple[Array, Any]:
            terms, vjp = jax.vjp(lambda t: terms_fn(t, one), t)
            return terms, vjp(coefficients)[0]

        # One gradient for each particle, then their sum: XLA for CPUs takes three times as long to contract particles
        # and observations at once, as in the slopes of a matrix of loadings.
        terms, gradients = jax.vmap(of_particle)(x, of_term)
        return blocks.sum_terms(terms), jax.tree.map(lambda v: v.sum(0), gradients)

    def along(direction: Any) -> tuple[Array, Any]:
        return jax.jvp(energies_and_gradient, (theta,), (direction,))[1]

    given = jnp.eye(theta.shape[0], dtype=theta.dtype) if directions is None else directions
    num_directions = jax.tree.leaves(given)[0].shape[0]
    batch = max(1, min(num_directions, int(DIRECTIONS_AT_ONCE_BUDGET / (num_particles * max(num_terms, work)))))
    mapped = jax.vmap(along) if batch == num_directions else partial(lax.map, along, batch_size=batch)
    slopes, complete = mapped(given)  # [P, N, B], and like the directions
    _, gradient = energies_and_gradient(theta)
    if directions is not None:
        gradient, complete = along_each(directions, gradient), jax.vmap(partial(along_each, directions))(complete)
    factor = 1.0 if matched else jax.vmap(small_sample_factor, in_axes=1)(log_weights)
    centred = jnp.where(weights > 0, slopes, 0.0)
    # Not `sum(weights * centred, 1)`: XLA for CPUs (jaxlib 0.10.2) miscompiles that sum if it is subtracted from its
    # own summand, by several percent from about 20,000 numbers on.
    mean = jnp.einsum("nb,pnb->pb", weights, centred, precision="highest")
    centred = (centred - mean[:, None]) * jnp.sqrt(weights * factor)
    flat = centred.reshape(num_directions, -1)
    per_block = jnp.sum(jnp.sum(centred**2, 1) / jnp.maximum(jnp.abs(jnp.diag(complete)), 1e-30)[:, None], 0)
    share = jnp.max(per_block) / jnp.maximum(jnp.sum(per_block), 1e-30)
    return gradient, Information((complete + complete.T) / 2, jnp.matmul(flat, flat.T, precision="highest"), share)


def along_each(directions: Any, gradient: Any) -> Array:
    """[P] derivatives along directions, from a gradient; both pytrees, the directions with a leading axis [P]."""
    product = lambda d, g: jnp.tensordot(d, g, g.ndim, precision="highest")  # noqa: E731
    return jax.tree.reduce(jnp.add, jax.tree.map(product, directions, gradient))


def fisher_information(scores: Array, log_weights: Array) -> Fisher:
    """``Cov_pi( grad_theta U )``, the Fisher information of the family ``pi_theta``.

    Args:
        scores: [N, P] gradients of the energy in theta at the particles.
        log_weights: [N] their normalised log weights.
    """
    weights = jnp.exp(log_weights)
    scores = jnp.where(weights[:, None] > 0, scores, 0.0)
    mean = jnp.einsum("n,np->p", weights, scores, precision="highest")  # not `sum`: see `louis_information`
    centred = scores - mean
    # Twice, because what is left of a large mean after the first is rounding.
    centred = centred - jnp.einsum("n,np->p", weights, centred, precision="highest")
    centred = centred * jnp.sqrt(weights * small_sample_factor(log_weights))[:, None]
    matrix = jnp.matmul(centred.T, centred, precision="highest")
    # A coordinate that shifts all energies alike, the last bias of a network, has rounding for a variance.
    square = jnp.einsum("n,np->p", weights, scores**2, precision="highest")
    known = jnp.diag(matrix) > (ROUNDING * jnp.finfo(matrix.dtype).eps) ** 2 * square
    return Fisher(jnp.where(known & known[:, None], matrix, 0.0), 1 / jnp.sum(weights**2))


def whitening(information: np.ndarray) -> np.ndarray:
    """[P, P] ``L`` with ``L^T H L`` near the identity for a complete-data information ``H [P, P]``.

    It is the root of the inverse that is symmetric up to units, so that each column stays as near to the coordinate of
    its number as it can. Columns are long but finite where ``H`` has no rank, and of unit length where it is zero.
    """
    information = np.where(np.isfinite(information), information, 0.0)
    size = np.sqrt(np.abs(np.diag(information)))
    scale = 1 / np.where(size > 0, size, 1.0)
    correlation = np.where(size[:, None] * size > 0, information * scale[:, None] * scale, np.eye(len(size)))
    values, vectors = np.linalg.eigh((correlation + correlation.T) / 2)
    floored = np.maximum(np.abs(values), RESOLVED * np.max(np.abs(values), initial=0.0))
    return scale[:, None] * (vectors / np.sqrt(floored)) @ vectors.T
