"""Fisher blocks of programs against brute force, in float64."""

import itertools
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro import poutine
from torch import nn

import pyro_helmholtz as ph
from pyro_helmholtz.fisher import families, registry, solvers
from pyro_helmholtz.fisher.eigenbasis import EigenBasis
from tests.oracles import (
    arguments,
    check,
    check_operator,
    close,
    from_blocks,
    leaves,
    natural,
    patterns,
    program,
    score_information,
)

D = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(1)


def kinds(directions):
    return {p: b.kind for b in directions.fisher.blocks for p in b.params}


def linear(*shape):
    return {"a": nn.Linear(*shape)}


# exactness by enumeration --------------------------------------------------------------------


class AllStates(dist.Bernoulli):
    """Every state once, along the particles, each with the same probability."""

    def __init__(self, table):
        super().__init__(logits=torch.zeros_like(table))
        self.table = table

    def expand(self, batch_shape, _instance=None):
        return AllStates(self.table.expand(batch_shape))

    def sample(self, sample_shape=()):
        return self.table


def exact_network(widths):
    """A sigmoid belief network with a skip, and a guide that enumerates its latents."""
    bottom, middle, top = widths
    net = nn.ModuleDict(
        {
            "mid": nn.Linear(top, middle),
            "low": nn.Linear(middle, bottom),
            "skip": nn.Linear(top, bottom, bias=False),
        }
    ).double()
    prior = nn.Parameter(torch.randn(top, dtype=D))
    table = patterns(middle + top)[:, None]

    def conditionals(h2, h1):
        return (
            pyro.param("prior", prior).expand(h2.shape),
            net["mid"](h2),
            net["low"](h1) + net["skip"](h2),
        )

    def model(x, scale):
        pyro.module("net", net)
        p = pyro.param("prior", prior)
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=p).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=net["mid"](h2)).to_event(1))
            logits = net["low"](h1) + net["skip"](h2)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x, scale):
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("h2", AllStates(table[..., :top]).to_event(1))
            pyro.sample("h1", AllStates(table[..., top:]).to_event(1))

    return model, guide, conditionals, len(table)


def test_model_blocks_are_the_joint_fisher_matrix_by_enumeration():
    widths = (3, 2, 2)
    model, guide, conditionals, states = exact_network(widths)
    x = patterns(3)
    scores, log_p = [], []
    svi = natural(model, guide, num_particles=states, sleep_weight=0.0, max_plate_nesting=1)
    svi.directions(x, torch.ones(len(x), dtype=D))  # fills the parameter store
    names = leaves()
    for value in patterns(sum(widths)):
        x1, h1, h2 = value.split(widths)
        logits = conditionals(h2, h1)
        joint = sum(
            dist.Bernoulli(logits=a).log_prob(v).sum()
            for a, v in zip(logits, (h2, h1, x1), strict=True)
        )
        grads = torch.autograd.grad(joint, list(names.values()))
        scores.append(torch.cat([g.reshape(-1) for g in grads]))
        log_p.append(joint.detach())
    scores, p = torch.stack(scores), torch.stack(log_p).exp()
    assert abs(float(p.sum()) - 1) < 1e-12
    truth = torch.einsum("n,ni,nj->ij", p, scores, scores)
    # Data drawn from the model itself: every x once, scaled by its probability.
    p_x = p.reshape(8, -1).sum(1)
    directions = svi.directions(x, p_x * len(x))
    got = from_blocks(directions.fisher)
    close(got, truth, 1e-9)
    # What lies outside the blocks is zero in the truth, not only in ours.
    inside = torch.zeros_like(truth)
    for j in range(len(truth)):
        inside[j] = (got[j] != 0) | (torch.arange(len(truth)) == j)
    assert float((truth * (1 - inside)).abs().max()) < 1e-12
    assert float(inside.mean()) < 0.6
    # The direction is the gradient of log p(x): zero in expectation under the model.
    for g in directions.gradient.values():
        close(g, torch.zeros_like(g), 1e-10)


