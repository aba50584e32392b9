# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The target against NumPyro's own potential, in double precision."""

import functools
import math
from typing import NamedTuple

import equinox as eqx
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from compiling import compile_fast
from flax import nnx
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.contrib.module import eqx_module, flax_module, nnx_module, random_eqx_module, random_flax_module
from numpyro.distributions import biject_to, constraints
from numpyro.infer import init_to_value
from numpyro.infer.reparam import LocScaleReparam
from numpyro.infer.util import constrain_fn, potential_energy

from numpyro_smcopt import latents_to_params
from numpyro_smcopt.potential import Target, join_arguments, make_target, read_sites, split_arguments

Y = np.array([0.3, -1.2, 2.0, 0.7, 1.1, -0.4])
GROUP = np.array([0, 0, 1, 1, 2, 2])


@pytest.fixture(autouse=True)
def double_precision():
    with jax.enable_x64(True):
        yield


# -- models --------------------------------------------------------------------------------------------------------
def constrained_latents(y):
    mean = numpyro.param("mean", 0.3)
    sd = numpyro.param("sd", 1.3, constraint=constraints.positive)
    scale = numpyro.sample("scale", dist.HalfNormal(sd))
    share = numpyro.sample("share", dist.Beta(2.0, 3.0))
    mixture = numpyro.sample("mixture", dist.Dirichlet(jnp.ones(3)))
    cuts = numpyro.sample(
        "cuts",
        dist.TransformedDistribution(dist.Normal(0, 1).expand([3]).to_event(1), dist.transforms.OrderedTransform()),
    )
    lower = numpyro.sample("lower", dist.LKJCholesky(3, 2.0))
    loc = mean + share + mixture[1] + cuts[0] - cuts[2] + lower[2, 0]
    numpyro.sample("y", dist.Normal(loc, scale), obs=y)


def support_in_theta(y):
    top = numpyro.param("top", 3.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Uniform(-top, top))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def support_in_latent(y):
    sd = numpyro.param("sd", 2.0, constraint=constraints.positive)
    a = numpyro.sample("a", dist.HalfNormal(sd))
    x = numpyro.sample("x", dist.Uniform(-a, a))
    numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def mixed(group, y):
    mean = numpyro.param("mean", 0.5)
    sd = numpyro.param("sd", 1.5, constraint=constraints.positive)
    with numpyro.plate("groups", 3):
        b = numpyro.sample("b", dist.Normal(mean, sd))
        s = numpyro.sample("s", dist.LogNormal(0.0, sd))
    numpyro.deterministic("total", jnp.sum(b) * sd)
    with numpyro.plate("data", len(group)):
        numpyro.sample("y", dist.Normal(b[group], s[group]), obs=y)


def with_mask_scale_factor(y):
    sd = numpyro.param("sd", 1.5, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Gamma(2.0, sd))
        with handlers.scale(scale=2.5), handlers.mask(mask=jnp.asarray(y) > 0):
            numpyro.sample("y", dist.Normal(x, sd), obs=y)
    numpyro.factor("penalty", -jnp.sum(x**2) * sd)


def chain(y):
    persistence = numpyro.param("persistence", 0.7, constraint=constraints.interval(-1.0, 1.0))
    sd = numpyro.param("sd", 0.8, constraint=constraints.positive)

    def step(level, y):
        level = numpyro.sample("level", dist.Normal(persistence * level, sd))
        rate = numpyro.sample("rate", dist.Exponential(sd))
        numpyro.sample("y", dist.Normal(level, rate), obs=y)
        return level, None

    scan(step, 0.0, jnp.asarray(y))


def no_latents(y):
    mean = numpyro.param("mean", lambda key: random.normal(key, (2,)))
    sd = numpyro.param("sd", jnp.ones((3, 1)), constraint=constraints.positive)
    with numpyro.plate("columns", 2, dim=-1), numpyro.plate("rows", 3, dim=-2):
        numpyro.sample("y", dist.Normal(mean, sd), obs=y.reshape(3, 2))


