"""ALWS against closed forms, enumeration and quadrature."""

import itertools
import math
import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer import SVI
from torch import nn
from torch.nn.functional import softplus

from pyro_helmholtz import (
    ALWS,
    ALWS_ELBO,
    DirectRegression,
    GaussianKernel,
    KernelRegression,
    LinearFeatures,
    NetworkRegression,
    Nystrom,
    ParticleSimulator,
    RandomFeatures,
)

F64 = torch.float64
positive = dist.constraints.positive


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def tensor(values):
    return torch.tensor(values, dtype=F64)


# factor analysis -----------------------------------------------------------------------------

D = 10
LOADINGS = torch.randn(2, D, dtype=F64, generator=torch.Generator().manual_seed(0))


def factor_analysis(x, total=None, size=None, scale=1.0):
    w = pyro.param("w", LOADINGS.clone())
    b = pyro.param("b", torch.zeros(D, dtype=F64))
    s = pyro.param("s", torch.full((D,), 0.6, dtype=F64), constraint=positive)
    with pyro.plate("data", total or len(x), subsample_size=size or len(x)) as index:
        with poutine.scale(scale=scale):
            zero = torch.zeros(2, dtype=F64)
            z = pyro.sample("z", dist.Normal(zero, 1.0).to_event(1))
            obs = x[index] if total else x
            pyro.sample("x", dist.Normal(z @ w + b, s).to_event(1), obs=obs)


def exact(x):
    """The mean gradient in the unconstrained leaves, from the marginal Gaussian."""
    w, b = LOADINGS.clone().requires_grad_(), torch.zeros(D, dtype=F64, requires_grad=True)
    log_s = torch.full((D,), math.log(0.6), dtype=F64, requires_grad=True)
    covariance = w.T @ w + torch.diag(log_s.exp().square())
    value = dist.MultivariateNormal(b, covariance).log_prob(x).mean()
    grads = torch.autograd.grad(value, [w, b, log_s])
    return dict(zip("wbs", grads, strict=True))


def data(n=60):
    generator = torch.Generator().manual_seed(7)
    z = torch.randn(n, 2, dtype=F64, generator=generator)
    noise = torch.randn(n, D, dtype=F64, generator=generator)
    return 1.2 * z @ LOADINGS + 0.9 * noise + 0.2


def flat(grads):
    return torch.cat([grads[n].reshape(-1) for n in sorted(grads)])


def relative_error(svi, x, repeats=1):
    truth = flat(exact(x))
    errors = [(flat(svi.directions(x).gradient) - truth).square().sum() for _ in range(repeats)]
    return float((torch.stack(errors).mean() / truth.square().sum()).sqrt())


def test_the_error_falls_with_the_number_of_dreams():
    x = data()
    errors = [relative_error(ALWS(factor_analysis, num_sleep=n), x, 4) for n in (60, 300, 1500)]
    assert errors[0] > 1.3 * errors[1] > 1.3**2 * errors[2]
    assert errors[2] < 0.25


def test_the_exponential_family_form_beats_the_plain_one():
    x = data()
    forms = (ALWS(factor_analysis, num_sleep=600, exponential_family=e) for e in (True, False))
    with_form, plain = (relative_error(svi, x, 6) for svi in forms)
    assert with_form < 0.5 * plain


GRADIENT_MODELS = {
    "kernel": ("kernel", 0.35),
    "features": (KernelRegression(GaussianKernel(features=LinearFeatures(8)), 0.1), 0.5),
    "affine": (KernelRegression(affine=True), 0.8),
    "random-features": ("random-features", 0.35),
    "nystrom": ("nystrom", 0.35),
    "direct": (DirectRegression(KernelRegression(ridge=0.1)), 0.75),
}


@pytest.mark.parametrize("name", GRADIENT_MODELS)
def test_every_gradient_model(name):
    choice, bound = GRADIENT_MODELS[name]
    svi = ALWS(factor_analysis, num_sleep=1200, gradient_model=choice)
    assert relative_error(svi, data(), 2) < bound


def test_a_network_learns():
    model = NetworkRegression(ridge=1.0, num_features=30)
    still = pyro.optim.SGD({"lr": 0.0})
    svi = ALWS(factor_analysis, still, 800, gradient_model=model, adapt=0.02)
    x = data()
    before = relative_error(svi, x, 3)
    for _ in range(40):
        svi.step(x)
    assert relative_error(svi, x, 3) < min(0.75, 0.75 * before)


