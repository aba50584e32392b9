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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_smcopt import effects, loop
from numpyro_smcopt.algorithms import faults
from numpyro_smcopt.algorithms.journal import Journal
from numpyro_smcopt.algorithms.programs import Program
from numpyro_smcopt.algorithms.start import Start
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.convergence import EarlyStop, r_hat
from numpyro_smcopt.kernels import HMC, InvariantKernel
from numpyro_smcopt.objectives import MarginalLikelihood
from numpyro_smcopt.reporting.exploration import Cloud, explore
from numpyro_smcopt.results import RunResult, Runs, Status
from numpyro_smcopt.target import StaticArguments, Target, check_init_params, join_arguments, make_target
from numpyro_smcopt.types import Array, Params

TAIL = 0.25  # of a run, whose mean loss ranks it where there is no likelihood


class Plan(NamedTuple):
    """What is to be run; the names are those of `ParticleAlgorithm.run`.

    Attributes:
        num_runs: K.
        num_steps: Updates of every run.
        static: Static arguments of the model.
        arrays: Its traced arguments.
        progress_bar: Whether to show a bar.
        stop: When to end before.
    """

    num_runs: int
    num_steps: int
    static: StaticArguments
    arrays: list[Array]
    progress_bar: bool
    stop: EarlyStop | None


def begin(algorithm: Any, plan: Plan, rng_key: Array, init_params: Params | None) -> list[Any]:
    """The first states; that of run k is the one of a single run with the k-th of the split keys.

    Args:
        algorithm: A `ParticleAlgorithm`.
        plan: What is to be run.
        rng_key: Randomness.
        init_params: Constrained starting values, of the shape of their site or with a leading axis of K.

    Raises:
        ValueError: If a run cannot start; a note says which.
    """
    starts = _split_params(algorithm, plan, rng_key, init_params)
    states = []
    for k, key in enumerate(random.split(rng_key, plan.num_runs)):
        # Nobody knows the state yet if a handler keeps one of its own, see `run`.
        plain = k == 0 and not algorithm.handlers and not effects.handlers_are_active()

        def prepare(state: Any, plain: bool = plain) -> None:
            if plain:
                states = stacked_shapes(state, plan.num_runs)
                _program(algorithm).prepare(plan.static, plan.arrays, state.blocks, states, np.int32(1))

        try:
            states.append(algorithm._init(key, plan.arrays, plan.static, starts[k], prepare))
        except ValueError as error:
            error.add_note(f"This was the start of run {k} of {plan.num_runs}, which are counted from 0.")
            raise
    return states


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


def eval_records(algorithm: Any, static: StaticArguments, arrays: list[Array], stacked: Any) -> Any:
    """Shapes and types of the records of a chunk."""
    states = stacked._replace(blocks=None)
    return _program(algorithm).eval_shape(static, arrays, stacked.blocks, states, np.int32(1))[1]


