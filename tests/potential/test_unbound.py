# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Latents that nothing binds, or that are bound in another way, against closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.contrib.control_flow import scan
from numpyro.distributions import constraints
from numpyro.infer.reparam import CircularReparam
from scipy import special, stats

from numpyro_smcopt import SMCOptimizer, log_evidence
from numpyro_smcopt.potential import make_target

RNG = np.random.default_rng(0)
X = np.linspace(-1, 1, 12).astype(np.float32)
Y = (0.5 + 1.5 * X + 0.6 * RNG.normal(size=12)).astype(np.float32)
SEEN = np.array([1, 1, 0, 1, 0, 1, 1, 1, 0, 1, 0, 1], bool)


def agrees(model, exact, *args, params=None, **kwargs):
    """The evidence is right within five of its stated deviations."""
    found = log_evidence(model, *args, params=params, num_particles=3072, **kwargs)
    assert abs(found.log_evidence - exact) < 5 * found.log_evidence_std + 2e-4, (found.log_evidence, exact)
    assert found.log_evidence_std < 0.05
    return found


# -- missing outcomes --------------------------------------------------------------------------------------------------
def regression(x, y, seen):
    intercept = numpyro.param("intercept", 0.0)
    slope = numpyro.param("slope", 0.0)
    sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
    with numpyro.plate("rows", len(x)):
        numpyro.sample("y", dist.Normal(intercept + slope * x, sd), obs=y, obs_mask=seen)


def test_missing_outcomes_cost_no_evidence_and_are_no_observations():
    design = np.stack([np.ones(8), X[SEEN]], 1)
    (intercept, slope), rss, *_ = np.linalg.lstsq(design, Y[SEEN], rcond=None)
    sd = np.sqrt(rss[0] / 8)
    exact = stats.norm(0, sd).logpdf(Y[SEEN] - intercept - slope * X[SEEN]).sum()
    optimizer, data = SMCOptimizer(regression), (X, Y, SEEN)
    start = {"intercept": intercept, "slope": slope, "sd": sd}
    agrees(regression, exact, *data, params=start)
    result = optimizer.run(random.key(0), 200, *data, init_params=start, progress_bar=False)
    assert np.allclose([result.params["slope"], result.params["sd"]], [slope, sd], atol=0.02)
    assert np.mean(result.diagnostics["ess"][20:]) > 0.9
    report = optimizer.summarize(random.key(1), result.state, *data)
    assert report.num_observations == 8
    assert abs(report.log_evidence - exact) < 5 * report.log_evidence_std + 2e-3
    # Imputed values follow the regression, and values behind the mask their own rows.
    samples = optimizer.get_samples(result.state, *data, rng_key=random.key(2), num_samples=4000)
    assert np.array_equal(samples["y"][0][SEEN], Y[SEEN])
    line = result.params["intercept"] + result.params["slope"] * X
    residuals = (samples["y_unobserved"] - line) / result.params["sd"]
    assert np.all(abs(residuals.mean(0)) < 0.15) and np.all(abs(residuals.std(0) - 1) < 0.15)


@pytest.mark.parametrize("kind", ["Bernoulli", "Poisson"])
def test_missing_counts(kind):
    pytest.importorskip("funsor")

    def model(y, seen):
        mean = numpyro.param("mean", 0.0)
        b = numpyro.sample("b", dist.Normal(mean, 1.0))
        fn = dist.Bernoulli(logits=b) if kind == "Bernoulli" else dist.Poisson(jnp.exp(b))
        with numpyro.plate("rows", 4):
            numpyro.sample("y", fn, obs=y, obs_mask=seen)

    y, seen = np.array([1.0, 0.0, 0.0, 1.0], np.float32), np.array([True, True, False, True])
    if kind == "Poisson":
        with pytest.raises(ValueError, match=r"'y_unobserved' is discrete.*Rows without an outcome \(obs_mask\)"):
            make_target(model, (y, seen), {})
        return
    b = np.linspace(-9, 9, 4001)
    each = special.expit(b) ** 2 * special.expit(-b) * stats.norm(0.4, 1).pdf(b)
    agrees(model, np.log(np.trapezoid(each, b)), y, seen, params={"mean": 0.4})
    target = make_target(model, (y, seen), {})
    assert jax.jit(target.count_observations)({"mean": jnp.float32(0.4)}) == 3


