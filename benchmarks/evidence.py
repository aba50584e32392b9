# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The log evidence of five models in closed form or by quadrature, beside blackjax's adaptive tempered SMC.

    python benchmarks/evidence.py [--seeds 20]

Both get 1,000 particles and the same seeds, compiled before they are timed, and take turns. blackjax (extra ``bench``)
gets what its own documentation recommends: temperatures from the effective sample size (half of the particles), and
Hamiltonian moves whose mass matrix is tuned from the particles at every stage. It states no error. Without blackjax
its columns are left out. z is the largest error in stated standard deviations, or in roundings of the value in single
precision, whichever is larger.
"""

import argparse
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.infer.util import log_density
from scipy import stats

from numpyro_smcopt import log_evidence

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from oracles import cauchy_prior, exact_cauchy, exact_regression, regression

try:
    import blackjax
    from blackjax.smc.resampling import systematic
    from blackjax.smc.tuning.from_particles import inverse_mass_matrix_from_particles
except ImportError:
    blackjax = None

NUM_PARTICLES = 1000
STEP_SIZE, NUM_LEAPFROG, NUM_MOVES = 0.3, 8, 5  # of blackjax, in units of the particles' spread


def two_modes(y, sd):
    w = numpyro.sample("w", dist.Normal(0.0, 3.0).expand([len(y)]).to_event(1))
    means = jnp.stack([w, -w])  # the data do not tell the sign
    halves = dist.Categorical(probs=jnp.full(2, 0.5))
    numpyro.sample("y", dist.MixtureSameFamily(halves, dist.Normal(means, sd).to_event(1)), obs=y)


def exact_two_modes(y, sd):
    return stats.norm(0.0, np.hypot(3.0, sd)).logpdf(y).sum()


def problems():
    rng = np.random.default_rng(1)
    x, wide = rng.standard_normal((100, 5)), rng.standard_normal((100, 50))
    y = x @ np.array([0.3, 1.0, -0.2, 0.5, -1.0]) + rng.standard_normal(100)
    y_wide = wide @ rng.standard_normal(50) + rng.standard_normal(100)
    return {
        "regression, 5 coefficients": (regression, exact_regression, (x, y, 0.0, 3.0)),
        "regression, 50 coefficients": (regression, exact_regression, (wide, y_wide, 0.0, 3.0)),
        "off-centre prior": (regression, exact_regression, (x, y, 10.0, 1.0)),
        "Cauchy prior": (cauchy_prior, exact_cauchy, (np.array([2.0, 3.5, 1.0, 4.0]),)),
        "two modes": (two_modes, exact_two_modes, (np.array([3.0, 3.0]), 0.3)),
    }


def tempered_by_blackjax(model, arguments):
    """A function of a key."""
    trace = numpyro.handlers.trace(numpyro.handlers.seed(model, 0)).get_trace(*arguments)
    prior, shape = trace["w"]["fn"], trace["w"]["value"].shape
    log_prior = lambda w: prior.log_prob(w).sum()  # noqa: E731
    log_likelihood = lambda w: log_density(model, arguments, {}, {"w": w})[0] - log_prior(w)  # noqa: E731

    def tuned(_, state, info=None):
        mass = jnp.atleast_2d(inverse_mass_matrix_from_particles(state.particles.reshape(NUM_PARTICLES, -1)))
        return blackjax.smc.extend_params({"inverse_mass_matrix": mass if shape else mass[0]})

    step = blackjax.hmc.build_kernel()

    def move(rng_key, state, logdensity_fn, inverse_mass_matrix):
        return step(rng_key, state, logdensity_fn, STEP_SIZE, inverse_mass_matrix, NUM_LEAPFROG)

    @jax.jit
    def run(rng_key):
        key_prior, key_loop = random.split(rng_key)
        particles = prior.sample(key_prior, (NUM_PARTICLES,))
        first = tuned(None, blackjax.smc.tempered.init(particles))
        sampler = blackjax.inner_kernel_tuning(
            blackjax.adaptive_tempered_smc,
            log_prior,
            log_likelihood,
            move,
            blackjax.hmc.init,
            systematic,
            tuned,
            first,
            num_mcmc_steps=NUM_MOVES,
            target_ess=0.5,
        )

        def stage(carry):
            state, k, log_z = carry
            state, info = sampler.step(random.fold_in(key_loop, k), state)
            return state, k + 1, log_z + info.log_likelihood_increment

        carry = sampler.init(particles), 0, jnp.zeros(())
        return jax.lax.while_loop(lambda carry: carry[0].sampler_state.tempering_param < 1.0, stage, carry)[2]

    return run


def timed(function):
    start = time.perf_counter()
    value = jax.block_until_ready(function())
    return value, time.perf_counter() - start


def main(num):
    print(f"{num} seeds, {NUM_PARTICLES} particles; seconds are medians, in turns")
    print(
        f"{'':<28}{'exact':>10}{'RMSE':>8}{'stated':>8}{'max z':>7}{'tempered':>9}{'s':>8}{'RMSE':>8}{'s':>8}  blackjax"
    )
    for name, (model, exact, arguments) in problems().items():
        truth = exact(*arguments)
        ours = lambda key: log_evidence(model, *arguments, rng_key=key, num_particles=NUM_PARTICLES)  # noqa: B023, E731
        theirs = tempered_by_blackjax(model, arguments) if blackjax else None
        ours(random.key(1000))
        if theirs:
            theirs(random.key(1000)).block_until_ready()
        found, others = [], []
        for seed in range(num):
            found.append(timed(lambda: ours(random.key(seed))))  # noqa: B023
            if theirs:
                others.append(timed(lambda: theirs(random.key(seed))))  # noqa: B023
        errors = np.array([f.log_evidence - truth for f, _ in found])
        stated = np.array([f.log_evidence_std for f, _ in found])
        # Below the rounding of the exact value in single precision there is nothing to compare.
        z = np.max(np.abs(errors) / np.maximum(stated, abs(truth) * np.finfo(np.float32).eps))
        tempered = sum(f.tempered for f, _ in found)
        line = f"{name:<28}{truth:>10.4f}{np.sqrt(np.mean(errors**2)):>8.4f}{np.sqrt(np.mean(stated**2)):>8.4f}"
        line += f"{z:>7.1f}{tempered:>9}{np.median([s for _, s in found]):>8.3f}"
        if others:
            deviations = np.array([float(value) - truth for value, _ in others])
            line += f"{np.sqrt(np.mean(deviations**2)):>8.4f}{np.median([s for _, s in others]):>8.3f}"
        print(line, flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=20)
    warnings.simplefilter("ignore", UserWarning)
    main(parser.parse_args().seeds)
