# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Minus the log marginal likelihood.

F(theta) = -log p_theta(y),        grad F = E_pi[ grad_theta U_theta ]        (Fisher's identity)
"""

import dataclasses

import jax.numpy as jnp

from numpyro_smcopt.control_variates import calibrated_weights
from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene
from numpyro_smcopt.potential import Target
from numpyro_smcopt.types import Theta


@dataclasses.dataclass(frozen=True)
class MarginalLikelihood(Objective):
    """Minus the log marginal likelihood; terms that depend on no latent are the same for every particle.

    Args:
        control_variates: Whether the weights are calibrated by Stein control variates (see `control_variates`), which
            takes most of the noise out of the gradient. Needs a density that is continuous in the latents.
    """

    control_variates: bool = True
    is_likelihood = True
    whole_particles = False

    def check(self, target: Target, theta: Theta) -> None:
        """Refuse a model without observations, of which every theta is as likely as any other."""
        del theta
        sites = target.sites
        if sites.num_latents and all(is_prior for _, _, is_prior in sites.terms):
            raise ValueError(
                f"The model observes nothing: all of its sample sites ({', '.join(map(repr, sites.latents))}) are "
                "latent. Pass the observations to the model, as the argument that becomes `obs=`, or condition it on "
                "them with numpyro.handlers.condition."
            )

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """See `Objective.estimate`."""
        del scene
        num_particles = cloud.x.shape[0]
        weights = jnp.exp(cloud.log_weights)
        if self.control_variates and cloud.x.shape[1]:
            weights = calibrated_weights(cloud.x, cloud.grad, cloud.log_weights, cloud.blocks)
        free = jnp.full(num_particles, 1 / num_particles, weights.dtype)
        return Estimate(weights, free, -jnp.asarray(cloud.log_evidence))
