"""One program written in many ways: the same structure and the same direction."""

import equinox as eqx
import flax.linen as linen
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from flax import nnx
from numpyro.contrib.module import eqx_module, flax_module, nnx_module

from .oracles import KEY, close, natural, program

RNG = np.random.default_rng(5)
W, C, UP = (jnp.asarray(RNG.normal(size=s)) for s in ((4, 3), (4,), (3, 4)))
X = jnp.asarray(RNG.integers(0, 2, (5, 4)), float)


def weight():
    return numpyro.param("w", W)


def bias():
    return numpyro.param("c", C)


def with_linen(h):
    net = flax_module(
        "net",
        linen.Dense(
            4,
            kernel_init=lambda *_: W.T,
            bias_init=lambda *_: C,
            param_dtype=jnp.float64,
        ),
        input_shape=(3,),
    )
    return net(h)


def with_nnx(h):
    made = nnx.Linear(
        3,
        4,
        rngs=nnx.Rngs(0),
        kernel_init=lambda *_: W.T,
        bias_init=lambda *_: C,
        param_dtype=jnp.float64,
    )
    return nnx_module("net", made)(h)


def with_equinox(h):
    made = eqx.nn.Linear(3, 4, key=jax.random.PRNGKey(0))
    made = eqx.tree_at(lambda m: (m.weight, m.bias), made, (W, C))
    net = eqx_module("net", made)
    return jax.vmap(jax.vmap(net))(h) if h.ndim == 3 else jax.vmap(net)(h)


def vmapped(h):
    one = lambda v: weight() @ v + bias()  # noqa: E731
    return jax.vmap(jax.vmap(one))(h) if h.ndim == 3 else jax.vmap(one)(h)


def constrained(h):
    w = numpyro.param("w", W, constraint=dist.constraints.real_matrix)
    c = numpyro.param("c", C, constraint=dist.constraints.real_vector)
    return h @ w.T + c


STYLES = {
    "plain": lambda h: h @ weight().T + bias(),
    "param @": lambda h: h @ numpyro.param("w", W.T) + bias(),
    "bias first": lambda h: bias() + h @ weight().T,
    "jnp.dot": lambda h: jnp.dot(h, weight().T) + bias()[None],
    "einsum": lambda h: jnp.einsum("...i,ji->...j", h, weight()) + bias(),
    "W @ h.T": lambda h: (weight() @ h.mT).mT + bias(),
    "column vector": lambda h: (weight() @ h[..., None])[..., 0] + bias(),
    "stacked": lambda h: h @ weight().reshape(2, 2, 3).reshape(4, 3).T + bias(),
    "vmapped W @ v": vmapped,
    "jitted": lambda h: jax.jit(lambda w, c, h: h @ w.T + c)(weight(), bias(), h),
    "checkpointed": lambda h: jax.checkpoint(lambda w, h: h @ w.T)(weight(), h) + bias(),
    "with constraints": constrained,
    "flax linen": with_linen,
    "flax nnx": with_nnx,
    "equinox": with_equinox,
}


def run(style):
    layer = STYLES[style]

    def model(x):
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Bernoulli(0.4 * jnp.ones(3)).to_event(1))
            h = h.astype(float)
            numpyro.sample("x", dist.Bernoulli(logits=layer(h)).to_event(1), obs=x)

    def guide(x):
        up = numpyro.param("up", UP)
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Bernoulli(logits=x @ up.T).to_event(1))

    svi = natural(model, guide, sleep_weight=0.0)
    state = svi.init(KEY, X)
    (row,) = [r for r in svi.structure(KEY, X) if r.site == "x"]
    found = svi.directions(state, X)
    (block,) = [b for b in found.fisher.blocks if b.site == "x"]
    # Modules draw their starts from the programs' keys, so that the samples differ.
    return row, block, found


@pytest.fixture(scope="module")
def plain():
    return run("plain")


@pytest.mark.parametrize("style", STYLES)
def test_every_spelling_is_the_same_program(style, plain):
    (first, first_block, expected), (row, block, found) = plain, run(style)
    for field in ("kind", "units", "fan_in", "size", "exact", "solver", "note"):
        assert getattr(row, field) == getattr(first, field)
    assert (row.kind, row.units, row.fan_in, row.exact) == ("affine", 4, 4, True)
    close(block.gather(found.gradient), first_block.gather(expected.gradient), 1e-10)
    close(block.gather(found.natural), first_block.gather(expected.natural), 1e-10)
    close(block.dense(), first_block.dense(), 1e-10)
    close(found.natural["up"], expected.natural["up"], 1e-10)
    moved = jnp.abs(block.gather(found.natural) - block.gather(found.gradient)).max()
    assert float(moved) > 1e-3


