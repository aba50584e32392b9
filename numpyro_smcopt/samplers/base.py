# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The interface of samplers: samples that depend on theta, and the gradient of a loss through them.

There are two kinds. `Chains` never end: Markov chains whose law is ``pi_theta`` in the long run, moved a little at
every update. `EulerMaruyama` ends: a diffusion from noise to samples in finitely many steps, differentiated along its
path.
"""

import abc
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.blocks import Blocks, make_blocks
from numpyro_smcopt.objectives import Objective
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import Target
from numpyro_smcopt.theta_step import StepContext, ThetaStep, as_theta_step
from numpyro_smcopt.types import Array, Theta


class Assessed(NamedTuple):
    """Loss and gradient that an objective estimates from the samples.

    Attributes:
        gradient: [P] of the loss.
        loss: [].
        curvature: [] of the loss, see `objectives.Estimate`.
        diagnostics: Further scalars.
        num_masked: [] samples that were left out because the objective was not finite there.
    """

    gradient: Array
    loss: Array
    curvature: Array
    diagnostics: dict[str, Array]
    num_masked: Array


class Sampler(abc.ABC):
    """The source of the samples of `ImplicitDiffusion`.

    Attributes:
        has_energy: Whether the model is an energy (latent sites and factors), or else returns a drift.
    """

    has_energy: bool

    def check(self, target: Target, theta: Theta, objective: Objective) -> None:
        """Refuse a model or an objective that does not go with this sampler; nothing is computed.

        Raises:
            ValueError: The message names the argument.
        """
        del target, theta, objective

    def find_blocks(self, rng_key: Array, bound: BoundTarget, theta: Theta, objective: Objective) -> Blocks:
        """The partition of the latents, of which there are none by default; on the host."""
        del rng_key, bound, theta, objective
        return make_blocks(np.zeros(0, int), np.zeros(0, int), 1)

    @abc.abstractmethod
    def first_particles(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        blocks: Blocks,
        mode: Array,
        objective: Objective,
        num_particles: int | None,
    ) -> tuple[Any, Tempered | None]:
        """The sampler's first state, a pytree of arrays, and the particles as they were drawn, if there is an energy.

        Args:
            rng_key: Randomness.
            target: The model.
            theta: Where theta starts.
            blocks: The partition of the latents.
            mode: [D] a likely place of the latents, or zero.
            objective: What is minimised.
            num_particles: N; None is for the sampler to choose.
        """

    def theta_step(self, target: Target, theta: Theta, particles: Any, objective: Objective) -> ThetaStep:
        """The default theta step: without an energy there is no information, hence Adam(1e-3)."""
        del target, theta, particles, objective
        return as_theta_step(optax.adam(1e-3))

    def step_context(
        self, target: Target, theta: Theta, particles: Any, blocks: Blocks, num_updates: Array
    ) -> StepContext:
        """The context of a step from ``theta``; gradient, loss and curvature are filled in by the caller."""
        del target, particles, blocks, num_updates
        flat, _ = ravel_pytree(theta)
        return StepContext(jnp.zeros_like(flat), jnp.zeros((), flat.dtype))

    @abc.abstractmethod
    def advance(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        particles: Any,
        blocks: Blocks,
        num_updates: Array,
        objective: Objective,
        controls: dict[str, Array],
    ) -> tuple[Any, dict[str, Array]]:
        """Let the samples follow ``theta``, which has just moved; the new state and diagnostics."""

    @abc.abstractmethod
    def assess(
        self, rng_key: Array, target: Target, theta: Theta, particles: Any, blocks: Blocks, objective: Objective
    ) -> Assessed:
        """Loss and gradient at ``theta``."""

    def adopt(
        self, rng_key: Array, target: Target, theta: Theta, particles: Any, blocks: Blocks
    ) -> tuple[Any, Array | bool]:
        """The samples under the data of ``target``, and whether these contradict the partition."""
        del rng_key, target, theta, blocks
        return particles, False

    def controls(self, particles: Any) -> dict[str, Array]:
        """Values that handlers may replace, by site name."""
        del particles
        return {}

    @abc.abstractmethod
    def draw(
        self, rng_key: Array, target: Target, theta: Theta, particles: Any, blocks: Blocks, num: int
    ) -> dict[str, Array]:
        """``num`` samples, ``{site: [num, ...]}``."""

    @abc.abstractmethod
    def size(self, particles: Any) -> int:
        """N."""
