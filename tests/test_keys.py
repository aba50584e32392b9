# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Every random key of an update is used once: parted, folded into or drawn from, and never two of these.

``fold_in(key, i)`` equals ``split(key, n)[i]``, so a key that is split and folded hands out the same key twice. The
test wraps what consumes keys, makes one update (on new data, so that they are adopted in it), and reads the keys that
went by as numbers.
"""

import sys
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from clouds import compile_fast
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import ImplicitDiffusion, MomentumParticleMLE, SMCOptimizer, one_block, random_numbers
from numpyro_smcopt.kernels import HMC, MALA, ULA, RandomWalk
from numpyro_smcopt.objectives import EnergyBasedLikelihood, ForwardKL, Reward
from numpyro_smcopt.potential import fingerprint
from numpyro_smcopt.runs.update import step_on_data
from numpyro_smcopt.samplers import Chains, EulerMaruyama, Paths

ASIDE = 2**32 - 1  # `random_numbers.aside` folds this in, which no split of fewer keys hands out
DRAWS = ("bits", "uniform", "normal", "randint", "categorical", "permutation", "choice", "bernoulli")
Y = jnp.array([1.0, 2.0, 4.5])


def groups(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


def energy(y):
    scale = numpyro.param("scale", 1.0, constraint=constraints.positive)
    numpyro.sample("x", dist.Normal(y[0], scale))


def drift(y):
    pull = numpyro.param("pull", 1.0)
    return lambda t, x: -pull * (x - y[0])


fresh = ForwardKL(reference_samples=lambda key: {"x": random.normal(key, (16,))})
reward = Reward(lambda sample: -(sample["x"] ** 2), kl_weight=0.5, kl=fresh)
ebm = EnergyBasedLikelihood({"x": jnp.linspace(-1.0, 1.0, 9)}, batch_size=4)
SAMPLER = {"times": np.linspace(0.0, 1.0, 5), "initial": dist.Normal(0.0, 1.0)}
CASES = {
    "hmc": lambda: SMCOptimizer(groups, num_particles=16),
    "random_walk": lambda: SMCOptimizer(groups, kernel=RandomWalk(), partition=one_block, num_particles=16),
    "mala_adam": lambda: SMCOptimizer(groups, optax.adam(0.1), kernel=MALA(), num_particles=16),
    "ula": lambda: SMCOptimizer(groups, kernel=ULA(), num_particles=16),
    "reward": lambda: SMCOptimizer(energy, objective=reward, num_particles=16),
    "ebm": lambda: SMCOptimizer(energy, objective=ebm, kernel=HMC(), num_particles=16),
    "chains": lambda: ImplicitDiffusion(energy, objective=reward, sampler=Chains(moves_per_update=2), num_particles=16),
    "chains_ula": lambda: ImplicitDiffusion(energy, objective=ebm, sampler=ULA(), num_particles=16),
    "paths": lambda: ImplicitDiffusion(
        drift, objective=Reward(lambda s: -(s["y"] ** 2)), sampler=EulerMaruyama(**SAMPLER), num_particles=16
    ),
    "queue": lambda: ImplicitDiffusion(
        drift,
        objective=Reward(lambda s: -(s["y"] ** 2)),
        sampler=EulerMaruyama(**SAMPLER, paths=Paths.STORED, num_batches=2),
        num_particles=16,
    ),
    "momentum": lambda: MomentumParticleMLE(groups, num_particles=16),
    "momentum_reward": lambda: MomentumParticleMLE(energy, objective=reward, num_particles=16),
}


class Recorder:
    """Writes down what consumes which key, in compiled programs too."""

    def __init__(self, monkeypatch):
        self.events, self.depth = [], 0
        for name in (*DRAWS, "split", "fold_in"):
            monkeypatch.setattr(random, name, self.wrapped(name, getattr(random, name)))
        monkeypatch.setattr(random_numbers, "_bits", self.wrapped("bits", random_numbers._bits))
        own = self.wrapped("split", random_numbers.split)
        for module in [module for name, module in sys.modules.items() if name.startswith("numpyro_smcopt")]:
            if getattr(module, "split", None) is random_numbers.split and module is not random_numbers:
                monkeypatch.setattr(module, "split", own)

    def wrapped(self, name, function):
        def consume(key, *args, **kwargs):
            if self.depth == 0:  # what a consumer does inside is its own business
                number = args[0] if name == "fold_in" else 0
                data = random.key_data(key)
                data = data.reshape(-1, data.shape[-1])
                numbers = jnp.broadcast_to(jnp.asarray(number, jnp.uint32), data.shape[:1])
                jax.debug.callback(lambda d, n: self.note(name, d, n), data, numbers)
            self.depth += 1
            try:
                return function(key, *args, **kwargs)
            finally:
                self.depth -= 1

        return consume

    def note(self, name, data, numbers):
        rows = np.asarray(data).reshape(-1, np.shape(data)[-1]), np.asarray(numbers).ravel()
        self.events += [(tuple(map(int, key)), name, int(number)) for key, number in zip(*rows, strict=True)]

    def misused(self):
        """Keys that were split and folded, drawn from twice, and so on; the fixed key of a dry run does not count."""
        fixed = tuple(map(int, random.key_data(random.key(0))))
        whole = Counter((key, name) for key, name, _ in self.events if name != "fold_in" and key != fixed)
        folded = Counter((key, number) for key, name, number in self.events if name == "fold_in" and key != fixed)
        uses = Counter(key for key, _ in whole.elements()) + Counter({key for key, number in folded if number != ASIDE})
        return [key for key, count in uses.items() if count > 1] + [key for key, count in folded.items() if count > 1]


def step_on_new_data(optimizer, state):
    bound = optimizer._bind((Y + 0.25,), {})
    controls = optimizer.controls(state)
    functions = {name: value for name, value in controls.items() if callable(value)}
    numbers = {name: value for name, value in controls.items() if name not in functions}

    def step(state, arrays, numbers):
        target = optimizer._target(arrays, bound.static)
        return step_on_data(optimizer, target, state, fingerprint(arrays), {**numbers, **functions})

    return compile_fast(step), (state, bound.arrays, numbers)


@pytest.mark.parametrize("name", CASES)
def test_every_key_is_used_once(name, monkeypatch):
    optimizer = CASES[name]()
    state = optimizer.init(random.key(7), Y)
    recorder = Recorder(monkeypatch)
    program, arguments = step_on_new_data(optimizer, state)
    new = program(*arguments)
    jax.effects_barrier()
    root = tuple(map(int, random.key_data(state.rng_key)))
    seen = {key for key, _, _ in recorder.events}
    assert root in seen and len(seen) > 2
    assert recorder.misused() == []
    assert tuple(map(int, random.key_data(new.rng_key))) not in seen


def test_a_key_that_is_split_and_folded_is_noticed(monkeypatch):
    recorder = Recorder(monkeypatch)
    key = random.key(3)
    random.normal(random.fold_in(key, 1))
    random.normal(random.split(key)[1])
    jax.effects_barrier()
    assert len(recorder.misused()) == 2  # the parent, and the child that was drawn from twice


def test_moves_and_reference_samples_share_no_number_in_double_precision():
    """What an objective draws for itself are not the normal numbers that move the particles."""
    drawn = []

    def samples(key):
        value = random.normal(key, (16,))
        jax.debug.callback(lambda v: drawn.append(np.asarray(v)), value)
        return {"x": value}

    with jax.enable_x64(True):
        objective = Reward(lambda sample: -(sample["x"] ** 2), kl_weight=0.5, kl=ForwardKL(reference_samples=samples))
        optimizer = SMCOptimizer(energy, objective=objective, kernel=MALA(), num_particles=16)
        state = optimizer.init(random.key(7), Y)
        drawn.clear()
        _, key_move, *_ = random.split(state.rng_key, 4)
        optimizer.update(state, Y)
        jax.effects_barrier()
        moved = random_numbers.draw_random_numbers(key_move, state.points.x, 1).normal
        assert drawn and not np.intersect1d(np.round(drawn[-1], 9), np.round(np.asarray(moved), 9)).size
