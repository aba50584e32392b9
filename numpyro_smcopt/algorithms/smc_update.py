# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One update of `SMCOptimizer`: a sequential Monte Carlo sampler whose targets follow the optimiser.

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

import dataclasses
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt.adaptation import adapt_size, adapt_unadjusted_size
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import InvariantKernel, Point, Potential, Step, WeightedKernel
from numpyro_smcopt.objectives import Cloud, Estimate, Objective, Scene, term_coefficients
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.evaluate import added_up, evaluator, resample_blocks, revived
from numpyro_smcopt.population.gradients import (
    Gradient,
    default_theta_step,
    gradient_of_rest,
    step_context,
    step_probe,
    surrogate_gradient,
)
from numpyro_smcopt.population.safeguards import SHORTER, Judged, advance, directly, next_backoff, unspoiled
from numpyro_smcopt.potential import Target, flat_terms, strong
from numpyro_smcopt.random_numbers import RandomNumbers, draw_random_numbers, split
from numpyro_smcopt.resampling import ResamplingScheme
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.types import Array, Params, Theta
from numpyro_smcopt.weights import Reweighted, conditional_ess, incremental_log_weight, reweight

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
        next_theta: [P] where theta goes next, if the order is to weigh first (see `SMCOptimizer`).
        step_backoff: [] factor on the steps of theta: one, or less after a step was refused.
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
    next_theta: Array
    step_backoff: Array
    blocks: Blocks
    num_updates: Array
    num_refused: Array
    num_lost: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array


