# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A run: from a first state, or one to go on from, through its updates to what it returns.

A record of an update is a triple: the scalars among its diagnostics, the constrained iterate, and the path that
convergence is seen from (unconstrained iterate and gradient); the latter two are empty where theta is too large.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import effects, faults
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.gradients import step_context
from numpyro_smcopt.population.start import Start
from numpyro_smcopt.potential import (
    StaticArguments,
    Target,
    as_array,
    check_init_params,
    check_start,
    fingerprint,
    strong,
)
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.runs import loop
from numpyro_smcopt.runs.algorithm import Algorithm, refuse_foreign
from numpyro_smcopt.runs.compilation import Program
from numpyro_smcopt.runs.convergence import EarlyStop, look, theta_moves
from numpyro_smcopt.runs.journal import Journal
from numpyro_smcopt.theta_step import inverse_metric
from numpyro_smcopt.types import Array, Params, Theta

FLOOR = 0.1  # smallest eigenvalue of the observed information relative to the complete one
LARGEST_TRAJECTORY = 20_000  # coordinates of theta up to which the iterates are recorded


class Plan(NamedTuple):
    """What is to be run; the names are those of `ParticleAlgorithm.run`.

    Attributes:
        num_runs: K, see `many_runs` if there are several.
        num_steps: Updates of every run.
        static: Static arguments of the model.
        arrays: Its traced arguments.
        progress_bar: Whether to show a bar.
        stop: When to end before.
        ranking: Key of the ranking of several runs.
    """

    num_runs: int
    num_steps: int
    static: StaticArguments
    arrays: list[Array]
    progress_bar: bool
    stop: EarlyStop | None
    ranking: Any = None


# -- states to run from --------------------------------------------------------------------------------------------
class _Read(NamedTuple):
    """What one look at the model tells: starting values, constrained and not, the next key, and the data's mark."""

    params: Params
    theta: Theta
    rng_key: Array
    fingerprint: Array


def _read(target: Target, rng_key: Array, init_params: Params, arrays: list[Array]) -> _Read:
    key_params, key_begin = random.split(rng_key)
    return _Read(*target.initial_params(key_params, init_params), key_begin, fingerprint(arrays))


def first_state(
    algorithm: Algorithm,
    arrays: list[Array],
    static: StaticArguments,
    rng_key: Array,
    init_params: Params | None,
    foresee: Callable[[Any], None] = lambda state: None,
) -> Any:
    """The state at the start; ``foresee`` is told its shapes and types as soon as they are known.

    Raises:
        ValueError: If the model or a starting value cannot be used; the message names the site.
    """
    target = algorithm._target(arrays, static)
    algorithm._check_model(target)
    init_params = {} if init_params is None else init_params
    check_init_params(target.sites.params, init_params)
    init_params = jax.tree.map(as_array, init_params)

    read = algorithm._program("read", _read)(static, arrays, rng_key, init_params, arrays)
    check_start(read.params, read.theta)
    state = algorithm._begin(read.rng_key, Start(algorithm._program, static, arrays, target, read.theta, foresee))
    return jax.tree.map(strong, algorithm._introduced(state, read.fingerprint))


def begin(algorithm: Algorithm, plan: Plan, rng_key: Array, init_params: Params | None) -> Any:
    """`first_state`, while the program of the run is compiled in the background."""
    # A handler may keep a state of its own or replace controls: then nobody knows the state yet.
    plain = not algorithm.handlers and not effects.handlers_are_active()

    def prepare(state: Any) -> None:
        if plain:
            _program(algorithm).prepare(plan.static, plan.arrays, state, np.int32(1))

    return first_state(algorithm, plan.arrays, plan.static, rng_key, init_params, prepare)


