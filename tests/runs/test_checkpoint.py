# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""Checkpoints: files that are whole or refused, and runs that do not notice that they were killed."""

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from models import normal

from numpyro_smcopt import EarlyStop, SMCOptimizer, Status
from numpyro_smcopt.handlers import adapt_step_size
from numpyro_smcopt.kernels import MALA, RandomWalk
from numpyro_smcopt.runs.run import Driver
from numpyro_smcopt.runs.tree_file import load, restore, save

pytestmark = pytest.mark.slow

# -- files -------------------------------------------------------------------------------------------------------------
TREE = {
    "state": {
        "a": np.arange(3.0, dtype=np.float32),
        "key": random.key(3, impl="rbg"),
        "small": jnp.ones(2, jnp.bfloat16),
        "flag": np.asarray(True),
        "pair": (np.zeros((), np.int32), None),
    },
    "records": {"with / and 'quote'": np.arange(6, dtype=np.int32).reshape(3, 2)},
}


def same(one, other):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jax.dtypes.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = random.key_data(a), random.key_data(b)
        np.testing.assert_array_equal(a, b)


def test_a_tree_comes_back_as_it_was(tmp_path):
    save(tmp_path / "file", {"note": [1, None, "x"]}, TREE)
    assert os.listdir(tmp_path) == ["file"]
    saved = load(tmp_path / "file")
    assert saved.header == {"note": [1, None, "x"]}
    for name in TREE:
        same(restore(saved, name, jax.eval_shape(lambda name=name: TREE[name])), TREE[name])
    with np.load(tmp_path / "file") as archive:  # anyone can look into it
        np.testing.assert_array_equal(archive["['state']['a']"], TREE["state"]["a"])


def test_a_dimension_of_any_length(tmp_path):
    save(tmp_path / "file", {}, {"records": np.zeros((7, 2))})
    needed = lambda *shape: jax.ShapeDtypeStruct(shape, np.dtype(float))  # noqa: E731
    saved = load(tmp_path / "file")
    assert restore(saved, "records", needed(-1, 2)).shape == (7, 2)
    with pytest.raises(ValueError, match=r"float64 of shape \(7, 2\) at \['records'\], where .* of shape \(any, 3\)"):
        restore(saved, "records", needed(-1, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": jnp.zeros(4)}, r"float32 of shape \(3,\) at \['state'\]\['a'\], where .* has float32 of shape \(4,\)"),
        ({"a": jnp.zeros(3, int)}, r"float32 of shape .* has int32 of shape"),
        ({"key": random.key(0)}, r"key<rbg> of shape \(\) at .*, where .* has key<fry>"),
        ({"new": jnp.zeros(3)}, r"has nothing at .*new.*, but with .* is an array"),
        ({"a": None}, r"has an array at \['state'\]\['a'\], but with .* is nothing"),
    ],
)
def test_another_structure_is_refused(tmp_path, change, message):
    save(tmp_path / "file", {}, TREE)
    with pytest.raises(ValueError, match=message):
        restore(load(tmp_path / "file"), "state", TREE["state"] | change)


def test_every_flipped_bit_and_every_missing_byte_is_noticed(tmp_path):
    """Or changes nothing that is read: a date, say."""
    save(tmp_path / "file", {"note": 1}, TREE)
    whole, good = (tmp_path / "file").read_bytes(), load(tmp_path / "file")
    refused = 0
    damaged = [whole[:k] + bytes([whole[k] ^ (1 << k % 8)]) + whole[k + 1 :] for k in range(len(whole))]
    damaged += [whole[:k] for k in range(0, len(whole), 7)] + [b"", b"nonsense", pickle.dumps(TREE["records"])]
    for data in damaged:
        (tmp_path / "damaged").write_bytes(data)
        try:
            found = load(tmp_path / "damaged")
        except ValueError as error:
            assert "no checkpoint of this package, or it is damaged" in str(error)
            refused += 1
        else:
            assert found.header == good.header
            same(found.arrays, good.arrays)
    assert refused > 0.7 * len(damaged)


