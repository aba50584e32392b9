# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A handler that turns latents into parameters."""

from collections.abc import Iterable
from typing import Any

import jax.numpy as jnp
import numpyro
from numpyro.distributions import biject_to
from numpyro.infer.util import helpful_support_errors
from numpyro.primitives import Messenger

from numpyro_smcopt.types import Model


class latents_to_params(Messenger):  # noqa: N801 - a handler, named as NumPyro names them
    """Turn latent sites of a model into parameters, so that they are estimated instead of integrated out.

    The opposite of `numpyro.handlers.lift`. With ``keep_prior=True`` the prior density of the site (on its constrained
    scale) stays in the model as the observed site ``<name>_prior``: the estimate is a marginal maximum a posteriori.
    With ``keep_prior=False`` it is a maximum marginal likelihood estimate.

    Args:
        fn: The model.
        sites: Names of latent sample sites.
        keep_prior: Whether the prior density of these sites stays in the model.

    Raises:
        ValueError: When the model runs: if a site is observed, has its value already, or does not exist.

    Example:
        >>> import numpyro, numpyro.distributions as dist
        >>> from numpyro_smcopt import latents_to_params
        >>> def model(y):
        ...     scale = numpyro.sample("scale", dist.HalfNormal(5.0))
        ...     with numpyro.plate("groups", len(y)):
        ...         b = numpyro.sample("b", dist.Normal(0.0, scale))
        ...         numpyro.sample("y", dist.Normal(b, 1.0), obs=y)
        >>> empirical_bayes = latents_to_params(model, ["scale"], keep_prior=False)
    """

    def __init__(self, fn: Model | None = None, sites: Iterable[str] = (), keep_prior: bool = True) -> None:
        if isinstance(sites, str):
            raise TypeError(f"sites must be a collection of names, got the string '{sites}'. Write ['{sites}'].")
        self.sites = frozenset(sites)
        self.keep_prior = keep_prior
        self._seen: set[str] = set()
        super().__init__(fn)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model."""
        self._seen = set()
        result = super().__call__(*args, **kwargs)
        if missing := sorted(self.sites - self._seen):
            raise ValueError(f"latents_to_params names {missing}, but the model has no such sample sites.")
        return result

    def process_message(self, msg: dict) -> None:
        """Replace a sample message by an observed one whose value is a param site of the same name."""
        if msg["type"] != "sample" or msg["name"] not in self.sites:
            return
        if msg["is_observed"]:
            raise ValueError(f"Site '{msg['name']}' is observed and cannot become a parameter.")
        if msg["value"] is not None:
            raise ValueError(
                f"Site '{msg['name']}' has a value already (inside `scan`, or from another handler), so it cannot "
                "become a parameter. Declare it with numpyro.param, outside of `scan`."
            )
        self._seen.add(msg["name"])
        name, fn = msg["name"], msg["fn"]
        with helpful_support_errors(msg):
            # The prior median of a few draws: inside the support, and not an extreme one.
            start = lambda key: jnp.median(fn.expand((15, *fn.batch_shape)).sample(key), 0)  # noqa: E731
            center = biject_to(fn.support)
            value = numpyro.param(
                name, lambda key: center(center.inv(start(key))), constraint=fn.support, event_dim=fn.event_dim
            )
        msg["value"], msg["is_observed"], msg["name"] = value, True, f"{name}_prior"
        if not self.keep_prior:
            msg["fn"] = fn.mask(False)
