# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What `MomentumParticleMLE` may be given: two numbers per block, from either description, and what is refused.

step size h = dt / gamma,       momentum mu = exp(-z),       damping z = gamma eta dt
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_smcopt import faults
from numpyro_smcopt.algorithms.momentum.particles import LARGEST_TOLERANCE
from numpyro_smcopt.algorithms.momentum.theta import Number
from numpyro_smcopt.kernels import Preconditioning
from numpyro_smcopt.kernels.underdamped import IntegratorFn, Pace, VelocityKernel, stability_limit
from numpyro_smcopt.types import check_number

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
    shown = _first(f"{block}step_size", step_size)
    warming_up = callable(step_size) and shown == 0
    if step_size is not None and not (_is_number(shown) and 0 < shown < math.inf or warming_up):
        raise ValueError(f"{block}step_size must be a positive number or a schedule of such, got {shown!r}.")
    shown = _first(f"{block}momentum", momentum)
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


def _first(name: str, value: Number) -> Any:
    """A number, or what a schedule begins with."""
    if not callable(value):
        return value
    try:
        return value(np.zeros((), np.int32))  # type: ignore[arg-type]
    except Exception as error:
        raise TypeError(
            f"{name} must be a number, or a function of the number of updates, but {value!r} fails at 0: {error}."
        ) from error


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    if isinstance(value, np.ndarray | jax.Array):  # a key is one, too
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        return value.ndim == 0 and real
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def unstable_argument(
    block: str, going: Pace, scheme: IntegratorFn, excess: float, coupled: bool, time_step: float | None
) -> str:
    """The message about a step that is too long, with the limit of the argument that makes it.

    Args:
        block: Prefix of the arguments' names.
        going: The pace of the block.
        scheme: Makes the numbers of a step.
        excess: How many times larger ``h`` is than stable at the same ``z``.
        coupled: Whether ``z`` is proportional to ``h``.
        time_step: ``dt``, if the block was described by it.
    """
    step_size, damping = float(np.max(going.step_size)), float(np.max(going.damping))
    share = _stable_share(scheme, step_size, damping, excess, coupled or time_step is not None)
    if time_step is not None:
        return faults.unstable_step(f"{block}time_step", time_step, share * time_step)
    return faults.unstable_step(f"{block}step_size", step_size, share * step_size)


def _stable_share(scheme: IntegratorFn, step_size: float, damping: float, excess: float, coupled: bool) -> float:
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


def check_moves(preconditioning: Any, kernel: Any, averaging: Any, bias_tolerance: Any) -> None:
    """Refuse what moves no particles with a velocity, and numbers that are out of range."""
    if bias_tolerance is not None:
        check_number("bias_tolerance", bias_tolerance)
    if averaging is not None:
        check_number("averaging", averaging)
    if preconditioning is not None and not isinstance(preconditioning, Preconditioning):
        raise TypeError(
            "preconditioning must be an object from numpyro_smcopt.kernels.preconditioners, such as diagonal, got "
            f"{preconditioning!r}."
        )
    if kernel is not None and not isinstance(kernel, VelocityKernel):
        raise TypeError(
            "kernel must move particles that have a velocity: kernels.Underdamped() or "
            f"kernels.MetropolisUnderdamped(), got {kernel!r}. Other kernels are for SMCOptimizer."
        )
    if averaging is not None and not averaging >= 0:
        raise ValueError(f"averaging must be a power of at least 0, or None for the last iterate, got {averaging!r}.")
    if bias_tolerance is not None and not 0 < bias_tolerance <= LARGEST_TOLERANCE:
        raise ValueError(
            f"bias_tolerance is a relative bias within (0, {LARGEST_TOLERANCE:g}], got {bias_tolerance!r}. Steps "
            "for a larger one would come too near to where moves diverge; to try them, give a latent_step_size."
        )


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
