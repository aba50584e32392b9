# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Laplace approximation of the latents: modes, curvatures, and a warm start for ``theta``.

    pi_theta(x) ~ N(x_hat, H^-1),    x_hat = argmin U_theta,    H = d2U/dx2 (x_hat)
    -log p_theta(y) ~ U_theta(x_hat) + 1/2 log det H - D/2 log(2 pi) =: F_0(theta)
    dF_0/dtheta ~ E[ dU/dtheta (x_hat + delta + z) ],    z ~ N(0, H^-1),    delta = -H^-1 E[ dU/dx (x_hat + z) ]
    F_w(theta) = F_0(theta) - log E[ w ],    w = exp(U_theta(x_hat) - U_theta(x_hat + z) + z^T H z / 2), block by block

Blocks make it cheap: the Hessians of all blocks come from as many Hessian-vector products as the largest block has
coordinates, and modes are found by one damped Newton iteration per block, all at once.

The warm start walks to the neighbourhood of the maximum with the step of `theta_step`, the particles being draws from
the approximation, and ``F_w`` deciding how far to go: with few observations per latent, ``F_0`` alone may be tens of
nats off, and lower at the end of a scale than it should be. The draws are centred at the mean of the latents rather
than at their mode (by ``delta``, the first correction for skewness); only then is their gradient that of ``F_0``, and a
step downhill. It costs no accuracy (the particles have the last word) and makes far starting points harmless.

On the way a scale may fall so far below the noise that the likelihood no longer depends on it (for a standard
deviation ``s`` of latents the slope in ``log s`` goes to zero as ``s^2``). Such a plateau looks like a maximum to
everything local, particles included, so the walk does not end before it has looked along the scales for lower ground.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from numpyro_smcopt import dispersal
from numpyro_smcopt.blocks import Blocks
from numpyro_smcopt.information import Information, louis_information
from numpyro_smcopt.kernels.preconditioners import Curvature
from numpyro_smcopt.types import Array

MAX_NUMBERS = 4_000_000  # B M^2 up to which Hessian blocks are affordable
MAX_WIDTH = 1200
COLUMNS_AT_ONCE = 128
NEWTON_ITERATIONS = 100
NEWTON_TOLERANCE = 1e-3  # length of the last Newton step, in posterior standard deviations
NEWTON_PATIENCE = 15  # iterations after which rounding may be what is left: a tenfold length will do
WARM_ITERATIONS = 80
LONGEST_STEP = 2.0  # for parameters on a log or logit scale, whose natural unit is one
SMALLEST_EIGENVALUE = 1e-6  # of the observed information, relative to the complete one
MOST_STRETCHED = 4.0  # times its length may a step grow while it leads downhill: damped ones are too short
GROWS_FROM, SHRINKS_BELOW = 0.6, 0.2  # of the gain that the slope promised; half of it is what a parabola gives
DAMPING = 0.1  # of scales, relative to the complete information
GOOD_ENOUGH = 1e-3  # predicted decrease, in nats, at which the particles take over
STEEP = 0.5  # nats that say that there is no plateau in a direction
LOOKS = (1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)  # how far, in units of a log or logit scale
WORTH_A_JUMP = 0.003  # nats
WORTH_A_RESTART = 0.5  # nats
MOST_RESTARTED = 30  # expansions of the walk from another place
FAR_OFF = 10.0  # on a log or logit scale, where rounding may pass for lower ground
MOST_LOOKS = 60


def affordable(blocks: Blocks) -> bool:
    """True if the Hessian blocks are affordable."""
    num, width = blocks.members.shape
    return width <= MAX_WIDTH and num * width**2 <= MAX_NUMBERS


def hessian_blocks(gradient_fn: Callable[[Array], Array], x: Array, blocks: Blocks) -> Array:
    """[..., B, M, M] Hessians of the blocks; padded with the identity.

    ``gradient_fn`` is ``x [D] -> [..., D]``, one or several gradients of energies.
    """
    num, width = blocks.members.shape
    columns = blocks.members.T  # [M, B]: the m-th coordinate of every block is disturbed at once

    def column(members: Array) -> Array:
        direction = jnp.zeros_like(x).at[members].set(1.0, mode="drop")
        return blocks.gather(jax.jvp(gradient_fn, (x,), (direction,))[1], 0.0)

    mapped = jax.vmap(column) if width <= COLUMNS_AT_ONCE else partial(lax.map, column, batch_size=COLUMNS_AT_ONCE)
    hessian = jnp.moveaxis(mapped(columns), 0, -1)  # [..., B, M, M]
    padding = blocks.members == x.shape[0]
    return hessian + jnp.where(padding, 1.0, 0.0)[..., None] * jnp.eye(width, dtype=x.dtype)


