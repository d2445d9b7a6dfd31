"""The bidirectional machine against enumeration: directions, log p̃*, Z², natural steps."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn

from pyro_helmholtz import (
    BiHM,
    BiHM_ELBO,
    LogPartition,
    NaturalBiHM,
    bidirectional_log_likelihood,
    log_likelihood,
    log_partition,
)
from pyro_helmholtz.trace import Programs

from .programs import SBN, patterns, snapshot
from .test_estimators import flat, mean_and_error, replayed, within
from .test_resume import check, of_modules, of_params

F64 = torch.float64
X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64)
K = 4
UP = 11  # parameters of the guide


@pytest.fixture
def sbn():
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    return SBN()


def log_root(sbn, x):
    """``log p̃*(x) = 2 log Σ_h √(p q)`` per datum by enumeration."""
    h1, h2 = sbn.latents()
    both = sbn.log_joint(x[:, None], h1, h2) + sbn.log_guide(x[:, None], h1, h2)
    return 2 * (both / 2).logsumexp(1)


def run_on(model, guide, x, samples, **options):
    """The estimator's pass on given samples."""
    estimator = BiHM_ELBO(next(iter(samples.values())).shape[0], **options)
    programs = estimator.programs(model, guide)
    programs.wake = partial(Programs.wake, programs, samples=replayed(samples))
    return estimator.run(programs, (x,), {})


def bits(n, k=K):
    h = torch.bernoulli(torch.full((k, n, 3), 0.5, dtype=F64))
    return {"h1": h[..., :2], "h2": h[..., 2:]}


def leaves(sbn):
    """All parameters, sorted by name, the model's first."""
    modules = sbn.down, sbn.up
    return [p for m in modules for _, p in sorted(m.named_parameters())]


def gradient(sbn, scalar):
    grads = torch.autograd.grad(scalar, leaves(sbn), retain_graph=True)
    return torch.cat([g.reshape(-1) for g in grads])


def draws(svi, n):
    found = [svi.directions(X).gradient for _ in range(n)]
    return torch.stack([torch.cat([flat(g, "down"), flat(g, "up")]) for g in found])


def direction_on(sbn, x, samples, model=None, guide=None, **options):
    done = run_on(model or sbn.model, guide or sbn.guide, x, samples, **options)
    return gradient(sbn, done.surrogate), float(done.loss)


def by_hand(sbn, x, samples, baseline=True):
    """Weights, directions and loss without the package."""
    log_p = sbn.log_joint(x, samples["h1"], samples["h2"])
    log_q = sbn.log_guide(x, samples["h1"], samples["h2"])
    root = ((log_p - log_q) / 2).detach().exp()
    w = root / root.sum(0)
    signed = w - 1 / len(w) if baseline else w
    value = (w * log_p + signed * log_q).sum() / len(x)
    return gradient(sbn, value), -2 * float(root.mean(0).log().sum())


@pytest.mark.parametrize("baseline", [True, False])
def test_direction_and_loss_on_given_samples(sbn, baseline):
    samples = bits(len(X))
    found, loss = direction_on(sbn, X, samples, baseline=baseline)
    expected, expected_loss = by_hand(sbn, X, samples, baseline)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    assert loss == pytest.approx(expected_loss, rel=1e-12)


def test_one_batch_or_two(sbn):
    samples = bits(6)
    x = patterns(3)[:6]
    whole, loss = direction_on(sbn, x, samples)
    first = direction_on(sbn, x[:2], {n: v[:, :2] for n, v in samples.items()})
    second = direction_on(sbn, x[2:], {n: v[:, 2:] for n, v in samples.items()})
    torch.testing.assert_close(whole, (2 * first[0] + 4 * second[0]) / 6, rtol=1e-12, atol=1e-14)
    assert loss == pytest.approx(first[1] + second[1], rel=1e-12)


def test_masks_and_scales(sbn):
    samples = bits(len(X))
    mask = torch.tensor([True, True, False])
    some, loss = direction_on(sbn, X[:2], {n: v[:, :2] for n, v in samples.items()})
    wrapped = [poutine.mask(f, mask=mask) for f in (sbn.model, sbn.guide)]
    found, masked_loss = direction_on(sbn, X, samples, *wrapped)
    torch.testing.assert_close(3 * found, 2 * some, rtol=1e-12, atol=1e-14)
    assert masked_loss == pytest.approx(loss, rel=1e-12)

    plain, loss = direction_on(sbn, X, samples)
    wrapped = [poutine.scale(f, 7.0) for f in (sbn.model, sbn.guide)]
    found, scaled_loss = direction_on(sbn, X, samples, *wrapped)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-14)
    assert scaled_loss == pytest.approx(7 * loss, rel=1e-12)


