# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One update of `MomentumParticleMLE`: momentum in the parameters and in the particles.

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
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.algorithms.momentum.gradient import momentum_surroundings
from numpyro_smcopt.algorithms.momentum.particles import CloudState, LatentStep
from numpyro_smcopt.algorithms.momentum.theta import Around, MomentumStep, MotionState
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Point, Potential, Preconditioner
from numpyro_smcopt.kernels.underdamped import Pace, controlled, exponential
from numpyro_smcopt.objectives import Estimate, Objective, Scene
from numpyro_smcopt.population.evaluate import evaluator
from numpyro_smcopt.population.nonfinite import living, replaced, theta_is_possible
from numpyro_smcopt.population.safeguards import next_backoff
from numpyro_smcopt.potential import Target
from numpyro_smcopt.random_numbers import draw_normals, split
from numpyro_smcopt.types import Array, Params, Theta
from numpyro_smcopt.weights import uniform_log_weights


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
        step_backoff: [] factor on the step size of theta: one, or less after theta was refused.
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
    step_backoff: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array


@dataclasses.dataclass(frozen=True)
class Moves:
    """How an update is made.

    Args:
        objective: What is minimised.
        theta: Moves theta.
        latents: Moves the particles.
        simultaneous: Whether particles move under the old theta instead of the new one.
        theta_noise: Whether theta is driven by noise as well.
    """

    objective: Objective
    theta: MomentumStep
    latents: LatentStep
    simultaneous: bool
    theta_noise: bool


def init(
    moves: Moves,
    target: Target,
    theta: Theta,
    points: Point,
    metric: Preconditioner,
    blocks: Blocks,
    key_velocity: Array,
    rng_key: Array,
) -> MomentumState:
    """The state at the start: theta at rest, the particles not.

    Args:
        moves: How updates are made.
        target: The model.
        theta: The first iterate, unconstrained.
        points: [N, ...] the first particles, evaluated there.
        metric: The first metric of the particles.
        blocks: The partition of the latents.
        key_velocity: Randomness of the first velocities.
        rng_key: Randomness of what follows.
    """
    flat, _ = ravel_pytree(theta)
    velocity = random.normal(key_velocity, points.x.shape, flat.dtype)
    nothing, zero = jnp.zeros((), flat.dtype), jnp.zeros((), jnp.int32)
    state = MomentumState(
        theta=theta,
        params=target.constrain_params(theta),
        points=Particles(points.x),
        log_weights=uniform_log_weights(len(points.x), blocks.num_blocks, flat.dtype),
        motion=moves.theta.init(theta),
        cloud=moves.latents.init(velocity, metric, points, blocks),
        blocks=blocks,
        num_updates=zero,
        num_refused=zero,
        step_backoff=jnp.ones((), flat.dtype),
        wrong_blocks=jnp.asarray(False),
        fingerprint=jnp.zeros((), jnp.uint32),
        diagnostics={},
        mutable_state={},
        rng_key=rng_key,
    )
    _, estimate, _ = _look(moves, target, state, flat)
    own = dict.fromkeys(("damping", "stability", "latent_bias", "latent_stability", "grad_norm"), nothing)
    own |= {"acceptance_rate": nothing + 1, "num_nonfinite": zero, "num_refused": zero}
    return state._replace(diagnostics=_diagnosed(state.motion, own | _said(moves, points.terms, estimate)))


