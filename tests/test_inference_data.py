# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Fits for ArviZ, of whichever generation is installed (0.x and 1.x are both meant to pass)."""

import warnings

import jax
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro import handlers
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, one_block, to_arviz
from numpyro_smcopt.kernels import RandomWalk

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # ArviZ 0.x announces ArviZ 1
    az = pytest.importorskip("arviz")

matplotlib.use("Agg")
FIRST_GENERATION = int(az.__version__.partition(".")[0]) < 1
# Their own affairs: a deprecation inside ArviZ 0.x with matplotlib 3.11, and its talk about single chains.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:Passing a dict or None as alias_mapping"),
    pytest.mark.filterwarnings("ignore:More chains .* than draws"),
]

GROUP = np.repeat(np.arange(3), 4)
Y = np.array([1.2, 0.4, 1.9, 0.8, -0.3, 0.6, -1.0, 0.1, 2.9, 3.4, 2.2, 3.0], np.float32)
STEPS, PARTICLES = 30, 1000


def model(group, y=None, num_groups=3):
    mean = numpyro.param("mean", 0.5)
    sd = numpyro.param("sd", np.ones(2), constraint=constraints.positive)
    with numpyro.plate("groups", num_groups):
        b = numpyro.sample("b", dist.Normal(np.zeros(2), sd).to_event(1), infer={"event_dims": ["part"]})
        numpyro.deterministic("level", mean + b[:, 0])
    with numpyro.plate("data", len(group)):
        numpyro.sample("y", dist.Normal(mean + b[group, 0] + b[group, 1], 1.0), obs=y)


def fit(seed=0, model=model, **settings):
    optimizer = SMCOptimizer(model, optax.sgd(0.01), num_particles=PARTICLES, kernel=RandomWalk(), **settings)
    return optimizer, optimizer.run(random.key(seed), STEPS, GROUP, Y, progress_bar=False)


@pytest.fixture(scope="module")
def blocks():
    return fit()


@pytest.fixture(scope="module")
def data(blocks):
    return to_arviz(*blocks, num_samples=500, coords={"groups": ["a", "b", "c"]})


def group(data, name):
    return data[name] if FIRST_GENERATION else data[name].to_dataset()


def test_the_groups_and_their_axes(data):
    shapes = {
        "posterior": {"b": ("chain", "draw", "groups", "part"), "level": ("chain", "draw", "groups")},
        "log_likelihood": {"y": ("chain", "draw", "data")},
        "observed_data": {"y": ("data",)},
        "weighted_posterior": {
            "b": ("chain", "particle", "groups", "part"),
            "log_weight": ("chain", "particle"),
            "ess": ("chain", "block"),
        },
        "point_estimate": {"mean": ("chain",), "sd": ("chain", "sd_dim_0")},
        "optimization_trace": {"mean": ("chain", "step"), "ess": ("chain", "step"), "loss": ("chain", "step")},
    }
    for name, axes in shapes.items():
        assert {variable: group(data, name)[variable].dims for variable in axes} == axes
    found = {axis: size for name in shapes for axis, size in group(data, name).sizes.items()}
    sizes = {"chain": 1, "draw": 500, "particle": PARTICLES, "step": STEPS, "groups": 3, "part": 2, "data": 12}
    assert found == {**sizes, "block": 3, "sd_dim_0": 2}
    assert list(group(data, "posterior")["groups"].values) == ["a", "b", "c"]


def test_the_groups_hold_the_fit(blocks, data):
    optimizer, result = blocks
    posterior, likelihood = group(data, "posterior"), group(data, "log_likelihood")
    np.testing.assert_array_equal(group(data, "observed_data")["y"], Y)
    np.testing.assert_array_equal(group(data, "point_estimate")["sd"][0], result.params["sd"])
    np.testing.assert_array_equal(group(data, "optimization_trace")["sd"][0], result.trajectory["sd"])
    np.testing.assert_array_equal(group(data, "optimization_trace")["loss"][0], result.losses)
    assert posterior.attrs["status"] == result.status.value
    samples = {"b": posterior["b"].values[0]}
    np.testing.assert_allclose(
        likelihood["y"].values[0], optimizer.log_likelihood(result.params, samples)["y"], rtol=1e-5, atol=1e-5
    )


