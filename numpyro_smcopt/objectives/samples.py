# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Samples that a user gives to an objective: data of an energy-based model, draws from a reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.potential import Target, as_array
from numpyro_smcopt.types import Array, Theta


def as_arrays(given: Any, argument: str) -> Any:
    """The arrays of ``given``, all [J, ...] with the same J.

    Args:
        given: An array, or a dictionary of arrays by latent site.
        argument: What the user calls it.

    Raises:
        TypeError: If it is something else.
        ValueError: If it is empty, ragged or not finite.
    """
    leaves = list(given.values()) if isinstance(given, dict) else [given]
    if not leaves or any(not hasattr(leaf, "shape") and not isinstance(leaf, list | tuple) for leaf in leaves):
        raise TypeError(
            f"{argument} must be an array [J, ...] of samples, or a dict of such arrays by latent site; got "
            f"{type(given).__name__}."
        )
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return given
    arrays = [np.asarray(leaf) for leaf in leaves]
    sizes = {np.shape(array)[:1] for array in arrays}
    if len(sizes) != 1 or sizes in ({()}, {(0,)}):
        raise ValueError(
            f"{argument} must hold at least one sample, and as many for every site; the leading axes are "
            f"{[np.shape(array)[:1] for array in arrays]}."
        )
    bad = sum(int(np.sum(~np.isfinite(array))) for array in arrays if array.dtype.kind == "f")
    if bad:
        raise ValueError(f"{argument} holds {bad} numbers that are NaN or infinite. Remove these samples.")
    if not isinstance(given, dict):
        return as_array(given, argument)
    return {name: as_array(leaf, f"{argument}['{name}']") for name, leaf in given.items()}


def by_site(target: Target, theta: Theta, samples: Any, argument: str) -> dict[str, Array]:
    """``samples`` as ``{latent site: [J, ...]}``.

    Args:
        target: The model.
        theta: Unconstrained parameters; only their shapes count.
        samples: A dictionary by site; or an array, if the model has a single latent site.
        argument: What the user calls it.

    Raises:
        ValueError: If sites or shapes are not those of the model.
    """
    sites = target.sites
    if sites.enumerated:
        raise ValueError(f"{argument} cannot be compared with a model whose discrete latents are summed out.")
    if not isinstance(samples, dict):
        if len(sites.latents) != 1:
            raise ValueError(
                f"{argument} is one array, but the model has the latent sites {list(sites.latents)}. Pass a dict of "
                "arrays by site."
            )
        samples = {next(iter(sites.latents)): samples}
    if set(samples) != set(sites.latents):
        raise ValueError(
            f"{argument} has the sites {sorted(samples)}, but the latent sites of the model are {list(sites.latents)}."
        )
    particle = jax.ShapeDtypeStruct((sites.num_latents,), jnp.result_type(float))
    shapes = jax.eval_shape(target.constrain_latents, theta, particle)
    for name, value in samples.items():
        if jnp.shape(value)[1:] != shapes[name].shape:
            raise ValueError(
                f"{argument} of site '{name}' has shape {jnp.shape(value)}, expected [J, ...] with rows of shape "
                f"{shapes[name].shape}."
            )
    return samples


def some_of(rng_key: Array, samples: Any, batch_size: int | None) -> Any:
    """``batch_size`` of the samples, drawn with replacement; all of them for None."""
    if batch_size is None:
        return samples
    size = jax.tree.leaves(samples)[0].shape[0]
    chosen = random.randint(rng_key, (batch_size,), 0, size)
    return jax.tree.map(lambda leaf: leaf[chosen], samples)


def check_batch_size(batch_size: int | None) -> None:
    """Refuse a batch size that is no positive integer.

    Raises:
        ValueError: If it is none.
    """
    if batch_size is not None and (not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1):
        raise ValueError(f"batch_size must be a positive integer or None (all samples), got {batch_size!r}.")
