# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""CPU seconds of a first fit, and where they go, beside NumPyro's SVI in the same process.

    python benchmarks/first_fit.py [names] [--problems FILE] [--programs]

For every model, in a process of its own that is pinned to one core, so that seconds are CPU seconds:

    run          the first `SMCOptimizer(model).run` of 1,000 updates, everything included
    again        the same once more: what a warm fit costs
    other data   a run with other data of the same shapes
    summarize    the first report
    SVI          the first `SVI.run` of 6,000 steps with AutoNormal, and with AutoMultivariateNormal
    cached       the first `run` in a new process, with JAX's persistent compilation cache warm

and, with `--programs`, seconds of tracing, lowering and compiling of every program. FILE is a Python file with a
dictionary ``PROBLEMS`` of objects that have a ``model`` and a method ``load() -> dict`` of its keyword arguments.
Without it three larger models with simulated data are timed.
"""

import argparse
import collections
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROWS = ("run", "again", "other data", "summarize", "AutoNormal", "AutoMVN", "cached")
STAGES = {
    "jaxpr_trace_duration": "trace",
    "jaxpr_to_mlir_module_duration": "lower",
    "backend_compile_duration": "compile",
}


def graded_responses():
    """Items with five ordered answers: 400 persons, 12 items, 60 parameters."""
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    num_persons, num_items = 400, 12

    def model(person, item, num_persons, num_items, answer=None):
        first = numpyro.param("first", -1.5 * jnp.ones(num_items))
        gaps = numpyro.param("gaps", jnp.ones((num_items, 3)), constraint=constraints.positive)
        slope = numpyro.param("slope", jnp.ones(num_items), constraint=constraints.positive)
        with numpyro.plate("persons", num_persons):
            ability = numpyro.sample("ability", dist.Normal(0.0, 1.0))
        cuts = jnp.concatenate([first[:, None], first[:, None] + jnp.cumsum(gaps, 1)], 1)
        with numpyro.plate("answers", len(person)):
            location = slope[item] * ability[person]
            numpyro.sample("answer", dist.OrderedLogistic(location, cuts[item]), obs=answer)

    rng = np.random.default_rng(0)
    person, item = (v.ravel() for v in np.indices((num_persons, num_items)))
    ability = rng.normal(size=num_persons)
    cuts = np.sort(rng.normal(0.0, 1.5, (num_items, 4)), 1)
    uniform = rng.uniform(size=person.size)
    below = 1 / (1 + np.exp(-(cuts[item] - 1.2 * ability[person][:, None])))
    answer = (uniform[:, None] > below).sum(1)
    return model, dict(person=person, item=item, num_persons=num_persons, num_items=num_items, answer=answer)


def nested_counts():
    """Counts with two nested levels: 1,000 patients in 50 clinics, four visits, six parameters."""
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(clinic, patient, covariates, num_clinics, num_patients, count=None):
        beta = numpyro.param("beta", jnp.zeros(3))
        sd_clinic = numpyro.param("sd_clinic", 1.0, constraint=constraints.positive)
        sd_patient = numpyro.param("sd_patient", 1.0, constraint=constraints.positive)
        concentration = numpyro.param("concentration", 5.0, constraint=constraints.positive)
        with numpyro.plate("clinics", num_clinics):
            u = numpyro.sample("u", dist.Normal(0.0, 1.0))
        with numpyro.plate("patients", num_patients):
            v = numpyro.sample("v", dist.Normal(0.0, 1.0))
        with numpyro.plate("visits", len(patient)):
            mean = jnp.exp(covariates @ beta + sd_clinic * u[clinic] + sd_patient * v[patient])
            numpyro.sample("count", dist.NegativeBinomial2(mean, concentration), obs=count)

    rng = np.random.default_rng(1)
    patient = np.repeat(np.arange(1_000), 4)
    clinic = patient // 20
    covariates = np.stack([np.ones(4_000), rng.normal(size=4_000), np.tile(np.arange(4) / 4, 1_000)], 1)
    log_mean = covariates @ [1.0, 0.3, -0.4] + rng.normal(0, 0.5, 50)[clinic] + rng.normal(0, 0.7, 1_000)[patient]
    count = rng.poisson(np.exp(log_mean) * rng.gamma(6.0, 1 / 6.0, 4_000))
    sizes = dict(num_clinics=50, num_patients=1_000)
    return model, dict(clinic=clinic, patient=patient, covariates=covariates, count=count, **sizes)


def growth_curves():
    """Logistic growth of 60 trees, three correlated effects each: ten parameters."""
    import jax.numpy as jnp
    import numpy as np
    import numpyro
    import numpyro.distributions as dist
    from numpyro.distributions import constraints

    def model(age, tree, num_trees, size=None):
        location = numpyro.param("location", jnp.array([5.0, 1.5, 0.0]))
        sd = numpyro.param("sd", jnp.array([0.5, 0.3, 0.3]), constraint=constraints.positive)
        correlation = numpyro.param("correlation", jnp.eye(3), constraint=constraints.corr_cholesky)
        sigma = numpyro.param("sigma", 5.0, constraint=constraints.positive)
        with numpyro.plate("trees", num_trees):
            scale_tril = sd[:, None] * correlation
            b = numpyro.sample("b", dist.MultivariateNormal(location, scale_tril=scale_tril))
        with numpyro.plate("measurements", len(age)):
            top, middle, pace = b[tree].T
            curve = jnp.exp(top) / (1 + jnp.exp(-(age - jnp.exp(middle)) * jnp.exp(pace)))
            numpyro.sample("size", dist.Normal(curve, sigma), obs=size)

    rng = np.random.default_rng(2)
    tree, age = np.repeat(np.arange(60), 8), np.tile(np.linspace(1.0, 8.0, 8), 60)
    top, middle, pace = (np.array([5.2, 1.4, 0.1]) + rng.normal(0, [0.2, 0.15, 0.2], (60, 3)))[tree].T
    size = np.exp(top) / (1 + np.exp(-(age - np.exp(middle)) * np.exp(pace))) + rng.normal(0, 4.0, 480)
    return model, dict(age=age, tree=tree, num_trees=60, size=size)


SIMULATED = {make.__name__: make for make in (graded_responses, nested_counts, growth_curves)}


def load(name, file):
    """The model and its keyword arguments."""
    if file is None:
        return SIMULATED[name]()
    sys.path.insert(0, str(Path(file).parent))
    spec = importlib.util.spec_from_file_location("problems", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["problems"] = module
    spec.loader.exec_module(module)
    problem = module.PROBLEMS[name]
    return problem.model, problem.load()


def time_one(name, file, only_run):
    """Print the figures of one model as JSON; the process is pinned to one core by then."""
    import jax
    import numpy as np
    from jax import random

    from numpyro_smcopt import SMCOptimizer

    programs = collections.defaultdict(lambda: collections.defaultdict(float))
    compiled = []

    def note(event, duration, **about):
        stage = STAGES.get(event.rpartition("/")[2])
        if stage is not None:
            programs[about.get("fun_name", "?")][stage] += duration
            compiled.extend([duration] if stage == "compile" else [])

    model, data = load(name, file)
    seconds, counts = {}, {}

    def timed(row, function):
        start, before = time.process_time(), len(compiled)
        result = function()
        seconds[row], counts[row] = time.process_time() - start, len(compiled) - before
        return result

    jax.monitoring.register_event_duration_secs_listener(note)
    optimizer = SMCOptimizer(model)
    run = lambda **data: optimizer.run(random.key(0), 1_000, progress_bar=False, **data)  # noqa: E731
    result = timed("run", lambda: run(**data))
    if not only_run:
        seen = {key: dict(value) for key, value in programs.items()}
        timed("again", lambda: run(**data))
        floats = (key for key, v in data.items() if isinstance(v, np.ndarray) and v.dtype.kind == "f")
        one = next(floats, None)
        other = (
            data
            if one is None
            else {**data, one: data[one] * np.linspace(1.0, 1.001, data[one].size).reshape(data[one].shape)}
        )
        timed("other data", lambda: run(**other))
        timed("summarize", lambda: optimizer.summarize(random.key(1), result.state, **data))
        from numpyro.infer import SVI, Trace_ELBO
        from numpyro.infer.autoguide import AutoMultivariateNormal, AutoNormal
        from numpyro.optim import Adam

        for row, guide in (("AutoNormal", AutoNormal), ("AutoMVN", AutoMultivariateNormal)):
            svi = SVI(model, guide(model), Adam(1e-2), Trace_ELBO())
            timed(row, lambda: svi.run(random.key(0), 6_000, progress_bar=False, **data).params)  # noqa: B023
        print(json.dumps({"seconds": seconds, "compiled": counts, "programs": seen}))
    else:
        print(json.dumps({"seconds": {"cached": seconds["run"]}, "compiled": {"cached": counts["run"]}}))


def in_own_process(name, file, **settings):
    """`time_one` in a new process."""
    worker = [sys.executable, __file__, name, "--worker", *(["--problems", str(file)] if file else [])]
    worker += ["--only-run"] if settings.get("only_run") else []
    done = subprocess.run(worker, env=os.environ | settings.get("env", {}), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--problems", help="a Python file with PROBLEMS")
    parser.add_argument("--programs", action="store_true", help="print the seconds of every program of the first run")
    parser.add_argument("--json", help="write all figures to this file")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--only-run", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        time_one(options.names[0], options.problems, options.only_run)
        return

    if hasattr(os, "sched_setaffinity"):  # children inherit it
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    names = options.names or list(SIMULATED)
    if options.problems and not options.names:
        spec = importlib.util.spec_from_file_location("problems", options.problems)
        module = importlib.util.module_from_spec(spec)
        sys.modules["problems"] = module
        spec.loader.exec_module(module)
        names = list(module.PROBLEMS)

    print("CPU seconds; in brackets, programs compiled")
    print(f"{'':18}" + "".join(f"{row:>17}" for row in ROWS) + f"{'run/SVI':>9}{'report/SVI':>11}")
    everything, ratios = {}, []
    for name in names:
        found = in_own_process(name, options.problems)
        with tempfile.TemporaryDirectory() as cache:
            env = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
            env["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "0"
            for _ in range(2):
                cached = in_own_process(name, options.problems, only_run=True, env=env)
        for part in ("seconds", "compiled"):
            found[part].update(cached[part])
        seconds, compiled = found["seconds"], found["compiled"]
        cells = "".join(f"{seconds[row]:>11.2f} ({compiled[row]:>3})" for row in ROWS)
        ratios.append((seconds["run"] / seconds["AutoNormal"], seconds["summarize"] / seconds["AutoNormal"]))
        print(f"{name:18}{cells}{ratios[-1][0]:>9.2f}{ratios[-1][1]:>11.2f}", flush=True)
        if options.programs:
            for program, stages in sorted(found["programs"].items(), key=lambda item: -sum(item[1].values())):
                if sum(stages.values()) > 0.02:
                    shown = "  ".join(
                        f"{stage} {stages.get(stage, 0.0):6.2f}" for stage in ("trace", "lower", "compile")
                    )
                    print(f"    {program[:50]:50} {shown}")
        everything[name] = found
    medians = [sorted(column)[len(column) // 2] for column in zip(*ratios, strict=True)]
    print(f"{'median':18}{'':{17 * len(ROWS)}}{medians[0]:>9.2f}{medians[1]:>11.2f}")
    if options.json:
        Path(options.json).write_text(json.dumps(everything, indent=1))


if __name__ == "__main__":
    main()