@dataclasses.dataclass(frozen=True)
class SMCUpdate:
    """How an update is made.

    Args:
        objective: What is minimised.
        kernel: Moves the particles.
        scheme: Resamples them.
        optim: Moves theta; None for the default step.
    """

    objective: Objective
    kernel: InvariantKernel | WeightedKernel
    scheme: ResamplingScheme
    optim: ThetaStep | None

    def step(self, target: Target, state: SMCState, controls: dict[str, Array]) -> SMCState:
        """The next state, see the head of this file."""
        num_particles, num_blocks = state.log_weights.shape
        whole = state.blocks
        target, blocks = added_up(target, whole)
        state, step = state._replace(blocks=blocks), state.step._replace(size=controls["step_size"])
        keys = split(state.rng_key, 2 + num_blocks)
        num_uniforms = self.kernel.num_uniforms(state.points.x.shape[1], num_blocks)
        random_numbers = draw_random_numbers(keys[1], state.points.x, num_uniforms)
        _, flat, unravel = flat_terms(target, state.theta)
        theta_step = self.theta_step(target, state.theta, num_particles, num_blocks)

        # Theta: the gradient and a step, or what the last update decided
        gradient, proposed, theta_state, usable = self._propose(target, state, theta_step, controls)

        # Move and weigh (weighted kernels), or weigh where the particles are (invariant kernels)
        judge = partial(self._judge, target, state, proposed, random_numbers, step)
        judged_by = unspoiled if self._shares_passes(state) else directly
        judged = judged_by(judge, state.points.x, jnp.zeros(state.log_weights.shape, bool))
        points, log_weights, sound = judged.points, judged.log_weights, judged.sound
        keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(sound, a, b), a, b)  # noqa: E731
        here, theta_state = keep(proposed, flat), keep(theta_state, state.theta_state)
        ess = jnp.where(sound, judged.weighed.ess, jnp.inf)
        next_theta = flat + SHORTER * (jnp.where(jnp.isfinite(proposed), proposed, flat) - flat)
        state = state._replace(log_evidence_change=state.log_evidence_change + judged.gained)

        # Next theta, from the weighted particles before they are resampled and moved
        if judged.estimate is not None:
            gradient = judged.gradient
            around = self._step_context(target, state, points, log_weights, here, gradient, judged.estimate, controls)
            following, next_theta_state, usable = advance(theta_step, theta_state, here, around)
            next_theta, theta_state = keep(following, next_theta), keep(next_theta_state, theta_state)

        # Resample
        threshold = jnp.where(controls["resample"], controls["ess_threshold"], -1.0)
        points, log_weights, num_resampled = resample_blocks(
            keys[2:], points, log_weights, ess, blocks, self.scheme, threshold
        )

        # Move (invariant kernels)
        if isinstance(self.kernel, InvariantKernel):
            points, accepted = self._move(target, state, unravel(here), points, random_numbers, step)
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
            next_theta=next_theta,
            step_backoff=next_backoff(state.step_backoff, sound, usable),
            num_updates=state.num_updates + 1,
            num_refused=state.num_refused + refused,
            num_lost=jnp.zeros_like(state.num_lost),
            blocks=whole,
            rng_key=keys[0],
        )
        diagnostics = diagnostics_of(state, judged.weighed, judged.kept, acceptance, gradient, num_resampled, refused)
        diagnostics = self.with_gradient(diagnostics, gradient)
        return state._replace(diagnostics=self.with_objective(diagnostics, judged.estimate))

    def _judge(
        self,
        target: Target,
        state: SMCState,
        proposed: Array,
        random_numbers: RandomNumbers,
        step: Step,
        x: Array,
        lost: Array,
    ) -> Judged:
        """Particles ``x`` weighed at theta', a refusal if need be, and loss and gradient where theta then is.

        ``lost [N, B]`` have no weight whatever their energy.
        """
        _, flat, unravel = flat_terms(target, state.theta)
        blocks = state.blocks
        moved, change, backward, kept = self._weigh(target, state, proposed, random_numbers, step, x)
        # A particle without a finite gradient has no future.
        change = jnp.where(jnp.isfinite(blocks.sum_coordinates(moved.grad)) & ~lost, change, jnp.nan)
        if moved.score is not None:  # where none is finite it is theta that is at fault, and stays
            scored = jnp.all(jnp.isfinite(moved.score), 1, keepdims=True)
            change = jnp.where(scored | ~jnp.any(scored), change, jnp.nan)
        weighed = reweight(state.log_weights, change)
        kept = conditional_ess(state.log_weights, change) if kept is None else kept
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
        estimate = self.estimate(target, state, points, log_weights, unravel(keep(proposed, flat)))
        gradient = jnp.where(sound, backward(points, estimate), 0.0)
        estimate = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf)), estimate._replace(rest=None))
        return Judged(points, log_weights, weighed, kept, sound, gained, gradient, estimate)

    @property
    def maximises_likelihood(self) -> bool:
        """Whether the loss is minus the log evidence."""
        return self.objective.is_likelihood

    @property
    def _gradient_first(self) -> bool:
        """Whether theta moves by the gradient of the cloud as it was left by the last move, as in the paper.

        The default order weighs, takes the gradient, and then moves the particles: the particles that weigh a step
        have then moved since they proposed it, so the log evidence is not pulled up by steps that were fitted to the
        very particles that judge them. Objectives other than the marginal likelihood always have that order: the loss
        and the gradient are then those of one and the same theta and cloud, before resampling adds its random_numbers.
        """
        return self.maximises_likelihood and (self.optim is not None or isinstance(self.kernel, WeightedKernel))

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
            return jnp.zeros_like(flat), state.next_theta, state.theta_state, jnp.asarray(True)
        estimate = self.estimate(target, state, state.points, state.log_weights, state.theta)
        gradient = surrogate_gradient(target, state.blocks, state.theta)(state.points, estimate)
        around = self._step_context(target, state, state.points, state.log_weights, flat, gradient, estimate, controls)
        return gradient, *advance(theta_step, state.theta_state, flat, around)

    def _weigh(
        self, target: Target, state: SMCState, proposed: Array, random_numbers: RandomNumbers, step: Step, x: Array
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
            potential = Potential(evaluate, state.blocks)
            points, log_ratio = jax.vmap(lambda drawn, p: self.kernel.move(drawn, p, potential, step))(
                random_numbers, state.points
            )
            change = gain(points, log_ratio)
            # Of those that met a finite energy: the others are not for the step size to answer for.
            survived = jnp.sum(jnp.where(jnp.isfinite(change), jnp.exp(state.log_weights), 0.0), 0)
            kept = conditional_ess(state.log_weights, change) / jnp.maximum(survived, jnp.finfo(change.dtype).tiny)
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

    def estimate(self, target: Target, state: SMCState, points: Point, log_weights: Array, theta: Theta) -> Estimate:
        """Loss and coefficients of the gradient at ``theta``, where ``points`` are evaluated and weighed."""
        cloud = Cloud(*points[:3], log_weights, state.blocks, log_evidence(state), state.log_evidence_change)
        return self.objective.estimate(Scene(target, theta, target.attached, random.fold_in(state.rng_key, 2)), cloud)

    def with_gradient(self, diagnostics: dict[str, Array], gradient: Array) -> dict[str, Array]:
        """Diagnostics with the gradient [P] of a likelihood, from which it is seen whether theta still moves."""
        if not self.maximises_likelihood or gradient.size > budget.LARGEST_INFORMATION:
            return diagnostics
        return diagnostics | {"gradient": jnp.where(jnp.isfinite(gradient), gradient, 0.0)}

    def with_objective(self, diagnostics: dict[str, Array], estimate: Estimate | None) -> dict[str, Array]:
        """Diagnostics with the loss of an objective other than the marginal likelihood, and with what else it says."""
        if self.maximises_likelihood or estimate is None:
            return diagnostics
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return diagnostics | estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}

    def _step_context(
        self,
        target: Target,
        state: SMCState,
        points: Point,
        log_weights: Array,
        theta: Array,
        gradient: Array,
        estimate: Estimate,
        controls: dict[str, Any],
    ) -> StepContext:
        loss = -log_evidence(state) if self.maximises_likelihood else estimate.loss
        place = target, state.theta, theta, points, log_weights, state.blocks

        def admit(step: Array) -> Array:
            step = controls["learning_rate"] * state.step_backoff * step
            return controls["theta_limit"](step_probe(*place), step) * step

        found = step_context(*place, state.num_updates)
        return found._replace(gradient=gradient, loss=loss, curvature=estimate.curvature, admit=admit)

    def _move(
        self, target: Target, state: SMCState, theta: Theta, points: Point, random_numbers: RandomNumbers, step: Step
    ) -> tuple[Point, Array]:
        """One invariant move of every particle at ``theta``; the acceptance of each block, [N, B]."""
        potential = Potential(evaluator(target, theta, points.score is not None), state.blocks)
        return jax.vmap(lambda random_numbers, p: self.kernel.move(random_numbers, p, potential, step))(
            random_numbers, points
        )

    def theta_step(self, target: Target, theta: Theta, num_particles: int, num_blocks: int) -> ThetaStep:
        """The step of theta, by default the one that needs no learning rate."""
        if self.optim is not None:
            return self.optim
        evaluations = self.kernel.num_evaluations
        return default_theta_step(self.objective, target, theta, num_particles, num_blocks, evaluations)


def log_evidence(state: SMCState) -> Array:
    """[] the running log evidence."""
    return state.log_evidence_start + state.log_evidence_change


def diagnostics_of(
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
        "loss": -log_evidence(state),
        "log_evidence": log_evidence(state),
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
