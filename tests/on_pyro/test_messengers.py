"""The handlers that run programs do what the host's own do, one by one."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from torch.distributions import constraints

from pyro_helmholtz.checks import PARTICLES, check_observations
from pyro_helmholtz.estimators.base import score
from pyro_helmholtz.messengers import Particles, record
from pyro_helmholtz.sites import parameters, site_log_prob, stochastic_sites
from pyro_helmholtz.trace import Programs

K, B, D = 3, 4, torch.float64


class Constant(poutine.messenger.Messenger):
    """Samples as constants, by the host's own dispatch."""

    def _pyro_post_sample(self, msg):
        msg["value"] = msg["value"].detach()


def program(x):
    """Global and plated sites, masks, scales, a batched parameter and a sequential plate."""
    rate = pyro.param("rate", torch.full((B,), 0.5, dtype=D), constraint=constraints.positive)
    top = pyro.sample("top", dist.Normal(torch.zeros((), dtype=D), 1.0))
    with pyro.plate("data", B, dim=-1):
        z = pyro.sample("z", dist.Gamma(2.0 + 0.0 * rate, rate))
        with poutine.mask(mask=torch.tensor([True, False, True, True])), poutine.scale(scale=3.0):
            logits = torch.stack([z, top + z], -1)
            b = pyro.sample("b", dist.Bernoulli(logits=logits).to_event(1))
        for i in pyro.plate("turns", 2):
            pyro.sample(f"w{i}", dist.Normal(b.sum(-1), 1.0))
        pyro.deterministic("mean", z + 1)
        pyro.sample("x", dist.Normal(z, 1.0), obs=x)


def of_host(fn, x, samples=None):
    """The trace by the host's handlers."""
    torch.manual_seed(0)
    if samples is not None:
        fn = poutine.replay(fn, trace=samples)
    with Constant(), pyro.plate(PARTICLES, K, dim=-2):
        return poutine.trace(fn).get_trace(x)


def of_ours(fn, x, samples=None):
    """The trace by the library's."""
    torch.manual_seed(0)
    with Particles(K, -2, constant=True):
        return record(fn, (x,), {}, samples)


@pytest.mark.parametrize("replayed", [False, True])
def test_the_same_trace_as_by_the_hosts_handlers(replayed):
    pyro.clear_param_store()
    x = torch.randn(B, dtype=D)
    first = of_host(program, x)
    samples = first if replayed else None
    # the library draws Bernoulli sites in its own way: give both the same
    known = poutine.Trace()
    known.add_node("b", **first.nodes["b"])
    theirs, ours = (run(program, x, samples or known) for run in (of_host, of_ours))
    assert list(theirs.nodes)[1:-1] == [n for n in ours.nodes if not n.startswith("_")]
    for name, site in stochastic_sites(theirs):
        other = ours.nodes[name]
        assert torch.equal(site["value"], other["value"])
        assert not other["value"].requires_grad
        assert site["cond_indep_stack"] == other["cond_indep_stack"]
        assert site["fn"].batch_shape == other["fn"].batch_shape
        assert site["scale"] == other["scale"] and site["is_observed"] == other["is_observed"]
        theirs.compute_log_prob()
        log_prob = site_log_prob(other)
        assert torch.allclose(log_prob * other["scale"], site["log_prob"], rtol=1e-12, atol=0)
        assert log_prob.shape == site["log_prob"].shape


def test_quick_draws_and_log_densities_of_bernoulli_sites():
    logits = torch.randn(2, 5, 6, dtype=D, requires_grad=True)

    def guide():
        with pyro.plate("data", 5):
            pyro.sample("b", dist.Bernoulli(logits=logits.mean(0)).to_event(1))

    pyro.set_rng_seed(1)
    with pyro.validation_enabled(False), Particles(20_000, -2, constant=True):
        site = record(guide, (), {}).nodes["b"]
    mean, truth = site["value"].mean(0), torch.sigmoid(logits.mean(0))
    assert ((mean - truth).abs() < 5 * (truth * (1 - truth) / 20_000).sqrt()).all()
    ours, theirs = site_log_prob(site), site["fn"].log_prob(site["value"])
    assert torch.allclose(ours, theirs, rtol=1e-12, atol=0)
    one, other = (torch.autograd.grad(value.sum(), logits)[0] for value in (ours, theirs))
    assert torch.allclose(one, other, rtol=1e-10, atol=1e-10)


