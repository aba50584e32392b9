# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The divergence of a sampler's paths from those of a pretrained one, KL(model || reference) on the law of the path.

    KL = E sum_t h_t / (2 sigma_t^2) |b_theta(s_t, Y_t) - b_ref(s_t, Y_t)|^2

It is exact for a diffusion in finitely many steps, and no less than the divergence of the ends; see `samplers.paths`.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene
from numpyro_smcopt.objectives.divergences import check_params
from numpyro_smcopt.potential import Target, strong
from numpyro_smcopt.types import Params, Theta


@dataclasses.dataclass(frozen=True, eq=False)
class PathKL(Objective):
    """KL(model || reference) of whole paths, a penalty for `Reward` with `samplers.EulerMaruyama`.

    Args:
        reference_params: Constrained parameters of the model; the reference is the sampler there.
    """

    reference_params: Params
    of_paths = True  # what samplers of paths ask for

    def __post_init__(self) -> None:
        """Hold the parameters as arrays of JAX."""
        params = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf)), self.reference_params)
        object.__setattr__(self, "reference_params", params)

    @property
    def arrays(self) -> Any:
        """The parameters of the reference."""
        return self.reference_params

    def check(self, target: Target, theta: Theta) -> None:
        """See `Objective.check`."""
        del theta
        if target.sites.latents:
            raise ValueError(
                "PathKL compares the paths of samplers.EulerMaruyama. A model with latent sites has a law without "
                "paths: use ForwardKL or ReverseKL."
            )
        check_params(target, self.reference_params, "reference_params")

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """Not of a cloud: the sampler differentiates it along its paths."""
        raise NotImplementedError("PathKL is differentiated by samplers.EulerMaruyama")
