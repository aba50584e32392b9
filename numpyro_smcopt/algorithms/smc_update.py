# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One update of `SMCOptimizer`: a sequential Monte Carlo sampler whose targets follow the optimiser.

One update of ``theta_k`` and the weighted particles ``(x_i, w_i)`` of ``pi_theta_k``:

    g      = estimate of grad F(theta_k) from (x_i, w_i)
    theta' = step(theta_k, g)
    invariant kernel:  w_i <- w_i exp(U_theta(x_i) - U_theta'(x_i));  resample;  x_i <- q_theta'(. | x_i)
    weighted kernel:   x'_i ~ q_theta(. | x_i);  w_i <- w_i exp(U_theta(x_i) - U_theta'(x'_i)) q_theta'(x_i | x'_i)
                       / q_theta(x'_i | x_i);  resample

and ``log Z`` grows by the logarithm of the mean increment, block by block.

Source: Cuin, Tang, Carbone and Akyildiz, "Efficient Stochastic Optimisation via Sequential Monte Carlo", ICML 2026,
arXiv 2601.22003, algorithm 1.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.kernels import Kernel, Point, Potential, Step
from numpyro_smcopt.objectives import Cloud, Estimate, Objective, Scene, term_coefficients
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.evaluate import (
    added_up,
    blocks_are_wrong,
    evaluate_together,
    evaluator,
    evaluator_at,
    replace_dead,
    resample_blocks,
)
from numpyro_smcopt.population.gradients import (
    default_theta_step,
    gradient_of_rest,
    step_context,
    step_probe,
    surrogate_gradient,
)
from numpyro_smcopt.population.safeguards import SHORTER, is_finite, next_backoff, select, update_if_finite
from numpyro_smcopt.potential import Target, flat_terms
from numpyro_smcopt.random_numbers import RandomNumbers, aside, draw_random_numbers, split
from numpyro_smcopt.resampling import ResamplingScheme
from numpyro_smcopt.theta_step import ThetaStep
from numpyro_smcopt.types import Array, FlatTermsFn, Params, Theta
from numpyro_smcopt.weights import conditional_ess, incremental_log_weight, reweight

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
class SMCParts:
    """The parts of an update.

    Args:
        objective: What is minimised.
        kernel: Moves the particles.
        scheme: Resamples them.
        optim: Moves theta; None for the default step.
    """

    objective: Objective
    kernel: Kernel
    scheme: ResamplingScheme
    optim: ThetaStep | None

    def order(self) -> "UpdateFn":
        """`gradient_first` or `weigh_first`.

        The paper takes the gradient of the cloud as the last move left it. The default order weighs, takes the
        gradient, and then moves the particles: the particles that weigh a step have then moved since they proposed it,
        so the log evidence is not pulled up by steps that were fitted to the very particles that judge them. Objectives
        other than the marginal likelihood always have that order: the loss and the gradient are then those of one and
        the same theta and cloud, before resampling adds its noise.
        """
        as_published = self.objective.is_likelihood and (self.optim is not None or not self.kernel.invariant)
        return gradient_first if as_published else weigh_first

    def theta_step(self, target: Target, theta: Theta, num_particles: int, num_blocks: int) -> ThetaStep:
        """The step of theta; by default the one that needs no learning rate."""
        if self.optim is not None:
            return self.optim
        evaluations = self.kernel.num_evaluations
        return default_theta_step(self.objective, target, theta, num_particles, num_blocks, evaluations)


UpdateFn: TypeAlias = Callable[[SMCParts, Target, SMCState, dict[str, Any]], SMCState]
"""The next state, from the present one and the values of the control sites."""


def weigh_first(parts: SMCParts, target: Target, state: SMCState, controls: dict[str, Any]) -> SMCState:
    """Go where the last update decided to go, and decide on the next theta."""
    now = _workspace(parts, target, state, controls)

    # Weigh the particles at theta', or refuse theta'; those of a weighted kernel move there first
    state, weighed = _weigh(now, state, state.next_theta)

    # Gradient at theta'
    estimate, gradient = _differentiate(now, state, weighed.theta, weighed.pull_back)
    gradient = jnp.where(weighed.accepted, gradient, 0.0)

    # Next theta, from particles that have not yet been resampled and moved
    *advanced, usable = _step_theta(now, state, weighed.theta, estimate, gradient)
    next_theta, theta_state = select(weighed.accepted, advanced, [state.next_theta, state.theta_state])

    # Resample the blocks of low effective sample size
    state, num_resampled = _resample(now, state, weighed)

    # Move those of an invariant kernel, and adapt the kernel
    state, acceptance = _move(now, state, weighed)

    state = state._replace(next_theta=next_theta, theta_state=theta_state)
    return _concluded(now, state, weighed, estimate, gradient, usable, num_resampled, acceptance)


def gradient_first(parts: SMCParts, target: Target, state: SMCState, controls: dict[str, Any]) -> SMCState:
    """The algorithm as published."""
    now = _workspace(parts, target, state, controls)

    # Gradient at theta, from the particles as the last update left them
    estimate, gradient = _differentiate(now, state, now.theta)

    # Step to theta'
    proposed, theta_state, usable = _step_theta(now, state, now.theta, estimate, gradient)

    # Weigh the particles at theta', or refuse theta'; those of a weighted kernel move there first
    state, weighed = _weigh(now, state, proposed)
    theta_state = select(weighed.accepted, theta_state, state.theta_state)

    # Resample the blocks of low effective sample size
    state, num_resampled = _resample(now, state, weighed)

    # Move those of an invariant kernel, and adapt the kernel
    state, acceptance = _move(now, state, weighed)

    state = state._replace(theta_state=theta_state)
    return _concluded(now, state, weighed, estimate, gradient, usable, num_resampled, acceptance)


# -- what they are made of ---------------------------------------------------------------------------------------------
class _Workspace(NamedTuple):
    """The quantities that the stages of one update share.

    Attributes:
        parts: The parts.
        target: The model, its energy terms added up.
        terms_fn: The same, of a flat theta.
        blocks: The partition of those sums.
        theta: [P] the present theta, flat.
        unravel: The way back to its tree.
        theta_step: Moves it.
        step: How far the kernel goes.
        controls: Values of the control sites.
        random_numbers: Of the moves.
        key_objective: Of the objective.
        keys_resampling: [B] one per block.
        next_key: Of the updates that follow.
    """

    parts: SMCParts
    target: Target
    terms_fn: FlatTermsFn
    blocks: Blocks
    theta: Array
    unravel: Callable[[Array], Theta]
    theta_step: ThetaStep
    step: Step
    controls: dict[str, Any]
    random_numbers: RandomNumbers
    key_objective: Array
    keys_resampling: Array
    next_key: Array


def _workspace(parts: SMCParts, target: Target, state: SMCState, controls: dict[str, Any]) -> _Workspace:
    num_particles, num_blocks = state.log_weights.shape
    target, blocks = added_up(target, state.blocks)
    terms_fn, theta, unravel = flat_terms(target, state.theta)
    next_key, key_move, key_objective, *_ = keys = split(state.rng_key, 3 + num_blocks)
    num_uniforms = parts.kernel.num_uniforms(state.points.x.shape[1], num_blocks)
    return _Workspace(
        parts,
        target,
        terms_fn,
        blocks,
        theta,
        unravel,
        parts.theta_step(target, state.theta, num_particles, num_blocks),
        state.step._replace(size=controls["step_size"]),
        controls,
        draw_random_numbers(key_move, state.points.x, num_uniforms),
        key_objective,
        keys[3:],
        next_key,
    )


class _Weighed(NamedTuple):
    """Result of the weighing.

    Attributes:
        theta: [P] theta', or the present theta if theta' was refused.
        accepted: [] bool, whether it was not.
        ess: [B] effective sample size.
        num_nonfinite: [] weights that were lost.
        conditional_ess: [B] share of the effective particles that the update kept, or that its moves would have kept.
        pull_back: From cotangents [N, K] of the energy terms to the gradient at theta', if that is known.
    """

    theta: Array
    accepted: Array
    ess: Array
    num_nonfinite: Array
    conditional_ess: Array
    pull_back: Callable[[Array], Array] | None


def _weigh(now: _Workspace, state: SMCState, proposed: Array) -> tuple[SMCState, _Weighed]:
    """The particles with their weights at theta', and the log evidence; all as before where theta' is refused.

    It is refused if it or a parameter is not finite, or would leave a block without any weight.
    """
    kernel, blocks, pull_back, kept = now.parts.kernel, now.blocks, None, None
    if kernel.invariant and state.points.score is None:
        points, pull_back = evaluate_together(now.terms_fn, proposed, state.points.x)
        increment = incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms)
    else:
        potential = Potential(evaluator_at(now.terms_fn, proposed, state.points.score is not None), blocks)
        weigh = lambda drawn, point: kernel.weigh(drawn, point, potential, now.step)  # noqa: E731
        points, log_ratio = jax.vmap(weigh)(now.random_numbers, state.points)
        increment = incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms, log_ratio)
        if not kernel.invariant:
            points, increment, kept = _unmoved(now, state, potential, points, increment, log_ratio)

    # A particle without a finite gradient has no future.
    increment = jnp.where(jnp.isfinite(blocks.sum_coordinates(points.grad)), increment, jnp.nan)
    if points.score is not None:  # where none is finite it is theta that is at fault, and stays
        scored = jnp.all(jnp.isfinite(points.score), 1, keepdims=True)
        increment = jnp.where(scored | ~jnp.any(scored), increment, jnp.nan)
    new = reweight(state.log_weights, increment)
    gained = jnp.sum(new.log_mean) + jnp.mean(blocks.sum_free_terms(state.points.terms - points.terms))

    accepted = ~jnp.any(new.collapsed) & is_finite(now.target, now.unravel(proposed))
    accepted &= jnp.isfinite(state.log_evidence_change + gained)
    retry = now.theta + SHORTER * (jnp.where(jnp.isfinite(proposed), proposed, now.theta) - now.theta)
    weighed = _Weighed(
        theta=jnp.where(accepted, proposed, now.theta),
        accepted=accepted,
        ess=new.ess,
        num_nonfinite=jnp.where(accepted, new.num_nonfinite, 0),  # else it is theta that is at fault
        conditional_ess=conditional_ess(state.log_weights, increment) if kept is None else kept,
        pull_back=pull_back,
    )
    before, points = state.points, replace_dead(points, new.log_weights, blocks)
    return state._replace(
        points=changed_if(~accepted, lambda _: before, points),
        log_weights=jnp.where(accepted, new.log_weights, state.log_weights),
        log_evidence_change=state.log_evidence_change + jnp.where(accepted, gained, 0.0),
        next_theta=retry,
    ), weighed


def _unmoved(
    now: _Workspace, state: SMCState, potential: Potential, points: Point, increment: Array, log_ratio: Array
) -> tuple[Point, Array, Array]:
    """Points and increments without the moves that would destroy the weights of a block, and what the moves keep [B].

    A block that stays where it is, and is weighed there, makes a valid move too.
    """
    # Of those that met a finite energy: the others are not for the step size to answer for.
    survived = jnp.sum(jnp.where(jnp.isfinite(increment), jnp.exp(state.log_weights), 0.0), 0)
    kept = conditional_ess(state.log_weights, increment) / jnp.maximum(survived, jnp.finfo(increment.dtype).tiny)
    moves = kept >= KEPT_BY_A_MOVE
    where, blocks = now.blocks.to_coordinates(moves), now.blocks

    def stay(moved: tuple[Point, Array]) -> tuple[Point, Array]:
        points = jax.vmap(potential.evaluate)(jnp.where(where, moved[0].x, state.points.x))
        ratio = jnp.where(moves, log_ratio, 0.0)
        return points, incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms, ratio)

    return *changed_if(~jnp.all(moves), stay, (points, increment)), kept


def estimate_at(
    parts: SMCParts, target: Target, theta: Theta, state: SMCState, blocks: Blocks, rng_key: Array
) -> Estimate:
    """The objective's estimate from the cloud of a state, evaluated and weighed at ``theta``."""
    cloud = Cloud(*state.points[:3], state.log_weights, blocks, log_evidence(state), state.log_evidence_change)
    return parts.objective.estimate(Scene(target, theta, target.attached, rng_key), cloud)


def _differentiate(
    now: _Workspace, state: SMCState, theta: Array, pull_back: Callable[[Array], Array] | None = None
) -> tuple[Estimate, Array]:
    """The objective's estimate, and the gradient [P] at ``theta``."""
    tree = now.unravel(theta)
    estimate = estimate_at(now.parts, now.target, tree, state, now.blocks, now.key_objective)
    backward = lambda: surrogate_gradient(  # noqa: E731
        now.terms_fn, theta, now.unravel, state.points, estimate, now.blocks
    )
    if pull_back is None:
        return estimate, backward()
    gradient = pull_back(term_coefficients(estimate, now.blocks)) + gradient_of_rest(estimate, tree)
    # Particles without weight may have spoiled it, where they stood: zero times NaN is NaN.
    return estimate, changed_if(~jnp.all(jnp.isfinite(gradient)), lambda _: backward(), gradient)


def _step_theta(
    now: _Workspace, state: SMCState, theta: Array, estimate: Estimate, gradient: Array
) -> tuple[Array, Any, Array]:
    """The end of a step from ``theta``, the state of the theta step, and whether all of that is finite."""
    place = now.target, state.theta, theta, state.points, state.log_weights, now.blocks

    def admit(step: Array) -> Array:
        step = now.controls["learning_rate"] * state.step_backoff * step
        return now.controls["theta_limit"](step_probe(*place), step) * step

    loss = -log_evidence(state) if now.parts.objective.is_likelihood else estimate.loss
    context = step_context(*place, state.num_updates)
    context = context._replace(gradient=gradient, loss=loss, curvature=estimate.curvature, admit=admit)
    return update_if_finite(now.theta_step, state.theta_state, theta, context)


def _resample(now: _Workspace, state: SMCState, weighed: _Weighed) -> tuple[SMCState, Array]:
    """The particles resampled, none where theta' was refused, and how many blocks were."""
    ess = jnp.where(weighed.accepted, weighed.ess, jnp.inf)
    threshold = jnp.where(now.controls["resample"], now.controls["ess_threshold"], -1.0)
    points, log_weights, num_resampled = resample_blocks(
        now.keys_resampling, state.points, state.log_weights, ess, now.blocks, now.parts.scheme, threshold
    )
    return state._replace(points=points, log_weights=log_weights), num_resampled


def _move(now: _Workspace, state: SMCState, weighed: _Weighed) -> tuple[SMCState, Array]:
    """The particles after a move that leaves the target invariant, the adapted step, and the acceptance [B]."""
    kernel, points, step = now.parts.kernel, state.points, now.step
    if kernel.invariant:
        potential = Potential(evaluator_at(now.terms_fn, weighed.theta, points.score is not None), now.blocks)
        move = lambda drawn, point: kernel.move(drawn, point, potential, step)  # noqa: E731
        points, accepted = jax.vmap(move)(now.random_numbers, points)
        observed = acceptance = jnp.sum(jnp.exp(state.log_weights) * accepted, 0)
    else:
        observed = weighed.conditional_ess
        acceptance = (observed >= KEPT_BY_A_MOVE).astype(observed.dtype)
    size = kernel.adapt(step.size, observed, state.num_updates)
    preconditioner = kernel.preconditioning.adapt(step.preconditioner, points.x, state.log_weights, now.blocks)
    return state._replace(points=points, step=Step(size, preconditioner)), acceptance


def _concluded(
    now: _Workspace,
    state: SMCState,
    weighed: _Weighed,
    estimate: Estimate,
    gradient: Array,
    usable: Array,
    num_resampled: Array,
    acceptance: Array,
) -> SMCState:
    """The state in which theta has arrived, and what is announced."""
    refused = (~(weighed.accepted & usable)).astype(jnp.int32)
    num_lost, theta = state.num_lost, now.unravel(weighed.theta)
    state = state._replace(
        theta=theta,
        params=now.target.constrain_params(now.unravel(now.theta_step.estimate(state.theta_state, weighed.theta))),
        step_backoff=next_backoff(state.step_backoff, weighed.accepted, usable),
        num_updates=state.num_updates + 1,
        num_refused=state.num_refused + refused,
        num_lost=jnp.zeros_like(num_lost),
        rng_key=now.next_key,
    )
    diagnostics = diagnose(
        now.parts,
        state,
        estimate,
        gradient,
        ess=weighed.ess,
        step_ess=weighed.conditional_ess,
        acceptance=acceptance,
        num_nonfinite=weighed.num_nonfinite + num_lost,
        num_refused=refused,
        num_resampled=num_resampled,
    )
    return state._replace(diagnostics=diagnostics)


def adopt(target: Target, state: SMCState, fingerprint: Array) -> SMCState:
    """The state under new data, by weights; as it was if they contradict its blocks."""
    target, blocks = added_up(target, state.blocks)
    points = jax.vmap(evaluator(target, state.theta, state.points.score is not None))(state.points.x)
    new = reweight(state.log_weights, incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms))
    wrong = blocks_are_wrong(aside(state.rng_key), target, state.theta, points.x, blocks)
    free = jnp.mean(blocks.sum_free_terms(state.points.terms - points.terms))
    adopted = state._replace(
        points=replace_dead(points, new.log_weights, blocks),
        log_weights=new.log_weights,
        log_evidence_change=state.log_evidence_change + jnp.sum(new.log_mean) + free,
        num_lost=state.num_lost + new.num_nonfinite,
        fingerprint=fingerprint,
    )
    return select(~wrong & ~jnp.any(new.collapsed), adopted, state)._replace(wrong_blocks=wrong)


