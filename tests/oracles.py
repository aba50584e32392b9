# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What tests and benchmarks compare with: closed forms, and models whose log evidence is known."""

import numpy as np
import numpyro
import numpyro.distributions as dist
from scipy import stats
from scipy.special import logsumexp


def balanced_groups(y, group_variance, noise_variance):
    """``b_g ~ N(mean, group_variance)``, ``y_gj ~ N(b_g, noise_variance)`` with the variances known.

    Args:
        y: [G, J] observations.

    Returns:
        The maximum likelihood estimate of ``mean``, its standard error, the log likelihood there, and mean and variance
        [G] of the group effects given the data and the estimate.
    """
    y = np.asarray(y, float)
    num_groups, size = y.shape
    spread = group_variance + noise_variance / size  # of a group's mean around the grand mean
    means, mean = y.mean(1), y.mean()
    within = ((y - means[:, None]) ** 2).sum() / noise_variance
    log_likelihood = -0.5 * (
        y.size * np.log(2 * np.pi)
        + (num_groups * (size - 1)) * np.log(noise_variance)
        + num_groups * np.log(noise_variance + size * group_variance)
        + within
        + ((means - mean) ** 2).sum() / spread
    )
    shrinkage = group_variance / spread
    effects = mean + shrinkage * (means - mean)
    return mean, np.sqrt(spread / num_groups), log_likelihood, effects, shrinkage * noise_variance / size


def random_intercepts_log_likelihood(y, mean, sd, sigma):
    """Log likelihood of ``y_jg ~ N(mean + b_g, sigma^2)``, ``b_g ~ N(0, sd^2)``, for observations [J, G]."""
    size, groups = y.shape
    within, between = np.sum((y - y.mean(0)) ** 2), size * np.sum((y.mean(0) - mean) ** 2)
    total = sigma**2 + size * sd**2
    log_det = groups * ((size - 1) * np.log(sigma**2) + np.log(total))
    return -(log_det + within / sigma**2 + between / total + y.size * np.log(2 * np.pi)) / 2


def random_intercepts_fit(y):
    """Estimates ``{name: value}`` for such data and their standard errors, from two mean squares; for ``sd > 0``."""
    size, groups = y.shape
    noise = np.sum((y - y.mean(0)) ** 2) / (groups * (size - 1))
    total = size * np.mean((y.mean(0) - y.mean()) ** 2)
    sd, sigma = np.sqrt((total - noise) / size), np.sqrt(noise)
    # From the chi-squared laws of the mean squares
    errors = {
        "mean": np.sqrt(total / y.size),
        "sd": np.sqrt(2 * (total**2 / groups + noise**2 / (groups * (size - 1)))) / size / (2 * sd),
        "sigma": sigma / np.sqrt(2 * groups * (size - 1)),
    }
    return {"mean": y.mean(), "sd": sd, "sigma": sigma}, errors


def normal_fit(y):
    """Maximum likelihood estimates of mean and standard deviation, and the log likelihood there."""
    y = np.asarray(y, float)
    sd = y.std()
    return y.mean(), sd, -0.5 * y.size * (np.log(2 * np.pi * sd**2) + 1)


# Models without parameters whose log evidence is known, in closed form or by quadrature


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
