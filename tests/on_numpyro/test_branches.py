"""Branches stay branches under vmap, and each member of a batch keeps what is its own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random
from jax.extend.core import jaxprs_in_params

import numpyro_helmholtz as nh
from numpyro_helmholtz import branches

from .programs import SBN

KEY = random.key(5)
X = random.bernoulli(KEY, 0.4, (6, 3)).astype(float)


def doubled(predicate, x):
    def taken():
        return {"x": 2 * x, "key": random.key(2)}

    return branches.cond(predicate, taken, {"x": x, "key": random.key(1)})


@pytest.mark.parametrize("which", [[False, False, False], [True, False, True], [True] * 3])
@pytest.mark.parametrize("batched", [True, False])
def test_each_member_keeps_its_own(which, batched):
    x = jnp.arange(6.0).reshape(3, 2) + 1
    got = jax.jit(jax.vmap(doubled, (0, 0 if batched else None)))(
        jnp.array(which), x if batched else x[0]
    )
    for i, taken in enumerate(which):
        own = x[i] if batched else x[0]
        assert (got["x"][i] == (2 * own if taken else own)).all()
        assert got["key"][i] == random.key(2 if taken else 1)


def test_alone_and_in_two_batches():
    which = jnp.array([[True, False], [False, False]])
    x = jnp.arange(4.0).reshape(2, 2)
    twice = jax.vmap(jax.vmap(doubled))(which, x)
    assert (twice["x"] == jnp.where(which, 2 * x, x)).all()
    for i, j in np.ndindex(2, 2):
        assert doubled(which[i, j], x[i, j])["x"] == twice["x"][i, j]


def test_the_largest_index_of_a_batch_counts():
    ways = [lambda x, k=k: x + 10.0 * k for k in range(3)]

    def chosen(i, x):
        return branches.switch(i, ways, x)

    assert (jax.vmap(chosen)(jnp.array([0, 1]), jnp.zeros(2)) == 10.0).all()
    assert chosen(jnp.array(2), 1.0) == 21.0


def eigenbases(jaxpr, inside=False):
    """For each eigendecomposition whether it stands inside a branch."""
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "eigh":
            yield inside
        for sub in jaxprs_in_params(eqn.params):
            yield from eigenbases(sub, inside or eqn.primitive is lax.cond_p)


def test_no_eigenbasis_is_found_in_vain_for_seeds_side_by_side():
    sbn = SBN()
    svi = nh.NaturalRWS(sbn.model, sbn.guide, num_particles=3)
    states = jax.vmap(lambda key: svi.init(key, X))(random.split(KEY, 3))
    found = list(eigenbases(jax.make_jaxpr(jax.vmap(lambda s: svi.update(s, X)))(states).jaxpr))
    assert found and all(found)
