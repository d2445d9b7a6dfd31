"""Kernels against their formula, element by element."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

from pyro_helmholtz import ALWS, GaussianKernel, LinearFeatures
from pyro_helmholtz.kernels import deviation, median_distance, spread

F64 = torch.float64


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def by_loop(a, b, bandwidth):
    return torch.stack(
        [torch.stack([(-0.5 * (u - v).square().sum() / bandwidth**2).exp() for v in b]) for u in a]
    )


def test_the_formula():
    x, y = points(6, 3) + 100, points(4, 3, 1) + 100
    kernel = GaussianKernel(bandwidth=1.7)
    torch.testing.assert_close(kernel(x, y), by_loop(x, y, 1.7), rtol=1e-12, atol=1e-12)
    gram, cross = kernel.grams(x, y)
    torch.testing.assert_close(gram, by_loop(x, x, 1.7), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(cross, by_loop(x, y, 1.7), rtol=1e-12, atol=1e-12)


def test_features_and_standardisation():
    x, y = points(30, 3) * torch.tensor([1.0, 10.0, 0.1]), points(5, 3, 1)
    weight = points(3, 2, 2)
    kernel = GaussianKernel(0.8, features=lambda v: v @ weight, standardise=True)
    a, b = x @ weight, y @ weight
    scale = (a - a.mean(0)).square().mean(0).sqrt()
    torch.testing.assert_close(kernel(x, y), by_loop(a / scale, b / scale, 0.8))


def test_a_feature_that_hardly_varies_keeps_its_scale():
    values = torch.cat([points(20, 1), torch.full((20, 1), 3.0, dtype=F64)], 1)
    assert deviation(values)[1] == 1.0
    assert torch.isfinite(GaussianKernel(1.0, standardise=True)(values, values)).all()


def test_the_bandwidth_is_the_median_distance_of_the_first_sleep_set():
    x = points(40, 2)
    kernel = GaussianKernel()
    assert math.isnan(kernel.bandwidth)
    kernel.prepare(x)
    rows = [(x[i] - x[j]).norm() for i in range(40) for j in range(i)]
    assert kernel.bandwidth == pytest.approx(float(torch.stack(rows).median()), rel=1e-12)
    kernel.prepare(10 * x)
    assert kernel.bandwidth == pytest.approx(float(torch.stack(rows).median()), rel=1e-12)


def test_the_median_leaves_out_equal_points():
    x = torch.tensor([[0.0], [0.0], [0.0], [0.0], [2.0]])
    assert median_distance(x) == 2.0
    assert median_distance(x[:3]) == 1.0


def test_linear_features_are_drawn_once():
    features = LinearFeatures(4)
    assert features.weight is None
    x = points(500, 50)
    first = features(x)
    assert first.shape == (500, 4) and first.dtype == F64
    assert torch.equal(features(x), first)
    assert 0.5 < features.weight.var().item() * 50 < 2


@pytest.mark.parametrize("features", [None, "linear", "module"])
def test_state(features):
    make = {
        None: lambda: None,
        "linear": lambda: LinearFeatures(2),
        "module": lambda: nn.Linear(3, 2).double(),
    }[features]
    x, y = points(20, 3), points(5, 3, 1)
    first, second = GaussianKernel(features=make()), GaussianKernel(features=make())
    first.prepare(x)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(x, y), second(x, y))
    assert first.parameters().keys() == second.parameters().keys()


@pytest.mark.parametrize("features", [None, "linear", "within"])
def test_a_state_of_before_the_first_sleep_set(features):
    """It makes a kernel that has seen one as it was: the next sleep set decides."""
    make = {
        None: lambda: None,
        "linear": lambda: LinearFeatures(2),
        "within": lambda: nn.Sequential(LinearFeatures(2), nn.Tanh()),
    }[features]
    kernel = GaussianKernel(features=make())
    early, fresh = kernel.state_dict(), kernel.parameters().keys()
    x, y = points(20, 3), points(5, 3, 1)
    torch.manual_seed(0)
    first = kernel(x, y)
    width = kernel.bandwidth
    kernel.prepare(10 * x)
    kernel.load_state_dict(early)
    assert math.isnan(kernel.bandwidth) and kernel.parameters().keys() == fresh
    torch.manual_seed(0)
    kernel.prepare(x)
    assert kernel.bandwidth == width and torch.equal(kernel(x, y), first)


@pytest.mark.parametrize("features", [None, "linear"])
def test_a_run_goes_back_to_before_its_first_step(features):
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    net, x = nn.Linear(2, 4).double(), points(10, 4)

    def model(x):
        pyro.module("net", net)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(net(z), 1.0).to_event(1), obs=x)

    kernel = GaussianKernel(features=LinearFeatures(3) if features else None)
    svi = ALWS(model, num_sleep=50, kernel=kernel, adapt=1e-2, held_out=5)
    early, start = svi.state_dict(), {n: p.detach().clone() for n, p in net.named_parameters()}
    svi.step(x)
    runs = []
    for _ in range(2):
        svi.load_state_dict(early)
        net.load_state_dict(start)
        pyro.set_rng_seed(1)
        runs.append([svi.step(x), svi.step(x)])
    assert runs[0] == runs[1]


def test_gradients_by_finite_differences():
    x, y = points(6, 3), points(4, 3, 1)
    kernel = GaussianKernel(1.3, LinearFeatures(2), standardise=True)
    kernel.prepare(x)
    for leaf in kernel.parameters().values():
        exact = torch.autograd.grad(kernel(x, y).sin().sum(), leaf)[0].reshape(-1)
        for i in range(leaf.numel()):
            ends = []
            for step in (1e-6, -2e-6):
                leaf.data.view(-1)[i] += step
                ends.append(float(kernel(x, y).detach().sin().sum()))
            leaf.data.view(-1)[i] += 1e-6
            assert float(exact[i]) == pytest.approx((ends[0] - ends[1]) / 2e-6, abs=1e-7)


def test_spread():
    assert spread(4, 10).tolist() == [0, 2, 5, 7]
    assert spread(3, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("bandwidth", [0.0, -1.0, math.inf, math.nan])
def test_bad_bandwidth(bandwidth):
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        GaussianKernel(bandwidth)


def test_bad_features():
    with pytest.raises(TypeError, match="features must be callable"):
        GaussianKernel(features=3)
    with pytest.raises(ValueError, match="dim must be an int"):
        LinearFeatures(0)
    with pytest.raises(ValueError, match="one row per input"):
        GaussianKernel(1.0, features=lambda v: v.sum(0))(points(4, 2), points(3, 2))
