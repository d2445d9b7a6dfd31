"""The reparameterised ELBO against the host's, closed forms and quadrature."""

import math
import warnings

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI, Trace_ELBO
from torch import nn

from pyro_helmholtz import RankOnePrecisionNormal, StochasticBackprop, StochasticBackprop_ELBO

from .programs import snapshot

F64 = torch.float64
X = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=F64)


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(7)


def param(name, *shape, constraint=dist.constraints.real):
    def start():
        value = torch.randn(shape, dtype=F64)
        return value if constraint is dist.constraints.real else value.exp()

    return pyro.param(name, start, constraint=constraint)


def positive(name, *shape):
    return param(name, *shape, constraint=dist.constraints.positive)


def decode(z):
    """Logits of three pixels, smooth in z."""
    return torch.tanh(z @ param("w1", z.shape[-1], 4)) @ param("w2", 4, 3) + param("b", 3)


def normal(x):
    return dist.Normal(x @ param("loc", 3, 2), (x @ param("scale", 3, 2)).exp()).to_event(1)


def multivariate(x):
    diagonal = torch.diag_embed((x @ param("scale", 3, 2)).exp())
    below = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=F64)
    tril = diagonal + (x @ param("off", 3, 1)).unsqueeze(-1) * below
    return dist.MultivariateNormal(x @ param("loc", 3, 2), scale_tril=tril)


def rank_one(x):
    return RankOnePrecisionNormal(
        x @ param("loc", 3, 2), x @ param("factor", 3, 2), (x @ param("scale", 3, 2)).exp()
    )


def gamma(x):
    a = (x @ param("loc", 3, 2)).exp()
    return dist.Gamma(a + 0.5, (x @ param("scale", 3, 2)).exp()).to_event(1)


def log_normal(x):
    return dist.LogNormal(x @ param("loc", 3, 2), positive("spread", 2)).to_event(1)


def logit_normal(x):
    base = dist.Normal(x @ param("loc", 3, 2), positive("spread", 2))
    squash = torch.distributions.transforms.SigmoidTransform()
    return dist.TransformedDistribution(base, [squash]).to_event(1)


def standard(kind):
    if kind is logit_normal:
        return dist.Uniform(torch.zeros(2, dtype=F64), 1.0).to_event(1)
    if kind in (gamma, log_normal):
        return dist.Exponential(torch.ones(2, dtype=F64)).to_event(1)
    return dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1)


def local(kind, size=None, scale=1.0, mask=None):
    """One latent per datum; with a subsample's size, a scale, a mask."""

    def wrapped(program):
        def run(x):
            with poutine.scale(scale=scale), pyro.plate("data", size or len(x), subsample=x):
                if mask is None:
                    return program(x)
                with poutine.mask(mask=mask):
                    return program(x)

        return run

    def model(x):
        z = pyro.sample("z", standard(kind))
        pyro.sample("x", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x)

    def guide(x):
        pyro.sample("z", kind(x))

    return wrapped(model), wrapped(guide)


