# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What arrives at an edge when theta runs off, in the parameter's own terms.

Of most constraints it is a number of the parameter itself that arrives: a scale at 0, a share at 0 or 1. Of ordered
vectors it is a difference, and of covariances a correlation or a standard deviation.
"""

import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from numpyro.distributions import constraints
from numpyro.distributions.constraints import Constraint

from numpyro_smcopt.reporting.coordinates import coordinate_names, ravel, unravel
from numpyro_smcopt.reporting.programs import Fixed

FAR_OFF = 60.0  # on a log or logit scale, where every transform has arrived in single precision
NOTHING, HUGE, ROUNDING = 1e-9, 1e12, 1e-6  # taken there for 0, for infinity, and for a whole number
SLACK = ((constraints.corr_cholesky, 1e-3), (constraints.simplex, 1e-6))  # for 0, where it is a difference from one
ORDERED = (constraints.ordered_vector, constraints.positive_ordered_vector)
FACTORS = (constraints.lower_cholesky, constraints.scaled_unit_lower_cholesky, constraints.softplus_lower_cholesky)
CORRELATIONS = (constraints.corr_cholesky, constraints.corr_matrix)
COVARIANCES = (*FACTORS, constraints.positive_definite)


def numbers_at_edge(
    fixed: Fixed, direction: np.ndarray, running: np.ndarray, thetas: list[np.ndarray]
) -> Iterator[tuple[str, float, np.ndarray]]:
    """Name, limit, and values [J] of what arrives at an edge.

    Args:
        fixed: The estimate and its constraints.
        direction: [P] of theta, towards the edge; zero for what settles.
        running: [Q] bool, numbers of the constrained parameters that do not settle.
        thetas: J points on the way back from the edge.
    """
    flat, bounded = ravel(fixed.theta), np.asarray(fixed.bounded, bool)
    end = fixed.constrained(flat + np.sign(direction) * np.where(bounded, FAR_OFF, 2 * HUGE))
    path = [fixed.constrained(theta) for theta in thetas]
    moved, found = unravel(direction != 0, fixed.theta), False
    for name, constraint in fixed.constraints.items():
        if np.any(ravel(moved[name])):
            limits = _derived(name, constraint, end[name])
            ways = [_derived(name, constraint, params[name]) for params in path]
            for key, limit in limits.items():
                values = np.array([way[key] for way in ways])
                if _settled(limit) in (0.0, -1.0, 1.0, math.inf) and np.ptp(values) > NOTHING:
                    found = True
                    yield key, _settled(limit), values
    slack = ravel(
        {
            name: jax.tree.map(lambda v, c=c: np.full(np.shape(v), _slack(c)), end[name])
            for name, c in fixed.constraints.items()
        }
    )
    names, ends, values = coordinate_names(end), ravel(end), np.stack([ravel(params) for params in path])
    for q in np.flatnonzero(running).tolist():
        found = True
        yield names[q], _settled(ends[q], slack[q]), values[:, q]
    if not found:
        k = int(np.argmax(np.abs(direction)))
        name = coordinate_names(fixed.theta)[k]
        yield f"unconstrained {name}", math.copysign(math.inf, direction[k]), np.stack(thetas)[:, k]


def mixes_units(constraint: Constraint) -> bool:
    """Whether some of the unconstrained coordinates carry the units of the parameter, as a location does."""
    return _base(constraint) in ORDERED + COVARIANCES


def _slack(constraint: Constraint) -> float:
    return next((slack for known, slack in SLACK if known is _base(constraint)), NOTHING)


def _settled(value: float, slack: float = NOTHING) -> float:
    """A limit without its rounding, which is ``slack`` at 0."""
    if abs(value) > HUGE:
        return math.copysign(math.inf, value)
    near = float(np.round(value))
    return near if abs(value - near) <= (slack if near == 0 else ROUNDING) else float(value)


def _base(constraint: Constraint) -> Constraint:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint


def _derived(name: str, constraint: Constraint, value: Any) -> dict[str, float]:
    """Numbers that people read off a value, by name: differences, correlations and standard deviations."""
    constraint = _base(constraint)
    value = np.asarray(value, float) if not isinstance(value, dict) else np.zeros(0)
    found: dict[str, float] = {}
    if constraint in ORDERED:
        for index in np.ndindex(*value.shape[:-1], value.shape[-1] - 1):
            above = (*index[:-1], index[-1] + 1)
            found[f"{_at(name, above)} - {_at(name, index)}"] = float(value[above] - value[index])
    elif constraint in CORRELATIONS + COVARIANCES:
        factor = constraint in FACTORS or constraint is constraints.corr_cholesky
        covariance = value @ np.swapaxes(value, -1, -2) if factor else value
        for index in np.ndindex(covariance.shape):
            *batch, i, j = index
            here = covariance[tuple(batch)]
            if j < i:
                size = max(np.sqrt(here[i, i] * here[j, j]), np.finfo(float).tiny)
                found[f"correlation {_at(name, index)}"] = float(here[i, j] / size)
            elif i == j and constraint in COVARIANCES:
                found[f"standard deviation {_at(name, (*batch, i))}"] = float(np.sqrt(here[i, i]))
    return found


def _at(name: str, index: tuple[int, ...]) -> str:
    return f"{name}[{','.join(map(str, index))}]"
