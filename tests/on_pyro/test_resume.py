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

from pyro_helmholtz import (
    RWS,
    BiHM,
    NaturalBiHM,
    NaturalRWS,
    StochasticBackprop,
    WakeSleep,
)

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


def refuses(front, state, match):
    before = snapshot()
    with pytest.raises(ValueError, match=match):
        front.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in snapshot().items())


def test_states_load_where_they_were_saved_alone():
    pyro.clear_param_store()
    programs = of_modules()
    kinds = (RWS, WakeSleep, BiHM, NaturalRWS, NaturalBiHM)
    fronts = [kind(*programs, num_particles=2, average=False) for kind in kinds]
    for one in fronts:
        one.step(X)
        state = through_a_file(one.state_dict())
        for other in fronts:
            if other is not one:
                refuses(other, state, f"by {type(one).__name__}.*is {type(other).__name__}")
    unit = NaturalRWS(*programs, num_particles=2, average=False, fisher="unit")
    refuses(unit, fronts[3].state_dict(), "fisher='kronecker'.*fisher='unit'.*same: fisher")


def test_a_state_with_a_posterior_is_refused_without_one():
    def model(x):
        w = pyro.param("w", torch.zeros(3))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z + w, 1.0).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(pyro.param("v", torch.zeros(3)), 1.0).to_event(1))

    pyro.clear_param_store()
    plain = StochasticBackprop(model, guide)
    posterior = StochasticBackprop(model, guide, parameter_posterior=1.0)
    for one, other in ((plain, posterior), (posterior, plain)):
        one.step(X)
        refuses(other, one.state_dict(), "Not the same: parameter_posterior")


def test_a_state_of_an_earlier_version_loads():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = NaturalRWS(*of_modules(), num_particles=2)
    svi.step(X)
    state = svi.state_dict()
    del state["kind"]
    expected = svi.step(X)
    svi.load_state_dict(state)
    assert svi.step(X) == expected


@pytest.mark.parametrize("clear", [True, False])
@pytest.mark.parametrize("kind", [RWS, NaturalRWS])
def test_a_state_of_other_programs_is_refused_in_every_step(kind, clear):
    pyro.clear_param_store()
    svi = kind(*of_params(), num_particles=2)
    svi.step(X)
    state = svi.state_dict()
    if clear:
        pyro.clear_param_store()
    fresh = kind(*of_modules(), num_particles=2)
    fresh.load_state_dict(state)
    for _ in range(2):
        with pytest.raises(ValueError, match="of other programs: it has trained parameter"):
            fresh.step(X)
    with pytest.raises(ValueError, match="of other programs"):
        fresh.evaluate_loss(X)


def of_growing(constraint=dist.constraints.real):
    """A parameter more in batches of more than three."""

    def model(x):
        w = pyro.param("w", lambda: torch.randn(2, 3))
        late = pyro.param("late", lambda: 0.1 + torch.rand(3), constraint) if len(x) > 3 else 0.0
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=h @ w + late).to_event(1), obs=x)

    return model, of_params()[1]


@pytest.mark.parametrize("kind", [RWS, NaturalRWS])
@pytest.mark.parametrize("constraint", [dist.constraints.real, dist.constraints.positive])
def test_a_parameter_that_comes_later_has_its_saved_value(kind, constraint):
    """The first run after loading has a batch that does not use it."""
    many = X.repeat(2, 1)

    def front():
        optim = pyro.optim.Adam({"lr": 0.05})
        return kind(*of_growing(constraint), optim, num_particles=2)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front()
    svi.step(many)
    state = through_a_file(svi.state_dict())
    losses = [svi.step(batch) for batch in (X, X, many, X, many)]
    expected = snapshot()

    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    svi = front()
    svi.load_state_dict(state)
    with pytest.warns(UserWarning, match="trained parameter 'late'"):
        found = [svi.step(X)]
    state = through_a_file(svi.state_dict())  # once more, before it exists
    pyro.clear_param_store()
    svi = front()
    svi.load_state_dict(state)
    with pytest.warns(UserWarning, match="trained parameter 'late'"):
        found += [svi.step(batch) for batch in (X, many, X, many)]
    assert found == losses
    assert all(torch.equal(v, snapshot()[name]) for name, v in expected.items())


def test_a_parameter_that_the_state_does_not_have():
    pyro.clear_param_store()
    svi = RWS(*of_growing(), num_particles=2)
    svi.step(X)
    state = svi.state_dict()
    svi.step(X.repeat(2, 1))
    pyro.clear_param_store()
    svi = RWS(*of_growing(), num_particles=2)
    svi.load_state_dict(state)
    with pytest.warns(UserWarning, match="parameter 'late' is not in the state"):
        svi.step(X.repeat(2, 1))


@pytest.mark.parametrize("kind", [RWS, NaturalRWS])
def test_nothing_is_lost_between_loading_and_the_first_step(kind):
    def front():
        return kind(*of_params(), pyro.optim.Adam({"lr": 0.05}), num_particles=2)

    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front()
    for _ in range(3):
        svi.step(X)
    state = svi.state_dict()
    losses = [svi.step(X) for _ in range(3)]

    pyro.clear_param_store()
    svi = front()
    svi.load_state_dict(state)
    with pytest.raises(ValueError, match="NaN"):  # the first data are bad
        svi.step(X * float("nan"))
    assert [svi.step(X) for _ in range(3)] == losses

    pyro.clear_param_store()
    svi = front()
    svi.load_state_dict(state)
    svi.evaluate_loss(X)
    again = svi.state_dict()  # the optimiser has met no parameter yet
    assert again["optimiser"].keys() == state["optimiser"].keys()
    pyro.clear_param_store()
    svi = front()
    svi.load_state_dict(again | {"random": state["random"]})
    assert [svi.step(X) for _ in range(3)] == losses


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
