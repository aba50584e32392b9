# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Densities that integrate to one for latents that the model leaves without: masked ones, and unwrapped angles.

A masked element has no term in the energy, and mostly nothing else depends on it (an outcome that was observed, the
padding of a ragged group). It then stands beside the model: a standard normal on unconstrained space, whatever theta,
takes no part in weights or evidence; what is reported of it is drawn from the distribution behind the mask. An angle
after `CircularReparam` may turn any number of times: a smooth window, whose sum over the turns is one, chooses.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpyro.distributions as dist
from jax import random
from jax.scipy.stats import norm
from numpyro.distributions import biject_to, constraints
from numpyro.distributions.util import sum_rightmost
from numpyro.primitives import Messenger

from numpyro_smcopt.types import Array, Model

BLUR = 0.5  # standard deviation of the edges of the window, in radians
UNWRAPPED, FACTOR = "_unwrapped", "_factor"  # what `CircularReparam` appends to the name of an angle


class proper_latents(Messenger):  # noqa: N801 - a handler, named as NumPyro names them
    """Give every latent of a model a density that integrates to one; directly around the model."""

    def __init__(self, fn: Model) -> None:
        self._angles: dict[str, int] = {}  # per batch element of an unwrapped site
        super().__init__(fn)

    def process_message(self, msg: dict) -> None:
        """Replace the distribution of a masked or unwrapped latent, and complete the factor of the latter."""
        if msg["type"] != "sample":
            return
        name, fn = msg["name"], msg["fn"]
        inner = _innermost(fn)
        if name.endswith(UNWRAPPED) and isinstance(inner, dist.ImproperUniform):
            self._angles[name.removesuffix(UNWRAPPED) + FACTOR] = math.prod(fn.event_shape)
            msg["fn"] = Window(fn.batch_shape + fn.event_shape).to_event(len(fn.event_shape))
        elif not msg["is_observed"]:
            msg["fn"] = _completed(fn)
        elif name in self._angles and isinstance(inner, dist.Unit):
            whole = jnp.broadcast_to(inner.log_factor, fn.batch_shape) + self._angles[name] * math.log(2 * math.pi)
            msg["fn"] = dist.Unit(jnp.where(kept_batch(fn), whole, 0.0))
        elif name.endswith("_log_det") and isinstance(inner, dist.Unit) and kept(fn) is not True:
            shape = jnp.broadcast_shapes(jnp.shape(inner.log_factor), fn.batch_shape)
            msg["fn"] = dist.Unit(jnp.broadcast_to(inner.log_factor, shape))  # `Completed` counts on all of it


class imputing(Messenger):  # noqa: N801 - a handler, named as NumPyro names them
    """Draw what is masked from the distribution behind the mask; around a model whose latents have values.

    Args:
        rng_key: Randomness.
    """

    def __init__(self, rng_key: Array) -> None:
        self.rng_key, self._num = rng_key, 0
        super().__init__()

    def process_message(self, msg: dict) -> None:
        """Replace the masked elements of a latent's value."""
        if msg["type"] == "sample" and not msg["is_observed"] and msg["value"] is not None and is_masked(msg["fn"]):
            self._num += 1
            drawn = msg["fn"].sample(random.fold_in(self.rng_key, self._num))
            msg["value"] = jnp.where(kept(msg["fn"]), msg["value"], drawn)


class Completed(dist.MaskedDistribution):
    """A distribution of which the masked elements are standard normal on unconstrained space, or uniform if discrete.

    It draws from the distribution behind the mask, as what is reported; `Target.draw_prior` knows better.
    """

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """The log density of the distribution behind the mask, or of the one that stands for it."""
        del intermediates
        if self.support.is_discrete:
            num = self.base_dist.enumerate_support(expand=False).shape[0]
            return jnp.where(self._mask, self.base_dist.log_prob(value), -math.log(num))
        mask, center = jnp.reshape(self._mask, self._mask.shape + (1,) * self.event_dim), biject_to(self.support)
        middle = center(jnp.zeros(center.inverse_shape(jnp.shape(value)), jnp.result_type(value)))
        # Neither branch is evaluated where the other counts: its derivative might be NaN there.
        inside = self.base_dist.log_prob(jnp.where(mask, value, middle))
        value = jnp.where(mask, middle, value)
        x = center.inv(value)
        log_det = center.log_abs_det_jacobian(x, value)
        dims = jnp.ndim(value) - self.event_dim
        beside = sum_rightmost(norm.logpdf(x), jnp.ndim(x) - dims)
        return jnp.where(self._mask, inside, beside - sum_rightmost(log_det, jnp.ndim(log_det) - dims))


class Window(dist.Distribution):
    """A uniform angle plus normal noise: its density, shifted by all whole turns and added up, is ``1 / (2 pi)``."""

    support = constraints.real

    def sample(self, key: Array, sample_shape: tuple[int, ...] = ()) -> Array:
        """Draw."""
        angle, noise = random.split(key)
        shape = self.shape(sample_shape)
        return random.uniform(angle, shape, minval=-math.pi, maxval=math.pi) + BLUR * random.normal(noise, shape)

    def log_prob(self, value: Array, intermediates: Any = None) -> Array:
        """Log density."""
        del intermediates
        # By symmetry on the left side, where the difference of two distribution functions loses nothing.
        value = -jnp.abs(value)
        above, below = (norm.logcdf((value + edge) / BLUR) for edge in (math.pi, -math.pi))
        return above + jnp.log1p(-jnp.exp(below - above)) - math.log(2 * math.pi)


def is_masked(fn: dist.Distribution) -> bool:
    """True if some elements of a latent may stand beside the model."""
    while not isinstance(fn, Completed) and hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return isinstance(fn, Completed)


def kept(fn: dist.Distribution) -> Any:
    """Mask of the elements of a value that are not masked, with all of its axes, broadcasting to it; True if all."""
    if isinstance(fn, dist.MaskedDistribution):
        mask = jnp.asarray(fn._mask)
        return jnp.reshape(mask, mask.shape + (1,) * fn.event_dim) & kept(fn.base_dist)
    return kept(fn.base_dist) if isinstance(fn, dist.ExpandedDistribution | dist.Independent) else True


def kept_batch(fn: dist.Distribution) -> Any:
    """[batch shape] which batch elements are not masked altogether."""
    keep = jnp.asarray(kept(fn))
    keep = keep.any(tuple(range(keep.ndim - fn.event_dim, keep.ndim))) if keep.ndim else keep
    return jnp.broadcast_to(keep, fn.batch_shape)


def _completed(fn: dist.Distribution) -> dist.Distribution:
    """The distribution without its masks."""
    wrapped = isinstance(fn, dist.MaskedDistribution | dist.ExpandedDistribution | dist.Independent)
    if not wrapped or isinstance(fn, Completed):
        return fn
    inner = _completed(fn.base_dist)
    if isinstance(fn, dist.MaskedDistribution):
        if fn._mask is True:
            return inner
        if fn._mask is False and not fn.support.is_discrete:  # a flat prior
            return dist.ImproperUniform(fn.support, fn.batch_shape, fn.event_shape)
        return Completed(inner, jnp.broadcast_to(jnp.asarray(fn._mask), fn.batch_shape))
    if inner is fn.base_dist:
        return fn
    return (
        inner.expand(fn.batch_shape)
        if isinstance(fn, dist.ExpandedDistribution)
        else inner.to_event(fn.reinterpreted_batch_ndims)
    )


def _innermost(fn: dist.Distribution) -> dist.Distribution:
    while hasattr(fn, "base_dist"):
        fn = fn.base_dist
    return fn
