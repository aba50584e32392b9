# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A NumPyro model as a target: the energy ``U_theta(x) = -log p_theta(x, y)``, unsummed.

``theta`` holds the `numpyro.param` sites on unconstrained space, *without* a Jacobian (the maximum likelihood estimate
is invariant); ``x`` holds the latent `numpyro.sample` sites of one particle as one flat unconstrained vector, *with*
its log-Jacobian. `Target.terms` returns one term per site and batch element, so that a change of energy can be formed
as a sum of differences, and so that latents which are independent given ``theta`` can be recognised.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints
from numpyro.infer import init_to_uniform
from numpyro.infer.util import constrain_fn

from numpyro_smcopt.potential.arguments import argument_names, columns, fingerprint
from numpyro_smcopt.potential.conversions import strong
from numpyro_smcopt.potential.indices import check_indices
from numpyro_smcopt.potential.log_scale import keep_logarithms
from numpyro_smcopt.potential.precision import PLATEAU, double_precision, halves, partitioned_in_double, widened
from numpyro_smcopt.potential.proper_latents import imputing, kept, kept_batch, proper_latents
from numpyro_smcopt.potential.sites import Sites, read_sites
from numpyro_smcopt.potential.tracing import (
    constrained_param,
    drawable,
    enumerated_terms,
    is_real,
    log_prob_of,
    map_constraint,
    substitution,
    trace_model,
    unconstrained,
)
from numpyro_smcopt.term_sums import NO_SUMS, Sums
from numpyro_smcopt.traces import num_elements, traced_once
from numpyro_smcopt.types import Array, Model, Params, Theta


