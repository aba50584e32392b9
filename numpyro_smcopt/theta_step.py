# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How ``theta`` moves.

`OptimizerStep` hands the gradient estimate to any optax or NumPyro optimiser. `NaturalStep`, the default, needs no
learning rate: it knows the units of the parameters from the information in the particles,

    theta' = theta - gain * M^-1 g,

with ``M`` Louis' observed information ``H - F`` (see `uncertainty`), formed where ``H`` is the identity and with its
eigenvalues floored, so that a noisy or indefinite estimate still gives a descent direction no longer than a few EM
steps. Three rules choose the rest:

*gain* (Kesten 1958): 1 while successive steps agree; ``(1 + s / 5)^-0.7`` after ``s`` reversals, so a far start is
walked from at full speed and noise is averaged out near the maximum, without a horizon to be given;

*length*: ``max_b Var(step . grad_theta U_b) <= -log(target_ess)``, which keeps the effective sample size of every block
above ``target_ess`` to first order (the variance comes from ``F``, split over blocks as on average over theta);

*average*: the answer is an average of the iterates that forgets the approach, ``weight_k ~ s_k^2``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpyro
import optax
from jax import lax
from jax.example_libraries import optimizers
from numpyro.optim import _NumPyroOptim

from numpyro_smcopt.types import Array
from numpyro_smcopt.uncertainty import Information


class Surroundings(NamedTuple):
    """What a step may ask about the place where it stands; functions, so that only what is asked for is computed.

    Attributes:
        gradient: [P] estimate of the gradient of the loss.
        loss: [] estimate of the loss.
        information: () -> complete and missing information.
    """

    gradient: Array
    loss: Array
    information: Callable[[], Information]


class ThetaStep(Protocol):
    """Moves a flat ``theta [P]``; the state is a pytree of arrays."""

    def init(self, theta: Array) -> Any:
        """The state at the start."""

    def update(self, state: Any, theta: Array, around: Surroundings) -> tuple[Array, Any]:
        """The next ``theta`` and state."""

    def estimate(self, state: Any, theta: Array) -> Array:
        """[P] the answer so far."""


