"""Fisher blocks and natural directions of both packages on the same samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch
from jax import random

import numpyro_helmholtz as nh
import pyro_helmholtz as ph

from .test_weights import DATA, SAMPLES, B, K, _double, close, in_numpyro, in_pyro, replayed

OPTIONS = {"num_particles": K, "sleep_weight": 0.0, "fisher_samples": "same", "tolerance": 1e-13}
__all__ = ["_double"]


def on(programs, samples):
    """Let the programs' wake phase take given samples."""
    programs.wake = partial(type(programs).wake, programs, samples=samples)


@pytest.mark.parametrize("form", ["unit", "diagonal", "kronecker"])
@pytest.mark.parametrize(("size", "scale"), [(B, 1.0), (40, 3.0)])
def test_blocks_and_natural_directions(form, size, scale):
    pyro.clear_param_store()
    theirs = ph.NaturalRWS(*in_pyro(size, scale), fisher=form, max_plate_nesting=1, **OPTIONS)
    on(theirs.programs, replayed(SAMPLES))
    expected = theirs.directions(torch.tensor(DATA))

    ours = nh.NaturalRWS(*in_numpyro(size, scale), fisher=form, max_plate_nesting=1, **OPTIONS)
    state = ours.init(random.key(0), jnp.asarray(DATA))
    on(ours.programs, {n: jnp.asarray(v) for n, v in SAMPLES.items()})
    found = ours.directions(state, jnp.asarray(DATA))

    close(found.loss, expected.loss)
    assert set(found.gradient) == set(expected.gradient)
    for name in found.gradient:
        close(found.gradient[name], expected.gradient[name])
        close(found.natural[name], expected.natural[name])
    blocks = {tuple(b.params): b for b in expected.fisher.blocks}
    assert {tuple(b.params) for b in found.fisher.blocks} == set(blocks)
    for block in found.fisher.blocks:
        other = blocks[tuple(block.params)]
        for field in ("site", "kind", "units", "fan_in", "size", "exact", "how"):
            assert getattr(block, field) == getattr(other, field)
        close(block.dense(), other.dense())
        close(block.diagonal(), other.diagonal())
        g = np.random.default_rng(0).normal(size=(block.units, block.size))
        close(block.matvec(jnp.asarray(g)), other.matvec(torch.tensor(g)))
        close(jax.jit(block.solve)(jnp.asarray(g), 0.3), other.solve(torch.tensor(g), 0.3))
