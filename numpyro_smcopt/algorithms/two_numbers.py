# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The two numbers that describe a block with momentum, from either description, and what is refused.

step size h = dt / gamma,       momentum mu = exp(-z),       damping z = gamma eta dt
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_smcopt.kernels.underdamped import IntegratorFn, stability_limit
from numpyro_smcopt.theta_momentum import Number

BISECTIONS = 40


def two_numbers(
    block: str,
    step_size: Number,
    momentum: Number,
    gamma: float | None,
    eta: float | None,
    time_step: float | None,
) -> tuple[Number, Number]:
    """Step size and damping of a block from either description; what is not given is None.

    Args:
        block: Prefix of the arguments' names.
        step_size: Step size, or a schedule.
        momentum: Momentum, or a schedule.
        gamma: Friction.
        eta: Inverse mass.
        time_step: ``dt``.

    Raises:
        ValueError: If a number is out of range, or the description is double or incomplete.
    """
    friction = {f"{block}gamma": gamma, f"{block}eta": eta, f"{block}time_step": time_step}
    given = [name for name, value in friction.items() if value is not None]
    if given and (step_size is not None or momentum is not None):
        raise ValueError(
            f"Give either {block}step_size and {block}momentum or {', '.join(friction)}; got {', '.join(given)} and "
            f"{block}step_size={step_size!r}, {block}momentum={momentum!r}. The step size is time_step / gamma and the "
            "momentum exp(-gamma eta time_step)."
        )
    if given:
        for name, value in friction.items():
            if value is None:
                raise ValueError(
                    f"{', '.join(friction)} go together: {name} is missing. Give it, or {block}step_size and "
                    f"{block}momentum instead."
                )
            if not _is_number(value) or not 0 < value < math.inf:
                raise ValueError(f"{name} must be a positive number, got {value!r}.")
        gamma, eta, time_step = (float(value) for value in friction.values())  # type: ignore[arg-type]
        numbers = time_step / gamma, gamma * eta * time_step
        if not all(0 < number < math.inf for number in numbers):
            raise ValueError(
                f"{', '.join(friction)} = {gamma:g}, {eta:g}, {time_step:g} make a step size time_step / gamma of "
                f"{numbers[0]:g} and a momentum exp(-gamma eta time_step) with gamma eta time_step = {numbers[1]:g}; "
                "both must be positive and finite."
            )
        return numbers
    shown = _first(step_size)
    warming_up = callable(step_size) and shown == 0
    if step_size is not None and not (_is_number(shown) and 0 < shown < math.inf or warming_up):
        raise ValueError(f"{block}step_size must be a positive number or a schedule of such, got {shown!r}.")
    shown = _first(momentum)
    if momentum is not None and not (_is_number(shown) and 0 <= shown < 1):
        raise ValueError(
            f"{block}momentum must lie in [0, 1), got {shown!r}: it is the share of the velocity that is left "
            "after a step, and 0 is gradient descent."
        )
    step_size = float(step_size) if _is_number(step_size) else step_size  # type: ignore[arg-type]
    if momentum is None:
        return step_size, None
    if callable(momentum):
        schedule = momentum
        return step_size, lambda count: -jnp.log(jnp.asarray(schedule(count), jnp.result_type(float)))
    return step_size, -math.log(momentum) if momentum > 0 else math.inf


def _first(value: Number) -> Any:
    """A number, or what a schedule begins with."""
    return value(np.zeros((), np.int32)) if callable(value) else value  # type: ignore[arg-type]


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    if isinstance(value, np.ndarray | jax.Array):  # a key is one, too
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        return value.ndim == 0 and real
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def stable_share(scheme: IntegratorFn, step_size: float, damping: float, excess: float, coupled: bool) -> float:
    """By what a step has to be multiplied to be stable.

    Args:
        scheme: Makes the numbers of a step.
        step_size: ``h``.
        damping: ``z``.
        excess: How many times larger ``h`` is than stable at the same ``z``.
        coupled: Whether ``z`` is multiplied as well, as by a time step; the limit is then another.
    """
    if not coupled:
        return 1 / excess
    limit = lambda share: float(stability_limit(scheme(share * step_size, share * damping)))  # noqa: E731
    curvature, stable, unstable = excess * limit(1.0), 0.0, 1.0
    for _ in range(BISECTIONS):
        middle = (stable + unstable) / 2
        stable, unstable = (middle, unstable) if curvature < limit(middle) else (stable, middle)
    return stable


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse what is no transformation of a gradient."""
    if not isinstance(preconditioner, optax.GradientTransformation):
        raise TypeError(
            "preconditioner must be an optax transformation of the gradient such as optax.scale_by_rms(), got "
            f"{type(preconditioner).__name__}."
        )
    # A whole optimiser, with its learning rate, changes the sign.
    probe = {"theta": np.ones(2, np.float32)}
    update, _ = preconditioner.update(probe, preconditioner.init(probe), probe)
    if float(np.sum(jax.device_get(update["theta"]))) < 0:
        raise ValueError(
            "preconditioner turns the gradient round: it is a whole optimiser. Pass the part that scales the gradient "
            "(for optax.adam that is optax.scale_by_adam(b1=0.0)), and the rest as step_size and momentum."
        )


def refuse_foreign_arguments(static_kwargs: dict[str, Any]) -> None:
    """Refuse arguments of other algorithms, which would be taken for arguments of the model."""
    advice = {
        "optim": "theta moves by step_size and momentum; a scaling of its gradient goes to preconditioner",
        "resampling": "particles have no weights; use SMCOptimizer",
        "ess_threshold": "particles have no weights; use SMCOptimizer",
    }
    for name, text in advice.items():
        if name in static_kwargs:
            raise TypeError(f"MomentumParticleMLE takes no {name}: {text}.")
