# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The continuation of a run from its checkpoint.

The structure of a state comes from the program, not from the file (see `tree_file`): the saved arrays are put into the
shapes that a first state would have with the saved partition.
"""

import os
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from numpyro_smcopt.blocks import Blocks, add_up
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.results import RunResult
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.runs.checkpoint import identity_of, read, write
from numpyro_smcopt.runs.first_state import shapes_of_start
from numpyro_smcopt.runs.run import Driver
from numpyro_smcopt.runs.tree_file import restore
from numpyro_smcopt.types import positive

_FOUND = ("of_coordinate", "of_term", "members", "slots", "terms")  # fields of a partition; the others follow


def resume(
    algorithm: Algorithm, path: str | os.PathLike, bound: BoundTarget, num_steps: int | None, progress_bar: bool
) -> RunResult:
    """See `ParticleAlgorithm.resume`."""
    identity = identity_of(algorithm, bound)
    saved, settings, status = read(path, identity)
    if num_steps is not None:
        settings = settings._replace(num_steps=positive("num_steps", num_steps))
    driver = Driver(algorithm, bound, settings)

    tables: Any = {name: jnp.asarray(saved.arrays[f"['state'].blocks.{name}"]) for name in _FOUND}
    blocks = Blocks(**tables)
    if "['state'].blocks.table_of_sums" in saved.arrays:
        blocks = add_up(blocks, bound.target.sites.term_shapes)
    rng_key = saved.arrays["['state'].rng_key"]
    rng_key = rng_key if settings.num_runs == 1 else rng_key[0]
    shapes = driver.axis.stacked_shapes(shapes_of_start(algorithm, bound, rng_key, blocks))
    state = jax.tree.map(jnp.asarray, restore(saved, "state", shapes))
    records = None
    if saved.header["done"]:
        any_length = lambda leaf: jax.ShapeDtypeStruct((-1, *leaf.shape[1:]), leaf.dtype)  # noqa: E731
        records = restore(saved, "records", jax.tree.map(any_length, driver.shapes_of_records(state)))
    return driver.run(state, progress_bar, partial(write, path, identity, settings), records, status)
