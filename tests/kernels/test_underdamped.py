# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Coefficients against 60 digits, stability and stationary variance against linear algebra, moves against closed forms.

Monte Carlo comparisons allow 4 standard errors.
"""

from decimal import Decimal, localcontext

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from clouds import identity, partition, potential_of, skewed_map, z_score
from compiling import compile_tuned
from jax import random
from scipy.special import digamma, polygamma

from numpyro_smcopt.kernels import MetropolisUnderdamped, Underdamped
from numpyro_smcopt.kernels.integrators import (
    Integrator,
    controlled,
    exponential,
    nesterov,
    stability_limit,
    uncorrected,
)
from numpyro_smcopt.kernels.underdamped import leapfrog_step

pytestmark = pytest.mark.slow

STANDARD_ERRORS = 4.0
GRID = np.geomspace(1e-6, 50, 60)


def exact_integrator(z):
    """The textbook formulas for step size 1 and mass 1, in 60 digits: carry, drift, decay, S_pp, S_xp, S_xx."""
    with localcontext() as context:
        context.prec = 60
        z = Decimal(float(z))
        mu = (-z).exp()
        gone = 1 - mu
        position = (2 * z - 3 + 4 * mu - mu * mu) / z
        return [float(v) for v in (gone / z.sqrt(), (z - gone) / z, mu, 1 - mu * mu, gone * gone / z.sqrt(), position)]


@pytest.mark.parametrize(("dtype", "error"), [(np.float32, 1e-6), (np.float64, 2e-15)])
def test_coefficients_are_right_to_the_last_digits(dtype, error):
    with jax.enable_x64(True):
        grid = GRID.astype(dtype)
        found = jax.jit(exponential)(jnp.ones((), dtype), jnp.asarray(grid))
    assert found.drift.dtype == dtype
    by = Integrator(*(np.asarray(v, np.float64) for v in found))
    exact = np.array([exact_integrator(z) for z in grid]).T
    rebuilt = (by.carry, by.drift, by.decay, by.vv**2, by.vv * by.xv, by.xv**2 + by.xx**2)
    for mine, truth in zip(rebuilt, exact, strict=True):
        np.testing.assert_allclose(mine, truth, rtol=error)
    np.testing.assert_array_equal(by.lookahead, by.carry)
    np.testing.assert_array_equal(by.kick, by.carry)


def test_textbook_variance_is_lost_in_single_precision():
    """What the first test would look like for the usual formula."""
    z = GRID.astype(np.float32)
    with np.errstate(invalid="ignore"):
        usual = np.sqrt(2 * z - 3 + 4 * np.exp(-z) - np.exp(-2 * z))
    assert not np.all(np.isfinite(usual))


# Step size 1; z, (z - E)/z, E/z, and the noise with the velocity measured in units of the step: l_vv, l_xv, l_xx.
TABLE = [
    (1e-6, 4.999998333e-7, 0.9999995000, 1.414212855, 7.071064276e-7, 4.082482905e-7),
    (0.02, 0.009933665338, 0.9900663347, 1.400188574, 0.01400141903, 0.008164802515),
    (0.5, 0.2130613194, 0.7869386806, 1.124384773, 0.2753828146, 0.2016201894),
    (2.0, 0.5676676416, 0.4323323584, 0.7006012993, 0.5335738552, 0.6905155234),
    (40.0, 0.975, 0.025, 0.1581138830, 0.1581138830, 1.378404875),
]


@pytest.mark.parametrize("row", TABLE)
def test_coefficients_agree_with_a_table(row):
    z, *expected = row
    by = exponential(1.0, z)
    assert all(isinstance(number, np.floating | float) for number in by)  # static: no program, double precision
    found = [by.drift, by.kick / np.sqrt(z), by.vv / np.sqrt(z), by.xv, by.xx]
    np.testing.assert_allclose(found, expected, rtol=5e-10)


@pytest.mark.parametrize("module", [np, jnp])
def test_no_momentum_is_langevin(module):
    by = exponential(module.asarray(0.3), module.asarray(np.inf))
    np.testing.assert_allclose(by[2:], [0, 0, 0.3, 0, 0, 1, 0, np.sqrt(0.6)], rtol=1e-6)
    np.testing.assert_allclose(nesterov(module.asarray(0.3), module.asarray(np.inf)).drift, 0.3, rtol=1e-6)
    np.testing.assert_allclose(leapfrog_step(0.3, np.inf), np.sqrt(0.6))  # MALA with step size 0.3


def test_only_step_size_and_momentum_matter():
    """(dt, gamma, eta) and (s dt, s gamma, eta / s^2) are the same algorithm."""
    for scale in (0.1, 7.0):
        dt, gamma, eta = 0.02, 0.3, 50.0
        first = exponential(dt / gamma, gamma * eta * dt)
        dt, gamma, eta = scale * dt, scale * gamma, eta / scale**2
        np.testing.assert_allclose(exponential(dt / gamma, gamma * eta * dt), first, rtol=1e-12)


def test_controls_recompute_only_what_changed():
    old = jax.tree.map(jnp.float32, exponential(0.1, 1e-6))
    same = controlled(exponential, old, old.step_size, old.momentum)
    np.testing.assert_array_equal(same, old)  # and not those of the rounded momentum
    other = controlled(exponential, old, jnp.float32(0.2), jnp.float32(0.5))
    np.testing.assert_allclose(other, exponential(0.2, np.log(2)), rtol=1e-6)


# -- stability -----------------------------------------------------------------------------------------------------
def matrix(by, curvature):
    """One noiseless step on a quadratic, for (x, p)."""
    ahead = curvature * by.lookahead
    return np.array(
        [[1 - by.drift * curvature, by.carry - by.drift * ahead], [-by.kick * curvature, by.decay - by.kick * ahead]]
    )


def spectral_radius(by, curvature):
    return np.max(np.abs(np.linalg.eigvals(matrix(by, curvature))))


@pytest.mark.parametrize("scheme", [exponential, uncorrected, nesterov])
def test_stability_limit_is_where_the_spectral_radius_is_one(scheme):
    for z in (0.01, 0.1, 0.5, 1.0, 2.0, 5.0, 30.0, np.inf):
        by = scheme(0.7, z)
        limit = float(stability_limit(by))
        np.testing.assert_allclose(spectral_radius(by, limit), 1, atol=1e-8)
        assert spectral_radius(by, 0.99 * limit) < 1 < spectral_radius(by, 1.01 * limit)


@pytest.mark.parametrize(
    ("scheme", "limits"),
    [
        (exponential, {0.01: 200.8, 0.05: 40.8, 0.1: 20.9, 0.3: 7.56, 0.5: 4.93, 1: 3.03, 2: 2.23, 5: 2.005}),
        (uncorrected, {0.01: 2.003, 0.05: 2.017, 0.1: 2.034, 0.3: 2.105, 0.5: 2.181, 1: 2.392, 2: 2.911, 5: 3.304}),
    ],
)
def test_largest_stable_steps(scheme, limits):
    for z, limit in limits.items():
        np.testing.assert_allclose(stability_limit(scheme(1.0, float(z))), limit, rtol=3e-3)
    # Nesterov with learning rate lr and momentum m diverges from lr (2 + 2m)/(1 + 2m) on.
    for m in (0.5, 0.9, 0.99):
        expected = (2 + 2 * m) / (1 + 2 * m) / (1 - m)
        np.testing.assert_allclose(stability_limit(nesterov(1.0, -np.log(m))), expected, rtol=1e-10)


# -- moves ---------------------------------------------------------------------------------------------------------
def lyapunov_variance(step_size, z, curvature):
    """Stationary variance of x, from the linear recursion."""
    by = uncorrected(step_size, z)  # the gradient is taken where the particle is
    step = matrix(by, curvature)
    noise = np.array([[by.xv, by.xx], [by.vv, 0.0]])
    covariance = np.linalg.solve(np.eye(4) - np.kron(step, step), (noise @ noise.T).ravel())
    return covariance[0]


def test_lyapunov_values():
    cases = {(0.1, 0.1): 0.55545, (0.2, 1.0): 0.6204, (0.1, 2.0): 0.5541, (0.005, 40.0): 0.50251}
    for (step_size, z), variance in cases.items():
        np.testing.assert_allclose(lyapunov_variance(step_size, z, 2.0), variance, rtol=1e-4)


def run(kernel, terms_fn, num_latents, start, step_size, z, num_moves, keep, metric=None, joint=True):
    """The last ``keep`` of many moves, [keep, N, D], and the mean acceptance."""
    blocks = partition(terms_fn, num_latents, joint)
    potential, metric = potential_of(terms_fn, blocks), metric or identity(num_latents)
    going = jax.tree.map(lambda v: jnp.full(blocks.num_blocks, v, jnp.result_type(float)), exponential(step_size, z))
    num_normals = kernel.num_normals(num_latents, blocks.num_blocks)

    @compile_tuned
    def chain(x, rng_key):
        def one(carry, key):
            x, velocity = carry
            normals = random.normal(key, (x.shape[0], num_normals))
            moved = jax.vmap(lambda n, x, v: kernel.move(n, x, v, potential, metric, going))(normals, x, velocity)
            return (moved.x, moved.velocity), (moved.x, jnp.mean(moved.acceptance))

        keys = random.split(rng_key, num_moves + keep)
        begin = x, random.normal(random.fold_in(rng_key, 1), x.shape)
        middle = jax.lax.scan(lambda c, k: (one(c, k)[0], None), begin, keys[:num_moves])[0]
        return jax.lax.scan(one, middle, keys[num_moves:])[1]

    return chain(jnp.asarray(start, jnp.result_type(float)), random.key(0))


@pytest.mark.parametrize(("step_size", "z"), [(0.1, 0.1), (0.2, 1.0), (0.1, np.inf)])
def test_stationary_variance_is_the_lyapunov_value(step_size, z):
    """Within a percent; the error of the estimate is a quarter of that."""
    start = np.random.default_rng(0).standard_normal((4000, 25)) / np.sqrt(2)
    x, _ = run(Underdamped(), lambda x: x**2, 25, start, step_size, z, 100, 200)
    np.testing.assert_allclose(np.mean(np.asarray(x) ** 2), lyapunov_variance(step_size, z, 2.0), rtol=0.01)


def gamma_terms(x):
    """Logarithms of gamma variables: skewed, so no symmetric error goes unnoticed."""
    return jnp.concatenate([jnp.exp(x), -jnp.array([1.0, 2.5]) * x])


def gamma_scores(x):
    """Standard errors by which the moments of x, x^2 and exp(x) are off."""
    shapes, x = np.array([1.0, 2.5]), np.asarray(x)
    truth = np.concatenate([digamma(shapes), polygamma(1, shapes) + digamma(shapes) ** 2, shapes])
    return z_score(np.concatenate([x, x**2, np.exp(x)], 1), truth)


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("step_size", "z"), [(6.0, 0.2), (1.0, np.inf)])
def test_accept_reject_has_no_bias(step_size, z, joint):
    start = np.log(np.random.default_rng(0).gamma([1.0, 2.5], size=(20_000, 2)))
    blocks = partition(gamma_terms, 2, joint)
    x, acceptance = run(
        MetropolisUnderdamped(), gamma_terms, 2, start, step_size, z, 30, 1, skewed_map(blocks), joint=joint
    )
    assert 0.3 < np.mean(acceptance) < 0.97  # it rejects
    scores = gamma_scores(x[0])
    assert np.all(abs(scores) < STANDARD_ERRORS), scores


def test_without_accept_reject_the_bias_is_noticed():
    start = np.log(np.random.default_rng(0).gamma([1.0, 2.5], size=(20_000, 2)))
    x, _ = run(Underdamped(), gamma_terms, 2, start, 0.5, 0.5, 30, 1)
    assert np.max(abs(gamma_scores(x[0]))) > 3 * STANDARD_ERRORS


def test_without_momentum_accept_reject_is_mala():
    """The same proposal and the same acceptance as a step written out."""
    with jax.enable_x64(True):
        blocks = partition(gamma_terms, 2, True)
        potential, h = potential_of(gamma_terms, blocks), 0.4
        going = jax.tree.map(lambda v: jnp.full(1, v), exponential(h, np.inf))
        normals, x = random.normal(random.key(0), (3,)), jnp.array([0.1, 0.6])
        moved = MetropolisUnderdamped().move(normals, x, jnp.zeros(2), potential, identity(2), going)

        U, grad = (lambda x: np.sum(gamma_terms(x))), (lambda x: np.exp(x) - np.array([1.0, 2.5]))
        x, noise = np.asarray(x), np.asarray(normals[:2])
        y = x - h * grad(x) + np.sqrt(2 * h) * noise
        log_q = lambda a, b: -np.sum((b - a + h * grad(a)) ** 2) / (4 * h)  # noqa: E731
        np.testing.assert_allclose(
            moved.acceptance[0], min(1, np.exp(U(x) - U(y) + log_q(y, x) - log_q(x, y))), rtol=1e-10
        )
        assert np.allclose(moved.x, y) or np.array_equal(moved.x, x)


def test_blocks_go_at_their_own_pace():
    """With the same random numbers each coordinate moves as if it were alone."""
    terms = lambda x: jnp.array([1.0, 3.0]) * x**2 / 2  # noqa: E731
    blocks = partition(terms, 2)
    assert blocks.num_blocks == 2
    going = jax.tree.map(jnp.asarray, exponential(np.array([0.1, 0.4]), np.array([0.3, 2.0])))
    x, velocity, normals = jnp.array([0.5, -1.0]), jnp.array([0.2, 0.3]), jnp.arange(4.0)
    moved = Underdamped().move(normals, x, velocity, potential_of(terms, blocks), identity(2), going)
    for k, curvature in enumerate((1.0, 3.0)):
        by = uncorrected([0.1, 0.4][k], [0.3, 2.0][k])
        place = matrix(by, curvature) @ [x[k], velocity[k]] + [
            by.xv * normals[k] + by.xx * normals[2 + k],
            by.vv * normals[k],
        ]
        np.testing.assert_allclose([moved.x[k], moved.velocity[k]], place, rtol=1e-5)
