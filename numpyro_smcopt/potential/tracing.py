# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One run of a model under chosen values, and what its sites say.

A model is always run below a `block` handler and a seed of its own: its sites neither leak into a user's handlers nor
can they be altered by them.
"""

import contextlib
import inspect
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_uniform
from numpyro.infer.util import _unconstrain_reparam, helpful_support_errors

from numpyro_smcopt.types import Array, Model, Theta


def trace_model(model: Model, args: tuple, kwargs: dict, rng_key: Array, validate: bool | None = None) -> dict:
    """Run the model, hidden from a user's handlers; by default distributions check what NumPyro is set to check."""
    quiet = contextlib.nullcontext() if validate is None else numpyro.validation_enabled(validate)
    with _explained(model, args, kwargs), quiet, handlers.block(), handlers.seed(rng_seed=rng_key):
        return handlers.trace(model).get_trace(*args, **kwargs)


@contextlib.contextmanager
def _explained(model: Model, args: tuple, kwargs: dict) -> Iterator[None]:
    """Errors of a model that is run, in terms of what it was run with.

    What NumPyro refuses and a call that does not fit the model's signature get messages of their own; errors of the
    model itself pass as they are, with a note that lists the arguments.
    """
    try:
        yield
    except AssertionError as error:
        text = str(error)
        if found := re.search("unique names but got `(.*)` duplicated", text):
            raise ValueError(f"Two sites of the model are called '{found[1]}'. Give each a name of its own.") from error
        if "size of plate should be positive" in text:
            raise ValueError(
                f"A plate of the model has no elements (or its size is negative). The model was run with "
                f"{_shown(args, kwargs)}: pass data that are not empty, and positive sizes."
            ) from error
        error.add_note(f"The model was run with {_shown(args, kwargs)}.")
        raise
    except Exception as error:
        if isinstance(error, TypeError) and (mismatch := _mismatch(model, args, kwargs)):
            raise TypeError(
                f"The model cannot be called with {_shown(args, kwargs)}: {mismatch}. (Keyword arguments that the "
                "optimiser does not know are passed on to the model.)"
            ) from error
        note = f"The model was run with {_shown(args, kwargs)}."
        if note not in getattr(error, "__notes__", ()):
            error.add_note(note)
        raise


def _mismatch(model: Model, args: tuple, kwargs: dict) -> str | None:
    """The reason that arguments do not fit the signature of a model."""
    while hasattr(model, "fn"):  # what handlers are wrapped around
        model = model.fn
    try:
        inspect.signature(model).bind(*args, **kwargs)
    except TypeError as error:
        return str(error)
    except ValueError:  # it has none
        return None
    return None


def _shown(args: tuple, kwargs: dict) -> str:
    """Arguments in short, such as ``args[0]: float32[3], kwargs['n']: 3``."""

    def short(leaf: Any) -> str:
        if hasattr(leaf, "dtype"):
            return f"{leaf.dtype}[{', '.join(map(str, jnp.shape(leaf)))}]"
        text = repr(leaf)
        return text if len(text) <= 40 else f"{text[:40]}..."

    leaves = [
        (f"{name}{jax.tree_util.keystr(path)}", leaf)
        for name, values in (("args", args), ("kwargs", kwargs))
        for path, leaf in jax.tree_util.tree_leaves_with_path(values, is_leaf=lambda value: value is None)
    ]
    return ", ".join(f"{name}: {short(leaf)}" for name, leaf in leaves) or "no arguments"


def drawable(model: Model, improper: set[str]) -> Model:
    """The model with values at the sites that have no sampler, so that a trace can go on; notes their names."""

    def stand_in(site: dict) -> Any:
        if site["type"] != "sample" or site["is_observed"] or site["value"] is not None:
            return None
        try:
            site["fn"].sample(random.key(0))
        except NotImplementedError:
            improper.add(site["name"])
            return init_to_uniform()(site | {"kwargs": site["kwargs"] | {"rng_key": random.key(0)}})
        return None

    return handlers.substitute(model, substitute_fn=stand_in)