def curvature(terms_fn: Callable[[Array], Array], x: Array, prior_mask: Array, blocks: Blocks) -> Curvature:
    """Hessian blocks of prior and remainder at ``x``, for `tempering.temper`."""

    def gradients(x: Array) -> Array:
        _, vjp = jax.vjp(terms_fn, x)
        share = prior_mask.astype(x.dtype)
        return jnp.stack([vjp(share)[0], vjp(1 - share)[0]])

    both = hessian_blocks(gradients, x, blocks)
    padding = jnp.where(blocks.members == x.shape[0], 1.0, 0.0)[..., None] * jnp.eye(blocks.width, dtype=x.dtype)
    return Curvature(both[0], both[1] - padding)


class Mode(NamedTuple):
    """The mode of a target.

    Attributes:
        x: [D] the mode.
        terms: [K] energy terms there.
        hessian: [B, M, M] the curvature there.
        step: [] length of the last Newton step, in standard deviations (the largest over blocks).
    """

    x: Array
    terms: Array
    hessian: Array
    step: Array


def find_mode(terms_fn: Callable[[Array], Array], x: Array, blocks: Blocks) -> Mode:
    """Minimise the energy by Newton's method with Levenberg-Marquardt damping, block by block."""
    eye = jnp.eye(blocks.width, dtype=x.dtype)

    def energy_and_terms(x: Array) -> tuple[Array, Array]:
        terms = terms_fn(x)
        return jnp.sum(terms), terms

    gradient_and_terms = jax.grad(energy_and_terms, has_aux=True)

    def newton(gradient: Array, hessian: Array, damping: Array) -> tuple[Array, Array]:
        diagonal = jnp.maximum(jnp.abs(jnp.diagonal(hessian, axis1=1, axis2=2)), 1e-6)
        factor = jnp.linalg.cholesky(hessian + damping[:, None, None] * diagonal[:, :, None] * eye)
        whitened = jax.scipy.linalg.solve_triangular(factor, blocks.gather(gradient, 0.0)[..., None], lower=True)
        step = -jax.scipy.linalg.solve_triangular(factor, whitened, lower=True, trans=1)[..., 0]
        return step, jnp.sqrt(jnp.sum(whitened[..., 0] ** 2, -1))

    def body(carry: tuple) -> tuple:
        here, candidate, damping, length, k = carry
        x, terms, gradient, hessian = here
        new_gradient, new_terms = gradient_and_terms(candidate)
        new_hessian = hessian_blocks(lambda x: gradient_and_terms(x)[0], candidate, blocks)

        # Accept or refuse, block by block. Near the mode rounding decides; a step that short is taken on trust.
        change = blocks.sum_terms(new_terms - terms)
        better = (k == 0) | (change < 0) | ((length < 0.3) & (change < 0.1))
        of_x, of_term = blocks.to_coordinates(better), blocks.to_terms(better, True)
        x, gradient = jnp.where(of_x, candidate, x), jnp.where(of_x, new_gradient, gradient)
        terms, hessian = jnp.where(of_term, new_terms, terms), jnp.where(better[:, None, None], new_hessian, hessian)
        relaxed = jnp.where(damping < 1e-3, 0.0, damping / 5)
        damping = jnp.where(k == 0, 0.0, jnp.where(better, relaxed, jnp.maximum(4 * damping, 1e-2)))

        # Next candidate. A block whose Hessian is indefinite stays and is damped more.
        step, length = newton(gradient, hessian, damping)
        sane = jnp.all(jnp.isfinite(step), -1)
        candidate = x + blocks.scatter(jnp.where(sane[:, None], step, 0.0))
        damping = jnp.where(sane, damping, jnp.maximum(4 * damping, 1e-2))
        length = jnp.where(sane, length, jnp.inf)
        return (x, terms, gradient, hessian), candidate, damping, length, k + 1

    def going(carry: tuple) -> Array:
        _, _, damping, length, k = carry
        tolerance = jnp.where(k < NEWTON_PATIENCE, 1.0, 10.0) * NEWTON_TOLERANCE
        return jnp.any((length > tolerance) | (damping >= 1e-2)) & (k < NEWTON_ITERATIONS)

    zeros = jnp.zeros(blocks.num_blocks, x.dtype)
    hessian = jnp.zeros((blocks.num_blocks, blocks.width, blocks.width), x.dtype)
    here = (x, jnp.zeros(blocks.of_term.shape[0], x.dtype), jnp.zeros_like(x), hessian)
    here, _, damping, length, _ = lax.while_loop(going, body, (here, x, zeros, zeros + jnp.inf, 0))
    return Mode(here[0], here[1], here[3], jnp.max(jnp.where(damping < 1e-2, length, jnp.inf)))


