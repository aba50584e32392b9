# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The distinct maxima that several runs ended at; one that is only labelled otherwise is the same."""

from collections.abc import Sequence

import jax
import numpy as np

from numpyro_smcopt.results import Maximum
from numpyro_smcopt.types import Params

SAME_HEIGHT, ERRORS = 0.05, 4.0  # nats, and standard errors of a difference
SAME_VALUE, SAME_ZERO = 0.1, 0.01  # relative to a value, and to the largest


def distinct_maxima(losses: np.ndarray, errors: np.ndarray, params: Sequence[Params]) -> tuple[Maximum, ...]:
    """The maxima, highest first.

    Args:
        losses: [K] minus the log evidence at each end.
        errors: [K] their standard deviations; NaN if they are not known.
        params: K estimates, constrained.
    """
    maxima: list[Maximum] = []
    for k in np.argsort(np.where(np.isfinite(losses), losses, np.inf), kind="stable").tolist():
        for i, known in enumerate(maxima):
            error = np.nan_to_num(np.hypot(known.error, errors[k]))
            level = known.log_evidence + losses[k] <= SAME_HEIGHT + ERRORS * error
            if level and _same_but_for_labels(known.params, params[k]):
                maxima[i] = known._replace(runs=(*known.runs, k))
                break
        else:
            maxima.append(Maximum(-float(losses[k]), float(errors[k]), (k,), params[k]))
    return tuple(maxima)


def _same_but_for_labels(one: Params, other: Params) -> bool:
    """Whether two estimates of the same height consist of the same numbers, but for their order and signs.

    Components of a mixture, rates that swap, and loadings whose signs turn with their latents change nothing else.
    """
    a, b = (np.sort(np.abs(np.concatenate([np.ravel(v) for v in jax.tree.leaves(p)]))) for p in (one, other))
    size = np.maximum(a, b)
    return bool(np.all(np.abs(a - b) <= SAME_VALUE * size + SAME_ZERO * np.max(size, initial=0.0)))