def test_report_lists_every_parameter_once_and_prints():
    def site(h, w):
        loc = w.layer("b", jnp.tanh(w.layer("a", h, 2)), 4)
        return dist.Normal(loc, jnp.exp(w.layer("s", h, 4))).to_event(1)

    model, guide, x = program(site)
    structure = natural(model, guide).structure(KEY, x)
    rows = {name: row for row in structure for name in row.params}
    assert sum(len(row.params) for row in structure) == len(rows) == 9
    assert rows["a.w"].kind == "site" and rows["a.w"] is rows["b.b"]
    assert "whole site" in rows["a.w"].note
    assert rows["s.w"].kind == "affine" and rows["s.w"].units == 4
    text = str(structure)
    assert all(name in text for name in rows)
    assert len(text.splitlines()) == 2 + len(structure.rows)


def test_what_no_information_covers_is_reported_and_keeps_its_gradient():
    def site(h, w):
        scale = jnp.exp(w("s", 2))
        flow = [dist.transforms.AffineTransform(0.0, scale)]
        return dist.TransformedDistribution(dist.Normal(w.layer("a", h, 2), 1.0), flow).to_event(1)

    model, guide, x = program(site)
    svi = natural(model, guide)
    rows = {name: row for row in svi.structure(KEY, x) for name in row.params}
    assert rows["s"].kind == "none" and rows["s"].solver == "plain gradient"
    assert rows["a.w"].kind == "affine"
    found = svi.directions(svi.init(KEY, x), x)
    close(found.natural["s"], found.gradient["s"], 0)


def test_fixed_features_between_parameters_and_site_stay_affine():
    def site(h, w):
        return dist.Bernoulli(logits=w.layer("a", jax.nn.relu(h @ jnp.ones((3, 3))), 2)).to_event(1)

    model, guide, x = program(site)
    (row,) = [row for row in natural(model, guide).structure(KEY, x) if row.site == "x"]
    assert (row.kind, row.units, row.fan_in) == ("affine", 2, 4)


def test_a_frozen_weight_leaves_the_bias_with_a_block_of_its_own():
    def site(h, w):
        frozen = jax.lax.stop_gradient(w("a.w", 3, 2))
        return dist.Bernoulli(logits=h @ frozen + w("a.b", 2)).to_event(1)

    model, guide, x = program(site)
    rows = {row.site: row for row in natural(model, guide).structure(KEY, x)}
    assert rows["x"].params == ("a.b",)
    assert (rows["x"].units, rows["x"].size) == (2, 1)
    assert rows[""].params == ("a.w",)


def mixture(loc, w):
    weights = dist.Categorical(logits=jnp.zeros(2))
    return dist.MixtureSameFamily(weights, dist.Normal(loc[..., None] + w("m", 2), 1.0))


UNSEEN = {
    "mixture": lambda h, w: mixture(w.layer("a", h, 2), w).to_event(1),
    "mixture of bijections": lambda h, w: dist.TransformedDistribution(
        mixture(w.layer("a", h, 2), w), [dist.transforms.ExpTransform()]
    ).to_event(1),
    "truncated": lambda h, w: dist.TruncatedNormal(
        w.layer("a", h, 2), jnp.exp(w("m", 2)), low=0.0
    ).to_event(1),
    "inflated": lambda h, w: dist.ZeroInflatedDistribution(
        dist.Poisson(jnp.exp(w.layer("a", h, 2) + w("m", 2))), gate=0.3
    ).to_event(1),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_distribution_holds_within_has_no_information(name):
    """Also where a parameter feeds another site, whose information alone would be too small."""
    base, guide, x = program(UNSEEN[name])

    def model(x):
        base(x)
        m, own = (numpyro.param(n, jnp.ones(2)) for n in ("m", "own"))
        with numpyro.plate("others", 2):
            numpyro.sample("y", dist.Normal(m, 1.0), obs=jnp.zeros(2))
            numpyro.sample("z", dist.Normal(own, 1.0), obs=jnp.zeros(2))

    structure = natural(model, guide, sleep_weight=0.0).structure(KEY, x)
    rows = {n: row for row in structure for n in row.params}
    assert rows["a.w"].kind == rows["m"].kind == "none"
    assert (rows["a.w"].site, rows["m"].site) == ("x", "x, y")
    assert rows["own"].site == "z" and rows["own"].exact
    assert "x, y" in str(structure)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_factor_has_no_information(wrapped):
    """The block is that of the draws, whether or not the model has a factor."""
    weights = {}

    def site(h, w):
        weights["w"] = w
        return dist.Bernoulli(logits=w.layer("a", h, 2)).to_event(1)

    base, guide, x = program(site)

    def model(x):
        base(x)
        b, c = (weights["w"](n, 2) for n in ("a.b", "alone"))
        with numpyro.plate("data", len(x)), numpyro.handlers.mask(mask=not wrapped):
            numpyro.factor("bonus", -jnp.square(b + c + x).sum(-1))

    found = []
    for program_ in (base, model):
        svi = natural(program_, guide, sleep_weight=0.0, num_particles=1)
        directions = svi.directions(svi.init(KEY, x), x)
        (block,) = [b for b in directions.fisher.blocks if b.site == "x"]
        found.append(block.dense())
        assert block.exact and block.kind == "affine"
    close(*found, 1e-12)
    rows = {n: row for row in svi.structure(KEY, x) for n in row.params}
    assert rows["alone"].kind == "none"