def chain():
    """Two latents, the second drawn given the first, and one outside the plate."""

    def model(x):
        top = pyro.sample("top", dist.Normal(torch.zeros((), dtype=F64), 1.0))
        with pyro.plate("data", 9, subsample=x):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            mean = torch.tanh(z2 @ param("v", 2, 2)) + top.unsqueeze(-1)
            z1 = pyro.sample("z1", dist.Normal(mean, positive("s", 2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(z1)).to_event(1), obs=x)

    def guide(x):
        pyro.sample("top", dist.Normal(param("m", 1)[0], positive("t", 1)[0]))
        with pyro.plate("data", 9, subsample=x):
            z1 = pyro.sample("z1", rank_one(x))
            loc = torch.sin(z1 @ param("u", 2, 2))
            pyro.sample("z2", dist.Normal(loc, positive("r", 2)).to_event(1))

    return model, guide


def sequential():
    def model(x):
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", standard(normal))
            pyro.sample(f"x{i}", dist.Bernoulli(logits=decode(z)).to_event(1), obs=x[i])

    def guide(x):
        for i in pyro.plate("data", len(x)):
            pyro.sample(f"z{i}", normal(x[i]))

    return model, guide


MASK = torch.tensor([True, False, True, True])
PROGRAMS = {
    "normal": lambda: local(normal),
    "multivariate": lambda: local(multivariate),
    "rank one": lambda: local(rank_one),
    "gamma": lambda: local(gamma),
    "log-normal": lambda: local(log_normal),
    "logit-normal": lambda: local(logit_normal),
    "subsample": lambda: local(normal, size=20),
    "scale": lambda: local(normal, scale=3.0),
    "mask": lambda: local(normal, size=20, mask=MASK),
    "chain": chain,
    "sequential": sequential,
}


def leaf_gradients(loss):
    leaves = pyro.get_param_store()._params
    grads = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g
        for (name, leaf), g in zip(leaves.items(), grads, strict=True)
    }


@pytest.mark.parametrize("particles", [1, 3])
@pytest.mark.parametrize("name", PROGRAMS)
def test_path_is_the_hosts_gradient_on_the_same_noise(name, particles):
    model, guide = PROGRAMS[name]()
    nesting = 0 if name == "sequential" else 1
    ours = StochasticBackprop_ELBO(particles, max_plate_nesting=nesting)
    theirs = Trace_ELBO(particles, max_plate_nesting=nesting, vectorize_particles=True)
    found = []
    ours.loss(model, guide, X)  # the parameters exist
    for elbo in (ours, theirs):
        pyro.set_rng_seed(1)
        loss = elbo.differentiable_loss(model, guide, X)
        found.append((float(loss.detach()), leaf_gradients(loss)))
        pyro.set_rng_seed(1)
        assert elbo.loss(model, guide, X) == pytest.approx(found[-1][0], rel=1e-12)
    (loss, grads), (expected_loss, expected) = found
    assert loss == pytest.approx(expected_loss, rel=1e-12)
    for leaf, value in expected.items():
        torch.testing.assert_close(grads[leaf], value, rtol=1e-10, atol=1e-10)


class Linear:
    """A linear Gaussian model, for which f is quadratic and every expectation is closed."""

    def __init__(self, family):
        self.family = family
        g = torch.Generator().manual_seed(4)
        self.w = torch.randn(2, 3, dtype=F64, generator=g)
        self.x = torch.randn(4, 3, dtype=F64, generator=g)

    def q(self, x):
        return self.family(x)

    def model(self, x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(normal))
            pyro.sample("x", dist.Normal(z @ self.w + param("b", 3), 0.7).to_event(1), obs=x)

    def guide(self, x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", self.q(x))

    def elbo(self):
        """``E log p(x|z) − KL``, mean over data, from the moments of q."""
        q = self.q(self.x)
        if isinstance(q, dist.Independent):
            cov = torch.diag_embed(q.base_dist.scale**2)
        else:
            cov = q.covariance_matrix
        full = torch.distributions.MultivariateNormal(q.mean, covariance_matrix=cov)
        prior = torch.distributions.MultivariateNormal(
            torch.zeros(2, dtype=F64), torch.eye(2, dtype=F64)
        )
        mean = q.mean @ self.w + param("b", 3)
        fit = dist.Normal(mean, 0.7).to_event(1).log_prob(self.x)
        spread = torch.einsum("ki,bkl,li->b", self.w, cov, self.w) / 0.49
        kl = torch.distributions.kl_divergence(full, prior)
        return (fit - 0.5 * spread - kl).mean()


def price(program, **options):
    return StochasticBackprop(program.model, program.guide, estimator="price", **options)


FAMILIES = {"normal": normal, "multivariate": multivariate, "rank one": rank_one}


@pytest.mark.parametrize("family", FAMILIES)
def test_price_has_no_variance_in_the_scales_of_a_quadratic(family):
    program = Linear(FAMILIES[family])
    svi = price(program, hessian="exact")
    found = svi.directions(program.x).gradient
    expected = leaf_gradients(program.elbo())
    for name in {"scale", "off", "factor"} & found.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=1e-10, atol=1e-12)


