"""The front end: training, the posterior over the model's parameters, resuming, errors."""

import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers

from numpyro_helmholtz import RankOnePrecisionNormal, StochasticBackprop, StochasticBackprop_ELBO

KEY = random.key(6)
X = random.normal(random.key(3), (4, 3))
SIGMA = 0.5


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def init(name, *shape, spread=0.5):
    return numpyro.param(name, lambda key: spread * random.normal(key, shape))


def model(x):
    """Factor analysis with two factors and known noise."""
    w = init("w", 2, 3)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        numpyro.sample("x", dist.Normal(z @ w, SIGMA).to_event(1), obs=x)


def guide(x):
    """In two dimensions every normal distribution has a precision of this form."""
    v, u, d = init("v", 3, 2), init("u", 2), init("d", 2)
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", RankOnePrecisionNormal(x @ v, u, jnp.exp(d)))


@pytest.mark.parametrize("estimator", ["path", "price"])
def test_training_reaches_the_exact_log_likelihood(estimator):
    """The guide can be the posterior, so the bound at the optimum is log p(x)."""
    x = random.normal(random.key(8), (40, 2)) @ random.normal(random.key(9), (2, 3))
    svi = StochasticBackprop(model, guide, numpyro.optim.Adam(0.02), 2, estimator=estimator)
    state = svi.run(KEY, 1500, x, progress_bar=False).state
    w = svi.get_params(state)["w"]
    covariance = w.T @ w + SIGMA**2 * jnp.eye(3)
    exact = dist.MultivariateNormal(jnp.zeros(3), covariance).log_prob(x).sum()
    many = StochasticBackprop(model, guide, num_particles=2000, estimator=estimator)
    gap = float(exact + many.evaluate(state, x))
    assert -0.3 < gap < 1.5, gap


def test_an_update_takes_the_direction():
    svi = StochasticBackprop(model, guide, numpyro.optim.SGD(0.1), 2, estimator="price")
    state = svi.init(KEY, X)
    found = svi.directions(state, X)
    new, loss = jax.jit(svi.update)(state, X)
    close(loss, found.loss)
    before, after = svi.get_params(state), svi.get_params(new)
    assert before.keys() == set("wvud") and found.fisher is None
    for name in before:
        close(after[name], before[name] + 0.1 * found.gradient[name])


def test_default_optimiser_is_adam():
    svi = StochasticBackprop(model, guide)
    state = svi.init(KEY, X)
    new, _ = jax.jit(svi.update)(state, X)
    moved = svi.get_params(new)["w"] - svi.get_params(state)["w"]
    close(jnp.abs(moved), 1e-3, 1e-6)


def test_resume_is_bit_equal():
    options = {"estimator": "price", "parameter_posterior": 10.0}
    svi = StochasticBackprop(model, guide, numpyro.optim.Adam(0.01), 2, **options)
    state = svi.init(KEY, X)
    update = jax.jit(svi.update)
    state, _ = update(state, X)
    leaves, structure = jax.tree.flatten(state._replace(rng_key=random.key_data(state.rng_key)))
    stored = pickle.loads(pickle.dumps([np.asarray(leaf) for leaf in leaves]))
    again = jax.tree.unflatten(structure, stored)
    again = again._replace(rng_key=random.wrap_key_data(again.rng_key))
    other = StochasticBackprop(model, guide, numpyro.optim.Adam(0.01), 2, **options)
    other.init(KEY, X)
    one, two = update(state, X), jax.jit(other.update)(again, X)
    assert float(one[1]) == float(two[1])
    jax.tree.map(
        np.testing.assert_array_equal,
        svi.optim.get_params(one[0].optim_state),
        other.optim.get_params(two[0].optim_state),
    )


def test_scan_and_vmap_over_seeds():
    svi = StochasticBackprop(model, guide, numpyro.optim.Adam(0.01), 2, estimator="price")

    def losses(key):
        return jax.lax.scan(svi.update, svi.init(key, X), jnp.stack([X, 2 * X, X]))[1]

    keys = random.split(KEY, 2)
    found = jax.jit(jax.vmap(losses))(keys)
    assert found.shape == (2, 3)
    close(found[1], jax.jit(losses)(keys[1]), 1e-8)


