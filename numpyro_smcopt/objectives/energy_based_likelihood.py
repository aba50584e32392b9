# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Maximum likelihood of an energy-based model ``p_theta(x) = exp(-U_theta(x)) / Z_theta``.

    F(theta) = mean_j U_theta(x_j) + log Z_theta,        grad F = E_data[ grad U ] - E_pi[ grad U ]

With persistent particles and no weights (`ImplicitDiffusion`) this is persistent contrastive divergence; with weights
(`SMCOptimizer` and `kernels.ULA`) it is the estimator from Jarzynski's equality, which has no bias from particles that
lag behind theta, and knows ``log Z_theta``.

Source: Tieleman 2008; Carbone, Hua, Coste and Vanden-Eijnden 2023.
"""

import dataclasses
from typing import Any

from numpyro_smcopt.objectives.base import Cloud, Estimate, Objective, Scene, refuse_observations
from numpyro_smcopt.objectives.divergences import contrast
from numpyro_smcopt.objectives.samples import as_arrays, by_site, check_batch_size, some_of
from numpyro_smcopt.potential import Target
from numpyro_smcopt.types import Theta


@dataclasses.dataclass(frozen=True, eq=False)
class EnergyBasedLikelihood(Objective):
    """Minus the mean log likelihood of data under the law of the model's latents.

    The reported loss is ``mean_j U_theta(x_j) + log Z_theta`` in nats per datum; where the normalising constant of the
    start is not known (an improper base measure), it lacks that constant.

    Args:
        data: The observations of the latent sites: ``{latent site: [J, ...]}`` on the scale of the model, or an array
            [J, ...] if the model has a single latent site.
        batch_size: How many of them a gradient uses, drawn anew each time; all by default.

    Raises:
        TypeError: If the data are no arrays.
        ValueError: If they are empty, ragged or not finite.
    """

    data: Any
    batch_size: int | None = None

    def __post_init__(self) -> None:
        """Check the data, and hold them as arrays of JAX."""
        check_batch_size(self.batch_size)
        object.__setattr__(self, "data", as_arrays(self.data, "data"))

    @property
    def arrays(self) -> Any:
        """The data."""
        return self.data

    def check(self, target: Target, theta: Theta) -> None:
        """See `Objective.check`."""
        refuse_observations(target, "EnergyBasedLikelihood")
        by_site(target, theta, self.data, "data")

    def estimate(self, scene: Scene, cloud: Cloud) -> Estimate:
        """See `Objective.estimate`."""
        return contrast(scene, cloud, some_of(scene.rng_key, scene.arrays, self.batch_size), "data")
