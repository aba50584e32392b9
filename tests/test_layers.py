# Copyright Contributors to the numpyro_smcopt project.
# SPDX-License-Identifier: Apache-2.0
"""The architecture, held by a test: imports go down, each foreign interface has one owner, importing costs nothing.

The rules are about the source text, so imports inside functions and under TYPE_CHECKING count like any other. They are
driven by the files that exist; a new file must be given its layer in `LAYERS`.
"""

import ast
import graphlib
import subprocess
import sys
from pathlib import Path

import pytest

NAME = "numpyro_smcopt"
PACKAGE = Path(__file__).parents[1] / NAME

# From top to bottom; a module may import from the layers below its own, not from its own. "room.*" stands for those
# files of a room that are not named themselves, "room" for its __init__.py.
LAYERS = (
    {"__init__"},
    {"inference_data", "plots", "comparison"},
    {"evidence"},
    {"algorithms", "handlers"},
    {"algorithms.*"},
    {"algorithms.base"},
    {"algorithms.resuming"},
    {"algorithms.many_runs"},
    {"algorithms.running", "algorithms.summary", "algorithms.momentum_update"},
    {"algorithms.contract", "algorithms.momentum_settings"},
    {"reporting.assembly"},
    {"reporting.laplace_fit"},
    {"reporting.exploration"},
    {"reporting.programs"},
    {"samplers"},
    {"samplers.*"},
    {"samplers.base", "samplers.drifts", "samplers.paths"},
    {"algorithms.start"},
    {"algorithms.faults", "algorithms.journal"},
    {"algorithms.gradients", "algorithms.safeguards"},
    {
        "algorithms.budget",
        "algorithms.lost_particles",
        "algorithms.particles",
        "algorithms.programs",
        "algorithms.settings",
    },
    {"reporting.islands", "reporting.transport"},
    {"reporting.reference"},
    {"latent_momentum"},
    {"theta_momentum"},
    {"objectives", "loop", "theta_step", "laplace"},
    {"objectives.reward", "objectives.energy_based_likelihood", "objectives.path_kl"},
    {"objectives.divergences", "objectives.marginal_likelihood"},
    {"objectives.base", "objectives.samples"},
    {"theta_step.*"},
    {"theta_step.base"},
    {"uncertainty", "tempering", "control_variates", "reporting.standard_errors"},
    {"target", "results", "reporting.report", "checkpoint", "adaptation", "convergence", "minibatch"},
    {"target.observed"},
    {"target.energy", "target.latents_to_params", "target.svi_view"},
    {"target.sites"},
    {"target.arguments", "target.checks", "target.tracing"},
    {"reporting"},
    {"kernels"},
    {"kernels.*"},
    {"kernels.base"},
    {"kernels.preconditioners", "resampling", "effects", "sharding"},
    {"weights"},
    {"blocks"},
    {"noise", "traces", "branching", "sums"},
    {"types"},
)

DEPENDENCIES = {"jax", "jaxlib", "numpy", "numpyro", "optax"}

# Foreign names that only some files may use, by their longest listed prefix.
# First the seams, then what is optional or comes with a dependency. "room.*" stands for every file of a room.
OWNERS = {
    "numpyro.infer.util": {"target.*"},
    "numpyro.infer.Predictive": {"target.*"},
    "numpyro.infer.log_likelihood": {"target.*"},
    "numpyro.handlers": {"target.*", "effects"},
    "numpyro.primitives": {"effects"},
    "numpyro.primitives.Messenger": {"target.*", "effects"},  # to write a handler, not to touch the stack
    "numpyro.sample": {"target.*", "effects"},
    "numpyro.param": {"target.*", "effects"},
    "numpyro.deterministic": {"target.*", "effects"},
    "numpyro.factor": {"target.*", "effects"},
    "numpyro.mutable": {"target.*", "effects"},
    "numpyro.plate": {"target.*", "effects"},
    "numpyro.contrib.funsor": {"target.*"},
    "diffrax": {"samplers.diffrax_sampler"},
    "lineax": {"samplers.diffrax_sampler"},
    "arviz": {"inference_data"},
    "xarray": {"inference_data"},  # comes with ArviZ
    "funsor": {"target.*"},
    "matplotlib": {"plots"},
    "scipy": set(),  # jax.scipy serves
    "tqdm": {"loop"},
}

