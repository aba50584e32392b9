# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Quickstart: a linear mixed model with correlated random intercepts and slopes, against lme4.

Reaction times of 18 drivers over ten days of sleep restriction (Belenky et al. 2003; lme4's `sleepstudy`). Subject s
has an intercept and a slope of its own, b_s ~ Normal(0, Sigma):

    reaction = beta[0] + b_s[0] + (beta[1] + b_s[1]) * days + Normal(0, sigma)

with Sigma given by the standard deviations `sd` and the correlation `rho`. The marginal likelihood of this model is
known exactly, so lme4's maximum (`lmer(Reaction ~ Days + (Days | Subject), REML = FALSE)`) is the value to reach.
"""

import time

import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from _report import draw, parse_options, print_table, read_csv
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer

PUBLISHED = {"beta": [251.405, 10.467], "sd": [23.78, 5.717], "rho": 0.081, "sigma": 25.592}
PUBLISHED_LOG_LIKELIHOOD = -875.97


def model(days, subject, num_subjects, reaction=None):
    beta = numpyro.param("beta", jnp.array([250.0, 10.0]))
    sd = numpyro.param("sd", jnp.array([20.0, 5.0]), constraint=constraints.positive)
    rho = numpyro.param("rho", 0.0, constraint=constraints.interval(-1.0, 1.0))
    sigma = numpyro.param("sigma", 25.0, constraint=constraints.positive)

    correlation_tril = jnp.array([[1.0, 0.0], [rho, jnp.sqrt(1.0 - rho**2)]])
    with numpyro.plate("subjects", num_subjects):
        b = numpyro.sample("b", dist.MultivariateNormal(jnp.zeros(2), scale_tril=sd[:, None] * correlation_tril))

    mean = beta[0] + b[subject, 0] + (beta[1] + b[subject, 1]) * days
    with numpyro.plate("observations", len(days)):
        numpyro.sample("reaction", dist.Normal(mean, sigma), obs=reaction)


def main():
    options = parse_options("sleepstudy", "Linear mixed model with random slopes, against lme4")
    data = read_csv("sleepstudy")
    subject = data["subject"].astype(int)
    num_subjects = int(subject.max()) + 1

    settings = {} if options.num_particles is None else {"num_particles": options.num_particles}
    optimizer = SMCOptimizer(model, **settings)
    start = time.perf_counter()
    result = optimizer.run(
        random.key(0), options.num_steps, data["days"], subject, num_subjects, reaction=data["reaction"]
    )
    seconds = time.perf_counter() - start

    print(f"\nsleepstudy: {options.num_steps} iterations in {seconds:.1f} s with compilation, {result.status}")
    source = "lme4, maximum likelihood"
    print_table(optimizer.summarize(random.key(1), result.state), PUBLISHED, PUBLISHED_LOG_LIKELIHOOD, source)
    draw(
        result, PUBLISHED, PUBLISHED_LOG_LIKELIHOOD, source, "sleepstudy: random intercepts and slopes", options.output
    )


if __name__ == "__main__":
    main()
