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


@pytest.mark.slow
def test_digits_are_tuned_and_judged(tmp_path):
    """A moment's pretraining and two updates: no sampler does better than the bound, and real digits are digits."""
    pytest.importorskip("flax")
    figure = tmp_path / "digits.png"
    budget = "--pretraining-steps 30 --num-steps 2 --num-particles 8 --num-times 4 --num-judged 100 --kl-weights 1"
    done = run_python("examples/digits_diffusion.py", *budget.split(), "--output", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    rows = dict(re.findall(r"^(\S.*?)  +(\d.*)$", done.stdout, re.MULTILINE))
    rows = {name: [float(value) for value in numbers.split()] for name, numbers in rows.items()}
    _, agreed, sure, distance, _ = rows["digits held out"]
    assert agreed > 0.95 and sure > 0.8 and distance < rows["pixels mixed"][3]
    before = rows["pretrained"][0]
    for name, sign in (("brighter, weight 1", 1), ("darker, weight 1", -1)):
        pixel, kl, loss, least, *_ = rows[name]
        assert abs(loss - (kl - sign * pixel)) < 0.002 and kl > 0
        assert loss > least - 0.1 and sign * (pixel - before) > -0.1
