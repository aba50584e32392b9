# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The log marginal likelihood at a given theta, with an error from one run.

The estimate comes from the draws of a reference distribution that is put where the posterior lies; if they do not
suffice, from tempered populations (see `islands`). It is unbiased for ``p_theta(y)``, and its standard deviation is
that of independent islands.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer.importance import _psis_khat

from numpyro_smcopt import laplace
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import InvariantKernel
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.start import Start, starts_from_prior
from numpyro_smcopt.reporting import effort, islands, programs
from numpyro_smcopt.reporting.reference import SIZE, draw_uniforms
from numpyro_smcopt.reporting.standard_errors import whitening
from numpyro_smcopt.types import Array, Params

NOISY_EVIDENCE = 0.5  # nats
FEW_DRAWS = 40.0
NO_TAIL = 1e-3  # nats between the heaviest fifth of the weights
HEAVY_TAIL = 0.7
NO_DERIVATIVES = "there are too many parameters, or too many latents in a block"


class LaplacePoint(NamedTuple):
    """Laplace's approximation of the log marginal likelihood at a theta; arrays of the host.

    Attributes:
        theta: [P] flat and unconstrained.
        terms: [K] energy terms at the mode of the latents.
        log_volumes: [B] what the blocks add: ``D_b / 2 log(2 pi) - 1/2 log det H_b``.
        score: [P] gradient of minus the approximation.
    """

    theta: np.ndarray
    terms: np.ndarray
    log_volumes: np.ndarray
    score: np.ndarray


class Exploration(NamedTuple):
    """Fresh particles at a theta, and what they tell; arrays of the host.

    Attributes:
        fixed: What does not depend on particles.
        log_evidence: Log marginal likelihood, relative to an unknown constant if ``relative``.
        std: Its standard deviation: Monte Carlo error and rounding.
        relative: Whether the prior cannot be drawn from, so that only slopes and samples are known.
        laplace: The Laplace approximation of the log evidence; NaN if there is none.
        laplace_point: The same and its gradient, or in words why there is none.
        ess: [B] effective number of draws.
        tempered: Whether drawing from the reference did not suffice.
        num_particles: Draws behind it, those of the populations if they were tempered.
        acceptance: Mean acceptance of the last moves; NaN if nothing was moved.
        num_unfinished: Blocks of islands that did not reach temperature one.
        num_ancestors: Draws at the start of a tempered island that have descendants, in the worst block of the worst
            island; NaN if nothing was tempered.
        slopes: Derivatives of minus the log marginal likelihood in the flat theta, in double precision; None if theta
            is too large, or absent.
        outer: [P, P] outer product of the scores of independent units, likewise, if it was asked for.
        pareto_k: Tail index of the importance weights in the worst block; NaN if none were used.
        samples: Latent and deterministic sites, [S, ...].
        log_weights: [S].
    """

    fixed: programs.Fixed
    log_evidence: float
    std: float
    relative: bool
    laplace: float
    laplace_point: LaplacePoint | str
    ess: np.ndarray
    tempered: bool
    num_particles: int
    acceptance: float
    num_unfinished: int
    num_ancestors: float
    slopes: programs.Slopes | None
    outer: np.ndarray | None
    pareto_k: float
    samples: dict[str, Array]
    log_weights: Array


class Cloud(NamedTuple):
    """Particles of the posterior, from which an exploration starts.

    Attributes:
        x: [N, D].
        log_weights: [N, B] normalised log weights.
        blocks: The partition.
    """

    x: Array
    log_weights: Array
    blocks: Blocks


class Frame(NamedTuple):
    """Directions of theta that a report is differentiated along.

    Attributes:
        complete: [P, P] complete-data information at latents that stay, in double precision.
        columns: [P, P] the directions, see `standard_errors.whitening`; in the precision of theta.
    """

    complete: np.ndarray
    columns: np.ndarray