BANNED_NAMES = {"util", "utils", "misc", "common", "helper", "helpers"}


def read_package(root):
    """Parse every module below `root`: {"kernels.base": tree}; a room's __init__ goes by the room's name."""
    modules = {}
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if len(parts) > 1 and parts[-1] == "__init__":
            parts = parts[:-1]
        modules[".".join(parts)] = ast.parse(path.read_text(), str(path))
    return modules


def layer_of(module):
    """Index of the layer of a module, counted from the top."""
    room = module.partition(".")[0]
    for name in (module, f"{room}.*" if "." in module else None):
        for index, layer in enumerate(LAYERS):
            if name in layer:
                return index
    raise ValueError(f"{module} has no layer: add it to LAYERS in {Path(__file__).name}")


def imports_of(module, modules):
    """List (imported dotted name, alias, dotted name that the alias stands for); relative names are made absolute."""
    here = [NAME] if module == "__init__" else [NAME, *module.split(".")]
    is_package = module == "__init__" or any(other.startswith(f"{module}.") for other in modules)
    package = here if is_package else here[:-1]
    found = []
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition(".")[0]
                found.append((alias.name, alias.asname or root, alias.name if alias.asname else root))
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join(base + ([node.module] if node.module else []))
            for alias in node.names:
                name = f"{base}.{alias.name}"
                found.append((name, alias.asname or alias.name, name))
    return found


def internal_imports(modules):
    """Map every module to the modules of the package that it imports."""
    graph = {module: set() for module in modules}
    for module in modules:
        for name, _, _ in imports_of(module, modules):
            top, _, inner = name.partition(".")
            while inner and inner not in modules:  # the last parts may be names within a module
                inner = inner.rpartition(".")[0]
            if top == NAME:
                graph[module].add(inner or "__init__")
    return graph


def foreign_names(module, modules):
    """Dotted foreign names that a module imports or reaches through attributes of what it imports."""
    foreign = [found for found in imports_of(module, modules) if found[0].partition(".")[0] != NAME]
    names = {name for name, _, _ in foreign}
    aliases = {alias: meant for _, alias, meant in foreign}
    for node in ast.walk(modules[module]):
        if isinstance(node, ast.Attribute):
            name, base = node.attr, node.value
            while isinstance(base, ast.Attribute):
                name, base = f"{base.attr}.{name}", base.value
            if isinstance(base, ast.Name) and base.id in aliases:
                names.add(f"{aliases[base.id]}.{name}")
    return names


def upward_imports(modules):
    return sorted(
        f"{module} imports {imported}"
        for module, imports in internal_imports(modules).items()
        for imported in imports
        if layer_of(imported) <= layer_of(module)
    )


def misplaced_foreign_names(modules):
    """List the uses of foreign names outside the files that own them, and of packages that are no dependency."""
    found = set()
    for module in modules:
        for name in foreign_names(module, modules):
            prefixes = [owned for owned in OWNERS if f"{name}.".startswith(f"{owned}.")]
            if prefixes:
                if not {module, f"{module.partition('.')[0]}.*"} & OWNERS[max(prefixes, key=len)]:
                    found.add(f"{module} uses {name}")
            elif name.partition(".")[0] not in DEPENDENCIES | sys.stdlib_module_names:
                found.add(f"{module} uses {name}, which is no dependency")
    return sorted(found)


@pytest.fixture(scope="module")
def modules():
    return read_package(PACKAGE)


def test_imports_go_down(modules):
    assert upward_imports(modules) == []


def test_imports_have_no_cycle(modules):
    graphlib.TopologicalSorter(internal_imports(modules)).prepare()  # raises CycleError, which names the cycle


def test_foreign_interfaces_have_one_owner(modules):
    assert misplaced_foreign_names(modules) == []


def test_modules_are_named_after_a_concept(modules):
    assert [module for module in modules if BANNED_NAMES & set(module.split("."))] == []


