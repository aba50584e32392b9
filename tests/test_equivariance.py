# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What must change nothing: the order of rows, labels of groups, units of covariates, names of sites, and which of two
equivalent parametrisations is written.

The whole report is compared: estimates, standard errors, intervals, log evidence, criteria and warnings.
"""

import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints

from numpyro_smcopt import SMCOptimizer
from numpyro_smcopt.reporting.coordinates import ravel

NUM_ROWS, NUM_GROUPS = 72, 8
positive, param = constraints.positive, numpyro.param


def linear(x, group, y):
    a, b = param("a", 0.0), param("b", 0.0)
    sigma = param("sigma", 1.0, constraint=positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(a + b * x, sigma), obs=y)


def linear_renamed(x, group, y):
    """A precision for the noise."""
    first, precision = param("first", 0.0), param("precision", 1.0, constraint=positive)
    b = param("slope", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("response", dist.Normal(first + b * x, precision**-0.5), obs=y)


def counts(x, group, y):
    a, b = param("a", 0.0), param("b", 0.0)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Poisson(jnp.exp(a + b * x)), obs=y)


def counts_renamed(x, group, y):
    base, slope = param("base", 1.0, constraint=positive), param("slope", 0.0)
    with numpyro.plate("data", len(y)):
        numpyro.sample("response", dist.Poisson(base * jnp.exp(slope * x)), obs=y)


def groups_apart(x, group, y):
    """A mean for each group, and one slope."""
    level, b = param("level", jnp.zeros(NUM_GROUPS)), param("b", 0.0)
    sigma = param("sigma", 1.0, constraint=positive)
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(level[group] + b * x, sigma), obs=y)


def groups_apart_renamed(x, group, y):
    """A dictionary of parameters, and a variance."""
    all_of_it = param("line", {"levels": jnp.zeros(NUM_GROUPS), "slope": 0.0})
    variance = param("variance", 1.0, constraint=positive)
    with numpyro.plate("data", len(y)):
        mean = all_of_it["levels"][group] + all_of_it["slope"] * x
        numpyro.sample("response", dist.Normal(mean, variance**0.5), obs=y)


def mixed(x, group, y):
    a, b = param("a", 0.0), param("b", 0.0)
    sd, sigma = param("sd", 1.0, constraint=positive), param("sigma", 1.0, constraint=positive)
    with numpyro.plate("groups", NUM_GROUPS):
        u = numpyro.sample("u", dist.Normal(a, sd))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Normal(u[group] + b * x, sigma), obs=y)


def mixed_renamed(x, group, y):
    """The group effects standardised, and a precision."""
    b, a = param("slope", 0.0), param("zero", 0.0)
    scale, precision = param("scale", 1.0, constraint=positive), param("precision", 1.0, constraint=positive)
    with numpyro.plate("units", NUM_GROUPS):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        numpyro.sample("response", dist.Normal(a + scale * z[group] + b * x, precision**-0.5), obs=y)


def mixed_binary(x, group, y):
    a, b, sd = param("a", 0.0), param("b", 0.0), param("sd", 1.0, constraint=positive)
    with numpyro.plate("groups", NUM_GROUPS):
        u = numpyro.sample("u", dist.Normal(0.0, sd))
    with numpyro.plate("rows", len(y)):
        numpyro.sample("y", dist.Bernoulli(logits=a + u[group] + b * x), obs=y)


def mixed_binary_renamed(x, group, y):
    slope, odds = param("slope", 0.0), param("odds", 1.0, constraint=positive)
    variance = param("variance", 1.0, constraint=positive)
    with numpyro.plate("units", NUM_GROUPS):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
    with numpyro.plate("data", len(y)):
        probs_logits = jnp.log(odds) + variance**0.5 * z[group] + slope * x
        numpyro.sample("response", dist.BinomialLogits(probs_logits, 1), obs=y)


def root(v):
    return v**-0.5


# Model, the same otherwise written, and for each number of the first: name in the second, and the way back.
SAME = {
    "linear": (linear, linear_renamed, {"a": ("first", None), "b": ("slope", None), "sigma": ("precision", root)}),
    "counts": (counts, counts_renamed, {"a": ("base", np.log), "b": ("slope", None)}),
    "groups apart": (
        groups_apart,
        groups_apart_renamed,
        {"b": ("line.slope", None), "level[3]": ("line.levels[3]", None), "sigma": ("variance", np.sqrt)},
    ),
    "mixed": (
        mixed,
        mixed_renamed,
        {"a": ("zero", None), "b": ("slope", None), "sd": ("scale", None), "sigma": ("precision", root)},
    ),
    "mixed binary": (
        mixed_binary,
        mixed_binary_renamed,
        {"a": ("odds", np.log), "b": ("slope", None), "sd": ("variance", np.sqrt)},
    ),
}


def data_of(name):
    rng = np.random.default_rng(3)
    group = np.repeat(np.arange(NUM_GROUPS), NUM_ROWS // NUM_GROUPS)
    x = rng.normal(size=NUM_ROWS) + 0.5
    u = rng.normal(size=NUM_GROUPS)
    mean = 0.4 + 0.7 * x + 1.2 * u[group] * (name not in ("linear", "counts"))
    if name == "counts":
        return x, group, rng.poisson(np.exp(mean - 0.5)).astype(float)
    if "binary" in name:
        return x, group, (rng.uniform(size=NUM_ROWS) < 1 / (1 + np.exp(-mean))).astype(float)
    return x, group, mean + 0.6 * rng.normal(size=NUM_ROWS)


def report_of(optimizer, x, group, y):
    data = np.asarray(x, np.float32), group, np.asarray(y, np.float32)
    result = optimizer.run(random.key(0), 150, *data, progress_bar=False)
    return optimizer.summarize(random.key(1), result.state)


@pytest.fixture(scope="module", params=SAME)
def fitted(request):
    model, _, _ = SAME[request.param]
    optimizer = SMCOptimizer(model)
    return request.param, optimizer, report_of(optimizer, *data_of(request.param))


def numbers(report):
    """[Q] estimates, standard errors and Monte Carlo errors by name, and [Q, 2] intervals."""
    columns = ravel(report.params), ravel(report.standard_errors), ravel(report.mc_errors)
    return dict(zip(report.names, zip(*columns, ravel(report.confidence_intervals(), 2), strict=True), strict=True))


def assert_same(one, other, same=None, units=None):
    """The second report says the same as the first, by the names of the first.

    Args:
        one: A report.
        other: Another.
        same: By name, the name in the other and the way back to the number of the first; by default the same names.
        units: By name, what a number of the other is multiplied with.
    """
    a, b = numbers(one), numbers(other)
    for name, (there, back) in (same or {name: (name, None) for name in a}).items():
        unit, back = (units or {}).get(name, 1.0), back or (lambda v: v)
        value, error, blur, ends = a[name]
        low, high = sorted(back(unit * np.asarray(b[there][3])))
        changed = abs(back(unit * b[there][0] * 1.001) - back(unit * b[there][0])) / abs(0.001 * b[there][0])
        other_blur, other_error = changed * b[there][2], changed * b[there][1]
        noise = 3 * np.hypot(blur, other_blur) + 0.01 * error
        assert abs(back(unit * b[there][0]) - value) <= noise, name
        assert other_error == pytest.approx(error, rel=0.03), name
        np.testing.assert_allclose([low, high], ends, atol=2 * noise + 0.03 * error, err_msg=name)
    error = np.hypot(one.log_evidence_std, other.log_evidence_std)
    assert other.log_evidence == pytest.approx(one.log_evidence, abs=4 * error + 2e-3)
    assert (other.num_parameters, other.num_observations) == (one.num_parameters, one.num_observations)
    assert [note[:25] for note in other.warnings] == [note[:25] for note in one.warnings]


def test_order_of_rows(fitted):
    name, optimizer, report = fitted
    order = np.random.default_rng(0).permutation(NUM_ROWS)
    assert_same(report, report_of(optimizer, *(v[order] for v in data_of(name))))


def test_labels_of_groups(fitted):
    name, optimizer, report = fitted
    labels = np.random.default_rng(1).permutation(NUM_GROUPS)
    x, group, y = data_of(name)
    moved = {f"level[{g}]": (f"level[{labels[g]}]", None) for g in range(NUM_GROUPS)}
    same = {key: moved.get(key, (key, None)) for key in report.names}
    assert_same(report, report_of(optimizer, x, labels[group], y), same)


@pytest.mark.parametrize("unit", [1e7, 1e-7])
def test_units_of_covariates(fitted, unit):
    name, optimizer, report = fitted
    x, group, y = data_of(name)
    assert_same(report, report_of(optimizer, unit * x, group, y), units={"b": unit})


def test_names_of_sites_and_parametrisation(fitted):
    name, _, report = fitted
    _, otherwise, same = SAME[name]
    assert_same(report, report_of(SMCOptimizer(otherwise), *data_of(name)), same)
