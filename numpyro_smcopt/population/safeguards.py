# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Safeguards against numbers that are not finite: lose the particle, skip the step, shorten the next steps.

A particle whose energy or gradient is not finite loses its weight (`weights.reweight`) and waits at the heaviest one of
its block (`evaluate.replace_dead`), so that it spoils nothing. A step of theta is refused if it would leave a block
without any weight, or leads where a parameter is not finite (`is_finite`), and skipped if its gradient is not finite;
what follows is shorter (`next_backoff`).
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from numpyro_smcopt.potential import Target
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.types import Array, Theta

SHORTER = 0.25  # of a refused step is tried next
SLOWER = 0.9  # are all steps after a gradient that was not finite
RECOVERY = 1.1  # by which that, or what follows a refusal, is taken back in every update that succeeds
SHORTEST = 2.0**-10

T = TypeVar("T")


def select(condition: Array, new: T, old: T) -> T:
    """``new`` where the condition [] holds, else ``old``: pytrees of arrays."""
    return jax.tree.map(lambda a, b: jnp.where(condition, a, b), new, old)


def is_finite(target: Target, theta: Theta) -> Array:
    """[] bool: whether theta is finite both on unconstrained space and on the scale of the model.

    The exponential of 100 is not, in single precision, though an energy may be that is computed from logarithms.
    """
    both = theta, target.constrain_params(theta)
    return jax.tree.reduce(lambda sound, leaf: sound & jnp.all(jnp.isfinite(leaf)), both, jnp.asarray(True))


def update_if_finite(
    theta_step: ThetaStep, theta_state: Any, theta: Array, context: StepContext
) -> tuple[Array, Any, Array]:
    """The next theta [P] and state of the theta step, and whether all that went into them was finite; else the old."""
    new_theta, new_state = theta_step.update(theta_state, theta, context)
    usable = jnp.all(jnp.isfinite(context.gradient)) & jnp.all(jnp.isfinite(new_theta))
    return *select(usable, (new_theta, new_state), (theta, theta_state)), usable


def next_backoff(step_backoff: Array, accepted: Array, usable: Array) -> Array:
    """[] factor on the next steps of theta.

    Args:
        step_backoff: [] the present one.
        accepted: [] bool, whether the last step was not refused.
        usable: [] bool, whether the last gradient was finite.
    """
    factor = jnp.where(accepted, jnp.where(usable, RECOVERY, SLOWER), SHORTER)
    return jnp.clip(factor * step_backoff, SHORTEST, 1.0).astype(step_backoff.dtype)
