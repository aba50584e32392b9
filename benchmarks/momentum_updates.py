# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time of one update of `MomentumParticleMLE` over the bare pair of gradients that it needs.

    python benchmarks/momentum_updates.py [--repeats 5] [--steps 40]

An update takes one gradient in theta and one in the latents, at different theta, so they cannot share a pass. Below
"pair" are these two gradients alone, mapped over the particles and compiled in a loop. Both sides are timed in turn and
the fastest of several times is taken, so that another load on the machine disturbs the ratio little.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.flatten_util import ravel_pytree
from updates import model

from numpyro_smcopt import MomentumParticleMLE, one_block
from numpyro_smcopt.potential import make_target

NUM_PARTICLES = (10, 100, 1_000, 10_000)
NUM_LATENTS = (10, 100)


def pair(y, x, theta, steps):
    """A compiled loop of gradients in theta, then in the latents; both move, so that nothing can be hoisted."""

    @jax.jit
    def loop(y, x, theta):
        target = make_target(model, (y,), {})
        flat, unravel = ravel_pytree(theta)
        mean_energy = lambda t, x: jnp.mean(jax.vmap(lambda one: jnp.sum(target.terms(unravel(t), one)))(x))  # noqa: E731
        of_latents = jax.vmap(jax.grad(lambda one, t: jnp.sum(target.terms(unravel(t), one))), (0, None))

        def body(_, carry):
            x, t = carry
            t = t - 1e-9 * jax.grad(mean_energy)(t, x)
            return x - 1e-6 * of_latents(x, t), t

        return lax.fori_loop(0, steps, body, (x, flat))

    return lambda: jax.block_until_ready(loop(y, x, theta))


def seconds(call):
    """Wall time of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--steps", type=int, default=40)
    args = parser.parse_args()
    print(f"{'particles':>10}{'latents':>9}{'pair ms':>10}{'update ms':>11}{'update/pair':>13}{'compile s':>11}")
    for num_latents in NUM_LATENTS:
        y = np.random.default_rng(0).standard_normal(num_latents).astype(np.float32)
        for num_particles in NUM_PARTICLES:
            optimizer = MomentumParticleMLE(
                model, step_size=1e-5, momentum=0.9, latent_step_size=1e-3, latent_momentum=0.9,
                num_particles=num_particles, partition=one_block,
            )  # fmt: skip
            state = optimizer.init(random.key(0), y)
            bare = pair(y, state.points.x, state.theta, args.steps)
            update = lambda: optimizer.run(None, args.steps, y, init_state=state, progress_bar=False)  # noqa: B023, E731
            first = seconds(update)
            bare()
            times = [(seconds(bare), seconds(update)) for _ in range(args.repeats)]
            of_pair, of_update = (1e3 * min(column) / args.steps for column in zip(*times, strict=True))
            row = f"{num_particles:>10}{num_latents:>9}{of_pair:>10.3f}{of_update:>11.3f}{of_update / of_pair:>13.2f}"
            print(f"{row}{first:>11.1f}", flush=True)


if __name__ == "__main__":
    main()