def draws(svi, x, count):
    found = [svi.directions(x).gradient for _ in range(count)]
    return {name: torch.stack([g[name] for g in found]) for name in found[0]}


def assert_unbiased(values, expected, errors=4.5):
    for name, value in values.items():
        error = value.std(0) / len(value) ** 0.5
        gap = (value.mean(0) - expected[name]).abs()
        assert bool((gap <= errors * error + 1e-9).all()), (name, gap / error)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("options", [{}, {"num_probes": 3}, {"entropy": "sampled"}])
def test_probes_are_unbiased(family, options):
    program = Linear(FAMILIES[family])
    values = draws(price(program, num_particles=20, max_plate_nesting=1, **options), program.x, 120)
    assert_unbiased(values, leaf_gradients(program.elbo()))


@pytest.mark.parametrize("hessian", ["probes", "exact"])
def test_price_goes_through_later_latents_at_fixed_noise(hessian):
    """z2 = w z1 + b + s2 ε2 in the guide; the scales' gradients have no variance."""

    def guide(x):
        with pyro.plate("data", len(x)):
            z1 = pyro.sample("z1", dist.Normal(param("a", 1)[0], positive("s1", 1)[0]))
            pyro.sample("z2", dist.Normal(1.5 * z1 + param("c", 1)[0], positive("s2", 1)[0]))

    def model(x):
        with pyro.plate("data", len(x)):
            z2 = pyro.sample("z2", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            z1 = pyro.sample("z1", dist.Normal(0.8 * z2, 1.3))
            pyro.sample("x", dist.Normal(z1 + 2 * z2, 0.9), obs=x)

    x = X[:, 0]
    svi = StochasticBackprop(model, guide, estimator="price", hessian=hessian, num_particles=4)
    found = draws(svi, x, 1 if hessian == "exact" else 300)
    s1, s2 = positive("s1", 1), positive("s2", 1)
    # The quadratic part of f in the deviations (d1, d2 = 1.5 d1 + r) of z1 and z2.
    first = -((1 - 0.8 * 1.5) ** 2) / 1.69 - 1.5**2 - (1 + 3) ** 2 / 0.81
    second = -(0.8**2) / 1.69 - 1 - 4 / 0.81
    value = 0.5 * (first * s1**2 + second * s2**2) + s1.log() + s2.log()
    expected = leaf_gradients(value.sum())
    for name in ("s1", "s2"):
        if hessian == "exact":
            torch.testing.assert_close(found[name][0], expected[name], rtol=1e-10, atol=1e-12)
        else:
            assert_unbiased({name: found[name]}, expected)


@pytest.mark.parametrize("name", ["chain", "mask", "rank one", "sequential"])
def test_price_and_path_agree_on_programs_that_are_not_quadratic(name):
    model, guide = PROGRAMS[name]()
    nesting = 0 if name == "sequential" else 1
    found = {}
    for estimator, hessian in [("path", "probes"), ("price", "probes"), ("price", "exact")]:
        svi = StochasticBackprop(
            model,
            guide,
            estimator=estimator,
            hessian=hessian,
            num_particles=50,
            max_plate_nesting=nesting,
        )
        values = draws(svi, X, 40)
        found[estimator, hessian] = {n: (v.mean(0), v.var(0) / len(v)) for n, v in values.items()}
    for key in [("price", "probes"), ("price", "exact")]:
        for leaf, (mean, variance) in found[key].items():
            other, spread = found["path", "probes"][leaf]
            gap = (mean - other).abs() / (variance + spread + 1e-20).sqrt()
            assert float(gap.max()) < 4.5, (key, leaf, gap)


def quadrature(function, mu, sigma):
    """E f(z) for a scalar Normal, 80 nodes."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    z = mu + sigma * torch.tensor(nodes)
    return (torch.tensor(weights / math.sqrt(2 * math.pi)) * function(z)).sum()


def one_pixel():
    def log_p(z):
        logit = 2 * torch.tanh(1.5 * z) - 0.4
        return dist.Bernoulli(logits=logit).log_prob(torch.ones((), dtype=F64))

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Bernoulli(logits=2 * torch.tanh(1.5 * z) - 0.4), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(param("mu", 1)[0], positive("sigma", 1)[0]))

    return model, guide, log_p


@pytest.mark.parametrize("entropy", [None, "sampled", "closed"])
@pytest.mark.parametrize("estimator", ["path", "price"])
def test_gradients_against_quadrature(estimator, entropy):
    model, guide, log_p = one_pixel()
    x = torch.ones(1, dtype=F64)
    options = {"num_particles": 4000, "max_plate_nesting": 1}
    svi = StochasticBackprop(model, guide, estimator=estimator, entropy=entropy, **options)
    values = draws(svi, x, 30)
    mu, sigma = param("mu", 1), positive("sigma", 1)
    prior = lambda z: -0.5 * (z**2 + math.log(2 * math.pi))  # noqa: E731
    value = quadrature(lambda z: log_p(z) + prior(z), mu, sigma) + sigma.log()[0]
    assert_unbiased(values, leaf_gradients(value))
    exact = -float(value.detach()) - 0.5 * (1 + math.log(2 * math.pi))
    losses = torch.tensor([svi.evaluate_loss(x) for _ in range(30)])
    assert abs(float(losses.mean()) - exact) < 4.5 * float(losses.std()) / 30**0.5


def test_price_has_less_variance_in_the_scales():
    """A smooth decoder, three families: trace of the variance of all scale gradients."""
    for family in FAMILIES.values():
        pyro.clear_param_store()
        pyro.set_rng_seed(3)
        model, guide = local(family)
        spread = {}
        for estimator in ("path", "price"):
            svi = StochasticBackprop(
                model, guide, estimator=estimator, entropy="closed", max_plate_nesting=1
            )
            values = draws(svi, X, 200)
            spread[estimator] = sum(
                float(values[n].var(0).sum()) for n in {"scale", "off", "factor"} & values.keys()
            )
        assert spread["price"] < 0.6 * spread["path"], spread


def test_variances_of_the_four_estimators():
    """Equations 36 to 39 for f = c ξ²/2, from the estimators' gradients themselves."""
    c, mu, sigma = 1.3, 0.7, 0.6
    size = 200_000

    def model(x):
        with pyro.plate("data", len(x)):
            xi = pyro.sample("xi", dist.Delta(torch.zeros((), dtype=F64)).mask(False))
            pyro.sample("x", dist.Normal(0.0, 1.0).mask(False), obs=x)
            pyro.factor("f", 0.5 * c * xi**2)

    x = torch.zeros(size, dtype=F64)
    at = torch.full((size,), mu, dtype=F64, requires_grad=True)
    scale = torch.full((size,), sigma, dtype=F64, requires_grad=True)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("xi", dist.Normal(at, scale).mask(False))

    def slopes(estimator):
        pyro.set_rng_seed(2)
        elbo = StochasticBackprop_ELBO(estimator=estimator, max_plate_nesting=1, entropy="sampled")
        return torch.autograd.grad(-elbo.differentiable_loss(model, guide, x), [at, scale])

    location, reparameterised = slopes("path")
    _, price_scale = slopes("price")
    pyro.set_rng_seed(2)
    xi = dist.Normal(mu, sigma).expand((size,)).sample().double()
    expectation = 0.5 * c * (mu**2 + sigma**2)
    reinforce = (xi - mu) / sigma**2 * (0.5 * c * xi**2 - expectation)
    for values, expected in [
        (location, c**2 * sigma**2),
        (reparameterised, 2 * c**2 * sigma**2 + mu**2 * c**2),
        (reinforce, 2 * c**2 * mu**2 + 2.5 * c**2 * sigma**2),
    ]:
        centred = (values - values.mean()).square()
        error = float(centred.std()) / math.sqrt(size)
        assert abs(float(centred.mean()) - expected) < 4.5 * error
    torch.testing.assert_close(price_scale, torch.full_like(price_scale, c * sigma))


def test_subsample_and_scale_leave_the_direction():
    for estimator in ("path", "price"):
        found = []
        for programs in (local(normal), local(normal, size=20), local(normal, scale=7.0)):
            svi = StochasticBackprop(*programs, estimator=estimator, num_particles=2)
            svi.evaluate_loss(X)
            pyro.set_rng_seed(3)
            found.append(svi.directions(X))
        for other, factor in zip(found[1:], (5, 7), strict=True):
            assert other.loss == pytest.approx(factor * found[0].loss, rel=1e-12)
            for name, value in found[0].gradient.items():
                torch.testing.assert_close(other.gradient[name], value, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("estimator", ["path", "price"])
def test_as_elbo_of_the_hosts_svi(estimator):
    model, guide = local(normal)
    elbo = StochasticBackprop_ELBO(3, estimator=estimator, max_plate_nesting=1)
    elbo.loss(model, guide, X)
    pyro.set_rng_seed(2)
    options = {"estimator": estimator, "max_plate_nesting": 1}
    svi = StochasticBackprop(model, guide, num_particles=3, **options)
    expected = svi.directions(X)
    pyro.set_rng_seed(2)
    loss = elbo.loss_and_grads(model, guide, X)
    assert loss == pytest.approx(expected.loss, rel=1e-9)
    for name, leaf in pyro.get_param_store()._params.items():
        torch.testing.assert_close(leaf.grad, -4 * expected.gradient[name])
        leaf.grad = None
    host = SVI(model, guide, pyro.optim.Adam({"lr": 0.05}), loss=elbo)
    losses = [host.step(X) for _ in range(150)]
    assert sum(losses[-30:]) < sum(losses[:30])


def test_what_is_done_at_each_site_is_reported():
    model, guide = chain()
    svi = StochasticBackprop(model, guide, estimator="price", hessian="exact")
    assert set(svi.structure(X)) == {"top", "z1", "z2"}
    assert svi.structure(X)["z1"] == "price (Hessian: exact), entropy: closed"
    other = StochasticBackprop(*local(logit_normal), estimator="price").structure(X)
    assert other["z"].startswith("path (") and other["z"].endswith("entropy: sampled")
    pyro.clear_param_store()
    plain = StochasticBackprop(*local(normal)).structure(X)
    assert plain == {"z": "path, entropy: sampled"}


def relu_programs(inside):
    up, down = nn.Linear(3, 2).double(), nn.Linear(2, 3).double()

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", standard(normal))
            logits = down(z.relu() if inside else z)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(up(x).relu(), 1.0).to_event(1))

    return model, guide


def test_a_kink_below_a_latent_is_said_once():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        StochasticBackprop(*relu_programs(False), estimator="price").step(X)
        StochasticBackprop(*relu_programs(True)).step(X)
        svi = StochasticBackprop(*relu_programs(True), estimator="price")
        with pytest.raises(UserWarning, match="Relu"):
            svi.step(X)
    svi = StochasticBackprop(*relu_programs(True), estimator="price")
    with pytest.warns(UserWarning, match="twice differentiable") as seen:
        svi.step(X)
        svi.step(X)
    assert len(seen) == 1


def fixed_scale(x):
    return dist.Laplace(x @ param("loc", 3, 2), 0.5).to_event(1)


def test_product_rule_trains_locations():
    model, guide = local(fixed_scale)
    found = []
    for estimator in ("path", "product-rule"):
        svi = StochasticBackprop(model, guide, estimator=estimator)
        svi.evaluate_loss(X)
        pyro.set_rng_seed(5)
        found.append(svi.directions(X).gradient)
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=0, atol=0)


