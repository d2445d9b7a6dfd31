"""Stochastic backpropagation in both packages on the same parameters and the same noise."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pyro
import pytest
import torch
from jax import random

import numpyro_helmholtz as nh
import pyro_helmholtz as ph

from .test_weights import _double, close

__all__ = ["_double"]

K, B = 3, 4
RNG = np.random.default_rng(3)
SHAPES = {
    "down": (2, 5),
    "bias": (5,),
    "up": (5, 2),
    "log_scale": (2,),
    "across": (2, 3),
    "factor": (2, 3),
    "log_diag": (3,),
}
VALUES = {name: 0.5 * RNG.normal(size=shape) for name, shape in SHAPES.items()}
DATA = RNG.normal(size=(B, 5))
MASK = np.array([True, False, True, True])
NOISE = {(K, B, 2): RNG.normal(size=(K, B, 2)), (K, B, 3): RNG.normal(size=(K, B, 3))}
NOISE |= {shape[1:]: value[0] for shape, value in NOISE.items()}  # a first look has no particles


def programs(host, np_, rank_one, param, masked, scaled, size, trained):
    """x(5) ← z(2) and t(3); the guide draws z, normal, and t with a rank-one precision."""
    dist = host.distributions

    def plate():
        return host.plate("data", size, subsample_size=B, dim=-1)

    def model(x):
        with scaled(), plate():
            t = host.sample("t", dist.Normal(0.0 * x[..., :3], 1.0).to_event(1))
            z = host.sample("z", dist.Normal(np_.sin(t[..., :2]), 0.8).to_event(1))
            with masked():
                loc = np_.tanh(z) @ param("down") + param("bias") * t[..., :1]
                host.sample("x", dist.Normal(loc, 0.6).to_event(1), obs=x)

    def guide(x):
        with scaled(), plate():
            scale = np_.exp(param("log_scale")) if trained else 0.7 + 0.0 * x[..., :2]
            z = host.sample("z", dist.Normal(x @ param("up"), scale).to_event(1))
            h = np_.tanh(z)
            factor = h @ param("factor") if trained else 1.0 + 0.0 * x[..., :3]
            diag = np_.exp(param("log_diag")) if trained else 2.0 + 0.0 * x[..., :3]
            host.sample("t", rank_one(h @ param("across"), factor, diag))

    return model, guide


def in_numpyro(size, scale, trained):
    return programs(
        numpyro,
        jnp,
        nh.RankOnePrecisionNormal,
        lambda name: numpyro.param(name, jnp.asarray(VALUES[name])),
        lambda: numpyro.handlers.mask(mask=jnp.asarray(MASK)),
        lambda: numpyro.handlers.scale(scale=scale),
        size,
        trained,
    )


def in_pyro(size, scale, trained):
    return programs(
        pyro,
        torch,
        ph.RankOnePrecisionNormal,
        lambda name: pyro.param(name, torch.tensor(VALUES[name])),
        lambda: pyro.poutine.mask(mask=torch.tensor(MASK)),
        lambda: pyro.poutine.scale(scale=scale),
        size,
        trained,
    )


@pytest.fixture
def _same_noise(monkeypatch):
    """All normal draws take their noise from ``NOISE``, by shape."""

    def of_jax(d, sample_shape):
        return jnp.asarray(NOISE[d.shape(sample_shape)])

    def of_torch(d, sample_shape):
        return torch.tensor(NOISE[tuple(d._extended_shape(sample_shape))])

    def put(cls, name, draw):
        monkeypatch.setattr(cls, name, draw)

    put(
        numpyro.distributions.Normal,
        "sample",
        lambda d, key, sample_shape=(): d.loc + d.scale * of_jax(d, sample_shape),
    )
    put(
        nh.RankOnePrecisionNormal,
        "sample",
        lambda d, key, sample_shape=(): d.loc + d.root(of_jax(d, sample_shape)),
    )
    put(
        torch.distributions.Normal,
        "rsample",
        lambda d, sample_shape=(): d.loc + d.scale * of_torch(d, sample_shape),
    )
    put(
        ph.RankOnePrecisionNormal,
        "rsample",
        lambda d, sample_shape=(): d.loc + d.root(of_torch(d, sample_shape)),
    )


CASES = {
    "path": {"estimator": "path"},
    "path, closed": {"estimator": "path", "entropy": "closed"},
    "price": {"estimator": "price", "hessian": "exact"},
    "price, sampled": {"estimator": "price", "hessian": "exact", "entropy": "sampled"},
    "product-rule": {"estimator": "product-rule"},
    "posterior": {"parameter_posterior": 3.0, "parameter_variance": 1e-26},
}


@pytest.mark.parametrize("name", CASES)
def test_directions(_same_noise, name):
    """Losses and directions; the posterior with a variance that moves no parameter."""
    trained, (size, scale) = name != "product-rule", (40, 3.0)
    pyro.clear_param_store()
    theirs = ph.StochasticBackprop(
        *in_pyro(size, scale, trained), num_particles=K, max_plate_nesting=1, **CASES[name]
    )
    expected = theirs.directions(torch.tensor(DATA))
    ours = nh.StochasticBackprop(
        *in_numpyro(size, scale, trained), num_particles=K, max_plate_nesting=1, **CASES[name]
    )
    x = jnp.asarray(DATA)
    found = ours.directions(ours.init(random.key(0), x), x)
    close(found.loss, expected.loss)
    assert set(found.gradient) == set(expected.gradient)
    for key, value in found.gradient.items():
        close(value, expected.gradient[key])


def test_reports():
    trained = True
    theirs = ph.StochasticBackprop(*in_pyro(B, 1.0, trained), estimator="price")
    ours = nh.StochasticBackprop(*in_numpyro(B, 1.0, trained), estimator="price")
    pyro.clear_param_store()
    found = ours.structure(random.key(0), jnp.asarray(DATA))
    assert found == theirs.structure(torch.tensor(DATA))


def double(value):
    return torch.tensor(value, dtype=torch.float64)


def test_distributions():
    loc, factor, diag = RNG.normal(size=(2, 4)), RNG.normal(size=(2, 4)), RNG.gamma(2.0, size=4)
    x = RNG.normal(size=(3, 2, 4))
    ours = nh.RankOnePrecisionNormal(*map(jnp.asarray, (loc, factor, diag)))
    theirs = ph.RankOnePrecisionNormal(*map(torch.tensor, (loc, factor, diag)))
    close(ours.log_prob(x), theirs.log_prob(torch.tensor(x)))
    close(ours.root(jnp.asarray(x)), theirs.root(torch.tensor(x)))
    close(ours.entropy(), theirs.entropy())
    close(ours.variance, theirs.variance)
    flat = numpyro.distributions.Normal(jnp.zeros(4), 2.0).to_event(1)
    normal = pyro.distributions.Normal(torch.zeros(4, dtype=torch.float64), 2.0).to_event(1)
    close(
        numpyro.distributions.kl_divergence(ours, flat),
        torch.distributions.kl_divergence(theirs, normal),
    )
    shapes = np.array([-0.4, 0.0, 1e-3, 0.3])
    ours = nh.GeneralizedExtremeValue(0.2, 1.5, jnp.asarray(shapes))
    theirs = ph.GeneralizedExtremeValue(double(0.2), double(1.5), double(shapes))
    for value in (-1.0, 0.7, 2.0):
        close(ours.log_prob(value), theirs.log_prob(double([value] * 4)))
    close(ours.entropy(), theirs.entropy())
    np.testing.assert_allclose(ours.mean, theirs.mean, rtol=1e-6)
    np.testing.assert_allclose(ours.variance, theirs.variance, rtol=1e-4)
    ours, theirs = (
        nh.Levy(0.5, 1.3),
        ph.Levy(double(0.5), double(1.3)),
    )
    close(ours.log_prob(jnp.array([0.8, 7.0])), theirs.log_prob(double([0.8, 7.0])))


def test_the_product_rule_refuses_the_same():
    for make, args in ((in_pyro, ()), (in_numpyro, (random.key(0),))):
        package = ph if make is in_pyro else nh
        pyro.clear_param_store()
        x = torch.tensor(DATA) if make is in_pyro else jnp.asarray(DATA)
        svi = package.StochasticBackprop(*make(B, 1.0, True), estimator="product-rule")
        with pytest.raises(ValueError, match="latent site 'z'.*'scale' of Normal.*pole"):
            if args:
                jax.eval_shape(lambda k, svi=svi, x=x: svi.update(svi.init(k, x), x), *args)
            else:
                svi.step(x)
