# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The checkpoint of a run, or of several: whose it is, what was asked for, how far it is."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpyro
from jax import random

from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.potential import Target, fingerprint
from numpyro_smcopt.results import Status
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.convergence import EarlyStop
from numpyro_smcopt.runs.tree_file import Saved, digest, load, save, without_addresses

_NO_SETTINGS = ("model", "handlers", "static_kwargs", "_programs", "_seen")  # attributes that are no settings


class RunSettings(NamedTuple):
    """The settings of a run.

    Attributes:
        num_steps: Updates of every run, at most.
        num_runs: R, the number of runs made at once.
        early_stop: When they end before; None for never.
        ranking_key: Randomness of the ranking of several runs; None for one.
        checkpoint_every: Updates between two checkpoints.
    """

    num_steps: int
    num_runs: int = 1
    early_stop: EarlyStop | None = None
    ranking_key: Any = None
    checkpoint_every: int = 500


def write(
    path: str | os.PathLike,
    identity: dict[str, Any],
    settings: RunSettings,
    state: Any,
    records: Any = None,
    status: Status | None = None,
) -> None:
    """Write a checkpoint, replacing the one before.

    Args:
        path: The file.
        identity: See `identity_of`.
        settings: What was asked for.
        state: The state; of several runs with a leading axis.
        records: Of all updates so far, [T, ...]; None before the first.
        status: How the run ended; None while it goes on.
    """
    stop, ranking_key = settings.early_stop, settings.ranking_key
    header = {
        "versions": _versions(),
        "num_steps": settings.num_steps,
        "num_runs": settings.num_runs,
        "every": settings.checkpoint_every,
        "done": 0 if records is None else len(jax.tree.leaves(records)[0]),
        "early_stop": None if stop is None else dataclasses.asdict(stop),
        "status": None if status is None else status.name,
        "identity": identity,
    }
    parts = {"state": state, "records": records, "ranking": ranking_key}
    save(path, header, {name: part for name, part in parts.items() if part is not None})


def read(path: str | os.PathLike, identity: dict[str, Any]) -> tuple[Saved, RunSettings, Status | None]:
    """Contents of a checkpoint, settings of the run, and its status, if it ended.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is damaged, or of a run with another identity; the message says what differs.
    """
    saved = load(path)
    header = saved.header
    if header["versions"] != _versions():  # programs of other versions are spelled otherwise
        identity = {key: value for key, value in identity.items() if key != "energy"}
    for key, now in identity.items():
        before = header["identity"].get(key)
        if before != now:
            raise ValueError(
                f"The checkpoint '{path}' belongs to another run: {_difference(key, before, now)}. Resume it with "
                "what it was begun with, or begin a new run at another path."
            )
    status = None if header["status"] is None else Status[header["status"]]
    num_runs = header.get("num_runs", 1)  # older files hold one, and do not say so
    settings = RunSettings(
        # A run that was ended by its stopping rule has arrived, whatever it was asked for.
        num_steps=header["done"] if status is Status.CONVERGED else header["num_steps"],
        num_runs=num_runs,
        early_stop=None if header["early_stop"] is None else EarlyStop(**header["early_stop"]),
        ranking_key=jnp.asarray(saved.arrays["['ranking']"]) if num_runs > 1 else None,
        checkpoint_every=header["every"],
    )
    return saved, settings, status


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


def identity_of(algorithm: Algorithm, bound: BoundTarget) -> dict[str, Any]:
    """The mark of all that must not change while a run is interrupted: algorithm, settings, model and data; JSON."""
    sites = bound.target.sites
    _, theta = bound.eval_shape("theta", Target.initial_params, random.key(0), {})
    x = jax.ShapeDtypeStruct((sites.num_latents,), jnp.result_type(float))
    settings = {name: value for name, value in vars(algorithm).items() if name not in _NO_SETTINGS}
    mark = bound.call("data", lambda target, arrays: fingerprint(arrays), bound.arrays)
    terms = bound.programs("terms", Target.terms).trace(bound.static, bound.arrays, theta, x)
    described = {
        "algorithm": type(algorithm).__name__,
        "param sites": list(sites.params),
        "latent sites": {name: list(site.shape) for name, site in sites.latents.items()},
        "energy terms": {name: size for name, size, _ in sites.terms},
        "settings": {name: without_addresses(repr(value)) for name, value in settings.items()},
        "data": int(mark),
        "energy": digest(terms.jaxpr),
    }
    return json.loads(json.dumps(described))


def _versions() -> dict[str, str]:
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
