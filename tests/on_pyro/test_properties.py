"""Random programs: the Fisher matrix and the natural direction equal brute force."""

import pyro
import pyro.distributions as dist
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from tests.oracles import brute_force, check, close, leaves, natural

D = torch.float64
QUICK = settings(
    max_examples=15,
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
        loc, log_scale = a.chunk(2, -1)
        return dist.Normal(loc, torch.exp(0.3 * log_scale)).to_event(1)
    if family == "poisson":
        return dist.Poisson(torch.exp(0.3 * a)).to_event(1)
    return dist.Categorical(logits=a.reshape(*a.shape[:-1], -1, 3)).to_event(1)


def build(layers, batch):
    """Model and guide over the layers, with data of the last one."""
    down, up = nn.ModuleDict(), nn.ModuleDict()
    bottom = layers[-1][0]
    for i, (width, family, parents, skip) in enumerate(layers):
        outputs = width * ARGUMENTS[family]
        for n, j in enumerate(parents):
            down[f"{j}_{i}"] = nn.Linear(layers[j][0], outputs, bias=n == 0)
        up[f"x_{i}"] = nn.Linear(bottom, outputs)
        if skip and i:
            up[f"s_{i}"] = nn.Linear(layers[i - 1][0], outputs, bias=False)
    down, up = down.double(), up.double()

    def argument(i, values):
        width, family, parents, _ = layers[i]
        if not parents:
            return pyro.param(f"prior_{i}", lambda: torch.randn(width * ARGUMENTS[family], dtype=D))
        return sum(down[f"{j}_{i}"](values[j].double()) for j in parents)

    def model(x):
        pyro.module("down", down)
        values = []
        with pyro.plate("data", len(x)):
            for i, (_, family, _, _) in enumerate(layers):
                obs = x if i == len(layers) - 1 else None
                values.append(pyro.sample(f"h{i}", site(family, argument(i, values)), obs=obs))

    def guide(x):
        pyro.module("up", up)
        previous = None
        features = torch.tanh(x.double())
        with pyro.plate("data", len(x)):
            for i, (_, family, _, skip) in enumerate(layers[:-1]):
                a = up[f"x_{i}"](features)
                if skip and i:
                    a = a + up[f"s_{i}"](previous.double())
                previous = pyro.sample(f"h{i}", site(family, a))

    width, family, _, _ = layers[-1]
    x = site(family, torch.randn(batch, width * ARGUMENTS[family], dtype=D)).sample()
    return model, guide, x


def setup(network):
    layers, batch, particles, seed = network
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    model, guide, x = build(layers, batch)
    return natural(model, guide, num_particles=particles), x


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
    # A chunked normal is two sums over one layer; all else is affine or direct.
    assert {b.kind for b in d.fisher.blocks} <= {"affine", "direct"}


@QUICK
@given(networks(FAMILIES), st.floats(0.01, 10.0))
def test_the_natural_direction_solves_the_whole_system(network, alpha):
    svi, x = setup(network)
    svi.damping = alpha
    svi.directions(x)
    pyro.set_rng_seed(0)
    d = svi.directions(x)
    truth = brute_force(svi, (x,))
    order = list(leaves())
    zeros = {n: torch.zeros_like(p).detach() for n, p in leaves().items()}
    g = torch.cat([(zeros | d.gradient)[n].reshape(-1) for n in order])
    got = torch.cat([(zeros | d.natural)[n].reshape(-1) for n in order])
    eye = torch.eye(len(g), dtype=D)
    close(got, torch.linalg.solve(alpha * eye + truth, (1 + alpha) * g), 1e-7)


@QUICK
@given(st.integers(1, 3), st.integers(1, 3), st.integers(2, 3), st.integers(0, 10**6))
def test_random_shared_weights(width, batch, sites, seed):
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    shared = nn.Linear(width, width).double()
    up = nn.Linear(width, width * (sites - 1)).double()

    def model(x):
        pyro.module("shared", shared)
        prior = pyro.param("prior", lambda: torch.zeros(width, dtype=D))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h0", dist.Bernoulli(logits=prior).to_event(1))
            for i in range(1, sites - 1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=shared(h)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=shared(h)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            for i, a in enumerate(up(x).chunk(sites - 1, -1)):
                pyro.sample(f"h{i}", dist.Bernoulli(logits=a).to_event(1))

    x = torch.randint(0, 2, (batch, width)).double()
    d = check(natural(model, guide), x)
    block = next(b for b in d.fisher.blocks if "shared$$$weight" in b.params)
    assert (block.units, block.size) == (width, width + 1)
    assert ("shared by" in block.kind) == (sites > 2)
