# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Reward of the samples, and a penalty for leaving a reference.

    F(theta) = -E_pi[ r(x) ] + kl_weight * KL,        grad F = Cov_pi( r, grad_theta U ) + kl_weight * grad KL

The reward is needed pointwise, not its gradient in x. If it depends on theta (through a `numpyro.deterministic` site,
say), ``-E_pi[grad_theta r]`` is added. Source: Marion et al. 2024; Cuin et al. 2026.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene, add, expectation, refuse_observations
from numpyro_smcopt.potential import Target
from numpyro_smcopt.types import Array, Theta

RewardFn = Callable[[dict[str, Array]], Array]
"""One sample, a dict of sites on the scale of the model, to a number."""

MEMBERS = ("is_likelihood", "whole_particles", "arrays", "default_step", "check", "estimate")  # of an `Objective`


@dataclasses.dataclass(frozen=True, eq=False)
class Reward(Objective):
    """Minus the expected reward, plus ``kl_weight`` times a divergence from a reference.

    Args:
        reward_fn: ``sample -> []``, the reward of one sample: a dict of the model's latent and deterministic sites
            without the particle axis. It need not be differentiable or continuous. Particles where it is not finite
            are left out and counted (``num_masked``).
        kl_weight: How much the divergence counts, >= 0.
        kl: ``ForwardKL(reference_samples=...)`` for KL(reference || model), or
            ``ReverseKL(reference_energy=...)`` or ``ReverseKL(reference_params=...)`` for KL(model || reference); for
            `samplers.EulerMaruyama`, ``PathKL(reference_params=...)``.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the weight is negative, or there is a weight but no divergence, or the other way round.
    """

    reward_fn: RewardFn
    kl_weight: float = 0.0
    kl: Objective | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if not callable(self.reward_fn):
            raise TypeError(f"reward_fn must be a function of one sample, got {type(self.reward_fn).__name__}.")
        if isinstance(self.kl_weight, bool) or not isinstance(self.kl_weight, int | float) or not self.kl_weight >= 0:
            raise ValueError(f"kl_weight must be a number >= 0, got {self.kl_weight!r}.")
        if self.kl is not None and not all(hasattr(self.kl, name) for name in MEMBERS):
            raise TypeError(f"kl must be ForwardKL(...) or ReverseKL(...), got {self.kl!r}.")
        if self.kl_weight and self.kl is None:
            raise ValueError(
                f"kl_weight is {self.kl_weight}, but there is no reference: pass kl=ForwardKL(reference_samples=...) "
                "or kl=ReverseKL(reference_params=...)."
            )

    @property
    def arrays(self) -> object:
        """The arrays of the divergence."""
        return () if self.kl is None else self.kl.arrays

    def check(self, target: Target, theta: Theta) -> None:
        """See `Objective.check`."""
        refuse_observations(target, "Reward")
        particle = jax.ShapeDtypeStruct((target.sites.num_latents,), jnp.result_type(float))
        self.check_reward(jax.eval_shape(target.constrain_latents, theta, particle))
        if self.kl is not None:
            self.kl.check(target, theta)

    def check_reward(self, sample: dict[str, jax.ShapeDtypeStruct]) -> None:
        """Refuse a reward that is no number.

        Raises:
            ValueError: The message says what was returned.
        """
        got = jax.eval_shape(self.reward_fn, sample)
        if getattr(got, "shape", None) != ():
            shapes = {name: value.shape for name, value in sample.items()}
            raise ValueError(
                f"reward_fn must return one number for one sample (a dict of sites with shapes {shapes}, without the "
                f"particle axis), but it returns {got}."
            )

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """See `Objective.estimate`."""
        rewards = self._rewards(scene, cloud.x)
        estimate = expectation(-rewards, cloud)
        kept = jnp.isfinite(rewards) & jnp.isfinite(cloud.log_weights[:, 0])
        weights = jax.nn.softmax(jnp.where(kept, cloud.log_weights[:, 0], -jnp.inf))
        # Elsewhere a reward has no usable gradient in theta, not even times zero.
        x = jnp.where(kept[:, None], cloud.x, cloud.x[jnp.argmax(weights)])

        def direct(theta: Theta) -> Array:
            return -jnp.sum(jnp.where(kept, weights * self._rewards(scene._replace(theta=theta), x), 0.0))

        estimate = estimate._replace(rest=direct, diagnostics={"reward": -estimate.loss})
        return estimate if self.kl is None else add(estimate, self.kl.estimate(scene, cloud), self.kl_weight)

    def _rewards(self, scene: Scene, x: Array) -> Array:
        return jnp.asarray(jax.vmap(self.reward_fn)(scene.samples(x)), x.dtype)


def as_objective(given: Any) -> Objective:
    """An objective as it is; a function of one sample as the loss whose expectation is minimised.

    Raises:
        TypeError: If it is neither.
    """
    missing = [name for name in MEMBERS if not hasattr(given, name)]
    if not isinstance(given, type) and not missing:
        return given
    if hasattr(given, "estimate") and missing:
        raise TypeError(f"objective {given!r} has no {', '.join(missing)}; see numpyro_smcopt.objectives.Objective.")
    if isinstance(given, type) or not callable(given):
        raise TypeError(
            "objective must be an object from numpyro_smcopt.objectives such as Reward(reward_fn), or a function of "
            f"one sample that returns a loss; got {given!r}."
        )
    return Reward(partial(_minus, given))


def _minus(loss_fn: RewardFn, sample: dict[str, Array]) -> Array:
    return -loss_fn(sample)
