# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What enters through `as_array`: the same words for every container, and no value that changes in silence."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_smcopt import SMCOptimizer, log_evidence
from numpyro_smcopt.potential import split_arguments

CONTAINERS = ["numpy", "list", "tuple", "pandas", "index", "nullable", "objects", "frame", "polars", "xarray"]


def contained(values, container):
    """The numbers in a container of each kind."""
    if container in ("list", "tuple"):
        return {"list": list, "tuple": tuple}[container](values)
    if container == "objects":
        return np.array(values, object)
    if container == "polars":
        return pytest.importorskip("polars").Series(values)
    if container == "xarray":
        return pytest.importorskip("xarray").DataArray(np.array(values))
    if container in ("pandas", "index", "nullable", "frame"):
        pandas = pytest.importorskip("pandas")
        if container == "nullable":
            return pandas.Series(values, dtype="Int64" if isinstance(values[0], int) else "Float64")
        return {"pandas": pandas.Series, "index": pandas.Index, "frame": pandas.DataFrame}[container](values)
    return np.array(values)


def enter(*args, **kwargs):
    return split_arguments(args, kwargs)[0]


every_container = pytest.mark.parametrize("container", CONTAINERS)


# -- numbers that would become others ----------------------------------------------------------------------------------
@every_container
@pytest.mark.parametrize("far", [2**31, -(2**31) - 1, 2**40])
def test_integers_beyond_32_bits_are_refused(container, far):
    with pytest.raises(ValueError, match=rf"kwargs\['group'\] has integers that do not fit.*{far} at .*2.*Number the"):
        enter(group=contained([0, 1, far], container))


@every_container
def test_timestamps_that_become_equal_are_refused(container):
    seconds = contained([1.7e9 + 1, 1.7e9 + 60], container)
    with pytest.raises(ValueError, match=r"args\[1\].* loses digits.*1700000001 to 1700000060.*Subtract the origin"):
        enter(0, seconds)


@every_container
def test_numbers_that_become_zero_are_refused(container):
    with pytest.raises(ValueError, match=r"args\[0\] has numbers that single precision takes for 0, such as 1e-42"):
        enter(contained([1e-42, 1e-50], container))


@every_container
def test_numbers_that_become_infinite_are_refused(container):
    with pytest.raises(ValueError, match=r"do not fit into single precision, such as 1e\+300 at .*1.*Rescale"):
        enter(contained([1.0, 1e300], container))


@every_container
def test_what_fits_passes_and_double_precision_takes_all(container):
    columns = [
        [0, 1, 2**31 - 1],
        [0.1, -3e38, 0.0 if container == "nullable" else np.nan],
        [1.7e9, 1.7e9 + 3e7, 1.6e9],
        [0.1 * 3, 0.3, 0.3],
    ]
    for values in columns:
        enter(contained(values, container))
    with jax.enable_x64(True):
        for values in ([0, 1, 2**40], [1.7e9 + 1, 1.7e9 + 60], [1e-42, 1e-50], [1.0, 1e300]):
            for array in enter(contained(values, container)):
                assert array.ndim == 0 or np.array_equal(np.ravel(array), values)


@pytest.mark.parametrize("number", [1e-50, 1e300])
def test_numbers_by_themselves(number):
    with pytest.raises(ValueError, match=r"kwargs\['rate'\].* single precision"):
        enter(rate=number)


def test_a_column_of_a_matrix():
    design = np.stack([np.ones(4), 1.7e9 + 20.0 * np.arange(4)], 1)
    with pytest.raises(ValueError, match=r"args\[0\] \(column 1\) loses digits"):
        enter(design)
    enter(design - [0, 1.7e9])


def test_complex_numbers():
    with pytest.raises(ValueError, match="do not fit into single precision"):
        enter(np.array([1j, 1e300j]))


def test_minutes_of_a_year_are_told():
    minutes = 1.7e9 + 60.0 * np.arange(525_600)[:200_000]
    with pytest.warns(UserWarning, match="of the distinct ones become equal.*Subtract the origin"):
        enter(minutes)


def test_tails_of_features_are_told():
    with pytest.warns(UserWarning, match="takes for 0, such as 1e-50 at row 1"):
        enter(np.array([1.0, 1e-50]))


def test_a_response_that_is_far_from_zero():
    y = 1e7 + 0.1 * np.random.default_rng(0).normal(size=50)
    with pytest.raises(ValueError, match=r"kwargs\['y'\] loses digits.*Subtract the origin"):
        log_evidence(lambda y: numpyro.sample("y", dist.Normal(1e7, 0.1), obs=y), y=y)


