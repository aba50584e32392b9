# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Bad input: every message names the site or argument, says what was got, and what to do.

None of these may get as far as an error of JAX. Almost all are refused before anything is compiled.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import nnx
from jax import random
from models import unknown_spread
from numpyro import handlers
from numpyro.contrib.module import nnx_module
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, latents_to_params
from numpyro_smcopt.potential import make_target, read_sites

Y = np.array([0.5, -1.0, 2.0], np.float32)


def regression(inputs, y):
    slope = numpyro.param("slope", jnp.zeros(2))
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(inputs @ slope, 1.0), obs=y)


def init(model, *args, **options):
    return SMCOptimizer(model).init(random.key(0), *args, **options)


def refused(kind, *parts):
    """`pytest.raises` that wants all of ``parts`` in the message."""
    return pytest.raises(kind, match="(?s)" + "".join(f"(?=.*{part})" for part in parts))


# -- the model ---------------------------------------------------------------------------------------------------------
def test_a_model_without_parameters_is_pointed_to_the_helper():
    def model(y):
        scale = numpyro.sample("scale", dist.HalfNormal(1.0))
        numpyro.sample("y", dist.Normal(0.0, scale), obs=y)

    with refused(ValueError, "no numpyro.param site", r"latents_to_params\(model, \['scale'\]\)"):
        init(model, Y)


def test_a_model_that_observes_nothing():
    def model(y=None):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", 3):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with refused(ValueError, "The model observes nothing", "'x', 'y'", "obs="):
        init(model)


def test_a_model_that_is_no_function():
    with refused(TypeError, "model must be a callable", "got str"):
        SMCOptimizer("model")


@pytest.mark.parametrize("distribution", [dist.Poisson(2.0), dist.Geometric(0.5)])
def test_a_discrete_latent_that_cannot_be_enumerated(distribution):
    def model(y):
        rate = numpyro.param("rate", 1.0)
        count = numpyro.sample("count", distribution)
        numpyro.sample("y", dist.Normal(rate * count, 1.0), obs=y)

    with refused(ValueError, "Latent site 'count' is discrete", "no enumerate support", "Sum it out"):
        init(model, Y)


def test_a_delta_latent():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", 3):
            numpyro.sample("point", dist.Delta(mean))

    with refused(ValueError, "'point' has a Delta distribution", "numpyro.deterministic"):
        init(model, Y)


def test_a_subsampled_plate_with_local_latents():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("rows", 3, subsample_size=2) as index:
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.asarray(y)[index])

    with refused(ValueError, "Plate 'rows' is subsampled", "2 of 3", r"latent sites \['x'\]", "Use the whole plate"):
        init(model, Y)


def test_a_plate_that_is_subsampled_at_random():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        with numpyro.plate("rows", 3, subsample_size=2) as index:
            numpyro.sample("y", dist.Normal(x, 1.0), obs=jnp.asarray(y)[index])

    with refused(ValueError, "Plate 'rows' is subsampled", "fix the subset with `handlers.substitute"):
        init(model, Y)
    fixed = handlers.substitute(model, data={"rows": jnp.array([0, 2])})
    assert read_sites(fixed, (Y,), {}).num_terms == 3


def test_a_mutable_site_of_a_module():
    def model(y):
        net = nnx_module("net", nnx.BatchNorm(1, rngs=nnx.Rngs(0)))
        numpyro.sample("y", dist.Normal(net(jnp.ones((3, 1)))[:, 0], 1.0), obs=y)

    with refused(ValueError, "Mutable site 'net", "shared by particles", "LayerNorm instead of BatchNorm"):
        init(model, Y)


@pytest.mark.parametrize("where", ["unused", "deterministic only"])
def test_a_parameter_that_never_reaches_the_density(where):
    def model(y):
        mean = numpyro.param("mean", 0.0)
        lost = numpyro.param("lost", 1.0)
        if where == "deterministic only":
            numpyro.deterministic("twice", 2 * lost)
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)

    with refused(ValueError, "Param site 'lost' never reaches the density", "Remove it, or use it"):
        init(model, Y)


