"""Held-out log-likelihoods against enumeration, closed forms and arviz."""

import itertools
import math
from typing import NamedTuple

import arviz
import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_helmholtz import evaluation
from pyro_helmholtz.evaluation import log_likelihood


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def sbn(widths=(4, 3, 2), guide_scale=1.0):
    """A sigmoid belief network in float64, its guide, and its layers."""
    pairs = list(itertools.pairwise(widths))
    down = nn.ModuleList(nn.Linear(b, a) for a, b in pairs).double()
    up = nn.ModuleList(nn.Linear(a, b) for a, b in pairs).double()
    prior = torch.randn(widths[-1], dtype=torch.float64)
    with torch.no_grad():
        for p in down.parameters():
            p.normal_()
        for p in up.parameters():
            p.normal_().mul_(guide_scale)

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            h = pyro.sample(f"h{len(down)}", dist.Bernoulli(logits=prior).to_event(1))
            for i in range(len(down) - 1, 0, -1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=down[i](h)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=down[0](h)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            h = x
            for i, layer in enumerate(up, start=1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=layer(h)).to_event(1))

    return model, guide, down, prior


def patterns(n):
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


def enumerated(x, down, prior):
    """``log p(x)`` by the sum over all latents."""
    total = []
    for h2, h1 in itertools.product(patterns(2), patterns(3)):
        log_p = dist.Bernoulli(logits=prior).log_prob(h2).sum()
        log_p = log_p + dist.Bernoulli(logits=down[1](h2)).log_prob(h1).sum()
        total.append(log_p + dist.Bernoulli(logits=down[0](h1)).log_prob(x).sum(-1))
    return torch.stack(total).logsumexp(0).detach()


def within_four_errors(result, exact):
    error = (1 / result.ess - 1 / result.num_particles).clamp(min=0).sqrt()
    return ((result.values - exact).abs() <= 4 * error + 1e-9).all()


def stub(monkeypatch, log_weights, by_row=False):
    """Makes the programs' log-weights those of ``log_weights``, taken from the top."""
    state = {"done": 0}

    class Wake:
        guide = pyro.poutine.Trace()

    def wake_trace(model, guide, args, kwargs, *, num_particles, **rest):
        start = state["done"]
        state["done"] = (start + num_particles) % len(log_weights)
        wake = Wake()
        columns = args[0].long() if by_row else slice(None)
        wake.log_weights = log_weights[start : start + num_particles][:, columns]
        return wake

    monkeypatch.setattr(evaluation, "wake_trace", wake_trace)
    return {"max_plate_nesting": 1, "num_particles": len(log_weights)}


def test_agrees_with_enumeration():
    model, guide, down, prior = sbn(guide_scale=0.3)
    x = patterns(4)
    result = log_likelihood(model, guide, x, num_particles=20_000, particles_at_once=5_000)
    exact = enumerated(x, down, prior)
    assert result.values.dtype == torch.float64
    assert within_four_errors(result, exact)
    assert (result.values - exact).abs().max() < 0.1
    assert result.mean == pytest.approx(result.values.mean().item())
    assert result.stderr == pytest.approx(result.values.std().item() / math.sqrt(16))
    assert result.num_particles == 20_000
    assert "n_data=16" in repr(result)


@pytest.mark.parametrize("exact_guide", [True, False])
def test_agrees_with_the_linear_gaussian_closed_form(exact_guide):
    weight = torch.randn(3, 2, dtype=torch.float64)
    offset, sigma = torch.randn(3, dtype=torch.float64), 0.7
    precision = torch.eye(2, dtype=torch.float64) + weight.T @ weight / sigma**2
    x = torch.randn(6, 3, dtype=torch.float64) * 2

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(x.new_zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ weight.T + offset, sigma).to_event(1), obs=x)

    def guide(x):
        mean = (x - offset) @ weight @ torch.linalg.inv(precision) / sigma**2
        with pyro.plate("data", len(x)):
            scale = 1.0 if exact_guide else 0.5
            pyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision * scale))

    covariance = weight @ weight.T + sigma**2 * torch.eye(3, dtype=torch.float64)
    exact = dist.MultivariateNormal(offset, covariance).log_prob(x)
    result = log_likelihood(model, guide, x, num_particles=2_000, particles_at_once=300)
    if exact_guide:
        torch.testing.assert_close(result.values, exact)
        torch.testing.assert_close(result.ess, torch.full_like(exact, 2_000))
    else:
        assert within_four_errors(result, exact)
        assert (result.khat < 0.7).all()


@pytest.mark.parametrize("num_particles", [1, 3, 24, 25, 60, 226, 1_000, 3_001])
def test_chunks_equal_one_pass_and_arviz(monkeypatch, num_particles):
    log_weights = 3 * torch.randn(num_particles, 4, dtype=torch.float64) - 700
    log_weights[:, 1] *= 2
    options = stub(monkeypatch, log_weights)
    whole = log_likelihood(None, None, particles_at_once=num_particles, **options)
    pieces = log_likelihood(None, None, particles_at_once=7, **options)
    for name in ("values", "ess", "khat"):
        torch.testing.assert_close(getattr(pieces, name), getattr(whole, name))
    torch.testing.assert_close(whole.values, log_weights.logsumexp(0) - math.log(num_particles))
    weights = log_weights.softmax(0)
    torch.testing.assert_close(whole.ess, 1 / (weights**2).sum(0))
    if num_particles == 1:
        assert (whole.khat == math.inf).all()
        return
    _, khat = arviz.psislw(log_weights.T.numpy())
    np.testing.assert_allclose(pieces.khat.numpy(), khat, rtol=1e-9)
    tail = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    assert pieces.tail.shape == (4, tail + 1)


