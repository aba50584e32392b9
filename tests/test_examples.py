# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
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


def numbers_after(label, text):
    """The numbers of the row that begins with `label`."""
    row = re.search(rf"^{re.escape(label)}(.*)$", text, re.MULTILINE).group(1)
    return [float(number) for number in re.findall(r"-?\d+\.?\d*(?:e[-+]?\d+)?", row)]


def test_mixture_is_tuned_to_the_optimum_by_quadrature(tmp_path):
    figure = tmp_path / "mixture.png"
    options = [
        "--num-steps",
        "60",
        "--num-particles",
        "500",
        "--algorithms",
        "SMCOptimizer",
        "--divergences",
        "reverse",
    ]
    done = run_python("examples/mixture_reward.py", *options, "--output", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    start, best, found = (
        numbers_after(f"{name:<20}reverse", done.stdout)[0] for name in ("the start", "the optimum", "SMCOptimizer")
    )
    assert best - 0.02 < found <= best and start < best - 0.2


DAMPING_ROWS = ("  PGD", "  MPGD, gamma 0.05: under-damped", "    without gradient correction")


def test_momentum_arrives_first_and_gradient_correction_helps(tmp_path):
    figure = tmp_path / "damping.png"
    options = ["--num-steps", "700", "--regimes", "under-damped", "--only-nominal", "--output", str(figure)]
    done = run_python("examples/damping.py", *options)
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    rows = {name: numbers_after(f"{name:<48}", done.stdout) for name in DAMPING_ROWS}
    plain, corrected, uncorrected = rows.values()
    # Of gradient descent only two numbers are printed, since it has not come near: the variance, and how far it is off.
    assert len(plain) == 2 and abs(plain[0] - 0.5) < 0.02 and plain[1] < -10
    assert corrected[0] < uncorrected[0] and corrected[1] < 700 and abs(corrected[-1]) < 1


def test_step_sizes_are_adapted_from_both_sides(tmp_path):
    figure = tmp_path / "step_sizes.png"
    done = run_python("examples/step_sizes.py", "--num-steps", "80", "--output", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    rows = re.findall(r"^ +(\d\.\de-\d+) +(\S+) +(\S+) +(\S+)$", done.stdout, re.MULTILINE)
    start, fixed, adapted, end = map(list, zip(*(map(float, row) for row in rows), strict=True))
    assert start == [3e-4, 3e-3, 3e-2, 3e-1]
    # One step that is far too small, one that is far too large: 80 updates change them by up to 1.03^80 = 10.6.
    assert fixed[0] > 0.99 and end[0] > 8 * start[0]
    assert fixed[3] < 0.2 and adapted[3] > fixed[3] + 0.3 and end[3] < start[3] / 2


def test_energy_based_model_is_trained_and_tuned(tmp_path):
    figure = tmp_path / "energy.png"
    sizes = {"num-data": 500, "batch-size": 100, "width": 8, "num-particles": 200, "train-steps": 30, "tune-steps": 10}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    options += ["--algorithms", "SMCOptimizer", "--kl-weights", "1"]
    done = run_python("examples/energy_based.py", *options, "--output", str(figure))
    assert done.returncode == 0, done.stderr
    assert figure.read_bytes().startswith(PNG_SIGNATURE)
    assert (tmp_path / "energy_tuned.png").read_bytes().startswith(PNG_SIGNATURE)
    kl, _, _, log_z, again = numbers_after(f"{'SMCOptimizer':<20}", done.stdout)[:5]
    assert 0 < kl < 0.8 and abs(log_z - again) < 0.1  # of the base measure alone, KL is 1.59
    tuned = done.stdout[done.stdout.index("tuning") :]
    reward, _, divergence, objective, gap = numbers_after(f"{'SMCOptimizer':<20}", tuned)[1:6]
    assert abs(reward - divergence - objective) < 2e-4 and -1e-4 < gap < 0.2


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
