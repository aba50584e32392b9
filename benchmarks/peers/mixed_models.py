# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Mixed models beside lme4 and glmmTMB: estimates, log likelihoods, CPU seconds of a first fit.

    python benchmarks/peers/mixed_models.py

R and its packages are used where they are installed (on Debian: r-cran-lme4, r-cran-glmmtmb); without R only this
package is run. lme4 integrates the two generalised models by adaptive quadrature with 25 nodes, and leaves constants
out of their log likelihoods; glmmTMB approximates by Laplace. "off" is the largest difference from this package's
estimate, in its standard errors. Seconds of this package are those of a new process each, start of Python and imports
aside, compilation included; those of R are of the call of the fit, in a process that has its packages loaded.
"""

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODELS = ("dyestuff", "sleepstudy", "penicillin", "pastes", "cbpp", "epil")


def read(name):
    import numpy as np

    return np.genfromtxt(ROOT / "examples" / "data" / f"{name}.csv", delimiter=",", skip_header=3, names=True)


def mixed_model(design, groups, sizes, start, family, size=None, y=None):
    """Random intercepts for every array of labels in ``groups``; ``start`` are intercept and residual scale."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    beta = numpyro.param("beta", jnp.zeros(design.shape[1]).at[0].set(start[0]))
    sd = numpyro.param("sd", jnp.full(len(groups), start[1]), constraint=constraints.positive)
    mean = design @ beta
    for k, (labels, num) in enumerate(zip(groups, sizes, strict=True)):
        with numpyro.plate(f"groups_{k}", num):
            mean = mean + numpyro.sample(f"b_{k}", dist.Normal(0.0, sd[k]))[labels]
    with numpyro.plate("data", len(design)):
        if family == "normal":
            sigma = numpyro.param("sigma", start[1], constraint=constraints.positive)
            law = dist.Normal(mean, sigma)
        elif family == "binomial":
            law = dist.Binomial(size, logits=mean)
        else:
            law = dist.Poisson(jnp.exp(mean))
        numpyro.sample("y", law, obs=y)


def random_slopes(days, subject, num_subjects, y=None):
    """lme4's ``(days | subject)``."""
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    beta = numpyro.param("beta", jnp.array([250.0, 10.0]))
    sd = numpyro.param("sd", jnp.array([20.0, 5.0]), constraint=constraints.positive)
    rho = numpyro.param("rho", 0.0, constraint=constraints.interval(-1.0, 1.0))
    sigma = numpyro.param("sigma", 25.0, constraint=constraints.positive)
    correlation = jnp.array([[1.0, 0.0], [rho, jnp.sqrt(1.0 - rho**2)]])
    with numpyro.plate("subjects", num_subjects):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scale_tril=sd[:, None] * correlation))
    effects = beta + b
    with numpyro.plate("data", len(days)):
        numpyro.sample("y", dist.Normal(effects[subject, 0] + effects[subject, 1] * days, sigma), obs=y)


def problem(name):
    """A model and its keyword arguments."""
    import numpy as np

    table = read(name)
    if name == "sleepstudy":
        subject = table["subject"].astype(int)
        return random_slopes, dict(days=table["days"], subject=subject, num_subjects=18, y=table["reaction"])
    ones = np.ones(len(table))
    columns, response, start, family, size = {
        "dyestuff": (["batch"], "yield_", (1500.0, 50.0), "normal", None),
        "penicillin": (["plate", "sample"], "diameter", (20.0, 1.0), "normal", None),
        "pastes": (["batch", "cask"], "strength", (60.0, 1.0), "normal", None),
        "cbpp": (["herd"], "incidence", (0.0, 1.0), "binomial", "size"),
        "epil": (["patient"], "seizures", (0.0, 1.0), "poisson", None),
    }[name]
    response = response if response in table.dtype.names else response.rstrip("_")
    design = ones[:, None]
    if name == "cbpp":
        design = np.column_stack([ones, *(table["period"] == k for k in (1, 2, 3))])
    elif name == "epil":
        centred = lambda v: np.log(v) - np.log(v).mean()  # noqa: E731
        base, age, treated = centred(table["base"]), centred(table["age"]), table["progabide"]
        design = np.column_stack([ones, base, treated, age, table["last"], base * treated])
    groups = [table[column].astype(int) for column in columns]
    sizes = tuple(int(labels.max()) + 1 for labels in groups)
    data = dict(design=design, groups=groups, sizes=sizes, start=start, family=family, y=table[response])
    return mixed_model, data if size is None else data | {"size": table[size].astype(int)}


def fit_here(name):
    """Fit with this package, and print the figures as JSON."""
    import numpy as np
    from jax import random

    from numpyro_smcopt import SMCOptimizer

    model, data = problem(name)
    begin = time.process_time()
    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 1_000, progress_bar=False, **data)
    seconds = time.process_time() - begin
    report = optimizer.summarize(random.key(1), result.state)
    estimates, errors = {}, {}
    for site in ("beta", "sd", "sigma"):
        values = np.ravel(np.asarray(result.params.get(site, []), float))
        for k, value in enumerate(values):
            label = site if site == "sigma" else f"{site}{k}"
            estimates[label], errors[label] = value, float(np.ravel(report.standard_errors[site])[k])
    evidence = float(report.log_evidence), float(report.log_evidence_std)
    print(json.dumps({"seconds": seconds, "estimates": estimates, "errors": errors, "evidence": evidence}))


def fit_in_r():
    """``{model: {peer: (seconds, log likelihood, estimates)}}``."""
    if shutil.which("Rscript") is None:
        print("R is not installed: its columns are left out.")
        return {}
    script = Path(__file__).with_suffix(".R")
    done = subprocess.run(["Rscript", script, ROOT / "examples" / "data"], capture_output=True, text=True, check=True)
    found = {}
    for line in done.stdout.splitlines():
        model, peer, seconds, log_likelihood, values = line.split("|")
        estimates = {key: float(value) for key, value in (pair.split("=") for pair in values.split())}
        found.setdefault(model, {})[peer] = float(seconds), float(log_likelihood), estimates
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worker", choices=MODELS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        fit_here(options.worker)
        return
    peers = fit_in_r()
    print(f"{'data':12}{'program':16}{'log likelihood':>22}{'off':>9}{'CPU s':>9}")
    for name in MODELS:
        worker = [sys.executable, __file__, "--worker", name]
        done = subprocess.run(worker, capture_output=True, text=True, check=True)
        here = json.loads(done.stdout.strip().splitlines()[-1])
        value, error = here["evidence"]
        print(f"{name:12}{'numpyro_smcopt':16}{f'{value:.3f} +- {error:.3f}':>22}{'':9}{here['seconds']:>9.2f}")
        for peer, (seconds, log_likelihood, estimates) in peers.get(name, {}).items():
            off = max(abs(estimates[key] - here["estimates"][key]) / here["errors"][key] for key in here["estimates"])
            print(f"{'':12}{peer:16}{log_likelihood:>22.3f}{off:>9.3f}{seconds:>9.2f}", flush=True)


if __name__ == "__main__":
    main()