def as_theta_step(optim: Any) -> ThetaStep:
    """Wrap what `numpyro.infer.SVI` accepts as an optimiser.

    Raises:
        TypeError: If it is something else, or `numpyro.optim.Minimize`, which takes no gradient.
    """
    if isinstance(optim, NaturalStep | OptimizerStep):
        return optim
    if isinstance(optim, numpyro.optim.Minimize):
        raise TypeError(
            "numpyro.optim.Minimize minimises a deterministic function and cannot follow a gradient estimate. Use an "
            "optimiser such as optax.adam(1e-2), or none: the default needs no learning rate."
        )
    if isinstance(optim, _NumPyroOptim):
        return OptimizerStep(optim)
    if isinstance(optim, optax.GradientTransformation):
        return OptimizerStep(numpyro.optim.optax_to_numpyro(optim))
    if isinstance(optim, optimizers.Optimizer):
        return OptimizerStep(_NumPyroOptim(lambda *args: args, *optim))
    raise TypeError(
        "Expected either an instance of numpyro.optim._NumPyroOptim, jax.example_libraries.optimizers.Optimizer or "
        f"optax.GradientTransformation. Got {type(optim).__name__}."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerStep:
    """Any optimiser that NumPyro knows, applied to the gradient estimate; the answer is the last iterate.

    Args:
        optim: A `numpyro.optim` optimiser.
    """

    optim: Any

    def init(self, theta: Array) -> Any:
        """See `ThetaStep.init`."""
        return self.optim.init(theta)

    def update(self, state: Any, theta: Array, around: Surroundings) -> tuple[Array, Any]:
        """See `ThetaStep.update`."""
        del theta  # the optimiser keeps its own copy
        new = self.optim.update(around.gradient, state, value=around.loss)
        return self.optim.get_params(new), new

    def estimate(self, state: Any, theta: Array) -> Array:
        """See `ThetaStep.estimate`."""
        del state
        return theta


class NaturalState(NamedTuple):
    """State of `NaturalStep`.

    Attributes:
        num_updates: [] so far.
        reversals: [] how often a gradient disagreed with the step before it.
        information: Running complete and missing information.
        metric: [P, P] ``M^-1``.
        last: [P] the last direction.
        average: [P] the running average of theta.
    """

    num_updates: Array
    reversals: Array
    information: Information
    metric: Array
    last: Array
    average: Array


@dataclasses.dataclass(frozen=True)
class NaturalStep:
    """The scale-free step; see the head of this file.

    Args:
        target_ess: Fraction of effective particles that a step of theta may cost a block, to first order.
        refresh_every: Updates between two evaluations of the information.
        floor: Smallest eigenvalue of ``M`` relative to the complete information.
        forgetting: Smallest weight of the newest information in the running mean.
        patience: Reversals after which the gain starts to fall.
    """

    target_ess: float = 0.8
    refresh_every: int = 5
    floor: float = 0.1
    forgetting: float = 0.1
    patience: float = 5.0

    def init(self, theta: Array) -> NaturalState:
        """See `ThetaStep.init`."""
        zero, matrix = jnp.zeros((), jnp.int32), jnp.zeros((theta.shape[0],) * 2, theta.dtype)
        information = Information(matrix, matrix, jnp.ones((), theta.dtype))
        return NaturalState(zero, zero, information, matrix, jnp.zeros_like(theta), theta)

    def update(self, state: NaturalState, theta: Array, around: Surroundings) -> tuple[Array, NaturalState]:
        """See `ThetaStep.update`."""
        # Metric
        information, metric = self._refresh(state, around)

        # Direction
        direction = -metric @ around.gradient
        direction = jnp.where(jnp.all(jnp.isfinite(direction)), direction, 0.0)

        # Gain
        reversals = state.reversals + (jnp.vdot(around.gradient, state.last) > 0).astype(jnp.int32)
        gain = (1 + reversals / self.patience) ** -0.7
        step = gain.astype(theta.dtype) * direction

        # Length
        spread = information.largest_share * (step @ information.missing @ step)
        step = step * jnp.sqrt(jnp.minimum(1.0, -jnp.log(self.target_ess) / jnp.maximum(spread, 1e-30)))

        # Average
        theta = theta + step
        weight = 3.0 / (2.0 * reversals + 3.0)
        average = state.average + weight.astype(theta.dtype) * (theta - state.average)
        return theta, NaturalState(state.num_updates + 1, reversals, information, metric, direction, average)

    def estimate(self, state: NaturalState, theta: Array) -> Array:
        """See `ThetaStep.estimate`."""
        del theta
        return state.average

    def _refresh(self, state: NaturalState, around: Surroundings) -> tuple[Information, Array]:
        renewals = state.num_updates // self.refresh_every
        weight = jnp.maximum(1.0 / (renewals + 1), self.forgetting)

        def renew(_: None) -> tuple[Information, Array]:
            new = around.information()
            usable = jnp.all(jnp.isfinite(new.complete)) & jnp.all(jnp.isfinite(new.missing))
            mix = lambda a, b: jnp.where(usable, a + weight.astype(a.dtype) * (b - a), a)  # noqa: E731
            information = jax.tree.map(mix, state.information, new)
            metric = inverse_metric(information, self.floor)
            # Without any usable information theta stays where it is.
            return information, jnp.where(usable, metric, state.metric)

        return lax.cond(
            state.num_updates % self.refresh_every == 0, renew, lambda _: (state.information, state.metric), None
        )


def inverse_metric(information: Information, floor: float) -> Array:
    """``M^-1 [P, P]`` with ``M = H - F``, floored.

    Args:
        information: ``H`` and ``F``.
        floor: Smallest eigenvalue of ``H^-1/2 (H - F) H^-1/2``.
    """
    complete, missing = information.complete, information.missing
    scale = 1 / jnp.sqrt(jnp.maximum(jnp.abs(jnp.diag(complete)), 1e-30))
    values, vectors = jnp.linalg.eigh(complete * scale[:, None] * scale)
    whiten = (vectors / jnp.sqrt(jnp.maximum(jnp.abs(values), 1e-3))) @ vectors.T * scale  # H^-1/2, up to a rotation
    values, vectors = jnp.linalg.eigh(jnp.eye(len(scale), dtype=complete.dtype) - whiten @ missing @ whiten.T)
    half = vectors.T @ whiten
    return (half.T / jnp.maximum(values, floor)) @ half
