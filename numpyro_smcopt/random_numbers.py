# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Random numbers for a whole cloud, from one call of the generator.

The keys and bits are those of `jax.random`, of which they are a copy without a loop: on a CPU `jax.random` goes over
the whole array once per four rounds of its generator, and such a loop may cost more than all else in a small update.
In single precision, where random numbers can cost more than the energies of the particles, bits become numbers ``x`` in
(-1, 1), and these normals by a polynomial in ``-log(1 - x^2)``, without a table or a rejection. In double precision
`jax.random` does it all.

Sources: Salmon, Moraes, Dror and Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011 (Threefry, 20 rounds);
Giles, "Approximating the erfinv function", GPU Computing Gems, 2012 (the polynomial; relative error 3e-7).
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random
from jax.scipy.special import ndtri
from jax.typing import DTypeLike

from numpyro_smcopt.types import Array

ROTATIONS = (13, 15, 26, 6), (17, 29, 16, 24)

# Coefficients of erfinv(x) / x in w - 2.5 where w = -log(1 - x^2) < 5, and in sqrt(w) - 3 beyond; highest power first.
CENTRE = (
    2.81022636e-8, 3.43273939e-7, -3.5233877e-6, -4.39150654e-6, 2.1858087e-4, -1.25372503e-3, -4.17768164e-3,
    0.246640727, 1.50140941,
)  # fmt: skip
TAIL = (
    -2.00214257e-4, 1.00950558e-4, 1.34934322e-3, -3.67342844e-3, 5.73950773e-3, -7.6224613e-3, 9.43887047e-3,
    1.00167406, 2.83297682,
)  # fmt: skip


class RandomNumbers(NamedTuple):
    """The randomness of one move of one particle; with a leading axis [N], of a cloud.

    Attributes:
        normal: [D] standard normal numbers.
        uniform: [num_uniforms] numbers in (0, 1), as many as the kernel asks for.
    """

    normal: Array
    uniform: Array


def draw_random_numbers(rng_key: Array, x: Array, num_uniforms: int) -> RandomNumbers:
    """Random numbers for one move of every particle.

    Args:
        rng_key: A key.
        x: [N, D] the particles, of which only the shape and the type matter.
        num_uniforms: Uniform numbers of a particle.
    """
    num_particles, num_latents = x.shape
    shape = (num_particles, num_latents + num_uniforms)
    if x.dtype == jnp.float32:
        bits = _bits(rng_key, shape)
        return RandomNumbers(_normals(bits[:, :num_latents]), _uniforms(bits[:, num_latents:]))
    uniform = random.uniform(rng_key, shape, x.dtype, minval=jnp.finfo(x.dtype).tiny)
    return RandomNumbers(ndtri(uniform[:, :num_latents]), uniform[:, num_latents:])


def draw_normals(rng_key: Array, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
    """Standard normal numbers."""
    if dtype == jnp.float32:
        return _normals(_bits(rng_key, shape))
    return random.normal(rng_key, shape, dtype)


def split(rng_key: Array, num: int) -> Array:
    """The keys of `jax.random.split`."""
    if not _is_threefry(rng_key) or not jax.config.jax_threefry_partitionable:  # type: ignore[attr-defined]
        return random.split(rng_key, num)
    counts = lax.iota(jnp.uint32, num)
    keys = jnp.stack(_threefry(random.key_data(rng_key), jnp.zeros_like(counts), counts), axis=1)
    return random.wrap_key_data(keys) if jnp.issubdtype(rng_key.dtype, jax.dtypes.prng_key) else keys


def aside(rng_key: Array) -> Array:
    """A key for a look at a state that stays as it is: none of those into which `split` parts ``rng_key``."""
    return random.fold_in(rng_key, 2**32 - 1)


def _bits(rng_key: Array, shape: tuple[int, ...]) -> Array:
    """The bits of `jax.random.bits` without the option that an array may be computed by several devices in parts.

    With that option, which is the default, half of what the generator computes would be thrown away.
    """
    size = math.prod(shape)
    if not _is_threefry(rng_key) or size >= 2**32:
        with jax.threefry_partitionable(False):
            return random.bits(rng_key, shape, jnp.uint32)
    half = (size + 1) // 2
    first = lax.iota(jnp.uint32, half)
    second = first + np.uint32(half)
    if size % 2:
        second = jnp.where(second < size, second, 0)  # where `jax.random` fills up with a zero
    return jnp.concatenate(_threefry(random.key_data(rng_key), first, second))[:size].reshape(shape)


def _is_threefry(rng_key: Array) -> bool:
    return str(random.key_impl(rng_key)) in ("fry", "threefry2x32")


def _threefry(key: Array, first: Array, second: Array) -> tuple[Array, Array]:
    """Two words of 32 bits from a key [2] and two counts, elementwise."""
    keys = key[0], key[1], key[0] ^ key[1] ^ np.uint32(0x1BD11BDA)
    first, second = first + keys[0], second + keys[1]
    for k in range(5):
        for rotation in ROTATIONS[k % 2]:
            first = first + second
            second = (second << np.uint32(rotation)) | (second >> np.uint32(32 - rotation))
            second = second ^ first
        first, second = first + keys[(k + 1) % 3], second + keys[(k + 2) % 3] + np.uint32(k + 1)
    return first, second


def _between_one_and_two(bits: Array) -> Array:
    """The upper 23 bits as the mantissa of a number in [1, 2)."""
    return lax.bitcast_convert_type((bits >> 9) | np.uint32(0x3F800000), jnp.float32)


def _uniforms(bits: Array) -> Array:
    """Odd multiples of 2^-24 in (0, 1)."""
    return _between_one_and_two(bits) - np.float32(1 - 2**-24)


def _normals(bits: Array) -> Array:
    x = 2 * (_between_one_and_two(bits) - np.float32(1.5)) + np.float32(2**-23)  # odd multiples of 2^-23 in (-1, 1)
    w = -jnp.log((1 - x) * (1 + x))
    centre, tail = _polynomial(CENTRE, w - np.float32(2.5)), _polynomial(TAIL, jnp.sqrt(w) - 3)
    return np.float32(np.sqrt(2)) * x * jnp.where(w < 5, centre, tail)


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    value = jnp.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        value = value * x + np.float32(coefficient)
    return value
