import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pyro
import pytest
import torch

from . import quick_compile

pytest.importorskip("matplotlib").use("Agg")

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "tutorials").glob("*.py"))
ON_NUMPYRO = [path for path in SCRIPTS if path.stem.endswith("_numpyro")]
ON_PYRO = [path for path in SCRIPTS if path not in ON_NUMPYRO]


@pytest.fixture(autouse=True)
def _apart(monkeypatch, tmp_path):
    """Scripts run in an empty folder, with a parameter store and random numbers of their own."""
    import matplotlib.pyplot as plt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_FAST", "1")
    with pyro.get_param_store().scope(), torch.random.fork_rng():
        yield
    plt.close("all")


@pytest.mark.parametrize("script", ON_PYRO, ids=lambda path: path.stem)
def test_tutorial_runs_and_leaves_only_figures(script, tmp_path):
    runpy.run_path(str(script), run_name="__main__")
    check_figures(script, tmp_path)


@pytest.mark.parametrize("script", ON_NUMPYRO, ids=lambda path: path.stem)
def test_numpyro_tutorial_runs_and_leaves_only_figures(script, tmp_path):
    """In a process of its own: precision and devices are settings of a whole process."""
    pytest.importorskip("numpyro")
    env = os.environ | {
        "MPLBACKEND": "Agg",
        "PYTHONPATH": str(ROOT),
        "XLA_FLAGS": quick_compile.FLAGS,
    }
    program = f"import runpy; found = runpy.run_path({str(script)!r}, run_name='__main__')\n"
    program += CHECKS.get(script.stem, "")
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    check_figures(script, tmp_path)


CHECKS = {
    "02_why_natural_gradients_numpyro": """
import numpy as np
exact, inside = np.asarray(found["exact"]), np.asarray(found["inside"])
assert abs(exact[~inside]).max() < 1e-14
assert abs(exact - found["sampled"]).max() < 0.03
zero_one, plus_minus = found["zero_one"], found["plus_minus"]
np.testing.assert_allclose(zero_one["natural"], plus_minus["natural"], rtol=1e-5, atol=1e-6)
assert not np.allclose(zero_one["gradient"], plus_minus["gradient"], rtol=0.1)
""",
    "03_several_devices_numpyro": "assert len(found['jax'].devices()) == 8\n",
}


def check_figures(script, folder):
    assert [path.name for path in folder.iterdir()] == ["figures"]
    assert list((folder / "figures").glob(f"{script.stem[:2]}_*.png"))


def test_second_tutorial_shows_what_it_says():
    found = runpy.run_path(str(ROOT / "tutorials" / "02_why_natural_gradients.py"))
    exact, inside = found["exact"], found["inside"]
    assert exact[~inside].abs().max() < 1e-14
    assert (exact - found["sampled"]).abs().max() < 0.03
    zero_one, plus_minus = found["zero_one"], found["plus_minus"]
    torch.testing.assert_close(zero_one["natural"], plus_minus["natural"], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(zero_one["gradient"], plus_minus["gradient"], rtol=0.1)


def test_readme_examples_run(capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.S)
    assert blocks
    names: dict = {}
    for block in blocks:  # in order, as a reader would type them; NumPyro's stands for itself
        exec(compile(block, "README.md", "exec"), {} if "numpyro" in block else names)
    assert capsys.readouterr().out.count("LogLikelihood(mean=-2") == 2


def test_readme_links_lead_somewhere():
    text = (ROOT / "README.md").read_text("utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (ROOT / target).exists(), target
