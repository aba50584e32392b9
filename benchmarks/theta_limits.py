# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The effective sample size that `limit_theta_step` promises beside the one that a step leaves.

    python benchmarks/theta_limits.py BANK [--problems sleepstudy cbpp nile] [--particles 1024] [--output figure.png]

BANK is a folder with `problems.py` (``PROBLEMS``: models, data). Along a run with the defaults, the direction of each
update is stretched to the length that the rule allows for each target, and the particles are weighed at its end. Both
rules are shown: the closed form (``exp(-Var)`` to first order) and the bisection on the weights themselves. The table
has a third, which is no rule of the package: increments of first order, weighed without taking them for Gaussian.
"""

import argparse
import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import random
from momentum_bank import load

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.adaptation import BisectedLimit, FirstOrderLimit
from numpyro_smcopt.population.gradients import step_probe
from numpyro_smcopt.potential import flat_terms
from numpyro_smcopt.weights import conditional_ess, weighted_variance

TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99)


@dataclasses.dataclass(frozen=True)
class LinearLimit:
    """The length at which increments ``-length * slope`` would leave exactly the target."""

    target_ess: float

    def __call__(self, probe, step):
        slopes = probe.slopes(step)
        straight = probe._replace(slopes=lambda _: slopes, increments=lambda length: -length[0] * slopes)
        return BisectedLimit(self.target_ess, num_trials=24)(straight, jnp.ones(1))


RULES = {"closed form": FirstOrderLimit, "bisection": BisectedLimit, "linear": LinearLimit}
DRAWN = ("closed form", "bisection")
LONG = 30.0  # standard deviations of the log weights that the unlimited step would cause: every step is limited


def realised(target, state, direction):
    """[rules, targets]: the fraction of effective particles that the worst block keeps."""
    _, flat, _ = flat_terms(target, state.theta)
    probe = step_probe(target, state.theta, flat, state.points, state.log_weights, state.blocks)
    spread = jnp.max(jax.vmap(weighted_variance, in_axes=1)(probe.log_weights, probe.slopes(direction)))
    step = LONG / jnp.sqrt(spread) * direction

    def left(rule):
        return jnp.min(conditional_ess(probe.log_weights, probe.increments(rule(probe, step) * step)))

    return jnp.array([[left(rule(value)) for value in TARGETS] for rule in RULES.values()])


def measure(problem, num_particles, num_steps, seed):
    """[states, rules, targets] along a run."""
    data = problem.load()
    optimizer = SMCOptimizer(problem.model, num_particles=num_particles)
    state, found = optimizer.init(random.key(seed), **data), []
    bound = optimizer._bind((), data)
    for _ in range(num_steps):
        state, _ = optimizer.update(state, **data)
        found.append(np.asarray(bound.call("theta limits", realised, state, state.theta_state.last)))
    return np.array(found)


def draw(found, path):
    """One panel per problem: mean and range over the run."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(3.4 * len(found), 3.4), sharey=True, layout="constrained")
    for axes, (name, values) in zip(np.atleast_1d(panels), found.items(), strict=True):
        axes.plot([0.45, 1.0], [0.45, 1.0], color="black", linewidth=0.8, label="as promised")
        axes.fill_between([0.45, 1.0], [0.405, 0.9], [0.495, 1.1], color="black", alpha=0.08, linewidth=0, label="10 %")
        for k, rule in enumerate(DRAWN):
            middle, low, high = values[:, k].mean(0), *np.quantile(values[:, k], [0.05, 0.95], axis=0)
            places = np.array(TARGETS) + 0.008 * (k - 0.5)
            axes.errorbar(
                places, middle, [middle - low, high - middle], fmt="o", markersize=4, color=f"C{k}", label=rule
            )
        axes.set(title=name, xlabel="target", xlim=(0.45, 1.03), ylim=(0.4, 1.05))
    np.atleast_1d(panels)[0].set_ylabel("share of effective particles left")
    np.atleast_1d(panels)[0].legend(fontsize="small", loc="upper left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def main():
    """Print the table, and draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bank", type=Path)
    parser.add_argument("--problems", nargs="+", default=["sleepstudy", "cbpp", "nile"])
    parser.add_argument("--particles", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    problems, _ = load(args.bank)
    found = {}
    print(f"{'problem':<16}{'rule':<14}" + "".join(f"{value:>16}" for value in TARGETS))
    for name in args.problems:
        found[name] = measure(problems[name], args.particles, args.steps, args.seed)
        for k, rule in enumerate(RULES):
            values = found[name][:, k]
            cells = (f"{m:.3f} +- {s:.3f}" for m, s in zip(values.mean(0), values.std(0), strict=True))
            print(f"{name:<16}{rule:<14}" + "".join(f"{cell:>16}" for cell in cells))
            near = np.mean(abs(values / np.array(TARGETS) - 1) < 0.1, 0)
            print(f"{'':<16}{'within 10 %':<14}" + "".join(f"{share:>16.0%}" for share in near), flush=True)
    if args.output:
        draw(found, args.output)


if __name__ == "__main__":
    main()
