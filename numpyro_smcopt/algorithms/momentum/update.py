# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One update of `MomentumParticleMLE`: momentum in the parameters and in the particles.

Continuous time, with inverse masses eta and frictions gamma of both blocks:

    d theta = eta_t m dt       d m   = -gamma_t eta_t m dt - (1/N) sum_j grad_theta U_theta(x_j) dt
    d x_j   = eta_x u_j dt     d u_j = -gamma_x eta_x u_j dt - grad_x U_theta(x_j) dt + sqrt(2 gamma_x) dW_j

One update, by exponential integrators (see `kernels.integrators`; v and p_j are m and u_j in units of mass one):

    ahead  = theta + a v,      g = (1/N) sum_j grad_theta U_ahead(x_j)          gradient correction
    theta' = ahead - b g,      v' = mu v - a g
    x_j'   = x_j + a p_j - b grad_x U_theta'(x_j) + noise,      p_j' = mu p_j - a grad_x U_theta'(x_j) + noise

The particles approximate the posterior at theta; they are not weighted, and not corrected unless the kernel says so.

Source: Lim, Kuntz, Power and Johansen, "Momentum Particle Maximum Likelihood", ICML 2024, arXiv 2312.07335.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.algorithms.momentum.gradient import momentum_context
from numpyro_smcopt.algorithms.momentum.particles import CloudState, LatentStep
from numpyro_smcopt.algorithms.momentum.theta import MomentumStep, MotionState
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Point, Potential, Preconditioner
from numpyro_smcopt.kernels.integrators import Integrator, controlled, exponential
from numpyro_smcopt.objectives import Estimate, Objective, Scene
from numpyro_smcopt.population.evaluate import evaluator
from numpyro_smcopt.population.nonfinite import living, replaced, theta_is_possible
from numpyro_smcopt.population.safeguards import is_finite, next_backoff
from numpyro_smcopt.potential import Target
from numpyro_smcopt.random_numbers import split
from numpyro_smcopt.theta_step import StepContext
from numpyro_smcopt.types import Array, Params, Theta
from numpyro_smcopt.weights import uniform_log_weights


