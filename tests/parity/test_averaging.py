"""Both packages take the same steps into the same means."""

import jax
import numpy as np
import pytest
import torch

from numpyro_helmholtz.averaging import Average as InJax
from pyro_helmholtz.averaging import Average as InTorch


@pytest.fixture(autouse=True, scope="module")
def _double():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    yield
    jax.config.update("jax_enable_x64", before)


def test_means_of_the_same_steps():
    points = np.random.default_rng(2).normal(size=(40, 2, 3))
    ours, theirs = InJax.start({"w": jax.numpy.zeros((2, 3))}), InTorch()
    for t, point in enumerate(points):
        ours = ours.take_in({"w": jax.numpy.asarray(point)})
        theirs.take_in({"w": torch.tensor(point)})
        found = theirs._means["w"]
        np.testing.assert_allclose(ours.means["w"], found, rtol=1e-12, atol=1e-12)
        assert int(ours.updates) == theirs.state()["updates"]["w"] == t + 1
