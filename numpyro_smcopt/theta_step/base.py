# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The interface of theta steps, the context of a step, and the rules that the scale-free ones share.

*gain* (Kesten 1958): 1 while successive steps agree; ``(1 + s / 5)^-0.7`` after ``s`` reversals, so a far start is
walked from at full speed and noise is averaged out near the minimum, without a horizon to be given;

*length*: ``max_b Var(step . grad_theta U_b) <= -log(target_ess) reach^2``, which keeps the effective sample size of
every block above ``target_ess`` to first order: after one step, or after ``1 / reach`` of them in one direction;

*average*: the answer is an average of the iterates that forgets the approach, ``weight_k ~ s_k^2``.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from numpyro_smcopt.information import Fisher, Information
from numpyro_smcopt.types import Array


def _unknown(*arguments: Any) -> Any:
    raise NotImplementedError("the algorithm does not say this of where a step stands")


class StepContext(NamedTuple):
    """The surroundings of a step; functions, so that only what a step asks for is computed.

    Attributes:
        gradient: [P] estimate of the gradient of the loss.
        loss: [] estimate of the loss.
        information: () -> complete and missing information.
        fisher: () -> Fisher information of ``pi_theta``.
        curvature: [] of the loss, relative to ``fisher``: a guess from above.
        spread: ``step [P] -> []``, the variance over the particles of the change of energy that a step makes.
        along: ``v [P] -> ([], [])``, complete and missing information along a direction.
        conditional_ess: ``step [P] -> []``, the fraction of effective particles that a step leaves; not to first order.
        elapsed: [] how long the particles moved since the last step, in units of their own time.
        reach: [] share of the length that ``target_ess`` allows which a step may have; less than one where particles
            without weights have to catch up before theta has gone that far.
        admit: ``step [P] -> [P]``, what is to be taken of a step, after all that shortens it from outside.
    """

    gradient: Array
    loss: Array
    information: Callable[[], Information] = _unknown
    fisher: Callable[[], Fisher] = _unknown
    curvature: Array | float = 1.0
    spread: Callable[[Array], Array] = _unknown
    along: Callable[[Array], tuple[Array, Array]] = _unknown
    conditional_ess: Callable[[Array], Array] = _unknown
    elapsed: Array | float = 0.0
    reach: Array | float = 1.0
    admit: Callable[[Array], Array] = lambda step: step


class ThetaStep(Protocol):
    """Moves a flat ``theta [P]``; the state is a pytree of arrays.

    A state that has them is asked for more: ``metric`` [P, P], the inverse information, and ``information``, for early
    stopping and the report; ``anew()``, the state with which theta sets out under other data; and
    ``still_moving(grad_norm [T])``, whether theta moved in one direction to the end of a run.
    """

    def init(self, theta: Array) -> Any:
        """The state at the start."""

    def update(self, state: Any, theta: Array, context: StepContext) -> tuple[Array, Any]:
        """The next ``theta`` and state."""

    def estimate(self, state: Any, theta: Array) -> Array:
        """[P] the answer so far; the last iterate, unless a step says otherwise."""
        del state
        return theta


def gain(reversals: Array, patience: float) -> Array:
    """Kesten's rule: 1 while successive steps agree, ``(1 + s / patience)^-0.7`` after ``s`` reversals."""
    return (1 + reversals / patience) ** -0.7


def shortened(step: Array, spread: Array, target_ess: float, reach: Array | float = 1.0) -> Array:
    """The step, no longer than its ``spread``, a variance of log weights, allows."""
    longest = reach * jnp.sqrt(-jnp.log(target_ess) / jnp.maximum(spread, 1e-30))
    return step * jnp.minimum(1.0, longest).astype(step.dtype)


def averaged(average: Array, theta: Array, reversals: Array) -> Array:
    """The average of the iterates with one more, which weighs ``s^2`` and so forgets the approach."""
    weight = 3.0 / (2.0 * reversals + 3.0)
    return average + weight.astype(theta.dtype) * (theta - average)
