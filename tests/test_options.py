"""Options that count something: whole numbers of any kind, no truth values."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("jax")

from torch import nn  # noqa: E402

import numpyro_helmholtz as nh  # noqa: E402
import pyro_helmholtz as ph  # noqa: E402

BOTH = pytest.mark.parametrize("package", [ph, nh], ids=["pyro", "numpyro"])


def program(x):
    """Nothing: only the options are looked at."""


@BOTH
@pytest.mark.parametrize("count", [True, 0, 2.0, "3", None])
def test_no_count(package, count):
    with pytest.raises(ValueError, match="num_particles must be an int of at least 1"):
        package.RWS(program, program, num_particles=count)
    with pytest.raises(ValueError, match="sleep_steps must be an int of at least 1"):
        package.RWS(program, program, sleep_steps=count)


@BOTH
def test_integers_of_numpy(package):
    svi = package.RWS(program, program, num_particles=np.int64(5), sleep_steps=np.int32(2))
    assert svi.estimator.num_particles == 5
    assert svi.sleep_steps == 2


@BOTH
def test_bounds_other_than_one(package):
    with pytest.raises(ValueError, match="num_sleep must be an int of at least 2, got 1"):
        package.ALWS(program, num_sleep=1)
    with pytest.raises(ValueError, match="held_out must be an int of at least 0, got -1"):
        package.ALWS(program, held_out=-1)


@pytest.mark.parametrize("count", [None, 2.5, 0])
def test_particles_of_a_simulator(count):
    networks = {ph: nn.Identity(), nh: SimpleNamespace(init=program, apply=program)}
    for package, network in networks.items():
        with pytest.raises(ValueError, match="num_particles must be an int of at least 1"):
            package.ParticleSimulator(network, 2, count)