def test_ess_and_khat_of_a_program_equal_arviz():
    model, guide, *_ = sbn((4, 10, 10))
    x = patterns(4)[:3]
    result = log_likelihood(model, guide, x, num_particles=1_000, particles_at_once=1_000)
    pyro.set_rng_seed(1)
    first = log_likelihood(model, guide, x, num_particles=1_000, max_plate_nesting=1)
    pyro.set_rng_seed(1)
    chunks = [
        evaluation.wake_trace(model, guide, (x,), {}, num_particles=100, max_plate_nesting=1)
        for _ in range(10)
    ]
    log_weights = torch.cat([chunk.log_weights for chunk in chunks]).detach()
    smooth, khat = arviz.psislw(log_weights.T.numpy())
    np.testing.assert_allclose(first.khat.numpy(), khat, rtol=1e-9)
    torch.testing.assert_close(first.ess, 1 / (log_weights.softmax(0) ** 2).sum(0))
    assert result.ess.shape == result.khat.shape == (3,)


def test_zero_weights_count_as_zero(monkeypatch):
    log_weights = torch.randn(200, 2)
    log_weights[::2] = -math.inf
    result = log_likelihood(None, None, particles_at_once=1, **stub(monkeypatch, log_weights))
    torch.testing.assert_close(result.values, log_weights.logsumexp(0) - math.log(200))
    assert torch.isfinite(result.ess).all()
    assert result.values.dtype == torch.float32


def test_batch_gives_the_same_data_in_the_same_order(monkeypatch):
    log_weights = torch.randn(50, 7, dtype=torch.float64)
    options = stub(monkeypatch, log_weights, by_row=True)
    rows = torch.arange(7.0)
    whole = log_likelihood(None, None, rows, **options)
    parts = log_likelihood(None, None, rows, batch=3, particles_at_once=20, **options)
    for name in ("values", "ess", "khat"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


def test_batch_slices_every_tensor_as_long_as_the_first():
    seen = []

    def model(x, pair, *, labels, table):
        seen.append([len(x), len(pair[0]), len(labels), len(table)])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z + labels + pair[0], 1.0), obs=x)

    def guide(x, pair, *, labels, table):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal((x - labels - pair[0]) / 2, math.sqrt(0.5)))

    x, labels, extra = torch.randn(3, 5)
    result = log_likelihood(
        model,
        guide,
        x,
        (extra,),
        labels=labels,
        table=torch.zeros(4),
        num_particles=30,
        batch=2,
        progress=True,
    )
    exact = dist.Normal(labels + extra, math.sqrt(2)).log_prob(x)
    torch.testing.assert_close(result.values, exact)
    assert {tuple(lengths) for lengths in seen} == {(2, 2, 2, 4), (1, 1, 1, 4)}


def test_nothing_is_changed():
    model, guide, down, _ = sbn()
    model(patterns(4))
    before = {k: v.detach().clone() for k, v in pyro.get_param_store().items()}
    result = log_likelihood(model, guide, patterns(4), num_particles=50)
    assert torch.is_grad_enabled()
    assert not result.values.requires_grad
    for name, value in before.items():
        param = pyro.param(name)
        assert torch.equal(param, value) and param.requires_grad and param.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be an int of at least 1"),
        ({"num_particles": 2.5}, "num_particles must be an int of at least 1, got 2.5"),
        ({"particles_at_once": 0}, "particles_at_once must be an int of at least 1"),
        ({"batch": 0}, "batch must be an int of at least 1"),
    ],
)
def test_counts_below_one_are_errors(options, message):
    model, guide, *_ = sbn()
    with pytest.raises(ValueError, match=message):
        log_likelihood(model, guide, patterns(4), **options)


def test_empty_data_is_an_error(monkeypatch):
    model, guide, *_ = sbn()
    with pytest.raises(ValueError, match="no data"):
        log_likelihood(model, guide, patterns(4)[:0])
    options = stub(monkeypatch, torch.zeros(5, 0))
    with pytest.raises(ValueError, match="no datum"):
        log_likelihood(None, None, **options)
    with pytest.raises(ValueError, match="needs a tensor"):
        log_likelihood(None, None, batch=2, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_errors(monkeypatch, value):
    log_weights = torch.zeros(40, 3)
    log_weights[33, 2] = value
    options = stub(monkeypatch, log_weights)
    with pytest.raises(ValueError, match=rf"datum 2 is {value} \(1 of 3 data"):
        log_likelihood(None, None, particles_at_once=10, **options)


def test_data_that_the_model_excludes_are_an_error(monkeypatch):
    log_weights = torch.zeros(40, 3)
    log_weights[:, 1] = -math.inf
    with pytest.raises(ValueError, match="all 40 log-weights of datum 1 are -inf"):
        log_likelihood(None, None, **stub(monkeypatch, log_weights))


def test_batch_with_weights_that_do_not_separate_is_an_error():
    def model(x):
        z = pyro.sample("z", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="do not separate by datum"):
        log_likelihood(model, guide, torch.randn(5), batch=2, num_particles=10)


class Batch(NamedTuple):
    """What a data loader may give."""

    x: torch.Tensor
    shift: torch.Tensor


def test_batch_slices_named_tuples():
    def model(b):
        with pyro.plate("data", len(b.x)):
            z = pyro.sample("z", dist.Normal(b.shift, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=b.x)

    def guide(b):
        with pyro.plate("data", len(b.x)):
            pyro.sample("z", dist.Normal((b.x + b.shift) / 2, math.sqrt(0.5)))

    b = Batch(*torch.randn(2, 5))
    result = log_likelihood(model, guide, b, num_particles=3, batch=2)
    exact = dist.Normal(b.shift, math.sqrt(2)).log_prob(b.x)
    torch.testing.assert_close(result.values, exact)
