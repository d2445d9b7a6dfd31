"""The package's own distributions against dense algebra, scipy and moments."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
import scipy.stats
from jax import random
from numpyro.distributions import kl_divergence

from numpyro_helmholtz import distributions as ours
from numpyro_helmholtz.fisher import families

KEY = random.key(4)
D = 5
RNG = np.random.default_rng(2)
LOC, FACTOR = (jnp.asarray(RNG.normal(size=(3, D))) for _ in range(2))
DIAG = jnp.exp(jnp.asarray(RNG.normal(size=(3, D))))
DRAWS = 200_000


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def rank_one():
    return ours.RankOnePrecisionNormal(LOC, FACTOR, DIAG)


def dense():
    precision = jax.vmap(jnp.diag)(DIAG) + FACTOR[:, :, None] * FACTOR[:, None, :]
    return dist.MultivariateNormal(LOC, precision_matrix=precision)


def test_rank_one_equals_dense_algebra():
    d, full = rank_one(), dense()
    assert d.batch_shape == (3,) and d.event_shape == (D,)
    x = random.normal(KEY, (7, 3, D))
    close(d.log_prob(x), full.log_prob(x))
    close(d.entropy(), full.entropy())
    close(d.mean, full.mean)
    close(d.variance, full.variance)
    close(d.covariance_matrix, full.covariance_matrix)
    close(d.precision_matrix, full.precision_matrix)
    root = jax.vmap(d.root, 0, -1)(jnp.broadcast_to(jnp.eye(D)[:, None], (D, 3, D)))
    close(root @ root.mT, full.covariance_matrix)


def test_rank_one_samples_are_the_transform_of_noise():
    d = rank_one()
    assert d.has_rsample
    x = d.sample(KEY, (DRAWS,))
    assert x.shape == (DRAWS, 3, D)
    noise = random.normal(KEY, x.shape)
    close(x, LOC + d.root(noise))
    away = x - LOC
    found = jnp.einsum("nbi,nbj->bij", away, away) / DRAWS
    variance = d.variance[:, :, None] * d.variance[:, None, :] + d.covariance_matrix**2
    assert jnp.abs((found - d.covariance_matrix) / jnp.sqrt(variance / DRAWS)).max() < 4


def test_rank_one_divergences():
    p, full = rank_one(), dense()
    scale = jnp.linspace(0.5, 2.0, D)
    q = dist.MultivariateNormal(jnp.ones(D), scale_tril=jnp.diag(scale))
    normal = dist.Normal(jnp.ones(D), scale).to_event(1)
    close(kl_divergence(p, normal), kl_divergence(full, q))
    close(kl_divergence(p, dist.Normal(0.0, 1.0).expand([D]).to_event(1)), kl_to_standard(full))
    other = ours.RankOnePrecisionNormal(LOC[::-1], FACTOR[::-1], DIAG[::-1])
    precision = other.precision_matrix
    expected = kl_divergence(full, dist.MultivariateNormal(LOC[::-1], precision_matrix=precision))
    close(kl_divergence(p, other), expected)
    with pytest.raises(NotImplementedError):
        kl_divergence(p, dist.Laplace(jnp.zeros(D), 1.0).to_event(1))
    with pytest.raises(NotImplementedError):
        kl_divergence(p, dist.LogNormal(jnp.zeros(D), 1.0).to_event(1))


def kl_to_standard(p):
    return kl_divergence(p, dist.MultivariateNormal(jnp.zeros(D), scale_tril=jnp.eye(D)))


def test_rank_one_zero_factor_is_the_diagonal_normal():
    """η is 1 there, and its derivative finite."""
    x = random.normal(KEY, (D,))
    d = ours.RankOnePrecisionNormal(LOC[0], jnp.zeros(D), DIAG[0])
    close(d.log_prob(x), dist.Normal(LOC[0], DIAG[0] ** -0.5).to_event(1).log_prob(x))

    def spread(u):
        return ours.RankOnePrecisionNormal(LOC[0], u, DIAG[0]).root(x).sum()

    assert jnp.isfinite(jax.grad(spread)(jnp.zeros(D))).all()


def test_rank_one_broadcasts_expands_and_goes_through_jit():
    d = ours.RankOnePrecisionNormal(jnp.zeros(D), FACTOR, jnp.ones(D))
    assert d.batch_shape == (3,) and d.sample(KEY).shape == (3, D)
    assert d.mean.shape == d.variance.shape == (3, D) and d.entropy().shape == (3,)
    wide = d.expand((4, 3))
    assert wide.sample(KEY, (2,)).shape == (2, 4, 3, D)
    assert wide.log_prob(jnp.zeros(D)).shape == (4, 3)
    back = jax.jit(lambda d: d)(d)
    close(back.log_prob(jnp.ones(D)), d.log_prob(jnp.ones(D)))


def test_rank_one_fisher_is_that_of_the_mean():
    info, exact, how = families.information(rank_one())
    assert exact and how == "closed form" and set(info) == {"loc"}
    close(info["loc"], dense().precision_matrix)


def test_rank_one_refuses_bad_arguments():
    with pytest.raises(ValueError, match="same last dimension"):
        ours.RankOnePrecisionNormal(jnp.zeros(3), jnp.zeros(2), jnp.ones(3))
    with pytest.raises(ValueError, match="same last dimension"):
        ours.RankOnePrecisionNormal(0.0, jnp.zeros(2), jnp.ones(2))
    with numpyro.validation_enabled(), pytest.raises(ValueError, match="precision_diag"):
        ours.RankOnePrecisionNormal(jnp.zeros(2), jnp.zeros(2), jnp.array([1.0, -1.0]))


SHAPES = [-0.7, -0.2, -1e-9, 0.0, 1e-4, 0.03, 0.3]


@pytest.mark.parametrize("shape", SHAPES)
def test_extreme_values_equal_scipy(shape):
    d = ours.GeneralizedExtremeValue(0.3, 1.7, shape)
    exact = scipy.stats.genextreme(-shape, 0.3, 1.7)
    q = jnp.linspace(0.01, 0.99, 21)
    x = d.icdf(q)
    close(x, exact.ppf(q), 1e-10)
    close(d.cdf(x), q, 1e-12)
    close(d.log_prob(x), exact.logpdf(x), 1e-8)
    close(d.entropy(), exact.entropy(), 1e-6)
    close(d.mean, exact.mean(), 1e-6)
    close(d.variance, exact.var(), 1e-5)
    assert (d.support(x)).all()


def test_extreme_values_outside_their_support():
    d = ours.GeneralizedExtremeValue(0.0, 1.0, jnp.array([0.5, -0.5]))
    x = jnp.array([-3.0, 3.0])  # the ends are −2 and 2
    assert not d.support(x).any()
    assert (d.log_prob(x) == -jnp.inf).all()
    close(d.cdf(x), [0.0, 1.0])
    slope = jax.grad(lambda c: ours.GeneralizedExtremeValue(0.0, 1.0, c).log_prob(x)[0])(0.5)
    assert jnp.isfinite(slope)


def test_extreme_values_are_smooth_in_their_shape():
    """Across the switch from the series to the function, and at 0."""

    def sample(c):
        return ours.GeneralizedExtremeValue(0.0, 1.0, c).icdf(0.3)

    def density(c):
        return ours.GeneralizedExtremeValue(0.0, 1.0, c).log_prob(0.8)

    for fn in (sample, density):
        for c in (0.0, 0.06, 0.0625, 0.4):
            step = 1e-5
            expected = (fn(c + step) - fn(c - step)) / (2 * step)
            close(jax.grad(fn)(c), expected, 1e-8)


def test_moments_of_heavy_shapes():
    d = ours.GeneralizedExtremeValue(0.0, 1.0, jnp.array([0.5, 0.99, 1.0]))
    assert (d.variance == jnp.inf).all() and jnp.isfinite(d.mean[:2]).all()
    assert d.mean[2] == jnp.inf


def kolmogorov(sample, cdf):
    return scipy.stats.kstest(np.asarray(sample), cdf).pvalue


@pytest.mark.parametrize("shape", [-0.4, 0.0, 0.6])
def test_extreme_value_samples(shape):
    d = ours.GeneralizedExtremeValue(0.3, 1.7, shape)
    assert d.has_rsample
    assert kolmogorov(d.sample(KEY, (20_000,)), d.cdf) > 0.01


def test_levy_samples_and_density():
    d, exact = ours.Levy(0.5, 1.3), scipy.stats.levy(0.5, 1.3)
    assert d.has_rsample and not dist.Levy(0.5, 1.3).has_rsample
    assert kolmogorov(d.sample(KEY, (20_000,)), exact.cdf) > 0.01
    x = jnp.array([0.6, 1.0, 40.0])
    close(d.log_prob(x), exact.logpdf(x), 1e-12)
    slope = jax.grad(lambda c: ours.Levy(0.5, c).sample(KEY))(1.3)
    close(slope, (d.sample(KEY) - 0.5) / 1.3)


STABLES = {
    (2.0, 0.4): scipy.stats.norm(0, 2**0.5).cdf,
    (1.0, 0.0): scipy.stats.cauchy.cdf,
    (0.5, 1.0): scipy.stats.levy.cdf,
}


@pytest.mark.parametrize("case", STABLES)
def test_stable_samples_with_a_known_distribution(case):
    d = ours.Stable(*case, coords="S")
    assert d.has_rsample
    assert kolmogorov(d.sample(KEY, (20_000,)), STABLES[case]) > 0.01


@pytest.mark.parametrize("alpha", [1.7, 1.0, 0.6])
def test_stable_samples_have_their_characteristic_function(alpha):
    """``E e^{isZ}`` of a skewed stable variable in the coordinates S0, at some s."""
    beta = 0.6
    z = ours.Stable(alpha, beta).sample(KEY, (DRAWS,))
    for s in (0.3, 1.0, 2.5):
        if alpha == 1:
            turn = -s * beta * 2 / jnp.pi * jnp.log(s)
            # the limit that interpolation from both sides has to meet
        else:
            turn = -beta * jnp.tan(jnp.pi * alpha / 2) * (s - s**alpha)
        expected = jnp.exp(-(s**alpha) + 1j * turn)
        found = jnp.exp(1j * s * z)
        error = (found.mean() - expected) * DRAWS**0.5
        assert abs(error) < 4 * jnp.sqrt(2.0)


def test_stable_samples_are_continuous_and_differentiable_across_one():
    def sample(alpha):
        return ours.Stable(alpha, 0.6, 2.0, -1.0).sample(KEY)

    for alpha in (0.98, 0.99, 1.0, 1.01, 1.5):
        low, high = sample(alpha - 1e-9), sample(alpha + 1e-9)
        close(low, high, 1e-6)
        assert jnp.isfinite(jax.grad(sample)(alpha))
    step = 1e-6
    close(jax.grad(sample)(1.5), (sample(1.5 + step) - sample(1.5 - step)) / (2 * step), 1e-6)


def test_stable_has_no_density():
    with pytest.raises(NotImplementedError, match="no closed form"):
        ours.Stable(1.5, 0.0).log_prob(0.0)
    with pytest.raises(ValueError, match="coords"):
        ours.Stable(1.5, 0.0, coords="S1")


@pytest.mark.parametrize(
    ("make", "values", "exact"),
    [
        (dist.Logistic, (0.4, 1.3), scipy.stats.logistic(0.4, 1.3)),
        (dist.Weibull, (1.3, 2.1), scipy.stats.weibull_min(2.1, scale=1.3)),
        (dist.Gumbel, (0.4, 1.3), scipy.stats.gumbel_r(0.4, 1.3)),
        (dist.StudentT, (5.0, 0.4, 1.3), scipy.stats.t(5.0, 0.4, 1.3)),
    ],
)
def test_the_hosts_own_transforms(make, values, exact):
    """Those that the package does not build: their samples are differentiable and right."""
    d = make(*values)
    assert d.has_rsample
    x = d.sample(KEY, (20_000,))
    assert kolmogorov(x, exact.cdf) > 0.01
    slopes = jax.jacobian(lambda *v: (make(*v).sample(KEY, (DRAWS,))).mean(), range(len(values)))
    step = 1e-4
    for i, slope in enumerate(slopes(*values)):
        up, down = list(values), list(values)
        up[i], down[i] = up[i] + step, down[i] - step
        expected = (make(*up).mean - make(*down).mean) / (2 * step)
        spread = make(*values).variance ** 0.5
        assert abs(slope - expected) < 5 * spread / DRAWS**0.5