def test_direct_is_the_plain_form_to_round_off():
    x = data(20)
    directions = []
    for choice in ("kernel", "direct"):
        pyro.set_rng_seed(3)
        svi = ALWS(factor_analysis, num_sleep=300, gradient_model=choice, exponential_family=False)
        done = svi.directions(x)
        directions.append(flat(done.gradient))
        assert math.isfinite(done.loss)
    torch.testing.assert_close(*directions, rtol=1e-10, atol=1e-12)


def replayed(svi, x, families):
    """Ĵ(x*) = Σ_n A_nm (η_n·s(x*_m) − Ψ_n) + log h, term by term, from the run's own dreams."""
    done = svi.estimator.run(svi.programs, (x,), {})
    nodes = done.dream.model.nodes
    z = nodes["z"]["value"].reshape(-1, 2)[: svi.estimator.num_sleep]
    dreams = nodes["x"]["value"].reshape(-1, D)[: svi.estimator.num_sleep]
    leaves = done.leaves()
    w, b, s = leaves["w"], leaves["b"], leaves["s"].exp()
    weights = svi.gradient_model.weights(dreams, x).detach()
    prior = dist.Normal(0.0, 1.0).log_prob(z).sum(1)
    mean = z @ w + b
    if families:
        at_data = dist.Normal(mean[:, None], s).log_prob(x).sum(-1)  # every dream at every datum
        values = at_data + prior[:, None]
        # a density at each datum counts log h(x) once for each weight; the objective counts it once
        base = -0.5 * D * math.log(2 * math.pi) * (weights.sum(0) - 1)
        total = (weights * values).sum(0) - base
    else:
        values = dist.Normal(mean, s).log_prob(dreams).sum(1) + prior
        total = values @ weights
    grads = torch.autograd.grad(total.mean(), [w, b, leaves["s"]])
    return done, dict(zip("wbs", grads, strict=True)), total.sum().item()


@pytest.mark.parametrize("families", [True, False])
def test_the_fast_form_is_the_sum_over_all_pairs(families):
    x = data(20)
    svi = ALWS(factor_analysis, num_sleep=200, exponential_family=families)
    done, grads, total = replayed(svi, x, families)
    found = torch.autograd.grad(done.surrogate, list(done.leaves().values()))
    torch.testing.assert_close(
        flat(dict(zip(done.leaves(), found, strict=True))), flat(grads), rtol=1e-9, atol=1e-10
    )
    assert float(done.loss) == pytest.approx(-total, rel=1e-9)


def test_subsampling_and_scale():
    """The direction is a mean per datum whatever the scale; the loss is on the host's."""
    x = data(40)
    results = []
    for options in ({}, {"scale": 0.5}, {"total": 400, "size": 40}):
        pyro.set_rng_seed(3)
        values = x.repeat(10, 1) if "total" in options else x
        svi = ALWS(lambda v, o=options: factor_analysis(v, **o), num_sleep=400)
        results.append(svi.directions(values))
    first, halved, subsampled = results
    torch.testing.assert_close(flat(halved.gradient), flat(first.gradient))
    assert halved.loss == pytest.approx(0.5 * first.loss, rel=1e-6)
    torch.testing.assert_close(
        flat(subsampled.gradient), flat(exact(x)), rtol=0, atol=0.5 * float(flat(exact(x)).norm())
    )
    assert 5 * first.loss < subsampled.loss < 20 * first.loss


def test_the_scale_of_one_site():
    """The prior has no parameters here: scaling the observation scales the direction."""
    x = data(10)
    directions = []
    for scale in (1.0, 0.25):

        def model(x, scale=scale):
            w = pyro.param("w", LOADINGS.clone())
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
                with poutine.scale(scale=scale):
                    pyro.sample("x", dist.Normal(z @ w, tensor(0.6)).to_event(1), obs=x)

        for families in (True, False):
            pyro.set_rng_seed(3)
            svi = ALWS(model, num_sleep=200, exponential_family=families)
            directions.append(svi.directions(x).gradient["w"])
    torch.testing.assert_close(directions[2], 0.25 * directions[0])
    torch.testing.assert_close(directions[3], 0.25 * directions[1])


