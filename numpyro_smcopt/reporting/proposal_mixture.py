# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A distribution of known density that lies where the posterior lies, block by block.

    q(x) = sum_c alpha_c q_c(x)

The components: the Laplace approximation; a Gaussian with the moments of a cloud of particles; the same, twice as wide;
and the prior. The first makes Gaussian posteriors exact, the second and third follow skewness and heavy tails, the last
bounds the importance weights by the likelihood and looks where no particle has been (Hesterberg 1995). Nothing has to
be chosen between them, because the components are known to integrate to one: as control variates they make the mixture
as good as its best component, and often much better (Owen and Zhou 2000).

Draws are stratified. Each component has a fixed number of them, and those of a Gaussian come from a lattice that is
shifted at random: every draw has exactly the right law, and one coordinate taken by itself is covered evenly.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import logsumexp, ndtri

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.laplace import factors, find_mode
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import effective_sample_size

COUNTS = (64, 64, 32, 32)  # draws of each component; powers of two, for the lattice
SIZE = sum(COUNTS)
WIDER = 2.0
WIDEST = 4.0  # stands in for a prior that cannot be drawn from
TRUST = 2.0  # particles per coordinate that the Laplace approximation counts for beside the moments of the cloud


class ProposalMixture(NamedTuple):
    """The Gaussian components, in the coordinates ``z`` of each block: ``x = center + L z``.

    Attributes:
        center: [D] the mode.
        base: [K] energy terms there.
        factor: [B, M, M] ``L``, with ``L L^T`` the inverse Hessian.
        inverse: [B, M, M] its inverse.
        mean: [B, M] mean of the cloud in z.
        spread: [B, M, M] Cholesky factor of its covariance in z.
        tightness: [B, M, M] the inverse of ``spread``.
        laplace: [B] log evidence of each block by the Laplace approximation, relative to ``-base``.
        concave: [B] bool, whether there is such an approximation; elsewhere ``L`` is diagonal, from the cloud.
    """

    center: Array
    base: Array
    factor: Array
    inverse: Array
    mean: Array
    spread: Array
    tightness: Array
    laplace: Array
    concave: Array

    def to_z(self, x: Array, blocks: Blocks) -> Array:
        """One particle [D] in the coordinates of the blocks, [B, M]."""
        return jnp.einsum("bij,bj->bi", self.inverse, blocks.gather(x - self.center, 0.0))

    def from_z(self, z: Array, blocks: Blocks) -> Array:
        """Undo `to_z`."""
        return self.center + blocks.scatter(jnp.einsum("bij,bj->bi", self.factor, z))


def fit_mixture(terms_fn: Callable[[Array], Array], x: Array, log_weights: Array, blocks: Blocks) -> ProposalMixture:
    """Put a mixture where a cloud of particles [N, D] with normalised log weights [N, B] lies."""
    size, width = x.shape[1], blocks.width
    eye = jnp.eye(width, dtype=x.dtype)
    present = blocks.members < size
    heaviest = blocks.to_coordinates(jnp.argmax(log_weights, 0))
    mode = find_mode(terms_fn, jnp.take_along_axis(x, heaviest[None], 0)[0], blocks)
    factor, inverse, half_log_det = factors(mode.hessian)

    # A block without a proper mode takes its scales from the cloud.
    weights = jnp.exp(log_weights)
    of_x = blocks.to_coordinates(weights)
    average = jnp.sum(of_x * x, 0)
    deviation = jnp.sqrt(jnp.maximum(jnp.sum(of_x * (x - average) ** 2, 0), 1e-12))
    concave = jnp.all(jnp.isfinite(factor), (1, 2)) & jnp.isfinite(half_log_det)
    scale = blocks.gather(deviation, 1.0)
    factor = jnp.where(concave[:, None, None], factor, scale[:, :, None] * eye)
    inverse = jnp.where(concave[:, None, None], inverse, eye / scale[:, :, None])
    log_volume = jnp.where(concave, -half_log_det, jnp.sum(jnp.where(present, jnp.log(scale), 0.0), 1))
    center = jnp.where(blocks.to_coordinates(concave), mode.x, average)

    # Moments of the cloud, held to the Laplace approximation where the particles are few
    round_one = jnp.broadcast_to(eye, factor.shape)
    zeros = jnp.zeros((blocks.num_blocks, width), x.dtype)
    laplace = log_volume + jnp.sum(present, 1) * (0.5 * np.log(2 * np.pi)).astype(x.dtype)
    mixture = ProposalMixture(center, mode.terms, factor, inverse, zeros, round_one, round_one, laplace, concave)
    z = jax.vmap(lambda one: mixture.to_z(one, blocks))(x)
    ess = effective_sample_size(log_weights)
    share = (ess / (ess + TRUST * width))[:, None]
    mean = jnp.einsum("nb,nbi->bi", weights, z)
    centred = z - mean
    covariance = jnp.einsum("nb,nbi,nbj->bij", weights, centred, centred)
    covariance = covariance + jnp.where(present, 0.0, 1.0)[..., None] * eye  # what is padded has no volume
    spread = jnp.linalg.cholesky(share[..., None] * covariance + (1 - share[..., None]) * eye)
    sound = jnp.all(jnp.isfinite(spread), (1, 2)) & jnp.all(jnp.isfinite(mean), 1)
    spread = jnp.where(sound[:, None, None], spread, eye)
    tightness = jax.scipy.linalg.solve_triangular(spread, jnp.broadcast_to(eye, spread.shape), lower=True)
    mean = jnp.where(sound[:, None], share * mean, 0.0)
    return mixture._replace(mean=mean, spread=spread, tightness=tightness)


