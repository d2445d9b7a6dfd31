"""Pyro's own traps: each is right here, or a clear error."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_helmholtz import RWS, NaturalRWS
from pyro_helmholtz.trace import Programs, wake_trace

from .programs import SBN, snapshot

X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 1.0, 0.0]], dtype=torch.float64)


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def test_scale_is_not_inside_the_logsumexp():
    sbn = SBN()
    args = dict(num_particles=6, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    plain = wake_trace(sbn.model, sbn.guide, (X,), {}, **args)
    pyro.set_rng_seed(1)
    scaled = wake_trace(
        poutine.scale(sbn.model, 30.0), poutine.scale(sbn.guide, 30.0), (X,), {}, **args
    )
    assert torch.equal(plain.log_weights, scaled.log_weights)
    assert float(scaled.bound()) == pytest.approx(30 * float(plain.bound()), rel=1e-12)


def test_weights_are_per_datum_not_joint():
    sbn = SBN()
    wake = wake_trace(sbn.model, sbn.guide, (X,), {}, num_particles=6)
    (weights,) = wake.weights().values()
    assert torch.allclose(weights.sum(0), torch.ones(2, dtype=torch.float64))
    assert not torch.allclose(weights[:, 0], weights[:, 1])


def ignoring(x, observations=None):
    with pyro.plate("data", 2):
        pyro.sample("h", dist.Bernoulli(logits=pyro.param("a", torch.ones(2)) * x[:, 0]))


def one_latent(x, observations=None):
    with pyro.plate("data", 2):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)))
        logits = h[..., None] * torch.ones(3)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)


def test_guide_that_ignores_observations_still_sees_the_dream():
    dream = Programs(one_latent, ignoring, 2).dream((X.float(),), {})
    seen = dream.guide.nodes["h"]["fn"].logits
    assert torch.equal(seen, dream.model.nodes["x"]["value"][:, 0])


def test_guide_that_ignores_observations_where_identity_fails_is_an_error():
    def model(x, observations=None):
        one_latent(x + 0.0)

    svi = RWS(model, ignoring, num_particles=2)
    with pytest.raises(ValueError, match="ignores the dream of site 'x'"):
        svi.step(X.float())
    assert torch.equal(pyro.param("a"), torch.ones(2))


def test_plate_of_the_datas_length_in_the_sleep_phase():
    sbn = SBN()
    dream = Programs(sbn.model, sbn.guide, 7).dream((X,), {})
    assert dream.args[0].shape == X.shape
    for name in ("h1", "h2"):
        site = dream.guide.nodes[name]
        assert [f.size for f in site["cond_indep_stack"]] == [2]
        assert site["scale"] == 1.0
        assert site["fn"].batch_shape == (2,)


def test_deterministic_in_a_plate_under_dreams():
    def model(x):
        with pyro.plate("data", 2):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)))
            m = pyro.deterministic("m", h[..., None] * torch.ones(3), event_dim=1)
            pyro.sample("x", dist.Bernoulli(logits=m).to_event(1), obs=x)

    def guide(x):
        ignoring(x)

    dream = Programs(model, guide, 4).dream((X.float(),), {})
    node = dream.model.nodes
    assert torch.equal(node["m"]["value"], node["h"]["value"][:, None] * torch.ones(3))
    assert math.isfinite(RWS(model, guide, num_particles=4).step(X.float()))
    assert math.isfinite(NaturalRWS(model, guide, num_particles=4).step(X.float()))


def test_factor_counts_in_the_wake_phase():
    def model(x, factor):
        with pyro.plate("data", 2):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)))
            pyro.sample("x", dist.Bernoulli(logits=h[..., None] * torch.ones(3)).to_event(1), obs=x)
            if factor:
                pyro.factor("bonus", 2.0 * h)

    def guide(x, factor):
        ignoring(x)

    args = dict(num_particles=4, max_plate_nesting=1)
    pyro.set_rng_seed(2)
    without = wake_trace(model, guide, (X.float(), False), {}, **args)
    pyro.set_rng_seed(2)
    with_it = wake_trace(model, guide, (X.float(), True), {}, **args)
    h = with_it.guide.nodes["h"]["value"]
    assert torch.allclose(with_it.log_weights - without.log_weights, 2.0 * h)
    for front in (RWS, NaturalRWS):
        svi = front(model, guide, num_particles=4, sleep_weight=0.0)
        assert math.isfinite(svi.step(X.float(), True))
        with pytest.raises(ValueError, match="site 'bonus' is a pyro.factor"):
            front(model, guide, num_particles=4).step(X.float(), True)


def test_model_latent_missing_from_the_guide_is_not_drawn_from_the_prior():
    sbn = SBN()

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(logits=sbn.q1(x)).to_event(1))

    with pytest.raises(ValueError, match="latent site 'h2'.*missing from the guide"):
        RWS(sbn.model, guide, num_particles=2).step(X)


def test_indexed_data_break_identity():
    sbn = SBN()

    def model(x):
        sbn.model(x[torch.tensor([1, 0])])

    with pytest.raises(ValueError, match="site 'x' is none of the arguments"):
        RWS(model, sbn.guide, num_particles=2).step(X)
    RWS(model, sbn.guide, num_particles=2, sleep_weight=0.0).step(X)


OPTIMISERS = {
    "adam": lambda: pyro.optim.Adam({"lr": 0.01}),
    "clipped": lambda: pyro.optim.ClippedAdam({"lr": 0.01, "clip_norm": 5.0}),
    "momentum": lambda: pyro.optim.SGD({"lr": 0.01, "momentum": 0.9, "nesterov": True}),
    "schedule": lambda: pyro.optim.ExponentialLR(
        {"optimizer": torch.optim.SGD, "optim_args": {"lr": 0.01}, "gamma": 0.9}
    ),
    "per parameter": lambda: pyro.optim.SGD(lambda name: {"lr": 0.0 if "top" in name else 0.01}),
}


@pytest.mark.parametrize("name", OPTIMISERS)
@pytest.mark.parametrize("front", [RWS, NaturalRWS])
def test_optimiser_per_parameter(front, name):
    sbn = SBN()
    svi = front(sbn.model, sbn.guide, OPTIMISERS[name](), num_particles=4)
    svi.step(X)
    before = snapshot()
    svi.step(X)
    moved = {k for k, v in snapshot().items() if not torch.equal(v, before[k])}
    expected = set(before) - ({"down$$$top"} if name == "per parameter" else set())
    assert moved == expected
    assert all(p.grad is None for p in sbn.down.parameters())


def test_plain_sgd_takes_the_direction():
    sbn = SBN()
    svi = NaturalRWS(sbn.model, sbn.guide, pyro.optim.SGD({"lr": 0.1}), num_particles=4)
    svi.step(X)
    before = snapshot()
    state = torch.get_rng_state()
    found = svi.directions(X)
    torch.set_rng_state(state)
    svi.step(X)
    for name, value in snapshot().items():
        torch.testing.assert_close(value, before[name] + 0.1 * found.natural[name])


def test_enumeration_marks():
    for mark in ("parallel", "sequential"):
        model = pyro.infer.config_enumerate(one_latent, default=mark)
        with pytest.raises(ValueError, match="'h' of the model is marked for enumeration"):
            RWS(model, ignoring, num_particles=2).step(X.float())
