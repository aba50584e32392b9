# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What all files share: a count of compilations, and a cache of compiled programs."""

import contextlib
import os
import shutil

import jax
import pytest

LARGEST_CACHE = 2**30  # bytes
_compiled: list[str] = []  # one entry per program that was compiled, or read from the cache, since the session began

jax.monitoring.register_event_duration_secs_listener(
    lambda event, duration, **rest: _compiled.append(event) if event.endswith("backend_compile_duration") else None
)


def pytest_configure(config):
    """Let all processes of this session, and of the next, share what they compile, in pytest's own cache."""
    if hasattr(config, "workerinput") or not hasattr(config, "cache") or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # a worker inherits the environment
    folder = config.cache.mkdir("compiled")
    if sum(path.stat().st_size for path in folder.iterdir()) > LARGEST_CACHE:
        shutil.rmtree(folder)
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.1,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    os.environ.update({name.upper(): str(value) for name, value in options.items()})
    for name, value in options.items():
        jax.config.update(name, value)


@pytest.fixture(scope="session")
def compilations():
    """A context manager that yields a list to which every compilation within it adds an entry."""

    @contextlib.contextmanager
    def counting():
        before, seen = len(_compiled), []
        yield seen
        seen.extend(_compiled[before:])

    return counting
