# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`SMCOptimizer`: settings, start, new data and faults; `smc_update` is what it does at every update."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt import faults
from numpyro_smcopt.adaptation import no_limit
from numpyro_smcopt.algorithms.base import ParticleAlgorithm, check_functions, check_number, whole_or_none
from numpyro_smcopt.algorithms.smc_update import SMCParts, SMCState, adopt, diagnose, estimate_at, loss_on
from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import Blocks, Partition, one_block
from numpyro_smcopt.kernels import HMC, Kernel, is_kernel
from numpyro_smcopt.objectives import (
    MarginalLikelihood,
    Objective,
    as_objective,
)
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.evaluate import added_up, evaluator, replace_dead
from numpyro_smcopt.population.first_cloud import first_cloud, first_step, starts_from_prior
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.population.warm_start import warm_start
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.resampling import ResamplingScheme, systematic
from numpyro_smcopt.results import Status
from numpyro_smcopt.theta_step import as_theta_step
from numpyro_smcopt.types import Array, Model, Theta
from numpyro_smcopt.weights import (
    reweight,
    uniform_log_weights,
)

LARGEST_LOSS = 0.25  # share of the particles that may meet a potential that is not finite


class SMCOptimizer(ParticleAlgorithm[SMCState]):
    """Minimise a loss whose gradient is an expectation under ``pi_theta``; by default, minus the marginal likelihood.

    Args:
        model: A callable with NumPyro primitives: `numpyro.param` sites are estimated, latent `numpyro.sample` sites
            are integrated out.
        optim: An optax, `numpyro.optim` or `jax.example_libraries` optimiser. The default has no learning rate: for the
            marginal likelihood `NaturalStep`, preceded by a Laplace warm start, for other objectives `FisherStep`.
        objective: What is minimised: an object from `objectives`, or a function of one sample whose expectation is. By
            default `MarginalLikelihood`, with control variates for the default step and plain, as in the paper, with an
            ``optim``.
        kernel: How particles move; by default `HMC` with a jittered, adapted step size.
        num_particles: N. For the marginal likelihood by default 128 where one weight is shared by all latents, and down
            to 32 for larger models with many independent blocks; for other objectives 128 to 1024.
        resampling: A resampling scheme; by default `resampling.systematic`.
        ess_threshold: A block is resampled if its ESS falls below this fraction of the particles.
        init_strategy: A strategy such as `numpyro.infer.init_to_uniform` for particles that cannot be drawn from the
            prior, or shall not be; the log evidence is then relative to the start.
        partition: How independent blocks are found; `one_block` keeps all latents together, as the paper does, and as
            every objective but the marginal likelihood needs it.
        handlers: NumPyro handlers that see the ``smcopt/...`` sites of every update.
        **static_kwargs: Keyword arguments of the model that stay fixed.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smcopt import SMCOptimizer
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> y = jnp.array([1.0, 2.0, 4.5])
        >>> result = SMCOptimizer(model).run(random.key(0), 200, y, progress_bar=False)
        >>> round(float(result.params["mean"]), 1)
        2.5

    Reference:
        Cuin, Tang, Carbone and Akyildiz, "Efficient Stochastic Optimisation via Sequential Monte Carlo", ICML 2026.
    """

    def __init__(
        self,
        model: Model,
        optim: Any = None,
        objective: Objective | None = None,
        *,
        kernel: Kernel | None = None,
        num_particles: int | None = None,
        resampling: ResamplingScheme | None = None,
        ess_threshold: float = 0.5,
        init_strategy: Callable | None = None,
        partition: Partition = find_blocks,
        handlers: Sequence[Any] = (),
        **static_kwargs: Any,
    ) -> None:
        super().__init__(model, handlers, static_kwargs)
        num_particles = whole_or_none("num_particles", num_particles)
        check_functions(resampling=resampling, init_strategy=init_strategy, partition=partition)
        check_number("ess_threshold", ess_threshold)
        if not 0.0 <= ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold is a fraction of the particles within [0, 1], got {ess_threshold!r}.")
        if kernel is not None and not is_kernel(kernel):
            raise TypeError(f"kernel must be an object from numpyro_smcopt.kernels such as MALA(), got {kernel!r}.")
        self.optim = None if optim is None else as_theta_step(optim)
        self.objective = (
            MarginalLikelihood(control_variates=optim is None) if objective is None else as_objective(objective)
        )
        self.kernel = kernel or HMC()
        self.num_particles = num_particles
        self.resampling = resampling or systematic
        self.ess_threshold = ess_threshold
        self.init_strategy = init_strategy
        self._parts = SMCParts(self.objective, self.kernel, self.resampling, self.optim)
        self._update = self._parts.order()
        self.partition = one_block if self.objective.whole_particles else partition

    state_type = SMCState

    # -- start --------------------------------------------------------------------------------------------------------
    def warm_start(self, bound: BoundTarget, theta: Theta, blocks: Blocks) -> tuple[Theta, Any] | None:
        """See `Algorithm.warm_start`."""
        return warm_start(bound, theta, blocks) if self.optim is None and self.maximises_likelihood else None

    def _num_particles_for(self, target: Target, theta: Theta, num_blocks: int) -> int:
        if target.sites.num_latents == 0:
            return 1  # plain maximum likelihood: there is nothing to integrate out
        return self.num_particles or budget.default_num_particles(
            target.work(theta),
            control_variates=self.maximises_likelihood,
            fewest=budget.fewest_with_weights(num_blocks),
        )

    def first_state(
        self, target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array
    ) -> tuple[SMCState, Tempered]:
        """See `Algorithm.first_state`."""
        key_cloud, key_objective, key_state = random.split(rng_key, 3)
        num_particles = self._num_particles_for(target, theta, blocks.num_blocks)
        whole = blocks
        target, blocks = added_up(target, whole)
        _, flat, _ = flat_terms(target, theta)
        kernel = self.kernel if self.kernel.invariant else HMC()
        cloud = first_cloud(
            key_cloud, target, theta, blocks, mode, kernel, num_particles, init_strategy=self.init_strategy
        )
        points = cloud.points
        work, evaluations = target.work(theta), self.kernel.num_evaluations
        if budget.carries_scores(num_particles, flat.size, blocks.num_blocks, work, evaluations):
            points = jax.vmap(evaluator(target, theta, scores=True))(points.x)
        finite = jnp.isfinite(blocks.sum_terms(points.terms) + blocks.sum_coordinates(points.grad))
        equal = uniform_log_weights(num_particles, blocks.num_blocks, flat.dtype)
        fresh = reweight(equal, jnp.where(finite, 0.0, jnp.nan))
        points = replace_dead(points, fresh.log_weights, blocks)
        known = starts_from_prior(target, self.init_strategy)
        free = -blocks.sum_free_terms(points.terms[0])
        first = jnp.sum(cloud.log_evidence) + free if known else jnp.zeros((), flat.dtype)
        zero = jnp.zeros((), jnp.int32)
        state = SMCState(
            theta=theta,
            params=target.constrain_params(theta),
            points=points,
            log_weights=fresh.log_weights,
            log_evidence_start=first,
            log_evidence_change=jnp.zeros_like(first),
            relative=jnp.asarray(not known),
            step=first_step(self.kernel, cloud.step, kernel),
            theta_state=self._parts.theta_step(target, theta, num_particles, blocks.num_blocks).init(flat),
            next_theta=flat,
            step_backoff=jnp.ones((), flat.dtype),
            blocks=blocks,
            num_updates=zero,
            num_refused=zero,
            num_lost=zero,
            wrong_blocks=jnp.asarray(False),
            fingerprint=jnp.zeros((), jnp.uint32),
            diagnostics={},
            mutable_state={},
            rng_key=key_state,
        )
        estimate = estimate_at(self._parts, target, theta, state, blocks, key_objective)
        diagnostics = diagnose(
            self._parts,
            state,
            estimate,
            jnp.zeros_like(flat),
            ess=fresh.ess,
            step_ess=jnp.ones_like(cloud.acceptance),
            acceptance=cloud.acceptance,
            num_nonfinite=fresh.num_nonfinite,
            num_refused=zero,
            num_resampled=zero,
        )
        state = state._replace(diagnostics=diagnostics, blocks=whole)
        return state, cloud._replace(points=points)

    def step(self, target: Target, state: SMCState, controls: dict[str, Array]) -> SMCState:
        """See `smc_update`."""
        return self._update(self._parts, target, state, controls)

    def controls(self, state: SMCState) -> dict[str, Any]:
        """See `Algorithm.controls`."""
        dtype = state.log_weights.dtype.type
        return {
            "step_size": state.step.size,
            "ess_threshold": dtype(self.ess_threshold),
            "resample": np.bool_(True),
            "learning_rate": dtype(1.0),
            "theta_limit": no_limit,
        }

    # -- new data -----------------------------------------------------------------------------------------------------
    def adopt(self, target: Target, state: SMCState, fingerprint: Array) -> SMCState:
        """See `smc_update.adopt`."""
        return adopt(target, state, fingerprint)

    def loss(self, target: Target, state: SMCState) -> Array:
        """See `Algorithm.loss`; for the marginal likelihood this is minus the running log evidence."""
        return loss_on(self._parts, target, state)

    def faults(self, state: SMCState, diagnostics: dict[str, np.ndarray]) -> tuple[list[str | None], Status]:
        """See `Algorithm.faults`."""
        num = len(diagnostics["loss"])
        refused, lost = (int(np.sum(diagnostics[name])) for name in ("num_refused", "num_nonfinite"))
        acceptance = float(np.mean(diagnostics["acceptance_rate"][num // 2 :]))
        moves = self.kernel.invariant and state.points.x.shape[1] > 0
        starved = faults.starved_cloud(float(np.mean(diagnostics["step_ess"])), state.log_weights.shape[0])
        found = [
            faults.refused_updates(refused, num),
            starved,
            faults.lost_particles(lost),
            faults.frozen_particles(acceptance) if moves else None,
            faults.masked_particles(int(np.sum(diagnostics.get("num_masked", 0)))),
        ]
        if refused > num / 4 or starved:
            return found, Status.WEIGHTS_COLLAPSED
        return found, Status.NON_FINITE if lost > LARGEST_LOSS * num * state.log_weights.size else Status.FINISHED
