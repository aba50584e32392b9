# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Time and memory of an update of the digits' diffusion, for every way to keep the paths, timed in turns.

    python benchmarks/diffusion_paths.py [--num-particles 64] [--num-times 50] [--num-updates 5] [--rounds 5]

Time is the CPU time of an update over that of the default in the same round, median and range over rounds; in CPU time
a busy machine shows little. Memory is that of the compiled update: what XLA allots for the time of an update, and what
the state holds from one update to the next, without the parameters and the moments of Adam. The weights are random,
since neither depends on them.
"""

import argparse
import sys
import time
from pathlib import Path

import jax
import numpy as np
from jax import random

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_diffusion import model, tuner  # noqa: E402

from numpyro_smcopt import ImplicitDiffusion
from numpyro_smcopt.potential import make_target
from numpyro_smcopt.samplers import Gradient, Paths

MEBIBYTE = 2**20


def settings_of(num_times):
    """The options by name; queues of as many batches as divide the steps."""
    options = {
        "RESIMULATED": {},
        "CHECKPOINTED": {"paths": Paths.CHECKPOINTED},
        "SCORE_FUNCTION": {"gradient": Gradient.SCORE_FUNCTION},
    }
    for num in sorted({1, 5, num_times}):
        if num_times % num == 0:
            options[f"STORED, {num}"] = {"paths": Paths.STORED, "num_batches": num}
    return options


def compiled(optimizer: ImplicitDiffusion, state):
    """The compiled update, and the bytes that it needs for the time."""
    program = jax.jit(optimizer.update).lower(state).compile()
    return program, program.memory_analysis().temp_size_in_bytes


def main():
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument("--num-times", type=int, default=50)
    parser.add_argument("--num-updates", type=int, default=5)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()

    params, _ = make_target(model, (), {}).initial_params(random.key(0), {})
    programs, states, temporary, held = {}, {}, {}, {}
    for name, settings in settings_of(args.num_times).items():
        optimizer = tuner(params, 1.0, 0.25, args.num_times, 100, args.num_particles, **settings)
        states[name] = optimizer.init(random.key(0))
        programs[name], temporary[name] = compiled(optimizer, states[name])
        held[name] = sum(leaf.nbytes for leaf in jax.tree.leaves(states[name].particles))

    seconds = {name: [] for name in programs}
    for _ in range(args.rounds):
        for name, program in programs.items():
            state, begin = states[name], time.process_time()
            for _ in range(args.num_updates):
                state, _ = program(state)
            jax.block_until_ready(state)
            seconds[name].append((time.process_time() - begin) / args.num_updates)
    base = np.array(seconds["RESIMULATED"])
    print(f"{args.num_particles} particles, {args.num_times} steps; RESIMULATED {np.median(base):.3f} s of CPU")
    print(f"{'':<16}{'time':>7}{'range':>16}{'MiB for an update':>20}{'MiB in the state':>19}")
    for name, found in seconds.items():
        ratios = np.array(found) / base
        span = f"{ratios.min():.2f} to {ratios.max():.2f}"
        print(
            f"{name:<16}{np.median(ratios):>7.2f}{span:>16}{temporary[name] / MEBIBYTE:>20.2f}"
            f"{held[name] / MEBIBYTE:>19.2f}"
        )


if __name__ == "__main__":
    main()