def lifted_base(y):
    sd = numpyro.param("sd", 2.0, constraint=constraints.positive)
    tau = numpyro.param("tau", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(0.0, tau))
        numpyro.sample("y", dist.Normal(x, sd), obs=y)


def conditioned_base(y):
    mean = numpyro.param("mean", 1.0)
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    x = numpyro.sample("x", dist.Normal(mean, scale))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def in_subset(y):
    sd = numpyro.param("sd", 2.0, constraint=constraints.positive)
    x = numpyro.sample("x", dist.Normal(0.0, sd))
    with numpyro.plate("data", len(y), subsample_size=2) as index:
        numpyro.sample("y", dist.Normal(x, sd), obs=jnp.asarray(y)[index])


REPARAM = {"b": LocScaleReparam(0), "s": LocScaleReparam(0)}
MODELS = {
    "constrained latents": (constrained_latents, (Y,)),
    "support in theta": (support_in_theta, (Y,)),
    "support in a latent": (support_in_latent, (Y,)),
    "groups": (mixed, (GROUP, Y)),
    "reparam": (handlers.reparam(mixed, config={"b": LocScaleReparam(0)}), (GROUP, Y)),
    "lift": (handlers.lift(lifted_base, prior={"tau": dist.HalfNormal(1.0)}), (Y,)),
    "condition": (handlers.condition(conditioned_base, data={"x": jnp.asarray(0.4)}), (Y,)),
    "scope": (handlers.scope(mixed, prefix="inner"), (GROUP, Y)),
    "mask, scale and factor": (with_mask_scale_factor, (Y,)),
    "scan": (chain, (Y,)),
    "no latents": (no_latents, (Y,)),
    "fixed subset": (handlers.substitute(in_subset, data={"data": jnp.array([1, 4])}), (Y,)),
    "latents as params": (latents_to_params(mixed, ["s"]), (GROUP, Y)),
}


# -- truth ---------------------------------------------------------------------------------------------------------
class Case(NamedTuple):
    """What the target and NumPyro say of one model at the same place."""

    target: Target
    ours: dict
    numpyro: dict


class prior_only(handlers.block):
    """Hide what is observed, but not the log-Jacobians that `potential_energy` adds."""

    def __init__(self, fn):
        super().__init__(fn, hide_fn=lambda m: m.get("is_observed", False) and not m["name"].endswith("_log_det"))


def somewhere(target, seed=3):
    """Some theta and x that nobody would choose."""
    rng = np.random.default_rng(seed)
    theta = jax.eval_shape(lambda key: target.initial_params(key, {})[1], random.key(0))
    theta = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0.3, 0.3, leaf.shape)), theta)
    return theta, jnp.asarray(rng.normal(0, 0.6, target.sites.num_latents))


def according_to_us(target, theta, x):
    def energy(theta, x):
        terms = target.terms(theta, x)
        return jnp.sum(terms), terms

    (total, terms), (in_theta, in_x) = jax.value_and_grad(energy, (0, 1), has_aux=True)(theta, x)
    return {
        "terms": terms,
        "energy": total,
        "in theta": in_theta,
        "in latents": target.sites.unravel(in_x),
        "prior": jnp.sum(terms * target.sites.prior_mask),
        "params": target.constrain_params(theta),
        "latents": target.constrain_latents(theta, x),
    }


