# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Energy terms that are added up: what is together, how many remain, and that nothing is lost by it."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import random

from numpyro_smcopt import SMCOptimizer, find_blocks, one_block
from numpyro_smcopt.blocks import add_up, make_blocks
from numpyro_smcopt.population.evaluate import added_up
from numpyro_smcopt.potential import make_target
from numpyro_smcopt.term_sums import LARGEST_AT_ALL, LARGEST_SUM, find_sums
from numpyro_smcopt.weights import effective_sample_size, incremental_log_weight

GROUPS = np.arange(7)

LAYOUTS = {
    "repeats by groups": (np.broadcast_to(GROUPS, (5, 7)), 7),
    "groups by items": (np.broadcast_to(GROUPS[:, None], (7, 5)), 7),
    "repeats by groups by items": (np.broadcast_to(GROUPS[:, None], (4, 7, 3)), 7),
    "one after the other": (np.repeat(GROUPS, 5), 7),
    "in turns": (np.tile(GROUPS, 5), 7),
    "one after the other, two outcomes": (np.broadcast_to(np.repeat(GROUPS, 5)[:, None], (35, 2)), 7),
    "groups of many sizes": (np.repeat(GROUPS, [1, 2, 3, 4, 5, 6, 7]), 28),
    "in no order": (np.random.default_rng(0).permutation(np.repeat(GROUPS, 5)), 35),
    "repeats by groups, some of them masked": (np.where(np.arange(35).reshape(5, 7) % 4, GROUPS, 7), 7),
    "one each": (GROUPS, 7),
    "a single term": (np.zeros((), int), 1),
    "one block": (np.zeros(200, int), 1),
    "one block, by rows": (np.zeros((20, 100), int), 10),
    "one block of a million": (np.zeros(1_000_000, int), 4_000),
    "one block of a prime number": (np.zeros(1_009, int), 1),
    "one block of a large prime number": (np.zeros(10_007, int), 10_007),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_number_of_sums(layout):
    owners, expected = LAYOUTS[layout]
    (site,) = find_sums(owners.ravel(), [owners.shape], min(7, 1 + owners.max())).sites
    assert math.prod(site.kept) == expected


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_sums_hold_every_term_of_one_block_once(data):
    """Against NumPy: any layout of blocks along the axes of two sites, or none at all."""
    rng, shapes, owners = np.random.default_rng(data.draw(st.integers(0, 1000))), [], []
    num_blocks = data.draw(st.integers(1, 4))
    for _ in range(2):
        shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=3)))
        along = tuple(size if data.draw(st.booleans()) else 1 for size in shape)
        spread = np.broadcast_to(np.sort(rng.integers(0, num_blocks + 1, along), None).reshape(along), shape)
        shapes.append(shape)
        owners.append(rng.permutation(spread.ravel()) if data.draw(st.booleans()) else spread.ravel())
    of_term = np.minimum(np.concatenate(owners), num_blocks - (num_blocks == 1))
    of_coordinate = np.arange(num_blocks)
    blocks = add_up(make_blocks(of_coordinate, of_term, num_blocks), shapes)
    terms, sums = rng.normal(size=len(of_term)).astype(np.float32), blocks.sums
    pieces = np.split(jnp.asarray(terms), [math.prod(shapes[0])])
    added = jnp.concatenate([site.add(piece) for site, piece in zip(sums.sites, pieces, strict=True)])
    # What depends on no latent may be with any block.
    tied = np.where(of_term < num_blocks, terms, 0.0).astype(np.float32)
    tied_pieces = np.split(jnp.asarray(tied), [math.prod(shapes[0])])
    tied_sums = jnp.concatenate([site.add(piece) for site, piece in zip(sums.sites, tied_pieces, strict=True)])
    np.testing.assert_allclose(blocks.of_sums.sum_terms(tied_sums), blocks.sum_terms(tied), rtol=1e-4, atol=1e-5)
    total = blocks.of_sums.sum_terms(added).sum() + blocks.of_sums.sum_free_terms(added)
    np.testing.assert_allclose(total, terms.sum(), rtol=1e-4, atol=1e-5)
    sizes = np.concatenate([site.add(np.ones(math.prod(site.shape))) for site in sums.sites])
    assert sizes.sum() == len(of_term) and sizes.max(initial=0) <= LARGEST_SUM < LARGEST_AT_ALL