def factors(hessian: Array) -> tuple[Array, Array, Array]:
    """``L`` with ``H^-1 = L L^T``, its inverse, and half the log determinant of ``H [B, M, M]``, per block; NaN
    where it is not positive definite.

    Returns:
        [B, M, M], [B, M, M] and [B].
    """
    lower = jnp.linalg.cholesky(hessian)
    eye = jnp.broadcast_to(jnp.eye(hessian.shape[-1], dtype=hessian.dtype), hessian.shape)
    factor = jax.scipy.linalg.solve_triangular(lower, eye, lower=True, trans=1)
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(lower, axis1=1, axis2=2)), -1)
    return factor, jnp.swapaxes(lower, 1, 2), half_log_det


class Expansion(NamedTuple):
    """Everything the warm start needs to know at one ``theta``.

    Attributes:
        mode: The mode of the latents.
        half_log_det: [] ``1/2 log det H``.
        log_mean: [] log of the mean importance weight of draws from the approximation, which is zero where it is exact.
        gradient: [P] expected gradient under the approximation.
        information: Complete and missing information under the approximation.
        resolution: [] the least standard deviation of a latent given the others, in units of its rounding.
    """

    mode: Mode
    half_log_det: Array
    log_mean: Array
    gradient: Array
    information: Information
    resolution: Array


def expand(
    terms_fn: Callable[[Array, Array], Array], theta: Array, x: Array, normals: Array, blocks: Blocks, work: int
) -> Expansion:
    """Laplace approximation at ``theta``, and the gradient and information that draws from it give.

    ``terms_fn`` is ``(theta [P], x [D]) -> [K]``; the search begins at x [D]; and ``normals [N, D]`` are fixed, so that
    the result is a smooth function of theta.
    """
    mode = find_mode(lambda one: terms_fn(theta, one), x, blocks)
    factor, _, half_log_det = factors(mode.hessian)
    draws = mode.x + blocks.scatter(jnp.einsum("bij,nbj->nbi", factor, blocks.gather(normals, 0.0)))
    shift, log_means = _skewness_shift(lambda one: terms_fn(theta, one), draws, normals, mode, factor, blocks)
    draws = draws + shift
    log_weights = jnp.full((draws.shape[0], blocks.num_blocks), -np.log(draws.shape[0]), draws.dtype)
    gradient, information = louis_information(terms_fn, theta, draws, log_weights, blocks, work, matched=True)
    if not _can_match(normals.shape[0], blocks):
        correction = _linear_correction(terms_fn, theta, mode.x, factor, normals, blocks)
        information = information._replace(missing=information.missing + correction)
    stiffness = blocks.scatter(jnp.sqrt(jnp.diagonal(mode.hessian, axis1=1, axis2=2)))
    resolution = 1 / (jnp.finfo(theta.dtype).eps * jnp.max(stiffness * jnp.abs(mode.x), initial=0.0))
    return Expansion(mode, jnp.sum(half_log_det), jnp.sum(log_means), gradient, information, resolution)


