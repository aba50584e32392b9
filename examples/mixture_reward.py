# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Reward tuning of a Gaussian mixture: the samples are drawn to a reward, a divergence holds them near the start.

The samples are those of a mixture of three normals that hardly touch; the parameters are the log odds of two of them
against the third. What is maximised is

    F = E[R] - 0.2 KL,        R(x) = exp(-|x - (3, 1)|^2 / 8),

with either divergence from the start, KL(model || start) or KL(start || model). With two parameters F can be drawn, by
quadrature on a grid of the plane, and the paths of both algorithms over it. The particles of `SMCOptimizer` are
weighted. Those of `ImplicitDiffusion` stay in the component where they are. With the reverse divergence that does no
harm here: at the optimum ``R - 0.2 log(model / start)`` is constant, and its covariance with whatever vanishes under
every law of the particles. With the forward one it does.
"""

import argparse
from pathlib import Path

import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from scipy.optimize import minimize

from numpyro_smcopt import ImplicitDiffusion, SMCOptimizer
from numpyro_smcopt.objectives import ForwardKL, ReverseKL, Reward

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MEANS, SD = 2.6 * np.array([[0.87, 0.5], [-0.87, 0.5], [0.0, -1.0]]), 0.45
START, KL_WEIGHT = np.array([-0.5, 0.5]), 0.2
AXIS = np.linspace(-6.0, 6.0, 121)
GRID = np.stack(np.meshgrid(AXIS, AXIS), -1)  # [row: x2, column: x1, 2]
CELL = (AXIS[1] - AXIS[0]) ** 2
ALGORITHMS = {"SMCOptimizer": SMCOptimizer, "ImplicitDiffusion": ImplicitDiffusion}
TICKS = (-50, -20, -8, -4, -2, 0, 2, 4, 8, 20, 50)
COLOURS = {"SMCOptimizer": "tab:red", "ImplicitDiffusion": "tab:blue"}


def model():
    log_odds = numpyro.param("log_odds", jnp.asarray(START, jnp.float32))
    components = dist.Normal(jnp.asarray(MEANS, jnp.float32), SD).to_event(1)
    weights = dist.Categorical(logits=jnp.append(log_odds, 0.0))
    numpyro.sample("x", dist.MixtureSameFamily(weights, components))


def reward(x):
    return jnp.exp(-jnp.sum((x - jnp.array([3.0, 1.0])) ** 2, -1) / 8)


def density(log_odds):
    """[..., 121, 121] on the grid, for log odds [..., 2]."""
    odds = np.exp(np.concatenate([log_odds, np.zeros_like(log_odds[..., :1])], -1))
    components = np.exp(-np.sum((GRID - MEANS[:, None, None]) ** 2, -1) / (2 * SD**2)) / (2 * np.pi * SD**2)
    return np.maximum(np.tensordot(odds / odds.sum(-1, keepdims=True), components, 1), 1e-300)


def exact(log_odds, direction):
    """[..., 3]: F, E[R] and the divergence by quadrature, for log odds [..., 2]."""
    model, start = density(log_odds), density(START)
    mean_reward = np.sum(model * np.asarray(reward(jnp.asarray(GRID))), (-2, -1)) * CELL
    p, q = (model, start) if direction == "reverse" else (start, model)
    kl = np.sum(p * np.log(p / q), (-2, -1)) * CELL
    return np.stack([mean_reward - KL_WEIGHT * kl, mean_reward, kl], -1)


def draw_start(rng_key):
    """Samples of the mixture at the start, for the forward divergence."""
    key_component, key_noise = random.split(rng_key)
    component = random.categorical(key_component, jnp.append(jnp.asarray(START), 0.0), shape=(2000,))
    return jnp.asarray(MEANS, jnp.float32)[component] + SD * random.normal(key_noise, (2000, 2))


DIVERGENCES = {"reverse": ReverseKL(reference_params={"log_odds": START}), "forward": ForwardKL(draw_start)}


def tune(algorithm, direction, args):
    """The estimate, and the path [T + 1, 2]."""
    objective = Reward(lambda sample: reward(sample["x"]), KL_WEIGHT, DIVERGENCES[direction])
    optimizer = algorithm(model, objective=objective, num_particles=args.num_particles)
    result = optimizer.run(random.key(0), args.num_steps, progress_bar=False)
    return np.asarray(result.params["log_odds"], float), np.stack([START, *np.asarray(result.trajectory["log_odds"])])


def draw_density(axis, log_odds, title):
    """A density, and the contours of the reward."""
    axis.pcolormesh(AXIS, AXIS, density(log_odds), cmap="Greys", shading="nearest", rasterized=True)
    axis.contour(AXIS, AXIS, reward(jnp.asarray(GRID)), levels=[0.2, 0.4, 0.6, 0.8], colors="tab:green", linewidths=0.8)
    axis.set(title=title, xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), xlabel="$x_1$", ylabel="$x_2$", aspect="equal")


def draw_paths(axis, direction, best, paths):
    """Paths of theta over the contours of F."""
    everywhere = np.concatenate([*paths.values(), [best, best - 2, best + 2]])
    low, high = (np.arcsinh(edge(0) + shift) for edge, shift in ((everywhere.min, -1), (everywhere.max, 1)))
    first, second = (np.sinh(np.linspace(low[k], high[k], 45)) for k in (0, 1))
    gaps = exact(best, direction)[0] - exact(np.stack(np.meshgrid(first, second), -1), direction)[..., 0]
    levels = np.geomspace(1e-3, gaps.max(), 16)
    axis.contour(first, second, gaps, levels=levels, cmap="Greys_r", norm="log", linewidths=0.8)
    for name, path in paths.items():
        axis.plot(*path.T, color=COLOURS[name], linewidth=1.2, label=name)
    axis.plot(*START, "ko", markersize=4)
    axis.plot(*best, "k*", markersize=9)
    axis.set_xscale("symlog", linthresh=4)
    axis.set_yscale("symlog", linthresh=4)
    for of_axis, bounds in ((axis.xaxis, first), (axis.yaxis, second)):
        of_axis.set_ticks([tick for tick in TICKS if bounds[0] < tick < bounds[-1]], minor=False)
        of_axis.set_major_formatter("{x:g}")
    axis.set(title=f"paths, {direction} divergence", xlabel="log odds of 1", ylabel="log odds of 2")
    axis.legend(loc="lower left", fontsize=8)


def main():
    """Tune by both algorithms, print the exact values, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--divergences", choices=DIVERGENCES, nargs="+", default=list(DIVERGENCES))
    parser.add_argument("--num-steps", type=int, default=300)
    parser.add_argument("--num-particles", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "mixture_reward.png")
    args = parser.parse_args()
    num = 2 + len(args.divergences)
    figure, axes = plt.subplots(1, num, figsize=(3.75 * num, 3.7), layout="constrained")
    draw_density(axes[0], START, "before (lines: the reward)")
    print(f"{'exact values at':<20}{'divergence':<12}{'F':>9}{'reward':>9}{'KL':>9}   log odds")
    for axis, direction in zip(axes[2:], args.divergences, strict=True):
        best = minimize(lambda log_odds: -exact(log_odds, direction)[0], START, method="Nelder-Mead").x  # noqa: B023
        rows, paths = {"the start": START, "the optimum": best}, {}
        for name in args.algorithms:
            rows[name], paths[name] = tune(ALGORITHMS[name], direction, args)
        for name, log_odds in rows.items():
            values = "".join(f"{value:>9.4f}" for value in exact(log_odds, direction))
            print(f"{name:<20}{direction:<12}{values}   {log_odds[0]:.2f} {log_odds[1]:.2f}", flush=True)
        draw_paths(axis, direction, best, paths)
        if direction == args.divergences[0]:
            draw_density(axes[1], rows[args.algorithms[0]], f"after, {direction} divergence")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=90)
    plt.close(figure)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