def test_many_doubles_are_not_told_of():
    rng = np.random.default_rng(0)
    for values in (rng.normal(size=200_000), rng.uniform(size=200_000), np.exp(5 * rng.normal(size=200_000))):
        enter(values)


# -- what is no number -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("container", ["nullable", "objects", "frame"])
def test_missing_values_among_objects(container):
    values = contained([1, 2, 3], container)
    if container == "frame":
        values = values.astype("Int64")
        values.iloc[1] = pytest.importorskip("pandas").NA
    else:
        values[1] = None
    with pytest.raises(TypeError, match=r"kwargs\['y'\] has a missing value at .*1.*handlers.mask"):
        enter(y=values)


def test_missing_values_of_polars():
    polars = pytest.importorskip("polars")
    with pytest.raises(TypeError, match=r"args\[0\] has a missing value at row 1"):
        enter(polars.Series([1, None, 3]))
    with pytest.raises(TypeError, match=r"args\[0\] has a missing value at element \[1, 0\]"):
        enter(polars.DataFrame({"a": [1, None, 3], "b": [1.0, 2.0, 3.0]}))


def test_masked_elements():
    with pytest.raises(TypeError, match=r"masked elements, the first at row 1.*handlers.mask"):
        enter(np.ma.array([1.0, 2.0, 3.0], mask=[0, 1, 0]))
    (kept,) = enter(np.ma.array([1.0, 2.0], mask=False))
    assert np.array_equal(kept, [1.0, 2.0])


@pytest.mark.parametrize("container", ["numpy", "pandas", "index", "objects", "polars", "xarray"])
def test_text(container):
    with pytest.raises(TypeError, match=r"args\[0\] is an array of dtype .*encode labels as integers"):
        enter(contained(["a", "b"], container))


def test_categories():
    pandas = pytest.importorskip("pandas")
    with pytest.raises(TypeError, match=r"kwargs\['group'\] is an array of dtype .*encode labels as integers"):
        enter(group=pandas.Series(["a", "b", "a"], dtype="category"))
    (codes,) = enter(group=pandas.Series(["a", "b", "a"], dtype="category").cat.codes)
    assert np.array_equal(codes, [0, 1, 0])


def test_containers_of_several_arrays():
    xarray = pytest.importorskip("xarray")
    with pytest.raises(TypeError, match=r"args\[0\] is a Dataset"):
        enter(xarray.Dataset({"y": ("rows", [1.0, 2.0])}))


def test_extended_precision():
    (array,) = enter(np.array([0.5, 2.0], np.longdouble))
    assert array.dtype == np.float32 and np.array_equal(array, [0.5, 2.0])


def test_dates():
    with pytest.raises(TypeError, match="datetime64.*times as numbers since the first"):
        enter(np.array(["2020-01-01", "2020-01-02"], "M8[D]"))


# -- where the door stands ---------------------------------------------------------------------------------------------
def simple(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", 3):
        numpyro.sample("y", dist.Normal(numpyro.sample("x", dist.Normal(mean, 1.0)), 1.0), obs=y)


@pytest.mark.parametrize("method", ["init", "run", "log_evidence"])
def test_every_method_has_the_same_door(method):
    optimizer, y = SMCOptimizer(simple), np.array([0, 1, 2**31])
    call = {
        "init": lambda: optimizer.init(random.key(0), y),
        "run": lambda: optimizer.run(random.key(0), 3, y=y),
        "log_evidence": lambda: log_evidence(simple, y, params={"mean": 0.0}),
    }[method]
    with pytest.raises(ValueError, match=r"Model argument .* has integers that do not fit into 32 bits"):
        call()


@pytest.mark.parametrize(
    ("value", "kind", "words"),
    [
        (1e300, ValueError, "do not fit into single precision"),
        (1e-50, ValueError, "takes for 0"),
        (np.array(2**40), ValueError, "do not fit into 32 bits"),
        (np.ma.masked_array(1.0, True), TypeError, "masked"),
        (np.array(None), TypeError, "missing value"),
        (1j, TypeError, "Give a constrained value"),
    ],
)
def test_starting_values(value, kind, words):
    with pytest.raises(kind, match=rf"init_params\['mean'\].*{words}"):
        SMCOptimizer(simple).init(random.key(0), np.zeros(3), init_params={"mean": value})
