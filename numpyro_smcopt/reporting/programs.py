# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The programs behind a report: fresh particles at a fixed theta, and what they tell of the marginal likelihood.

`draw_program` fits the mixture, draws from it, weighs, and differentiates. `temper_program` is compiled only if those
draws do not suffice. `wide_program` is for models whose blocks are too large for Hessians, `exact_program` for models
without latents. What is random beside keys comes as ``numbers``, uniforms of the host: ``"mixture"`` from
`proposal_mixture.draw_uniforms`, ``"picks"`` from `derivatives.draw_picks`, ``"order"`` [2, B] for resampling.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.distributions import biject_to
from numpyro.distributions.constraints import Constraint

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import louis_information
from numpyro_smcopt.kernels import InvariantKernel
from numpyro_smcopt.population.first_cloud import first_cloud
from numpyro_smcopt.population.tempering import Tempered as TemperedCloud
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.reporting.coordinates import unravel
from numpyro_smcopt.reporting.derivatives import Derivatives, MovingTarget, moving_target
from numpyro_smcopt.reporting.effort import DerivativeDraws
from numpyro_smcopt.reporting.proposal_mixture import ProposalMixture, fit_mixture
from numpyro_smcopt.reporting.replicates import Draws, equal_draws, resampled, temper_replicate, weigh_replicates
from numpyro_smcopt.reporting.transport import Moved, laplace_transport, still_directions
from numpyro_smcopt.traces import traced_once
from numpyro_smcopt.types import Array, Params, Theta
from numpyro_smcopt.weights import effective_sample_size

NUM_SAMPLES = 1024  # where blocks are resampled; a power of two, for the strides
WEIGHTED_REPLICATES = 5  # that keep their weights, where there is one block

Numbers = dict[str, Any]


class Fixed(NamedTuple):
    """The part of a report that does not depend on particles.

    Attributes:
        theta: The estimate, unconstrained.
        jacobian: [Q, P] derivative of the flat constrained parameters in the flat unconstrained ones.
        bounded: [P] which coordinates belong to a constrained parameter.
        constraints: By param site.
    """

    theta: Theta
    jacobian: Array
    bounded: Array
    constraints: dict[str, Constraint]

    def constrained(self, flat: np.ndarray) -> Params:
        """A flat theta [P] on the scale of the model."""
        theta = unravel(flat, self.theta)
        return {
            name: jax.tree.map(
                lambda v, o, c=constraint: np.asarray(biject_to(c)(v.astype(o.dtype))), theta[name], self.theta[name]
            )
            for name, constraint in self.constraints.items()
        }


def _fixed(target: Target, rng_key: Array, params: Params) -> Fixed:
    _, theta = target.initial_params(rng_key, params)
    flat, unravel = ravel_pytree(theta)
    constrained = lambda t: ravel_pytree(target.constrain_params(unravel(t)))[0]  # noqa: E731
    bounded, constraints = jnp.asarray(target.bounded_coordinates(theta)), target.param_constraints(theta)
    return Fixed(theta, jax.jacobian(constrained)(flat), bounded, constraints)


