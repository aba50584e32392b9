# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The gradient of theta ahead of it, and what else a step with momentum may ask there."""

import jax
import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Point
from numpyro_smcopt.objectives import Cloud, Estimate, Objective, Scene, term_coefficients
from numpyro_smcopt.population.gradients import gradient_of_rest, step_context
from numpyro_smcopt.potential import flat_terms
from numpyro_smcopt.theta_step import StepContext
from numpyro_smcopt.types import Array


def momentum_context(
    objective: Objective, scene: Scene, x: Array, log_weights: Array, blocks: Blocks, num_updates: Array
) -> tuple[Array, Estimate, StepContext]:
    """One pass over the particles ``x [N, D]``: energy terms [N, K], what the objective says, what a step may ask.

    The arguments are those of `step_context`, and the scene says where.
    """
    terms_fn, theta, _ = flat_terms(scene.target, scene.theta)
    all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
    terms, vjp = jax.vjp(all_terms, theta, x)
    # Not computed unless the objective looks at it.
    grad = vjp(jnp.ones_like(terms))[1]
    estimate = objective.estimate(scene, Cloud(x, terms, grad, log_weights, blocks))
    coefficients = term_coefficients(estimate, blocks)
    gradient = vjp(coefficients)[0] + gradient_of_rest(estimate, scene.theta)

    def slopes(v: Array, distance: Array | float = 0.0) -> Array:
        """[N, K] derivatives of the terms along a direction, some distance away."""
        return jax.jvp(lambda t: all_terms(t, x), (theta + distance * v,), (v,))[1]

    def variance(slope: Array) -> Array:
        """[] variance over the particles, added up over the blocks."""
        centred = blocks.sum_terms(slope) - jnp.mean(blocks.sum_terms(slope), 0)
        return jnp.sum(centred**2) / max(x.shape[0] - 1, 1)

    def along(v: Array) -> tuple[Array, Array]:
        if not objective.is_likelihood:
            return estimate.curvature * variance(slopes(v)), jnp.zeros((), theta.dtype)
        zero, one = jnp.zeros((), theta.dtype), jnp.ones((), theta.dtype)
        slope, bend = jax.jvp(lambda distance: slopes(v, distance), (zero,), (one,))
        return jnp.sum(coefficients * bend), variance(slope)

    context = step_context(scene.target, scene.theta, theta, Point(x, terms, grad), log_weights, blocks, num_updates)
    context = context._replace(gradient=gradient, loss=estimate.loss, curvature=estimate.curvature)
    return terms, estimate, context._replace(spread=lambda v: variance(slopes(v)), along=along)