def test_importing_creates_no_array_and_loads_no_optional_package():
    program = f"""
import sys
import {NAME}
import jax
print(len(jax.live_arrays()), sorted({{"arviz", "funsor", "matplotlib"}} & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "0 []"


# The rules themselves, on a package that breaks them.


@pytest.fixture
def package(tmp_path):
    """Write a package from {"kernels/base.py": source} and parse it."""

    def write(files):
        for path, source in files.items():
            (tmp_path / path).parent.mkdir(exist_ok=True)
            (tmp_path / path).write_text(source)
        return read_package(tmp_path)

    return write


def test_rule_accepts_imports_of_every_form(package):
    modules = package(
        {
            "__init__.py": f"from {NAME} import kernels as kernels\nfrom .algorithms import SMCOptimizer\n",
            "algorithms/__init__.py": "from .smc_optimizer import SMCOptimizer\n",
            "algorithms/smc_optimizer.py": f"from {NAME}.algorithms import base\nfrom ..kernels import HMC\n",
            "algorithms/base.py": f"import {NAME}.loop as loop\nfrom {NAME} import weights\n",
            "loop.py": "import functools\nfrom tqdm.auto import trange\n",
            "kernels/__init__.py": "from .hamiltonian import HMC\n",
            "kernels/hamiltonian.py": "from .base import InvariantKernel\n",
            "kernels/base.py": "from ..types import Array\n",
            "weights.py": "from .blocks import Blocks\nimport jax.scipy\n",
            "blocks.py": "from .types import Array\n",
            "types.py": "",
        }
    )
    assert upward_imports(modules) == []
    assert misplaced_foreign_names(modules) == []
    assert internal_imports(modules)["algorithms.smc_optimizer"] == {"algorithms.base", "kernels"}
    assert internal_imports(modules)["algorithms.base"] == {"loop", "weights"}


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("weights.py", f"from {NAME}.target import Target\n", "weights imports target"),
        ("kernels/base.py", "def f():\n    from ..target import Target\n", "kernels.base imports target"),
        ("kernels/base.py", "from .langevin import ULA\n", "kernels.base imports kernels.langevin"),
        ("kernels/langevin.py", "from .hamiltonian import HMC\n", "kernels.langevin imports kernels.hamiltonian"),
        ("loop.py", f"import {NAME}\n", "loop imports __init__"),
        (
            "types.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .loop import run\n",
            "types imports loop",
        ),
    ],
)
def test_rule_notices_an_import_that_does_not_go_down(package, path, source, complaint):
    names = ("target.py", "loop.py", "types.py", "weights.py", "kernels/base.py")
    others = dict.fromkeys((*names, "kernels/langevin.py", "kernels/hamiltonian.py"), "")
    assert upward_imports(package(others | {path: source})) == [complaint]


def test_rule_notices_a_module_without_a_layer(package):
    with pytest.raises(ValueError, match="toolbox has no layer"):
        upward_imports(package({"toolbox.py": "from . import types\n", "types.py": ""}))


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("loop.py", "from numpyro.infer import util\n", "loop uses numpyro.infer.util"),
        ("loop.py", "import numpyro\nnumpyro.infer.util.f()\n", "loop uses numpyro.infer.util.f"),
        ("loop.py", "import numpyro.handlers as h\n", "loop uses numpyro.handlers"),
        ("loop.py", "from numpyro import handlers\nhandlers.trace(f)\n", "loop uses numpyro.handlers.trace"),
        ("target/sites.py", "from numpyro.primitives import mutable\n", "target.sites uses numpyro.primitives.mutable"),
        ("loop.py", "import numpyro as np\nnp.deterministic('a', 1)\n", "loop uses numpyro.deterministic"),
        ("plots.py", "def f():\n    import arviz\n", "plots uses arviz"),
        ("loop.py", "from scipy.stats import norm\n", "loop uses scipy.stats.norm"),
        ("loop.py", "import equinox\n", "loop uses equinox, which is no dependency"),
        ("algorithms/start.py", "import numpyro.handlers\n", "algorithms.start uses numpyro.handlers"),
    ],
)
def test_rule_notices_a_foreign_name_in_the_wrong_file(package, path, source, complaint):
    assert complaint in misplaced_foreign_names(package({path: source}))
