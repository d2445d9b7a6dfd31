"""What follows the products is computed in the branch, and has the same value there."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, random

from numpyro_helmholtz.later import later

X, W = random.normal(random.key(0), (3, 4)), random.normal(random.key(1), (4, 5))


@jax.custom_jvp
def clipped(x):
    return jnp.minimum(x, 1.0)


clipped.defjvp(lambda x, t: (clipped(*x), *t))


def whole(x, w):
    h = jax.jit(lambda x: jnp.tanh(x) @ w)(x)
    inner = lax.cond(x.sum() > 0, lambda: h @ w.T, lambda: x)
    return {"a": jnp.exp(clipped(h)) * jnp.where(h > 0, h, 2), "b": (x, inner.sum(0)), "c": None}


def split(x, w, due):
    rest = later(lambda: whole(x, w))
    return lax.cond(due, rest, lambda: jax.tree.map(jnp.zeros_like, rest()))


def primitives(jaxpr):
    """Names of the primitives of a jaxpr, those inside included."""
    for eqn in jaxpr.eqns:
        yield eqn.primitive.name
        for value in eqn.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from primitives(getattr(inner, "jaxpr", inner))


def test_the_same_values():
    got, want = jax.jit(split)(X, W, True), whole(X, W)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-14), got, want)
    assert all((leaf == 0).all() for leaf in jax.tree.leaves(jax.jit(split)(X, W, False)))


def test_products_outside_and_the_rest_inside():
    eqns = jax.make_jaxpr(split)(X, W, True).jaxpr.eqns
    branches = [b for e in eqns[-1:] for b in e.params["branches"]]
    assert eqns[-1].primitive.name == "cond"
    inside = {name for branch in branches for name in primitives(branch.jaxpr)}
    outside = {name for eqn in eqns[:-1] for name in primitives(_alone(eqn))}
    assert "exp" in inside and "dot_general" not in inside
    assert "dot_general" in outside and "exp" not in outside


class _alone:
    """One equation as a jaxpr."""

    def __init__(self, eqn):
        self.eqns = [eqn]
