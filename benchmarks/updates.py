# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time of one ULA and one MALA update over the bare value and gradient of the same potential, timed in the same run.

    python benchmarks/updates.py [--repeats 5] [--observations 1 20]

Both sides run inside one compiled loop, long enough that its beginning and end do not count. The bare side is
`jax.vmap(jax.value_and_grad(potential))` of all particles in the latents, as a user would write it, compiled with XLA's
defaults and with the options of this package, of which the faster counts. One block, plain SGD, no adaptation: the
paper's algorithm. ULA evaluates once per update, in latents and parameters, MALA twice.

A move also needs a normal number per coordinate: "noise" is the time to draw them, by the same function, and the
last ratios are over what a move cannot do without: one evaluation and the noise (ULA), or two and the noise (MALA).
How much an update costs beside its evaluations depends on what an evaluation costs: with a single observation per
latent it is cheaper than a normal number, with 20 it is that of an ordinary mixed model.
"""

import argparse
import itertools
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, one_block
from numpyro_smcopt.kernels import MALA, ULA, Preconditioning
from numpyro_smcopt.random_numbers import draw_random_numbers
from numpyro_smcopt.runs.compilation import compiler_options

SIZES = [(n, d) for n in (100, 1_000, 10_000) for d in (10, 100, 1_000)]


WORK = 2e8  # particles times observations that a loop goes through
LARGEST = 2e7  # particles times observations: 100 MB for every array of the bare side


def model(y):
    """Heavy-tailed observations [R, D] of normal latents, R of each."""
    mean = numpyro.param("mean", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("latents", y.shape[1]):
        x = numpyro.sample("x", dist.Normal(mean, scale))
        with numpyro.plate("observations", y.shape[0]):
            numpyro.sample("y", dist.StudentT(4.0, x, 1.0), obs=y)


def potential(y, theta, x):
    """The same energy of one particle ``x [D]``, written down."""
    mean, scale = theta["mean"], jnp.exp(theta["scale"])
    log_prior = dist.Normal(mean, scale).log_prob(x).sum()
    return -log_prior - dist.StudentT(4.0, x, 1.0).log_prob(y).sum()


def best_of(repeats, call):
    """Smallest of several wall times, the first call (compilation) apart; returns (best, first)."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    first, times = time.perf_counter() - start, []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(call())
        times.append(time.perf_counter() - start)
    return min(times), first


def bare(y, x, theta, steps, options):
    """A compiled loop of ``steps`` vmapped values and gradients; the points move, so that nothing can be hoisted."""

    def loop(y, x, theta):
        evaluate = jax.vmap(jax.value_and_grad(lambda x: potential(y, theta, x)))

        def body(_, carry):
            x, total = carry
            value, gradient = evaluate(x)
            return x - 1e-6 * gradient, total + value.sum()

        return lax.fori_loop(0, steps, body, (x, 0.0))

    compiled = jax.jit(loop, compiler_options=options)
    return lambda: compiled(y, x, theta)


def noise(x, steps):
    """A compiled loop that draws the normal numbers of ``steps`` moves."""

    @jax.jit
    def loop(x):
        draw = lambda k, x: x + draw_random_numbers(random.fold_in(random.key(0), k), x, 0).normal  # noqa: E731
        return lax.fori_loop(0, steps, draw, x)

    return lambda: loop(x)


def updates(kernel, y, num_particles, steps):
    """The optimiser and a call that makes ``steps`` updates from a fixed state, without a bar."""
    optimizer = SMCOptimizer(
        model, optax.sgd(1e-4), kernel=kernel, num_particles=num_particles, partition=one_block, ess_threshold=0.5
    )
    state = optimizer.init(random.key(0), y)
    return state, lambda: optimizer.run(None, steps, y, init_state=state, progress_bar=False).state


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--observations", type=int, nargs="+", default=[1, 20], help="per latent")
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # frozen steps sizes are the point here
    plain = Preconditioning(forgetting=0.0)
    kernels = {
        "ULA": ULA(step_size=1e-4, target=None),
        "MALA": MALA(step_size=1e-3, target=None, preconditioning=plain),
    }
    print(f"{'obs/latent':>10}{'particles':>10}{'latents':>9}{'bare ms':>10}{'noise ms':>10}{'ULA/bare':>10}", end="")
    print(f"{'MALA/bare':>10}{'ULA/(b+n)':>11}{'MALA/(2b+n)':>13}{'compile s: ULA':>16}{'MALA':>8}")
    for num_observations, (num_particles, num_latents) in itertools.product(args.observations, SIZES):
        if num_observations > 1 and num_observations * num_particles * num_latents > LARGEST:
            continue
        steps = int(np.clip(WORK / (num_observations * num_particles * num_latents), 10, 2_000))
        y = np.random.default_rng(0).standard_normal((num_observations, num_latents)).astype(np.float32)
        row, first, state = {}, {}, None
        for name, kernel in kernels.items():
            state, call = updates(kernel, y, num_particles, steps)
            row[name], first[name] = best_of(args.repeats, call)
        x = state.points.x
        sides = [bare(y, x, state.theta, steps, options) for options in ({}, compiler_options())]
        evaluation = min(best_of(args.repeats, side)[0] for side in sides)
        drawing, _ = best_of(args.repeats, noise(x, steps))
        print(
            f"{num_observations:>10}{num_particles:>10}{num_latents:>9}{1e3 * evaluation / steps:>10.3f}"
            f"{1e3 * drawing / steps:>10.3f}{row['ULA'] / evaluation:>10.2f}{row['MALA'] / evaluation:>10.2f}"
            f"{row['ULA'] / (evaluation + drawing):>11.2f}{row['MALA'] / (2 * evaluation + drawing):>13.2f}"
            f"{first['ULA'] - row['ULA']:>16.1f}{first['MALA'] - row['MALA']:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
