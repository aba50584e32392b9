# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The log marginal likelihood of any NumPyro model, with an error from one run.

A first population is tempered from the prior to the posterior; it shows where the posterior lies, all modes that the
prior reaches included. There a mixture is put, and weighed draws from it give an unbiased estimate of
``p(y)``; where they do not suffice, independent tempered populations do (see `reporting.replicates`).
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import random

from numpyro_smcopt import faults, laplace
from numpyro_smcopt.block_search import find_blocks
from numpyro_smcopt.blocks import Blocks, Partition
from numpyro_smcopt.kernels import HMC, InvariantKernel
from numpyro_smcopt.population import budget
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.population.first_cloud import draw_particles, first_cloud
from numpyro_smcopt.population.independent_blocks import check_energies, independent_blocks
from numpyro_smcopt.population.self_check import as_precise_as_needed
from numpyro_smcopt.potential import (
    Target,
    check_init_params,
    check_key,
    check_start,
    flat_terms,
    join_arguments,
    make_target,
    split_arguments,
    strong,
)
from numpyro_smcopt.reporting.evidence_at import EvidenceAt
from numpyro_smcopt.reporting.evidence_at import LogEvidence as LogEvidence
from numpyro_smcopt.reporting.proposal_mixture import SIZE
from numpyro_smcopt.reporting.replicates import Draws
from numpyro_smcopt.reporting.report_texts import about_draws
from numpyro_smcopt.runs.compilation import Programs
from numpyro_smcopt.types import Array, Model, Params, Theta

REMEMBERED_MODELS = 32  # whose compiled programs are kept


def log_evidence(
    model: Model,
    *args: Any,
    params: Params | None = None,
    rng_key: Array | None = None,
    num_particles: int | None = None,
    kernel: InvariantKernel | None = None,
    partition: Partition = find_blocks,
    **kwargs: Any,
) -> LogEvidence:
    """The log marginal likelihood ``log p(y)`` of a model, its latents integrated out.

    Args:
        model: A callable with NumPyro primitives. Latent `numpyro.sample` sites are integrated out; there may be
            `numpyro.param` sites, or none (a Bayesian model).
        *args: Arguments of the model.
        params: Constrained values of all param sites, for instance ``result.params``.
        rng_key: Randomness (default ``random.key(0)``).
        num_particles: Draws from a mixture; rounded up to whole replicates of 192, four at least. By default about
            12,000, fewer for models whose density is expensive. Where they do not suffice, as many particles are
            tempered in their place, but never fewer than 3,072 (sixteen populations of 192, without whose spread no
            error could be stated): 1,000 may then cost what 3,072 do, and many evaluations for each. The result says
            how many there were. Up to 256 more particles are tempered at first in any case, to find the posterior.
        kernel: Moves particles; by default `kernels.HMC`.
        partition: How independent blocks are found.
        **kwargs: Keyword arguments of the model.

    Returns:
        The estimate, its standard deviation, and draws from the posterior.

    Raises:
        ValueError: If a param site has no value, or the model cannot be used; the message names the site.

    Example:
        >>> import jax.numpy as jnp, numpyro, numpyro.distributions as dist
        >>> from numpyro_smcopt import log_evidence
        >>> def model(y):
        ...     mean = numpyro.sample("mean", dist.Normal(0.0, 3.0))
        ...     with numpyro.plate("data", len(y)):
        ...         numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)
        >>> found = log_evidence(model, jnp.array([1.0, 2.0, 4.5]))
        >>> round(found.log_evidence, 2)
        -8.01
    """
    if not callable(model):
        raise TypeError(f"model must be a callable with NumPyro primitives, got {type(model).__name__}.")
    if rng_key is not None:
        check_key(rng_key)
    key = random.key(0) if rng_key is None else rng_key
    key_params, key_blocks, key_cloud, key_draw = random.split(key, 4)
    start, params = _start(key_params, model, args, kwargs, {} if params is None else params)
    kernel = kernel or HMC()
    blocks = independent_blocks(key_blocks, start, start.theta, partition)
    cloud = _first_cloud(key_cloud, start, blocks, kernel)
    precise = as_precise_as_needed(start, start.theta, cloud.x, blocks)
    if precise is not blocks:
        blocks, cloud = precise, _first_cloud(key_cloud, start, precise, kernel)
    num_replicates = None if num_particles is None else 2 * max(2, -(-int(num_particles) // (2 * SIZE)))
    found = EvidenceAt(key_draw, start, cloud, blocks, kernel, num_replicates=num_replicates)(params).evidence
    faults.warn_of(about_draws(found))
    return found


def _start(rng_key: Array, model: Model, args: tuple, kwargs: dict, params: Params) -> tuple[BoundTarget, Params]:
    """The model bound to its arguments, and the values of all param sites as arrays."""
    arrays, static = split_arguments(args, kwargs)
    bound = BoundTarget(_programs_of(model), arrays, static)
    target = bound.target
    params = check_init_params(target.sites.params, params)
    if missing := [name for name in target.sites.params if name not in params]:
        raise ValueError(
            f"log_evidence needs values of all param sites, but params lacks {missing}. Pass params=result.params of a "
            "fit, or values of your own."
        )
    target.refuse_wrong_indices()
    params = jax.tree.map(lambda leaf: strong(jnp.asarray(leaf, jnp.result_type(float))), params)
    params, theta = bound.call("read", Target.initial_params, rng_key, params)
    check_start(params, theta)
    return bound.at(theta), params


def _first_cloud(rng_key: Array, start: BoundTarget, blocks: Blocks, kernel: InvariantKernel) -> Draws:
    """Particles of the posterior, found from the prior."""
    num = 2 * budget.default_num_particles(start.target.work(start.theta))

    def program(target: Target, rng_key: Array, theta: Theta, blocks: Blocks) -> tuple[Array, Array, Array]:
        terms_fn, flat, _ = flat_terms(target, theta)
        at_theta = lambda x: terms_fn(flat, x)  # noqa: E731
        key_mode, key_cloud = random.split(rng_key)
        mode = draw_particles(1, target.sites.can_draw_prior, None)(target, key_mode, theta)[0]
        if laplace.affordable(blocks):
            mode = laplace.find_mode(at_theta, mode, blocks).x
        cloud = first_cloud(key_cloud, target, theta, blocks, mode, kernel, num)
        return cloud.points.x, cloud.points.terms, jnp.sum(cloud.unfinished)

    if start.target.sites.num_latents == 0:
        return Draws(jnp.zeros((1, 0)), jnp.zeros((1, 1)))
    x, terms, _ = start.call(("first", num, kernel), program, rng_key, start.theta, blocks)
    check_energies(start.target, terms)
    return Draws(x, jnp.full((num, blocks.num_blocks), -np.log(num), x.dtype))


@functools.lru_cache(maxsize=REMEMBERED_MODELS)
def _programs_of(model: Model) -> Programs:
    """Compiled programs of a model."""
    return Programs(lambda arrays, static: make_target(model, *join_arguments(arrays, static)))