def test_structure_says_how_each_site_is_trained():
    def mixed(x):
        with numpyro.plate("data", len(x)):
            normal = numpyro.sample("a", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("b", dist.LogNormal(normal, 1.0).to_event(1))
            numpyro.sample("c", dist.SoftLaplace(0.0, 1.0))

    def target(x):
        mixed(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1), obs=x)

    price = StochasticBackprop(target, mixed, estimator="price", hessian="exact")
    assert price.structure(KEY, X) == {
        "a": "price (Hessian: exact), entropy: closed",
        "b": "path (LogNormal is not one of price's Gaussians), entropy: closed",
        "c": "path (SoftLaplace is not one of price's Gaussians), entropy: sampled",
    }
    path = StochasticBackprop(target, mixed).structure(KEY, X)
    assert set(path.values()) == {"path, entropy: sampled"}


# deep latent Gaussian models: h_2 = G_2 ξ_2, h_1 = W f(h_2) + b + G_1 ξ_1


def deep(x, noise_space=True, replay=None):
    """The model; in the space of the noise ξ or in that of the layers h."""
    w, b, g1, g2 = init("w", 2, 2), init("b", 2), init("g1", 2), init("g2", 2)
    out = init("out", 2, 3)
    with numpyro.plate("data", len(x)):
        if noise_space:
            standard = dist.Normal(jnp.zeros(2), 1.0).to_event(1)
            h2 = jnp.exp(g2) * numpyro.sample("xi2", standard)
            h1 = jnp.tanh(h2) @ w + b + jnp.exp(g1) * numpyro.sample("xi1", standard)
        else:
            h2 = numpyro.sample("xi2", dist.Normal(jnp.zeros(2), jnp.exp(g2)).to_event(1))
            down = dist.Normal(jnp.tanh(h2) @ w + b, jnp.exp(g1)).to_event(1)
            h1 = numpyro.sample("xi1", down)
        numpyro.sample("x", dist.Bernoulli(logits=h1 @ out).to_event(1), obs=x)


def deep_guide(x, noise_space=True, rank_one=True):
    with numpyro.plate("data", len(x)):
        h2 = None
        for level in (2, 1):
            mean, log_d = x @ init(f"m{level}", 3, 2), x @ init(f"d{level}", 3, 2)
            if rank_one:
                u = x @ init(f"u{level}", 3, 2)
                fn = RankOnePrecisionNormal(mean, u, jnp.exp(log_d))
            elif noise_space:
                fn = dist.Normal(mean, jnp.exp(-0.5 * log_d)).to_event(1)
            else:
                g = jnp.exp(init(f"g{level}", 2))
                loc = 0.0 if h2 is None else jnp.tanh(h2) @ init("w", 2, 2) + init("b", 2)
                fn = dist.Normal(loc + g * mean, g * jnp.exp(-0.5 * log_d)).to_event(1)
            h2 = numpyro.sample(f"xi{level}", fn)


BITS = random.bernoulli(random.key(5), 0.6, (20, 3)).astype(float)


def test_noise_space_equals_layer_space():
    """The same ELBO and the same path derivative: a change of coordinates."""

    def layers(program):
        return lambda x: program(x, noise_space=False)

    def in_layers(x):
        deep_guide(x, noise_space=False, rank_one=False)

    def in_noise(x):
        deep_guide(x, rank_one=False)

    seeded = handlers.seed(in_noise, KEY), handlers.seed(in_layers, KEY)
    svi = StochasticBackprop(deep, in_noise)
    params = svi.get_params(svi.init(KEY, BITS))
    elbo = StochasticBackprop_ELBO()
    one, two = (
        jax.jit(jax.value_and_grad(lambda p, m=m, g=g: elbo.loss(KEY, p, m, g, BITS)))(params)
        for m, g in ((deep, seeded[0]), (layers(deep), seeded[1]))
    )
    jax.tree.map(close, one, two)


@pytest.mark.parametrize("estimator", ["path", "price"])
def test_a_deep_latent_gaussian_model_learns(estimator):
    optim = numpyro.optim.Adam(0.02)
    svi = StochasticBackprop(deep, deep_guide, optim, 2, estimator=estimator)
    losses = svi.run(KEY, 300, BITS, progress_bar=False).losses
    assert losses[-50:].mean() < losses[:20].mean() - 3


# the posterior over parameters: x ~ N(θ, 1), θ ~ N(0, κ), whose posterior is normal

KAPPA, SIZE = 2.0, 12
DATA = 1.0 + random.normal(random.key(1), (4,))


def conjugate(x, size=SIZE):
    theta = numpyro.param("theta", jnp.asarray(0.3))
    with numpyro.plate("data", size, subsample_size=len(x)):
        numpyro.sample("x", dist.Normal(theta, 1.0), obs=x)


def nothing(x):
    pass


def bayes(**options):
    settings = {"parameter_posterior": KAPPA, "parameter_variance": 0.2, **options}
    return StochasticBackprop(conjugate, nothing, numpyro.optim.SGD(0.1), **settings)


