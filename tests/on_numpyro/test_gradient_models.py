"""The regressions against dense algebra written out, and their limits."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import random

from numpyro_helmholtz import (
    GaussianKernel,
    KernelRegression,
    LinearFeatures,
    NetworkRegression,
    Nystrom,
    ParticleSimulator,
    RandomFeatures,
)
from numpyro_helmholtz.gradient_models import make_gradient_model
from numpyro_helmholtz.linear_algebra import solve_spd


def points(n, d, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=(n, d)))


X, TARGETS = points(40, 3), points(7, 3, 1)


def gram(x, y, bandwidth=1.5):
    return np.exp(-0.5 * ((np.asarray(x)[:, None] - np.asarray(y)) ** 2).sum(-1) / bandwidth**2)


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_kernel_regression_by_dense_inverse():
    weights = KernelRegression(GaussianKernel(1.5), ridge=0.3).weights(X, TARGETS)
    close(weights, np.linalg.inv(gram(X, X) + 0.3 * np.eye(40)) @ gram(X, TARGETS))


def test_the_ridge_is_the_total_one():
    """The minimiser of Σ (y − f)² + Λ|f|²: a ridge that grew with N would give another."""
    weights = KernelRegression(GaussianKernel(1.5), ridge=0.3).weights(X, TARGETS)
    y, k = np.asarray(points(40, 1, 3)[:, 0]), gram(X, X)
    half = np.linalg.cholesky(k + 1e-13 * np.eye(40)).T
    rows, wanted = np.concatenate([k, 0.3**0.5 * half]), np.concatenate([y, np.zeros(40)])
    coefficients = np.linalg.lstsq(rows, wanted, rcond=None)[0]
    close(y @ weights, coefficients @ gram(X, TARGETS), 1e-6)


def test_affine_part_by_the_joint_system():
    """Lagrange's system of universal kriging, solved densely."""
    weights, coverage = KernelRegression(GaussianKernel(1.5), 0.3, affine=True).solve(X, TARGETS)
    basis, wanted = (np.concatenate([np.ones((len(v), 1)), v], 1) for v in (X, TARGETS))
    system = np.block([[gram(X, X) + 0.3 * np.eye(40), basis], [basis.T, np.zeros((4, 4))]])
    right = np.concatenate([gram(X, TARGETS), wanted.T])
    close(weights, (np.linalg.inv(system) @ right)[:40])
    close(weights.sum(0), np.ones(7))
    close(coverage, KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS).sum(0))


def test_affine_part_is_exact_for_affine_targets_far_away():
    slope = jnp.array([1.0, -2.0, 0.5])
    far = TARGETS + 50
    weights, coverage = KernelRegression(GaussianKernel(1.0), 0.3, affine=True).solve(X, far)
    close((3 + X @ slope) @ weights, 3 + far @ slope, 1e-7)
    assert float(jnp.abs(coverage).max()) < 1e-12


def test_affine_part_on_one_hot_inputs():
    """The columns of a one-hot code sum to the constant one: the pseudo-inverse sees to it."""
    codes = jnp.eye(4)[jnp.arange(40) % 4]
    y = jnp.array([1.0, -2.0, 0.5, 7.0])
    model = KernelRegression(GaussianKernel(1.0), 0.1, affine=True)
    close(codes @ y @ model.weights(codes, jnp.eye(4)), y)
    with pytest.raises(ValueError, match="affine part has 4 columns"):
        model.weights(X[:4], TARGETS)


def test_a_users_kernel():
    def kernel(x, y):
        return (1 + x @ y.T) ** 2

    weights = KernelRegression(kernel, 0.2).weights(X, TARGETS)
    dense = np.linalg.inv(kernel(X, X) + 0.2 * np.eye(40)) @ kernel(X, TARGETS)
    close(weights, dense)
    with pytest.raises(ValueError, match="the kernel must map"):
        KernelRegression(lambda x, y: x, 0.2).weights(X, TARGETS)


def test_a_users_kernel_with_parameters():
    class Scaled:
        def init(self, rng_key, x):
            return {"log_scale": jnp.zeros(x.shape[1])}

        def __call__(self, x, y, params):
            scale = jnp.exp(params["log_scale"])
            return jnp.exp(-jnp.square(x[:, None] * scale - y * scale).sum(-1))

    model = KernelRegression(Scaled(), 0.3)
    gamma = model.init(random.key(0), X)
    assert set(gamma["learned"]["kernel"]) == {"log_scale"}
    close(
        model.weights(X, TARGETS, gamma),
        KernelRegression(GaussianKernel(0.5**0.5), 0.3).weights(X, TARGETS),
    )


def test_nystrom_by_dense_inverse_and_its_limit():
    weights = Nystrom(9, 0.3, GaussianKernel(1.5)).weights(X, TARGETS)
    # The Gaussian kernel sees differences alone, so the centring of its features is no matter.
    u = X[np.arange(9) * 40 // 9]
    knm, kmm = gram(X, u), gram(u, u)
    close(weights, knm @ np.linalg.inv(knm.T @ knm + 0.3 * kmm) @ gram(u, TARGETS))
    every = Nystrom(40, 0.3, GaussianKernel(1.5)).weights(X, TARGETS)
    close(every, KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS), 1e-8)


