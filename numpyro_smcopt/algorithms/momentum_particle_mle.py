# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`MomentumParticleMLE`: particle gradient descent with momentum in the parameters and in the particles.

Continuous time, with inverse masses eta and frictions gamma of both blocks:

    d theta = eta_t m dt       d m   = -gamma_t eta_t m dt - (1/N) sum_j grad_theta U_theta(x_j) dt
    d x_j   = eta_x u_j dt     d u_j = -gamma_x eta_x u_j dt - grad_x U_theta(x_j) dt + sqrt(2 gamma_x) dW_j

One update, by exponential integrators (see `kernels.underdamped`; v and p_j are m and u_j in units of mass one):

    ahead  = theta + a v,      g = (1/N) sum_j grad_theta U_ahead(x_j)          gradient correction
    theta' = ahead - b g,      v' = mu v - a g
    x_j'   = x_j + a p_j - b grad_x U_theta'(x_j) + noise,      p_j' = mu p_j - a grad_x U_theta'(x_j) + noise

The particles approximate the posterior at theta; they are not weighted, and not corrected unless the kernel says so.

Source: Lim, Kuntz, Power and Johansen, "Momentum Particle Maximum Likelihood", ICML 2024, arXiv 2312.07335.
"""

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random

from numpyro_smcopt import tempering
from numpyro_smcopt.algorithms import budget, faults
from numpyro_smcopt.algorithms.base import ParticleAlgorithm, check_functions, check_number, whole_or_none
from numpyro_smcopt.algorithms.gradients import gradient_of_rest, surroundings
from numpyro_smcopt.algorithms.particles import blocks_are_wrong, evaluator
from numpyro_smcopt.algorithms.safeguards import next_caution
from numpyro_smcopt.algorithms.start import (
    Start,
    draw_particles,
    first_cloud,
    refuse_hopeless,
    refuse_loss,
    start_blocks,
    starts_from_prior,
    warm_theta,
    warn_of_unfinished,
)
from numpyro_smcopt.algorithms.two_numbers import (
    check_preconditioner,
    refuse_foreign_arguments,
    stable_share,
    two_numbers,
)
from numpyro_smcopt.blocks import Blocks, Partition, find_blocks, one_block
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import HMC, Point, Potential, Preconditioner, Preconditioning, preconditioners
from numpyro_smcopt.kernels.underdamped import (
    IntegratorFn,
    Moved,
    Pace,
    Underdamped,
    VelocityKernel,
    controlled,
    exponential,
    nesterov,
    uncorrected,
)
from numpyro_smcopt.latent_momentum import LARGEST_TOLERANCE, CloudState, LatentStep, forgotten
from numpyro_smcopt.noise import draw_normals, split
from numpyro_smcopt.objectives import (
    Cloud,
    Estimate,
    MarginalLikelihood,
    Objective,
    Scene,
    as_objective,
    term_coefficients,
)
from numpyro_smcopt.results import Status
from numpyro_smcopt.target import Target, flat_terms
from numpyro_smcopt.theta_momentum import (
    Around,
    InformationMetric,
    InformationState,
    MomentumStep,
    MotionState,
    Number,
    TransformMetric,
)
from numpyro_smcopt.types import Array, Model, Params, Theta
from numpyro_smcopt.weights import uniform_log_weights

BIAS_TOLERANCE = 0.05
BIAS_TOLERANCE_OF_LARGE_THETA = 0.15  # the particles have to keep up with theta: being late costs more than the bias
DEFAULT_MOMENTUM = 0.9  # where the damping is not chosen from the information
LARGEST_LOSS = 0.25  # share of the particles, block by block, that may meet a potential that is not finite
SETTLED = 100  # updates after which the estimated bias is worth a warning
DEFAULT_LEARNING_RATE = 1e-2  # for gradients that a transformation has made of order one


class Damping(enum.Enum):
    """How the motion of theta is damped."""

    UNDER = "under-damped"
    CRITICAL = "near critical damping"
    OVER = "over-damped"


class Particles(NamedTuple):
    """Where the particles are.

    Attributes:
        x: [N, D], on unconstrained space.
    """

    x: Array


class MomentumState(NamedTuple):
    """State of `MomentumParticleMLE`: what the next update needs, and the last diagnostics.

    Attributes:
        theta: The iterate, unconstrained.
        params: The estimate, constrained: an average of iterates.
        points: The particles.
        log_weights: [N, B] equal weights.
        motion: Velocity, pace and metric of theta.
        cloud: Velocities, pace and metric of the particles.
        blocks: The partition of the latents.
        num_updates: [] updates so far.
        num_refused: [] updates in which theta stayed because its gradient was not finite, or nothing was where it led.
        caution: [] factor on the step size of theta: one, or less after theta was refused.
        wrong_blocks: [] bool, whether the data contradict the partition.
        fingerprint: [] of the data.
        diagnostics: Scalars of the last update.
        mutable_state: State of handlers.
        rng_key: Randomness of what follows.
    """

    theta: Theta
    params: Params
    points: Particles
    log_weights: Array
    motion: MotionState
    cloud: CloudState
    blocks: Blocks
    num_updates: Array
    num_refused: Array
    caution: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array


class MomentumParticleMLE(ParticleAlgorithm):
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
        scheme: How theta is integrated: `kernels.underdamped.exponential` (as published), `uncorrected` (the gradient
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

    Reference:
        Lim, Kuntz, Power and Johansen, "Momentum Particle Maximum Likelihood", ICML 2024.
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
        num_particles = whole_or_none("num_particles", num_particles)
        check_functions(scheme=scheme, init_strategy=init_strategy, partition=partition)
        if bias_tolerance is not None:
            check_number("bias_tolerance", bias_tolerance)
        if averaging is not None:
            check_number("averaging", averaging)
        if preconditioning is not None and not isinstance(preconditioning, Preconditioning):
            raise TypeError(
                "preconditioning must be an object from numpyro_smcopt.kernels.preconditioners, such as diagonal, got "
                f"{preconditioning!r}."
            )
        if kernel is not None and not isinstance(kernel, VelocityKernel):
            raise TypeError(
                "kernel must move particles that have a velocity: kernels.Underdamped() or "
                f"kernels.MetropolisUnderdamped(), got {kernel!r}. Other kernels are for SMCOptimizer."
            )
        if averaging is not None and not averaging >= 0:
            raise ValueError(
                f"averaging must be a power of at least 0, or None for the last iterate, got {averaging!r}."
            )
        if bias_tolerance is not None and not 0 < bias_tolerance <= LARGEST_TOLERANCE:
            raise ValueError(
                f"bias_tolerance is a relative bias within (0, {LARGEST_TOLERANCE:g}], got {bias_tolerance!r}. Steps "
                "for a larger one would come too near to where moves diverge; to try them, give a latent_step_size."
            )
        self.step_size, self.damping = two_numbers("", step_size, momentum, gamma, eta, time_step)
        self.latent_step_size, self.latent_damping = two_numbers(
            "latent_", latent_step_size, latent_momentum, latent_gamma, latent_eta, latent_time_step
        )
        self._time_steps = {"": time_step, "latent_": latent_time_step}  # where they were given, to speak of them
        if theta_noise and (self.step_size is None or preconditioner is not None or scheme is nesterov):
            raise ValueError(
                "theta_noise=True needs a step_size, no preconditioner, and an exponential scheme: otherwise the noise "
                "would not fit the motion."
            )
        if preconditioner is not None:
            check_preconditioner(preconditioner)
        self.scheme = scheme
        self.simultaneous = simultaneous
        self.theta_noise = theta_noise
        self.preconditioner = preconditioner
        self.restart = restart
        self.averaging = averaging
        self.objective = None if objective is None else as_objective(objective)
        self.num_particles = num_particles
        self.init_strategy = init_strategy
        self.partition = one_block if self.objective is not None and self.objective.whole_particles else partition
        if preconditioning is None:
            given = self.latent_step_size is not None
            preconditioning = preconditioners.none if given else preconditioners.dense
        self.bias_tolerance = bias_tolerance
        self._latents = LatentStep(
            kernel or Underdamped(),
            self.latent_step_size,
            self.latent_damping,
            preconditioning,
            bias_tolerance or BIAS_TOLERANCE,
        )

    _state_type = MomentumState

    # -- start --------------------------------------------------------------------------------------------------------
    def _begin(self, rng_key: Array, start: Start) -> MomentumState:
        key_blocks, key_cloud, key_state = random.split(rng_key, 3)
        theta, target = start.theta, start.target
        mode = np.zeros(target.sites.num_latents, jnp.result_type(float))
        self._objective(theta).check(target, theta)
        blocks = start_blocks(key_blocks, start, self.partition, self.init_strategy)
        informed = self._knows_units(theta)
        warm = warm_theta(start, blocks) if informed else None
        if warm is not None:
            theta, mode = warm
        num_particles = 1
        if target.sites.num_latents:
            fewest = budget.FEWEST_PARTICLES
            if not _information_is_affordable(theta):
                fewest = budget.fewest_without_information(blocks.num_blocks)
            num_particles = self.num_particles or budget.default_num_particles(
                target.work(theta), control_variates=informed, fewest=fewest
            )
        first = ("first", num_particles), self._first_state(num_particles)
        state, terms, num_unfinished, num_stages = start.call(*first, key_cloud, theta, blocks, mode, key_state)
        refuse_hopeless(start, terms)
        refuse_loss(start, self._objective(theta), state.diagnostics["loss"])
        warn_of_unfinished(start, blocks, num_unfinished, num_stages)
        return state

    def _first_state(self, num_particles: int) -> Callable:
        """A program: the first state at ``theta``, energy terms, blocks not at their posterior, stages of tempering."""

        def first(
            target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array, key_state: Array
        ) -> tuple[MomentumState, Array, Array, Array]:
            _, flat, _ = flat_terms(target, theta)
            key_cloud, key_velocity = random.split(rng_key)
            points, metric, num_unfinished, num_stages = self._first_particles(
                key_cloud, target, theta, blocks, mode, num_particles
            )
            velocity = random.normal(key_velocity, points.x.shape, flat.dtype)
            zero = jnp.zeros((), jnp.int32)
            motion = self._theta_step(target, theta, num_particles, blocks.num_blocks).init(theta)
            state = MomentumState(
                theta=theta,
                params=target.constrain_params(theta),
                points=Particles(points.x),
                log_weights=uniform_log_weights(num_particles, blocks.num_blocks, flat.dtype),
                motion=motion,
                cloud=self._latent_step(theta).init(velocity, metric, points, blocks),
                blocks=blocks,
                num_updates=zero,
                num_refused=zero,
                caution=jnp.ones((), flat.dtype),
                wrong_blocks=jnp.asarray(False),
                fingerprint=jnp.zeros((), jnp.uint32),
                diagnostics={},
                mutable_state={},
                rng_key=key_state,
            )
            nothing = jnp.zeros((), flat.dtype)
            own = dict.fromkeys(("damping", "stability", "latent_bias", "latent_stability"), nothing)
            own["num_refused"] = zero
            _, estimate, _ = self._around(target, state, flat)
            found = self._diagnostics(points.terms, estimate)
            diagnostics = _diagnostics(nothing + 1, nothing, zero, motion, own | found)
            return state._replace(diagnostics=diagnostics), points.terms, num_unfinished, num_stages

        return first

    def _first_particles(
        self, rng_key: Array, target: Target, theta: Theta, blocks: Blocks, mode: Array, num_particles: int
    ) -> tuple[Point, Preconditioner, Array, Array]:
        if self.latent_step_size is None:
            # At the posterior from the first update on, with a metric that is known to fit.
            kernel = HMC(preconditioning=self._latents.preconditioning)
            cloud = first_cloud(
                rng_key, target, theta, blocks, mode, kernel, num_particles, init_strategy=self.init_strategy
            )
            metric = cloud.step.preconditioner
            if self._latents.preconditioning == preconditioners.none:
                metric = tempering.identity_like(mode, None)
            return cloud.points, metric, jnp.sum(cloud.unfinished), cloud.num_stages
        # As published: from the prior.
        draw = draw_particles(num_particles, starts_from_prior(target, self.init_strategy), self.init_strategy)
        points = jax.vmap(evaluator(target, theta))(draw(target, rng_key, theta))
        metric = tempering.identity_like(mode, None)
        if self._latents.preconditioning != preconditioners.none:
            metric = tempering.rescaled(metric, points.x, blocks)
        nothing = jnp.zeros((), jnp.int32)
        return points, metric, nothing, nothing

    def _knows_units(self, theta: Theta) -> bool:
        """Whether the step of theta is chosen from the information in the particles."""
        automatic = self.step_size is None and self.preconditioner is None
        return automatic and _information_is_affordable(theta) and self._maximises_likelihood

    def _objective(self, theta: Theta) -> Objective:
        return self.objective or MarginalLikelihood(control_variates=self._knows_units(theta))

    @property
    def _maximises_likelihood(self) -> bool:
        return self.objective is None or isinstance(self.objective, MarginalLikelihood)

    def _attached(self) -> Any:
        return () if self.objective is None else self.objective.arrays

    def _theta_step(self, target: Target, theta: Theta, num_particles: int, num_blocks: int) -> MomentumStep:
        step_size, damping = self.step_size, self.damping
        if self._knows_units(theta):
            num_params = sum(leaf.size for leaf in jax.tree.leaves(theta))
            interval = budget.refresh_interval(num_particles, num_blocks, num_params, target.work(theta), 1)
            metric: Any = InformationMetric(interval)
        else:
            transformation = self.preconditioner
            if transformation is None:
                given = step_size is not None
                transformation = optax.identity() if given else optax.scale_by_adam(b1=0.0, b2=0.99)
            metric = TransformMetric(transformation)
            step_size = DEFAULT_LEARNING_RATE if step_size is None else step_size
            damping = -math.log(DEFAULT_MOMENTUM) if damping is None else damping
        return MomentumStep(metric, step_size, damping, self.scheme, self.averaging, self.restart)

    def _latent_step(self, theta: Theta) -> LatentStep:
        if self.bias_tolerance is None and not _information_is_affordable(theta):
            return dataclasses.replace(self._latents, tolerance=BIAS_TOLERANCE_OF_LARGE_THETA)
        return self._latents

    # -- update -------------------------------------------------------------------------------------------------------
    def _controls(self, state: MomentumState) -> dict[str, Array]:
        theta, latents = state.motion.pace, state.cloud.pace
        return {
            "step_size": theta.step_size,
            "momentum": theta.momentum,
            "latent_step_size": latents.step_size,
            "latent_momentum": latents.momentum,
        }

    def _step(self, target: Target, state: MomentumState, controls: dict[str, Array]) -> MomentumState:
        num_particles, num_blocks = state.log_weights.shape
        _, flat, unravel = flat_terms(target, state.theta)
        step = self._theta_step(target, state.theta, num_particles, num_blocks)
        latents = self._latent_step(state.theta)
        step_size = state.caution * controls["step_size"]
        going = controlled(self.scheme, state.motion.pace, step_size, controls["momentum"])
        latent_going = controlled(
            exponential, state.cloud.pace, controls["latent_step_size"], controls["latent_momentum"]
        )
        key_next, key_theta, key_latents = split(state.rng_key, 3)

        # Gradient, ahead of theta
        ahead = flat + going.integrator.lookahead * state.motion.velocity
        terms, estimate, around = self._around(target, state, ahead)
        noise = None
        if self.theta_noise:
            noise = random.normal(key_theta, (2, flat.size), flat.dtype) / math.sqrt(num_particles)

        # Theta; it stays where its gradient is not finite
        following, motion = step.update(state.motion, going, state.theta, around, noise)
        usable = jnp.all(jnp.isfinite(around.gradient)) & jnp.all(jnp.isfinite(following))
        following = jnp.where(usable, following, flat)

        # Particles
        place = flat if self.simultaneous else following
        potential = Potential(evaluator(target, unravel(place)), state.blocks)
        num_normals = latents.kernel.num_normals(state.points.x.shape[1], num_blocks)
        normals = draw_normals(key_latents, (num_particles, num_normals), flat.dtype)
        moved = latents.move(normals, state.points.x, state.cloud, latent_going, potential)
        alive = _alive(state.blocks, (terms, moved.terms), (moved.slope, moved.x, moved.velocity))
        replaced = partial(_replaced, alive, state.blocks, state.points.x)
        moved = changed_if(~jnp.all(alive), replaced, moved)

        # Back, where hardly anything lives; then from rest, and with shorter steps
        possible = _is_possible(state.blocks, alive, moved.terms)
        sound = usable & possible
        following = jnp.where(sound, following, flat)
        stay = state.motion._replace(velocity=jnp.zeros_like(flat))
        motion = jax.tree.map(lambda new, old: jnp.where(sound, new, old), motion, stay)

        # What follows
        cloud, x = latents.update(state.cloud, latent_going, state.points.x, moved, state.blocks, state.num_updates)

        refused = (~sound).astype(jnp.int32)
        own = {"num_refused": refused} | step.diagnose(motion, going) | latents.diagnose(cloud, latent_going)
        diagnostics = _diagnostics(
            jnp.mean(moved.acceptance),
            jnp.linalg.norm(jnp.where(jnp.isfinite(around.gradient), around.gradient, 0.0)),
            jnp.sum(~alive).astype(jnp.int32),
            motion,
            own | self._diagnostics(terms, estimate),
        )
        return state._replace(
            theta=unravel(following),
            params=target.constrain_params(unravel(step.estimate(motion))),
            points=Particles(x),
            motion=motion,
            cloud=cloud,
            num_updates=state.num_updates + 1,
            num_refused=state.num_refused + refused,
            caution=next_caution(state.caution, possible, usable),
            rng_key=key_next,
            diagnostics=diagnostics,
        )

    def _around(self, target: Target, state: MomentumState, theta: Array) -> tuple[Array, Estimate, Around]:
        """Energy terms [N, K] at a flat theta, what the objective says there, and what the step may ask."""
        x, blocks = state.points.x, state.blocks
        terms_fn, _, unravel = flat_terms(target, state.theta)
        all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
        terms, vjp = jax.vjp(all_terms, theta, x)
        # Not computed unless the objective looks at it.
        grad = vjp(jnp.ones_like(terms))[1]
        scene = Scene(target, unravel(theta), target.attached, random.fold_in(state.rng_key, 2))
        estimate = self._objective(state.theta).estimate(scene, Cloud(x, terms, grad, state.log_weights, blocks))
        coefficients = term_coefficients(estimate, blocks)
        gradient = vjp(coefficients)[0]
        gradient = gradient + gradient_of_rest(estimate, unravel(theta))

        def missing(slope: Array) -> Array:  # [N, K] derivatives of the terms along a direction
            freedom = max(x.shape[0] - 1, 1)
            centred = blocks.sum_terms(slope) - jnp.mean(blocks.sum_terms(slope), 0)
            return jnp.sum(centred**2) / freedom

        def along(v: Array) -> tuple[Array, Array]:
            one, zero = jnp.ones((), theta.dtype), jnp.zeros((), theta.dtype)
            first = lambda t: jax.jvp(lambda t: all_terms(theta + t * v, x), (t,), (one,))[1]  # noqa: E731
            if not self._maximises_likelihood:
                return estimate.curvature * missing(first(zero)), zero
            slope, bend = jax.jvp(first, (zero,), (one,))
            return jnp.sum(coefficients * bend), missing(slope)

        def slope_error(v: Array) -> Array:
            return jnp.sqrt(missing(jax.jvp(lambda t: all_terms(t, x), (theta,), (v,))[1]) / x.shape[0])

        places = Point(x, terms, grad)
        asked = surroundings(target, state.theta, theta, places, state.log_weights, blocks, state.num_updates)
        return terms, estimate, Around(gradient, asked.information, along, slope_error)

    def _diagnostics(self, terms: Array, estimate: Estimate) -> dict[str, Array]:
        """The loss, and what else the objective says."""
        if self._maximises_likelihood:
            finite = jnp.all(jnp.isfinite(terms), 1)
            total = jnp.sum(jnp.where(finite, jnp.sum(terms, 1), 0.0))
            return {"loss": total / jnp.maximum(jnp.sum(finite), 1)}
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}

    # -- new data -----------------------------------------------------------------------------------------------------
    def _adopt(self, target: Target, state: MomentumState, fingerprint: Array) -> MomentumState:
        have, need = state.points.x.shape[1], target.sites.num_latents
        if have != need:
            raise ValueError(
                f"The state has {have} latents, but with these arguments the model has {need}. Data of another shape "
                "need a new init."
            )
        wrong = blocks_are_wrong(random.fold_in(state.rng_key, 1), target, state.theta, state.points.x, state.blocks)
        fingerprint = jnp.where(wrong, state.fingerprint, fingerprint)
        cloud = forgotten(state.cloud, state.fingerprint != fingerprint)
        return state._replace(fingerprint=fingerprint, wrong_blocks=wrong, cloud=cloud)

    def evaluate(self, state: MomentumState, *args: Any, **kwargs: Any) -> Array:
        """The loss in a state under the given data, without changing the state.

        For the marginal likelihood, which these particles do not know, it is the mean energy of the particles.

        Args:
            state: A state.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.
        """
        self._check_state(state)
        arrays, static = self._bind(args, kwargs)

        def loss(target: Target, state: MomentumState) -> Array:
            _, flat, _ = flat_terms(target, state.theta)
            terms, estimate, _ = self._around(target, state, flat)
            return self._diagnostics(terms, estimate)["loss"]

        return self._program("evaluate", loss)(static, arrays, state)

    # -- reports ------------------------------------------------------------------------------------------------------
    def get_weighted_samples(self, state: MomentumState, *args: Any, **kwargs: Any) -> tuple[dict[str, Array], Array]:
        """The particles with equal log weights, and a warning: there are no weights in this algorithm.

        See `ParticleAlgorithm.get_weighted_samples`.
        """
        self._check_state(state)
        message = (
            "MomentumParticleMLE does not weigh its particles, so their log weights are equal. Use get_samples, or "
            "SMCOptimizer for weights and a running log evidence."
        )
        faults.warn_of([message])
        return super().get_weighted_samples(state, *args, **kwargs)

    def damping_regime(self, diagnostics: dict[str, Array]) -> Damping:
        """How the motion of theta was damped in the last half of a run.

        The damping ratio along the velocity, ``gamma eta / (2 sqrt(eta c))`` with c the curvature of the loss there, is
        one where it is critical; within a factor of sqrt(2) it is called near.

        Args:
            diagnostics: Those of a run.
        """
        ratio = float(np.median(diagnostics["damping"][len(diagnostics["damping"]) // 2 :]))
        if ratio < math.sqrt(0.5):
            return Damping.UNDER
        return Damping.OVER if ratio > math.sqrt(2) else Damping.CRITICAL

    def _early_faults(self, state: MomentumState, diagnostics: dict[str, Array]) -> list[str | None]:
        return [self._instability(state, diagnostics)]

    def _instability(self, state: MomentumState, diagnostics: dict[str, Array]) -> str | None:
        """A given step that diverges in the first updates, with its limit."""
        excess = faults.beyond_stability(diagnostics["stability"])
        if excess is not None:
            return self._too_long("", self.scheme, state.motion.pace, excess)
        excess = faults.beyond_stability(diagnostics["latent_stability"])
        if excess is None or self.latent_step_size is None or not state.points.x.shape[1]:
            return None
        return self._too_long("latent_", uncorrected, state.cloud.pace, excess)

    def _too_long(self, block: str, scheme: IntegratorFn, going: Pace, excess: float) -> str:
        step_size, damping = float(np.max(going.step_size)), float(np.max(going.damping))
        time_step = self._time_steps[block]
        # Without a momentum of its own the damping of the particles is proportional to their step size.
        coupled = time_step is not None or block == "latent_" and self.latent_damping is None
        share = stable_share(scheme, step_size, damping, excess, coupled)
        if time_step is not None:
            return faults.unstable_step(f"{block}time_step", time_step, share * time_step)
        return faults.unstable_step(f"{block}step_size", step_size, share * step_size)

    def _known_information(self, state: MomentumState) -> Array | None:
        metric = state.motion.metric
        return metric.information.complete if isinstance(metric, InformationState) else None

    def _report_faults(self, state: MomentumState, diagnostics: dict[str, Array]) -> Status:
        num, refused = len(diagnostics["loss"]), int(state.num_refused)
        has_latents = state.points.x.shape[1] > 0
        acceptance = float(np.mean(diagnostics["acceptance_rate"][num // 2 :]))
        found = [
            faults.unmoved_theta(refused, int(state.num_updates)),
            faults.replaced_particles(int(np.sum(diagnostics["num_nonfinite"]))),
            faults.masked_particles(int(np.sum(diagnostics.get("num_masked", 0)))),
        ]
        stable = self._instability(state, diagnostics) is None
        if stable and has_latents and int(state.num_updates) > SETTLED:
            found.append(faults.biased_latents(float(np.median(diagnostics["latent_bias"][num // 2 :]))))
            found.append(faults.frozen_particles(acceptance))
        faults.warn_of(found)
        lost = np.sum(diagnostics["num_nonfinite"]) > LARGEST_LOSS * num * state.log_weights.size
        diverged = refused > num / 4 or refused > 0 and not stable
        return Status.NON_FINITE if diverged or lost else Status.FINISHED


# -- small print -------------------------------------------------------------------------------------------------------
def _information_is_affordable(theta: Theta) -> bool:
    return sum(leaf.size for leaf in jax.tree.leaves(theta)) <= budget.LARGEST_INFORMATION


def _alive(blocks: Blocks, terms: tuple[Array, ...], coordinates: tuple[Array, ...]) -> Array:
    """[N, B] bool: in which blocks of which particles terms [N, K] and coordinates [N, D] are all finite."""
    parts = [blocks.sum_terms(v) for v in terms] + [blocks.sum_coordinates(v) for v in coordinates]
    return jnp.all(jnp.stack([jnp.isfinite(part) for part in parts]), 0)


def _is_possible(blocks: Blocks, alive: Array, terms: Array) -> Array:
    """[] bool: whether terms that depend on theta only are finite, and some particle of most blocks lives."""
    free = jnp.all(jnp.isfinite(terms[0]) | (blocks.of_term != blocks.num_blocks))
    return free & (jnp.sum(~jnp.any(alive, 0)) <= LARGEST_LOSS * alive.shape[1])


def _replaced(alive: Array, blocks: Blocks, before: Array, moved: Moved) -> Moved:
    """The move, in which blocks that are lost took the place of others, as it was before."""
    num = alive.shape[0]
    order = jnp.argsort(~alive, 0, stable=True)  # the living first
    places = jnp.arange(num)[:, None] % jnp.maximum(jnp.sum(alive, 0), 1)
    heir = blocks.to_coordinates(jnp.take_along_axis(order, places, 0))
    lost, nobody = blocks.to_coordinates(~alive), blocks.to_coordinates(~jnp.any(alive, 0))
    inherited = jnp.where(nobody, before, jnp.take_along_axis(before, heir, 0))
    return moved._replace(
        x=jnp.where(lost, inherited, moved.x),
        velocity=jnp.where(lost, 0.0, moved.velocity),
        slope=jnp.where(lost, 0.0, moved.slope),
    )


def _diagnostics(
    acceptance: Array, grad_norm: Array, num_nonfinite: Array, motion: MotionState, own: dict[str, Array]
) -> dict[str, Array]:
    """Scalars of an update; the weights being equal, the effective sample size is all of the particles."""
    one = jnp.ones_like(grad_norm)
    return {
        "loss": own["loss"],
        "ess": one,
        "mean_ess": one,
        "acceptance_rate": acceptance,
        "grad_norm": grad_norm,
        "num_nonfinite": num_nonfinite,
        "num_resampled": jnp.zeros((), jnp.int32),
        "num_restarts": motion.num_restarts,
        **own,
    }