def test_what_is_observed_takes_no_part_in_anything():
    target = make_target(regression, (X, Y, SEEN), {})
    theta = {"intercept": jnp.float32(0.3), "slope": jnp.float32(-1.0), "sd": jnp.float32(0.7)}
    x = random.normal(random.key(0), (12,))
    (beside,) = jax.jit(target.beside)(theta).values()
    assert np.array_equal(beside, SEEN)
    prior = jnp.asarray(target.sites.prior_mask)
    terms = jax.jit(lambda theta: jnp.where(prior, target.terms(theta, x), 0.0)[prior])
    moved = jax.tree.map(lambda v: v + 0.5, theta)
    assert np.array_equal(terms(theta)[SEEN], terms(moved)[SEEN])
    np.testing.assert_allclose(terms(theta)[SEEN], -stats.norm.logpdf(x[SEEN]), rtol=1e-5)
    assert target.sites.num_observations is None
    assert jax.jit(target.count_observations)(theta) == 8


# -- padding -----------------------------------------------------------------------------------------------------------
LENGTHS = np.array([4, 2, 1, 3])
INSIDE = np.arange(4) < LENGTHS[:, None]
RAGGED = np.where(INSIDE, 1 + RNG.normal(size=(4, 1)) + RNG.normal(size=(4, 4)), 1e3).astype(np.float32)


def ragged(y, inside):
    """Groups and rows with effects of their own, padded to the longest; 16 of 26 elements are no padding."""
    mean = numpyro.param("mean", 1.0)
    with numpyro.plate("groups", 4, dim=-2):
        b = numpyro.sample("b", dist.Normal(mean, 1.2))
        with numpyro.plate("rows", 4, dim=-1), handlers.mask(mask=inside):
            u = numpyro.sample("u", dist.Normal(b, 0.5))
            numpyro.sample("y", dist.Normal(u, 0.8), obs=y)


def exact_ragged(mean):
    total = 0.0
    for row, n in zip(RAGGED, LENGTHS, strict=True):
        covariance = 1.2**2 * np.ones((n, n)) + (0.5**2 + 0.8**2) * np.eye(n)
        total += stats.multivariate_normal(np.full(n, mean), covariance).logpdf(row[:n])
    return total


def test_padding_of_ragged_groups():
    agrees(ragged, exact_ragged(0.7), RAGGED, INSIDE, params={"mean": 0.7})
    target = make_target(ragged, (RAGGED, INSIDE), {})
    assert jax.jit(target.count_observations)({"mean": jnp.float32(0.7)}) == 10


