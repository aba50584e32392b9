# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Diffusions in finite time by diffrax: solvers of higher order, adaptive steps, reversible and other adjoints.

    dY = b_theta(t, Y) dt + sigma(t) dW,      KL(path) = E int |b_theta - b_ref|^2 / (2 sigma^2) dt

The divergence is integrated beside the samples. Needs diffrax (``pip install numpyro_smcopt[diffrax]``), so it is
imported by its own name: ``from numpyro_smcopt.samplers.diffrax_sampler import DiffraxSampler``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import diffrax
import jax
import jax.numpy as jnp
import lineax
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.potential import Target
from numpyro_smcopt.samplers.base import Assessed, Sampler
from numpyro_smcopt.samplers.drifts import (
    DEFAULT_PARTICLES,
    check_drift,
    check_initial,
    draw_initial,
    drift_of,
    rate,
    reference_of,
)
from numpyro_smcopt.types import Array, Theta

STEPS = 100  # by default
FINEST = 2.0**-20  # of the time: how finely adaptive steps may look at the Brownian motion


class Seeds(NamedTuple):
    """State of `DiffraxSampler`: the paths are known by their keys.

    Attributes:
        keys: [N].
    """

    keys: Array


@dataclasses.dataclass(frozen=True, eq=False)
class DiffraxSampler(Sampler):
    """Samples at the end of a stochastic differential equation, solved by diffrax.

    Every update solves it anew for all particles and differentiates through the solver. Model, objective and sites are
    those of `EulerMaruyama`.

    Args:
        t0: Where time begins.
        t1: Where time ends.
        initial: The law of ``Y_0``: a NumPyro distribution of one particle, or a function ``rng_key -> y``.
        noise_scale: ``sigma``: a positive number, or a function of time.
        solver: A diffrax solver for additive noise; by default `diffrax.SRA1`, of strong order 3/2.
        dt0: The first step; by default a hundredth of the time. `diffrax.StepTo` knows its steps and takes none.
        stepsize_controller: Adaptive or constant steps.
        adjoint: How diffrax differentiates; by default with checkpoints.
        max_steps: The most steps of a path.

    Raises:
        TypeError: If ``initial`` draws nothing.
        ValueError: If time does not run forwards, or a step is given that cannot be used.
    """

    t0: float
    t1: float
    initial: Any
    noise_scale: float | Callable[[Array], Array] = 2**0.5
    solver: diffrax.AbstractSolver = diffrax.SRA1()
    dt0: float | None = None
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.ConstantStepSize()
    adjoint: diffrax.AbstractAdjoint = diffrax.RecursiveCheckpointAdjoint()
    max_steps: int = 4096
    has_energy = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not self.t0 < self.t1:
            raise ValueError(f"t0 must come before t1, got t0={self.t0!r} and t1={self.t1!r}.")
        if self.dt0 is not None and not self.dt0 > 0:
            raise ValueError(f"dt0 must be positive, got {self.dt0!r}.")
        if self.dt0 is not None and isinstance(self.stepsize_controller, diffrax.StepTo):
            raise ValueError(f"dt0 is {self.dt0!r}, but stepsize_controller=StepTo(ts) knows its steps: leave dt0 out.")
        if not callable(self.noise_scale) and not self.noise_scale > 0:
            raise ValueError(f"noise_scale must be positive or a function of time, got {self.noise_scale!r}.")
        check_initial(self.initial)

    def check(self, target: Target, theta: Theta, objective: Any) -> None:
        """See `Sampler.check`."""
        check_drift(target, theta, objective, self.initial, "DiffraxSampler")

    def first_particles(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        blocks: Blocks,
        mode: Array,
        objective: Any,
        num_particles: int | None,
    ) -> tuple[Seeds, None]:
        """See `Sampler.first_particles`."""
        del target, theta, blocks, mode, objective
        return Seeds(random.split(rng_key, num_particles or DEFAULT_PARTICLES)), None

    def advance(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        particles: Seeds,
        blocks: Blocks,
        num_updates: Array,
        objective: Any,
        controls: dict[str, Array],
    ) -> tuple[Seeds, dict[str, Array]]:
        """See `Sampler.advance`."""
        del target, theta, blocks, num_updates, objective, controls
        return Seeds(random.split(rng_key, particles.keys.shape[0])), {}

    def assess(
        self, rng_key: Array, target: Target, theta: Theta, particles: Seeds, blocks: Blocks, objective: Any
    ) -> Assessed:
        """See `Sampler.assess`."""
        del rng_key, blocks
        drift, reference = drift_of(target), reference_of(target, objective)

        def loss(theta: Theta) -> tuple[Array, tuple[dict[str, Array], Array]]:
            y, cost = jax.vmap(lambda key: self._solve(drift, reference, theta, key))(particles.keys)
            rated, kl = rate(objective, y), jnp.mean(cost)
            diagnostics = {"reward": rated.mean} | ({} if reference is None else {"path_kl": kl})
            return objective.kl_weight * kl - rated.mean, (diagnostics, rated.num_masked)

        (value, (diagnostics, num_masked)), gradient = jax.value_and_grad(loss, has_aux=True)(theta)
        return Assessed(ravel_pytree(gradient)[0], value, jnp.ones_like(value), diagnostics, num_masked)

    def draw(
        self, rng_key: Array, target: Target, theta: Theta, particles: Seeds, blocks: Blocks, num: int
    ) -> dict[str, Array]:
        """See `Sampler.draw`."""
        del particles, blocks
        drift = drift_of(target)
        solve = lambda key: self._solve(drift, None, theta, key)[0]  # noqa: E731
        return {"y": jax.vmap(solve)(random.split(rng_key, num))}

    def size(self, particles: Seeds) -> int:
        """See `Sampler.size`."""
        return particles.keys.shape[0]

    def _solve(
        self,
        drift: Callable[[Theta, Array, Array], Array],
        reference: Callable[[Array, Array], Array] | None,
        theta: Theta,
        rng_key: Array,
    ) -> tuple[Array, Array]:
        """One particle at the end, and its share of the divergence."""
        key_start, key_noise = random.split(rng_key)
        y = draw_initial(self.initial, key_start)
        scale = self.noise_scale if callable(self.noise_scale) else lambda t: jnp.asarray(self.noise_scale, y.dtype)
        first, resolution = self._steps()

        def moved(t: Any, state: tuple[Array, Array], theta: Theta) -> tuple[Array, Array]:
            velocity = drift(theta, t, state[0])
            if reference is None:
                return velocity, jnp.zeros((), y.dtype)
            gap = velocity - reference(t, state[0])
            return velocity, jnp.sum(gap**2) / (2 * scale(t) ** 2)

        def spread(t: Any, state: tuple[Array, Array], theta: Theta) -> lineax.DiagonalLinearOperator:
            return lineax.DiagonalLinearOperator((jnp.full_like(y, scale(t)), jnp.zeros((), y.dtype)))

        shape = (jax.ShapeDtypeStruct(y.shape, y.dtype), jax.ShapeDtypeStruct((), y.dtype))
        needs = getattr(self.solver, "minimal_levy_area", diffrax.BrownianIncrement)
        areas = (diffrax.BrownianIncrement, diffrax.SpaceTimeLevyArea, diffrax.SpaceTimeTimeLevyArea)
        levy_area = next(area for area in areas if issubclass(area, needs))
        brownian = diffrax.VirtualBrownianTree(self.t0, self.t1, resolution, shape, key_noise, levy_area)
        solution = diffrax.diffeqsolve(
            diffrax.MultiTerm(diffrax.ODETerm(moved), diffrax.ControlTerm(spread, brownian)),
            self.solver,
            self.t0,
            self.t1,
            first,
            (y, jnp.zeros((), y.dtype)),
            theta,
            stepsize_controller=self.stepsize_controller,
            adjoint=self.adjoint,
            max_steps=self.max_steps,
        )
        end, cost = solution.ys
        return end[-1], cost[-1]

    def _steps(self) -> tuple[float | None, Any]:
        """The first step, and how finely the Brownian motion is known: more finely than any step."""
        if isinstance(self.stepsize_controller, diffrax.StepTo):
            return None, jnp.min(jnp.diff(self.stepsize_controller.ts)) / 2
        first = (self.t1 - self.t0) / STEPS if self.dt0 is None else self.dt0
        constant = isinstance(self.stepsize_controller, diffrax.ConstantStepSize)
        return first, first / 2 if constant else min(first / 2, FINEST * (self.t1 - self.t0))
