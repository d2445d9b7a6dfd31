"""Natural forms against the hosts' log-densities, and the registry."""

import jax
import jax.numpy as jnp
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import transforms as nt
from scipy.stats import nbinom

import numpyro_helmholtz as nh
from numpyro_helmholtz import exponential_families as families
from numpyro_helmholtz.exponential_families import exponential_family

A, B, P = jnp.array([-1.3, 0.2, 2.0]), jnp.array([0.6, 1.1, 2.3]), jnp.array([0.1, 0.5, 0.83])
TRIL = jnp.array([[1.2, 0.0, 0.0], [0.4, 0.8, 0.0], [-0.3, 0.5, 1.5]])
CASES = {
    "normal": dist.Normal(A, B),
    "normal with one scale": dist.Normal(A, 0.7),
    "log-normal": dist.LogNormal(A, B),
    "half-normal": dist.HalfNormal(B),
    "bernoulli logits": dist.Bernoulli(logits=A),
    "bernoulli probs": dist.Bernoulli(probs=P),
    "binomial logits": dist.Binomial(7, logits=A),
    "binomial probs": dist.Binomial(jnp.array([3, 5, 9]), probs=P),
    "negative binomial logits": dist.NegativeBinomialLogits(4.0, A),
    "negative binomial probs": dist.NegativeBinomialProbs(4.0, P),
    "negative binomial by mean": dist.NegativeBinomial2(B, 3.0),
    "gamma-poisson": dist.GammaPoisson(3.0, B),
    "geometric logits": dist.Geometric(logits=A),
    "geometric probs": dist.Geometric(probs=P),
    "poisson": dist.Poisson(B),
    "categorical logits": dist.Categorical(logits=jnp.stack([A, B])),
    "categorical probs": dist.Categorical(probs=jnp.stack([P, P[::-1]]) / P.sum()),
    "multinomial logits": dist.Multinomial(6, logits=jnp.stack([A, B])),
    "multinomial probs": dist.Multinomial(6, probs=jnp.stack([P, P[::-1]]) / P.sum()),
    "exponential": dist.Exponential(B),
    "gamma": dist.Gamma(1.0 + B, B),
    "chi-squared": dist.Chi2(2.0 + B),
    "inverse gamma": dist.InverseGamma(1.0 + B, B),
    "beta": dist.Beta(1.0 + B, 1.5 + P),
    "dirichlet": dist.Dirichlet(jnp.stack([B, B + 1])),
    "von mises": dist.VonMises(A, B),
    "multivariate normal": dist.MultivariateNormal(jnp.stack([A, B]), scale_tril=TRIL),
    "multivariate normal, precision": dist.MultivariateNormal(A, precision_matrix=TRIL @ TRIL.T),
    "multivariate normal of low rank": dist.LowRankMultivariateNormal(A, TRIL[:, :2], B),
    "sigmoid of a normal": dist.TransformedDistribution(
        dist.Normal(A, B), [nt.AffineTransform(0.5, 2.0), nt.SigmoidTransform()]
    ),
}


def rebuilt(fn, value):
    """η·s(x) − log Z + log h(x) with all dimensions of a batch element summed."""
    form = exponential_family(fn)
    total = form.log_base(value) - form.log_normaliser
    for eta, s in zip(form.natural, form.statistics(value), strict=True):
        product = eta * s
        extra = tuple(range(total.ndim, product.ndim))
        total = total + product.sum(extra)
    return total, form


def log_prob(fn, value):
    """The host's; SciPy's where the host's is an approximation (its log-beta is good to 1e-6)."""
    if isinstance(fn, dist.GammaPoisson) and not isinstance(fn, dist.NegativeBinomialLogits):
        return nbinom.logpmf(value, fn.concentration, fn.rate / (1 + fn.rate))
    return fn.log_prob(value)


@pytest.mark.parametrize("name", CASES)
def test_natural_form_equals_the_log_density(name):
    fn = CASES[name]
    value = fn.sample(random.key(3), (4,))
    total, _ = rebuilt(fn, value)
    assert total.shape == (4, *fn.batch_shape)
    assert float(jnp.abs(total - log_prob(fn, value)).max()) < 1e-10


@pytest.mark.parametrize("name", ["normal", "bernoulli logits", "gamma", "multivariate normal"])
def test_wrappers_are_taken_off(name):
    fn = CASES[name]
    wrapped = fn.expand((5, *fn.batch_shape)).mask(True).to_event(1)
    value = wrapped.sample(random.key(4))
    total, _ = rebuilt(wrapped, value)
    assert float(jnp.abs(total.sum(-1) - wrapped.log_prob(value)).max()) < 1e-10


def test_logits_of_exactly_zero_have_the_slope_of_the_density():
    def total(logits, value):
        return rebuilt(dist.Bernoulli(logits=logits), value)[0].sum()

    slopes = [float(jax.grad(total)(jnp.zeros(1), jnp.array([v]))[0]) for v in (0.0, 1.0)]
    assert slopes == pytest.approx([-0.5, 0.5])


@pytest.mark.parametrize("value", [-800.0, 800.0])
def test_saturated_units_are_finite(value):
    form = exponential_family(dist.Bernoulli(logits=jnp.array([value])))
    assert bool(jnp.isfinite(form.log_normaliser).all())
    form = exponential_family(dist.Bernoulli(probs=jnp.array([float(value > 0)])))
    assert bool(jnp.isfinite(form.natural[0]).all())


def test_what_is_none_is_none():
    assert exponential_family(dist.StudentT(3.0, A, B)) is None
    assert exponential_family(dist.Uniform(0.0, B)) is None
    base = dist.Normal(jnp.zeros(3), 1.0)
    moving = dist.TransformedDistribution(base, [nt.AffineTransform(A, B)])
    assert exponential_family(moving) is None  # the transform may hold parameters
    assert exponential_family(dist.TransformedDistribution(base, [nt.ExpTransform()]))


def test_fixed_arguments_are_named():
    assert exponential_family(dist.Binomial(7, logits=A)).fixed
    assert not exponential_family(dist.Normal(A, B)).fixed


@pytest.mark.parametrize("wrong", [None, "Normal", dist.Normal(0.0, 1.0), lambda: 0])
def test_the_registry_refuses_what_is_no_class(wrong):
    with pytest.raises(TypeError, match="register_exponential_family needs a distribution class"):
        nh.register_exponential_family(wrong)


def test_the_registry_takes_a_users_family(monkeypatch):
    monkeypatch.setattr(families, "_RULES", dict(families._RULES))

    class Mine(dist.Laplace):
        pass

    assert exponential_family(Mine(A, B)) is None

    @nh.register_exponential_family(Mine)
    def rule(d):
        """Own text."""
        statistics = lambda x: (jnp.abs(x),)  # noqa: E731
        return families.ExponentialFamily(
            (-1 / d.scale,), statistics, jnp.log(2 * d.scale), jnp.zeros_like
        )

    assert rule.__doc__ == "Own text."
    fn = Mine(0.0, B)
    value = fn.sample(random.key(0), (3,))
    assert float(jnp.abs(rebuilt(fn, value)[0] - fn.log_prob(value)).max()) < 1e-12