@pytest.mark.parametrize("draws", ["step", "particle"])
def test_the_posteriors_direction(draws):
    """Its mean is exact; of K draws the variance is a K-th; the data's scale is in it."""
    svi = bayes(num_particles=4, parameter_draws=draws)
    state = svi.init(KEY, DATA)
    keys = random.split(KEY, 4000)

    def one(key):
        found = svi.directions(state._replace(rng_key=key), DATA)
        return found.gradient, found.loss

    gradient, loss = jax.jit(jax.vmap(one))(keys)
    mean, tau, weight = 0.3, 0.2, SIZE / 4
    slope = weight * (DATA - mean).sum()
    expected = {
        "theta": (slope - mean / KAPPA) / SIZE,
        "posterior_variance.theta": 0.5 * (1 - tau * (SIZE + 1 / KAPPA)) / SIZE,
    }
    assert gradient.keys() == expected.keys()
    for name, value in expected.items():
        values = gradient[name]
        assert abs(values.mean() - value) < 4 * values.std() / 4000**0.5
    count = 4 if draws == "particle" else 1
    close(gradient["theta"].var(), tau / count, 0.1)
    log_p = dist.Normal(mean, 1.0).log_prob(DATA).sum() - 4 * tau / 2
    divergence = 0.5 * (mean**2 / KAPPA + tau / KAPPA + jnp.log(KAPPA / tau) - 1)
    exact = -weight * log_p + divergence
    assert abs(loss.mean() - exact) < 4 * loss.std() / 4000**0.5
    at_mean = -weight * dist.Normal(mean, 1.0).log_prob(DATA).sum() + divergence
    close(svi.evaluate(state, DATA), at_mean)


def test_the_posterior_is_found():
    svi = bayes(num_particles=10, parameter_draws="particle")
    state = svi.run(KEY, 2000, DATA, progress_bar=False).state
    (mean, variance) = svi.posterior(state)["theta"]
    precision = SIZE + 1 / KAPPA
    close(mean, SIZE * DATA.mean() / precision, 0.03)
    close(variance, 1 / precision, 0.1)
    assert set(svi.get_params(state)) == {"theta"}


def test_a_posterior_beside_latents():
    """Only the model's parameters are random; the start is as given."""
    svi = StochasticBackprop(model, guide, parameter_posterior=5.0, estimator="price")
    state = svi.init(KEY, X)
    posterior = svi.posterior(state)
    assert set(posterior) == {"w"}
    close(posterior["w"][1], jnp.full((2, 3), 1e-6), 1e-9)
    state, _ = jax.jit(svi.stable_update)(state, X)
    assert set(svi.get_params(state)) == set("wvud")
    bad, _ = jax.jit(svi.stable_update)(state, X * jnp.nan)
    assert int(bad.skipped) == 1
    jax.tree.map(np.testing.assert_array_equal, svi.posterior(bad), svi.posterior(state))


def test_errors_of_the_posterior():
    def shared(x):
        init("w", 2, 3)
        guide(x)

    with pytest.raises(ValueError, match="parameter 'w' is used by the model and by the guide"):
        StochasticBackprop(model, shared, parameter_posterior=1.0).init(KEY, X)

    def bare(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z[..., :1], 1.0).to_event(1), obs=x[:, :1])

    with pytest.raises(ValueError, match="needs parameters of the model"):
        StochasticBackprop(bare, guide, parameter_posterior=1.0).init(KEY, X)
    with pytest.raises(ValueError, match="parameter_posterior=κ"):
        StochasticBackprop(model, guide).posterior(None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parameter_posterior": 0.0}, "parameter_posterior must be a positive number"),
        ({"parameter_posterior": 1.0, "parameter_variance": -1.0}, "parameter_variance"),
        ({"parameter_draws": "datum"}, "parameter_draws must be one of"),
        ({"estimator": "reinforce"}, "estimator must be one of"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StochasticBackprop(model, guide, **options)


def test_programs_that_cannot_be_trained():
    def discrete(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=x @ init("v", 3, 2)).to_event(1))

    def bits(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(0.5 * jnp.ones(2)).to_event(1))
            numpyro.sample("x", dist.Normal(z @ init("w", 2, 3), 1.0).to_event(1), obs=x)

    with pytest.raises(ValueError, match="latent site 'z' of the guide is BernoulliLogits"):
        StochasticBackprop(bits, discrete).init(KEY, X)
    with pytest.raises(ValueError, match="no observed site"):
        StochasticBackprop(lambda x: guide(x), guide).init(KEY, X)
    with pytest.raises(ValueError, match="missing from the guide"):
        StochasticBackprop(model, nothing).init(KEY, X)
