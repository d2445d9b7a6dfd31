"""The regressions against dense algebra written out, and their limits."""

import math

import pytest
import torch
from torch import nn

from pyro_helmholtz import (
    GaussianKernel,
    KernelRegression,
    LinearFeatures,
    NetworkRegression,
    Nystrom,
    ParticleSimulator,
    RandomFeatures,
)
from pyro_helmholtz.gradient_models import make_gradient_model
from pyro_helmholtz.linear_algebra import solve_spd

F64 = torch.float64


def points(n, d, seed=0):
    return torch.randn(n, d, dtype=F64, generator=torch.Generator().manual_seed(seed))


def eye(n):
    return torch.eye(n, dtype=F64)


X, TARGETS = points(40, 3), points(7, 3, 1)


def gram(x, y, bandwidth):
    return (-0.5 * torch.cdist(x, y).square() / bandwidth**2).exp()


def close(a, b, tolerance=1e-9):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_kernel_regression_by_dense_inverse():
    weights = KernelRegression(GaussianKernel(1.5), ridge=0.3).weights(X, TARGETS)
    close(weights, torch.linalg.inv(gram(X, X, 1.5) + 0.3 * eye(40)) @ gram(X, TARGETS, 1.5))


def test_the_ridge_is_the_total_one():
    """The minimiser of Σ (y − f)² + Λ|f|²: a ridge that grew with N would give another."""
    weights = KernelRegression(GaussianKernel(1.5), ridge=0.3).weights(X, TARGETS)
    y, k = points(40, 1, 3)[:, 0], gram(X, X, 1.5)
    coefficients = torch.linalg.lstsq(
        torch.cat([k, 0.3**0.5 * torch.linalg.cholesky(k + 1e-13 * eye(40)).T]),
        torch.cat([y, torch.zeros(40, dtype=F64)])[:, None],
    ).solution[:, 0]
    close(y @ weights, coefficients @ gram(X, TARGETS, 1.5), 1e-6)


def test_affine_part_by_the_joint_system():
    """Lagrange's system of universal kriging, solved densely."""
    weights, coverage = KernelRegression(GaussianKernel(1.5), 0.3, affine=True).solve(X, TARGETS)
    basis, wanted = (torch.cat([torch.ones(len(v), 1, dtype=F64), v], 1) for v in (X, TARGETS))
    g = gram(X, X, 1.5) + 0.3 * eye(40)
    system = torch.cat(
        [torch.cat([g, basis], 1), torch.cat([basis.T, torch.zeros(4, 4, dtype=F64)], 1)]
    )
    right = torch.cat([gram(X, TARGETS, 1.5), wanted.T])
    close(weights, (torch.linalg.inv(system) @ right)[:40])
    close(weights.sum(0), torch.ones(7, dtype=F64))
    plain = KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS)
    close(coverage, plain.sum(0))


def test_affine_part_is_exact_for_affine_targets_far_away():
    y = 3 + X @ torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    far = TARGETS + 50
    weights, coverage = KernelRegression(GaussianKernel(1.0), 0.3, affine=True).solve(X, far)
    close(y @ weights, 3 + far @ torch.tensor([1.0, -2.0, 0.5], dtype=F64), 1e-7)
    assert float(coverage.detach().abs().max()) < 1e-12


def test_affine_part_on_one_hot_inputs():
    """The columns of a one-hot code sum to the constant one: the pseudo-inverse sees to it."""
    codes = torch.eye(4, dtype=F64)[torch.arange(40) % 4]
    y = torch.tensor([1.0, -2.0, 0.5, 7.0], dtype=F64)
    weights = KernelRegression(GaussianKernel(1.0), 0.1, affine=True).weights(
        codes, torch.eye(4, dtype=F64)
    )
    close(codes @ y @ weights, y)
    with pytest.raises(ValueError, match="affine part has 4 columns"):
        KernelRegression(GaussianKernel(1.0), 0.1, affine=True).weights(X[:4], TARGETS)


def test_a_users_kernel():
    def kernel(x, y):
        return (1 + x @ y.T).square()

    weights = KernelRegression(kernel, 0.2).weights(X, TARGETS)
    close(weights, torch.linalg.inv(kernel(X, X) + 0.2 * eye(40)) @ kernel(X, TARGETS))
    with pytest.raises(ValueError, match="the kernel must map"):
        KernelRegression(lambda x, y: x, 0.2).weights(X, TARGETS)


def test_nystrom_by_dense_inverse_and_its_limit():
    weights = Nystrom(9, 0.3, GaussianKernel(1.5)).weights(X, TARGETS)
    u = X[torch.arange(9) * 40 // 9]
    knm, kmm = gram(X, u, 1.5), gram(u, u, 1.5)
    inner = torch.linalg.inv(knm.T @ knm + 0.3 * kmm)
    close(weights, knm @ inner @ gram(u, TARGETS, 1.5))
    every = Nystrom(40, 0.3, GaussianKernel(1.5)).weights(X, TARGETS)
    close(every, KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS), 1e-8)


@pytest.mark.parametrize("width", [0.3, 1.0, 2.0])
def test_nystrom_in_float32_with_many_close_dreams(width):
    x, targets = points(2000, 2), points(50, 2, 1)
    y, model = (3 * x[:, 0]).sin() + x[:, 1], Nystrom(200, 0.1, GaussianKernel(width))
    expected = y @ model.weights(x, targets)
    close((y.float() @ model.weights(x.float(), targets.float())).double(), expected, 0.15)


