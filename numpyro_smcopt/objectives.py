# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What is minimised in ``theta``: losses whose gradient is an expectation under ``pi_theta``.

Every objective states its gradient estimate as one coefficient per particle and block,

    grad F(theta) ~ sum_i sum_b c_ib grad_theta U_theta(x_i)_b,

``U(x)_b`` being the energy of block b, so that a single backward pass through ``sum stop_gradient(c) U`` gives it. For
the negative log marginal likelihood, Fisher's identity ``grad(-log p_theta(y)) = E_pi[grad_theta U]`` says ``c = w``.
"""

import abc
import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.control_variates import calibrated_weights
from numpyro_smcopt.types import Array


class Cloud(NamedTuple):
    """Weighted particles of ``pi_theta``.

    Attributes:
        x: [N, D] particles.
        terms: [N, K] their energy terms.
        grad: [N, D] gradients of their energies in ``x``.
        log_weights: [N, B] normalised log weights.
        blocks: The partition of coordinates and terms.
    """

    x: Array
    terms: Array
    grad: Array
    log_weights: Array
    blocks: Blocks


class Objective(abc.ABC):
    """A loss that is minimised in ``theta``."""

    @abc.abstractmethod
    def coefficients(self, cloud: Cloud) -> tuple[Array, Array]:
        """Coefficients of the energies in the surrogate whose gradient estimates that of the loss.

        Args:
            cloud: The weighted particles; everything in it counts as constant.

        Returns:
            [N, B] coefficients of the block energies, and [N] of the terms that depend on no latent.
        """


@dataclasses.dataclass(frozen=True)
class MarginalLikelihood(Objective):
    """Minus the log marginal likelihood ``-log p_theta(y)``; gradient ``E_pi[grad_theta U]`` (Fisher's identity).

    Args:
        control_variates: Whether the weights are calibrated by Stein control variates (see `control_variates`), which
            takes most of the noise out of the gradient. Needs a density that is continuous in the latents.
    """

    control_variates: bool = True

    def coefficients(self, cloud: Cloud) -> tuple[Array, Array]:
        """The weights; terms without latents are the same for every particle."""
        num_particles = cloud.x.shape[0]
        weights = jnp.exp(cloud.log_weights)
        if self.control_variates and cloud.x.shape[1]:
            weights = calibrated_weights(cloud.x, cloud.grad, cloud.log_weights, cloud.blocks)
        return weights, jnp.full(num_particles, 1 / num_particles, weights.dtype)


def term_coefficients(objective: Objective, cloud: Cloud) -> Array:
    """[N, K]: the coefficients of `Objective.coefficients`, one per term."""
    of_blocks, of_free = objective.coefficients(cloud)
    return cloud.blocks.to_terms(of_blocks, of_free[:, None])
