# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Labels that point beyond their groups are refused by name, unless the rows are masked or the model means them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.potential import join_arguments, make_target, split_arguments

Y = np.array([0.5, -1.0, 2.0, 0.1, 0.4, -0.2], np.float32)
GROUP = np.array([0, 0, 1, 1, 2, 2])


def check(model, *args, **kwargs):
    make_target(model, *join_arguments(*split_arguments(args, kwargs))).refuse_wrong_indices()


def effects(rows):
    """A model whose rows take ``rows(b, group, y)`` of three group effects and one fixed effect each."""

    def model(group, y):
        mean = numpyro.param("mean", jnp.zeros(3))
        with numpyro.plate("groups", 3):
            b = numpyro.sample("b", dist.Normal(mean, 1.0))
        with numpyro.plate("rows", 6):
            rows(b, group, y)

    return model


def observe(mean, y):
    numpyro.sample("y", dist.Normal(mean, 1.0), obs=y)


WAYS = {
    "index": lambda b, group, y: observe(b[group], y),
    "take": lambda b, group, y: observe(jnp.take(b, group), y),
    "at": lambda b, group, y: observe(b.at[group].get(), y),
    "vmap": lambda b, group, y: observe(jax.vmap(lambda k: b[k])(group), y),
    "matrix": lambda b, group, y: observe(jnp.stack([b, b], 1)[group, 1], y),
    "rows of a matrix": lambda b, group, y: observe(jnp.stack([b, b], 1)[group][:, 0], y),
    "column": lambda b, group, y: observe(b[group[:, None]][:, 0], y),
    "reversed": lambda b, group, y: observe(b[group[::-1]], y),
    "cast": lambda b, group, y: observe(b[group.astype(jnp.int8)], y),
    "jit": lambda b, group, y: observe(jax.jit(lambda b, k: b[k])(b, group), y),
}
every_way = pytest.mark.parametrize("rows", WAYS.values(), ids=WAYS)


@every_way
def test_labels_within_the_groups_pass(rows):
    check(effects(rows), GROUP, Y)


@every_way
@pytest.mark.parametrize("dtype", ["i4", "u1", "i8"])
def test_a_label_one_too_large(rows, dtype):
    group = GROUP.astype(dtype)
    group[4] = 3
    with pytest.raises(ValueError, match=r"args\[0\], element 4, holds 3, .* axis of 'b' of length 3: indices count"):
        check(effects(rows), group, Y)


@every_way
def test_a_missing_label_coded_minus_one(rows):
    group = GROUP.copy()
    group[3] = -1
    with pytest.raises(ValueError, match=r"kwargs\['group'\], element 3, holds -1, .*'b' of length 3: negative.*mask"):
        check(effects(rows), group=group, y=Y)


def test_labels_that_count_from_one():
    with pytest.raises(ValueError, match=r"element 4, holds 3, .*Do the labels start at 1\? Subtract 1"):
        check(effects(WAYS["index"]), GROUP + 1, Y)
    check(effects(lambda b, group, y: observe(b[group - 1], y)), GROUP + 1, Y)


def test_labels_that_count_from_zero_where_the_model_subtracts_one():
    model = effects(lambda b, group, y: observe(b[group - 1], y))
    with pytest.raises(ValueError, match=r"args\[0\], element 0, holds -1"):
        check(model, GROUP, Y)
    with pytest.raises(ValueError, match=r"args\[0\], element 0, holds 255"):
        check(model, GROUP.astype("u1"), Y)


def test_labels_with_nan_that_the_model_makes_integers():
    group = np.where(np.arange(6) == 2, np.nan, GROUP).astype("f4")
    with pytest.raises(ValueError, match=r"args\[0\], element 2, holds -2147483648"):
        check(effects(lambda b, group, y: observe(b[group.astype(int)], y)), group, Y)


def test_the_categories_of_a_column():
    pandas = pytest.importorskip("pandas")
    codes = pandas.Series(["a", "b", None, "a", "c", "c"], dtype="category").cat.codes
    with pytest.raises(ValueError, match=r"args\[0\], element 2, holds -1"):
        check(effects(WAYS["index"]), codes, Y)


@pytest.mark.parametrize("kind", [list, tuple])
def test_labels_in_a_list(kind):
    rows = effects(lambda b, group, y: observe(b[jnp.array(group)], y))
    check(rows, kind([0, 0, 1, 1, 2, 2]), Y)
    for bad in (-1, 3):
        with pytest.raises(ValueError, match=rf"args\[0\], element 3, holds {bad}, .*'b' of length 3"):
            check(rows, kind([0, 0, 1, bad, 2, 2]), Y)