def _skewness_shift(
    terms_fn: Callable[[Array], Array], draws: Array, normals: Array, mode: Mode, factor: Array, blocks: Blocks
) -> tuple[Array, Array]:
    """Two corrections for what is not Gaussian, from draws [N, D] of the approximation.

    Returns:
        [D] from the mode to the mean of the latents: a Newton step for ``E[dU/dx] = 0``; zero if they are Gaussian.
        [B] log evidence beside that of the approximation, by importance weights.
    """

    def energy_and_terms(x: Array) -> tuple[Array, Array]:
        terms = terms_fn(x)
        return jnp.sum(terms), terms

    gradients, terms = jax.vmap(jax.grad(energy_and_terms, has_aux=True))(draws)
    whitened = jnp.einsum("bij,bi->bj", factor, blocks.gather(gradients.mean(0), 0.0))  # in posterior deviations
    longest = jnp.max(jnp.abs(whitened), -1, keepdims=True)
    whitened = jnp.where(jnp.isfinite(longest), whitened / jnp.maximum(longest, 1.0), 0.0)
    shift = -blocks.scatter(jnp.einsum("bij,bj->bi", factor, whitened))
    log_weights = blocks.sum_coordinates(normals**2) / 2 - blocks.sum_terms(terms - mode.terms)
    return shift, jax.scipy.special.logsumexp(log_weights, 0) - np.log(draws.shape[0])


def _linear_correction(
    terms_fn: Callable[[Array, Array], Array], theta: Array, x: Array, factor: Array, normals: Array, blocks: Blocks
) -> Array:
    """[P, P] what the missing information of the draws lacks of the exact one, as far as the slopes are linear in x.

    The slopes ``dU_b/dtheta ~ a_b (x - x_hat)`` have covariance ``a_b L L^T a_b^T``; the draws have their own.
    """
    gradient_in_x = lambda t: jax.grad(lambda x: jnp.sum(terms_fn(t, x)))(x)  # noqa: E731
    slopes = jnp.moveaxis(jax.jacfwd(gradient_in_x)(theta), 0, 1)  # [P, D]
    whitened = jnp.einsum("pbi,bij->pbj", blocks.gather(slopes, 0.0), factor, precision="highest")
    drawn = jnp.einsum("pbj,nbj->pnb", whitened, blocks.gather(normals, 0.0), precision="highest")
    exact = jnp.einsum("pbj,qbj->pq", whitened, whitened, precision="highest")
    return exact - jnp.einsum("pnb,qnb->pq", drawn, drawn, precision="highest") / normals.shape[0]


