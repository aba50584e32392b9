# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Pure rules that adapt the tuning parameters of a run to what it observes.

A rule has a state that starts as `init` says, proposes a `value`, and learns in `update` from the diagnostic that it
`observes`. `effects.adapt` makes a handler of any rule; a rule of your own is as short as this::

    @dataclasses.dataclass(frozen=True)
    class Halving:
        observes: str = "num_resampled"

        def init(self, value):
            return value

        def value(self, state):
            return state

        def update(self, state, observed):
            return jnp.where(observed > 0, state / 2, state)

Which observation serves which control: the acceptance of an accept-reject move depends on its step size, but its
effective sample size does not (weights change when theta does, before the particles move), so a rule that follows the
ESS would drift to a bound. For unadjusted moves the ESS after the move does depend on the step size.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import lax

from numpyro_smcopt.types import Array
from numpyro_smcopt.weights import conditional_ess, weighted_variance

SMALLEST_SIZE = 1e-6
LARGEST_SIZE = 1e3


def adapt_size(size: Array, observed: Array, target: float | None, num_updates: Array, settle: float = 20.0) -> Array:
    """Robbins-Monro step of log step sizes towards a target.

    ``log h += rate_k (observed - target)`` with ``rate_k = max((1 + k / settle)^-0.6, 0.03)``: fast at first, never
    quite asleep, because the target follows theta. This is for accept-reject kernels: their weights do not depend on
    ``h``, their acceptance does.

    Args:
        size: [B] step sizes.
        observed: [B] acceptance.
        target: What it should be; None keeps the sizes.
        num_updates: [] updates so far.
        settle: After how many updates the rate starts to fall.
    """
    if target is None:
        return size
    rate = jnp.maximum((1 + num_updates / settle) ** -0.6, 0.03).astype(size.dtype)
    return jnp.clip(size * jnp.exp(rate * (observed - target)), SMALLEST_SIZE, LARGEST_SIZE)


def adapt_unadjusted_size(size: Array, kept: Array, target: float | None, num_updates: Array) -> Array:
    """Damped Newton step of the log step sizes of an unadjusted kernel towards what its weights shall keep.

    What one move of unadjusted Langevin costs grows as ``1 - kept ~ h^3``, so ``log h`` has to move by a third of the
    logarithm of the ratio of costs: from a step size that destroys the weights it falls as fast as from an idle one it
    grows.

    Args:
        size: [B] step sizes.
        kept: [B] fraction of the effective particles that a move kept, `weights.conditional_ess`.
        target: What it should be; None keeps the sizes.
        num_updates: [] updates so far.
    """
    if target is None:
        return size
    cost = jnp.maximum(1 - kept, 1e-3 * (1 - target))
    rate = jnp.maximum((1 + num_updates / 20.0) ** -0.6, 0.06).astype(size.dtype)
    newton = jnp.clip(jnp.log((1 - target) / cost) / 3, -1.0, 1.0)
    return jnp.clip(size * jnp.exp(rate * newton), SMALLEST_SIZE, LARGEST_SIZE)


class Adapted(NamedTuple):
    """State of `RobbinsMonro` and `EssRule`.

    Attributes:
        size: What is adapted.
        num_updates: [] so far.
    """

    size: Array
    num_updates: Array


@dataclasses.dataclass(frozen=True)
class RobbinsMonro:
    """Raise the value while the observation is above its target, lower it while it is below: see `adapt_size`.

    Args:
        target: What the observation shall be.
        settle: After how many updates the rate starts to fall.
        observes: The diagnostic; per block by default.

    Source: Robbins and Monro 1951; for acceptances, Andrieu and Thoms 2008, section 4.
    """

    target: float = 0.65
    settle: float = 20.0
    observes: str = "block_acceptance"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_fraction("target", self.target)
        _check_positive("settle", self.settle)

    def init(self, value: Array) -> Adapted:
        """From the value that is there."""
        return Adapted(value, jnp.zeros((), jnp.int32))

    def value(self, state: Adapted) -> Array:
        """The present size."""
        return state.size

    def update(self, state: Adapted, observed: Array) -> Adapted:
        """One step of the recursion."""
        size = adapt_size(state.size, observed, self.target, state.num_updates, self.settle)
        return Adapted(size, state.num_updates + 1)


