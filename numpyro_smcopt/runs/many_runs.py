# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Several independent runs in one compiled program.

Each run starts by itself, on the host, because a start looks for blocks, walks towards a maximum and may be refused.
From there on the states have a leading axis, and one program makes an update of all of them. The partition of the
latents, which belongs to the model and not to a run, is shared.

On a CPU the program takes the runs in turn: below `jax.vmap` every `lax.cond` computes both sides, so that an update of
four runs cost 5 to 6.5 times that of one (measured on three models), instead of 4.1. Accelerators get `jax.vmap`.
"""

import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_smcopt import effects, faults
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.potential import Target, check_init_params
from numpyro_smcopt.results import RunResult, Runs, Status
from numpyro_smcopt.runs import loop, running
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.compilation import Program
from numpyro_smcopt.runs.convergence import r_hat
from numpyro_smcopt.runs.journal import Journal
from numpyro_smcopt.runs.running import (
    Plan,
    Watch,
    check_stop,
    first_state,
    has_arrived,
    recorded_step,
    result_of,
    until_the_end,
)
from numpyro_smcopt.types import Array, Params

TAIL = 0.25  # of a run, whose mean loss ranks it where there is no likelihood


def begin(algorithm: Algorithm, plan: Plan, rng_key: Array, init_params: Params | None) -> Any:
    """The first states, stacked; that of run k is the one of a single run with the k-th of the split keys.

    Args:
        algorithm: What runs.
        plan: What is to be run.
        rng_key: Randomness.
        init_params: Constrained starting values, of the shape of their site or with a leading axis of K.

    Raises:
        ValueError: If a run cannot start; a note says which.
    """
    starts = _split_params(algorithm, plan, rng_key, init_params)
    # Nobody knows the state yet if a handler keeps one of its own, see `running.begin`.
    plain = not algorithm.handlers and not effects.handlers_are_active()

    def prepare(state: Any) -> None:
        states = stacked_shapes(state, plan.num_runs)
        _program(algorithm).prepare(plan.static, plan.arrays, state.blocks, states, np.int32(1))

    states = []
    for k, key in enumerate(random.split(rng_key, plan.num_runs)):
        foresee = prepare if plain and k == 0 else lambda state: None
        try:
            states.append(first_state(algorithm, plan.arrays, plan.static, key, starts[k], foresee))
        except ValueError as error:
            error.add_note(f"This was the start of run {k} of {plan.num_runs}, which are counted from 0.")
            raise
    return stack(states)


def adopted(algorithm: Algorithm, plan: Plan, states: Any) -> Any:
    """States to go on from under the data, stacked; a ValueError if they are not a list of one per run."""
    if not isinstance(states, list | tuple) or hasattr(states, "_fields") or len(states) != plan.num_runs:
        got = f"{len(states)} of them" if isinstance(states, list) else type(states).__name__
        raise ValueError(
            f"init_state must be a list of {plan.num_runs} states, one per run, such as result.runs.states; got {got}."
        )
    return stack([running.adopted(algorithm, plan, state) for state in states])


def stack(states: Sequence[Any]) -> Any:
    """One state with a leading axis of runs, but for their partition.

    Raises:
        ValueError: If they have not the same partition.
    """
    blocks = _shared_blocks(states)
    return _stacked(*(state._replace(blocks=None) for state in states))._replace(blocks=blocks)


def part(stacked: Any, k: int) -> Any:
    """The state of one of stacked runs."""
    return _picked(stacked._replace(blocks=None), k)._replace(blocks=stacked.blocks)


# Each compiled as one program, not as one for every shape of a leaf.
_stacked = jax.jit(lambda *states: jax.tree.map(lambda *leaves: jnp.stack(leaves), *states))
_picked = jax.jit(lambda stacked, k: jax.tree.map(lambda leaf: leaf[k], stacked))


def stacked_shapes(state: Any, num_runs: int) -> Any:
    """Shapes and types of the stacked states, without their partition, from those of one."""
    shape = lambda leaf: jax.ShapeDtypeStruct((num_runs, *leaf.shape), leaf.dtype)  # noqa: E731
    return jax.tree.map(shape, state._replace(blocks=None))


def eval_records(algorithm: Algorithm, plan: Plan, stacked: Any) -> Any:
    """Shapes and types of the records of a chunk."""
    states = stacked._replace(blocks=None)
    return _program(algorithm).eval_shape(plan.static, plan.arrays, stacked.blocks, states, np.int32(1))[1]


def live(algorithm: Algorithm, plan: Plan, stacked: Any, journal: Journal | None = None, past: Any = None) -> RunResult:
    """Run to the end; arguments as for `running.until_the_end`, with states and records of all runs."""
    check_stop(algorithm, plan, stacked)
    program, runs = _program(algorithm), range(plan.num_runs)

    def run_chunk(stacked: Any, num: Array) -> tuple[Any, Any]:
        states, records = program(plan.static, plan.arrays, stacked.blocks, stacked._replace(blocks=None), num)
        return states._replace(blocks=stacked.blocks), records

    def early_faults(stacked: Any, records: Any) -> list[str | None]:
        found = [algorithm._early_faults(part(stacked, k), _of_run(k, records)[0]) for k in runs]
        return [_named(k, plan, message) for k in runs for message in found[k] if message is not None]

    def arrived(stacked: Any, records: Any) -> bool:
        return all(has_arrived(algorithm, plan, part(stacked, k), _of_run(k, records)) for k in runs)

    ended = until_the_end(plan, run_chunk, stacked, Watch(early_faults, arrived, _describe), journal, past)
    results = []
    for k in runs:
        own = ended._replace(state=part(ended.state, k), records=_of_run(k, ended.records))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(result_of(algorithm, own))
        faults.warn_of(_named(k, plan, warning.message) for warning in caught)
    _, trajectories, _ = ended.records
    return _ranked(algorithm, plan, results, trajectories)


def _of_run(k: int, records: Any) -> Any:
    """Records [T, ...] of one of the runs, from those of all [T, K, ...]."""
    return jax.tree.map(lambda leaf: leaf[:, k], records)


def _named(k: int, plan: Plan, message: Any) -> str:
    return f"Run {k} of {plan.num_runs}: {message}"


def _program(algorithm: Algorithm) -> Program:
    """The program of `running` for states with a leading axis, but for their partition."""

    def advance(target: Target, blocks: Blocks, states: Any, num: Array) -> tuple[Any, Any]:
        def one(state: Any) -> tuple[Any, Any]:
            state, record = recorded_step(algorithm, target, state._replace(blocks=blocks))
            return state._replace(blocks=None), record

        return loop.chunk(partial(lax.map, one) if _in_turn() else jax.vmap(one), states, num)

    return algorithm._program("many runs", advance, keep=not effects.handlers_are_active())


def _in_turn() -> bool:
    """Whether the runs make their updates one after the other."""
    return jax.default_backend() == "cpu"


def _split_params(algorithm: Algorithm, plan: Plan, rng_key: Array, init_params: Params | None) -> list[Params]:
    """Starting values of each run."""
    init_params = {} if init_params is None else init_params
    target = algorithm._target(plan.arrays, plan.static)
    algorithm._check_model(target)
    check_init_params(target.sites.params, init_params)
    program = algorithm._program("theta", Target.initial_params)
    like, _ = program.eval_shape(plan.static, plan.arrays, rng_key, {})
    apart = {name for name, value in init_params.items() if _has_axis(name, value, like[name], plan.num_runs)}
    return [
        {
            name: jax.tree.map(lambda leaf: leaf[k], value) if name in apart else value  # noqa: B023
            for name, value in init_params.items()
        }
        for k in range(plan.num_runs)
    ]


def _has_axis(name: str, value: Any, like: Any, num_runs: int) -> bool:
    """Whether a starting value has an axis of runs."""
    (leaves, structure), (wanted, structure_wanted) = jax.tree.flatten(value), jax.tree.flatten(like)
    shapes, needed = [np.shape(leaf) for leaf in leaves], [leaf.shape for leaf in wanted]
    if shapes == needed or str(structure) != str(structure_wanted):
        return False  # another structure will be refused by its name
    if shapes == [(num_runs, *shape) for shape in needed]:
        return True
    shown = (shapes[0], needed[0], (num_runs, *needed[0])) if len(needed) == 1 else (shapes, needed, "a leading axis")
    raise ValueError(
        f"init_params['{name}'] has shape {shown[0]}, but the param site has shape {shown[1]}. Give a value of that "
        f"shape for all of the {num_runs} runs, or one for each: {shown[2]}."
    )


def _shared_blocks(states: Sequence[Any]) -> Blocks:
    """The partition of the latents, which must be the same for all.

    Raises:
        ValueError: If it is not.
    """
    first = states[0].blocks
    for k, state in enumerate(states):
        if not all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(state.blocks))):
            raise ValueError(
                f"At the starting values of run {k} the latents depend on one another in another way than at those of "
                "run 0. Start elsewhere with init_params, or use partition=numpyro_smcopt.one_block."
            )
    return first


def _ranked(algorithm: Algorithm, plan: Plan, results: list[RunResult], trajectories: Params) -> RunResult:
    """The best of the runs, with all of them."""
    likelihood = getattr(algorithm, "objective", None)
    interrupted = any(result.status is Status.INTERRUPTED for result in results)
    if (likelihood is None or likelihood.is_likelihood) and not interrupted:
        # The running log evidence has other errors from start to start.
        look = lambda state: algorithm._log_evidence_at(plan.ranking, plan.arrays, plan.static, state)  # noqa: E731
        evidences, errors = np.transpose([look(result.state) for result in results])
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
    )
    return results[best]._replace(runs=runs)


def _describe(records: Any) -> str:
    """The text behind the bar."""
    diagnostics, _, _ = records
    losses = diagnostics["loss"][-1]
    parts = [f"losses {np.min(losses):.4g} to {np.max(losses):.4g}"]
    for name, title in (("ess", "ess"), ("acceptance_rate", "accept")):
        if name in diagnostics:
            parts.append(f"{title} {np.mean(diagnostics[name]):.2f}")
    return ", ".join(parts)
