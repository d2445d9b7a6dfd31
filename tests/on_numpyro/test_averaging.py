"""Means of the parameters: what is read, and where an update goes on from."""

import pickle
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints

from numpyro_helmholtz import (
    ALWS,
    RWS,
    BiHM,
    NaturalBiHM,
    NaturalRWS,
    StochasticBackprop,
    WakeSleep,
)

from .programs import of_params
from .test_resume import X, of_sbn, same

KEY = random.key(2)


def of_factors():
    def model(x):
        w = numpyro.param("w", lambda key: 0.5 * random.normal(key, (2, 3)))
        s = numpyro.param("s", jnp.ones(3), constraint=constraints.positive)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ w, s).to_event(1), obs=x)

    def guide(x):
        v = numpyro.param("v", lambda key: 0.5 * random.normal(key, (3, 2)))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(x @ v, 0.7).to_event(1))

    return model, guide


def alws(model, guide, optim, num_particles, **options):
    """With a regression that adapts; of one interface with the others."""
    return ALWS(model, optim, 10 * num_particles, adapt=0.05, held_out=10, **options)


with_posterior = partial(StochasticBackprop, parameter_posterior=5.0, parameter_variance=0.1)


def close(a, b):
    """Two programs, which the compiler may round in different ways."""
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10), a, b)


def made(front, make, **options):
    return front(*make(), numpyro.optim.SGD(0.3), num_particles=4, **options)


@cache
def trained(front, make, **options):
    """The front end and its states before and after each of twelve steps."""
    svi = made(front, make, **options)
    state, update = svi.init(KEY, X), jax.jit(svi.update)
    states = [state]
    for _ in range(12):
        states.append(update(states[-1], X)[0])
    return svi, states


@pytest.mark.parametrize(
    ("front", "make"),
    [
        (RWS, of_params),
        (NaturalRWS, of_sbn),
        (WakeSleep, of_sbn),
        (BiHM, of_sbn),
        (alws, of_factors),
        (with_posterior, of_factors),
    ],
)
def test_what_is_read_are_weighted_means_of_the_steps(front, make):
    plain, points = trained(front, make)
    svi, states = trained(front, make, average=True)
    shares = [10 / (10 + t) for t in range(12)]
    for t in (1, 2, 12):
        weights = [shares[s] * np.prod([1 - x for x in shares[s + 1 : t]]) for s in range(t)]
        assert sum(weights) == pytest.approx(1)
        read = [plain._optimiser.everything(s.optim_state) for s in points[1 : t + 1]]
        expected = jax.tree.map(
            lambda *x, w=weights: sum(a * b for a, b in zip(w, x, strict=True)), *read
        )
        close(states[t].average.means, expected)
    close(states[-1].optim_state, points[-1].optim_state)
    close(svi.directions(states[-1], X).gradient, plain.directions(points[-1], X).gradient)


@pytest.mark.parametrize(("front", "make"), [(RWS, of_sbn), (alws, of_factors)])
def test_parameters_and_evaluation_are_those_of_the_means(front, make):
    svi, states = trained(front, make, average=True)
    means, memory = states[-1].average.means, states[-1].memory
    params = svi.get_params(states[-1])
    same(params, {n: jnp.exp(v) if n == "s" else v for n, v in means.items()})
    other = made(front, make)
    there = other.init(KEY, X, init_params=params)
    there = there._replace(rng_key=states[-1].rng_key, memory=memory)
    np.testing.assert_allclose(svi.evaluate(states[-1], X), other.evaluate(there, X), rtol=1e-10)


def test_the_posterior_and_its_divergence_are_those_of_the_means():
    """By a point put where the means are."""
    svi, states = trained(with_posterior, of_factors, average=True)
    means = states[-1].average.means
    plain = made(with_posterior, of_factors)
    assert svi.get_params(states[-1]).keys() == set("wsv")
    posterior = svi.posterior(states[-1])
    for name, (mean, variance) in posterior.items():
        same(mean, means[name])
        same(variance, jnp.exp(means["posterior_variance"][name]))
    there = states[-1]._replace(optim_state=plain.optim.init(means), average=())
    found, expected = svi.evaluate(states[-1], X), plain.evaluate(there, X)
    np.testing.assert_allclose(found, expected, rtol=1e-12)
    assert abs(float(expected - plain.evaluate(states[-1], X))) > 1e-6  # not at the point


@pytest.mark.parametrize(
    ("front", "make"), [(NaturalRWS, of_sbn), (alws, of_factors), (with_posterior, of_factors)]
)
def test_a_state_pickles_and_goes_on(front, make):
    svi, states = trained(front, make, average=True)
    other = made(front, make, average=True)
    state, update = pickle.loads(pickle.dumps(states[2])), jax.jit(other.update)
    for expected in states[3:6]:
        state, _ = update(state, X)
        same(other.get_params(state), svi.get_params(expected))
        same(state.average, expected.average)
        same(state.optim_state, expected.optim_state)


@pytest.mark.parametrize(
    ("front", "make"), [(RWS, of_sbn), (alws, of_factors), (with_posterior, of_factors)]
)
def test_a_step_that_is_not_finite_leaves_the_means(front, make):
    svi, states = trained(front, make, average=True)
    new, _ = jax.jit(svi.stable_update)(states[-1], X * jnp.nan)
    same(new.average, states[-1].average)
    assert int(new.skipped) == 1


def test_natural_estimators_average_with_their_own_optimiser():
    model, guide = of_sbn()
    sgd = numpyro.optim.SGD(0.1)
    for front in (NaturalRWS, NaturalBiHM):
        assert front(model, guide).average
        assert not front(model, guide, average=False).average
        assert not front(model, guide, sgd).average
        assert front(model, guide, sgd, average=True).average
    for front in (RWS, StochasticBackprop):
        assert not front(model, guide).average
    assert not ALWS(model).average
    assert RWS(model, guide).init(KEY, X).average == ()
