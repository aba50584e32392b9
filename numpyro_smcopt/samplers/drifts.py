# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models that return a drift, and rewards at the ends of its paths: what diffusions in finite time share."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt.objectives import Reward
from numpyro_smcopt.potential import Target
from numpyro_smcopt.types import Array, Theta

DEFAULT_PARTICLES = 256


def drift_of(target: Target) -> Callable[[Theta, Array, Array], Array]:
    """The drift ``(theta, time [], y [...]) -> [...]`` of one particle."""
    return lambda theta, t, y: target.output(theta)(t, y)


def reference_of(target: Target, objective: Any) -> Callable[[Array, Array], Array] | None:
    """The drift ``(time, y)`` of the reference of a `PathKL`, or None."""
    if getattr(objective, "kl", None) is None:
        return None
    _, pretrained = target.initial_params(random.key(0), target.attached)
    return target.output(pretrained)


def check_initial(initial: Any) -> None:
    """Refuse what draws no ``Y_0``.

    Raises:
        TypeError: If it is neither a distribution nor a function.
    """
    if not callable(initial) and not hasattr(initial, "sample"):
        raise TypeError(
            "initial must be a NumPyro distribution of one particle or a function rng_key -> y, got "
            f"{type(initial).__name__}."
        )


def draw_initial(initial: Any, rng_key: Array) -> Array:
    """One ``Y_0``."""
    y = initial.sample(rng_key) if hasattr(initial, "sample") else initial(rng_key)
    return jnp.asarray(y, jnp.result_type(float))


def check_drift(target: Target, theta: Theta, objective: Any, initial: Any, sampler: str) -> None:
    """Refuse a model that returns no fitting drift, and objectives that need an energy.

    Raises:
        ValueError: The message names the argument.
    """
    if target.sites.latents or target.sites.observed:
        raise ValueError(
            f"{sampler} needs a model that returns a drift b(t, y) and has no sample sites, but it has "
            f"{[*target.sites.latents, *target.sites.observed]}."
        )
    kl = getattr(objective, "kl", None)
    if not hasattr(objective, "reward_fn") or not (kl is None or getattr(kl, "of_paths", False)):
        raise ValueError(
            f"The objective of {sampler} is Reward(reward_fn), or Reward(reward_fn, kl_weight, "
            f"PathKL(reference_params=...)); got {objective!r}. The other objectives need an energy."
        )
    returned = jax.eval_shape(lambda theta: _Hidden(target.output(theta)), theta).value
    if not callable(returned):
        raise ValueError(f"The model must return a drift, a function of (t, y) for one particle; got {returned}.")
    y = jax.eval_shape(lambda key: draw_initial(initial, key), random.key(0))
    shape = jax.eval_shape(lambda theta, y: drift_of(target)(theta, jnp.zeros((), y.dtype), y), theta, y)
    if getattr(shape, "shape", None) != y.shape:
        raise ValueError(f"The drift that the model returns has shape {shape}, but y has shape {y.shape}.")
    objective.check_reward({"y": y})
    if kl is not None:
        kl.check(target, theta)


class Rated(NamedTuple):
    """Rewards at the ends of paths.

    Attributes:
        rewards: [N].
        kept: [N] bool, whether they are finite.
        share: [N] ``1 / number kept``, or 0.
        mean: [] over those kept; NaN if there are none.
        num_masked: [] how many are not.
    """

    rewards: Array
    kept: Array
    share: Array
    mean: Array
    num_masked: Array


def rate(objective: Reward, y: Array) -> Rated:
    """Rewards of samples [N, ...], those that are not finite left out; differentiable in ``y``."""
    reward_of = lambda y: jnp.asarray(objective.reward_fn({"y": y}), y.dtype)  # noqa: E731
    kept = jnp.isfinite(jax.vmap(reward_of)(jax.lax.stop_gradient(y)))
    # Where the reward is not finite its gradient need not be either, not even times zero.
    safe = jnp.where(kept.reshape(-1, *(1 for _ in y.shape[1:])), y, y[jnp.argmax(kept)])
    rewards = jax.vmap(reward_of)(safe)
    num_kept = jnp.sum(kept)
    share = kept / jnp.maximum(num_kept, 1).astype(y.dtype)
    mean = jnp.where(num_kept > 0, jnp.sum(jnp.where(kept, share * rewards, 0.0)), jnp.nan)
    return Rated(rewards, kept, share, mean, (len(kept) - num_kept).astype(jnp.int32))


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True, eq=False)
class _Hidden:
    """Carries what is no array through an abstract evaluation."""

    value: Any
