# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The settings of `MomentumParticleMLE`: two numbers per block, from either description, and refusals.

step size h = dt / gamma,       momentum mu = exp(-z),       damping z = gamma eta dt
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from numpyro_smcopt import faults
from numpyro_smcopt.algorithms.momentum.particles import LARGEST_TOLERANCE
from numpyro_smcopt.algorithms.momentum.theta import Number
from numpyro_smcopt.kernels.integrators import Integrator, IntegratorFn, nesterov, stability_limit
from numpyro_smcopt.types import check_number

BISECTIONS = 40


def two_numbers(block: str, step_size: Any, momentum: Any, friction: Sequence[Any]) -> tuple[Number, Number]:
    """Step size and damping of a block from either description; None is what is not given.

    ``block`` is the prefix of the arguments' names, ``friction`` holds ``gamma``, ``eta`` and ``time_step``.

    Raises:
        TypeError: If a schedule fails.
        ValueError: If a number is out of range, or the description is double or incomplete.
    """
    named = dict(zip((f"{block}gamma", f"{block}eta", f"{block}time_step"), friction, strict=True))
    present = [name for name, value in named.items() if value is not None]
    if not present:
        return _checked_step_size(f"{block}step_size", step_size), _damping(f"{block}momentum", momentum)
    if step_size is not None or momentum is not None:
        raise ValueError(
            f"Give either {block}step_size and {block}momentum or {', '.join(named)}; got {', '.join(present)} and "
            f"{block}step_size={step_size!r}, {block}momentum={momentum!r}. The step size is time_step / gamma and the "
            "momentum exp(-gamma eta time_step)."
        )
    for name, value in named.items():
        if value is None:
            raise ValueError(
                f"{', '.join(named)} go together: {name} is missing. Give it, or {block}step_size and "
                f"{block}momentum instead."
            )
        if not _is_number(value) or not 0 < value < math.inf:
            raise ValueError(f"{name} must be a positive number, got {value!r}.")
    gamma, eta, time_step = map(float, named.values())
    numbers = time_step / gamma, gamma * eta * time_step
    if not all(0 < number < math.inf for number in numbers):
        raise ValueError(
            f"{', '.join(named)} = {gamma:g}, {eta:g}, {time_step:g} make a step size time_step / gamma of "
            f"{numbers[0]:g} and a momentum exp(-gamma eta time_step) with gamma eta time_step = {numbers[1]:g}; "
            "both must be positive and finite."
        )
    return numbers


def _checked_step_size(name: str, given: Any) -> Number:
    first = _first(name, given)
    warming_up = callable(given) and first == 0
    if given is not None and not (_is_number(first) and 0 < first < math.inf or warming_up):
        raise ValueError(f"{name} must be a positive number or a schedule of such, got {first!r}.")
    return float(given) if _is_number(given) else given


def _damping(name: str, momentum: Any) -> Number:
    first = _first(name, momentum)
    if momentum is None:
        return None
    if not (_is_number(first) and 0 <= first < 1):
        raise ValueError(
            f"{name} must lie in [0, 1), got {first!r}: it is the share of the velocity that is left after a step, and "
            "0 is gradient descent."
        )
    if callable(momentum):
        return lambda count: -jnp.log(jnp.asarray(momentum(count), jnp.result_type(float)))
    return -math.log(momentum) if momentum > 0 else math.inf


def _first(name: str, given: Any) -> Any:
    """A number, or the first one of a schedule."""
    if not callable(given):
        return given
    try:
        return given(np.zeros((), np.int32))
    except Exception as error:
        raise TypeError(
            f"{name} must be a number, or a function of the number of updates, but {given!r} fails at 0: {error}."
        ) from error


def _is_number(value: Any) -> bool:
    if isinstance(value, jax.core.Tracer):
        return False
    if isinstance(value, np.ndarray | jax.Array):  # a key is one, too
        real = jnp.issubdtype(value.dtype, jnp.integer) or jnp.issubdtype(value.dtype, jnp.floating)
        return value.ndim == 0 and real
    return isinstance(value, int | float | np.integer | np.floating) and not isinstance(value, bool)


def unstable_argument(
    block: str, pace: Integrator, scheme: IntegratorFn, excess: float, time_step: float | None, coupled: bool = False
) -> str:
    """The message about a step that is too long, with the limit of the argument that makes it.

    Args:
        block: Prefix of the arguments' names.
        pace: The step of the block.
        scheme: Makes the numbers of a step.
        excess: How many times larger ``h`` is than stable at the same ``z``.
        time_step: ``dt``, if the block was described by it.
        coupled: Whether ``z`` is proportional to ``h``, as it always is to a time step; the limit is then another.
    """
    step_size, damping = float(np.max(pace.step_size)), float(np.max(pace.damping))
    name, value = ("step_size", step_size) if time_step is None else ("time_step", time_step)
    stable, unstable = 1 / excess, 1 / excess
    if coupled or time_step is not None:
        limit = lambda share: float(stability_limit(scheme(share * step_size, share * damping)))  # noqa: E731
        curvature, stable, unstable = excess * limit(1.0), 0.0, 1.0
        for _ in range(BISECTIONS):
            middle = (stable + unstable) / 2
            stable, unstable = (middle, unstable) if curvature < limit(middle) else (stable, middle)
    return faults.unstable_step(f"{block}{name}", value, stable * value)


def check_moves(preconditioning: Any, kernel: Any, averaging: Any, bias_tolerance: Any) -> None:
    """Refuse what moves no particles with a velocity, and numbers that are out of range."""
    if bias_tolerance is not None:
        check_number("bias_tolerance", bias_tolerance)
    if averaging is not None:
        check_number("averaging", averaging)
    if preconditioning is not None and not hasattr(preconditioning, "adapt"):
        raise TypeError(
            "preconditioning must be an object from numpyro_smcopt.kernels.preconditioners, such as diagonal, got "
            f"{preconditioning!r}."
        )
    if kernel is not None and not hasattr(kernel, "num_normals"):
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


def check_theta_noise(step_size: Number, preconditioner: Any, scheme: IntegratorFn) -> None:
    """Refuse noise in theta that would not fit its motion."""
    if step_size is None or preconditioner is not None or scheme is nesterov:
        raise ValueError(
            "theta_noise=True needs a step_size, no preconditioner, and an exponential scheme: otherwise the noise "
            "would not fit the motion."
        )


def check_preconditioner(preconditioner: Any) -> None:
    """Refuse what is no transformation of a gradient."""
    if preconditioner is None:
        return
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