@dataclasses.dataclass(frozen=True)
class Target:
    """The energy of a model with its data bound; made anew whenever a program is traced, kept nowhere.

    Args:
        model: A callable that contains NumPyro primitives.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
        sites: What `read_sites` found.
        validate: Whether distributions check parameters and observations (a failed check is a NaN).
        attached: Further arrays that belong to the problem, such as the data of an objective; traced as data are.
        sums: How the terms are added up; ``sites`` are then those of the sums. See `adding_up`.
        double: Whether terms are computed in double precision, see `in_double`.
        is_relaxed: Whether terms of the likelihood that are not finite are a plateau, see `relaxed`.
    """

    model: Model
    args: tuple
    kwargs: dict
    sites: Sites
    validate: bool = False
    attached: Any = ()
    sums: Sums = NO_SUMS
    double: bool = False
    is_relaxed: bool = False
    _traced: dict[Any, Callable] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def adding_up(self, sums: Sums) -> "Target":
        """The same target, whose energy terms are sums of the present ones."""
        if sums.double and not self.double:
            return self.in_double().adding_up(sums)
        if not sums.sites:
            return self
        shapes = tuple(site.kept for site in sums.sites)
        terms = tuple(
            (name, math.prod(shape), prior) for (name, _, prior), shape in zip(self.sites.terms, shapes, strict=True)
        )
        return dataclasses.replace(self, sites=self.sites._replace(terms=terms, term_shapes=shapes), sums=sums)

    def in_double(self) -> "Target":
        """The same target with terms that single precision cannot hold.

        Everything behind the unconstrained coordinates is computed in double precision. There are then 2 K terms: K
        rounded to single precision, and K that hold what they lack. The sum of both is the energy, and differences of
        terms keep their digits, wherever they are formed.
        """
        terms, shapes = 2 * self.sites.terms, 2 * self.sites.term_shapes
        return dataclasses.replace(self, sites=self.sites._replace(terms=terms, term_shapes=shapes), double=True)

    def relaxed(self) -> "Target":
        """The same target, but a datum that cannot be given the latents costs `PLATEAU` nats instead of all.

        What is impossible is then so to a degree: the fewer data contradict a draw, the lower its energy.
        """
        return dataclasses.replace(self, is_relaxed=True)

    def as_partitioned(self, arguments: Any) -> "Target":
        """The target in the precision of the partition among ``arguments``, a pytree."""
        return self.in_double() if partitioned_in_double(arguments) else self

    def terms(self, theta: Theta, x: Array) -> Array:
        """Energy terms of one particle.

        Args:
            theta: Parameters on unconstrained space.
            x: [D] one particle.

        Returns:
            [K] terms whose sum is ``-log p_theta(x, y)``, the log-Jacobian of ``x`` included;
            [2 K] in double precision.
        """
        leaves, treedef = jax.tree.flatten((theta, x))
        like = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        key = treedef, *like
        if key not in self._traced:
            kept = lambda theta, x: keep_logarithms(self._at, theta, x, widen=self.double)  # noqa: E731
            with double_precision(self.double):
                self._traced[key], _ = traced_once(kept, *jax.tree.unflatten(treedef, like))
        return self._traced[key](theta, x)

    def _at(self, theta: Theta, x: Array) -> Array:
        if not self.double:
            return self._terms(substitution(theta, self.sites.unravel(x)))
        target = dataclasses.replace(self, args=widened(self.args), kwargs=widened(self.kwargs))
        return target._terms(substitution(widened(theta), self.sites.unravel(widened(x))))

    def energy_of(self, theta: Theta, latents: dict[str, Array]) -> Array:
        """``-log p_theta(x, y)`` [] of one draw given on the scale of the model, as a density on that scale.

        Args:
            theta: Parameters on unconstrained space.
            latents: The value of every latent site.
        """

        def value_of(site: dict) -> Any:
            return latents[site["name"]] if site["name"] in latents else of_params(site)

        of_params = substitution(theta, {})
        return jnp.sum(self._terms(value_of))

    def _terms(self, value_of: Callable[[dict], Any]) -> Array:
        # Parameters and particles are inside their supports by construction; data are checked once, at the start.
        with numpyro.validation_enabled(self.validate):
            model = handlers.substitute(self.model, substitute_fn=value_of)
            if self.sites.enumerated:
                pairs = enumerated_terms(model, self.args, self.kwargs, self.sites.latents)
                return self._joined([-v for pair in zip(*pairs, strict=True) for v in pair])
            trace = trace_model(model, self.args, self.kwargs, random.key(0))
            return self._joined([-log_prob_of(site) for site in trace.values() if site["type"] == "sample"])

    def _joined(self, pieces: list[Array]) -> Array:
        """The terms of all sites in one vector, added up if they shall be."""
        if self.is_relaxed:
            priors = [prior for _, _, prior in self.sites.terms]
            pieces = [
                piece if prior else jnp.where(jnp.isfinite(piece), piece, PLATEAU)
                for piece, prior in zip(pieces, priors, strict=not self.double)
            ]
        if self.sums.sites:
            pieces = [site.add(piece) for site, piece in zip(self.sums.sites, pieces, strict=not self.double)]
        terms = jnp.concatenate([jnp.ravel(piece) for piece in pieces]) if pieces else jnp.zeros(0)
        return halves(terms) if self.double else terms

    def program(self, theta: Theta) -> Any:
        """The energy as a closed jaxpr: leaves of theta and one particle in, terms out; the data are its constants."""
        leaves, treedef = jax.tree.flatten(theta)
        x = jax.ShapeDtypeStruct((self.sites.num_latents,), jnp.result_type(float))
        return jax.make_jaxpr(lambda *v: self.terms(jax.tree.unflatten(treedef, v[:-1]), v[-1]))(*leaves, x)

    def work(self, theta: Theta) -> int:
        """Array elements that are computed for the energy of one particle."""
        return max(1, num_elements(self.program(theta).jaxpr))

    def unreached_params(self) -> list[str]:
        """Param sites on which no energy term depends, found in the program of the energy."""
        owners, program = self._owned_program
        inputs = zip(owners, program.jaxpr.invars, strict=False)
        reached = {owner for owner, variable in inputs if any(_depend_on(variable, program.jaxpr))}
        return [name for name in self.sites.params if name not in reached]

    def refuse_wrong_indices(self) -> None:
        """Refuse data that index beyond an axis, see `indices`; nothing is computed.

        Raises:
            ValueError: The message names the argument, the element, and the site that is indexed.
        """
        owners, program = self._owned_program
        sizes = [math.prod(site.shape) for site in self.sites.latents.values()]
        leaves = jax.tree.leaves((self.args, self.kwargs))
        names = dict(zip(map(id, leaves), argument_names(self.args, self.kwargs), strict=True))
        lists = [(name, np.asarray(column)) for name, column in columns(self.args, self.kwargs)]

        def name_of(array: Any) -> str | None:
            same = (name for name, column in lists if column.shape == array.shape and np.array_equal(column, array))
            return names.get(id(array)) or next(same, None)

        check_indices(program, name_of, owners, np.repeat(np.array(list(self.sites.latents), object), sizes))

    @functools.cached_property
    def _owned_program(self) -> tuple[list[str], Any]:
        """`program`, and the param site of each leaf of theta."""
        _, theta = jax.eval_shape(lambda key: self.initial_params(key, {}), random.key(0))
        return [name for name in theta for _ in jax.tree.leaves(theta[name])], self.program(theta)

    def draw_prior(self, rng_key: Array, theta: Theta) -> Array:
        """One draw [D] of the latents from their prior at ``theta``, on unconstrained space."""
        return self._draw(rng_key, theta, lambda site: None)

    def draw_start(self, rng_key: Array, theta: Theta, init_strategy: Callable | None = None) -> Array:
        """One starting point [D] from a NumPyro init strategy (`numpyro.infer.init_to_uniform` by default)."""
        return self._draw(rng_key, theta, (init_strategy or init_to_uniform)())

    def _draw(self, rng_key: Array, theta: Theta, strategy: Callable) -> Array:
        def value_of(site: dict, theta: Theta) -> Any:
            if site["type"] == "param":
                return constrained_param(site, theta)
            if site["type"] == "sample" and not site["is_observed"]:
                return strategy(site)
            return None

        def draw(rng_key: Array, theta: Theta) -> Array:
            # `seed` inside `substitute`: a strategy finds the key of its site in the message.
            seeded = handlers.seed(self.model, rng_key)
            model = handlers.substitute(seeded, substitute_fn=lambda site: value_of(site, theta))
            trace = trace_model(model, self.args, self.kwargs, rng_key)
            drawn = {name: unconstrained(trace[name]) for name in self.sites.latents}
            for k, name in enumerate(self.sites.masked):
                normal = random.normal(random.fold_in(rng_key, k), drawn[name].shape, drawn[name].dtype)
                drawn[name] = jnp.where(self._is_beside(name, trace[name]["fn"]), normal, drawn[name])
            return jnp.concatenate([jnp.ravel(v) for v in drawn.values()]) if drawn else jnp.zeros(0)

        return keep_logarithms(draw, rng_key, theta)

    def _is_beside(self, name: str, fn: Any) -> Array:
        """Mask of the masked elements of a latent, unconstrained."""
        shape, keep = self.sites.latents[name].shape, jnp.asarray(kept(fn))
        if math.prod(keep.shape[keep.ndim - fn.event_dim :]) == 1:  # whole batch elements
            keep = kept_batch(fn).reshape(fn.batch_shape + (1,) * self.sites.latents[name].event_dim)
        return jnp.broadcast_to(~keep, shape)

    def initial_params(self, rng_key: Array, init_params: Params) -> tuple[Params, Theta]:
        """Values of the param sites, constrained and unconstrained, at the start.

        Args:
            rng_key: Seed of callable initial values.
            init_params: Constrained values that replace the model's own.

        Raises:
            ValueError: If one of them has another shape than the model's own.
        """
        model = drawable(self.model, set())
        # Bad starting values are refused by `check_start`, which knows the site.
        trace = trace_model(model, self.args, self.kwargs, rng_key, validate=False)
        if init_params:
            for name, given in init_params.items():
                expected, got = (jax.tree.map(jnp.shape, value) for value in (trace[name]["value"], given))
                if expected != got:
                    raise ValueError(
                        f"init_params['{name}'] has shape {got}, but the param site has shape {expected}. Give a "
                        "constrained value of that shape."
                    )
            model = handlers.substitute(model, data=init_params)
            trace = trace_model(model, self.args, self.kwargs, rng_key, validate=False)
        values = {name: jax.tree.map(_floating, trace[name]["value"]) for name in self.sites.params}
        theta = {name: map_constraint(trace[name], lambda t, v: t.inv(v), values[name]) for name in values}
        return jax.tree.map(strong, (values, theta))

    def _trace_at(self, theta: Theta) -> dict:
        # Values for the latents too: an improper one cannot be drawn.
        latents = self.sites.unravel(jnp.zeros(self.sites.num_latents))
        model = handlers.substitute(self.model, substitute_fn=substitution(theta, latents))
        return trace_model(model, self.args, self.kwargs, random.key(0))

    def beside(self, theta: Theta) -> dict[str, Array]:
        """Masks of the coordinates of masked latents that stand beside the model: ``{site: [D] bool}``."""
        trace = self._trace_at(theta)
        found = {}
        for name in self.sites.masked:
            marks = self.sites.unravel(jnp.zeros(self.sites.num_latents, bool))
            marks[name] = self._is_beside(name, trace[name]["fn"])
            found[name] = jnp.concatenate([jnp.ravel(mark) for mark in marks.values()])
        return found

    def count_observations(self, theta: Theta) -> Array:
        """[] how many observations the likelihood counts: none where it is masked, n of those that are scaled by n."""
        total = jnp.zeros(())
        for name, site in self._trace_at(theta).items():
            if name in self.sites.observed and name.removesuffix("_prior") not in self.sites.params:
                shape = jnp.shape(site["fn"].log_prob(site["value"]))
                scale = 1.0 if site["scale"] is None else site["scale"]
                total += jnp.sum(jnp.broadcast_to(kept_batch(site["fn"]) * jnp.asarray(scale), shape))
        return total

    def constrain_params(self, theta: Theta) -> Params:
        """``theta`` on the scale of the model."""
        trace = self._trace_at(theta)
        return {name: trace[name]["value"] for name in self.sites.params}

    def output(self, theta: Theta) -> Any:
        """The return value of the model at ``theta``."""
        model = handlers.substitute(self.model, substitute_fn=substitution(theta, {}))
        with handlers.block(), handlers.seed(rng_seed=random.key(0)):
            return model(*self.args, **self.kwargs)

    def param_constraints(self, theta: Theta) -> dict[str, constraints.Constraint]:
        """The constraint of each param site; pytrees, whose bounds may be data."""
        trace = self._trace_at(theta)
        return {name: trace[name]["kwargs"].get("constraint", constraints.real) for name in self.sites.params}

    def bounded_coordinates(self, theta: Theta) -> np.ndarray:
        """[P] bool: which coordinates of the flat ``theta`` belong to a constrained parameter; nothing is computed."""
        free: dict[str, bool] = {}

        def look(theta: Theta) -> None:
            trace = self._trace_at(theta)
            free.update({name: is_real(trace[name]["kwargs"].get("constraint", constraints.real)) for name in theta})

        jax.eval_shape(look, theta)
        marks = {
            name: jax.tree.map(lambda leaf, mark=not free[name]: np.full(np.size(leaf), mark), theta[name])
            for name in theta
        }
        return np.concatenate([np.zeros(0, bool), *jax.tree.leaves(marks)])

    def constrain_latents(self, theta: Theta, x: Array) -> dict[str, Array]:
        """Latent and deterministic sites of one particle ``[D]`` at ``theta``, on the scale of the model.

        Discrete sites are summed out and have no value, so deterministic sites that depend on them are left out.
        """
        model = handlers.substitute(self.model, substitute_fn=substitution(theta, {}))

        def values(rng_key: Array) -> dict[str, Array]:
            # Particles that differ have other draws of what is masked.
            imputed = imputing(random.fold_in(rng_key, fingerprint([x]))) if self.sites.masked else nullcontext()
            with handlers.block(), imputed, handlers.seed(rng_seed=rng_key):
                return constrain_fn(model, self.args, self.kwargs, self.sites.unravel(x), return_deterministic=True)

        if not self.sites.enumerated:
            return values(random.key(0))
        program = jax.make_jaxpr(values)(random.key(0)).jaxpr
        names = sorted(jax.eval_shape(values, random.key(0)))  # the order in which JAX flattens a dictionary
        random_names = [
            name for name, drawn in zip(names, _depend_on(program.invars[0], program), strict=True) if drawn
        ]
        return {name: value for name, value in values(random.key(0)).items() if name not in random_names}


def make_target(model: Model, args: tuple, kwargs: dict, attached: Any = ()) -> Target:
    """Bind a model to its arguments; the model is traced abstractly, nothing is computed.

    Raises:
        ValueError: If the model has a site that cannot be handled; the message names it and says what to do.
    """
    return Target(proper_latents(model), args, kwargs, read_sites(model, args, kwargs), attached=attached)


def flat_terms(target: Target, theta: Theta) -> tuple[Callable[[Array, Array], Array], Array, Callable]:
    """``(theta [P], x [D]) -> [K]``, the flat theta, and the way back to its tree."""
    flat, unravel = jax.flatten_util.ravel_pytree(theta)
    return lambda t, x: target.terms(unravel(t), x), flat, unravel


def _depend_on(variable: Any, program: Any) -> list[bool]:
    """Masks of the outputs of a jaxpr that depend on one of its variables."""
    touched = {variable}
    for equation in program.eqns:
        if any(not hasattr(v, "val") and v in touched for v in equation.invars):
            touched.update(equation.outvars)
    return [not hasattr(v, "val") and v in touched for v in program.outvars]


def _floating(leaf: Any) -> Array:
    leaf = jnp.asarray(leaf)
    return leaf if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.astype(jnp.result_type(float))
