# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What is done now and then: the same as a `cond`, at no cost where it is not done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from numpyro_smcopt.branching import changed_if


@pytest.mark.parametrize("needed", [False, True])
def test_changes_what_needs_it(needed):
    value = {"x": jnp.arange(3.0), "n": jnp.asarray(2)}
    other = jnp.asarray([5.0, 6.0, 7.0])

    def change(value):
        return {"x": value["x"] + other, "n": value["n"] + 1}

    found = jax.jit(lambda needed, value: changed_if(needed, change, value))(jnp.asarray(needed), value)
    expected = change(value) if needed else value
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_maps_over_both():
    found = jax.vmap(lambda needed, x: changed_if(needed, lambda x: -x, x))(jnp.array([True, False]), jnp.ones(2))
    np.testing.assert_array_equal(found, [-1.0, 1.0])