def loss_on(parts: SMCParts, target: Target, state: SMCState) -> Array:
    """[] the loss in a state under the data of ``target``."""
    state = adopt(target, state, state.fingerprint)
    if parts.objective.is_likelihood:
        return -log_evidence(state)
    target, blocks = added_up(target, state.blocks)
    return estimate_at(parts, target, state.theta, state, blocks, aside(state.rng_key)).loss


def log_evidence(state: SMCState) -> Array:
    """[] the running log evidence."""
    return state.log_evidence_start + state.log_evidence_change


def diagnose(
    parts: SMCParts,
    state: SMCState,
    estimate: Estimate,
    gradient: Array,
    *,
    ess: Array,
    step_ess: Array,
    acceptance: Array,
    **counts: Array,
) -> dict[str, Array]:
    """The diagnostics of an update; ESS as fractions of the particles, over blocks the smallest, the mean, all [B].

    The gradient [P] of a likelihood is among them where theta is not too large, to see whether theta still moves; of
    other objectives the loss, and what else they say.
    """
    ess = ess / state.log_weights.shape[0]
    known = jnp.where(jnp.isfinite(gradient), gradient, 0.0)
    diagnostics = {
        "loss": -log_evidence(state),
        "log_evidence": log_evidence(state),
        "ess": jnp.min(ess),
        "mean_ess": jnp.mean(ess),
        "step_ess": jnp.min(step_ess),
        "acceptance_rate": jnp.mean(acceptance),
        "mean_step_size": jnp.mean(state.step.size),
        "grad_norm": jnp.linalg.norm(known),
        "block_ess": ess,
        "block_step_ess": step_ess,
        "block_acceptance": acceptance,
        **counts,
    }
    if not parts.objective.is_likelihood:
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return diagnostics | estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}
    return diagnostics if gradient.size > budget.LARGEST_INFORMATION else diagnostics | {"gradient": known}