class Drawn(NamedTuple):
    """Result of `draw_program`.

    Attributes:
        fixed: What does not depend on particles.
        mixture: What is drawn from.
        directions: [P] directions of theta, and how the latents move along them.
        laplace_score: [P] gradient of minus Laplace's approximation of the log marginal likelihood along the
            directions: no draws, and so no noise. None without transport.
        moments: [R, B, C + 1, C + 1] see `replicates.weigh_replicates`.
        at_probes: [N, B] log weights of the particles of the cloud.
        worst_log_weights: [R N] log weights of the block with the fewest effective draws.
        derivatives: Along the directions.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    fixed: Fixed
    mixture: ProposalMixture
    directions: Moved
    laplace_score: Array | None
    moments: Array
    at_probes: Array
    worst_log_weights: Array
    derivatives: Derivatives | None
    samples: dict[str, Array]
    log_weights: Array


def draw_program(draws: DerivativeDraws, transported: bool) -> Callable[..., Drawn]:
    """A program that draws from the mixture.

    Args:
        draws: What derivatives are taken from.
        transported: Whether the latents move along with theta in derivatives.

    Returns:
        ``(target, wanted, rng_key, numbers, params, columns, cloud, blocks) -> Drawn``: whether draws are wanted
        (otherwise what comes from them is zero, and only the rest is of use), randomness, the estimate, the directions
        of derivatives as columns [P, P], and a cloud of the posterior with normalised log weights.
    """

    def program(
        target: Target,
        wanted: Array,
        rng_key: Array,
        numbers: Numbers,
        params: Params,
        columns: Array,
        cloud: Draws,
        blocks: Blocks,
    ) -> Drawn:
        fixed = _fixed(target, rng_key, params)
        terms_fn, flat, _ = flat_terms(target, fixed.theta)
        mixture = fit_mixture(lambda x: terms_fn(flat, x), cloud.x, cloud.log_weights, blocks)
        directions, laplace_score = still_directions(columns), None
        if draws.replicates and transported:
            directions = laplace_transport(terms_fn, flat, columns, mixture, blocks)
            # Along the mode the energy does not change but by theta, and the transport knows how the curvature does.
            at_mode = jax.grad(lambda t: jnp.sum(terms_fn(t, mixture.center)))(flat)
            at_mode = jnp.matmul(at_mode, columns, precision="highest")
            laplace_score = at_mode - jnp.sum(directions.log_volume_slopes(), 1)

        def explored() -> tuple:
            place = target, fixed.theta, mixture, blocks
            replicates, moments, at_probes = weigh_replicates(
                random.fold_in(rng_key, 0), numbers["mixture"], *place, cloud.x
            )
            moving = moving_target(target, fixed.theta, directions, mixture, blocks)
            derivatives = moving.differentiate(replicates, draws, numbers["picks"])
            every = replicates.log_weights.reshape(-1, blocks.num_blocks)
            worst = every[:, jnp.argmin(effective_sample_size(every))]
            samples = _posterior_samples(target, fixed.theta, numbers["order"], blocks, replicates)
            return moments, at_probes, worst, derivatives, *samples

        explore, shapes = traced_once(explored)
        nothing = lambda: jax.tree.map(lambda v: jnp.zeros(v.shape, v.dtype), shapes)  # noqa: E731
        return Drawn(fixed, mixture, directions, laplace_score, *lax.cond(wanted, explore, nothing))

    return program


class Tempered(NamedTuple):
    """Result of `temper_program` and `wide_program`.

    Attributes:
        log_evidence: [R, B] estimates, relative to the Laplace approximation if there is a mixture.
        acceptance: [R, B] mean acceptances of the last moves.
        unfinished: [R, B] bool, which did not reach temperature one.
        num_ancestors: [R, B] draws at the start that have descendants.
        derivatives: Along the directions.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    log_evidence: Array
    acceptance: Array
    unfinished: Array
    num_ancestors: Array
    derivatives: Derivatives | None
    samples: dict[str, Array]
    log_weights: Array


def _tempered(
    one: Callable[..., TemperedCloud],
    each: tuple,
    target: Target,
    theta: Theta,
    moving: MovingTarget,
    draws: DerivativeDraws,
    numbers: Numbers,
) -> tuple[Array, Tempered]:
    """Particles [R, N, D] of the populations that ``one`` makes of each of R arguments, and what they tell."""

    def kept(arguments: tuple) -> tuple[Array, ...]:
        done = one(*arguments)
        return done.points.x, done.log_evidence, done.acceptance, done.unfinished, done.num_ancestors

    x, log_evidence, acceptance, unfinished, num_ancestors = lax.map(kept, each)
    replicates = equal_draws(x, moving.blocks)
    derivatives = moving.differentiate(replicates, draws, numbers["picks"])
    samples, log_weights = _posterior_samples(target, theta, numbers["order"], moving.blocks, replicates)
    about = log_evidence, acceptance, unfinished, num_ancestors
    return x, Tempered(*about, derivatives, samples, log_weights)


def temper_program(kernel: InvariantKernel, draws: DerivativeDraws) -> Callable[..., Tempered]:
    """A program that tempers replicates.

    Returns:
        ``(target, rng_key, numbers, drawn, blocks, missed) -> Tempered``.
    """

    def program(
        target: Target, rng_key: Array, numbers: Numbers, drawn: Drawn, blocks: Blocks, missed: Array
    ) -> Tempered:
        theta, mixture = drawn.fixed.theta, drawn.mixture
        one = lambda key, u: temper_replicate(key, u, target, theta, mixture, blocks, missed, kernel)  # noqa: E731
        # Another key than that of the draws from the prior
        keys = random.split(random.fold_in(rng_key, 1), len(numbers["mixture"]))
        moving = moving_target(target, theta, drawn.directions, mixture, blocks)
        return _tempered(one, (keys, numbers["mixture"]), target, theta, moving, draws, numbers)[1]

    return program


