"""Both packages on the same parameters and the same samples: equal to rounding."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pyro.distributions
import pytest
import torch
from jax import random

import numpyro_helmholtz.estimators.base as on_jax
import numpyro_helmholtz.trace
import pyro_helmholtz.estimators.base as on_torch
import pyro_helmholtz.trace

K, B = 6, 5
WIDTHS = {"x": 4, "h1": 3, "h2": 2}
RNG = np.random.default_rng(7)
SHAPES = {
    "top": (2,),
    "down2": (2, 3),
    "down1": (3, 4),
    "up1": (4, 3),
    "up2": (3, 2),
    "log_scale": (4,),
}
VALUES = {name: RNG.normal(size=shape) for name, shape in SHAPES.items()}
DATA = RNG.normal(size=(B, 4))
MASK = np.array([True, True, False, True, True])
SAMPLES = {name: RNG.integers(0, 2, (K, B, WIDTHS[name])).astype(float) for name in ("h1", "h2")}
DREAM = {n: RNG.integers(0, 2, (B, WIDTHS[n])).astype(float) for n in ("h1", "h2")}
DREAM["x"] = RNG.normal(size=(B, 4))


@pytest.fixture(autouse=True, scope="module")
def _double():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    pyro.clear_param_store()
    yield
    jax.config.update("jax_enable_x64", before)


def programs(host, dist, param, masked, exp, scaled, size):
    """One pair of programs in either host; masked and scaled data, a subsampled plate."""

    def bernoulli(name, logits):
        return host.sample(name, dist.Bernoulli(logits=logits).to_event(1))

    def model(x):
        with scaled(), host.plate("data", size, subsample_size=B, dim=-1):
            h2 = bernoulli("h2", param("top"))
            h1 = bernoulli("h1", h2 @ param("down2"))
            with masked():
                fn = dist.Normal(h1 @ param("down1"), exp(param("log_scale"))).to_event(1)
                host.sample("x", fn, obs=x)

    def guide(x):
        with scaled(), host.plate("data", size, subsample_size=B, dim=-1):
            h1 = bernoulli("h1", x @ param("up1"))
            bernoulli("h2", h1 @ param("up2"))

    return model, guide


def in_numpyro(size, scale):
    return programs(
        numpyro,
        numpyro.distributions,
        lambda name: numpyro.param(name, jnp.asarray(VALUES[name])),
        lambda: numpyro.handlers.mask(mask=jnp.asarray(MASK)),
        jnp.exp,
        lambda: numpyro.handlers.scale(scale=scale),
        size,
    )


def in_pyro(size, scale):
    return programs(
        pyro,
        pyro.distributions,
        lambda name: pyro.param(name, torch.tensor(VALUES[name])),
        lambda: pyro.poutine.mask(mask=torch.tensor(MASK)),
        torch.exp,
        lambda: pyro.poutine.scale(scale=scale),
        size,
    )


def replayed(values):
    trace = pyro.poutine.Trace()
    for name, value in values.items():
        node = {"name": name, "type": "sample", "is_observed": False, "infer": {}}
        trace.add_node(name, value=torch.tensor(value), **node)
    return trace


@pytest.mark.parametrize(("size", "scale"), [(B, 1.0), (40, 1.0), (40, 3.0)])
@pytest.mark.parametrize("baseline", [True, False])
def test_weights_bound_and_wake_directions(size, scale, baseline):
    pyro.clear_param_store()
    samples = dict(SAMPLES)
    theirs = pyro_helmholtz.trace.Programs(*in_pyro(size, scale), K, 1)
    wake = theirs.wake((torch.tensor(DATA),), {}, samples=replayed(samples))
    weights = wake.weights()
    shift = 1 / K if baseline else 0.0
    signed = {key: w - shift for key, w in weights.items()}
    surrogate = on_torch.score(wake.model, wake.layout, weights) + 0.5 * on_torch.score(
        wake.guide, wake.layout, signed, observed=False
    )
    leaves = pyro.get_param_store()._params
    names = sorted(leaves)
    grads = torch.autograd.grad(surrogate, [leaves[n] for n in names])

    ours = numpyro_helmholtz.trace.Programs(*in_numpyro(size, scale), K, 1)

    def objective(params):
        wake = ours.wake(random.key(0), params, (jnp.asarray(DATA),), {}, samples=samples)
        weights = wake.weights()
        value = on_jax.score(wake.model, wake.layout, weights) + 0.5 * on_jax.score(
            wake.guide, wake.layout, weights - shift, observed=False
        )
        return value, (wake.log_weights, wake.bound(), wake.layout.num_data)

    (value, rest), found = jax.jit(jax.value_and_grad(objective, has_aux=True))(VALUES)
    log_weights, bound, num_data = rest

    close(log_weights, wake.log_weights)
    close(bound, wake.bound())
    close(num_data, wake.layout.num_data)
    close(value, surrogate.detach())
    for name, grad in zip(names, grads, strict=True):
        close(found[name], grad)
    assert names == sorted(VALUES)


def test_sleep_direction():
    pyro.clear_param_store()
    theirs = pyro_helmholtz.trace.Programs(*in_pyro(B, 1.0), K, 1)
    guide = pyro.poutine.trace(pyro.poutine.replay(theirs.guide, trace=replayed(DREAM))).get_trace(
        torch.tensor(DREAM["x"])
    )
    model = pyro.poutine.trace(pyro.poutine.replay(theirs.model, trace=replayed(DREAM))).get_trace(
        torch.tensor(DREAM["x"])
    )
    sites = [site for _, site in pyro_helmholtz.sites.stochastic_sites(model)]
    layout = pyro_helmholtz.trace.Layout.of(sites, 1)
    surrogate = on_torch.score(guide, layout, None, observed=False)
    names = ["up1", "up2"]
    leaves = pyro.get_param_store()._params
    grads = torch.autograd.grad(surrogate, [leaves[n] for n in names])

    ours = numpyro_helmholtz.trace.Programs(*in_numpyro(B, 1.0), K, 1)

    def objective(params):
        dream = ours.dream(random.key(0), params, (jnp.asarray(DATA),), {}, subsample=DREAM)
        return on_jax.score(dream.guide, dream.layout, None, observed=False)

    found = jax.jit(jax.grad(objective))(VALUES)
    for name, grad in zip(names, grads, strict=True):
        close(found[name], grad)


def close(ours, theirs):
    if torch.is_tensor(theirs):
        theirs = theirs.detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
