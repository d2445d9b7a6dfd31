"""One program written in many ways: the same structure and the same direction."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F
from pyro.nn import PyroModule, PyroParam
from torch import nn

from tests.oracles import close, natural, program

D = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


W = torch.randn(4, 3, dtype=D, generator=torch.Generator().manual_seed(5))
C = torch.randn(4, dtype=D, generator=torch.Generator().manual_seed(6))
UP = torch.randn(3, 4, dtype=D, generator=torch.Generator().manual_seed(7))


def weight():
    return pyro.param("w", lambda: W.clone())


def bias():
    return pyro.param("c", lambda: C.clone())


def layer(cls=nn.Linear):
    made = cls(3, 4).double()
    with torch.no_grad():
        made.weight.copy_(W)
        made.bias.copy_(C)
    return made


def from_module(cls):
    held = layer(cls)
    return lambda h: pyro.module("net", held)(h)


def params_of_pyro_module():
    class Net(PyroModule):
        def __init__(self):
            super().__init__()
            self.w, self.c = PyroParam(W.clone()), PyroParam(C.clone())

        def forward(self, h):
            return h @ self.w.t() + self.c

    net = Net()
    return lambda h: net(h)


def transposed():
    v = pyro.param("w", lambda: W.t().contiguous())
    return v


STYLES = {
    "nn.Linear": lambda: from_module(nn.Linear),
    "PyroModule[nn.Linear]": lambda: from_module(PyroModule[nn.Linear]),
    "PyroModule with PyroParam": params_of_pyro_module,
    "param @": lambda: lambda h: h @ transposed() + bias(),
    "param.t() @": lambda: lambda h: h @ weight().t() + bias(),
    "bias first": lambda: lambda h: bias() + h @ weight().t(),
    "torch.matmul": lambda: lambda h: torch.matmul(h, weight().mT) + bias(),
    "F.linear": lambda: lambda h: F.linear(h, weight(), bias()),
    "einsum": lambda: lambda h: torch.einsum("...i,ji->...j", h, weight()) + bias(),
    "W @ h.T": lambda: lambda h: (weight() @ h.mT).mT + bias(),
    "column vector": lambda: lambda h: (weight() @ h[..., None])[..., 0] + bias(),
    "stacked": lambda: lambda h: F.linear(h, weight().reshape(2, 2, 3).reshape(4, 3), bias()),
    "bias row": lambda: lambda h: h @ weight().t() + bias()[None],
}


def run(style, fisher):
    """Structure and natural direction of the model's layer in one style."""
    pyro.clear_param_store()
    affine = STYLES[style]()

    def model(x):
        prior = pyro.param("prior", lambda: torch.zeros(3, dtype=D))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=affine(h)).to_event(1), obs=x)

    def guide(x):
        up = pyro.param("up", lambda: UP.clone())
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ up.t()).to_event(1))

    x = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 1], [0, 0, 1, 0]], dtype=D)
    svi = natural(model, guide, fisher=fisher, num_particles=4)
    (row,) = [row for row in svi.structure(x) if row.site == "x"]
    pyro.set_rng_seed(3)
    d = svi.directions(x)
    (block,) = [b for b in d.fisher.blocks if b.site == "x"]
    return row, block.gather(d.natural), block.gather(d.gradient), block.dense()


@pytest.mark.parametrize("fisher", ["unit", "kronecker", "diagonal"])
@pytest.mark.parametrize("style", STYLES)
def test_every_style_gives_the_same_structure_and_direction(style, fisher):
    row, natural_direction, gradient, dense = run(style, fisher)
    first, *expected = run("nn.Linear", fisher)
    for field in ("kind", "units", "fan_in", "size", "exact", "solver", "note"):
        assert getattr(row, field) == getattr(first, field)
    assert (row.kind, row.units, row.fan_in, row.exact) == ("affine", 4, 4, True)
    for value, truth in zip((natural_direction, gradient, dense), expected, strict=True):
        close(value, truth, 1e-10)
    assert float((natural_direction - gradient).abs().max()) > 1e-3


