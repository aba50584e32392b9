# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The nouns that a user keeps: plain data."""

import enum
from typing import Any, NamedTuple

from numpyro_smcopt.types import Array, Params


class Status(enum.Enum):
    """How a run ended."""

    FINISHED = "finished"
    CONVERGED = "converged"
    INTERRUPTED = "interrupted"
    WEIGHTS_COLLAPSED = "weights collapsed"
    NON_FINITE = "non-finite potential"


class RunResult(NamedTuple):
    """What `run` returns; the first three fields are those of `numpyro.infer.svi.SVIRunResult`.

    Attributes:
        params: The estimate, on the constrained scale of the model.
        state: The last state; pass it as ``init_state`` to go on.
        losses: [T] running estimate of the loss; for the marginal likelihood, minus its logarithm.
        diagnostics: Arrays [T], one per diagnostic site (without the prefix ``smcopt/``).
        status: How the run ended.
        trajectory: The iterates, constrained, each [T, ...]; empty if theta is too large to be kept.
    """

    params: Params
    state: Any
    losses: Array
    diagnostics: dict[str, Array]
    status: Status
    trajectory: Params