RULES = {  # log p(x; θ), θ, the mode, a grid
    "Normal, σ²": (lambda x, v: -0.5 * (x - 0.3) ** 2 / v - 0.5 * v.log(), 0.8, 0.3),
    "log-normal, μ": (lambda x, m: -0.5 * (x.log() - m) ** 2 - x.log(), 0.2, math.exp(0.2 - 1)),
    "inverse-gamma, β": (lambda x, b: 3 * b.log() - 4 * x.log() - b / x, 1.5, 1.5 / 4),
}


def part(rule, gap):
    """``−∫ p ∂_x(B f) dx`` over |x − mode| > gap, f = x: what is left of it next to the mode."""
    log_p, theta, mode = RULES[rule]
    t = torch.tensor(theta, dtype=F64, requires_grad=True)
    x = torch.tensor([mode - gap, mode + gap], dtype=F64, requires_grad=True)
    value = log_p(x, t)
    (by_x,) = torch.autograd.grad(value.sum(), x, retain_graph=True)
    by_t = torch.stack([torch.autograd.grad(v, t, retain_graph=True)[0] for v in value])
    edge = by_t / by_x * x * value.exp()  # B f p at both sides of the mode
    return float((edge[1] - edge[0]).detach())


@pytest.mark.parametrize("rule", RULES)
def test_the_product_rule_fails_at_the_mode(rule):
    """What integration by parts leaves at the mode grows like 1/gap, so (30) has no value."""
    near, nearer = part(rule, 1e-3), part(rule, 1e-4)
    assert abs(nearer) > 5 * abs(near) > 0.1


