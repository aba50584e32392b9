# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Pictures of a fit: how it went, how well its particles represent the posterior, and what the latents look like.

Every function draws into the figure (or axes) that it is given, or into a new one, and returns it; nothing is shown or
saved. Matplotlib is an optional dependency and is imported only here, so this module is imported by its name::

    from numpyro_smcopt import plots
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numpyro_smcopt.results import RunResult
from numpyro_smcopt.types import Array

try:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
except ImportError as error:
    raise ImportError("numpyro_smcopt.plots needs Matplotlib: pip install 'numpyro_smcopt[plots]'.") from error

MOST_STRIPS = 12
MOST_LABELS = 40
LEVEL = 0.95
RUNS = RunResult | Sequence[RunResult]


def plot_run(
    result: RUNS,
    *,
    report: Any = None,
    reference: Mapping[str, Any] | None = None,
    log_likelihood: float | None = None,
    label: str = "reference",
) -> Figure:
    """An overview: parameters, effective sample size and acceptance, running log likelihood over the iterations.

    Args:
        result: What `run` returned, or the results of several runs.
        report: What `summarize` returned; adds confidence intervals and the log evidence.
        reference: Values to compare with, ``{param site: value}``, drawn as dashed lines.
        log_likelihood: The same for the log likelihood.
        label: What the reference is called.
    """
    strips = len(_scalars(_runs(result)[0], None))
    figure = plt.figure(figsize=(11, max(5.0, 1.1 * min(strips, MOST_STRIPS))), layout="constrained")
    left, right = figure.subfigures(1, 2, squeeze=False)[0]
    plot_params(result, report=report, reference=reference, label=label, figure=left)
    diagnostics, likelihood = right.subplots(2, sharex=True)
    plot_diagnostics(result, axes=diagnostics)
    plot_log_likelihood(result, report=report, reference=log_likelihood, label=label, axes=likelihood)
    diagnostics.set_xlabel("")
    return figure


def plot_params(
    result: RUNS,
    names: Sequence[str] | None = None,
    *,
    report: Any = None,
    reference: Mapping[str, Any] | None = None,
    label: str = "reference",
    figure: Any = None,
) -> Any:
    """The iterates of every parameter; each scalar has a strip of its own, because their units differ.

    Args:
        result: What `run` returned, or the results of several runs, one line each.
        names: Param sites (default: all, up to 12 scalars).
        report: What `summarize` returned: its 95% intervals become horizontal bands.
        reference: Values to compare with, ``{param site: value}``, drawn as dashed lines.
        label: What the reference is called.
        figure: A figure or subfigure to draw into.

    Raises:
        ValueError: If the run has kept no iterates, or does not know a name.
    """
    runs = _runs(result)
    scalars = _scalars(runs[0], names)
    shown = scalars[:MOST_STRIPS]
    if figure is None:
        figure = plt.figure(figsize=(6.5, max(3.0, 1.1 * len(shown))), layout="constrained")
    if len(shown) < len(scalars):
        figure.suptitle(f"{len(shown)} of {len(scalars)} parameters; choose with names=", fontsize="medium")
    intervals = None if report is None else report.confidence_intervals(LEVEL)
    strips = figure.subplots(len(shown), sharex=True, squeeze=False)[:, 0]
    for axes, (title, name, index) in zip(strips, shown, strict=True):
        if intervals is not None:
            low, high = np.asarray(intervals[name])[index]
            axes.axhspan(low, high, color="C0", alpha=0.15, linewidth=0, label=f"{LEVEL:.0%} interval")
            axes.margins(y=0.2)  # so that the ends of the interval are seen
        for k, run in enumerate(runs):
            path = np.asarray(run.trajectory[name])[(slice(None), *index)]
            axes.plot(
                np.arange(1, len(path) + 1), path, color=f"C{k}", linewidth=1.6, label="iterates" if k == 0 else None
            )
        if reference is not None and name in reference:
            value = np.asarray(reference[name])[index]
            axes.axhline(value, color="black", linestyle=(0, (4, 4)), linewidth=1, label=label)
        axes.set_ylabel(title, rotation=0, ha="right", va="center")
    if len(strips[0].get_legend_handles_labels()[0]) > 1:  # one line needs no name
        strips[0].legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, frameon=False, fontsize="small")
    strips[-1].set_xlabel("iteration")
    figure.align_ylabels(strips)
    return figure


