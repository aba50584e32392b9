# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Closed forms that tests compare with."""

import numpy as np


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


def normal_fit(y):
    """Maximum likelihood estimates of mean and standard deviation, and the log likelihood there."""
    y = np.asarray(y, float)
    sd = y.std()
    return y.mean(), sd, -0.5 * y.size * (np.log(2 * np.pi * sd**2) + 1)