@pytest.mark.parametrize("width", [0.3, 1.0, 2.0])
def test_nystrom_in_float32_with_many_close_dreams(width):
    x, targets = points(2000, 2), points(50, 2, 1)
    y, model = jnp.sin(3 * x[:, 0]) + x[:, 1], Nystrom(200, 0.1, GaussianKernel(width))
    expected = y @ model.weights(x, targets)
    x, y, targets = (v.astype(jnp.float32) for v in (x, y, targets))
    close(y @ model.weights(x, targets), expected, 0.15)


def test_random_features_by_dense_inverse_and_their_limit():
    model = RandomFeatures(50, 0.3, GaussianKernel(1.5))
    gamma = model.init(random.key(0), X)

    def features(v):
        fixed = gamma["fixed"]
        return math.sqrt(2 / 50) * np.cos(
            (v - X.mean(0)) @ fixed["frequencies"] / 1.5 + fixed["phases"]
        )

    f, g = features(X), features(TARGETS)
    close(model.weights(X, TARGETS, gamma), f @ np.linalg.inv(f.T @ f + 0.3 * np.eye(50)) @ g.T)
    exact = KernelRegression(GaussianKernel(1.5), 0.3).weights(X, TARGETS)
    errors = [
        float(
            jnp.linalg.norm(RandomFeatures(n, 0.3, GaussianKernel(1.5)).weights(X, TARGETS) - exact)
        )
        for n in (40, 2000)
    ]
    assert errors[1] < 0.3 * errors[0]


def test_network_by_dense_inverse():
    model = NetworkRegression(ridge=0.3, num_features=5)
    gamma = model.init(random.key(0), X)
    network = gamma["learned"]["network"]

    def features(v):
        v = (v - X.mean(0)) / X.std(0)
        return np.concatenate(
            [np.ones((len(v), 1)), np.tanh(v @ network["weight"] + network["bias"])], 1
        )

    f, g = features(X), features(TARGETS)
    close(model.weights(X, TARGETS, gamma), f @ np.linalg.inv(f.T @ f + 0.3 * np.eye(6)) @ g.T)


def test_the_solve_and_its_adjoint():
    a, right = points(5, 5), points(5, 2, 1)
    matrix = a @ a.T + jnp.eye(5)
    close(matrix @ solve_spd(matrix, right), right)

    def value(inverse, matrix, right):
        return jnp.sin(inverse(matrix, right)).sum()

    ours = jax.grad(lambda m, r: value(solve_spd, m, r), (0, 1))(matrix, right)
    truth = jax.grad(lambda m, r: value(lambda m, r: jnp.linalg.inv(m) @ r, m, r), (0, 1))(
        matrix, right
    )
    close(0.5 * (ours[0] + ours[0].T), 0.5 * (truth[0] + truth[0].T))
    close(ours[1], truth[1])
    assert bool(jnp.isnan(solve_spd(-jnp.eye(3), jnp.ones((3, 1)))).all())


MODELS = {
    "kernel": lambda: KernelRegression(GaussianKernel(features=LinearFeatures(2)), 0.3),
    "affine": lambda: KernelRegression(GaussianKernel(standardise=True), 0.3, affine=True),
    "random": lambda: RandomFeatures(20, 0.3),
    "nystrom": lambda: Nystrom(9, 0.3),
    "network": lambda: NetworkRegression(None, 0.3, num_features=6),
}


@pytest.mark.parametrize("name", MODELS)
def test_parameters_have_the_gradient_of_finite_differences(name):
    model = MODELS[name]()
    gamma = model.init(random.key(0), X)
    assert "log_ridge" in gamma["learned"]
    coefficients = points(40, 7, 5)

    @jax.jit
    def value(learned):
        return (model.weights(X, TARGETS, {**gamma, "learned": learned}) * coefficients).sum()

    learned = gamma["learned"]
    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size * 1.0)).reshape(p.shape), learned)
    gradient = jax.grad(value)(learned)
    slope = sum(jax.tree.leaves(jax.tree.map(lambda g, d: (g * d).sum(), gradient, direction)))
    ends = [value(jax.tree.map(lambda p, d: p + h * d, learned, direction)) for h in (1e-5, -1e-5)]  # noqa: B023
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


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
    with pytest.raises(TypeError, match="must have init"):
        ParticleSimulator(lambda x, noise: {}, 2)
    with pytest.raises(ValueError, match="even"):
        ParticleSimulator(LinearFeatures(2), 2, num_particles=3)
    for make_one in (lambda: Nystrom(0), lambda: RandomFeatures(0)):
        with pytest.raises(ValueError, match="int of at least 1"):
            make_one()
