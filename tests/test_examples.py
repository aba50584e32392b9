"""The examples run as a user runs them; test_docs.py runs the programs of README and documentation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
EXAMPLES = {"sleepstudy": ("beta[0]", "beta[1]", "sd[0]", "sd[1]", "rho", "sigma"), "cbpp": ("beta[3]", "sd")}
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


def run_python(*args):
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True
    )


@pytest.mark.parametrize("name", EXAMPLES)
def test_example_prints_its_table_and_draws_its_figure(name, tmp_path):
    figure = tmp_path / "figures" / f"{name}.png"
    done = run_python(f"examples/{name}.py", "--num-steps", "20", "--num-particles", "16", "--output", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    for label in (*EXAMPLES[name], "log likelihood"):
        row = rf"^{re.escape(label)} +(\S+) +(\S+)$"
        estimate, published = map(float, re.search(row, done.stdout, re.MULTILINE).groups())
        assert abs(estimate) < 1e6 and abs(published) < 1e6


def test_generator_compares_its_methods_and_draws_them(tmp_path):
    figure = tmp_path / "generator.png"
    sizes = ["--passes", "560", "--num-training", "24", "--num-test", "4", "--num-draws", "1"]
    done = run_python(
        "examples/generator.py", *sizes, "--methods", "momentum", "persistent", "autoencoder", "--output", str(figure)
    )
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    for method in ("momentum", "persistent", "autoencoder"):
        row = re.search(rf"^{method} +\d+ +(\S+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
        error, log_likelihood, _ = map(float, row.groups())
        assert 0 < error < 1 and abs(log_likelihood) < 1e6
