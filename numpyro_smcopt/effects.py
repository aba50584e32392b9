# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The sites that an algorithm announces, the shell that announces them, and what a handler of them is made of.

The compiled update is pure and emits no site, hence its cache is right under any handler stack. Around it a thin shell
announces *control* sites before (a handler may replace their values, which then enter the update as traced arguments)
and *diagnostic* sites after. All are `numpyro.deterministic` sites named ``smcopt/...``; the state of a handler is a
`mutable` site that the algorithm's state carries.

Order of handlers: ambient ones outermost (they win), then those bound at construction (the first is the outermost),
then the shell. A handler entered around an update that was already compiled *by the user*
(`jax.jit(optimizer.update)`) is not seen, because jit does not look at the handler stack; `control` is, because it
changes the key of every cache of jax.

This is the only file of the package that touches the handler stack.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial, wraps
from types import TracebackType
from typing import Any, Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from numpyro.primitives import _PYRO_STACK, Messenger, mutable

from numpyro_smcopt.types import Array

PREFIX = "smcopt/"

F = TypeVar("F", bound=Callable)


def handlers_are_active() -> bool:
    """True if a handler stands around the present code, so that a program traced now must not be kept."""
    return bool(_PYRO_STACK)


def check_handlers(handlers: Any) -> tuple[Messenger, ...]:
    """Handlers to be bound, as a tuple.

    Raises:
        TypeError: If they are no sequence of handlers.
    """
    if not isinstance(handlers, list | tuple) or not all(isinstance(handler, Messenger) for handler in handlers):
        raise TypeError(
            "handlers must be a list of NumPyro handlers, such as [numpyro_smcopt.handlers.adapt_step_size()], got "
            f"{handlers!r}."
        )
    return tuple(handlers)


class Shell(Messenger):
    """Announces the sites of one update; a context manager.

    As the innermost handler it tells the others which sites are ours, and feeds and records their state. The unscoped
    name is kept in the message, so that `numpyro.handlers.scope`, which renames it, cannot break the threading.

    Args:
        handlers: Handlers bound at construction.
        mutable_state: State of the handlers before the update; None at the start of a run, when they bring it.
    """

    def __init__(self, handlers: Sequence[Messenger], mutable_state: dict | None) -> None:
        self._handlers, self._stack = handlers, ExitStack()
        self._carried, self._first = mutable_state or {}, mutable_state is None
        self._mutables: dict[str, Any] = {}
        super().__init__()

    def __enter__(self) -> "Shell":
        """Enter the bound handlers, then the shell itself."""
        for handler in self._handlers:
            self._stack.enter_context(handler)
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave them."""
        super().__exit__(kind, error, trace)
        self._stack.__exit__(kind, error, trace)

    def process_message(self, msg: dict) -> None:
        """Mark what is ours, and give a handler the state that it left."""
        name = msg.get("name", "")
        if not isinstance(name, str) or not name.startswith(PREFIX) or msg["type"] not in ("deterministic", "mutable"):
            return
        msg["_smcopt"] = name.removeprefix(PREFIX)
        msg["_smcopt_first"] = self._first
        if msg["type"] == "mutable":
            if name in self._mutables:
                msg["value"] = self._mutables[name]
            elif name in self._carried:
                msg["value"] = dict(self._carried[name])
            elif not self._first:
                raise ValueError(
                    f"A handler brought the mutable site '{name}', but at init there were {sorted(self._carried)}. "
                    "Enter a handler that keeps a state before init, or bind it with `handlers=`."
                )

    def postprocess_message(self, msg: dict) -> None:
        """Record the state of a handler."""
        if msg["type"] == "mutable" and "_smcopt" in msg:
            self._mutables[PREFIX + msg["_smcopt"]] = msg["value"]

    def controls(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Announce the control sites.

        Args:
            values: By name without prefix: arrays, or functions that the update is compiled with.

        Returns:
            What handlers made of them, of the same shapes and types.

        Raises:
            ValueError: If a handler put something there that cannot take the place, or steers another site.
        """
        _check("steers", values)
        return {
            name: _in_place_of(value, numpyro.deterministic(PREFIX + name, value), name)
            for name, value in values.items()
        }

    def diagnostics(self, values: Mapping[str, Array]) -> None:
        """Announce the diagnostic sites.

        Raises:
            ValueError: If a rule observes another one.
        """
        _check("observes", values)
        for name, value in values.items():
            numpyro.deterministic(PREFIX + name, value)

    def mutable_state(self) -> dict:
        """The state of the handlers after the update.

        Raises:
            ValueError: If a handler withheld the state that it brought when the run began.
        """
        missing = set(self._carried) - set(self._mutables)
        if missing:
            raise ValueError(
                f"The handlers of the mutable sites {sorted(missing)} were there at init, but no longer are. Keep them "
                "entered during the whole run, or bind them with `handlers=`."
            )
        return dict(self._mutables)


def _check(does: str, announced: Mapping[str, Any]) -> None:
    """Raise a ValueError if a handler says, by ``smcopt_steers`` or ``smcopt_observes``, that it does so to another."""
    for handler in _PYRO_STACK:
        unknown = sorted(set(getattr(handler, f"smcopt_{does}", ())) - announced.keys())
        if unknown:
            names = ", ".join(map(repr, unknown))
            raise ValueError(f"{handler!r} {does} {names}, but the sites here are {sorted(announced)}.")


