"""Kernels against their formula, element by element."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen
from jax import random

from numpyro_helmholtz import GaussianKernel, LinearFeatures
from numpyro_helmholtz.kernels import deviation, median_distance, spread


def points(n, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, d))


def by_loop(a, b, bandwidth):
    return np.array([[np.exp(-0.5 * ((u - v) ** 2).sum() / bandwidth**2) for v in b] for u in a])


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_the_formula():
    x, y = points(6, 3) + 100, points(4, 3, 1) + 100
    kernel = GaussianKernel(bandwidth=1.7)
    close(kernel(x, y), by_loop(x, y, 1.7))
    gram, cross = kernel.grams(x, y, kernel.init(random.key(0), x))
    close(gram, by_loop(x, x, 1.7))
    close(cross, by_loop(x, y, 1.7))


def test_features_and_standardisation():
    x, y = points(30, 3) * np.array([1.0, 10.0, 0.1]), points(5, 3, 1)
    weight = points(3, 2, 2)
    kernel = GaussianKernel(0.8, features=lambda v: v @ weight, standardise=True)
    a, b = x @ weight, y @ weight
    close(kernel(x, y), by_loop(a / a.std(0), b / a.std(0), 0.8), 1e-9)


def test_a_feature_that_hardly_varies_keeps_its_scale():
    values = jnp.concatenate([points(20, 1), jnp.full((20, 1), 3.0)], 1)
    assert deviation(values)[1] == 1.0
    assert bool(jnp.isfinite(GaussianKernel(1.0, standardise=True)(values, values)).all())


def test_the_bandwidth_is_the_median_distance():
    x = points(40, 2)
    rows = sorted(np.linalg.norm(x[i] - x[j]) for i in range(40) for j in range(i))
    params = GaussianKernel().init(random.key(0), jnp.asarray(x))
    close(jnp.exp(params["log_bandwidth"]), rows[(len(rows) - 1) // 2])


def test_the_median_leaves_out_equal_points():
    x = jnp.array([[0.0], [0.0], [0.0], [0.0], [2.0]])
    assert median_distance(x) == 2.0
    assert median_distance(x[:3]) == 1.0
    assert median_distance(x[:1]) == 1.0
    # Equal rows whose squared distance, by matrix products, is round-off and not zero.
    far = jnp.repeat(jnp.asarray(points(3, 7)) + 50, 20, 0)
    rows = sorted(
        float(jnp.linalg.norm(far[20 * i] - far[20 * j])) for i in range(3) for j in range(i)
    )
    close(median_distance(far - far.mean(0)), rows[1], 1e-9)


def test_linear_features():
    features = LinearFeatures(4)
    x = jnp.asarray(points(500, 50))
    params = features.init(random.key(0), x)
    close(features.apply(params, x), x @ params["weight"])
    assert 0.5 < float(params["weight"].var() * 50) < 2


@pytest.mark.parametrize("features", [LinearFeatures(2), linen.Dense(2, param_dtype=jnp.float64)])
def test_gradients_by_finite_differences(features):
    x, y = jnp.asarray(points(6, 3)), jnp.asarray(points(4, 3, 1))
    kernel = GaussianKernel(1.3, features, standardise=True)
    params = kernel.init(random.key(1), x)

    @jax.jit
    def value(params):
        return jnp.sin(kernel(x, y, params)).sum()

    direction = jax.tree.map(lambda p: jnp.cos(jnp.arange(p.size * 1.0)).reshape(p.shape), params)
    _, slope = jax.jvp(value, (params,), (direction,))
    ends = [value(jax.tree.map(lambda p, d: p + h * d, params, direction)) for h in (1e-6, -1e-6)]  # noqa: B023
    assert float(slope) == pytest.approx(float(ends[0] - ends[1]) / 2e-6, abs=1e-7)


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