REFUSED = {
    "scale": (lambda x: normal(x), "'z'.*'scale' of Normal"),
    "factor": (lambda x: rank_one(x), "'z'.*'precision_factor'"),
    "log-normal": (lambda x: log_normal(x), "'z'.*LogNormal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_product_rule_refuses_what_it_does_not_hold_for(case):
    kind, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        StochasticBackprop(*local(kind), estimator="product-rule").step(X)


def discrete():
    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(0.5 * torch.ones(2, dtype=F64)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decode(h)).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ param("v", 3, 2)).to_event(1))

    return model, guide


def unobserved():
    def model(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", standard(normal))

    return model, local(normal)[1]


def missing_latent():
    return local(normal)[0], lambda x: param("nothing", 1)


ERRORS = {
    "discrete": (discrete, {}, "'h'.*Bernoulli.*RWS"),
    "discrete, price": (discrete, {"estimator": "price"}, "'h'.*Bernoulli.*RWS"),
    "unobserved": (unobserved, {}, "no observed site"),
    "missing": (missing_latent, {}, "'z' of the model is missing"),
    "closed": (lambda: local(logit_normal), {"entropy": "closed"}, "'z'.*closed form"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_programs_change_nothing(case):
    make, options, message = ERRORS[case]
    svi = StochasticBackprop(*make(), **options)
    with pytest.raises(ValueError, match=message):
        svi.step(X)
    before = snapshot()
    with pytest.raises(ValueError, match=message):
        svi.step(X)
    after = snapshot()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    with pytest.raises(ValueError, match=message):
        svi.evaluate_loss(X)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "reinforce"}, "estimator must be one of"),
        ({"entropy": "kl"}, "entropy must be one of"),
        ({"hessian": "diagonal"}, "hessian must be one of"),
        ({"num_probes": 0}, "num_probes"),
        ({"num_particles": 0}, "num_particles"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StochasticBackprop_ELBO(**options)
