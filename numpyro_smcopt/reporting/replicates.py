# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Independent sets of draws ("replicates") at a fixed theta, and the marginal likelihood that they give.

    p_theta(y) = prod_b Z_b,      Z_b = E_q[ exp(-U_b(x)) / q_b(x) ]

The draws of a replicate come from the `proposal_mixture` q and are weighed. The components of q have known integrals,
so the means of ``q_c / q`` serve as control variates; the slope that one half of the replicates uses is found in the
other half, so nothing is biased, and the spread over the replicates is the error (Owen and Zhou 2000).

Where q is too poor for that, a replicate is a tempered population instead: a sequential Monte Carlo sampler along
``q^(1 - beta) exp(-beta U)``, from q or, for a block of which q has missed something, from the prior.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import InvariantKernel, Step
from numpyro_smcopt.kernels.preconditioners import Curvature
from numpyro_smcopt.population import tempering
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.reporting.proposal_mixture import COUNTS, SIZE, ProposalMixture, draw_mixture, log_densities
from numpyro_smcopt.types import Array, Theta

LARGEST_LOG = 60.0  # of a weight relative to the Laplace approximation
FEWEST_EFFECTIVE = 100.0  # draws of a block, below which the replicates are tempered
MISSED = 10.0  # how much heavier the posterior's own particles may be than the weighted draws
RIDGE = 1e-6


class Draws(NamedTuple):
    """Weighted particles of the posterior; a leading axis [R] for independent sets of them.

    Attributes:
        x: [N, D] particles.
        log_weights: [N, B] log weights, not normalised.
    """

    x: Array
    log_weights: Array


def equal_draws(x: Array, blocks: Blocks) -> Draws:
    """Particles [..., N, D] of equal weight."""
    return Draws(x, jnp.zeros((*x.shape[:-1], blocks.num_blocks), x.dtype))


def resampled(draws: Draws, heights: Array, blocks: Blocks) -> Array:
    """[S, D] draws that lie, block by block, at heights [S, B] of the cumulative weights."""
    ends = jnp.cumsum(jax.nn.softmax(draws.log_weights, 0), 0)
    ends = ends / ends[-1]
    search = jax.vmap(lambda ends, heights: jnp.searchsorted(ends, heights, side="right"), in_axes=1, out_axes=1)
    chosen = jnp.minimum(search(ends, heights), draws.x.shape[0] - 1)
    return jnp.take_along_axis(draws.x, blocks.to_coordinates(chosen), 0)


class BlockEvidence(NamedTuple):
    """Estimates in double precision, on the host.

    Attributes:
        log_evidence: [B] relative to the Laplace approximation.
        variance: [B] relative variance of the evidence.
        ess: [B] effective number of draws.
        missed: [B] bool, whether the mixture misses part of the posterior.
    """

    log_evidence: np.ndarray
    variance: np.ndarray
    ess: np.ndarray
    missed: np.ndarray

    @property
    def trustworthy(self) -> bool:
        """Drawing from the mixture suffices."""
        return bool(np.all((self.ess >= FEWEST_EFFECTIVE) & ~self.missed))


