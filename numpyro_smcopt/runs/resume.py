# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""How a run goes on from its checkpoint: what must be as it was, and which shapes the saved arrays must have.

The structure of a state comes from the program, not from the file (see `checkpoint`). So the start of the run is
rehearsed, with shapes and types in place of arrays, and the saved arrays are put into what comes out.
"""

import json
import os
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt.blocks import Blocks, add_up
from numpyro_smcopt.population.start import Rehearsal
from numpyro_smcopt.potential import StaticArguments, Target, fingerprint
from numpyro_smcopt.results import RunResult
from numpyro_smcopt.runs import many_runs, running
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.checkpoint import Saved, digest, restore, without_addresses
from numpyro_smcopt.runs.journal import Journal
from numpyro_smcopt.runs.running import Plan
from numpyro_smcopt.types import Array, positive

_NO_SETTINGS = ("model", "handlers", "static_kwargs", "_programs", "_seen")  # attributes that are no settings


def one_or_many(num_runs: int) -> ModuleType:
    """The file that lives one run, or the one that lives several; they have the same functions."""
    return running if num_runs == 1 else many_runs


def new_journal(algorithm: Algorithm, plan: Plan, checkpoint: str | os.PathLike, every: int) -> Journal:
    """The journal of a run that begins."""
    return Journal(
        checkpoint,
        every,
        identity(algorithm, plan.arrays, plan.static),
        plan.num_steps,
        stop=plan.stop,
        num_runs=plan.num_runs,
        ranking=plan.ranking,
    )


def resume(
    algorithm: Algorithm,
    checkpoint: str | os.PathLike,
    arrays: list[Array],
    static: StaticArguments,
    num_steps: int | None,
    progress_bar: bool,
) -> RunResult:
    """See `ParticleAlgorithm.resume`."""
    journal, saved = Journal.read(checkpoint, identity(algorithm, arrays, static))
    journal.num_steps = journal.num_steps if num_steps is None else positive("num_steps", num_steps)
    plan = Plan(journal.num_runs, journal.num_steps, static, arrays, progress_bar, journal.stop, journal.ranking)
    runs = one_or_many(plan.num_runs)
    state = jax.tree.map(jnp.asarray, restore(saved, "state", _rehearsed(algorithm, plan, saved)))
    recorded = runs.eval_records(algorithm, plan, state)
    records = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((-1, *leaf.shape[1:]), leaf.dtype), recorded)
    past = restore(saved, "records", records) if journal.done else None
    return runs.live(algorithm, plan, state, journal, past)


def identity(algorithm: Algorithm, arrays: list[Array], static: StaticArguments) -> dict[str, Any]:
    """What must not change while a run is interrupted; JSON."""
    sites, theta = algorithm._target(arrays, static).sites, _theta(algorithm, arrays, static, random.key(0))
    x = jax.ShapeDtypeStruct((sites.num_latents,), jnp.result_type(float))
    settings = {name: value for name, value in vars(algorithm).items() if name not in _NO_SETTINGS}
    data = algorithm._program("data", lambda target, arrays: fingerprint(arrays))
    described = {
        "algorithm": type(algorithm).__name__,
        "param sites": list(sites.params),
        "latent sites": {name: list(site.shape) for name, site in sites.latents.items()},
        "energy terms": {name: size for name, size, _ in sites.terms},
        "settings": {name: without_addresses(repr(value)) for name, value in settings.items()},
        "data": int(data(static, arrays, arrays)),
        "energy": digest(algorithm._program("terms", Target.terms).trace(static, arrays, theta, x).jaxpr),
    }
    return json.loads(json.dumps(described))


def _rehearsed(algorithm: Algorithm, plan: Plan, saved: Saved) -> Any:
    """A state to which ``saved`` may be restored: shapes and types, which depend on the saved blocks and key."""
    arrays, static = plan.arrays, plan.static
    rng_key = saved.arrays["['state'].rng_key"]
    rng_key = rng_key if plan.num_runs == 1 else rng_key[0]
    found = ("of_coordinate", "of_term", "members", "slots", "terms")
    fields: Any = {name: jnp.asarray(saved.arrays[f"['state'].blocks.{name}"]) for name in found}
    target = algorithm._target(arrays, static)
    blocks = add_up(Blocks(**fields), target.sites.term_shapes)
    theta = _theta(algorithm, arrays, static, rng_key)
    start = Rehearsal(algorithm._program, static, arrays, target, theta, blocks=blocks)
    state = algorithm._begin(rng_key, start)
    state = jax.eval_shape(lambda state: algorithm._introduced(state, fingerprint(arrays)), state)
    return state if plan.num_runs == 1 else many_runs.stacked_shapes(state, plan.num_runs)._replace(blocks=state.blocks)


def _theta(algorithm: Algorithm, arrays: list[Array], static: StaticArguments, rng_key: Array) -> Any:
    """Shapes and types of theta."""
    _, theta = algorithm._program("theta", Target.initial_params).eval_shape(static, arrays, rng_key, {})
    return theta
