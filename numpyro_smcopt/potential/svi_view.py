# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A cloud of particles in the shape of NumPyro's `SVI`: a model at its estimate, and a guide that draws particles."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from numpyro import handlers

from numpyro_smcopt.types import Array, Model, Params


class SVIView(NamedTuple):
    """A fit in the form that `numpyro.infer.Predictive` and ArviZ's `from_numpyro_svi` take.

    Attributes:
        model: The model with its parameters at the estimate.
        guide: Draws one particle with the probability of its weight, and takes whatever arguments the model takes.
    """

    model: Model
    guide: Model


def make_svi_view(model: Model, params: Params, draw: Callable[[Array], dict[str, Array]]) -> SVIView:
    """The view of a cloud.

    Args:
        model: The model.
        params: Its parameters, constrained.
        draw: ``rng_key -> {latent site: value}``, constrained.
    """

    def guide(*args: Any, **kwargs: Any) -> None:
        del args, kwargs  # the particles belong to the data of the fit
        rng_key = numpyro.prng_key()
        if rng_key is None:
            raise ValueError("The guide draws particles, so it needs randomness: numpyro.handlers.seed(guide, 0).")
        for name, value in draw(rng_key).items():
            numpyro.sample(name, dist.Delta(value, event_dim=jnp.ndim(value)))

    return SVIView(handlers.substitute(model, data=params), guide)
