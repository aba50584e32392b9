# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models and starting values that are refused, each by the name of its site and with a remedy."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.potential.conversions import as_array
from numpyro_smcopt.types import Array, Params, Theta


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
                + (" Rows without an outcome (obs_mask) are better left out." if name.endswith("_unobserved") else "")
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

    for name in latents:
        if trace[name]["scaled"]:
            raise ValueError(
                f"Latent site '{name}' stands under numpyro.handlers.scale: a power of its density has another "
                "integral, and a group that occurs n times has n latents of its own. Repeat the group n times, or put "
                "the scale around the observations only (rows that occur n times and share a latent)."
            )


def check_observed(name: str, site: dict) -> None:
    """Refuse observations that are no numbers, or whose shape does not fit that of their distribution.

    Raises:
        TypeError: If they are no array of real numbers.
        ValueError: If the shapes do not fit.
    """
    if not _is_real(site["value"]):
        raise TypeError(
            f"Observations of site '{name}' are {_kind(site['value'])}; pass an array of real numbers, such as "
            "jnp.asarray(values)."
        )
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


def check_param(name: str, value: Any) -> None:
    """Refuse a parameter whose initial value is not made of real numbers.

    Raises:
        TypeError: The message names the site.
    """
    for leaf in jax.tree.leaves(value):
        if not _is_real(leaf):
            raise TypeError(f"The initial value of param site '{name}' is {_kind(leaf)}. Give real numbers.")


def _is_real(value: Any) -> bool:
    """True for a real number or an array of such."""
    if isinstance(value, bool | int | float):
        return True
    kind = getattr(value, "dtype", None)
    real = (jnp.floating, jnp.integer, jnp.bool_)
    return kind is not None and any(jnp.issubdtype(kind, wide) for wide in real)


def _kind(value: Any) -> str:
    kind = getattr(value, "dtype", None)
    return f"a {type(value).__name__}" if kind is None else f"of dtype {kind}"


def check_key(rng_key: Any) -> None:
    """Refuse what is no single PRNG key.

    Raises:
        TypeError: The message says what was got.
    """
    shape, kind = jnp.shape(rng_key) if hasattr(rng_key, "dtype") else None, getattr(rng_key, "dtype", None)
    if kind is not None and jax.dtypes.issubdtype(kind, jax.dtypes.prng_key):
        fits = shape == ()
    else:  # a key of the old kind
        fits = kind == np.uint32 and shape == jax.eval_shape(random.PRNGKey, 0).shape
    if not fits:
        got = f"an array {kind}{list(shape)}" if shape is not None else repr(rng_key)[:60]
        raise TypeError(f"rng_key must be a single key such as jax.random.key(0), got {got}.")


def check_init_params(names: Sequence[str], init_params: Any) -> Params:
    """Refuse names that are no `param` site, and values that are no numbers.

    Args:
        names: The param sites of the model.
        init_params: What the user gave.

    Returns:
        The same as arrays.

    Raises:
        TypeError: If ``init_params`` is no dictionary, or a value in it no array of real numbers.
        ValueError: If a name is unknown, or a number would be lost, see `conversions.as_array`.
    """
    if not isinstance(init_params, dict):
        raise TypeError(f"init_params must be a dict of constrained values by site, got {type(init_params).__name__}.")
    unknown = sorted(set(init_params) - set(names))
    if unknown:
        raise ValueError(f"init_params names {unknown}, which are no param sites. The param sites are {list(names)}.")
    return jax.tree_util.tree_map_with_path(_constrained_value, init_params)


def _constrained_value(path: tuple, leaf: Any) -> Array:
    name = f"init_params{jax.tree_util.keystr(path)}"
    value = as_array(leaf, name) if isinstance(leaf, bool | int | float) or hasattr(leaf, "__array__") else leaf
    if not _is_real(value):
        raise TypeError(f"{name} is {_kind(leaf)}. Give a constrained value: real numbers.")
    return value


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
