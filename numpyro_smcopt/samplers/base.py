# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What a sampler is to `ImplicitDiffusion`: samples that depend on theta, and the gradient of a loss through them.

There are two kinds. `Chains` never end: Markov chains whose law is ``pi_theta`` in the long run, moved a little at
every update. `EulerMaruyama` ends: a diffusion from noise to samples in finitely many steps, differentiated along its
path.
"""

import abc
from typing import Any, NamedTuple

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.objectives import Objective
from numpyro_smcopt.population.start import Start
from numpyro_smcopt.potential import Target
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.types import Array, Theta


class Begun(NamedTuple):
    """A sampler at its start.

    Attributes:
        theta: Where theta starts; a warm start may have moved it.
        particles: The sampler's state, a pytree of arrays.
        blocks: The partition of the latents.
    """

    theta: Theta
    particles: Any
    blocks: Blocks


class Assessed(NamedTuple):
    """What an objective says of the samples.

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
    """Where the samples of `ImplicitDiffusion` come from.

    Attributes:
        has_energy: Whether the model is an energy (latent sites and factors), or else returns a drift.
    """

    has_energy: bool

    @abc.abstractmethod
    def check(self, target: Target, theta: Theta, objective: Objective) -> None:
        """Refuse a model or an objective that does not go with this sampler; nothing is computed.

        Raises:
            ValueError: The message names the argument.
        """

    @abc.abstractmethod
    def begin(self, rng_key: Array, start: Start, objective: Objective, num_particles: int | None, warm: bool) -> Begun:
        """The first samples; eager, compiles programs through ``start``.

        Args:
            rng_key: Randomness.
            start: The model and theta.
            objective: What is minimised.
            num_particles: N; None is for the sampler to choose.
            warm: Whether theta may be moved to a better start.
        """

    @abc.abstractmethod
    def theta_step(self, target: Target, theta: Theta, particles: Any, objective: Objective) -> ThetaStep:
        """The default theta step."""

    @abc.abstractmethod
    def step_context(
        self, target: Target, theta: Theta, particles: Any, blocks: Blocks, num_updates: Array
    ) -> StepContext:
        """What a theta step may ask at ``theta``; gradient, loss and curvature are filled in by the caller."""

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

    @abc.abstractmethod
    def adopt(
        self, rng_key: Array, target: Target, theta: Theta, particles: Any, blocks: Blocks
    ) -> tuple[Any, Array | bool]:
        """The samples under the data of ``target``, and whether these contradict the partition."""

    @abc.abstractmethod
    def controls(self, particles: Any) -> dict[str, Array]:
        """What handlers may replace, by site name."""

    @abc.abstractmethod
    def draw(
        self, rng_key: Array, target: Target, theta: Theta, particles: Any, blocks: Blocks, num: int
    ) -> dict[str, Array]:
        """``num`` samples, ``{site: [num, ...]}``."""

    @abc.abstractmethod
    def size(self, particles: Any) -> int:
        """N."""
