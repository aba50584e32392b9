# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""NumPyro handlers that steer an update through its ``smcopt/...`` sites.

Bind them (``SMCOptimizer(model, handlers=[adapt_step_size()])``) or enter them around `init`, `update` and `run`::

    with control(learning_rate=0.5):
        result = optimizer.run(random.key(0), 1000, *args)

Those that keep a state must be there from `init` on. Of several that steer the same site the outermost wins: what is
entered around an object stands outside what is bound to it, and of bound ones the first is the outermost. Any other
handler, yours or NumPyro's (`numpyro.handlers.trace`, `substitute`, `block`, `scope`), works on the sites as well.
"""

from collections.abc import Callable

from numpyro_smcopt.adaptation import BisectedLimit, EssRule, FirstOrderLimit, RobbinsMonro, Scheduled
from numpyro_smcopt.effects import Rule, adapt, control
from numpyro_smcopt.types import Array

__all__ = ["Rule", "adapt", "adapt_learning_rate", "adapt_step_size", "anneal", "control", "limit_theta_step"]


def adapt_step_size(rule: Rule | None = None) -> adapt:
    """Adapt the step size of the particles' moves, in place of the kernel's own adaptation.

    Args:
        rule: `adaptation.RobbinsMonro` (the default) or `adaptation.DualAveraging` follow the acceptance of MALA, HMC
            or a random walk; `adaptation.EssRule` follows the effective sample size that a move of ULA leaves.
    """
    return adapt("step_size", RobbinsMonro() if rule is None else rule)


def adapt_learning_rate(rule: Rule | None = None) -> adapt:
    """Adapt the factor on the steps of theta to the effective sample size that they leave.

    Args:
        rule: By default ``EssRule(0.95, 1.05, largest=1.0, observes="step_ess")``: the factor falls by a twentieth
            where an update costs more than a twentieth of the particles, and rises again, up to the optimiser's own
            rate.
    """
    return adapt("learning_rate", EssRule(0.95, 1.05, largest=1.0, observes="step_ess") if rule is None else rule)


def limit_theta_step(target_ess: float = 0.9, *, exact: bool = False) -> control:
    """Shorten every step of theta that would leave less than a fraction of effective particles.

    Args:
        target_ess: That fraction, for the worst block.
        exact: Whether the length is found by trying it on the particles (`adaptation.BisectedLimit`) instead of by the
            closed form (`adaptation.FirstOrderLimit`).
    """
    return control(theta_limit=BisectedLimit(target_ess) if exact else FirstOrderLimit(target_ess))


def anneal(site: str, schedule: Callable[[Array], Array]) -> adapt:
    """Let a control follow a schedule.

    Args:
        site: Name of the control site, without prefix.
        schedule: ``number of updates -> value``, such as `optax.linear_schedule`.

    Example:
        >>> import optax
        >>> from numpyro_smcopt.handlers import anneal
        >>> warm_up = anneal("learning_rate", optax.linear_schedule(0.0, 1.0, 100))
    """
    return adapt(site, Scheduled(schedule), f"anneal_{site}")