def many(y):
    """A mean of very many observations, with one latent."""
    sd = numpyro.param("sd", 50.0)
    x = numpyro.sample("x", dist.Normal(0.0, 0.1))
    with numpyro.plate("data", y.size):
        numpyro.sample("y", dist.Normal(x, sd), obs=y)


def test_a_million_observations_added_up_keep_the_effective_sample_size():
    """Of 32 particles after a step in theta, in float32 beside float64: one latent, a million terms in 4,000 sums."""
    y = np.random.default_rng(0).normal(0.0, 50.0, 1_000_000)
    x = 0.15 * np.random.default_rng(1).standard_normal(32)
    target = make_target(many, (jnp.asarray(y, jnp.float32),), {})
    blocks = add_up(one_block(None, np.zeros((2, 1)), target.sites.num_terms, None), target.sites.term_shapes)
    target, blocks = added_up(target, blocks)
    evaluate = jax.jit(lambda sd: jax.lax.map(lambda one: target.terms({"sd": sd}, one), jnp.asarray(x[:, None], "f4")))
    old, new = evaluate(jnp.float32(50.0)), evaluate(jnp.float32(42.0))
    assert new.shape == (32, 1 + 4_000)
    got = effective_sample_size(incremental_log_weight(old, new, blocks.sum_terms)[:, 0])
    squares = np.sum(y**2) - 2 * x * np.sum(y) + len(y) * x**2
    exact = np.exp(squares / 2 * (50.0**-2 - 42.0**-2) - np.max(squares / 2 * (50.0**-2 - 42.0**-2)))
    expected = exact.sum() ** 2 / np.sum(exact**2)
    assert 4 < expected < 28
    np.testing.assert_allclose(got, expected, rtol=0.01)


def groups_and_items(y):
    mean = numpyro.param("mean", 0.5)
    with numpyro.plate("groups", y.shape[0], dim=-2):
        x = numpyro.sample("x", dist.Normal(mean, 1.0))
        with numpyro.plate("items", y.shape[1], dim=-1):
            numpyro.sample("y", dist.Normal(x, 1.0), obs=y)


@pytest.mark.parametrize("partition", [find_blocks, one_block])
def test_a_run_is_the_same_with_the_terms_kept_apart(partition, monkeypatch):
    """Up to rounding, which a few updates do not yet blow up."""
    y = 1.0 + np.random.default_rng(0).standard_normal((6, 40)).astype(np.float32)
    run = lambda: SMCOptimizer(groups_and_items, num_particles=16, partition=partition).run(  # noqa: E731
        random.key(0), 5, y, progress_bar=False
    )
    added = run()
    monkeypatch.setattr("numpyro_smcopt.population.independent_blocks.add_up", lambda blocks, shapes: blocks)
    # The look at the precision compares with sums.
    monkeypatch.setattr(
        "numpyro_smcopt.runs.first_state.as_precise_as_needed", lambda bound, theta, x, blocks, terms: blocks
    )
    apart = run()
    assert (added.state.points.terms.shape[1], apart.state.points.terms.shape[1]) == (
        (12, 246) if partition is find_blocks else (2, 246)
    )
    np.testing.assert_allclose(added.losses, apart.losses, rtol=1e-4)
    np.testing.assert_allclose(added.params["mean"], apart.params["mean"], rtol=1e-3)
    np.testing.assert_allclose(added.state.points.x, apart.state.points.x, rtol=1e-2, atol=1e-2)
