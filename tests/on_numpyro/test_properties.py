"""Random programs: the Fisher matrix and the natural direction equal brute force."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import random

from numpyro_helmholtz.parameters import parameters

from .oracles import KEY, Weights, brute_force, check, close, natural

QUICK = settings(
    max_examples=6,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
FAMILIES = ("bernoulli", "normal", "poisson", "categorical")
ARGUMENTS = {"bernoulli": 1, "normal": 2, "poisson": 1, "categorical": 3}


@st.composite
def networks(draw, families=("bernoulli",)):
    """A DAG of layers, bottom last: width, family, parents and whether the guide skips."""
    count = draw(st.integers(2, 4))
    layers = []
    for i in range(count):
        parents = draw(st.sets(st.integers(0, i - 1), max_size=2)) if i else set()
        if i == count - 1:
            parents = parents | {i - 1}
        layers.append(
            (
                draw(st.integers(1, 3)),
                draw(st.sampled_from(families)),
                tuple(sorted(parents)),
                draw(st.booleans()),
            )
        )
    return layers, draw(st.integers(1, 4)), draw(st.integers(1, 3)), draw(st.integers(0, 10**6))


def site(family, a):
    if family == "bernoulli":
        return dist.Bernoulli(logits=a).to_event(1)
    if family == "normal":
        loc, log_scale = jnp.split(a, 2, -1)
        return dist.Normal(loc, jnp.exp(0.3 * log_scale)).to_event(1)
    if family == "poisson":
        return dist.Poisson(jnp.exp(0.3 * a)).to_event(1)
    return dist.Categorical(logits=a.reshape(*a.shape[:-1], -1, 3)).to_event(1)


def build(layers, batch, seed):
    """Model and guide over the layers, with data of the last one."""
    w = Weights(seed)

    def argument(i, values):
        width, family, parents, _ = layers[i]
        outputs = width * ARGUMENTS[family]
        if not parents:
            return w(f"prior_{i}", outputs)
        parts = [
            w.layer(f"{j}_{i}", values[j].astype(float), outputs, bias=n == 0)
            for n, j in enumerate(parents)
        ]
        return sum(parts[1:], parts[0])

    def model(x):
        values = []
        with numpyro.plate("data", len(x)):
            for i, (_, family, _, _) in enumerate(layers):
                obs = x if i == len(layers) - 1 else None
                values.append(numpyro.sample(f"h{i}", site(family, argument(i, values)), obs=obs))

    def guide(x):
        previous = None
        features = jnp.tanh(x.astype(float))
        with numpyro.plate("data", len(x)):
            for i, (width, family, _, skip) in enumerate(layers[:-1]):
                outputs = width * ARGUMENTS[family]
                a = w.layer(f"x_{i}", features, outputs)
                if skip and i:
                    a = a + w.layer(f"s_{i}", previous.astype(float), outputs, bias=False)
                previous = numpyro.sample(f"h{i}", site(family, a))

    width, family, _, _ = layers[-1]
    logits = jnp.asarray(
        np.random.default_rng(seed).normal(size=(batch, width * ARGUMENTS[family]))
    )
    return model, guide, site(family, logits).sample(random.key(seed))


def setup(network, **options):
    layers, batch, particles, seed = network
    model, guide, x = build(layers, batch, seed)
    return natural(model, guide, num_particles=particles, **options), x


@QUICK
@given(networks())
def test_random_belief_networks(network):
    svi, x = setup(network)
    d = check(svi, x)
    assert {b.kind for b in d.fisher.blocks} <= {"affine", "direct"}


@QUICK
@given(networks(FAMILIES))
def test_random_mixed_programs(network):
    svi, x = setup(network)
    d = check(svi, x)
    assert all(block.exact for block in d.fisher.blocks)
    assert {b.kind for b in d.fisher.blocks} <= {"affine", "direct"}


@QUICK
@given(networks(FAMILIES), st.floats(0.01, 10.0))
def test_the_natural_direction_solves_the_whole_system(network, alpha):
    svi, x = setup(network, damping=alpha)
    state = svi.init(KEY, x)
    d = svi.directions(state, x)
    truth = brute_force(svi, state, (x,))
    order = list(parameters(svi._optimiser.params(state.optim_state)))
    g, got = (
        jnp.concatenate([found[n].reshape(-1) for n in order]) for found in (d.gradient, d.natural)
    )
    matrix = alpha * jnp.eye(len(g)) + truth
    close(got, np.linalg.solve(matrix, (1 + alpha) * g[:, None])[:, 0], 1e-7)


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 3), st.integers(0, 10**6))
def test_random_shared_weights(width, batch, sites, seed):
    w = Weights(seed)

    def model(x):
        prior = w("prior", width)
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h0", site("bernoulli", prior))
            for i in range(1, sites - 1):
                h = numpyro.sample(f"h{i}", site("bernoulli", w.layer("s", h * 1.0, width)))
            numpyro.sample("x", site("bernoulli", w.layer("s", h * 1.0, width)), obs=x)

    def guide(x):
        up = w.layer("up", x, width * (sites - 1))
        with numpyro.plate("data", len(x)):
            for i, a in enumerate(jnp.split(up, sites - 1, -1)):
                numpyro.sample(f"h{i}", site("bernoulli", a))

    x = jax.random.bernoulli(random.key(seed), 0.5, (batch, width)).astype(float)
    d = check(natural(model, guide), x)
    block = next(b for b in d.fisher.blocks if "s.w" in b.params)
    assert (block.units, block.size) == (width, width + 1)
    assert ("shared by" in block.kind) == (sites > 2)
