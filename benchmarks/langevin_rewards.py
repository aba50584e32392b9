# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Reward tuning of Gaussian mixtures with a forward divergence: the four Langevin studies of the papers.

    python benchmarks/langevin_rewards.py [--num-particles 10000] [--num-steps 600] [--seeds 10] [--settings tight ...]

The samples are those of a mixture with weights softmax(theta) and known components; the reward is given, the reference
is the mixture at the start. What is printed is the *exact* expected reward at the final theta, sum_j softmax(theta)_j
E[R | component j] by quadrature, not an average over particles; beside it that of the optimum, in closed form.
Setting, optimiser (Adam, 0.1), fresh reference draws per update and first step size (0.1) are those of the public code.
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
from jax import random

from numpyro_smcopt import ImplicitDiffusion, SMCOptimizer
from numpyro_smcopt.kernels import HMC, MALA, ULA
from numpyro_smcopt.objectives import ForwardKL, Reward
from numpyro_smcopt.samplers import Chains

NUM_REFERENCE = 5000
PAIR = np.array([[-3.0, 0.0], [3.0, 0.0]])
ANGLES = np.pi / 3 * np.arange(6)
HEXAGON = 4.0 * np.stack([np.cos(ANGLES), np.sin(ANGLES)], 1)


def smooth(x):
    return jax.nn.sigmoid(x[..., 0] / 0.5) * jnp.exp(-jnp.sum((x - jnp.array([4.0, 3.8])) ** 2, -1) / 20) / 0.7


def half_plane(centre):
    def reward(x):
        bump = jnp.exp(-jnp.sum((x - jnp.asarray(centre)) ** 2, -1) / 20) / 2.5
        return jnp.where(x[..., 0] >= 0, bump, 0.0)

    return reward


# means, variance of a component, logits at the start, reward, weight of the divergence
SETTINGS = {
    "dual-smooth": (PAIR, 0.5, np.zeros(2), smooth, 0.1),
    "dual-hard": (PAIR, 0.5, np.zeros(2), half_plane([10.0, 3.8]), 1e-3),
    "sparse-hard": (HEXAGON, 1.0, np.tile([1.5, -1.5], 3), half_plane([10.0, 3.8]), 1e-3),
    "tight": (HEXAGON, 0.01, np.zeros(6), half_plane([4.0, 0.0]), 0.1),
}


def component_rewards(means, variance, reward):
    """E[R | component j] by a midpoint rule over eight standard deviations, which splits at x1 = 0 as finely."""
    sd, cells = np.sqrt(variance), 1600
    offsets = sd * (16 * (np.arange(cells) + 0.5) / cells - 8)
    weights = np.exp(-(offsets**2) / (2 * variance))
    weights /= weights.sum()
    rewards = []
    for mean in means:
        grid = np.stack(np.meshgrid(mean[0] + offsets, mean[1] + offsets, indexing="ij"), -1)
        rewards.append(float(weights @ np.asarray(reward(jnp.asarray(grid)), float) @ weights))
    return np.array(rewards)


def optimum(rewards, reference, weight):
    """Weights p that maximise ``p . R - weight * KL(reference || p)``: p_j = weight q_j / (nu - R_j)."""
    low, high = rewards.max(), rewards.max() + weight
    for _ in range(200):
        nu = (low + high) / 2
        too_much = np.sum(weight * reference / (nu - rewards)) > 1
        low, high = (nu, high) if too_much else (low, nu)
    return weight * reference / (nu - rewards)


def make_model(means, variance, start):
    def model():
        logits = numpyro.param("logits", jnp.asarray(start, jnp.float32))
        components = dist.Normal(jnp.asarray(means, jnp.float32), np.sqrt(variance)).to_event(1)
        numpyro.sample("x", dist.MixtureSameFamily(dist.Categorical(logits=logits), components))

    return model


def reference_draws(means, variance, start):
    def draw(rng_key):
        key_component, key_noise = random.split(rng_key)
        component = random.categorical(key_component, jnp.asarray(start), shape=(NUM_REFERENCE,))
        noise = jnp.sqrt(variance) * random.normal(key_noise, (NUM_REFERENCE, 2))
        return {"x": jnp.asarray(means, jnp.float32)[component] + noise}

    return draw


METHODS = {
    "ULA": lambda model, objective, num: SMCOptimizer(
        model, optax.adam(0.1), objective, kernel=ULA(0.1), num_particles=num, ess_threshold=0.9
    ),
    "MALA": lambda model, objective, num: SMCOptimizer(
        model, optax.adam(0.1), objective, kernel=MALA(0.1), num_particles=num, ess_threshold=0.9
    ),
    "HMC": lambda model, objective, num: SMCOptimizer(
        model, optax.adam(0.1), objective, kernel=HMC(0.1), num_particles=num, ess_threshold=0.9
    ),
    "default": lambda model, objective, num: SMCOptimizer(model, None, objective, num_particles=num),
    "ImpDiff": lambda model, objective, num: ImplicitDiffusion(
        model, optax.adam(0.1), objective, sampler=Chains(ULA(0.1, target=None)), num_particles=num
    ),
}


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-particles", type=int, default=10_000)
    parser.add_argument("--num-steps", type=int, default=600)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS), choices=SETTINGS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=METHODS)
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)
    print(f"{args.num_particles} particles, {args.num_steps} updates, {args.seeds} seeds; exact reward at the end")
    print(f"{'setting':<13}{'method':<9}{'optimum':>9}{'mean':>9}{'sd':>9}{'min':>9}{'max':>9}{'worst %':>9}{'s':>6}")
    for setting in args.settings:
        means, variance, start, reward, weight = SETTINGS[setting]
        rewards = component_rewards(means, variance, reward)
        reference = np.exp(start) / np.exp(start).sum()
        best = rewards @ optimum(rewards, reference, weight)
        divergence = ForwardKL(reference_draws(means, variance, start))
        objective = Reward(lambda sample, reward=reward: reward(sample["x"]), weight, divergence)
        for method in args.methods:
            optimizer = METHODS[method](make_model(means, variance, start), objective, args.num_particles)
            begin, found = time.perf_counter(), []
            for seed in range(args.seeds):
                result = optimizer.run(random.key(seed), args.num_steps, progress_bar=False)
                logits = np.asarray(result.params["logits"], float)
                found.append(rewards @ (np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()))
            seconds, found = time.perf_counter() - begin, np.array(found)
            print(
                f"{setting:<13}{method:<9}{best:>9.5f}{found.mean():>9.5f}{found.std():>9.5f}{found.min():>9.5f}"
                f"{found.max():>9.5f}{100 * np.max(np.abs(found / best - 1)):>9.2f}{seconds / args.seeds:>6.1f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
