# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`SMCOptimizer`: a sequential Monte Carlo sampler whose targets follow the optimiser.

One update of ``theta_k`` and the weighted particles ``(x_i, w_i)`` of ``pi_theta_k``:

    g      = estimate of grad F(theta_k) from (x_i, w_i)
    theta' = step(theta_k, g)
    invariant kernel:  w_i <- w_i exp(U_theta(x_i) - U_theta'(x_i));  resample;  x_i <- K_theta'(x_i, .)
    weighted kernel:   x'_i ~ K_theta(x_i, .);  w_i <- w_i exp(U_theta(x_i) - U_theta'(x'_i)) L_theta'(x_i | x'_i)
                       / K_theta(x'_i | x_i);  resample

and ``log Z`` grows by the logarithm of the mean increment, block by block.

Source: Cuin, Tang, Carbone and Akyildiz, "Efficient Stochastic Optimisation via Sequential Monte Carlo", ICML 2026,
arXiv 2601.22003, algorithm 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt import faults
from numpyro_smcopt.adaptation import adapt_size, adapt_unadjusted_size, no_limit
from numpyro_smcopt.algorithms.base import ParticleAlgorithm, check_functions, check_number, whole_or_none
from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import Blocks, Partition, one_block
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import HMC, InvariantKernel, Point, Potential, Step, WeightedKernel
from numpyro_smcopt.objectives import (
    Cloud,
    Estimate,
    MarginalLikelihood,
    Objective,
    Scene,
    as_objective,
    term_coefficients,
)
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.evaluate import added_up, blocks_are_wrong, evaluator, resample_blocks, revived
from numpyro_smcopt.population.gradients import (
    Gradient,
    default_theta_step,
    gradient_of_rest,
    step_probe,
    surrogate_gradient,
    surroundings,
)
from numpyro_smcopt.population.safeguards import SHORTER, Judged, advance, directly, next_caution, unspoiled
from numpyro_smcopt.population.start import (
    Start,
    first_cloud,
    first_step,
    refuse_hopeless,
    refuse_loss,
    start_blocks,
    starts_from_prior,
    warm_theta,
    warn_of_unfinished,
)
from numpyro_smcopt.potential import Target, flat_terms, strong
from numpyro_smcopt.random_numbers import Noise, draw_noise, split
from numpyro_smcopt.resampling import ResamplingScheme, systematic, when_ess_below
from numpyro_smcopt.results import Status
from numpyro_smcopt.theta_step import Surroundings, ThetaStep, as_theta_step
from numpyro_smcopt.types import Array, Model, Params, Theta
from numpyro_smcopt.weights import (
    Reweighted,
    incremental_log_weight,
    kept_fraction,
    reweight,
    uniform_log_weights,
)

LARGEST_LOSS = 0.25  # share of the particles that may meet a potential that is not finite
KEPT_BY_A_MOVE = 0.2  # of the effective particles, or the move of a weighted kernel is not made


class SMCState(NamedTuple):
    """State of `SMCOptimizer`: what the next update needs, and the last diagnostics.

    Attributes:
        theta: The iterate, unconstrained.
        params: The estimate, constrained: the iterate, or for the default step an average of iterates.
        points: The particles, each with sums of its energy terms and its gradient: arrays [N, ...].
        log_weights: [N, B] normalised log weights.
        log_evidence_start: [] log evidence where the run started.
        log_evidence_change: [] its change since.
        relative: [] bool, whether the start is unknown (the prior cannot be sampled) and set to zero.
        step: Step sizes and preconditioner of the kernel.
        theta_state: State of the theta step.
        pending: [P] where theta goes next, if the order is to weigh first (see `SMCOptimizer`).
        caution: [] factor on the steps of theta: one, or less after a step was refused.
        blocks: The partition of the latents.
        num_updates: [] updates so far.
        num_refused: [] updates in which theta stayed because a block would have lost all weight, or something in its
            step was not finite.
        num_lost: [] weights lost to new data, which the diagnostics of the next update will count.
        wrong_blocks: [] bool, whether the data contradict the partition.
        fingerprint: [] of the data.
        diagnostics: Scalars of the last update.
        mutable_state: State of handlers.
        rng_key: Randomness of what follows.
    """

    theta: Theta
    params: Params
    points: Point
    log_weights: Array
    log_evidence_start: Array
    log_evidence_change: Array
    relative: Array
    step: Step
    theta_state: Any
    pending: Array
    caution: Array
    blocks: Blocks
    num_updates: Array
    num_refused: Array
    num_lost: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array


class SMCOptimizer(ParticleAlgorithm):
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
        kernel: InvariantKernel | WeightedKernel | None = None,
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
        if kernel is not None and not isinstance(kernel, InvariantKernel | WeightedKernel):
            raise TypeError(f"kernel must be an object from numpyro_smcopt.kernels such as MALA(), got {kernel!r}.")
        self.optim = None if optim is None else as_theta_step(optim)
        self.objective = (
            MarginalLikelihood(control_variates=optim is None) if objective is None else as_objective(objective)
        )
        self.kernel = kernel or HMC()
        self.num_particles = num_particles
        self.resample = when_ess_below(resampling or systematic, ess_threshold)
        self.init_strategy = init_strategy
        self.partition = one_block if self.objective.whole_particles else partition

    _state_type = SMCState

    # -- start --------------------------------------------------------------------------------------------------------
    def _begin(self, rng_key: Array, start: Start) -> SMCState:
        theta, target = start.theta, start.target
        mode = np.zeros(target.sites.num_latents, jnp.result_type(float))
        self.objective.check(target, theta)
        blocks = start_blocks(rng_key, start, self.partition, self.init_strategy)
        num_particles = self._num_particles_for(target, theta, blocks.num_blocks)
        first = ("first", num_particles), self._first_state(num_particles)
        start.foresee(start.prepare(*first, rng_key, theta, blocks, mode)[0])
        warm = warm_theta(start, blocks) if self.optim is None and self._maximises_likelihood else None
        if warm is not None:
            theta, mode = warm
        state, num_unfinished, num_stages = start.call(*first, rng_key, theta, blocks, mode)
        refuse_hopeless(start, state.points.terms, blocks.sums)
        if not self._maximises_likelihood:
            refuse_loss(start, self.objective, state.diagnostics["loss"])
        warn_of_unfinished(start, blocks, num_unfinished, num_stages)
        return state

    def _num_particles_for(self, target: Target, theta: Theta, num_blocks: int) -> int:
        if target.sites.num_latents == 0:
            return 1  # plain maximum likelihood: there is nothing to integrate out
        return self.num_particles or budget.default_num_particles(
            target.work(theta),
            control_variates=self._maximises_likelihood,
            fewest=budget.fewest_with_weights(num_blocks),
        )

    def _first_state(self, num_particles: int) -> Callable:
        """A program: the first state at ``theta``, how many blocks are not at their posterior, stages of tempering."""

        def first(
            target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array
        ) -> tuple[SMCState, Array, Array]:
            key_cloud, key_state = random.split(rng_key)
            whole = blocks
            target, blocks = added_up(target, whole)
            _, flat, _ = flat_terms(target, theta)
            kernel = self.kernel if isinstance(self.kernel, InvariantKernel) else HMC()
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
            points = revived(points, fresh.log_weights, blocks)
            known = starts_from_prior(target, self.init_strategy)
            free = -blocks.sum_free_terms(points.terms[0])
            log_evidence = jnp.sum(cloud.log_evidence) + free if known else jnp.zeros((), flat.dtype)
            zero = jnp.zeros((), jnp.int32)
            state = SMCState(
                theta=theta,
                params=target.constrain_params(theta),
                points=points,
                log_weights=fresh.log_weights,
                log_evidence_start=log_evidence,
                log_evidence_change=jnp.zeros_like(log_evidence),
                relative=jnp.asarray(not known),
                step=first_step(self.kernel, cloud.step, kernel),
                theta_state=self._theta_step(target, theta, num_particles, blocks.num_blocks).init(flat),
                pending=flat,
                caution=jnp.ones((), flat.dtype),
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
            estimate = self._estimate(target, state, points, state.log_weights, theta)
            kept = jnp.ones_like(cloud.acceptance)
            diagnostics = _diagnostics(state, fresh, kept, cloud.acceptance, jnp.zeros_like(flat), zero, zero)
            diagnostics = self._with_gradient(diagnostics, jnp.zeros_like(flat))
            state = state._replace(diagnostics=self._with_objective(diagnostics, estimate), blocks=whole)
            return state, jnp.sum(cloud.unfinished), cloud.num_stages

        return first

    # -- update -------------------------------------------------------------------------------------------------------
    def _step(self, target: Target, state: SMCState, controls: dict[str, Array]) -> SMCState:
        num_particles, num_blocks = state.log_weights.shape
        whole = state.blocks
        target, blocks = added_up(target, whole)
        state, step = state._replace(blocks=blocks), state.step._replace(size=controls["step_size"])
        keys = split(state.rng_key, 2 + num_blocks)
        num_uniforms = self.kernel.num_uniforms(state.points.x.shape[1], num_blocks)
        noise = draw_noise(keys[1], state.points.x, num_uniforms)
        _, flat, unravel = flat_terms(target, state.theta)
        theta_step = self._theta_step(target, state.theta, num_particles, num_blocks)

        # Theta: the gradient and a step, or what the last update decided
        gradient, proposed, theta_state, usable = self._propose(target, state, theta_step, controls)

        # Move and weigh (weighted kernels), or weigh where the particles are (invariant kernels)
        judge = partial(self._judge, target, state, proposed, noise, step)
        judged_by = unspoiled if self._shares_passes(state) else directly
        judged = judged_by(judge, state.points.x, jnp.zeros(state.log_weights.shape, bool))
        points, log_weights, sound = judged.points, judged.log_weights, judged.sound
        keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(sound, a, b), a, b)  # noqa: E731
        here, theta_state = keep(proposed, flat), keep(theta_state, state.theta_state)
        ess = jnp.where(sound, judged.weighed.ess, jnp.inf)
        pending = flat + SHORTER * (jnp.where(jnp.isfinite(proposed), proposed, flat) - flat)
        state = state._replace(log_evidence_change=state.log_evidence_change + judged.gained)

        # Next theta, from the weighted particles before they are resampled and moved
        if judged.estimate is not None:
            gradient = judged.gradient
            around = self._surroundings(target, state, points, log_weights, here, gradient, judged.estimate, controls)
            following, next_state, usable = advance(theta_step, theta_state, here, around)
            pending, theta_state = keep(following, pending), keep(next_state, theta_state)

        # Resample
        threshold = jnp.where(controls["resample"], controls["ess_threshold"], -1.0)
        points, log_weights, num_resampled = resample_blocks(
            keys[2:], points, log_weights, ess, blocks, self.resample.scheme, threshold
        )

        # Move (invariant kernels)
        if isinstance(self.kernel, InvariantKernel):
            points, accepted = self._move(target, state, unravel(here), points, noise, step)
            acceptance = jnp.sum(jnp.exp(log_weights) * accepted, 0)
            size = adapt_size(step.size, acceptance, self.kernel.target, state.num_updates)
        else:
            acceptance = (judged.kept >= KEPT_BY_A_MOVE).astype(flat.dtype)
            size = adapt_unadjusted_size(step.size, judged.kept, self.kernel.target, state.num_updates)

        # Adapt
        preconditioner = self.kernel.preconditioning.adapt(step.preconditioner, points.x, log_weights, blocks)

        refused = (~(sound & usable)).astype(jnp.int32)
        state = state._replace(
            theta=unravel(here),
            params=target.constrain_params(unravel(theta_step.estimate(theta_state, here))),
            points=points,
            log_weights=log_weights,
            step=Step(size, preconditioner),
            theta_state=theta_state,
            pending=pending,
            caution=next_caution(state.caution, sound, usable),
            num_updates=state.num_updates + 1,
            num_refused=state.num_refused + refused,
            num_lost=jnp.zeros_like(state.num_lost),
            blocks=whole,
            rng_key=keys[0],
        )
        diagnostics = _diagnostics(state, judged.weighed, judged.kept, acceptance, gradient, num_resampled, refused)
        diagnostics = self._with_gradient(diagnostics, gradient)
        return state._replace(diagnostics=self._with_objective(diagnostics, judged.estimate))

    def _judge(
        self, target: Target, state: SMCState, proposed: Array, noise: Noise, step: Step, x: Array, lost: Array
    ) -> Judged:
        """Particles ``x`` weighed at theta', a refusal if need be, and loss and gradient where theta then is.

        ``lost [N, B]`` have no weight whatever their energy.
        """
        _, flat, unravel = flat_terms(target, state.theta)
        blocks = state.blocks
        moved, change, backward, kept = self._weigh(target, state, proposed, noise, step, x)
        # A particle without a finite gradient has no future.
        change = jnp.where(jnp.isfinite(blocks.sum_coordinates(moved.grad)) & ~lost, change, jnp.nan)
        if moved.score is not None:  # where none is finite it is theta that is at fault, and stays
            scored = jnp.all(jnp.isfinite(moved.score), 1, keepdims=True)
            change = jnp.where(scored | ~jnp.any(scored), change, jnp.nan)
        weighed = reweight(state.log_weights, change)
        kept = kept_fraction(state.log_weights, change) if kept is None else kept
        gained = jnp.sum(weighed.log_mean) + jnp.mean(blocks.sum_free_terms(state.points.terms - moved.terms))

        # Refuse a step that leaves a block without weight, or theta not finite
        sound = ~jnp.any(weighed.collapsed) & jnp.all(jnp.isfinite(proposed))
        sound &= jnp.isfinite(state.log_evidence_change + gained)
        keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(sound, a, b), a, b)  # noqa: E731
        log_weights, gained = keep(weighed.log_weights, state.log_weights), jnp.where(sound, gained, 0.0)
        points = changed_if(~sound, lambda _: state.points, revived(moved, weighed.log_weights, blocks))
        # In a refused update it is theta that is at fault, and no particle.
        num_nonfinite = jnp.where(sound, weighed.num_nonfinite, 0) + state.num_lost
        weighed = weighed._replace(num_nonfinite=num_nonfinite)
        if self._gradient_first:
            return Judged(points, log_weights, weighed, kept, sound, gained, jnp.zeros_like(flat), None)

        # What the objective says of them
        state = state._replace(log_evidence_change=state.log_evidence_change + gained)
        estimate = self._estimate(target, state, points, log_weights, unravel(keep(proposed, flat)))
        gradient = jnp.where(sound, backward(points, estimate), 0.0)
        estimate = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf)), estimate._replace(rest=None))
        return Judged(points, log_weights, weighed, kept, sound, gained, gradient, estimate)

    @property
    def _maximises_likelihood(self) -> bool:
        return isinstance(self.objective, MarginalLikelihood)

    @property
    def _gradient_first(self) -> bool:
        """Whether theta moves by the gradient of the cloud as it was left by the last move, as in the paper.

        The default order weighs, takes the gradient, and then moves the particles: the particles that weigh a step
        have then moved since they proposed it, so the log evidence is not pulled up by steps that were fitted to the
        very particles that judge them. Objectives other than the marginal likelihood always have that order: the loss
        and the gradient are then those of one and the same theta and cloud, before resampling adds its noise.
        """
        return self._maximises_likelihood and (self.optim is not None or isinstance(self.kernel, WeightedKernel))

    def _shares_passes(self, state: SMCState) -> bool:
        """Whether one forward pass serves the weights and the gradients in x and theta."""
        invariant = isinstance(self.kernel, InvariantKernel)
        return invariant and not self._gradient_first and state.points.score is None

    def _propose(
        self, target: Target, state: SMCState, theta_step: ThetaStep, controls: dict[str, Any]
    ) -> tuple[Array, Array, Any, Array]:
        """Gradient, theta', the state of the theta step and whether they are finite, if the gradient comes first.

        Else what was decided in the last update.
        """
        _, flat, _ = flat_terms(target, state.theta)
        if not self._gradient_first:
            return jnp.zeros_like(flat), state.pending, state.theta_state, jnp.asarray(True)
        estimate = self._estimate(target, state, state.points, state.log_weights, state.theta)
        gradient = surrogate_gradient(target, state.blocks, state.theta)(state.points, estimate)
        around = self._surroundings(target, state, state.points, state.log_weights, flat, gradient, estimate, controls)
        return gradient, *advance(theta_step, state.theta_state, flat, around)

    def _weigh(
        self, target: Target, state: SMCState, proposed: Array, noise: Noise, step: Step, x: Array
    ) -> tuple[Point, Array, Gradient, Array | None]:
        """Particles evaluated at theta', [N, B] what their log weights gain, an estimate's way to a gradient, and [B].

        The last is the fraction of effective particles that the move of a weighted kernel kept, or would have kept: a
        block whose weights it would destroy (an unstable step size) stays where it is instead, which is a valid move
        too, and is weighed there. The particles of other kernels do not move in here, and are taken to be at ``x``.
        """
        terms_fn, _, unravel = flat_terms(target, state.theta)
        evaluate = evaluator(target, unravel(proposed), state.points.score is not None)
        backward = surrogate_gradient(target, state.blocks, unravel(proposed))

        def gain(points: Point, log_ratio: Array | float) -> Array:
            return incremental_log_weight(state.points.terms, points.terms, state.blocks.sum_terms, log_ratio)

        if isinstance(self.kernel, WeightedKernel):
            move = lambda noise, p: self.kernel.move(noise, p, Potential(evaluate, state.blocks), step)  # noqa: E731
            points, log_ratio = jax.vmap(move)(noise, state.points)
            change = gain(points, log_ratio)
            # Of those that met a finite energy: the others are not for the step size to answer for.
            survived = jnp.sum(jnp.where(jnp.isfinite(change), jnp.exp(state.log_weights), 0.0), 0)
            kept = kept_fraction(state.log_weights, change) / jnp.maximum(survived, jnp.finfo(change.dtype).tiny)
            moves = kept >= KEPT_BY_A_MOVE
            where = state.blocks.to_coordinates(moves)

            def stay(moved: tuple[Point, Array]) -> tuple[Point, Array]:
                points = jax.vmap(evaluate)(jnp.where(where, moved[0].x, state.points.x))
                return points, gain(points, jnp.where(moves, log_ratio, 0.0))

            return *changed_if(~jnp.all(moves), stay, (points, change)), backward, kept
        if not self._shares_passes(state):
            points = jax.vmap(evaluate)(x)
            return points, gain(points, 0.0), backward, None
        # One forward pass serves the weights and both gradients.
        all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
        terms, vjp = jax.vjp(all_terms, proposed, x)
        points = Point(x, terms, vjp(jnp.ones_like(terms))[1])
        shared = lambda estimate: vjp(term_coefficients(estimate, state.blocks))[0]  # noqa: E731
        rest = lambda estimate: gradient_of_rest(estimate, unravel(proposed))  # noqa: E731
        return points, gain(points, 0.0), lambda points, estimate: shared(estimate) + rest(estimate), None

    def _estimate(self, target: Target, state: SMCState, points: Point, log_weights: Array, theta: Theta) -> Estimate:
        """Loss and coefficients of the gradient at ``theta``, where ``points`` are evaluated and weighed."""
        cloud = Cloud(*points[:3], log_weights, state.blocks, _log_evidence(state), state.log_evidence_change)
        return self.objective.estimate(Scene(target, theta, target.attached, random.fold_in(state.rng_key, 2)), cloud)

    def _with_gradient(self, diagnostics: dict[str, Array], gradient: Array) -> dict[str, Array]:
        """Diagnostics with the gradient [P] of a likelihood, from which it is seen whether theta still moves."""
        if not self._maximises_likelihood or gradient.size > budget.LARGEST_INFORMATION:
            return diagnostics
        return diagnostics | {"gradient": jnp.where(jnp.isfinite(gradient), gradient, 0.0)}

    def _with_objective(self, diagnostics: dict[str, Array], estimate: Estimate | None) -> dict[str, Array]:
        """Diagnostics with the loss of an objective other than the marginal likelihood, and with what else it says."""
        if self._maximises_likelihood or estimate is None:
            return diagnostics
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return diagnostics | estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}

    def _surroundings(
        self,
        target: Target,
        state: SMCState,
        points: Point,
        log_weights: Array,
        theta: Array,
        gradient: Array,
        estimate: Estimate,
        controls: dict[str, Any],
    ) -> Surroundings:
        loss = -_log_evidence(state) if self._maximises_likelihood else estimate.loss
        place = target, state.theta, theta, points, log_weights, state.blocks

        def admit(step: Array) -> Array:
            step = controls["learning_rate"] * state.caution * step
            return controls["theta_limit"](step_probe(*place), step) * step

        found = surroundings(*place, state.num_updates)
        return found._replace(gradient=gradient, loss=loss, curvature=estimate.curvature, admit=admit)

    def _move(
        self, target: Target, state: SMCState, theta: Theta, points: Point, noise: Noise, step: Step
    ) -> tuple[Point, Array]:
        """One invariant move of every particle at ``theta``; the acceptance of each block, [N, B]."""
        potential = Potential(evaluator(target, theta, points.score is not None), state.blocks)
        return jax.vmap(lambda noise, p: self.kernel.move(noise, p, potential, step))(noise, points)

    def _theta_step(self, target: Target, theta: Theta, num_particles: int, num_blocks: int) -> ThetaStep:
        if self.optim is not None:
            return self.optim
        evaluations = self.kernel.num_evaluations
        return default_theta_step(self.objective, target, theta, num_particles, num_blocks, evaluations)

    def _attached(self) -> Any:
        return self.objective.arrays

    def _controls(self, state: SMCState) -> dict[str, Any]:
        dtype = state.log_weights.dtype.type
        return {
            "step_size": state.step.size,
            "ess_threshold": dtype(self.resample.threshold),
            "resample": np.bool_(True),
            "learning_rate": dtype(1.0),
            "theta_limit": no_limit,
        }

    # -- new data -----------------------------------------------------------------------------------------------------
    def _adopt(self, target: Target, state: SMCState, fingerprint: Array) -> SMCState:
        target, blocks = added_up(target, state.blocks)
        points = jax.vmap(evaluator(target, state.theta, state.points.score is not None))(state.points.x)
        change = incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms)
        weighed = reweight(state.log_weights, change)
        wrong = blocks_are_wrong(random.fold_in(state.rng_key, 1), target, state.theta, points.x, blocks)
        free = jnp.mean(blocks.sum_free_terms(state.points.terms - points.terms))
        adopted = state._replace(
            points=revived(points, weighed.log_weights, blocks),
            log_weights=weighed.log_weights,
            log_evidence_change=state.log_evidence_change + jnp.sum(weighed.log_mean) + free,
            num_lost=state.num_lost + weighed.num_nonfinite,
            fingerprint=fingerprint,
        )
        usable = ~wrong & ~jnp.any(weighed.collapsed)
        kept = jax.tree.map(lambda a, b: jnp.where(usable, a, b) if a is not b else a, adopted, state)
        return kept._replace(wrong_blocks=wrong)

    def evaluate(self, state: SMCState, *args: Any, **kwargs: Any) -> Array:
        """The loss in a state under the given data, without changing the state.

        For the marginal likelihood this is minus the running log evidence.

        Args:
            state: A state.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.
        """
        self._check_state(state)
        arrays, static = self._bind(args, kwargs)

        def loss(target: Target, state: SMCState) -> Array:
            state = self._adopt(target, state, state.fingerprint)
            if self._maximises_likelihood:
                return -_log_evidence(state)
            target, blocks = added_up(target, state.blocks)
            state = state._replace(blocks=blocks)
            return self._estimate(target, state, state.points, state.log_weights, state.theta).loss

        return self._program("evaluate", loss)(static, arrays, state)

    def _report_faults(self, state: SMCState, diagnostics: dict[str, Array]) -> Status:
        num = len(diagnostics["loss"])
        refused, lost = (int(np.sum(diagnostics[name])) for name in ("num_refused", "num_nonfinite"))
        acceptance = float(np.mean(diagnostics["acceptance_rate"][num // 2 :]))
        moves = isinstance(self.kernel, InvariantKernel) and state.points.x.shape[1] > 0
        starved = faults.starved_cloud(float(np.mean(diagnostics["step_ess"])), state.log_weights.shape[0])
        faults.warn_of(
            (
                faults.refused_updates(refused, num),
                starved,
                faults.lost_particles(lost),
                faults.frozen_particles(acceptance) if moves else None,
                faults.masked_particles(int(np.sum(diagnostics.get("num_masked", 0)))),
            )
        )
        if refused > num / 4 or starved:
            return Status.WEIGHTS_COLLAPSED
        return Status.NON_FINITE if lost > LARGEST_LOSS * num * state.log_weights.size else Status.FINISHED


def _log_evidence(state: SMCState) -> Array:
    return state.log_evidence_start + state.log_evidence_change


def _diagnostics(
    state: SMCState,
    weighed: Reweighted,
    kept: Array,
    acceptance: Array,
    gradient: Array,
    num_resampled: Array,
    num_refused: Array,
) -> dict[str, Array]:
    """What an update announces; ESS as fractions of the particles, over blocks the smallest, the mean, and all [B]."""
    ess = weighed.ess / state.log_weights.shape[0]
    return {
        "loss": -_log_evidence(state),
        "log_evidence": _log_evidence(state),
        "ess": jnp.min(ess),
        "mean_ess": jnp.mean(ess),
        "step_ess": jnp.min(kept),
        "acceptance_rate": jnp.mean(acceptance),
        "mean_step_size": jnp.mean(state.step.size),
        "grad_norm": jnp.linalg.norm(jnp.where(jnp.isfinite(gradient), gradient, 0.0)),
        "num_nonfinite": weighed.num_nonfinite,
        "num_refused": num_refused,
        "num_resampled": jnp.asarray(num_resampled, jnp.int32),
        "block_ess": ess,
        "block_step_ess": kept,
        "block_acceptance": acceptance,
    }
