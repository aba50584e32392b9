# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The independent blocks of the latents of a bound target: where dependences are looked for, and what is refused."""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt.block_search import probe_rows
from numpyro_smcopt.blocks import Blocks, Partition, add_up
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.first_cloud import draw_particles
from numpyro_smcopt.population.possible_points import possible_points
from numpyro_smcopt.potential import Sites, Target
from numpyro_smcopt.term_sums import NO_SUMS, Sums
from numpyro_smcopt.types import Array, Theta

NOWHERE_FINITE = (
    "The potential is not finite at any starting point. Start the parameters elsewhere with init_params, or pass "
    "init_strategy=numpyro.infer.init_to_median."
)
CANDIDATES = 32  # drawn where the origin's neighbourhood has no finite energy


def independent_blocks(
    rng_key: Array, bound: BoundTarget, theta: Theta, partition: Partition, init_strategy: Callable | None = None
) -> Blocks:
    """The independent blocks of the latents.

    Args:
        rng_key: Randomness of the points where dependences are looked for.
        bound: The target.
        theta: Where.
        partition: Finds them.
        init_strategy: See `draw_particles`.

    Raises:
        ValueError: If no point has a finite energy, or a latent has no distribution; the message names the site.
    """
    sites = bound.target.sites
    most = probe_rows(sites.num_latents)

    def probe(rows: np.ndarray, tangents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Always as many rows, so that one compiled program serves all calls.
        pad = lambda v: np.concatenate([v, np.repeat(v[:1], most - len(v), axis=0)])  # noqa: E731
        found = bound.call("probe", _probe, theta, pad(rows), pad(tangents))
        values, slopes = (np.asarray(v)[: len(rows)] for v in found)
        return values, slopes

    points = _generic_points(rng_key, bound, theta, probe, partition, init_strategy)
    _refuse_use_of_masked(bound, theta, probe, points)
    blocks = partition(probe, points, sites.num_terms, sites.units)
    _refuse_unbound(sites, blocks)
    return add_up(blocks, sites.term_shapes)


def _refuse_use_of_masked(bound: BoundTarget, theta: Theta, probe: Callable, points: np.ndarray) -> None:
    """Raise if a term depends on an element of a latent that is masked."""
    sites = bound.target.sites
    if not sites.masked or sites.enumerated:
        return
    for name, beside in bound.call("beside", Target.beside, theta).items():
        slopes = probe(points, np.asarray(beside) * (1 + np.abs(points)))[1]
        reacts = np.any((slopes != 0) & np.isfinite(slopes), 0)
        for term, first, size in _foreign_terms(sites, name):
            if reacts[first : first + size].any():
                raise ValueError(
                    f"Latent site '{name}' is masked where site '{term}' depends on it: without a prior, that element "
                    "has no distribution to be integrated over. Mask the observations that depend on it as well, or "
                    "leave out the mask of the latent."
                )


def _refuse_unbound(sites: Sites, blocks: Blocks) -> None:
    """Raise if nothing depends on an element of a latent whose prior is improper."""
    of_coordinate, of_term = np.asarray(blocks.of_coordinate), np.asarray(blocks.of_term)
    for name in sites.flat:
        own = np.ravel(sites.unravel(jnp.arange(sites.num_latents))[name])
        foreign = [of_term[first : first + size] for _, first, size in _foreign_terms(sites, name)]
        unbound = np.flatnonzero(~np.isin(of_coordinate[own], np.concatenate([*foreign, []])))
        if len(unbound):
            raise ValueError(
                f"Latent site '{name}' has an improper prior, and nothing depends on its element {unbound[0]} (counted "
                f"in unconstrained coordinates; {len(unbound)} of {len(own)} are so): nothing determines it. Give it a "
                "proper prior, or leave it out of the model."
            )


def _foreign_terms(sites: Sites, name: str) -> list[tuple[str, int, int]]:
    """Site, first term and number of terms, but for those of the latent ``name`` itself."""
    first = np.cumsum([0, *(size for _, size, _ in sites.terms)])
    return [
        (term, int(start), size)
        for (term, size, _), start in zip(sites.terms, first, strict=False)
        if term != name and not term.endswith(f"_{name}_log_det")
    ]


def _generic_points(
    rng_key: Array,
    bound: BoundTarget,
    theta: Theta,
    probe: Callable,
    partition: Partition,
    init_strategy: Callable | None,
) -> np.ndarray:
    """[2, D] points with finite energy that are special in no way."""
    sites = bound.target.sites
    most = probe_rows(sites.num_latents)

    def finite_terms(rows: np.ndarray) -> np.ndarray:
        chunks = [rows[k : k + most] for k in range(0, len(rows), most)]
        return np.isfinite(np.concatenate([probe(chunk, np.zeros_like(chunk))[0] for chunk in chunks]))

    def draw(k: int) -> np.ndarray:
        from_prior = draw_particles(CANDIDATES, sites.can_draw_prior, init_strategy)
        return np.asarray(bound.call("candidates", from_prior, random.fold_in(rng_key, k), theta))

    points = np.random.default_rng(1).uniform(-1, 1, (2, sites.num_latents)).astype(jnp.result_type(float))
    if finite_terms(points).all():
        return points
    find = lambda points: partition(probe, points, sites.num_terms, sites.units)  # noqa: E731
    found, ever = possible_points(draw, finite_terms, find, sites.units)
    if found is None:
        _refuse(bound.target, ~ever, "terms")
        raise ValueError(NOWHERE_FINITE)
    return found


def _probe(target: Target, theta: Theta, rows: Array, tangents: Array) -> tuple[Array, Array]:
    target = dataclasses.replace(target, validate=True)
    return jax.vmap(lambda x, v: jax.jvp(lambda x: target.terms(theta, x), (x,), (v,)))(rows, tangents)


def check_energies(target: Target, terms: Array | np.ndarray, sums: Sums = NO_SUMS) -> None:
    """Refuse a start at which no particle has a finite energy.

    Args:
        target: The target.
        terms: [N, K] energy terms, or fewer sums of them.
        sums: How terms may have been added up.

    Raises:
        ValueError: The message names the site.
    """
    finite = np.isfinite(np.asarray(terms))
    if np.any(np.all(finite, 1)):
        return
    target = target.in_double() if sums.double else target
    added_up = finite.shape[1] < target.sites.num_terms
    of_what = target.adding_up(sums if added_up else NO_SUMS)
    _refuse(of_what, ~finite.any(0), "sums of terms" if added_up else "terms")
    raise ValueError(NOWHERE_FINITE)


def _refuse(target: Target, bad: np.ndarray, what: str) -> None:
    """Raise if a term is bad [K] at all points, by the name of its site and its place there."""
    first = 0
    for (name, size, _), shape in zip(target.sites.terms, target.sites.term_shapes, strict=True):
        found = np.flatnonzero(bad[first : first + size])
        first += size
        if len(found):
            place = ", ".join(map(str, np.unravel_index(found[0], shape)))
            where = f", the first of them that of row {place}" if shape and what == "terms" else ""
            raise ValueError(
                f"Site '{name}' has no finite log density at any starting point: {len(found)} of its {size} "
                f"{what} are NaN or infinite for every particle{where}. Look for NaN or impossible values in the data "
                "that reach it, or start the parameters elsewhere with init_params."
            )
