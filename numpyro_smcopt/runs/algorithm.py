# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""An algorithm as the code that runs it sees it: a model that is bound to data, and hooks that an algorithm fills in.

Four hooks are the algorithm, pure functions of a target and a state: `first_state`, `step`, `loss`, and the values
that may be steered from outside, `controls`. The others have defaults. What users call is made of them in
`algorithms.base`; `ParticleState` is a state for algorithms that need no other.
"""

import abc
import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt import effects
from numpyro_smcopt.blocks import Blocks, Partition, one_block
from numpyro_smcopt.kernels import Point
from numpyro_smcopt.objectives import MarginalLikelihood
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.evaluate import blocks_are_wrong
from numpyro_smcopt.population.independent_blocks import independent_blocks
from numpyro_smcopt.population.tempering import Tempered
from numpyro_smcopt.potential import StaticArguments, Target, join_arguments, make_target, split_arguments
from numpyro_smcopt.random_numbers import aside
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.runs.compilation import Programs
from numpyro_smcopt.types import Array, Model, Params, State, Theta
from numpyro_smcopt.weights import uniform_log_weights

S = TypeVar("S", bound=State)


class Algorithm(abc.ABC, Generic[S]):
    """The inner face of an algorithm; `algorithms.base.ParticleAlgorithm` is the outer one.

    Attributes of an instance other than the model are its settings: a checkpoint refuses to go on with others.

    Args:
        model: A callable with NumPyro primitives.
        handlers: NumPyro handlers that see the sites of every update.
        static_kwargs: Keyword arguments of the model that stay fixed.

    Attributes:
        state_type: The type of the states, a NamedTuple, see `types.State`.
        partition: How independent blocks of latents are found.
        init_strategy: Where the first particles start, if not in the prior.
        objective: What is minimised, an `objectives.Objective`; None for minus the log marginal likelihood.
    """

    state_type: type[S]
    partition: Partition = staticmethod(one_block)
    init_strategy: Callable | None = None
    objective: Any = None

    def __init__(self, model: Model, handlers: Sequence[Any] = (), static_kwargs: dict[str, Any] | None = None) -> None:
        if not callable(model):
            raise TypeError(f"model must be a callable with NumPyro primitives, got {type(model).__name__}.")
        self.model = model
        self.handlers = effects.check_handlers(handlers)
        self.static_kwargs = dict(static_kwargs or {})
        self._programs = Programs(self._target)
        self._seen: BoundTarget | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but remembered data."""
        return {**self.__dict__, "_seen": None}

    @property
    def maximises_likelihood(self) -> bool:
        """True if the loss is minus the log marginal likelihood; several runs are then ranked by it."""
        return self.objective is None or self.objective.is_likelihood

    # -- hooks without a default --------------------------------------------------------------------------------------
    @abc.abstractmethod
    def first_state(
        self, target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array
    ) -> tuple[S, Tempered | None]:
        """The state at the start; pure.

        Args:
            target: The model with its data.
            rng_key: Randomness.
            theta: Where to start.
            blocks: The partition of the latents.
            mode: [D] a likely place of the latents at ``theta``, or zero.

        Returns:
            The state, and the particles as they were drawn, if there is an energy: the start is refused where it is not
            finite, and a warning given where it was not reached. Fingerprint and state of handlers are filled in.
        """

    @abc.abstractmethod
    def step(self, target: Target, state: S, controls: dict[str, Any]) -> S:
        """One update; pure.

        Args:
            target: The model with its data.
            state: The present state.
            controls: What handlers made of `controls`.

        Returns:
            The new state. Its ``diagnostics`` are announced, and those that are scalars recorded; ``"loss"`` is one of
            them. ``"gradient"`` ([P], of a likelihood) makes it possible to stop early.
        """

    @abc.abstractmethod
    def loss(self, target: Target, state: S) -> Array:
        """[] what is minimised, in a state under the data of ``target``; pure."""

    @abc.abstractmethod
    def log_evidence_at(self, rng_key: Array, bound: BoundTarget, state: S) -> tuple[float, float]:
        """Log evidence at the estimate of a state, and its error; several runs are ranked by it."""

    # -- hooks with a default -----------------------------------------------------------------------------------------
    def controls(self, state: S) -> dict[str, Any]:
        """Values that handlers may replace, by site name: arrays, and functions that a step is compiled with."""
        del state
        return {}

    def check(self, target: Target, theta: Theta) -> None:
        """Refuse a model in which there is nothing to estimate, or something that cannot be; nothing is computed."""
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
        target.refuse_wrong_indices()
        objective = MarginalLikelihood() if self.objective is None else self.objective
        objective.check(target, theta)

    def find_blocks(self, rng_key: Array, bound: BoundTarget, theta: Theta) -> Blocks:
        """The partition of the latents; on the host."""
        return independent_blocks(rng_key, bound, theta, self.partition, self.init_strategy)

    def warm_start(self, bound: BoundTarget, theta: Theta, blocks: Blocks) -> tuple[Theta, Any] | None:
        """A better start, and the mode [D] of the latents there, or None; on the host."""
        del bound, theta, blocks
        return None

    def adopt(self, target: Target, state: S, fingerprint: Array) -> S:
        """The state under other data, those of ``target``, or as it was but with ``wrong_blocks``; pure."""
        particles: Any = state
        wrong = blocks_are_wrong(aside(state.rng_key), target, state.theta, particles.points.x, state.blocks)
        fingerprint = jnp.where(wrong, state.fingerprint, fingerprint)
        return state._replace(fingerprint=fingerprint, wrong_blocks=wrong)

    def faults(self, state: S, diagnostics: dict[str, np.ndarray]) -> tuple[list[str | None], Status]:
        """Faults of a run with these diagnostics [T, ...], each with its remedy, and its status."""
        del state, diagnostics
        return [], Status.FINISHED

    def early_faults(self, state: S, diagnostics: dict[str, np.ndarray]) -> list[str | None]:
        """Faults that show in the first `faults.LAST_LOOK` updates; told then, or at the end of a shorter run."""
        del state, diagnostics
        return []

    def complete_information(self, state: S) -> Array | None:
        """[P, P] complete-data information that a state carries, if it does."""
        found = getattr(getattr(state, "theta_state", None), "information", None)
        return None if found is None else found.complete

    def attached(self) -> Any:
        """Arrays (a pytree) that belong to the algorithm itself; programs get them traced, as ``target.attached``."""
        return () if self.objective is None else self.objective.arrays

    # -- the model and its arguments ----------------------------------------------------------------------------------
    def _bind(self, args: tuple, kwargs: dict) -> BoundTarget:
        """The model with its arguments."""
        arrays, static = split_arguments(args, {**self.static_kwargs, **kwargs})
        bound = BoundTarget(self._programs, [*arrays, *jax.tree.leaves(self.attached())], static)
        if not any(isinstance(value, jax.core.Tracer) for value in bound.arrays):
            self._seen = bound
        return bound

    def _bind_again(self, args: tuple, kwargs: dict) -> BoundTarget:
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
        leaves, treedef = jax.tree.flatten(self.attached())
        own = len(arrays) - len(leaves)
        return make_target(
            self.model, *join_arguments(arrays[:own], static), attached=jax.tree.unflatten(treedef, arrays[own:])
        )

    # -- states that are refused --------------------------------------------------------------------------------------
    def _check_state(self, state: Any, name: str = "state") -> None:
        """Refuse what is no state of this algorithm; the message says where it may be found."""
        if isinstance(state, self.state_type):
            return
        advice = ""
        if isinstance(state, RunResult):
            advice = " Pass result.state."
        elif isinstance(state, tuple) and any(isinstance(part, self.state_type) for part in state):
            advice = " Note that update returns a state and a loss."
        raise TypeError(
            f"{name} must be a state of {type(self).__name__}, as init and update return it, got "
            f"{type(state).__name__}.{advice}"
        )


