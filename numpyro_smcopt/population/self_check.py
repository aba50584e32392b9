# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""A few energies in double precision beside those that are used.

An energy that single precision cannot hold looks like any other: it is off by the same amount at all particles, or by
noise that passes for a likelihood. So a model is evaluated at a few particles both ways, site by site, and where that
makes a difference everything is computed in double precision (`Target.in_double`).
"""

import math
from typing import Any

import jax
import numpy as np

from numpyro_smcopt.blocks import Blocks, add_up, doubled
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.evaluate import added_up
from numpyro_smcopt.potential import Target, double_allowed, double_may_be_needed
from numpyro_smcopt.types import Array, Theta

NUM_CHECKED = 4  # particles
FAR = 1e4  # where numbers of single precision are a thousandth apart
LARGEST_ERROR = 0.01  # nats that the terms of a site may be off


def as_precise_as_needed(bound: BoundTarget, theta: Theta, x: Any, blocks: Blocks, terms: Any = None) -> Blocks:
    """The partition as it is, or that of terms in double precision if the energy is wrong otherwise.

    Args:
        bound: The target.
        theta: Where, unconstrained.
        x: [N, D] particles of the posterior.
        blocks: Their partition.
        terms: [N, F] sums of their energy terms, if these are known.

    Raises:
        ValueError: If a latent lies where single precision cannot tell its values apart; the message names the site.
    """
    x = np.asarray(x)
    _check_spacing(bound, x)
    if blocks.sums.double or not double_may_be_needed():
        return blocks
    double, some = in_double(bound, blocks), np.arange(NUM_CHECKED) % len(x)
    sizes = [size for _, size, _ in bound.target.adding_up(blocks.sums).sites.terms]
    if terms is None or terms.shape[1] != sum(sizes):
        used = np.asarray(bound.call("energies", _energies, theta, x[some], blocks))
    else:  # particles without a finite energy have been replaced since
        some = np.argsort(~np.isfinite(np.asarray(terms)).all(1), kind="stable")[some]
        used = np.asarray(terms)[some]
    try:
        with double_allowed(double):
            exact = np.asarray(bound.call("self-check", _energies, theta, x[some], double), float)
    except (TypeError, ValueError):  # a model that insists on single precision: it works in that
        return blocks
    exact = exact.reshape(len(some), 2, -1).sum(1)
    # Where there is no energy in double precision either, nothing is to be gained.
    with np.errstate(invalid="ignore"):
        errors = np.where(np.isfinite(exact), used - exact, 0.0)
    of_sites = [piece.sum(1) for piece in np.split(errors, np.cumsum(sizes)[:-1], axis=1)]
    return blocks if np.all(np.abs(of_sites) <= LARGEST_ERROR) else double


def _energies(target: Target, theta: Theta, x: Array, blocks: Blocks) -> Array:
    """[N, F] sums of energy terms of particles [N, D], [N, 2 F] in double precision."""
    target, _ = added_up(target, blocks)
    return jax.vmap(lambda x: target.terms(theta, x))(x)


def in_double(bound: BoundTarget, blocks: Blocks) -> Blocks:
    """The partition of terms that are computed in double precision."""
    return blocks if blocks.sums.double else add_up(doubled(blocks), bound.target.sites.term_shapes)


def _check_spacing(bound: BoundTarget, x: np.ndarray) -> None:
    """Refuse a cloud [N, D] of which neighbours are farther apart in a coordinate than its values lie together."""
    start = 0
    with np.errstate(invalid="ignore"):
        far = np.max(np.abs(x), 0, initial=0.0)
        coarse = (far > FAR) & (np.finfo(x.dtype).eps * far > x.std(0) / 2)
    for name, site in bound.target.sites.latents.items():
        stop = start + math.prod(site.shape)
        if len(found := start + np.flatnonzero(coarse[start:stop])):
            raise ValueError(
                f"Latent site '{name}' is near {x[0, found[0]]:.4g}, where numbers of {x.dtype} are "
                f"{np.spacing(x[0, found[0]]):.2g} apart, which is more than its values differ. Write it as an offset "
                "from a constant, and subtract that from the data, or enable double precision "
                "(`jax.config.update('jax_enable_x64', True)`)."
            )
        start = stop