def plot_diagnostics(result: RUNS, *, axes: Axes | None = None) -> Axes:
    """Effective sample size (of the smallest block, as a share of the particles) and acceptance over the iterations.

    Args:
        result: What `run` returned, or the results of several runs.
        axes: Where to draw.
    """
    axes = _axes(axes)
    for run in _runs(result):
        for color, name, title in (("C1", "ess", "effective sample size"), ("C4", "acceptance_rate", "acceptance")):
            if name in run.diagnostics:
                values = run.diagnostics[name]
                axes.plot(np.arange(1, len(values) + 1), values, color=color, linewidth=0.7, label=title)
    _legend_once(axes)
    axes.set(xlabel="iteration", ylabel="share", ylim=(0.0, 1.05))
    return axes


def plot_log_likelihood(
    result: RUNS,
    *,
    report: Any = None,
    reference: float | None = None,
    label: str = "reference",
    axes: Axes | None = None,
) -> Axes:
    """The running log likelihood; limits leave out the way to the neighbourhood of the maximum.

    Algorithms without weights have none, and their loss is another number: then minus the loss is drawn and called so.

    Args:
        result: What `run` returned, or the results of several runs.
        report: What `summarize` returned: its log evidence becomes a band of two standard deviations.
        reference: A log likelihood to compare with.
        label: What the reference is called.
        axes: Where to draw.
    """
    axes = _axes(axes)
    settled: list[float] = []
    for k, run in enumerate(_runs(result)):
        values = -np.asarray(run.losses, float)
        axes.plot(np.arange(1, len(values) + 1), values, color="C2" if k == 0 else f"C{k}", linewidth=0.8)
        tail = values[len(values) // 4 :]
        settled += [v for v in (tail.min(), tail.max()) if np.isfinite(v)]
    if report is not None:
        center, width = report.log_evidence, 2 * report.log_evidence_std
        axes.axhspan(center - width, center + width, color="C0", alpha=0.3, linewidth=0, label="log evidence, 2 sd")
        axes.axhline(center, color="C0", linewidth=0.8)
        settled += [center - width, center + width]
    if reference is not None:
        axes.axhline(reference, color="black", linestyle="--", linewidth=1, label=label)
        settled.append(reference)
    if settled:
        margin = max(1.0, 0.1 * (max(settled) - min(settled)))
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
    _legend_once(axes)
    weighted = all("log_evidence" in run.diagnostics for run in _runs(result))
    axes.set(xlabel="iteration", ylabel="running log likelihood" if weighted else "minus the loss")
    return axes


def plot_weights(log_weights: Array, *, axes: Axes | None = None) -> Axes:
    """Histogram of the weights, relative to equal ones; a healthy cloud has no weight far to the right.

    Args:
        log_weights: [N], or [N, B] for independent blocks, all of which are shown together.
        axes: Where to draw.

    Raises:
        ValueError: If a block has no finite log weight.
    """
    columns = np.asarray(log_weights, float).reshape(len(log_weights), -1)
    if not np.all(np.any(np.isfinite(columns), 0)):
        raise ValueError("plot_weights needs a finite log weight in every block.")
    weights = np.exp(columns - columns.max(0))
    weights /= weights.sum(0)
    share = 1 / (weights**2).sum(0) / len(weights)
    axes = _axes(axes)
    relative = (len(weights) * weights).ravel()
    axes.hist(relative, bins=list(np.linspace(0.0, max(2.0, relative.max()), 41)), color="C0", alpha=0.8)
    axes.axvline(1.0, color="black", linestyle="--", linewidth=1, label="equal weights")
    axes.set(xlabel="weight, in units of 1/N", ylabel="particles")
    several = f" (smallest of {share.size} blocks)" if share.size > 1 else ""
    axes.set_title(f"effective sample size {share.min():.0%} of {len(weights)}{several}", fontsize="medium")
    axes.legend(fontsize="small")
    return axes


def plot_latents(
    samples: Mapping[str, Any],
    names: Sequence[str] | None = None,
    *,
    log_weights: Array | None = None,
    labels: Sequence[Any] | None = None,
    level: float = 0.9,
    sort: bool = True,
    figure: Any = None,
) -> Any:
    """Posterior medians and intervals along the plate of a latent (a caterpillar plot), a panel per component.

    Args:
        samples: ``{site: [S, groups, ...]}`` from `get_samples`, or those of a report.
        names: Which sites (default: all with a plate).
        log_weights: [S] weights of the samples, as a report has them.
        labels: Names of the groups.
        level: Probability of the intervals.
        sort: Whether members are sorted by the median of the first panel.
        figure: A figure or subfigure to draw into.

    Raises:
        ValueError: If no site has a plate, or the sizes of the sites or of ``labels`` do not fit.
    """
    names = [name for name, value in samples.items() if np.ndim(value) > 1] if names is None else list(names)
    panels = [panel for name in names for panel in _components(name, np.asarray(samples[name], float))]
    sizes = {values.shape[1] for _, values in panels}
    if len(sizes) != 1 or (labels is not None and len(labels) not in sizes):
        got = "" if labels is None else f", and {len(labels)} labels"
        raise ValueError(
            f"plot_latents wants sites [S, groups, ...] of the same groups; {names} have {sorted(sizes)}{got}."
        )
    size = sizes.pop()
    tails = ((1 - level) / 2, 0.5, (1 + level) / 2)
    quantiles = [_weighted_quantiles(values, log_weights, tails) for _, values in panels]
    order = np.argsort(quantiles[0][1]) if sort else np.arange(size)
    if figure is None:
        figure = plt.figure(figsize=(3.6 * len(panels) + 1, min(9.0, 1.5 + 0.22 * size)), layout="constrained")
    columns = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    rows = np.arange(size)
    for axes, (title, _), (low, median, high) in zip(columns, panels, quantiles, strict=True):
        axes.hlines(rows, low[order], high[order], color="C0", linewidth=1.2 if size <= MOST_LABELS else 0.6)
        axes.plot(median[order], rows, "o", color="C0", markersize=4 if size <= MOST_LABELS else 1.5)
        axes.set(xlabel=f"{title}, {level:.0%}")
    names_of_rows = np.arange(size) if labels is None else np.asarray(labels)
    shown = rows if size <= MOST_LABELS else rows[:: -(-size // MOST_LABELS)]
    columns[0].set_yticks(shown, [str(names_of_rows[order][k]) for k in shown], fontsize="small")
    return figure


def _runs(result: Any) -> list[RunResult]:
    return [result] if hasattr(result, "trajectory") else list(result)


def _scalars(run: RunResult, names: Sequence[str] | None) -> list[tuple[str, str, tuple[Any, ...]]]:
    """(title, site, index) of every scalar, as ("beta[0]", "beta", (0,))."""
    if not run.trajectory:
        raise ValueError("This run has kept no iterates, because theta is too large; there is nothing to draw.")
    if unknown := sorted(set(names or ()) - set(run.trajectory)):
        raise ValueError(f"names contains {unknown}, but the param sites are {sorted(run.trajectory)}.")
    arrays = {name: v for name, v in run.trajectory.items() if hasattr(v, "shape")}  # modules have no strips
    return [
        (name + (f"[{', '.join(map(str, index))}]" if index else ""), name, index)
        for name in (arrays if names is None else names)
        for index in np.ndindex(arrays[name].shape[1:])
    ]


def _components(name: str, values: np.ndarray) -> list[tuple[str, np.ndarray]]:
    """``[S, groups, ...]`` as titled panels [S, groups]."""
    if values.ndim < 2:
        raise ValueError(f"Site '{name}' has shape {values.shape}, which has no axis of a plate behind the draws.")
    return [
        (name + (f"[{', '.join(map(str, index))}]" if index else ""), values[(slice(None), slice(None), *index)])
        for index in np.ndindex(values.shape[2:])
    ]


def _weighted_quantiles(values: np.ndarray, log_weights: Array | None, levels: Sequence[float]) -> np.ndarray:
    """[len(levels), groups] quantiles over the draws of ``values [S, groups]``."""
    if log_weights is None:
        return np.quantile(values, levels, axis=0)
    weights = np.exp(np.asarray(log_weights, float) - np.max(log_weights))
    order = np.argsort(values, axis=0)
    cumulative = np.cumsum(weights[order], axis=0) / weights.sum()
    found = [
        [column[np.searchsorted(below, level)] for column, below in zip(ordered.T, cumulative.T, strict=True)]
        for level in levels
        for ordered in [np.take_along_axis(values, order, 0)]
    ]
    return np.asarray(found)


def _axes(axes: Axes | None) -> Axes:
    return plt.figure(figsize=(6.5, 3.0), layout="constrained").subplots() if axes is None else axes


def _legend_once(axes: Axes) -> None:
    """A legend in which runs of the same kind appear once."""
    handles, titles = axes.get_legend_handles_labels()
    unique = dict(zip(titles, handles, strict=True))
    if unique:
        axes.legend(unique.values(), unique.keys(), loc="best", fontsize="small")
