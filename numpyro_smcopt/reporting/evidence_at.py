# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The log marginal likelihood as a function of theta, with an error from one run.

The estimate comes from the draws of a mixture that is put where the posterior lies; if they do not suffice, from
tempered populations (see `replicates`). It is unbiased for ``p_theta(y)``, and its standard deviation is that of
independent replicates.
"""

import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from numpyro.infer.importance import _psis_khat

from numpyro_smcopt import laplace
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import whitening
from numpyro_smcopt.kernels import InvariantKernel
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.first_cloud import starts_from_prior
from numpyro_smcopt.reporting import effort, programs
from numpyro_smcopt.reporting.coordinates import ravel
from numpyro_smcopt.reporting.derivatives import Derivatives, draw_picks, inverse
from numpyro_smcopt.reporting.effort import DerivativeDraws
from numpyro_smcopt.reporting.laplace_fit import LaplacePoint, no_laplace
from numpyro_smcopt.reporting.proposal_mixture import SIZE, draw_uniforms
from numpyro_smcopt.reporting.replicates import Draws, combine_tempered, combine_weighed
from numpyro_smcopt.types import Array, Params

FEWEST_IN_TAIL = 40.0  # weights, of which a tail index is found
NO_TAIL = 1e-3  # nats between the heaviest fifth of the weights
HEAVY_TAIL = 0.7


class LogEvidence(NamedTuple):
    """An estimate of a log marginal likelihood, what `log_evidence` returns.

    Attributes:
        log_evidence: The log marginal likelihood; NaN if nothing can be drawn from the prior of the latents and their
            blocks are too large for Hessians, so that only draws are known.
        log_evidence_std: Its standard deviation: Monte Carlo error and rounding.
        samples: Draws from the posterior: latent and deterministic sites, [S, ...] each.
        log_weights: [S] their normalised log weights; equal where the latents fall into several blocks.
        ess: Effective number of draws, in the worst block.
        laplace: The Laplace approximation of the log evidence; NaN where there is none.
        tempered: Whether the draws from the mixture did not suffice, so that populations were tempered.
        num_particles: Draws behind the estimate; those of the populations if they were tempered, 0 without latents.
        pareto_k: Tail index of the importance weights in the worst block; NaN if none were used, minus infinity
            without a tail.
        acceptance_rate: Mean acceptance of the last moves; NaN if nothing was moved.
        num_unfinished: Blocks of populations that did not reach the posterior.
        unique_ancestors: Draws at the start of a population that have descendants, in the worst block of the worst
            population; NaN if nothing was tempered.
    """

    log_evidence: float
    log_evidence_std: float
    samples: dict[str, Array]
    log_weights: Array
    ess: float
    laplace: float
    tempered: bool
    num_particles: int
    pareto_k: float = np.nan
    acceptance_rate: float = np.nan
    num_unfinished: int = 0
    unique_ancestors: float = np.nan


class Exploration(NamedTuple):
    """Findings from fresh particles at a theta; arrays of the host.

    Attributes:
        fixed: What does not depend on particles.
        evidence: The estimate of the log evidence.
        laplace: Laplace's approximation of it and its gradient, or why there is none.
        derivatives: Of minus the log marginal likelihood in the flat theta, in double precision; None if theta is too
            large, or absent.
    """

    fixed: programs.Fixed
    evidence: LogEvidence
    laplace: LaplacePoint
    derivatives: Derivatives | None


def complete_information(
    rng_key: Array, start: BoundTarget, params: Params, cloud: Draws, blocks: Blocks
) -> np.ndarray:
    """[P, P] complete-data information at latents that stay, from a cloud near the posterior; in double precision."""
    num_params, num_particles = ravel(start.theta).size, len(cloud.x)
    num = budget.num_for_information(num_particles, blocks.num_blocks, num_params, start.target.work(start.theta))
    some = slice(0, num * (num_particles // num), num_particles // num)
    place = params, Draws(cloud.x[some], cloud.log_weights[some]), blocks
    return np.asarray(start.call("complete", programs.complete_information, rng_key, *place), float)


@dataclasses.dataclass(frozen=True)
class EvidenceAt:
    """The log evidence as a function of theta, with the same randomness everywhere: call it with parameters.

    Attributes:
        rng_key: Randomness.
        start: The target, and programs bound to it; ``start.theta`` gives shapes only.
        cloud: Particles of the posterior, or near it, with normalised log weights.
        blocks: The partition.
        kernel: Moves particles, should that be necessary.
        complete: [P, P] complete-data information, which says along which directions to differentiate; None if no
            derivatives in theta are wanted.
        sandwich: Whether the outer product of the scores of independent units is wanted, too.
        init_strategy: Where particles start, if not in the prior.
        num_replicates: Independent sets of draws, an even number; by default as many as the model's work allows. So
            many populations are tempered, too, should that be necessary, but not fewer than the spread of which is
            known.
    """

    rng_key: Array
    start: BoundTarget
    cloud: Draws
    blocks: Blocks
    kernel: InvariantKernel
    complete: np.ndarray | None = None
    sandwich: bool = False
    init_strategy: Callable | None = None
    num_replicates: int | None = None

    def __call__(self, params: Params, continuous: bool = True) -> Exploration:
        """Draw fresh particles at ``params`` and weigh them.

        Args:
            params: Constrained.
            continuous: Whether the density is continuous in the latents, so that they may move along with theta.
        """
        if self.start.target.sites.num_latents == 0:
            return self._exactly(params)
        return self._by_mixture(params, continuous) if laplace.affordable(self.blocks) else self._from_prior(params)

    def laplace(self, params: Params) -> LaplacePoint:
        """Laplace's approximation at ``params``: the program that has drawn at others, once more."""
        return self._laplace_point(self._draw(_host_generator(self.rng_key), params, True, wanted=False)[0], True)

    @functools.cached_property
    def columns(self) -> np.ndarray:
        """[P, P] directions along which the complete-data information is near the identity, in theta's precision."""
        leaves = jax.tree.leaves(self.start.theta)
        dtype = jnp.result_type(*leaves, float)
        return np.zeros((0, 0), dtype) if self.complete is None else whitening(self.complete).astype(dtype)

    def _by_mixture(self, params: Params, continuous: bool) -> Exploration:
        rng = _host_generator(self.rng_key)
        drawn, draws, numbers = self._draw(rng, params, continuous)
        found = combine_weighed(*jax.device_get((drawn.moments, drawn.at_probes, self.cloud.log_weights)))
        told: Any = drawn
        about: dict[str, Any] = {"pareto_k": _pareto_k(np.asarray(drawn.worst_log_weights))}
        num = len(drawn.moments)
        # A heavy tail says the same as few effective draws: a part of the posterior, another mode for instance, is left
        # to the components that reach everywhere.
        tempered = not found.trustworthy or about["pareto_k"] > HEAVY_TAIL
        if tempered:
            num = max(effort.TEMPERED_REPLICATES, self.num_replicates or 0)
            draws = self._derivative_draws(num if draws.replicates else 0, SIZE)
            numbers = self._numbers(rng, num, SIZE, draws, numbers["order"])
            program = ("temper", self.kernel, num, draws), programs.temper_program(self.kernel, draws)
            told = self.start.call(*program, self.rng_key, numbers, drawn, self.blocks, found.missed)
            found, about = combine_tempered(told.log_evidence), _about_tempering(told)
        fixed = jax.device_get(drawn.fixed)
        base, log_volumes, concave = jax.device_get((drawn.mixture.base, drawn.mixture.laplace, drawn.mixture.concave))
        approximation = float(np.sum(log_volumes, dtype=float)) - float(np.sum(base, dtype=float))
        value = approximation + float(np.sum(found.log_evidence))
        # The terms themselves are rounded, by half a unit in the last place at best, unless they come in two halves.
        eps = 0.0 if self.blocks.sums.double else np.finfo(base.dtype).eps
        rounding = float(eps * np.sum(np.abs(base), dtype=float))
        evidence = LogEvidence(
            value,
            float(np.linalg.norm([np.sqrt(np.sum(found.variance)), rounding, self._excess(value)])),
            jax.device_get(told.samples),
            jax.device_get(told.log_weights),
            float(np.min(found.ess)),
            approximation if np.all(concave) else np.nan,
            tempered,
            num * SIZE,
            **about,
        )
        return Exploration(fixed, evidence, self._laplace_point(drawn, continuous), self._in_theta(told.derivatives))

    def _draw(
        self, rng: np.random.Generator, params: Params, continuous: bool, *, wanted: bool = True
    ) -> tuple[programs.Drawn, DerivativeDraws, programs.Numbers]:
        work, num_params = self.start.target.work(self.start.theta), len(self.columns)
        num = self.num_replicates or effort.num_replicates(work)
        draws = self._derivative_draws(effort.num_informing(num, num_params, work), SIZE)
        order = rng.uniform(size=(2, self.blocks.num_blocks))
        numbers = self._numbers(rng, num, SIZE, draws, order)
        transported = continuous and num_params * self.blocks.width * work <= effort.TRANSPORT_WORK
        program = ("draw", num, draws, transported), programs.draw_program(draws, transported)
        place = params, self.columns, self.cloud, self.blocks
        return self.start.call(*program, np.asarray(wanted), self.rng_key, numbers, *place), draws, numbers

    def _derivative_draws(self, num: int, size: int) -> DerivativeDraws:
        place = len(self.columns), self.blocks.num_blocks, self.start.target.work(self.start.theta)
        return effort.derivative_draws(num, size, *place, self.sandwich)

    def _numbers(
        self, rng: np.random.Generator, num: int, size: int, draws: DerivativeDraws, order: Any
    ) -> programs.Numbers:
        sites = self.start.target.sites
        mixture = draw_uniforms(rng, num, sites.can_draw_prior, sites.num_latents)
        picks = draw_picks(rng, draws, size, self.blocks.num_blocks)
        numbers = {"mixture": mixture, "picks": picks, "order": order}
        return {name: v.astype(self.cloud.x.dtype) for name, v in numbers.items()}

    def _laplace_point(self, drawn: programs.Drawn, continuous: bool) -> LaplacePoint:
        if not continuous:
            return no_laplace("the density jumps in the latents")
        if drawn.laplace_score is None:
            return no_laplace("there are too many parameters, or too many latents in a block")
        score = np.asarray(drawn.laplace_score, float) @ inverse(self.columns)
        base, log_volumes = (np.asarray(v, float) for v in (drawn.mixture.base, drawn.mixture.laplace))
        point = LaplacePoint(ravel(drawn.fixed.theta), base, log_volumes, score)
        if np.all(np.asarray(drawn.mixture.concave)) and all(np.all(np.isfinite(v)) for v in point[:4]):
            return point
        return no_laplace("the posterior of the latents has no proper mode")

    def _from_prior(self, params: Params) -> Exploration:
        rng, num_particles = _host_generator(self.rng_key), self.cloud.x.shape[0]
        num = max(effort.WIDE_REPLICATES, -(-(self.num_replicates or 0) * SIZE // num_particles))
        draws = self._derivative_draws(num if 0 < len(self.columns) <= budget.LARGEST_INFORMATION else 0, num_particles)
        order = rng.uniform(size=(2, self.blocks.num_blocks))
        picks = draw_picks(rng, draws, num_particles, self.blocks.num_blocks)
        numbers = {"order": order.astype(self.cloud.x.dtype), "picks": picks.astype(self.cloud.x.dtype)}
        settings = self.kernel, num, num_particles, draws, self.init_strategy
        program = ("wide", *settings[:4]), programs.wide_program(*settings)
        place = params, self.columns, self.cloud.x[0], self.blocks
        fixed, free, told = jax.device_get(self.start.call(*program, self.rng_key, numbers, *place))
        found = combine_tempered(told.log_evidence)
        known = starts_from_prior(self.start.target, self.init_strategy)
        evidence = LogEvidence(
            float(np.sum(found.log_evidence) + free) if known else np.nan,
            float(np.sqrt(np.sum(found.variance))) if known else np.nan,
            told.samples,
            told.log_weights,
            float(np.min(found.ess)),
            np.nan,
            True,
            num * num_particles,
            **_about_tempering(told),
        )
        missing = no_laplace(f"blocks of {self.blocks.width} latents are too large for their Hessians")
        return Exploration(fixed, evidence, missing, self._in_theta(told.derivatives))

    def _exactly(self, params: Params) -> Exploration:
        size = ravel(self.start.theta).size
        columns = np.eye(size, dtype=self.columns.dtype) if self.complete is None else self.columns
        program = ("exact", self.sandwich), programs.exact_program(self.sandwich)
        found = jax.device_get(self.start.call(*program, self.rng_key, params, columns, self.blocks))
        fixed, terms, derivatives, samples, log_weights = found
        value = -float(np.sum(terms, dtype=float))
        evidence = LogEvidence(value, self._excess(value), samples, log_weights, np.inf, value, False, 0)
        derivatives = derivatives.in_theta(columns) if len(columns) else None
        return Exploration(fixed, evidence, no_laplace("there are no latents"), derivatives)

    def _excess(self, log_evidence: float) -> float:
        """Nats by which it is wrong for certain: a probability is at most one."""
        return max(log_evidence, 0.0) if self.start.target.sites.discrete_data else 0.0

    def _in_theta(self, derivatives: Derivatives | None) -> Derivatives | None:
        # In double precision nothing is lost on the way.
        return None if derivatives is None else derivatives.in_theta(self.columns)


def _about_tempering(told: programs.Tempered) -> dict[str, Any]:
    return {
        "acceptance_rate": float(np.mean(told.acceptance)),
        "num_unfinished": int(np.sum(told.unfinished)),
        "unique_ancestors": float(np.min(told.num_ancestors)),
    }


def _pareto_k(log_weights: np.ndarray) -> float:
    """Shape of the generalised Pareto distribution in the tail of the weights (Vehtari et al. 2024), NumPyro's fit."""
    finite = np.asarray(log_weights[np.isfinite(log_weights)], float)
    # The same weight over and over has no tail: the mixture is exact.
    if len(finite) < FEWEST_IN_TAIL or np.ptp(np.sort(finite)[-len(finite) // 5 :]) < NO_TAIL:
        return -np.inf
    with warnings.catch_warnings():
        # Where a handful of draws has nearly all weight NumPyro warns and says infinity; the report tells it in words.
        warnings.filterwarnings("ignore", "Not enough tail samples")
        return _psis_khat(finite)


def _host_generator(rng_key: Array) -> np.random.Generator:
    """A generator of the host that is seeded by a key."""
    is_typed = jax.dtypes.issubdtype(rng_key.dtype, jax.dtypes.prng_key)
    return np.random.default_rng(np.asarray(random.key_data(rng_key) if is_typed else rng_key).ravel().tolist())
