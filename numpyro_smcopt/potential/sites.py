# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Parameters, latents and energy terms of a model, from one abstract trace."""

import math
from collections import Counter
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
from jax import random
from numpyro import handlers

from numpyro_smcopt.potential.checks import check_observed, check_param, refuse_unsupported
from numpyro_smcopt.potential.proper_latents import is_masked, kept, proper_latents
from numpyro_smcopt.potential.tracing import (
    drawable,
    enumerated_terms,
    is_prior,
    log_prob_of,
    substitution,
    trace_model,
    unconstrained,
)
from numpyro_smcopt.types import Array, Model

ENUMERATED = "enumerated"
"""Name of the terms that hold all but the prior of the continuous latents, if discrete latents are summed out."""


class LatentSite(NamedTuple):
    """A latent site: its shape on unconstrained space and the plates that it stands in."""

    shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int], ...]  # (name, dim, size); dim counts from the right of the batch shape
    event_dim: int  # of the unconstrained value


class Sites(NamedTuple):
    """The sites of a model, from one trace: shapes and names, no arrays."""

    params: tuple[str, ...]
    latents: dict[str, LatentSite]
    terms: tuple[tuple[str, int, bool], ...]  # (site, number of terms, whether it belongs to the prior)
    term_shapes: tuple[tuple[int, ...], ...]  # of the terms of each
    enumerated: bool
    improper: tuple[str, ...]  # latents whose prior cannot be drawn from
    flat: tuple[str, ...] = ()  # those whose prior has no density
    masked: tuple[str, ...] = ()  # latents some elements of which may stand beside the model
    observed: tuple[str, ...] = ()  # sites with observations; factors are none
    num_observations: int | None = 0  # batch elements of observed sites; None where masks or scales decide
    discrete_data: bool = False  # all of them, without factors, so that the evidence is a probability

    @property
    def can_draw_prior(self) -> bool:
        """True if all latents can be drawn from their prior."""
        return not self.improper

    @property
    def num_latents(self) -> int:
        """D, the length of a particle."""
        return sum(math.prod(site.shape) for site in self.latents.values())

    @property
    def num_terms(self) -> int:
        """K."""
        return sum(size for _, size, _ in self.terms)

    @property
    def prior_mask(self) -> np.ndarray:
        """[K] whether a term belongs to the prior of the latents (their log-Jacobians included)."""
        return np.concatenate([np.full(size, prior) for _, size, prior in self.terms] or [np.zeros(0, bool)])

    @property
    def jacobian_mask(self) -> np.ndarray:
        """[K] whether a term is the log-Jacobian of a latent, and no density."""
        marks = [np.full(size, prior and name not in self.latents) for name, size, prior in self.terms]
        return np.concatenate(marks or [np.zeros(0, bool)])

    @property
    def units(self) -> np.ndarray:
        """[D] a guess of which coordinates belong together: those with the same index in the same plate.

        Of several plates the one that most sites share is taken, which for nested plates is the outer one.
        """
        shared = Counter(plate[0] for site in self.latents.values() for plate in site.plates)
        unit_of: dict[Any, int] = {}
        units: list[int] = []
        for name, site in self.latents.items():
            index = np.arange(math.prod(site.shape)).reshape(site.shape)
            keys: Any = [(name, k) for k in range(index.size)]
            if site.plates:
                plate, dim, _ = max(site.plates, key=lambda plate: (shared[plate[0]], plate[2]))
                axis = index.ndim - site.event_dim + dim
                if 0 <= axis < index.ndim:
                    keys = [(plate, k) for k in np.indices(site.shape)[axis].ravel()]
            units += [unit_of.setdefault(key, len(unit_of)) for key in keys]
        return np.asarray(units, int)

    def unravel(self, x: Array) -> dict[str, Array]:
        """One particle ``[D]`` as a dictionary of unconstrained latent sites."""
        values, start = {}, 0
        for name, site in self.latents.items():
            size = math.prod(site.shape)
            values[name] = x[start : start + size].reshape(site.shape)
            start += size
        return values