def draw_uniforms(rng: np.random.Generator, num: int, with_prior: bool, size: int) -> np.ndarray:
    """[num, C, 2, D] the randomness of ``num`` calls of `draw_mixture`, C Gaussian components each.

    It comes from the host, because a call of the generator takes longer to compile than everything around it.
    """
    return rng.uniform(size=(num, len(COUNTS) - with_prior, 2, size))


def draw_mixture(uniforms: Array, mixture: ProposalMixture, blocks: Blocks, prior: Array | None) -> Array:
    """[SIZE, D] draws, those of each component together.

    ``uniforms [C, 2, D]`` are those of `draw_uniforms`; ``prior [COUNTS[-1], D]`` is None if it cannot be drawn from.
    """
    counts = COUNTS[: uniforms.shape[0]]
    normals = [blocks.gather(_lattice(u, n), 0.0) for u, n in zip(uniforms, counts, strict=True)]
    skewed = lambda z: mixture.mean + jnp.einsum("bij,nbj->nbi", mixture.spread, z)  # noqa: E731
    z = [normals[0], skewed(normals[1]), *(skewed(s * z) for s, z in zip((WIDER, WIDEST), normals[2:], strict=False))]
    x = jax.vmap(lambda z: mixture.from_z(z, blocks))(jnp.concatenate(z))
    return x if prior is None else jnp.concatenate([x, prior])


def log_densities(mixture: ProposalMixture, x: Array, log_prior: Array | None, blocks: Blocks) -> tuple[Array, Array]:
    """Log densities of the components, [C, B], and of the mixture, [B], at one particle.

    ``log_prior [B]`` is the log density of the prior, or None if it is no component.
    """
    z = mixture.to_z(x, blocks)
    dimension = jnp.sum(blocks.members < x.shape[0], 1)
    log_tightness = jnp.sum(jnp.log(jnp.diagonal(mixture.tightness, axis1=1, axis2=2)), 1)
    near = jnp.sum(z**2, 1)
    far = jnp.sum(jnp.einsum("bij,bj->bi", mixture.tightness, z - mixture.mean) ** 2, 1)

    def wide(scale: float) -> Array:
        return log_tightness - mixture.laplace - dimension * np.log(scale) - far / (2 * scale**2)

    last = wide(WIDEST) if log_prior is None else log_prior
    logs = jnp.stack([-mixture.laplace - near / 2, wide(1.0), wide(WIDER), last]).astype(x.dtype)
    shares = np.log(np.array(COUNTS) / SIZE)[:, None].astype(x.dtype)
    return logs, logsumexp(logs + shares, 0)


def _lattice(uniforms: Array, num: int) -> Array:
    """[num, D] standard normals: evenly spaced quantiles, visited in strides of a random odd length, shifted at random.

    Args:
        uniforms: [2, D].
        num: A power of two.
    """
    stride = 2 * jnp.floor(uniforms[0] * (num // 2)).astype(jnp.int32) + 1
    places = (jnp.arange(num)[:, None] * stride) % num
    # Shifted all the way round: otherwise the first draw would be extreme in every coordinate at once.
    quantiles = (places.astype(uniforms.dtype) / num + uniforms[1]) % 1
    tiny = jnp.finfo(uniforms.dtype).eps / 2
    return ndtri(jnp.clip(quantiles, tiny, 1 - tiny))
