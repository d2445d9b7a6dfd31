"""Saving and going on: the next steps are the same, bit for bit."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random

from numpyro_helmholtz import ALWS, RWS, NaturalRWS, WakeSleep

from .programs import SBN, of_params

KEY = random.key(2)
X = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def same(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


def of_sbn():
    sbn = SBN()
    return sbn.model, sbn.guide


@pytest.mark.parametrize("make", [of_sbn, of_params])
@pytest.mark.parametrize(
    ("front", "optim", "options"),
    [
        (RWS, lambda: numpyro.optim.Adam(0.05), {}),
        (RWS, lambda: optax.sgd(0.05, 0.9), {"sleep_steps": 2}),
        (WakeSleep, lambda: None, {}),
    ],
)
def test_a_fresh_front_end_goes_on(make, front, optim, options):
    def fresh():
        return front(*make(), optim(), num_particles=4, **options)

    svi = fresh()
    state = svi.run(KEY, 3, X, progress_bar=False).state
    saved = pickle.dumps(state)
    expected = svi.run(KEY, 3, X, init_state=state, progress_bar=False)

    other = fresh()
    restored = pickle.loads(saved)
    same(other.get_params(restored), svi.get_params(state))
    found = other.run(random.key(9), 3, X, init_state=restored, progress_bar=False)
    same(found.losses, expected.losses)
    same(found.params, expected.params)
    assert int(found.state.step) == 6


def test_looking_changes_nothing():
    svi = RWS(*of_sbn(), numpyro.optim.Adam(0.05), num_particles=4)
    state = svi.init(KEY, X)
    update = jax.jit(svi.update)
    expected, loss = update(state, X)
    assert svi.evaluate(state, X) == svi.evaluate(state, X)
    assert float(svi.directions(state, X).loss) == pytest.approx(float(loss))
    same(svi.get_params(update(state, X)[0]), svi.get_params(expected))


def test_raw_keys_work_as_well():
    svi = RWS(*of_sbn(), num_particles=4)
    state = pickle.loads(pickle.dumps(svi.init(random.PRNGKey(0), X)))
    assert state.rng_key.shape == (2,)
    assert jnp.isfinite(svi.run(random.PRNGKey(0), 2, X, progress_bar=False).losses).all()


def of_means():
    def model(x):
        w = numpyro.param("w", jnp.array([[1.0, 0.5, 0.0], [0.0, 1.0, 0.3]]))
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(h @ w, 1.0).to_event(1), obs=x)

    return ALWS(model, num_sleep=20)


@pytest.mark.parametrize(
    "make",
    [
        lambda: RWS(*of_params(), num_particles=3, average=True),
        lambda: NaturalRWS(*of_params(), num_particles=3),
        of_means,
    ],
)
def test_a_state_can_be_donated(make):
    """Its arrays are distinct, and those that it was made from stay."""
    svi = make()
    w = jnp.full((2, 3), 0.3)
    state = svi.init(KEY, X, init_params={"w": w})
    found = []
    for options in ({}, {"donate_argnums": 0}):
        update = jax.jit(svi.update, **options)
        moved = jax.tree.map(jnp.copy, state) if not options else state
        for _ in range(2):
            moved, loss = update(moved, X)
        found.append((svi.get_params(moved), loss))
    same(*found)
    assert float(w.sum()) == pytest.approx(1.8)
