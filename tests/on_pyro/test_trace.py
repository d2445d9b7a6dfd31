"""Traces: per-datum log-weights, plates, masks and scales, against sums by hand."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine

from pyro_helmholtz import RWS
from pyro_helmholtz.trace import Programs, wake_trace

K = 5
F64 = torch.float64


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def normal(loc, scale=1.0):
    return dist.Normal(torch.as_tensor(loc, dtype=F64), torch.tensor(scale, dtype=F64))


def value(wake, name):
    return wake.guide.nodes[name]["value"]


def by_hand(p, q):
    """Sum the terms of p minus those of q."""
    return sum(p) - sum(q)


def close(a, b):
    torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


DATA = torch.linspace(-1, 1, 4, dtype=F64)


def simple_model(x):
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", normal(0.5))
        pyro.sample("x", normal(z, 0.7), obs=x)


def simple_guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("z", normal(0.3 * x, 0.9))


def simple_weights(z, x):
    return normal(0.5).log_prob(z) + normal(z, 0.7).log_prob(x) - normal(0.3 * x, 0.9).log_prob(z)


def test_per_datum_weights_and_bound():
    wake = wake_trace(simple_model, simple_guide, (DATA,), {}, num_particles=K)
    expected = simple_weights(value(wake, "z"), DATA)
    assert expected.shape == (K, 4)
    close(wake.log_weights, expected)
    close(wake.bound(), (expected.logsumexp(0) - math.log(K)).sum())
    (weights,) = wake.weights().values()
    close(weights.reshape(K, 4), expected.softmax(0))
    assert wake.layout.num_data == 4


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float32, 0.1), (F64, 0.04)])
def test_negligible_weights_are_zero_and_no_product_is_subnormal(dtype, scale):
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))
            pyro.sample("x", dist.Normal(z, scale), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(torch.zeros((), dtype=dtype), 1.0))

    limits = torch.finfo(dtype)
    wake = wake_trace(model, guide, (DATA.to(dtype),), {}, num_particles=2000)
    (weights,) = wake.weights().values()
    exact = wake.log_weights.double().softmax(0)
    used = weights > 0
    lost = ~used & (exact > 0)
    assert lost.sum() > 20
    assert (weights[used] * limits.eps).min() >= limits.tiny
    assert exact[lost].sum() < limits.eps**2
    torch.testing.assert_close(weights[used].double(), exact[used], rtol=1e3 * limits.eps, atol=0)

    wake.per_turn = {
        k: v.index_fill(0, torch.tensor(0), math.nan) for k, v in wake.per_turn.items()
    }
    assert torch.stack(list(wake.weights().values())).isnan().all()


def test_samples_are_constants():
    def guide(x):
        a = pyro.param("a", torch.zeros(4, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", normal(0.0).__class__(a, torch.ones(4, dtype=F64)))

    wake = wake_trace(simple_model, guide, (DATA,), {}, num_particles=K)
    assert not value(wake, "z").requires_grad
    assert not wake.model.nodes["x"]["fn"].loc.requires_grad


def test_nested_plates_shared_by_all_sites():
    x = torch.randn(3, 4, dtype=F64)

    def model(x):
        with pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 3, dim=-2):
            z = pyro.sample("z", normal(0.0))
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("outer", 4, dim=-1), pyro.plate("inner", 3, dim=-2):
            pyro.sample("z", normal(x))

    wake = wake_trace(model, guide, (x,), {}, num_particles=K)
    z = value(wake, "z")
    expected = normal(0.0).log_prob(z) + normal(z).log_prob(x) - normal(x).log_prob(z)
    close(wake.log_weights, expected.flatten(1))
    assert wake.log_weights.shape == (K, 12)
    assert wake.layout.num_data == 12


def test_inner_plate_is_summed_where_a_latent_is_outside():
    x = torch.randn(3, 4, dtype=F64)

    def model(x):
        with pyro.plate("data", 4, dim=-1):
            z = pyro.sample("z", normal(0.0))
            with pyro.plate("pixels", 3, dim=-2):
                pyro.sample("x", normal(z), obs=x)

    def guide(x):
        with pyro.plate("data", 4, dim=-1):
            pyro.sample("z", normal(x.mean(0)))

    wake = wake_trace(model, guide, (x,), {}, num_particles=K)
    z = value(wake, "z").reshape(K, 4)
    expected = (
        normal(0.0).log_prob(z)
        + normal(z[:, None]).log_prob(x).sum(1)
        - normal(x.mean(0)).log_prob(z)
    )
    close(wake.log_weights, expected)


def test_latent_outside_the_data_plate_makes_the_weights_joint():
    def model(x):
        z = pyro.sample("z", normal(0.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", normal(z), obs=x)

    def guide(x):
        pyro.sample("z", normal(x.mean()))

    wake = wake_trace(model, guide, (DATA,), {}, num_particles=K)
    z = value(wake, "z").reshape(K, 1)
    expected = (
        normal(0.0).log_prob(z)
        + normal(z).log_prob(DATA).sum(1, keepdim=True)
        - normal(DATA.mean()).log_prob(z)
    )
    close(wake.log_weights, expected)
    assert wake.layout.num_data == 4


def test_subsampled_plate():
    full = torch.randn(10, dtype=F64)

    def model(x):
        with pyro.plate("data", 10, subsample_size=4) as i:
            z = pyro.sample("z", normal(0.5))
            pyro.sample("x", normal(z, 0.7), obs=x[i])

    def guide(x):
        with pyro.plate("data", 10, subsample_size=4) as i:
            pyro.sample("z", normal(0.3 * x[i], 0.9))

    wake = wake_trace(model, guide, (full,), {}, num_particles=K)
    x = wake.model.nodes["x"]["value"]
    assert torch.equal(x, full[wake.guide.nodes["data"]["value"]])
    expected = simple_weights(value(wake, "z"), x)
    close(wake.log_weights, expected)
    close(wake.bound(), 2.5 * (expected.logsumexp(0) - math.log(K)).sum())
    assert wake.layout.num_data == 10


def test_poutine_scale_stays_outside_the_exponent():
    model, guide = poutine.scale(simple_model, 3.0), poutine.scale(simple_guide, 3.0)
    wake = wake_trace(model, guide, (DATA,), {}, num_particles=K)
    expected = simple_weights(value(wake, "z"), DATA)
    close(wake.log_weights, expected)
    close(wake.bound(), 3.0 * (expected.logsumexp(0) - math.log(K)).sum())


@pytest.mark.parametrize("kind", ["poutine", "dist"])
def test_masked_entries_contribute_nothing(kind):
    mask = torch.tensor([True, False, True, True])

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.5))
            if kind == "poutine":
                with poutine.mask(mask=mask):
                    pyro.sample("x", normal(z, 0.7), obs=x)
            else:
                pyro.sample("x", normal(z, 0.7).mask(mask), obs=x)

    wake = wake_trace(model, simple_guide, (DATA,), {}, num_particles=K)
    z = value(wake, "z")
    expected = (
        normal(0.5).log_prob(z)
        + normal(z, 0.7).log_prob(DATA) * mask
        - normal(0.3 * DATA, 0.9).log_prob(z)
    )
    close(wake.log_weights, expected)


def test_to_event_and_deterministic_and_several_observed_sites():
    x, y = torch.randn(4, 3, dtype=F64), torch.randn(4, dtype=F64)

    def model(x, y):
        with pyro.plate("data", 4):
            z = pyro.sample("z", normal(torch.zeros(2)).to_event(1))
            s = pyro.deterministic("s", z.sum(-1))
            pyro.sample("x", normal(s[..., None] * torch.ones(3, dtype=F64)).to_event(1), obs=x)
            pyro.sample("y", normal(s), obs=y)

    def guide(x, y):
        with pyro.plate("data", 4):
            pyro.sample("z", normal(x[:, :2]).to_event(1))

    wake = wake_trace(model, guide, (x, y), {}, num_particles=K)
    z = value(wake, "z")
    s = z.sum(-1)
    expected = (
        normal(0.0).log_prob(z).sum(-1)
        + normal(s[..., None]).log_prob(x).sum(-1)
        + normal(s).log_prob(y)
        - normal(x[:, :2]).log_prob(z).sum(-1)
    )
    close(wake.log_weights, expected)


def test_skip_connection():
    def model(x):
        with pyro.plate("data", len(x)):
            a = pyro.sample("a", normal(0.0))
            b = pyro.sample("b", normal(a))
            pyro.sample("x", normal(a + 2 * b), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            b = pyro.sample("b", normal(x))
            pyro.sample("a", normal(b - x))

    wake = wake_trace(model, guide, (DATA,), {}, num_particles=K)
    a, b = value(wake, "a"), value(wake, "b")
    p = [normal(0.0).log_prob(a), normal(a).log_prob(b), normal(a + 2 * b).log_prob(DATA)]
    q = [normal(DATA).log_prob(b), normal(b - DATA).log_prob(a)]
    close(wake.log_weights, by_hand(p, q))


def test_sequential_plates_give_the_vectorised_programs_weights():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", normal(0.5))
            pyro.sample(f"x{i}", normal(z, 0.7), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", normal(0.3 * x[i], 0.9))

    wake = wake_trace(model, guide, (DATA,), {}, num_particles=K)
    z = torch.stack([value(wake, f"z{i}").reshape(K) for i in range(4)], 1)
    samples = poutine.Trace()
    samples.add_node("z", name="z", type="sample", is_observed=False, value=z, infer={})
    other = Programs(simple_model, simple_guide, K).wake((DATA,), {}, samples=samples)
    close(wake.log_weights, other.log_weights)
    close(wake.bound(), other.bound())
    assert wake.layout.num_data == other.layout.num_data == 4


def test_sequential_plate_direction_is_the_vectorised_one():
    theta = {"init": torch.tensor(0.3, dtype=F64)}

    def pmodel(x):
        t = pyro.param("t", theta["init"].clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(t, torch.ones((), dtype=F64)))
            pyro.sample("x", normal(z), obs=x)

    def smodel(x):
        t = pyro.param("t", theta["init"].clone())
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(t, torch.ones((), dtype=F64)))
            pyro.sample(f"x{i}", normal(z), obs=x[i])

    def sguide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", normal(0.3 * x[i], 0.9))

    from pyro_helmholtz.estimators.base import score

    wake = Programs(smodel, sguide, K).wake((DATA,), {})
    z = torch.stack([value(wake, f"z{i}").reshape(K) for i in range(4)], 1)
    samples = poutine.Trace()
    samples.add_node("z", name="z", type="sample", is_observed=False, value=z, infer={})
    other = Programs(pmodel, simple_guide, K).wake((DATA,), {}, samples=samples)
    leaf = pyro.get_param_store()._params["t"]
    found = [
        torch.autograd.grad(score(w.model, w.layout, w.weights()), leaf)[0] for w in (wake, other)
    ]
    close(found[0], found[1])


def test_evaluate_loss_is_minus_the_bound():
    pyro.set_rng_seed(3)
    wake = wake_trace(simple_model, simple_guide, (DATA,), {}, num_particles=K, max_plate_nesting=1)
    svi = RWS(simple_model, simple_guide, num_particles=K, max_plate_nesting=1, sleep_weight=0.0)
    pyro.set_rng_seed(3)
    assert svi.evaluate_loss(DATA) == pytest.approx(-float(wake.bound()), rel=1e-12)


def test_dream_draws_every_site_and_keeps_deterministic_shapes():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", normal(0.5))
            m = pyro.deterministic("m", 2 * z)
            pyro.sample("x", normal(m, 0.7), obs=x)

    dream = Programs(model, simple_guide, K).dream((DATA,), {})
    nodes = dream.model.nodes
    assert not torch.equal(nodes["x"]["value"], DATA)
    assert nodes["m"]["value"].shape == (4,)
    close(nodes["m"]["value"], 2 * nodes["z"]["value"])
    assert dream.args[0] is nodes["x"]["value"]
    assert dream.guide.nodes["z"]["value"] is nodes["z"]["value"]


def test_a_plate_of_global_latents_is_no_plate_of_data():
    def model(x):
        with pyro.plate("components", 3):
            mu = pyro.sample("mu", normal(torch.zeros(3, dtype=F64)))
        with pyro.plate("data", 4), pyro.plate("pixels", 2, dim=-2):
            pyro.sample("x", normal(mu.sum(-1, keepdim=True)), obs=x)

    def guide(x):
        with pyro.plate("components", 3):
            pyro.sample("mu", normal(torch.zeros(3, dtype=F64)))

    x = torch.randn(2, 4, dtype=F64)
    assert wake_trace(model, guide, (x,), {}, num_particles=K).layout.num_data == 8
    assert Programs(model, guide, K).dream((x,), {}).layout.num_data == 8