def substitution(theta: Theta, latents: dict[str, Array]) -> Callable[[dict], Any]:
    """Unconstrained values of param and latent sites, for `numpyro.handlers.substitute`."""

    def value_of(site: dict) -> Any:
        if site["type"] == "param":
            return constrained_param(site, theta)
        if site["type"] == "sample" and site["name"] in latents:
            return _unconstrain_reparam(latents, site)
        return None

    return value_of


def constrained_param(site: dict, theta: Theta) -> Any:
    """The value of a param site at ``theta``, on the scale of the model; None if ``theta`` does not have it."""
    if site["name"] not in theta:
        return None
    return map_constraint(site, lambda transform, v: transform(v), theta[site["name"]])


def map_constraint(site: dict, fn: Callable, value: Any) -> Any:
    """``fn(transform, leaf)`` over the leaves of a param site, ``transform`` being that of its constraint."""
    with helpful_support_errors(site | {"fn": None}):
        transform = biject_to(site["kwargs"].get("constraint", constraints.real))
    return jax.tree.map(lambda leaf: fn(transform, leaf), value)


def unconstrained(site: dict) -> Array:
    """The value of a sample site on unconstrained space."""
    with helpful_support_errors(site):
        return biject_to(site["fn"].support).inv(site["value"])


def is_real(constraint: constraints.Constraint) -> bool:
    """True if a constraint constrains nothing."""
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def log_prob_of(site: dict) -> Array:
    """The scaled log density of a sample site, unsummed."""
    value, intermediates, scale = site["value"], site["intermediates"], site["scale"]
    log_prob = site["fn"].log_prob(value, intermediates) if intermediates else site["fn"].log_prob(value)
    if site["is_observed"] and _support_moves(site["fn"]):
        log_prob = jnp.where(_in_support(site["fn"], value), log_prob, -jnp.inf)
    return log_prob if scale is None else scale * log_prob


def _support_moves(fn: dist.Distribution) -> bool:
    """True if parameters say what values are possible: densities do not look at that themselves."""
    while isinstance(fn, dist.Independent | dist.ExpandedDistribution | dist.MaskedDistribution):
        fn = fn.base_dist
    depends = isinstance(getattr(type(fn), "support", None), constraints.dependent_property)
    return depends and (not fn.support.is_discrete or isinstance(fn, dist.DiscreteUniform))


def _in_support(fn: dist.Distribution, value: Array) -> Array:
    if isinstance(fn, dist.MaskedDistribution):
        return _in_support(fn.base_dist, value) | ~jnp.asarray(fn._mask)
    return fn.support(value)


def is_prior(name: str, latents: dict[str, Any]) -> bool:
    """True for a latent, and for the log-Jacobian of one: `_<latent>_log_det`, below the latent's own scope."""
    factors = {f"_{latent}_log_det": latent for latent in latents if name.endswith(f"_{latent}_log_det")}
    return name in latents or any(latent.startswith(name.removesuffix(end)) for end, latent in factors.items())


