# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Latents that move along with theta, so that derivatives of the marginal likelihood lose their noise.

For any smooth map ``phi_delta`` of the latents with ``phi_0 = id``,

    p_{theta + delta}(y) = int exp(-U_{theta + delta}(phi_delta(x))) |det dphi_delta / dx| dx,

so the energy may be replaced by ``psi(delta, x) = U_{theta + delta}(phi_delta(x)) - log |det dphi_delta / dx|``
wherever the marginal likelihood is differentiated in delta: the expectations of Fisher's and Louis' identities stay
what they are, for every such map. Their noise does not. With the map that carries the Laplace approximation of
``pi_theta`` to that of ``pi_{theta + delta}``,

    phi_delta(x) = x_hat + L (alpha . delta + exp(beta . delta) z),      x = x_hat + L z,  L L^T = H^-1,
    alpha_p = -L^T d_p grad_x U,      beta_p = -1/2 L^T (d_p + d_p x_hat . grad_x) H L,

``psi`` hardly depends on x: to first order not at all where the posterior is Gaussian. Nothing then is missing from the
information, and gradient and Hessian are exact up to what is not Gaussian. The density must be continuous in x.

The map is the "targeted perturbation" of Jarzynski 2002; the gradient alone is a Stein control variate.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.laplace import hessian_blocks
from numpyro_smcopt.reporting.proposal_mixture import ProposalMixture
from numpyro_smcopt.types import Array


class Moved(NamedTuple):
    """A theta, and how the latents of each block have moved on the way to it, in the coordinates of a mixture.

    With a leading axis [P] it is P directions of the two: ``shift`` is then ``alpha`` and ``growth`` ``beta``. To move
    along all of them at once would take a sum over P in every evaluation.

    Attributes:
        theta: [P] flat.
        shift: [B, M] ``alpha . delta``; [0] if the latents stay.
        growth: [B, M, M] ``beta . delta``; [0] if they stay.
    """

    theta: Array
    shift: Array
    growth: Array

    @property
    def still(self) -> bool:
        """True if the latents stay where they are."""
        return self.shift.shape[-1] == 0

    def log_volume_slopes(self) -> Array:
        """[P, B] derivatives along directions of the ``log |det dT / dx|`` of each block; they are linear in delta."""
        return jnp.einsum("pbii->pb", self.growth)


def still_directions(columns: Array) -> Moved:
    """Directions ``columns [P, P]`` of theta along which the latents stay."""
    nowhere = jnp.zeros((columns.shape[1], 0), columns.dtype)
    return Moved(columns.T, nowhere, nowhere)


def laplace_transport(
    terms_fn: Callable[[Array, Array], Array], theta: Array, columns: Array, mixture: ProposalMixture, blocks: Blocks
) -> Moved:
    """Directions ``columns [P, P]`` of theta, along which the latents follow mode and curvature.

    ``terms_fn`` is ``(theta [P], x [D]) -> [K]``. A block of the mixture without a proper mode does not move.
    """
    x, factor = mixture.center, mixture.factor
    gradient = lambda t, x: jax.grad(lambda x: jnp.sum(terms_fn(t, x)))(x)  # noqa: E731
    hessian = lambda t, x: hessian_blocks(lambda x: gradient(t, x), x, blocks)  # noqa: E731

    def along(direction: Array) -> tuple[Array, Array]:
        _, slope = jax.jvp(lambda t: gradient(t, x), (theta,), (direction,))
        shift = -jnp.einsum("bji,bj->bi", factor, blocks.gather(slope, 0.0))
        velocity = blocks.scatter(jnp.einsum("bij,bj->bi", factor, shift))
        _, change = jax.jvp(hessian, (theta, x), (direction, velocity))
        return shift, -0.5 * jnp.einsum("bji,bjk,bkl->bil", factor, change, factor)

    shift, growth = lax.map(along, columns.T)
    finite = [jnp.all(jnp.isfinite(v), (0, *range(2, v.ndim))) for v in (shift, growth)]
    moving = mixture.concave & finite[0] & finite[1]
    keep = lambda v: jnp.where(moving.reshape(1, -1, *[1] * (v.ndim - 2)), v, 0.0)  # noqa: E731
    return Moved(columns.T, keep(shift), keep(growth))


def moved_terms(
    terms_fn: Callable[[Array, Array], Array], mixture: ProposalMixture, blocks: Blocks
) -> Callable[[Moved, Array], Array]:
    """``(Moved, x [D]) -> [K]``, the energy terms of ``U_{theta + delta}(phi_delta(x))``, right to second order.

    What is missing of ``psi`` is the log volume, which does not depend on x: see `Moved.log_volume_slopes`.
    """

    def terms(moved: Moved, x: Array) -> Array:
        once = jnp.einsum("bij,bj->bi", moved.growth, mixture.to_z(x, blocks))
        twice = jnp.einsum("bij,bj->bi", moved.growth, once)
        move = moved.shift + once + twice / 2
        return terms_fn(moved.theta, x + blocks.scatter(jnp.einsum("bij,bj->bi", mixture.factor, move)))

    return terms