def test_model_blocks_on_data_use_the_exact_posterior():
    model, guide, conditionals, states = exact_network((3, 2, 2))
    x = patterns(3)[[1, 6, 6]]
    svi = natural(model, guide, num_particles=states, sleep_weight=0.0, max_plate_nesting=1)
    directions = svi.directions(x, torch.ones(3, dtype=D))
    block = next(b for b in directions.fisher.blocks if b.site == "x")
    truth = 0.0
    for datum in x:
        log_joint, blocks = [], []
        for h in patterns(4):
            h2, h1 = h.split((2, 2))
            top, mid, low = conditionals(h2, h1)
            log_joint.append(
                dist.Bernoulli(logits=top).log_prob(h2).sum()
                + dist.Bernoulli(logits=mid).log_prob(h1).sum()
                + dist.Bernoulli(logits=low).log_prob(datum).sum()
            )
            u = torch.cat([h1, h2, torch.ones(1, dtype=D)])
            c = torch.sigmoid(low) * torch.sigmoid(-low)
            blocks.append(c[:, None, None] * torch.outer(u, u))
        posterior = torch.stack(log_joint).softmax(0).detach()
        truth = truth + torch.einsum("s,sjab->jab", posterior, torch.stack(blocks).detach()) / 3
    # Columns may come in another order of the two layers; compare through gather.
    names = block.components[0].names
    if "skip" in names[0]:
        order = [2, 3, 0, 1, 4]
        truth = truth[:, order][:, :, order]
    close(block.dense(), truth, 1e-10)


# families in programs ------------------------------------------------------------------------


def chunked(h, m):
    loc, raw = m["a"](h).chunk(2, -1)
    return dist.Normal(loc, F.softplus(raw)).to_event(1)


def gamma_two(h, m):
    return dist.Gamma(F.softplus(m["a"](h)) + 0.4, torch.exp(m["b"](h))).to_event(1)


def gamma_one(h, m):
    a, b = m["a"](h).chunk(2, -1)
    return dist.Gamma(F.softplus(a) + 0.4, torch.exp(b)).to_event(1)


def beta_one(h, m):
    a, b = F.softplus(m["a"](h)).add(1.5).chunk(2, -1)
    return dist.Beta(a, b).to_event(1)


def reshaped(h, m):
    return m["a"](h).reshape(*h.shape[:-1], 2, 3)


