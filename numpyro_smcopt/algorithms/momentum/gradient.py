# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What a step with momentum may ask at the place where its gradient is taken."""

import jax
import jax.numpy as jnp

from numpyro_smcopt.algorithms.momentum.theta import Around
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Point
from numpyro_smcopt.objectives import Cloud, Estimate, Objective, Scene, term_coefficients
from numpyro_smcopt.population.gradients import gradient_of_rest, step_context
from numpyro_smcopt.potential import flat_terms
from numpyro_smcopt.types import Array


def momentum_surroundings(
    objective: Objective, scene: Scene, x: Array, log_weights: Array, blocks: Blocks, num_updates: Array
) -> tuple[Array, Estimate, Around]:
    """What a step with momentum may ask where its gradient is taken.

    Args:
        objective: What is minimised.
        scene: The model, and where.
        x: [N, D] particles.
        log_weights: [N, B] their equal log weights.
        blocks: The partition.
        num_updates: [] see `step_context`.

    Returns:
        Energy terms [N, K], what the objective says, and what may be asked.
    """
    terms_fn, theta, _ = flat_terms(scene.target, scene.theta)
    all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
    terms, vjp = jax.vjp(all_terms, theta, x)
    # Not computed unless the objective looks at it.
    grad = vjp(jnp.ones_like(terms))[1]
    estimate = objective.estimate(scene, Cloud(x, terms, grad, log_weights, blocks))
    coefficients = term_coefficients(estimate, blocks)
    gradient = vjp(coefficients)[0] + gradient_of_rest(estimate, scene.theta)

    def missing(slope: Array) -> Array:  # [N, K] derivatives of the terms along a direction
        freedom = max(x.shape[0] - 1, 1)
        centred = blocks.sum_terms(slope) - jnp.mean(blocks.sum_terms(slope), 0)
        return jnp.sum(centred**2) / freedom

    def along(v: Array) -> tuple[Array, Array]:
        one, zero = jnp.ones((), theta.dtype), jnp.zeros((), theta.dtype)
        first = lambda t: jax.jvp(lambda t: all_terms(theta + t * v, x), (t,), (one,))[1]  # noqa: E731
        if not objective.is_likelihood:
            return estimate.curvature * missing(first(zero)), zero
        slope, bend = jax.jvp(first, (zero,), (one,))
        return jnp.sum(coefficients * bend), missing(slope)

    def slope_error(v: Array) -> Array:
        return jnp.sqrt(missing(jax.jvp(lambda t: all_terms(t, x), (theta,), (v,))[1]) / x.shape[0])

    places = Point(x, terms, grad)
    asked = step_context(scene.target, scene.theta, theta, places, log_weights, blocks, num_updates)
    return terms, estimate, Around(gradient, asked.information, along, slope_error)