def _in_place_of(value: Any, replaced: Any, name: str) -> Any:
    if replaced is value:
        return value
    if callable(value):
        if not callable(replaced):
            raise ValueError(f"A handler replaced site '{PREFIX}{name}' by {replaced!r}; it must be a function.")
        return replaced
    traced = isinstance(value, jax.core.Tracer) or isinstance(replaced, jax.core.Tracer)
    numbers: Any = jnp if traced else np  # nothing is compiled for a number that is known
    try:
        replaced = numbers.asarray(replaced)
        fitting = numbers.broadcast_to(replaced, value.shape)
    except (ValueError, TypeError) as error:
        what = f"a value of shape {jnp.shape(replaced)}" if hasattr(replaced, "shape") else repr(replaced)
        raise ValueError(
            f"A handler replaced site '{PREFIX}{name}' by {what}; it must broadcast to {value.shape}."
        ) from error
    if not (np.issubdtype(replaced.dtype, np.number) or replaced.dtype == bool):
        raise ValueError(f"A handler replaced site '{PREFIX}{name}' by {replaced!r}, which is no number.")
    if not traced and not np.all(np.isfinite(fitting) & (fitting >= 0)):
        raise ValueError(
            f"A handler replaced site '{PREFIX}{name}' by {replaced!r}; it must be finite, and at least 0."
        )
    # A Python float from `substitute` is weakly typed and would recompile the update.
    return fitting.astype(value.dtype)


# -- handlers ------------------------------------------------------------------------------------------------------
class Rule(Protocol):
    """A rule by which a control follows a diagnostic; hashable, for instance a frozen dataclass. See `adaptation`."""

    @property
    def observes(self) -> str:
        """Name of the diagnostic site, without prefix."""

    def init(self, value: Array) -> Any:
        """The state at the start, a pytree of arrays; ``value`` is what the control would be without the rule."""

    def value(self, state: Any) -> Array:
        """The next value of the control."""

    def update(self, state: Any, observed: Array) -> Any:
        """The state after an update in which ``observed`` was announced."""


class adapt(Messenger):  # named like the handlers of NumPyro
    """Let a rule steer a control site.

    Args:
        site: Name of the control site, without prefix.
        rule: The rule.
        name: Name of the mutable site that holds its state; another one where a rule steers the same site twice.
    """

    def __init__(self, site: str, rule: Rule, name: str | None = None) -> None:
        try:
            hash(rule)
        except TypeError as error:
            raise TypeError(f"rule must be hashable (a frozen dataclass, for instance), got {rule!r}.") from error
        self.site, self.rule, self.name = site, rule, PREFIX + (name or f"adapt_{site}")
        self.smcopt_steers, self.smcopt_observes = (site,), (rule.observes,)
        super().__init__()

    def __repr__(self) -> str:
        return f"adapt({self.site!r}, {self.rule!r})"

    def process_message(self, msg: dict) -> None:
        """Put the rule's value in the place of the control."""
        if msg.get("_smcopt") == self.site:
            start = _call(self.rule, "init", msg["value"]) if msg["_smcopt_first"] else None
            msg["value"] = _call(self.rule, "value", mutable(self.name, {"state": start})["state"])

    def postprocess_message(self, msg: dict) -> None:
        """Show the diagnostic to the rule."""
        if msg.get("_smcopt") == self.rule.observes and not msg["_smcopt_first"]:
            carried = mutable(self.name)
            carried["state"] = _call(self.rule, "update", carried["state"], msg["value"])


@partial(jax.jit, static_argnums=(0, 1))
def _call(rule: Rule, method: str, *arguments: Any) -> Any:
    """One program instead of one per operation, where updates are eager."""
    return getattr(rule, method)(*arguments)


class control(Messenger):
    """Fix control sites: `numpyro.handlers.substitute` for them, with three advantages.

    A name that the algorithm does not announce is refused, and functions that *you* compiled before
    (``jax.jit(optimizer.update)``, `jax.lax.scan`) follow it as well: entering and leaving changes the key of every
    cache of jax. Scoped sites are found by their own names.

    Args:
        data: Values by site name, with or without the prefix ``smcopt/``.
        **values: More of them.

    Raises:
        ValueError: If there is no value at all. On entering an update, if no such site is announced.

    Example:
        >>> from numpyro_smcopt.handlers import control
        >>> with control(step_size=0.1, ess_threshold=1.0):
        ...     pass  # updates in here move by steps of 0.1, and resample whenever weights are unequal
    """

    def __init__(self, data: Mapping[str, Any] | None = None, **values: Any) -> None:
        given = {**(data or {}), **values}
        self.data = {name.removeprefix(PREFIX): value for name, value in given.items()}
        if not self.data:
            raise ValueError("control needs values, for instance control(step_size=0.1).")
        self.smcopt_steers = tuple(self.data)
        self._keys = ExitStack()
        super().__init__()

    def __repr__(self) -> str:
        return f"control({self.data!r})"

    def __enter__(self) -> "control":
        """Enter, and change the key of the caches."""
        key = tuple((name, _hashable(value)) for name, value in sorted(self.data.items()))
        self._keys.enter_context(_cache_key((_cache_key.value, key)))
        super().__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave, and change it back."""
        super().__exit__(kind, error, trace)
        self._keys.close()

    def process_message(self, msg: dict) -> None:
        """Put the value in the place of the control."""
        if msg["type"] == "deterministic" and msg.get("_smcopt") in self.data:
            msg["value"] = self.data[msg["_smcopt"]]


# Part of the key of the caches of jit and of scan.
_cache_key: Any = jax.make_user_context(None)


def unkeyed(method: F) -> F:
    """Decorate what is right under any handler, so that `control` does not make it compile anew."""

    @wraps(method)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with _cache_key(None):
            return method(*args, **kwargs)

    return inner  # type: ignore[return-value]


def _hashable(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer):
        return object()  # unlike any other
    if callable(value):
        return value
    array = np.asarray(value)
    return array.shape, array.dtype.str, array.tobytes()
