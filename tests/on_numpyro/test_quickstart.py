"""The quickstart with ``--backend numpyro``; what both hosts share is tested with Pyro."""

import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random
from numpyro import handlers

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from numpyro_helmholtz import quickstart  # noqa: E402


def test_the_job_trains_both_prints_a_table_and_writes_a_figure(tmp_path, capsys, monkeypatch):
    job = pytest.importorskip("pyro_helmholtz.quickstart")
    monkeypatch.setattr(job, "FINAL_PARTICLES", 200)
    with jax.enable_x64(False):
        results = job.main(
            ["--backend", "numpyro", "--seconds", "1", "--layers", "12", "--output", str(tmp_path)]
        )

    assert [r.name for r in results] == ["RWS", "NaturalRWS"]
    for r in results:
        numbers = (r.log_likelihood, r.stderr, r.ess, r.seconds)
        assert all(math.isfinite(number) for number in numbers)
        assert -64 * math.log(2) < r.log_likelihood < -15
        assert r.stderr > 0 and 1 <= r.ess <= 200
        assert 1 <= r.seconds < 5 and r.steps >= 50 and r.before > 0
        values = [value for _, value in r.curve]
        assert len(values) == job.CURVE_POINTS and values[-1] > values[0]
        assert r.samples.shape == r.reconstructions.shape == (job.SHOWN, 64)
        assert np.isfinite(r.samples).all() and np.isfinite(r.reconstructions).all()
    printed = capsys.readouterr().out
    assert "64-12" in printed and "NaturalRWS" in printed and "Compilation" in printed
    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")


def test_the_training_needs_no_torch():
    program = (
        "import sys; sys.modules.update(torch=None, pyro=None); "
        "from numpyro_helmholtz.quickstart import datasets, training"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_network_is_a_plain_pair_of_numpyro_programs():
    x = jnp.array(np.random.default_rng(0).random((6, 5)) < 0.3, float)
    net = quickstart.SigmoidBeliefNetwork((5, 4, 3), x.mean(0))
    found = {}
    for name, program in (("model", net.model), ("guide", net.guide)):
        trace = handlers.trace(handlers.seed(program, 0)).get_trace(x)
        found[name] = [n for n, site in trace.items() if site["type"] == "sample"]
        params = {n: site["value"] for n, site in trace.items() if site["type"] == "param"}
        assert {value.dtype for value in params.values()} == {x.dtype}
    assert found == {"model": ["h2", "h1", "x"], "guide": ["h1", "h2"]}
    params = {}
    for picture in (net.dream, net.reconstruct):
        assert picture(random.key(0), params, x).shape == (6, 5)


def test_batches_visit_every_datum_once_in_a_pass():
    batches = quickstart.Batches(12, 4, seed=0)
    seen = np.concatenate([batches.next(n) for n in (1, 4, 1)]).reshape(2, 12)
    assert (np.sort(seen) == np.arange(12)).all()
    assert quickstart.Batches(3, 5, seed=0).next(2).shape == (2, 3)
