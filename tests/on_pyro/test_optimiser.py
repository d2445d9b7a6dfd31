"""One joint step equals Pyro's own, parameter by parameter, bit for bit."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_helmholtz as ph
from pyro_helmholtz.optimiser import JointStep

OPTIMISERS = {
    "sgd": ("SGD", {"lr": 0.1}),
    "momentum": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "adam": ("Adam", {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": ("AdamW", {"lr": 0.01}),
    "rmsprop": ("RMSprop", {"lr": 0.01}),
}


def leaves(seed=0):
    generator = torch.Generator().manual_seed(seed)
    pyro.clear_param_store()
    store = pyro.get_param_store()
    for i, shape in enumerate([(3, 2), (4,), ()]):
        store.setdefault(f"p{i}", torch.randn(shape, generator=generator))
    return [store._params[f"p{i}"] for i in range(3)]


def run(optim, step, count=5, change=None):
    params = leaves()
    generator = torch.Generator().manual_seed(1)
    for i in range(count):
        if change is not None and i == 3:
            change(optim, params)
        for p in params:
            p.grad = torch.randn(p.shape, generator=generator)
        step(optim, params)
    return [p.detach().clone() for p in params], copy.deepcopy(optim.get_state())


def make(name, **more):
    kind, options = OPTIMISERS[name]
    return getattr(pyro.optim, kind)(dict(options), **more)


def equal(one, other):
    if torch.is_tensor(one):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[k], other[k]) for k in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(equal, one, other))
    return one == other


@pytest.mark.parametrize("name", OPTIMISERS)
def test_same_parameters_and_same_state_as_the_host(name):
    joint = run(make(name), JointStep())
    host = run(make(name), lambda optim, params: optim(params))
    assert equal(joint, host)


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_rate_changed_by_the_user_counts(name):
    def slower(optim, params):
        for p in params:
            optim.optim_objs[p].param_groups[0]["lr"] = 1e-3

    joint = run(make(name), JointStep(), change=slower)
    host = run(make(name), lambda optim, params: optim(params), change=slower)
    assert equal(joint, host)
    assert not equal(joint[0], run(make(name), JointStep())[0])


def test_a_rate_of_one_parameter_counts():
    def one_slower(optim, params):
        optim.optim_objs[params[1]].param_groups[0]["lr"] = 1e-3

    joint = run(make("adam"), JointStep(), change=one_slower)
    host = run(make("adam"), lambda optim, params: optim(params), change=one_slower)
    assert equal(joint, host)


def test_rates_by_name_clipping_and_schedulers_are_the_hosts():
    def by_name(name):
        return {"lr": 0.1 if name == "p0" else 0.01}

    def scheduled():
        return pyro.optim.ExponentialLR(
            {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.1}, "gamma": 0.5}
        )

    for maker in (
        lambda: pyro.optim.SGD(by_name),
        lambda: make("sgd", clip_args={"clip_norm": 0.5}),
        scheduled,
    ):
        joint = run(maker(), JointStep())
        host = run(maker(), lambda optim, params: optim(params))
        assert equal(joint[0], host[0])


def test_fewer_parameters_in_some_steps():
    def alternate(step):
        count = iter(range(100))

        def some(optim, params):
            step(optim, params if next(count) % 2 == 0 else params[1:])

        return some

    joint = run(make("adam"), alternate(JointStep()))
    host = run(make("adam"), alternate(lambda optim, params: optim(params)))
    assert equal(joint, host)


def test_the_hosts_state_follows_and_loads():
    def model(x):
        p = pyro.param("p", torch.zeros(()))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=p))
            pyro.sample("x", dist.Normal(h, 1.0), obs=x)

    def guide(x):
        q = pyro.param("q", torch.zeros(()))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=q + x))

    pyro.clear_param_store()
    svi = ph.RWS(model, guide, pyro.optim.Adam({"lr": 0.1}))
    x = torch.tensor([0.1, 0.9])
    for _ in range(3):
        svi.step(x)
    state = svi.optim.get_state()
    assert {float(s["state"][0]["step"]) for s in state.values()} == {3.0}


def tied(names, deep=True):
    """A layer that the model and the guide share, or the model's two sites; under some names."""
    torch.manual_seed(3)
    shared, down, up = nn.Linear(4, 4), nn.Linear(2, 4), nn.Linear(4, 2)

    def model(x):
        pyro.module("down", down)
        for name in names[:1] if deep else names:
            pyro.module(name, shared)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            mean = down(h)
            if deep:
                pyro.sample("x", dist.Bernoulli(logits=shared(mean)).to_event(1), obs=x)
            else:
                y = pyro.sample("y", dist.Bernoulli(logits=mean).to_event(1))
                z = pyro.sample("z", dist.Bernoulli(logits=shared(y)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=shared(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        if deep:
            pyro.module(names[-1], shared)
        with pyro.plate("data", len(x)):
            if not deep:
                pyro.sample("z", dist.Bernoulli(logits=x).to_event(1))
                pyro.sample("y", dist.Bernoulli(logits=-x).to_event(1))
            mean = shared(x) if deep else x
            pyro.sample("h", dist.Bernoulli(logits=up(mean)).to_event(1))

    return model, guide, shared.weight


def data():
    return torch.bernoulli(torch.full((8, 4), 0.4), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("kind", [ph.RWS, ph.BiHM, ph.WakeSleep])
def test_a_layer_of_two_names_takes_one_step_as_under_the_host(kind, deep):
    x = data()
    elbo = getattr(ph, f"{kind.__name__}_ELBO")

    def ours(model, guide, optim):
        return kind(model, guide, optim, num_particles=3)

    def hosts(model, guide, optim):
        return pyro.infer.SVI(model, guide, optim, elbo(3))

    found = []
    for make in (ours, hosts):
        pyro.clear_param_store()
        model, guide, weight = tied(["one", "two"], deep)
        before = weight.detach().clone()
        svi = make(model, guide, pyro.optim.SGD({"lr": 0.1}))
        torch.manual_seed(1)
        found.append((svi.step(x), (weight - before).detach()))
    (loss, moved), (host_loss, host_moved) = found
    assert loss == pytest.approx(host_loss, rel=1e-6)
    torch.testing.assert_close(moved, host_moved / len(x), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"average": True}, {"sleep_steps": 2}])
@pytest.mark.parametrize("deep", [True, False])
@pytest.mark.parametrize("form", [None, "unit", "diagonal", "kronecker"])
def test_a_second_name_changes_nothing(form, deep, options):
    """Not the steps, not the blocks, not what is saved: bit for bit."""
    x, results = data(), []
    chosen = {"num_particles": 3, "average": False} | options
    for names in (["one"], ["one", "one2"], ["m", "one"], ["one", "m"]):
        pyro.clear_param_store()
        model, guide, weight = tied(names, deep)
        optim = pyro.optim.Adam({"lr": 0.05})
        if form is None:
            svi = ph.RWS(model, guide, optim, **chosen)
        else:
            svi = ph.NaturalRWS(model, guide, optim, fisher=form, **chosen)
        torch.manual_seed(1)
        losses = [svi.step(x) for _ in range(3)]
        state = copy.deepcopy(svi.state_dict())
        losses += [svi.step(x) for _ in range(2)]
        after = weight.detach().clone()
        svi.load_state_dict(state)
        assert [svi.step(x) for _ in range(2)] == losses[3:]
        assert torch.equal(weight, after)

        found = svi.directions(x)
        (mine,) = {f"{name}$$$weight" for name in names} & found.gradient.keys()
        if form is not None:
            assert [block for block in found.fisher.blocks if mine in block.params]
            rows = [row.params for row in svi.structure(x).rows]
            assert sum(f"{name}$$$weight" in row for name in names for row in rows) == 1
        results.append((losses, found.gradient[mine], found.natural[mine], after))
    assert all(equal(other, results[0]) for other in results[1:])
