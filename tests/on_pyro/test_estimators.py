"""Directions against enumeration; the estimators as ELBOs of pyro.infer.SVI."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI

from pyro_helmholtz import RWS, RWS_ELBO, WakeSleep, WakeSleep_ELBO
from pyro_helmholtz.estimators.base import score
from pyro_helmholtz.trace import Programs

from .programs import SBN, patterns

F64 = torch.float64
X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], dtype=F64)


@pytest.fixture
def sbn():
    pyro.clear_param_store()
    pyro.set_rng_seed(5)
    return SBN()


def flat(grads, prefix):
    return torch.cat([g.reshape(-1) for n, g in sorted(grads.items()) if n.startswith(prefix)])


def named(module, prefix, scalar):
    """The gradient of a scalar by store name."""
    names, leaves = zip(*module.named_parameters(), strict=True)
    grads = torch.autograd.grad(scalar, leaves, allow_unused=True, materialize_grads=True)
    return {f"{prefix}$$${n}": g for n, g in zip(names, grads, strict=True)}


def draws(estimator, sbn, x, n, prefix):
    svi = estimator(sbn.model, sbn.guide)
    return torch.stack([flat(svi.directions(x).gradient, prefix) for _ in range(n)])


def mean_and_error(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5


def within(values, expected, errors=4.5):
    mean, error = mean_and_error(values)
    assert ((mean - expected).abs() <= errors * error + 1e-9).all(), (mean - expected) / error


def rws(k, **options):
    return lambda m, g: RWS(m, g, num_particles=k, max_plate_nesting=1, **options)


def test_theta_tends_to_the_exact_gradient(sbn):
    exact = flat(named(sbn.down, "down", sbn.log_likelihood(X).mean()), "down")
    distance = []
    for k in (2, 50, 5000):
        values = draws(rws(k, sleep_weight=0.0), sbn, X, 20, "down")
        distance.append(float((values - exact).square().mean().sqrt()))
    assert distance[0] > 2 * distance[1] > 4 * distance[2]
    mean, error = mean_and_error(values)
    bias = float(exact.abs().max()) * 20 / 5000
    assert ((mean - exact).abs() <= 4.5 * error + bias).all()


def pairs_expectation(sbn, x, k2_of):
    """E over two particles by enumeration: the sum over all pairs of latents."""
    h1, h2 = sbn.latents()
    total = 0.0
    for b in range(len(x)):
        log_p, log_q = sbn.log_joint(x[b], h1, h2), sbn.log_guide(x[b], h1, h2)
        log_w = (log_p - log_q).detach()
        prob = (log_q[:, None] + log_q[None, :]).detach().exp()
        share = torch.stack(torch.broadcast_tensors(log_w[:, None], log_w[None, :])).softmax(0)
        total = total + k2_of(prob, share, log_p, log_q)
    return total / len(x)


def test_fixed_k_has_the_importance_sampling_expectation(sbn):
    def theta(prob, share, log_p, log_q):
        return (prob * (share[0] * log_p[:, None] + share[1] * log_p[None, :])).sum()

    def phi(prob, share, log_p, log_q):
        return (prob * (share[0] * log_q[:, None] + share[1] * log_q[None, :])).sum()

    expected_p = flat(named(sbn.down, "down", pairs_expectation(sbn, X, theta)), "down")
    expected_q = flat(named(sbn.up, "up", pairs_expectation(sbn, X, phi)), "up")
    svi = rws(2, sleep_weight=0.0)(sbn.model, sbn.guide)
    found = [svi.directions(X).gradient for _ in range(400)]
    within(torch.stack([flat(g, "down") for g in found]), expected_p)
    within(torch.stack([flat(g, "up") for g in found]), expected_q)


def test_baseline_changes_only_the_variance(sbn):
    on = draws(rws(4, sleep_weight=0.0), sbn, X, 300, "up")
    off = draws(rws(4, sleep_weight=0.0, baseline=False), sbn, X, 300, "up")
    (a, ea), (b, eb) = mean_and_error(on), mean_and_error(off)
    assert ((a - b).abs() <= 4.5 * (ea**2 + eb**2).sqrt()).all()
    assert on.var(0).sum() < 0.8 * off.var(0).sum()


def sleep_exact(sbn):
    h1, h2 = sbn.latents()
    x = patterns(3)[:, None]
    weight = sbn.log_joint(x, h1, h2).exp().detach()
    assert float(weight.sum()) == pytest.approx(1.0)
    return flat(named(sbn.up, "up", (weight * sbn.log_guide(x, h1, h2)).sum()), "up")


@pytest.mark.parametrize("front", [rws(2, sleep_weight=1.0), WakeSleep])
def test_sleep_direction(sbn, front):
    x = patterns(3).repeat(8, 1)
    within(draws(front, sbn, x, 60, "up"), sleep_exact(sbn))


def test_wake_sleep_theta(sbn):
    h1, h2 = sbn.latents()
    q = sbn.log_guide(X[:, None], h1, h2).exp().detach()
    value = (q * sbn.log_joint(X[:, None], h1, h2)).sum(1).mean()
    exact = flat(named(sbn.down, "down", value), "down")
    front = lambda m, g: WakeSleep(m, g, num_particles=10)  # noqa: E731
    within(draws(front, sbn, X, 100, "down"), exact)


def replayed(values):
    samples = poutine.Trace()
    for name, value in values.items():
        samples.add_node(name, name=name, type="sample", is_observed=False, value=value, infer={})
    return samples


def wake_directions(sbn, x, samples):
    k = next(iter(samples.values())).shape[0]
    wake = Programs(sbn.model, sbn.guide, k, 1).wake((x,), {}, samples=replayed(samples))
    w = wake.weights()
    signed = {key: v - 1 / k for key, v in w.items()}
    theta = named(sbn.down, "down", score(wake.model, wake.layout, w))
    phi = named(sbn.up, "up", score(wake.guide, wake.layout, signed, observed=False))
    return flat(theta, "down"), flat(phi, "up")


def test_one_batch_or_two(sbn):
    x = patterns(3)[:6]
    wake = Programs(sbn.model, sbn.guide, 5).wake((x,), {})
    h = {n: wake.guide.nodes[n]["value"] for n in ("h1", "h2")}
    whole = wake_directions(sbn, x, h)
    first = wake_directions(sbn, x[:3], {n: v[:, :3] for n, v in h.items()})
    second = wake_directions(sbn, x[3:], {n: v[:, 3:] for n, v in h.items()})
    for w, a, b in zip(whole, first, second, strict=True):
        torch.testing.assert_close(w, (a + b) / 2, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("sleep_weight", [0.0, 0.5, 1.0])
def test_uniform_scale_leaves_the_direction(sbn, sleep_weight):
    found = []
    for model, guide in [
        (sbn.model, sbn.guide),
        (poutine.scale(sbn.model, 7.0), poutine.scale(sbn.guide, 7.0)),
    ]:
        svi = rws(4, sleep_weight=sleep_weight)(model, guide)
        pyro.set_rng_seed(1)
        found.append(svi.directions(X))
    for name, value in found[0].gradient.items():
        torch.testing.assert_close(found[1].gradient[name], value, rtol=1e-12, atol=1e-14)
    assert found[1].loss == pytest.approx(7 * found[0].loss, rel=1e-12)


def test_subsample_scale_leaves_the_direction(sbn):
    def programs(size):
        def model(x):
            pyro.module("down", sbn.down)
            with pyro.plate("data", size, subsample=torch.arange(2)):
                h2 = pyro.sample("h2", dist.Bernoulli(logits=sbn.top).to_event(1))
                h1 = pyro.sample("h1", dist.Bernoulli(logits=sbn.p2(h2)).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=sbn.p1(h1)).to_event(1), obs=x)

        def guide(x):
            pyro.module("up", sbn.up)
            with pyro.plate("data", size, subsample=torch.arange(2)):
                h1 = pyro.sample("h1", dist.Bernoulli(logits=sbn.q1(x)).to_event(1))
                pyro.sample("h2", dist.Bernoulli(logits=sbn.q2(h1)).to_event(1))

        return model, guide

    found = []
    for size in (2, 50):
        pyro.set_rng_seed(1)
        found.append(rws(4)(*programs(size)).directions(X))
    for name, value in found[0].gradient.items():
        torch.testing.assert_close(found[1].gradient[name], value, rtol=1e-12, atol=1e-14)
    assert found[1].loss == pytest.approx(25 * found[0].loss, rel=1e-12)


ELBOS = {
    "rws": (lambda: RWS_ELBO(4, max_plate_nesting=1), rws(4)),
    "wake-sleep": (
        lambda: WakeSleep_ELBO(4, max_plate_nesting=1),
        lambda m, g: WakeSleep(m, g, num_particles=4, max_plate_nesting=1),
    ),
}


@pytest.mark.parametrize("name", ELBOS)
def test_as_elbo_of_the_hosts_svi(sbn, name):
    make, front = ELBOS[name]
    elbo = make()
    pyro.set_rng_seed(2)
    expected = front(sbn.model, sbn.guide).directions(X)
    pyro.set_rng_seed(2)
    loss = elbo.differentiable_loss(sbn.model, sbn.guide, X)
    assert float(loss.detach()) == pytest.approx(expected.loss, rel=1e-12)
    leaves = pyro.get_param_store()._params
    names = list(leaves)
    grads = torch.autograd.grad(loss, [leaves[n] for n in names], allow_unused=True)
    for n, g in zip(names, grads, strict=True):
        torch.testing.assert_close(g, -2 * expected.gradient[n], rtol=1e-12, atol=1e-14)
    pyro.set_rng_seed(2)
    assert elbo.loss_and_grads(sbn.model, sbn.guide, X) == pytest.approx(expected.loss)
    for n in names:
        torch.testing.assert_close(leaves[n].grad, -2 * expected.gradient[n])
        leaves[n].grad = None
    pyro.set_rng_seed(2)
    assert elbo.loss(sbn.model, sbn.guide, X) == pytest.approx(expected.loss)
    svi = SVI(sbn.model, sbn.guide, pyro.optim.Adam({"lr": 0.01}), loss=elbo)
    pyro.set_rng_seed(2)
    assert svi.step(X) == pytest.approx(expected.loss)
    assert svi.evaluate_loss(X) > 0


def test_sleep_weight_mixes_and_sleep_scale_multiplies(sbn):
    found = {}
    for key in [(0.0, 1.0), (1.0, 1.0), (0.25, 1.0), (0.25, 8.0)]:
        pyro.set_rng_seed(4)
        svi = rws(4, sleep_weight=key[0], sleep_scale=key[1])(sbn.model, sbn.guide)
        found[key] = flat(svi.directions(X).gradient, "up")
    wake, sleep = found[0.0, 1.0], found[1.0, 1.0]
    torch.testing.assert_close(found[0.25, 1.0], 0.75 * wake + 0.25 * sleep)
    torch.testing.assert_close(found[0.25, 8.0], 0.75 * wake + 2.0 * sleep)


@pytest.mark.parametrize("front", [RWS, WakeSleep])
def test_sleep_steps_after_the_first_train_the_guide_alone(sbn, front):
    states = []
    for steps in (1, 4):
        pyro.set_rng_seed(6)
        pyro.clear_param_store()
        fresh = SBN()
        front(fresh.model, fresh.guide, num_particles=3, sleep_steps=steps).step(X)
        states.append((fresh.down.state_dict(), fresh.up.state_dict()))
    (down1, up1), (down4, up4) = states
    assert all(torch.equal(down1[n], down4[n]) for n in down1)
    assert any(not torch.equal(up1[n], up4[n]) for n in up1)