def adopted(algorithm: Algorithm, plan: Plan, state: Any) -> Any:
    """A state to go on from, under the data."""
    algorithm._check_state(state, "init_state")
    adopt = lambda target, state, arrays: algorithm._adopt(target, state, fingerprint(arrays))  # noqa: E731
    adopted = algorithm._program("adopt", adopt)(plan.static, plan.arrays, state, plan.arrays)
    algorithm._refuse_wrong_blocks(adopted)
    anew = getattr(getattr(adopted, "theta_state", None), "anew", None)
    other_data = np.any(np.asarray(adopted.fingerprint) != np.asarray(state.fingerprint))
    return adopted if anew is None or not other_data else adopted._replace(theta_state=anew())


# -- updates -------------------------------------------------------------------------------------------------------
def recorded_step(algorithm: Algorithm, target: Target, state: Any) -> tuple[Any, Any]:
    """An announced step and its record."""
    refuse_foreign(target, state)
    state = algorithm._announced(lambda state, controls: algorithm._step(target, state, controls), state)
    small = sum(leaf.size for leaf in jax.tree.leaves(state.theta)) <= LARGEST_TRAJECTORY
    scalars = {name: value for name, value in state.diagnostics.items() if value.ndim == 0}
    gradient = state.diagnostics.get("gradient")
    path = {} if gradient is None else {"theta": ravel_pytree(state.theta)[0], "gradient": gradient}
    return state, (scalars, target.constrain_params(state.theta) if small else {}, path)


def _program(algorithm: Algorithm) -> Program:
    """`loop.chunk` of recorded steps, compiled."""

    def advance(target: Target, state: Any, num: Array) -> tuple[Any, Any]:
        return loop.chunk(lambda state: recorded_step(algorithm, target, state), state, num)

    # A program traced under a handler of the user is thrown away: caches do not look at the handler stack.
    return algorithm._program("run", advance, keep=not effects.handlers_are_active())


def eval_records(algorithm: Algorithm, plan: Plan, state: Any) -> Any:
    """Shapes and types of the records of a chunk."""
    return _program(algorithm).eval_shape(plan.static, plan.arrays, state, np.int32(1))[1]


# -- to the end ----------------------------------------------------------------------------------------------------
class Watch(NamedTuple):
    """What is looked at while a run goes on; of several runs, at all of them.

    Attributes:
        early_faults: ``(state, records)`` to what can be known to be wrong after `faults.LAST_LOOK` updates.
        arrived: ``(state, records)`` to whether the run may end.
        describe: Records of a chunk to the text behind the bar.
    """

    early_faults: Callable[[Any, Any], list[str | None]]
    arrived: Callable[[Any, Any], bool]
    describe: Callable[[Any], str]


class Ended(NamedTuple):
    """A run that is over: its last state and records, how it ended, and whether early faults were told before it."""

    state: Any
    records: Any
    status: Status
    told: bool


def until_the_end(
    plan: Plan,
    run_chunk: Callable[[Any, Any], tuple[Any, Any]],
    state: Any,
    watch: Watch,
    journal: Journal | None = None,
    past: Any = None,
) -> Ended:
    """Update, and between the updates warn, decide whether to stop, and write checkpoints.

    Args:
        plan: What is to be run.
        run_chunk: See `loop.run_chunks`.
        state: Where to start.
        watch: What is looked at.
        journal: Writes the checkpoints, if there are to be any.
        past: Records of the updates that led to ``state``, if the run goes on.
    """

    def look_early(state: Any, records: Any, done: int) -> bool:
        del done
        faults.warn_of(watch.early_faults(state, records))
        return False

    # The end of a short run has told it, if it is made longer.
    told = journal is not None and journal.ended and past is not None and any(watch.early_faults(state, past))
    # Both the warning and the decision come before the checkpoint, which then says that they were made.
    pauses = [] if told else [loop.Pause(faults.LAST_LOOK, look_early, until=faults.LAST_LOOK)]
    if plan.stop is not None:
        pauses.append(loop.Pause(plan.stop.every, lambda state, records, done: watch.arrived(state, records)))
    if journal is not None:
        pauses.extend(journal.begin(state))
    done = 0 if journal is None else journal.done
    progress = loop.ProgressBar(plan.num_steps, watch.describe, done) if plan.progress_bar else loop.SilentProgress()
    state, records, status = loop.run_chunks(run_chunk, state, plan.num_steps, progress, past=past, pauses=pauses)
    if journal is not None:
        status = journal.end(state, records, len(records[0]["loss"]), status)
    return Ended(state, records, status, told)


