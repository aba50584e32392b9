# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The best of several runs, and their agreement."""

import jax
import numpy as np

from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.results import RunResult, Runs, Status
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.convergence import r_hat
from numpyro_smcopt.runs.maxima import distinct_maxima
from numpyro_smcopt.types import Array, Params

TAIL = 0.25  # of a run, whose mean loss ranks it where there is no likelihood


def rank(
    algorithm: Algorithm, bound: BoundTarget, rng_key: Array, results: list[RunResult], trajectories: Params
) -> RunResult:
    """The best of the runs, with all of them.

    Args:
        algorithm: What has run.
        bound: The model with its data.
        rng_key: Randomness.
        results: Of every run.
        trajectories: Iterates of all runs, [T, R, ...].
    """
    interrupted = any(result.status is Status.INTERRUPTED for result in results)
    if algorithm.maximises_likelihood and not interrupted:
        # The running log evidence has other errors from start to start.
        found = [algorithm.log_evidence_at(rng_key, bound, result.state) for result in results]
        evidences, errors = np.transpose(found)
        losses = -evidences
    else:
        tail = -max(1, round(TAIL * len(results[0].losses)))
        losses = np.array([np.mean(result.losses[tail:], dtype=float) for result in results])
        errors = np.full(len(results), np.nan)
    best = int(np.argmin(np.where(np.isfinite(losses), losses, np.inf)))
    spread = lambda *leaves: np.std(np.stack([np.asarray(leaf, float) for leaf in leaves]), 0, ddof=1)  # noqa: E731
    runs = Runs(
        results=tuple(results),
        best=best,
        losses=losses,
        loss_errors=errors,
        r_hat=jax.tree.map(r_hat, trajectories),
        spread=jax.tree.map(spread, *(result.params for result in results)),
        maxima=distinct_maxima(losses, errors, [result.params for result in results]),
    )
    return results[best]._replace(runs=runs)