def test_evaluation_changes_nothing():
    x = data(10)
    svi = ALWS(factor_analysis, num_sleep=100)
    svi.step(x)
    before = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    pyro.set_rng_seed(3)
    loss = svi.evaluate_loss(x)
    pyro.set_rng_seed(3)
    assert svi.directions(x).loss == pytest.approx(loss, rel=1e-12)
    assert all(torch.equal(v, before[n]) for n, v in pyro.get_param_store().items())


def test_a_users_gradient_model():
    """The nearest dream: any object with weights(x, targets)."""

    class Nearest:
        def weights(self, x, targets):
            return (torch.cdist(x, targets) == torch.cdist(x, targets).amin(0)).to(x)

    svi = ALWS(factor_analysis, num_sleep=4000, gradient_model=Nearest())
    assert relative_error(svi, data(), 1) < 0.75
    svi.load_state_dict(svi.state_dict())
    svi.step(data())
    with pytest.raises(ValueError, match="adapt needs a gradient model with parameters"):
        ALWS(factor_analysis, gradient_model=Nearest(), adapt=0.1)


@pytest.mark.filterwarnings("ignore:the dreams cover the data poorly")
def test_modules_and_minibatches():
    """A network in the model; the parameters are those of the module."""
    decoder = nn.Sequential(nn.Linear(2, 5), nn.Tanh(), nn.Linear(5, D)).double()

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), tensor(0.6)).to_event(1), obs=x)

    svi = ALWS(model, pyro.optim.Adam({"lr": 0.02}), num_sleep=200, gradient_model="nystrom")
    before = {n: p.detach().clone() for n, p in decoder.named_parameters()}
    for start in range(0, 60, 20):
        assert math.isfinite(svi.step(data()[start : start + 20]))
    assert all(not torch.equal(p, before[n]) for n, p in decoder.named_parameters())


def test_a_scale_per_datum_weighs_the_data():
    x = data(4)
    scale = tensor([1.0, 0.5, 2.0, 1.5])
    pyro.set_rng_seed(3)
    found = flat(
        ALWS(lambda v: factor_analysis(v, scale=scale), num_sleep=400).directions(x).gradient
    )
    svi = ALWS(factor_analysis, num_sleep=400)
    by_datum = []
    for i in range(4):
        pyro.set_rng_seed(3)
        svi.estimator.num_data = None
        svi.programs.max_plate_nesting = math.inf
        by_datum.append(flat(svi.directions(x[[i] * 4]).gradient))
    expected = (scale[:, None] * torch.stack(by_datum)).sum(0) / scale.sum()
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_another_batch_size_draws_as_many_dreams():
    svi = ALWS(factor_analysis, num_sleep=100)
    for n, particles in ((10, 10), (30, 4), (200, 1)):
        svi.step(data(n))
        done = svi.estimator.run(svi.programs, (data(n),), {})
        assert len(done.dream.model.nodes["z"]["value"]) == particles


def test_learning_reaches_the_likelihood_of_the_truth():
    x = data(200)
    svi = ALWS(factor_analysis, pyro.optim.Adam({"lr": 0.02}), num_sleep=300)

    def log_likelihood():
        w, b, s = (pyro.param(n).detach() for n in "wbs")
        return float(dist.MultivariateNormal(b, w.T @ w + s.square().diag()).log_prob(x).mean())

    svi.directions(x)
    before = log_likelihood()
    for _ in range(120):
        svi.step(x)
    best = dist.MultivariateNormal(x.mean(0), torch.cov(x.T, correction=0)).log_prob(x).mean()
    assert before < log_likelihood() <= float(best)
    assert float(best) - log_likelihood() < 0.25 * (float(best) - before)


def test_float32_and_the_hosts_svi():
    def model(x):
        w = pyro.param("w", LOADINGS.float())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, 0.6).to_event(1), obs=x)

    x = data(10).float()
    svi = ALWS(model, num_sleep=100)
    assert svi.directions(x).gradient["w"].dtype == torch.float32
    pyro.set_rng_seed(3)
    direction = svi.directions(x)
    pyro.set_rng_seed(3)
    kernel = GaussianKernel(svi.gradient_model.kernel.bandwidth)
    elbo = ALWS_ELBO(num_sleep=100, kernel=kernel, max_plate_nesting=1)
    elbo.num_data = 10  # or its first call runs the model once more to find out
    before = pyro.param("w").detach().clone()
    host = SVI(model, lambda x: None, pyro.optim.SGD({"lr": 0.01}), elbo)
    loss = host.step(x)
    assert loss == pytest.approx(direction.loss, rel=1e-4)
    step = (pyro.param("w").detach() - before) / 0.01
    torch.testing.assert_close(step, 10 * direction.gradient["w"], rtol=1e-3, atol=1e-3)


