# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Stein control variates: weights that know what some expectations must be.

For any smooth field ``a(x)``, ``E_pi[ a . grad_x U - div a ] = 0`` (integrate by parts). With ``z = (x - m) / s`` and
``v = s grad_x U`` in the coordinates of one block this gives functions with known mean zero,

    c_j = v_j,        c_jk = z_j v_k + z_k v_j - 2 [j = k],

made of gradients that the sampler has computed anyway. A regression estimate that uses them equals a weighted mean with
*calibrated* weights, whatever is averaged. Half of the particles regresses, the other half says how far the means are
off, and then the other way round, so that no bias of order 1/N is left:

    w~_i = w_i (1 - (c_i - c_A)^T V_A^-1 c_B) / 2,     i in half A;  c_A, V_A mean and covariance there.

The log density of a Gaussian model is quadratic in x, and then the gradient in theta has no Monte Carlo error at all.

The identity needs a density that is continuous in x. Source: Mira, Solgi and Imparato 2013; Oates, Girolami and Chopin
2017; calibration as in Deville and Sarndal 1992.
"""

from functools import partial

import jax
import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import block_moments

PARTICLES_PER_VARIATE = 8
RIDGE = 1e-4


def calibrated_weights(x: Array, grad: Array, log_weights: Array, blocks: Blocks) -> Array:
    """Weights under which the control variates have mean zero, to first order.

    Args:
        x: [N, D] particles.
        grad: [N, D] gradients of the energy in ``x``.
        log_weights: [N, B] normalised log weights.
        blocks: The partition.

    Returns:
        [N, B] weights that sum to one per block; some may be negative. The plain weights if N is too small.
    """
    num_particles = x.shape[0]
    variates = _variates(x, grad, log_weights, blocks, num_particles // PARTICLES_PER_VARIATE)
    if variates is None:
        return jnp.exp(log_weights)
    variates, weights = _halves(variates, 0.0), jax.nn.softmax(_halves(log_weights, -jnp.inf), axis=1)
    # A half without weight has nothing to say.
    usable = jnp.all(jnp.isfinite(weights), (0, 1))
    weights = jnp.where(usable, weights, 1 / weights.shape[1])
    einsum = partial(jnp.einsum, precision="highest")
    mean = einsum("hnb,hnbc->hbc", weights, variates)
    centred = variates - mean[:, None]
    covariance = einsum("hnbc,hnbd->hbcd", weights[..., None] * centred, centred)
    ridge = RIDGE * (jnp.diagonal(covariance, axis1=2, axis2=3) + 1e-3)
    factor = jnp.linalg.cholesky(covariance + ridge[..., None] * jnp.eye(mean.shape[-1], dtype=x.dtype))
    slope = jax.scipy.linalg.cho_solve((factor, True), mean[::-1, ..., None])[..., 0]
    calibrated = weights * (1 - einsum("hnbc,hbc->hnb", centred, slope)) / 2
    calibrated = calibrated.reshape(-1, blocks.num_blocks)[:num_particles]
    sound = usable & jnp.all(jnp.isfinite(calibrated), 0)
    return jnp.where(sound, calibrated, jnp.exp(log_weights))


def _halves(values: Array, fill: float) -> Array:
    """[N, ...] to [2, N / 2, ...], filled up if N is odd."""
    if values.shape[0] % 2:
        values = jnp.concatenate([values, jnp.full((1, *values.shape[1:]), fill, values.dtype)])
    return values.reshape(2, -1, *values.shape[1:])


def _variates(x: Array, grad: Array, log_weights: Array, blocks: Blocks, most: int) -> Array | None:
    """[N, B, C] as many control variates per block as ``most`` allows, in the order of their use."""
    width = blocks.width
    mean, variance = block_moments(log_weights, x, blocks)
    scale = jnp.sqrt(jnp.maximum(variance, 1e-30))
    z, v = blocks.gather((x - mean) / scale, 0.0), blocks.gather(grad * scale, 0.0)  # [N, B, M]
    present = (blocks.members < x.shape[1]).astype(x.dtype)
    own = 2 * (z * v - present)
    if width + width * (width + 1) // 2 <= most:
        j, k = jnp.triu_indices(width, 1)
        return jnp.concatenate([v, own, z[..., j] * v[..., k] + z[..., k] * v[..., j]], -1)
    if 2 * width <= most:
        return jnp.concatenate([v, own], -1)
    if width + 1 <= most:
        return jnp.concatenate([v, own.sum(-1, keepdims=True)], -1)
    # The centre m is a mean over the particles, so E[(x_i - m) v_i] is 1 - w_i, not 1. (Above, where v itself is a
    # variate, the centre makes no difference.)
    alone = own + 2 * present * jnp.exp(log_weights)[..., None]
    return alone.sum(-1, keepdims=True) if most >= 1 else None
