# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Fixtures that several files share."""

import contextlib

import jax
import pytest

_compiled: list[str] = []  # one entry per program that XLA compiled since the session began

jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **rest: _compiled.append(event) if event.endswith("backend_compile_duration") else None
)


@pytest.fixture(scope="session")
def compilations():
    """A context manager that yields a list to which every compilation within it adds an entry."""

    @contextlib.contextmanager
    def counting():
        before, seen = len(_compiled), []
        yield seen
        seen.extend(_compiled[before:])

    return counting
