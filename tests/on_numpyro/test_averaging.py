"""Means of the parameters: what is read, and where an update goes on from."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random

from numpyro_helmholtz import RWS, BiHM, NaturalBiHM, NaturalRWS, WakeSleep

from .programs import of_params
from .test_resume import X, of_sbn, same

KEY = random.key(2)


def trained(front, make, steps, **options):
    """The front end, its states and what it reads after each step, constrained or not."""
    svi = front(*make(), numpyro.optim.SGD(0.3), num_particles=4, **options)
    state, update = svi.init(KEY, X), jax.jit(svi.update)
    states = [state]
    for _ in range(steps):
        states.append(update(states[-1], X)[0])
    return svi, states


@pytest.mark.parametrize(
    ("front", "make"),
    [(RWS, of_params), (NaturalRWS, of_sbn), (WakeSleep, of_sbn), (BiHM, of_sbn)],
)
def test_what_is_read_are_weighted_means_of_the_steps(front, make):
    plain, points = trained(front, make, 12)
    svi, states = trained(front, make, 12, average=True)
    shares = [10 / (10 + t) for t in range(12)]
    for t in (1, 2, 12):
        weights = [shares[s] * np.prod([1 - x for x in shares[s + 1 : t]]) for s in range(t)]
        assert sum(weights) == pytest.approx(1)
        read = [plain._optimiser.params(s.optim_state) for s in points[1 : t + 1]]
        expected = jax.tree.map(
            lambda *x, w=weights: sum(a * b for a, b in zip(w, x, strict=True)), *read
        )
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-10),
            states[t].average.means,
            expected,
        )
    same(states[-1].optim_state, points[-1].optim_state)
    same(svi.directions(states[-1], X).gradient, plain.directions(points[-1], X).gradient)


def test_parameters_and_evaluation_are_those_of_the_means():
    svi, states = trained(RWS, of_sbn, 3, average=True)
    same(svi.get_params(states[-1]), states[-1].average.means)
    other = RWS(*of_sbn(), num_particles=4)
    there = other.init(KEY, X, init_params=states[-1].average.means)
    there = there._replace(rng_key=states[-1].rng_key)
    np.testing.assert_allclose(svi.evaluate(states[-1], X), other.evaluate(there, X), rtol=1e-10)


def test_a_state_pickles_and_goes_on():
    svi, states = trained(NaturalRWS, of_sbn, 2, average=True)
    expected = svi.run(KEY, 3, X, init_state=states[-1], progress_bar=False)
    other = NaturalRWS(*of_sbn(), numpyro.optim.SGD(0.3), num_particles=4, average=True)
    restored = pickle.loads(pickle.dumps(states[-1]))
    found = other.run(random.key(9), 3, X, init_state=restored, progress_bar=False)
    same(found.params, expected.params)
    same(found.state.average, expected.state.average)


def test_a_step_that_is_not_finite_leaves_the_means():
    svi, states = trained(RWS, of_sbn, 2, average=True)
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
    assert not RWS(model, guide).average
    assert RWS(model, guide).init(KEY, X).average == ()
