# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The start of a run: on the host the model is read, blocks are found and theta walks; then one pure program.

What cannot start is refused, by the name of its site. The shapes of the first state, which no computation is needed
for, tell how a saved state is to be put together again.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt import faults
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.independent_blocks import check_energies
from numpyro_smcopt.population.self_check import as_precise_as_needed, in_double
from numpyro_smcopt.potential import Target, check_init_params, check_start, fingerprint, strong
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.update import announce_start
from numpyro_smcopt.types import Array, Params, Theta


class _Read(NamedTuple):
    """A first look at the model: starting values, constrained and not, the next keys, and the data's mark."""

    params: Params
    theta: Theta
    key_blocks: Array
    key_first: Array
    fingerprint: Array


def _read(target: Target, rng_key: Array, init_params: Params, arrays: list[Array]) -> _Read:
    key_params, key_rest = random.split(rng_key)
    key_blocks, key_first = random.split(key_rest)
    return _Read(*target.initial_params(key_params, init_params), key_blocks, key_first, fingerprint(arrays))


def start(
    algorithm: Algorithm,
    bound: BoundTarget,
    rng_key: Array,
    init_params: Params | None = None,
    foresee: Callable[[Any], None] | None = None,
    double: bool = False,
) -> Any:
    """The state at the start of one run.

    Args:
        algorithm: What runs.
        bound: The model with its data.
        rng_key: Randomness.
        init_params: Constrained starting values of param sites.
        foresee: Told the shapes and types of the state as soon as they are known, while it is still being made.
        double: Whether energies are known to need double precision.

    Raises:
        ValueError: If the model or a starting value cannot be used; the message names the site.
    """
    init_params = {} if init_params is None else init_params
    init_params = check_init_params(bound.target.sites.params, init_params)
    read = bound.call("read", _read, rng_key, init_params, bound.arrays)
    check_start(read.params, read.theta)
    theta, key_first = read.theta, read.key_first
    algorithm.check(bound.target, theta)
    blocks = algorithm.find_blocks(read.key_blocks, bound, theta)
    blocks = in_double(bound, blocks) if double else blocks
    mode = np.zeros(bound.target.sites.num_latents, jnp.result_type(float))

    def begun(blocks: Blocks) -> tuple[Any, Any]:
        place = theta, mode
        # Compiled while theta walks.
        shapes, _ = bound.prepare("first", _first(algorithm), key_first, theta, blocks, mode)
        if foresee is not None:
            foresee(shapes)
        place = algorithm.warm_start(bound, theta, blocks) or place
        return bound.call("first", _first(algorithm), key_first, place[0], blocks, place[1])

    state, particles = begun(blocks)
    precise = blocks
    if particles is not None and not double:
        precise = as_precise_as_needed(bound, state.theta, state.points.x, blocks, particles[0])
    if precise is not blocks:
        blocks = precise
        state, particles = begun(blocks)
    if particles is not None:
        terms, num_unfinished, num_stages = particles
        check_energies(bound.target, terms, blocks.sums)
        found = faults.unfinished_tempering(int(num_unfinished), blocks.num_blocks, int(num_stages))
        faults.warn_of([found])
    _check_loss(algorithm, state.diagnostics["loss"])
    return jax.tree.map(strong, announce_start(algorithm, state, read.fingerprint))


def shapes_of_start(algorithm: Algorithm, bound: BoundTarget, rng_key: Array, blocks: Blocks) -> Any:
    """Shapes and types of the state at the start, whose partition is known; nothing is computed.

    Args:
        algorithm: What would run.
        bound: The model with its data.
        rng_key: A key of the right kind.
        blocks: The partition of the latents.
    """
    _, theta = bound.eval_shape("theta", Target.initial_params, rng_key, {})
    mode = jax.ShapeDtypeStruct((bound.target.sites.num_latents,), jnp.result_type(float))
    state, _ = bound.eval_shape("first", _first(algorithm), rng_key, theta, blocks, mode)
    return jax.eval_shape(lambda state: announce_start(algorithm, state, fingerprint(bound.arrays)), state)


def _first(algorithm: Algorithm) -> Callable:
    """A program: the first state, and what is to be checked of the particles, if there is something."""

    def first(target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array) -> Any:
        state, cloud = algorithm.first_state(target, rng_key, theta, blocks, mode)
        checked = None if cloud is None else (cloud.points.terms, jnp.sum(cloud.unfinished), cloud.num_stages)
        return jax.tree.map(strong, state), checked

    return first


def _check_loss(algorithm: Algorithm, loss: Array) -> None:
    """Refuse a loss that is not finite at the start; the message names the objective."""
    if not np.isfinite(loss):
        objective = getattr(algorithm, "objective", None)
        name = type(algorithm if objective is None else objective).__name__
        raise ValueError(
            f"The loss of {name} is {float(loss)} at the start. Look for a reward that is NaN or infinite at every "
            "particle, a reference energy that is infinite, or data outside the support of the model."
        )


def split_init_params(bound: BoundTarget, rng_key: Array, init_params: Params | None, num_runs: int) -> list[Any]:
    """Starting values of each of several runs, from values with or without a leading axis of R, site by site."""
    if num_runs == 1 or not init_params:
        return [init_params] * num_runs
    init_params = check_init_params(bound.target.sites.params, init_params)
    like, _ = bound.eval_shape("theta", Target.initial_params, rng_key, {})
    apart = {name for name, value in init_params.items() if _has_axis(name, value, like[name], num_runs)}
    return [
        {
            name: jax.tree.map(lambda leaf: leaf[k], value) if name in apart else value  # noqa: B023
            for name, value in init_params.items()
        }
        for k in range(num_runs)
    ]


def _has_axis(name: str, value: Any, like: Any, num_runs: int) -> bool:
    """True if a starting value has an axis of runs."""
    (leaves, structure), (wanted, structure_wanted) = jax.tree.flatten(value), jax.tree.flatten(like)
    shapes, needed = [np.shape(leaf) for leaf in leaves], [leaf.shape for leaf in wanted]
    if shapes == needed or str(structure) != str(structure_wanted):
        return False  # another structure will be refused by its name
    if shapes == [(num_runs, *shape) for shape in needed]:
        return True
    shown = (shapes[0], needed[0], (num_runs, *needed[0])) if len(needed) == 1 else (shapes, needed, "a leading axis")
    raise ValueError(
        f"init_params['{name}'] has shape {shown[0]}, but the param site has shape {shown[1]}. Give a value of that "
        f"shape for all of the {num_runs} runs, or one for each: {shown[2]}."
    )
