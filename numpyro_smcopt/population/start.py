# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What algorithms do before the first update: find the blocks, walk near the maximum, make a cloud at theta.

Each is a function of its own, so that an algorithm takes what it needs, in this order: `start_blocks`, `warm_theta`,
`first_cloud` (pure, to be called inside a program), `refuse_hopeless` and `warn_of_unfinished`.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt import faults, laplace
from numpyro_smcopt.block_search import probe_rows
from numpyro_smcopt.blocks import Blocks, Partition, add_up
from numpyro_smcopt.kernels import Kernel, Preconditioner, Step
from numpyro_smcopt.objectives import Objective
from numpyro_smcopt.population import tempering
from numpyro_smcopt.population.budget import LARGEST_INFORMATION, num_for_information
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import Sites, StaticArguments, Target, flat_terms
from numpyro_smcopt.term_sums import NO_SUMS, Sums
from numpyro_smcopt.types import Array, Theta

WARM_DRAWS = 64
CANDIDATES = 32  # drawn where the origin's neighbourhood has no finite energy
BURN_IN = 100
FINAL_MOVES = 10


class Start:
    """The target's facts, and programs bound to the data.

    Args:
        program: Compiles ``function(target, *arguments)`` under a name, as ``(static, arrays, *arguments)``.
        static: Static arguments of the model.
        arrays: Its traced arguments.
        target: The target, bound to the data; not to be evaluated eagerly, only to be asked for its sites.
        theta: Unconstrained starting values.
        foresee: Told the shapes and types of the first state as soon as they are known, while it is still being made.
    """

    def __init__(
        self,
        program: Callable[[Any, Callable], Any],
        static: StaticArguments,
        arrays: list[Array],
        target: Target,
        theta: Theta,
        foresee: Callable[[Any], None] = lambda state: None,
    ) -> None:
        self._program, self._static, self._arrays = program, static, arrays
        self.target, self.theta, self.foresee = target, theta, foresee

    def call(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """Compile ``function(target, *arguments)`` under ``name`` and call it."""
        return self._program(name, function)(self._static, self._arrays, *arguments)

    def prepare(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """Begin to compile what `call` will call; shapes and types of its result."""
        return self._program(name, function).prepare(self._static, self._arrays, *arguments)


class Rehearsal(Start):
    """A start that computes nothing: shapes and types take the place of arrays, so a state is found to be restored to.

    Args:
        *args: See `Start`; ``theta`` may be shapes.
        blocks: The partition, which cannot be found without computing.
    """

    def __init__(self, *args: Any, blocks: Blocks) -> None:
        super().__init__(*args)
        self.blocks = blocks

    def call(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """The shapes and types that `Start.call` would return."""
        return self._program(name, function).eval_shape(self._static, self._arrays, *arguments)

    prepare = call


# -- blocks --------------------------------------------------------------------------------------------------------
def start_blocks(rng_key: Array, start: Start, partition: Partition, init_strategy: Callable | None = None) -> Blocks:
    """The independent blocks of the latents.

    Args:
        rng_key: Randomness of the points where dependences are looked for.
        start: The target.
        partition: Finds them.
        init_strategy: See `draw_particles`.

    Raises:
        ValueError: If no point has a finite energy; the message names the site.
    """
    if isinstance(start, Rehearsal):
        return start.blocks
    sites = start.target.sites
    most = probe_rows(sites.num_latents)

    def probe(rows: np.ndarray, tangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Always as many rows, so that one compiled program serves all calls.
        pad = lambda v: np.concatenate([v, np.repeat(v[:1], most - len(v), axis=0)])  # noqa: E731
        found = start.call("probe", _probe, start.theta, pad(rows), pad(tangents))
        values, slopes = (np.asarray(v)[: len(rows)] for v in found)
        return values, slopes

    points = _generic_points(rng_key, start, probe, init_strategy)
    blocks = partition(probe, points, sites.num_terms, sites.units)
    faults.warn_of([faults.labels_from_one(_without_first_data(sites, blocks))])
    return add_up(blocks, sites.term_shapes)


def _without_first_data(sites: Sites, blocks: Blocks) -> list[str]:
    """Latent sites of which the first element reaches no data, and every other element does."""
    reached = np.unique(np.asarray(blocks.of_term)[~sites.prior_mask])
    with_data = np.isin(np.asarray(blocks.of_coordinate), reached)
    found, start = [], 0
    for name, site in sites.latents.items():
        size = math.prod(site.shape)
        if site.plates and site.shape and site.shape[0] > 2:
            rows = np.asarray(with_data[start : start + size].reshape(site.shape[0], -1).any(1))
            found += [name] if not rows[0] and rows[1:].all() else []
        start += size
    return found


def _generic_points(rng_key: Array, start: Start, probe: Callable, init_strategy: Callable | None) -> np.ndarray:
    """[2, D] points with finite energy that are special in no way."""
    sites = start.target.sites
    points = np.random.default_rng(1).uniform(-1, 1, (2, sites.num_latents)).astype(jnp.result_type(float))
    if np.all(np.isfinite(probe(points, np.zeros_like(points))[0])):
        return points
    draw = draw_particles(CANDIDATES, sites.can_draw_prior, init_strategy)
    drawn = np.asarray(start.call("candidates", draw, rng_key, start.theta))
    pairs = [drawn[k : k + 2] for k in range(0, CANDIDATES, 2)]
    energies = [probe(pair, np.zeros_like(points))[0] for pair in pairs]
    energy = np.concatenate(energies)
    refuse_hopeless(start, energy)
    best = np.argsort(-np.isfinite(energy).sum(1), kind="stable")[:2]
    return drawn[best]


def _probe(target: Target, theta: Theta, rows: Array, tangents: Array) -> tuple[Array, Array]:
    target = dataclasses.replace(target, validate=True)
    return jax.vmap(lambda x, v: jax.jvp(lambda x: target.terms(theta, x), (x,), (v,)))(rows, tangents)


# -- warm start ----------------------------------------------------------------------------------------------------
def warm_theta(start: Start, blocks: Blocks) -> tuple[Theta, np.ndarray] | None:
    """Theta near the maximum of the Laplace approximation, and the mode [D] of the latents there.

    None where that is not affordable or does not exist, and in a rehearsal.
    """
    if isinstance(start, Rehearsal):
        return None
    flat, unravel = _ravel(start.theta)
    if not laplace.affordable(blocks) or flat.size > LARGEST_INFORMATION:
        return None
    num_draws = num_for_information(WARM_DRAWS, 1, flat.size, start.target.work(start.theta))
    normals = laplace.fixed_normals(num_draws, blocks).astype(flat.dtype)

    def expand(target: Target, flat: Array, x: Array, normals: Array, blocks: Blocks) -> laplace.Expansion:
        terms_fn = lambda t, x: target.terms(unravel(t), x)  # noqa: E731
        return laplace.expand(terms_fn, flat, x, normals, blocks, target.work(unravel(flat)))

    expand_fn = lambda flat, x: start.call("expand", expand, flat, x, normals, blocks)  # noqa: E731
    bounded, origin = start.target.bounded_coordinates(start.theta), np.zeros(len(blocks.of_coordinate), flat.dtype)
    found = laplace.warm_start(expand_fn, flat, origin, bounded)
    return None if found is None else (unravel(found.theta), found.mode)


def _ravel(theta: Theta) -> tuple[np.ndarray, Callable[[Any], Theta]]:
    """`ravel_pytree` on the host, where nothing compiles; the way back serves traced vectors too."""
    leaves, treedef = jax.tree.flatten(theta)
    ends = np.cumsum([leaf.size for leaf in leaves])[:-1].tolist()

    def unravel(flat: Any) -> Theta:
        pieces = (np if isinstance(flat, np.ndarray) else jnp).split(flat, ends)
        shaped = [piece.reshape(leaf.shape).astype(leaf.dtype) for piece, leaf in zip(pieces, leaves, strict=True)]
        return jax.tree.unflatten(treedef, shaped)

    return np.concatenate([np.ravel(leaf) for leaf in leaves]), unravel


# -- first cloud ---------------------------------------------------------------------------------------------------
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
    terms_fn, flat, _ = flat_terms(target, theta)
    at_theta = lambda x: terms_fn(flat, x)  # noqa: E731
    from_prior = starts_from_prior(target, init_strategy)
    key_draw, key_move = random.split(rng_key)
    x = draw_particles(num_particles, from_prior, init_strategy)(target, key_draw, theta)
    prior = jnp.asarray(target.sites.prior_mask)
    curvature = None
    if kernel.preconditioning.dense and laplace.affordable(blocks) and blocks.width > 1:
        curvature = laplace.curvature(at_theta, mode, prior, blocks)
    size = jnp.full(blocks.num_blocks, kernel.step_size, x.dtype)
    step = Step(size, tempering.identity_like(mode, curvature))
    beta = jnp.full(blocks.num_blocks, 0.0 if from_prior else 1.0, x.dtype)
    final_moves = FINAL_MOVES if from_prior else BURN_IN
    return tempering.temper(
        key_move, at_theta, x, prior, blocks, kernel, step, curvature, beta, final_moves=final_moves
    )


def first_step(kernel: Kernel, found: Step, used: Kernel) -> Step:
    """Where the step of ``kernel`` starts; the first cloud was moved by ``used``, whose step ended as ``found``."""
    preconditioner = found.preconditioner
    if kernel.preconditioning.forgetting == 0.0 and not kernel.preconditioning.dense:
        preconditioner = Preconditioner(jnp.ones_like(preconditioner.scale))
    if kernel is used and kernel.target is not None:
        return Step(found.size, preconditioner)
    return Step(jnp.full_like(found.size, kernel.step_size), preconditioner)


def starts_from_prior(target: Target, init_strategy: Callable | None) -> bool:
    """Whether the first particles are draws from the prior, so that the log evidence is known from the start."""
    return target.sites.can_draw_prior and init_strategy is None


def refuse_hopeless(start: Start, terms: Array | np.ndarray, sums: Sums = NO_SUMS) -> None:
    """Raise if no particle has a finite energy.

    Args:
        start: The target.
        terms: [N, K] energy terms.
        sums: How they have been added up.

    Raises:
        ValueError: The message names the site.
    """
    if isinstance(start, Rehearsal):
        return
    finite = np.isfinite(np.asarray(terms))
    if np.any(np.all(finite, 1)):
        return
    first, what = 0, "sums of terms" if sums.sites else "terms"
    for name, size, _ in start.target.adding_up(sums).sites.terms:
        bad = ~finite[:, first : first + size].any(0)
        first += size
        if bad.any():
            raise ValueError(
                f"Site '{name}' has no finite log density at any starting point: {int(bad.sum())} of its {size} "
                f"{what} are NaN or infinite for every particle. Look for NaN or impossible values in the data that "
                "reach it, or start the parameters elsewhere with init_params."
            )
    raise ValueError(
        "The potential is not finite at any starting point. Start the parameters elsewhere with init_params, or pass "
        "init_strategy=numpyro.infer.init_to_median."
    )


def refuse_loss(start: Start, objective: Objective, loss: Array) -> None:
    """Raise if the loss is not finite at the start.

    Raises:
        ValueError: The message names the objective.
    """
    if not isinstance(start, Rehearsal) and not np.isfinite(loss):
        raise ValueError(
            f"The loss of {type(objective).__name__} is {float(loss)} at the start. Look for a reward that is NaN or "
            "infinite at every particle, a reference energy that is infinite, or data outside the support of the model."
        )


def warn_of_unfinished(start: Start, blocks: Blocks, num_unfinished: Array, num_stages: Array) -> None:
    """Warn if tempering did not bring the first particles to the posterior."""
    if not isinstance(start, Rehearsal):
        found = faults.unfinished_tempering(int(num_unfinished), blocks.num_blocks, int(num_stages))
        faults.warn_of([found])
