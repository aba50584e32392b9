# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""An energy-based model in the plane: trained in two ways, then tuned to a reward in two ways.

The energy is a small network on top of a broad normal base measure. It is trained on noisy moons (or circles) by
persistent contrastive divergence (`ImplicitDiffusion` with `EnergyBasedLikelihood`), and by its form with Jarzynski's
weights (`SMCOptimizer` with the same objective). The model of the latter is then tuned to be in the lower half plane,

    maximise  F = E[1{x2 < 0}] - kl_weight KL(tuned || trained),

by both algorithms, with the same moves and no learning rate. Everything is judged by quadrature on a grid, log Z
included: the trained models by their divergence from the law of the data, the tuned ones by F beside its maximum over
*all* densities, which is known,

    F* = kl_weight log( p e^(1 / kl_weight) + 1 - p ),        p = the probability of the lower half when trained.

    python examples/energy_based.py [--data circles] [--num-particles 2000] [--kl-weights 0.1 0.25 0.5 1 5] ...

Source of the study: Cuin, Tang, Carbone and Akyildiz 2026, section 5, with a larger network and other data.
"""

import argparse
import time
from pathlib import Path

import flax.linen as nn
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from numpyro.contrib.module import flax_module

from numpyro_smcopt import ImplicitDiffusion, SMCOptimizer, log_evidence
from numpyro_smcopt.kernels import MALA
from numpyro_smcopt.objectives import EnergyBasedLikelihood, ReverseKL, Reward

matplotlib.use("Agg")
import matplotlib.pyplot as plt

BASE_SD = 3.0
EDGE, CELLS = 6.0, 400  # the grid of the quadrature: CELLS^2 cells on [-EDGE, EDGE]^2
AXIS = EDGE * (2 * (np.arange(CELLS) + 0.5) / CELLS - 1)
GRID = np.stack(np.meshgrid(AXIS, AXIS), -1).astype(np.float32)  # [row: x2, column: x1, 2]
CELL = (2 * EDGE / CELLS) ** 2
LOWER = GRID[..., 1] < 0
ALGORITHMS = {"ImplicitDiffusion": ImplicitDiffusion, "SMCOptimizer": SMCOptimizer}


# -- data with a known law: a normal of standard deviation sd around a point of a curve, all points alike --------------
def moons():
    """Curve [J, 2] of two half circles, and sd."""
    angle = np.pi * (np.arange(2000) + 0.5) / 2000
    upper = np.stack([np.cos(angle), np.sin(angle)], 1)
    return 2.2 * (np.concatenate([upper, [1, 0.5] - upper]) - [0.5, 0.25]), 0.25


def circles():
    """Curve [J, 2] of two circles, equally likely, and sd."""
    angle = 2 * np.pi * (np.arange(2000) + 0.5) / 2000
    circle = np.stack([np.cos(angle), np.sin(angle)], 1)
    return np.concatenate([4.0 * circle, 2.0 * circle]), 0.25


DATA = {"moons": moons, "circles": circles}


def draw_data(rng, curve, sd, num):
    """[num, 2] points."""
    return (curve[rng.integers(len(curve), size=num)] + sd * rng.standard_normal((num, 2))).astype(np.float32)


def true_density(curve, sd):
    """[CELLS, CELLS] density of the data; along one axis and along the other it is a product."""
    of_x1, of_x2 = (np.exp(-((AXIS - curve[:, [k]]) ** 2) / (2 * sd**2)) / np.sqrt(2 * np.pi * sd**2) for k in (0, 1))
    return of_x2.T @ of_x1 / len(curve)


# -- the model ----------------------------------------------------------------------------------------------------
class Energy(nn.Module):
    """A network from the plane to a number."""

    width: int

    @nn.compact
    def __call__(self, x):  # noqa: D102
        for _ in range(3):
            x = nn.silu(nn.Dense(self.width)(x))
        return nn.Dense(1)(x)[..., 0]


def make_model(width):
    def model():
        energy = flax_module("energy", Energy(width), jnp.zeros(2))
        x = numpyro.sample("x", dist.Normal(0.0, BASE_SD).expand([2]).to_event(1))
        numpyro.factor("minus_energy", -energy(x))

    return model


def log_density(params, width):
    """[CELLS, CELLS] log density of the model, normalised on the grid, and log Z."""
    energy = Energy(width).apply({"params": params["energy$params"]}, jnp.asarray(GRID))
    base = np.sum(GRID.astype(float) ** 2, -1) / (2 * BASE_SD**2) + np.log(2 * np.pi * BASE_SD**2)
    unnormalised = -np.asarray(energy, float) - base
    largest = unnormalised.max()
    log_z = largest + np.log(np.sum(np.exp(unnormalised - largest)) * CELL)
    return unnormalised - log_z, log_z


def divergence(log_p, log_q):
    """KL(p || q) on the grid."""
    p = np.exp(log_p)
    return float(np.sum(p * np.where(p > 0, log_p - log_q, 0.0)) * CELL)


# -- training and tuning --------------------------------------------------------------------------------------------
def run(name, objective, num_steps, args, start=None):
    """What the algorithm `name` returns, with the same moves for both, and the seconds that it took."""
    moves = {"kernel": MALA()} if name == "SMCOptimizer" else {"sampler": MALA()}
    algorithm = ALGORITHMS[name](make_model(args.width), objective=objective, num_particles=args.num_particles, **moves)
    begin = time.perf_counter()
    result = algorithm.run(random.key(args.seed), num_steps, init_params=start, progress_bar=False)
    return result, time.perf_counter() - begin


def at_the_end(result, diagnostic):
    """Mean over the last tenth of the updates."""
    values = result.diagnostics[diagnostic]
    return float(np.mean(values[-max(1, len(values) // 10) :]))


def train(args, axes):
    """Parameters of the last training; prints and draws all trainings."""
    curve, sd = DATA[args.data]()
    data = draw_data(np.random.default_rng(args.seed), curve, sd, args.num_data)
    truth = true_density(curve, sd)
    log_truth = np.log(np.maximum(truth, 1e-300))
    entropy = -float(np.sum(truth * log_truth) * CELL)
    draw(axes[0], truth, f"{args.data}: the law of the data", truth.max())
    axes[0].plot(*data[:500].T, ".", color="tab:orange", markersize=1)
    print(f"entropy of the data {entropy:.4f}; KL(data || model) is the exact loss minus that")
    print(
        f"{'training':<20}{'KL':>9}{'loss of the run':>18}{'exact':>9}{'log Z':>9}{'by log_evidence':>18}{'ESS':>6}"
        f"{'s':>6}"
    )
    for axis, name in zip(axes[1:], args.algorithms, strict=True):
        result, seconds = run(name, EnergyBasedLikelihood(data, args.batch_size), args.train_steps, args)
        log_model, log_z = log_density(result.params, args.width)
        kl = divergence(log_truth, log_model)
        found = log_evidence(make_model(args.width), params=result.params)
        print(
            f"{name:<20}{kl:>9.4f}{at_the_end(result, 'loss'):>18.4f}{entropy + kl:>9.4f}{log_z:>9.4f}"
            f"{found.log_evidence:>11.4f} +-{found.log_evidence_std:.3f}{ess_of(name, result):>6}{seconds:>6.0f}",
            flush=True,
        )
        draw(axis, np.exp(log_model), f"trained by {name}", truth.max())
    return result.params


def ess_of(name, result):
    """Percent of the particles; without weights there is none."""
    return f"{100 * at_the_end(result, 'ess'):.0f}%" if name == "SMCOptimizer" else "-"


def tune(args, trained, axes):
    """Prints and draws the optimum and what the algorithms find for every weight of the divergence."""
    log_trained, _ = log_density(trained, args.width)
    p = float(np.sum(np.exp(log_trained)[LOWER]) * CELL)
    print(f"\ntuning of the latter, where p = {p:.4f}; 'told' is the mean reward of the particles")
    print(f"{'':<20}{'weight':>8}{'reward':>9}{'told':>9}{'KL':>9}{'F':>9}{'F* - F':>9}{'ESS':>6}{'s':>6}")
    for column, weight in zip(axes.T, args.kl_weights, strict=True):
        log_best = log_trained + LOWER / weight
        log_best -= np.log(np.sum(np.exp(log_best)) * CELL)
        best = weight * np.logaddexp(np.log(p) + 1 / weight, np.log1p(-p))
        objective = Reward(in_lower_half, weight, ReverseKL(reference_params=trained))
        for axis, name in zip(column, ("optimum", *args.algorithms), strict=True):
            log_model, told, ess, seconds = log_best, "-", "-", "-"
            if name in ALGORITHMS:
                result, spent = run(name, objective, args.tune_steps, args, trained)
                log_model, _ = log_density(result.params, args.width)
                told, ess, seconds = f"{at_the_end(result, 'reward'):.4f}", ess_of(name, result), f"{spent:.0f}"
            reward, kl = float(np.sum(np.exp(log_model)[LOWER]) * CELL), divergence(log_model, log_trained)
            f = reward - weight * kl
            print(
                f"{name:<20}{weight:>8g}{reward:>9.4f}{told:>9}{kl:>9.4f}{f:>9.4f}{best - f:>9.4f}{ess:>6}{seconds:>6}",
                flush=True,
            )
            draw(axis, np.exp(log_model), f"{name}, {weight:g}\nF = {f:.3f}", np.exp(log_best).max())


def in_lower_half(sample):
    return jnp.where(sample["x"][1] < 0, 1.0, 0.0)


# -- figures --------------------------------------------------------------------------------------------------------
def draw(axis, density, title, largest):
    """A density of the plane."""
    axis.imshow(density, origin="lower", extent=(-EDGE, EDGE, -EDGE, EDGE), cmap="Greys", vmin=0, vmax=largest)
    axis.set(xticks=[], yticks=[], xlim=(-5, 5), ylim=(-5, 5))
    axis.set_title(title, fontsize=9)


def save(figure, path):
    """Write a figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)
    print(f"Figure: {path}")


def main():
    """Train, tune, print the tables, draw the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=DATA, default="moons")
    parser.add_argument("--algorithms", choices=ALGORITHMS, nargs="+", default=list(ALGORITHMS))
    parser.add_argument("--num-data", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=1000, help="data per update of the training")
    parser.add_argument("--width", type=int, default=64, help="of the three hidden layers")
    parser.add_argument("--num-particles", type=int, default=2000)
    parser.add_argument("--train-steps", type=int, default=3000)
    parser.add_argument("--tune-steps", type=int, default=1000)
    parser.add_argument("--kl-weights", type=float, nargs="+", default=[0.1, 0.25, 0.5, 1.0, 5.0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "energy_based.png")
    args = parser.parse_args()
    num = len(args.algorithms)
    figure, axes = plt.subplots(1, 1 + num, figsize=(3 + 3 * num, 3), layout="constrained")
    trained = train(args, axes)
    save(figure, args.output)
    shape = 1 + num, len(args.kl_weights)
    size = 1 + 2 * shape[1], 0.5 + 2 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    tune(args, trained, axes)
    save(figure, args.output.with_stem(args.output.stem + "_tuned"))


if __name__ == "__main__":
    main()
