# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What an algorithm is to the code that runs it: four pure functions, and a model that is bound to data.

An algorithm says how to start (`_begin`), how to adopt new data (`_adopt`), what may be controlled (`_controls`) and
how to step (`_step`); all four are pure functions of a target and a state. `Algorithm` binds the model to its
arguments, compiles programs of a target, announces the sites of a step, and refuses states that are not its own.
What users call is made of that in `base`.
"""

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import jax

from numpyro_smcopt import effects
from numpyro_smcopt.population.start import Start
from numpyro_smcopt.potential import StaticArguments, Target, join_arguments, make_target, split_arguments, strong
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.runs.compilation import Program
from numpyro_smcopt.types import Array, Model


class Algorithm(abc.ABC):
    """The inner face of an algorithm, see the head of this file; `base.ParticleAlgorithm` is the outer one.

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

    # -- what an algorithm must say -----------------------------------------------------------------------------------
    _state_type: type  # of the states of the algorithm

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

    @abc.abstractmethod
    def _log_evidence_at(
        self, rng_key: Array, arrays: list[Array], static: StaticArguments, state: Any
    ) -> tuple[float, float]:
        """Log evidence at the estimate of a state, and its error; several runs are ranked by it."""

    # -- what it may say ----------------------------------------------------------------------------------------------
    def _early_faults(self, state: Any, diagnostics: dict[str, Array]) -> list[str | None]:
        """What can be known to be wrong after `faults.LAST_LOOK` updates, so that a run need not end before it is told.

        Told once: then, or at the end of a run that is shorter.
        """
        del state, diagnostics
        return []

    def _attached(self) -> Any:
        """Arrays (a pytree) that belong to the algorithm itself; programs get them traced, as ``target.attached``."""
        return ()

    def _known_information(self, state: Any) -> Array | None:
        """[P, P] complete-data information that a state carries, if it does."""
        found = getattr(getattr(state, "theta_state", None), "information", None)
        return None if found is None else found.complete

    def _check_model(self, target: Target) -> None:
        """Refuse a model in which there is nothing to estimate, or something that cannot be."""
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

    # -- the model and its arguments ----------------------------------------------------------------------------------
    def _bind(self, args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
        """The arguments of the model, those that are traced and those that are static."""
        arrays, static = split_arguments(args, {**self.static_kwargs, **kwargs})
        arrays = [*arrays, *jax.tree.leaves(self._attached())]
        if not any(isinstance(value, jax.core.Tracer) for value in arrays):
            self._seen = arrays, static
        return arrays, static

    def _bind_again(self, args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
        """`_bind`, where the arguments may be left out if they have been seen before."""
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

    def _target(self, arrays: list[Array], static: StaticArguments) -> Target:
        leaves, treedef = jax.tree.flatten(self._attached())
        own = len(arrays) - len(leaves)
        return make_target(
            self.model, *join_arguments(arrays[:own], static), attached=jax.tree.unflatten(treedef, arrays[own:])
        )

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

    # -- sites --------------------------------------------------------------------------------------------------------
    def _introduced(self, state: Any, fingerprint: Array) -> Any:
        """A first state whose sites have been announced, so that handlers could bring their state."""
        with effects.Shell(self.handlers, None) as shell:
            shell.controls(self._controls(state))
            shell.diagnostics(state.diagnostics)
        return state._replace(mutable_state=shell.mutable_state(), fingerprint=fingerprint)

    def _announced(self, step: Callable[[Any, dict[str, Any]], Any], state: Any) -> Any:
        """Announce the control sites, step, announce the diagnostic sites."""
        with effects.Shell(self.handlers, state.mutable_state) as shell:
            new = step(state, shell.controls(self._controls(state)))
            shell.diagnostics(new.diagnostics)
        new = new._replace(mutable_state=shell.mutable_state())
        return jax.tree.map(strong, new)

    # -- states that are refused --------------------------------------------------------------------------------------
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

    def _refuse_wrong_blocks(self, state: Any) -> None:
        """Raise if the data contradict the partition of a state, where that can be raised."""
        if not isinstance(state.wrong_blocks, jax.core.Tracer) and bool(state.wrong_blocks):
            raise ValueError(
                "With these data the latents depend on one another in another way than with the data that the state "
                "was started from (another grouping, for instance), so its independent blocks would be wrong. Start "
                "anew with init, or use partition=numpyro_smcopt.one_block."
            )


def refuse_foreign(target: Target, state: Any) -> None:
    """Raise if a state belongs to another model; costs nothing in a compiled program."""
    if sorted(state.theta) != sorted(target.sites.params):
        raise ValueError(
            f"The state has the parameters {sorted(state.theta)}, but the model has {sorted(target.sites.params)}. "
            "Start anew with init."
        )
