# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`ImplicitDiffusion`: one loop that tunes a sampler while it samples.

One update of ``theta_k`` and the samples ``X_k``, whose law follows that of theta:

    theta' = step(theta_k, g_k)                    g_k = estimate of grad F(theta_k) from X_k
    X'     = a little of the sampler at theta'     (or driven by the gradient at theta_k, see `samplers.Chains`)
    g'     = estimate of grad F(theta') from X'

With Markov chains (`samplers.Chains`) the estimate is a covariance or a mean over the particles, see `objectives`; with
a diffusion of finitely many steps (`samplers.EulerMaruyama`) it is the adjoint along the path. The particles have no
weights, so they lag behind theta, the less the slower theta is, and with them lags what is known of ``log Z_theta``,
which enters the loss of every divergence. Where modes are far apart the particles may never follow. `SMCOptimizer`
removes the lag by weights.

Source: Marion et al., "Implicit Diffusion: Efficient Optimization through Stochastic Sampling", AISTATS 2025, arXiv
2402.05468, algorithms 2 and 3.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import faults
from numpyro_smcopt.algorithms.base import ParticleAlgorithm
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.kernels import Kernel, Point
from numpyro_smcopt.objectives import MarginalLikelihood, Objective, as_objective
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.safeguards import is_finite, next_backoff, select
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.population.warm_start import warm_start
from numpyro_smcopt.potential import Target
from numpyro_smcopt.random_numbers import aside, split
from numpyro_smcopt.results import Status
from numpyro_smcopt.samplers import Assessed, Sampler, as_sampler
from numpyro_smcopt.theta_step import as_theta_step
from numpyro_smcopt.types import Array, Model, Params, Theta, whole_or_none

LARGEST_LOSS = 0.25  # share of the particles that may meet a potential that is not finite


class ImplicitDiffusionState(NamedTuple):
    """State of `ImplicitDiffusion`: what the next update needs, and the last diagnostics.

    Attributes:
        theta: The iterate, unconstrained.
        params: The estimate, constrained: the iterate, or for the default step an average of iterates.
        particles: State of the sampler.
        assessed: Loss and gradient at ``theta``; the gradient is zero where it was not finite.
        usable: [] bool, whether it was; else theta stays in the next update.
        step_backoff: [] factor on the steps of theta: one, or less after a gradient that was not finite.
        theta_state: State of the theta step.
        blocks: The partition of the latents.
        num_updates: [] updates so far.
        num_refused: [] updates whose theta or gradient was not finite.
        wrong_blocks: [] bool, whether the data contradict the partition; never the case in one block.
        fingerprint: [] of the data.
        diagnostics: Scalars of the last update.
        mutable_state: State of handlers.
        rng_key: Randomness of what follows.
    """

    theta: Theta
    params: Params
    particles: Any
    assessed: Assessed
    usable: Array
    step_backoff: Array
    theta_state: Any
    blocks: Blocks
    num_updates: Array
    num_refused: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array

    @property
    def points(self) -> Point:
        """[N, ...] the particles of a model with an energy."""
        return self.particles.points

    @property
    def log_weights(self) -> Array:
        """[N, B] their log weights, which are equal."""
        return self.particles.log_weights


