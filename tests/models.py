# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Small models that several files of tests are run on."""

import numpyro
import numpyro.distributions as dist
from numpyro.distributions import constraints


def normal(y):
    """x_i ~ N(mean, 1), y_i ~ N(x_i, 1/4)."""
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def unknown_spread(y, n=3):
    """x_i ~ N(mean, sd^2), y_i ~ N(x_i, 1); the size of the plate is an argument of its own."""
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", n):
        x = numpyro.sample("x", dist.Normal(mean, sd))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)
