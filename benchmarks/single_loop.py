# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Updates per second of ImplicitDiffusion over those of a Python loop around compiled steps, timed in turns.

    python benchmarks/single_loop.py [--num-particles 1000] [--num-steps 500] [--rounds 3]

Both sides do the same: reward tuning of a mixture of six components by unadjusted Langevin and Adam, theta from the
covariance of the reward with the gradient of the energy, the reward recorded at every update. The loop is what one
writes first: `jax.jit` on the move and on the gradient, optax between them, and a number fetched per update.
"""

import argparse
import time
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import random
from langevin_rewards import HEXAGON, half_plane, make_model

from numpyro_smcopt import ImplicitDiffusion
from numpyro_smcopt.kernels import ULA
from numpyro_smcopt.objectives import Reward
from numpyro_smcopt.samplers import Chains

STEP_SIZE = 0.1
REWARD = half_plane([10.0, 3.8])


def energy(logits, x):
    squares = jnp.sum((x - jnp.asarray(HEXAGON, jnp.float32)) ** 2, 1) / 2
    return -jax.nn.logsumexp(jax.nn.log_softmax(logits) - squares)


@jax.jit
def move(rng_key, logits, x):
    gradient = jax.vmap(jax.grad(energy, argnums=1), in_axes=(None, 0))(logits, x)
    return x - STEP_SIZE * gradient + jnp.sqrt(2 * STEP_SIZE) * random.normal(rng_key, x.shape)


@jax.jit
def gradient_and_reward(logits, x):
    rewards = REWARD(x)
    slopes = jax.vmap(jax.grad(energy), in_axes=(None, 0))(logits, x)
    return (rewards - rewards.mean()) @ slopes / (len(x) - 1), rewards.mean()


def python_loop(num_particles, num_steps):
    optimizer, logits, rng_key = optax.adam(0.1), jnp.zeros(6), random.key(0)
    state, x, rewards = optimizer.init(logits), random.normal(random.key(1), (num_particles, 2)), []
    for _ in range(num_steps):
        rng_key, key = random.split(rng_key)
        x = move(key, logits, x)
        gradient, reward = gradient_and_reward(logits, x)
        updates, state = optimizer.update(gradient, state)
        logits = optax.apply_updates(logits, updates)
        rewards.append(float(reward))
    return logits


def main():
    """Print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--num-steps", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    ours = ImplicitDiffusion(
        make_model(HEXAGON, 1.0, np.zeros(6)),
        optax.adam(0.1),
        Reward(lambda sample: REWARD(sample["x"])),
        sampler=Chains(ULA(STEP_SIZE, target=None)),
        num_particles=args.num_particles,
    )
    start = ours.init(random.key(0))
    run = lambda: ours.run(None, args.num_steps, init_state=start, progress_bar=False)  # noqa: E731
    run(), python_loop(args.num_particles, 3)  # compile
    ratios = []
    for _ in range(args.rounds):
        begin = time.perf_counter()
        run()
        middle = time.perf_counter()
        python_loop(args.num_particles, args.num_steps)
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - begin))
        print(
            f"{args.num_steps / (middle - begin):10.0f} updates/s, Python loop {args.num_steps / (end - middle):8.0f}, "
            f"ratio {ratios[-1]:.1f}",
            flush=True,
        )
    print(f"median ratio {np.median(ratios):.1f}")


if __name__ == "__main__":
    main()