def test_a_subsample_carries_its_scale(sbn):
    found = []
    for size in (2, 50):

        def model(x, size=size):
            pyro.module("down", sbn.down)
            with pyro.plate("data", size, subsample=torch.arange(2)):
                h = pyro.sample("h", dist.Bernoulli(logits=sbn.p2(x[:, :1])).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=sbn.p1(h)).to_event(1), obs=x)

        def guide(x, size=size):
            pyro.module("up", sbn.up)
            with pyro.plate("data", size, subsample=torch.arange(2)):
                pyro.sample("h", dist.Bernoulli(logits=sbn.q1(x)).to_event(1))

        pyro.set_rng_seed(1)
        found.append(BiHM(model, guide, num_particles=K).directions(X[:2]))
    for name, value in found[0].gradient.items():
        torch.testing.assert_close(found[1].gradient[name], value, rtol=1e-12, atol=1e-14)
    assert found[1].loss == pytest.approx(25 * found[0].loss, rel=1e-12)


def test_both_directions_tend_to_the_exact_gradient(sbn):
    exact = gradient(sbn, log_root(sbn, X).mean())
    distance = []
    for k in (2, 50, 5000):
        values = draws(BiHM(sbn.model, sbn.guide, num_particles=k), 20)
        distance.append(float((values - exact).square().mean().sqrt()))
    assert distance[0] > 2 * distance[1] > 4 * distance[2]
    mean, error = mean_and_error(values)
    bias = float(exact.abs().max()) * 20 / 5000
    assert ((mean - exact).abs() <= 4.5 * error + bias).all()


def test_two_particles_have_the_enumerated_expectation(sbn):
    h1, h2 = sbn.latents()
    total = 0.0
    for x in X:
        log_p, log_q = sbn.log_joint(x, h1, h2), sbn.log_guide(x, h1, h2)
        root = ((log_p - log_q) / 2).detach().exp()
        prob = (log_q[:, None] + log_q).detach().exp()
        w = root[:, None] / (root[:, None] + root)
        value = log_p + log_q
        total = total + (prob * (w * value[:, None] + (1 - w) * value)).sum() / len(X)
    exact = gradient(sbn, total)
    spread = []
    for baseline in (True, False):
        svi = BiHM(sbn.model, sbn.guide, num_particles=2, baseline=baseline)
        found = draws(svi, 300)
        within(found, exact)
        spread.append(float(found[:, -UP:].var(0).sum()))
    assert spread[0] < 0.8 * spread[1]


def test_order_of_the_bounds(sbn):
    x = patterns(3)
    exact, log_p = log_root(sbn, x).detach(), sbn.log_likelihood(x)
    assert (exact < log_p).all()
    log_w = Programs(sbn.model, sbn.guide, K).wake((x,), {}).log_weights
    loss = -2 * ((log_w / 2).logsumexp(0) - math.log(K))
    assert (-loss > log_w.mean(0)).all()
    assert (-loss < log_w.logsumexp(0) - math.log(K)).all()
    # The estimate's mean is below log p̃*.
    values = [BiHM(sbn.model, sbn.guide, num_particles=2).evaluate_loss(x) for _ in range(400)]
    mean, error = mean_and_error(-torch.tensor(values))
    assert mean + 3 * error < float(exact.sum())