# -- drawing from the mixture --------------------------------------------------------------------------------------
def weigh_replicates(
    rng_key: Array,
    uniforms: Array,
    target: Target,
    theta: Theta,
    mixture: ProposalMixture,
    blocks: Blocks,
    probes: Array,
) -> tuple[Draws, Array, Array]:
    """Draw from the mixture and weigh.

    The key draws from the prior, ``uniforms [R, C, 2, D]`` of `proposal_mixture.draw_uniforms` from the other
    components. The probes [N, D] are particles of the posterior.

    Returns:
        R replicates; [R, B, C + 1, C + 1] the mean of ``v v^T`` over the draws of each, ``v`` being one, the weight w
        relative to the Laplace approximation, and ``r_c = q_c / q - 1`` for all components but the last; and [N, B]
        log weights that the probes would have had.
    """
    terms_fn, flat, _ = flat_terms(target, theta)
    from_prior, mask = target.sites.can_draw_prior, jnp.asarray(target.sites.prior_mask)
    num = uniforms.shape[0]

    def weigh(x: Array) -> tuple[Array, Array]:
        terms = terms_fn(flat, x)
        log_prior = -blocks.sum_terms(jnp.where(mask, terms, 0.0)) if from_prior else None
        each, density = log_densities(mixture, x, log_prior, blocks)
        log_weight = -blocks.sum_terms(terms - mixture.base) - density - mixture.laplace
        log_weight = jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf)
        weight = jnp.exp(jnp.minimum(log_weight, LARGEST_LOG))
        return log_weight, jnp.stack([jnp.ones_like(weight), weight, *(jnp.exp(each[:-1] - density) - 1)])

    def moments(chunk: Array) -> tuple[Array, Array]:
        log_weights, v = jax.vmap(weigh)(chunk)  # [N, B], [N, C + 1, B]
        return log_weights, jnp.einsum("nib,njb->bij", v, v, precision="highest") / chunk.shape[0]

    if from_prior:
        prior = draw_priors(rng_key, target, theta, num * COUNTS[-1]).reshape(num, COUNTS[-1], -1)
        x = jax.vmap(lambda u, prior: draw_mixture(u, mixture, blocks, prior))(uniforms, prior)
    else:
        x = jax.vmap(lambda u: draw_mixture(u, mixture, blocks, None))(uniforms)
    # The probes pass in chunks of the same size, so that the model is compiled once.
    rows = -(-probes.shape[0] // SIZE)
    padded = probes[jnp.arange(rows * SIZE) % probes.shape[0]].reshape(rows, SIZE, -1)
    log_weights, found = jax.lax.map(moments, jnp.concatenate([x, padded]))
    at_probes = log_weights[num:].reshape(rows * SIZE, -1)[: probes.shape[0]]
    return Draws(x, log_weights[:num]), found[:num], at_probes


def draw_priors(rng_key: Array, target: Target, theta: Theta, num: int) -> Array:
    """[num, D] draws of the latents from their prior."""
    return jax.vmap(lambda key: target.draw_prior(key, theta))(random.split(rng_key, num))


def combine_weighed(moments: np.ndarray, at_probes: np.ndarray, probe_log_weights: np.ndarray) -> BlockEvidence:
    """Log evidence of each block with its error.

    Both arrays of probes are [N, B]: log weights that they would have had as draws from the mixture, and normalised
    ones that they have as particles of the posterior. The moments [R, B, C + 1, C + 1] are those of `weigh_replicates`.
    """
    moments = np.asarray(moments, float)
    num, tiny = len(moments), np.finfo(float).tiny
    weights, ratios = moments[:, :, 0, 1], moments[:, :, 0, 2:]
    values, first = np.array(weights), np.arange(num) < num // 2
    for mine in (first, ~first):
        other = moments[~mine].mean(0)
        ratio = other[:, 0, 2:]
        covariance = other[:, 2:, 2:] - ratio[:, :, None] * ratio[:, None, :]
        scale = 1 + np.trace(covariance, axis1=1, axis2=2)[:, None, None]
        covariance = covariance + RIDGE * scale * np.eye(covariance.shape[-1])
        with_weight = other[:, 1, 2:] - other[:, 0, 1, None] * ratio
        slope = np.linalg.solve(covariance, with_weight[..., None])[..., 0]
        values[mine] -= np.einsum("rbc,bc->rb", ratios[mine], slope)
    values = np.where(values.mean(0) > 0, values, weights)  # a slope from a handful of draws may be wild
    mean, weight = np.maximum(values.mean(0), tiny), np.maximum(weights.mean(0), tiny)
    concentration = np.maximum(moments[:, :, 1, 1].mean(0) / weight**2, 1.0)
    own = np.exp(probe_log_weights + np.minimum(at_probes, LARGEST_LOG)).sum(0) / weight
    variance = values.var(0, ddof=1) / num / mean**2
    return BlockEvidence(np.log(mean), variance, num * SIZE / concentration, ~(own <= MISSED * concentration))


# -- tempering -----------------------------------------------------------------------------------------------------
def temper_replicate(
    rng_key: Array,
    uniforms: Array,
    target: Target,
    theta: Theta,
    mixture: ProposalMixture,
    blocks: Blocks,
    missed: Array,
    kernel: InvariantKernel,
) -> tempering.Tempered:
    """One replicate, tempered from the mixture, or from the prior where the mixture has missed something.

    Its log evidence is relative to the Laplace approximation. ``uniforms [C, 2, D]`` draw from the mixture; ``missed
    [B]`` says which blocks start from the prior, if it can be drawn from.
    """
    terms_fn, flat, _ = flat_terms(target, theta)
    from_prior, mask = target.sites.can_draw_prior, jnp.asarray(target.sites.prior_mask)
    key_prior, key_move = random.split(rng_key)
    missed = missed & from_prior
    prior = draw_priors(key_prior, target, theta, SIZE) if from_prior else None
    x = draw_mixture(uniforms, mixture, blocks, None if prior is None else prior[-COUNTS[-1] :])
    if prior is not None:
        x = jnp.where(blocks.to_coordinates(missed), prior, x)

    # The path's start, and what the target has beside it, are one term each for every block.
    def two_terms(x: Array) -> Array:
        terms = terms_fn(flat, x)
        log_prior = -blocks.sum_terms(jnp.where(mask, terms, 0.0))
        _, density = log_densities(mixture, x, log_prior if from_prior else None, blocks)
        start = -jnp.where(missed, log_prior, density)
        return jnp.concatenate([start, blocks.sum_terms(terms - mixture.base) - start])

    numbers = jnp.arange(blocks.num_blocks, dtype=jnp.int32)
    pairs = jnp.stack([numbers, numbers + blocks.num_blocks], 1)
    paired = blocks._replace(of_term=jnp.tile(numbers, 2), terms=pairs)
    curvature = None
    if kernel.preconditioning.dense and blocks.width > 1:
        hessian = jnp.einsum("bji,bjk->bik", mixture.inverse, mixture.inverse)
        curvature = Curvature(hessian, jnp.zeros_like(hessian))
    size = jnp.full(blocks.num_blocks, kernel.step_size, x.dtype)
    step = Step(size, tempering.identity_like(mixture.center, curvature))
    starts = jnp.arange(2 * blocks.num_blocks) < blocks.num_blocks
    cold = jnp.zeros(blocks.num_blocks, x.dtype)
    done = tempering.temper(key_move, two_terms, x, starts, paired, kernel, step, curvature, cold)
    return done._replace(log_evidence=done.log_evidence - mixture.laplace)


def combine_tempered(log_evidence: np.ndarray) -> BlockEvidence:
    """Log evidence of each block with its error, from the estimates [R, B] of tempered replicates."""
    logs = np.asarray(log_evidence, float)
    num, num_blocks = logs.shape
    top = logs.max(0)
    values = np.exp(logs - top)
    mean = values.mean(0)
    # A block is as reliable as the replicates agree on it.
    variance = values.var(0, ddof=1) / num / mean**2
    ess = num * SIZE / (1 + num * variance)
    return BlockEvidence(top + np.log(mean), variance, ess, np.zeros(num_blocks, bool))
