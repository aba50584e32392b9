# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models and starting values that are refused, each by the name of its site and with a remedy."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt.types import Params, Theta


def refuse_unsupported(trace: dict) -> None:
    """Raise if a site cannot be handled.

    Args:
        trace: The sites, with the facts that `sites.read_sites` adds to them.

    Raises:
        ValueError: The message names the site and says what to do.
        ImportError: If a discrete latent would have to be summed out and funsor is not installed.
    """
    for name, site in trace.items():
        if site.get("delta", False):
            raise ValueError(
                f"Latent site '{name}' has a Delta distribution, which leaves nothing to integrate out. Use "
                "`numpyro.deterministic` instead."
            )
    discrete = [name for name, site in trace.items() if site["discrete"]]
    for name in discrete:
        if not trace[name]["can_enumerate"]:
            raise ValueError(
                f"Latent site '{name}' is discrete and its distribution has no enumerate support. Sum it out in the "
                "model (for instance a Poisson latent with a gamma rate is a GammaPoisson observation), or make it "
                "continuous."
            )
    if discrete:
        try:
            import funsor  # noqa: F401
        except ImportError as error:
            raise ImportError(
                f"Latent site '{discrete[0]}' is discrete: it is summed out by enumeration, which needs funsor. "
                "Install it with `pip install funsor`."
            ) from error
    latents = [name for name, site in trace.items() if site["latent"]]
    for name, site in trace.items():
        if site["type"] == "mutable":
            raise ValueError(
                f"Mutable site '{name}' (batch normalisation, a stateful module): a state shared by particles has no "
                "meaning here. Use layers without state, for instance LayerNorm instead of BatchNorm."
            )
        if site["type"] == "plate" and site["args"][1] not in (None, site["args"][0]):
            size, subsample = site["args"]
            local = [v for v in latents if name in [plate[0] for plate in trace[v]["plates"]]]
            if local or site["drawn"]:
                what = (
                    f"the latent sites {local} in it would have no particles to keep"
                    if local
                    else ("a fresh random subset at every evaluation is not an energy")
                )
                raise ValueError(
                    f"Plate '{name}' is subsampled ({subsample} of {size}): {what}. Use the whole plate"
                    + ("." if local else ", or fix the subset with `handlers.substitute(model, data={...: indices})`.")
                )


def check_observed_shape(name: str, site: dict) -> None:
    """Raise a ValueError if observations and distribution of a site have shapes that do not fit."""
    try:
        expected = tuple(site["fn"].shape())
    except (NotImplementedError, AttributeError):
        return
    got = tuple(jnp.shape(site["value"]))
    try:
        # Either may be spread over the other (a scalar mean, one mean per row); an outer product is a mistake.
        fits = math.prod(np.broadcast_shapes(got, expected)) <= max(math.prod(got), math.prod(expected))
    except ValueError:
        fits = False
    if not fits:
        raise ValueError(
            f"Observations of site '{name}' have shape {got}, but its distribution has shape {expected}. "
            "Pass observations of that shape (check the plate sizes and stray axes)."
        )


def check_init_params(names: Sequence[str], init_params: Any) -> None:
    """Refuse names that are no `param` site.

    Args:
        names: The param sites of the model.
        init_params: What the user gave.

    Raises:
        TypeError: If ``init_params`` is no dictionary.
        ValueError: If a name is unknown.
    """
    if not isinstance(init_params, dict):
        raise TypeError(f"init_params must be a dict of constrained values by site, got {type(init_params).__name__}.")
    unknown = sorted(set(init_params) - set(names))
    if unknown:
        raise ValueError(f"init_params names {unknown}, which are no param sites. The param sites are {list(names)}.")


def check_start(start: Params, theta: Theta) -> None:
    """Refuse starting values outside their support.

    Args:
        start: The values to start from, constrained.
        theta: The same, unconstrained.

    Raises:
        ValueError: The message names the site.
    """
    for name in theta:
        if not all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(theta[name])):
            shown = start[name] if jnp.size(jax.tree.leaves(start[name])[0]) < 10 else "a value"
            raise ValueError(
                f"Param site '{name}' starts at {shown}, which is outside the interior of its constraint (or not "
                "finite). Start inside: for a scale at a positive value, for a correlation strictly between -1 and 1."
            )
