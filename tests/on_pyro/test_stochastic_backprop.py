"""The front end: training, resuming, the posterior of the parameters, deep latent Gaussians."""

import io
import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.nn import PyroModule, PyroParam
from torch import nn

from pyro_helmholtz import RankOnePrecisionNormal, StochasticBackprop, StochasticBackprop_ELBO

from .programs import snapshot

F64 = torch.float64


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(7)


def linear():
    """x = w z + noise; the exact posterior is a Normal, so that the ELBO can reach log p(x)."""
    g = torch.Generator().manual_seed(1)
    w = torch.randn(1, 3, dtype=F64, generator=g)
    x = torch.randn(6, 3, dtype=F64, generator=g)

    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 0.5).to_event(1), obs=x)

    def guide(x):
        v = pyro.param("v", torch.zeros(3, 1, dtype=F64))
        s = pyro.param("s", torch.ones(1, dtype=F64), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ v, s).to_event(1))

    cov = w.mT @ w + 0.25 * torch.eye(3, dtype=F64)
    exact = dist.MultivariateNormal(torch.zeros(3, dtype=F64), cov).log_prob(x).sum()
    return model, guide, x, float(exact)


@pytest.mark.parametrize("estimator", ["path", "price"])
def test_reaches_the_log_likelihood_where_the_guide_can(estimator):
    model, guide, x, exact = linear()
    adam = pyro.optim.Adam({"lr": 0.05})
    svi = StochasticBackprop(model, guide, adam, num_particles=4, estimator=estimator)
    for _ in range(200):
        svi.step(x)
    loss = StochasticBackprop_ELBO(500, max_plate_nesting=1).loss(model, guide, x)
    assert loss == pytest.approx(-exact, abs=0.15)


def test_the_default_optimiser_is_adam():
    model, guide, x, _ = linear()
    svi = StochasticBackprop(model, guide)
    svi.step(x)
    assert abs(float(pyro.param("v")[0].detach())) == pytest.approx(1e-3, rel=1e-3)
    with pytest.raises(TypeError, match="pyro.optim"):
        StochasticBackprop(model, guide, torch.optim.SGD)


