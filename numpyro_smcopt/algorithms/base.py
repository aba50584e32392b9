# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What the algorithms share: SVI's methods around a pure step.

An algorithm says how to start (`_begin`), how to adopt new data (`_adopt`), what may be controlled (`_controls`) and
how to step (`_step`); all four are pure functions of a target and a state. This file binds the model to its arguments,
compiles, announces sites, runs, and turns particles into samples.
"""

import abc
import contextlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt import effects, loop
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.resampling import systematic
from numpyro_smcopt.results import RunResult, Status
from numpyro_smcopt.target import (
    StaticArguments,
    Target,
    check_init_params,
    check_start,
    join_arguments,
    make_target,
    split_arguments,
    strong,
)
from numpyro_smcopt.types import Array, Model, Params, Theta

LARGEST_TRAJECTORY = 20_000  # coordinates of theta up to which `run` records the iterates


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
        self.handlers = tuple(handlers)
        self.static_kwargs = dict(static_kwargs)
        self._programs: dict[Any, Callable] = {}
        self._seen: tuple[list[Array], StaticArguments] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Everything but compiled programs and remembered data."""
        return {**self.__dict__, "_programs": {}, "_seen": None}

    # -- what an algorithm must say -----------------------------------------------------------------------------------
    @abc.abstractmethod
    def _begin(self, rng_key: Array, start: "Start") -> Any:
        """The first state; eager, may compile programs through ``start``."""

    @abc.abstractmethod
    def _adopt(self, target: Target, state: Any, fingerprint: Array) -> Any:
        """The state under the data of ``target``, whose fingerprint is given."""

    @abc.abstractmethod
    def _controls(self, state: Any) -> dict[str, Array]:
        """Values that handlers may replace, by site name."""

    @abc.abstractmethod
    def _step(self, target: Target, state: Any, controls: dict[str, Array]) -> Any:
        """One update; ``diagnostics`` of the new state are announced."""

    @abc.abstractmethod
    def _report_faults(self, state: Any, diagnostics: dict[str, Array]) -> Status:
        """Warn about what went wrong in a run, and say how it ended."""

    # -- SVI's methods ------------------------------------------------------------------------------------------------
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
        arrays, static = self._bind(args, kwargs)
        key_params, key_begin = random.split(rng_key)
        target = make_target(self.model, *join_arguments(arrays, static))
        self._check_model(target)
        init_params = {} if init_params is None else init_params
        check_init_params(target.sites, init_params)
        init_params = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf)), init_params)

        params, theta = self._program("read", Target.initial_params)(static, arrays, key_params, init_params)
        check_start(target.sites, params, theta)
        state = self._begin(key_begin, Start(self, static, arrays, target, theta))
        with effects.Shell(self.handlers, {}) as shell:
            for name, value in self._controls(state).items():
                shell.control(name, value)
            for name, value in state.diagnostics.items():
                shell.diagnostic(name, value)
        state = state._replace(mutable_state=shell.mutable_state(), fingerprint=_fingerprint(arrays))
        return jax.tree.map(strong, state)

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
        arrays, static = self._bind(args, kwargs)

        def step(target: Target, state: Any, arrays: list[Array], controls: dict[str, Array]) -> Any:
            fingerprint = _fingerprint(arrays)
            state = jax.lax.cond(
                fingerprint == state.fingerprint,
                lambda state: state,
                lambda state: self._adopt(target, state, fingerprint),
                state,
            )
            return self._step(target, state, controls)

        def compiled(state: Any, controls: dict[str, Array]) -> Any:
            return self._program("update", step)(static, arrays, state, arrays, controls)

        state = self._announced(compiled, state)
        self._refuse_wrong_blocks(state)
        return state, jnp.where(state.wrong_blocks, jnp.nan, state.diagnostics["loss"])

    def stable_update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """`update`, which already survives non-finite potentials and gradients; the name is SVI's."""
        return self.update(state, *args, **kwargs)

    def get_params(self, state: Any) -> Params:
        """The estimate in a state, on the constrained scale of the model."""
        self._refuse_wrong_blocks(state)
        return state.params

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: Any = None,
        init_params: Params | None = None,
        **kwargs: Any,
    ) -> RunResult:
        """Start and update ``num_steps`` times.

        Args:
            rng_key: Randomness; not used if ``init_state`` is given.
            num_steps: How many updates.
            *args: Arguments of the model.
            progress_bar: Whether to show a bar.
            stable_update: Accepted for compatibility with SVI; updates are always stable.
            init_state: A state to go on from.
            init_params: Constrained starting values of param sites.
            **kwargs: Keyword arguments of the model.

        Returns:
            The estimate, the last state, losses and diagnostics.

        Raises:
            ValueError: If an argument cannot be used; the message says which and what to do.
        """
        del stable_update
        if isinstance(num_steps, bool) or not isinstance(num_steps, int | np.integer) or num_steps < 1:
            raise ValueError(f"num_steps must be a positive integer, got {num_steps!r}.")
        arrays, static = self._bind(args, kwargs)
        state = self.init(rng_key, *args, init_params=init_params, **kwargs) if init_state is None else init_state
        if init_state is not None:
            state = self._program("adopt", lambda target, state, fingerprint: self._adopt(target, state, fingerprint))(
                static, arrays, state, _fingerprint(arrays)
            )
            self._refuse_wrong_blocks(state)

        def advance(target: Target, state: Any, num: Array) -> tuple[Any, Any]:
            def one(state: Any) -> tuple[Any, Any]:
                state = self._announced(lambda state, controls: self._step(target, state, controls), state)
                small = sum(leaf.size for leaf in jax.tree.leaves(state.theta)) <= LARGEST_TRAJECTORY
                return state, (state.diagnostics, target.constrain_params(state.theta) if small else {})

            return loop.chunk(one, state, num)

        # A program traced under a handler of the user is thrown away: caches do not look at the handler stack.
        program = self._program("run", advance, keep=not effects.handlers_are_active())
        progress = loop.ProgressBar(num_steps, _describe) if progress_bar else loop.SilentProgress()
        state, (diagnostics, trajectory), interrupted = loop.run_chunks(
            lambda state, num: program(static, arrays, state, num), state, num_steps, progress
        )
        status = Status.INTERRUPTED if interrupted else self._report_faults(state, diagnostics)
        return RunResult(self.get_params(state), state, diagnostics["loss"], diagnostics, status, trajectory)

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
        arrays, static = self._bind_again(args, kwargs)
        num = state.log_weights.shape[0] if num_samples is None else num_samples
        if isinstance(num, bool) or not isinstance(num, int | np.integer) or num < 1:
            raise ValueError(f"num_samples must be a positive integer, got {num_samples!r}.")
        num = int(num)

        def draw(target: Target, state: Any, key: Array) -> dict[str, Array]:
            x = _resample(key, state.points.x, state.log_weights, state.blocks, num)
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
        if state.blocks.num_blocks > 1:
            samples = self.get_samples(state, *args, **kwargs)
            num = state.log_weights.shape[0]
            return samples, jnp.full(num, -jnp.log(num))
        arrays, static = self._bind_again(args, kwargs)
        constrain = lambda target, state: jax.vmap(lambda x: target.constrain_latents(state.theta, x))(  # noqa: E731
            state.points.x
        )
        return self._program("weighted", constrain)(static, arrays, state), state.log_weights[:, 0]

    # -- small print --------------------------------------------------------------------------------------------------
    def _check_model(self, target: Target) -> None:
        if not target.sites.params:
            latents = list(target.sites.latents)
            raise ValueError(
                "The model has no numpyro.param site, so there is nothing to estimate. Declare the parameters with "
                "numpyro.param, or turn latent sites into parameters with "
                f"numpyro_smcopt.latents_to_params(model, {latents[:1] or ['name']})."
            )
        unreached = _unreached_params(target)
        if unreached:
            raise ValueError(
                f"Param site '{unreached[0]}' never reaches the density: no observed or latent site depends on it, "
                "so it cannot be estimated. Remove it, or use it in a distribution."
            )

    def _bind(self, args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
        arrays, static = split_arguments(args, {**self.static_kwargs, **kwargs})
        if not any(isinstance(value, jax.core.Tracer) for value in arrays):
            self._seen = arrays, static
        return arrays, static

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

    def _program(self, name: Any, function: Callable, keep: bool = True) -> Callable:
        """``function(target, *arguments)`` compiled as ``(static, arrays, *arguments)``; arrays are traced."""
        if keep and name in self._programs:
            return self._programs[name]

        def bound(static: StaticArguments, arrays: list[Array], *arguments: Any) -> Any:
            return function(make_target(self.model, *join_arguments(arrays, static)), *arguments)

        program = jax.jit(bound, static_argnums=0)
        if keep:
            self._programs[name] = program
        return program

    def _announced(self, step: Callable[[Any, dict[str, Array]], Any], state: Any) -> Any:
        """Announce the control sites, step, announce the diagnostic sites."""
        with effects.Shell(self.handlers, state.mutable_state) as shell:
            controls = {name: shell.control(name, value) for name, value in self._controls(state).items()}
            new = step(state, controls)
            for name, value in new.diagnostics.items():
                shell.diagnostic(name, value)
        new = new._replace(mutable_state=shell.mutable_state(state.mutable_state))
        return jax.tree.map(strong, new)

    def _refuse_wrong_blocks(self, state: Any) -> None:
        if not isinstance(state.wrong_blocks, jax.core.Tracer) and bool(state.wrong_blocks):
            raise ValueError(
                "With these data the latents depend on one another in another way than with the data that the state "
                "was started from (another grouping, for instance), so its independent blocks would be wrong. Start "
                "anew with init, or use partition=numpyro_smcopt.one_block."
            )


class Start:
    """What an algorithm needs at its start: the target's facts, and programs bound to the data.

    Attributes:
        target: The target, bound to the data; not to be evaluated eagerly, only to be asked for its sites.
        theta: Unconstrained starting values.
    """

    def __init__(
        self, owner: ParticleAlgorithm, static: StaticArguments, arrays: list[Array], target: Target, theta: Theta
    ) -> None:
        self._owner, self._static, self._arrays = owner, static, arrays
        self.target, self.theta = target, theta

    def call(self, name: Any, function: Callable, *arguments: Any) -> Any:
        """Compile ``function(target, *arguments)`` under ``name`` and call it."""
        return self._owner._program(name, function)(self._static, self._arrays, *arguments)


def flat_terms(target: Target, theta: Theta) -> tuple[Callable[[Array, Array], Array], Array, Callable]:
    """``(theta [P], x [D]) -> [K]``, the flat theta, and the way back to its tree."""
    flat, unravel = ravel_pytree(theta)
    return lambda t, x: target.terms(unravel(t), x), flat, unravel


def _unreached_params(target: Target) -> list[str]:
    """Param sites on which no energy term depends, found in the program of the energy."""
    _, theta = jax.eval_shape(lambda key: target.initial_params(key, {}), random.key(0))
    owners = [name for name in theta for _ in jax.tree.leaves(theta[name])]
    program = target.program(theta)
    reached = set()
    for owner, variable in zip(owners, program.invars, strict=False):
        touched = {variable}
        for equation in program.eqns:
            if any(not hasattr(v, "val") and v in touched for v in equation.invars):
                touched.update(equation.outvars)
        if any(not hasattr(v, "val") and v in touched for v in program.outvars):
            reached.add(owner)
    return [name for name in theta if name not in reached]


def _fingerprint(arrays: Sequence[Array]) -> Array:
    """[] uint32 that changes when the data do; position counts, so a permutation changes it too."""
    total = jnp.zeros((), jnp.uint32)
    for k, value in enumerate(arrays):
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = random.key_data(value)
        if jnp.issubdtype(value.dtype, jnp.floating):
            bits = jax.lax.bitcast_convert_type(value.astype(jnp.float32), jnp.uint32)
        else:
            bits = value.astype(jnp.uint32)
        places = jnp.arange(bits.size, dtype=jnp.uint32).reshape(bits.shape)
        total = total * jnp.uint32(31) + jnp.sum(
            (bits ^ (bits >> 15)) * (jnp.uint32(2) * places + jnp.uint32(2 * k + 1)), dtype=jnp.uint32
        )
    return total


def _resample(rng_key: Array, x: Array, log_weights: Array, blocks: Blocks, num: int) -> Array:
    """[num, D] draws from a weighted cloud, independent over blocks, in random order."""
    num_particles = x.shape[0]
    rounds = -(-num // num_particles)

    def of_block(key: Array, log_weights: Array) -> Array:
        keys = random.split(key, rounds + 1)
        ancestors = jnp.concatenate([systematic(k, log_weights) for k in keys[1:]])
        return random.permutation(keys[0], ancestors)[:num]

    keys = random.split(rng_key, blocks.num_blocks)
    ancestors = jax.vmap(of_block, in_axes=(0, 1), out_axes=1)(keys, log_weights)
    return jnp.take_along_axis(x, blocks.to_coordinates(ancestors), 0)


def _describe(records: Any) -> str:
    diagnostics = records[0]
    parts = [f"loss {diagnostics['loss'][-1]:.4g}"]
    if "ess" in diagnostics:
        parts.append(f"ess {np.mean(diagnostics['ess']):.2f}")
    if "acceptance_rate" in diagnostics:
        parts.append(f"accept {np.mean(diagnostics['acceptance_rate']):.2f}")
    return ", ".join(parts)


def warn(message: str) -> None:
    """Warn at the line of the user's call."""
    warnings.warn(message, UserWarning, stacklevel=4)