# the softplus model of section 4.1 -----------------------------------------------------------


def softplus_model(b, sigma, x):
    w = pyro.param("w", tensor(b))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
        mean = softplus(z @ w) - w.square().sum()
        pyro.sample("x", dist.Normal(mean, tensor(sigma)), obs=x)


def softplus_truth(b, sigma, x):
    """The gradient by quadrature: z @ w is N(0, |w|²), one dimension."""
    w = tensor(b).requires_grad_()
    grid = torch.linspace(-8, 8, 4001, dtype=F64)
    log_prior = -0.5 * grid.square()
    mean = softplus(grid * w.norm()) - w.square().sum()
    log_joint = log_prior - 0.5 * ((x[:, None] - mean) / sigma) ** 2
    return torch.autograd.grad(log_joint.logsumexp(1).mean(), w)[0]


@pytest.mark.parametrize(
    ("b", "sigma"), [((0.6, 0.6), 0.3), ((1.4, 1.4), 0.3), ((0.6, 0.6), 1.0), ((1.4, 1.4), 1.0)]
)
@pytest.mark.filterwarnings("ignore:the dreams cover the data poorly")
def test_the_softplus_model(b, sigma):
    """``benchmarks/alws_gradient.py`` has the whole grid."""
    svi = ALWS(lambda v: softplus_model(b, sigma, v), num_sleep=2000, ridge=0.01)
    check_softplus(svi, b, sigma)


@pytest.mark.parametrize("b", [(0.2, 0.2), (0.2, 0.6), (0.6, 0.6), (1.0, 1.0), (0.2, 1.8)])
@pytest.mark.filterwarnings("ignore:the dreams cover the data poorly")
def test_the_softplus_model_with_little_noise(b):
    """Few dreams are near a datum, so that many are needed; the log joint itself is regressed."""
    dreams = softplus(tensor(b).norm() * torch.randn(500, dtype=F64)) - tensor(b).square().sum()
    width = 0.5 * float(nn.functional.pdist(dreams[:, None]).median())
    regression = Nystrom(200, 0.01, GaussianKernel(width))
    svi = ALWS(
        lambda v: softplus_model(b, 0.1, v),
        num_sleep=20_000,
        gradient_model=regression,
        exponential_family=False,
    )
    check_softplus(svi, b, 0.1)


def check_softplus(svi, b, sigma):
    z = torch.randn(100, 2, dtype=F64)
    x = softplus(z.sum(1)) - 2 + 0.1 * torch.randn(100, dtype=F64)
    found = svi.directions(x).gradient["w"]
    assert torch.cosine_similarity(found, softplus_truth(b, sigma, x), 0) > 0.95


# discrete ------------------------------------------------------------------------------------


def discrete(x, kind="bernoulli"):
    top = pyro.param("top", tensor([0.3, -0.4]))
    w = pyro.param("w", tensor([[1.0, -1.0, 0.5], [0.2, 0.7, -0.9]]))
    with pyro.plate("data", len(x)):
        z = pyro.sample("z", dist.Bernoulli(logits=top).to_event(1))
        if kind == "categorical":
            pyro.sample("x", dist.Categorical(logits=z @ w), obs=x)
        else:
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)


def enumerated(x, kind):
    top = tensor([0.3, -0.4]).requires_grad_()
    w = tensor([[1.0, -1.0, 0.5], [0.2, 0.7, -0.9]]).requires_grad_()
    z = tensor(list(itertools.product([0.0, 1.0], repeat=2)))
    prior = dist.Bernoulli(logits=top).log_prob(z).sum(1)
    if kind == "categorical":
        value = dist.Categorical(logits=z @ w).log_prob(x[:, None])
    else:
        value = dist.Bernoulli(logits=z @ w).log_prob(x[:, None]).sum(-1)
    total = (prior + value).logsumexp(1).mean()
    return dict(zip(["top", "w"], torch.autograd.grad(total, [top, w]), strict=True))


