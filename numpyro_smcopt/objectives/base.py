# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Objectives: a loss ``F(theta)`` whose gradient is an expectation under ``pi_theta = exp(-U_theta) / Z``.

Every objective states its gradient through one surrogate, whose coefficients count as constants,

    grad F(theta) ~ grad_theta [ sum_i sum_b c_ib U_theta(x_i)_b + rest(theta) ],

``U(x)_b`` being the energy of block b of particle i, so that one backward pass gives it and no gradient of a single
particle is formed. Two identities serve all of them (f does not depend on theta):

    grad(-log Z_theta)   = E_pi[ grad_theta U ]             c_i = w_i
    grad E_pi[f]         = -Cov_pi( f, grad_theta U )       c_i = -c2 w_i (f_i - <f>_w)

with ``<f>_w = sum_i w_i f_i`` and ``c2 = 1 / (1 - sum_i w_i^2)``, which is ``N / (N - 1)`` for equal weights. A loss
that is not linear in ``pi_theta`` has ``f = dF/dpi``, its first variation.

To write an objective, subclass `Objective`; `expectation` does the second identity::

    class Spread(Objective):
        def estimate(self, scene, cloud):
            x = scene.samples(cloud.x)["x"]
            deviation = (x - weighted_mean(cloud.log_weights[:, 0], x)) ** 2
            return expectation(deviation, cloud)
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.potential import Target
from numpyro_smcopt.theta_step import FisherStep, NaturalStep, ThetaStep, as_theta_step
from numpyro_smcopt.types import Array, Theta
from numpyro_smcopt.weights import small_sample_factor


class Cloud(NamedTuple):
    """Weighted particles of ``pi_theta``; all of it counts as constant.

    Attributes:
        x: [N, D] particles.
        terms: [N, K] their energy terms.
        grad: [N, D] gradients of their energies in ``x``.
        log_weights: [N, B] normalised log weights.
        blocks: The partition of coordinates and terms.
        log_evidence: [] ``log Z_theta``, or its change since the start if the start is not known.
        log_evidence_change: [] the change of ``log Z_theta`` since the start.
    """

    x: Array
    terms: Array
    grad: Array
    log_weights: Array
    blocks: Blocks
    log_evidence: Array | float = 0.0
    log_evidence_change: Array | float = 0.0


class Scene(NamedTuple):
    """The setting of an estimate.

    Attributes:
        target: The model.
        theta: Unconstrained parameters.
        arrays: The objective's own arrays, `Objective.arrays`.
        rng_key: Randomness, for objectives that use a part of their data at a time.
    """

    target: Target
    theta: Theta
    arrays: Any
    rng_key: Array

    def samples(self, x: Array) -> dict[str, Array]:
        """Particles [N, D] as ``{site: [N, ...]}`` on the scale of the model, deterministic sites included."""
        return jax.vmap(lambda one: self.target.constrain_latents(self.theta, one))(x)


class Estimate(NamedTuple):
    """Loss and gradient that an objective estimates from a cloud.

    Attributes:
        coefficients: [N, B] ``c_ib`` of the block energies.
        free: [N] coefficients of the terms that depend on no latent (with one block there are none).
        loss: [] the loss.
        rest: What else is differentiated: ``theta -> []``, or None.
        curvature: [] the curvature of the loss relative to that of ``-log pi_theta``, whose Hessian is the Fisher
            information ``Cov_pi(grad_theta U)``; a guess from above. It is what makes the default step scale-free.
        diagnostics: Further scalars to announce, by site name.
        num_masked: [] how many particles were left out because the objective was not finite there.
    """

    coefficients: Array
    free: Array
    loss: Array
    rest: Callable[[Theta], Array] | None = None
    curvature: Array | float = 1.0
    diagnostics: dict[str, Array] = {}
    num_masked: Array | int = 0