ONE = torch.ones((), dtype=D)
PROGRAMS = {
    "bernoulli logits": (
        lambda h, m: dist.Bernoulli(logits=m["a"](h)).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "bernoulli probs": (
        lambda h, m: dist.Bernoulli(probs=torch.sigmoid(m["a"](h))).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "normal loc": (
        lambda h, m: dist.Normal(m["a"](h), 0.5 * ONE).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "normal scale exp": (
        lambda h, m: dist.Normal(0.0 * ONE, torch.exp(m["a"](h))).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "normal scale softplus": (
        lambda h, m: dist.Normal(0.0 * ONE, F.softplus(m["a"](h)) + 0.1).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "normal half log": (
        lambda h, m: dist.Normal(m["a"](h), torch.exp(0.5 * m["b"](h))).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "normal chunked": (chunked, linear(3, 4), "affine"),
    "poisson": (
        lambda h, m: dist.Poisson(torch.exp(m["a"](h))).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "geometric": (
        lambda h, m: dist.Geometric(logits=m["a"](h)).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "categorical": (
        lambda h, m: dist.Categorical(logits=m["a"](h)),
        linear(3, 4),
        "affine",
    ),
    "categorical reshaped": (
        lambda h, m: dist.Categorical(logits=reshaped(h, m)).to_event(1),
        linear(3, 6),
        "affine",
    ),
    "one-hot": (
        lambda h, m: dist.OneHotCategorical(logits=reshaped(h, m)).to_event(1),
        linear(3, 6),
        "affine",
    ),
    "categorical probs": (
        lambda h, m: dist.Categorical(probs=torch.softmax(m["a"](h), -1)),
        linear(3, 3),
        "affine",
    ),
    "categorical log-softmax": (
        lambda h, m: dist.Categorical(logits=torch.log_softmax(m["a"](h), -1)),
        linear(3, 3),
        "affine",
    ),
    "categorical weights": (
        lambda h, m: dist.Categorical(probs=torch.exp(m["a"](h))),
        linear(3, 3),
        "affine",
    ),
    "one-hot probs": (
        lambda h, m: dist.OneHotCategorical(probs=reshaped(h, m).softmax(-1)).to_event(1),
        linear(3, 6),
        "affine",
    ),
    "softmax of another dimension": (
        lambda h, m: dist.Categorical(probs=reshaped(h, m).softmax(-2)).to_event(1),
        linear(3, 6),
        "site",
    ),
    "scaled": (
        lambda h, m: dist.Bernoulli(logits=0.5 * m["a"](h) / 3.0 + m["b"](h) * 2).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2, bias=False)},
        "affine",
    ),
    "von mises": (
        lambda h, m: dist.VonMises(m["a"](h), torch.exp(m["b"](h))).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "gamma two": (gamma_two, {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)}, "affine"),
    "gamma one": (gamma_one, linear(3, 4), "affine"),
    "beta one": (beta_one, linear(3, 4), "affine"),
    "beta half": (
        lambda h, m: dist.Beta(F.softplus(m["a"](h)) + 1.0, 2.0 * ONE).to_event(1),
        linear(3, 2),
        None,
    ),
    "exponential": (
        lambda h, m: dist.Exponential(torch.exp(m["a"](h))).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "half-normal": (
        lambda h, m: dist.HalfNormal(torch.exp(m["a"](h))).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "student-t": (
        lambda h, m: dist.StudentT(2.5 * ONE, m["a"](h), F.softplus(m["b"](h)) + 0.5).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "weibull": (
        lambda h, m: dist.Weibull(torch.exp(m["a"](h)), F.softplus(m["b"](h)) + 0.5).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "beta-binomial": (
        lambda h, m: dist.BetaBinomial(
            torch.exp(m["a"](h)), torch.exp(m["b"](h)), 5.0 * ONE
        ).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "zero-inflated poisson": (
        lambda h, m: dist.ZeroInflatedPoisson(torch.exp(m["a"](h)), gate_logits=m["b"](h)).to_event(
            1
        ),
        {"a": nn.Linear(3, 2), "b": nn.Linear(3, 2)},
        "affine",
    ),
    "lognormal": (
        lambda h, m: dist.LogNormal(m["a"](h), 0.7 * ONE).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "transformed": (
        lambda h, m: dist.TransformedDistribution(
            dist.Normal(m["a"](h), 0.7 * ONE), [dist.transforms.SigmoidTransform()]
        ).to_event(1),
        linear(3, 2),
        "affine",
    ),
    "masked elements": (
        lambda h, m: (
            dist.Bernoulli(logits=m["a"](h)).mask(torch.tensor([True, False, True])).to_event(1)
        ),
        linear(3, 3),
        "affine",
    ),
    "skip": (
        lambda h, m: dist.Bernoulli(logits=m["a"](h[..., :2]) + m["b"](h)).to_event(1),
        {"a": nn.Linear(2, 2), "b": nn.Linear(3, 2, bias=False)},
        "affine",
    ),
    "difference": (
        lambda h, m: dist.Bernoulli(logits=m["a"](h[..., :2]) - 2 * m["b"](h)).to_event(1),
        {"a": nn.Linear(2, 2), "b": nn.Linear(3, 2, bias=False)},
        "affine",
    ),
    "subtracted": (
        lambda h, m: dist.Bernoulli(
            logits=torch.sub(m["a"](h[..., :2]), m["b"](h), alpha=2)
        ).to_event(1),
        {"a": nn.Linear(2, 2), "b": nn.Linear(3, 2, bias=False)},
        "affine",
    ),
    "mlp": (
        lambda h, m: dist.Bernoulli(logits=m["b"](torch.tanh(m["a"](h)))).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(2, 2)},
        "site",
    ),
    "tied": (
        lambda h, m: dist.Bernoulli(
            logits=torch.tanh(h @ m["a"].weight.t()) @ m["a"].weight
        ).to_event(1),
        linear(3, 2),
        "site",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_equals_brute_force(name):
    site, modules, kind = PROGRAMS[name]
    model, guide, x = program(site, modules)
    directions = check(natural(model, guide), x)
    of = kinds(directions)
    used = {n for n in leaves() if name != "tied" or n != "net$$$a.bias"}
    assert set(of) == used
    if kind is not None:
        assert {k for n, k in of.items() if n.startswith("net")} == {kind}
    assert of["prior"] == "direct" and of["up$$$weight"] == "affine"
    assert all(block.exact for block in directions.fisher.blocks)


@pytest.mark.parametrize("name", ["categorical reshaped", "gamma two", "bernoulli logits", "skip"])
def test_conjugate_gradients_equal_a_dense_solve(name, monkeypatch):
    monkeypatch.setattr(solvers, "CHOLESKY_SIZE", 0)
    site, modules, _ = PROGRAMS[name]
    model, guide, x = program(site, modules)
    check(natural(model, guide), x)


@pytest.mark.parametrize("name", ["categorical reshaped", "gamma one", "poisson"])
@pytest.mark.parametrize("fisher", ["unit", "diagonal", "kronecker"])
def test_large_damping_gives_the_gradient(name, fisher):
    site, modules, _ = PROGRAMS[name]
    model, guide, x = program(site, modules)
    d = natural(model, guide, fisher=fisher, damping=1e12).directions(x)
    for key in d.gradient:
        close(d.natural[key], d.gradient[key], 1e-9)
    small = natural(model, guide, fisher=fisher, damping=0.1).directions(x)
    assert any(float((small.natural[k] - small.gradient[k]).abs().max()) > 1e-3 for k in d.gradient)


def test_diagonal_solve_is_the_dense_diagonal():
    model, guide, x = program(PROGRAMS["categorical"][0], PROGRAMS["categorical"][1])
    d = natural(model, guide, fisher="diagonal", damping=0.3).directions(x)
    for block in d.fisher.blocks:
        g = block.gather(d.gradient)
        diagonal = block.dense().diagonal(dim1=1, dim2=2)
        close(block.gather(d.natural), 1.3 * g / (0.3 + diagonal), 1e-12)


# layers --------------------------------------------------------------------------------------


CONVOLUTIONS = {
    "conv": (nn.Conv2d(2, 3, 2), (2, 3, 3)),
    "conv stride padding": (nn.Conv2d(2, 3, 3, stride=2, padding=1), (2, 4, 3)),
    "conv no bias dilation": (nn.Conv2d(1, 2, 2, dilation=2, bias=False), (1, 4, 3)),
    "transposed": (nn.ConvTranspose2d(2, 3, 2), (2, 2, 2)),
    "transposed stride padding": (
        nn.ConvTranspose2d(2, 3, 3, stride=2, padding=1, output_padding=1),
        (2, 2, 2),
    ),
    "one dimension": (nn.Conv1d(2, 3, 2), (2, 4)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_brute_force(name):
    layer, shape = CONVOLUTIONS[name]
    count = math.prod(shape)

    def site(h, m):
        maps = m["a"](h.reshape(-1, *shape))
        return dist.Bernoulli(logits=maps.reshape(*h.shape[:-1], *maps.shape[1:])).to_event(
            len(shape)
        )

    model, guide, x = program(site, {"a": layer}, latents=count, batch=2)
    d = check(natural(model, guide, num_particles=2), x, tolerance=1e-10)
    block = next(b for b in d.fisher.blocks if b.site == "x")
    assert "convolution" in block.kind
    assert block.units == 3 - (name == "conv no bias dilation")


def test_weights_shared_over_positions():
    def site(h, m):
        return dist.Bernoulli(logits=m["a"](h.reshape(*h.shape[:-1], 2, 2))).to_event(2)

    model, guide, x = program(site, linear(2, 3), latents=4)
    d = check(natural(model, guide), x)
    block = next(b for b in d.fisher.blocks if b.site == "x")
    assert (block.kind, block.units, block.size) == ("affine", 3, 3)


def test_one_layer_at_two_sites():
    layer = nn.Linear(2, 2).double()
    up = nn.Linear(2, 4).double()
    x = torch.randint(0, 2, (4, 2)).double()

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4 * torch.ones(2, dtype=D)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(logits=layer(a)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=layer(b)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        a, b = up(x).chunk(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("a", dist.Bernoulli(logits=a).to_event(1))
            pyro.sample("b", dist.Bernoulli(logits=b).to_event(1))

    d = check(natural(model, guide), x)
    block = next(b for b in d.fisher.blocks if "layer$$$weight" in b.params)
    assert block.site == "b, x" and "shared" in block.kind and block.units == 2


def test_skip_from_the_datum_and_from_the_particles():
    low, top = nn.Linear(3, 2).double(), nn.Linear(2, 2).double()
    down = nn.Linear(2, 3).double()
    x = torch.randint(0, 2, (4, 3)).double()

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(0.4 * torch.ones(2, dtype=D)).to_event(1))
            b = pyro.sample("b", dist.Bernoulli(0.4 * torch.ones(2, dtype=D)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=down(a + b)).to_event(1), obs=x)

    def guide(x):
        pyro.module("low", low)
        pyro.module("top", top)
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", dist.Bernoulli(logits=low(x)[..., :2]).to_event(1))
            logits = top(a) + x @ pyro.param("skip", lambda: torch.randn(3, 2, dtype=D))
            pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))

    d = check(natural(model, guide), x)
    block = next(b for b in d.fisher.blocks if "skip" in b.params)
    assert block.kind.startswith("affine") and block.units == 2 and block.size == 6


def test_bias_shared_by_all_units_is_matrix_free():
    def site(h, m):
        return dist.Bernoulli(logits=m["a"](h) + pyro.param("shift", lambda: ONE.clone())).to_event(
            1
        )

    model, guide, x = program(site, {"a": nn.Linear(3, 2, bias=False)})
    d = check(natural(model, guide), x)
    assert kinds(d)["shift"] == "site"


def test_constrained_parameter_as_scale():
    def site(h, m):
        scale = pyro.param("scale", lambda: 0.7 * torch.ones(2, dtype=D), dist.constraints.positive)
        return dist.Normal(m["a"](h), scale).to_event(1)

    model, guide, x = program(site, linear(3, 2))
    d = check(natural(model, guide), x)
    assert kinds(d)["scale"] == "direct"
    block = next(b for b in d.fisher.blocks if b.params == ["scale"])
    close(block.dense(), torch.full((2, 1, 1), 2.0, dtype=D), 1e-12)


# plates, scales and masks --------------------------------------------------------------------


def plated(x, mask=None, scale=1.0):
    net, up = nn.Linear(2, 3).double(), nn.Linear(3, 2).double()

    def model(x):
        pyro.module("net", net)
        prior = pyro.param("prior", lambda: torch.zeros(2, dtype=D))
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
            with poutine.mask(mask=True if mask is None else mask):
                pyro.sample("x", dist.Bernoulli(logits=net(h)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)), poutine.scale(scale=scale):
            pyro.sample("h", dist.Bernoulli(logits=up(x)).to_event(1))

    return natural(model, guide)


@pytest.mark.parametrize("batch", [3, 5, 7])
def test_weights_are_not_rounded_to_single_precision(batch):
    x = torch.randint(0, 2, (batch, 3)).double()
    check(plated(x, scale=1.1), x, num_data=1.1 * batch, tolerance=1e-13)


def test_masked_data():
    x = patterns(3)[:5]
    check(plated(x, mask=torch.tensor([True, False, True, True, False])), x)


def test_scale_common_and_per_datum():
    x = patterns(3)[:4]
    check(plated(x, scale=2.5), x, num_data=10.0)
    pyro.clear_param_store()
    weights = torch.tensor([0.5, 1.0, 2.0, 0.1], dtype=D)
    check(plated(x, scale=weights), x, num_data=float(weights.sum()))


def test_nested_plates():
    net, up = nn.Linear(2, 2).double(), nn.Linear(2, 2).double()
    x = torch.randint(0, 2, (3, 4, 2)).double()

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", 4, dim=-1):
            h = pyro.sample("h", dist.Bernoulli(0.3 * torch.ones(2, dtype=D)).to_event(1))
            with pyro.plate("views", 3, dim=-2):
                pyro.sample("x", dist.Bernoulli(logits=net(h)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("h", dist.Bernoulli(logits=up(x.mean(0))).to_event(1))

    check(natural(model, guide), x, num_data=4)


def test_a_latent_outside_the_data_plate():
    net = nn.Linear(2, 2).double()
    x = torch.randint(0, 2, (3, 2)).double()

    def model(x):
        pyro.module("net", net)
        g = pyro.sample("g", dist.Normal(torch.zeros(2, dtype=D), ONE).to_event(1))
        with pyro.plate("data", 3):
            pyro.sample("x", dist.Bernoulli(logits=net(g)).to_event(1), obs=x)

    def guide(x):
        loc = pyro.param("loc", lambda: torch.randn(2, dtype=D))
        pyro.sample("g", dist.Normal(loc, ONE).to_event(1))

    check(natural(model, guide), x, data_dims=(), num_data=3)


def test_a_vector_that_shifts_inform_is_not_normalised_away():
    def site(h, m):
        a = m["a"](h)
        loc = a - a.logsumexp(-1, keepdim=True)
        return dist.MultivariateNormal(loc, scale_tril=torch.eye(2, dtype=D))

    model, guide, x = program(site, linear(3, 2))
    svi = natural(model, guide)
    svi.directions(x)
    pyro.set_rng_seed(0)
    d = svi.directions(x)
    (block,) = [b for b in d.fisher.blocks if b.site == "x"]
    assert block.kind == "site"
    check_operator(block)
    # The location's normalisation removes the direction along which all logits shift.
    shift = block.gather(
        {n: torch.ones_like(p) if "bias" in n else torch.zeros_like(p) for n, p in leaves().items()}
    )
    assert float((shift * block.matvec(shift)).sum()) < 1e-12


# routes to the information -------------------------------------------------------------------


def test_score_route_is_reported_as_inexact():
    def site(h, m):
        return dist.SoftLaplace(m["a"](h), ONE).to_event(1)

    model, guide, x = program(site, linear(3, 2))
    svi = natural(model, guide)
    d = svi.directions(x)
    block = next(b for b in d.fisher.blocks if "net$$$a.weight" in b.params)
    assert not block.exact and "scores" in block.how
    rows = {row.params: row for row in svi.structure(x)}
    assert not rows[tuple(block.params)].exact
    assert all(b.exact for b in d.fisher.blocks if b is not block)


class Shifted(dist.TorchDistribution):
    """A normal that the library does not know."""

    arg_constraints = {"where": dist.constraints.real}
    support = dist.constraints.real

    def __init__(self, where, validate_args=None):
        self.where = where
        super().__init__(where.shape, validate_args=validate_args)

    def expand(self, batch_shape, _instance=None):
        return Shifted(self.where.expand(batch_shape))

    def sample(self, sample_shape=()):
        return torch.normal(self.where.detach().expand(self._extended_shape(sample_shape)), 0.5)

    def log_prob(self, value):
        return dist.Normal(self.where, 0.5).log_prob(value)


def test_register_fisher_makes_a_users_distribution_exact(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    def site(h, m):
        return Shifted(m["a"](h)).to_event(1)

    model, guide, x = program(site, linear(3, 2))
    before = natural(model, guide).directions(x).fisher.blocks
    assert not next(b for b in before if b.site == "x").exact

    @ph.register_fisher(Shifted)
    def rule(d):
        return {"where": torch.full_like(d.where.detach(), 4.0)}

    assert rule is registry._RULES[Shifted]
    d = check(natural(model, guide), x)
    assert next(b for b in d.fisher.blocks if b.site == "x").exact


# expanded distributions ----------------------------------------------------------------------


class Unexpanded(Shifted):
    """Without an ``expand`` of its own, as most users write it."""

    expand = dist.TorchDistribution.expand


MASK = torch.tensor([True, False, True])
MASKED_DATA = torch.tensor([True, False, True, True])
FOLD = dist.transforms.ReshapeTransform((3,), (3, 1))
EXPANDED = {
    "scalar": (
        lambda p: Unexpanded(p).expand([3]).to_event(1),
        lambda p: dist.Normal(p.expand(4, 3), 0.5).to_event(1),
        3,
    ),
    "vector": (
        lambda p: Unexpanded(p.expand(3)).to_event(1),
        lambda p: dist.Normal(p.expand(4, 3), 0.5).to_event(1),
        3,
    ),
    "of size one": (
        lambda p: Unexpanded(p.expand(2, 1)).expand([2, 3]).to_event(2),
        lambda p: dist.Normal(p.expand(4, 2, 3), 0.5).to_event(2),
        6,
    ),
    "two events": (
        lambda p: Unexpanded(p.expand(3)).expand([2, 3]).to_event(1).to_event(1),
        lambda p: dist.Normal(p.expand(4, 2, 3), 0.5).to_event(2),
        6,
    ),
    "masked elements": (
        lambda p: Unexpanded(p).expand([3]).mask(MASK).to_event(1),
        lambda p: dist.Normal(p.expand(4, 3), 0.5).mask(MASK).to_event(1),
        2,
    ),
    "masked data": (
        lambda p: Unexpanded(p).expand([3]).to_event(1).mask(MASKED_DATA),
        lambda p: dist.Normal(p.expand(4, 3), 0.5).to_event(1).mask(MASKED_DATA),
        2.25,
    ),
    "masked, then expanded": (
        lambda p: dist.ExpandedDistribution(Unexpanded(p.expand(3)).mask(MASK), [4, 3]).to_event(1),
        lambda p: dist.Normal(p.expand(4, 3), 0.5).mask(MASK).to_event(1),
        2,
    ),
    "another shape": (
        lambda p: dist.TransformedDistribution(Unexpanded(p).expand([3]), [FOLD]),
        lambda p: dist.TransformedDistribution(dist.Normal(p.expand(4, 3), 0.5), [FOLD]),
        3,
    ),
    "every datum alike": (
        lambda p: Unexpanded(p),
        lambda p: dist.Normal(p.expand(4), 0.5),
        1,
    ),
}


@pytest.mark.parametrize("name", EXPANDED)
def test_expanded_distributions_inform_as_tensors_of_full_shape(name, monkeypatch):
    """One that is expanded stands for every element of every datum, also beside another one."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    ph.register_fisher(Unexpanded)(lambda d: {"where": torch.full_like(d.where.detach(), 4.0)})
    expanded, full, elements = EXPANDED[name]

    def fisher(site, other):
        pyro.clear_param_store()

        def model(x, y):
            p, q = (pyro.param(n, torch.tensor(0.3, dtype=D)) for n in "pq")
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(torch.zeros(2, dtype=D), ONE).to_event(1))
                pyro.sample("y", other(q), obs=y)
                pyro.sample("x", site(p), obs=x)

        def guide(x, y):
            up = pyro.param("up", torch.zeros(2, dtype=D))
            with pyro.plate("data", 4):
                pyro.sample("z", dist.Normal(up, ONE).to_event(1))

        x = torch.zeros(4, *full(ONE).event_shape, dtype=D)
        pyro.set_rng_seed(0)
        found = natural(model, guide).directions(x, torch.zeros(4, 5, dtype=D)).fisher
        return from_blocks(found)

    found = fisher(expanded, lambda q: Unexpanded(q).expand([5]).to_event(1))
    truth = fisher(full, lambda q: dist.Normal(q.expand(4, 5), 0.5).to_event(1))
    close(found, truth, 1e-10)
    close(truth[0, 0], torch.tensor(4.0 * elements, dtype=D), 1e-12)
    close(truth[1, 1], torch.tensor(20.0, dtype=D), 1e-12)


# memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fisher", ["unit", "diagonal", "kronecker"])
@pytest.mark.parametrize("samples", ["lagged", "average", "dream"])
def test_programs_with_networks_train(fisher, samples):
    site, modules, _ = PROGRAMS["mlp"]
    model, guide, x = program(site, modules)
    svi = natural(model, guide, fisher=fisher, fisher_samples=samples, tolerance=1e-2)
    svi.directions(x)  # fills the parameter store
    before = {n: p.detach().clone() for n, p in leaves().items()}
    assert len(before) == 7
    assert all(math.isfinite(svi.step(x)) for _ in range(3))
    assert all(not torch.equal(before[n], p) for n, p in leaves().items())


def test_lagged_matrix_is_that_of_the_previous_batch():
    site, modules, _ = PROGRAMS["bernoulli logits"]
    model, guide, x = program(site, modules)
    svi = natural(model, guide, fisher_samples="lagged", optim=pyro.optim.SGD({"lr": 0.0}))
    pyro.set_rng_seed(0)
    svi.step(x[:2])
    pyro.set_rng_seed(0)
    same = natural(model, guide)
    same.directions(x[:2])
    pyro.set_rng_seed(0)
    # The first call of either found out the nesting, which took the same draws.
    before = from_blocks(svi.directions(x).fisher)
    fresh = from_blocks(same.directions(x).fisher)
    assert float((before - fresh).abs().max()) > 1e-4
    again = from_blocks(svi.directions(x[1:]).fisher)
    close(again, before, 0)


def test_matrix_free_lagged_matrix_uses_present_parameters_on_earlier_samples():
    site, modules, _ = PROGRAMS["mlp"]
    model, guide, x = program(site, modules)
    svi = natural(model, guide, fisher_samples="lagged", optim=pyro.optim.SGD({"lr": 0.0}))
    svi.step(x)
    one = from_blocks(svi.directions(x).fisher)
    two = from_blocks(svi.directions(x).fisher)
    close(one, two, 1e-14)


def test_pairs_of_blocks_share_no_parameter():
    for name, _ in itertools.islice(PROGRAMS.items(), 6):
        pyro.clear_param_store()
        site, modules, _ = PROGRAMS[name]
        model, guide, x = program(site, modules)
        names = [p for b in natural(model, guide).directions(x).fisher.blocks for p in b.params]
        assert len(names) == len(set(names))


def test_oracle_reads_arguments_as_given():
    assert arguments(dist.Bernoulli(probs=torch.tensor([0.2]))) == ["probs"]
    info = score_information(dist.Normal(torch.zeros(1, dtype=D), 0.5 * torch.ones(1, dtype=D)))
    close(info[0], torch.diag(torch.tensor([4.0, 8.0], dtype=D)), 1e-9)


def test_the_eigenbasis_is_computed_in_double_precision():
    # float32 eigh returned NaN for a block of low rank (MNIST, first recognition layer)
    generator = torch.Generator().manual_seed(0)
    probs = torch.rand(300, generator=generator) ** 3
    probs[:100] = 0
    u = torch.bernoulli(probs.expand(64, 300), generator=generator)
    block = u.t() @ u / 64
    basis = EigenBasis.of(block)
    assert basis.vectors.dtype == torch.float32
    unit = basis.vectors.double().t() @ basis.vectors.double()
    assert (unit - torch.eye(300, dtype=torch.float64)).abs().max() < 5e-7
    again = (basis.vectors.double() * basis.values.double()) @ basis.vectors.double().t()
    assert (again - block.double()).abs().max() < 5e-7


def saturated(seed):
    """The information of logits of which one is far above all others, for 20 units."""
    logits = 40 * torch.randn(20, 30, generator=torch.Generator().manual_seed(seed))
    return families.information(dist.Categorical(logits=logits))[0]["logits"]


def test_coupled_units_are_turned_in_double_precision():
    """float32 ``eigh`` does not converge for most of these saturated logits."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(50, 6, generator=generator)
    basis = EigenBasis.of(root.t() @ root / 50)
    g = torch.randn(20, 180, generator=generator)
    mean = (basis.vectors * basis.values).double() @ basis.vectors.double().t()
    for seed in range(12):
        scales = saturated(seed)
        x = basis.inverse(scales, 0.1, 0.0)(g)
        assert x.dtype == torch.float32
        dense = torch.stack([torch.kron(s, mean) for s in scales.double()])
        dense += 0.1 * torch.eye(180, dtype=D)
        exact = torch.linalg.solve(dense, g.double())
        close(x.double(), exact, 1e-4)


def test_saturated_logits_train():
    biases = 40 * torch.randn(20, 30, generator=torch.Generator().manual_seed(1))
    x = biases.argmax(-1).expand(8, 20).clone()

    def model(x):
        w = pyro.param("w", torch.zeros(5, 20, 30))
        c = pyro.param("c", biases)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(5)).to_event(1))
            logits = (h @ w.reshape(5, 600)).reshape(*h.shape[:-1], 20, 30) + c
            pyro.sample("x", dist.Categorical(logits=logits).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            logits = x.float() @ pyro.param("up", torch.zeros(20, 5))
            pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))

    svi = ph.NaturalRWS(model, guide, fisher="kronecker")
    assert all(math.isfinite(svi.step(x)) for _ in range(3))


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("rows", [1, 7, 30, 60])
def test_the_space_of_the_samples_gives_the_dense_solution(rows, mean):
    generator = torch.Generator().manual_seed(rows)
    u = torch.randn(rows, 40, generator=generator, dtype=torch.float64)
    u = (u > -0.2).to(u) if mean else u
    q = torch.rand(rows, 5, generator=generator, dtype=torch.float64)
    q[0], q[:, 1] = 0.0, 0.0
    g = torch.randn(5, 40, generator=generator, dtype=torch.float64)
    for damping in (0.01, 0.2, 100.0):
        dense = torch.einsum("nj,nk,nl->jkl", q, u, u)
        exact = solvers.cholesky(dense, g, damping).x
        tight = solvers.in_sample_space(u, q, g, damping, 1e-12, 500).x
        assert (tight - exact).norm() < 1e-9 * exact.norm()
        loose = solvers.in_sample_space(u, q, g, damping, 1e-2)
        assert (loose.x - exact).norm() <= 1e-2 * exact.norm()
        assert loose.error <= 1e-2
        nothing = solvers.in_sample_space(u, 0 * q, g, damping).x
        assert torch.allclose(nothing, (1 + damping) / damping * g, rtol=1e-12)


def test_a_mean_of_the_features_costs_no_iterations():
    generator = torch.Generator().manual_seed(0)
    u = torch.bernoulli(torch.full((320, 300), 0.5), generator=generator)
    q = torch.rand(320, 8, generator=generator) / 100
    g = torch.randn(8, 300, generator=generator)
    single = solvers.in_sample_space(u, q, g, 0.1).iterations
    double = solvers.in_sample_space(u.double(), q.double(), g.double(), 0.1).iterations
    assert single == double <= 10  # 15 and 12 by the diagonal alone


@pytest.mark.parametrize("coupled", [False, True])
def test_the_band_of_eigenvalues_keeps_its_promise(coupled):
    generator = torch.Generator().manual_seed(0)
    u = torch.rand(2000, 120, generator=generator, dtype=torch.float64)
    basis = EigenBasis.of(u.t() @ u / 2000)
    scales = 0.3 * torch.rand(6, generator=generator, dtype=torch.float64)
    g = torch.randn(6, 120, generator=generator, dtype=torch.float64)
    if coupled:
        root = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)
        scales, g = root @ root.transpose(1, 2) / 16, g.reshape(3, 240)
    top = float(torch.linalg.eigvalsh(scales).max() if coupled else scales.max())
    for slack in (0.05, 0.1, 0.3):
        exact = basis.inverse(scales, 0.2, 0.0)(g)
        low, high = basis._band(top, 0.2, slack)
        assert 2 * (high - low) > 120  # else nothing is left out and nothing is tested
        banded = basis.inverse(scales, 0.2, slack)(g)
        error = (banded - exact).norm() / exact.norm()
        assert 0 < error <= slack
