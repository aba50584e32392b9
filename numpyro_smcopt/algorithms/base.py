# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The base of all algorithms: SVI's methods around a pure step, samples and a report.

Every method checks what it is given, binds the model to its arguments, and calls what does the work: `runs.run` for
runs, `runs.resume` for checkpoints, `build_report` for reports. What an algorithm has to say for that are the
hooks of `runs.algorithm.Algorithm`.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt import effects
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.evaluate import equal_draws, one_draw
from numpyro_smcopt.potential import (
    SVIView,
    Target,
    axis_names,
    check_key,
    make_svi_view,
    observed_data,
    pointwise_log_likelihood,
)
from numpyro_smcopt.reporting import build_report
from numpyro_smcopt.reporting.report import Report
from numpyro_smcopt.results import RunResult
from numpyro_smcopt.runs.algorithm import Algorithm, S
from numpyro_smcopt.runs.checkpoint import RunSettings, check_path, identity_of, write
from numpyro_smcopt.runs.convergence import EarlyStop, stopping_rule
from numpyro_smcopt.runs.first_state import start
from numpyro_smcopt.runs.resume import resume
from numpyro_smcopt.runs.run import Driver
from numpyro_smcopt.runs.update import check_blocks, update
from numpyro_smcopt.types import Array, Params, positive
from numpyro_smcopt.types import check_functions as check_functions
from numpyro_smcopt.types import check_number as check_number
from numpyro_smcopt.types import whole_or_none as whole_or_none


class ParticleAlgorithm(Algorithm[S]):
    """The common face of the algorithms; see the subclasses for what each minimises and how.

    Args:
        model: A callable with NumPyro primitives.
        handlers: NumPyro handlers that see the sites of every update.
        static_kwargs: Keyword arguments of the model that stay fixed.
    """

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
        return start(self, self._bind(args, kwargs), rng_key, init_params)

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
        state = update(self, self._bind(args, kwargs), state)
        return state, jnp.where(state.wrong_blocks, jnp.nan, state.diagnostics["loss"])

    def stable_update(self, state: Any, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """`update`, which already survives non-finite potentials and gradients; the name is SVI's."""
        return self.update(state, *args, **kwargs)

    def evaluate(self, state: S, *args: Any, **kwargs: Any) -> Array:
        """The loss in a state under the given data, without changing the state.

        For the marginal likelihood this is minus the running log evidence, or, of particles without weights, their mean
        energy or what their sampler knows of the evidence. Arguments are those of `update`.
        """
        self._check_state(state)
        return self._bind(args, kwargs).call("evaluate", self.loss, state, often=True)

    def get_params(self, state: S) -> Params:
        """The estimate in a state, on the constrained scale of the model."""
        self._check_state(state)
        check_blocks(state)
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
        stop = stopping_rule(early_stop)
        if checkpoint is not None:
            check_path(checkpoint)
        if init_state is None or num_runs > 1 and rng_key is not None:
            check_key(rng_key)
        bound = self._bind(args, kwargs)
        ranking_key = None if num_runs == 1 else random.key(0) if rng_key is None else rng_key
        settings = RunSettings(num_steps, num_runs, stop, ranking_key, checkpoint_every)
        driver = Driver(self, bound, settings)
        state = driver.start(rng_key, init_params) if init_state is None else driver.adopt(init_state)
        write_to = None if checkpoint is None else partial(write, checkpoint, identity_of(self, bound), settings)
        return driver.run(state, progress_bar, write_to)

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
        return resume(self, checkpoint, self._bind(args, kwargs), num_steps, progress_bar)

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
            ``{site: [num_samples, ...]}`` on the scale of the model, deterministic sites included; of a sampler of
            `ImplicitDiffusion` that has no latents, fresh samples ``{"y": ...}``.

        Raises:
            ValueError: If the model's arguments are not known, or ``num_samples`` is not a positive integer.
        """
        self._check_state(state)
        if rng_key is not None:
            check_key(rng_key)
        num = whole_or_none("num_samples", num_samples)
        draw = lambda target, state, key: self.draw(target, key, state, num)  # noqa: E731
        key = random.key(0) if rng_key is None else rng_key
        return self._bind_again(args, kwargs).call(("samples", num), draw, state, key)

    def draw(self, target: Target, rng_key: Array, state: Any, num: int | None) -> dict[str, Array]:
        """The samples of `get_samples`; pure. None stands for as many draws as there are particles."""
        num = state.log_weights.shape[0] if num is None else num
        x = equal_draws(rng_key, state.points.x, state.log_weights, state.blocks, num)
        return jax.vmap(lambda one: target.constrain_latents(state.theta, one))(x)

    def get_weighted_samples(self, state: Any, *args: Any, **kwargs: Any) -> tuple[dict[str, Array], Array]:
        """The weighted particles, constrained, and their normalised log weights ``[N]``.

        Where the latents fall into several independent blocks, every block has weights of its own and no weight
        belongs to a whole particle: then each block is resampled first, and the log weights are equal. Arguments are
        those of `get_samples`.
        """
        self._check_state(state)
        if state.blocks.num_blocks > 1:
            samples = self.get_samples(state, *args, **kwargs)
            num = state.log_weights.shape[0]
            return samples, jnp.full(num, -jnp.log(num))
        bound = self._bind_again(args, kwargs)
        constrain = lambda target, state: jax.vmap(lambda x: target.constrain_latents(state.theta, x))(  # noqa: E731
            state.points.x
        )
        return bound.call("weighted", constrain, state), state.log_weights[:, 0]

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
        return self._bind_again(args, kwargs).call("log_likelihood", pointwise_log_likelihood, params, samples)

    def observed_data(self, params: Params, *args: Any, **kwargs: Any) -> dict[str, Array]:
        """The observations, ``{site: array}``; for ``params`` and the arguments see `log_likelihood`."""
        return self._bind_again(args, kwargs).call("observed", observed_data, params)

    def axis_names(self, *args: Any, **kwargs: Any) -> dict[str, list[str]]:
        """Names of the axes of every site, which are those of its plates where it stands in plates."""
        return axis_names(self._bind_again(args, kwargs).target)

    def as_svi(self, state: Any, *args: Any, **kwargs: Any) -> SVIView:
        """The weighted particles in the shape of NumPyro's `SVI`, for what is written for guides.

        ``Predictive(model, guide=view.guide, params=params, num_samples=1000)`` then draws particles with their true
        weights (block by block, if there are several), and so does ArviZ's ``from_numpyro_svi(view, ...)``. Arguments
        are those of `get_samples`.
        """
        self._check_state(state)
        target = self._bind_again(args, kwargs).target

        def draw(rng_key: Array) -> dict[str, Array]:
            values = target.constrain_latents(
                state.theta, one_draw(rng_key, state.points.x, state.log_weights, state.blocks)
            )
            return {name: values[name] for name in target.sites.latents}

        return make_svi_view(self.model, self.get_params(state), draw)

    def log_evidence_at(self, rng_key: Array, bound: BoundTarget, state: S) -> tuple[float, float]:
        """See `Algorithm.log_evidence_at`."""
        return build_report.log_evidence_at(self, rng_key, bound, state)

    # -- report -------------------------------------------------------------------------------------------------------
    def summarize(self, rng_key: Array, state: Any, *args: Any, sandwich: bool = False, **kwargs: Any) -> Report:
        """The report of a fit: standard errors, Monte Carlo errors, intervals, log evidence, samples.

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
        check_blocks(state)
        bound = self._bind_again(args, kwargs)
        return build_report.summarize(self, rng_key, bound, state, sandwich)
