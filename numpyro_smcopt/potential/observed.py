# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The data and axes of a model: observed values, pointwise log likelihood, names of dimensions."""

import jax
import jax.numpy as jnp
from jax import random
from numpyro import handlers

from numpyro_smcopt.potential.energy import Target
from numpyro_smcopt.potential.tracing import drawable, is_prior, trace_model
from numpyro_smcopt.types import Array, Params

LARGEST_BATCH = 3e7  # numbers computed at once for the log likelihoods of several draws


def observed_data(target: Target, params: Params) -> dict[str, Array]:
    """The observed values ``{site: array}``; neither `numpyro.factor` sites nor priors of parameters count as data."""
    model = drawable(handlers.substitute(target.model, data=params), set())
    trace = trace_model(model, target.args, target.kwargs, random.key(0), validate=False)
    return {
        name: site["value"] for name, site in trace.items() if _is_data(target, name, site) and jnp.size(site["value"])
    }


def pointwise_log_likelihood(target: Target, params: Params, samples: dict[str, Array]) -> dict[str, Array]:
    """Log densities of the observed sites, one per draw and batch element, given draws of the latents.

    Args:
        target: The model and its data.
        params: Constrained parameters.
        samples: ``{site: [S, ...]}`` draws of all latent sites on the scale of the model; other sites are ignored.

    Returns:
        ``{site: [S, ...]}``, `numpyro.factor` sites included.

    Raises:
        ValueError: If a latent site is missing, or if the model has discrete latents, which are summed out and have no
            draws.
    """
    if target.sites.enumerated:
        raise ValueError(
            "The model has discrete latents, which are summed out, so its observations have no log densities of their "
            "own. Draw the discrete sites with numpyro.infer.Predictive(..., infer_discrete=True) and use "
            "numpyro.infer.log_likelihood with them."
        )
    if missing := [name for name in target.sites.latents if name not in samples]:
        raise ValueError(f"samples lacks the latent sites {missing}; take them from get_samples.")

    def one(latents: dict[str, Array]) -> dict[str, Array]:
        model = handlers.substitute(target.model, data={**params, **latents})
        trace = trace_model(model, target.args, target.kwargs, random.key(0), validate=False)
        return {
            name: site["fn"].log_prob(site["value"]) for name, site in trace.items() if _is_data(target, name, site)
        }

    latents = {name: samples[name] for name in target.sites.latents}
    if not latents:
        return {name: value[None] for name, value in one({}).items()}
    batch = max(1, int(LARGEST_BATCH / target.sites.num_terms))
    return jax.lax.map(one, latents, batch_size=batch)


def _is_data(target: Target, name: str, site: dict) -> bool:
    if site["type"] != "sample" or not site["is_observed"] or is_prior(name, target.sites.latents):
        return False
    return name.removesuffix("_prior") not in target.sites.params  # made by `latents_to_params`


def axis_names(target: Target) -> dict[str, list[str]]:
    """Names of the axes of every array site, ``{site: [name, ...]}``: plates, and ``infer={"event_dims": [...]}``.

    An axis without a name is called ``<site>_dim_<k>``, as in ArviZ; so is one whose plate has the name of a site,
    which a data set could not hold.
    """
    found: dict[str, list[str]] = {}

    def probe(rng_key: Array) -> None:
        trace = trace_model(drawable(target.model, set()), target.args, target.kwargs, rng_key, validate=False)
        variables = {name for name, site in trace.items() if site["type"] != "plate"}
        for name, site in trace.items():
            if site["type"] in ("sample", "deterministic", "param") and hasattr(site["value"], "shape"):
                found[name] = _axis_names(name, site, variables)

    jax.eval_shape(probe, random.key(0))
    return found


def _axis_names(name: str, site: dict, taken: set[str]) -> list[str]:
    shape = site["value"].shape
    names = [f"{name}_dim_{k}" for k in range(len(shape))]
    event = list(site.get("infer", {}).get("event_dims", []))
    if site["type"] == "sample":
        event_dims = [site["fn"].event_dim]
    else:  # not known: the smallest that agrees with the plates
        event_dims = list(range(len(shape) + 1))
    frames = [frame for frame in site.get("cond_indep_stack", []) if frame.name not in taken]
    for event_dim in event_dims:
        axes = {frame.name: len(shape) - event_dim + frame.dim for frame in frames}
        if all(0 <= axes[frame.name] and shape[axes[frame.name]] in (1, frame.size) for frame in frames):
            for frame in frames:
                if shape[axes[frame.name]] == frame.size:
                    names[axes[frame.name]] = frame.name
            break
    if event and len(event) <= len(shape):
        names[len(shape) - len(event) :] = event
    return names
