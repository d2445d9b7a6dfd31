"""Saving and going on: the next steps are the same, bit for bit."""

import io
import os
import subprocess
import sys

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule
from torch import nn

from pyro_helmholtz import RWS, NaturalRWS, WakeSleep

from .programs import SBN, snapshot

X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0]])


def of_modules():
    sbn = SBN(torch.float32)
    return sbn.model, sbn.guide


def of_params():
    def init(name, *shape):
        return pyro.param(name, lambda: 0.5 * torch.randn(shape))

    def model(x):
        w, b = init("w", 2, 3), init("b", 3)
        top = pyro.param("top", lambda: torch.full((2,), 0.4), dist.constraints.unit_interval)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(top).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=h @ w + b).to_event(1), obs=x)

    def guide(x):
        v = init("v", 3, 2)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ v).to_event(1))

    return model, guide


def of_pyro_modules(mlp=False):
    class Model(PyroModule):
        def __init__(self):
            super().__init__()
            self.down = PyroModule[nn.Linear](2, 3)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.down(h)).to_event(1), obs=x)

    class Guide(PyroModule):
        def __init__(self):
            super().__init__()
            if mlp:
                self.up = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))
            else:
                self.up = PyroModule[nn.Linear](3, 2)

        def forward(self, x):
            with pyro.plate("data", len(x)):
                pyro.sample("h", dist.Bernoulli(logits=self.up(x)).to_event(1))

    return Model(), Guide()


def of_mlp():
    return of_pyro_modules(mlp=True)


PROGRAMS = [of_modules, of_params, of_pyro_modules, of_mlp]


def through_a_file(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def check(make, front):
    """Three steps, save, three more; then the same three from the saved state."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front(*make())
    for _ in range(3):
        svi.step(X)
    state = through_a_file(svi.state_dict())
    losses = [svi.step(X) for _ in range(3)]
    expected = snapshot()

    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    svi = front(*make())
    svi.load_state_dict(state)
    assert [svi.step(X) for _ in range(3)] == losses
    after = snapshot()
    assert after.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(after[name], value), name


@pytest.mark.parametrize("make", PROGRAMS)
@pytest.mark.parametrize("kind", [RWS, WakeSleep])
def test_plain_with_adam(make, kind):
    check(make, lambda m, g: kind(m, g, pyro.optim.Adam({"lr": 0.05}), num_particles=4))


@pytest.mark.parametrize("make", PROGRAMS)
@pytest.mark.parametrize("samples", ["lagged", "average"])
@pytest.mark.parametrize("form", ["unit", "diagonal", "kronecker"])
def test_natural(make, form, samples):
    optim = {"lr": 0.05, "momentum": 0.9}
    check(
        make,
        lambda m, g: NaturalRWS(
            m, g, pyro.optim.SGD(dict(optim)), num_particles=4, fisher=form, fisher_samples=samples
        ),
    )


@pytest.mark.parametrize("samples", ["same", "dream"])
def test_other_samples(samples):
    check(of_modules, lambda m, g: NaturalRWS(m, g, num_particles=4, fisher_samples=samples))


def test_refresh_and_schedule_go_on():
    check(
        of_modules,
        lambda m, g: NaturalRWS(
            m, g, num_particles=4, refresh_every=2, damping=lambda step: 1.0 / (1 + step)
        ),
    )


@pytest.mark.parametrize("front", [RWS, NaturalRWS])
def test_a_kept_state_rewinds_the_same_object(front):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front(*of_modules(), pyro.optim.Adam({"lr": 0.05}), num_particles=4)
    svi.step(X)
    state = svi.state_dict()
    losses = [svi.step(X) for _ in range(3)]
    expected = snapshot()
    svi.load_state_dict(state)
    assert [svi.step(X) for _ in range(3)] == losses
    assert all(torch.equal(v, expected[k]) for k, v in snapshot().items())


@pytest.mark.parametrize("front", [RWS, NaturalRWS])
def test_loss_and_directions_after_loading(front):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front(*of_modules(), num_particles=4)
    svi.step(X)
    state = svi.state_dict()
    expected = svi.evaluate_loss(X)
    for call in ("evaluate_loss", "directions"):
        pyro.clear_param_store()
        fresh = front(*of_modules(), num_particles=4)
        fresh.load_state_dict(state)
        assert fresh.state_dict()["parameters"].keys() == state["parameters"].keys()
        result = getattr(fresh, call)(X)
        assert (result if call == "evaluate_loss" else result.loss) == expected


def test_a_loaded_state_is_in_the_store_at_once() -> None:
    """What is measured right after loading is the saved model, not the one trained since."""

    def model(x: torch.Tensor) -> None:
        w = pyro.param("w", torch.zeros(2, 3))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=h @ w).to_event(1), obs=x)

    def guide(x: torch.Tensor) -> None:
        v = pyro.param("v", torch.zeros(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ v).to_event(1))

    pyro.clear_param_store()
    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((6, 3), 0.4))
    svi = RWS(model, guide)
    svi.step(x)
    state, saved = svi.state_dict(), pyro.param("w").detach().clone()
    svi.step(x)
    assert not torch.equal(pyro.param("w"), saved)
    svi.load_state_dict(state)
    assert torch.equal(pyro.param("w"), saved)


JOINED = """
import pyro, pyro.distributions as dist, torch
from pyro_helmholtz import NaturalRWS

def model(x):
    weights = [pyro.param(f"w{i}", torch.full((3, 1), 0.1 * i)) for i in range(6)]
    bias = pyro.param("b", torch.zeros(1))
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=bias).to_event(1))
        for i, w in enumerate(weights):
            pyro.sample(f"y{i}", dist.Bernoulli(logits=x @ w).to_event(1), obs=x[:, :1])
        logits = sum(x @ w for w in weights) + h
        pyro.sample("z", dist.Bernoulli(logits=logits).to_event(1), obs=x[:, 1:2])

def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Bernoulli(logits=pyro.param("c", torch.zeros(1))).to_event(1))

x = torch.ones(4, 3)
svi = NaturalRWS(model, guide, sleep_weight=0.0)
print([block.site for block in svi.directions(x).fisher.blocks])
"""


def test_blocks_of_shared_parameters_are_the_same_in_every_process():
    # Python's order of sets of strings is another in each: sums in another order would round
    # otherwise, and a resumed run would go another way.
    def sites(seed):
        env = os.environ | {"PYTHONHASHSEED": seed}
        done = subprocess.run(
            [sys.executable, "-c", JOINED], env=env, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "y0, y1, y2, y3, y4, y5, z" in sites("1")
    assert sites("1") == sites("2")
