# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A NumPyro model as a target: the energy ``U_theta(x) = -log p_theta(x, y)``, unsummed.

``theta`` holds the `numpyro.param` sites on unconstrained space, *without* a Jacobian (the maximum likelihood estimate
is invariant); ``x`` holds the latent `numpyro.sample` sites of one particle as one flat unconstrained vector, *with*
its log-Jacobian. `Target.terms` returns one term per site and batch element, so that a change of energy can be formed
as a sum of differences, and so that latents which are independent given ``theta`` can be recognised.

This is the only file of the package that traces models. A model is always run below a `block` handler and a seed of
its own: its sites neither leak into a user's handlers nor can they be altered by them.
"""

import contextlib
import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro import handlers
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_uniform
from numpyro.infer.util import _unconstrain_reparam, constrain_fn, helpful_support_errors
from numpyro.primitives import Messenger

from numpyro_smcopt.types import Array, Model, Params, Theta

ENUMERATED = "enumerated"
"""Name of the term that holds all but the prior of the continuous latents, if discrete latents are summed out."""


# -- arguments of the model: arrays are traced, everything else is static ------------------------------------------
class StaticArguments(NamedTuple):
    """The part of a model's arguments that a compiled program is built for: hashable."""

    treedef: Any
    leaves: tuple  # one entry per leaf; `_TRACED` marks a leaf that is an array
    types: tuple[type, ...]  # of the leaves, because 1 == True


class _Traced:
    """The type of the marker of array leaves; one instance, printed as an array."""

    def __repr__(self) -> str:
        return "<array>"


_TRACED = _Traced()


