# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time: many updates in chunks on the device, and between chunks the progress bar, checkpoints, the decision to stop.

A chunk is a loop with a traced number of iterations that writes what it records into buffers of a fixed length, so one
compiled program serves chunks of every length, and nothing that a user sees depends on how a run is cut into chunks.
"""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from tqdm.auto import tqdm

from numpyro_smcopt.results import Status
from numpyro_smcopt.traces import traced_once
from numpyro_smcopt.types import Array

CHUNK = 100  # updates at most
SECONDS_PER_CHUNK = 0.5

UpdateFn = Callable[[Any], tuple[Any, Any]]
"""``state -> (state, record)``; a record is a pytree of arrays."""


def chunk(update: UpdateFn, state: Any, num_steps: Array) -> tuple[Any, Any]:
    """Apply ``update`` ``num_steps <= CHUNK`` times.

    Returns:
        The state, and the records in buffers of length `CHUNK`, of which the first ``num_steps`` entries count.
    """
    update, (_, shapes) = traced_once(update, state)
    buffers = jax.tree.map(lambda s: jnp.zeros((CHUNK, *s.shape), s.dtype), shapes)

    def body(k: Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
        state, buffers = carry
        state, record = update(state)
        return state, jax.tree.map(lambda b, r: b.at[k].set(r), buffers, record)

    return lax.fori_loop(0, num_steps, body, (state, buffers))


class ProgressBar:
    """A tqdm bar with the loss and the effective sample size.

    Args:
        num_steps: Length of the run.
        describe: Turns the records of a chunk into the text behind the bar.
        done: Where the bar begins.
        shown: Whether there is a bar at all.
    """

    def __init__(self, num_steps: int, describe: Callable[[Any], str], done: int = 0, shown: bool = True) -> None:
        self._bar = tqdm(total=num_steps, initial=done, disable=not shown)
        self._describe = describe

    def advance(self, steps: int, records: Any) -> None:
        """``steps`` more are done; their records are given."""
        self._bar.update(steps)
        if not self._bar.disable:
            self._bar.set_postfix_str(self._describe(records), refresh=False)

    def close(self) -> None:
        """The run is over."""
        self._bar.close()


class Pause(NamedTuple):
    """Something that is done every so many updates of a run, on the host.

    Attributes:
        every: Updates between two pauses, counted from the first update of the run.
        action: ``(state, records so far)``; True ends the run.
        until: Updates after which there are no more pauses; None for no end.
    """

    every: int
    action: Callable[[Any, Any], bool | None]
    until: int | None = None

    def ahead(self, done: int) -> int:
        """Updates from ``done`` to the next pause; if there is none, more than any run has."""
        ahead = self.every - done % self.every
        return ahead if self.until is None or done + ahead <= self.until else sys.maxsize

    def due(self, done: int) -> bool:
        """True if there is a pause after ``done`` updates."""
        return done % self.every == 0 and (self.until is None or done <= self.until)


def run_chunks(
    run_chunk: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    num_steps: int,
    progress: ProgressBar,
    *,
    past: Any = None,
    pauses: Sequence[Pause] = (),
) -> tuple[Any, Any, Status]:
    """Update until a run is ``num_steps`` long.

    Args:
        run_chunk: The compiled `chunk`, ``(state, num_steps) -> (state, buffers)``.
        state: Where to start.
        num_steps: Length of the whole run.
        progress: What to show.
        past: Records [T, ...] of the updates that led to ``state``, if this run was begun before.
        pauses: What is done in between, in this order where several fall together.

    Returns:
        The last state, the records of the whole run as NumPy arrays [T, ...], and whether the run went to its end
        (finished), was ended by a pause (converged) or interrupted from the keyboard.

    Raises:
        KeyboardInterrupt: If the run was interrupted before its first update was done.
    """
    begun = 0 if past is None else _length(past)
    # One assignment moves on, so that an interrupt finds a state and the records that belong to it.
    here = _Here(state, () if past is None else (past,), begun)
    status, pace = Status.FINISHED, 1
    try:
        while here.done < num_steps and status is Status.FINISHED:
            length = min([pace, num_steps - here.done, *(pause.ahead(here.done) for pause in pauses)])
            start = time.monotonic()
            following, buffers = run_chunk(here.state, np.int32(length))
            piece = jax.tree.map(lambda b: np.asarray(b[:length]), jax.device_get(buffers))  # noqa: B023
            if here.done > begun:  # the first chunk may have waited for the compiler
                pace = _pace(length, time.monotonic() - start)
            here = _Here(following, (*here.pieces, piece), here.done + length)
            progress.advance(length, piece)
            for pause in pauses:
                if pause.due(here.done):
                    here = here._replace(pieces=(_concatenate(here.pieces),))
                    if pause.action(here.state, here.pieces[0]):
                        status = Status.CONVERGED
    except KeyboardInterrupt:
        if not here.done:
            raise
        status = Status.INTERRUPTED
    finally:
        progress.close()
    return here.state, _concatenate(here.pieces), status


def _pace(length: int, seconds: float) -> int:
    """Updates of the next chunk: it takes equally long, so the bar moves and an interrupt is heard at any cost."""
    return min(max(1, int(SECONDS_PER_CHUNK * length / max(seconds, 1e-6))), CHUNK)


class _Here(NamedTuple):
    state: Any
    pieces: tuple  # of the records
    done: int


def _length(records: Any) -> int:
    return len(jax.tree.leaves(records)[0])


def _concatenate(pieces: tuple) -> Any:
    return pieces[0] if len(pieces) == 1 else jax.tree.map(lambda *parts: np.concatenate(parts), *pieces)
