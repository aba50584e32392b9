# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Fits for ArviZ: an `InferenceData` (ArviZ 0.x) or a `DataTree` (ArviZ 1.x) with the same groups.

    posterior            equally weighted draws of the latents given the estimate       (chain, draw, ...)
    weighted_posterior   the particles with `log_weight`, and the `ess` of every block   (chain, particle, ...)
    point_estimate       the parameters, with standard and Monte Carlo errors            (chain, ...)
    optimization_trace   iterates and diagnostics                                        (chain, step, ...)
    log_likelihood       of every observation, for the draws of `posterior`              (chain, draw, ...)
    observed_data        the observations

A chain is an independent run. Axes that belong to a plate are named after it. What ArviZ computes from `posterior`
about the error of draws (its effective sample size, its Monte Carlo errors) knows nothing of weights and is too good;
`ess` and the report know.

ArviZ is an optional dependency and is imported only here, when it is needed.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax import random

from numpyro_smcopt.algorithms.base import ParticleAlgorithm
from numpyro_smcopt.resampling import systematic
from numpyro_smcopt.results import RunResult
from numpyro_smcopt.types import Array, Params
from numpyro_smcopt.weights import effective_sample_size

DRAWN, PARTICLES, STEPS = ("chain", "draw"), ("chain", "particle"), ("chain", "step")


def to_arviz(
    optimizer: ParticleAlgorithm,
    result: RunResult | Sequence[RunResult],
    *,
    report: Any = None,
    model_args: tuple | None = None,
    model_kwargs: dict[str, Any] | None = None,
    num_samples: int | None = None,
    rng_key: Array | None = None,
    log_likelihood: bool = True,
    coords: Mapping[str, Any] | None = None,
    dims: Mapping[str, Sequence[str]] | None = None,
) -> Any:
    """Convert a fit for ArviZ.

    Args:
        optimizer: What made the fit.
        result: What `run` returned; several results of independent runs of equal settings become chains.
        report: What `summarize` returned for it (or one report per result). Draws and weights are then those of the
            report, which belong to the estimate, and standard errors and log evidence are included.
        model_args: Arguments of the model; may be left out if the object has seen them before.
        model_kwargs: Its keyword arguments.
        num_samples: Draws per chain (default: as many as there are particles).
        rng_key: Randomness of the resampling (default ``random.key(0)``).
        log_likelihood: Whether to compute that of every observation for every draw.
        coords: Labels of axes, ``{axis: labels}``; an axis that belongs to a plate has the plate's name.
        dims: Names of axes, ``{site: names}``, where the model does not give them.

    Returns:
        An `arviz.InferenceData` under ArviZ 0.x, an `xarray.DataTree` under ArviZ 1.x.

    Raises:
        ImportError: If ArviZ is not installed.
        ValueError: If there are not as many reports as results.
    """
    results: list[Any] = [result] if hasattr(result, "trajectory") else list(result)
    reports = [None] * len(results) if report is None else list(report) if isinstance(report, list) else [report]
    if len(reports) != len(results):
        raise ValueError(f"There are {len(results)} results and {len(reports)} reports; pass one report per result.")
    args, kwargs = model_args or (), model_kwargs or {}
    keys = random.split(random.key(0) if rng_key is None else rng_key, len(results))
    chains = [
        _chain(optimizer, one, its_report, key, args, kwargs, num_samples, log_likelihood)
        for one, its_report, key in zip(results, reports, keys, strict=True)
    ]
    axes = _Axes({**optimizer.axis_names(*args, **kwargs), **(dims or {})}, coords or {})
    return _assemble(
        {
            "posterior": axes.dataset(_stack(chains, "posterior"), DRAWN, _attributes(results, reports)),
            "log_likelihood": axes.dataset(_stack(chains, "log_likelihood"), DRAWN),
            "observed_data": axes.dataset(optimizer.observed_data(results[0].params, *args, **kwargs), ()),
            "weighted_posterior": axes.dataset(_stack(chains, "weighted_posterior"), PARTICLES),
            "point_estimate": axes.dataset(_stack(chains, "point_estimate"), DRAWN[:1]),
            "optimization_trace": axes.dataset(_stack(chains, "optimization_trace"), STEPS),
        }
    )


def _chain(
    optimizer: ParticleAlgorithm,
    result: RunResult,
    report: Any,
    rng_key: Array,
    args: tuple,
    kwargs: dict,
    num_samples: int | None,
    log_likelihood: bool,
) -> dict[str, dict[str, Any]]:
    """The groups of one run, ``{group: {variable: array}}``, without a chain axis."""
    if report is None:
        state, params = result.state, result.params
        samples = optimizer.get_samples(state, *args, rng_key=rng_key, num_samples=num_samples, **kwargs)
        cloud, log_weights = optimizer.get_weighted_samples(state, *args, **kwargs)
        ess = effective_sample_size(state.log_weights)
    else:
        params, cloud, log_weights, ess = report.params, report.samples, report.log_weights, report.ess
        chosen = _resampled(rng_key, log_weights, num_samples or len(log_weights))
        samples = {name: value[chosen] for name, value in cloud.items()}
    pointwise = optimizer.log_likelihood(params, samples, *args, **kwargs) if log_likelihood else {}
    return {
        "posterior": samples,
        "log_likelihood": pointwise,
        "weighted_posterior": {**cloud, "log_weight": log_weights, "ess": np.atleast_1d(ess)},
        "point_estimate": _point_estimate(params, report),
        "optimization_trace": {**result.diagnostics, **_leaves(result.trajectory)},
    }


