"""One joint step equals Pyro's own, parameter by parameter, bit for bit."""

import copy

import pyro
import pyro.distributions as dist
import pytest
import torch

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
