# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`MomentumParticleMLE`: particle gradient descent with momentum in the parameters and in the particles.

The update, with its equations, is in `momentum.update`. This file chooses what is not given: the particles to start
from, the metric and the pace of theta and of the particles; and it tells how a run went.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax import random

from numpyro_smcopt import faults
from numpyro_smcopt.algorithms.base import ParticleAlgorithm
from numpyro_smcopt.algorithms.momentum.damping import Damping, damping_regime
from numpyro_smcopt.algorithms.momentum.particles import LatentStep, forgotten
from numpyro_smcopt.algorithms.momentum.settings import (
    check_moves,
    check_preconditioner,
    check_theta_noise,
    refuse_foreign_arguments,
    two_numbers,
    unstable_argument,
)
from numpyro_smcopt.algorithms.momentum.theta import InformationMetric, Metric, MomentumStep, Number, TransformMetric
from numpyro_smcopt.algorithms.momentum.update import MomentumState, MomentumUpdate
from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import Blocks, Partition, one_block
from numpyro_smcopt.kernels import Preconditioning, preconditioners
from numpyro_smcopt.kernels.integrators import IntegratorFn, exponential, uncorrected
from numpyro_smcopt.kernels.underdamped import Underdamped, VelocityKernel
from numpyro_smcopt.objectives import MarginalLikelihood, Objective, as_objective
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.nonfinite import LARGEST_LOSS
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.population.warm_start import warm_start
from numpyro_smcopt.potential import Target
from numpyro_smcopt.results import Status
from numpyro_smcopt.types import Array, Model, Theta, check_functions, whole_or_none

BIAS_TOLERANCE = 0.05
BIAS_TOLERANCE_OF_LARGE_THETA = 0.15  # the particles have to keep up with theta: being late costs more than the bias
DEFAULT_MOMENTUM = 0.9  # where the damping is not chosen from the information
SETTLED = 100  # updates after which the estimated bias is worth a warning
UNWEIGHTED = (
    "MomentumParticleMLE does not weigh its particles, so their log weights are equal. Use get_samples, or "
    "SMCOptimizer for weights and a running log evidence."
)
DEFAULT_LEARNING_RATE = 1e-2  # for gradients that a transformation has made of order one


