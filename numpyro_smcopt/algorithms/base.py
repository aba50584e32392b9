# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What the algorithms share: SVI's methods around a pure step.

An algorithm says how to start (`_begin`), how to adopt new data (`_adopt`), what may be controlled (`_controls`) and
how to step (`_step`); all four are pure functions of a target and a state. This file binds the model to its arguments,
compiles, announces sites, runs, and turns particles into samples.
"""

import abc
import contextlib
import json
import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import effects, loop
from numpyro_smcopt.algorithms import budget, faults, many_runs
from numpyro_smcopt.algorithms.gradients import surroundings
from numpyro_smcopt.algorithms.journal import Journal, check_path
from numpyro_smcopt.algorithms.particles import equal_draws, one_draw
from numpyro_smcopt.algorithms.programs import Program
from numpyro_smcopt.algorithms.start import Rehearsal, Start
from numpyro_smcopt.blocks import Blocks, add_up
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.checkpoint import Saved, digest, restore, without_addresses
from numpyro_smcopt.convergence import EarlyStop, look
from numpyro_smcopt.kernels import HMC, InvariantKernel
from numpyro_smcopt.reporting.assembly import make_report
from numpyro_smcopt.reporting.exploration import (
    Cloud,
    Exploration,
    LaplacePoint,
    explore,
    find_frame,
    laplace_at,
)
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.target import (
    StaticArguments,
    SVIView,
    Target,
    as_array,
    axis_names,
    check_init_params,
    check_key,
    check_start,
    fingerprint,
    join_arguments,
    make_svi_view,
    make_target,
    observed_data,
    pointwise_log_likelihood,
    split_arguments,
    strong,
)
from numpyro_smcopt.theta_step import FisherState, NaturalState, inverse_metric
from numpyro_smcopt.types import Array, Model, Params, Theta
from numpyro_smcopt.uncertainty import Information

FLOOR = 0.1  # smallest eigenvalue of the observed information relative to the complete one
LARGEST_TRAJECTORY = 20_000  # coordinates of theta up to which `run` records the iterates
_NO_SETTINGS = ("model", "handlers", "static_kwargs", "_programs", "_seen")  # attributes that are no settings


class ParticleAlgorithm(abc.ABC):
    """The common face of the algorithms; see the subclasses for what each minimises and how.

    Args:
        model: A callable with NumPyro primitives.
        handlers: NumPyro handlers that see the sites of every update.
        static_kwargs: Keyword arguments of the model that stay fixed.
    """

    def __init__(self, model: Model, handlers: Sequence[Any], static_kwargs: dict[str, Any]) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable with NumPyro primitives, got {type(model).__name__}.")
        self.model = model
        self.handlers = effects.check_handlers(handlers)
        self.static_kwargs = dict(static_kwargs)
        self._programs: dict[Any, Program] = {}
        self._seen: tuple[list[Array], StaticArguments] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but compiled programs and remembered data."""
        return {**self.__dict__, "_programs": {}, "_seen": None}

    _state_type: type  # of the states of the algorithm

    # -- what an algorithm must say -----------------------------------------------------------------------------------
    @abc.abstractmethod
    def _begin(self, rng_key: Array, start: Start) -> Any:
        """The first state; eager, may compile programs through ``start``."""

    @abc.abstractmethod
    def _adopt(self, target: Target, state: Any, fingerprint: Array) -> Any:
        """The state under the data of ``target``, whose fingerprint is given."""

    @abc.abstractmethod
    def _controls(self, state: Any) -> dict[str, Any]:
        """Values that handlers may replace, by site name: arrays, and functions that a step is compiled with."""

    @abc.abstractmethod
    def _step(self, target: Target, state: Any, controls: dict[str, Any]) -> Any:
        """One update; ``diagnostics`` of the new state are announced, and those that are scalars recorded."""

    @abc.abstractmethod
    def _report_faults(self, state: Any, diagnostics: dict[str, Array]) -> Status:
        """Warn about what went wrong in a run, and say how it ended."""

    def _early_faults(self, state: Any, diagnostics: dict[str, Array]) -> list[str | None]:
        """What can be known to be wrong after `faults.LAST_LOOK` updates, so that a run need not end before it is told.

        Told once: then, or at the end of a run that is shorter.
        """
        del state, diagnostics
        return []

    def _attached(self) -> Any:
        """Arrays (a pytree) that belong to the algorithm itself; programs get them traced, as ``target.attached``."""
        return ()

    # -- SVI's methods ------------------------------------------------------------------------------------------------
    @effects.unkeyed
    def init(self, rng_key: Array, *args: Any, init_params: Params | None = None, **kwargs: Any) -> Any:
        """The state at the start.

        Args:
            rng_key: Randomness.
            *args: Arguments of the model.
            init_params: Constrained values of param sites to start from, as in `numpyro.infer.SVI`.
            **kwargs: Keyword arguments of the model.

        Raises:
            ValueError: If the model or a starting value cannot be used; the message names the site.
        """
        check_key(rng_key)
        arrays, static = self._bind(args, kwargs)
        return self._init(rng_key, arrays, static, init_params)

    def _init(
        self,
        rng_key: Array,
        arrays: list[Array],
        static: StaticArguments,
        init_params: Params | None,
        foresee: Callable[[Any], None] = lambda state: None,
    ) -> Any:
        """`init`, which tells ``foresee`` the shapes and types of the state as soon as they are known."""
        target = self._target(arrays, static)
        self._check_model(target)
        init_params = {} if init_params is None else init_params
        check_init_params(target.sites.params, init_params)
        init_params = jax.tree.map(as_array, init_params)

        read = self._program("read", _read)(static, arrays, rng_key, init_params, arrays)
        check_start(read.params, read.theta)
        state = self._begin(read.rng_key, Start(self._program, static, arrays, target, read.theta, foresee))
        return jax.tree.map(strong, self._introduced(state, read.fingerprint))

    def _introduced(self, state: Any, fingerprint: Array) -> Any:
        """A first state whose sites have been announced, so that handlers could bring their state."""
        with effects.Shell(self.handlers, None) as shell:
            shell.controls(self._controls(state))
            shell.diagnostics(state.diagnostics)
        return state._replace(mutable_state=shell.mutable_state(), fingerprint=fingerprint)

    @effects.unkeyed
    def update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """One step; a pure function of the state, whose data may differ from call to call.

        Args:
            state: The present state.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.

        Returns:
            The new state and the loss.

        Raises:
            ValueError: If the data do not fit the state (other shapes, or other dependences among the latents). Below a
                `jax.jit` of the user, where nothing can be raised, the loss is NaN and `get_params` raises.
        """
        self._check_state(state)
        arrays, static = self._bind(args, kwargs)

        def compiled(state: Any, controls: dict[str, Any]) -> Any:
            functions = {name: value for name, value in controls.items() if callable(value)}
            numbers = {name: value for name, value in controls.items() if name not in functions}

            def step(target: Target, state: Any, arrays: list[Array], numbers: dict[str, Array]) -> Any:
                return self._step_on_data(target, state, fingerprint(arrays), {**numbers, **functions})

            return self._program(("update", *functions.items()), step)(static, arrays, state, arrays, numbers)

        state = self._announced(compiled, state)
        self._refuse_wrong_blocks(state)
        return state, jnp.where(state.wrong_blocks, jnp.nan, state.diagnostics["loss"])

    def _step_on_data(self, target: Target, state: Any, fingerprint: Array, controls: dict[str, Any]) -> Any:
        """`_step` after the state has adopted the data, if they are new to it."""
        _refuse_foreign(target, state)
        state = state._replace(wrong_blocks=jnp.zeros_like(state.wrong_blocks))
        adopt = lambda state: jax.tree.map(strong, self._adopt(target, state, fingerprint))  # noqa: E731
        state = changed_if(fingerprint != state.fingerprint, adopt, state)
        # Under data that contradict the blocks nothing moves, so that right data may follow.
        return changed_if(
            state.wrong_blocks, lambda _: state, jax.tree.map(strong, self._step(target, state, controls))
        )

    def stable_update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """`update`, which already survives non-finite potentials and gradients; the name is SVI's."""
        return self.update(state, *args, **kwargs)

    def get_params(self, state: Any) -> Params:
        """The estimate in a state, on the constrained scale of the model."""
        self._check_state(state)
        self._refuse_wrong_blocks(state)
        return state.params

    @effects.unkeyed
    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: Any = None,
        init_params: Params | None = None,
        checkpoint: str | os.PathLike | None = None,
        checkpoint_every: int = 500,
        early_stop: bool | EarlyStop = False,
        num_runs: int = 1,
        **kwargs: Any,
    ) -> RunResult:
        """Start and update ``num_steps`` times.

        Args:
            rng_key: Randomness; not used if ``init_state`` is given.
            num_steps: How many updates; with ``early_stop``, at most.
            *args: Arguments of the model.
            progress_bar: Whether to show a bar.
            stable_update: Accepted for compatibility with SVI; updates are always stable.
            init_state: A state to go on from; for several runs a list, ``result.runs.states``.
            init_params: Constrained starting values of param sites; for several runs with or without a leading axis of
                length ``num_runs``, site by site.
            checkpoint: A file that is written at the start, every ``checkpoint_every`` updates and at the end; `resume`
                goes on from it, also in another process. One file holds all of several runs.
            checkpoint_every: Updates between two checkpoints.
            early_stop: Whether to end when nothing is left to be gained (status ``CONVERGED``), or an `EarlyStop` that
                says when that is. Off by default, so that a run is as long as it was asked to be, as in SVI.
            num_runs: How many independent runs are made at once, in one compiled program. They differ in their keys,
                ``random.split(rng_key, num_runs)``, hence in the starting values that a `numpyro.param` draws with its
                key, and in ``init_params`` with a leading axis. With ``early_stop`` they end when all have arrived.
            **kwargs: Keyword arguments of the model.

        Returns:
            The estimate, the last state, losses and diagnostics; of several runs those of the best, and all of them as
            ``runs``.

        Raises:
            ValueError: If an argument cannot be used; the message says which and what to do.
            OSError: If there is a file at ``checkpoint`` already, or it cannot be written.
        """
        del stable_update
        num_steps, checkpoint_every = positive("num_steps", num_steps), positive("checkpoint_every", checkpoint_every)
        num_runs = positive("num_runs", num_runs)
        if not isinstance(early_stop, bool | EarlyStop):
            raise TypeError(f"early_stop must be True, False or an EarlyStop, got {early_stop!r}.")
        stop = early_stop if isinstance(early_stop, EarlyStop) else EarlyStop() if early_stop else None
        if checkpoint is not None:
            check_path(checkpoint)
        if init_state is None or num_runs > 1 and rng_key is not None:
            check_key(rng_key)
        arrays, static = self._bind(args, kwargs)
        if num_runs > 1:
            plan = many_runs.Plan(num_runs, num_steps, static, arrays, progress_bar, stop)
            if init_state is None:
                states = many_runs.begin(self, plan, rng_key, init_params)
            else:
                states = [self._adopted(static, arrays, state) for state in several(init_state, num_runs)]
            ranking = random.key(0) if rng_key is None else rng_key
            journal = None
            if checkpoint is not None:
                identity = self._identity(static, arrays)
                journal = Journal(
                    checkpoint, checkpoint_every, identity, num_steps, stop=stop, num_runs=num_runs, ranking=ranking
                )
            return many_runs.live(self, plan, many_runs.stack(states), ranking, journal)
        if init_state is None:
            # A handler may keep a state of its own or replace controls: then nobody knows the state yet.
            plain = not self.handlers and not effects.handlers_are_active()
            prepare = lambda state: self._run_program().prepare(static, arrays, state, np.int32(1)) if plain else None  # noqa: E731
            state = self._init(rng_key, arrays, static, init_params, prepare)
        else:
            state = self._adopted(static, arrays, init_state)
        journal = None
        if checkpoint is not None:
            journal = Journal(checkpoint, checkpoint_every, self._identity(static, arrays), num_steps, stop=stop)
        return self._live(static, arrays, state, None, num_steps, journal, progress_bar, stop)

    @effects.unkeyed
    def resume(
        self,
        checkpoint: str | os.PathLike,
        *args: Any,
        num_steps: int | None = None,
        progress_bar: bool = True,
        **kwargs: Any,
    ) -> RunResult:
        """Go on with what was interrupted, in this process or another: equal, bit for bit, to a run that was not.

        Of several runs all go on; how many they are is in the file.

        Args:
            checkpoint: The file that `run` was given; it goes on being written.
            *args: Arguments of the model, the same as before.
            num_steps: Length of the whole run; by default, what `run` was asked for.
            progress_bar: Whether to show a bar.
            **kwargs: Keyword arguments of the model, the same as before.

        Returns:
            The result of the whole run, the part before the interruption included.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or was written with another model, other data or other settings.
        """
        arrays, static = self._bind(args, kwargs)
        identity = self._identity(static, arrays)
        journal, saved = Journal.read(checkpoint, identity)
        journal.num_steps = journal.num_steps if num_steps is None else positive("num_steps", num_steps)
        template = self._rehearsed(static, arrays, saved, journal.num_runs)
        state = jax.tree.map(jnp.asarray, restore(saved, "state", template))
        several = journal.num_runs > 1
        if several:
            recorded = many_runs.eval_records(self, static, arrays, state)
        else:
            recorded = self._run_program().eval_shape(static, arrays, state, np.int32(1))[1]
        records = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((-1, *leaf.shape[1:]), leaf.dtype), recorded)
        past = restore(saved, "records", records) if journal.done else None
        if several:
            plan = many_runs.Plan(journal.num_runs, journal.num_steps, static, arrays, progress_bar, journal.stop)
            return many_runs.live(self, plan, state, journal.ranking, journal, past)
        return self._live(static, arrays, state, past, journal.num_steps, journal, progress_bar, journal.stop)

    def _live(
        self,
        static: StaticArguments,
        arrays: list[Array],
        state: Any,
        past: Any,
        num_steps: int,
        journal: Journal | None,
        progress_bar: bool,
        stop: EarlyStop | None,
    ) -> RunResult:
        """Run to the end from a state and the records that led to it."""
        self._check_stop(stop, state)

        def arrived(state: Any, records: Any, done: int) -> bool:
            del done
            path = records[2]
            return stop is not None and stop.arrived(
                path["theta"], path["gradient"], self._inverse_information(static, arrays, state)
            )

        def look_early(state: Any, records: Any, done: int) -> bool:
            del done
            faults.warn_of(self._early_faults(state, records[0]))
            return False

        program, done = self._run_program(), 0 if journal is None else journal.done
        # The end of a short run has told it, if it is made longer.
        told = journal is not None and journal.ended and past is not None and any(self._early_faults(state, past[0]))
        # Both the warning and the decision come before the checkpoint, which then says that they were made.
        pauses: tuple[loop.Pause, ...] = (
            () if told else (loop.Pause(faults.LAST_LOOK, look_early, until=faults.LAST_LOOK),)
        )
        pauses += () if stop is None else (loop.Pause(stop.every, arrived),)
        pauses += () if journal is None else journal.begin(state)
        progress = loop.ProgressBar(num_steps, _describe, done) if progress_bar else loop.SilentProgress()
        state, records, status = loop.run_chunks(
            lambda state, num: program(static, arrays, state, num), state, num_steps, progress, past=past, pauses=pauses
        )
        if journal is not None:
            status = journal.end(state, records, len(records[0]["loss"]), status)
        return self._result(state, records, status, told)

    def _adopted(self, static: StaticArguments, arrays: list[Array], state: Any) -> Any:
        """A state to go on from, under the data."""
        self._check_state(state, "init_state")
        adopt = lambda target, state, arrays: self._adopt(target, state, fingerprint(arrays))  # noqa: E731
        adopted = self._program("adopt", adopt)(static, arrays, state, arrays)
        self._refuse_wrong_blocks(adopted)
        walk = getattr(adopted, "theta_state", None)
        other_data = np.any(np.asarray(adopted.fingerprint) != np.asarray(state.fingerprint))
        if other_data and isinstance(walk, NaturalState | FisherState):
            # Under other data theta sets out anew: at full speed, and its average forgets where it was before.
            none: Any = np.zeros_like(walk.reversals)  # of NumPy, so that nothing is compiled
            return adopted._replace(theta_state=walk._replace(reversals=none))
        return adopted

    def _check_state(self, state: Any, name: str = "state") -> None:
        """Refuse what is no state of this algorithm; the message says where it may be found."""
        if isinstance(state, self._state_type):
            return
        advice = ""
        if isinstance(state, RunResult):
            advice = " Pass result.state."
        elif isinstance(state, tuple) and any(isinstance(part, self._state_type) for part in state):
            advice = " Note that update returns a state and a loss."
        raise TypeError(
            f"{name} must be a state of {type(self).__name__}, as init and update return it, got "
            f"{type(state).__name__}.{advice}"
        )

    def _check_stop(self, stop: EarlyStop | None, state: Any) -> None:
        if stop is not None and "gradient" not in state.diagnostics:
            raise ValueError(
                "early_stop needs a marginal likelihood and its gradient, for at most "
                f"{budget.LARGEST_INFORMATION} parameters, which {type(self).__name__} does not announce here."
            )

    def _result(self, state: Any, records: Any, status: Status, told: bool = False) -> RunResult:
        """What a run returns; warns of what went wrong in it, unless its first updates have ``told`` it before."""
        diagnostics, trajectory, path = records
        if status is not Status.INTERRUPTED:
            if len(diagnostics["loss"]) < faults.LAST_LOOK and not told:
                faults.warn_of(self._early_faults(state, diagnostics))
            found = self._report_faults(state, diagnostics)
            status = status if found is Status.FINISHED else found
            if path and status is Status.FINISHED and getattr(state.theta_state, "metric", None) is not None:
                seen = look(path["theta"], path["gradient"], np.asarray(state.theta_state.metric))
                faults.warn_of([faults.theta_moves(seen)])
        return RunResult(self.get_params(state), state, diagnostics["loss"], diagnostics, status, trajectory)

    def _run_program(self) -> Program:
        """`loop.chunk` of announced steps, compiled; records are diagnostics and iterates."""

        def advance(target: Target, state: Any, num: Array) -> tuple[Any, Any]:
            return loop.chunk(lambda state: self._recorded_step(target, state), state, num)

        # A program traced under a handler of the user is thrown away: caches do not look at the handler stack.
        return self._program("run", advance, keep=not effects.handlers_are_active())

    def _recorded_step(self, target: Target, state: Any) -> tuple[Any, Any]:
        """An announced step; diagnostics, iterate, and what convergence is seen from."""
        _refuse_foreign(target, state)
        state = self._announced(lambda state, controls: self._step(target, state, controls), state)
        small = sum(leaf.size for leaf in jax.tree.leaves(state.theta)) <= LARGEST_TRAJECTORY
        scalars = {name: value for name, value in state.diagnostics.items() if value.ndim == 0}
        gradient = state.diagnostics.get("gradient")
        path = {} if gradient is None else {"theta": ravel_pytree(state.theta)[0], "gradient": gradient}
        return state, (scalars, target.constrain_params(state.theta) if small else {}, path)

    def _inverse_information(self, static: StaticArguments, arrays: list[Array], state: Any) -> np.ndarray:
        """[P, P] inverse observed information: what the step of theta knows, or from the particles."""
        metric = getattr(state.theta_state, "metric", None)
        if metric is None:

            def inverse(target: Target, state: Any) -> Array:
                flat, _ = ravel_pytree(state.theta)
                place = target, state.theta, flat, state.points, state.log_weights, state.blocks
                return inverse_metric(surroundings(*place, state.num_updates).information(), FLOOR)

            metric = self._program("information", inverse)(static, arrays, state)
        return np.asarray(metric, float)

    def _identity(self, static: StaticArguments, arrays: list[Array]) -> dict[str, Any]:
        """What must not change while a run is interrupted; JSON."""
        target = self._target(arrays, static)
        sites, start = target.sites, random.key(0)
        _, theta = self._program("theta", Target.initial_params).eval_shape(static, arrays, start, {})
        x = jax.ShapeDtypeStruct((sites.num_latents,), jnp.result_type(float))
        parts = {name: value for name, value in vars(self).items() if name not in _NO_SETTINGS}
        described = {
            "algorithm": type(self).__name__,
            "param sites": list(sites.params),
            "latent sites": {name: list(site.shape) for name, site in sites.latents.items()},
            "energy terms": {name: size for name, size, _ in sites.terms},
            "settings": {name: without_addresses(repr(value)) for name, value in parts.items()},
            "data": int(self._program("data", lambda target, arrays: fingerprint(arrays))(static, arrays, arrays)),
            "energy": digest(self._program("terms", Target.terms).trace(static, arrays, theta, x).jaxpr),
        }
        return json.loads(json.dumps(described))

    def _rehearsed(self, static: StaticArguments, arrays: list[Array], saved: Saved, num_runs: int) -> Any:
        """A state to which ``saved`` may be restored: shapes and types, which depend on the saved blocks and key."""
        target = self._target(arrays, static)
        rng_key = saved.arrays["['state'].rng_key"]
        rng_key = rng_key if num_runs == 1 else rng_key[0]
        fields: Any = [jnp.asarray(saved.arrays[f"['state'].blocks.{name}"]) for name in Blocks._fields[:-1]]
        blocks = add_up(Blocks(*fields), target.sites.term_shapes)
        _, theta = self._program("theta", Target.initial_params).eval_shape(static, arrays, rng_key, {})
        state = self._begin(rng_key, Rehearsal(self._program, static, arrays, target, theta, blocks=blocks))
        state = jax.eval_shape(lambda state: self._introduced(state, fingerprint(arrays)), state)
        return state if num_runs == 1 else many_runs.stacked_shapes(state, num_runs)._replace(blocks=state.blocks)

    # -- particles ----------------------------------------------------------------------------------------------------
    def get_samples(
        self, state: Any, *args: Any, rng_key: Array | None = None, num_samples: int | None = None, **kwargs: Any
    ) -> dict[str, Array]:
        """Equally weighted draws of the latents given the estimate: resampled, in random order, constrained.

        Args:
            state: A state.
            *args: Arguments of the model; may be left out if this object has seen them before.
            rng_key: Randomness of the resampling (default ``random.key(0)``).
            num_samples: How many draws (default: as many as there are particles).
            **kwargs: Keyword arguments of the model.

        Returns:
            ``{site: [num_samples, ...]}`` on the scale of the model, deterministic sites included.

        Raises:
            ValueError: If the model's arguments are not known, or ``num_samples`` is not a positive integer.
        """
        self._check_state(state)
        if rng_key is not None:
            check_key(rng_key)
        arrays, static = self._bind_again(args, kwargs)
        num = positive("num_samples", state.log_weights.shape[0] if num_samples is None else num_samples)

        def draw(target: Target, state: Any, key: Array) -> dict[str, Array]:
            x = equal_draws(key, state.points.x, state.log_weights, state.blocks, num)
            return jax.vmap(lambda one: target.constrain_latents(state.theta, one))(x)

        key = random.key(0) if rng_key is None else rng_key
        return self._program(("samples", num), draw)(static, arrays, state, key)

    def get_weighted_samples(self, state: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Array], Array]:
        """The weighted particles, constrained, and their normalised log weights ``[N]``.

        Where the latents fall into several independent blocks, every block has weights of its own and no weight
        belongs to a whole particle: then each block is resampled first, and the log weights are equal.

        Args:
            state: A state.
            *args: Arguments of the model; may be left out if this object has seen them before.
            **kwargs: Keyword arguments of the model.
        """
        self._check_state(state)
        if state.blocks.num_blocks > 1:
            samples = self.get_samples(state, *args, **kwargs)
            num = state.log_weights.shape[0]
            return samples, jnp.full(num, -jnp.log(num))
        arrays, static = self._bind_again(args, kwargs)
        constrain = lambda target, state: jax.vmap(lambda x: target.constrain_latents(state.theta, x))(  # noqa: E731
            state.points.x
        )
        return self._program("weighted", constrain)(static, arrays, state), state.log_weights[:, 0]

    def log_likelihood(self, params: Params, samples: dict[str, Array], *args: Any, **kwargs: Any) -> dict[str, Array]:
        """Log densities of the observations given draws of the latents, as `numpyro.infer.log_likelihood`.

        Args:
            params: The estimate, constrained.
            samples: Draws of all latent sites from `get_samples`, ``{site: [S, ...]}``.
            *args: Arguments of the model; may be left out if this object has seen them before.
            **kwargs: Keyword arguments of the model.

        Returns:
            ``{observed site: [S, ...]}``, one number per draw and batch element of the site.

        Raises:
            ValueError: If a latent site is missing, or the model has discrete latents.
        """
        arrays, static = self._bind_again(args, kwargs)
        return self._program("log_likelihood", pointwise_log_likelihood)(static, arrays, params, samples)

    def observed_data(self, params: Params, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The observations, ``{site: array}``; for ``params`` and the arguments see `log_likelihood`."""
        arrays, static = self._bind_again(args, kwargs)
        return self._program("observed", observed_data)(static, arrays, params)

    def axis_names(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Names of the axes of every site, which are those of its plates where it stands in plates."""
        arrays, static = self._bind_again(args, kwargs)
        return axis_names(make_target(self.model, *join_arguments(arrays, static)))

    def as_svi(self, state: Any, *args: Any, **kwargs: Any) -> SVIView:
        """The weighted particles in the shape of NumPyro's `SVI`, for what is written for guides.

        ``Predictive(model, guide=view.guide, params=params, num_samples=1000)`` then draws particles with their true
        weights (block by block, if there are several), and so does ArviZ's ``from_numpyro_svi(view, ...)``.

        Args:
            state: A state.
            *args: Arguments of the model; may be left out if this object has seen them before.
            **kwargs: Keyword arguments of the model.
        """
        self._check_state(state)
        arrays, static = self._bind_again(args, kwargs)
        target = self._target(arrays, static)

        def draw(rng_key: Array) -> dict[str, Array]:
            values = target.constrain_latents(
                state.theta, one_draw(rng_key, state.points.x, state.log_weights, state.blocks)
            )
            return {name: values[name] for name in target.sites.latents}

        return make_svi_view(self.model, self.get_params(state), draw)

    # -- report -------------------------------------------------------------------------------------------------------
    def summarize(self, rng_key: Array, state: Any, *args: Any, sandwich: bool = False, **kwargs: Any) -> Report:
        """What is to be reported of a fit: standard errors, Monte Carlo errors, intervals, log evidence, samples.

        Theta stays at the estimate; fresh particles are drawn there, so the numbers owe nothing to the path that led
        to it. See `report.Report` for what comes back, and its ``warnings`` for what may be wrong with it.

        Args:
            rng_key: Randomness.
            state: A state.
            *args: Arguments of the model; may be left out if this object has seen them before.
            sandwich: Whether to add a covariance that does not trust the model; it needs latents that fall into many
                independent blocks, or a model without latents.
            **kwargs: Keyword arguments of the model.

        Raises:
            ValueError: If the model's arguments are not known, or contradict the state; or if a sandwich is wanted and
                all latents depend on one another.
        """
        self._check_state(state)
        check_key(rng_key)
        self._refuse_wrong_blocks(state)
        if sandwich and state.blocks.num_blocks == 1 and state.points.x.shape[1]:
            raise ValueError(
                "A sandwich covariance needs independent units, but all latents of this model depend on one another. "
                "Leave sandwich=True out."
            )
        arrays, static = self._bind_again(args, kwargs)
        target = make_target(self.model, *join_arguments(arrays, static))
        start = Start(self._program, static, arrays, target, state.theta)
        cloud = Cloud(state.points.x, state.log_weights, state.blocks)
        kernel = getattr(self, "kernel", None)
        kernel = kernel if isinstance(kernel, InvariantKernel) else HMC()

        strategy = getattr(self, "init_strategy", None)

        frame = find_frame(rng_key, start, state.params, cloud, self._known_information(state))

        def explore_at(params: Params, continuous: bool) -> Exploration:
            return explore(
                rng_key,
                start,
                params,
                cloud,
                kernel,
                frame=frame,
                sandwich=sandwich,
                continuous=continuous,
                init_strategy=strategy,
            )

        def by_laplace(params: Params) -> LaplacePoint | str:
            return laplace_at(rng_key, start, params, cloud, frame, sandwich=sandwich)

        complete = None if frame is None else frame.complete
        return make_report(state.params, explore_at, by_laplace, target.sites.num_observations, complete)

    def _known_information(self, state: Any) -> Array | None:
        """[P, P] complete-data information that a state carries, if it does."""
        found = getattr(getattr(state, "theta_state", None), "information", None)
        return found.complete if isinstance(found, Information) else None

    # -- small print --------------------------------------------------------------------------------------------------
    def _check_model(self, target: Target) -> None:
        if not target.sites.params:
            latents = list(target.sites.latents)
            raise ValueError(
                "The model has no numpyro.param site, so there is nothing to estimate. Declare the parameters with "
                "numpyro.param, or turn latent sites into parameters with "
                f"numpyro_smcopt.latents_to_params(model, {latents[:1] or ['name']})."
            )
        unreached = target.unreached_params()
        if unreached:
            raise ValueError(
                f"Param site '{unreached[0]}' never reaches the density: no observed or latent site depends on it, "
                "so it cannot be estimated. Remove it, or use it in a distribution."
            )

    def _bind(self, args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
        arrays, static = split_arguments(args, {**self.static_kwargs, **kwargs})
        arrays = [*arrays, *jax.tree.leaves(self._attached())]
        if not any(isinstance(value, jax.core.Tracer) for value in arrays):
            self._seen = arrays, static
        return arrays, static

    def _target(self, arrays: list[Array], static: StaticArguments) -> Target:
        leaves, treedef = jax.tree.flatten(self._attached())
        own = len(arrays) - len(leaves)
        return make_target(
            self.model, *join_arguments(arrays[:own], static), attached=jax.tree.unflatten(treedef, arrays[own:])
        )

    def _bind_again(self, args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
        if args or kwargs:
            return self._bind(args, kwargs)
        if self._seen is None:
            with contextlib.suppress(TypeError, ValueError):
                make_target(self.model, (), self.static_kwargs)
                return self._bind((), {})
            raise ValueError(
                "This object has not seen the model's arguments yet (a restored state in a new object). Pass them "
                "behind the state: get_samples(state, *args, **kwargs)."
            )
        return self._seen

    def _program(self, name: Any, function: Callable, keep: bool = True) -> Program:
        """``function(target, *arguments)`` compiled as ``(static, arrays, *arguments)``; arrays are traced."""
        if keep and name in self._programs:
            return self._programs[name]

        def bound(static: StaticArguments, arrays: list[Array], *arguments: Any) -> Any:
            return function(self._target(arrays, static), *arguments)

        program = Program(bound)
        if keep:
            self._programs[name] = program
        return program

    def _announced(self, step: Callable[[Any, dict[str, Any]], Any], state: Any) -> Any:
        """Announce the control sites, step, announce the diagnostic sites."""
        with effects.Shell(self.handlers, state.mutable_state) as shell:
            new = step(state, shell.controls(self._controls(state)))
            shell.diagnostics(new.diagnostics)
        new = new._replace(mutable_state=shell.mutable_state())
        return jax.tree.map(strong, new)

    def _refuse_wrong_blocks(self, state: Any) -> None:
        if not isinstance(state.wrong_blocks, jax.core.Tracer) and bool(state.wrong_blocks):
            raise ValueError(
                "With these data the latents depend on one another in another way than with the data that the state "
                "was started from (another grouping, for instance), so its independent blocks would be wrong. Start "
                "anew with init, or use partition=numpyro_smcopt.one_block."
            )


def _refuse_foreign(target: Target, state: Any) -> None:
    """Raise if a state belongs to another model; costs nothing in a compiled program."""
    if sorted(state.theta) != sorted(target.sites.params):
        raise ValueError(
            f"The state has the parameters {sorted(state.theta)}, but the model has {sorted(target.sites.params)}. "
            "Start anew with init."
        )


class _Read(NamedTuple):
    """What one look at the model tells: starting values, constrained and not, the next key, and the data's mark."""

    params: Params
    theta: Theta
    rng_key: Array
    fingerprint: Array


def _read(target: Target, rng_key: Array, init_params: Params, arrays: list[Array]) -> _Read:
    key_params, key_begin = random.split(rng_key)
    return _Read(*target.initial_params(key_params, init_params), key_begin, fingerprint(arrays))


def _describe(records: Any) -> str:
    diagnostics = records[0]
    parts = [f"loss {diagnostics['loss'][-1]:.4g}"]
    if "ess" in diagnostics:
        parts.append(f"ess {np.mean(diagnostics['ess']):.2f}")
    if "acceptance_rate" in diagnostics:
        parts.append(f"accept {np.mean(diagnostics['acceptance_rate']):.2f}")
    return ", ".join(parts)


def several(states: Any, num_runs: int) -> list[Any]:
    """A list of states, one per run, or a ValueError."""
    if not isinstance(states, list | tuple) or hasattr(states, "_fields") or len(states) != num_runs:
        got = f"{len(states)} of them" if isinstance(states, list) else type(states).__name__
        raise ValueError(
            f"init_state must be a list of {num_runs} states, one per run, such as result.runs.states; got {got}."
        )
    return list(states)


def whole_or_none(name: str, number: Any) -> int | None:
    """`positive`, or None where the algorithm is to choose."""
    return None if number is None else positive(name, number)


def check_functions(**arguments: Any) -> None:
    """Refuse arguments that are neither None nor functions; a TypeError names the argument."""
    for name, value in arguments.items():
        if value is not None and not callable(value):
            raise TypeError(f"{name} must be a function, got {value!r}.")


def check_number(name: str, value: Any) -> None:
    """Refuse what is no real number; a TypeError names the argument."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        raise TypeError(f"{name} must be a number, got {value!r}.")


def positive(name: str, number: Any) -> int:
    """A positive integer, or a ValueError that names the argument."""
    if isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 1:
        shape = getattr(number, "shape", ())
        got = f"an array of shape {shape}" if shape else repr(number)  # data, where the number was left out
        raise ValueError(f"{name} must be a positive integer, got {got}.")
    return int(number)
