"""Flat keys draw the same bits as JAX's own, and go to known distributions alone."""

import jax
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers

from numpyro_helmholtz.flat_keys import draws_plainly, flat
from numpyro_helmholtz.messengers import FlatDraws

KEY = random.key(3)


@pytest.mark.parametrize("shape", [(), (1,), (0, 3), (3, 4, 5)])
@pytest.mark.parametrize("width", ["uint8", "uint32", "uint64"])
@pytest.mark.parametrize("partitionable", [True, False])
def test_the_same_bits(shape, width, partitionable):
    with jax.threefry_partitionable(partitionable):
        ours, own = (random.bits(key, shape, width) for key in (flat(KEY), KEY))
    assert ours.dtype == own.dtype and ours.shape == shape
    assert (ours == own).all()


def test_the_same_keys_from_keys():
    for derive in (lambda key: random.split(key, (2, 3)), lambda key: random.fold_in(key, 7)):
        ours, own = derive(flat(KEY)), derive(KEY)
        assert ours.dtype == flat(KEY).dtype != own.dtype
        assert (random.key_data(ours) == random.key_data(own)).all()
    many = random.split(KEY, 4)
    draw = jax.vmap(lambda key: random.normal(key, (3,)))
    assert (draw(many) == draw(flat(many))).all()


def test_other_kinds_of_keys_stay():
    other = random.key(0, impl="rbg")
    assert flat(other) is other
    assert flat(flat(KEY)).dtype == flat(KEY).dtype


class Odd(dist.Normal):
    """Samples in a way of its own."""


PLAIN = dist.Bernoulli(logits=np.zeros((4, 3))).to_event(1).expand([2, 4]).mask(True)


@pytest.mark.parametrize(
    ("fn", "plain"),
    [(PLAIN, True), (dist.Normal(0, 1), True), (dist.Poisson(2.0), False), (Odd(0, 1), False)],
)
def test_samples_are_those_of_the_host(fn, plain):
    def program():
        return numpyro.sample("z", fn)

    assert draws_plainly(fn) is plain
    with FlatDraws(), handlers.trace() as trace, handlers.seed(rng_seed=KEY):
        ours = program()
    used = trace["z"]["kwargs"]["rng_key"]
    assert (used.dtype == flat(KEY).dtype) is plain
    assert (ours == handlers.seed(program, KEY)()).all()
    with FlatDraws(), handlers.seed(rng_seed=random.key_data(KEY)):  # a raw key
        assert (ours == program()).all()