@pytest.mark.parametrize("kind", ["bernoulli", "categorical"])
def test_discrete_observations_by_enumeration(kind):
    """Few values of x: the regression is the mean over the dreams of each value."""
    x = torch.tensor([0, 2, 2, 1]) if kind == "categorical" else tensor([[0.0, 1, 1], [1, 0, 0]])
    truth = flat(enumerated(x, kind))
    svi = ALWS(lambda v: discrete(v, kind), num_sleep=1500, kernel=GaussianKernel(0.2), ridge=1e-6)
    found = torch.stack([flat(svi.directions(x).gradient) for _ in range(8)])
    error = found.std(0) / 8**0.5
    assert ((found.mean(0) - truth).abs() < 4.5 * error + 1e-3).all()
    assert float((found.mean(0) - truth).norm()) < 0.1 * float(truth.norm())


# plates, sequences, several sites ---------------------------------------------------------------


def sequence(x):
    a = pyro.param("a", tensor(0.8))
    z = torch.zeros((), dtype=F64)
    for t in range(len(x)):
        z = pyro.sample(f"z{t}", dist.Normal(a * z, 1.0))
        pyro.sample(f"x{t}", dist.Normal(z, tensor(0.5)), obs=x[t])


def test_a_sequence_is_one_datum():
    x = tensor([0.5, 1.0, 0.3])
    a = tensor(0.8).requires_grad_()
    # z = L ε with L_ts = a^(t−s)
    lower = torch.stack(
        [torch.stack([a ** max(t - s, 0) * (t >= s) for s in range(3)]) for t in range(3)]
    )
    marginal = dist.MultivariateNormal(
        tensor([0.0] * 3), lower @ lower.T + 0.25 * torch.eye(3, dtype=F64)
    )
    truth = torch.autograd.grad(marginal.log_prob(x), a)[0]
    svi = ALWS(sequence, num_sleep=1500)
    found = torch.stack([svi.directions(x).gradient["a"] for _ in range(4)])
    assert float((found.mean() - truth).abs()) < 0.1 * float(truth.abs()) + 0.05
    done = svi.estimator.run(svi.programs, (x,), {})
    assert done.dream.model.nodes["z0"]["value"].shape == (1500,)


def test_sequential_plates_of_data():
    """Each turn is a regression of its own; the direction is the vectorised plate's, on average."""

    def model(x):
        w = pyro.param("w", LOADINGS[:1].clone())
        for i in pyro.plate("data", len(x)):
            z = pyro.sample(f"z{i}", dist.Normal(torch.zeros(1, dtype=F64), 1.0).to_event(1))
            pyro.sample(f"x{i}", dist.Normal(z @ w, tensor(0.6)).to_event(1), obs=x[i])

    x = tensor([[1.5], [-0.7]]) * LOADINGS[:1] + 0.4 * torch.randn(2, D, dtype=F64)
    w = LOADINGS[:1].clone().requires_grad_()
    marginal = dist.MultivariateNormal(
        torch.zeros(D, dtype=F64), w.T @ w + 0.36 * torch.eye(D, dtype=F64)
    )
    truth = torch.autograd.grad(marginal.log_prob(x).mean(), w)[0]
    found = ALWS(model, num_sleep=1500).directions(x).gradient["w"]
    assert float((found - truth).norm()) < 0.35 * float(truth.norm())


def test_nested_plates_and_two_sites():
    """Sites of several kinds, one in a plate within the data's: against quadrature."""
    count = torch.tensor([2.0, 0.0, 1.0], dtype=F64)
    y = tensor([[0.3, 0.9], [-0.5, -0.2], [0.1, 0.7]]).T  # the inner plate is left

    def model(count, y):
        a, b = pyro.param("a", tensor(0.5)), pyro.param("b", tensor(0.7))
        with pyro.plate("data", 3, dim=-1):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("count", dist.Poisson((a * z).exp()), obs=count)
            with pyro.plate("inner", 2, dim=-2):
                pyro.sample("y", dist.StudentT(tensor(5.0), b * z, tensor(0.5)), obs=y)

    a, b = tensor(0.5).requires_grad_(), tensor(0.7).requires_grad_()
    z = torch.linspace(-7, 7, 2001, dtype=F64)
    value = -0.5 * z.square() + dist.Poisson((a * z).exp()).log_prob(count[:, None])
    value = value + dist.StudentT(tensor(5.0), b * z, tensor(0.5)).log_prob(y[..., None]).sum(0)
    truth = torch.stack(torch.autograd.grad(value.logsumexp(1).mean(), [a, b]))
    svi = ALWS(model, num_sleep=2000)
    draws = [svi.directions(count, y).gradient for _ in range(4)]
    found = torch.stack([torch.stack([g["a"], g["b"]]) for g in draws]).mean(0)
    assert float((found - truth).norm()) < 0.15 * float(truth.norm())