def according_to_numpyro(model, args, theta, latents):
    trace = handlers.trace(handlers.seed(model, random.key(7))).get_trace(*args)
    kinds = {k: v["kwargs"].get("constraint", constraints.real) for k, v in trace.items() if v["type"] == "param"}
    constrained = lambda theta: {k: jax.tree.map(biject_to(kinds[k]), theta[k]) for k in theta}  # noqa: E731
    fix = lambda theta: handlers.seed(handlers.substitute(model, data=constrained(theta)), random.key(0))  # noqa: E731
    energy = lambda theta, latents: potential_energy(fix(theta), args, {}, latents)  # noqa: E731
    total, (in_theta, in_latents) = jax.value_and_grad(energy, (0, 1))(theta, latents)
    return {
        "energy": total,
        "in theta": in_theta,
        "in latents": in_latents,
        "prior": potential_energy(prior_only(fix(theta)), args, {}, latents),
        "params": constrained(theta),
        "latents": constrain_fn(fix(theta), args, {}, latents, return_deterministic=True),
    }


@pytest.fixture(params=MODELS, scope="module")
def case(request):
    model, args = MODELS[request.param]
    with jax.enable_x64(True):
        target = make_target(model, args, {})
        theta, x = somewhere(target)
        ours = compile_fast(functools.partial(according_to_us, target))(theta, x)
        truth = compile_fast(functools.partial(according_to_numpyro, model, args))(theta, target.sites.unravel(x))
        return Case(target, ours, truth)


close = functools.partial(np.testing.assert_allclose, rtol=1e-9, atol=1e-11)


def test_the_terms_sum_to_the_potential(case):
    assert case.ours["terms"].shape == (case.target.sites.num_terms,)
    close(case.ours["energy"], case.numpyro["energy"])


@pytest.mark.parametrize("wanted", ["in theta", "in latents"])
def test_the_gradient_is_that_of_the_potential(case, wanted):
    jax.tree.map(close, case.ours[wanted], case.numpyro[wanted])


def test_every_parameter_of_these_models_has_a_gradient(case):
    assert all(np.any(np.asarray(leaf) != 0) for leaf in jax.tree.leaves(case.ours["in theta"]))


def test_prior_terms_are_the_latents_and_their_jacobians(case):
    close(case.ours["prior"], case.numpyro["prior"])


@pytest.mark.parametrize("wanted", ["params", "latents"])
def test_values_are_constrained_as_numpyro_does(case, wanted):
    assert case.ours[wanted].keys() == case.numpyro[wanted].keys()
    jax.tree.map(close, case.ours[wanted], case.numpyro[wanted])


# -- where the potential of NumPyro is not enough ------------------------------------------------------------------
def normal_log_density(x, mean, sd):
    return -0.5 * ((x - mean) / sd) ** 2 - np.log(sd) - 0.5 * np.log(2 * np.pi)


def test_a_support_in_theta_carries_its_jacobian_by_hand():
    # x = top (2 s - 1) with s = sigmoid(u): the density 1 / (2 top) times dx/du = 2 top s (1 - s).
    target = make_target(support_in_theta, (Y[:1],), {})
    u, top = 0.4, 2.5
    s = 1 / (1 + np.exp(-u))
    expected = np.log(s * (1 - s)) + normal_log_density(Y[0], top * (2 * s - 1), 1.0)
    close(jnp.sum(target.terms({"top": jnp.log(top)}, jnp.array([u]))), -expected)


def test_there_is_one_term_per_site_and_batch_element():
    sites = read_sites(mixed, (GROUP, Y), {})
    assert sites.terms == (("b", 3, True), ("_s_log_det", 3, True), ("s", 3, True), ("y", 6, False))


