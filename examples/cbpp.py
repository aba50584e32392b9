# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A generalised linear mixed model: binomial counts with a random effect per herd, against lme4.

New cases of contagious bovine pleuropneumonia in 15 Ethiopian herds over four periods (Lesnoff et al. 2004; lme4's
`cbpp`). Herd h has a level of its own, b_h ~ Normal(0, sd), and `beta` holds the log odds of the first period and the
differences of the later ones from it:

    incidence ~ Binomial(size, logits = beta[0] + beta[period] + b_h)

The published values are those of `glmer(cbind(incidence, size - incidence) ~ period + (1 | herd), family = binomial,
nAGQ = 9)`, that is, adaptive Gauss-Hermite quadrature with nine nodes. In that mode lme4 reports the log likelihood
relative to the saturated model (-50.00); the absolute value here is that of the same quadrature with 61 nodes.
"""

import time

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from _report import draw, parse_options, print_table, read_csv
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer

PUBLISHED = {"beta": [-1.3992, -0.9914, -1.1278, -1.5797], "sd": 0.6475}
QUADRATURE_LOG_LIKELIHOOD = -91.98


def model(design, size, herd, num_herds, incidence=None):
    beta = numpyro.param("beta", jnp.array([-1.0, 0.0, 0.0, 0.0]))
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)

    with numpyro.plate("herds", num_herds):
        b = numpyro.sample("b", dist.Normal(0.0, sd))

    with numpyro.plate("observations", len(size)):
        numpyro.sample("incidence", dist.Binomial(size, logits=design @ beta + b[herd]), obs=incidence)


def main():
    options = parse_options("cbpp", "Binomial mixed model, against lme4")
    data = {name: column.astype(int) for name, column in read_csv("cbpp").items()}
    design = np.eye(4)[data["period"]]
    design[:, 0] = 1.0  # the first period is the baseline
    num_herds = int(data["herd"].max()) + 1

    settings = {} if options.num_particles is None else {"num_particles": options.num_particles}
    optimizer = SMCOptimizer(model, **settings)
    start = time.perf_counter()
    result = optimizer.run(
        random.key(0),
        options.num_steps,
        design,
        data["size"],
        data["herd"],
        num_herds,
        incidence=data["incidence"],
    )
    seconds = time.perf_counter() - start

    print(f"\ncbpp: {options.num_steps} iterations in {seconds:.1f} s with compilation, {result.status}")
    source = "lme4, quadrature"
    print_table(optimizer.summarize(random.key(1), result.state), PUBLISHED, QUADRATURE_LOG_LIKELIHOOD, source)
    draw(result, PUBLISHED, QUADRATURE_LOG_LIKELIHOOD, source, "cbpp: binomial mixed model", options.output)


if __name__ == "__main__":
    main()
