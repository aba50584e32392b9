# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A family of laws on the line whose losses and gradients are known by quadrature, for tests of objectives.

U_theta(x) = theta x^4 / 8 + (x - theta)^2 / 2,        pi_theta = exp(-U_theta) / Z_theta
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from compiling import compile_tuned
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt.blocks import one_block
from numpyro_smcopt.objectives import Cloud, Scene, term_coefficients
from numpyro_smcopt.potential import make_target

THETA, REFERENCE = 0.7, 0.2
GRID = np.linspace(-9.0, 9.0, 20_001)
SPACING = GRID[1] - GRID[0]


def quartic(theta, x):
    return theta * x**4 / 8 + (x - theta) ** 2 / 2


def bump(sample):
    return jnp.exp(-((sample["x"] - 1.0) ** 2) / 2)


def model():
    theta = numpyro.param("theta", THETA)
    x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
    numpyro.deterministic("twice_theta", 2 * theta)
    numpyro.factor("energy", -quartic(theta, x))


def density(theta):
    unnormalised = np.exp(-quartic(theta, GRID))
    return unnormalised / np.sum(unnormalised) / SPACING


def expect(theta, values):
    return np.sum(density(theta) * values) * SPACING


def log_normaliser(theta):
    return np.log(np.sum(np.exp(-quartic(theta, GRID))) * SPACING)


def _quantiles(theta, levels):
    cumulative = np.cumsum(density(theta)) * SPACING
    return np.interp(levels, cumulative, GRID + SPACING / 2)


def reference_quantiles():
    """[4000] points that stand for the reference with hardly an error."""
    return _quantiles(REFERENCE, (np.arange(4000) + 0.5) / 4000).astype(np.float32)


def _reward(theta):
    return expect(theta, np.exp(-((GRID - 1.0) ** 2) / 2))


def _cross_entropy(theta):
    return expect(REFERENCE, quartic(theta, GRID)) + log_normaliser(theta)


def _reverse_kl(theta):
    difference = quartic(REFERENCE, GRID) - quartic(theta, GRID)
    return expect(theta, difference) - log_normaliser(theta) + log_normaliser(REFERENCE)


EXACT_LOSSES = {
    "marginal_likelihood": lambda theta: -log_normaliser(theta),
    "marginal_likelihood_calibrated": lambda theta: -log_normaliser(theta),
    "reward": lambda theta: -_reward(theta),
    "forward_kl": _cross_entropy,
    "reverse_kl_of_params": _reverse_kl,
    "reverse_kl_of_energy": _reverse_kl,
    "reward_with_reverse_kl": lambda theta: -_reward(theta) + 0.3 * _reverse_kl(theta),
    "reward_with_forward_kl": lambda theta: -_reward(theta) + 0.3 * _cross_entropy(theta),
    "reward_that_knows_theta": lambda theta: -2 * theta * _reward(theta),
    "energy_based_likelihood": _cross_entropy,
}


def loss_and_gradient(name):
    """Loss and its derivative at `THETA`."""
    loss, eps = EXACT_LOSSES[name], 1e-4
    return loss(THETA), (loss(THETA + eps) - loss(THETA - eps)) / (2 * eps)


def exact_clouds(rng_key, num_clouds, num_particles):
    """Draws [R, N] of the law at `THETA` and equal log weights."""
    levels = np.asarray(random.uniform(rng_key, (num_clouds, num_particles)), float)
    return jnp.asarray(_quantiles(THETA, levels), jnp.float32), jnp.zeros((num_clouds, num_particles))


def weighted_clouds(rng_key, num_clouds, num_particles):
    """Draws [R, N] of another law, and their log weights."""
    x = 0.6 + 1.1 * random.normal(rng_key, (num_clouds, num_particles))
    return x, -quartic(THETA, x) + (x - 0.6) ** 2 / (2 * 1.1**2)


def estimates(objective, x, log_weights):
    """Gradients [R] and losses [R] that an objective estimates from clouds [R, N], given the log evidence."""
    theta = {"theta": jnp.asarray(THETA)}
    blocks = one_block(None, np.zeros((2, 1)), make_target(model, (), {}).sites.num_terms, None)
    log_z, change = log_normaliser(THETA), log_normaliser(THETA) - log_normaliser(REFERENCE)

    @compile_tuned
    def run(x, log_weights, arrays):
        target = make_target(model, (), {})
        objective.check(target, theta)

        def one(x, log_weights):
            points = x[:, None]
            energies = lambda theta: jax.vmap(lambda x: target.terms(theta, x))(points)  # noqa: E731
            grad = jax.vmap(jax.grad(lambda x: jnp.sum(target.terms(theta, x))))(points)
            log_weights = jax.nn.log_softmax(log_weights)[:, None]
            cloud = Cloud(points, energies(theta), grad, log_weights, blocks, log_z, change)
            estimate = objective.estimate(Scene(target, theta, arrays, random.key(0)), cloud)

            def surrogate(theta):
                energy = jnp.sum(term_coefficients(estimate, blocks) * energies(theta))
                return energy if estimate.rest is None else energy + estimate.rest(theta)

            return jax.grad(surrogate)(theta)["theta"], estimate.loss

        return jax.lax.map(lambda row: one(*row), (x, log_weights), batch_size=2000)

    return run(x, log_weights, objective.arrays)