def test_condition():
    """x = c·w + noise with a latent offset; without c the regression cannot know its part."""

    def model(x, c):
        w = pyro.param("w", tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            pyro.sample("x", dist.Normal(c * w + z, tensor(0.5)), obs=x)

    c = torch.linspace(-2, 2, 40, dtype=F64)
    x = 1.5 * c + torch.randn(40, dtype=F64)
    truth = float((c * (x - 0.5 * c) / 1.25).mean())
    errors = []
    for condition in (lambda x, c: c, None):
        svi = ALWS(model, num_sleep=1600, condition=condition)
        found = [float(svi.directions(x, c).gradient["w"]) for _ in range(3)]
        errors.append(abs(sum(found) / 3 - truth))
    assert errors[0] < 0.1 * truth < errors[1]


def test_log_prior():
    gradients, losses = [], []
    prior = lambda p: dist.Normal(0.0, 0.5).log_prob(p["w"]).sum() - p["s"].sum()  # noqa: E731
    for log_prior in (None, prior):
        pyro.set_rng_seed(3)
        svi = ALWS(lambda v: factor_analysis(v, 40, 10), num_sleep=100, log_prior=log_prior)
        done = svi.directions(data(40))
        gradients.append(done.gradient)
        losses.append(done.loss)
    s = torch.full((D,), 0.6, dtype=F64)
    torch.testing.assert_close(
        gradients[1]["w"] - gradients[0]["w"], -LOADINGS / 0.25 / 40, rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(
        gradients[1]["s"] - gradients[0]["s"], -s / 40, rtol=1e-9, atol=1e-12
    )
    values = {"w": LOADINGS, "s": s}
    assert losses[1] - losses[0] == pytest.approx(-float(prior(values)))


# adaptation, diagnostics, state --------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the dreams cover the data poorly")
@pytest.mark.parametrize("choice", ["kernel", "network"])
def test_adaptation_lowers_the_held_out_error(choice):
    if choice == "kernel":
        features = nn.Linear(D, 3).double()
        model = KernelRegression(GaussianKernel(0.3, features, standardise=True), ridge=5.0)
    else:
        model = NetworkRegression(nn.Sequential(nn.Linear(D, 8), nn.Tanh()).double(), ridge=1.0)
    svi = ALWS(
        factor_analysis,
        pyro.optim.SGD({"lr": 0.0}),
        200,
        gradient_model=model,
        adapt=0.03,
        held_out=100,
    )
    x = data(20)
    errors, parameters = [], {n: v.detach().clone() for n, v in model.parameters().items()}
    for _ in range(40):
        svi.step(x)
        errors.append(svi.diagnostics["held_out_error"])
    assert sum(errors[-5:]) < 0.8 * sum(errors[:5])
    for name, value in model.parameters().items():
        assert value.grad is None
        if name in parameters and "features.bias" not in name:  # which a kernel cannot see
            assert not torch.equal(value, parameters[name]), name


def test_adaptation_every_other_step_and_by_a_users_optimiser():
    made = []

    def sgd(leaves):
        made.append(torch.optim.SGD(leaves, lr=0.1))
        return made[0]

    svi = ALWS(factor_analysis, num_sleep=50, adapt=sgd, adapt_every=2, held_out=20)
    seen = []
    for _ in range(4):
        svi.step(data(10))
        seen.append(svi.gradient_model.kernel.bandwidth)
    assert seen[1] != seen[0] and seen[1] == seen[2] and seen[3] != seen[2]
    assert len(made) == 1


def test_held_out_error_is_near_one_where_nothing_can_be_known():
    kernel = GaussianKernel(1e-3)
    svi = ALWS(factor_analysis, num_sleep=200, held_out=100, kernel=kernel)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        svi.directions(data(10))
    assert svi.diagnostics["held_out_error"] > 0.9
    svi = ALWS(factor_analysis, num_sleep=1000, held_out=100)
    svi.directions(data(10))
    assert svi.diagnostics["held_out_error"] < 0.5


def test_coverage_warns_once():
    svi = ALWS(factor_analysis, num_sleep=200)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.directions(data(10))
    assert svi.diagnostics["coverage_min"] > 0.5
    with pytest.warns(UserWarning, match="cover the data poorly"):
        svi.directions(data(10) + 20)
    assert svi.diagnostics["coverage_mean"] < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.directions(data(10) + 20)


def test_affine_has_a_direction_far_from_the_dreams():
    """Shifted data: the direction of the location, against the closed form."""
    x = data(20) + 6
    errors = []
    for affine in (False, True):
        svi = ALWS(factor_analysis, num_sleep=1000, affine=affine)
        with pytest.warns(UserWarning, match="cover the data poorly"):
            found = svi.directions(x).gradient["b"]
        errors.append(float((found - exact(x)["b"]).norm() / exact(x)["b"].norm()))
    assert errors[1] < 0.3 < 0.8 < errors[0]


STATES = {
    "kernel": {},
    "features": {"kernel": lambda: GaussianKernel(features=LinearFeatures(3), standardise=True)},
    "random-features": {"gradient_model": lambda: RandomFeatures(50)},
    "nystrom": {"gradient_model": lambda: Nystrom(20)},
    "network": {"gradient_model": lambda: NetworkRegression(num_features=10)},
}


@pytest.mark.parametrize("name", STATES)
def test_resume_is_the_same_bit_for_bit(name):
    x = data(10)

    def make():
        options = {key: value() for key, value in STATES[name].items()}
        return ALWS(
            factor_analysis, pyro.optim.Adam({"lr": 0.01}), 60, adapt=1e-2, held_out=20, **options
        )

    first = make()
    for _ in range(3):
        first.step(x)
    state = first.state_dict()
    expected = [first.step(x) for _ in range(3)]
    diagnostics = first.diagnostics
    values = {n: v.detach().clone() for n, v in pyro.get_param_store().items()}
    pyro.clear_param_store()
    second = make()
    second.load_state_dict(state)
    assert [second.step(x) for _ in range(3)] == expected
    assert second.diagnostics == diagnostics
    for n, v in pyro.get_param_store().items():
        assert torch.equal(v, values[n])


# particles -------------------------------------------------------------------------------------


class Linear(nn.Module):
    """z = V x + noise·exp(c)."""

    def __init__(self):
        super().__init__()
        self.v = nn.Parameter(torch.zeros(D, 2, dtype=F64))
        self.c = nn.Parameter(torch.zeros(2, dtype=F64))

    def forward(self, x, noise):
        return {"z": x @ self.v + noise * self.c.exp()}


def test_particles_of_the_posterior_have_the_exact_direction():
    """The posterior of factor analysis is linear: the simulator can be made exact."""
    x = data(10)
    s2 = 0.36
    inverse = torch.linalg.inv(torch.eye(2, dtype=F64) + LOADINGS @ LOADINGS.T / s2)
    simulator = Linear()
    half = torch.linalg.cholesky(inverse)
    simulator.forward = lambda x, noise: {"z": x @ LOADINGS.T @ inverse / s2 + noise @ half.T}
    svi = ALWS(factor_analysis, gradient_model=ParticleSimulator(simulator, 2, 400))
    draws = torch.stack([flat(svi.directions(x).gradient) for _ in range(20)])
    error = draws.std(0) / 20**0.5
    assert ((draws.mean(0) - flat(exact(x))).abs() < 4.5 * error).all()


def test_particles_are_trained():
    x = data(20)
    simulator = Linear()
    svi = ALWS(
        factor_analysis,
        pyro.optim.SGD({"lr": 0.0}),
        gradient_model=ParticleSimulator(simulator, 2, 10),
        adapt=0.06,
    )
    svi.directions(x)
    before = relative_error(svi, x, 5)
    for _ in range(60):
        svi.step(x)
    assert relative_error(svi, x, 5) < 0.5 * before
    assert math.isnan(svi.diagnostics["coverage_mean"])


def test_particles_of_the_wrong_sites():
    simulator = Linear()
    simulator.forward = lambda x, noise: {"h": noise}
    svi = ALWS(factor_analysis, gradient_model=ParticleSimulator(simulator, 2, 2))
    with pytest.raises(ValueError, match=r"latent sites \['z'\]"):
        svi.step(data(5))
    simulator.forward = lambda x, noise: {"z": noise[0]}
    with pytest.raises(ValueError, match="latent site 'z'"):
        svi.step(data(5))


# errors --------------------------------------------------------------------------------------


def programs(kind):
    def model(x):
        w = pyro.param("w", tensor(0.5))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            if kind == "unobserved":
                pyro.sample("x", dist.Normal(w * z, 1.0))
            elif kind == "factor":
                pyro.factor("x", w * z * x)
            elif kind == "delta":
                pyro.sample("x", dist.Delta(w * z), obs=x)
            elif kind == "masked":
                with poutine.mask(mask=x > 0):
                    pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)
            elif kind == "infinite":
                pyro.sample("x", dist.Normal(w * z / 0, 1.0, validate_args=False), obs=x)
            elif kind == "bernoulli":
                pyro.sample("x", dist.Bernoulli(logits=w * z), obs=x)
            else:
                pyro.sample("x", dist.Normal(w * z, 1.0), obs=x)

    return model


X = tensor([0.5, -0.3])
BAD = {
    "unobserved": (X, ValueError, "no observed site"),
    "factor": (X, ValueError, "site 'x' is a pyro.factor"),
    "delta": (X, ValueError, "observed site 'x' is a Delta"),
    "masked": (X, ValueError, "site 'x' is masked"),
    "infinite": (X, ValueError, "site 'x': the model dreams values that are not finite"),
    "bernoulli": (X, ValueError, "observed site 'x': 2 of 2 values lie outside the support"),
    "nan": (tensor([0.5, math.nan]), ValueError, "observed site 'x' has 1 NaN"),
    "empty": (X[:0], ValueError, "empty batch"),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_input_changes_nothing(kind):
    x, error, message = BAD[kind]
    svi = ALWS(programs(kind), num_sleep=20)
    with pytest.raises(error, match=message):
        svi.step(x)
    if "w" in pyro.get_param_store():
        assert float(pyro.param("w").detach()) == 0.5


@pytest.mark.parametrize(
    "kernel",
    [lambda x, y: math.nan * x @ y.T, lambda x, y: -10 * torch.ones(len(x), len(y)).to(x)],
)
def test_a_kernel_that_fails_changes_nothing(kernel):
    svi = ALWS(programs(""), num_sleep=20, kernel=kernel)
    with pytest.raises(FloatingPointError, match="not positive definite"):
        svi.step(X)
    assert float(pyro.param("w").detach()) == 0.5


def test_no_parameters():
    def model(x):
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(tensor(0.0), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    with pytest.raises(ValueError, match="no parameters"):
        ALWS(model, num_sleep=20).step(X)


def test_bad_options():
    with pytest.raises(ValueError, match="num_sleep must be an int of at least 2"):
        ALWS(programs(""), num_sleep=1)
    with pytest.raises(ValueError, match="ridge must be positive"):
        ALWS(programs(""), ridge=0.0)
    with pytest.raises(ValueError, match="held_out"):
        ALWS(programs(""), held_out=-1)
    with pytest.raises(ValueError, match="at least 2 held-out"):
        ALWS(programs(""), adapt=0.1, held_out=1)
    with pytest.raises(ValueError, match="adapt must be a positive rate"):
        ALWS(programs(""), adapt=0.0)
    with pytest.raises(ValueError, match="adapt_every"):
        ALWS(programs(""), adapt_every=0)
    with pytest.raises(TypeError, match="model must be a Pyro program"):
        ALWS(None)
    svi = ALWS(programs(""), num_sleep=20, condition=lambda x: torch.zeros(3))
    with pytest.raises(ValueError, match="condition must return one row for each of the 2 data"):
        svi.step(X)
    svi = ALWS(programs(""), num_sleep=20, log_prior=lambda p: torch.zeros(3))
    with pytest.raises(ValueError, match="log_prior must return one number"):
        svi.step(X)
