# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A mixed model with 10,000 groups and 128 particles: independent blocks beside the joint algorithm.

    python benchmarks/many_groups.py [--groups 10000] [--members 5] [--particles 128] [--steps 300]

Simulated data ``y_ij ~ N(x_i, sigma)``, ``x_i ~ N(mean, sd)``, whose maximum of the marginal likelihood has a closed
form. Printed per partition: how far each estimate is from the maximum, in standard errors of the maximum, the log
likelihood lost, and the effective sample size as a fraction of the particles (of the worst block, and on average).
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, find_blocks, one_block

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import random_intercepts_fit, random_intercepts_log_likelihood

TRUTH = {"mean": 2.0, "sd": 1.5, "sigma": 1.0}


def model(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 2.0, constraint=constraints.positive)
    with numpyro.plate("groups", y.shape[1]):
        x = numpyro.sample("x", dist.Normal(mean, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(x, sigma), obs=y)


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
    exact, errors = random_intercepts_fit(y)
    best, data = random_intercepts_log_likelihood(y, **exact), y.astype(np.float32)
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
        lost = best - random_intercepts_log_likelihood(y, **found)
        print(f"{lost:>11.4f}{worst:>11.3f}{mean:>10.3f}{seconds:>9.1f}", flush=True)


if __name__ == "__main__":
    main()
