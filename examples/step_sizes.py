# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Step sizes over three orders of magnitude, fixed and adapted: what unadjusted Langevin moves leave of the particles.

Twenty observations of latents with an unknown mean, 200 particles, weights joint over all latents. The adapted runs
follow the rule of the paper, `adaptation.EssRule`, towards nine tenths of the particles.

Prints where the share of effective particles that a move leaves has settled; draws it over the iterations.
"""

import argparse
import warnings
from pathlib import Path

import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import random

from numpyro_smcopt import SMCOptimizer, one_block
from numpyro_smcopt.adaptation import EssRule
from numpyro_smcopt.handlers import adapt_step_size
from numpyro_smcopt.kernels import ULA

matplotlib.use("Agg")
import matplotlib.pyplot as plt

TARGET = 0.9
STEP_SIZES = np.geomspace(3e-4, 0.3, 4)


def model(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def runs(y, num_steps, handlers):
    """Share of effective particles [sizes, T] that a move leaves, and the last step sizes."""
    optimizer = SMCOptimizer(
        model, optax.adam(0.02), kernel=ULA(target=None), num_particles=200, partition=one_block, handlers=handlers
    )
    state, left, sizes = optimizer.init(random.key(0), y), [], []
    for size in STEP_SIZES:
        # The step size is in the state of the optimiser, or where a rule steers it, in that of the rule.
        begin = state._replace(step=state.step._replace(size=np.full_like(state.step.size, size)))
        if handlers:
            (name,) = state.mutable_state
            begin = begin._replace(mutable_state={name: {"state": np.full_like(state.step.size, size)}})
        result = optimizer.run(None, num_steps, y, init_state=begin, progress_bar=False)
        left.append(result.diagnostics["step_ess"])
        last = result.state.mutable_state[name]["state"] if handlers else result.state.step.size
        sizes.append(float(last[0]))
    return np.array(left), sizes


def main():
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-steps", type=int, default=400)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "step_sizes.png")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="An update left the weight of")  # that is what is shown
    y = np.random.default_rng(0).normal(3.0, np.sqrt(1.25), 20).astype(np.float32)
    fixed, _ = runs(y, args.num_steps, [])
    adapted, last = runs(y, args.num_steps, [adapt_step_size(EssRule(TARGET, 1.03))])

    tail = slice(3 * args.num_steps // 4, None)
    print(f"{'step size':>12}{'left, fixed':>14}{'left, adapted':>16}{'adapted to':>13}")
    for size, one, other, end in zip(STEP_SIZES, fixed, adapted, last, strict=True):
        print(f"{size:>12.1e}{one[tail].mean():>14.3f}{other[tail].mean():>16.3f}{end:>13.3f}")

    figure, panels = plt.subplots(1, 2, figsize=(10, 3.4), sharey=True, layout="constrained")
    for axes, title, shares in zip(panels, ("fixed", "adapted"), (fixed, adapted), strict=True):
        for k, (size, share) in enumerate(zip(STEP_SIZES, shares, strict=True)):
            axes.plot(np.arange(1, len(share) + 1), share, color=f"C{k}", linewidth=1, label=f"from {size:.0e}")
        axes.axhline(TARGET, color="black", linestyle=(0, (4, 4)), linewidth=1, label="target")
        axes.set(title=f"step size {title}", xlabel="iteration", ylim=(0, 1.05))
    panels[0].set_ylabel("effective particles that a move leaves")
    panels[1].legend(loc="lower right", fontsize="small")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.output, dpi=80)
    plt.close(figure)
    print(f"\nFigure: {args.output}")


if __name__ == "__main__":
    main()
