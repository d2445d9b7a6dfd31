"""A remembered walk serves only graphs that look the same; any change is seen."""

import pyro
import pyro.distributions as dist
import pytest
import torch
import torch.nn.functional as F

import pyro_helmholtz as ph
from pyro_helmholtz.finder import Finder


def make(model, guide):
    options = {"num_particles": 3, "max_plate_nesting": 1}
    return ph.NaturalRWS(model, guide, fisher="unit", **options)


def natural(model, guide, x, changed=None):
    """The same natural directions by an object that remembers and by new ones."""
    remembering = make(model, guide)
    for turn in range(4):
        if changed is not None:
            changed(turn)
        torch.manual_seed(turn)
        one = remembering.directions(x)
        torch.manual_seed(turn)
        other = make(model, guide).directions(x)
        for name in one.natural:
            assert torch.equal(one.natural[name], other.natural[name]), (turn, name)
        kinds = [[(b.kind, b.size, b.params) for b in d.fisher.blocks] for d in (one, other)]
        assert kinds[0] == kinds[1]


def programs(logits):
    def model(x):
        prior = pyro.param("prior", torch.zeros(4))
        weight = pyro.param("weight", torch.linspace(-1, 1, 24).reshape(4, 6))
        bias = pyro.param("bias", torch.linspace(0, 1, 6))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
            eta = logits(h, weight, bias)
            pyro.sample("x", dist.Bernoulli(logits=eta).to_event(1), obs=x)

    def guide(x):
        up = pyro.param("up", torch.linspace(-1, 1, 24).reshape(6, 4))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ up).to_event(1))

    return model, guide


@pytest.fixture
def x():
    pyro.clear_param_store()
    return torch.bernoulli(torch.full((5, 6), 0.5, dtype=torch.float64)).float()


def test_a_program_that_changes_between_steps(x):
    turn = [0]
    forms = [
        lambda h, w, b: h @ w + b,
        lambda h, w, b: torch.tanh(h @ w) + b,
        lambda h, w, b: F.linear(h, w.t(), b),
        lambda h, w, b: h @ w.flip(1) + b,
    ]
    natural(
        *programs(lambda h, w, b: forms[turn[0]](h, w, b)),
        x,
        lambda t: turn.__setitem__(0, t),
    )


def test_a_slice_that_moves(x):
    # same nodes, same shapes: only the saved offset of the slice differs
    start = [0]

    def logits(h, w, b):
        return h[..., :2] @ w[start[0] : start[0] + 2] + b

    natural(*programs(logits), x, lambda t: start.__setitem__(0, t % 3))


@pytest.mark.parametrize("take", [lambda w, i: w[:, i], lambda w, i: w.index_select(1, i)])
def test_an_index_that_changes(x, take):
    # same nodes, same shapes: only the saved index tensor differs
    generator = torch.Generator().manual_seed(0)
    index = [torch.arange(6)]

    def permute(turn):
        index[0] = torch.randperm(6, generator=generator)

    natural(*programs(lambda h, w, b: h @ take(w, index[0]) + b), x, permute)


def test_other_batch_sizes(x):
    model, guide = programs(lambda h, w, b: h @ w + b)
    svi = make(model, guide)
    for n in (5, 3, 5, 1, 2, 4, 5):
        torch.manual_seed(0)
        one = svi.directions(x[:n])
        torch.manual_seed(0)
        other = make(model, guide).directions(x[:n])
        for name in one.natural:
            assert torch.equal(one.natural[name], other.natural[name])


def test_routes_hold_no_graph():
    finder = Finder()
    w = torch.randn(3, 2, requires_grad=True)
    finder.start({id(w): "w"})
    seen = []
    for _ in range(2):
        features = torch.randn(4, 3)
        seen.append(torch.utils.weak.WeakTensorKeyDictionary({features: 1}))
        use = finder.use("a", features @ w)
        application = finder.apply("a", use, lambda: False)
        assert torch.equal(application.root.features(), features)
        del features, use, application
    assert all(len(kept) == 0 for kept in seen)