class Averaged(NamedTuple):
    """State of `DualAveraging`; logarithms of sizes.

    Attributes:
        log_size: What is tried next.
        log_average: What the averages of the tries have come to.
        error: Mean of target minus observation, with a prior weight of `stabilisation`.
        centre: Where the tries are drawn to.
        num_updates: [] so far.
    """

    log_size: Array
    log_average: Array
    error: Array
    centre: Array
    num_updates: Array


@dataclasses.dataclass(frozen=True)
class DualAveraging:
    """Nesterov's dual averaging as in NUTS: quick to find the scale, and asleep after a while.

    With ``e_k`` the running mean of target minus observation, the try is ``log h = centre - sqrt(k) / gamma e_k``, and
    the answer an average of the tries that forgets as ``k^-kappa``. The tries are used for ``warmup`` updates, the
    average from then on; use `RobbinsMonro` where theta has far to go.

    Args:
        target: What the observation shall be.
        warmup: Updates after which the average is used.
        gamma: How strongly the tries are drawn to the centre.
        kappa: How fast the average forgets.
        stabilisation: Prior weight of no error, in updates.
        observes: The diagnostic; per block by default.

    Source: Hoffman and Gelman 2014, section 3.2.1.
    """

    target: float = 0.8
    warmup: int = 100
    gamma: float = 0.05
    kappa: float = 0.75
    stabilisation: float = 10.0
    observes: str = "block_acceptance"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_fraction("target", self.target)
        for name in ("warmup", "gamma", "kappa", "stabilisation"):
            _check_positive(name, getattr(self, name))

    def init(self, value: Array) -> Averaged:
        """Drawn to ten times the value that is there: large steps are cheap to try."""
        log_size = jnp.log(value)
        return Averaged(log_size, log_size, jnp.zeros_like(value), log_size + jnp.log(10.0), jnp.zeros((), jnp.int32))

    def value(self, state: Averaged) -> Array:
        """The try, and later the average."""
        return jnp.exp(jnp.where(state.num_updates < self.warmup, state.log_size, state.log_average))

    def update(self, state: Averaged, observed: Array) -> Averaged:
        """One step of the recursion."""
        k = state.num_updates + 1
        error = state.error + (self.target - observed - state.error) / (k + self.stabilisation)
        log_size = state.centre - jnp.sqrt(1.0 * k) / self.gamma * error
        log_size = jnp.clip(log_size, jnp.log(SMALLEST_SIZE), jnp.log(LARGEST_SIZE))
        average = state.log_average + (1.0 * k) ** -self.kappa * (log_size - state.log_average)
        return Averaged(log_size, average, error, state.centre, k)


@dataclasses.dataclass(frozen=True)
class EssRule:
    """Divide the value by a factor if the effective sample size is below its target, else multiply by it.

    For the step size of unadjusted moves (ULA), whose weights depend on it; for accept-reject moves it drifts to a
    bound (see the head of this file). For the learning rate it is what remark 4 of the paper asks for: one step of the
    optimiser costs an ESS of ``N exp(-rate^2 Var(grad))``, so the rate follows the ESS that it costs.

    Args:
        target: Fraction of effective particles. The ESS is that of the update alone, whatever the weights were before.
        factor: By how much the value changes; 1.01 as published, larger ones settle sooner and less closely.
        smallest: Smallest value.
        largest: Largest value.
        observes: The diagnostic; per block by default.

    Source: Cuin, Tang, Carbone and Akyildiz 2026, remark 4 and the step-size rule of their code.
    """

    target: float = 0.95
    factor: float = 1.01
    smallest: float = SMALLEST_SIZE
    largest: float = LARGEST_SIZE
    observes: str = "block_step_ess"

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_fraction("target", self.target)
        if not self.factor > 1:
            raise ValueError(f"factor must be larger than 1, got {self.factor!r}.")
        if not 0 < self.smallest <= self.largest:
            raise ValueError(f"Expected 0 < smallest <= largest, got {self.smallest!r} and {self.largest!r}.")

    def init(self, value: Array) -> Array:
        """From the value that is there."""
        return value

    def value(self, state: Array) -> Array:
        """The present value."""
        return state

    def update(self, state: Array, observed: Array) -> Array:
        """Once up or down."""
        changed = jnp.where(observed >= self.target, state * self.factor, state / self.factor)
        return jnp.clip(changed, self.smallest, self.largest)


