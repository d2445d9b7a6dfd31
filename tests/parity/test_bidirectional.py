"""The bidirectional machine in both packages, on the same samples: equal to rounding."""

import inspect
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pyro
import pytest
import torch
from jax import random

import numpyro_helmholtz as nh
import numpyro_helmholtz.trace as trace_in_jax
import pyro_helmholtz as ph
import pyro_helmholtz.trace as trace_in_torch

from .test_weights import (
    DATA,
    SAMPLES,
    VALUES,
    B,
    K,
    _double,  # noqa: F401
    close,
    in_numpyro,
    in_pyro,
    replayed,
)


@pytest.mark.parametrize(("size", "scale", "baseline"), [(B, 1.0, False), (40, 3.0, True)])
def test_directions_weights_and_loss(size, scale, baseline):
    pyro.clear_param_store()
    estimator = ph.BiHM_ELBO(K, baseline=baseline, max_plate_nesting=1)
    programs = estimator.programs(*in_pyro(size, scale))
    wake = partial(trace_in_torch.Programs.wake, programs, samples=replayed(SAMPLES))
    programs.wake = wake
    theirs = estimator.run(programs, (torch.tensor(DATA),), {})
    (weights,) = estimator.weights(theirs.wake).values()
    leaves = pyro.get_param_store()._params
    names = sorted(leaves)
    grads = torch.autograd.grad(theirs.surrogate, [leaves[n] for n in names])

    ours = nh.BiHM_ELBO(K, baseline=baseline, max_plate_nesting=1)
    run = ours.programs(*in_numpyro(size, scale))
    run.wake = partial(trace_in_jax.Programs.wake, run, samples=SAMPLES)

    def objective(params):
        return ours.run(run, random.key(0), params, (jnp.asarray(DATA),), {})

    found, done = jax.jit(jax.grad(objective, has_aux=True))(VALUES)
    close(done.loss, theirs.loss)
    close(done.model.weights, weights)
    assert not np.allclose(done.model.weights, 1 / K)
    assert names == sorted(VALUES)
    for name, grad in zip(names, grads, strict=True):
        close(found[name], grad)


@pytest.mark.parametrize("name", ["BiHM", "NaturalBiHM", "BiHM_ELBO"])
def test_the_same_options(name):
    here, there = (
        [(k, p.default) for k, p in inspect.signature(getattr(package, name)).parameters.items()]
        for package in (ph, nh)
    )
    assert here == there


@pytest.mark.parametrize("name", ["log_partition", "bidirectional_log_likelihood"])
def test_the_same_options_but_for_state(name):
    here, there = (
        [(k, p.default) for k, p in inspect.signature(getattr(package, name)).parameters.items()]
        for package in (ph, nh)
    )
    assert here == [item for item in there if item[0] not in ("rng_key", "params", "mutable_state")]
