# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time: many updates in chunks on the device, and between chunks the progress bar.

A chunk is a loop with a traced number of iterations that writes what it records into buffers of a fixed length, so one
compiled program serves chunks of every length, and nothing that a user sees depends on how a run is cut into chunks.
"""

from collections.abc import Callable
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from numpyro_smcopt.types import Array

CHUNK = 50

UpdateFn = Callable[[Any], tuple[Any, Any]]
"""``state -> (state, record)``; a record is a pytree of arrays."""


def chunk(update: UpdateFn, state: Any, num_steps: Array) -> tuple[Any, Any]:
    """Apply ``update`` ``num_steps <= CHUNK`` times.

    Returns:
        The state, and the records in buffers of length `CHUNK`, of which the first ``num_steps`` entries count.
    """
    shapes = jax.eval_shape(update, state)[1]
    buffers = jax.tree.map(lambda s: jnp.zeros((CHUNK, *s.shape), s.dtype), shapes)

    def body(k: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, buffers = carry
        state, record = update(state)
        return state, jax.tree.map(lambda b, r: b.at[k].set(r), buffers, record)

    return lax.fori_loop(0, num_steps, body, (state, buffers))


class Progress(Protocol):
    """Shows how far a run is; `SilentProgress` is its silent twin."""

    def advance(self, steps: int, records: Any) -> None:
        """``steps`` more are done; their records are given."""

    def close(self) -> None:
        """The run is over."""


class SilentProgress:
    """Shows nothing."""

    def advance(self, steps: int, records: Any) -> None:
        """Nothing to show."""

    def close(self) -> None:
        """Nothing to close."""


class ProgressBar:
    """A tqdm bar with the loss and the effective sample size.

    Args:
        num_steps: Length of the run.
        describe: Turns the records of a chunk into the text behind the bar.
    """

    def __init__(self, num_steps: int, describe: Callable[[Any], str]) -> None:
        self._bar = tqdm(total=num_steps)
        self._describe = describe

    def advance(self, steps: int, records: Any) -> None:
        """Move the bar."""
        self._bar.update(steps)
        self._bar.set_postfix_str(self._describe(records), refresh=False)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def run_chunks(
    run_chunk: Callable[[Any, Array], tuple[Any, Any]], state: Any, num_steps: int, progress: Progress
) -> tuple[Any, Any, bool]:
    """Run ``num_steps`` updates.

    Args:
        run_chunk: The compiled `chunk`, ``(state, num_steps) -> (state, buffers)``.
        state: Where to start.
        num_steps: How many updates.
        progress: What to show.

    Returns:
        The last state, the records as NumPy arrays [T, ...], and whether the run was interrupted from the keyboard
        (then what was done so far is returned).
    """
    pieces, done, interrupted = [], 0, False
    try:
        while done < num_steps:
            length = min(CHUNK, num_steps - done)
            state, buffers = run_chunk(state, jnp.asarray(length, jnp.int32))
            pieces.append(jax.tree.map(lambda b: np.asarray(b[:length]), jax.device_get(buffers)))  # noqa: B023
            done += length
            progress.advance(length, pieces[-1])
    except KeyboardInterrupt:
        if not pieces:
            raise
        interrupted = True
    finally:
        progress.close()
    return state, jax.tree.map(lambda *parts: np.concatenate(parts), *pieces), interrupted