def test_as_elbo_of_the_hosts_svi(sbn):
    elbo = BiHM_ELBO(K, max_plate_nesting=1)
    pyro.set_rng_seed(2)
    expected = BiHM(sbn.model, sbn.guide, num_particles=K, max_plate_nesting=1).directions(X)
    pyro.set_rng_seed(2)
    assert elbo.loss_and_grads(sbn.model, sbn.guide, X) == pytest.approx(expected.loss)
    for name, leaf in pyro.get_param_store()._params.items():
        torch.testing.assert_close(leaf.grad, -3 * expected.gradient[name])
        leaf.grad = None
    pyro.set_rng_seed(2)
    assert elbo.loss(sbn.model, sbn.guide, X) == pytest.approx(expected.loss)
    pyro.set_rng_seed(2)
    svi = SVI(sbn.model, sbn.guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    assert svi.step(X) == pytest.approx(expected.loss)


@pytest.mark.parametrize("front", [BiHM, NaturalBiHM])
def test_learns(sbn, front):
    x = X[:2].repeat(8, 1)
    before = float(log_root(sbn, x).detach().mean())
    svi = front(sbn.model, sbn.guide, pyro.optim.SGD({"lr": 0.1}), num_particles=6)
    for _ in range(60):
        svi.step(x)
    assert float(log_root(sbn, x).detach().mean()) > before + 0.3


# natural steps -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["unit", "diagonal"])
def test_natural_is_the_dense_solve_with_the_machines_weights(sbn, form):
    options = {"fisher": form, "fisher_samples": "same", "tolerance": 1e-12, "damping": 0.3}
    svi = NaturalBiHM(sbn.model, sbn.guide, num_particles=K, max_plate_nesting=1, **options)
    pyro.set_rng_seed(3)
    found = svi.directions(X)
    assert set(found.natural) == set(found.gradient)
    for block in found.fisher.blocks:
        g, dense = block.gather(found.gradient), block.dense().detach()
        if form == "diagonal":
            dense = torch.diag_embed(dense.diagonal(dim1=1, dim2=2))
        root = torch.linalg.cholesky(dense + 0.3 * torch.eye(block.size, dtype=F64))
        expected = 1.3 * torch.cholesky_solve(g[..., None], root)[..., 0]
        torch.testing.assert_close(block.gather(found.natural), expected, rtol=1e-9, atol=1e-12)

    pyro.set_rng_seed(3)
    wake = Programs(sbn.model, sbn.guide, K, 1).wake((X,), {})
    w = (wake.log_weights / 2).softmax(0)
    h1 = wake.guide.nodes["h1"]["value"]
    features = torch.cat([h1, torch.ones(*h1.shape[:2], 1, dtype=F64)], -1)
    slope = torch.sigmoid(sbn.p1(h1)) * torch.sigmoid(-sbn.p1(h1))
    weight = w[..., None] * slope / len(X)
    expected = torch.einsum("sbj,sbi,sbk->jik", weight, features, features)
    block = next(b for b in found.fisher.blocks if "down$$$p1.weight" in b.params)
    torch.testing.assert_close(block.dense(), expected.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("make", [of_modules, of_params])
@pytest.mark.parametrize("options", [{}, {"fisher": "unit", "fisher_samples": "lagged"}])
def test_resume_of_the_natural_machine(make, options):
    check(make, lambda m, g: NaturalBiHM(m, g, num_particles=K, **options))


def test_resume_of_the_plain_machine():
    check(of_modules, lambda m, g: BiHM(m, g, pyro.optim.Adam({"lr": 0.05}), num_particles=K))


# bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [BiHM, NaturalBiHM])
def test_bad_input_names_the_site_and_changes_nothing(sbn, front):
    def guide(x):
        pyro.module("up", sbn.up)
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(logits=sbn.q1(x)).to_event(1))

    svi = front(sbn.model, sbn.guide, num_particles=K)
    svi.step(X)
    before = snapshot()
    with pytest.raises(ValueError, match="'x'.*NaN"):
        svi.step(torch.full_like(X, math.nan))
    with pytest.raises(ValueError, match="'h2'.*missing from the guide"):
        front(sbn.model, guide).step(X)
    assert all(torch.equal(v, before[n]) for n, v in snapshot().items())
    with torch.no_grad():
        sbn.p1.bias[0] = math.inf
    with pytest.raises((FloatingPointError, ValueError)):
        svi.step(X)


@pytest.mark.parametrize("make", [BiHM, NaturalBiHM])
def test_bad_options(sbn, make):
    with pytest.raises(ValueError, match="num_particles"):
        make(sbn.model, sbn.guide, num_particles=0)
    with pytest.raises(TypeError, match="sleep_weight"):
        make(sbn.model, sbn.guide, sleep_weight=0.5)
    with pytest.raises(TypeError, match="sleep_scale"):
        BiHM_ELBO(sleep_scale=2.0)
    with pytest.raises(ValueError, match="damping"):
        NaturalBiHM(sbn.model, sbn.guide, damping=0.0)


# the normalisation constant ------------------------------------------------------------------


def test_partition_agrees_with_enumeration(sbn):
    x = patterns(3)
    exact = float(log_root(sbn, x).detach().logsumexp(0))
    assert exact < -0.1
    found = {}
    for k in (1, 10):
        data = torch.zeros(2000, 3, dtype=F64)
        found[k] = log_partition(sbn.model, sbn.guide, data, num_dreams=10, num_particles=k)
        assert abs(found[k].value - exact) < 4.5 * found[k].stderr < 0.05
    assert found[10].stderr < found[1].stderr

    values = log_root(sbn, x).detach()
    plain = bidirectional_log_likelihood(sbn.model, sbn.guide, x, num_particles=20_000)
    assert (plain.values - values).abs().max() < 0.05
    pyro.set_rng_seed(0)
    same = log_likelihood(sbn.model, sbn.guide, x, num_particles=20, power=0.5)
    pyro.set_rng_seed(0)
    normal = bidirectional_log_likelihood(
        sbn.model, sbn.guide, x, num_particles=20, partition=found[10]
    )
    torch.testing.assert_close(normal.values, same.values - found[10].value)
    total = float((plain.values - found[10].value).exp().sum())
    assert total == pytest.approx(1, abs=0.05)


def test_mean_and_standard_error_of_the_ratio():
    r = torch.rand(50, 7, dtype=F64) * torch.arange(1, 8)
    log_r = r.log()
    found = LogPartition(torch.stack([log_r.logsumexp(0), (2 * log_r).logsumexp(0)]), 50)
    torch.testing.assert_close(found.values, r.mean(0).log(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.stderrs, r.std(0) / 50**0.5 / r.mean(0))
    assert found.value == pytest.approx(float(r.mean().log()), rel=1e-12)
    assert found.stderr == pytest.approx(float(r.std() / 350**0.5 / r.mean()), rel=1e-9)
    assert math.isnan(LogPartition(found.sums[:, :1], 1).stderr)


def test_partition_of_each_datum_with_its_own_input(sbn):
    """A model that conditions on c has a Z for each c."""
    net = nn.Linear(1, 2).double()

    def model(x, c):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h1", dist.Bernoulli(logits=3 * net(c)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=sbn.p1(h)).to_event(1), obs=x)

    def guide(x, c):
        with pyro.plate("data", len(x)):
            pyro.sample("h1", dist.Bernoulli(logits=sbn.q1(x)).to_event(1))

    c = torch.tensor([[-2.0], [0.0], [2.0]], dtype=F64)
    h, x = patterns(2), patterns(3)[:, None]
    exact = []
    for row in c:
        log_p = dist.Bernoulli(logits=3 * net(row)).log_prob(h).sum(-1)
        log_p = log_p + dist.Bernoulli(logits=sbn.p1(h)).log_prob(x).sum(-1)
        log_q = dist.Bernoulli(logits=sbn.q1(x)).log_prob(h).sum(-1)
        exact.append((2 * ((log_p + log_q) / 2).logsumexp(1)).logsumexp(0))
    exact = torch.stack(exact).detach()
    assert float(exact.max() - exact.min()) > 0.1
    for batch, count in ((None, 400), (2, 50)):
        found = log_partition(model, guide, X, c, num_dreams=count, batch=batch)
        assert ((found.values - exact).abs() < 4.5 * found.stderrs).all()
        assert found.values.shape == (3,) and float(found.stderrs.max()) < 2 / count**0.5


def test_partition_is_one_where_the_guide_is_the_posterior():
    """Then p* is p and every ratio is 1."""

    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(torch.tensor(0.5, dtype=F64)))
            pyro.sample("x", dist.Normal(h * 2 - 1, torch.ones((), dtype=F64)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=2 * x))

    found = log_partition(model, guide, torch.zeros(5, dtype=F64), num_dreams=3)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-6)
    assert "LogPartition(value=" in repr(found)


def test_partition_refuses(sbn):
    args = sbn.model, sbn.guide, X
    before = torch.get_rng_state()
    with pytest.raises(ValueError, match="num_dreams"):
        log_partition(*args, num_dreams=0)
    with pytest.raises(ValueError, match="num_particles"):
        log_partition(*args, num_particles=0)
    with pytest.raises(ValueError, match="no data"):
        log_partition(*args[:2], X[:0])
    assert torch.equal(torch.get_rng_state(), before)
    masked = [poutine.mask(f, mask=torch.tensor([True, False, True])) for f in args[:2]]
    with pytest.raises(ValueError, match="'h2' is masked"):
        log_partition(*masked, X)

    def with_factor(x):
        sbn.model(x)
        pyro.factor("extra", torch.zeros(()))

    with pytest.raises(ValueError, match="'extra'"):
        log_partition(with_factor, sbn.guide, X)
    with pytest.raises(ValueError, match="power"):
        log_likelihood(*args, power=0.0)
