# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time of one ULA and one MALA update over the bare value and gradient of the same potential, timed in the same run.

    python benchmarks/updates.py [--repeats 5] [--steps 40]

Both sides run inside one compiled loop. The bare side is `jax.vmap(jax.value_and_grad(potential))` of all particles,
in the latents alone and in latents and parameters (an update needs both gradients). One block, plain SGD, no
adaptation: the paper's algorithm. ULA evaluates once per update, MALA twice. A move also needs a normal number per
coordinate, which costs more than so cheap a potential: "noise" is the time to draw them, by the same function, and the
last ratios are over what a move cannot do without: one evaluation and the noise (ULA), or two and the noise (MALA).
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from jax.flatten_util import ravel_pytree
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer, one_block
from numpyro_smcopt.kernels import MALA, ULA, Preconditioning
from numpyro_smcopt.noise import draw_noise
from numpyro_smcopt.target import make_target

SIZES = [(n, d) for n in (100, 1_000, 10_000) for d in (10, 100, 1_000)]


def model(y):
    """Heavy-tailed observations of normal latents: some arithmetic per latent, as in a real model."""
    mean = numpyro.param("mean", 0.0)
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, scale))
        numpyro.sample("y", dist.StudentT(4.0, x, 1.0), obs=y)


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


def bare(y, x, theta, steps, both):
    """A compiled loop of ``steps`` vmapped values and gradients; the points move, so that nothing can be hoisted."""

    @jax.jit
    def loop(y, x, theta):
        target = make_target(model, (y,), {})
        flat, unravel = ravel_pytree(theta)
        energy = lambda t, x: jnp.sum(target.terms(unravel(t), x))  # noqa: E731
        evaluate = jax.vmap(jax.value_and_grad(energy, argnums=(0, 1) if both else 1), in_axes=(None, 0))

        def body(_, carry):
            x, t, total = carry
            value, gradient = evaluate(t, x)
            g_theta, g_x = gradient if both else (jnp.zeros((1, len(flat))), gradient)
            return x - 1e-6 * g_x, t - 1e-9 * g_theta.mean(0), total + value.sum()

        return lax.fori_loop(0, steps, body, (x, flat, 0.0))

    return lambda: loop(y, x, theta)


def noise(x, steps):
    """A compiled loop that draws the normal numbers of ``steps`` moves."""

    @jax.jit
    def loop(x):
        draw = lambda k, x: x + draw_noise(random.fold_in(random.key(0), k), x, 0).normal  # noqa: E731
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
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # frozen steps sizes are the point here
    plain = Preconditioning(forgetting=0.0)
    print(f"{'particles':>10}{'latents':>9}{'bare ms':>10}{'ULA/bare':>10}{'MALA/bare':>10}", end="")
    print(f"{'ULA/both':>10}{'MALA/both':>10}{'noise ms':>10}{'ULA/(b+n)':>11}{'MALA/(2b+n)':>13}", end="")
    print(f"{'compile s: ULA':>16}{'MALA':>8}")
    for num_particles, num_latents in SIZES:
        y = np.random.default_rng(0).standard_normal(num_latents).astype(np.float32)
        row, first, state = {}, {}, None
        for name, kernel in {
            "ULA": ULA(step_size=1e-4, target=None),
            "MALA": MALA(step_size=1e-3, target=None, preconditioning=plain),
        }.items():
            state, call = updates(kernel, y, num_particles, args.steps)
            row[name], first[name] = best_of(args.repeats, call)
        x, theta = state.points.x, state.theta
        latents, _ = best_of(args.repeats, bare(y, x, theta, args.steps, both=False))
        both, _ = best_of(args.repeats, bare(y, x, theta, args.steps, both=True))
        drawing, _ = best_of(args.repeats, noise(x, args.steps))
        print(
            f"{num_particles:>10}{num_latents:>9}{1e3 * latents / args.steps:>10.3f}{row['ULA'] / latents:>10.2f}"
            f"{row['MALA'] / latents:>10.2f}{row['ULA'] / both:>10.2f}{row['MALA'] / both:>10.2f}"
            f"{1e3 * drawing / args.steps:>10.3f}{row['ULA'] / (latents + drawing):>11.2f}"
            f"{row['MALA'] / (2 * latents + drawing):>13.2f}{first['ULA']:>16.1f}{first['MALA']:>8.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
