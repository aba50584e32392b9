# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Independent sets of draws ("islands") at a fixed theta, and the marginal likelihood that they give.

    p_theta(y) = prod_b Z_b,      Z_b = E_q[ exp(-U_b(x)) / q_b(x) ]

The draws of an island come from the `reference` mixture q and are weighed. The components of q have known integrals, so
the means of ``q_c / q`` serve as control variates; the slope that one half of the islands uses is found in the other
half, so nothing is biased, and the spread over the islands is the error (Owen and Zhou 2000).

Where q is too poor for that, an island is a tempered population instead: a sequential Monte Carlo sampler along
``q^(1 - beta) exp(-beta U)``, from the reference or, for a block whose reference has missed something, from the prior.
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
from numpyro_smcopt.reporting.reference import COUNTS, SIZE, Reference, draw_reference, log_densities
from numpyro_smcopt.types import Array, Theta

LARGEST_LOG = 60.0  # of a weight relative to the Laplace approximation
FEWEST_EFFECTIVE = 100.0  # draws of a block, below which the islands are tempered
MISSED = 10.0  # how much heavier the posterior's own particles may be than the weighted draws
RIDGE = 1e-6


class Islands(NamedTuple):
    """Weighted particles of the posterior, in R independent sets.

    Attributes:
        x: [R, N, D] particles.
        log_weights: [R, N, B] log weights, not normalised.
    """

    x: Array
    log_weights: Array


class Tally(NamedTuple):
    """What each island contributes: means over its draws; ``r_c = q_c / q - 1`` for all components but the last.

    Attributes:
        weight: [R, B] of ``w``, relative to the Laplace approximation.
        square: [R, B] of ``w^2``.
        ratio: [R, B, C - 1] of ``r``.
        ratio_square: [R, B, C - 1, C - 1] of ``r r^T``.
        product: [R, B, C - 1] of ``w r``.
    """

    weight: Array
    square: Array
    ratio: Array
    ratio_square: Array
    product: Array


class BlockEvidence(NamedTuple):
    """Estimates in double precision, on the host.

    Attributes:
        log_evidence: [B] relative to the Laplace approximation.
        variance: [B] relative variance of the evidence.
        ess: [B] effective number of draws.
        missed: [B] bool, whether the reference misses part of the posterior.
    """

    log_evidence: np.ndarray
    variance: np.ndarray
    ess: np.ndarray
    missed: np.ndarray

    @property
    def trustworthy(self) -> bool:
        """Whether drawing from the reference suffices."""
        return bool(np.all((self.ess >= FEWEST_EFFECTIVE) & ~self.missed))