class Objective(Protocol):
    """A loss that is minimised in ``theta``.

    An object that inherits from nothing will do, if it has all of the attributes and methods below.

    Attributes:
        is_likelihood: Whether the loss is minus the log marginal likelihood of the model, however its gradient is
            estimated. Only then is its value the running log evidence, may a run start near a Laplace approximation's
            maximum or stop early, and are several runs ranked by their evidence.
        whole_particles: Whether the loss couples the latents, so that a weight must belong to a whole particle and not
            to one of its independent blocks.
    """

    is_likelihood: bool = False
    whole_particles: bool = True

    @property
    def arrays(self) -> Any:
        """Arrays for `estimate` (a pytree), which gets them back as ``scene.arrays``, traced, no constants."""
        return ()

    def default_step(self, refresh_every: int | None) -> ThetaStep:
        """The step of theta that needs no learning rate.

        Args:
            refresh_every: Updates between two evaluations of the information of theta, as their cost allows; None where
                theta is too large for any.
        """
        if not self.is_likelihood:
            return as_theta_step(optax.adam(1e-3), target_ess=0.8) if refresh_every is None else FisherStep()
        if refresh_every is None:
            return as_theta_step(optax.adam(optax.schedules.exponential_decay(1e-2, 1000, 0.3)))
        return NaturalStep(refresh_every=refresh_every)

    def check(self, target: Target, theta: Theta) -> None:
        """Refuse a model that does not go with this objective; abstract, nothing is computed.

        Raises:
            ValueError: The message names the argument and says what to do.
        """
        del target, theta

    @abc.abstractmethod
    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """Loss and gradient at ``scene.theta``.

        Args:
            scene: Model, theta, and the objective's own data.
            cloud: Weighted particles there. An objective with ``whole_particles`` is given one block: ``B = 1``.
        """


def expectation(values: Array, cloud: Cloud, loss: Array | None = None) -> Estimate:
    """The estimate of ``E_pi[f]`` with ``f`` known at the particles: coefficients ``-c2 w_i (f_i - <f>_w)``.

    Particles where ``f`` is NaN or infinite are left out and counted.

    Args:
        values: [N] ``f`` at the particles, or the first variation of a loss that is not linear in ``pi_theta``.
        cloud: The particles, in one block.
        loss: [] the loss, if it is not ``<f>_w``.
    """
    finite, log_weights = jnp.isfinite(values), cloud.log_weights[:, 0]
    kept = finite & jnp.isfinite(log_weights)
    some = jnp.any(kept)
    log_weights = jax.nn.log_softmax(jnp.where(kept | ~some, log_weights, -jnp.inf))
    weights = jnp.exp(log_weights)
    values = jnp.where(kept, values, 0.0)
    # Twice, because what is left of a large mean after the first is rounding. Not `sum(weights * values)`: see
    # `uncertainty.louis_information`.
    first = jnp.einsum("n,n->", weights, values, precision="highest")
    centred = jnp.where(kept, values - first, 0.0)
    second = jnp.einsum("n,n->", weights, centred, precision="highest")
    centred = jnp.where(kept, centred - second, 0.0)
    mean = jnp.where(some, first + second, jnp.nan)
    return Estimate(
        coefficients=-(small_sample_factor(log_weights) * weights * centred)[:, None],
        free=jnp.zeros_like(weights),
        loss=mean if loss is None else loss,
        curvature=jnp.max(centred) - jnp.min(centred),
        num_masked=jnp.sum(~finite, dtype=jnp.int32),
    )


def add(first: Estimate, second: Estimate, weight: Array | float) -> Estimate:
    """The estimate of ``F_1 + weight F_2``."""
    rests = [(1.0, first.rest), (weight, second.rest)]
    present = [(scale, rest) for scale, rest in rests if rest is not None]
    return Estimate(
        coefficients=first.coefficients + weight * second.coefficients,
        free=first.free + weight * second.free,
        loss=first.loss + weight * second.loss,
        rest=(lambda theta: sum((s * rest(theta) for s, rest in present), start=0.0)) if present else None,  # type: ignore[arg-type, return-value]
        curvature=first.curvature + weight * second.curvature,
        diagnostics=first.diagnostics | second.diagnostics,
        num_masked=first.num_masked + second.num_masked,
    )


def term_coefficients(estimate: Estimate, blocks: Blocks) -> Array:
    """[N, K]: the coefficients of an estimate, one per term."""
    return blocks.to_terms(estimate.coefficients, estimate.free[:, None])


def refuse_observations(target: Target, objective: str) -> None:
    """Raise if the model has observed sites: the objective is about the law of its latents alone.

    Raises:
        ValueError: The message names the site.
    """
    if target.sites.observed:
        name = target.sites.observed[0]
        raise ValueError(
            f"{objective} needs a model of its samples alone, an energy, but site '{name}' has observations. Remove "
            f"the site, or if pi_theta shall be the posterior given '{name}', write its log density with "
            "`numpyro.factor`."
        )
    if not target.sites.latents:
        raise ValueError(
            f"{objective} needs a model with latent sites: its samples. Declare them with `numpyro.sample` (without "
            "`obs`), and an energy with `numpyro.factor(name, -energy)`."
        )
