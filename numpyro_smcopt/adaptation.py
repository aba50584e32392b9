# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Pure rules ``(state, observed) -> state`` that adapt the tuning parameters of a sampler."""

import jax.numpy as jnp

from numpyro_smcopt.types import Array

SMALLEST_SIZE = 1e-6
LARGEST_SIZE = 1e3


def adapt_size(size: Array, observed: Array, target: float | None, num_updates: Array, settle: float = 20.0) -> Array:
    """Robbins-Monro step of log step sizes towards a target.

    ``log h += rate_k (observed - target)`` with ``rate_k = max(0.5 (1 + k / settle)^-0.6, 0.03)``: fast at first, never
    quite asleep, because the target follows theta. For accept-reject kernels the observed quantity is the acceptance
    (their ESS does not depend on ``h``), for unadjusted ones the ESS after the move.

    Args:
        size: [B] step sizes.
        observed: [B] acceptance or ESS fraction.
        target: What it should be; None keeps the sizes.
        num_updates: [] updates so far.
        settle: After how many updates the rate starts to fall.
    """
    if target is None:
        return size
    rate = jnp.maximum(0.5 * (1 + num_updates / settle) ** -0.6, 0.03).astype(size.dtype)
    return jnp.clip(size * jnp.exp(rate * (observed - target)), SMALLEST_SIZE, LARGEST_SIZE)
