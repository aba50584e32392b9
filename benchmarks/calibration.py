# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Are the stated errors right? Coverage of 95% intervals over simulated data, and the error of the log evidence.

    python benchmarks/calibration.py [--data-sets 200] [--groups 100] [--size 5] [--seeds 50]

Coverage: a random-intercept model (all three parameters unknown), simulated anew for every data set from the seeds
0, 1, 2, ... Beside it the coverage of exact maximum likelihood intervals on the same data sets, and over many thousands
of others. With 100 groups exact intervals are calibrated; with 30 (``--groups 30``) they are too short for the mean.
Evidence: the standard deviation that one report states, beside the spread of the log evidence over seeds.
"""

import argparse
import warnings

import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.distributions import constraints
from scipy import optimize, stats

from numpyro_smcopt import SMCOptimizer, log_evidence

TRUTH = {"mean": 1.0, "sd": 0.7, "sigma": 0.8}
MANY = 50_000  # data sets for the coverage of exact intervals


def random_intercepts(y):
    mean = numpyro.param("mean", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    sigma = numpyro.param("sigma", 1.0, constraint=constraints.positive)
    with numpyro.plate("groups", y.shape[1]):
        b = numpyro.sample("b", dist.Normal(0.0, sd))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Normal(mean + b, sigma), obs=y)


def logistic_groups(y):
    with numpyro.plate("groups", y.shape[1]):
        b = numpyro.sample("b", dist.Normal(0.5, 1.5))
        with numpyro.plate("members", y.shape[0]):
            numpyro.sample("y", dist.Bernoulli(logits=b), obs=y)


def gamma_poisson(y):
    with numpyro.plate("data", len(y)):
        rate = numpyro.sample("rate", dist.Gamma(1.3, 0.2))
        numpyro.sample("y", dist.Poisson(rate), obs=y)


def logistic_regression(x, y):
    w = numpyro.sample("w", dist.Normal(0.0, 2.0).expand([x.shape[1]]).to_event(1))
    with numpyro.plate("data", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=x @ w), obs=y)


def exact_intervals(y):
    """{name: (low, high)} on the unconstrained scale, mapped back, from the exact likelihood."""
    size, groups = y.shape
    average = y.mean(0)

    def loss(flat):
        noise = np.exp(2 * flat[2])
        total = noise + size * np.exp(2 * flat[1])
        squares = np.sum((y - average) ** 2) / noise + size * np.sum((average - flat[0]) ** 2) / total
        return 0.5 * (squares + groups * ((size - 1) * np.log(noise) + np.log(total)))

    best = optimize.minimize(loss, [average.mean(), 0.0, 0.0], tol=1e-9).x
    step = 1e-4 * np.eye(3)
    signs = [(1, 1), (1, -1), (-1, 1), (-1, -1)]
    entry = lambda i, j: sum(a * b * loss(best + a * step[i] + b * step[j]) for a, b in signs) / 4e-8  # noqa: E731
    errors = np.sqrt(np.diag(np.linalg.inv([[entry(i, j) for j in range(3)] for i in range(3)])))
    ends = best + stats.norm.ppf(0.975) * errors * np.array([[-1], [1]])
    return {"mean": ends[:, 0], "sd": np.exp(ends[:, 1]), "sigma": np.exp(ends[:, 2])}


def simulate(rng, groups, size):
    """[size, groups] observations."""
    b = TRUTH["sd"] * rng.standard_normal(groups)
    return TRUTH["mean"] + b + TRUTH["sigma"] * rng.standard_normal((size, groups))


def exact_coverage(num, groups, size):
    """{name: share} of exact intervals over ``num`` data sets: in balanced data two sums of squares are sufficient.

    Of data sets whose maximum has ``sd = 0`` there is no interval for it, which counts as a miss.
    """
    rng = np.random.default_rng(1)
    noise, total = TRUTH["sigma"] ** 2, TRUTH["sigma"] ** 2 + size * TRUTH["sd"] ** 2
    within = noise * rng.chisquare(groups * (size - 1), num) / (groups * (size - 1))
    between = total * rng.chisquare(groups - 1, num) / groups
    mean = TRUTH["mean"] + np.sqrt(total / (size * groups)) * rng.standard_normal(num)
    inside = between > within
    variance = np.where(inside, between - within, np.nan) / size
    # Both have the relative variance 2 / degrees of freedom, and are independent.
    of_within, of_between = 2 * within**2 / (groups * (size - 1)), 2 * between**2 / groups
    errors = {
        "mean": np.abs(mean - TRUTH["mean"]) / np.sqrt(np.maximum(between, within) / (size * groups)),
        "sd": np.abs(np.log(variance / TRUTH["sd"] ** 2)) * size * variance / np.sqrt(of_between + of_within),
        "sigma": np.abs(np.log(within / noise)) * within / np.sqrt(of_within),
    }
    widest = stats.norm.ppf(0.975)
    return {name: np.mean(np.nan_to_num(error, nan=np.inf) < widest) for name, error in errors.items()}


def coverage(num, groups, size):
    optimizer = SMCOptimizer(random_intercepts)
    covered, exactly = ({name: 0 for name in TRUTH} for _ in range(2))
    for k in range(num):
        y = simulate(np.random.default_rng(k), groups, size)
        result = optimizer.run(random.key(k), 200, y, progress_bar=False)
        intervals = optimizer.summarize(random.key(k), result.state).confidence_intervals(0.95)
        for counts, found in ((covered, intervals), (exactly, exact_intervals(y))):
            for name, truth in TRUTH.items():
                counts[name] += bool(found[name][0] <= truth <= found[name][1])
    often = exact_coverage(MANY, groups, size)
    print(f"\nCoverage of 95% intervals, {num} data sets of {groups} groups of {size}")
    print(f"{'':<10}{'report':>8}{'exact':>8}{f'exact, {MANY}':>15}")
    for name in TRUTH:
        shares = [100 * counts[name] / num for counts in (covered, exactly)]
        print(f"  {name:<8}{shares[0]:>7.1f}%{shares[1]:>7.1f}%{100 * often[name]:>14.1f}%")
    shares = [100 * sum(counts.values()) / (num * len(TRUTH)) for counts in (covered, exactly)]
    print(f"  {'together':<8}{shares[0]:>7.1f}%{shares[1]:>7.1f}%", flush=True)


def spread(num):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((60, 6))
    problems = {
        "logistic groups": (logistic_groups, (rng.integers(0, 2, (4, 40)),)),
        "gamma-Poisson": (gamma_poisson, (rng.poisson(rng.gamma(1.3, 5.0, 80)),)),
        "logistic regression": (logistic_regression, (x, (x[:, 0] > rng.logistic(size=60)).astype(int))),
    }
    print(f"\nLog evidence over {num} seeds\n{'':<22}{'spread':>9}{'stated':>9}{'ratio':>7}")
    for name, (model, arguments) in problems.items():
        found = [log_evidence(model, *arguments, rng_key=random.key(k)) for k in range(num)]
        actual = np.std([f.log_evidence for f in found], ddof=1)
        stated = np.sqrt(np.mean([f.log_evidence_std**2 for f in found]))
        print(f"{name:<22}{actual:>9.4f}{stated:>9.4f}{stated / actual:>7.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-sets", type=int, default=200)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--size", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=50, help="0: only the coverage")
    options = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    if options.seeds:
        spread(options.seeds)
    coverage(options.data_sets, options.groups, options.size)