@pytest.mark.parametrize(
    "fn",
    [
        dist.Gamma(2.0, 3.0).expand([4]),
        dist.Beta(2.0, 3.0).expand([4]),
        dist.MultivariateNormal(jnp.ones(2), jnp.eye(2)).expand([4]),
        dist.Dirichlet(jnp.array([2.0, 1.0, 3.0])).expand([4]),
        dist.LogNormal(0.0, 1.0).expand([4, 2]).to_event(1),
        dist.VonMises(1.0, 2.0).expand([4]),
    ],
    ids=["gamma", "beta", "normals", "dirichlet", "log-normals", "angle"],
)
def test_masked_elements_of_any_support_are_standard_normal(fn):
    mask = np.array([True, False, True, False])

    def model(mask):
        shift = numpyro.param("shift", 0.0)
        with numpyro.plate("groups", 4), handlers.mask(mask=mask):
            numpyro.sample("x", fn)
        numpyro.sample("y", dist.Normal(shift, 1.0), obs=0.0)

    target = make_target(model, (mask,), {})
    theta = {"shift": jnp.float32(0.0)}
    (beside,) = jax.jit(target.beside)(theta).values()
    x = random.normal(random.key(1), beside.shape)
    energy = jax.jit(lambda x: target.terms(theta, x).sum())
    # Two particles that differ in what is masked only differ by standard normal densities.
    other = jnp.where(beside, -0.3 * x + 0.1, x)
    found, expected = energy(other) - energy(x), -(stats.norm.logpdf(other) - stats.norm.logpdf(x)).sum()
    assert abs(found - expected) < 1e-4
    # What is drawn of the prior and what is reported follow both.
    drawn = jax.jit(jax.vmap(lambda key: target.draw_prior(key, theta)))(random.split(random.key(2), 4000))
    assert np.all(abs(drawn[:, beside].mean(0)) < 0.1) and np.all(abs(drawn[:, beside].std(0) - 1) < 0.1)
    shown = jax.jit(jax.vmap(lambda x: target.constrain_latents(theta, x)["x"]))(drawn)
    pairs = [(np.ravel(shown[:, 0]), np.ravel(shown[:, 1])), (np.ravel(shown[:, 2]), np.ravel(shown[:, 3]))]
    for bound, behind in pairs:
        assert stats.ks_2samp(bound, behind).pvalue > 1e-3


def test_elements_of_a_vector_are_masked_one_by_one():
    def model(y, used):
        mean = numpyro.param("mean", 0.5)
        b = numpyro.sample("b", dist.LogNormal(mean, 1.0).expand([3]).mask(used).to_event(1))
        numpyro.sample("y", dist.Normal(jnp.log(b), 1.0).mask(used).to_event(1), obs=y)

    used = np.array([True, False, True])
    exact = stats.norm(0.5, np.sqrt(2)).logpdf(Y[:3][used]).sum()
    agrees(model, exact, Y[:3], used, params={"mean": 0.5})


@pytest.mark.parametrize("level", ["real", "positive"])
def test_series_of_unequal_length(level):
    """A random walk, or its exponential, of two series, of which the second ends early."""

    def model(y, inside):
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive)

        def step(before, now):
            y, inside = now
            with numpyro.plate("series", 2), handlers.mask(mask=inside):
                fn = dist.Normal(before, sd) if level == "real" else dist.LogNormal(before, sd)
                drawn = numpyro.sample("level", fn)
                height = drawn if level == "real" else jnp.log(drawn)
                numpyro.sample("y", dist.Normal(height, 0.5), obs=y)
            return jnp.where(inside, height, before), None

        scan(step, jnp.zeros(2), (y, inside))

    y, inside = Y[:6].reshape(3, 2), np.array([[True, True], [True, False], [True, False]])
    times = np.arange(1, 4)
    covariance = 0.8**2 * np.minimum(times[:, None], times) + 0.5**2 * np.eye(3)
    exact = stats.multivariate_normal(np.zeros(3), covariance).logpdf(y[:, 0])
    exact += stats.norm(0, np.hypot(0.8, 0.5)).logpdf(y[0, 1])
    agrees(model, exact, y, inside, params={"sd": 0.8})


def test_a_group_that_is_left_out_by_its_mask():
    def model(y, used):
        mean = numpyro.param("mean", 0.5)
        with numpyro.plate("groups", 3), handlers.mask(mask=used):
            b = numpyro.sample("b", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(b, 1.0), obs=y)

    y = np.array([0.3, np.nan, 1.8], np.float32)
    used = np.array([True, False, True])
    exact = stats.norm(0.5, np.sqrt(2)).logpdf(y[used]).sum()
    agrees(model, exact, y, used, params={"mean": 0.5})


