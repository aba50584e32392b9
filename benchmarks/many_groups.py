# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A mixed model with 10,000 groups and 128 particles: independent blocks beside the joint algorithm.

    python benchmarks/many_groups.py [--groups 10000] [--members 5] [--particles 128] [--steps 300]

Simulated data ``y_ij ~ N(x_i, sigma)``, ``x_i ~ N(mean, sd)``, whose maximum of the marginal likelihood has a closed
form. Printed per partition: how far each estimate is from the maximum, in standard errors of the maximum, the log
likelihood lost, and the effective sample size as a fraction of the particles (of the worst block, and on average).
"""

import argparse
import time
import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, find_blocks, one_block

TRUTH = {"mean": 2.0, "sd": 1.5, "sigma": 1.0}


def model(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 2.0, constraint=constraints.positive)
    with numpyro.plate("groups", y.shape[1]):
        x = numpyro.sample("x", dist.Normal(mean, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(x, sigma), obs=y)


def log_likelihood(y, mean, sd, sigma):
    m, n = y.shape
    within, between = np.sum((y - y.mean(0)) ** 2), m * np.sum((y.mean(0) - mean) ** 2)
    total = sigma**2 + m * sd**2
    log_det = n * ((m - 1) * np.log(sigma**2) + np.log(total))
    return -(log_det + within / sigma**2 + between / total + m * n * np.log(2 * np.pi)) / 2


def maximum(y):
    """The maximum and its standard errors, from the two mean squares."""
    m, n = y.shape
    mean, sigma2 = y.mean(), np.sum((y - y.mean(0)) ** 2) / (n * (m - 1))
    between = m * np.mean((y.mean(0) - mean) ** 2)
    sd, sigma = np.sqrt((between - sigma2) / m), np.sqrt(sigma2)
    errors = {
        "mean": np.sqrt(between / (m * n)),
        "sd": np.sqrt(2 * (between**2 / n + sigma2**2 / (n * (m - 1)))) / m / (2 * sd),
        "sigma": sigma / np.sqrt(2 * n * (m - 1)),
    }
    return {"mean": mean, "sd": sd, "sigma": sigma}, errors


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"groups": 10_000, "members": 5, "particles": 128, "steps": 300}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # the joint algorithm complains, rightly
    rng = np.random.default_rng(0)
    groups = rng.normal(TRUTH["mean"], TRUTH["sd"], args.groups)
    y = rng.normal(groups, TRUTH["sigma"], (args.members, args.groups))
    exact, errors = maximum(y)
    best, data = log_likelihood(y, **exact), y.astype(np.float32)
    print(f"{'partition':<12}{'blocks':>8}" + "".join(f"{'z ' + name:>9}" for name in exact), end="")
    print(f"{'nats lost':>11}{'ESS worst':>11}{'ESS mean':>10}{'seconds':>9}")
    for partition in (find_blocks, one_block):
        start = time.perf_counter()
        result = SMCOptimizer(model, partition=partition, num_particles=args.particles).run(
            random.key(0), args.steps, data, progress_bar=False
        )
        found = {name: float(value) for name, value in result.params.items()}
        seconds, tail = time.perf_counter() - start, slice(args.steps // 2, None)
        worst, mean = (result.diagnostics[name][tail].mean() for name in ("ess", "mean_ess"))
        scores = [(found[name] - exact[name]) / errors[name] for name in exact]
        print(f"{partition.__name__:<12}{result.state.blocks.num_blocks:>8}", end="")
        print("".join(f"{score:>9.3f}" for score in scores), end="")
        lost = best - log_likelihood(y, **found)
        print(f"{lost:>11.4f}{worst:>11.3f}{mean:>10.3f}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