class Particles(NamedTuple):
    """The particles at one theta.

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


def keys_of(state: MomentumState) -> Array:
    """[4] keys: of the next state, of theta, of the particles, and of the objective."""
    return split(state.rng_key, 4)


@dataclasses.dataclass(frozen=True)
class MomentumUpdate:
    """One update, in the order of the equations at the head of this file.

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

    def step(self, target: Target, state: MomentumState, controls: dict[str, Array]) -> MomentumState:
        """The next state."""
        flat, unravel = ravel_pytree(state.theta)
        x, blocks = state.points.x, state.blocks
        pace, latent_pace = self._paces(state, controls)
        key_next, key_theta, key_latents, key_objective = keys_of(state)

        # Gradient, ahead of theta
        ahead = flat + pace.lookahead * state.motion.velocity
        terms, estimate, context = self._look(target, state, ahead, key_objective)

        # Theta; it stays where its gradient or its end is not finite
        noise = random.normal(key_theta, (2, flat.size), flat.dtype) if self.theta_noise else None
        proposed, motion = self.theta.update(state.motion, pace, state.theta, context, len(x), noise)
        usable, inside = jnp.all(jnp.isfinite(context.gradient)), is_finite(target, unravel(proposed))
        proposed = jnp.where(usable & inside, proposed, flat)

        # Particles; those that are lost take the place of others
        potential = Potential(evaluator(target, unravel(flat if self.simultaneous else proposed)), blocks)
        moved = self.latents.move(key_latents, x, state.cloud, latent_pace, potential)
        alive = living(blocks, terms, moved)
        moved = replaced(blocks, alive, x, moved)

        # Back, where hardly anything lives; then from rest, and with shorter steps
        possible = theta_is_possible(blocks, alive, moved.terms) & (inside | ~usable)
        sound = usable & possible
        at_rest = state.motion._replace(velocity=jnp.zeros_like(flat))
        theta = unravel(jnp.where(sound, proposed, flat))
        motion = jax.tree.map(lambda new, old: jnp.where(sound, new, old), motion, at_rest)

        # Pace and metric of the particles
        cloud, x = self.latents.update(state.cloud, latent_pace, x, moved, blocks, state.num_updates)

        refused = (~sound).astype(jnp.int32)
        diagnostics = self._said(terms, estimate) | {
            **self.theta.diagnose(motion, pace),
            **self.latents.diagnose(cloud, latent_pace),
            "acceptance_rate": jnp.mean(moved.acceptance),
            "grad_norm": jnp.linalg.norm(jnp.where(jnp.isfinite(context.gradient), context.gradient, 0.0)),
            "num_nonfinite": jnp.sum(~alive).astype(jnp.int32),
            "num_refused": refused,
        }
        return state._replace(
            theta=theta,
            params=target.constrain_params(unravel(motion.average)),
            points=Particles(x),
            motion=motion,
            cloud=cloud,
            num_updates=state.num_updates + 1,
            num_refused=state.num_refused + refused,
            step_backoff=next_backoff(state.step_backoff, possible, usable),
            rng_key=key_next,
            diagnostics=diagnostics,
        )

    def first(
        self, target: Target, rng_key: Array, theta: Theta, points: Point, metric: Preconditioner, blocks: Blocks
    ) -> MomentumState:
        """The state at the start: theta at rest, the particles, whose points [N, ...] are evaluated there, not."""
        flat, _ = ravel_pytree(theta)
        key_state, key_velocity = random.split(rng_key)
        velocity = random.normal(key_velocity, points.x.shape, flat.dtype)
        nothing, zero = jnp.zeros((), flat.dtype), jnp.zeros((), jnp.int32)
        state = MomentumState(
            theta=theta,
            params=target.constrain_params(theta),
            points=Particles(points.x),
            log_weights=uniform_log_weights(len(points.x), blocks.num_blocks, flat.dtype),
            motion=self.theta.init(theta),
            cloud=self.latents.init(velocity, metric, points, blocks),
            blocks=blocks,
            num_updates=zero,
            num_refused=zero,
            step_backoff=jnp.ones((), flat.dtype),
            wrong_blocks=jnp.asarray(False),
            fingerprint=jnp.zeros((), jnp.uint32),
            diagnostics={},
            mutable_state={},
            rng_key=key_state,
        )
        none = dict.fromkeys(("damping", "stability", "latent_bias", "latent_stability", "grad_norm"), nothing)
        none |= {"acceptance_rate": nothing + 1, "num_nonfinite": zero, "num_refused": zero, "num_restarts": zero}
        return state._replace(diagnostics=self._seen(target, state) | none)

    def loss(self, target: Target, state: MomentumState) -> Array:
        """[] the loss in a state; for the marginal likelihood, which is not known, the mean energy of the particles."""
        return self._seen(target, state)["loss"]

    def _paces(self, state: MomentumState, controls: dict[str, Array]) -> tuple[Integrator, Integrator]:
        """The numbers of theta and of the particles, under the control of handlers."""
        step_size = state.step_backoff * controls["step_size"]
        pace = controlled(self.theta.scheme, state.motion.pace, step_size, controls["momentum"])
        numbers = controls["latent_step_size"], controls["latent_momentum"]
        return pace, controlled(exponential, state.cloud.pace, *numbers)

    def _seen(self, target: Target, state: MomentumState) -> dict[str, Array]:
        """`_said`, of a state."""
        terms, estimate, _ = self._look(target, state, ravel_pytree(state.theta)[0], keys_of(state)[3])
        return self._said(terms, estimate)

    def _look(
        self, target: Target, state: MomentumState, theta: Array, rng_key: Array
    ) -> tuple[Array, Estimate, StepContext]:
        """Energy terms [N, K] at a flat theta, what the objective says there, and what the step may ask."""
        _, unravel = ravel_pytree(state.theta)
        scene = Scene(target, unravel(theta), target.attached, rng_key)
        cloud = state.points.x, state.log_weights, state.blocks
        return momentum_context(self.objective, scene, *cloud, state.num_updates)

    def _said(self, terms: Array, estimate: Estimate) -> dict[str, Array]:
        """The loss and what else the objective says; weights being equal, all of the particles are effective."""
        one = jnp.ones((), terms.dtype)
        equal = {"ess": one, "mean_ess": one, "num_resampled": jnp.zeros((), jnp.int32)}
        if self.objective.is_likelihood:
            finite = jnp.all(jnp.isfinite(terms), 1)
            total = jnp.sum(jnp.where(finite, jnp.sum(terms, 1), 0.0))
            return equal | {"loss": total / jnp.maximum(jnp.sum(finite), 1)}
        masked = jnp.asarray(estimate.num_masked, jnp.int32)
        return equal | estimate.diagnostics | {"loss": estimate.loss, "num_masked": masked}