def test_a_size_that_is_computed_from_data():
    def model(group, y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("groups", int(group.max()) + 1):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x[group], 1.0), obs=y)

    with refused(ValueError, "looks at the values of an array argument", "pass them as Python integers"):
        init(model, np.array([0, 1, 1]), Y)


@pytest.mark.parametrize("wrong", ["branch", "numpy", "boolean index", "range"])
def test_a_model_that_looks_at_data(wrong):
    def model(y, n):
        mean = numpyro.param("mean", 0.0)
        if wrong == "branch" and y[0] > 0:
            mean = -mean
        elif wrong == "numpy":
            y = np.unique(y)
        elif wrong == "boolean index":
            y = y[y > 0]
        elif wrong == "range":
            y = [y[k] for k in range(n + 0)][0]
        numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)

    with refused(ValueError, "looks at the values of an array argument", "pass them as Python integers"):
        init(model, Y, jnp.asarray(2))


# -- latents_to_params -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("sites", "kind", "parts"),
    [
        ("x", TypeError, ["the string 'x'", r"Write \['x'\]"]),
        (["z"], ValueError, [r"names \['z'\]", "no such sample sites"]),
        (["y"], ValueError, ["Site 'y' is observed"]),
    ],
)
def test_sites_that_cannot_become_parameters(sites, kind, parts):
    with refused(kind, *parts):
        read_sites(latents_to_params(unknown_spread, sites), (Y,), {})


# -- starting values ---------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("init_params", "kind", "parts"),
    [
        ({"men": 0.0}, ValueError, [r"init_params names \['men'\]", r"\['mean', 'sd'\]"]),
        ({"x": jnp.zeros(3)}, ValueError, [r"init_params names \['x'\]", "no param sites"]),
        ([0.0, 1.0], TypeError, ["init_params must be a dict", "got list"]),
        ({"mean": jnp.zeros(3)}, ValueError, [r"init_params\['mean'\] has shape \(3,\)", r"shape \(\)"]),
        ({"sd": -1.0}, ValueError, ["Param site 'sd' starts at -1", "outside the interior", "positive"]),
        ({"sd": 0.0}, ValueError, ["Param site 'sd' starts at 0", "outside the interior", "positive"]),
        ({"mean": jnp.nan}, ValueError, ["Param site 'mean' starts at nan", "not finite"]),
    ],
)
def test_init_params_that_cannot_be_used(init_params, kind, parts):
    with refused(kind, *parts):
        init(unknown_spread, Y, init_params=init_params)


def test_init_params_of_a_shape_that_would_break_the_model():
    with refused(ValueError, r"init_params\['slope'\] has shape \(4,\)", r"shape \(2,\)", "Give a constrained value"):
        init(regression, np.ones((3, 2)), Y, init_params={"slope": jnp.zeros(4)})


def test_a_model_whose_own_start_is_outside_the_support():
    def model(y):
        sd = numpyro.param("sd", -2.0, constraint=constraints.positive)
        numpyro.sample("y", dist.Normal(0.0, sd), obs=y)

    with refused(ValueError, "Param site 'sd' starts at -2", "for a scale at a positive value"):
        init(model, Y)


# -- numbers and parts -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("number", [0, -3, 2.5, "10", True, None])
def test_num_steps(number):
    with refused(ValueError, "num_steps must be a positive integer", f"got {number!r}"):
        SMCOptimizer(unknown_spread).run(random.key(0), number, Y, progress_bar=False)


def test_num_steps_left_out():
    with refused(ValueError, "num_steps must be a positive integer", r"got an array of shape \(500,\)"):
        SMCOptimizer(unknown_spread).run(random.key(0), np.zeros(500))


@pytest.mark.parametrize("number", [0, -3, 2.5, "10", True])
def test_num_particles(number):
    with refused(ValueError, "num_particles must be a positive integer", f"got {number!r}"):
        SMCOptimizer(unknown_spread, num_particles=number)