def _point_estimate(params: Params, report: Any) -> dict[str, Any]:
    found = _leaves(params)
    if report is not None:
        for suffix, values in (("standard_error", report.standard_errors), ("mc_error", report.mc_errors)):
            found |= {f"{name}_{suffix}": value for name, value in _leaves(values).items()}
    return found


def _attributes(results: Sequence[RunResult], reports: Sequence[Any]) -> dict[str, Any]:
    """Of the posterior group; lists are one entry per chain."""
    found: dict[str, Any] = {
        "inference_library": "numpyro_smcopt",
        "resampled": 1,
        "status": [result.status.value for result in results],
    }
    for name in ("log_evidence", "log_evidence_std", "aic", "bic"):
        if reports[0] is not None:
            found[name] = [float(getattr(report, name)) for report in reports]
    return {name: value[0] if isinstance(value, list) and len(value) == 1 else value for name, value in found.items()}


def _resampled(rng_key: Array, log_weights: Array, num: int) -> Array:
    """[num] indices of particles, each drawn as often as its weight says, in random order."""
    rounds = -(-num // len(log_weights))
    keys = random.split(rng_key, rounds + 1)
    chosen = jax.vmap(lambda key: systematic(key, log_weights))(keys[1:])
    return random.permutation(keys[0], chosen.ravel())[:num]


def _leaves(values: Params) -> dict[str, Any]:
    """The arrays of a dictionary of pytrees; a leaf of a module is called ``net$params['kernel']``."""
    return {
        name + jax.tree_util.keystr(path): leaf
        for name, value in values.items()
        for path, leaf in jax.tree_util.tree_leaves_with_path(value)
    }


def _stack(chains: Sequence[dict[str, dict[str, Any]]], group: str) -> dict[str, np.ndarray]:
    """Arrays with a chain axis; shorter runs are filled up with NaN."""
    return {name: _fill([np.asarray(chain[group][name]) for chain in chains]) for name in chains[0][group]}


def _fill(values: Sequence[np.ndarray]) -> np.ndarray:
    if len({value.shape for value in values}) == 1:
        return np.stack(values)
    length = max(len(value) for value in values)
    pad = lambda v: np.pad(v.astype(float), [(0, length - len(v))] + [(0, 0)] * (v.ndim - 1), constant_values=np.nan)  # noqa: E731
    return np.stack([pad(value) for value in values])


class _Axes:
    """Makes data sets whose axes have names and labels."""

    def __init__(self, names: Mapping[str, Sequence[str]], labels: Mapping[str, Any]) -> None:
        self._names, self._labels = names, labels

    def dataset(self, values: Mapping[str, Any], leading: tuple[str, ...], attrs: dict | None = None) -> Any:
        """``values`` as an `xarray.Dataset`, whose first axes are ``leading``."""
        import xarray

        variables = {
            _plain(name): (self._axes(name, np.ndim(value), leading), np.asarray(value))
            for name, value in values.items()
        }
        sizes = {axis: size for axes, value in variables.values() for axis, size in zip(axes, value.shape, strict=True)}
        labels = {axis: self._labels.get(axis, np.arange(size)) for axis, size in sizes.items()}
        return xarray.Dataset(variables, labels, attrs)

    def _axes(self, name: str, ndim: int, leading: tuple[str, ...]) -> tuple[str, ...]:
        if name == "ess" and leading == PARTICLES:
            return ("chain", "block")
        base = name.removesuffix("_standard_error").removesuffix("_mc_error")
        own = list(self._names.get(base, ()))
        # A log likelihood has no event axes, and a site may have more axes than the model tells.
        default = [f"{base}_dim_{k}" for k in range(ndim)]
        return (*leading, *map(_plain, (own + default[len(own) :])[: ndim - len(leading)]))


def _plain(name: str) -> str:
    """A name without the divider of NumPyro's scopes, which is that of groups in a `DataTree`."""
    return name.replace("/", ".")


def _assemble(groups: dict[str, Any]) -> Any:
    try:
        import arviz
    except ImportError as error:
        raise ImportError("to_arviz needs ArviZ: pip install 'numpyro_smcopt[arviz]'.") from error
    present = {name: group for name, group in groups.items() if group.data_vars}
    # Not `hasattr(arviz, "InferenceData")`: ArviZ 1 warns of the question.
    if int(arviz.__version__.partition(".")[0]) < 1:
        return arviz.InferenceData(**present, warn_on_custom_groups=False)
    import xarray

    return xarray.DataTree.from_dict(present)