class ParticleState(NamedTuple):
    """A state of particles with equal weights: what an algorithm of your own needs not write anew.

    Attributes:
        theta: The iterate, unconstrained.
        params: The estimate, constrained.
        points: The particles [N, ...].
        log_weights: [N, B] equal log weights.
        theta_state: What else the algorithm remembers, a pytree of arrays.
        blocks: The partition of the latents.
        num_updates: [] updates so far.
        wrong_blocks: [] bool, whether the data contradict the partition.
        fingerprint: [] of the data.
        diagnostics: Of the last update.
        mutable_state: State of handlers.
        rng_key: Randomness of what follows.
    """

    theta: Theta
    params: Params
    points: Point
    log_weights: Array
    theta_state: Any
    blocks: Blocks
    num_updates: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array

    @classmethod
    def start(
        cls,
        target: Target,
        rng_key: Array,
        theta: Theta,
        points: Point,
        blocks: Blocks,
        diagnostics: dict[str, Array],
        theta_state: Any = (),
    ) -> "ParticleState":
        """The state at the start; ``diagnostics`` are zeros or values of the names and types that a step announces."""
        log_weights = uniform_log_weights(len(points.x), blocks.num_blocks, points.x.dtype)
        wrong, no_data, zero = jnp.asarray(False), jnp.zeros((), jnp.uint32), jnp.zeros((), jnp.int32)
        own = target.constrain_params(theta), points, log_weights, theta_state, blocks
        return cls(theta, *own, zero, wrong, no_data, diagnostics, {}, rng_key)