# -- drawing from the reference ------------------------------------------------------------------------------------
def weigh_islands(
    rng_key: Array,
    uniforms: Array,
    target: Target,
    theta: Theta,
    reference: Reference,
    blocks: Blocks,
    probes: Array,
) -> tuple[Islands, Tally, Array]:
    """Draw from the reference and weigh.

    Args:
        rng_key: Randomness of the draws from the prior.
        uniforms: [R, C, 2, D] randomness of the others, from `reference.draw_uniforms`.
        target: The target.
        theta: Where.
        reference: The Gaussian components of q.
        blocks: The partition.
        probes: [N, D] particles of the posterior.

    Returns:
        The islands, their tallies, and the log weights [N, B] that the probes would have had.
    """
    terms_fn, flat, _ = flat_terms(target, theta)
    from_prior, mask = target.sites.can_draw_prior, jnp.asarray(target.sites.prior_mask)
    num = uniforms.shape[0]

    def weigh(x: Array) -> tuple[Array, Array]:
        terms = terms_fn(flat, x)
        log_prior = -blocks.sum_terms(jnp.where(mask, terms, 0.0)) if from_prior else None
        each, mixture = log_densities(reference, x, log_prior, blocks)
        log_weight = -blocks.sum_terms(terms - reference.base) - mixture - reference.laplace
        return jnp.where(jnp.isfinite(log_weight), log_weight, -jnp.inf), jnp.exp(each[:-1] - mixture) - 1

    def tally(chunk: Array) -> tuple[Array, Tally]:
        log_weights, ratios = jax.vmap(weigh)(chunk)  # [N, B], [N, C - 1, B]
        weights = jnp.exp(jnp.minimum(log_weights, LARGEST_LOG))
        return log_weights, Tally(
            weights.mean(0),
            (weights**2).mean(0),
            ratios.mean(0).T,
            jnp.einsum("ncb,ndb->bcd", ratios, ratios) / chunk.shape[0],
            jnp.einsum("nb,ncb->bc", weights, ratios) / chunk.shape[0],
        )

    if from_prior:
        prior = draw_priors(rng_key, target, theta, num * COUNTS[-1]).reshape(num, COUNTS[-1], -1)
        x = jax.vmap(lambda u, prior: draw_reference(u, reference, blocks, prior))(uniforms, prior)
    else:
        x = jax.vmap(lambda u: draw_reference(u, reference, blocks, None))(uniforms)
    # The probes pass in chunks of the same size, so that the model is compiled once.
    rows = -(-probes.shape[0] // SIZE)
    padded = probes[jnp.arange(rows * SIZE) % probes.shape[0]].reshape(rows, SIZE, -1)
    log_weights, tallies = jax.lax.map(tally, jnp.concatenate([x, padded]))
    at_probes = log_weights[num:].reshape(rows * SIZE, -1)[: probes.shape[0]]
    return Islands(x, log_weights[:num]), jax.tree.map(lambda v: v[:num], tallies), at_probes


def draw_priors(rng_key: Array, target: Target, theta: Theta, num: int) -> Array:
    """[num, D] draws of the latents from their prior."""
    return jax.vmap(lambda key: target.draw_prior(key, theta))(random.split(rng_key, num))


def combine_weighed(tally: Tally, at_probes: np.ndarray, probe_log_weights: np.ndarray) -> BlockEvidence:
    """Log evidence of each block with its error.

    Args:
        tally: From `weigh_islands`.
        at_probes: [N, B] from there too.
        probe_log_weights: [N, B] normalised log weights of the probes as particles of the posterior.
    """
    tally = jax.tree.map(lambda v: np.asarray(v, float), tally)
    num, tiny = tally.weight.shape[0], np.finfo(float).tiny
    first = np.arange(num) < num // 2
    values: np.ndarray = np.array(tally.weight)
    for mine in (first, ~first):
        other = jax.tree.map(lambda v, mine=mine: v[~mine].mean(0), tally)
        covariance = other.ratio_square - other.ratio[:, :, None] * other.ratio[:, None, :]
        scale = 1 + np.trace(covariance, axis1=1, axis2=2)[:, None, None]
        covariance = covariance + RIDGE * scale * np.eye(covariance.shape[-1])
        with_weight = other.product - other.weight[:, None] * other.ratio
        slope = np.linalg.solve(covariance, with_weight[..., None])[..., 0]
        values[mine] -= np.einsum("rbc,bc->rb", tally.ratio[mine], slope)
    values = np.where(values.mean(0) > 0, values, tally.weight)  # a slope from a handful of draws may be wild
    mean = np.maximum(values.mean(0), tiny)
    weight = np.maximum(tally.weight.mean(0), tiny)
    concentration = np.maximum(tally.square.mean(0) / weight**2, 1.0)
    own = np.exp(probe_log_weights + np.minimum(at_probes, LARGEST_LOG)).sum(0) / weight
    return BlockEvidence(
        np.log(mean),
        values.var(0, ddof=1) / num / mean**2,
        num * SIZE / concentration,
        ~(own <= MISSED * concentration),
    )


# -- tempering -----------------------------------------------------------------------------------------------------
class TemperedIsland(NamedTuple):
    """One island at temperature one.

    Attributes:
        x: [SIZE, D] equally weighted particles.
        log_evidence: [B] estimates relative to the Laplace approximation.
        acceptance: [] mean acceptance of the last move.
        num_unfinished: [] blocks that did not reach temperature one.
        num_ancestors: [] draws at the start that have descendants, in the worst block.
    """

    x: Array
    log_evidence: Array
    acceptance: Array
    num_unfinished: Array
    num_ancestors: Array


def temper_island(
    rng_key: Array,
    uniforms: Array,
    target: Target,
    theta: Theta,
    reference: Reference,
    blocks: Blocks,
    missed: Array,
    kernel: InvariantKernel,
) -> TemperedIsland:
    """One island, tempered from the reference, or from the prior where the reference has missed something.

    Args:
        rng_key: Randomness.
        uniforms: [C, 2, D] randomness of the draws from the reference.
        target: The target.
        theta: Where.
        reference: The Gaussian components of q.
        blocks: The partition.
        missed: [B] bool, the blocks that start from the prior, if it can be drawn from.
        kernel: Moves the particles.
    """
    terms_fn, flat, _ = flat_terms(target, theta)
    from_prior, mask = target.sites.can_draw_prior, jnp.asarray(target.sites.prior_mask)
    key_prior, key_move = random.split(rng_key)
    missed = missed & from_prior
    prior = draw_priors(key_prior, target, theta, SIZE) if from_prior else None
    x = draw_reference(uniforms, reference, blocks, None if prior is None else prior[-COUNTS[-1] :])
    if prior is not None:
        x = jnp.where(blocks.to_coordinates(missed), prior, x)

    # The path's start, and what the target has beside it, are one term each for every block.
    def two_terms(x: Array) -> Array:
        terms = terms_fn(flat, x)
        log_prior = -blocks.sum_terms(jnp.where(mask, terms, 0.0))
        _, mixture = log_densities(reference, x, log_prior if from_prior else None, blocks)
        start = -jnp.where(missed, log_prior, mixture)
        return jnp.concatenate([start, blocks.sum_terms(terms - reference.base) - start])

    numbers = jnp.arange(blocks.num_blocks, dtype=jnp.int32)
    pairs = jnp.stack([numbers, numbers + blocks.num_blocks], 1)
    paired = blocks._replace(of_term=jnp.tile(numbers, 2), terms=pairs)
    curvature = None
    if kernel.preconditioning.dense and blocks.width > 1:
        hessian = jnp.einsum("bji,bjk->bik", reference.inverse, reference.inverse)
        curvature = Curvature(hessian, jnp.zeros_like(hessian))
    size = jnp.full(blocks.num_blocks, kernel.step_size, x.dtype)
    step = Step(size, tempering.identity_like(reference.center, curvature))
    starts = jnp.arange(2 * blocks.num_blocks) < blocks.num_blocks
    cold = jnp.zeros(blocks.num_blocks, x.dtype)
    done = tempering.temper(key_move, two_terms, x, starts, paired, kernel, step, curvature, cold)
    return TemperedIsland(
        done.points.x,
        done.log_evidence - reference.laplace,
        jnp.mean(done.acceptance),
        jnp.sum(done.unfinished),
        jnp.min(done.num_ancestors),
    )


def combine_tempered(log_evidence: np.ndarray) -> BlockEvidence:
    """Log evidence of each block with its error, from the estimates [R, B] of tempered islands."""
    logs = np.asarray(log_evidence, float)
    num, num_blocks = logs.shape
    top = logs.max(0)
    values = np.exp(logs - top)
    mean = values.mean(0)
    # A block is as reliable as the islands agree on it.
    variance = values.var(0, ddof=1) / num / mean**2
    ess = num * SIZE / (1 + num * variance)
    return BlockEvidence(top + np.log(mean), variance, ess, np.zeros(num_blocks, bool))
