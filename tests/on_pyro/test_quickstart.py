import math
import subprocess
import sys

import numpy as np
import pyro
import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")

from pyro_helmholtz import quickstart  # noqa: E402


def test_the_job_trains_both_prints_a_table_and_writes_a_figure(tmp_path, capsys):
    pyro.get_param_store().clear()
    pyro.param("mine", torch.ones(2))
    results = quickstart.main(["--seconds", "1", "--output", str(tmp_path)])

    assert [r.name for r in results] == ["RWS", "NaturalRWS"]
    for r in results:
        numbers = (r.log_likelihood, r.stderr, r.ess, r.seconds)
        assert all(math.isfinite(number) for number in numbers)
        assert -64 * math.log(2) < r.log_likelihood < 0
        assert r.stderr > 0 and 1 <= r.ess <= quickstart.FINAL_PARTICLES
        assert 1 <= r.seconds < 5 and r.steps >= 1 and r.before > 0
        assert len(r.curve) == quickstart.CURVE_POINTS
        assert r.samples.shape == r.reconstructions.shape == (quickstart.SHOWN, 64)
        assert np.isfinite(r.samples).all() and np.isfinite(r.reconstructions).all()
    printed = capsys.readouterr().out
    assert "64-48-24-12" in printed and "NaturalRWS" in printed

    assert (tmp_path / "digits.png").read_bytes().startswith(b"\x89PNG")
    assert list(pyro.get_param_store().keys()) == ["mine"], "the caller's store is as it was"
    pyro.clear_param_store()


@pytest.mark.parametrize(
    "wrong", [["--seconds", "0"], ["--layers", "8,0"], ["--layers", "a"], ["--particles", "-1"]]
)
def test_wrong_arguments_are_refused(wrong, capsys):
    with pytest.raises(SystemExit):
        quickstart.main(wrong)
    assert wrong[0] in capsys.readouterr().err


def test_the_job_needs_no_jax(tmp_path):
    program = (
        "import sys; sys.modules.update(jax=None, numpyro=None); sys.argv[0] = 'quickstart'; "
        "import runpy; runpy.run_module('pyro_helmholtz.quickstart', run_name='__main__')"
    )
    options = ["--seconds", "0.1", "--layers", "4", "--output", str(tmp_path)]
    command = [sys.executable, "-c", program, *options]
    subprocess.run(command, check=True, capture_output=True)
    assert (tmp_path / "digits.png").exists()
    done = subprocess.run([*command, "--backend", "numpyro"], capture_output=True, text=True)
    assert done.returncode == 1 and "--backend numpyro needs its host" in done.stderr


def test_network_is_a_plain_pair_of_pyro_programs():
    pyro.clear_param_store()
    x = torch.bernoulli(torch.full((6, 5), 0.3))
    net = quickstart.SigmoidBeliefNetwork((5, 4, 3), x.mean(0))
    model = pyro.poutine.trace(net.model).get_trace(x)
    guide = pyro.poutine.trace(net.guide).get_trace(x)
    assert model.stochastic_nodes == ["data", "h2", "h1"]
    assert guide.stochastic_nodes == ["data", "h1", "h2"]
    model.compute_log_prob()
    assert model.nodes["x"]["log_prob"].shape == (6,)
    assert net.dream(x).shape == net.reconstruct(x).shape == (6, 5)
    pyro.clear_param_store()


def test_batches_visit_every_datum_once_in_a_pass():
    data = torch.arange(12.0)[:, None]
    batches = quickstart.Batches(data, 4, seed=0)
    seen = torch.cat([batches.next() for _ in range(3)])
    assert torch.equal(seen.sort(0).values, data)


def test_mosaic_of_an_odd_number_of_images():
    images = np.ones((3, 6))
    mosaic = quickstart._mosaic(images, (2, 3))
    assert mosaic.shape == (2 * 4, 2 * 5)
    assert mosaic.sum() == images.sum() and (mosaic[1:3, 1:4] == 1).all()