class MomentumParticleMLE(ParticleAlgorithm[MomentumState]):
    """Maximum marginal likelihood by particles with momentum.

    The method to choose where theta is large (neural decoders), or where weights would collapse.
    Each of the two blocks, theta and the particles, is described by two numbers: a *step size*, which is that of
    gradient descent (or Langevin dynamics) at the same pace, and a *momentum* ``mu = exp(-gamma eta dt)``, which is
    exactly what is left of a velocity after one step. Whatever is not given is chosen from the model.

    Args:
        model: A callable with NumPyro primitives: `numpyro.param` sites are estimated, latent `numpyro.sample` sites
            are integrated out.
        step_size: Step size of theta on unconstrained space, ``dt / gamma``: a number or an optax schedule. By default
            chosen from the information in the particles (up to 500 parameters), or 0.01 behind RMS scaling.
        momentum: Momentum of theta in [0, 1): a number or a schedule. By default near critical damping, or 0.9.
        latent_step_size: Step size of the particles on unconstrained space; by default chosen for `bias_tolerance`.
        latent_momentum: Momentum of the particles; by default near critical damping.
        num_particles: N; by default a power of two that falls with the size of the model, 32 at least, or 8 where theta
            has more than 500 coordinates and the latents fall into 256 blocks or more.
        objective: What is minimised; by default `MarginalLikelihood`, with control variates where the step of theta is
            chosen by default, and plain, as in the paper, where it is given.
        gamma: Friction of theta, with ``eta`` in place of step size and momentum.
        eta: Inverse mass of theta.
        time_step: ``dt`` of theta, with gamma and eta.
        latent_gamma: Friction of the particles.
        latent_eta: Inverse mass of the particles.
        latent_time_step: ``dt`` of the particles.
        scheme: How theta is integrated: `kernels.integrators.exponential` (as published), `uncorrected` (the gradient
            is taken where theta is) or `nesterov`.
        simultaneous: Whether particles move under the old theta instead of the new one.
        theta_noise: Whether theta is driven by noise as well (kinetic interacting particle Langevin): its iterates are
            then spread like ``p(y | theta)^N``.
        preconditioner: An optax transformation of the gradient of theta, such as ``optax.scale_by_rms()``.
        preconditioning: Preconditioning of the latents, shared over particles, from `kernels.preconditioners`; by
            default none where the latent step size is given.
        kernel: `kernels.Underdamped()`, or `kernels.MetropolisUnderdamped()` for accept-reject.
        restart: Whether theta drops its velocity where it leads uphill beyond the noise of the gradient.
        averaging: The estimate averages the iterates with weights that grow like this power of their number; None for
            the last iterate.
        bias_tolerance: Relative bias of the latent variance that a latent step size chosen by default may cause, at
            most 0.5; by default 0.05, or 0.15 where theta has more than 500 coordinates. The step is shorter where the
            particles meet curvatures on which it would come near to diverging.
        init_strategy: A strategy such as `numpyro.infer.init_to_uniform` for the first particles.
        partition: How independent blocks are found.
        handlers: NumPyro handlers that see the ``smcopt/...`` sites of every update.
        **static_kwargs: Keyword arguments of the model that stay fixed.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range, or a block is described twice.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smcopt import MomentumParticleMLE
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> y = jnp.array([1.0, 2.0, 4.5])
        >>> optimizer = MomentumParticleMLE(model, step_size=0.1, momentum=0.8)
        >>> result = optimizer.run(random.key(0), 500, y, progress_bar=False)
        >>> bool(abs(result.params["mean"] - 2.5) < 0.1)
        True

    Source: Lim, Kuntz, Power and Johansen, "Momentum Particle Maximum Likelihood", ICML 2024, arXiv 2312.07335.
    """

    def __init__(
        self,
        model: Model,
        *,
        step_size: Number = None,
        momentum: Number = None,
        latent_step_size: Number = None,
        latent_momentum: Number = None,
        num_particles: int | None = None,
        objective: Objective | None = None,
        gamma: float | None = None,
        eta: float | None = None,
        time_step: float | None = None,
        latent_gamma: float | None = None,
        latent_eta: float | None = None,
        latent_time_step: float | None = None,
        scheme: IntegratorFn = exponential,
        simultaneous: bool = False,
        theta_noise: bool = False,
        preconditioner: optax.GradientTransformation | None = None,
        preconditioning: Preconditioning | None = None,
        kernel: VelocityKernel | None = None,
        restart: bool = False,
        averaging: float | None = 7.0,
        bias_tolerance: float | None = None,
        init_strategy: Callable | None = None,
        partition: Partition = find_blocks,
        handlers: Sequence[Any] = (),
        **static_kwargs: Any,
    ) -> None:
        refuse_foreign_arguments(static_kwargs)
        super().__init__(model, handlers, static_kwargs)
        check_functions(scheme=scheme, init_strategy=init_strategy, partition=partition)
        check_moves(preconditioning, kernel, averaging, bias_tolerance)
        check_preconditioner(preconditioner)
        friction, latent_friction = (gamma, eta, time_step), (latent_gamma, latent_eta, latent_time_step)
        self.step_size, self.damping = two_numbers("", step_size, momentum, friction)
        latent_numbers = two_numbers("latent_", latent_step_size, latent_momentum, latent_friction)
        self.latent_step_size, self.latent_damping = latent_numbers
        self._time_step, self._latent_time_step = time_step, latent_time_step  # to speak of them
        if theta_noise:
            check_theta_noise(self.step_size, preconditioner, scheme)
        self.scheme, self.preconditioner, self.restart, self.averaging = scheme, preconditioner, restart, averaging
        self.simultaneous, self.theta_noise = simultaneous, theta_noise
        self.objective = None if objective is None else as_objective(objective)
        self.num_particles, self.init_strategy = whole_or_none("num_particles", num_particles), init_strategy
        self.partition = one_block if self.objective is not None and self.objective.whole_particles else partition
        if preconditioning is None:
            given = self.latent_step_size is not None
            preconditioning = preconditioners.none if given else preconditioners.dense
        self.bias_tolerance, kernel = bias_tolerance, kernel or Underdamped()
        self._latents = LatentStep(
            kernel, self.latent_step_size, self.latent_damping, preconditioning, bias_tolerance or BIAS_TOLERANCE
        )

    state_type = MomentumState

    # -- start --------------------------------------------------------------------------------------------------------
    def warm_start(self, bound: BoundTarget, theta: Theta, blocks: Blocks) -> tuple[Theta, Any] | None:
        """See `Algorithm.warm_start`."""
        return warm_start(bound, theta, blocks) if self._knows_units(theta) else None

    def _num_particles_for(self, target: Target, theta: Theta, num_blocks: int) -> int:
        if target.sites.num_latents == 0:
            return 1  # plain maximum likelihood: there is nothing to integrate out
        small = _information_is_affordable(theta)
        fewest = budget.FEWEST_PARTICLES if small else budget.fewest_without_information(num_blocks)
        return self.num_particles or budget.default_num_particles(
            target.work(theta), control_variates=self._knows_units(theta), fewest=fewest
        )

    def first_state(
        self, target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array
    ) -> tuple[MomentumState, Tempered]:
        """See `Algorithm.first_state`."""
        key_cloud, key_state = random.split(rng_key)
        num_particles = self._num_particles_for(target, theta, blocks.num_blocks)
        cloud = self._latents.first(key_cloud, target, theta, blocks, mode, num_particles, self.init_strategy)
        update = self._update(target, theta, num_particles, blocks.num_blocks)
        return update.first(target, key_state, theta, cloud.points, cloud.step.preconditioner, blocks), cloud

    # -- what is chosen -----------------------------------------------------------------------------------------------
    def _knows_units(self, theta: Theta) -> bool:
        """True if the step of theta is chosen from the information in the particles."""
        automatic = self.step_size is None and self.preconditioner is None
        return automatic and self.maximises_likelihood and _information_is_affordable(theta)

    def _objective(self, theta: Theta) -> Objective:
        return self.objective or MarginalLikelihood(control_variates=self._knows_units(theta))

    def _update(self, target: Target, theta: Theta, num_particles: int, num_blocks: int) -> MomentumUpdate:
        """The update; of theta only the shapes count."""
        step_size, damping, latents = self.step_size, self.damping, self._latents
        if self.bias_tolerance is None and not _information_is_affordable(theta):
            latents = dataclasses.replace(latents, tolerance=BIAS_TOLERANCE_OF_LARGE_THETA)
        if self._knows_units(theta):
            num_params = sum(leaf.size for leaf in jax.tree.leaves(theta))
            interval = budget.refresh_interval(num_particles, num_blocks, num_params, target.work(theta), 1)
            metric: Metric = InformationMetric(interval)
        else:
            transformation = self.preconditioner
            if transformation is None:
                given = step_size is not None
                transformation = optax.identity() if given else optax.scale_by_adam(b1=0.0, b2=0.99)
            metric = TransformMetric(transformation)
            step_size = DEFAULT_LEARNING_RATE if step_size is None else step_size
            damping = -math.log(DEFAULT_MOMENTUM) if damping is None else damping
        step = MomentumStep(metric, step_size, damping, self.scheme, self.averaging, self.restart)
        return MomentumUpdate(self._objective(theta), step, latents, self.simultaneous, self.theta_noise)

    # -- update -------------------------------------------------------------------------------------------------------
    def controls(self, state: MomentumState) -> dict[str, Array]:
        """See `Algorithm.controls`."""
        own, latent = state.motion.pace, state.cloud.pace
        controls = {"step_size": own.step_size, "momentum": own.momentum}
        return controls | {"latent_step_size": latent.step_size, "latent_momentum": latent.momentum}

    def step(self, target: Target, state: MomentumState, controls: dict[str, Array]) -> MomentumState:
        """See `momentum.update`."""
        return self._update(target, state.theta, *state.log_weights.shape).step(target, state, controls)

    # -- new data -----------------------------------------------------------------------------------------------------
    def adopt(self, target: Target, state: MomentumState, fingerprint: Array) -> MomentumState:
        """See `Algorithm.adopt`."""
        have, need = state.points.x.shape[1], target.sites.num_latents
        if have != need:
            raise ValueError(
                f"The state has {have} latents, but with these arguments the model has {need}. Data of another shape "
                "need a new init."
            )
        adopted = super().adopt(target, state, fingerprint)
        return adopted._replace(cloud=forgotten(state.cloud, state.fingerprint != adopted.fingerprint))

    def loss(self, target: Target, state: MomentumState) -> Array:
        """See `Algorithm.loss`; of the marginal likelihood, which these particles do not know, their mean energy."""
        return self._update(target, state.theta, *state.log_weights.shape).loss(target, state)

    # -- reports ------------------------------------------------------------------------------------------------------
    def get_weighted_samples(self, state: MomentumState, *args: Any, **kwargs: Any) -> tuple[dict[str, Array], Array]:
        """The particles with equal log weights, and a warning: there are no weights in this algorithm.

        See `ParticleAlgorithm.get_weighted_samples`.
        """
        self._check_state(state)
        faults.warn_of([UNWEIGHTED])
        return super().get_weighted_samples(state, *args, **kwargs)

    def damping_regime(self, diagnostics: dict[str, Array]) -> Damping:
        """The damping of the motion of theta in the last half of the run with these diagnostics."""
        return damping_regime(diagnostics["damping"])

    def early_faults(self, state: MomentumState, diagnostics: dict[str, np.ndarray]) -> list[str | None]:
        """See `Algorithm.early_faults`."""
        return [self._instability(state, diagnostics)]

    def _instability(self, state: MomentumState, diagnostics: dict[str, np.ndarray]) -> str | None:
        """A given step that diverges in the first updates, with its limit."""
        excess = faults.beyond_stability(diagnostics["stability"])
        if excess is not None:
            return unstable_argument("", state.motion.pace, self.scheme, excess, self._time_step)
        excess = faults.beyond_stability(diagnostics["latent_stability"])
        if excess is None or self.latent_step_size is None or not state.points.x.shape[1]:
            return None
        # Without a momentum of its own the damping of the particles is proportional to their step size.
        coupled = self.latent_damping is None
        return unstable_argument("latent_", state.cloud.pace, uncorrected, excess, self._latent_time_step, coupled)

    def complete_information(self, state: MomentumState) -> Array | None:
        """See `Algorithm.complete_information`."""
        found = getattr(state.motion.metric, "information", None)
        return None if found is None else found.complete

    def faults(self, state: MomentumState, diagnostics: dict[str, np.ndarray]) -> tuple[list[str | None], Status]:
        """See `Algorithm.faults`."""
        num, refused = len(diagnostics["loss"]), int(state.num_refused)
        found = [
            faults.unmoved_theta(refused, int(state.num_updates)),
            faults.replaced_particles(int(np.sum(diagnostics["num_nonfinite"]))),
            faults.masked_particles(int(np.sum(diagnostics.get("num_masked", 0)))),
        ]
        stable = self._instability(state, diagnostics) is None
        if stable and state.points.x.shape[1] and int(state.num_updates) > SETTLED:
            found.append(faults.biased_latents(float(np.median(diagnostics["latent_bias"][num // 2 :]))))
            found.append(faults.frozen_particles(float(np.mean(diagnostics["acceptance_rate"][num // 2 :]))))
        lost = np.sum(diagnostics["num_nonfinite"]) > LARGEST_LOSS * num * state.log_weights.size
        diverged = refused > num / 4 or refused > 0 and not stable
        return found, Status.NON_FINITE if diverged or lost else Status.FINISHED


def _information_is_affordable(theta: Theta) -> bool:
    return sum(leaf.size for leaf in jax.tree.leaves(theta)) <= budget.LARGEST_INFORMATION