def test_files_of_the_future_and_of_nobody(tmp_path):
    with zipfile.ZipFile(tmp_path / "file", "w") as archive:
        archive.writestr("header.json", '{"format": 99}')
    with pytest.raises(ValueError, match="format 99, this version reads 1"):
        load(tmp_path / "file")
    with pytest.raises(FileNotFoundError, match="There is no checkpoint at '.*absent'"):
        load(tmp_path / "absent")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    save(tmp_path / "file", {"n": 1}, TREE)

    with pytest.raises(OSError, match="disk full"):
        save(tmp_path / "file", {"n": 2}, {"x": FailsToBecomeAnArray()})
    assert load(tmp_path / "file").header == {"n": 1}


class FailsToBecomeAnArray:
    dtype, shape = np.dtype(float), (2,)

    def __array__(self, *args, **kwargs):
        raise OSError("disk full")


WRITER = """
    import os, random, signal, sys, time
    import numpy as np
    from numpyro_smcopt.runs.tree_file import load, save

    path, picks = sys.argv[1], random.Random(0)
    trees = [{"x": np.full(200_000, k)} for k in range(2)]
    save(path, {"k": 0}, trees[0])
    for _ in range(25):
        child = os.fork()
        if not child:
            while True:
                for k in (1, 0):
                    save(path, {"k": k}, trees[k])
        time.sleep(picks.uniform(0.0, 0.03))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        saved = load(path)
        assert np.all(saved.arrays["['x']"] == saved.header["k"])
    assert len(os.listdir(os.path.dirname(path))) <= 2
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_file_is_whole_whenever_its_writer_is_killed(tmp_path):
    subprocess.run([sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path / "file")], check=True, timeout=100)


# -- runs --------------------------------------------------------------------------------------------------------------
SMALL = np.array([1.0, 2.0, 4.5], np.float32)


def optimizer():
    return SMCOptimizer(normal, optax.adam(0.05), kernel=RandomWalk(), num_particles=16)


@pytest.fixture(scope="module")
def uninterrupted():
    return optimizer().run(random.key(0), 230, SMALL, progress_bar=False)


CHILD = """
    import sys
    from jax import random
    from test_checkpoint import SMALL, optimizer

    optimizer().run(random.key(0), 230, SMALL, progress_bar=False, checkpoint=sys.argv[1], checkpoint_every=30)
