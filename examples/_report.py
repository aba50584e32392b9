# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""What the examples share: their options, the table that they print and the figure that they draw."""

import argparse
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # the figure goes to a file, so no display is needed
import matplotlib.pyplot as plt
import numpy as np

from numpyro_smcopt import plots

EXAMPLES = Path(__file__).parent


def parse_options(name, description):
    """Read the command line of the example `name`."""
    parser = argparse.ArgumentParser(prog=f"{name}.py", description=description)
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--num-particles", type=int, help="default: that of SMCOptimizer")
    parser.add_argument("--output", type=Path, default=EXAMPLES / "output" / f"{name}.png", help="file of the figure")
    return parser.parse_args()


def read_csv(name):
    """Read `data/<name>.csv` as a dict of columns [D]; lines that begin with # tell where the data are from."""
    lines = (EXAMPLES / "data" / f"{name}.csv").read_text().splitlines()
    header, *rows = [line for line in lines if not line.startswith("#")]
    columns = np.array([row.split(",") for row in rows], float).T
    return dict(zip(header.split(","), columns, strict=True))


def print_table(report, published, log_likelihood, source):
    """Print the estimate and the log likelihood there beside the `published` ones, then the whole report."""
    width = len(source) + 4
    print(f"\n{'':<16}{'estimate':>12}{source:>{width}}")
    for label, name, index in _scalars(published):
        print(f"{label:<16}{report.params[name][index]:>12.3f}{np.asarray(published[name])[index]:>{width}.3f}")
    print(f"{'log likelihood':<16}{report.log_evidence:>12.2f}{log_likelihood:>{width}.2f}")
    report.print_summary()


def draw(result, published, log_likelihood, source, title, path):
    """Draw the parameters, the effective sample size and the running log likelihood beside the published values."""
    figure = plots.plot_run(result, reference=published, log_likelihood=log_likelihood, label=source)
    figure.suptitle(title)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    print(f"\nFigure: {path}")


def _scalars(published):
    """List (label, site, index) of every scalar of a dict of arrays, as ("beta[0]", "beta", (0,))."""
    return [
        (name + "".join(f"[{i}]" for i in index), name, index)
        for name, value in published.items()
        for index in np.ndindex(np.shape(value))
    ]