def find_frame(rng_key: Array, start: Start, params: Params, cloud: Cloud, complete: Any = None) -> Frame | None:
    """Directions along which the complete-data information is near the identity; None if theta is too large.

    Args:
        rng_key: Randomness.
        start: The target, and programs bound to it.
        params: Constrained.
        cloud: Particles of the posterior at ``params``, or near it.
        complete: [P, P] complete-data information, if it is known from a fit; otherwise it is formed.
    """
    num_params = sum(np.size(leaf) for leaf in jax.tree.leaves(start.theta))
    if not 0 < num_params <= budget.LARGEST_INFORMATION:
        return None
    known = np.zeros((num_params, num_params)) if complete is None else np.asarray(complete, float)
    if not np.any(known):
        num_particles, work = len(cloud.x), start.target.work(start.theta)
        num = budget.num_for_information(num_particles, cloud.blocks.num_blocks, num_params, work)
        some = slice(0, num * (num_particles // num), num_particles // num)
        place = params, cloud.x[some], cloud.log_weights[some], cloud.blocks
        known = np.asarray(start.call("complete", programs.complete_information, rng_key, *place), float)
    columns = whitening(known)
    return Frame(known, columns.astype(jnp.result_type(*jax.tree.leaves(start.theta), float)))


def explore(
    rng_key: Array,
    start: Start,
    params: Params,
    cloud: Cloud,
    kernel: InvariantKernel,
    *,
    frame: Frame | None = None,
    sandwich: bool = False,
    continuous: bool = True,
    init_strategy: Callable | None = None,
    num_islands: int | None = None,
) -> Exploration:
    """Draw fresh particles at ``params`` and weigh them.

    Args:
        rng_key: Randomness.
        start: The target, and programs bound to it; ``start.theta`` gives shapes only.
        params: Constrained.
        cloud: Particles of the posterior at ``params``, or near it.
        kernel: Moves particles, should that be necessary.
        frame: Directions to differentiate along; None if no derivatives in theta are wanted.
        sandwich: Whether the outer product of the scores of independent units is wanted, too.
        continuous: Whether the density is continuous in the latents, so that they may move along with theta.
        init_strategy: Where particles start, if not in the prior.
        num_islands: Independent sets of draws, an even number; by default as many as the model's work allows. So many
            populations are tempered, too, should that be necessary, but not fewer than the spread of which is known.
    """
    sites, blocks = start.target.sites, cloud.blocks
    if sites.num_latents == 0:
        return _exact(rng_key, start, params, frame, sandwich)
    rng = host_generator(rng_key)
    columns = np.zeros((0, 0), cloud.x.dtype) if frame is None else frame.columns
    num_params = len(columns)
    order = rng.uniform(size=(2, blocks.num_blocks)).astype(cloud.x.dtype)
    if not laplace.affordable(blocks):
        wanted = 0 if num_islands is None else -(-num_islands * SIZE // cloud.x.shape[0])
        return _explore_wide(
            rng, rng_key, start, params, cloud, kernel, columns, order, sandwich, init_strategy, wanted
        )

    num, sandwich, drawn = _draw(rng, rng_key, start, params, cloud, order, columns, sandwich, continuous, num_islands)
    found = islands.combine_weighed(*jax.device_get((drawn.tally, drawn.at_probes, cloud.log_weights)))
    rest = jax.device_get((drawn.slopes, drawn.outer, drawn.samples, drawn.log_weights))
    pareto_k = _pareto_k(np.asarray(drawn.worst_log_weights))
    # A heavy tail says the same as few effective draws: a part of the posterior, another mode for instance, is left to
    # the components that reach everywhere.
    tempered = not found.trustworthy or pareto_k > HEAVY_TAIL
    acceptance, num_unfinished, num_ancestors = np.nan, 0, np.nan
    if tempered:
        num = max(effort.TEMPERED_ISLANDS, num_islands or 0)
        keys = random.split(rng_key, num)
        some = draw_uniforms(rng, num, sites.can_draw_prior, sites.num_latents).astype(cloud.x.dtype)
        informing = num if drawn.slopes is not None else 0
        draws = effort.slope_draws(informing, SIZE, num_params, blocks.num_blocks, start.target.work(start.theta))
        picks = programs.draw_picks(rng, draws, SIZE, blocks.num_blocks).astype(cloud.x.dtype)
        temper = ("temper", kernel, draws, sandwich), programs.temper_program(kernel, draws, sandwich)
        done = jax.device_get(start.call(*temper, keys, some, picks, order, columns, drawn, blocks, found.missed))
        found = islands.combine_tempered(done.log_evidence)
        rest, pareto_k = (done.slopes, done.outer, done.samples, done.log_weights), np.nan
        acceptance, num_unfinished = float(np.mean(done.acceptance)), int(np.sum(done.num_unfinished))
        num_ancestors = float(np.min(done.num_ancestors))
    reference = drawn.reference
    fixed, base, log_volumes, concave = jax.device_get(
        (drawn.fixed, reference.base, reference.laplace, reference.concave)
    )
    point = _laplace_point(drawn, columns, "the density jumps in the latents" if not continuous else NO_DERIVATIVES)
    approximation = float(np.sum(log_volumes, dtype=float)) - float(np.sum(base, dtype=float))
    # The terms themselves are rounded, by half a unit in the last place at best.
    rounding = float(np.finfo(base.dtype).eps * np.sum(np.abs(base), dtype=float))
    slopes, outer, samples, log_weights = rest
    return Exploration(
        fixed=fixed,
        log_evidence=approximation + float(np.sum(found.log_evidence)),
        std=float(np.hypot(np.sqrt(np.sum(found.variance)), rounding)),
        relative=False,
        laplace=approximation if np.all(concave) else np.nan,
        laplace_point=point,
        ess=found.ess,
        tempered=tempered,
        num_particles=num * SIZE,
        acceptance=acceptance,
        num_unfinished=num_unfinished,
        num_ancestors=num_ancestors,
        **_in_theta(columns, slopes, outer),
        pareto_k=pareto_k,
        samples=samples,
        log_weights=log_weights,
    )


def laplace_at(
    rng_key: Array, start: Start, params: Params, cloud: Cloud, frame: Frame | None, *, sandwich: bool = False
) -> LaplacePoint | str:
    """Laplace's approximation at other parameters than those that were explored: the same program again.

    Args:
        rng_key: See `explore`, whose arguments the others must be, too.
        start: The target.
        params: Constrained.
        cloud: Particles.
        frame: Directions to differentiate along.
        sandwich: As it was.

    Returns:
        The approximation, or in words why there is none.
    """
    rng = host_generator(rng_key)
    columns = np.zeros((0, 0), cloud.x.dtype) if frame is None else frame.columns
    order = rng.uniform(size=(2, cloud.blocks.num_blocks)).astype(cloud.x.dtype)
    drawn = _draw(rng, rng_key, start, params, cloud, order, columns, sandwich, True, None, wanted=False)[2]
    return _laplace_point(drawn, columns, NO_DERIVATIVES)


def _draw(
    rng: np.random.Generator,
    rng_key: Array,
    start: Start,
    params: Params,
    cloud: Cloud,
    order: np.ndarray,
    columns: np.ndarray,
    sandwich: bool,
    continuous: bool,
    num_islands: int | None,
    *,
    wanted: bool = True,
) -> tuple[int, bool, programs.Drawn]:
    """How many islands there are, whether there is a sandwich, and the draws of the reference."""
    sites, blocks, work = start.target.sites, cloud.blocks, start.target.work(start.theta)
    num = num_islands or effort.num_islands(work)
    informing = effort.num_informing(num, len(columns), work)
    sandwich = sandwich and informing > 0
    draws = effort.slope_draws(informing, SIZE, len(columns), blocks.num_blocks, work)
    uniforms = draw_uniforms(rng, num, sites.can_draw_prior, sites.num_latents).astype(cloud.x.dtype)
    picks = programs.draw_picks(rng, draws, SIZE, blocks.num_blocks).astype(cloud.x.dtype)
    transported = continuous and len(columns) * blocks.width * work <= effort.TRANSPORT_WORK
    draw = ("draw", num, draws, transported, sandwich), programs.draw_program(draws, transported, sandwich)
    place = params, columns, cloud.x, cloud.log_weights, blocks
    return num, sandwich, start.call(*draw, np.asarray(wanted), rng_key, uniforms, picks, order, *place)


def _laplace_point(drawn: programs.Drawn, columns: np.ndarray, without_score: str) -> LaplacePoint | str:
    if drawn.laplace_score is None:
        return without_score
    reference = drawn.reference
    theta = np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(jax.device_get(drawn.fixed.theta))])
    score = np.asarray(drawn.laplace_score, float) @ _back(columns)
    found = (*jax.device_get((reference.base, reference.laplace)), score)
    point = LaplacePoint(*(np.asarray(v, float) for v in (theta, *found)))
    if not np.all(np.asarray(reference.concave)) or not all(np.all(np.isfinite(v)) for v in point):
        return "the posterior of the latents has no proper mode"
    return point


def _explore_wide(
    rng: np.random.Generator,
    rng_key: Array,
    start: Start,
    params: Params,
    cloud: Cloud,
    kernel: InvariantKernel,
    columns: np.ndarray,
    order: np.ndarray,
    sandwich: bool,
    init_strategy: Callable | None,
    wanted: int,
) -> Exploration:
    num_particles, num = cloud.x.shape[0], max(effort.WIDE_ISLANDS, wanted)
    informing = num if 0 < len(columns) <= budget.LARGEST_INFORMATION else 0
    place = len(columns), cloud.blocks.num_blocks, start.target.work(start.theta)
    draws, sandwich = effort.slope_draws(informing, num_particles, *place), sandwich and informing > 0
    picks = programs.draw_picks(rng, draws, num_particles, cloud.blocks.num_blocks).astype(cloud.x.dtype)
    build = programs.wide_program(kernel, num_particles, draws, sandwich, init_strategy)
    wide = ("wide", kernel, num_particles, draws, sandwich), build
    keys = random.split(rng_key, num)
    fixed, done = jax.device_get(start.call(*wide, keys, picks, order, params, columns, cloud.x[0], cloud.blocks))
    found = islands.combine_tempered(done.log_evidence)
    known = starts_from_prior(start.target, init_strategy)
    return Exploration(
        fixed=fixed,
        log_evidence=float(np.sum(found.log_evidence) + done.free) if known else np.nan,
        std=float(np.sqrt(np.sum(found.variance))) if known else np.nan,
        relative=not known,
        laplace=np.nan,
        laplace_point=f"blocks of {cloud.blocks.width} latents are too large for their Hessians",
        ess=found.ess,
        tempered=True,
        num_particles=num * num_particles,
        acceptance=float(np.mean(done.acceptance)),
        num_unfinished=int(np.sum(done.num_unfinished)),
        num_ancestors=float(np.min(done.num_ancestors)),
        **_in_theta(columns, done.slopes, done.outer),
        pareto_k=np.nan,
        samples=done.samples,
        log_weights=done.log_weights,
    )


def _exact(rng_key: Array, start: Start, params: Params, frame: Frame | None, sandwich: bool) -> Exploration:
    leaves = jax.tree.leaves(start.theta)
    unit = np.eye(sum(np.size(leaf) for leaf in leaves), dtype=jnp.result_type(*leaves, float))
    columns = unit if frame is None else frame.columns
    call = ("exact", sandwich), programs.exact_program(sandwich)
    fixed, terms, slopes, outer, (samples, log_weights) = jax.device_get(start.call(*call, rng_key, params, columns))
    value = -float(np.sum(terms, dtype=float))
    return Exploration(
        fixed=fixed,
        log_evidence=value,
        std=0.0,
        relative=False,
        laplace=value,
        laplace_point="there are no latents",
        ess=np.array([np.inf]),
        tempered=False,
        num_particles=0,
        acceptance=np.nan,
        num_unfinished=0,
        num_ancestors=np.nan,
        **_in_theta(columns, slopes, outer),
        pareto_k=np.nan,
        samples=samples,
        log_weights=log_weights,
    )


def _in_theta(columns: np.ndarray, slopes: programs.Slopes | None, outer: np.ndarray | None) -> dict[str, Any]:
    """Derivatives along columns as derivatives in theta. In double precision nothing is lost on the way."""
    if slopes is None:
        return {"slopes": None, "outer": None}
    back = _back(columns)
    score, plain, information, complete = (np.asarray(v, float) for v in slopes)
    square = lambda v: back.T @ v @ back  # noqa: E731
    found = programs.Slopes(score @ back, plain @ back, square(information), square(complete))
    return {"slopes": found, "outer": None if outer is None else square(np.asarray(outer, float))}


def _back(columns: np.ndarray) -> np.ndarray:
    """[P, P] what turns a row of derivatives along columns into derivatives in theta."""
    columns = np.asarray(columns, float)
    units = np.maximum(np.abs(columns).max(1, initial=0.0), np.finfo(float).tiny)
    return np.linalg.inv(columns / units[:, None]) / units


def _pareto_k(log_weights: np.ndarray) -> float:
    """Shape of the generalised Pareto distribution in the tail of the weights (Vehtari et al. 2024), NumPyro's fit."""
    finite = np.asarray(log_weights[np.isfinite(log_weights)], float)
    # The same weight over and over has no tail: the reference is exact.
    if len(finite) < FEW_DRAWS or np.ptp(np.sort(finite)[-len(finite) // 5 :]) < NO_TAIL:
        return -np.inf
    return _psis_khat(finite)


def about_draws(found: Exploration) -> list[str]:
    """What is to be known about the draws themselves, with remedies."""
    warnings = []
    if found.num_unfinished:
        warnings.append(
            f"{found.num_unfinished} tempered populations did not reach the posterior: the log evidence and everything "
            "else here is of no use. Rescale the model, or reparametrise it."
        )
    if found.relative:
        warnings.append(
            "The prior of the latents cannot be drawn from and their blocks are too large for a reference "
            "distribution, so there is no log evidence."
        )
    if np.min(found.ess) < FEW_DRAWS:
        warnings.append(
            f"Only {np.min(found.ess):.0f} effective draws in the worst block of latents: errors may be larger than "
            "stated. Reparametrise the model, or compare with another key."
        )
    if found.std > NOISY_EVIDENCE:
        warnings.append(f"The log evidence is uncertain by {found.std:.1f} nats.")
    return warnings


def host_generator(rng_key: Array) -> np.random.Generator:
    """A generator of the host that is seeded by a key."""
    is_typed = jax.dtypes.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    return np.random.default_rng(np.asarray(random.key_data(rng_key) if is_typed else rng_key).ravel().tolist())