@dataclasses.dataclass(frozen=True)
class Scheduled:
    """A value that depends on the number of updates only.

    Args:
        schedule: ``number of updates -> value``; an optax schedule, for instance.
        observes: The diagnostic that counts the updates.
    """

    schedule: Callable[[Array], Array]
    observes: str = "loss"

    def init(self, value: Array) -> Array:
        """No updates so far."""
        del value
        return jnp.zeros((), jnp.int32)

    def value(self, state: Array) -> Array:
        """The value of the schedule."""
        return jnp.asarray(self.schedule(state))

    def update(self, state: Array, observed: Array) -> Array:
        """One more."""
        del observed
        return state + 1


# -- the length of a step of theta -------------------------------------------------------------------------------------
class StepProbe(NamedTuple):
    """Effect of a step of theta on the weights; functions, so that only what is asked for is computed.

    Attributes:
        log_weights: [N, B] normalised log weights before the step.
        slopes: Step [P] -> [N, B], the derivative of the energies of the blocks along it.
        increments: Step [P] -> [N, B], ``U_theta(x) - U_{theta + step}(x)``.
    """

    log_weights: Array
    slopes: Callable[[Array], Array]
    increments: Callable[[Array], Array]


ThetaLimit: TypeAlias = Callable[[StepProbe, Array], Array]
"""``(probe, step [P]) -> []``: what is left of a step, as a factor in [0, 1]; hashable."""


def no_limit(probe: StepProbe, step: Array) -> Array:
    """All of it."""
    del probe
    return jnp.ones((), step.dtype)


@dataclasses.dataclass(frozen=True)
class FirstOrderLimit:
    """Shorten a step so that no block loses more of its effective sample size than it may, to first order.

    To first order the log increments of a step ``d`` are ``-d . grad_theta U(x)``, and if they are Gaussian the ESS
    fraction that they leave is ``exp(-Var_w(d . grad_theta U))``. So a step is multiplied by

        sqrt(-log(target_ess) / max_b Var_w(d . grad_theta U_b))

    where that is less than one: one directional derivative per particle, and no evaluation at the new theta.

    Args:
        target_ess: Fraction of effective particles that an update shall leave, whatever the weights were before.
    """

    target_ess: float = 0.9

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_fraction("target_ess", self.target_ess)

    def __call__(self, probe: StepProbe, step: Array) -> Array:
        """See `ThetaLimit`."""
        return jnp.minimum(1.0, _first_order_scale(probe, step, self.target_ess))


@dataclasses.dataclass(frozen=True)
class BisectedLimit:
    """Shorten a step so that no block loses more of its effective sample size than it may, by trying.

    Bisection on the length, between a sixteenth and sixteen times what `FirstOrderLimit` says, with the increments
    ``U_theta(x) - U_{theta + s d}(x)`` that invariant kernels weigh with. (For unadjusted kernels this is the share of
    theta in the increments; the move has its own.)

    Args:
        target_ess: Fraction of effective particles that an update shall leave, whatever the weights were before.
        num_trials: How many lengths are tried; each costs one energy of every particle.
    """

    target_ess: float = 0.9
    num_trials: int = 8

    def __post_init__(self) -> None:
        """Refuse impossible settings."""
        _check_fraction("target_ess", self.target_ess)
        _check_positive("num_trials", self.num_trials)

    def __call__(self, probe: StepProbe, step: Array) -> Array:
        """See `ThetaLimit`."""
        guess = _first_order_scale(probe, step, self.target_ess)
        low, high = jnp.log(jnp.minimum(guess, 1.0) / 16), jnp.log(jnp.minimum(16 * guess, 1.0))

        def halve(k: Array, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = bounds
            tried = jnp.where(k == 0, high, (low + high) / 2)  # the whole step may do
            ess = jnp.min(conditional_ess(probe.log_weights, probe.increments(jnp.exp(tried) * step)))
            enough = ess >= self.target_ess
            return jnp.where(enough, tried, low), jnp.where(enough, high, tried)

        return jnp.exp(lax.fori_loop(0, self.num_trials, halve, (low, high))[0])


def _first_order_scale(probe: StepProbe, step: Array, target_ess: float) -> Array:
    variance = jax.vmap(weighted_variance, in_axes=1)(probe.log_weights, probe.slopes(step))
    return jnp.sqrt(-jnp.log(target_ess) / jnp.maximum(jnp.max(variance), jnp.finfo(step.dtype).tiny))


def _check_fraction(name: str, value: float) -> None:
    if not 0 < value < 1:
        raise ValueError(f"{name} must lie within (0, 1), got {value!r}.")


def _check_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name} must be positive, got {value!r}.")
