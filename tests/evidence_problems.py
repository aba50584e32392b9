# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Models without parameters whose log evidence is known, in closed form or by quadrature; benchmarks use them too."""

import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import logsumexp


def regression(x, y, location, scale):
    w = numpyro.sample("w", dist.Normal(location, scale).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(x @ w, 1.0), obs=y)


def exact_regression(x, y, location, scale):
    mean = x @ np.full(x.shape[1], location)
    return stats.multivariate_normal(mean, scale**2 * x @ x.T + np.eye(len(y))).logpdf(y)


def cauchy_prior(y):
    w = numpyro.sample("w", dist.Cauchy(-5.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Normal(w, 1.0), obs=y)


def exact_cauchy(y):
    grid = np.linspace(-20.0, 30.0, 500_001)
    logs = stats.cauchy(-5.0, 1.0).logpdf(grid) + stats.norm(grid[:, None], 1.0).logpdf(y).sum(1)
    return logsumexp(logs) + np.log(grid[1] - grid[0])