def split_arguments(args: tuple, kwargs: dict) -> tuple[list[Array], StaticArguments]:
    """Separate the arrays among the arguments of a model from the rest.

    Arrays and Python floats become traced arguments of the compiled programs, so new values of the same shapes do not
    recompile. Integers (plate sizes), booleans, strings, ``None`` and functions are static; so are integers and
    booleans of NumPy, also as arrays of dimension zero.

    Returns:
        The arrays, and the hashable remainder for `join_arguments`.

    Raises:
        TypeError: If an argument is neither an array nor hashable.
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    arrays: list[Array] = []
    static: list[Any] = []
    for k, leaf in enumerate(leaves):
        if isinstance(leaf, np.generic | np.ndarray) and np.ndim(leaf) == 0 and leaf.dtype.kind in "biu":
            leaf = leaf.item()
        try:
            if isinstance(leaf, bool | int | str | bytes):
                static.append(leaf)
            elif isinstance(leaf, float | complex | jax.Array) or hasattr(leaf, "__array__"):
                arrays.append(_as_array(leaf))
                static.append(_TRACED)
            else:
                hash(leaf)
                static.append(leaf)
        except TypeError as error:
            path = jax.tree_util.tree_flatten_with_path((args, kwargs))[0][k][0]
            where = ("args", "kwargs")[path[0].idx] + jax.tree_util.keystr(path[1:])
            found = getattr(leaf, "dtype", "")
            raise TypeError(
                f"Model argument {where} is {f'an array of dtype {found}' if found else f'a {type(leaf).__name__}'}, "
                "which is neither an array that JAX can hold nor hashable. Pass arrays of numbers, numbers, strings, "
                "functions or (nested) tuples, lists and dicts of them; encode labels as integers (for instance with "
                "`numpy.unique(..., return_inverse=True)`)."
            ) from error
    return arrays, StaticArguments(treedef, tuple(static), tuple(map(type, static)))


def _as_array(leaf: Any) -> Array:
    value = leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)
    return strong(jnp.asarray(value))


def join_arguments(arrays: Sequence[Array], static: StaticArguments) -> tuple[tuple, dict]:
    """Undo `split_arguments`."""
    rest = iter(arrays)
    return jax.tree.unflatten(static.treedef, [next(rest) if leaf is _TRACED else leaf for leaf in static.leaves])


def strong(value: Array) -> Array:
    """Drop the weak type of an array (a weak type costs a second trace); PRNG keys pass unchanged."""
    dtype = jnp.result_type(value)
    if jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        return value
    return jax.lax.convert_element_type(value, dtype)


# -- the sites of a model ------------------------------------------------------------------------------------------
class LatentSite(NamedTuple):
    """A latent site: its shape on unconstrained space and the plates that it stands in."""

    shape: tuple[int, ...]
    plates: tuple[tuple[str, int, int], ...]  # (name, dim, size); dim counts from the right of the batch shape
    event_dim: int  # of the unconstrained value


class Sites(NamedTuple):
    """What one trace of a model tells: shapes and names, no arrays."""

    params: tuple[str, ...]
    latents: dict[str, LatentSite]
    terms: tuple[tuple[str, int, bool], ...]  # (site, number of terms, whether it belongs to the prior)
    enumerated: bool
    can_draw_prior: bool

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


@dataclasses.dataclass(frozen=True)
class Target:
    """The energy of a model with its data bound; made anew whenever a program is traced, kept nowhere.

    Args:
        model: A callable that contains NumPyro primitives.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sites: What `read_sites` found.
        validate: Whether distributions check parameters and observations (a failed check is a NaN).
    """

    model: Model
    args: tuple
    kwargs: dict
    sites: Sites
    validate: bool = False

    def unravel(self, x: Array) -> dict[str, Array]:
        """One particle ``[D]`` as a dictionary of unconstrained latent sites."""
        values, start = {}, 0
        for name, site in self.sites.latents.items():
            size = math.prod(site.shape)
            values[name] = x[start : start + size].reshape(site.shape)
            start += size
        return values

    def terms(self, theta: Theta, x: Array) -> Array:
        """Energy terms of one particle.

        Args:
            theta: Parameters on unconstrained space.
            x: [D] one particle.

        Returns:
            [K] terms whose sum is ``-log p_theta(x, y)``, the log-Jacobian of ``x`` included.
        """
        # Parameters and particles are inside their supports by construction; data are checked once, at the start.
        with numpyro.validation_enabled(self.validate):
            return self._terms(theta, x)

    def _terms(self, theta: Theta, x: Array) -> Array:
        latents = self.unravel(x)
        model = handlers.substitute(self.model, substitute_fn=_substitution(theta, latents))
        if self.sites.enumerated:
            return self._enumerated_terms(model, latents)
        trace = _trace(model, self.args, self.kwargs, random.key(0))
        pieces = [-jnp.ravel(_log_prob(site)) for site in trace.values() if site["type"] == "sample"]
        return jnp.concatenate(pieces) if pieces else jnp.zeros(0)

    def _enumerated_terms(self, model: Model, latents: dict[str, Array]) -> Array:
        # Sums over discrete sites couple the terms, so only prior and remainder are told apart; the prior is summed
        # over the discrete sites as well.
        from numpyro.contrib.funsor import log_density

        def observed(site: dict) -> bool:
            return site.get("is_observed", False) and not _is_prior(site["name"], latents)

        model = _enumerated(model, self.args, self.kwargs)
        with handlers.block(), handlers.seed(rng_seed=random.key(0)):
            total, _ = log_density(model, self.args, self.kwargs, {})
            prior, _ = log_density(handlers.block(model, hide_fn=observed), self.args, self.kwargs, {})
        return -jnp.stack([prior, total - prior])

    def program(self, theta: Theta) -> Any:
        """The energy as a jaxpr: leaves of theta and one particle in, terms out."""
        leaves, treedef = jax.tree.flatten(theta)
        x = jax.ShapeDtypeStruct((self.sites.num_latents,), jnp.result_type(float))
        return jax.make_jaxpr(lambda *v: self.terms(jax.tree.unflatten(treedef, v[:-1]), v[-1]))(*leaves, x).jaxpr

    def work(self, theta: Theta) -> int:
        """Array elements that are computed for the energy of one particle."""
        return max(1, _elements(self.program(theta)))

    def draw_prior(self, rng_key: Array, theta: Theta) -> Array:
        """One draw [D] of the latents from their prior at ``theta``, on unconstrained space."""
        return self._draw(rng_key, theta, lambda site: None)

    def draw_start(self, rng_key: Array, theta: Theta, init_strategy: Callable | None = None) -> Array:
        """One starting point [D] from a NumPyro init strategy (`numpyro.infer.init_to_uniform` by default)."""
        return self._draw(rng_key, theta, (init_strategy or init_to_uniform)())

    def _draw(self, rng_key: Array, theta: Theta, strategy: Callable) -> Array:
        def value_of(site: dict) -> Any:
            if site["type"] == "param":
                return _constrained_param(site, theta)
            if site["type"] == "sample" and not site["is_observed"]:
                return strategy(site)
            return None

        # `seed` inside `substitute`: a strategy finds the key of its site in the message.
        model = handlers.substitute(handlers.seed(self.model, rng_key), substitute_fn=value_of)
        trace = _trace(model, self.args, self.kwargs, rng_key)
        pieces = [jnp.ravel(_unconstrained(trace[name])) for name in self.sites.latents]
        return jnp.concatenate(pieces) if pieces else jnp.zeros(0)

    def initial_params(self, rng_key: Array, init_params: Params) -> tuple[Params, Theta]:
        """Values of the param sites, constrained and unconstrained, at the start.

        Args:
            rng_key: Seed of callable initial values.
            init_params: Constrained values that replace the model's own.

        Raises:
            ValueError: If one of them has another shape than the model's own.
        """
        model = _drawable(self.model, set())
        # Bad starting values are refused by `check_start`, which knows the site.
        trace = _trace(model, self.args, self.kwargs, rng_key, validate=False)
        if init_params:
            for name, given in init_params.items():
                expected, got = (jax.tree.map(jnp.shape, value) for value in (trace[name]["value"], given))
                if expected != got:
                    raise ValueError(
                        f"init_params['{name}'] has shape {got}, but the param site has shape {expected}. Give a "
                        "constrained value of that shape."
                    )
            model = handlers.substitute(model, data=init_params)
            trace = _trace(model, self.args, self.kwargs, rng_key, validate=False)
        values = {name: jax.tree.map(_floating, trace[name]["value"]) for name in self.sites.params}
        theta = {name: _tree_map_constraint(trace[name], lambda t, v: t.inv(v), values[name]) for name in values}
        return jax.tree.map(strong, (values, theta))

    def _trace_at(self, theta: Theta) -> dict:
        # Values for the latents too: an improper one cannot be drawn.
        latents = self.unravel(jnp.zeros(self.sites.num_latents))
        model = handlers.substitute(self.model, substitute_fn=_substitution(theta, latents))
        return _trace(model, self.args, self.kwargs, random.key(0))

    def constrain_params(self, theta: Theta) -> Params:
        """``theta`` on the scale of the model."""
        trace = self._trace_at(theta)
        return {name: trace[name]["value"] for name in self.sites.params}

    def bounded_coordinates(self, theta: Theta) -> Array:
        """[P] bool: which coordinates of the flat ``theta`` belong to a constrained parameter."""
        trace = self._trace_at(theta)
        free = {name: _is_real(trace[name]["kwargs"].get("constraint", constraints.real)) for name in theta}
        marks = {
            name: jax.tree.map(lambda leaf, mark=not free[name]: jnp.full(jnp.shape(leaf), mark), theta[name])
            for name in theta
        }
        return jax.flatten_util.ravel_pytree(marks)[0]

    def constrain_latents(self, theta: Theta, x: Array) -> dict[str, Array]:
        """Latent and deterministic sites of one particle ``[D]`` at ``theta``, on the scale of the model."""
        with handlers.block(), handlers.seed(rng_seed=random.key(0)):
            model = handlers.substitute(self.model, substitute_fn=_substitution(theta, {}))
            return constrain_fn(model, self.args, self.kwargs, self.unravel(x), return_deterministic=True)


def make_target(model: Model, args: tuple, kwargs: dict) -> Target:
    """Bind a model to its arguments; the model is traced abstractly, nothing is computed.

    Raises:
        ValueError: If the model has a site that cannot be handled; the message names it and says what to do.
    """
    return Target(model, args, kwargs, read_sites(model, args, kwargs))


def read_sites(model: Model, args: tuple, kwargs: dict) -> Sites:
    """Trace the model without computing anything and describe its sites."""
    found: dict[str, Any] = {}
    improper: set[str] = set()

    def probe(rng_key: Array) -> None:
        found["trace"] = {
            name: {k: v for k, v in site.items() if k != "intermediates"} | _describe(site)
            for name, site in _trace(_drawable(model, improper), args, kwargs, rng_key, validate=False).items()
        }

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
    _refuse_unsupported(trace)
    params = tuple(
        name for name, site in trace.items() if site["type"] == "param" and site["leaves"] and not _is_free(name, trace)
    )
    discrete = [name for name, site in trace.items() if site["discrete"]]
    latents = {
        name: LatentSite(site["shape"], site["plates"], site["event_dim"])
        for name, site in trace.items()
        if site["latent"] and name not in discrete
    }
    sites = Sites(params, latents, (), bool(discrete), can_draw_prior=not improper)
    return sites._replace(terms=_read_terms(Target(model, args, kwargs, sites), trace))


def _read_terms(target: Target, trace: dict) -> tuple[tuple[str, int, bool], ...]:
    if target.sites.enumerated:
        return (("prior", 1, True), (ENUMERATED, 1, False))
    found: list[tuple[str, int, bool]] = []

    def probe(x: Array, rng_key: Array) -> None:
        latents = target.unravel(x)
        _, theta = target.initial_params(rng_key, {})
        model = handlers.substitute(target.model, substitute_fn=_substitution(theta, latents))
        for name, site in _trace(model, target.args, target.kwargs, rng_key, validate=False).items():
            if site["type"] == "sample":
                if site["is_observed"] and name in trace:
                    _check_observed_shape(name, site)
                found.append((name, math.prod(jnp.shape(_log_prob(site))), _is_prior(name, latents)))

    jax.eval_shape(probe, jax.ShapeDtypeStruct((target.sites.num_latents,), jnp.result_type(float)), random.key(0))
    return tuple(found)


def _is_free(name: str, trace: dict) -> bool:
    """Whether a param site only chooses between equivalent forms of the model, as that of `LocScaleReparam(None)`."""
    return name.endswith("_centered") and f"{name.removesuffix('_centered')}_decentered" in trace


def _describe(site: dict) -> dict:
    """What must be remembered of a site, as plain Python (the trace itself holds tracers)."""
    latent = site["type"] == "sample" and not site["is_observed"]
    facts: dict[str, Any] = {"latent": latent, "discrete": False, "leaves": 0}
    if site["type"] == "param":
        facts["leaves"] = len(jax.tree.leaves(site["value"]))
    if latent:
        facts["delta"] = _is_delta(site["fn"])
        facts["discrete"] = bool(site["fn"].support.is_discrete)
        facts["can_enumerate"] = facts["discrete"] and bool(site["fn"].has_enumerate_support)
        facts["plates"] = tuple((frame.name, frame.dim, frame.size) for frame in site["cond_indep_stack"])
        if not facts["discrete"]:
            value = _unconstrained(site)
            facts["shape"] = tuple(jnp.shape(value))
            facts["event_dim"] = jnp.ndim(value) - len(site["fn"].batch_shape)
    return facts


def _is_delta(fn: dist.Distribution) -> bool:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, dist.Delta)


def _refuse_unsupported(trace: dict) -> None:
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
            drawn = site["kwargs"].get("rng_key") is not None
            if local or drawn:
                what = (
                    f"the latent sites {local} in it would have no particles to keep"
                    if local
                    else ("a fresh random subset at every evaluation is not an energy")
                )
                raise ValueError(
                    f"Plate '{name}' is subsampled ({subsample} of {size}): {what}. Use the whole plate"
                    + ("." if local else ", or fix the subset with `handlers.substitute(model, data={...: indices})`.")
                )


def _check_observed_shape(name: str, site: dict) -> None:
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


def check_init_params(sites: Sites, init_params: Any) -> None:
    """Refuse names that are no `param` site.

    Raises:
        TypeError: If ``init_params`` is no dictionary.
        ValueError: If a name is unknown.
    """
    if not isinstance(init_params, dict):
        raise TypeError(f"init_params must be a dict of constrained values by site, got {type(init_params).__name__}.")
    unknown = sorted(set(init_params) - set(sites.params))
    if unknown:
        raise ValueError(
            f"init_params names {unknown}, which are no param sites. The param sites are {list(sites.params)}."
        )


def check_start(sites: Sites, start: Params, theta: Theta) -> None:
    """Refuse starting values outside their support.

    Args:
        sites: The sites of the model.
        start: The values to start from, constrained.
        theta: The same, unconstrained.

    Raises:
        ValueError: The message names the site.
    """
    for name in sites.params:
        if not all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(theta[name])):
            shown = start[name] if jnp.size(jax.tree.leaves(start[name])[0]) < 10 else "a value"
            raise ValueError(
                f"Param site '{name}' starts at {shown}, which is outside the interior of its constraint (or not "
                "finite). Start inside: for a scale at a positive value, for a correlation strictly between -1 and 1."
            )


# -- latents become parameters -------------------------------------------------------------------------------------
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


# -- small print ---------------------------------------------------------------------------------------------------
def _trace(model: Model, args: tuple, kwargs: dict, rng_key: Array, validate: bool | None = None) -> dict:
    """Run the model, hidden from a user's handlers; by default distributions check what NumPyro is set to check."""
    quiet = contextlib.nullcontext() if validate is None else numpyro.validation_enabled(validate)
    with quiet, handlers.block(), handlers.seed(rng_seed=rng_key):
        return handlers.trace(model).get_trace(*args, **kwargs)


