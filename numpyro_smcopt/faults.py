# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Faults of a run: each is a message with its remedy, or None."""

from collections.abc import Iterable
from typing import Any

import numpy as np

from numpyro_smcopt.types import warn_outside

FROZEN_ACCEPTANCE = 0.05
WORRYING_BIAS = 0.2
FIRST_LOOK, LAST_LOOK = 5, 50  # updates between which stability is judged
UNSTABLE_SHARE = 0.5  # of them that must be beyond the limit
STARVED, FEWEST_TO_STARVE = 2.0, 8  # effective particles, and of how many


def warn_of(found: Iterable[str | None]) -> None:
    """Warn of every fault at the line of the user's call, however deep in the package it was found."""
    for message in found:
        if message is not None:
            warn_outside(message)


def unfinished_tempering(num_unfinished: int, num_blocks: int, num_stages: int) -> str | None:
    """The first particles did not arrive at the posterior."""
    if not num_unfinished:
        return None
    return (
        f"{num_stages} stages of tempering did not bring the first particles from the prior to the posterior "
        f"({num_unfinished} of {num_blocks} independent blocks of latents are on their way): the prior at the starting "
        "parameters is too far from the data. The log evidence will be off. Start nearer with init_params, use more "
        "particles, or start the particles elsewhere with init_strategy=numpyro.infer.init_to_median."
    )


def higher_ground(gain: float) -> str | None:
    """A restart of the warm start ended ``gain`` nats above the place that the walk from the start led to."""
    if not gain > 0:
        return None
    return (
        f"The likelihood has several maxima: the one next to the starting values is about {gain:.1f} nats lower than "
        "one found by starting elsewhere, where the run now begins. There may be higher ones: compare several runs, "
        "run(..., num_runs=8)."
    )


def refused_updates(num_refused: int, num_updates: int) -> str | None:
    """Some updates would have left a block without weight, or theta not finite."""
    if not num_refused:
        return None
    return (
        f"{num_refused} of {num_updates} updates were refused because a block of latents lost all its weight or theta "
        "was not finite. Use more particles, a smaller learning rate, or check the model for NaN."
    )


def starved_cloud(step_ess: float, num_particles: int) -> str | None:
    """Updates leave nearly all of the weight to one particle; ``step_ess`` is the mean fraction that they leave."""
    if num_particles < FEWEST_TO_STARVE or step_ess * num_particles >= STARVED:
        return None
    return (
        f"An update left the weight of {step_ess * num_particles:.1f} of {num_particles} particles, on average over "
        "the run. Use a smaller learning rate or handlers.limit_theta_step(), for unadjusted moves a smaller step size "
        "or handlers.adapt_step_size(adaptation.EssRule()), or an accept-reject kernel such as kernels.HMC()."
    )


def lost_particles(num_nonfinite: int) -> str | None:
    """Some particles met a potential that is not finite."""
    if not num_nonfinite:
        return None
    return f"The potential was not finite for {num_nonfinite} particles; they lost their weight and the run went on."


def frozen_particles(acceptance: float) -> str | None:
    """Hardly any move is accepted."""
    if acceptance >= FROZEN_ACCEPTANCE:
        return None
    return (
        f"The particles hardly move: acceptance {acceptance:.3f}. Use a smaller step size or an adapted one (the "
        "kernel's `target`)."
    )


def theta_still_moving(theta_state: Any, grad_norm: np.ndarray) -> str | None:
    """A state of a theta step that can tell says that theta still moves."""
    still_moving = getattr(theta_state, "still_moving", None)
    if still_moving is None or not still_moving(grad_norm):
        return None
    return (
        "theta was still moving in one direction at the end of the run. Go on with more steps, "
        "run(..., init_state=result.state), unless the maximum lies on a boundary (a scale that goes to zero)."
    )


def masked_particles(num_masked: int) -> str | None:
    """The objective was not finite at some particles."""
    if not num_masked:
        return None
    return (
        f"The objective was NaN or infinite at {num_masked} particles; they were left out of the estimates, and the "
        "run went on. Make the reward finite where the particles go."
    )


def unmoved_theta(num_refused: int, num_updates: int) -> str | None:
    """The gradient of some updates was not finite."""
    if not num_refused:
        return None
    return (
        f"theta stayed where it was in {num_refused} of {num_updates} updates, because its gradient, or the potential "
        "of too many particles, was not finite. Use a smaller step_size, start elsewhere with init_params, or check "
        "the model for NaN."
    )


def replaced_particles(num_nonfinite: int) -> str | None:
    """Some unadjusted moves led where the potential is not finite."""
    if not num_nonfinite:
        return None
    return f"The potential was not finite for {num_nonfinite} particles; they took the place of others."


def beyond_stability(stability: np.ndarray) -> float | None:
    """The factor by which the steps of the first updates were too long, if they were.

    Where a motion explodes its velocity turns to the direction that does, so the curvature along it gives the limit.

    Args:
        stability: [T] step size as a fraction of the largest stable one.
    """
    beginning = stability[FIRST_LOOK:LAST_LOOK]
    beginning = beginning[np.isfinite(beginning) & (beginning > 0)]
    if not len(beginning) or np.mean(beginning > 1) < UNSTABLE_SHARE:
        return None
    return float(np.median(beginning[beginning > 1]))


def unstable_step(name: str, value: float, limit: float) -> str:
    """The argument ``name`` makes steps that are longer than the largest stable one."""
    return (
        f"{name}={value:.3g} is beyond the stability limit of this model: it diverges along some direction. Use {name} "
        f"below about {limit:.2g}."
    )


def biased_latents(bias: float) -> str | None:
    """The step size of unadjusted moves inflates the variance of the latents."""
    if bias < WORRYING_BIAS:
        return None
    return (
        f"The unadjusted moves inflate the variance of some latents by about {100 * bias / (1 - bias):.0f} %. Use a "
        "smaller latent_step_size, or kernel=kernels.MetropolisUnderdamped()."
    )
