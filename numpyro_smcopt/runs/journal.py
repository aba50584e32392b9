# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run: whose it is, how far it is, and when it is written."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpyro

from numpyro_smcopt.results import Status
from numpyro_smcopt.runs.checkpoint import Saved, load, save
from numpyro_smcopt.runs.convergence import EarlyStop
from numpyro_smcopt.runs.loop import Pause


class Journal:
    """Writes the checkpoints of a run.

    Args:
        path: The file.
        every: Updates between two checkpoints.
        identity: What must be the same when the run goes on; JSON.
        num_steps: Length of the whole run.
        done: Updates so far.
        stop: When the run ends before.
        ended: Whether the run has come to its end before, which may now be a later one.
        converged: Whether it was ended by its stopping rule, so that nothing is left to be done.
        num_runs: How many runs are made at once; state and records then have an axis for them.
        ranking: Key of the ranking of several runs, which is written with them.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        every: int,
        identity: dict[str, Any],
        num_steps: int,
        done: int = 0,
        stop: EarlyStop | None = None,
        ended: bool = False,
        converged: bool = False,
        num_runs: int = 1,
        ranking: Any = None,
    ) -> None:
        self.path, self.every, self.identity = Path(path), every, identity
        self.num_steps, self.done, self.stop = num_steps, done, stop
        self.ended, self.converged = ended, converged
        self.num_runs, self.ranking, self._begun = num_runs, ranking, done

    @classmethod
    def read(cls, path: str | os.PathLike, identity: dict[str, Any]) -> tuple["Journal", Saved]:
        """The journal of a run that goes on, and what its file holds.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is damaged, or of a run with another identity; the message says what differs.
        """
        saved = load(path)
        header = saved.header
        if header["versions"] != versions():  # programs of other versions are spelled otherwise
            identity = {key: value for key, value in identity.items() if key != "energy"}
        for key, now in identity.items():
            before = header["identity"].get(key)
            if before != now:
                raise ValueError(
                    f"The checkpoint '{path}' belongs to another run: {_difference(key, before, now)}. Resume it with "
                    "what it was begun with, or begin a new run at another path."
                )
        # A run that was ended by its stopping rule has arrived, whatever it was asked for.
        converged = header["status"] == Status.CONVERGED.name
        ended = converged or header["status"] == Status.FINISHED.name
        num_steps = header["done"] if converged else header["num_steps"]
        stop = None if header["early_stop"] is None else EarlyStop(**header["early_stop"])
        num_runs = header.get("num_runs", 1)  # older files hold one, and do not say so
        ranking = jnp.asarray(saved.arrays["['ranking']"]) if num_runs > 1 else None
        same = header["every"], header["identity"], num_steps, header["done"], stop
        return cls(path, *same, ended, converged, num_runs, ranking), saved

    def begin(self, state: Any) -> tuple[Pause, ...]:
        """Write the first checkpoint, if there is none, and say when the others are due."""
        if not self.done:
            self.write(state, None, 0)
        return (Pause(self.every, self.write),)

    def write(self, state: Any, records: Any, done: int, status: Status | None = None) -> bool:
        """Write a checkpoint; False, for it is no reason to stop (see `Pause`)."""
        self.done = done
        header = {
            "versions": versions(),
            "num_steps": self.num_steps,
            "num_runs": self.num_runs,
            "every": self.every,
            "done": done,
            "early_stop": None if self.stop is None else dataclasses.asdict(self.stop),
            "status": None if status is None else status.name,
            "identity": self.identity,
        }
        parts = {"state": state, "records": records, "ranking": self.ranking}
        save(self.path, header, {name: part for name, part in parts.items() if part is not None})
        return False

    def end(self, state: Any, records: Any, done: int, status: Status) -> Status:
        """Write the last checkpoint, and say how the run ended, which may have been before it was resumed."""
        status = Status.CONVERGED if self.converged and done == self._begun else status
        self.write(state, records, done, status)
        return status


def check_path(path: str | os.PathLike) -> None:
    """Refuse what cannot become the checkpoint of a new run, before anything is computed.

    Raises:
        TypeError: If it is no path.
        ValueError: If it cannot be that of a file.
        FileExistsError: If there is a file already, which would be destroyed.
        FileNotFoundError: If there is no directory to hold it.
    """
    if not isinstance(path, str | os.PathLike):
        raise TypeError(f"checkpoint must be the path of a file, got {path!r}.")
    if "\0" in os.fspath(path) or Path(path).is_dir():
        raise ValueError(f"checkpoint must be the path of a file, but {os.fspath(path)!r} is none.")
    if Path(path).exists():
        raise FileExistsError(
            f"There is a checkpoint at '{path}'. Go on with it by resume('{path}', ...), or delete it to begin anew."
        )
    if not Path(path).parent.is_dir():
        raise FileNotFoundError(
            f"There is no directory '{Path(path).parent}' for the checkpoint '{path}'. Make it first."
        )


def versions() -> dict[str, str]:
    """Of the libraries whose programs are compared."""
    return {"jax": jax.__version__, "numpyro": numpyro.__version__}


def _difference(key: str, before: Any, now: Any) -> str:
    if key == "data":
        return "the data differ"
    if key == "energy":
        return "the model has the same sites, but other densities"
    if isinstance(before, dict) and isinstance(now, dict):
        for name in [*before, *now]:
            if before.get(name) != now.get(name):
                where = f"`{name}`" if key == "settings" else f"{key} '{name}'"
                return f"{where} was {before.get(name)} and is {now.get(name)}"
    return f"{key}: {before}, and now {now}"
