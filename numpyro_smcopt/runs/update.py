# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""One update, as users and runs make it: its sites announced, on data that the state has adopted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from numpyro_smcopt import effects
from numpyro_smcopt.branching import changed_if
from numpyro_smcopt.population.bound_target import BoundTarget
from numpyro_smcopt.potential import Target, fingerprint, strong
from numpyro_smcopt.runs.algorithm import Algorithm
from numpyro_smcopt.types import Array


def announce_start(algorithm: Algorithm, state: Any, fingerprint: Array) -> Any:
    """A first state whose sites have been announced, so that handlers could bring their state."""
    with effects.Shell(algorithm.handlers, None) as shell:
        shell.controls(algorithm.controls(state))
        shell.diagnostics(state.diagnostics)
    return state._replace(mutable_state=shell.mutable_state(), fingerprint=fingerprint)


def announce_step(algorithm: Algorithm, step: Callable[[Any, dict[str, Any]], Any], state: Any) -> Any:
    """Announce the control sites, step, announce the diagnostic sites."""
    with effects.Shell(algorithm.handlers, state.mutable_state) as shell:
        new = step(state, shell.controls(algorithm.controls(state)))
        shell.diagnostics(new.diagnostics)
    return jax.tree.map(strong, new._replace(mutable_state=shell.mutable_state()))


def update(algorithm: Algorithm, bound: BoundTarget, state: Any) -> Any:
    """A compiled, announced update; the data may be others than those of the state."""

    def compiled(state: Any, controls: dict[str, Any]) -> Any:
        functions = {name: value for name, value in controls.items() if callable(value)}
        numbers = {name: value for name, value in controls.items() if name not in functions}

        def step(target: Target, state: Any, arrays: list[Array], numbers: dict[str, Array]) -> Any:
            return step_on_data(algorithm, target, state, fingerprint(arrays), {**numbers, **functions})

        return bound.call(("update", *functions.items()), step, state, bound.arrays, numbers, often=True)

    state = announce_step(algorithm, compiled, state)
    check_blocks(state)
    return state


def step_on_data(algorithm: Algorithm, target: Target, state: Any, fingerprint: Array, controls: dict[str, Any]) -> Any:
    """A step after the state has adopted the data, if they are new to it."""
    state = _on_data(algorithm, target, state, fingerprint)
    # Under data that contradict the blocks nothing moves, so that right data may follow.
    return changed_if(
        state.wrong_blocks, lambda _: state, jax.tree.map(strong, algorithm.step(target, state, controls))
    )


def _on_data(algorithm: Algorithm, target: Target, state: Any, fingerprint: Array) -> Any:
    """The state under the data; if they are its own, as it was, randomness included."""
    check_model_of(target, state)
    state = state._replace(wrong_blocks=jnp.zeros_like(state.wrong_blocks))
    adopt = lambda state: jax.tree.map(strong, algorithm.adopt(target, state, fingerprint))  # noqa: E731
    return changed_if(fingerprint != state.fingerprint, adopt, state)


def adopt(algorithm: Algorithm, bound: BoundTarget, state: Any) -> Any:
    """A state to go on from, under the data.

    Raises:
        ValueError: If the data contradict its partition, or index beyond an axis.
    """
    algorithm._check_state(state, "init_state")
    on_data = lambda target, state, arrays: _on_data(algorithm, target, state, fingerprint(arrays))  # noqa: E731
    adopted = bound.call("adopt", on_data, state, bound.arrays)
    check_blocks(adopted)
    anew = getattr(getattr(adopted, "theta_state", None), "anew", None)
    other_data = np.any(np.asarray(adopted.fingerprint) != np.asarray(state.fingerprint))
    if other_data:
        bound.target.refuse_wrong_indices()
    return adopted if anew is None or not other_data else adopted._replace(theta_state=anew())


def check_model_of(target: Target, state: Any) -> None:
    """Refuse the state of another model; costs nothing in a compiled program."""
    if sorted(state.theta) != sorted(target.sites.params):
        raise ValueError(
            f"The state has the parameters {sorted(state.theta)}, but the model has {sorted(target.sites.params)}. "
            "Start anew with init."
        )


def check_blocks(state: Any) -> None:
    """Refuse data that contradict the partition of a state, where that can be raised."""
    if not isinstance(state.wrong_blocks, jax.core.Tracer) and bool(state.wrong_blocks):
        raise ValueError(
            "With these data the latents depend on one another in another way than with the data that the state "
            "was started from (another grouping, for instance), so its independent blocks would be wrong. Start "
            "anew with init, or use partition=numpyro_smcopt.one_block."
        )