class ImplicitDiffusion(ParticleAlgorithm[ImplicitDiffusionState]):
    """Minimise a loss of the samples of a sampler, in a single loop of sampling and optimisation.

    Args:
        model: A callable with NumPyro primitives and `numpyro.param` sites. For `samplers.Chains` it is an energy:
            latent `numpyro.sample` sites and `numpyro.factor` sites; for `samplers.EulerMaruyama` it returns the drift.
        optim: An optax, `numpyro.optim` or `jax.example_libraries` optimiser, or a `theta_step.ThetaStep` such as
            ``GradientFlow(ratio)``, which sets the ratio of the time scales of theta and the particles. The default has
            no learning rate.
        objective: What is minimised: an object from `objectives`, or a function of one sample whose expectation is. By
            default `MarginalLikelihood`, which makes this particle gradient descent.
        sampler: Where samples come from: an object from `samplers`, or a kernel for `samplers.Chains`; by default
            ``Chains()``.
        num_particles: N; by default up to 1024, fewer for larger models.
        handlers: NumPyro handlers that see the ``smcopt/...`` sites of every update.
        **static_kwargs: Keyword arguments of the model that stay fixed.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smcopt import ImplicitDiffusion
        >>> from numpyro_smcopt.objectives import Reward, ReverseKL
        >>> def model():
        ...     mean = numpyro.param("mean", 0.0)
        ...     numpyro.sample("x", dist.Normal(mean, 1.0))
        >>> reward = Reward(lambda sample: sample["x"], kl_weight=0.5, kl=ReverseKL(reference_params={"mean": 0.0}))
        >>> result = ImplicitDiffusion(model, objective=reward).run(random.key(0), 300, progress_bar=False)
        >>> bool(abs(result.params["mean"] - 2.0) < 0.2)  # maximises mean - 0.5 * mean**2 / 2
        True

    Reference:
        Marion, Korba, Bartlett, Blondel, De Bortoli, Doucet, Llinares-Lopez, Paquette and Berthet, "Implicit Diffusion:
        Efficient Optimization through Stochastic Sampling", AISTATS 2025.
    """

    def __init__(
        self,
        model: Model,
        optim: Any = None,
        objective: Objective | None = None,
        *,
        sampler: Sampler | Kernel | None = None,
        num_particles: int | None = None,
        handlers: Sequence[Any] = (),
        **static_kwargs: Any,
    ) -> None:
        super().__init__(model, handlers, static_kwargs)
        self.optim = None if optim is None else as_theta_step(optim)
        self.objective = (
            MarginalLikelihood(control_variates=optim is None) if objective is None else as_objective(objective)
        )
        self.sampler = as_sampler(sampler)
        self.num_particles = whole_or_none("num_particles", num_particles)

    state_type = ImplicitDiffusionState

    # -- start --------------------------------------------------------------------------------------------------------
    def check(self, target: Target, theta: Theta) -> None:
        """See `Algorithm.check`."""
        if self.sampler.has_energy or not target.sites.params:
            super().check(target, theta)
        self.sampler.check(target, theta, self.objective)

    def find_blocks(self, rng_key: Array, bound: BoundTarget, theta: Theta) -> Blocks:
        """See `Algorithm.find_blocks`."""
        return self.sampler.find_blocks(rng_key, bound, theta, self.objective)

    def warm_start(self, bound: BoundTarget, theta: Theta, blocks: Blocks) -> tuple[Theta, Any] | None:
        """See `Algorithm.warm_start`."""
        wanted = self.optim is None and self.maximises_likelihood and self.sampler.has_energy
        return warm_start(bound, theta, blocks) if wanted else None

    def first_state(
        self, target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array
    ) -> tuple[ImplicitDiffusionState, Tempered | None]:
        """See `Algorithm.first_state`."""
        key_sampler, key_assess, key_state = random.split(rng_key, 3)
        place = target, theta, blocks, mode
        particles, cloud = self.sampler.first_particles(key_sampler, *place, self.objective, self.num_particles)
        zero = jnp.zeros((), jnp.int32)
        assessed = self.sampler.assess(key_assess, target, theta, particles, blocks, self.objective)
        flat, _ = ravel_pytree(theta)
        # A dry advance tells what diagnostics there will be; its values count as those of the start.
        idle = self.sampler.controls(particles)
        _, shapes = jax.eval_shape(
            lambda: self.sampler.advance(key_state, target, theta, particles, blocks, zero, self.objective, idle)
        )
        diagnostics = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)
        state = ImplicitDiffusionState(
            theta=theta,
            params=target.constrain_params(theta),
            particles=particles,
            assessed=_finite_or(assessed, assessed),
            usable=_is_finite(assessed),
            step_backoff=jnp.ones((), flat.dtype),
            theta_state=self._theta_step(target, theta, particles).init(flat),
            blocks=blocks,
            num_updates=zero,
            num_refused=zero,
            wrong_blocks=jnp.asarray(False),
            fingerprint=jnp.zeros((), jnp.uint32),
            diagnostics=diagnostics | _diagnostics(_finite_or(assessed, assessed), zero),
            mutable_state={},
            rng_key=key_state,
        )
        return state, cloud

    # -- update -------------------------------------------------------------------------------------------------------
    def step(self, target: Target, state: ImplicitDiffusionState, controls: dict[str, Array]) -> ImplicitDiffusionState:
        """See the head of this file."""
        next_key, key_advance, key_assess = split(state.rng_key, 3)
        sampler, objective, assessed = self.sampler, self.objective, state.assessed
        flat, unravel = ravel_pytree(state.theta)

        # Theta
        theta_step = self._theta_step(target, state.theta, state.particles)
        around = sampler.step_context(target, state.theta, state.particles, state.blocks, state.num_updates)
        around = around._replace(
            gradient=assessed.gradient,
            loss=assessed.loss,
            curvature=assessed.curvature,
            admit=lambda step: controls["learning_rate"] * state.step_backoff * step,
        )
        proposed, theta_state = theta_step.update(state.theta_state, flat, around)
        inside = is_finite(target, unravel(proposed))
        accepted = inside & state.usable
        here, theta_state = select(accepted, (proposed, theta_state), (flat, state.theta_state))
        theta = unravel(here)

        # Samples
        particles, diagnostics = sampler.advance(
            key_advance, target, theta, state.particles, state.blocks, state.num_updates, objective, controls
        )

        # Loss and gradient
        seen = sampler.assess(key_assess, target, theta, particles, state.blocks, objective)
        assessed, refused = _finite_or(seen, state.assessed), (~accepted).astype(jnp.int32)
        return state._replace(
            theta=theta,
            params=target.constrain_params(unravel(theta_step.estimate(theta_state, here))),
            particles=particles,
            assessed=assessed,
            usable=_is_finite(seen),
            step_backoff=next_backoff(state.step_backoff, inside | ~state.usable, state.usable),
            theta_state=theta_state,
            num_updates=state.num_updates + 1,
            num_refused=state.num_refused + refused,
            diagnostics=diagnostics | _diagnostics(assessed, refused),
            rng_key=next_key,
        )

    def _theta_step(self, target: Target, theta: Theta, particles: Any) -> Any:
        return self.optim or self.sampler.theta_step(target, theta, particles, self.objective)

    def controls(self, state: ImplicitDiffusionState) -> dict[str, Array]:
        """See `Algorithm.controls`."""
        return {"learning_rate": state.step_backoff.dtype.type(1.0), **self.sampler.controls(state.particles)}

    def adopt(self, target: Target, state: ImplicitDiffusionState, fingerprint: Array) -> ImplicitDiffusionState:
        """See `Algorithm.adopt`."""
        key_assess, key_blocks = random.split(aside(state.rng_key))
        particles, wrong = self.sampler.adopt(key_blocks, target, state.theta, state.particles, state.blocks)
        assessed = self.sampler.assess(key_assess, target, state.theta, particles, state.blocks, self.objective)
        adopted = state._replace(
            particles=particles,
            assessed=_finite_or(assessed, state.assessed),
            usable=_is_finite(assessed),
            fingerprint=fingerprint,
        )
        return select(~jnp.asarray(wrong), adopted, state)._replace(wrong_blocks=jnp.asarray(wrong))

    def loss(self, target: Target, state: ImplicitDiffusionState) -> Array:
        """See `Algorithm.loss`."""
        return self.adopt(target, state, state.fingerprint).assessed.loss

    def draw(self, target: Target, rng_key: Array, state: Any, num: int | None) -> dict[str, Array]:
        """See `ParticleAlgorithm.draw`."""
        num = self.sampler.size(state.particles) if num is None else num
        return self.sampler.draw(rng_key, target, state.theta, state.particles, state.blocks, num)

    # -- faults -------------------------------------------------------------------------------------------------------
    def faults(
        self, state: ImplicitDiffusionState, diagnostics: dict[str, np.ndarray]
    ) -> tuple[list[str | None], Status]:
        """See `Algorithm.faults`."""
        num, refused = len(diagnostics["loss"]), int(state.num_refused)
        found = [
            faults.unmoved_theta(refused, int(state.num_updates)),
            faults.theta_still_moving(state.theta_state, diagnostics["grad_norm"]),
            faults.masked_particles(int(np.sum(diagnostics["num_masked"]))),
        ]
        if self.sampler.has_energy:
            found.append(faults.replaced_particles(int(np.sum(diagnostics["num_nonfinite"]))))
        if "acceptance_rate" in diagnostics:
            found.append(faults.frozen_particles(float(np.mean(diagnostics["acceptance_rate"][num // 2 :]))))
        lost = float(np.mean(diagnostics.get("num_nonfinite", 0))) / (
            self.sampler.size(state.particles) * state.blocks.num_blocks
        )
        return found, Status.NON_FINITE if refused > num / 4 or lost > LARGEST_LOSS else Status.FINISHED


def _is_finite(assessed: Assessed) -> Array:
    """[] bool: whether gradient, loss and curvature are finite."""
    parts = (assessed.gradient, assessed.loss, assessed.curvature)
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(part)) for part in parts]))


def _finite_or(assessed: Assessed, before: Assessed) -> Assessed:
    """``assessed`` without what is not finite: no gradient, and the loss and curvature of before."""
    usable = _is_finite(assessed)
    return assessed._replace(
        gradient=jnp.where(usable, assessed.gradient, 0.0),
        loss=jnp.where(jnp.isfinite(assessed.loss), assessed.loss, before.loss),
        curvature=jnp.where(jnp.isfinite(assessed.curvature), assessed.curvature, before.curvature),
    )


def _diagnostics(assessed: Assessed, num_refused: Array) -> dict[str, Array]:
    return assessed.diagnostics | {
        "loss": assessed.loss,
        "grad_norm": jnp.linalg.norm(assessed.gradient),
        "num_masked": assessed.num_masked,
        "num_refused": num_refused,
    }
