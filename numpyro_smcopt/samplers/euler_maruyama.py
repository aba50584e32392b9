# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A diffusion from noise to samples in T steps, with a queue of batches on their way.

Simulating T steps for every update of theta is a loop in a loop. The queue does them side by side instead: its batches
stand at times 0, c, 2c, ... with ``c = T / num_batches``; every update advances all of them by c steps under the
present theta, the foremost is finished and gives a gradient, and a new one starts. A finished path was then made by the
last ``num_batches`` thetas: slower thetas, or fewer batches, make it less stale; with one batch it is the loop in a
loop, and nothing is stale.

Source: Marion et al. 2024, algorithm 3.
"""

import dataclasses
import enum
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.objectives import Reward
from numpyro_smcopt.potential import Target
from numpyro_smcopt.samplers.base import Assessed, Sampler
from numpyro_smcopt.samplers.drifts import (
    DEFAULT_PARTICLES,
    check_drift,
    check_initial,
    draw_initial,
    drift_of,
    rate,
    reference_of,
)
from numpyro_smcopt.samplers.paths import Dynamics, Ends, Grid, backward, checkpointed_backward, simulate
from numpyro_smcopt.types import Array, Theta


class Paths(enum.Enum):
    """Place of the states of a path, T steps of N particles, until its gradient is formed.

    ``RESIMULATED``: a batch is known by its key and its start [N, ...], and is simulated under the present theta when
    its gradient is formed, which takes memory for T times as many numbers meanwhile; nothing is stale.
    ``CHECKPOINTED``: the same with 2 sqrt(T) times as many numbers, for one more simulation.
    ``STORED``: every batch on its way keeps its path; ``num_batches + 1`` of them, and a copy in an update. The
    gradient is that along the path as it was made. Only this way there can be several batches, whose steps are made
    side by side: it spares time where one batch leaves a part of the device idle.
    """

    RESIMULATED = "resimulated"
    CHECKPOINTED = "checkpointed"
    STORED = "stored"


class Gradient(enum.Enum):
    """The way to differentiate a loss.

    ``ADJOINT``: backwards along the path; needs a differentiable reward, and has little noise.
    ``SCORE_FUNCTION``: by the density of the path, for rewards without a gradient; its noise grows with the time that a
    path takes, though not with the number of steps in it.
    """

    ADJOINT = "adjoint"
    SCORE_FUNCTION = "score function"


class Batch(NamedTuple):
    """A batch of N particles; one that is on its way, or finished.

    Attributes:
        key: Of its noise.
        y: [N, ...] where it is; its start, if paths are not stored.
        path: [T, N, ...] where it was at the steps before; T = 0 if paths are not stored.
        cost: [N] ``sum_t r_t`` so far.
    """

    key: Array
    y: Array
    path: Array
    cost: Array


class Queue(NamedTuple):
    """State of `EulerMaruyama`.

    Attributes:
        waiting: The batches on their way, the newest first, arrays [num_batches, ...]; none if paths are not stored.
        ready: The batch whose gradient is next.
    """

    waiting: Batch
    ready: Batch


@dataclasses.dataclass(frozen=True, eq=False)
class EulerMaruyama(Sampler):
    """Samples at the end of ``Y_{t+1} = Y_t + h_t b_theta(s_t, Y_t) + sigma_t sqrt(h_t) xi_t``.

    The model returns the drift of one particle, ``b(t, y)``, with its parameters in `numpyro.param` sites::

        def model():
            net = flax_module("net", Network(), jnp.zeros(3))
            return lambda t, y: net(jnp.append(y, t))

    The objective is `objectives.Reward`, of one sample ``{"y": [...]}``, with ``kl=PathKL(reference_params=...)`` for a
    penalty. A learning rate is needed: Adam(1e-3) by default.

    Args:
        times: [T + 1] the grid, increasing.
        initial: The law of ``Y_0``: a NumPyro distribution of one particle, or a function ``rng_key -> y``.
        noise_scale: ``sigma``: a number, or a function of time.
        gradient: How the loss is differentiated.
        paths: Where paths are kept meanwhile.
        num_batches: For stored paths; it divides T.

    Raises:
        TypeError: If an argument is of the wrong kind.
        ValueError: If the grid does not increase, sigma is negative, or the queue does not fit the grid.
    """

    times: Any
    initial: Any
    noise_scale: float | Callable[[Array], Array] = 2**0.5
    gradient: Gradient = Gradient.ADJOINT
    paths: Paths = Paths.RESIMULATED
    num_batches: int = 1
    has_energy = False

    def __post_init__(self) -> None:
        """Check the arguments."""
        times = np.asarray(self.times, float)
        if times.ndim != 1 or len(times) < 2 or not np.all(np.isfinite(times)) or not np.all(np.diff(times) > 0):
            raise ValueError(f"times must be a grid of at least two increasing numbers, got {self.times!r}.")
        object.__setattr__(self, "times", tuple(map(float, times)))
        check_initial(self.initial)
        if not callable(self.noise_scale) and not self.noise_scale >= 0:
            raise ValueError(f"noise_scale must be a number >= 0 or a function of time, got {self.noise_scale!r}.")
        for name, kind in (("gradient", Gradient), ("paths", Paths)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be one of {list(map(str, kind))}, got {getattr(self, name)!r}.")
        num, steps = self.num_batches, len(times) - 1
        if isinstance(num, bool) or not isinstance(num, int) or num < 1:
            raise ValueError(f"num_batches must be a positive integer, got {num!r}.")
        if num > steps or steps % num:
            raise ValueError(
                f"num_batches is {num}, but the {steps} steps of times cannot be shared out evenly among so many "
                "batches: it must divide the number of steps."
            )
        if num > 1 and self.paths is not Paths.STORED:
            raise ValueError("num_batches > 1, a queue of batches on their way, needs paths=Paths.STORED.")

    # -- start --------------------------------------------------------------------------------------------------------
    def check(self, target: Target, theta: Theta, objective: Any) -> None:
        """See `Sampler.check`."""
        check_drift(target, theta, objective, self.initial, "EulerMaruyama")
        density = objective.kl is not None or self.gradient is Gradient.SCORE_FUNCTION
        if density and np.any(np.asarray(self._noise_scales()) <= 0):
            raise ValueError("noise_scale must be positive for PathKL and for the score function: a density is needed.")

    def first_particles(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        blocks: Blocks,
        mode: Array,
        objective: Any,
        num_particles: int | None,
    ) -> tuple[Queue, None]:
        """See `Sampler.first_particles`."""
        del blocks, mode
        num = num_particles or DEFAULT_PARTICLES
        if self.paths is not Paths.STORED:
            ready = self._fresh(rng_key, num)
            waiting = jax.tree.map(lambda leaf: jnp.zeros((0, *leaf.shape), leaf.dtype), ready)
            return Queue(waiting, ready), None
        # A batch for every place, moved on until it is there; the last one is finished.
        places = jnp.arange(self.num_batches + 1)
        batches = jax.vmap(lambda key: self._fresh(key, num))(random.split(rng_key, self.num_batches + 1))
        dynamics = self._dynamics(target, objective)

        def move(k: Array, batches: Batch) -> Batch:
            moved = self._advanced(dynamics, theta, batches, jnp.full_like(places, k))
            on = lambda old, new: jax.vmap(jnp.where)(places > k, new, old)  # noqa: E731
            return Batch(batches.key, *jax.tree.map(on, batches[1:], moved[1:]))

        batches = lax.fori_loop(0, self.num_batches, move, batches)
        queue = (jax.tree.map(lambda leaf, part=part: leaf[part], batches) for part in (slice(-1), -1))
        return Queue(*queue), None

    def _fresh(self, rng_key: Array, num: int) -> Batch:
        key_start, key_noise = random.split(rng_key)
        y = jax.vmap(lambda key: draw_initial(self.initial, key))(random.split(key_start, num))
        steps = len(self.times) - 1 if self.paths is Paths.STORED else 0
        return Batch(key_noise, y, jnp.zeros((steps, *y.shape), y.dtype), jnp.zeros(num, y.dtype))

    # -- update -------------------------------------------------------------------------------------------------------
    def advance(
        self,
        rng_key: Array,
        target: Target,
        theta: Theta,
        particles: Queue,
        blocks: Blocks,
        num_updates: Array,
        objective: Any,
        controls: dict[str, Array],
    ) -> tuple[Queue, dict[str, Array]]:
        """See `Sampler.advance`."""
        del blocks, num_updates, controls
        fresh = self._fresh(rng_key, particles.ready.y.shape[0])
        if self.paths is not Paths.STORED:
            return Queue(particles.waiting, fresh), {}
        dynamics = self._dynamics(target, objective)
        moved = self._advanced(dynamics, theta, particles.waiting, jnp.arange(self.num_batches))
        waiting = jax.tree.map(lambda new, leaf: jnp.concatenate([new[None], leaf[:-1]]), fresh, moved)
        return Queue(waiting, jax.tree.map(lambda leaf: leaf[-1], moved)), {}

    def _advanced(self, dynamics: Dynamics, theta: Theta, batches: Batch, places: Array) -> Batch:
        """Batches [num_batches, ...], each moved on by its share of the steps from its place in the queue."""
        share = (len(self.times) - 1) // self.num_batches

        def one(batch: Batch, index: Array) -> Batch:
            here = jax.tree.map(lambda leaf: leaf[index], dynamics.grid)
            y, rate = dynamics.advance(theta, here, batch.y, batch.key)
            return Batch(batch.key, y, batch.path.at[index].set(batch.y), batch.cost + rate)

        return lax.fori_loop(0, share, lambda k, batches: jax.vmap(one)(batches, share * places + k), batches)

    def assess(
        self, rng_key: Array, target: Target, theta: Theta, particles: Queue, blocks: Blocks, objective: Any
    ) -> Assessed:
        """See `Sampler.assess`."""
        del rng_key, blocks
        dynamics, batch = self._dynamics(target, objective), particles.ready
        ends_of = lambda y, cost: self._ends(objective, y, cost)  # noqa: E731
        if self.paths is Paths.CHECKPOINTED:
            gradient, said = checkpointed_backward(dynamics, theta, batch.y, batch.key, ends_of)
        else:
            stored = self.paths is Paths.STORED
            y, path, cost = (
                (batch.y, batch.path, batch.cost) if stored else simulate(dynamics, theta, batch.y, batch.key)
            )
            ends, said = ends_of(y, cost)
            gradient = backward(dynamics, theta, path, batch.key, ends)
        flat, _ = ravel_pytree(gradient)
        return Assessed(flat, said.loss, jnp.ones_like(said.loss), said.diagnostics, said.num_masked)

    def _ends(self, objective: Reward, y: Array, cost: Array) -> tuple[Ends, "_Said"]:
        """The loss at the ends [N, ...] of paths that cost [N], and its gradient there."""
        weight, rated, kl = objective.kl_weight, rate(objective, y), jnp.mean(cost)
        of_kl = jnp.full_like(cost, weight / len(cost))
        if self.gradient is Gradient.ADJOINT:
            ends = Ends(jax.grad(lambda y: -rate(objective, y).mean)(y), None, of_kl)
        else:
            total = weight * cost - rated.rewards
            centred = jnp.where(rated.kept, total - jnp.sum(jnp.where(rated.kept, rated.share * total, 0.0)), 0.0)
            ends = Ends(None, centred / jnp.maximum(len(cost) - rated.num_masked - 1, 1), of_kl)
        lost = ~jnp.all(jnp.isfinite(y.reshape(len(y), -1)), 1)
        diagnostics = {"reward": rated.mean, "num_nonfinite": jnp.sum(lost, dtype=jnp.int32)}
        diagnostics |= {} if objective.kl is None else {"path_kl": kl}
        return ends, _Said(weight * kl - rated.mean, diagnostics, rated.num_masked)

    # -- the rest -----------------------------------------------------------------------------------------------------
    def draw(
        self, rng_key: Array, target: Target, theta: Theta, particles: Queue, blocks: Blocks, num: int
    ) -> dict[str, Array]:
        """See `Sampler.draw`."""
        del particles, blocks
        batch = self._fresh(rng_key, num)
        dynamics = Dynamics(drift_of(target), None, self._grid(batch.y.dtype))
        step = lambda y, here: (dynamics.advance(theta, here, y, batch.key)[0], None)  # noqa: E731
        return {"y": lax.scan(step, batch.y, dynamics.grid)[0]}

    def size(self, particles: Queue) -> int:
        """See `Sampler.size`."""
        return particles.ready.y.shape[0]

    def _dynamics(self, target: Target, objective: Any) -> Dynamics:
        grid = self._grid(jnp.result_type(float))
        return Dynamics(drift_of(target), reference_of(target, objective), grid)

    def _grid(self, dtype: Any) -> Grid:
        times = np.asarray(self.times)
        noise = jnp.asarray(self._noise_scales(), dtype)
        number = jnp.arange(len(times) - 1)
        return Grid(number, jnp.asarray(times[:-1], dtype), jnp.asarray(np.diff(times), dtype), noise)

    def _noise_scales(self) -> Array | np.ndarray:
        times = np.asarray(self.times[:-1])
        if callable(self.noise_scale):
            return jax.vmap(self.noise_scale)(jnp.asarray(times))
        return np.full(times.shape, self.noise_scale)


class _Said(NamedTuple):
    loss: Array
    diagnostics: dict[str, Array]
    num_masked: Array