def live(algorithm: Algorithm, plan: Plan, state: Any, journal: Journal | None = None, past: Any = None) -> RunResult:
    """Run to the end; arguments as for `until_the_end`."""
    check_stop(algorithm, plan, state)
    program = _program(algorithm)

    def run_chunk(state: Any, num: Array) -> tuple[Any, Any]:
        return program(plan.static, plan.arrays, state, num)

    def early_faults(state: Any, records: Any) -> list[str | None]:
        diagnostics, _, _ = records
        return algorithm._early_faults(state, diagnostics)

    def arrived(state: Any, records: Any) -> bool:
        return has_arrived(algorithm, plan, state, records)

    ended = until_the_end(plan, run_chunk, state, Watch(early_faults, arrived, _describe), journal, past)
    return result_of(algorithm, ended)


def check_stop(algorithm: Algorithm, plan: Plan, state: Any) -> None:
    """Refuse to stop early where it cannot be seen whether theta has arrived."""
    if plan.stop is not None and "gradient" not in state.diagnostics:
        raise ValueError(
            "early_stop needs a marginal likelihood and its gradient, for at most "
            f"{budget.LARGEST_INFORMATION} parameters, which {type(algorithm).__name__} does not announce here."
        )


def has_arrived(algorithm: Algorithm, plan: Plan, state: Any, records: Any) -> bool:
    """Whether the run that led to a state may end."""
    _, _, path = records
    return plan.stop is not None and plan.stop.arrived(
        path["theta"], path["gradient"], _inverse_information(algorithm, plan, state)
    )


def _inverse_information(algorithm: Algorithm, plan: Plan, state: Any) -> np.ndarray:
    """[P, P] inverse observed information: what the step of theta knows, or from the particles."""
    metric = getattr(state.theta_state, "metric", None)
    if metric is None:

        def inverse(target: Target, state: Any) -> Array:
            flat, _ = ravel_pytree(state.theta)
            place = target, state.theta, flat, state.points, state.log_weights, state.blocks
            return inverse_metric(step_context(*place, state.num_updates).information(), FLOOR)

        metric = algorithm._program("information", inverse)(plan.static, plan.arrays, state)
    return np.asarray(metric, float)


def result_of(algorithm: Algorithm, ended: Ended) -> RunResult:
    """What a run returns; warns of what went wrong in it, unless that was told before."""
    state, status = ended.state, ended.status
    diagnostics, trajectory, path = ended.records
    if status is not Status.INTERRUPTED:
        if len(diagnostics["loss"]) < faults.LAST_LOOK and not ended.told:
            faults.warn_of(algorithm._early_faults(state, diagnostics))
        found = algorithm._report_faults(state, diagnostics)
        status = status if found is Status.FINISHED else found
        if path and status is Status.FINISHED and getattr(state.theta_state, "metric", None) is not None:
            seen = look(path["theta"], path["gradient"], np.asarray(state.theta_state.metric))
            faults.warn_of([theta_moves(seen)])
    return RunResult(state.params, state, diagnostics["loss"], diagnostics, status, trajectory)


def _describe(records: Any) -> str:
    """The text behind the bar."""
    diagnostics, _, _ = records
    parts = [f"loss {diagnostics['loss'][-1]:.4g}"]
    if "ess" in diagnostics:
        parts.append(f"ess {np.mean(diagnostics['ess']):.2f}")
    if "acceptance_rate" in diagnostics:
        parts.append(f"accept {np.mean(diagnostics['acceptance_rate']):.2f}")
    return ", ".join(parts)