def _drawable(model: Model, improper: set[str]) -> Model:
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


def _substitution(theta: Theta, latents: dict[str, Array]) -> Callable[[dict], Any]:
    def value_of(site: dict) -> Any:
        if site["type"] == "param":
            return _constrained_param(site, theta)
        if site["type"] == "sample" and site["name"] in latents:
            return _unconstrain_reparam(latents, site)
        return None

    return value_of


def _constrained_param(site: dict, theta: Theta) -> Any:
    if site["name"] not in theta:
        return None
    return _tree_map_constraint(site, lambda transform, v: transform(v), theta[site["name"]])


def _tree_map_constraint(site: dict, fn: Callable, value: Any) -> Any:
    with helpful_support_errors(site | {"fn": None}):
        transform = biject_to(site["kwargs"].get("constraint", constraints.real))
    return jax.tree.map(lambda leaf: fn(transform, leaf), value)


def _unconstrained(site: dict) -> Array:
    with helpful_support_errors(site):
        return biject_to(site["fn"].support).inv(site["value"])


def _elements(program: Any) -> int:
    total = 0
    for equation in program.eqns:
        inner = [
            v for v in jax.tree.leaves(list(equation.params.values())) if hasattr(v, "jaxpr") or hasattr(v, "eqns")
        ]
        repeats = equation.params.get("length", 1)
        total += repeats * sum(_elements(getattr(v, "jaxpr", v)) for v in inner)
        total += sum(math.prod(v.aval.shape) for v in equation.outvars if not inner)
    return total


