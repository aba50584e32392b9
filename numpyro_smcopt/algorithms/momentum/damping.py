# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The regime in which the motion of theta was damped.

The damping ratio along the velocity, ``gamma eta / (2 sqrt(eta c))`` with c the curvature of the loss there, is one
where it is critical; within a factor of sqrt(2) it is called near.
"""

import enum
import math

import numpy as np

from numpyro_smcopt.types import Array


class Damping(enum.Enum):
    """The damping of the motion of theta."""

    UNDER = "under-damped"
    CRITICAL = "near critical damping"
    OVER = "over-damped"


def damping_regime(ratios: Array) -> Damping:
    """The regime in the last half of a run, from its damping ratios [T]."""
    ratio = float(np.median(ratios[len(ratios) // 2 :]))
    if ratio < math.sqrt(0.5):
        return Damping.UNDER
    return Damping.OVER if ratio > math.sqrt(2) else Damping.CRITICAL