def test_two_levels_of_labels():
    def model(school_of_class, class_of_row, y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("schools", 2):
            b = numpyro.sample("b", dist.Normal(mean, 1.0))
        with numpyro.plate("classes", 3):
            c = numpyro.sample("c", dist.Normal(b[school_of_class], 1.0))
        with numpyro.plate("rows", 6):
            observe(c[class_of_row], y)

    check(model, np.array([0, 0, 1]), GROUP, Y)
    with pytest.raises(ValueError, match=r"args\[0\], element 2, holds 2, .*'b' of length 2"):
        check(model, np.array([0, 0, 2]), GROUP, Y)
    with pytest.raises(ValueError, match=r"args\[1\], element 0, holds -3, .*'c' of length 3"):
        check(model, np.array([0, 0, 1]), np.array([-3, 0, 1, 1, 2, 2]), Y)


def test_sums_by_label():
    def model(group, y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("rows", 6):
            x = numpyro.sample("x", dist.Normal(mean, 1.0))
        with numpyro.plate("groups", 3):
            observe(jnp.zeros(3).at[group].add(x), y[:3])

    check(model, GROUP, Y)
    check(model, np.array([0, 0, 1, 1, 2, 3]), Y)  # JAX leaves it out, and says so
    with pytest.raises(ValueError, match=r"args\[0\], element 5, holds -1, .*length 3"):
        check(model, np.array([0, 0, 1, 1, 2, -1]), Y)


def test_a_table_of_parameters():
    def model(level, y):
        effect = numpyro.param("effect", jnp.zeros(3))
        with numpyro.plate("rows", 6):
            observe(effect[level], y)

    with pytest.raises(ValueError, match=r"element 5, holds 7, .*'effect' of length 3"):
        check(model, np.array([0, 1, 2, 0, 1, 7]), Y)


def test_what_a_model_says_itself_is_meant():
    def rows(b, group, y):
        observe(b[group] + b[-1] + b[jnp.array([0, -1, 1, -2, 2, -3])] + b[::-1][group] + jnp.roll(b, 1)[group], y)

    check(effects(rows), GROUP, Y)
    clipped = np.array([0, 0, 1, 1, 2, 9])
    check(effects(lambda b, group, y: observe(b.at[group].get(mode="clip"), y)), clipped, Y)
    check(effects(lambda b, group, y: observe(b[jnp.clip(group, 0, 2)], y)), clipped, Y)
    check(effects(lambda b, group, y: observe(b[group % 3], y)), clipped, Y)
    filled = effects(lambda b, group, y: observe(b.at[group].get(mode="fill", fill_value=0.0), y))
    check(filled, clipped, Y)


@pytest.mark.parametrize("pad", [-1, 3])
@pytest.mark.parametrize("how", ["mask", "where", "factor", "mask of the label"])
def test_padded_rows_that_are_masked_pass(pad, how):
    def rows(b, group, y):
        used = jnp.arange(6) < 4
        if how == "mask of the label":
            used = (group >= 0) & (group < 3)
        if how == "where":
            numpyro.factor("y", jnp.where(used, dist.Normal(b[group], 1.0).log_prob(y), 0.0))
        elif how == "factor":
            numpyro.factor("y", dist.Normal(b[group], 1.0).log_prob(y) * used)
        else:
            with handlers.mask(mask=used):
                observe(b[group], y)

    check(effects(rows), np.array([0, 0, 1, 1, pad, pad]), Y)
    with pytest.raises(ValueError, match=f"element 2, holds {pad}"):
        check(effects(lambda b, group, y: observe(b[group], y)), np.array([0, 0, pad, 1, 2, 2]), Y)


def test_labels_that_are_bound_into_the_model():
    def model(y, group):
        return effects(WAYS["index"])(group, y)

    bound = functools.partial(model, group=jnp.array([0, 0, 1, 1, 2, 3]))
    with pytest.raises(ValueError, match="bound into the model holds 3, .*'b' of length 3"):
        check(bound, Y)


def test_labels_along_a_scan_are_told():
    def model(group, y):
        mean = numpyro.param("mean", jnp.zeros(3))
        with numpyro.plate("groups", 3):
            b = numpyro.sample("b", dist.Normal(mean, 1.0))

        def step(level, row):
            k, y = row
            level = numpyro.sample("level", dist.Normal(level, 1.0))
            numpyro.sample("y", dist.Normal(level + b[k], 1.0), obs=y)
            return level, None

        scan(step, 0.0, (group, y))

    check(model, GROUP, Y)
    with pytest.warns(UserWarning, match=r"args\[0\], element 3, holds -1, .*'b' of length 3.*In a scan"):
        check(model, np.array([0, 0, 1, -1, 2, 2]), Y)


def test_other_data_for_a_state():
    optimizer = SMCOptimizer(effects(WAYS["index"]))
    state = optimizer.init(random.key(0), GROUP, Y)
    with pytest.raises(ValueError, match=r"args\[0\], element 5, holds 3"):
        optimizer.run(random.key(0), 3, np.array([0, 0, 1, 1, 2, 3]), Y, init_state=state, progress_bar=False)


def test_arrays_of_any_size_are_followed_at_no_cost_below_jit():
    model = effects(WAYS["index"])

    @jax.jit
    def below(group, y):
        make_target(model, (group, y), {}).refuse_wrong_indices()
        return y

    assert np.array_equal(below(GROUP, Y), Y)