def fixed_normals(num: int, blocks: Blocks) -> np.ndarray:
    """[num, D] antithetic standard normals, the same in every run; within a block their second moments are exact.

    Exact moments matter where most of the information on a parameter is missing (an intercept that is confounded with
    its random effects): it is the small difference of two large numbers. Blocks too large for that get unit variances,
    and `expand` corrects the information.
    """
    members = np.asarray(blocks.members)
    num_coordinates = len(blocks.of_coordinate)
    half = np.random.default_rng(20).standard_normal((num // 2, num_coordinates))
    draws = np.concatenate([half, -half])
    draws /= np.sqrt(np.mean(draws**2, 0))
    if blocks.width > 1 and _can_match(num, blocks):
        inside = members < num_coordinates
        padded = np.where(inside, draws[:, np.minimum(members, num_coordinates - 1)], 0.0)  # [num, B, M]
        covariance = np.einsum("nbi,nbj->bij", padded, padded) / num + np.eye(blocks.width) * ~inside[:, None]
        white = np.einsum("bij,nbj->nbi", np.linalg.inv(np.linalg.cholesky(covariance)), padded)
        draws[:, members[inside]] = white[:, inside]
    return draws


def _can_match(num: int, blocks: Blocks) -> bool:
    """True if ``num`` draws are enough for exact second moments within blocks."""
    return blocks.width <= num // 4


def warm_start(
    expand_fn: Callable[[Any, Any], Expansion],
    theta: np.ndarray,
    x: np.ndarray,
    bounded: np.ndarray,
    restarts: np.ndarray | None = None,
    num_observations: int = 1,
) -> "WarmStart | None":
    """Walk towards the maximum of the Laplace approximation of the marginal likelihood.

    Args:
        expand_fn: ``(theta [P], x [D]) -> Expansion``, compiled.
        theta: [P] where to start.
        x: [D] where to start looking for the mode.
        bounded: [P] which coordinates of theta come from a constrained parameter.
        restarts: [R, P] places to start from once more, in units of `dispersal.around`; none by default.
        num_observations: What the information comes from.

    Returns:
        Where it ended, or None if there is no usable approximation at the start.
    """
    here = jax.device_get(expand_fn(theta, x))
    if not _usable(here):
        return None
    walk = WarmStart(expand_fn, theta, here, bounded)
    walk.descend()
    walk.settle()
    best, gain = walk, 0.0
    walk.around = dispersal.around(theta, walk.theta, _diagonal(here), _diagonal(walk.here), num_observations, bounded)
    for shift in np.zeros((0, len(theta))) if restarts is None else restarts:
        place = np.asarray(walk.around.center + shift * walk.around.units, theta.dtype)
        there = jax.device_get(expand_fn(place, x))
        if not _usable(there):
            continue
        other = WarmStart(expand_fn, place, there, bounded)
        other.descend(MOST_RESTARTED, walk)
        # Importance weights that matter so much are not known so well.
        higher = -_change(walk.here, other.here) - abs(float(walk.here.log_mean - other.here.log_mean))
        # A walk that runs off, to a spike at one observation for instance, has found no maximum.
        if other.converged and higher > max(gain, WORTH_A_RESTART) and _curves(other.here):
            best, gain = other, higher
    if gain > 0.0:
        best.settle()
    best.around, best.gain = walk.around, gain if walk.converged else 0.0
    return best


class WarmStart:
    """A walk on the host, and where it has arrived.

    Attributes:
        theta: [P].
        here: The expansion there.
        steps, looks: Expansions used, downhill and along scales.
        converged: Whether the predicted gain of a further step became negligible.
        around: Where to start from once more.
        gain: Nats by which a restart ended above the maximum that the walk from the start led to; 0 if none did.
    """

    def __init__(
        self, expand_fn: Callable[[Any, Any], Expansion], theta: np.ndarray, here: Expansion, bounded: np.ndarray
    ) -> None:
        self.expand_fn, self.bounded = expand_fn, bounded
        self.theta, self.here = theta, here
        self.steps, self.looks, self.converged = 1, 0, False
        self.around, self.gain = dispersal.Around(theta, np.ones(len(theta))), 0.0

    @property
    def mode(self) -> np.ndarray:
        """[D] mode of the latents."""
        return np.asarray(self.here.mode.x)

    @property
    def iterations(self) -> int:
        """Expansions used."""
        return self.steps + self.looks

    def settle(self) -> None:
        """Look beyond plateaus, as long as that leads further down."""
        while self.looks < MOST_LOOKS and self.look_beyond_plateaus():
            self.descend()

    def descend(self, most: int = WARM_ITERATIONS, known: "WarmStart | None" = None) -> None:
        """Go downhill to the end, or to where another walk has ended."""
        fraction, self.converged = 1.0, False
        while self.steps < most and not (known is not None and known.is_near(self.theta)):
            step = self._no_longer(fraction * _direction(self.here, self.bounded))
            predicted = -float(step @ self.here.gradient)
            if not np.isfinite(predicted) or predicted < GOOD_ENOUGH * fraction:
                self.converged = bool(np.isfinite(predicted))
                return
            there, change = self._look(step)
            self.steps += 1
            if change < 0.0:
                self._go(step, there)
                fulfilled = -change / predicted
                growth = 2.0 if fulfilled > GROWS_FROM else 1.0 if fulfilled > SHRINKS_BELOW else 0.5
                fraction = min(MOST_STRETCHED, growth * fraction)
            else:
                fraction /= 4
                if fraction < 1e-4:
                    return

    def is_near(self, theta: np.ndarray) -> bool:
        """Whether a place lies where this walk has ended, within a standard error of complete data."""
        apart = np.asarray(theta - self.theta, float)
        return bool(apart @ self.here.information.complete @ apart < 1.0)

    def _no_longer(self, step: np.ndarray) -> np.ndarray:
        return step * min(1.0, LONGEST_STEP / max(np.max(np.abs(step[self.bounded]), initial=0.0), 1e-30))

    def look_beyond_plateaus(self) -> bool:
        """Try long steps along single scales, those the data say least about first; whether one led further down."""
        complete, missing = (np.diag(v).astype(float) for v in self.here.information[:2])
        observed = (complete - missing) / np.maximum(np.abs(complete), 1e-30)
        gone = False
        for j in np.argsort(observed)[self.bounded[np.argsort(observed)]]:
            downhill = -1.0 if self.here.gradient[j] > 0 else 1.0
            gone |= self._look_along(j, downhill) or self._look_along(j, -downhill)
        return gone

    def _look_along(self, j: int, sign: float) -> bool:
        """Go to the lowest place found along a scale, if it is worth it; the other coordinates follow.

        Where the mean of latents grows with their scale, a location has to give way before a larger scale is better.
        """
        lowest: tuple[float, np.ndarray, Any] = (-WORTH_A_JUMP, np.zeros(0), None)
        unit, others = sign * (np.arange(len(self.theta)) == j), np.zeros(len(self.theta))
        for length in LOOKS:
            if self.looks >= MOST_LOOKS:
                break
            step = length * unit + others
            there, change = self._look(step)
            self.looks += 1
            if np.isfinite(change):
                follow = self._no_longer(_direction(there, self.bounded, held=j))
                gain = -float(follow @ there.gradient)
                if gain > WORTH_A_JUMP and change - gain < STEEP:
                    beside, changed = self._look(step + follow)
                    self.looks += 1
                    if changed < change:
                        step, there, change, others = step + follow, beside, changed, others + follow
            # Further away by less than a third of what is worth a jump is not lower.
            far = abs(self.theta[j] + step[j]) > FAR_OFF
            if change < min(lowest[0] - (WORTH_A_JUMP / 3 if lowest[2] is not None else 0.0), -STEEP if far else 0.0):
                lowest = (change, step, there)
            if not change < STEEP:
                break
        if lowest[2] is not None:
            self._go(*lowest[1:])
        return lowest[2] is not None

    def _look(self, step: np.ndarray) -> tuple[Expansion, float]:
        """The expansion after a step, and the change of ``F_w``; infinite where there is no usable one."""
        theta = np.asarray(self.theta + step, self.theta.dtype)
        there, here = jax.device_get(self.expand_fn(theta, self.here.mode.x)), self.here
        # Narrower than rounding, draws are one point, and any likelihood looks the higher the narrower.
        resolved = there.resolution >= min(1.0, float(here.resolution))
        return there, _change(here, there) if resolved and _usable(there) else np.inf

    def _go(self, step: np.ndarray, there: Expansion) -> None:
        self.theta, self.here = (self.theta + step).astype(self.theta.dtype), there


def _change(here: Expansion, there: Expansion) -> float:
    """Of ``L_w``."""
    # The terms are subtracted first: totals of a million observations would cancel.
    change = np.sum(there.mode.terms.astype(float) - here.mode.terms) + there.half_log_det - here.half_log_det
    return float(change - (there.log_mean - here.log_mean))


def _diagonal(here: Expansion) -> np.ndarray:
    return np.diag(here.information.complete).astype(float)


def _curves(here: Expansion) -> bool:
    """Whether the observed information is that of a maximum, and none of its coordinates runs off."""
    complete, missing = (np.asarray(v, float) for v in here.information[:2])
    scale = 1 / np.sqrt(np.maximum(np.abs(np.diag(complete)), 1e-30))
    return bool(np.linalg.eigvalsh((complete - missing) * scale[:, None] * scale)[0] > SMALLEST_EIGENVALUE)


def _usable(expansion: Expansion) -> bool:
    numbers = (expansion.mode.terms, *expansion[1:4], *expansion.information)
    return bool(expansion.mode.step < 100 * NEWTON_TOLERANCE) and all(np.all(np.isfinite(v)) for v in numbers)


def _direction(here: Expansion, bounded: np.ndarray, held: int | None = None) -> np.ndarray:
    """[P] a Newton step of all coordinates, or of all but one."""
    # On the host and in double precision: a handful of small matrices is not worth a program.
    complete, missing = (np.asarray(v, float) for v in here.information[:2])
    diagonal = np.maximum(np.abs(np.diag(complete)), 1e-30)
    # What is missing on scales is only known up to noise: damp them.
    scale = np.where(np.arange(len(diagonal)) == held, 0.0, 1 / np.sqrt(diagonal))
    observed = (complete - missing + np.diag(DAMPING * bounded * diagonal)) * scale[:, None] * scale
    values, vectors = np.linalg.eigh(observed)
    floored = np.maximum(np.abs(values), SMALLEST_EIGENVALUE)
    return -scale * (vectors @ ((vectors.T @ (scale * here.gradient)) / floored))
