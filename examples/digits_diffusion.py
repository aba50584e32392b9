# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A denoising diffusion of handwritten digits, tuned to draw them brighter or darker.

A small network is pretrained on the 8x8 digits of scikit-learn by denoising score matching. `ImplicitDiffusion` then
tunes the sampler itself, Euler-Maruyama of the reverse diffusion, to the mean pixel or to minus the mean pixel, less
kl_weight times the divergence of its paths from those of the pretrained sampler.

Prints for every weight, from fresh samples of the final sampler: the mean pixel (0 to 16), the path divergence, the
loss reached and the least loss that any sampler can have, and whether the samples are still digits: the share on which
two classifiers, a support vector machine and trees, each trained on a half of the real digits, agree; the share for
which most trees vote alike as well; the median distance to the nearest real digit; and how many classes there are (the
exponential of the entropy). Real digits that were held out, and pixels drawn independently from those of real digits,
stand beside. Draws the samples and the trade-off.

Needs flax, scikit-learn and matplotlib.
"""

import argparse
import functools
import time
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro.distributions as dist
import optax
from jax import random
from numpyro.contrib.module import flax_module
from sklearn.datasets import load_digits
from sklearn.ensemble import ExtraTreesClassifier
from sklearn.svm import SVC

from numpyro_smcopt import ImplicitDiffusion
from numpyro_smcopt.objectives import PathKL, Reward
from numpyro_smcopt.samplers import EulerMaruyama

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Images are in [-1, 1]. Noise comes in by dX = -X dt + sqrt(2) dW, so X_t ~ Normal(e^-t X_0, 1 - e^-2t).
FIRST, LAST = 3.0, 0.005  # times of the noise between which the reverse diffusion runs
KL_WEIGHTS = (1.0, 0.5, 0.25, 0.125, 0.0625)


# The model and its pretraining


class Network(nn.Module):
    """Predicts ``e^-t eps - sqrt(1 - e^-2t) x`` from ``y = e^-t x + sqrt(1 - e^-2t) eps`` of one image."""

    width: int = 256

    @nn.compact
    def __call__(self, t, y):
        waves = jnp.exp(jnp.linspace(0.0, 4.0, 16)) * jnp.log(t) / 4
        hidden = nn.Dense(self.width)(jnp.concatenate([y, jnp.sin(waves), jnp.cos(waves)]))
        for _ in range(2):
            hidden = hidden + nn.Dense(self.width)(nn.swish(nn.LayerNorm()(hidden)))
        return nn.Dense(y.size, kernel_init=nn.initializers.zeros)(nn.swish(hidden))


def model():
    """The drift of the reverse diffusion, y + 2 score, after time s: where the noise has had the time FIRST - s."""
    network = flax_module("net", Network(), jnp.ones(()), jnp.ones(64))

    def drift(s, y):
        t = FIRST - s
        return -y - 2 * jnp.exp(-t) / jnp.sqrt(1 - jnp.exp(-2 * t)) * network(t, y)

    return drift


def matching_loss(params, rng_key, images, batch_size=128):
    """The error of the network, at times that are uniform on the logarithmic scale."""
    key_image, key_time, key_noise = random.split(rng_key, 3)
    x = images[random.randint(key_image, (batch_size,), 0, len(images))]
    t = jnp.exp(random.uniform(key_time, (batch_size, 1), minval=np.log(LAST), maxval=np.log(FIRST)))
    noise, signal, spread = random.normal(key_noise, x.shape), jnp.exp(-t), jnp.sqrt(1 - jnp.exp(-2 * t))
    found = jax.vmap(lambda t, y: Network().apply({"params": params}, t, y))(t[:, 0], signal * x + spread * noise)
    return jnp.mean((found - (signal * noise - spread * x)) ** 2)


def pretrain(images, num_steps):
    """Parameters of the model, by denoising score matching."""
    params = Network().init(random.key(0), jnp.ones(()), jnp.ones(64))["params"]
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, num_steps))

    def step(carry, rng_key):
        params, state = carry
        updates, state = optimizer.update(jax.grad(matching_loss)(params, rng_key, images), state)
        return (optax.apply_updates(params, updates), state), None

    keys = random.split(random.key(1), num_steps)
    (params, _), _ = jax.jit(lambda carry: jax.lax.scan(step, carry, keys))((params, optimizer.init(params)))
    return {"net$params": params}


# Tuning


def pixels(y):
    """Brightness of the pixels of an image, 0 to 16."""
    return 8 * (jnp.clip(y, -1, 1) + 1)


def brightness(sample):
    return jnp.mean(pixels(sample["y"]))


def make_sampler(num_times, **settings):
    """The steps of the reverse diffusion become shorter in proportion to the time of the noise."""
    times = FIRST - np.geomspace(FIRST, LAST, num_times + 1)
    return EulerMaruyama(times, dist.Normal(0.0, 1.0).expand([64]).to_event(1), 2**0.5, **settings)


def tuner(pretrained, sign, kl_weight, num_times, num_steps, num_particles, **settings):
    objective = Reward(lambda sample: sign * brightness(sample), kl_weight, PathKL(reference_params=pretrained))
    optim = optax.adam(optax.cosine_decay_schedule(5e-4, num_steps))
    sampler = make_sampler(num_times, **settings)
    return ImplicitDiffusion(model, optim, objective, sampler=sampler, num_particles=num_particles)


# Judging


class Digits:
    """What is known of real digits, half of them for each classifier."""

    def __init__(self, images, labels):
        self.images, half = images, len(images) // 2
        self.machine = SVC(C=10.0).fit(images[:half], labels[:half])
        self.trees = ExtraTreesClassifier(200, random_state=0).fit(images[half:], labels[half:])

    def describe(self, images):
        """Share agreed on, share sure, median distance to the nearest digit, effective number of classes."""
        images = np.clip(images, -1, 1)
        found, votes = self.machine.predict(images), self.trees.predict_proba(images)
        agreed = found == votes.argmax(1)
        squares = (images**2).sum(1)[:, None] - 2 * images @ self.images.T + (self.images**2).sum(1)
        distance = 8 * np.median(np.sqrt(squares.min(1)))
        shares = np.bincount(found, minlength=10) / len(found)
        classes = np.exp(-np.sum(shares * np.log(np.maximum(shares, 1e-9))))
        return np.mean(agreed), np.mean(agreed & (votes.max(1) > 0.5)), distance, classes


class Judge:
    """Fresh samples, many more than for tuning, from a sampler whose theta stands still."""

    def __init__(self, pretrained, num_times, num_judged):
        objective = Reward(brightness, 1.0, PathKL(reference_params=pretrained))
        sampler = make_sampler(num_times)
        self._still = ImplicitDiffusion(model, optax.sgd(0.0), objective, sampler=sampler, num_particles=num_judged)

    def measure(self, params):
        """Mean pixel, path divergence, and as many samples."""
        state = self._still.init(random.key(4), init_params=params)
        samples = self._still.get_samples(state, rng_key=random.key(5))["y"]
        return float(state.diagnostics["reward"]), float(state.diagnostics["path_kl"]), np.asarray(samples)

    def draw(self, params, num):
        state = self._still.init(random.key(2), init_params=params)
        return np.asarray(self._still.get_samples(state, num_samples=num)["y"])


def optimum(rewards, kl_weight):
    """What no sampler can better, from the rewards of the pretrained one: its law times ``exp(R / kl_weight)``.

    Returns:
        ``-E R + kl_weight KL``, KL and ``E R``; all None if fewer than 100 of the samples count.
    """
    weights = np.exp((rewards - rewards.max()) / kl_weight)
    least = -rewards.max() - kl_weight * np.log(weights.mean())
    weights = weights / weights.sum()
    if 1 / np.sum(weights**2) < 100:
        return None, None, None
    mean = np.sum(weights * rewards)
    return least, (least + mean) / kl_weight, mean


HEADINGS = "pixel", "KL", "loss", "least", "agreed", "sure", "distance", "classes"


def print_row(name, pixel, kl, loss, least, description):
    agreed, sure, distance, classes = description
    cells = ["" if value is None else f"{value:.3f}" for value in (pixel, kl, loss, least, agreed, sure)]
    print(f"{name:<24}" + "".join(f"{cell:>9}" for cell in (*cells, f"{distance:.1f}", f"{classes:.1f}")), flush=True)


# The figure


def mosaic(images, num=6):
    """Images side by side in ``num`` rows."""
    tiles = np.full((num, num, 9, 9), np.nan)
    tiles[:, :, :8, :8] = images[: num * num].reshape(num, num, 8, 8)
    return tiles.swapaxes(1, 2).reshape(9 * num, 9 * num)[:-1, :-1]


def draw(shown, curves, start, path):
    """Samples on the left; on the right the mean pixel against the divergence, and the best that there can be."""
    widths = [1.0] * len(shown) + [1.5]
    figure, axes = plt.subplots(1, len(widths), figsize=(13, 3.1), layout="constrained", width_ratios=widths)
    for axis, (title, images) in zip(axes, shown.items(), strict=False):
        axis.imshow(mosaic(images), cmap="gray", vmin=-1, vmax=1)
        axis.set_title(title)
        axis.axis("off")
    figure.get_layout_engine().set(w_pad=0.08)
    trade = axes[-1]
    for colour, sign, (name, points) in zip(("tab:orange", "tab:blue"), (1, -1), curves.items(), strict=True):
        best = [optimum(sign * start, kl_weight)[1:] for kl_weight in np.geomspace(100.0, 0.05, 100)]
        kl, mean = np.array([found for found in best if found[0] is not None]).T
        trade.plot(kl, sign * mean, color=colour, linewidth=1, label="best possible" if sign > 0 else None)
        trade.plot(*np.array([point[1:] for point in points]).T, "o", color=colour, label=name)
        for kl_weight, *where in points:
            trade.annotate(
                f"{kl_weight:g}", where, xytext=(0, 7 * sign - 3), textcoords="offset points", fontsize=8, ha="center"
            )
    trade.axhline(start.mean(), color="0.7", linewidth=1, zorder=0)
    trade.set_xscale("function", functions=(lambda kl: np.sqrt(np.maximum(kl, 0)), np.square))
    trade.set(xlabel="path divergence from the pretrained sampler", ylabel="mean pixel")
    trade.set_xticks([0.1, 0.5, 2, 5, 10, 20])
    trade.set_xlim(0.0, 1.2 * max(kl for points in curves.values() for _, kl, _ in points))
    trade.margins(y=0.12)
    trade.legend(frameon=False, fontsize=8, loc="center right")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=80)


def main():
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretraining-steps", type=int, default=20_000)
    parser.add_argument("--num-steps", type=int, default=150, help="updates of the tuning")
    parser.add_argument("--num-particles", type=int, default=64)
    parser.add_argument("--num-times", type=int, default=50, help="steps of the reverse diffusion")
    parser.add_argument("--num-judged", type=int, default=1000, help="samples that are judged")
    parser.add_argument("--kl-weights", type=float, nargs="+", default=KL_WEIGHTS)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "digits_diffusion.png")
    args = parser.parse_args()
    clock = functools.partial(lambda begin: f"{time.process_time() - begin:.0f} s of CPU", time.process_time())

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    images, labels = (images[order] / 8 - 1).astype(np.float32), labels[order]
    images, held_out, labels, labels_held_out = images[:1437], images[1437:], labels[:1437], labels[1437:]
    digits = Digits(images, labels)
    accuracies = [classifier.score(held_out, labels_held_out) for classifier in (digits.machine, digits.trees)]
    print("accuracy on digits held out: support vector machine {:.3f}, trees {:.3f}".format(*accuracies))

    pretrained = jax.block_until_ready(pretrain(jnp.asarray(images), args.pretraining_steps))
    print(f"pretrained after {clock()}\n\n{'':<24}" + "".join(f"{heading:>9}" for heading in HEADINGS))
    mixed = np.random.default_rng(1).permuted(images, axis=0)
    for name, these in (("digits held out", held_out), ("pixels mixed", mixed[: args.num_judged])):
        print_row(name, np.mean(pixels(these)), None, None, None, digits.describe(these))

    judge = Judge(pretrained, args.num_times, args.num_judged)
    before = judge.draw(pretrained, 10 * args.num_judged)
    start = np.asarray(pixels(before)).mean(1)
    print_row("pretrained", start.mean(), 0.0, None, None, digits.describe(before))
    shown, curves = {"pretrained": before}, {}
    for name, sign in (("brighter", 1.0), ("darker", -1.0)):
        curves[name] = []
        for kl_weight in args.kl_weights:
            optimizer = tuner(pretrained, sign, kl_weight, args.num_times, args.num_steps, args.num_particles)
            result = optimizer.run(random.key(3), args.num_steps, init_params=pretrained, progress_bar=False)
            pixel, kl, after = judge.measure(result.params)
            label, loss = f"{name}, weight {kl_weight:g}", kl_weight * kl - sign * pixel
            print_row(label, pixel, kl, loss, optimum(sign * start, kl_weight)[0], digits.describe(after))
            curves[name].append((kl_weight, kl, pixel))
            if kl_weight == args.kl_weights[len(args.kl_weights) // 2]:
                shown[label] = after
    print(f"\nall after {clock()}")
    draw(shown, curves, start, args.output)
    print(f"Figure: {args.output}")


if __name__ == "__main__":
    main()
