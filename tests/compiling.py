# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""`jax.jit` for programs of tests, which are compiled for one call or a few."""

from functools import partial

import jax

from numpyro_smcopt.runs.compilation import compiler_options

compile_fast = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
"""For little data: takes a third of the time to compile."""

compile_tuned = partial(jax.jit, compiler_options=compiler_options())
"""For many replicates: compiled as the package compiles its own, in half of the time, and as fast afterwards."""
