# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Momentum in maximum marginal likelihood: three regimes of damping, with and without the gradient correction.

The toy of Lim, Kuntz, Power and Johansen (ICML 2024): 100 observations y_i ~ Normal(x_i, 1) of latents
x_i ~ Normal(theta, 1), 100 particles, theta started at 0 where the data are around 100. The estimate is mean(y), the
variance of every latent given theta and the data is 1/2.

Prints how many iterations particle gradient descent (PGD) and its version with momentum (MPGD) take: at the equal
*nominal* steps of the paper, at equal *effective* steps, and with the steps that are best for either if the variance of
the latents may be wrong by 10 %, best in the long run or for coming within 1 of the maximum from where they start.
Draws the path of theta in the three regimes.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random
from scipy.optimize import differential_evolution

from numpyro_smcopt import MomentumParticleMLE
from numpyro_smcopt.kernels.integrators import exponential, uncorrected

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_DATA, NUM_PARTICLES, TRUTH = 100, 100, 100.0
REGIMES = {"under-damped": 0.05, "nearly critical": 0.1, "over-damped": 2.0}  # frictions gamma of the paper
LARGEST_STEP = 0.2 / 1.1 / 2  # of particles on curvature 2, for a variance that is 10 % too large


def model(y):
    theta = numpyro.param("theta", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(theta, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def friction(gamma):
    """The settings of the paper: time steps 1e-4 and 1e-2, inverse mass 2000."""
    return {
        "gamma": gamma, "eta": 2000.0, "time_step": 1e-4,
        "latent_gamma": gamma, "latent_eta": 2000.0, "latent_time_step": 1e-2,
    }  # fmt: skip


def plain(step_size, latent_step_size):
    """Particle gradient descent; as published, particles and theta move at the same time."""
    steps = {"step_size": step_size, "latent_step_size": latent_step_size}
    return steps | {"momentum": 0.0, "latent_momentum": 0.0, "simultaneous": True}


def mean_dynamics(h, z=np.inf, latent_z=np.inf):
    """[4, 4] what an iteration makes of theta, its velocity, the mean of the particles and its velocity; no noise."""
    by, latent = exponential(h, z), exponential(LARGEST_STEP, latent_z)
    state = np.eye(4)
    gradient = NUM_DATA * (state[0] + by.lookahead * state[1] - state[2])
    theta, velocity = state[0] + by.carry * state[1] - by.drift * gradient, by.decay * state[1] - by.kick * gradient
    slope = 2 * state[2] - (state[0] if z == np.inf else theta)
    x = state[2] + latent.carry * state[3] - latent.drift * slope
    return np.array([theta, velocity, x, latent.decay * state[3] - latent.kick * slope])


def rate(*numbers):
    """By what the slowest error shrinks in an iteration: a spectral radius."""
    return np.max(np.abs(np.linalg.eigvals(mean_dynamics(*numbers))))


def arrival(*numbers, distance=0.9):
    """Iterations until theta stays within 1 of the maximum (less a tenth, for the noise); if many, a larger number."""
    dynamics, radius = mean_dynamics(*numbers), rate(*numbers)
    errors, state = [TRUTH], np.array([TRUTH, 0.0, TRUTH, 0.0])
    for _ in range(300 if radius < 0.98 else 0):
        state = dynamics @ state
        errors.append(abs(state[0]))
    if errors[-1] >= distance:
        return 1000 * radius
    last = np.flatnonzero(np.array(errors) >= distance)[-1]
    return last + (errors[last] - distance) / (errors[last] - errors[last + 1])


def tuned(criterion):
    """The best settings of both methods by a criterion, and its values."""
    best = min(np.geomspace(1e-3, 0.5, 400), key=criterion)
    # The logarithms of h and of both dampings; a damping of 20 is no momentum.
    found = differential_evolution(
        lambda logs: criterion(*np.exp(logs)), [(-7, 0), (-4, 3), (-4, 3)], seed=0, tol=1e-8, popsize=30
    )
    h, z, latent_z = np.exp(found.x)
    momentum = {
        "step_size": h, "momentum": np.exp(-z), "latent_step_size": LARGEST_STEP, "latent_momentum": np.exp(-latent_z),
    }  # fmt: skip
    print(f"  step size {best:.4f}; with momentum {h:.4f}, {np.exp(-z):.3f}, of the particles {np.exp(-latent_z):.3f}")
    return plain(best, LARGEST_STEP), criterion(best), momentum, found.fun


def fit(y, num_steps, **settings):
    """Path of theta, and the variance of the particles at the end."""
    optimizer = MomentumParticleMLE(model, num_particles=NUM_PARTICLES, **settings)
    result = optimizer.run(random.key(0), num_steps, y, progress_bar=False)
    return np.asarray(result.trajectory["theta"]), float(np.mean(np.var(result.state.points.x, 0)))


def describe(name, theta, variance, mean):
    """A row: iterations until theta stays within 5, 1 and 0.2 of the mean, and where it ends."""
    cells = []
    for distance in (5, 1, 0.2):
        outside = np.flatnonzero(np.abs(theta - mean) >= distance)
        last = outside[-1] + 2 if len(outside) else 1
        cells.append("-" if last > len(theta) else str(last))
    tail = theta[len(theta) // 2 :].mean() - mean
    print(f"{name:<48}" + "".join(f"{cell:>7}" for cell in cells) + f"{variance:>8.3f}{tail:>10.4f}", flush=True)


def at_equal_nominal_steps(y, num_steps, regimes):
    """Print their rows; the paths of theta."""
    print("equal nominal steps (1e-4 and 1e-2)")
    settings = {"PGD": plain(1e-4, 1e-2)}
    for name in regimes:
        settings[name] = friction(REGIMES[name])
        settings[f"{name}, uncorrected"] = friction(REGIMES[name]) | {"scheme": uncorrected}
    paths = {}
    for name, numbers in settings.items():
        paths[name], variance = fit(y, num_steps, **numbers)
        title = f"  MPGD, gamma {REGIMES[name]:g}: {name}" if name in regimes else "    without gradient correction"
        describe("  PGD" if name == "PGD" else title, paths[name], variance, y.mean())
    return paths


def at_equal_effective_steps(y, num_steps):
    """Print their rows."""
    print("equal effective steps (1e-3 and 0.1)")
    describe("  PGD", *fit(y, num_steps, **plain(1e-3, 0.1)), y.mean())
    describe("  MPGD, gamma 0.1", *fit(y, num_steps, **friction(0.1)), y.mean())


def at_their_best(y, num_steps, criterion):
    """Print the settings of both methods that are best by a criterion, and their rows."""
    of_plain, best_plain, of_momentum, best_momentum = tuned(criterion)
    if criterion is rate:
        says, ratio = "{:.3f} a step", np.log(best_momentum) / np.log(best_plain)
    else:
        says, ratio = "{:.1f} without noise", best_plain / best_momentum
    describe(f"  PGD, {says.format(best_plain)}", *fit(y, num_steps, **of_plain), y.mean())
    describe(f"  MPGD, {says.format(best_momentum)}", *fit(y, num_steps, **of_momentum), y.mean())
    print(f"  iterations of PGD over those of MPGD, without noise: {ratio:.2f}")


def draw(paths, regimes, mean, path):
    """The paths of theta, a panel per regime."""
    size = 3.2 * len(regimes) + 1.4, 3.4
    figure, panels = plt.subplots(1, len(regimes), figsize=size, sharey=True, squeeze=False, layout="constrained")
    for axes, name in zip(panels[0], regimes, strict=True):
        axes.axhline(mean, color="0.6", linewidth=1)
        axes.plot(paths["PGD"], color="0.35", linestyle=":", label="PGD")
        axes.plot(paths[f"{name}, uncorrected"], color="tab:orange", label="without gradient correction")
        axes.plot(paths[name], color="tab:blue", linestyle="--", label="with gradient correction")
        axes.set(title=f"{name} (gamma = {REGIMES[name]:g})", xlabel="iteration")
    panels[0, 0].set_ylabel("theta")
    panels[0, -1].legend(frameon=False, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)
    print(f"\nFigure: {path}")


def main():
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=2000)
    parser.add_argument("--regimes", choices=REGIMES, nargs="+", default=list(REGIMES))
    parser.add_argument("--only-nominal", action="store_true", help="leave out all other steps than those of the paper")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "damping.png")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="The unadjusted moves inflate")  # that is a column of the table
    rng = np.random.default_rng(0)
    y = (TRUTH + np.sqrt(2) * rng.standard_normal(NUM_DATA)).astype(np.float32)

    print(f"{'':<48}{'< 5':>7}{'< 1':>7}{'< 0.2':>7}{'Var x':>8}{'tail':>10}")
    paths = at_equal_nominal_steps(y, args.num_steps, args.regimes)
    if not args.only_nominal:
        at_equal_effective_steps(y, args.num_steps)
        print("both at their best in the long run, with a variance that is 10 % too large")
        at_their_best(y, args.num_steps, rate)
        print("both at their best for staying within 1 soon, with the same variance")
        at_their_best(y, args.num_steps, arrival)
    draw(paths, args.regimes, y.mean(), args.output)


if __name__ == "__main__":
    main()
