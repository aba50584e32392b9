# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Theta steps with a learning rate: any optax or NumPyro optimiser, and gradient descent in the particles' time."""

import dataclasses
from typing import Any

import jax
import numpyro
import optax
from jax.example_libraries import optimizers
from numpyro.optim import _NumPyroOptim

from numpyro_smcopt.theta_step.base import StepContext, ThetaStep, shortened
from numpyro_smcopt.types import Array


def as_theta_step(optim: Any, target_ess: float | None = None) -> ThetaStep:
    """Wrap what `numpyro.infer.SVI` accepts as an optimiser.

    Args:
        optim: The optimiser; a `ThetaStep` is returned as it is.
        target_ess: See `OptimizerStep`.

    Raises:
        TypeError: If it is something else, or `numpyro.optim.Minimize`, which takes no gradient.
    """
    if hasattr(optim, "estimate"):
        return optim
    if isinstance(optim, numpyro.optim.Minimize):
        raise TypeError(
            "numpyro.optim.Minimize minimises a deterministic function and cannot follow a gradient estimate. Use an "
            "optimiser such as optax.adam(1e-2), or none: the default needs no learning rate."
        )
    if isinstance(optim, _NumPyroOptim):
        return OptimizerStep(optim, target_ess)
    if isinstance(optim, optax.GradientTransformation):
        return OptimizerStep(numpyro.optim.optax_to_numpyro(optim), target_ess)
    if isinstance(optim, optimizers.Optimizer):
        return OptimizerStep(_NumPyroOptim(lambda *args: args, *optim), target_ess)
    raise TypeError(
        "Expected either an instance of numpyro.optim._NumPyroOptim, jax.example_libraries.optimizers.Optimizer or "
        f"optax.GradientTransformation. Got {type(optim).__name__}."
    )


@dataclasses.dataclass(frozen=True)
class OptimizerStep(ThetaStep):
    """Any optimiser that NumPyro knows, applied to the gradient estimate; the answer is the last iterate.

    Args:
        optim: A `numpyro.optim` optimiser.
        target_ess: Fraction of effective particles that a step of theta may cost, to first order: longer ones are
            shortened. None for no limit.
    """

    optim: Any
    target_ess: float | None = None

    def init(self, theta: Array) -> Any:
        """See `ThetaStep.init`."""
        return self.optim.init(theta)

    def update(self, state: Any, theta: Array, context: StepContext) -> tuple[Array, Any]:
        """See `ThetaStep.update`."""
        new = self.optim.update(context.gradient, state, value=context.loss)
        step = self.optim.get_params(new) - theta
        if self.target_ess is not None:
            step = shortened(step, context.spread(step), self.target_ess, context.reach)
        theta = theta + context.admit(step)
        # The optimiser keeps a copy of theta, which must not go another way: the leaf that `init` passes through.
        leaves, treedef = jax.tree.flatten(new)
        program = jax.make_jaxpr(self.optim.init)(theta).jaxpr
        copies = [k for k, leaf in enumerate(program.outvars) if leaf is program.invars[0]]
        leaves = [theta if k in copies[:1] else leaf for k, leaf in enumerate(leaves)]
        return theta, jax.tree.unflatten(treedef, leaves)


@dataclasses.dataclass(frozen=True)
class GradientFlow(ThetaStep):
    """Gradient descent in the particles' own time: ``theta' = theta - ratio * elapsed * g``.

    Discretises ``dx = -grad_x U dt + sqrt(2) dW, dtheta = -ratio * grad F dt``, the two time scales of Marion et al.
    2024; the learning rate follows the step size of the particles, and its schedule.

    Args:
        ratio: How much faster theta's time runs than that of the particles; small, theta is slow.

    Raises:
        ValueError: If the ratio is not positive.
    """

    ratio: float

    def __post_init__(self) -> None:
        """Refuse a ratio that is not positive."""
        if not self.ratio > 0:
            raise ValueError(f"ratio must be positive, got {self.ratio!r}.")

    def init(self, theta: Array) -> Any:
        """See `ThetaStep.init`."""
        del theta
        return ()

    def update(self, state: Any, theta: Array, context: StepContext) -> tuple[Array, Any]:
        """See `ThetaStep.update`."""
        return theta + context.admit(-self.ratio * context.elapsed * context.gradient), state
