"""Imputation: the chain's stationary distribution, passing of arguments, errors."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_helmholtz import impute

from .programs import bernoulli, patterns

KEY = random.key(2)
W = jnp.array([[1.5, -1.0, 2.0], [-0.5, 2.0, 0.7]])
B = jnp.array([-0.3, 0.2, -0.8])
TOP = jnp.array([0.4, -0.6])


def posterior_logits(x):
    """log p(x, h) for all four h, as logits: (N, 4)."""
    h = patterns(2)
    log_h = dist.Bernoulli(logits=TOP).log_prob(h).sum(-1)
    return log_h + dist.Bernoulli(logits=h @ W + B).log_prob(x[:, None]).sum(-1)


def model(x):
    """The latent is the number of a pattern of two bits."""
    log_h = dist.Bernoulli(logits=TOP).log_prob(patterns(2)).sum(-1)
    with numpyro.plate("data", len(x)):
        h = numpyro.sample("h", dist.Categorical(logits=log_h))
        bernoulli("x", patterns(2)[h] @ W + B, obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("h", dist.Categorical(logits=posterior_logits(x)))


def marginal(x, mask):
    """p(v_m | v_o) of one datum over all patterns that agree with it."""
    every = patterns(3)
    agree = jnp.where(mask, every == x, True).all(1)
    log_x = jax.nn.logsumexp(posterior_logits(every), 1)
    return every, jax.nn.softmax(jnp.where(agree, log_x, -jnp.inf))


N = 20_000


@pytest.mark.parametrize("given", [[True, False, False], [False, False, True], [False] * 3])
def test_the_stationary_distribution_is_the_conditional(given):
    """The guide is the exact posterior; many chains at once."""
    x = jnp.broadcast_to(jnp.array([1.0, 0.0, 1.0]), (N, 3))
    mask = jnp.broadcast_to(jnp.array(given), (N, 3))
    start = jnp.zeros((N, 3))
    found = impute(KEY, {}, model, guide, x, mask, 30, start=start)
    assert found.shape == x.shape and found.dtype == x.dtype
    np.testing.assert_array_equal(found[mask], x[mask])
    every, probability = marginal(x[0], mask[0])
    share = jnp.stack([(found == pattern).all(1).mean() for pattern in every])
    error = jnp.sqrt(probability * (1 - probability) / N) + 1e-12
    assert jnp.abs((share - probability) / error).max() < 4


def test_the_mean_of_the_last_states():
    x = jnp.broadcast_to(jnp.array([1.0, jnp.nan, jnp.nan]), (200, 3))
    mask = ~jnp.isnan(x)
    found = impute(KEY, {}, model, guide, x, mask, 520, keep=500)
    every, probability = marginal(jnp.array([1.0, 0.0, 0.0]), mask[0])
    np.testing.assert_array_equal(found[:, 0], 1.0)
    np.testing.assert_allclose(found.mean(0), probability @ every, atol=0.01)
    last = impute(KEY, {}, model, guide, x, mask, 520, keep=0)
    assert set(np.unique(last)) <= {0.0, 1.0}


def test_one_step_is_the_mean_of_one_state():
    """The same key; integers become floating point in a mean."""
    x = jnp.zeros((6, 3), int)
    mask = jnp.zeros((6, 3), bool).at[:, 0].set(True)
    one = impute(KEY, {}, model, guide, x, mask, 4)
    mean = impute(KEY, {}, model, guide, x, mask, 4, keep=1)
    assert one.dtype == x.dtype and jnp.issubdtype(mean.dtype, jnp.floating)
    np.testing.assert_array_equal(one, mean)
    other = impute(random.key(9), {}, model, guide, x, mask, 4)
    assert not np.array_equal(one, other)


def linear(y, x, *, scale):
    """A continuous site, another observed one, more arguments and parameters."""
    w = numpyro.param("w", jnp.ones((2, 3)))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z @ w, scale).to_event(1), obs=x)
        numpyro.sample("y", dist.Normal(z.sum(-1), 0.5), obs=y)


WEIGHTS = jnp.array([[1.0, 0.5, -0.4], [0.2, -1.0, 0.8]])


def exact(y, x, *, scale):
    """The posterior of z given x and y, of the model with ``WEIGHTS``."""
    features = jnp.concatenate([WEIGHTS / scale, jnp.full((2, 1), 2.0)], 1)
    precision = jnp.eye(2) + features @ features.T
    values = jnp.concatenate([x / scale, 2.0 * y[:, None]], 1)
    mean = jnp.linalg.solve(precision, features @ values.T).T
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", dist.MultivariateNormal(mean, precision_matrix=precision))


def test_continuous_data_with_other_arguments():
    """x is among the arguments; the chain's mean is that of the joint normal distribution."""
    scale = 0.7
    x = jnp.broadcast_to(jnp.array([0.8, 0.0, 0.0]), (4000, 3))
    y = jnp.full(4000, -0.5)
    mask = jnp.zeros(x.shape, bool).at[:, 0].set(True)
    found = impute(KEY, {"w": WEIGHTS}, linear, exact, x, mask, 60, y, x, keep=1, scale=scale)
    columns = jnp.concatenate([WEIGHTS, jnp.ones((2, 1))], 1)
    noise = jnp.diag(jnp.array([scale**2] * 3 + [0.25]))
    covariance = columns.T @ columns + noise
    seen, hidden = jnp.array([0, 3]), jnp.array([1, 2])
    gain = covariance[hidden][:, seen] @ jnp.linalg.inv(covariance[seen][:, seen])
    mean = gain @ jnp.array([0.8, -0.5])
    rest = covariance[hidden][:, hidden] - gain @ covariance[seen][:, hidden]
    error = jnp.sqrt(jnp.diag(rest) / 4000)
    assert jnp.abs((found[:, 1:].mean(0) - mean) / error).max() < 4
    np.testing.assert_allclose(jnp.cov(found[:, 1:].T), rest, atol=0.1)