def test_the_weighted_cloud_is_exact(tmp_path):
    optimizer, result = fit(model=handlers.scope(model, prefix="left"), partition=one_block)
    weights = np.exp(np.asarray(result.state.log_weights[:, 0], float))
    data = to_arviz(optimizer, result, log_likelihood=False)
    assert not hasattr(data, "log_likelihood")
    cloud = group(data, "weighted_posterior")
    mean = (cloud["left.b"] * np.exp(cloud["log_weight"])).sum("particle")[0]
    expected = np.einsum("n,nd->d", weights, result.state.points.x).reshape(3, 2)
    np.testing.assert_allclose(mean, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(cloud["ess"][0], [1 / (weights**2).sum()], rtol=1e-3)
    data.to_netcdf(tmp_path / "fit.nc")


def test_independent_runs_are_chains(blocks):
    optimizer, result = blocks
    other = optimizer.run(random.key(1), STEPS + 20, GROUP, Y, progress_bar=False)
    data = to_arviz(optimizer, [result, other])
    trace = group(data, "optimization_trace")
    assert group(data, "posterior").sizes["chain"] == 2
    assert trace.sizes["step"] == STEPS + 20
    np.testing.assert_array_equal(trace["mean"][0, :STEPS], result.trajectory["mean"])
    assert np.all(np.isnan(trace["mean"][0, STEPS:])) and np.all(np.isfinite(trace["mean"][1]))
    table = az.summary(data, var_names=["b"])
    assert np.all(np.isfinite(np.asarray(table["r_hat"], float)))
    with pytest.raises(ValueError, match="2 results and 1 reports"):
        to_arviz(optimizer, [result, other], report=object())


def test_arviz_works_on_it(data):
    table = az.summary(data, var_names=["level"])
    assert list(table.index) == ["level[a]", "level[b]", "level[c]"]
    level = group(data, "posterior")["level"].values.reshape(-1, 3)
    np.testing.assert_allclose(np.asarray(table["mean"], float), level.mean(0), atol=0.06)  # it rounds
    az.loo(data)
    az.plot_forest(data, var_names=["level"])
    if FIRST_GENERATION:
        az.plot_posterior(data, var_names=["level"])
    else:
        az.plot_dist(data, var_names=["level"])
    matplotlib.pyplot.close("all")


@pytest.mark.skipif(FIRST_GENERATION, reason="ArviZ 0.x has no from_numpyro_svi")
def test_from_numpyro_svi_takes_the_view(blocks):
    optimizer, result = blocks
    tilted = jax.nn.log_softmax(result.state.blocks.sum_coordinates(3.0 * result.state.points.x), 0)
    state = result.state._replace(log_weights=tilted)
    data = az.from_numpyro_svi(
        optimizer.as_svi(state),
        svi_result=result,
        model_args=(GROUP, Y),
        num_samples=2000,
        log_likelihood=True,
    )
    drawn = data["posterior"]["b"]
    assert drawn.dims == ("sample", "groups", "part")
    weights = np.exp(np.asarray(state.blocks.to_coordinates(tilted), float))
    x = np.asarray(state.points.x, float)
    mean = (weights * x).sum(0)
    error = np.sqrt((weights * (x - mean) ** 2).sum(0) / 2000)
    np.testing.assert_array_less(np.abs(drawn.values.mean(0).ravel() - mean), 5 * error)
    ours = optimizer.log_likelihood(result.params, {"b": drawn.values})["y"]
    np.testing.assert_allclose(data["log_likelihood"]["y"].values, ours, rtol=1e-4, atol=1e-4)
