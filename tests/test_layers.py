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

# Rooms from top to bottom. A file or folder below the package is a room; its files import each other freely, as long as
# there is no cycle, and anything from the rows below their own, but nothing from their own row or above.
LAYERS = (
    {"__init__"},
    {"inference_data", "plots", "comparison", "handlers"},
    {"evidence"},
    {"algorithms"},
    {"reporting", "samplers"},
    {"runs"},
    {"population"},
    {"faults"},
    {"objectives", "laplace"},
    {"kernels", "theta_step"},
    {"adaptation", "potential", "effects", "resampling", "control_variates", "information", "results"},
    {"weights", "block_search"},
    {"blocks"},
    {"term_sums", "random_numbers", "traces", "branching", "dispersal"},
    {"types"},
)

DEPENDENCIES = {"jax", "jaxlib", "numpy", "numpyro", "optax"}

# Foreign names that only some files may use, by their longest listed prefix.
# First the seams, then what is optional or comes with a dependency. "room.*" stands for every file of a room.
OWNERS = {
    "numpyro.infer.util": {"potential.*"},
    "numpyro.infer.Predictive": {"potential.*"},
    "numpyro.infer.log_likelihood": {"potential.*"},
    "numpyro.handlers": {"potential.*", "effects"},
    "numpyro.primitives": {"effects"},
    "numpyro.primitives.Messenger": {"potential.*", "effects"},  # to write a handler, not to touch the stack
    "numpyro.sample": {"potential.*", "effects"},
    "numpyro.param": {"potential.*", "effects"},
    "numpyro.deterministic": {"potential.*", "effects"},
    "numpyro.factor": {"potential.*", "effects"},
    "numpyro.mutable": {"potential.*", "effects"},
    "numpyro.plate": {"potential.*", "effects"},
    "numpyro.contrib.funsor": {"potential.*"},
    "diffrax": {"samplers.diffrax_sampler"},
    "lineax": {"samplers.diffrax_sampler"},
    "arviz": {"inference_data"},
    "xarray": {"inference_data"},  # comes with ArviZ
    "funsor": {"potential.*"},
    "matplotlib": {"plots"},
    "scipy": set(),  # jax.scipy serves
    "tqdm": {"runs.loop"},
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


def room_of(module):
    """The file or folder below the package that a module is, or is in."""
    return module.partition(".")[0]


def layer_of(module):
    """Index of the layer of a module, counted from the top."""
    for index, layer in enumerate(LAYERS):
        if room_of(module) in layer:
            return index
    raise ValueError(f"{module} has no layer: add its room to LAYERS in {Path(__file__).name}")


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
        if room_of(imported) != room_of(module) and layer_of(imported) <= layer_of(module)
    )


def mutual_imports(modules):
    """Pairs of rooms of which each imports the other, whatever the table says."""
    graph = {(room_of(a), room_of(b)) for a, imports in internal_imports(modules).items() for b in imports}
    return sorted((a, b) for a, b in graph if a < b and (b, a) in graph)


def rows_without_a_room(modules):
    """Names in the table that no file goes by."""
    return sorted(set().union(*LAYERS) - {room_of(module) for module in modules})


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


def test_no_two_rooms_import_each_other(modules):
    assert mutual_imports(modules) == []


def test_every_name_in_the_table_is_a_room(modules):
    assert rows_without_a_room(modules) == []


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
            "algorithms/base.py": f"import {NAME}.runs.loop as loop\nfrom {NAME} import weights\n",
            "runs/loop.py": "import functools\nfrom tqdm.auto import trange\n",
            "kernels/__init__.py": "from .hamiltonian import HMC\n",
            "kernels/hamiltonian.py": "from .base import InvariantKernel\n",
            "kernels/base.py": "from ..types import Array\n",
            "weights.py": "from .blocks import Blocks\nimport jax.scipy\n",
            "blocks.py": "from .types import Array\n",
            "types.py": "",
        }
    )
    assert upward_imports(modules) == []
    assert mutual_imports(modules) == []
    assert misplaced_foreign_names(modules) == []
    assert internal_imports(modules)["algorithms.smc_optimizer"] == {"algorithms.base", "kernels"}
    assert internal_imports(modules)["algorithms.base"] == {"runs.loop", "weights"}


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("weights.py", f"from {NAME}.potential import Target\n", "weights imports potential"),
        ("kernels/base.py", "def f():\n    from ..runs import loop\n", "kernels.base imports runs.loop"),
        ("effects.py", "from .potential import Target\n", "effects imports potential"),
        ("runs/loop.py", f"import {NAME}\n", "runs.loop imports __init__"),
        (
            "types.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .runs.loop import run\n",
            "types imports runs.loop",
        ),
    ],
)
def test_rule_notices_an_import_that_does_not_go_down(package, path, source, complaint):
    others = dict.fromkeys(("potential.py", "runs/__init__.py", "runs/loop.py", "types.py", "kernels/base.py"), "")
    assert upward_imports(package(others | {path: source})) == [complaint]


def test_rule_notices_rooms_that_import_each_other(package):
    files = {"runs/loop.py": "from ..kernels import HMC\n", "kernels/base.py": "from ..runs import loop\n"}
    assert mutual_imports(package(files | {"runs/__init__.py": "", "kernels/__init__.py": ""})) == [("kernels", "runs")]


def test_rule_notices_a_row_that_names_nothing(package):
    assert "effects" in rows_without_a_room(package({"types.py": ""}))


def test_rule_notices_a_module_without_a_layer(package):
    with pytest.raises(ValueError, match="toolbox has no layer"):
        upward_imports(package({"toolbox.py": "from . import types\n", "types.py": ""}))


@pytest.mark.parametrize(
    "path, source, complaint",
    [
        ("runs/run.py", "from numpyro.infer import util\n", "runs.run uses numpyro.infer.util"),
        ("runs/run.py", "import numpyro\nnumpyro.infer.util.f()\n", "runs.run uses numpyro.infer.util.f"),
        ("runs/run.py", "import numpyro.handlers as h\n", "runs.run uses numpyro.handlers"),
        ("runs/run.py", "from numpyro import handlers\nhandlers.trace(f)\n", "runs.run uses numpyro.handlers.trace"),
        (
            "potential/sites.py",
            "from numpyro.primitives import mutable\n",
            "potential.sites uses numpyro.primitives.mutable",
        ),
        ("runs/run.py", "import numpyro as np\nnp.deterministic('a', 1)\n", "runs.run uses numpyro.deterministic"),
        ("plots.py", "def f():\n    import arviz\n", "plots uses arviz"),
        ("runs/loop.py", "from scipy.stats import norm\n", "runs.loop uses scipy.stats.norm"),
        ("runs/loop.py", "import equinox\n", "runs.loop uses equinox, which is no dependency"),
    ],
)
def test_rule_notices_a_foreign_name_in_the_wrong_file(package, path, source, complaint):
    assert complaint in misplaced_foreign_names(package({path: source}))