def test_discrete_latents_behind_a_mask_cost_no_evidence():
    pytest.importorskip("funsor")

    def model(y, used):
        shift = numpyro.param("shift", 2.0)
        b = numpyro.sample("b", dist.Normal(0.0, 1.0))
        with numpyro.plate("rows", len(y)), handlers.mask(mask=used):
            z = numpyro.sample("z", dist.Categorical(jnp.array([0.2, 0.3, 0.5])))
            numpyro.sample("y", dist.Normal(b + shift * z, 1.0), obs=y)

    y, used = np.array([0.3, 50.0, 2.8, -50.0], np.float32), np.array([True, False, True, False])
    b = np.linspace(-8, 8, 4001)[:, None]
    each = np.log(sum(p * stats.norm(b + 2 * k, 1).pdf(y[used]) for k, p in enumerate([0.2, 0.3, 0.5])))
    exact = np.log(np.trapezoid(np.exp(each.sum(1)) * stats.norm.pdf(b[:, 0]), b[:, 0]))
    agrees(model, exact, y, used, params={"shift": 2.0})


def test_a_latent_whose_mask_its_observations_do_not_share():
    def model(y, used):
        mean = numpyro.param("mean", 0.5)
        with numpyro.plate("groups", 3):
            with handlers.mask(mask=used):
                b = numpyro.sample("b", dist.Normal(mean, 1.0))
            numpyro.sample("y", dist.Normal(b, 1.0), obs=y)

    with pytest.raises(ValueError, match="Latent site 'b' is masked where site 'y' depends on it.*Mask the observ"):
        SMCOptimizer(model).init(random.key(0), Y[:3], np.array([True, False, True]))


# -- weights -----------------------------------------------------------------------------------------------------------
COUNTS = np.array([3.0, 1.0, 2.0], np.float32)


def weighted(y, counts, around):
    mean = numpyro.param("mean", 0.5)
    with numpyro.plate("groups", 3):
        if around == "group":
            with handlers.scale(scale=counts):
                b = numpyro.sample("b", dist.Normal(mean, 1.0))
                numpyro.sample("y", dist.Normal(b, 1.0), obs=y)
        else:
            b = numpyro.sample("b", dist.Normal(mean, 1.0))
            with handlers.scale(scale=counts):
                numpyro.sample("y", dist.Normal(b, 1.0), obs=y)


def test_weights_around_a_latent_are_refused():
    with pytest.raises(ValueError, match="Latent site 'b' stands under numpyro.handlers.scale.*Repeat the group"):
        make_target(weighted, (Y[:3], COUNTS, "group"), {})


def test_weights_around_observations_are_rows_that_occur_often():
    exact = sum(
        stats.multivariate_normal(np.full(n, 0.2), np.ones((n, n)) + np.eye(n)).logpdf(np.full(n, y))
        for n, y in zip([3, 1, 2], Y[:3], strict=True)
    )
    agrees(weighted, exact, Y[:3], COUNTS, "rows", params={"mean": 0.2})
    target = make_target(weighted, (Y[:3], COUNTS, "rows"), {})
    assert jax.jit(target.count_observations)({"mean": jnp.float32(0.2)}) == 6


def test_a_fixed_subset_counts_for_all():
    def model(y):
        mean = numpyro.param("mean", 0.5)
        with numpyro.plate("rows", 12, subsample_size=3) as index:
            numpyro.sample("y", dist.Normal(mean, 1.0), obs=y[index])

    target = make_target(handlers.substitute(model, data={"rows": jnp.array([0, 5, 7])}), (Y,), {})
    assert jax.jit(target.count_observations)({"mean": jnp.float32(0.2)}) == 12


# -- angles ------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(("centre", "y"), [(0.3, 0.8), (3.0, -2.9), (np.pi, 0.1)])
@pytest.mark.parametrize("plates", [False, True])
def test_angles_after_circular_reparam(centre, y, plates):
    def model(y):
        centre = numpyro.param("centre", 0.0)
        with numpyro.plate("rows", len(y)) if plates else handlers.block(hide=[]):
            with handlers.reparam(config={"angle": CircularReparam()}):
                angle = numpyro.sample("angle", dist.VonMises(centre, 2.0))
            numpyro.sample("y", dist.VonMises(angle, 3.0), obs=y)

    together = np.sqrt(2**2 + 3**2 + 2 * 2 * 3 * np.cos(y - centre))
    one = np.log(special.i0(together) / (2 * np.pi * special.i0(2) * special.i0(3)))
    agrees(model, (2 if plates else 1) * one, np.full(2 if plates else 1, y), params={"centre": centre})


