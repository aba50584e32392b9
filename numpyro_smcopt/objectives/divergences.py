# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Divergences from a reference; the order of the arguments decides what is needed of it.

    ForwardKL   KL(reference || model)   needs samples of the reference    grad = E_ref[grad U] - E_pi[grad U]
    ReverseKL   KL(model || reference)   needs its energy, up to a constant    grad = Cov_pi(U_theta - U_ref, grad U)

In the reverse one ``U_theta - U_ref`` is not differentiated: its own derivative contributes the mean of a score, which
is zero.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import random

from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene, expectation, refuse_observations
from numpyro_smcopt.objectives.samples import as_arrays, by_site, check_batch_size, some_of
from numpyro_smcopt.potential import Target, strong
from numpyro_smcopt.types import Array, Params, Theta


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardKL(Objective):
    """``KL(reference || model)``: the model has to cover the reference.

    The reported value lacks the entropy of the reference, which does not depend on theta: it is the cross-entropy
    ``E_ref[U_theta] + log Z_theta`` (up to ``log Z`` of the start, if that is unknown).

    Args:
        reference_samples: Samples of the reference: ``{latent site: [J, ...]}`` on the scale of the model; an array
            [J, ...] if the model has a single latent site; or a function ``rng_key -> samples`` that draws fresh ones.
        batch_size: How many of them a gradient uses, drawn anew each time; all by default.

    Raises:
        TypeError: If the samples are neither arrays nor a function.
        ValueError: If they are empty, ragged or not finite.
    """

    reference_samples: Any
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the samples, and hold them as arrays of JAX."""
        check_batch_size(self.batch_size)
        if self.reference_samples is None:
            raise ValueError("ForwardKL needs reference_samples: samples of the reference, [J, ...].")
        if not callable(self.reference_samples):
            arrays = as_arrays(self.reference_samples, "reference_samples")
            object.__setattr__(self, "reference_samples", arrays)

    @property
    def arrays(self) -> Any:
        """The samples."""
        return () if callable(self.reference_samples) else self.reference_samples

    def check(self, target: Target, theta: Theta) -> None:
        """See `Objective.check`."""
        refuse_observations(target, "ForwardKL")
        samples = self.reference_samples
        if callable(samples):
            samples = jax.eval_shape(samples, random.key(0))
        by_site(target, theta, samples, "reference_samples")

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """See `Objective.estimate`."""
        given = self.reference_samples
        samples = given(scene.rng_key) if callable(given) else some_of(scene.rng_key, scene.arrays, self.batch_size)
        estimate = contrast(scene, cloud, samples, "reference_samples")
        return estimate._replace(diagnostics={"cross_entropy": estimate.loss})


@dataclasses.dataclass(frozen=True, eq=False)
class ReverseKL(Objective):
    """``KL(model || reference)``: the model may not go where the reference does not.

    Exactly one of the arguments is given. The reported value lacks ``log Z_ref``: it is exact if the run starts at the
    reference, else off by the constant ``log Z_start - log Z_ref``.

    Args:
        reference_energy: ``sample -> []``, minus the log density of the reference up to a constant, at one sample: a
            dict of latent sites on the scale of the model.
        reference_params: Constrained parameters of the model itself; the reference is the model there.

    Raises:
        ValueError: If none or both are given.
    """

    reference_energy: Callable[[dict[str, Array]], Array] | None = None
    reference_params: Params | None = None

    def __post_init__(self) -> None:
        """Check the arguments."""
        if (self.reference_energy is None) == (self.reference_params is None):
            raise ValueError(
                "ReverseKL needs a reference: either reference_energy, a function of one sample, or reference_params, "
                "parameters at which the model itself is the reference."
            )
        if self.reference_energy is not None and not callable(self.reference_energy):
            raise TypeError(f"reference_energy must be a function of one sample, got {self.reference_energy!r}.")
        if self.reference_params is not None:
            params = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf)), self.reference_params)
            object.__setattr__(self, "reference_params", params)

    @property
    def arrays(self) -> Any:
        """The parameters of the reference."""
        return () if self.reference_params is None else self.reference_params

    def check(self, target: Target, theta: Theta) -> None:
        """See `Objective.check`."""
        refuse_observations(target, "ReverseKL")
        if target.sites.enumerated:
            raise ValueError("ReverseKL cannot be had of a model whose discrete latents are summed out.")
        if self.reference_params is not None:
            check_params(target, self.reference_params, "reference_params")
        particle = jax.ShapeDtypeStruct((target.sites.num_latents,), jnp.result_type(float))
        energy = lambda params, theta, x: self._energy(target, params, target.constrain_latents(theta, x))  # noqa: E731
        got = jax.eval_shape(energy, self.arrays, theta, particle)
        if getattr(got, "shape", None) != ():
            raise ValueError(f"reference_energy must return one number for one sample, got {got}.")

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """See `Objective.estimate`."""
        samples = scene.samples(cloud.x)
        reference = jax.vmap(lambda one: self._energy(scene.target, scene.arrays, one))(samples)
        densities = jnp.asarray(~scene.target.sites.jacobian_mask)
        energy = jnp.sum(jnp.where(densities, cloud.terms, 0.0), 1)
        # KL(pi || ref) = E_pi[U_ref - U_theta] - log Z_theta + log Z_ref; its first variation is U_ref - U_theta.
        estimate = expectation(reference - energy, cloud)
        kl = estimate.loss - cloud.log_evidence_change
        return estimate._replace(loss=kl, curvature=1.0, diagnostics={"reverse_kl": kl})

    def _energy(self, target: Target, params: Params, sample: dict[str, Array]) -> Array:
        if self.reference_energy is not None:
            return self.reference_energy(sample)
        _, theta = target.initial_params(random.key(0), params)
        return target.energy_of(theta, {name: sample[name] for name in target.sites.latents})


def contrast(scene: Scene, cloud: Cloud, samples: Any, argument: str) -> Estimate:
    """``E_samples[U_theta] + log Z_theta``, with gradient ``E_samples[grad U] - E_pi[grad U]``."""
    rows = by_site(scene.target, scene.theta, samples, argument)

    def mean_energy(theta: Theta) -> Array:
        return jnp.mean(jax.vmap(lambda row: scene.target.energy_of(theta, row))(rows))

    return Estimate(
        coefficients=-jnp.exp(cloud.log_weights),
        free=jnp.zeros(cloud.x.shape[0], cloud.x.dtype),
        loss=mean_energy(scene.theta) + cloud.log_evidence,
        rest=mean_energy,
    )


def check_params(target: Target, params: Params, argument: str) -> None:
    """Refuse parameters that are not those of the model.

    Raises:
        ValueError: The message names ``argument`` and the site.
    """
    own, _ = jax.eval_shape(lambda key: target.initial_params(key, {}), random.key(0))
    if not isinstance(params, dict) or set(params) != set(own):
        got = sorted(params) if isinstance(params, dict) else type(params).__name__
        raise ValueError(f"{argument} must hold the param sites of the model, {sorted(own)}; got {got}.")
    for name in own:
        expected, got = (jax.tree.map(jnp.shape, value[name]) for value in (own, params))
        if expected != got:
            raise ValueError(f"{argument}['{name}'] has shape {got}, but the param site has shape {expected}.")
