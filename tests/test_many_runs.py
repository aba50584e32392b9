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
from numpyro_smcopt.convergence import r_hat
from numpyro_smcopt.handlers import control
from numpyro_smcopt.kernels import RandomWalk

Y = np.array([3.0, 5.5, 4.0, 3.5, 4.2], np.float32)
HINT = 1.0
STARTS = np.array([-2.5, 1.0, -1.0, 3.0], np.float32)


def squared(y):
    root = numpyro.param("root", 1.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(root**2, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)
    numpyro.sample("hint", dist.Normal(root, 1.0), obs=HINT)


def log_likelihood(root):
    normal = lambda x, variance: -0.5 * (x**2 / variance + np.log(2 * np.pi * variance))  # noqa: E731
    return np.sum(normal(Y - root**2, 1.25)) + normal(HINT - root, 1.0)


MAXIMA = {sign: minimize_scalar(lambda r: -log_likelihood(r), bounds=sorted((sign, 3 * sign)), method="bounded").x
          for sign in (-1, 1)}  # fmt: skip


def small(**options):
    return SMCOptimizer(squared, optax.adam(0.05), kernel=RandomWalk(), num_particles=32, **options)


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
    print(result.runs.r_hat, r_hat(np.stack([result.runs.results[k].trajectory["root"] for k in (1,3)],1)), ends, result.runs.losses, exact, result.runs.loss_errors)
