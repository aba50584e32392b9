# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Momentum particles beside weighted particles and plain particle gradient descent, on problems with exact answers.

    python benchmarks/momentum_bank.py BANK [--problems sleepstudy nile] [--methods momentum smc] [--steps 1000]

BANK is a folder with `problems.py` (``PROBLEMS``: models, data and exact log marginal likelihoods) and `reference.json`
(exact maxima and standard errors). Nothing is tuned: all methods run with their defaults, except that plain particle
gradient descent has no momentum. Printed are the gap to the exact maximum of the log marginal likelihood in nats, the
largest error in exact standard errors, and the processor's seconds of one run with compilation (of all cores together,
so that another load on the machine does not count).
"""

import argparse
import importlib.util
import json
import sys
import time
import warnings
from pathlib import Path

import jax
import numpy as np
from jax import random

from numpyro_smcopt import MomentumParticleMLE, SMCOptimizer, kernels

METHODS = {
    "smc": SMCOptimizer,
    "momentum": MomentumParticleMLE,
    "adjusted": lambda model: MomentumParticleMLE(model, kernel=kernels.MetropolisUnderdamped()),
    "plain": lambda model: MomentumParticleMLE(model, momentum=0.0, latent_momentum=0.0),
}


def load(bank):
    """The problems and the references of a bank."""
    spec = importlib.util.spec_from_file_location("problems", bank / "problems.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["problems"] = module
    spec.loader.exec_module(module)
    return module.PROBLEMS, json.loads((bank / "reference.json").read_text())


def flat(values, like, skip):
    """Those of ``like``, one after the other, without sites that have no comparable estimate."""
    names = [name for name in like if name not in skip]
    return np.concatenate([np.ravel(np.asarray(values[name], float)) for name in names] or [np.zeros(0)])


def score(problem, reference, make, seed, num_steps):
    """Gap, largest error and seconds of one run."""
    data = problem.load()
    start = time.process_time()
    result = make(problem.model).run(random.key(seed), num_steps, progress_bar=False, **data)
    params = {name: np.asarray(value, float) for name, value in result.params.items()}
    seconds = time.process_time() - start
    with jax.enable_x64(True):
        here = float(problem.log_marginal({name: jax.numpy.asarray(value) for name, value in params.items()}, data))
    skip = (*problem.at_boundary, *(("W",) if problem.rotation_invariant else ()))
    errors = flat(params, reference["se"], skip) - flat(reference["theta_hat"], reference["se"], skip)
    z = np.max(np.abs(errors) / flat(reference["se"], reference["se"], skip), initial=0.0)
    return reference["logZ"] - here, z, seconds


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--problems", nargs="*")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    problems, references = load(args.bank)
    print(f"{'problem':<18}" + "".join(f"{name + ': gap':>16}{'|z|':>8}{'cpu s':>8}" for name in args.methods))
    for name in args.problems or problems:
        cells = []
        for method in args.methods:
            rows = [
                score(problems[name], references[name], METHODS[method], seed, args.steps) for seed in range(args.seeds)
            ]
            gap, z = (max(column) for column in list(zip(*rows, strict=True))[:2])
            cells.append(f"{gap:>16.4f}{z:>8.3f}{rows[0][2]:>8.1f}")
        print(f"{name:<18}" + "".join(cells), flush=True)


if __name__ == "__main__":
    main()
