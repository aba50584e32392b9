# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The sites that an algorithm announces, and the shell that announces them.

The compiled update is pure and emits no site, hence its cache is right under any handler stack. Around it a thin shell
announces *control* sites before (a handler may replace their values, which then enter the update as traced arguments)
and *diagnostic* sites after. All are `numpyro.deterministic` sites named ``smcopt/...``; the state of a handler is a
`mutable` site that the algorithm's state carries.

Order of handlers: ambient ones outermost (they win), then those bound at construction, then the recorder. A handler
entered around an update that was already compiled *by the user* (`jax.jit(optimizer.update)`) is not seen: jit does not
look at the handler stack.

This is the only file of the package that touches the handler stack.
"""

from collections.abc import Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any

import jax.numpy as jnp
import numpyro
from jax import lax
from numpyro.primitives import _PYRO_STACK, Messenger

from numpyro_smcopt.types import Array

PREFIX = "smcopt/"


def handlers_are_active() -> bool:
    """Whether a handler stands around the present code, so that a program traced now must not be kept."""
    return bool(_PYRO_STACK)


class _Recorder(Messenger):
    """Innermost handler: records our sites by their own names and feeds the state of handlers.

    The unscoped name is kept in the message, so that `numpyro.handlers.scope`, which renames it, cannot break the
    threading of the state.
    """

    def __init__(self, mutable_state: dict) -> None:
        self.mutable_state = mutable_state
        self.values: dict[str, dict[str, Any]] = {"deterministic": {}, "mutable": {}}
        super().__init__()

    def process_message(self, msg: dict) -> None:
        name = msg.get("name", "")
        if isinstance(name, str) and name.startswith(PREFIX) and msg["type"] in self.values:
            msg["_smcopt"] = name
            if msg["type"] == "mutable" and name in self.mutable_state:
                msg["value"] = dict(self.mutable_state[name])

    def postprocess_message(self, msg: dict) -> None:
        if "_smcopt" in msg:
            self.values[msg["type"]][msg["_smcopt"]] = msg["value"]


class Shell:
    """Announces the sites of one update; a context manager.

    Args:
        handlers: Handlers bound at construction.
        mutable_state: State of the handlers before the update.
    """

    def __init__(self, handlers: Sequence[Messenger], mutable_state: dict) -> None:
        self._handlers = handlers
        self._recorder = _Recorder(mutable_state)
        self._stack = ExitStack()

    def __enter__(self) -> "Shell":
        """Enter the bound handlers, then the recorder."""
        for handler in (*self._handlers, self._recorder):
            self._stack.enter_context(handler)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them."""
        self._stack.__exit__(kind, error, trace)

    def control(self, name: str, value: Array) -> Array:
        """Announce a control site; the value that comes back has the shape and type of ``value``.

        Raises:
            ValueError: If a handler put a value there that does not broadcast to that shape.
        """
        replaced = numpyro.deterministic(PREFIX + name, value)
        if replaced is value:
            return value
        try:
            replaced = jnp.broadcast_to(jnp.asarray(replaced), value.shape)
        except ValueError as error:
            raise ValueError(
                f"A handler replaced site '{PREFIX}{name}' by a value of shape {jnp.shape(replaced)}; it must "
                f"broadcast to {value.shape}."
            ) from error
        # A Python float from `substitute` is weakly typed and would recompile the update.
        return lax.convert_element_type(replaced, value.dtype)

    def diagnostic(self, name: str, value: Array) -> None:
        """Announce a diagnostic site."""
        numpyro.deterministic(PREFIX + name, value)

    def mutable_state(self, expected: dict | None = None) -> dict:
        """The state of the handlers after the update.

        Args:
            expected: The state before; a handler may not bring new sites later.

        Raises:
            ValueError: If the sites differ from those of ``expected``.
        """
        found = self._recorder.values["mutable"]
        if expected is not None and set(found) != set(expected):
            raise ValueError(
                f"The mutable sites of the handlers are {sorted(found)}, but at init they were {sorted(expected)}. "
                "Enter a handler that keeps a state before init, or bind it with `handlers=`."
            )
        return dict(found)