def test_report_lists_every_parameter_once_and_prints():
    model, guide, x = program(
        lambda h, m: dist.Normal(m["b"](torch.tanh(m["a"](h))), torch.exp(m["s"](h))).to_event(1),
        {"a": nn.Linear(3, 2), "b": nn.Linear(2, 4), "s": nn.Linear(3, 4)},
    )
    structure = natural(model, guide).structure(x)
    rows = {name: row for row in structure for name in row.params}
    assert sum(len(row.params) for row in structure) == len(rows) == 9
    assert rows["net$$$a.weight"].kind == "site"
    assert rows["net$$$a.weight"] is rows["net$$$b.bias"]
    assert "whole site" in rows["net$$$a.weight"].note
    assert rows["net$$$s.weight"].kind == "affine" and rows["net$$$s.weight"].units == 4
    text = str(structure)
    assert all(name in text for name in rows)
    assert len(text.splitlines()) == 2 + len(structure.rows)


def test_structure_changes_no_parameter():
    model, guide, x = program(
        lambda h, m: dist.Bernoulli(logits=m["a"](h)).to_event(1), {"a": nn.Linear(3, 2)}
    )
    svi = natural(model, guide)
    svi.structure(x)
    before = {n: p.detach().clone() for n, p in pyro.get_param_store().named_parameters()}
    svi.structure(x)
    svi.directions(x)
    for name, p in pyro.get_param_store().named_parameters():
        assert torch.equal(before[name], p) and p.grad is None


def test_fixed_features_between_parameters_and_site_stay_affine():
    mixing = torch.randn(2, 4, dtype=D)
    model, guide, x = program(
        lambda h, m: dist.Bernoulli(logits=m["a"](torch.relu(h @ mixing.new_ones(3, 3)))).to_event(
            1
        ),
        {"a": nn.Linear(3, 2)},
    )
    (row,) = [row for row in natural(model, guide).structure(x) if row.site == "x"]
    assert (row.kind, row.units, row.fan_in) == ("affine", 2, 4)


def test_frozen_weight_leaves_the_bias_with_a_block_of_its_own():
    layers = {"a": nn.Linear(3, 2)}
    layers["a"].weight.requires_grad_(False)
    model, guide, x = program(lambda h, m: dist.Bernoulli(logits=m["a"](h)).to_event(1), layers)
    rows = {row.site: row for row in natural(model, guide).structure(x)}
    assert rows["x"].params == ("net$$$a.bias",)
    assert (rows["x"].units, rows["x"].size) == (2, 1)


def mixture(loc):
    weights = dist.Categorical(logits=torch.zeros(2, dtype=D))
    return dist.MixtureSameFamily(weights, dist.Normal(loc, 1.0))


UNSEEN = {
    "mixture": lambda h, m: mixture(h[..., None] + m).to_event(1),
    "mixture of bijections": lambda h, m: dist.TransformedDistribution(
        mixture(h[..., None] + m), [dist.transforms.ExpTransform()]
    ).to_event(1),
    "masked mixture": lambda h, m: dist.MaskedMixture(
        torch.tensor([True, False]), dist.Normal(h + m, 1.0), dist.Normal(-h, 1.0)
    ).to_event(1),
}


@pytest.mark.parametrize("name", UNSEEN)
def test_what_a_distribution_holds_within_has_no_information(name):
    """Also where a parameter feeds another site, whose information alone would be too small."""

    def model(x):
        m, own = (pyro.param(n, torch.ones(2, dtype=D)) for n in ("m", "own"))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2, dtype=D)).to_event(1))
            pyro.sample("x", UNSEEN[name](h, m), obs=x)
        with pyro.plate("others", 2):
            pyro.sample("y", dist.Normal(m, 1.0), obs=torch.zeros(2, dtype=D))
            pyro.sample("z", dist.Normal(own, 1.0), obs=torch.zeros(2, dtype=D))

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2, dtype=D)).to_event(1))

    structure = natural(model, guide, sleep_weight=0.0).structure(torch.ones(4, 2, dtype=D))
    rows = {n: row for row in structure for n in row.params}
    assert (rows["m"].kind, rows["m"].site) == ("none", "x, y")
    assert rows["own"].site == "z" and rows["own"].exact
    assert "x, y" in str(structure)