def enumerated_terms(
    model: Model, args: tuple, kwargs: dict, latents: dict[str, Any]
) -> tuple[list[Array], list[Array]]:
    """Log densities of a model whose discrete latents are summed out, unsummed over the plates where that can be.

    A discrete site ties together what depends on it, and no more: a sum over a site that stands in a plate leaves one
    term for each element of the plate.

    Args:
        model: The model under chosen values of everything that is not discrete.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        latents: The continuous latents, by name.

    Returns:
        Pairs of arrays, one pair for each set of plates: the prior of the continuous latents (itself summed over the
        discrete sites), and what the observations add.
    """
    import funsor
    from numpyro.contrib.funsor import log_density, plate_to_enum_plate
    from numpyro.contrib.funsor import trace as packed_trace

    model = enumerated_model(model, args, kwargs)
    with _explained(model, args, kwargs), handlers.block(), handlers.seed(rng_seed=random.key(0)):
        with plate_to_enum_plate():
            trace = packed_trace(model).get_trace(*args, **kwargs)
        sites = {name: site for name, site in trace.items() if site["type"] == "sample"}
        given = {name for name, site in sites.items() if site["is_observed"] and not is_prior(name, latents)}
        if any(dim.startswith("_") for site in sites.values() for dim in site["infer"]["dim_to_name"].values()):
            # A chain along `scan` is eliminated by an algorithm of its own, whole.
            total, _ = log_density(model, args, kwargs, {})
            prior, _ = log_density(handlers.block(model, hide_fn=lambda site: site["name"] in given), args, kwargs, {})
            return [prior], [total - prior]
    discrete = frozenset(name for name, site in sites.items() if not site["is_observed"])
    plates = frozenset(frame.name for site in sites.values() for frame in site["cond_indep_stack"])
    factors = {name: _factor(site) for name, site in sites.items()}
    totals = _summed_out(list(factors.values()), discrete, plates)
    priors = _summed_out([factor for name, factor in factors.items() if name not in given], discrete, plates)
    zero = funsor.Number(0.0)
    keys = sorted({*totals, *priors}, key=sorted)
    before = [priors.get(key, zero) for key in keys]
    after = [totals.get(key, zero) - prior for key, prior in zip(keys, before, strict=True)]
    return [jnp.asarray(v.data) for v in before], [jnp.asarray(v.data) for v in after]


def _factor(site: dict) -> Any:
    """The log density of a site as a funsor, whose inputs are plates and discrete sites."""
    import funsor

    log_prob, names = log_prob_of(site), site["infer"]["dim_to_name"]
    if not names and all(size == 1 for size in log_prob.shape):
        log_prob = jnp.reshape(log_prob, ())
    return funsor.to_funsor(log_prob, output=funsor.Real, dim_to_name=names)


def _summed_out(factors: list, discrete: frozenset[str], plates: frozenset[str]) -> dict[frozenset[str], Any]:
    """Sum over the discrete sites, and add up what stands in the same plates; by set of plates.

    Factors that are tied by discrete sites stay apart along the plates in which all of those sites stand.
    """
    import funsor

    found: dict[frozenset[str], Any] = {}
    for tied in _components(factors, discrete):
        here = frozenset[str]().union(*(discrete.intersection(factor.inputs) for factor in tied))
        if here:
            apart = plates.intersection(*(factor.inputs for factor in tied))
            summed = funsor.sum_product.sum_product(
                funsor.ops.logaddexp, funsor.ops.add, tied, eliminate=here | (plates - apart), plates=plates - apart
            )
        else:
            (summed,) = tied
        key = frozenset(summed.inputs)
        found[key] = found[key] + summed if key in found else summed
    return found


def _components(factors: list, discrete: frozenset[str]) -> list[list]:
    """Factors that share discrete sites, together."""
    components: list[tuple[set[str], list]] = []
    for factor in factors:
        names, together = set(discrete.intersection(factor.inputs)), [factor]
        apart = []
        for other, members in components:
            if names & other:
                names, together = names | other, members + together
            else:
                apart.append((other, members))
        components = [*apart, (names, together)]
    return [members for _, members in components]


def enumerated_model(model: Model, args: tuple, kwargs: dict) -> Model:
    """The model with its discrete latents laid out along new dimensions, left of all plates."""
    from numpyro.contrib.funsor import config_enumerate, enum

    with handlers.block(), handlers.seed(rng_seed=random.key(0)):
        trace = handlers.trace(model).get_trace(*args, **kwargs)
    dims = [frame.dim for site in trace.values() for frame in site.get("cond_indep_stack", [])]
    return enum(config_enumerate(model), first_available_dim=min(dims, default=0) - 1)
