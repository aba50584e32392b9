# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A run, or several at once: from first states, or states to go on from, through the updates to what is returned.

One run is R runs with R = 1, see `run_axis`. A record of an update is a triple: the scalars among its diagnostics, the
constrained iterate, and the path that convergence is seen from (unconstrained iterate and gradient); the latter two are
empty where theta is too large.
"""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import effects, faults
from numpyro_smcopt.dispersal import Elsewhere
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.gradients import step_context
from numpyro_smcopt.potential import Target
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.runs import loop
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.checkpoint import RunSettings
from numpyro_smcopt.runs.compilation import Program
from numpyro_smcopt.runs.convergence import look, theta_moves
from numpyro_smcopt.runs.dispersed_start import start_dispersed
from numpyro_smcopt.runs.first_state import split_init_params, start
from numpyro_smcopt.runs.ranking import rank
from numpyro_smcopt.runs.run_axis import RunAxis
from numpyro_smcopt.runs.update import adopt, announce_step, check_model_of
from numpyro_smcopt.theta_step import inverse_metric
from numpyro_smcopt.types import Array, Params

FLOOR = 0.1  # smallest eigenvalue of the observed information relative to the complete one
LARGEST_TRAJECTORY = 20_000  # coordinates of theta up to which the iterates are recorded


class Driver:
    """Makes the runs of an algorithm; "state" and "records" are those of all of them.

    Args:
        algorithm: What runs.
        bound: The model with its data.
        settings: What was asked for.
    """

    def __init__(self, algorithm: Algorithm, bound: BoundTarget, settings: RunSettings) -> None:
        self.algorithm, self.bound, self.settings = algorithm, bound, settings
        self.axis = RunAxis(settings.num_runs)

    # -- states to run from -------------------------------------------------------------------------------------------
    def start(self, rng_key: Array, init_params: Params | None) -> Any:
        """The first state; the one of run k is that of a single run with the k-th of the split keys.

        Run 0 starts where a single run would. Starting values of the others that would be the same are dispersed around
        them, if a warm start tells how far, and no value was given for each run.

        Args:
            rng_key: Randomness.
            init_params: Constrained starting values, of the shape of their site or with a leading axis of R.

        Raises:
            ValueError: If a run cannot start; of several, a note says which.
        """
        states = self._start_all(rng_key, init_params, double=False)
        # All have the precision that one of them needs.
        if len({state.blocks.sums.double for state in states}) > 1:
            states = self._start_all(rng_key, init_params, double=True)
        return self.axis.stack(states)

    def _start_all(self, rng_key: Array, init_params: Params | None, double: bool) -> list[Any]:
        num_runs, states = self.settings.num_runs, []
        starts = split_init_params(self.bound, rng_key, init_params, num_runs)
        # A handler may keep a state of its own or replace controls: then nobody knows the state before it is made.
        plain = not self.algorithm.handlers and not effects.handlers_are_active()
        apart = any(a is not b for a, b in zip(*(jax.tree.leaves(starts[k]) for k in (0, -1)), strict=True))
        bound = self.bound.looking(Elsewhere(0) if apart else Elsewhere())
        keys = self.axis.split(rng_key)
        for k, key in enumerate(keys):
            try:
                if k == 0:
                    foresee = self._prepare if plain else None
                    states.append(start(self.algorithm, bound, key, starts[0], foresee, double))
                else:
                    around = None if apart else bound.elsewhere.around
                    states.append(start_dispersed(self.algorithm, bound, keys, k, starts[k], around, double))
            except ValueError as error:
                if num_runs > 1:
                    error.add_note(f"This was the start of run {k} of {num_runs}, which are counted from 0.")
                raise
        return states

    def adopt(self, init_state: Any) -> Any:
        """The state that a user gave to go on from, under the data."""
        return self.axis.stack([adopt(self.algorithm, self.bound, one) for one in self.axis.listed(init_state)])

    # -- updates ------------------------------------------------------------------------------------------------------
    def _program(self) -> Program:
        """`loop.chunk` of recorded updates, compiled; the partition stays outside of the loop."""
        algorithm, axis = self.algorithm, self.axis  # the program outlives the driver and its data

        def advance(target: Target, blocks: Any, state: Any, num: Array) -> tuple[Any, Any]:
            def one(state: Any) -> tuple[Any, Any]:
                state, record = recorded_step(algorithm, target, state._replace(blocks=blocks))
                return state._replace(blocks=None), record

            return loop.chunk(axis.each(one), state, num)

        # A program traced under a handler of the user is thrown away: caches do not look at the handler stack.
        name = "run", self.settings.num_runs == 1
        return self.bound.programs(name, advance, keep=not effects.handlers_are_active(), often=True)

    def _arguments(self, state: Any, num: Any) -> tuple:
        return self.bound.static, self.bound.arrays, state.blocks, state._replace(blocks=None), num

    def _prepare(self, state: Any) -> None:
        """Compile in the background, for a state of one run of which shapes and types are known."""
        self._program().prepare(*self._arguments(self.axis.stacked_shapes(state), np.int32(1)))

    def shapes_of_records(self, state: Any) -> Any:
        """Shapes and types of the records of a chunk."""
        return self._program().eval_shape(*self._arguments(state, np.int32(1)))[1]

    # -- the run ------------------------------------------------------------------------------------------------------
    def run(
        self,
        state: Any,
        progress_bar: bool,
        write: Callable[..., None] | None = None,
        past: Any = None,
        past_status: Status | None = None,
    ) -> RunResult:
        """Update until the end, and between the updates warn, decide whether to stop, and write checkpoints.

        Args:
            state: Where to start.
            progress_bar: Whether to show a bar.
            write: Writes a checkpoint of ``(state, records, status)``, if there are to be any.
            past: Records of the updates that led to ``state``, if the run goes on.
            past_status: How it ended before, if it did.
        """
        settings, num_past = self.settings, 0 if past is None else _length(past)
        self._check_early_stop(state)
        program = self._program()

        def run_chunk(state: Any, num: Array) -> tuple[Any, Any]:
            without, records = program(*self._arguments(state, num))
            return without._replace(blocks=state.blocks), records

        warn_early = lambda state, records: faults.warn_of(self._early_faults(state, records))  # noqa: E731
        # The end of a short run has told it, if it is made longer.
        ended = past_status not in (None, Status.INTERRUPTED)
        told = ended and past is not None and bool(self._early_faults(state, past))
        # Both the warning and the decision come before the checkpoint, which then says that they were made.
        pauses = [] if told else [loop.Pause(faults.LAST_LOOK, warn_early, until=faults.LAST_LOOK)]
        if settings.early_stop is not None:
            pauses.append(loop.Pause(settings.early_stop.every, self._has_arrived))
        if write is not None:
            pauses.append(loop.Pause(settings.checkpoint_every, write))
            if past is None:
                write(state)
        bar = loop.ProgressBar(settings.num_steps, _describe, num_past, progress_bar)
        state, records, status = loop.run_chunks(run_chunk, state, settings.num_steps, bar, past=past, pauses=pauses)
        if past_status is Status.CONVERGED and _length(records) == num_past:
            status = past_status  # nothing was left to be done
        if write is not None:
            write(state, records, status)
        return self._result(state, records, status, told)

    def _check_early_stop(self, state: Any) -> None:
        """Refuse to stop early where it cannot be seen whether theta has arrived."""
        if self.settings.early_stop is not None and "gradient" not in state.diagnostics:
            raise ValueError(
                "early_stop needs a marginal likelihood and its gradient, for at most "
                f"{budget.LARGEST_INFORMATION} parameters, which {type(self.algorithm).__name__} does not announce "
                "here."
            )

    def _apart(self, state: Any, records: Any) -> list[tuple[Any, Any]]:
        """State and records of every run."""
        runs = range(self.settings.num_runs)
        return [(self.axis.state_of(k, state), self.axis.records_of(k, records)) for k in runs]

    def _early_faults(self, state: Any, records: Any) -> list[str]:
        found = [self.algorithm.early_faults(one, own[0]) for one, own in self._apart(state, records)]
        return [message for k, messages in enumerate(found) for message in self.axis.name(k, messages)]

    def _has_arrived(self, state: Any, records: Any) -> bool:
        """True if all runs may end."""
        stop = self.settings.early_stop
        return stop is not None and all(
            stop.arrived(path["theta"], path["gradient"], self._inverse_information(one))
            for one, (_, _, path) in self._apart(state, records)
        )

    def _inverse_information(self, state: Any) -> np.ndarray:
        """[P, P] inverse observed information: what the step of theta knows, or from the particles."""
        metric = getattr(state.theta_state, "metric", None)
        if metric is None:

            def inverse(target: Target, state: Any) -> Array:
                flat, _ = ravel_pytree(state.theta)
                place = target, state.theta, flat, state.points, state.log_weights, state.blocks
                return inverse_metric(step_context(*place, state.num_updates).information(), FLOOR)

            metric = self.bound.call("information", inverse, state)
        return np.asarray(metric, float)

    # -- what comes back ----------------------------------------------------------------------------------------------
    def _result(self, state: Any, records: Any, status: Status, told: bool) -> RunResult:
        results = []
        for k, (one, own) in enumerate(self._apart(state, records)):
            messages, ended = self._judge(one, own, status, told)
            faults.warn_of(self.axis.name(k, messages))
            diagnostics, trajectory, _ = own
            results.append(RunResult(one.params, one, diagnostics["loss"], diagnostics, ended, trajectory))
        if self.settings.num_runs == 1:
            return results[0]
        return rank(self.algorithm, self.bound, self.settings.ranking_key, results, records[1])

    def _judge(self, state: Any, records: Any, status: Status, told: bool) -> tuple[list[str | None], Status]:
        """Faults of one run, unless they were told before, and its status."""
        if status is Status.INTERRUPTED:
            return [], status
        diagnostics, _, path = records
        messages: list[str | None] = []
        if _length(records) < faults.LAST_LOOK and not told:
            messages += self.algorithm.early_faults(state, diagnostics)
        found, ended = self.algorithm.faults(state, diagnostics)
        messages += found
        status = status if ended is Status.FINISHED else ended
        if path and status is Status.FINISHED and getattr(state.theta_state, "metric", None) is not None:
            seen = look(path["theta"], path["gradient"], np.asarray(state.theta_state.metric))
            messages.append(theta_moves(seen))
        return messages, status


def recorded_step(algorithm: Algorithm, target: Target, state: Any) -> tuple[Any, Any]:
    """An announced step of one run, and its record."""
    check_model_of(target, state)
    state = announce_step(algorithm, lambda state, controls: algorithm.step(target, state, controls), state)
    small = sum(leaf.size for leaf in jax.tree.leaves(state.theta)) <= LARGEST_TRAJECTORY
    scalars = {name: value for name, value in state.diagnostics.items() if value.ndim == 0}
    gradient = state.diagnostics.get("gradient")
    path = {} if gradient is None else {"theta": ravel_pytree(state.theta)[0], "gradient": gradient}
    return state, (scalars, target.constrain_params(state.theta) if small else {}, path)


def _length(records: Any) -> int:
    return len(records[0]["loss"])


def _describe(records: Any) -> str:
    """The text behind the bar."""
    diagnostics, _, _ = records
    losses = np.ravel(diagnostics["loss"][-1])
    shown = f"loss {losses[0]:.4g}" if len(losses) == 1 else f"losses {np.min(losses):.4g} to {np.max(losses):.4g}"
    named = (("ess", "ess"), ("acceptance_rate", "accept"))
    means = [f"{title} {np.mean(diagnostics[name]):.2f}" for name, title in named if name in diagnostics]
    return ", ".join([shown, *means])
