# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The first particles: drawn from the prior and brought to the posterior at one theta; pure, inside programs."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt import laplace
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Kernel, Preconditioner, Step
from numpyro_smcopt.population import tempering
from numpyro_smcopt.population.evaluate import evaluator
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.types import Array, Theta

BURN_IN = 100
FINAL_MOVES = 10


def draw_particles(num: int, from_prior: bool, init_strategy: Callable | None) -> Callable:
    """``(target, rng_key, theta) -> [num, D]``, from the prior or from a NumPyro init strategy."""

    def draw(target: Target, rng_key: Array, theta: Theta) -> Array:
        if from_prior:
            one = lambda key: target.draw_prior(key, theta)  # noqa: E731
        else:
            one = lambda key: target.draw_start(key, theta, init_strategy)  # noqa: E731
        return jax.vmap(one)(random.split(rng_key, num))

    return draw


def first_cloud(
    rng_key: Array,
    target: Target,
    theta: Theta,
    blocks: Blocks,
    mode: Array,
    kernel: Kernel,
    num_particles: int,
    *,
    init_strategy: Callable | None = None,
) -> Tempered:
    """Equally weighted particles of ``pi_theta``: drawn from the prior and tempered, or started anywhere and burnt in.

    Args:
        rng_key: Randomness.
        target: The target.
        theta: Where.
        blocks: The partition.
        mode: [D] where the curvature of a dense preconditioner is taken.
        kernel: Moves the particles.
        num_particles: N.
        init_strategy: Where particles start, if not in the prior.
    """
    (terms_fn, flat, _), (strict_fn, *_) = flat_terms(target.relaxed(), theta), flat_terms(target, theta)
    at_theta = lambda x: terms_fn(flat, x)  # noqa: E731
    from_prior = starts_from_prior(target, init_strategy)
    key_draw, key_move = random.split(rng_key)
    x = draw_particles(num_particles, from_prior, init_strategy)(target, key_draw, theta)
    contradicted = ~jnp.all(jnp.isfinite(blocks.sum_terms(jax.vmap(lambda x: strict_fn(flat, x))(x))), 0)
    prior = jnp.asarray(target.sites.prior_mask)
    curvature = None
    if kernel.preconditioning.dense and laplace.affordable(blocks) and blocks.width > 1:
        curvature = laplace.curvature(at_theta, mode, prior, blocks)
    size = jnp.full(blocks.num_blocks, kernel.step_size, x.dtype)
    step = Step(size, tempering.identity_like(mode, curvature))
    beta = jnp.full(blocks.num_blocks, 0.0 if from_prior else 1.0, x.dtype)
    final_moves = FINAL_MOVES if from_prior else BURN_IN
    return tempering.temper(
        key_move,
        at_theta,
        x,
        prior,
        blocks,
        kernel,
        step,
        curvature,
        beta,
        impossible=contradicted,
        final_moves=final_moves,
    )


def prior_cloud(
    rng_key: Array, target: Target, theta: Theta, blocks: Blocks, num_particles: int, init_strategy: Callable | None
) -> Tempered:
    """Particles where they are drawn, for algorithms that bring them to the posterior themselves; see `first_cloud`."""
    draw = draw_particles(num_particles, starts_from_prior(target, init_strategy), init_strategy)
    points = jax.vmap(evaluator(target, theta))(draw(target, rng_key, theta))
    ones = jnp.ones(blocks.num_blocks, points.x.dtype)
    return Tempered(
        points=points,
        log_evidence=jnp.zeros_like(ones),
        step=Step(ones, tempering.identity_like(points.x[0], None)),
        num_stages=jnp.zeros((), jnp.int32),
        unfinished=jnp.zeros(blocks.num_blocks, bool),
        acceptance=ones,
        num_ancestors=jnp.full(blocks.num_blocks, num_particles, jnp.int32),
    )


def first_step(kernel: Kernel, found: Step, used: Kernel) -> Step:
    """The first step of ``kernel``; the first cloud was moved by ``used``, whose step ended as ``found``."""
    preconditioner = found.preconditioner
    if kernel.preconditioning.forgetting == 0.0 and not kernel.preconditioning.dense:
        preconditioner = Preconditioner(jnp.ones_like(preconditioner.scale))
    if kernel is used and kernel.target is not None:
        return Step(found.size, preconditioner)
    return Step(jnp.full_like(found.size, kernel.step_size), preconditioner)


def starts_from_prior(target: Target, init_strategy: Callable | None) -> bool:
    """True if the first particles are draws from the prior, so that the log evidence is known from the start."""
    return target.sites.can_draw_prior and init_strategy is None