def _is_real(constraint: constraints.Constraint) -> bool:
    while isinstance(constraint, constraints.independent):
        constraint = constraint.base_constraint
    return constraint is constraints.real


def _log_prob(site: dict) -> Array:
    value, intermediates, scale = site["value"], site["intermediates"], site["scale"]
    log_prob = site["fn"].log_prob(value, intermediates) if intermediates else site["fn"].log_prob(value)
    return log_prob if scale is None else scale * log_prob


def _is_prior(name: str, latents: dict[str, Any]) -> bool:
    """Whether a site is a latent, or the log-Jacobian of one: `_<latent>_log_det`, below the latent's own scope."""
    factors = {f"_{latent}_log_det": latent for latent in latents if name.endswith(f"_{latent}_log_det")}
    return name in latents or any(latent.startswith(name.removesuffix(end)) for end, latent in factors.items())


def _enumerated(model: Model, args: tuple, kwargs: dict) -> Model:
    from numpyro.contrib.funsor import config_enumerate, enum

    with handlers.block(), handlers.seed(rng_seed=random.key(0)):
        trace = handlers.trace(model).get_trace(*args, **kwargs)
    dims = [frame.dim for site in trace.values() for frame in site.get("cond_indep_stack", [])]
    return enum(config_enumerate(model), first_available_dim=min(dims, default=0) - 1)


def _floating(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.result_type(float))