def test_random_features_by_dense_inverse_and_their_limit():
    torch.manual_seed(0)
    model = RandomFeatures(50, 0.3, GaussianKernel(1.5))
    weights = model.weights(X, TARGETS)
    mean = X.mean(0)

    def features(v):
        return (2 / 50) ** 0.5 * torch.cos((v - mean) @ model.frequencies / 1.5 + model.phases)

    f, g = features(X), features(TARGETS)
    close(weights, f @ torch.linalg.inv(f.T @ f + 0.3 * eye(50)) @ g.T)
    exact = KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS)
    errors = []
    for count in (100, 10_000):
        torch.manual_seed(1)
        weights = RandomFeatures(count, 0.3, GaussianKernel(1.5)).weights(X, TARGETS)
        errors.append(float((weights - exact).detach().norm()))
    assert errors[1] < 0.3 * errors[0]


def test_network_by_dense_inverse():
    network = nn.Linear(3, 5).double()
    weights = NetworkRegression(network, 0.3).weights(X, TARGETS)
    mean, scale = X.mean(0), X.std(0, unbiased=False)

    def features(v):
        return torch.cat([torch.ones(len(v), 1, dtype=F64), network((v - mean) / scale)], 1)

    f, g = features(X), features(TARGETS)
    close(weights, f @ torch.linalg.inv(f.T @ f + 0.3 * eye(6)) @ g.T)


def test_the_solve_and_its_adjoint():
    a, b = points(5, 5), points(5, 2, 1)
    matrix = (a @ a.T + eye(5)).requires_grad_()
    right = b.clone().requires_grad_()
    close(matrix @ solve_spd(matrix, right), right)
    symmetric = lambda m, r: solve_spd(0.5 * (m + m.T), r)  # noqa: E731
    assert torch.autograd.gradcheck(symmetric, (matrix, right))
    with pytest.raises(FloatingPointError, match="not positive definite"):
        solve_spd(-eye(3), torch.ones(3, 1))
    with pytest.raises(FloatingPointError, match="not positive definite or not finite"):
        solve_spd(math.nan * eye(3), torch.ones(3, 1))


MODELS = {
    "kernel": lambda: KernelRegression(GaussianKernel(features=LinearFeatures(2)), 0.3),
    "affine": lambda: KernelRegression(GaussianKernel(standardise=True), 0.3, affine=True),
    "random": lambda: RandomFeatures(20, 0.3),
    "nystrom": lambda: Nystrom(9, 0.3),
    "network": lambda: NetworkRegression(None, 0.3, num_features=6),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_the_gradient_of_finite_differences(name):
    torch.manual_seed(0)
    model = MODELS[name]()
    model.prepare(X)
    coefficients = points(40, 7, 5)

    def value():
        return (model.weights(X, TARGETS) * coefficients).sum()

    leaves = model.parameters()
    assert "log_ridge" in leaves
    for leaf in leaves.values():
        exact = torch.autograd.grad(value(), leaf, allow_unused=True, materialize_grads=True)[0]
        i = leaf.numel() // 2
        with torch.no_grad():
            leaf.view(-1)[i] += 1e-5
            up = value()
            leaf.view(-1)[i] -= 2e-5
            down = value()
            leaf.view(-1)[i] += 1e-5
        numeric = float(up - down) / 2e-5
        assert float(exact.reshape(-1)[i]) == pytest.approx(numeric, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_state_gives_the_same_weights(name):
    torch.manual_seed(0)
    first = MODELS[name]()
    first.prepare(X)
    for leaf in first.parameters().values():
        leaf.data += 0.1
    expected = first.weights(X, TARGETS)
    second = MODELS[name]()
    second.load_state_dict(first.state_dict())
    assert torch.equal(second.weights(X, TARGETS), expected)


@pytest.mark.parametrize("ridge", [0.0, -0.1, math.inf, math.nan, "1"])
def test_bad_ridge(ridge):
    for make in (KernelRegression, RandomFeatures, Nystrom, NetworkRegression):
        with pytest.raises(ValueError, match="never times the number of sleep samples"):
            make(ridge=ridge)


def test_bad_choices():
    def make(choice, kernel=None, affine=False, ridge=0.1):
        return make_gradient_model(choice, ridge=ridge, kernel=kernel, affine=affine)

    with pytest.raises(ValueError, match="gradient_model must be one of"):
        make("krr")
    with pytest.raises(TypeError, match=r"weights\(x, targets\)"):
        make(object())
    with pytest.raises(ValueError, match="Give them to the Nystrom itself"):
        make(Nystrom(), affine=True)
    with pytest.raises(ValueError, match="Give them to the Nystrom itself"):
        make(Nystrom(), ridge=0.5)
    with pytest.raises(ValueError, match="no affine part"):
        make("nystrom", affine=True)
    with pytest.raises(ValueError, match="no kernel"):
        make("network", kernel=GaussianKernel())
    with pytest.raises(TypeError, match="kernel must be callable"):
        KernelRegression(3.0)
    with pytest.raises(TypeError, match="GaussianKernel"):
        RandomFeatures(kernel=lambda x, y: x @ y.T)
    with pytest.raises(TypeError, match=r"nn\.Module"):
        ParticleSimulator(lambda x, noise: {}, 2)
    with pytest.raises(ValueError, match="even"):
        ParticleSimulator(nn.Identity(), 2, num_particles=3)
    for make_one in (lambda: Nystrom(0), lambda: RandomFeatures(0)):
        with pytest.raises(ValueError, match="int of at least 1"):
            make_one()
