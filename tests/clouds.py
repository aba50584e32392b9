# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Clouds of particles without a model: potentials from plain energy terms, and a sampler along a fixed path.

`follow` is the algorithm of Del Moral, Doucet and Jasra (2006) on a given sequence of targets, written from the parts
of the package. Its normalising constants are unbiased whatever the number of particles, so each part can be judged by
closed forms.
"""

import jax
import jax.numpy as jnp
import numpy as np
from compiling import compile_fast
from jax import random

from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import one_block
from numpyro_smcopt.kernels import InvariantKernel, Point, Potential, Preconditioner, Step
from numpyro_smcopt.population.evaluate import resample_blocks
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.resampling import systematic
from numpyro_smcopt.weights import incremental_log_weight, reweight, uniform_log_weights

FAST_KEYS = "rbg"
"""A random number generator that compiles faster, for mapped programs without a loop of varying length: mapped, it
draws for all rows from the key of the first, which must not stand still while others go on."""


def partition(terms_fn, num_coordinates, joint=False):
    """The blocks of ``x [D] -> [K]``, as the package finds them."""
    probe = compile_fast(jax.vmap(lambda x, v: jax.jvp(terms_fn, (x,), (v,))))
    points = np.random.default_rng(0).uniform(-1, 1, (2, num_coordinates)).astype(jnp.result_type(float))
    num_terms = jax.eval_shape(terms_fn, jnp.asarray(points[0])).shape[0]
    return (one_block if joint else find_blocks)(probe, points, num_terms, np.arange(num_coordinates))


def potential_of(terms_fn, blocks):
    def evaluate(x):
        terms, backward = jax.vjp(terms_fn, x)
        return Point(x, terms, backward(jnp.ones_like(terms))[0])

    return Potential(evaluate, blocks)


def identity(num_coordinates):
    return Preconditioner(jnp.ones(num_coordinates))


def skewed_map(blocks, seed=0):
    """A preconditioner in general position: a lower triangular factor per block, and a scale per coordinate."""
    rng = np.random.default_rng(seed)
    num, width = blocks.members.shape
    factor = np.eye(width) * rng.uniform(0.7, 1.2, (num, width, 1)) + np.tril(
        rng.uniform(-0.4, 0.4, (num, width, width)), -1
    )
    padding = np.asarray(blocks.members) == blocks.of_coordinate.shape[0]
    factor = np.where(padding[:, :, None] | padding[:, None, :], np.eye(width), factor)
    scale = rng.uniform(0.8, 1.2, blocks.of_coordinate.shape[0])
    return Preconditioner(*map(jnp.asarray, (scale, factor, np.linalg.inv(factor))))


def noise_for(kernel, rng_key, x, blocks):
    """Random numbers for one move of a cloud [N, D]."""
    return draw_random_numbers(rng_key, x, kernel.num_uniforms(x.shape[1], blocks.num_blocks))


def move_all(kernel, rng_key, points, potential, step):
    """Move a cloud [N, ...]; what it adds to the log weights [N, B], and the acceptances [N, B] where there are any."""
    noise = noise_for(kernel, rng_key, points.x, potential.blocks)
    new, extra = jax.vmap(lambda noise, point: kernel.move(noise, point, potential, step))(noise, points)
    if isinstance(kernel, InvariantKernel):
        return new, jnp.zeros_like(extra), extra
    return new, incremental_log_weight(points.terms, new.terms, potential.blocks.sum_terms, extra), None


def follow(
    rng_key, kernel, terms_fn, schedule, x, blocks, step, ess_threshold=0.8, scheme=systematic, share_of_ratio=1.0
):
    """Weighted particles along a path of targets.

    Args:
        rng_key: A key.
        kernel: Of either kind.
        terms_fn: ``(target, x [D]) -> [K]``.
        schedule: The targets, stacked along the leading axis of a pytree.
        x: [N, D] exact draws from the first target.
        blocks: The partition.
        step: Step sizes and preconditioner.
        ess_threshold: When to resample.
        scheme: How to resample.
        share_of_ratio: 1; or 0 to leave out the kernel densities of a weighted kernel, which is wrong.

    Returns:
        The particles [N, D], their log weights [N, B] and the log ratio of normalising constants [B].
    """
    first, rest = jax.tree.map(lambda v: v[0], schedule), jax.tree.map(lambda v: v[1:], schedule)
    points = jax.vmap(potential_of(lambda x: terms_fn(first, x), blocks).evaluate)(x)
    log_weights = uniform_log_weights(x.shape[0], blocks.num_blocks, x.dtype)

    def advance(carry, target):
        key, points, log_weights, log_z = carry
        key, key_move, key_resample = random.split(key, 3)
        new = potential_of(lambda x: terms_fn(target, x), blocks)
        if isinstance(kernel, InvariantKernel):
            here, ratio = jax.vmap(new.evaluate)(points.x), 0.0
        else:
            noise = noise_for(kernel, key_move, points.x, blocks)
            here, ratio = jax.vmap(lambda noise, point: kernel.move(noise, point, new, step))(noise, points)
        change = incremental_log_weight(points.terms, here.terms, blocks.sum_terms, share_of_ratio * ratio)
        weighed = reweight(log_weights, change)
        keys = random.split(key_resample, blocks.num_blocks)
        points, log_weights, _ = resample_blocks(
            keys, here, weighed.log_weights, weighed.ess, blocks, scheme, ess_threshold
        )
        if isinstance(kernel, InvariantKernel):
            points, _, _ = move_all(kernel, key_move, points, new, step)
        return (key, points, log_weights, log_z + weighed.log_mean), None

    start = (rng_key, points, log_weights, jnp.zeros(blocks.num_blocks, x.dtype))
    (_, points, log_weights, log_z), _ = jax.lax.scan(advance, start, rest)
    return points.x, log_weights, log_z


def step_of(size, blocks, preconditioner):
    return Step(jnp.full(blocks.num_blocks, size, preconditioner.scale.dtype), preconditioner)


def z_score(values, truth, axis=0):
    """How many standard errors the mean of independent values is away from the truth."""
    values = np.asarray(values, np.float64)
    return (values.mean(axis) - truth) / (values.std(axis, ddof=1) / np.sqrt(values.shape[axis]))