def test_angles_without_reparam():
    def model(y):
        centre = numpyro.param("centre", 0.0)
        numpyro.sample("y", dist.VonMises(numpyro.sample("angle", dist.VonMises(centre, 2.0)), 3.0), obs=y)

    together = np.sqrt(2**2 + 3**2 + 2 * 2 * 3 * np.cos(0.5))
    exact = np.log(special.i0(together) / (2 * np.pi * special.i0(2) * special.i0(3)))
    agrees(model, exact, 0.8, params={"centre": 0.3})


# -- improper priors, and sums that are zero ---------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["improper", "masked"])
def test_a_flat_prior_that_the_data_bind(kind):
    def model(y):
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
        flat = dist.ImproperUniform(constraints.real, (), ()) if kind == "improper" else dist.Normal(0, 1).mask(False)
        mean = numpyro.sample("mean", flat)
        with numpyro.plate("rows", len(y)):
            numpyro.sample("y", dist.Normal(mean, sd), obs=y)

    n, square = len(Y), np.sum((Y - Y.mean()) ** 2)
    exact = -0.5 * (n - 1) * np.log(2 * np.pi * 0.7**2) - 0.5 * np.log(n) - 0.5 * square / 0.7**2
    agrees(model, exact, Y, params={"sd": 0.7})


@pytest.mark.parametrize("kind", ["improper", "masked"])
def test_a_flat_prior_that_nothing_binds(kind):
    def model(y):
        mean = numpyro.param("mean", 0.0)
        flat = dist.ImproperUniform(constraints.real, (), ()) if kind == "improper" else dist.Normal(0, 1).mask(False)
        with numpyro.plate("groups", 3):
            b = numpyro.sample("b", flat)
        with numpyro.plate("rows", 2):
            numpyro.sample("y", dist.Normal(mean + b[:2], 1.0), obs=y)

    with pytest.raises(ValueError, match="'b' has an improper prior, and nothing depends on its element 2"):
        SMCOptimizer(model).init(random.key(0), Y[:2])


def test_effects_that_sum_to_zero():
    def model(y):
        sd = numpyro.param("sd", 1.0, constraint=constraints.positive)
        b = numpyro.sample("b", dist.ZeroSumNormal(sd, (4,)))
        with numpyro.plate("rows", 4):
            numpyro.sample("y", dist.Normal(b, 0.5), obs=y)

    covariance = 1.3**2 * (np.eye(4) - 0.25) + 0.5**2 * np.eye(4)
    exact = stats.multivariate_normal(np.zeros(4), covariance).logpdf(Y[:4])
    found = agrees(model, exact, Y[:4], params={"sd": 1.3})
    assert np.all(abs(np.sum(found.samples["b"], -1)) < 1e-4)


# -- a density that is none ----------------------------------------------------------------------------------------
class Heavier(dist.Normal):
    """A normal distribution that integrates to exp(2)."""

    def log_prob(self, value):
        """Two nats too many."""
        return super().log_prob(value) + 2.0


@pytest.mark.parametrize("kind", [dist.Normal, Heavier])
def test_a_run_and_a_report_that_contradict_each_other(kind):
    def model(y):
        mean = numpyro.param("mean", 0.0)
        with numpyro.plate("groups", 6):
            b = numpyro.sample("b", kind(mean, 1.0))
            numpyro.sample("y", dist.Normal(b, 1.0), obs=y)

    optimizer = SMCOptimizer(model)
    result = optimizer.run(random.key(0), 50, Y[:6], progress_bar=False)
    report = optimizer.summarize(random.key(1), result.state, Y[:6])
    exact = stats.norm(result.params["mean"], np.sqrt(2)).logpdf(Y[:6]).sum()
    if kind is dist.Normal:
        assert abs(report.log_evidence - exact) < 1e-3 and not report.warnings
    else:
        assert any(f"The run found the log evidence {exact:.1f}" in told for told in report.warnings), report.warnings