def live(
    algorithm: Any, plan: Plan, stacked: Any, rng_key: Array, journal: Journal | None = None, past: Any = None
) -> RunResult:
    """Run to the end.

    Args:
        algorithm: A `ParticleAlgorithm`.
        plan: What is to be run.
        stacked: Where to start, see `stack`.
        rng_key: For the ranking.
        journal: Writes the checkpoints, if there are to be any.
        past: Records [T, K, ...] of the updates that led to ``stacked``, if the runs go on.
    """
    program = _program(algorithm)

    def run_chunk(stacked: Any, num: Array) -> tuple[Any, Any]:
        states, records = program(plan.static, plan.arrays, stacked.blocks, stacked._replace(blocks=None), num)
        return states._replace(blocks=stacked.blocks), records

    def early(stacked: Any, records: Any) -> list[str]:
        warnings_of = lambda k: algorithm._early_faults(part(stacked, k), {n: v[:, k] for n, v in records[0].items()})  # noqa: E731
        return [_named(k, plan, found) for k in range(plan.num_runs) for found in warnings_of(k) if found is not None]

    def look_early(stacked: Any, records: Any, done: int) -> bool:
        del done
        faults.warn_of(early(stacked, records))
        return False

    def arrived(stacked: Any, records: Any, done: int) -> bool:
        del done
        theta, gradient = records[2]["theta"], records[2]["gradient"]
        return plan.stop is not None and all(
            plan.stop.arrived(
                theta[:, k],
                gradient[:, k],
                algorithm._inverse_information(plan.static, plan.arrays, part(stacked, k)),
            )
            for k in range(plan.num_runs)
        )

    # The end of short runs has told it, if they are made longer.
    told = journal is not None and journal.ended and past is not None and bool(early(stacked, past))
    # Both the warning and the decision come before the checkpoint, which then says that they were made.
    pauses: tuple[loop.Pause, ...] = () if told else (loop.Pause(faults.LAST_LOOK, look_early, until=faults.LAST_LOOK),)
    pauses += () if plan.stop is None else (loop.Pause(plan.stop.every, arrived),)
    pauses += () if journal is None else journal.begin(stacked)
    done = 0 if journal is None else journal.done
    progress = loop.ProgressBar(plan.num_steps, _describe, done) if plan.progress_bar else loop.SilentProgress()
    stacked, records, status = loop.run_chunks(run_chunk, stacked, plan.num_steps, progress, past=past, pauses=pauses)
    if journal is not None:
        status = journal.end(stacked, records, len(records[0]["loss"]), status)
    results = []
    for k in range(plan.num_runs):
        state, own = part(stacked, k), jax.tree.map(lambda v: v[:, k], records)  # noqa: B023
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            results.append(algorithm._result(state, own, status, told))
        faults.warn_of(_named(k, plan, warning.message) for warning in caught)
    return _ranked(algorithm, plan, results, records[1], rng_key)


def _named(k: int, plan: Plan, message: Any) -> str:
    return f"Run {k} of {plan.num_runs}: {message}"


def _program(algorithm: Any) -> Program:
    """`ParticleAlgorithm._run_program` for states with a leading axis, but for their partition."""

    def advance(target: Target, blocks: Blocks, states: Any, num: Array) -> tuple[Any, Any]:
        def one(state: Any) -> tuple[Any, Any]:
            state, record = algorithm._recorded_step(target, state._replace(blocks=blocks))
            return state._replace(blocks=None), record

        return loop.chunk(partial(lax.map, one) if _in_turn() else jax.vmap(one), states, num)

    return algorithm._program("many runs", advance, keep=not effects.handlers_are_active())


def _in_turn() -> bool:
    """Whether the runs make their updates one after the other."""
    return jax.default_backend() == "cpu"


def _split_params(algorithm: Any, plan: Plan, rng_key: Array, init_params: Params | None) -> list[Params]:
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


def _ranked(algorithm: Any, plan: Plan, results: list[RunResult], paths: Params, rng_key: Array) -> RunResult:
    """The best of the runs, with all of them."""
    likelihood = getattr(algorithm, "objective", None)
    interrupted = any(result.status is Status.INTERRUPTED for result in results)
    if isinstance(likelihood, MarginalLikelihood | None) and not interrupted:
        losses, errors = np.transpose([_judged(algorithm, plan, result, rng_key) for result in results])
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
        r_hat=jax.tree.map(r_hat, paths),
        spread=jax.tree.map(spread, *(result.params for result in results)),
    )
    return results[best]._replace(runs=runs)


def _judged(algorithm: Any, plan: Plan, result: RunResult, rng_key: Array) -> tuple[float, float]:
    """Minus the log evidence at an estimate, and its error; the running one has other errors from start to start."""
    state = result.state
    target = make_target(algorithm.model, *join_arguments(plan.arrays, plan.static))
    start = Start(algorithm._program, plan.static, plan.arrays, target, state.theta)
    cloud = Cloud(state.points.x, state.log_weights, state.blocks)
    kernel = getattr(algorithm, "kernel", None)
    found = explore(
        rng_key,
        start,
        result.params,
        cloud,
        kernel if isinstance(kernel, InvariantKernel) else HMC(),
        init_strategy=getattr(algorithm, "init_strategy", None),
    )
    return -found.log_evidence, found.std


def _describe(records: Any) -> str:
    """The text behind the bar."""
    diagnostics = records[0]
    losses = diagnostics["loss"][-1]
    parts = [f"losses {np.min(losses):.4g} to {np.max(losses):.4g}"]
    for name, title in (("ess", "ess"), ("acceptance_rate", "accept")):
        if name in diagnostics:
            parts.append(f"{title} {np.mean(diagnostics[name]):.2f}")
    return ", ".join(parts)