def modules(kind="module", dtype=torch.float32):
    """A small autoencoder whose parameters are read in three ways."""
    if kind == "param":

        def model(x):
            w = pyro.param("w", lambda: torch.randn(2, 3, dtype=dtype))
            s = pyro.param(
                "sd", lambda: torch.rand(3, dtype=dtype) + 0.5, dist.constraints.positive
            )
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(torch.tanh(z) @ w, s).to_event(1), obs=x)

    elif kind == "pyro module":

        class Model(PyroModule):
            def __init__(self):
                super().__init__()
                self.down = PyroModule[nn.Linear](2, 3).to(dtype)
                self.sd = PyroParam(torch.full((3,), 0.7, dtype=dtype), dist.constraints.positive)

            def forward(self, x):
                with pyro.plate("data", len(x)):
                    z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
                    mean = self.down(torch.tanh(z))
                    pyro.sample("x", dist.Normal(mean, self.sd).to_event(1), obs=x)

        model = Model()
    else:
        down = nn.Linear(2, 3).to(dtype)

        def model(x):
            pyro.module("down", down)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=dtype), 1.0).to_event(1))
                pyro.sample("x", dist.Normal(down(torch.tanh(z)), 0.7).to_event(1), obs=x)

    def guide(x):
        v = pyro.param("v", lambda: torch.randn(3, 6, dtype=dtype))
        loc, u, log_d = (x @ v).split(2, -1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", RankOnePrecisionNormal(loc, u, log_d.exp()))

    return model, guide


KINDS = ["module", "param", "pyro module"]


@pytest.mark.parametrize("options", [{}, {"estimator": "price"}, {"parameter_posterior": 10.0}])
@pytest.mark.parametrize("kind", KINDS)
def test_resumes_bit_for_bit(kind, options):
    x = torch.randn(5, 3)
    first = StochasticBackprop(*modules(kind), num_particles=2, **options)
    for _ in range(3):
        first.step(x)
    buffer = io.BytesIO()
    torch.save(first.state_dict(), buffer)
    expected = [first.step(x) for _ in range(3)]
    after = snapshot()

    pyro.clear_param_store()
    pyro.set_rng_seed(99)
    second = StochasticBackprop(*modules(kind), num_particles=2, **options)
    buffer.seek(0)
    second.load_state_dict(torch.load(buffer, weights_only=False))
    assert [second.step(x) for _ in range(3)] == expected
    assert all(torch.equal(value, snapshot()[name]) for name, value in after.items())


def test_a_step_that_is_not_finite_changes_nothing():
    model, guide = modules()
    svi = StochasticBackprop(model, guide, parameter_posterior=1.0)
    x = torch.randn(5, 3)
    svi.step(x)
    before = snapshot()
    with pytest.raises(FloatingPointError):
        svi.step(1e30 * x)
    assert all(torch.equal(value, snapshot()[name]) for name, value in before.items())


# --- the posterior of the parameters


def mean_only(size=None):
    """x_n ~ N(θ, 1): with the prior N(0, κ) the posterior of θ is known."""

    def model(x):
        theta = pyro.param("theta", torch.full((2,), 0.3, dtype=F64))
        with pyro.plate("data", size or len(x), subsample=x):
            pyro.sample("x", dist.Normal(theta, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.param("unused", torch.zeros(1, dtype=F64))

    return model, guide


@pytest.mark.parametrize("size", [None, 40])
def test_directions_of_the_posterior_are_those_of_its_objective(size):
    """Against the closed form of E log p − KL; the KL carries no subsample scale."""
    kappa, tau = 0.8, 0.3
    x = torch.randn(8, 2, dtype=F64) + 1
    options = {"parameter_posterior": kappa, "parameter_variance": tau, "max_plate_nesting": 1}
    svi = StochasticBackprop(*mean_only(size), **options)
    found = [svi.directions(x) for _ in range(800)]
    m = torch.full((2,), 0.3, dtype=F64, requires_grad=True)
    log_tau = torch.full((2,), math.log(tau), dtype=F64, requires_grad=True)
    scale = (size or 8) / 8
    fit = dist.Normal(m, 1.0).log_prob(x).sum() - 0.5 * len(x) * log_tau.exp().sum()
    prior, q = dist.Normal(0.0, math.sqrt(kappa)), dist.Normal(m, (0.5 * log_tau).exp())
    value = scale * fit - torch.distributions.kl_divergence(q, prior).sum()
    expected = torch.autograd.grad(value / (size or 8), [m, log_tau])
    losses = torch.tensor([d.loss for d in found])
    assert abs(float(losses.mean() + value.detach())) < 4.5 * float(losses.std()) / 800**0.5
    for name, slope in zip(["theta", "posterior_variance.theta"], expected, strict=True):
        values = torch.stack([d.gradient[name] for d in found])
        error = values.std(0) / len(values) ** 0.5
        assert bool(((values.mean(0) - slope).abs() < 4.5 * error).all()), name


def test_the_posterior_is_learnt():
    kappa, x = 0.5, torch.randn(8, 2, dtype=F64) + 1
    adam = pyro.optim.Adam({"lr": 0.05})
    svi = StochasticBackprop(
        *mean_only(),
        adam,
        parameter_posterior=kappa,
        parameter_variance=0.01,
        num_particles=4,
        parameter_draws="particle",
    )
    logs = []
    for _ in range(240):
        svi.step(x)
        logs.append(svi.posterior()["theta"][1].log())
    mean, variance = svi.posterior()["theta"]
    average = torch.stack(logs[-120:]).mean(0).exp()  # Adam's steps keep the last one noisy
    precision = len(x) + 1 / kappa
    torch.testing.assert_close(mean, x.sum(0) / precision, rtol=0, atol=0.1)
    torch.testing.assert_close(average, torch.full_like(average, 1 / precision), rtol=0.2, atol=0)
    at_means = dist.Normal(mean, 1.0).log_prob(x).sum()
    q, prior = dist.Normal(mean, variance.sqrt()), dist.Normal(0 * mean, math.sqrt(kappa))
    kl = torch.distributions.kl_divergence(q, prior).sum()
    assert svi.evaluate_loss(x) == pytest.approx(float(kl - at_means), rel=1e-9)


@pytest.mark.parametrize("draws", ["step", "particle"])
@pytest.mark.parametrize("kind", KINDS)
def test_draws_reach_every_kind_of_parameter_and_leave_no_trace(kind, draws):
    x = torch.randn(5, 3, dtype=F64)
    model, guide = modules(kind, F64)
    options = {"num_particles": 2, "parameter_draws": draws, "max_plate_nesting": 1}
    svi = StochasticBackprop(
        model, guide, parameter_posterior=1.0, parameter_variance=0.5, **options
    )
    svi.evaluate_loss(x)
    names = set(svi.posterior())
    assert names and "v" not in names
    before = snapshot()
    seen = []

    def watching(x):
        seen.append({n: before[n].new_tensor(snapshot()[n].tolist()) for n in names})
        return model(x)

    svi.model = watching
    svi.evaluate_loss(x)  # its first look runs programs several times
    seen.clear()
    found = svi.directions(x)
    assert all(torch.equal(value, snapshot()[name]) for name, value in before.items())
    assert len(seen) == (2 if draws == "particle" else 1)
    assert all(not torch.equal(drawn[n], before[n]) for drawn in seen for n in names)
    assert found.gradient.keys() == {*names, *(f"posterior_variance.{n}" for n in names), "v"}
    for name in names:
        mean, variance = svi.posterior()[name]
        torch.testing.assert_close(variance, torch.full_like(mean, 0.5))


def test_small_variances_give_the_gradient_at_the_means():
    x = torch.randn(5, 3, dtype=F64)
    model, guide = modules("param", F64)
    kappa, options = 2.0, {"max_plate_nesting": 1}
    svi = StochasticBackprop(
        model, guide, parameter_posterior=kappa, parameter_variance=1e-24, **options
    )
    plain = StochasticBackprop(model, guide, **options)
    svi.evaluate_loss(x)
    start = torch.get_rng_state()
    found = svi.directions(x).gradient
    torch.set_rng_state(start)
    leaves = pyro.get_param_store()._params
    for name in sorted(svi.posterior()):
        torch.randn_like(leaves[name])
    expected = plain.directions(x).gradient
    torch.testing.assert_close(found["v"], expected["v"], rtol=1e-9, atol=1e-9)
    for name in svi.posterior():
        slope = expected[name] - leaves[name].detach() / (kappa * 5)
        torch.testing.assert_close(found[name], slope, rtol=1e-9, atol=1e-9)


def test_parameters_that_the_model_does_not_always_read():
    guide = mean_only()[1]

    def model(x):
        theta = pyro.param("theta", torch.zeros(2, dtype=F64))
        extra = pyro.param("odd" if len(x) % 2 else "even", torch.zeros(2, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(theta + extra, 1.0).to_event(1), obs=x)

    svi = StochasticBackprop(
        model, guide, parameter_posterior=2.0, parameter_variance=0.5, max_plate_nesting=1
    )
    x = torch.randn(5, 2, dtype=F64)
    svi.step(x)
    assert set(svi.posterior()) == {"theta", "odd"}
    svi.step(x[:4])
    assert set(svi.posterior()) == {"theta", "odd", "even"}
    found = svi.directions(x[:4]).gradient
    torch.testing.assert_close(found["odd"], -svi.posterior()["odd"][0] / (2.0 * 4))


def test_posterior_errors():
    model, guide = modules()
    with pytest.raises(ValueError, match="not asked for"):
        StochasticBackprop(model, guide).posterior()
    with pytest.raises(ValueError, match="no step"):
        StochasticBackprop(model, guide, parameter_posterior=1.0).posterior()
    for options in (
        {"parameter_posterior": 0.0},
        {"parameter_posterior": -1.0},
        {"parameter_posterior": 1.0, "parameter_variance": 0.0},
        {"parameter_draws": "datum"},
    ):
        with pytest.raises(ValueError, match=list(options)[-1]):
            StochasticBackprop(model, guide, **options)
    x = torch.randn(5, 3)

    def sharing(x):
        pyro.param("w", torch.zeros(2, 3))
        guide(x)

    pyro.clear_param_store()
    with pytest.raises(ValueError, match="'w' belongs to the model and to the guide"):
        StochasticBackprop(modules("param")[0], sharing, parameter_posterior=1.0).step(x)
    pyro.clear_param_store()
    none = linear()
    with pytest.raises(ValueError, match="needs a model with parameters"):
        StochasticBackprop(none[0], none[1], parameter_posterior=1.0).step(none[2])


# --- deep latent Gaussian models, in the space of the noise and of the latents


def deep(space):
    """Two layers: h2 = ξ2, h1 = tanh(h2 A) + g ξ1, x ~ Bernoulli(tanh(h1) W)."""

    def param(name, *shape):
        return pyro.param(name, lambda: torch.randn(shape, dtype=F64))

    def down(h2):
        return torch.tanh(h2 @ param("A", 2, 2)), param("g", 2).exp()

    def observe(h1, x):
        logits = torch.tanh(h1) @ param("W", 2, 3)
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def recognise(x, layer):
        mu = x @ param(f"mu{layer}", 3, 2)
        return mu, x @ param(f"u{layer}", 3, 2), (x @ param(f"d{layer}", 3, 2)).exp()

    zero = torch.zeros(2, dtype=F64)

    def noise_model(x):
        with pyro.plate("data", len(x)):
            xi2 = pyro.sample("xi2", dist.Normal(zero, 1.0).to_event(1))
            xi1 = pyro.sample("xi1", dist.Normal(zero, 1.0).to_event(1))
            mean, g = down(xi2)
            observe(mean + g * xi1, x)

    def noise_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("xi2", RankOnePrecisionNormal(*recognise(x, 2)))
            pyro.sample("xi1", RankOnePrecisionNormal(*recognise(x, 1)))

    def latent_model(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Normal(zero, 1.0).to_event(1))
            h1 = pyro.sample("h1", dist.Normal(*down(h2)).to_event(1))
            observe(h1, x)

    def latent_guide(x):
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", RankOnePrecisionNormal(*recognise(x, 2)))
            mean, g = down(h2)
            mu, u, d = recognise(x, 1)  # h1 = mean + g ξ1 has the precision of ξ1 over g²
            pyro.sample("h1", RankOnePrecisionNormal(mean + g * mu, u / g, d / g**2))

    if space == "noise":
        return noise_model, noise_guide
    return latent_model, latent_guide


PIXELS = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 0.0]], dtype=F64)


def expected_gradient(space, estimator, **options):
    svi = StochasticBackprop(
        *deep(space), estimator=estimator, num_particles=200, max_plate_nesting=1, **options
    )
    found = [svi.directions(PIXELS) for _ in range(40)]
    values = {n: torch.stack([d.gradient[n] for d in found]) for n in found[0].gradient}
    values["loss"] = torch.tensor([d.loss for d in found])
    return {n: (v.mean(0), v.var(0) / len(v)) for n, v in values.items()}


def test_deep_latent_gaussian_in_both_spaces():
    """The ELBO does not depend on the coordinates of the latents, nor does its gradient."""
    reference = expected_gradient("noise", "path")
    for space, estimator, options in [
        ("latent", "path", {}),
        ("noise", "price", {}),
        ("latent", "price", {"hessian": "exact"}),
    ]:
        for name, (mean, variance) in expected_gradient(space, estimator, **options).items():
            other, spread = reference[name]
            gap = (mean - other).abs() / (variance + spread).sqrt()
            assert float(gap.max()) < 4.5, (space, estimator, name)


@pytest.mark.parametrize("space", ["noise", "latent"])
@pytest.mark.parametrize("estimator", ["path", "price"])
def test_deep_latent_gaussian_trains(space, estimator):
    model, guide = deep(space)
    svi = StochasticBackprop(
        model, guide, pyro.optim.Adam({"lr": 0.02}), num_particles=4, estimator=estimator
    )
    losses = [svi.step(PIXELS) for _ in range(120)]
    assert sum(losses[-20:]) < 0.9 * sum(losses[:20])


def test_noise_space_with_diagonal_posteriors_is_the_same_draw_by_draw():
    """With u = 0 both spaces draw the same latents from the same noise: equal to round-off."""
    found = {}
    for space in ("noise", "latent"):
        model, guide = deep(space)
        elbo = StochasticBackprop_ELBO(3, max_plate_nesting=1)
        elbo.loss(model, guide, PIXELS)
        with torch.no_grad():
            for name in ("u1", "u2"):
                pyro.get_param_store()._params[name].zero_()
        pyro.set_rng_seed(5)
        loss = elbo.differentiable_loss(model, guide, PIXELS)
        names = ["A", "g", "W", "mu1", "mu2", "d1", "d2"]
        leaves = [pyro.get_param_store()._params[n] for n in names]
        found[space] = (float(loss.detach()), torch.autograd.grad(loss, leaves))
    assert found["noise"][0] == pytest.approx(found["latent"][0], rel=1e-12)
    for a, b in zip(found["noise"][1], found["latent"][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_posterior_begins_anew_where_the_store_was_cleared():
    def model(x):
        w = pyro.param("w", torch.ones(3, dtype=F64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(z[..., None] * w, 1.0).to_event(1), obs=x)

    def guide(x):
        v = pyro.param("v", torch.zeros(3, dtype=F64))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ v, 1.0))

    x = torch.eye(3, dtype=F64)
    svi = StochasticBackprop(model, guide, parameter_posterior=1.0, parameter_variance=1e-3)
    for _ in range(2):
        pyro.clear_param_store()
        assert math.isfinite(svi.step(x))
        mean, variance = svi.posterior()["w"]
        torch.testing.assert_close(mean, torch.ones(3, dtype=F64), rtol=0, atol=0.01)
        torch.testing.assert_close(variance, 1e-3 * torch.ones(3, dtype=F64), rtol=0.01, atol=0)


@pytest.mark.parametrize("options", [{}, {"parameter_posterior": 1.0}])
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_directions_where_torch_takes_no_gradients(mode, options):
    svi = StochasticBackprop(*modules(), num_particles=2, **options)
    x = torch.randn(5, 3)
    svi.step(x)
    for method in (svi.step, svi.directions):
        with mode(), pytest.raises(ValueError, match="need gradients"):
            method(x)


def test_a_layer_shared_with_the_guide_has_no_posterior():
    """Under two names too: the guide would run with the drawn values."""
    shared = nn.Linear(3, 3)

    def model(x):
        pyro.module("down", shared)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(shared(z), 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", shared)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shared(x), 1.0).to_event(1))

    with pytest.raises(ValueError, match="belongs to the model and to the guide.* of their own"):
        StochasticBackprop(model, guide, parameter_posterior=1.0).step(torch.randn(5, 3))
