# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The pictures show the numbers that they were given; looking at them is left to people."""

import types

import matplotlib
import numpy as np
import pytest

from numpyro_smcopt import RunResult, Status

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402

from numpyro_smcopt import plots  # noqa: E402

T = 40


def run(seed=0, num_params=2):
    rng = np.random.default_rng(seed)
    trajectory = {"beta": rng.normal(size=(T, num_params)), "sd": rng.gamma(2.0, size=T), "net": {"w": np.ones((T, 3))}}
    losses = np.linspace(90.0, 80.0, T)
    losses[:3] = np.inf, 5000.0, 300.0
    diagnostics = {"ess": rng.uniform(size=T), "acceptance_rate": rng.uniform(size=T), "log_evidence": -losses}
    return RunResult({}, None, losses, diagnostics, Status.FINISHED, trajectory)


REPORT = types.SimpleNamespace(
    confidence_intervals=lambda level: {"beta": np.array([[-1.0, 1.0], [-2.0, 2.0]]), "sd": np.array([0.5, 1.5])},
    log_evidence=-81.0,
    log_evidence_std=0.5,
)


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


def lines(axes):
    return [np.asarray(line.get_ydata()) for line in axes.lines]


def test_parameters_have_a_strip_each_with_interval_and_reference():
    result = run()
    figure = plots.plot_params(result, report=REPORT, reference={"sd": 1.1}, label="lme4")
    strips = figure.axes
    assert [axes.get_ylabel() for axes in strips] == ["beta[0]", "beta[1]", "sd"]
    np.testing.assert_array_equal(lines(strips[1])[0], result.trajectory["beta"][:, 1])
    np.testing.assert_array_equal(lines(strips[2])[1], [1.1, 1.1])
    band = strips[1].patches[0].get_extents().transformed(strips[1].transData.inverted())
    np.testing.assert_allclose([band.y0, band.y1], [-2.0, 2.0])
    assert strips[1].get_ylim()[0] < -2.0  # the ends of the interval are seen


def test_runs_have_a_line_each():
    runs = [run(0), run(1)]
    strip = plots.plot_params(runs, ["sd"]).axes[0]
    np.testing.assert_array_equal(lines(strip), [r.trajectory["sd"] for r in runs])


def test_many_parameters_are_cut_and_said_to_be():
    figure = plots.plot_params(run(num_params=30))
    assert len(figure.axes) == plots.MOST_STRIPS
    assert figure.get_suptitle() == "12 of 31 parameters; choose with names="


def test_log_likelihood_leaves_out_the_approach_but_nothing_else():
    axes = plots.plot_log_likelihood([run()], report=REPORT, reference=-95.0)
    low, high = axes.get_ylim()
    assert -100 < low < -95 and -80 < high < -75
    np.testing.assert_array_equal(lines(axes)[0], -run().losses)
    assert axes.get_ylabel() == "running log likelihood"


def test_a_loss_that_is_no_log_likelihood_is_not_called_one():
    axes = plots.plot_log_likelihood(run()._replace(diagnostics={}))
    assert axes.get_ylabel() == "minus the loss"


def test_overview_holds_all():
    figure = plots.plot_run([run(0), run(1)], report=REPORT, reference={"sd": 1.0}, log_likelihood=-80.0)
    labels = {text.get_text() for axes in figure.axes for text in (axes.get_legend() or axes).findobj(plt.Text)}
    assert {"95% interval", "reference", "effective sample size", "acceptance", "log evidence, 2 sd"} <= labels
    assert len(figure.axes) == 5


def test_weights_are_relative_to_equal_ones():
    axes = plots.plot_weights(np.log([0.1, 0.2, 0.3, 0.4]))
    edges = np.array([patch.get_x() for patch in axes.patches if patch.get_height()])
    np.testing.assert_allclose(edges, [0.4, 0.8, 1.2, 1.6], atol=0.051)
    assert axes.get_title() == "effective sample size 83% of 4"
    blocks = plots.plot_weights(np.log([[0.1, 0.5], [0.9, 0.5]]))
    assert blocks.get_title() == "effective sample size 61% of 2 (smallest of 2 blocks)"


def test_latents_are_sorted_quantiles_by_weight():
    rng = np.random.default_rng(0)
    samples = {"b": rng.normal([3.0, 1.0, 2.0], 1.0, size=(500, 3)), "scale": rng.gamma(1.0, size=500)}
    counts = rng.integers(1, 4, size=500)
    with np.errstate(divide="ignore"):
        axes = plots.plot_latents(samples, log_weights=np.log(counts), labels=["c", "a", "b"], level=0.8).axes[0]
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["a", "b", "c"]
    copies = np.repeat(samples["b"], counts, axis=0)
    low, median, high = np.quantile(copies, [0.1, 0.5, 0.9], axis=0, method="inverted_cdf")[:, [1, 2, 0]]
    segments = np.array(axes.collections[0].get_segments())
    np.testing.assert_allclose(segments[:, :, 0], np.stack([low, high], 1))
    np.testing.assert_allclose(axes.lines[0].get_xdata(), median)
    other = plots.plot_latents({"b": copies}, level=0.8).axes[0]
    np.testing.assert_allclose(other.lines[0].get_xdata(), median, atol=0.02)


def test_components_of_latents_have_a_panel_each():
    figure = plots.plot_latents({"b": np.random.default_rng(0).normal(size=(50, 200, 2))}, sort=False)
    assert [axes.get_xlabel() for axes in figure.axes] == ["b[0], 90%", "b[1], 90%"]
    assert len(figure.axes[0].get_yticks()) <= plots.MOST_LABELS


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: plots.plot_params(run()._replace(trajectory={})), "kept no iterates"),
        (lambda: plots.plot_params(run(), ["gamma"]), r"names contains \['gamma'\]"),
        (lambda: plots.plot_weights(np.full(3, -np.inf)), "a finite log weight"),
        (lambda: plots.plot_latents({"b": np.ones(5)}, ["b"]), r"Site 'b' has shape \(5,\)"),
        (lambda: plots.plot_latents({"a": np.ones((5, 2)), "b": np.ones((5, 3))}), r"have \[2, 3\]"),
        (lambda: plots.plot_latents({"b": np.ones((5, 3))}, labels=["x"]), "and 1 labels"),
    ],
)
def test_what_cannot_be_drawn_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
