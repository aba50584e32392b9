# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The nouns that a user keeps: plain data."""

import enum
from typing import Any, NamedTuple

import numpy as np

from numpyro_smcopt.types import Array, Params


class Status(enum.Enum):
    """The end of a run."""

    FINISHED = "finished"
    CONVERGED = "converged"
    INTERRUPTED = "interrupted"
    WEIGHTS_COLLAPSED = "weights collapsed"
    NON_FINITE = "non-finite potential"


class RunResult(NamedTuple):
    """Result of `run`; the first three fields are those of `numpyro.infer.svi.SVIRunResult`.

    Attributes:
        params: The estimate, on the constrained scale of the model.
        state: The last state; pass it as ``init_state`` to go on.
        losses: [T] running estimate of the loss; for the marginal likelihood, minus its logarithm.
        diagnostics: Arrays [T], one per diagnostic site (without the prefix ``smcopt/``).
        status: How the run ended.
        trajectory: The iterates, constrained, each [T, ...]; empty if theta is too large to be kept.
        runs: All runs, if there were several; the other fields are those of the best.
    """

    params: Params
    state: Any
    losses: Array
    diagnostics: dict[str, Array]
    status: Status
    trajectory: Params
    runs: "Runs | None" = None


class Maximum(NamedTuple):
    """A maximum of the likelihood that some runs ended at.

    Attributes:
        log_evidence: Log marginal likelihood there; for other objectives minus the loss.
        error: Its Monte Carlo standard deviation.
        runs: Which runs ended there, the best first.
        params: Where the best of them ended, constrained.
    """

    log_evidence: float
    error: float
    runs: tuple[int, ...]
    params: Params


class Runs(NamedTuple):
    """Several independent runs.

    Attributes:
        results: Those of the R runs, one by one.
        best: Which of them has the lowest loss.
        losses: [R] what they are ranked by: minus the log evidence at the estimate, or for other objectives the mean
            of the loss over the last quarter of a run.
        loss_errors: [R] Monte Carlo standard deviations of these.
        r_hat: ``{param site: array}``, the potential scale reduction of the iterates, see `convergence.r_hat`: near one
            where all runs ended at the same place, large where some did not. Empty if no iterates were kept.
        spread: ``{param site: array}``, the standard deviation of the estimates over the runs. Where R-hat is near
            one this is the Monte Carlo error of the estimate of one run.
        maxima: The distinct maxima that the runs ended at, highest first; labels of components that are exchanged and
            signs of loadings make no difference.
    """

    results: tuple[RunResult, ...]
    best: int
    losses: np.ndarray
    loss_errors: np.ndarray
    r_hat: Params
    spread: Params
    maxima: tuple[Maximum, ...] = ()

    @property
    def states(self) -> list[Any]:
        """The last state of every run; pass them as ``init_state`` to go on with all."""
        return [result.state for result in self.results]
