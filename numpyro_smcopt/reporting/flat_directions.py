# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Directions of theta that the data do not determine: told from noise, and put into words."""

from collections.abc import Sequence

import numpy as np

NOISE = 4.0  # standard errors by which an eigenvalue must exceed zero
SMALLEST_SHARE = 3e-4  # of the complete-data information; less cannot be told from rounding in single precision
LARGE_SHARE = 1e-2  # of the complete-data information; noise that could hide as much says nothing about the data
TURNING = 0.1  # how much curvature may change over a distance of one, both in units of that information
PART = 1e-4  # of a coordinate's variance, in a singular direction; with more it is not identified
SHOWN_PART = 0.05


def judge_directions(values: np.ndarray, noise: np.ndarray, slope: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Masks of directions without information that can be told from zero.

    Args:
        values: [P] eigenvalues of the information, in units of the complete-data information.
        noise: [P] their standard errors.
        slope: Length of the score in the same units.

    Returns:
        [P] bool, the directions that are singular; [P] bool, those among them whose information may be large but is
        lost in noise; and whether the information is significantly negative in some direction.
    """
    singular = ~(values > np.maximum(NOISE * noise, SMALLEST_SHARE))
    # Where theta is not at the maximum, a rotation that changes nothing is not straight: it curves as the score slopes.
    indefinite = bool(np.any(values < -np.maximum(NOISE * noise, SMALLEST_SHARE + TURNING * slope)))
    hidden = singular & (np.abs(values) <= NOISE * noise) & (values + NOISE * noise > LARGE_SHARE)
    return singular, hidden, indefinite


def describe_direction(direction: np.ndarray, names: Sequence[str]) -> str:
    """The coordinates that a direction [P] of unit length is made of."""
    order = np.argsort(-np.abs(direction), kind="stable").tolist()
    shown = [names[i] for i in order if direction[i] ** 2 > SHOWN_PART][:6]
    more = int(np.sum(direction**2 > PART)) - len(shown)
    if len(shown) == 1 and more <= 0:
        return shown[0]
    return "a combination of " + ", ".join(shown) + (f" and {more} more" if more > 0 else "")


def about_directions(singular: Sequence[str], hidden: Sequence[str], indefinite: bool) -> list[str]:
    """The notes of a report about them."""
    warnings = []
    if indefinite:
        warnings.append(
            "The likelihood curves upwards in some direction: this is no maximum. Run more updates, or from another "
            "start."
        )
    elif singular:
        warnings.append(
            f"The data do not determine {_some(singular)}: these have no standard errors. Fix them, or constrain them."
        )
    if hidden and not indefinite:
        warnings.append(
            f"How well the data determine {_some(hidden)} is lost in Monte Carlo noise: these have no "
            "standard errors. Reparametrise the latents, so that they depend less on one another."
        )
    return warnings


def _some(descriptions: Sequence[str]) -> str:
    return "; ".join(descriptions[:5]) + ("; ..." if len(descriptions) > 5 else "")