def read_sites(model: Model, args: tuple, kwargs: dict) -> Sites:
    """Trace the model without computing anything and describe its sites."""
    model = proper_latents(model)
    found: dict[str, Any] = {}
    improper: set[str] = set()

    def probe(rng_key: Array) -> None:
        trace = trace_model(drawable(model, improper), args, kwargs, rng_key, validate=False)
        found["trace"] = {name: _describe(site) for name, site in trace.items()}

    try:
        jax.eval_shape(probe, random.key(0))
    except (
        jax.errors.ConcretizationTypeError,
        jax.errors.NonConcreteBooleanIndexError,
        jax.errors.TracerArrayConversionError,
        jax.errors.TracerIntegerConversionError,
    ) as error:
        raise ValueError(
            "The model looks at the values of an array argument (a size computed from data, an `if` on an array, a "
            "call of NumPy). Arrays are traced, so that new data do not recompile: compute such values before and "
            "pass them as Python integers, or bind the array with `functools.partial(model, ...)`."
        ) from error
    trace = found["trace"]
    refuse_unsupported(trace)
    params = tuple(
        name for name, site in trace.items() if site["type"] == "param" and site["leaves"] and not _is_free(name, trace)
    )
    discrete = [name for name, site in trace.items() if site["discrete"]]
    latents = {
        name: LatentSite(site["shape"], site["plates"], site["event_dim"])
        for name, site in trace.items()
        if site["latent"] and name not in discrete
    }
    observed = tuple(name for name, site in trace.items() if site["observed"])
    priors = {f"{name}_prior" for name in params}  # of `latents_to_params`
    data = [name for name in observed if name not in priors]
    num_observations = sum(trace[name]["num_observed"] for name in data)
    weighted = any(trace[name]["weighted"] for name in data)
    if data and not num_observations:
        raise ValueError(
            f"There are no observations: the data of {', '.join(map(repr, data))} are empty. Pass data of at least one "
            "element."
        )
    flat, masked = (tuple(name for name in latents if trace[name][fact]) for fact in ("flat", "masked"))
    counted = None if weighted else num_observations
    all_discrete = all(site["discrete_data"] for site in trace.values() if site["given"])
    seen = observed, counted, all_discrete and not improper
    sites = Sites(params, latents, (), (), bool(discrete), tuple(sorted(improper)), flat, masked, *seen)
    found_terms = _read_terms(model, args, kwargs, sites, trace)
    terms = tuple((name, math.prod(shape), prior) for name, shape, prior in found_terms)
    return sites._replace(terms=terms, term_shapes=tuple(shape for _, shape, _ in found_terms))


def _read_terms(
    model: Model, args: tuple, kwargs: dict, sites: Sites, trace: dict
) -> list[tuple[str, tuple[int, ...], bool]]:
    found: list[tuple[str, tuple[int, ...], bool]] = []

    def probe(x: Array, rng_key: Array) -> None:
        latents = sites.unravel(x)
        bound = handlers.substitute(model, substitute_fn=substitution({}, latents))
        if sites.enumerated:
            for prior, rest in zip(*enumerated_terms(bound, args, kwargs, latents), strict=True):
                found.extend([("prior", prior.shape, True), (ENUMERATED, rest.shape, False)])
            return
        for name, site in trace_model(bound, args, kwargs, rng_key, validate=False).items():
            if site["type"] == "sample":
                if site["is_observed"] and name in trace:
                    check_observed(name, site)
                found.append((name, jnp.shape(log_prob_of(site)), is_prior(name, latents)))

    jax.eval_shape(probe, jax.ShapeDtypeStruct((sites.num_latents,), jnp.result_type(float)), random.key(0))
    return found


def _is_free(name: str, trace: dict) -> bool:
    """True if a param site only chooses between equivalent forms of the model, as that of `LocScaleReparam(None)`."""
    return name.endswith("_centered") and f"{name.removesuffix('_centered')}_decentered" in trace


def _describe(site: dict) -> dict:
    """A record of a site, as plain Python (the trace itself holds tracers)."""
    latent = site["type"] == "sample" and not site["is_observed"]
    observed = site["type"] == "sample" and site["is_observed"] and not isinstance(_base(site["fn"]), dist.Unit)
    facts: dict[str, Any] = {
        "type": site["type"],
        "latent": latent,
        "observed": observed,
        "discrete": False,
        "leaves": 0,
        "num_observed": 0,
        "given": site["type"] == "sample" and site["is_observed"],
        "discrete_data": observed and site["fn"].support is not None and bool(site["fn"].support.is_discrete),
    }
    if site["type"] == "plate":
        facts["args"] = site["args"]
        facts["drawn"] = site["kwargs"].get("rng_key") is not None
    if site["type"] == "param":
        facts["leaves"] = len(jax.tree.leaves(site["value"]))
        check_param(site["name"], site["value"])
    if observed:
        check_observed(site["name"], site)
        batch = jnp.shape(site["value"])[: jnp.ndim(site["value"]) - len(site["fn"].event_shape)]
        facts["num_observed"] = math.prod(np.broadcast_shapes(batch, site["fn"].batch_shape))
        facts["weighted"] = kept(site["fn"]) is not True or site["scale"] is not None
    if latent:
        facts["scaled"] = site["scale"] is not None and not (
            isinstance(site["scale"], float | int | np.ndarray) and np.all(np.equal(site["scale"], 1))
        )
        facts["masked"] = is_masked(site["fn"])
        facts["flat"] = isinstance(_base(site["fn"]), dist.ImproperUniform)
        facts["delta"] = isinstance(_base(site["fn"]), dist.Delta)
        facts["discrete"] = bool(site["fn"].support.is_discrete)
        facts["can_enumerate"] = facts["discrete"] and bool(site["fn"].has_enumerate_support)
        facts["plates"] = tuple((frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"])
        if not facts["discrete"]:
            value = unconstrained(site)
            facts["shape"] = tuple(jnp.shape(value))
            facts["event_dim"] = jnp.ndim(value) - len(site["fn"].batch_shape)
    return facts


def _base(fn: dist.Distribution) -> dist.Distribution:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
