"""Both packages on the same dreams: the same weights, directions and natural forms."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions
import pyro
import pyro.distributions
import pytest
import torch
from jax import random

import numpyro_helmholtz as nh
import pyro_helmholtz as ph
from numpyro_helmholtz.estimators.sleep_phase import no_guide
from numpyro_helmholtz.exponential_families import exponential_family as in_jax
from pyro_helmholtz.exponential_families import exponential_family as in_torch

B, S = 5, 8
RNG = np.random.default_rng(11)
VALUES = {
    "weight": RNG.normal(size=(2, 3)),
    "logits": RNG.normal(size=(2, 4)),
    "rate": RNG.normal(size=2),
    "log_scale": 0.3 * RNG.normal(size=3),
}
DATA = {
    "x": RNG.normal(size=(B, 3)),
    "k": RNG.integers(0, 4, B),
    "n": RNG.poisson(1.5, B).astype(float),
}
DREAMS = {
    "z": RNG.normal(size=(S, B, 2)),
    "x": RNG.normal(size=(S, B, 3)),
    "k": RNG.integers(0, 4, (S, B)),
    "n": RNG.poisson(1.5, (S, B)).astype(float),
}
INPUTS, TARGETS = RNG.normal(size=(40, 3)), RNG.normal(size=(7, 3))


@pytest.fixture(autouse=True, scope="module")
def _double():
    before = jax.config.jax_enable_x64
    jax.config.update("jax_enable_x64", True)
    pyro.clear_param_store()
    yield
    pyro.clear_param_store()
    jax.config.update("jax_enable_x64", before)


def close(ours, theirs, tolerance=1e-10):
    if torch.is_tensor(theirs):
        theirs = theirs.detach().numpy()
    np.testing.assert_allclose(np.asarray(ours), theirs, rtol=tolerance, atol=tolerance)


# weights ---------------------------------------------------------------------------------------

KERNELS = {
    "gaussian": {},
    "fixed": {"bandwidth": 1.3},
    "standardised": {"standardise": True},
}
MODELS = {
    "kernel": lambda p, kernel: p.KernelRegression(kernel, 0.3),
    "affine": lambda p, kernel: p.KernelRegression(kernel, 0.3, affine=True),
    "nystrom": lambda p, kernel: p.Nystrom(9, 0.3, kernel),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("model", MODELS)
def test_weights_and_coverage(model, kernel):
    theirs = MODELS[model](ph, ph.GaussianKernel(**KERNELS[kernel]))
    theirs.prepare(torch.tensor(INPUTS))
    ours = MODELS[model](nh, nh.GaussianKernel(**KERNELS[kernel]))
    expected = theirs.solve(torch.tensor(INPUTS), torch.tensor(TARGETS))
    for a, b in zip(ours.solve(jnp.asarray(INPUTS), jnp.asarray(TARGETS)), expected, strict=True):
        close(a, b, 1e-9 if model == "nystrom" else 1e-10)


def test_weights_of_linear_random_and_network_features():
    x, targets = jnp.asarray(INPUTS), jnp.asarray(TARGETS)
    theirs = ph.KernelRegression(ph.GaussianKernel(features=ph.LinearFeatures(2)), 0.3)
    theirs.prepare(torch.tensor(INPUTS))
    ours = nh.KernelRegression(nh.GaussianKernel(features=nh.LinearFeatures(2)), 0.3)
    gamma = ours.init(random.key(0), x)
    gamma["learned"]["kernel"] = {
        "log_bandwidth": jnp.log(theirs.kernel.bandwidth),
        "features": {"weight": jnp.asarray(theirs.kernel.features.weight.detach().numpy())},
    }
    close(
        ours.weights(x, targets, gamma), theirs.weights(torch.tensor(INPUTS), torch.tensor(TARGETS))
    )

    theirs = ph.RandomFeatures(30, 0.3)
    theirs.prepare(torch.tensor(INPUTS))
    ours = nh.RandomFeatures(30, 0.3)
    gamma = ours.init(random.key(0), x)
    gamma["fixed"] = {
        "frequencies": jnp.asarray(theirs.frequencies.numpy()),
        "phases": jnp.asarray(theirs.phases.numpy()),
    }
    close(
        ours.weights(x, targets, gamma), theirs.weights(torch.tensor(INPUTS), torch.tensor(TARGETS))
    )

    theirs = ph.NetworkRegression(ridge=0.3, num_features=4)
    theirs.prepare(torch.tensor(INPUTS))
    ours = nh.NetworkRegression(ridge=0.3, num_features=4)
    gamma = ours.init(random.key(0), x)
    weight, bias = (p.detach().numpy() for p in theirs.network.parameters())
    gamma["learned"]["network"] = {"weight": jnp.asarray(weight.T), "bias": jnp.asarray(bias)}
    close(
        ours.weights(x, targets, gamma), theirs.weights(torch.tensor(INPUTS), torch.tensor(TARGETS))
    )


# directions ------------------------------------------------------------------------------------


def program(host, dist, param, exp, size, scale, scaled):
    """Three observed sites of different families, a subsampled plate and a scale."""

    def model(x, k, n):
        with scaled(scale), host.plate("data", size, subsample_size=B, dim=-1):
            z = host.sample("z", dist.Normal(0.0 * param("rate"), 1.0).to_event(1))
            fn = dist.Normal(z @ param("weight"), exp(param("log_scale"))).to_event(1)
            host.sample("x", fn, obs=x)
            host.sample("k", dist.Categorical(logits=z @ param("logits")), obs=k)
            host.sample("n", dist.Poisson(exp(z @ param("rate"))), obs=n)

    return model


def in_numpyro(size, scale):
    param = lambda name: numpyro.param(name, jnp.asarray(VALUES[name]))  # noqa: E731
    scaled = lambda s: numpyro.handlers.scale(scale=s)  # noqa: E731
    return program(numpyro, numpyro.distributions, param, jnp.exp, size, scale, scaled)


def in_pyro(size, scale):
    param = lambda name: pyro.param(name, torch.tensor(VALUES[name]))  # noqa: E731
    scaled = lambda s: pyro.poutine.scale(scale=s)  # noqa: E731
    return program(pyro, pyro.distributions, param, torch.exp, size, scale, scaled)


class Given(pyro.poutine.messenger.Messenger):
    """Every draw is taken from ``DREAMS``; enter it outside of all else."""

    def _pyro_sample(self, msg):
        if msg["name"] in DREAMS and not msg["is_observed"]:
            msg["value"], msg["done"] = torch.tensor(DREAMS[msg["name"]]), True


OPTIONS = [
    {},
    {"exponential_family": False},
    {"affine": True},
    {"gradient_model": "nystrom"},
    {"num_sleep": 30, "held_out": 10},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(("size", "scale"), [(B, 1.0), (40, 3.0)])
def test_directions_on_the_same_dreams(options, size, scale):
    pyro.clear_param_store()
    options = {"num_sleep": 40, "ridge": 0.3, **options}
    estimator = ph.ALWS_ELBO(**options)
    estimator.num_data = B  # or a first run, with one particle, would meet the dreams
    theirs = estimator.programs(in_pyro(size, scale), lambda *args: None)
    theirs.max_plate_nesting = 1
    with Given():
        done = estimator.run(theirs, tuple(torch.tensor(v) for v in DATA.values()), {})
    leaves = pyro.get_param_store()._params
    names = sorted(leaves)
    grads = torch.autograd.grad(done.surrogate, [leaves[name] for name in names])

    ours = nh.ALWS_ELBO(**options)
    programs = ours.programs(in_numpyro(size, scale), no_guide)
    arguments = tuple(jnp.asarray(v) for v in DATA.values())

    def objective(params):
        return ours.run(programs, random.key(0), params, arguments, {}, samples=DREAMS)

    params = {name: jnp.asarray(value) for name, value in VALUES.items()}
    (_, passed), found = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)

    assert names == sorted(VALUES)
    for name, grad in zip(names, grads, strict=True):
        close(found[name], grad, 1e-9)
    close(passed.loss, float(done.loss), 1e-9)
    for name in ("coverage_mean", "coverage_min"):
        close(passed.report[name], estimator.diagnostics[name])
    if "held_out" in options:
        close(passed.report["held_out_error"], estimator.diagnostics["held_out_error"], 1e-9)


# natural forms ---------------------------------------------------------------------------------

A, R, P = np.array([-1.3, 0.2, 2.0]), np.array([0.6, 1.1, 2.3]), np.array([0.1, 0.5, 0.83])
FAMILIES = {
    "normal": lambda d, a: d.Normal(a(A), a(R)),
    "log-normal": lambda d, a: d.LogNormal(a(A), a(R)),
    "half-normal": lambda d, a: d.HalfNormal(a(R)),
    "bernoulli": lambda d, a: d.Bernoulli(probs=a(P)),
    "binomial": lambda d, a: d.Binomial(7, logits=a(A)),
    "geometric": lambda d, a: d.Geometric(probs=a(P)),
    "poisson": lambda d, a: d.Poisson(a(R)),
    "categorical": lambda d, a: d.Categorical(logits=a(A)),
    "exponential": lambda d, a: d.Exponential(a(R)),
    "gamma": lambda d, a: d.Gamma(a(1 + R), a(R)),
    "inverse gamma": lambda d, a: d.InverseGamma(a(1 + R), a(R)),
    "beta": lambda d, a: d.Beta(a(1 + R), a(1 + P)),
    "dirichlet": lambda d, a: d.Dirichlet(a(R)),
    "von mises": lambda d, a: d.VonMises(a(A), a(R)),
    "multivariate normal": lambda d, a: d.MultivariateNormal(a(A), a(np.eye(3) + 0.3)),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_natural_forms_are_the_same(name):
    fn = FAMILIES[name](numpyro.distributions, jnp.asarray)
    ours = in_jax(fn)
    theirs = in_torch(FAMILIES[name](pyro.distributions, torch.tensor))
    value = fn.sample(random.key(2))
    other = torch.tensor(np.asarray(value))
    other = other if name == "categorical" else other.double()
    for a, b in zip(ours.natural, theirs.natural, strict=True):
        close(a, b)
    for a, b in zip(ours.statistics(value), theirs.statistics(other), strict=True):
        close(a, b)
    close(ours.log_normaliser, theirs.log_normaliser)
    close(ours.log_base(value), theirs.log_base(other))