"""


def test_a_killed_run_goes_on_in_another_process_as_if_nothing_had_been(tmp_path, uninterrupted):
    path = tmp_path / "run"
    slow = "import numpyro_smcopt.runs.loop as loop, time\nold = loop._pace\n"
    slow += "loop._pace = lambda *args: (time.sleep(0.05), min(old(*args), 7))[1]\n"  # so that there is time to kill it
    child = subprocess.Popen(
        [sys.executable, "-c", slow + textwrap.dedent(CHILD), str(path)],
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(
                [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__)), os.getcwd()]
            ),
        },
    )
    try:
        until = time.monotonic() + 100
        while time.monotonic() < until and (not path.exists() or load(path).header["done"] < 60):
            time.sleep(0.01)
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    done = load(path).header["done"]
    assert 60 <= done < 230 and done % 30 == 0
    resumed = optimizer().resume(path, SMALL, progress_bar=False)
    same(resumed._replace(status=None), uninterrupted._replace(status=None))
    assert resumed.status is uninterrupted.status is Status.FINISHED
    # The file now holds the end, and says so again.
    same(optimizer().resume(path, SMALL, progress_bar=False).losses, uninterrupted.losses)


def test_checkpoints_and_their_number_change_nothing(tmp_path, uninterrupted):
    again = optimizer().run(
        random.key(0), 230, SMALL, progress_bar=False, checkpoint=tmp_path / "run", checkpoint_every=13
    )
    same(again._replace(status=None), uninterrupted._replace(status=None))


def test_a_run_can_be_made_longer(tmp_path, uninterrupted):
    optimizer().run(random.key(0), 100, SMALL, progress_bar=False, checkpoint=tmp_path / "run")
    longer = optimizer().resume(tmp_path / "run", SMALL, num_steps=230, progress_bar=False)
    same(longer._replace(status=None), uninterrupted._replace(status=None))


class Impatient:
    """A progress bar that the user interrupts."""

    def __init__(self, num_steps, describe, done=0, shown=True):
        self.left = 120 - done

    def advance(self, steps, records):
        self.left -= steps
        if self.left <= 0:
            raise KeyboardInterrupt

    def close(self):
        pass


def test_an_interrupted_run_returns_what_it_has_and_can_be_resumed(tmp_path, monkeypatch, uninterrupted):
    with monkeypatch.context() as patch:
        patch.setattr("numpyro_smcopt.runs.loop.ProgressBar", Impatient)
        patch.setattr("numpyro_smcopt.runs.loop.CHUNK", 50)  # the interrupt is heard after a chunk
        result = optimizer().run(random.key(0), 230, SMALL, checkpoint=tmp_path / "run")
    assert result.status is Status.INTERRUPTED and 120 <= len(result.losses) < 230
    np.testing.assert_array_equal(result.losses, uninterrupted.losses[: len(result.losses)])
    same(optimizer().resume(tmp_path / "run", SMALL, progress_bar=False).state, uninterrupted.state)


def test_an_interrupt_before_the_first_update_is_raised(monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    one = optimizer()
    state = one.init(random.key(0), SMALL)
    monkeypatch.setattr(Driver, "_program", lambda self: interrupted)
    with pytest.raises(KeyboardInterrupt):
        one.run(random.key(0), 10, SMALL, progress_bar=False, init_state=state)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoints") / "run"
    optimizer().run(random.key(0), 20, SMALL, progress_bar=False, checkpoint=path)
    return path


def wider(y):
    mean = numpyro.param("mean", 0.0)
    with numpyro.plate("data", len(y)):
        x = numpyro.sample("x", dist.Normal(mean, 1.1))
        numpyro.sample("y", dist.Normal(x, 0.5), obs=y)


def renamed(y):
    with numpyro.handlers.scope(prefix="my"):
        normal(y)


ADAM = optax.adam(0.05)


@pytest.mark.parametrize(
    ("other", "data", "message"),
    [
        (lambda: optimizer(), SMALL + 1, "the data differ"),
        (lambda: optimizer(), SMALL[:2], r"latent sites 'x' was \[3\] and is \[2\]"),
        (lambda: SMCOptimizer(wider, ADAM, kernel=RandomWalk(), num_particles=16), SMALL, "but other densities"),
        (lambda: SMCOptimizer(renamed, ADAM, kernel=RandomWalk(), num_particles=16), SMALL, r"and now \['my/mean'\]"),
        (lambda: SMCOptimizer(normal, ADAM, kernel=MALA(), num_particles=16), SMALL, "`kernel` was RandomWalk"),
        (lambda: SMCOptimizer(normal, ADAM, kernel=RandomWalk(), num_particles=8), SMALL, "`num_particles` was 16"),
        (
            lambda: SMCOptimizer(normal, optax.sgd(0.1, 0.9), kernel=RandomWalk(), num_particles=16),
            SMALL,
            "at .*theta_state",
        ),
    ],
)
def test_the_checkpoint_of_another_run_is_refused(begun, other, data, message):
    with pytest.raises(ValueError, match=message):
        other().resume(begun, data, progress_bar=False)


def test_paths_are_checked_before_anything_is_computed(begun, tmp_path):
    run = lambda path, every=10: optimizer().run(  # noqa: E731
        random.key(0), 20, SMALL, progress_bar=False, checkpoint=path, checkpoint_every=every
    )
    with pytest.raises(FileExistsError, match="Go on with it by resume"):
        run(begun)
    with pytest.raises(FileNotFoundError, match="There is no directory"):
        run(tmp_path / "absent" / "run")
    for path in ("", tmp_path, "run\0"):
        with pytest.raises(ValueError, match="checkpoint must be the path of a file, but .* is none"):
            run(path)
    with pytest.raises(ValueError, match="checkpoint_every must be a positive integer, got 0"):
        run(tmp_path / "run", 0)
    with pytest.raises(FileNotFoundError):
        optimizer().resume(tmp_path / "run", SMALL)


# -- several runs in one file ------------------------------------------------------------------------------------------
def steered():
    handlers = [adapt_step_size()]
    return SMCOptimizer(normal, optax.adam(0.05), kernel=RandomWalk(), num_particles=16, handlers=handlers)


TOGETHER = {"num_runs": 3, "init_params": {"mean": np.array([-1.0, 0.0, 5.0])}}


@pytest.fixture(scope="module")
def together():
    one = steered()
    return one, one.run(random.key(0), 90, SMALL, progress_bar=False, **TOGETHER)


def same_runs(one, other):
    for result in (one, other):
        assert {run.status for run in result.runs.results} == {result.status}
    assert one.status is other.status and one.runs.best == other.runs.best
    same(
        [run._replace(status=None) for run in one.runs.results],
        [run._replace(status=None) for run in other.runs.results],
    )
    same(*(jax.tree.map(np.asarray, result.runs[2:]) for result in (one, other)))  # the maxima hold floats


def test_several_runs_go_on_in_a_new_object_as_if_nothing_had_been(tmp_path, monkeypatch, together):
    one, uninterrupted = together

    class Killed(Impatient):
        def advance(self, steps, records):
            self.left -= steps
            if self.left <= 70:
                raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr("numpyro_smcopt.runs.loop.ProgressBar", Killed)
        one.run(random.key(0), 90, SMALL, checkpoint=tmp_path / "run", checkpoint_every=20, **TOGETHER)
    assert load(tmp_path / "run").header["done"] == 40
    same_runs(steered().resume(tmp_path / "run", SMALL, progress_bar=False), uninterrupted)
    # The file now holds the end, and says so again.
    same_runs(one.resume(tmp_path / "run", SMALL, progress_bar=False), uninterrupted)


def test_several_runs_that_are_interrupted_come_back_and_can_be_resumed(tmp_path, monkeypatch, together):
    one, uninterrupted = together
    with monkeypatch.context() as patch:
        patch.setattr(
            "numpyro_smcopt.runs.loop.ProgressBar",
            lambda num, describe, done, shown: Impatient(num, describe, 70 + done),
        )
        result = one.run(random.key(0), 90, SMALL, checkpoint=tmp_path / "run", **TOGETHER)
    assert {run.status for run in result.runs.results} == {Status.INTERRUPTED}
    for run, whole in zip(result.runs.results, uninterrupted.runs.results, strict=True):
        assert 50 <= len(run.losses) < 90
        np.testing.assert_array_equal(run.losses, whole.losses[: len(run.losses)])
    same_runs(one.resume(tmp_path / "run", SMALL, progress_bar=False), uninterrupted)


def test_several_runs_that_converged_stay_so_and_can_be_made_longer(tmp_path, monkeypatch, together):
    one, uninterrupted = together
    monkeypatch.setattr(EarlyStop, "arrived", lambda self, theta, *rest: len(theta) == 40)
    options = {"progress_bar": False, "checkpoint": tmp_path / "run", "early_stop": EarlyStop(every=20)}
    stopped = one.run(random.key(0), 90, SMALL, **options, **TOGETHER)
    assert stopped.status is Status.CONVERGED and len(stopped.losses) == 40
    same_runs(one.resume(tmp_path / "run", SMALL, progress_bar=False), stopped)
    same_runs(one.resume(tmp_path / "run", SMALL, num_steps=90, progress_bar=False), uninterrupted)


def test_the_checkpoint_of_other_runs_is_refused(tmp_path, together):
    one, _ = together
    one.run(random.key(0), 2, SMALL, progress_bar=False, checkpoint=tmp_path / "run", **TOGETHER)
    for other, data, message in (
        (one, SMALL + 1, "the data differ"),
        (optimizer(), SMALL, "an array at .*mutable_state.*, but with .* is nothing"),
        (SMCOptimizer(normal, ADAM, kernel=RandomWalk(), num_particles=8), SMALL, "`num_particles` was 16 and is 8"),
    ):
        with pytest.raises(ValueError, match=message):
            other.resume(tmp_path / "run", data, progress_bar=False)
    with pytest.raises(FileExistsError, match="Go on with it by resume"):
        one.run(random.key(0), 2, SMALL, progress_bar=False, checkpoint=tmp_path / "run", **TOGETHER)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_runs'"):
        one.resume(tmp_path / "run", SMALL, num_runs=2, progress_bar=False)