def test_the_same_log_density_to_the_bit_where_the_host_validates():
    logits = torch.randn(7, 50)
    for batch in ((7,), (3, 7)):
        fn = dist.Bernoulli(logits=logits).to_event(1).expand(batch)
        site = {"name": "b", "value": fn.sample(), "mask": None, "args": (), "kwargs": {}}
        with pyro.validation_enabled(True):
            checked = dist.Bernoulli(logits=logits).to_event(1).expand(batch)
            first = site_log_prob({**site, "fn": checked})
            with pytest.raises(ValueError, match="'b'"):
                site_log_prob({**site, "fn": checked, "value": site["value"] + 0.5})
        with pyro.validation_enabled(False):
            later = site_log_prob(
                {**site, "fn": dist.Bernoulli(logits=logits).to_event(1).expand(batch)}
            )
            asked = dist.Bernoulli(logits=logits, validate_args=True).to_event(1).expand(batch)
            with pytest.raises(ValueError, match="'b'"):
                site_log_prob({**site, "fn": asked, "value": site["value"] + 0.5})
        assert torch.equal(first, later) and first.shape == batch


def test_a_name_used_twice_and_a_replayed_parameter_are_refused():
    def twice():
        pyro.sample("a", dist.Normal(0.0, 1.0))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    def both():
        pyro.param("a", torch.zeros(()))
        pyro.sample("a", dist.Normal(0.0, 1.0))

    pyro.clear_param_store()
    for fn in (twice, both):
        with pytest.raises(RuntimeError, match="a"):
            record(fn, (), {})
    samples = poutine.Trace()
    samples.add_node("a", name="a", type="param", is_observed=False, value=torch.zeros(()))
    with pytest.raises(RuntimeError, match="site a must be sampled"):
        record(lambda: pyro.sample("a", dist.Normal(0.0, 1.0)), (), {}, samples)


@pytest.mark.parametrize("bad", [0.5, 2.0, -1.0, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("event", [False, True])
def test_binary_data_are_checked_in_every_step(bad, event):
    def model(x):
        with pyro.plate("data", 4):
            fn = dist.Bernoulli(logits=torch.zeros(4, 3))
            pyro.sample("x", fn.to_event(1), obs=x) if event else None
            pyro.sample("y", dist.Bernoulli(0.5), obs=x[:, 0])

    x = torch.tensor([0.0, 1.0, 1.0])
    data = x.expand(4, 3).clone()
    for kind in (torch.float32, torch.float64, torch.int64, torch.uint8, torch.bool):
        check_observations(poutine.trace(model).get_trace(data.to(kind)))
    data[2, 0] = bad
    with pyro.validation_enabled(False), pytest.raises(ValueError, match="site '[xy]'"):
        check_observations(poutine.trace(model).get_trace(data))


def test_log_densities_add_up_where_scales_are_tensors():
    scale = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=D)
    loc = torch.zeros(B, dtype=D, requires_grad=True)

    def model(x):
        with pyro.plate("data", B):
            with poutine.scale(scale=scale):
                pyro.sample("a", dist.Normal(loc, 1.0), obs=x)
                pyro.sample("b", dist.Normal(2 * loc, 1.0), obs=x)
            pyro.sample("c", dist.Normal(3 * loc, 1.0), obs=x)

    x = torch.randn(B, dtype=D)
    wake = Programs(model, lambda x: None, 2, 1).wake((x,), {})
    weights = torch.tensor([[0.3], [0.7]], dtype=D).expand(2, B)
    total = score(wake.model, wake.layout, {(): weights}) * wake.layout.num_data
    terms = [dist.Normal(k * loc, 1.0).log_prob(x) for k in (1, 2, 3)]
    truth = (scale * (terms[0] + terms[1]) + terms[2]).sum()
    assert torch.allclose(total, truth, rtol=1e-12)
    assert torch.allclose(wake.log_weights, sum(terms).detach().expand(2, B), rtol=1e-12)


def test_a_parameter_that_a_plate_subsamples_is_found_whole():
    def model(x):
        with pyro.plate("data", 6, subsample=torch.tensor([1, 4])):
            loc = pyro.param("loc", torch.zeros(6, dtype=D), event_dim=0)
            assert loc.shape == (2,)
            pyro.sample("x", dist.Normal(loc, 1.0), obs=x)

    pyro.clear_param_store()
    x = torch.tensor([1.0, -2.0], dtype=D)
    wake = Programs(model, lambda x: None, 2, 1).wake((x,), {})
    leaf = parameters(wake.model)["loc"]
    assert leaf is pyro.get_param_store()._params["loc"]
    surrogate = score(wake.model, wake.layout, wake.uniform())
    (gradient,) = torch.autograd.grad(surrogate, leaf)
    expected = torch.tensor([0.0, 0.5, 0.0, 0.0, -1.0, 0.0], dtype=D)
    assert torch.allclose(gradient, expected, rtol=1e-12)
