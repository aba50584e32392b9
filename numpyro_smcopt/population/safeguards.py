# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What an update does about what is not finite: lose the particle, skip the step, walk more carefully.

A particle whose energy or gradient is not finite loses its weight (`weights.reweight`) and waits at the heaviest one of
its block (`particles.revived`), so that it spoils nothing. A step of theta is refused if it would leave a block without
any weight, and skipped if its gradient is not finite; what follows is shorter (`next_backoff`).
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp

from numpyro_smcopt.kernels import Point
from numpyro_smcopt.objectives import Estimate
from numpyro_smcopt.theta_step import StepContext, ThetaStep
from numpyro_smcopt.traces import traced_once
from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import Reweighted

SHORTER = 0.25  # of a refused step is tried next
SLOWER = 0.9  # are all steps after a gradient that was not finite
RECOVERY = 1.1  # by which that, or what follows a refusal, is taken back in every sound update
SHORTEST = 2.0**-10


class Judged(NamedTuple):
    """What an update makes of a proposed theta.

    Attributes:
        points: The particles there, or as they were if it is refused.
        log_weights: [N, B] of them.
        weighed: The weights at the proposed theta.
        kept: [B] fraction of the effective particles that the update kept, or that its moves would have kept.
        sound: [] bool, whether theta goes there.
        gained: [] change of the log evidence.
        gradient: [P] of the loss where theta then is, or zero if it was taken before.
        estimate: What the objective says, or None if it was asked before.
    """

    points: Point
    log_weights: Array
    weighed: Reweighted
    kept: Array
    sound: Array
    gained: Array
    gradient: Array
    estimate: Estimate | None


JudgeFn: TypeAlias = Callable[[Array, Array], Judged]
"""Particles [N, D], and which blocks of them have lost their weight [N, B]."""


def directly(judge: JudgeFn, x: Array, lost: Array) -> Judged:
    """What is judged at first."""
    return judge(x, lost)


def unspoiled(judge: JudgeFn, x: Array, lost: Array) -> Judged:
    """`directly`, and once more from the survivors if a particle without a finite energy spoiled the gradient."""
    judge, shapes = traced_once(judge, x, lost)
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def attempt(carry: tuple[Array, Array, Array, Judged]) -> tuple[Array, Array, Array, Judged]:
        attempts, x, lost, _ = carry
        judged = judge(x, lost)
        return attempts + 1, judged.points.x, ~jnp.isfinite(judged.log_weights), judged

    def spoiled(carry: tuple[Array, Array, Array, Judged]) -> Array:
        attempts, _, _, judged = carry
        return (attempts == 0) | (attempts == 1) & ~jnp.all(jnp.isfinite(judged.gradient))

    return jax.lax.while_loop(spoiled, attempt, (jnp.zeros((), jnp.int32), x, lost, nothing))[3]


def advance(theta_step: ThetaStep, theta_state: Any, theta: Array, around: StepContext) -> tuple[Array, Any, Array]:
    """The next theta [P] and state of the theta step, and whether all that went into them was finite; else the old."""
    following, new = theta_step.update(theta_state, theta, around)
    usable = jnp.all(jnp.isfinite(around.gradient)) & jnp.all(jnp.isfinite(following))
    keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(usable, a, b), a, b)  # noqa: E731
    return keep(following, theta), keep(new, theta_state), usable


def next_backoff(step_backoff: Array, sound: Array, usable: Array) -> Array:
    """[] factor on the next steps of theta.

    Args:
        step_backoff: [] the present one.
        sound: [] bool, whether the last step was not refused.
        usable: [] bool, whether the last gradient was finite.
    """
    factor = jnp.where(sound, jnp.where(usable, RECOVERY, SLOWER), SHORTER)
    return jnp.clip(factor * step_backoff, SHORTEST, 1.0).astype(step_backoff.dtype)
