# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A generator of images, trained by momentum, gradient descent, short chains and a variational autoencoder.

scikit-learn's digits: 1797 images of 8 x 8 pixels between 0 and 1, the last 297 of them (after shuffling) held out.

    z ~ Normal(0, I) in 10 dimensions,      pixels ~ Normal(decoder(z), exp(log_noise))

The decoder has one hidden layer of 64 units; its 4864 weights and the noise are estimated, the latents of all images
are integrated out. All methods start at the same weights and get the same number of *passes*: forward and backward
through the decoder for one image and one particle, in whatever variables.

    momentum       MomentumParticleMLE, nothing given but 5 particles: two passes per particle and update, at two thetas
    tuned          the same with a learning rate that was chosen like those of the others
    gradient       the same without momentum in either block: one pass per particle and update, since both share it
    short run      a chain per image that starts at the prior in every update: 20 Langevin steps; 21 passes
    persistent     alternating back-propagation: 10 Langevin steps from where the chain was; 11 passes
    autoencoder    numpyro.infer.SVI: one pass through the decoder and one through an encoder of the same size

Learning rates and step sizes were chosen on 200 images out of the 1500 (`--tune` prints them): three values of each.
The same program samples the latents of held-out images for everybody, theta being fixed: `log_evidence`, which also
estimates their log likelihood. The last line is the best linear decoder, exactly (probabilistic PCA).
"""

import argparse
import time
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
from jax import lax, random
from numpyro import handlers
from numpyro.infer import SVI, TraceMeanField_ELBO
from numpyro.infer.util import log_density
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

from numpyro_smcopt import MomentumParticleMLE, log_evidence

matplotlib.use("Agg")
import matplotlib.pyplot as plt

NUM_PIXELS, NUM_HIDDEN, NUM_LATENTS = 64, 64, 10
NUM_TRAINING, NUM_VALIDATION, SHOWN = 1500, 200, 12
START = 104  # passes per particle: nine stages of tempering bring the first particles from the prior to the posterior
CANDIDATES = {"latent_step": (0.003, 0.01, 0.03), "rate": (0.003, 0.01, 0.03)}  # tried in this order


# -- the model ---------------------------------------------------------------------------------------------------------
def network(name, num_in, num_out):
    """A function of one hidden layer; its weights are param sites."""

    def weights(layer, rows, columns):
        start = lambda key: random.normal(key, (rows, columns)) / np.sqrt(rows)  # noqa: E731
        return numpyro.param(f"{name}_w{layer}", start), numpyro.param(f"{name}_b{layer}", jnp.zeros(columns))

    (w1, b1), (w2, b2) = weights(1, num_in, NUM_HIDDEN), weights(2, NUM_HIDDEN, num_out)
    return lambda x: jnp.tanh(x @ w1 + b1) @ w2 + b2


def model(images):
    decode = network("decoder", NUM_LATENTS, NUM_PIXELS)
    log_noise = numpyro.param("log_noise", -1.0)
    with numpyro.plate("images", len(images)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0).expand([NUM_LATENTS]).to_event(1))
        numpyro.sample("pixels", dist.Normal(decode(z), jnp.exp(log_noise)).to_event(1), obs=images)


def guide(images):
    encoded = network("encoder", NUM_PIXELS, 2 * NUM_LATENTS)(images)
    mean, log_scale = jnp.split(encoded, 2, -1)
    with numpyro.plate("images", len(images)):
        numpyro.sample("z", dist.Normal(mean, jnp.exp(log_scale - 1.0)).to_event(1))


def first_params(images):
    """Where everybody starts."""
    trace = handlers.trace(handlers.seed(model, random.key(1))).get_trace(images[:1])
    return {name: jnp.asarray(site["value"], jnp.float32) for name, site in trace.items() if site["type"] == "param"}


@jax.jit
def decoded(params, z):
    """Images without noise, [..., 64]."""
    with handlers.block(), handlers.substitute(data=params):
        return network("decoder", NUM_LATENTS, NUM_PIXELS)(z)


# -- the methods: images, passes per image, settings -> params ---------------------------------------------------------
def particles(images, passes, momentum=True, rate=None, num_particles=5):
    """`MomentumParticleMLE`, with momentum or without; with a learning rate of one's own the scaling has to be said."""
    options = {} if momentum else {"momentum": 0.0, "latent_momentum": 0.0, "simultaneous": True}
    if rate is not None:
        options |= {"step_size": rate, "preconditioner": optax.scale_by_adam(b1=0.0, b2=0.99)}
    num_updates = (passes // num_particles - START) // (2 if momentum else 1)
    optimizer = MomentumParticleMLE(model, num_particles=num_particles, **options)
    result = optimizer.run(random.key(0), num_updates, images, init_params=first_params(images), progress_bar=False)
    return result.params


def chains(images, passes, persistent, rate, latent_step):
    """Short-run MCMC or, with a persistent chain, alternating back-propagation; averaged like the particles' theta."""
    num_moves = 10 if persistent else 20
    scaling = optax.scale_by_adam(b1=0.0, b2=0.99)
    energy = lambda theta, z: -log_density(model, (images,), {}, theta | {"z": z})[0]  # noqa: E731

    def move(k, z, theta, key):
        noise = random.normal(random.fold_in(key, k), z.shape)
        return z - latent_step * jax.grad(energy, 1)(theta, z) + jnp.sqrt(2 * latent_step) * noise

    def update(carry, k):
        theta, z, state, average = carry
        key = random.fold_in(random.key(0), k)
        if not persistent:
            z = random.normal(random.fold_in(key, num_moves), z.shape)
        z = lax.fori_loop(0, num_moves, lambda j, z: move(j, z, theta, key), z)
        direction, state = scaling.update(jax.grad(energy)(theta, z), state)
        theta = jax.tree.map(lambda t, d: t - rate * d, theta, direction)
        average = jax.tree.map(lambda a, t: a + 8 / (k + 8) * (t - a), average, theta)
        return (theta, z, state, average), None

    theta, z = first_params(images), random.normal(random.key(2), (len(images), NUM_LATENTS))
    steps = jnp.arange(passes // (num_moves + 1))
    return jax.jit(lambda *carry: lax.scan(update, carry, steps)[0][3])(theta, z, scaling.init(theta), theta)


def autoencoder(images, passes, rate):
    """Adam with a learning rate that goes to zero."""
    num_steps = passes // 2
    svi = SVI(model, guide, optax.adam(optax.cosine_decay_schedule(rate, num_steps)), TraceMeanField_ELBO())
    first = first_params(images)
    result = svi.run(random.key(0), num_steps, images, init_params=first, progress_bar=False)
    return {name: result.params[name] for name in first}


METHODS = {
    "momentum": (particles, {}),
    "momentum, tuned": (particles, {"rate": 0.03}),
    "gradient": (partial(particles, momentum=False), {"rate": 0.003}),
    "short run": (partial(chains, persistent=False), {"latent_step": 0.03, "rate": 0.01}),
    "persistent": (partial(chains, persistent=True), {"latent_step": 0.003, "rate": 0.01}),
    "autoencoder": (autoencoder, {"rate": 0.03}),
}


# -- the test ----------------------------------------------------------------------------------------------------------
def test(params, images, num_draws, key=0):
    """Log likelihood of an image and its error; root mean square error of reconstructions, and these themselves."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The log evidence is uncertain")  # that is a column of the table
        found = log_evidence(model, images, params=params, num_particles=num_draws, rng_key=random.key(key))
    z = found.samples["z"][:: max(1, len(found.samples["z"]) // 200)]
    mean = np.mean(decoded(params, z), 0)
    scale = 1 / len(images)
    return scale * found.log_evidence, scale * found.log_evidence_std, np.sqrt(np.mean((mean - images) ** 2)), mean


def linear(training, images):
    """Probabilistic PCA: log likelihood of an image, root mean square error of the posterior mean."""
    pca = PCA(NUM_LATENTS).fit(training)
    shrunk = pca.transform(images) * (1 - pca.noise_variance_ / pca.explained_variance_)
    return pca.score(images), np.sqrt(np.mean((pca.inverse_transform(shrunk) - images) ** 2))


def tune(images, passes, num_draws, methods):
    """Print the log likelihood of validation images, for three values of one number after the other."""
    training, validation = images[:-NUM_VALIDATION], images[-NUM_VALIDATION:]
    for name in methods:
        train, settings = METHODS[name]
        for number, values in CANDIDATES.items():
            results = {}
            for value in values if number in settings else ():
                tried = settings | {number: value}
                results[value], error, rmse, _ = test(train(training, passes, **tried), validation, num_draws)
                print(f"{name:<17}{tried!s:<42}{results[value]:>9.2f} +- {error:.2f}{rmse:>9.4f}", flush=True)
            if results:
                settings = settings | {number: max(results, key=results.get)}


def draw(samples, reconstructions, path):
    """Samples on the left, reconstructions on the right; a row of images per entry."""
    panels = {"samples": samples, "reconstructions of held-out images": reconstructions}
    figure, axes = plt.subplots(1, 2, figsize=(11, 0.36 * len(samples) + 0.4), layout="constrained")
    for axis, (title, rows) in zip(axes, panels.items(), strict=True):
        squares = [np.pad(np.reshape(row, (-1, 8, 8)), ((0, 0), (1, 1), (1, 1))) for row in rows.values()]
        axis.imshow(np.concatenate([np.concatenate(list(row), 1) for row in squares]), cmap="gray_r", vmin=0, vmax=1)
        axis.set(title=title, xticks=[], yticks=10 * np.arange(len(rows)) + 4.5, yticklabels=list(rows))
        axis.tick_params(length=0)
        axis.spines[:].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
    plt.close(figure)
    print(f"\nFigure: {path}")


def main():
    """Train, test, print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passes", type=int, default=6000, help="through the decoder, per image and method")
    parser.add_argument("--num-training", type=int, default=NUM_TRAINING)
    parser.add_argument("--num-test", type=int, default=297)
    parser.add_argument("--num-draws", type=int, default=768, help="per image, of the estimated log likelihood")
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--tune", action="store_true", help="choose learning rates and step sizes")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "output" / "generator.png")
    args = parser.parse_args()
    if args.passes < 5 * (START + 2):
        parser.error(f"--passes must be at least {5 * (START + 2)}: the start of five particles and one update.")
    images = (load_digits().data / 16).astype(np.float32)
    images = images[np.random.default_rng(0).permutation(len(images))]
    training, held_out = images[: args.num_training], images[NUM_TRAINING:][: args.num_test]
    if args.tune:
        tune(training, args.passes, args.num_draws, args.methods)
        return

    print(f"{'':<17}{'seconds':>8}{'rmse':>9}{'log lik.':>10}{'error':>8}")
    samples, reconstructions = {"data": training[:SHOWN]}, {"held out": held_out[:SHOWN]}
    for name in args.methods:
        train, settings = METHODS[name]
        start = time.perf_counter()
        params = jax.block_until_ready(train(training, args.passes, **settings))
        seconds = time.perf_counter() - start
        value, error, rmse, mean = test(params, held_out, args.num_draws)
        print(f"{name:<17}{seconds:>8.0f}{rmse:>9.4f}{value:>10.2f}{error:>8.3f}", flush=True)
        samples[name] = decoded(params, random.normal(random.key(3), (SHOWN, NUM_LATENTS)))
        reconstructions[name] = mean[:SHOWN]
    value, rmse = linear(training, held_out)
    print(f"{'linear':<17}{'':>8}{rmse:>9.4f}{value:>10.2f}")
    draw(samples, reconstructions, args.output)


if __name__ == "__main__":
    main()