def two_clusters(y):
    share = numpyro.param("share", 0.3, constraint=constraints.unit_interval)
    centre = numpyro.sample("centre", dist.Normal(0.0, 2.0))
    scale = numpyro.sample("scale", dist.HalfNormal(1.0))
    with numpyro.plate("data", len(y)):
        which = numpyro.sample("which", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        numpyro.sample("y", dist.Normal(jnp.where(which, centre, -1.0), scale), obs=y)


def test_discrete_latents_are_summed_out():
    target = make_target(two_clusters, (Y,), {})
    share, centre, u = 0.3, 0.8, -0.2
    scale = np.exp(u)
    prior = normal_log_density(centre, 0, 2.0) + np.log(2) + normal_log_density(scale, 0, 1.0) + u
    parts = np.log(share) + normal_log_density(Y, centre, scale), np.log1p(-share) + normal_log_density(Y, -1.0, scale)

    theta, x = {"share": jnp.log(share / (1 - share))}, jnp.array([centre, u])
    energy = compile_fast(target.terms)(theta, x)
    close(energy[target.sites.prior_mask].sum(), -prior)
    close(energy.sum(), -prior - np.logaddexp(*parts).sum())


def test_a_discrete_latent_in_a_plate_leaves_a_term_for_each_element():
    def model(y):
        share = numpyro.param("share", 0.3, constraint=constraints.unit_interval)
        top = numpyro.sample("top", dist.Normal(0.0, 1.0))
        with numpyro.plate("groups", 3):
            which = numpyro.sample("which", dist.Bernoulli(share), infer={"enumerate": "parallel"})
            b = numpyro.sample("b", dist.Normal(top, 1.0))
            with handlers.scale(scale=2.0):
                numpyro.sample("y", dist.Normal(b + 4.0 * which, 0.5), obs=y[:3])
        with numpyro.plate("others", 2):
            numpyro.sample("z", dist.Normal(top, 1.0), obs=y[3:])

    target = make_target(model, (Y[:5],), {})
    assert sum(size for _, size, prior in target.sites.terms if prior) == 1 + 3 + 1  # of the others a zero
    top, b = 0.4, np.array([0.1, -0.3, 0.9])
    energy = compile_fast(target.terms)({"share": jnp.log(0.3 / 0.7)}, jnp.array([top, *b]))
    arms = [np.log(p) + 2 * normal_log_density(Y[:3], b + shift, 0.5) for p, shift in ((0.3, 4.0), (0.7, 0.0))]
    each = np.concatenate([np.logaddexp(*arms), normal_log_density(Y[3:5], top, 1.0)])
    prior = np.concatenate([[normal_log_density(top, 0, 1.0)], normal_log_density(b, top, 1.0)])
    mask = target.sites.prior_mask
    close(np.sort(energy[~mask]), np.sort([*-each, 0.0]))
    close(np.sort(energy[mask]), np.sort([*-prior, 0.0]))


def test_a_prior_that_hangs_on_a_discrete_latent_is_its_mixture():
    def model(y):
        share = numpyro.param("share", 0.3, constraint=constraints.unit_interval)
        which = numpyro.sample("which", dist.Bernoulli(share), infer={"enumerate": "parallel"})
        x = numpyro.sample("x", dist.Normal(jnp.where(which, 3.0, -1.0), 0.5))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    target = make_target(model, (0.7,), {})
    x = 1.1
    mixture = np.logaddexp(np.log(0.3) + normal_log_density(x, 3, 0.5), np.log(0.7) + normal_log_density(x, -1, 0.5))
    energy = compile_fast(target.terms)({"share": jnp.log(0.3 / 0.7)}, jnp.array([x]))
    close(energy, [-mixture, -normal_log_density(0.7, x, 1.0)])


@pytest.mark.parametrize(("centered", "params"), [(0, ("mean", "sd")), (None, ("mean", "sd"))])
def test_the_centering_of_a_reparametrised_latent_is_no_parameter(centered, params):
    # The marginal likelihood does not depend on it, so it would wander.
    sites = read_sites(handlers.reparam(mixed, config={"b": LocScaleReparam(centered)}), (GROUP, Y), {})
    assert sites.params == params


# -- draws ---------------------------------------------------------------------------------------------------------
def test_prior_draws_have_the_moments_of_the_prior():
    # Means of 4000 draws, within 5 standard errors.
    target = make_target(mixed, (GROUP, Y), {})
    theta = {"mean": jnp.asarray(1.5), "sd": jnp.log(0.5)}
    keys = random.split(random.key(0), 4000)
    draws = compile_fast(jax.vmap(lambda key: target.draw_prior(key, theta)))(keys)
    expected = np.repeat([1.5, 0.0], 3)  # b, then log s
    np.testing.assert_array_less(np.abs(draws.mean(0) - expected), 5 * 0.5 / np.sqrt(4000))
    np.testing.assert_array_less(np.abs(draws.var(0) / 0.25 - 1), 5 * np.sqrt(2 / 4000))
    correlation = np.corrcoef(draws.T)[np.triu_indices(6, 1)]
    np.testing.assert_array_less(np.abs(correlation), 5 / np.sqrt(4000))


def test_prior_draws_follow_the_hierarchy():
    target = make_target(support_in_latent, (Y,), {})
    keys = random.split(random.key(0), 4000)
    draws = compile_fast(jax.vmap(lambda key: target.draw_prior(key, {"sd": jnp.log(2.0)})))(keys)
    a, share = np.exp(draws[:, 0]), 1 / (1 + np.exp(-draws[:, 1]))  # share of the interval from -a to a
    np.testing.assert_array_less(abs(a.mean() - 2 * np.sqrt(2 / np.pi)), 5 * a.std() / np.sqrt(4000))
    np.testing.assert_array_less(abs(share.mean() - 0.5), 5 * np.sqrt(1 / 12 / 4000))
    np.testing.assert_array_less(abs(np.corrcoef(a, share)[0, 1]), 5 / np.sqrt(4000))


def test_an_init_strategy_gives_the_start():
    target = make_target(mixed, (GROUP, Y), {})
    theta = {"mean": jnp.asarray(1.5), "sd": jnp.log(0.5)}
    x = compile_fast(
        lambda: target.draw_start(
            random.key(0), theta, functools.partial(init_to_value, values={"b": Y[:3], "s": jnp.exp(Y[3:])})
        )
    )()
    close(x, Y)


def improper(y):
    sd = numpyro.param("sd", 2.0, constraint=constraints.positive)
    x = numpyro.sample("x", dist.ImproperUniform(constraints.positive, (), (2,)))
    numpyro.sample("y", dist.Normal(x.sum(), sd), obs=y)


def improper_chain(y):
    numpyro.param("sd", 2.0, constraint=constraints.positive)

    def step(_, y):
        x = numpyro.sample("x", dist.ImproperUniform(constraints.real, (), ()))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        return None, None

    scan(step, None, jnp.asarray(y))


@pytest.mark.parametrize("model", [improper, improper_chain])
def test_an_improper_prior_cannot_be_drawn_but_started(model):
    target = make_target(model, (Y[:2],), {})
    assert not target.sites.can_draw_prior and target.sites.num_latents == 2
    x = compile_fast(lambda key: target.draw_start(key, {"sd": jnp.zeros(())}))(random.key(0))
    assert x.shape == (2,) and np.all(np.abs(x) < 2) and x[0] != x[1]


# -- latents become parameters -------------------------------------------------------------------------------------
@pytest.mark.parametrize("keep_prior", [True, False])
def test_a_latent_made_a_parameter_keeps_or_drops_its_prior(keep_prior):
    target = make_target(latents_to_params(conditioned_base, ["scale"], keep_prior=keep_prior), (Y,), {})
    scale, x = 0.6, 0.2
    expected = normal_log_density(x, 1.0, scale) + normal_log_density(Y, x, 1.0).sum()
    if keep_prior:
        expected += np.log(2) + normal_log_density(scale, 0.0, 1.0)  # on the constrained scale: no Jacobian
    assert set(target.sites.params) == {"mean", "scale"} and set(target.sites.latents) == {"x"}
    energy = compile_fast(target.terms)({"mean": jnp.asarray(1.0), "scale": jnp.log(scale)}, jnp.array([x]))
    close(energy.sum(), -expected)


def test_a_latent_in_a_plate_becomes_a_parameter_of_the_plate_size():
    target = make_target(latents_to_params(mixed, ["s"]), (GROUP, Y), {})
    theta = jax.eval_shape(lambda key: target.initial_params(key, {})[1], random.key(0))
    assert theta["s"].shape == (3,)
    assert dict((name, size) for name, size, _ in target.sites.terms) == {"b": 3, "s_prior": 3, "y": 6}


# -- modules -------------------------------------------------------------------------------------------------------
def linear_truth(kernel, bias, y):
    return normal_log_density(y, np.asarray(INPUTS) @ np.ravel(kernel) + np.ravel(bias), 1.0).sum()


INPUTS = np.arange(12.0).reshape(6, 2) / 10


def flax_model(inputs, y):
    net = flax_module("net", flax.linen.Dense(1), input_shape=(2,))
    numpyro.sample("y", dist.Normal(net(inputs)[:, 0], 1.0).to_event(1), obs=y)


def random_flax_model(inputs, y):
    prior = {"bias": dist.Normal(0.0, 2.0)}
    net = random_flax_module("net", flax.linen.Dense(1), prior, input_shape=(2,))
    numpyro.sample("y", dist.Normal(net(inputs)[:, 0], 1.0).to_event(1), obs=y)


def eqx_model(inputs, y):
    net = eqx_module("net", eqx.nn.Linear(2, 1, key=random.key(1)))
    numpyro.sample("y", dist.Normal(jax.vmap(net)(inputs)[:, 0], 1.0).to_event(1), obs=y)


def random_eqx_model(inputs, y):
    net = random_eqx_module("net", eqx.nn.Linear(2, 1, key=random.key(1)), {"bias": dist.Normal(0.0, 2.0)})
    numpyro.sample("y", dist.Normal(jax.vmap(net)(inputs)[:, 0], 1.0).to_event(1), obs=y)


def nnx_model(inputs, y):
    net = nnx_module("net", nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
    numpyro.sample("y", dist.Normal(net(inputs)[:, 0], 1.0).to_event(1), obs=y)


MODULES = {
    "flax": flax_model,
    "random flax": random_flax_model,
    "eqx": eqx_model,
    "random eqx": random_eqx_model,
    "nnx": nnx_model,
}


@pytest.mark.parametrize("name", MODULES)
def test_a_module_is_one_parameter_with_the_leaves_of_its_tree(name):
    target = make_target(MODULES[name], (INPUTS, Y), {})
    assert target.sites.params == ("net$params",)
    theta, x = somewhere(target)
    if name.startswith("random"):
        (latent,) = target.sites.latents
        assert latent.endswith("bias") and x.shape == (1,)
    leaves = jax.tree.leaves(theta)
    kernel = next(leaf for leaf in leaves if leaf.size == 2)
    bias = x[0] if x.size else next(leaf for leaf in leaves if leaf.size == 1)
    expected = linear_truth(kernel, bias, Y) + (normal_log_density(x[0], 0.0, 2.0) if x.size else 0.0)

    energy, grad = compile_fast(jax.value_and_grad(lambda theta: target.terms(theta, x).sum()))(theta)
    close(energy, -expected)
    assert np.all(next(leaf for leaf in jax.tree.leaves(grad) if leaf.size == 2) != 0)
    assert jax.tree.structure(compile_fast(target.constrain_params)(theta)) == jax.tree.structure(theta)


# -- arguments -----------------------------------------------------------------------------------------------------
class Column:
    """What pandas and others look like to us."""

    def __init__(self, values):
        self.values = np.asarray(values)

    def __array__(self, dtype=None, copy=None):
        return self.values


@pytest.mark.parametrize(
    "argument",
    [3, np.int64(3), np.array(3), True, np.bool_(True), np.array(False), "label", b"label", None, math.sin, (1, "a")],
)
def test_what_a_shape_may_depend_on_is_static(argument):
    arrays, static = split_arguments((argument,), {"k": argument})
    args, kwargs = join_arguments(arrays, static)
    assert arrays == [] and args == (argument,) and kwargs == {"k": argument}
    assert hash(static) == hash(split_arguments((argument,), {"k": argument})[1])
    assert not isinstance(args[0], np.ndarray | np.generic)


@pytest.mark.parametrize(
    "argument",
    [
        2.5,
        np.float32(2.5),
        np.array(2.5),
        [1.5, 2.5],
        Y,
        jnp.asarray(3),
        Column(Y),
        {"a": [Y, (Y, 1.0)]},
        np.array([1, 2]),
        Y > 0,
    ],
)
def test_numbers_and_arrays_are_traced(argument):
    arrays, static = split_arguments((argument,), {})
    assert len(arrays) == len(jax.tree.leaves(argument))
    assert all(isinstance(a, jax.Array) and not a.weak_type for a in arrays)
    assert all(repr(leaf) == "<array>" for leaf in static.leaves)
    again = join_arguments(arrays, static)[0][0]
    jax.tree.map(
        np.testing.assert_array_equal, jax.tree.leaves(again), [np.asarray(leaf) for leaf in jax.tree.leaves(argument)]
    )


def test_keys_and_half_precision_are_arrays():
    arrays, _ = split_arguments((random.key(0), jnp.zeros(2, jnp.bfloat16), np.asarray(jnp.zeros(2, jnp.bfloat16))), {})
    assert [a.dtype for a in arrays] == [random.key(0).dtype, jnp.bfloat16, jnp.bfloat16]


@pytest.mark.parametrize(("one", "other"), [(1, True), (0, False), (3, 4), ("a", "b"), (1, 1.0)])
def test_arguments_that_may_run_another_program_are_told_apart(one, other):
    assert split_arguments((one,), {})[1] != split_arguments((other,), {})[1]


def test_equal_containers_of_new_data_share_a_program():
    first = split_arguments(({"a": Y, "n": 3},), {"flag": "x"})[1]
    assert first == split_arguments(({"a": 2 * Y, "n": np.int32(3)},), {"flag": "x"})[1]


@pytest.mark.parametrize(
    ("args", "kwargs", "where"),
    [
        ((1, {2, 3}), {}, "args[1] is a set"),
        ((), {"y": {"label": [Y, np.array(["a", "b"])]}}, "kwargs['y']['label'][1] is an array of dtype <U1"),
        ((np.array([object()]),), {}, "args[0] is an array of dtype object"),
        ((Column(["a", "b"]),), {}, "args[0] is a Column"),
        ((np.zeros(2, [("a", int)]),), {}, "args[0] is an array of dtype"),
    ],
)
def test_an_argument_that_is_neither_array_nor_hashable_is_named(args, kwargs, where):
    with pytest.raises(TypeError) as caught:
        split_arguments(args, kwargs)
    assert where in str(caught.value) and "Pass arrays of numbers" in str(caught.value)


def test_data_are_arguments_of_the_compiled_program_and_do_not_retrace():
    traces = []

    def model(group, y, num_groups):
        traces.append(num_groups)
        mixed(group, y)

    arrays, static = split_arguments((GROUP, Y, 3), {})

    def energy(static, arrays, x):
        return make_target(model, *join_arguments(arrays, static)).terms(
            {"mean": jnp.zeros(()), "sd": jnp.zeros(())}, x
        )

    program = jax.jit(energy, static_argnums=0)
    first = program(static, arrays, jnp.ones(6))
    once = len(traces)
    arrays, static = split_arguments((Column(GROUP[::-1]), 3 * Y, np.int64(3)), {})
    second = program(static, arrays, jnp.ones(6))
    assert len(traces) == once and not np.allclose(first, second)
    consts = jax.make_jaxpr(functools.partial(energy, static))(arrays, jnp.ones(6)).consts
    assert all(np.size(c) < len(Y) for c in consts)


def test_reading_a_model_computes_nothing(compilations):
    with compilations() as compiled:
        read_sites(support_in_theta, (Y,), {})
    assert compiled == []
