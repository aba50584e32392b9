# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""From a cloud and what an objective says of it to a gradient, and to what else a theta step may ask."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.adaptation import StepProbe
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import Fisher, Information, fisher_information, louis_information
from numpyro_smcopt.kernels import Point
from numpyro_smcopt.objectives import Estimate, Objective, term_coefficients
from numpyro_smcopt.population import budget
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.types import Array, FlatTermsFn, Theta
from numpyro_smcopt.weights import conditional_ess, incremental_log_weight, weighted_variance


def surrogate_gradient(
    terms_fn: FlatTermsFn, theta: Array, unravel: Callable, points: Point, estimate: Estimate, blocks: Blocks
) -> Array:
    """[P] one backward pass through the surrogate at ``theta``; none where the scores of the particles are known.

    Args:
        terms_fn: Energy terms.
        theta: [P] flat parameters.
        unravel: The way back to their tree.
        points: [N, ...] particles.
        estimate: What the objective says of them.
        blocks: The partition.
    """
    coefficients = term_coefficients(estimate, blocks)
    if points.score is not None:
        return coefficients[:, 0] @ points.score + gradient_of_rest(estimate, unravel(theta))

    def surrogate(t: Array) -> Array:
        energy = jnp.sum(coefficients * jax.vmap(lambda x: terms_fn(t, x))(points.x))
        return energy if estimate.rest is None else energy + estimate.rest(unravel(t))

    return jax.grad(surrogate)(theta)


def gradient_of_rest(estimate: Estimate, theta: Theta) -> Array | float:
    """The part of the gradient that does not come from the energies of the particles."""
    return 0.0 if estimate.rest is None else ravel_pytree(jax.grad(estimate.rest)(theta))[0]


def step_context(
    target: Target, like: Theta, theta: Array, points: Point, log_weights: Array, blocks: Blocks, num_updates: Array
) -> StepContext:
    """The context of a step from ``theta``; gradient, loss and curvature are left to the caller.

    Args:
        target: The model.
        like: Parameters whose tree is that of ``theta``.
        theta: [P] flat parameters.
        points: [N, ...] particles, evaluated at ``theta``.
        log_weights: [N, B] their normalised log weights.
        blocks: The partition.
        num_updates: [] updates so far: where information is formed from some of the particles, it says which.
    """
    terms_fn, _, _ = flat_terms(target, like)
    num_particles, work = log_weights.shape[0], target.work(like)

    def some() -> Array:
        # A few particles of every block do where there are many blocks; which ones changes from time to time.
        num = budget.num_for_information(num_particles, blocks.num_blocks, theta.size, work)
        stride = num_particles // num
        return stride * jnp.arange(num) + num_updates % stride

    def information() -> Information:
        chosen = some()
        weights = jax.nn.log_softmax(log_weights[chosen], axis=0)
        return louis_information(terms_fn, theta, points.x[chosen], weights, blocks, work)[1]

    def fisher() -> Fisher:
        if points.score is not None:
            return fisher_information(points.score, log_weights[:, 0])
        chosen = some()
        score = jax.vmap(lambda x: jax.grad(lambda t: jnp.sum(terms_fn(t, x)))(theta))(points.x[chosen])
        return fisher_information(score, jax.nn.log_softmax(log_weights[chosen, 0]))

    def spread(step: Array) -> Array:
        slopes = step_probe(target, like, theta, points, log_weights, blocks).slopes(step)
        return jnp.max(jax.vmap(weighted_variance, in_axes=1)(log_weights, slopes))

    def conditional(step: Array) -> Array:
        probe = step_probe(target, like, theta, points, log_weights, blocks)
        return jnp.min(conditional_ess(log_weights, probe.increments(step)))

    zero = jnp.zeros((), theta.dtype)
    return StepContext(jnp.zeros_like(theta), zero, information, fisher, spread=spread, conditional_ess=conditional)


def default_theta_step(
    objective: Objective, target: Target, theta: Theta, num_particles: int, num_blocks: int, num_evaluations: int
) -> ThetaStep:
    """The step that needs no learning rate, as far as the size of theta allows.

    Args:
        objective: What is minimised.
        target: The model.
        theta: Unconstrained parameters; only their shapes count.
        num_particles: N.
        num_blocks: B.
        num_evaluations: Evaluations of a particle per update.
    """
    num_params = sum(leaf.size for leaf in jax.tree.leaves(theta))
    if num_params > budget.LARGEST_INFORMATION:
        return objective.default_step(None)
    work = target.work(theta)
    return objective.default_step(budget.refresh_interval(num_particles, num_blocks, num_params, work, num_evaluations))


def step_probe(
    target: Target, like: Theta, theta: Array, points: Point, log_weights: Array, blocks: Blocks
) -> StepProbe:
    """Effect of a step from ``theta`` on the weights; arguments as for `step_context`."""
    terms_fn, _, _ = flat_terms(target, like)

    def slopes(step: Array) -> Array:
        if points.score is not None:
            return (points.score @ step)[:, None]
        energies = lambda t: jax.vmap(lambda x: blocks.sum_terms(terms_fn(t, x)))(points.x)  # noqa: E731
        return jax.jvp(energies, (theta,), (step,))[1]

    def increments(step: Array) -> Array:
        terms = jax.vmap(lambda x: terms_fn(theta + step, x))(points.x)
        return incremental_log_weight(points.terms, terms, blocks.sum_terms)

    return StepProbe(log_weights, slopes, increments)