@pytest.mark.parametrize("threshold", [-0.1, 1.5, np.nan])
def test_ess_threshold(threshold):
    with refused(ValueError, "ess_threshold", r"within \[0, 1\]", f"got {threshold!r}"):
        SMCOptimizer(unknown_spread, ess_threshold=threshold)


@pytest.mark.parametrize("optim", ["adam", optax.adam, 0.1, lambda g: g])
def test_an_optimiser_of_the_wrong_type(optim):
    with refused(
        TypeError, "Expected either an instance of", "optax.GradientTransformation", f"Got {type(optim).__name__}"
    ):
        SMCOptimizer(unknown_spread, optim)


def test_minimize_is_no_optimiser_of_noisy_gradients():
    with refused(TypeError, "numpyro.optim.Minimize", r"Use an optimiser such as optax.adam\(1e-2\)"):
        SMCOptimizer(unknown_spread, numpyro.optim.Minimize())


@pytest.mark.parametrize(
    ("part", "where"), [("kernel", "numpyro_smcopt.kernels"), ("objective", "numpyro_smcopt.objectives")]
)
def test_parts_of_the_wrong_type(part, where):
    with refused(TypeError, f"{part} must be an object from {where}", "got 'nonsense'"):
        SMCOptimizer(unknown_spread, **{part: "nonsense"})


# -- data --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("shape", [(4,), (2,), (3, 1), (3, 4), (0,)])
def test_observations_of_another_shape(shape):
    with refused(
        ValueError, "Observations of site 'y' have shape", str(shape).strip("()"), r"has shape \(3,\)", "plate sizes"
    ):
        make_target(unknown_spread, (np.zeros(shape, np.float32),), {})


def test_observations_may_be_spread_over_their_distribution():
    assert make_target(unknown_spread, (np.float32(0.5),), {}).sites.num_terms == 6
    assert make_target(unknown_spread, (np.zeros((5, 3), np.float32),), {}).sites.num_terms == 18


def test_labels_that_start_at_one():
    def model(group, y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("groups", 3):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
        with numpyro.plate("data", 6):
            numpyro.sample("y", dist.Normal(x[group], 1.0), obs=y)

    group = np.repeat(np.arange(3), 2)
    init(model, group, np.tile(Y, 2))
    with refused(ValueError, r"args\[0\], element 4, holds 3", "an axis of 'x' of length 3", "Subtract 1"):
        init(model, 1 + group, np.tile(Y, 2))


def test_labels_that_are_text():
    with refused(TypeError, r"kwargs\['y'\] is an array of dtype <U1", "encode labels as integers"):
        init(unknown_spread, y=np.array(["a", "b"]))


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_data_that_are_not_finite(value):
    with refused(ValueError, "Site 'y' has no finite log density", "1 of its 3 terms", "Look for NaN"):
        init(unknown_spread, np.array([0.5, value, 1.0], np.float32))


def test_a_covariate_that_is_not_finite():
    with refused(ValueError, "Site 'y' has no finite log density", "1 of its 3 terms"):
        init(regression, np.array([[0, 1], [np.nan, 1], [2, 1]], np.float32), Y)


@pytest.mark.parametrize("latents", [True, False])
def test_observations_outside_the_support(latents):
    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("data", 3):
            logits = numpyro.sample("x", dist.Normal(mean, 1.0)) if latents else mean
            numpyro.sample("y", dist.Bernoulli(logits=logits), obs=y)

    with refused(ValueError, "Site 'y' has no finite log density", "1 of its 3 terms", "impossible values"):
        init(model, np.array([0.0, 1.0, 2.0], np.float32))


def test_a_potential_that_is_nowhere_finite():
    def model(y):
        mean = numpyro.param("mean", 0.0)
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
        numpyro.factor("forbidden", jnp.where(jnp.abs(x) < 1e6, -jnp.inf, 0.0))

    with refused(ValueError, "Site 'forbidden' has no finite log density", "every particle", "init_params"):
        init(model, Y)