def bad(**changes):
    settings = {"x": jnp.zeros((4, 3)), "mask": jnp.ones((4, 3), bool), "steps": 3, "keep": 0}
    settings |= {"model": model, "guide": guide, "start": None} | changes
    impute(
        KEY,
        {},
        settings["model"],
        settings["guide"],
        settings["x"],
        settings["mask"],
        settings["steps"],
        keep=settings["keep"],
        start=settings["start"],
    )


def copied(x):
    with numpyro.plate("data", len(x)):
        h = numpyro.sample("h", dist.Categorical(logits=jnp.zeros(4)))
        bernoulli("x", patterns(2)[h] @ W + B, obs=x + 0)


def headless(x):
    pass


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask": jnp.ones((4, 3))}, "observed_mask must be bool.*got float"),
        ({"mask": jnp.ones((4, 2), bool)}, r"shape \(4, 3\)"),
        ({"steps": 0}, "num_steps must be"),
        ({"keep": 4}, "keep must be between"),
        ({"start": jnp.zeros(3)}, "start must have"),
        ({"x": jnp.full((4, 3), jnp.nan)}, "NaN in entries"),
        ({"x": jnp.zeros((0, 3)), "mask": jnp.ones((0, 3), bool)}, "data in it"),
        ({"model": copied}, r"no site observes x, of \['x'\]"),
        ({"guide": headless}, "latent site 'h' of the model is missing from the guide"),
    ],
)
def test_errors(changes, message):
    with pytest.raises(ValueError, match=message):
        bad(**changes)


def test_whole_numbers_of_a_continuous_site_are_refused():
    def continuous(x):
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Categorical(jnp.ones(4) / 4))
            numpyro.sample("x", dist.Normal(patterns(2)[h] @ W, 1.0).to_event(1), obs=x)

    x = jnp.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match="site 'x' draws float64 but x is int64"):
        impute(KEY, {}, continuous, guide, x, x > 2, 2)
