# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Several runs at once: each is what it would be by itself, and of several maxima the highest is found.

The likelihood of the model is known, ``y ~ N(root^2, 1.25)`` and ``hint ~ N(root, 1)``: it has a maximum near each root
of the mean of y, and the hint makes the positive one higher by ``2 * root * hint`` nats.
"""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.diagnostics import gelman_rubin
from scipy.optimize import minimize_scalar

from numpyro_smcopt import EarlyStop, ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer, Status
from numpyro_smcopt.handlers import adapt_step_size
from numpyro_smcopt.kernels import RandomWalk
from numpyro_smcopt.runs.convergence import r_hat
from numpyro_smcopt.runs.run_axis import RunAxis

pytestmark = pytest.mark.slow

Y = np.array([3.0, 5.5, 4.0, 3.5, 4.2], np.float32)
HINT = 1.0
STARTS = np.array([-2.5, 1.0, -1.0, 3.0], np.float32)


def squared(y):
    root = numpyro.param("root", lambda key: random.uniform(key, (), float, 1.0, 3.0))
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(root**2, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    numpyro.sample("hint", dist.Normal(root, 1.0), obs=HINT)


def log_likelihood(root):
    normal = lambda x, variance: -0.5 * (x**2 / variance + np.log(2 * np.pi * variance))  # noqa: E731
    return np.sum(normal(Y - root**2, 1.25)) + normal(HINT - root, 1.0)


MAXIMA = {sign: minimize_scalar(lambda r: -log_likelihood(r), bounds=sorted((sign, 3 * sign)), method="bounded").x
          for sign in (-1, 1)}  # fmt: skip


def small():
    return SMCOptimizer(squared, optax.adam(0.05), kernel=RandomWalk(), num_particles=32, handlers=[adapt_step_size()])


@pytest.fixture(scope="module")
def stuck():
    optimizer = small()
    starts = {"root": STARTS}
    return optimizer, optimizer.run(random.key(0), 400, Y, init_params=starts, num_runs=4, progress_bar=False)


def test_the_best_of_several_runs_is_right_where_single_ones_are_stuck(stuck):
    _, result = stuck
    ends = np.array([one.params["root"] for one in result.runs.results])
    np.testing.assert_allclose(ends, [MAXIMA[int(np.sign(start))] for start in STARTS], atol=0.1)
    assert result.runs.best in (1, 3) and result.params["root"] == ends[result.runs.best]
    exact = -np.array([log_likelihood(end) for end in ends])
    assert np.all(np.abs(result.runs.losses - exact) < 4 * result.runs.loss_errors + 1e-3)
    assert result.runs.r_hat["root"] > 10
    np.testing.assert_allclose(result.runs.spread["root"], np.std(ends, ddof=1), rtol=1e-6)
    assert 0.9 < r_hat(np.stack([result.runs.results[k].trajectory["root"] for k in (1, 3)], 1)) < 1.2


def test_runs_go_on_together(stuck):
    optimizer, result = stuck
    more = optimizer.run(None, 3, Y, init_state=result.runs.states, num_runs=4, progress_bar=False)
    for before, after in zip(result.runs.results, more.runs.results, strict=True):
        assert int(after.state.num_updates) == 403
        np.testing.assert_allclose(after.trajectory["root"][0], before.trajectory["root"][-1], atol=0.1)


def test_states_are_stacked_and_parted_by_one_program_each(stuck, compilations):
    """Where every array was stacked and sliced by itself, four runs of this model took 25 compilations more."""
    _, result = stuck
    pair = result.runs.states[:2]
    with compilations() as compiled:
        again = [RunAxis(2).state_of(k, RunAxis(2).stack(pair)) for k in range(2)]
    assert len(compiled) == 2
    for one, other in zip(pair, again, strict=True):
        close(one, other)


def close(one, other):
    """Equal up to rounding, keys and counters exactly."""
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            np.testing.assert_array_equal(random.key_data(a), random.key_data(b))
        else:
            np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-4)


def prior(y):
    """Where there is no likelihood."""
    root = numpyro.param("root", lambda key: random.uniform(key, (), float, 1.0, 3.0))
    numpyro.sample("x", dist.Normal(root, 1.0))


OBJECTS = {
    "momentum": lambda: MomentumParticleMLE(
        squared, step_size=0.01, momentum=0.5, latent_step_size=0.01, latent_momentum=0.5, num_particles=16
    ),
    "implicit": lambda: ImplicitDiffusion(
        prior, optax.sgd(0.01), lambda sample: sample["x"] ** 2, sampler=RandomWalk(), num_particles=16
    ),
}


@pytest.mark.filterwarnings("ignore:Run .* particles hardly move:UserWarning")
@pytest.mark.parametrize("name", ["smc", *OBJECTS])
def test_each_run_is_what_it_would_be_by_itself(name, stuck, monkeypatch):
    if name == "momentum":  # as on an accelerator
        monkeypatch.setattr("numpyro_smcopt.runs.run_axis._in_turn", lambda: False)
    optimizer = stuck[0] if name == "smc" else OBJECTS[name]()
    together = optimizer.run(random.key(1), 4, Y, num_runs=4, progress_bar=False)
    runs = together.runs
    alone = optimizer.run(random.split(random.key(1), 4)[1], 4, Y, progress_bar=False)
    close(runs.results[1]._replace(status=None), alone._replace(status=None))
    assert len({float(one.trajectory["root"][0]) for one in runs.results}) == 4
    assert np.all(np.isfinite(runs.losses)) and runs.losses[runs.best] == min(runs.losses)
    assert together.losses is runs.results[runs.best].losses
    if name == "implicit":  # ranked by the loss itself
        np.testing.assert_allclose(runs.losses, [one.losses[-1] for one in runs.results], rtol=1e-6)


def test_early_stopping_waits_for_all(stuck, monkeypatch):
    optimizer, result = stuck
    states = result.runs.states
    run = lambda states: optimizer.run(  # noqa: E731
        None, 300, Y, num_runs=4, init_state=states, progress_bar=False, early_stop=EarlyStop(tolerance=1.0)
    )
    assert {(one.status, len(one.losses)) for one in run(states).runs.results} == {(Status.CONVERGED, 250)}
    monkeypatch.setattr(EarlyStop, "arrived", lambda self, theta, *rest: theta[-1, 0] > 0)
    assert len(run([states[1], states[3]] * 2).losses) == 50
    assert {(one.status, len(one.losses)) for one in run(states).runs.results} == {(Status.FINISHED, 300)}


def test_early_stopping_of_several_runs_needs_a_gradient_as_that_of_one_does():
    for num_runs in (1, 2):
        with pytest.raises(ValueError, match="early_stop needs a marginal likelihood and its gradient"):
            OBJECTS["implicit"]().run(random.key(0), 10, Y, num_runs=num_runs, early_stop=True, progress_bar=False)


def test_a_warning_names_the_run(stuck):
    optimizer, result = stuck
    states = list(result.runs.states)
    huge = jax.tree.map(lambda size: 1e3 * size, states[1].mutable_state)
    states[1] = states[1]._replace(
        mutable_state=jax.tree.map(lambda a, b: a.astype(b.dtype), huge, states[0].mutable_state)
    )
    with pytest.warns(UserWarning, match="The particles hardly move") as caught:
        optimizer.run(None, 3, Y, num_runs=4, init_state=states, progress_bar=False)
    assert [str(warning.message)[:13] for warning in caught] == ["Run 1 of 4: T"]


def test_r_hat_is_that_of_numpyro_and_counts_rounding_as_none():
    rng = np.random.default_rng(0)
    paths = rng.normal(size=(101, 3, 2)) + rng.normal(size=(3, 2))
    np.testing.assert_allclose(r_hat(paths), gelman_rubin(np.swapaxes(paths[51:], 0, 1)), rtol=1e-12)
    same = np.full((50, 4), 250.0, np.float32) * (1 + np.float32(1e-7) * np.arange(4, dtype=np.float32))
    assert r_hat(same) < 1.1 < r_hat(same + np.arange(4, dtype=np.float32))
    assert np.isnan(r_hat(paths[:3])).all() and np.isnan(r_hat(paths[:, :1])).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_runs": 0}, "num_runs must be a positive integer, got 0"),
        ({"num_runs": 2.5}, "num_runs must be a positive integer, got 2.5"),
        (
            {"num_runs": 3, "init_params": {"root": np.zeros(2)}},
            r"init_params\['root'\] has shape \(2,\), but the param site has shape \(\).*each: \(3,\)",
        ),
        ({"num_runs": 3, "init_params": {"rot": 0.0}}, r"init_params names \['rot'\]"),
        ({"num_runs": 2, "init_state": "state"}, "init_state must be a list of 2 states.*got str"),
        ({"num_runs": 2, "init_state": [1, 2, 3]}, "init_state must be a list of 2 states.*got 3 of them"),
    ],
)
def test_options_are_checked(options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        small().run(random.key(0), 10, Y, progress_bar=False, **options)


def test_a_run_that_cannot_start_is_named():
    with pytest.raises(ValueError, match="'root' starts at nan") as caught:
        small().run(random.key(0), 10, Y, num_runs=2, init_params={"root": jnp.array([jnp.nan, 1.0])})
    assert "the start of run 0 of 2" in caught.value.__notes__[0]