def update(moves: Moves, target: Target, state: MomentumState, controls: dict[str, Array]) -> MomentumState:
    """The next state, in the order of the equations at the head of this file."""
    flat, unravel = ravel_pytree(state.theta)
    going, latents_going = _paces(moves, state, controls)
    key_next, key_theta, key_latents = split(state.rng_key, 3)

    # Gradient, ahead of theta
    ahead = flat + going.integrator.lookahead * state.motion.velocity
    terms, estimate, around = _look(moves, target, state, ahead)

    # Theta; it stays where its gradient is not finite
    noise = _theta_noise(key_theta, flat, len(state.points.x)) if moves.theta_noise else None
    following, motion = moves.theta.update(state.motion, going, state.theta, around, noise)
    usable = jnp.all(jnp.isfinite(around.gradient)) & jnp.all(jnp.isfinite(following))
    following = jnp.where(usable, following, flat)

    # Particles; those that are lost take the place of others
    place, before = unravel(flat if moves.simultaneous else following), state.points.x
    normals = _latent_noise(key_latents, moves, state)
    potential = Potential(evaluator(target, place), state.blocks)
    moved = moves.latents.move(normals, before, state.cloud, latents_going, potential)
    alive = living(state.blocks, terms, moved)
    moved = replaced(state.blocks, alive, before, moved)

    # Back, where hardly anything lives; then from rest, and with shorter steps
    possible = theta_is_possible(state.blocks, alive, moved.terms)
    sound = usable & possible
    following = jnp.where(sound, following, flat)
    stay = state.motion._replace(velocity=jnp.zeros_like(flat))
    motion = jax.tree.map(lambda new, old: jnp.where(sound, new, old), motion, stay)

    # What follows
    cloud, x = moves.latents.update(state.cloud, latents_going, before, moved, state.blocks, state.num_updates)
    refused = (~sound).astype(jnp.int32)
    own = moves.theta.diagnose(motion, going) | moves.latents.diagnose(cloud, latents_going)
    own |= {
        "acceptance_rate": jnp.mean(moved.acceptance),
        "grad_norm": jnp.linalg.norm(jnp.where(jnp.isfinite(around.gradient), around.gradient, 0.0)),
        "num_nonfinite": jnp.sum(~alive).astype(jnp.int32),
        "num_refused": refused,
    }
    return state._replace(
        theta=unravel(following),
        params=target.constrain_params(unravel(moves.theta.estimate(motion))),
        points=Particles(x),
        motion=motion,
        cloud=cloud,
        num_updates=state.num_updates + 1,
        num_refused=state.num_refused + refused,
        step_backoff=next_backoff(state.step_backoff, possible, usable),
        rng_key=key_next,
        diagnostics=_diagnosed(motion, own | _said(moves, terms, estimate)),
    )


def loss(moves: Moves, target: Target, state: MomentumState) -> Array:
    """[] the loss in a state; for the marginal likelihood, which is not known, the mean energy of the particles."""
    terms, estimate, _ = _look(moves, target, state, ravel_pytree(state.theta)[0])
    return _said(moves, terms, estimate)["loss"]


def _paces(moves: Moves, state: MomentumState, controls: dict[str, Array]) -> tuple[Pace, Pace]:
    """The paces of theta and of the particles, under the control of handlers."""
    step_size = state.step_backoff * controls["step_size"]
    going = controlled(moves.theta.scheme, state.motion.pace, step_size, controls["momentum"])
    latent_numbers = controls["latent_step_size"], controls["latent_momentum"]
    return going, controlled(exponential, state.cloud.pace, *latent_numbers)


def _theta_noise(rng_key: Array, flat: Array, num_particles: int) -> Array:
    """[2, P] normal numbers with the variance of one particle's share."""
    return random.normal(rng_key, (2, flat.size), flat.dtype) / math.sqrt(num_particles)


def _latent_noise(rng_key: Array, moves: Moves, state: MomentumState) -> Array:
    """[N, R] normal numbers, as many of every particle as the kernel needs."""
    num_particles, num_latents = state.points.x.shape
    num = moves.latents.kernel.num_normals(num_latents, state.blocks.num_blocks)
    return draw_normals(rng_key, (num_particles, num), state.step_backoff.dtype)


def _look(moves: Moves, target: Target, state: MomentumState, theta: Array) -> tuple[Array, Estimate, Around]:
    """Energy terms [N, K] at a flat theta, what the objective says there, and what the step may ask."""
    _, unravel = ravel_pytree(state.theta)
    scene = Scene(target, unravel(theta), target.attached, random.fold_in(state.rng_key, 2))
    cloud = state.points.x, state.log_weights, state.blocks
    return momentum_surroundings(moves.objective, scene, *cloud, state.num_updates)


def _said(moves: Moves, terms: Array, estimate: Estimate) -> dict[str, Array]:
    """The loss, and what else the objective says."""
    if moves.objective.is_likelihood:
        finite = jnp.all(jnp.isfinite(terms), 1)
        total = jnp.sum(jnp.where(finite, jnp.sum(terms, 1), 0.0))
        return {"loss": total / jnp.maximum(jnp.sum(finite), 1)}
    masked = jnp.asarray(estimate.num_masked, jnp.int32)
    return estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}


def _diagnosed(motion: MotionState, own: dict[str, Array]) -> dict[str, Array]:
    """Scalars of an update; the weights being equal, the effective sample size is all of the particles."""
    one = jnp.ones_like(own["grad_norm"])
    return {
        "ess": one,
        "mean_ess": one,
        "num_resampled": jnp.zeros((), jnp.int32),
        "num_restarts": motion.num_restarts,
        **own,
    }
