# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`SMCOptimizer`: a sequential Monte Carlo sampler whose targets follow the optimiser.

One update of ``theta_k`` and the weighted particles ``(x_i, w_i)`` of ``pi_theta_k``:

    g      = estimate of grad F(theta_k) from (x_i, w_i)
    theta' = step(theta_k, g)
    invariant kernel:  w_i <- w_i exp(U_theta(x_i) - U_theta'(x_i));  resample;  x_i <- K_theta'(x_i, .)
    weighted kernel:   x'_i ~ K_theta(x_i, .);  w_i <- w_i exp(U_theta(x_i) - U_theta'(x'_i)) L_theta'(x_i | x'_i)
                       / K_theta(x'_i | x_i);  resample

and ``log Z`` grows by the logarithm of the mean increment, block by block.

Source: Cuin, Tang, Carbone and Akyildiz, "Efficient Stochastic Optimisation via Sequential Monte Carlo", ICML 2026,
arXiv 2601.22003, algorithm 1.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
from jax import random

from numpyro_smcopt import laplace, tempering
from numpyro_smcopt.adaptation import adapt_size
from numpyro_smcopt.algorithms.base import ParticleAlgorithm, Start, flat_terms, warn
from numpyro_smcopt.blocks import Blocks, Partition, dependence_violated, find_blocks
from numpyro_smcopt.kernels import HMC, InvariantKernel, Point, Potential, Preconditioner, Step, WeightedKernel
from numpyro_smcopt.objectives import Cloud, MarginalLikelihood, Objective, term_coefficients
from numpyro_smcopt.resampling import Resampled, ResamplingScheme, systematic, when_ess_below
from numpyro_smcopt.results import Status
from numpyro_smcopt.target import Target
from numpyro_smcopt.theta_step import NaturalState, NaturalStep, Surroundings, ThetaStep, as_theta_step
from numpyro_smcopt.types import Array, Model, Params, Theta
from numpyro_smcopt.uncertainty import Information, louis_information
from numpyro_smcopt.weights import (
    Reweighted,
    effective_sample_size,
    incremental_log_weight,
    reweight,
    uniform_log_weights,
)

WORK_PER_EVALUATION = 1_500_000  # array elements that the default number of particles aims at
FEWEST_PARTICLES, MOST_PARTICLES = 32, 128
LARGEST_INFORMATION = 500  # coordinates of theta up to which the natural step is affordable
SHORTER = 0.25  # of a refused step is tried next
LARGEST_SCORES = 20_000_000  # particles times coordinates of theta up to which scores are carried
INFORMATION_DRAWS = 2048  # particles times blocks from which the information is formed
LARGEST_INFORMATION_WORK = 2e9  # array elements of one information
INFORMATION_SHARE = 0.5  # of the time that an update may spend on it, on average
WARM_DRAWS = 64
BURN_IN = 100
FINAL_MOVES = 10
GUARDS = 4


class SMCState(NamedTuple):
    """State of `SMCOptimizer`: what the next update needs, and the last diagnostics.

    Attributes:
        theta: The iterate, unconstrained.
        params: The estimate, constrained: the iterate, or for the default step an average of iterates.
        points: The particles, each with its energy terms and gradient: arrays [N, ...].
        log_weights: [N, B] normalised log weights.
        log_evidence_start: [] log evidence where the run started.
        log_evidence_change: [] its change since.
        relative: [] bool, whether the start is unknown (the prior cannot be sampled) and set to zero.
        step: Step sizes and preconditioner of the kernel.
        theta_state: State of the theta step.
        pending: [P] where theta goes next, if the order is to weigh first (see `SMCOptimizer`).
        blocks: The partition of the latents.
        num_updates: [] updates so far.
        num_collapsed: [] updates refused because all weight of a block was gone.
        wrong_blocks: [] bool, whether the data contradict the partition.
        fingerprint: [] of the data.
        diagnostics: Scalars of the last update.
        mutable_state: State of handlers.
        rng_key: Randomness of what follows.
    """

    theta: Theta
    params: Params
    points: Point
    log_weights: Array
    log_evidence_start: Array
    log_evidence_change: Array
    relative: Array
    step: Step
    theta_state: Any
    pending: Array
    blocks: Blocks
    num_updates: Array
    num_collapsed: Array
    wrong_blocks: Array
    fingerprint: Array
    diagnostics: dict[str, Array]
    mutable_state: dict
    rng_key: Array


class SMCOptimizer(ParticleAlgorithm):
    """Minimise a loss whose gradient is an expectation under ``pi_theta``; by default, minus the marginal likelihood.

    Args:
        model: A callable with NumPyro primitives: `numpyro.param` sites are estimated, latent `numpyro.sample` sites
            are integrated out.
        optim: An optax, `numpyro.optim` or `jax.example_libraries` optimiser. By default `NaturalStep`, which has no
            learning rate, preceded by a Laplace warm start.
        objective: What is minimised; by default `MarginalLikelihood`, with control variates for the default step and
            plain, as in the paper, with an ``optim``.
        kernel: How particles move; by default `HMC` with a jittered, adapted step size.
        num_particles: N; by default between 32 and 128, fewer for larger models.
        resampling: A resampling scheme; by default `resampling.systematic`.
        ess_threshold: A block is resampled if its ESS falls below this fraction of the particles.
        init_strategy: A strategy such as `numpyro.infer.init_to_uniform` for particles that cannot be drawn from the
            prior, or shall not be; the log evidence is then relative to the start.
        partition: How independent blocks are found; `one_block` keeps all latents together, as the paper does.
        handlers: NumPyro handlers that see the ``smcopt/...`` sites of every update.
        **static_kwargs: Keyword arguments of the model that stay fixed.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If a number is out of range.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from jax import random
        >>> from numpyro_smcopt import SMCOptimizer
        >>> def model(y):
        ...     mean = numpyro.param("mean", 0.0)
        ...     with numpyro.plate("data", len(y)):
        ...         x = numpyro.sample("x", dist.Normal(mean, 1.0))
        ...         numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        >>> y = jnp.array([1.0, 2.0, 4.5])
        >>> result = SMCOptimizer(model).run(random.key(0), 200, y, progress_bar=False)
        >>> round(float(result.params["mean"]), 1)
        2.5

    Reference:
        Cuin, Tang, Carbone and Akyildiz, "Efficient Stochastic Optimisation via Sequential Monte Carlo", ICML 2026.
    """

    def __init__(
        self,
        model: Model,
        optim: Any = None,
        objective: Objective | None = None,
        *,
        kernel: InvariantKernel | WeightedKernel | None = None,
        num_particles: int | None = None,
        resampling: ResamplingScheme | None = None,
        ess_threshold: float = 0.5,
        init_strategy: Callable | None = None,
        partition: Partition = find_blocks,
        handlers: Sequence[Any] = (),
        **static_kwargs: Any,
    ) -> None:
        super().__init__(model, handlers, static_kwargs)
        if num_particles is not None and (
            isinstance(num_particles, bool) or not isinstance(num_particles, int | np.integer) or num_particles < 1
        ):
            raise ValueError(f"num_particles must be a positive integer, got {num_particles!r}.")
        if not 0.0 <= ess_threshold <= 1.0:
            raise ValueError(f"ess_threshold is a fraction of the particles within [0, 1], got {ess_threshold!r}.")
        if kernel is not None and not isinstance(kernel, InvariantKernel | WeightedKernel):
            raise TypeError(f"kernel must be an object from numpyro_smcopt.kernels such as MALA(), got {kernel!r}.")
        if objective is not None and not isinstance(objective, Objective):
            raise TypeError(f"objective must be an object from numpyro_smcopt.objectives, got {objective!r}.")
        self.optim = None if optim is None else as_theta_step(optim)
        self.objective = objective or MarginalLikelihood(control_variates=optim is None)
        self.kernel = kernel or HMC()
        self.num_particles = num_particles
        self.resample = when_ess_below(resampling or systematic, ess_threshold)
        self.init_strategy = init_strategy
        self.partition = partition

    # -- start --------------------------------------------------------------------------------------------------------
    def _begin(self, rng_key: Array, start: Start) -> SMCState:
        key_draw, key_cloud, key_state = random.split(rng_key, 3)
        sites, theta = start.target.sites, start.theta
        num_particles = self._default_particles(start.target, theta)
        from_prior = sites.can_draw_prior and self.init_strategy is None

        # Blocks
        probe = lambda rows, tangents: start.call("probe", _probe, theta, rows, tangents)  # noqa: E731
        points = self._generic_points(start, probe, key_draw)
        blocks = self.partition(probe, points, sites.num_terms, sites.units)

        # Warm start
        mode = jnp.zeros(sites.num_latents, points.dtype)
        warm = self._warm_start(start, theta, mode, blocks, num_particles) if self.optim is None else None
        if warm is not None:
            theta, mode = warm

        # Cloud
        cloud = self._cloud(num_particles, from_prior)
        state = start.call(("cloud", num_particles, from_prior), cloud, key_cloud, theta, blocks, mode, key_state)
        self._check_cloud(start.target, state)
        return state

    def _generic_points(self, start: Start, probe: Callable, rng_key: Array) -> np.ndarray:
        """[2, D] points with finite energy that are special in no way."""
        size = start.target.sites.num_latents
        points = np.random.default_rng(1).uniform(-1, 1, (2, size)).astype(jnp.result_type(float))
        if np.all(np.isfinite(probe(jnp.asarray(points), jnp.zeros_like(points))[0])):
            return points
        drawn = np.asarray(
            start.call(("draw", True), self._draw(32, start.target.sites.can_draw_prior), rng_key, start.theta)
        )
        energies = [
            np.asarray(probe(jnp.asarray(drawn[k : k + 2]), jnp.zeros_like(points))[0]) for k in range(0, 32, 2)
        ]
        finite = np.isfinite(np.concatenate(energies))
        _refuse_hopeless(start.target, finite)
        best = np.argsort(-finite.sum(1), kind="stable")[:2]
        return drawn[best]

    def _default_particles(self, target: Target, theta: Theta) -> int:
        if target.sites.num_latents == 0:
            return 1  # plain maximum likelihood: there is nothing to integrate out
        if self.num_particles is not None:
            return int(self.num_particles)
        fitting = WORK_PER_EVALUATION / target.work(theta)
        return int(np.clip(2 ** round(math.log2(fitting)), FEWEST_PARTICLES, MOST_PARTICLES))

    def _draw(self, num: int, from_prior: bool) -> Callable:
        def draw(target: Target, rng_key: Array, theta: Theta) -> Array:
            one = target.draw_prior if from_prior else _start_with(target, self.init_strategy)
            return jax.vmap(lambda key: one(key, theta))(random.split(rng_key, num))

        return draw

    def _warm_start(
        self, start: Start, theta: Theta, x: Array, blocks: Blocks, num_particles: int
    ) -> tuple[Theta, Array] | None:
        """Theta and the mode of the latents near the maximum of the Laplace approximation, or None."""
        flat, unravel = jax.flatten_util.ravel_pytree(theta)
        if not laplace.affordable(blocks) or flat.size > LARGEST_INFORMATION:
            return None
        normals = jnp.asarray(
            laplace.fixed_normals(_num_for_information(WARM_DRAWS, 1, flat.size * start.target.work(theta)), blocks),
            flat.dtype,
        )

        def expand(target: Target, flat: Array, x: Array, normals: Array, blocks: Blocks) -> laplace.Expansion:
            terms_fn = lambda t, x: target.terms(unravel(t), x)  # noqa: E731
            return laplace.expand(terms_fn, flat, x, normals, blocks, target.work(theta))

        expand_fn = lambda flat, x: start.call("expand", expand, flat, x, normals, blocks)  # noqa: E731
        found = laplace.warm_start(expand_fn, flat, x, start.call("bounded", Target.bounded_coordinates, theta))
        return None if found is None else (unravel(found.theta), found.mode)

    def _cloud(self, num_particles: int, from_prior: bool) -> Callable:
        """A program that makes the first cloud at ``theta``, and the state around it."""

        def cloud(
            target: Target, rng_key: Array, theta: Theta, blocks: Blocks, mode: Array, key_state: Array
        ) -> SMCState:
            terms_fn, flat, _ = flat_terms(target, theta)
            at_theta = lambda x: terms_fn(flat, x)  # noqa: E731
            key_draw, key_move = random.split(rng_key)
            x = self._draw(num_particles, from_prior)(target, key_draw, theta)
            prior = jnp.asarray(target.sites.prior_mask)
            kernel = self.kernel if isinstance(self.kernel, InvariantKernel) else HMC()
            curvature = None
            if kernel.preconditioning.dense and laplace.affordable(blocks) and blocks.width > 1:
                curvature = laplace.curvature(at_theta, mode, prior, blocks)
            size = jnp.full(blocks.num_blocks, kernel.step_size, x.dtype)
            step = Step(size, tempering.identity_like(mode, curvature))
            beta = jnp.full(blocks.num_blocks, 0.0 if from_prior else 1.0, x.dtype)
            tempered = tempering.temper(
                key_move, at_theta, x, prior, blocks, kernel, step, curvature, beta,
                final_moves=FINAL_MOVES if from_prior else BURN_IN,
            )  # fmt: skip
            points = tempered.points
            if self._carries_scores(num_particles, flat.size, blocks):
                points = jax.vmap(self._evaluate(target, theta, True))(points.x)
            free = -blocks.sum_free_terms(points.terms[0])
            log_evidence = jnp.sum(tempered.log_evidence) + free if from_prior else jnp.zeros((), x.dtype)
            theta_step = self._theta_step(flat, (num_particles, blocks.num_blocks), target.work(theta))
            zero = jnp.zeros((), jnp.int32)
            state = SMCState(
                theta=theta,
                params=target.constrain_params(theta),
                points=points,
                log_weights=uniform_log_weights(num_particles, blocks.num_blocks, x.dtype),
                log_evidence_start=log_evidence,
                log_evidence_change=jnp.zeros_like(log_evidence),
                relative=jnp.asarray(not from_prior),
                step=self._first_step(tempered.step, kernel),
                theta_state=theta_step.init(flat),
                pending=flat,
                blocks=blocks,
                num_updates=zero,
                num_collapsed=zero,
                wrong_blocks=jnp.asarray(False),
                fingerprint=jnp.zeros((), jnp.uint32),
                diagnostics={},
                mutable_state={},
                rng_key=key_state,
            )
            fresh = reweight(state.log_weights, jnp.zeros_like(state.log_weights))
            return state._replace(
                diagnostics=_diagnostics(state, fresh, tempered.acceptance, jnp.zeros_like(flat), zero)
            )

        return cloud

    def _first_step(self, tempered: Step, used: InvariantKernel) -> Step:
        preconditioner = tempered.preconditioner
        if self.kernel.preconditioning.forgetting == 0.0 and not self.kernel.preconditioning.dense:
            preconditioner = Preconditioner(jnp.ones_like(preconditioner.scale))
        if self.kernel is used and self.kernel.target is not None:
            return Step(tempered.size, preconditioner)
        return Step(jnp.full_like(tempered.size, self.kernel.step_size), preconditioner)

    def _check_cloud(self, target: Target, state: SMCState) -> None:
        _refuse_hopeless(target, np.isfinite(np.asarray(state.points.terms)))

    # -- update -------------------------------------------------------------------------------------------------------
    def _theta_step(self, flat: Array, log_weights_shape: tuple[int, int], work: int) -> ThetaStep:
        if self.optim is not None:
            return self.optim
        if flat.size <= LARGEST_INFORMATION:
            num_particles, num_blocks = log_weights_shape
            # In units of the evaluations of one update; an information costs about three per direction.
            cost = 3 * flat.size * _num_for_information(num_particles, num_blocks, flat.size * work) / num_particles
            affordable = cost / (INFORMATION_SHARE * (2 + getattr(self.kernel, "num_evaluations", 1)))
            return NaturalStep(refresh_every=max(5, math.ceil(affordable)))
        return as_theta_step(optax.adam(optax.schedules.exponential_decay(1e-2, 1000, 0.3)))

    def _carries_scores(self, num_particles: int, num_params: int, blocks: Blocks) -> bool:
        single = getattr(self.kernel, "num_evaluations", 1) == 1
        return single and blocks.num_blocks == 1 and num_particles * num_params <= LARGEST_SCORES

    def _evaluate(self, target: Target, theta: Theta, scores: bool) -> Callable[[Array], Point]:
        """One evaluation: energy terms, their gradient in x, and with ``scores`` the one in theta."""
        terms_fn, flat, _ = flat_terms(target, theta)

        def evaluate(x: Array) -> Point:
            if scores:
                terms, vjp = jax.vjp(terms_fn, flat, x)
                score, grad = vjp(jnp.ones_like(terms))
                return Point(x, terms, grad, score)
            terms, vjp = jax.vjp(lambda x: terms_fn(flat, x), x)
            return Point(x, terms, vjp(jnp.ones_like(terms))[0])

        return evaluate

    def _controls(self, state: SMCState) -> dict[str, Array]:
        return {
            "step_size": state.step.size,
            "ess_threshold": jnp.asarray(self.resample.threshold, state.log_weights.dtype),
        }

    def _step(self, target: Target, state: SMCState, controls: dict[str, Array]) -> SMCState:
        num_particles, num_blocks = state.log_weights.shape
        blocks, step = state.blocks, state.step._replace(size=controls["step_size"])
        every_key = random.split(state.rng_key, 1 + num_particles + num_blocks)  # one call compiles to less
        particle_keys, block_keys = every_key[1 : 1 + num_particles], every_key[1 + num_particles :]
        _, flat, unravel = flat_terms(target, state.theta)
        theta_step = self._theta_step(flat, (num_particles, num_blocks), target.work(state.theta))

        # Theta
        gradient, proposed, theta_state = self._propose(target, state, theta_step)

        # Move and weigh (weighted kernels), or weigh where the particles are (invariant kernels)
        points, log_ratio, backward = self._weigh(target, state, proposed, particle_keys, step)
        change = incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms, log_ratio)
        weighed = reweight(state.log_weights, change)
        free = jnp.mean(blocks.sum_free_terms(state.points.terms - points.terms))

        # Refuse a step that leaves a block without weight, or theta not finite
        sound = ~jnp.any(weighed.collapsed) & jnp.all(jnp.isfinite(proposed)) & jnp.isfinite(free)
        keep = lambda a, b: jax.tree.map(lambda a, b: jnp.where(sound, a, b), a, b)  # noqa: E731
        points, theta_state = keep(points, state.points), keep(theta_state, state.theta_state)
        here, log_weights = keep(proposed, flat), keep(weighed.log_weights, state.log_weights)
        gained = jnp.where(sound, jnp.sum(weighed.log_mean) + free, 0.0)

        # Next theta, from the weighted particles before they are resampled and moved
        pending = flat + SHORTER * (jnp.where(jnp.isfinite(proposed), proposed, flat) - flat)
        if not self._gradient_first:
            cloud = Cloud(points.x, points.terms, points.grad, log_weights, blocks)
            gradient = jnp.where(sound, backward(term_coefficients(self.objective, cloud)), 0.0)
            around = self._surroundings(target, state, points.x, log_weights, here, gradient)
            following, next_state = theta_step.update(theta_state, here, around)
            pending, theta_state = keep(following, pending), keep(next_state, theta_state)

        # Resample
        points, log_weights, num_resampled = self._resample(block_keys, points, log_weights, blocks, controls)

        # Move (invariant kernels)
        observed = acceptance = weighed.ess / num_particles
        if isinstance(self.kernel, InvariantKernel):
            evaluate = self._evaluate(target, unravel(here), state.points.score is not None)
            move = lambda key, p: self.kernel.move(key, p, Potential(evaluate, blocks), step)  # noqa: E731
            points, accepted = jax.vmap(move)(particle_keys, points)
            observed = acceptance = jnp.sum(jnp.exp(log_weights) * accepted, 0)

        # Adapt
        size = adapt_size(step.size, observed, self.kernel.target, state.num_updates)
        preconditioner = self.kernel.preconditioning.adapt(step.preconditioner, points.x, log_weights, blocks)

        state = state._replace(
            theta=unravel(here),
            params=target.constrain_params(unravel(theta_step.estimate(theta_state, here))),
            points=points,
            log_weights=log_weights,
            log_evidence_change=state.log_evidence_change + gained,
            step=Step(size, preconditioner),
            theta_state=theta_state,
            pending=pending,
            num_updates=state.num_updates + 1,
            num_collapsed=state.num_collapsed + (~sound).astype(jnp.int32),
            rng_key=every_key[0],
        )
        acceptance = acceptance if isinstance(self.kernel, InvariantKernel) else jnp.ones_like(acceptance)
        return state._replace(diagnostics=_diagnostics(state, weighed, acceptance, gradient, num_resampled))

    def _propose(self, target: Target, state: SMCState, theta_step: ThetaStep) -> tuple[Array, Array, Any]:
        """Gradient, theta' and the state of the theta step, if the gradient comes first; else what was decided."""
        _, flat, _ = flat_terms(target, state.theta)
        if not self._gradient_first:
            return jnp.zeros_like(flat), state.pending, state.theta_state
        gradient = self._gradient(target, state)
        around = self._surroundings(target, state, state.points.x, state.log_weights, flat, gradient)
        return gradient, *theta_step.update(state.theta_state, flat, around)

    def _weigh(
        self, target: Target, state: SMCState, proposed: Array, keys: Array, step: Step
    ) -> tuple[Point, Array | float, Callable[[Array], Array]]:
        """Particles evaluated at theta', log kernel ratios, and coefficients of terms [N, K] -> gradient in theta."""
        terms_fn, _, unravel = flat_terms(target, state.theta)
        new = self._evaluate(target, unravel(proposed), state.points.score is not None)
        if isinstance(self.kernel, WeightedKernel):
            move = lambda key, p: self.kernel.move(key, p, Potential(new, state.blocks), step)  # noqa: E731
            return *jax.vmap(move)(keys, state.points), _no_gradient
        if self._gradient_first:
            return jax.vmap(new)(state.points.x), 0.0, _no_gradient
        # One forward pass serves the weights and both gradients.
        all_terms = lambda t, x: jax.vmap(lambda one: terms_fn(t, one))(x)  # noqa: E731
        terms, vjp = jax.vjp(all_terms, proposed, state.points.x)
        points = Point(state.points.x, terms, vjp(jnp.ones_like(terms))[1])
        return points, 0.0, lambda coefficients: vjp(coefficients)[0]

    @property
    def _gradient_first(self) -> bool:
        """Whether theta moves by the gradient of the cloud as it was left by the last move, as in the paper.

        The default order weighs, takes the gradient, and then moves the particles: the particles that weigh a step
        have then moved since they proposed it, so the log evidence is not pulled up by steps that were fitted to the
        very particles that judge them.
        """
        return self.optim is not None or isinstance(self.kernel, WeightedKernel)

    def _gradient(self, target: Target, state: SMCState) -> Array:
        cloud = Cloud(*state.points[:3], state.log_weights, state.blocks)
        coefficients = term_coefficients(self.objective, cloud)
        if state.points.score is not None:
            return coefficients[:, 0] @ state.points.score
        terms_fn, flat, _ = flat_terms(target, state.theta)
        return jax.grad(lambda t: jnp.sum(coefficients * jax.vmap(lambda x: terms_fn(t, x))(cloud.x)))(flat)

    def _surroundings(
        self, target: Target, state: SMCState, x: Array, log_weights: Array, theta: Array, gradient: Array
    ) -> Surroundings:
        terms_fn, _, _ = flat_terms(target, state.theta)

        def information() -> Information:
            # A few particles of every block do where there are many blocks; which ones changes from time to time.
            work = target.work(state.theta)
            num_particles, num_blocks = log_weights.shape
            num = _num_for_information(num_particles, num_blocks, theta.size * work)
            stride = num_particles // num
            chosen = stride * jnp.arange(num) + state.num_updates % stride
            weights = jax.nn.log_softmax(log_weights[chosen], axis=0)
            return louis_information(terms_fn, theta, x[chosen], weights, state.blocks, work)[1]

        return Surroundings(gradient, -_log_evidence(state), information)

    def _resample(
        self, keys: Array, points: Point, log_weights: Array, blocks: Blocks, controls: dict[str, Array]
    ) -> tuple[Point, Array, Array]:
        threshold = controls["ess_threshold"]
        # A particle without weight waits at the heaviest one: its own place may have no finite gradient.
        dead = ~jnp.isfinite(log_weights)
        low = effective_sample_size(log_weights) < threshold * log_weights.shape[0]

        def draw(log_weights: Array) -> Resampled:
            one = lambda k, w: tuple(self.resample(k, w, threshold))  # noqa: E731
            drawn = Resampled(*jax.vmap(one, in_axes=(0, 1), out_axes=(1, 1, 0))(keys, log_weights))
            still_dead, heaviest = ~jnp.isfinite(drawn.log_weights), jnp.argmax(log_weights, 0).astype(jnp.int32)
            return drawn._replace(ancestors=jnp.where(still_dead, heaviest, drawn.ancestors))

        def keep(log_weights: Array) -> Resampled:
            own = jnp.arange(log_weights.shape[0], dtype=jnp.int32)[:, None]
            return Resampled(jnp.broadcast_to(own, log_weights.shape), log_weights, jnp.zeros(low.shape, bool))

        moved = jnp.any(low) | jnp.any(dead)
        ancestors, log_weights, happened = jax.lax.cond(moved, draw, keep, log_weights)

        def gather(points: Point) -> Point:
            take = lambda v, index: jnp.take_along_axis(v, index, 0)  # noqa: E731
            own = jnp.arange(log_weights.shape[0])[:, None]
            of_x, of_term = blocks.to_coordinates(ancestors), blocks.to_terms(ancestors, own)
            score = None if points.score is None else points.score[ancestors[:, 0]]
            return Point(take(points.x, of_x), take(points.terms, of_term), take(points.grad, of_x), score)

        return jax.lax.cond(moved, gather, lambda p: p, points), log_weights, jnp.sum(happened)

    def _adopt(self, target: Target, state: SMCState, fingerprint: Array) -> SMCState:
        blocks = state.blocks
        if target.sites.num_terms != state.points.terms.shape[1] or target.sites.num_latents != state.points.x.shape[1]:
            raise ValueError(
                f"The state has {state.points.x.shape[1]} latents and {state.points.terms.shape[1]} energy terms, but "
                f"with these arguments the model has {target.sites.num_latents} and {target.sites.num_terms}. Data of "
                "another shape need a new init."
            )
        points = jax.vmap(self._evaluate(target, state.theta, state.points.score is not None))(state.points.x)
        weighed = reweight(
            state.log_weights, incremental_log_weight(state.points.terms, points.terms, blocks.sum_terms)
        )
        keys = random.split(random.fold_in(state.rng_key, 1), GUARDS)
        terms_fn, flat, _ = flat_terms(target, state.theta)
        wrong = jax.vmap(lambda key, x: dependence_violated(lambda x: terms_fn(flat, x), x, blocks, key))(
            keys, points.x[jnp.arange(GUARDS) % points.x.shape[0]]
        )
        free = jnp.mean(blocks.sum_free_terms(state.points.terms - points.terms))
        adopted = state._replace(
            points=points,
            log_weights=weighed.log_weights,
            log_evidence_change=state.log_evidence_change + jnp.sum(weighed.log_mean) + free,
            fingerprint=fingerprint,
        )
        usable = ~jnp.any(wrong) & ~jnp.any(weighed.collapsed)
        kept = jax.tree.map(lambda a, b: jnp.where(usable, a, b) if a is not b else a, adopted, state)
        return kept._replace(wrong_blocks=jnp.any(wrong))

    def evaluate(self, state: SMCState, *args: Any, **kwargs: Any) -> Array:
        """The loss in a state under the given data, without changing the state: minus the running log evidence.

        Args:
            state: A state.
            *args: Arguments of the model.
            **kwargs: Keyword arguments of the model.
        """
        arrays, static = self._bind(args, kwargs)

        def loss(target: Target, state: SMCState) -> Array:
            return -_log_evidence(self._adopt(target, state, state.fingerprint))

        return self._program("evaluate", loss)(static, arrays, state)

    def _report_faults(self, state: SMCState, diagnostics: dict[str, Array]) -> Status:
        num = len(diagnostics["loss"])
        acceptance, collapsed = np.mean(diagnostics["acceptance_rate"][num // 2 :]), int(state.num_collapsed)
        status = Status.FINISHED
        if collapsed:
            warn(
                f"{collapsed} of {int(state.num_updates)} updates were refused because a block of latents lost all its "
                "weight or theta was not finite. Use more particles, a smaller learning rate, or check the model for "
                "NaN."
            )
            status = Status.WEIGHTS_COLLAPSED if collapsed > num / 4 else status
        lost = int(np.sum(diagnostics["num_nonfinite"]))
        if lost:
            warn(f"The potential was not finite for {lost} particles; they lost their weight and the run went on.")
        if isinstance(self.kernel, InvariantKernel) and state.points.x.shape[1] and acceptance < 0.05:
            warn(
                f"The particles hardly move: acceptance {acceptance:.3f}. Use a smaller step size or an adapted one "
                "(the kernel's `target`)."
            )
        grad_norm = diagnostics["grad_norm"]  # without noise it vanishes at the maximum, and nothing reverses
        moving = int(getattr(state.theta_state, "reversals", num)) < min(10, num / 10)
        if isinstance(state.theta_state, NaturalState) and moving and grad_norm[-1] > 1e-3 * np.max(grad_norm):
            warn(
                "theta was still moving in one direction at the end of the run. Go on with more steps, "
                "run(..., init_state=result.state), unless the maximum lies on a boundary (a scale that goes to zero)."
            )
        return status


def _num_for_information(num_particles: int, num_blocks: int, cost: int) -> int:
    """How many particles the information is formed from; ``cost`` is parameters times work of one energy."""
    enough = 2 ** math.ceil(math.log2(max(INFORMATION_DRAWS / num_blocks, 16)))
    payable = 2 ** math.floor(math.log2(max(LARGEST_INFORMATION_WORK / cost, 4)))
    return min(enough, payable, num_particles)


def _probe(target: Target, theta: Theta, rows: Array, tangents: Array) -> tuple[Array, Array]:
    target = dataclasses.replace(target, validate=True)
    return jax.vmap(lambda x, v: jax.jvp(lambda x: target.terms(theta, x), (x,), (v,)))(rows, tangents)


def _refuse_hopeless(target: Target, finite: np.ndarray) -> None:
    """Raise if no particle has a finite energy; ``finite [N, K]`` says which terms are."""
    if np.any(np.all(finite, 1)):
        return
    start = 0
    for name, size, _ in target.sites.terms:
        bad = ~finite[:, start : start + size].any(0)
        start += size
        if bad.any():
            raise ValueError(
                f"Site '{name}' has no finite log density at any starting point: {int(bad.sum())} of its {size} "
                "terms are NaN or infinite for every particle. Look for NaN or impossible values in the data that "
                "reach it, or start the parameters elsewhere with init_params."
            )
    raise ValueError(
        "The potential is not finite at any starting point. Start the parameters elsewhere with init_params, or pass "
        "init_strategy=numpyro.infer.init_to_median."
    )


def _start_with(target: Target, strategy: Callable | None) -> Callable[[Array, Theta], Array]:
    return lambda key, theta: target.draw_start(key, theta, strategy)


def _log_evidence(state: SMCState) -> Array:
    return state.log_evidence_start + state.log_evidence_change


def _no_gradient(coefficients: Array) -> Array:
    raise NotImplementedError("the gradient of this order comes first")


def _diagnostics(
    state: SMCState, weighed: Reweighted, acceptance: Array, gradient: Array, num_resampled: Array
) -> dict[str, Array]:
    """Scalars of an update; ESS as fractions of the particles, the smallest block and the mean over blocks."""
    ess = weighed.ess / state.log_weights.shape[0]
    return {
        "loss": -_log_evidence(state),
        "log_evidence": _log_evidence(state),
        "ess": jnp.min(ess),
        "mean_ess": jnp.mean(ess),
        "acceptance_rate": jnp.mean(acceptance),
        "grad_norm": jnp.linalg.norm(gradient),
        "num_nonfinite": weighed.num_nonfinite,
        "num_resampled": jnp.asarray(num_resampled, jnp.int32),
    }
