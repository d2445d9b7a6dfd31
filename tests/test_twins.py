"""The two packages are twins: the same files, the same public names, the same plain code."""

import ast
import inspect
import itertools
from pathlib import Path

import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

import numpyro_helmholtz  # noqa: E402
import pyro_helmholtz  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
PYRO, NUMPYRO = ROOT / "pyro_helmholtz", ROOT / "numpyro_helmholtz"

# Files that one package alone has, and why.
ALONE = {
    # Torch builds its graph anew at each step, so what was found in it has to be remembered.
    # JAX traces once and compiles.
    "pyro_helmholtz/finder.py": "remembers which parameters enter an argument",
    "pyro_helmholtz/plans.py": "remembers the rows and units of a sum of terms",
    "pyro_helmholtz/routes.py": "remembers a walk through the graph",
    # Pyro's store gets its parameters as programs run. JAX's states are pytrees that hold all.
    "pyro_helmholtz/saved.py": "saved values of parameters that do not exist yet",
    # Pyro has a module or a store for what is plain data in JAX.
    "numpyro_helmholtz/arguments.py": "arguments of programs as a pytree",
    "numpyro_helmholtz/parameters.py": "names of leaves, constraints",
    "numpyro_helmholtz/runner.py": "the first look at programs, whose parameters have no store",
    # Torch hands the graph out. Here it is recorded from the equations that JAX traces.
    "numpyro_helmholtz/record.py": "records a program's equations",
    "numpyro_helmholtz/links.py": "what each primitive does to elements",
    # What compiling takes, and what a compiled step computes in vain.
    "numpyro_helmholtz/branches.py": "branches that stay branches under vmap",
    "numpyro_helmholtz/flat_keys.py": "keys whose draws compile fast",
    "numpyro_helmholtz/later.py": "moves what follows products into a branch",
}

# Names of one twin alone, and why: of `__all__`, and of classes where a twin has no `__all__`.
NAMES = {
    ("quickstart.py", "pyro_helmholtz"): {"Result", "main", "train"},  # the job, written once
    ("svi.py", "numpyro_helmholtz"): {"HelmholtzState"},  # Pyro keeps it in the front end
    # Torch's graph is walked. JAX's equations are recorded: these stand in `links.py`, `record.py`.
    ("columns.py", "pyro_helmholtz"): {"Opaque"},
    ("graph.py", "pyro_helmholtz"): {"Link"},
    # One Fisher matrix of several graphs, or of several turns of a loop; JAX has one program.
    ("fisher/assemble.py", "pyro_helmholtz"): {"Source"},
    ("fisher/blocks.py", "pyro_helmholtz"): {"Part"},
    ("fisher/matrix_free.py", "pyro_helmholtz"): {"Pieces"},
    # Values are detached, gated and differentiated where torch's graph is built.
    ("messengers.py", "pyro_helmholtz"): {"Detached", "Recorder"},
    ("sites.py", "pyro_helmholtz"): {"LogProb"},
    ("estimators/price.py", "pyro_helmholtz"): {"Gates", "Gaussian"},
    # The hosts' optimisers.
    ("optimiser.py", "pyro_helmholtz"): {"JointStep"},
    ("optimiser.py", "numpyro_helmholtz"): {"Optimiser"},
    # A compiled step is pure: what it keeps or may complain of is a pytree.
    ("checks.py", "numpyro_helmholtz"): {"Problem"},
    ("fisher/memory.py", "numpyro_helmholtz"): {"Kept"},
    # And programs are run again under other handlers, where Pyro changes a trace it has.
    ("messengers.py", "numpyro_helmholtz"): {"Constants", "FlatDraws", "PythonFlow", "Reached"},
    ("estimators/sleep_phase.py", "numpyro_helmholtz"): {"ModelAlone"},
    ("estimators/particles.py", "numpyro_helmholtz"): {"Simulated"},
    ("estimators/reparameterised.py", "numpyro_helmholtz"): {"Reparameterised", "Shifted"},
    ("estimators/sleep_set.py", "numpyro_helmholtz"): {"Drawable"},
}

# Framework-free files, and the definitions in them that differ, because they name arrays.
PLAIN = {"datasets.py": {"Dataset", "load"}, "diagnostics.py": {"describe"}, "options.py": set()}


def files(package):
    return {str(path.relative_to(package)) for path in package.rglob("*.py")}


COMMON = sorted(files(PYRO) & files(NUMPYRO))


def exported(path):
    """The names in a module's ``__all__``, or None."""
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return set(ast.literal_eval(node.value))
    return None


def classes(path):
    """The names of a module's public classes."""
    body = ast.parse(path.read_text("utf-8")).body
    return {n.name for n in body if isinstance(n, ast.ClassDef) and not n.name.startswith("_")}


def statements(path):
    """Sources of what a module defines, by name."""
    kinds = ast.FunctionDef | ast.ClassDef
    found = {}
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, kinds):
            found[node.name] = ast.unparse(node)
        elif isinstance(node, ast.Assign):
            found[ast.unparse(node.targets[0])] = ast.unparse(node)
    return found


def test_the_same_files():
    alone = [
        f"{package.name}/{name}"
        for package, other in itertools.permutations((PYRO, NUMPYRO))
        for name in files(package) - files(other)
    ]
    assert sorted(alone) == sorted(ALONE)


def test_the_same_public_names():
    assert pyro_helmholtz.__all__ == numpyro_helmholtz.__all__
    assert pyro_helmholtz.__version__ == numpyro_helmholtz.__version__


@pytest.mark.parametrize("name", COMMON)
def test_the_same_names_in_each_module(name):
    """Names exported, or else classes: functions between modules are the host's affair."""
    here, there = (exported(package / name) for package in (PYRO, NUMPYRO))
    if here is None or there is None:
        here, there = (classes(package / name) for package in (PYRO, NUMPYRO))
    assert here - there == NAMES.get((name, "pyro_helmholtz"), set())
    assert there - here == NAMES.get((name, "numpyro_helmholtz"), set())


@pytest.mark.parametrize(
    "name",
    [
        "ALWS",
        "ALWS_ELBO",
        "BiHM",
        "BiHM_ELBO",
        "NaturalBiHM",
        "NaturalRWS",
        "RWS",
        "RWS_ELBO",
        "StochasticBackprop",
        "StochasticBackprop_ELBO",
        "WakeSleep",
        "WakeSleep_ELBO",
    ],
)
def test_the_same_options(name):
    here, there = (
        {key: p.default for key, p in inspect.signature(getattr(package, name)).parameters.items()}
        for package in (pyro_helmholtz, numpyro_helmholtz)
    )
    assert list(here.items()) == list(there.items())


@pytest.mark.parametrize("name", PLAIN)
def test_plain_code_is_the_same(name):
    here, there = (statements(package / name) for package in (PYRO, NUMPYRO))
    assert here.keys() == there.keys()
    assert {key for key in here if here[key] != there[key]} == PLAIN[name]