def wide_program(
    kernel: InvariantKernel, num: int, num_particles: int, draws: DerivativeDraws, init_strategy: Callable | None
) -> Callable[..., tuple[Fixed, Array, Tempered]]:
    """A program that tempers ``num`` replicates from the prior, for blocks that are too large for Hessians.

    Returns:
        ``(target, rng_key, numbers, params, columns, mode, blocks) -> (Fixed, free, Tempered)``, ``free`` being the log
        density of the terms that depend on no latent.
    """

    def program(
        target: Target, rng_key: Array, numbers: Numbers, params: Params, columns: Array, mode: Array, blocks: Blocks
    ) -> tuple[Fixed, Array, Tempered]:
        fixed = _fixed(target, rng_key, params)
        terms_fn, flat, _ = flat_terms(target, fixed.theta)

        def one(key: Array) -> TemperedCloud:
            place = target, fixed.theta, blocks, mode, kernel, num_particles
            return first_cloud(key, *place, init_strategy=init_strategy)

        keys = random.split(random.fold_in(rng_key, 1), num)
        moving = moving_target(target, fixed.theta, still_directions(columns), None, blocks)
        x, found = _tempered(one, (keys,), target, fixed.theta, moving, draws, numbers)
        return fixed, -blocks.sum_free_terms(terms_fn(flat, x[0, 0])), found

    return program


def exact_program(sandwich: bool) -> Callable[..., tuple]:
    """A program for models without latents.

    Returns:
        ``(target, rng_key, params, columns, blocks) -> (Fixed, terms [K], Derivatives, samples, log weights)``.
    """

    def program(target: Target, rng_key: Array, params: Params, columns: Array, blocks: Blocks) -> tuple:
        del blocks  # they say how precise the target is
        fixed = _fixed(target, rng_key, params)
        terms_fn, flat, _ = flat_terms(target, fixed.theta)
        here, nowhere = jnp.zeros_like(flat), jnp.zeros(0, flat.dtype)
        # Second derivatives along columns are combined observation by observation, before they are summed. Those in
        # theta, of an intercept and the slope of a year, would have to be combined afterwards, where they cancel.
        along = lambda u: terms_fn(flat + jnp.matmul(columns, u, precision="highest"), nowhere)  # noqa: E731
        loss = lambda u: jnp.sum(along(u))  # noqa: E731
        score, information, outer = jax.grad(loss)(here), jax.hessian(loss)(here), None
        if sandwich:
            each = jax.jacfwd(along)(here)
            outer = jnp.matmul(each.T, each, precision="highest")
        derivatives = Derivatives(score[None], score[None], information[None], information, outer)
        samples = jax.tree.map(lambda v: v[None], target.constrain_latents(fixed.theta, nowhere))
        return fixed, along(here), derivatives, samples, jnp.zeros(1, here.dtype)

    return program


def complete_information(target: Target, rng_key: Array, params: Params, cloud: Draws, blocks: Blocks) -> Array:
    """[P, P] the complete-data information at an estimate, from a cloud."""
    theta = _fixed(target, rng_key, params).theta
    terms_fn, flat, _ = flat_terms(target, theta)
    log_weights = jax.nn.log_softmax(cloud.log_weights, 0)
    return louis_information(terms_fn, flat, cloud.x, log_weights, blocks, target.work(theta))[1].complete


def _posterior_samples(
    target: Target, theta: Theta, order: Array, blocks: Blocks, replicates: Draws
) -> tuple[dict[str, Array], Array]:
    """Draws of all latents, constrained, and their log weights: equal where blocks had weights of their own."""
    every = jax.tree.map(lambda v: v.reshape(-1, v.shape[-1]), replicates)
    if blocks.num_blocks == 1:
        num = min(WEIGHTED_REPLICATES, replicates.x.shape[0]) * replicates.x.shape[1]
        x, log_weights = every.x[:num], jax.nn.log_softmax(every.log_weights[:num, 0])
    else:
        num = NUM_SAMPLES
        # Systematic resampling, block by block. Odd strides visit the slots in another order in every block.
        strides, shifts = (2 * jnp.floor(order[0] * (num // 2)) + 1).astype(jnp.int32), order[1]
        slots = (jnp.arange(num)[:, None] * strides) % num
        x = resampled(every, (slots.astype(every.x.dtype) / num + shifts) % 1, blocks)
        log_weights = jnp.full(num, -math.log(num), x.dtype)
    return jax.vmap(lambda one: target.constrain_latents(theta, one))(x), log_weights
