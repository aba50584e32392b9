# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Derivatives of the log marginal likelihood in theta, from weighted draws at a fixed theta.

Fisher's identity gives the score, Louis' the information, and the scores of independent units the middle of a sandwich.
Theta moves along given directions, and the latents with it (see `transport`).
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import along_each, louis_information
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.reporting.effort import DerivativeDraws
from numpyro_smcopt.reporting.proposal_mixture import ProposalMixture
from numpyro_smcopt.reporting.replicates import Draws, equal_draws, resampled
from numpyro_smcopt.reporting.transport import Moved, moved_terms
from numpyro_smcopt.types import Array, Theta


class Derivatives(NamedTuple):
    """Derivatives of minus the log marginal likelihood along P directions of the flat theta, from R replicates.

    Attributes:
        score: [R, P] gradient, with transport.
        plain_score: [R, P] the same without transport: an independent check of the transport.
        information: [R, P, P] Hessian.
        complete: [P, P] complete-data information, with transport.
        outer: [P, P] ``sum_u s_u s_u^T`` over the independent units: blocks, and terms that depend on no latent; None
            if it was not asked for.
    """

    score: Array
    plain_score: Array
    information: Array
    complete: Array
    outer: Array | None

    def in_theta(self, columns: np.ndarray) -> "Derivatives":
        """Derivatives in theta, in double precision; these are along ``columns [P, P]``."""
        back = inverse(columns)
        score, plain, information, complete = (np.asarray(v, float) for v in self[:4])
        square = lambda v: back.T @ v @ back  # noqa: E731
        outer = None if self.outer is None else square(np.asarray(self.outer, float))
        return Derivatives(score @ back, plain @ back, square(information), square(complete), outer)


def inverse(columns: np.ndarray) -> np.ndarray:
    """[P, P] what turns a row of derivatives along columns into derivatives in theta, in double precision."""
    columns = np.asarray(columns, float)
    units = np.maximum(np.abs(columns).max(1, initial=0.0), np.finfo(float).tiny)
    return np.linalg.inv(columns / units[:, None]) / units


def draw_picks(rng: np.random.Generator, draws: DerivativeDraws, size: int, num_blocks: int) -> np.ndarray:
    """[R, n, B] uniforms that pick the draws of replicates of ``size``; n = 0 if derivatives take all."""
    fewer = [num for num in (draws.score, draws.information) if num < size]
    return rng.uniform(size=(draws.replicates, max(fewer, default=0), num_blocks))


@dataclasses.dataclass(frozen=True)
class MovingTarget:
    """A target whose theta moves along P directions, and its latents with it.

    Attributes:
        terms_fn: ``(Moved, x [D]) -> [K]``, the energy terms.
        here: Where theta is.
        directions: [P] directions of the two.
        blocks: The partition.
        work: Array elements that one energy computes.
    """

    terms_fn: Callable[[Moved, Array], Array]
    here: Moved
    directions: Moved
    blocks: Blocks
    work: int

    def differentiate(self, replicates: Draws, draws: DerivativeDraws, picks: Array) -> Derivatives | None:
        """Derivatives from the first replicates; None if ``draws`` wants none.

        Args:
            replicates: R or more of them.
            draws: How many draws are taken.
            picks: From `draw_picks`.
        """
        if not draws.replicates:
            return None
        first = jax.tree.map(lambda v: v[: draws.replicates], replicates)
        pick = lambda num: _picked(first, picks, num, self.blocks)  # noqa: E731
        score, plain = lax.map(self._score, pick(draws.score))
        information, complete = lax.map(self._information, pick(draws.information))
        outer = None
        if draws.outer:
            # Fewer replicates than above, and one derivative less than an information has: that pays for more draws.
            two = jax.tree.map(lambda v: v[:2], pick(min(draws.score, 4 * draws.information)))
            # The two factors come from different replicates, so that their Monte Carlo noise adds no bias.
            one, other = lax.map(self._unit_scores, two)
            product = jnp.matmul(one, other.T, precision="highest")
            outer = (product + product.T) / 2
        return Derivatives(score, plain, information, complete.mean(0), outer)

    def _volume(self) -> Array:
        """[P, B] slopes of the log volume of each block."""
        if self.directions.still:
            return jnp.zeros((self.directions.theta.shape[0], self.blocks.num_blocks), self.here.theta.dtype)
        return self.directions.log_volume_slopes()

    def _score(self, replicate: Draws) -> tuple[Array, Array]:
        log_weights = jax.nn.log_softmax(replicate.log_weights, 0)
        coefficients = self.blocks.to_terms(jnp.exp(log_weights), 1 / replicate.x.shape[0])
        energy = lambda at: jnp.sum(coefficients * jax.vmap(lambda x: self.terms_fn(at, x))(replicate.x))  # noqa: E731
        gradient = jax.grad(energy)(self.here)
        # Where nothing has moved yet, the gradient in theta alone is that without transport.
        plain = along_each(self.directions.theta, gradient.theta)
        return along_each(self.directions, gradient) - jnp.sum(self._volume(), 1), plain

    def _information(self, replicate: Draws) -> tuple[Array, Array]:
        log_weights = jax.nn.log_softmax(replicate.log_weights, 0)
        place = self.terms_fn, self.here, replicate.x, log_weights, self.blocks, self.work
        _, found = louis_information(*place, directions=self.directions)
        return found.complete - found.missing, found.complete

    def _unit_scores(self, replicate: Draws) -> Array:
        """[P, B + K] scores of the blocks, and of the terms that depend on no latent."""
        weights = jax.nn.softmax(replicate.log_weights, 0)
        free = self.blocks.of_term == self.blocks.num_blocks
        every = lambda at: jax.vmap(lambda x: self.terms_fn(at, x))(replicate.x)  # noqa: E731

        def of_units(direction: Moved) -> Array:
            _, slopes = jax.jvp(every, (self.here,), (direction,))
            of_blocks = jnp.sum(weights * self.blocks.sum_terms(slopes), 0)
            return jnp.concatenate([of_blocks, jnp.where(free, slopes[0], 0.0)])

        scores = lax.map(of_units, self.directions)
        return scores.at[:, : self.blocks.num_blocks].add(-self._volume())


def moving_target(
    target: Target, theta: Theta, directions: Moved, mixture: ProposalMixture | None, blocks: Blocks
) -> MovingTarget:
    """A target whose theta may move along directions [P], and its latents in the coordinates of a mixture, or not."""
    terms_fn, flat, _ = flat_terms(target, theta)
    origin = jax.tree.map(lambda v: jnp.zeros(v.shape[1:], v.dtype), directions)._replace(theta=flat)
    if mixture is None or directions.still:
        moving = lambda moved, x: terms_fn(moved.theta, x)  # noqa: E731
    else:
        moving = moved_terms(terms_fn, mixture, blocks)
    return MovingTarget(moving, origin, directions, blocks, target.work(theta))


def _picked(replicates: Draws, picks: Array, num: int, blocks: Blocks) -> Draws:
    """``num`` draws of each replicate, resampled block by block, with equal weights; all as they are if it has no more.

    Independent draws, not systematic ones: their covariances would be too large.
    """
    if num == replicates.x.shape[1]:
        return replicates

    pick = jax.vmap(lambda replicate, heights: resampled(replicate, heights, blocks))
    return equal_draws(pick(replicates, picks[:, :num]), blocks)
