"""The reparameterised ELBO: path, Price and the product rule against exact computations."""

import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI, Trace_ELBO

from numpyro_helmholtz import RankOnePrecisionNormal, StochasticBackprop_ELBO
from numpyro_helmholtz.estimators.price import gaussian, root
from numpyro_helmholtz.sites import sampled_values

KEY = random.key(11)
X = random.normal(random.key(3), (4, 3))
RUNS = 2000


def close(a, b, tolerance=1e-10):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def normal(name, loc, scale, obs=None):
    return numpyro.sample(name, dist.Normal(loc, scale).to_event(1), obs=obs)


PARAMS = {
    "w": random.normal(random.key(1), (2, 3)),
    "v": 0.5 * random.normal(random.key(2), (3, 2)),
    "s": jnp.array([-0.5, 0.2]),
    "g": jnp.array(0.3),
}


def param(name):
    return numpyro.param(name, PARAMS[name])


class Deep:
    """x(3) ← z(2) ← top(2); the guide goes up. Plates, a subsample, a mask and a scale."""

    mask = jnp.array([True, True, False, True])

    def __init__(self, size=4, scale=1.0, mask=False, latent=None):
        self.size, self.scale, self.masked = size, scale, mask
        self.latent = latent or (lambda h: dist.Normal(h, jnp.exp(param("s"))).to_event(1))

    def plates(self, x):
        return numpyro.plate("data", self.size, subsample_size=len(x))

    def model(self, x):
        with handlers.scale(scale=self.scale), self.plates(x):
            top = normal("top", jnp.zeros(2), 1.0)
            z = normal("z", jnp.sin(top), 0.8)
            with handlers.mask(mask=self.mask if self.masked else True):
                normal("x", jnp.tanh(z) @ param("w"), 0.5, obs=x)

    def guide(self, x):
        with handlers.scale(scale=self.scale), self.plates(x):
            z = numpyro.sample("z", self.latent(x @ param("v")))
            normal("top", jnp.tanh(z) * param("g"), 0.6 + 0.1 * z**2)


def slopes(elbo, model, guide, x=X, params=PARAMS, key=KEY):
    """The loss and its gradient, compiled."""
    return jax.jit(jax.value_and_grad(lambda p: elbo.loss(key, p, model, guide, x)))(params)


def abstractly(elbo, model, guide):
    """Trace the loss without computing it."""
    jax.eval_shape(lambda p: elbo.loss(KEY, p, model, guide, X), PARAMS)


CASES = {
    "plain": Deep(),
    "subsampled": Deep(size=40),
    "scaled": Deep(size=40, scale=3.0),
    "masked": Deep(mask=True),
}


@pytest.mark.parametrize("name", CASES)
def test_path_equals_the_hosts_elbo_on_the_same_noise(name):
    programs = CASES[name]
    guide = handlers.seed(programs.guide, KEY)
    found, expected = (
        slopes(e, programs.model, guide) for e in (StochasticBackprop_ELBO(), Trace_ELBO())
    )
    jax.tree.map(close, found, expected)


def by_hand(params, z, top, entropy):
    """The masked, scaled ELBO of ``Deep`` at given values, particles first."""

    def density(value, loc, scale):
        return dist.Normal(loc, scale).log_prob(value).sum(-1)

    total = density(top, 0.0, 1.0) + density(z, jnp.sin(top), 0.8)
    likelihood = density(X, jnp.tanh(z) @ params["w"], 0.5)
    total = total + jnp.where(Deep.mask, likelihood, 0)
    loc, scale = X @ params["v"], jnp.exp(params["s"])
    above, spread = jnp.tanh(z) * params["g"], 0.6 + 0.1 * z**2
    if entropy == "closed":
        constant = 0.5 * (1 + jnp.log(2 * jnp.pi))
        total = total + (constant + jnp.log(scale)).sum() + (constant + jnp.log(spread)).sum(-1)
    else:
        total = total - density(z, loc, scale) - density(top, above, spread)
    return 30.0 * total.sum(-1).mean()


@pytest.mark.parametrize("entropy", ["sampled", "closed"])
def test_particles_and_entropies_by_hand(entropy):
    """Three particles, on the noise that the samples show."""
    programs = Deep(size=40, scale=3.0, mask=True)
    elbo = StochasticBackprop_ELBO(3, entropy=entropy)
    loss, found = slopes(elbo, programs.model, programs.guide)
    wake = elbo.programs(programs.model, programs.guide, constrained=True).wake
    drawn = jax.jit(lambda p: sampled_values(wake(KEY, p, (X,), {}).guide))(PARAMS)
    z, top = drawn["z"], drawn["top"]
    assert z.shape == (3, 4, 2)
    noise = (z - X @ PARAMS["v"]) / jnp.exp(PARAMS["s"])
    above = (top - jnp.tanh(z) * PARAMS["g"]) / (0.6 + 0.1 * z**2)

    def objective(params):
        z = X @ params["v"] + jnp.exp(params["s"]) * noise
        top = jnp.tanh(z) * params["g"] + (0.6 + 0.1 * z**2) * above
        return -by_hand(params, z, top, entropy)

    expected = jax.jit(jax.value_and_grad(objective))(PARAMS)
    jax.tree.map(close, (loss, found), expected)


def tril(h):
    scale = jnp.array([[0.9, 0.0], [0.4, 0.6]]) * jnp.exp(param("s"))[:, None]
    return dist.MultivariateNormal(h, scale_tril=scale)


def rank_one(h):
    return RankOnePrecisionNormal(h, h[..., ::-1] + param("s"), jnp.exp(param("s")))


LATENTS = {
    "Normal": None,
    "MultivariateNormal": tril,
    "RankOnePrecisionNormal": rank_one,
    "LogNormal": lambda h: dist.LogNormal(h, jnp.exp(param("s"))).to_event(1),
    "Logistic": lambda h: dist.Logistic(h, jnp.exp(param("s"))).to_event(1),
}


def gradients(elbo, programs, runs=RUNS, key=KEY):
    """Losses and gradients of many runs."""

    def one(key):
        return jax.value_and_grad(elbo.loss, 1)(key, PARAMS, programs.model, programs.guide, X)

    return jax.jit(lambda keys: jax.lax.map(one, keys, batch_size=500))(random.split(key, runs))


def agree(one, other, errors=4.5):
    """Two sets of unbiased estimates have the same mean, in standard errors."""
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        spread = jnp.sqrt((a.var(0) + b.var(0)) / len(a)) + 1e-12
        assert jnp.abs((a.mean(0) - b.mean(0)) / spread).max() < errors


@pytest.mark.parametrize("name", [n for n in LATENTS if n != "Logistic"])
def test_price_has_the_mean_of_the_path(name):
    """For Gaussians, and beside sites that keep the path derivative."""
    programs = Deep(latent=LATENTS[name])
    path = gradients(StochasticBackprop_ELBO(), programs)
    price = gradients(StochasticBackprop_ELBO(estimator="price"), programs, key=random.key(2))
    agree(path, price)


def test_prices_scale_gradient_varies_less_than_the_paths():
    """A smooth model that is close to quadratic over the guide's spread."""
    programs = Deep(latent=lambda h: dist.Normal(h, 0.3 * jnp.exp(param("s"))).to_event(1))
    spread = {}
    for name, options in {
        "path": {"estimator": "path", "entropy": "closed"},
        "price": {"estimator": "price"},
        "exact": {"estimator": "price", "hessian": "exact"},
    }.items():
        _, found = gradients(StochasticBackprop_ELBO(**options), programs, 2000)
        spread[name] = found["s"].var(0).sum()
    assert spread["price"] < 0.5 * spread["path"]
    assert spread["exact"] < 0.7 * spread["price"]


# The four estimators of appendix D.2 for f = c z²/2, whose variances are equations 36 to 39.
C, MU, SIGMA = 1.7, 0.6, 0.8


def parabola():
    """The ELBO is f plus a constant in μ, plus the entropy, closed, in σ."""

    def model():
        z = numpyro.sample("z", dist.Uniform(-1e6, 1e6))
        numpyro.factor("f", C * z**2 / 2)
        numpyro.sample("x", dist.Normal(0.0, 1.0), obs=jnp.zeros(()))

    def guide():
        numpyro.sample("z", dist.Normal(numpyro.param("mu", MU), numpyro.param("sigma", SIGMA)))

    return model, guide


def test_variances_of_the_four_estimators():
    """The gradients in μ and σ; in the covariance they are those in σ over 2σ."""
    model, guide = parabola()
    params = {"mu": jnp.asarray(MU), "sigma": jnp.asarray(SIGMA)}
    runs = 20_000

    def slopes(estimator):
        elbo = StochasticBackprop_ELBO(estimator=estimator, entropy="closed")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            keys = random.split(KEY, runs)
            return jax.jit(jax.vmap(lambda key: jax.grad(elbo.loss, 1)(key, params, model, guide)))(
                keys
            )

    path, price = slopes("path"), slopes("price")

    def near(values, variance):
        """The sample variance in its standard errors; values with kurtosis from the sample."""
        fourth = ((values - values.mean()) ** 4).mean()
        error = jnp.sqrt((fourth - variance**2) / runs)
        assert abs(values.var() - variance) < 4 * error + 1e-18

    near(path["mu"], C**2 * SIGMA**2)
    near(price["mu"], C**2 * SIGMA**2)
    near(price["sigma"], 0.0)
    close(price["sigma"], -(C * SIGMA + 1 / SIGMA))  # the mean, exactly: −∂(f + H)
    near(path["sigma"], 2 * C**2 * SIGMA**2 + MU**2 * C**2)
    z = MU + SIGMA * random.normal(KEY, (runs,))
    f = C * z**2 / 2
    reinforce = (z - MU) / SIGMA**2 * (f - C * (MU**2 + SIGMA**2) / 2)
    near(reinforce, 2 * C**2 * MU**2 + 2.5 * C**2 * SIGMA**2)
    assert abs(path["sigma"].mean() - price["sigma"][0]) < 4 * path["sigma"].std() / runs**0.5


@pytest.mark.parametrize("make", [dist.Normal, tril, rank_one])
def test_a_root_of_the_covariance(make):
    with handlers.seed(rng_seed=0), handlers.substitute(data=PARAMS):
        d = dist.Normal(X[:, :2], jnp.exp(PARAMS["s"])) if make is dist.Normal else make(X[:, :2])
    columns = jnp.stack([root(gaussian(d), jnp.broadcast_to(e, (4, 2))) for e in jnp.eye(2)], -1)
    found = columns @ columns.mT
    if make is dist.Normal:
        close(found, jax.vmap(jnp.diag)(jnp.broadcast_to(d.variance, (4, 2))))
    else:
        close(found, jnp.broadcast_to(d.covariance_matrix, (4, 2, 2)))


@pytest.mark.parametrize(
    ("estimator", "hessian"), [("path", "probes"), ("price", "probes"), ("price", "exact")]
)
def test_gradients_equal_quadrature(monkeypatch, estimator, hessian):
    """One latent, f far from quadratic: summed over the nodes of a rule the gradient is exact."""
    x = jnp.array([0.7])

    def model(x):
        with numpyro.plate("data", 1):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(jnp.sin(2 * z), 0.6), obs=x)

    def guide(x):
        with numpyro.plate("data", 1):
            fn = dist.Normal(numpyro.param("loc", 0.3), numpyro.param("scale", 0.5))
            numpyro.sample("z", fn)

    nodes, weights = np.polynomial.hermite_e.hermegauss(80)
    weights = weights / weights.sum()

    def exact(params):
        z = params["loc"] + params["scale"] * nodes
        value = dist.Normal(0.0, 1.0).log_prob(z) + dist.Normal(jnp.sin(2 * z), 0.6).log_prob(x)
        return -(weights * value).sum() - jnp.log(params["scale"])

    params = {"loc": jnp.asarray(0.3), "scale": jnp.asarray(0.5)}
    elbo = StochasticBackprop_ELBO(estimator=estimator, hessian=hessian, entropy="closed")

    def at(noise):
        def sample(self, key, sample_shape=()):
            return jnp.broadcast_to(self.loc + self.scale * noise, self.shape(sample_shape))

        monkeypatch.setattr(dist.Normal, "sample", sample)
        return jax.grad(elbo.loss, 1)(KEY, params, model, guide, x)

    found = jax.jit(jax.vmap(at))(jnp.asarray(nodes))
    expected = jax.grad(exact)(params)
    for name in params:
        close((weights * found[name]).sum(), expected[name], 1e-9)


def test_product_rule_trains_locations_alone():
    """Equal to the path where only locations move, for several families; else an error."""
    fixed = {
        "Gumbel": lambda h: dist.Gumbel(h, 0.7).to_event(1),
        "RankOnePrecisionNormal": lambda h: RankOnePrecisionNormal(
            h, jnp.array([0.5, -1.0]), jnp.array([1.0, 2.0])
        ),
    }

    def guide_of(make):
        def guide(x):
            with numpyro.plate("data", len(x)):
                z = numpyro.sample("z", make(x @ param("v")))
                normal("top", jnp.tanh(z) * param("g"), 0.7)

        return handlers.seed(guide, KEY)

    params = {"w": PARAMS["w"], "v": PARAMS["v"], "g": PARAMS["g"]}
    for make in fixed.values():
        one, other = (
            slopes(StochasticBackprop_ELBO(estimator=e), Deep().model, guide_of(make), X, params)
            for e in ("product-rule", "path")
        )
        jax.tree.map(close, one, other)


@pytest.mark.parametrize(
    ("latent", "argument"),
    [
        (None, "'scale' of Normal"),
        (LATENTS["Logistic"], "'scale' of Logistic"),
        (LATENTS["LogNormal"], "'loc' of LogNormal"),
        (lambda h: dist.Gamma(jnp.exp(h), 1.0).to_event(1), "'concentration' of Gamma"),
    ],
)
def test_product_rule_refuses_what_it_cannot_do(latent, argument):
    programs = Deep(latent=latent)
    elbo = StochasticBackprop_ELBO(estimator="product-rule")
    with pytest.raises(ValueError, match=f"latent site 'z'.*{argument}.*pole"):
        abstractly(elbo, programs.model, programs.guide)


def test_the_product_rule_is_wrong_for_a_scale():
    """Why it is refused: −E[∂(B f)] with f = z², whose derivative in σ² is 1 exactly."""
    z = SIGMA * random.normal(KEY, (200_000,))

    def bf(z):
        return -(z - SIGMA) * (z + SIGMA) / (2 * SIGMA**2 * z) * z**2

    mean = -jax.vmap(jax.grad(bf))(z)
    assert abs(mean.mean() - 1) < 4 * mean.std() / len(z) ** 0.5  # f is 0 at the pole of B

    def shifted(z):
        return bf(z) * (z**2 + 1) / z**2

    off = -jax.vmap(jax.grad(shifted))(z)
    assert jnp.abs(off).max() > 1e6 and abs(off.mean() - 1) > 5  # f + 1, of the same derivative


def discrete(h):
    return dist.Bernoulli(logits=h).to_event(1)


@pytest.mark.parametrize("estimator", ["path", "price"])
def test_a_latent_without_gradients_is_refused(estimator):
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", discrete(jnp.zeros(2)))
            normal("x", z @ param("w"), 0.5, obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", discrete(x @ param("v")))

    elbo = StochasticBackprop_ELBO(estimator=estimator)
    with pytest.raises(ValueError, match="latent site 'z' of the guide is BernoulliLogits.*RWS"):
        abstractly(elbo, model, guide)


def test_no_closed_entropy_is_refused_by_name():
    latent = lambda h: dist.SoftLaplace(h, jnp.exp(param("s"))).to_event(1)  # noqa: E731
    programs = Deep(latent=latent)
    with pytest.raises(ValueError, match="latent site 'z' of the guide is SoftLaplace.*sampled"):
        abstractly(StochasticBackprop_ELBO(entropy="closed"), programs.model, programs.guide)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "score"}, "estimator must be one of"),
        ({"entropy": "exact"}, "entropy must be one of"),
        ({"hessian": "diagonal"}, "hessian must be one of"),
        ({"num_probes": 0}, "num_probes"),
        ({"num_particles": 0}, "num_particles"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        StochasticBackprop_ELBO(**options)


def test_price_warns_of_kinks():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = normal("z", jnp.zeros(2), 1.0)
            normal("x", jax.nn.relu(z) @ param("w"), 0.5, obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            normal("z", x @ param("v"), jnp.exp(param("s")))

    with pytest.warns(UserWarning, match="relu"):
        abstractly(StochasticBackprop_ELBO(estimator="price"), model, guide)


def test_in_the_hosts_svi():
    programs = Deep(size=40)
    svi = SVI(programs.model, programs.guide, numpyro.optim.Adam(0.01), StochasticBackprop_ELBO(2))
    result = svi.run(KEY, 200, X, progress_bar=False)
    assert result.losses[-20:].mean() < result.losses[:20].mean()


def test_float32_and_global_latents():
    """A latent outside of all plates, in single precision."""
    x = X.astype(jnp.float32)

    def model(x):
        top = normal("top", jnp.zeros(2, jnp.float32), 1.0)
        with numpyro.plate("data", len(x)):
            normal("x", top @ param("w").astype(jnp.float32), 0.5, obs=x)

    def guide(x):
        loc = numpyro.param("loc", jnp.zeros(2, jnp.float32))
        normal("top", loc, jnp.exp(numpyro.param("log", jnp.zeros(2, jnp.float32))))

    params = {n: v.astype(jnp.float32) for n, v in PARAMS.items()}
    params |= {"loc": jnp.zeros(2, jnp.float32), "log": jnp.zeros(2, jnp.float32)}
    seeded = handlers.seed(guide, KEY)
    path, price, host = (
        slopes(e, model, seeded, x, params)[1]
        for e in (
            StochasticBackprop_ELBO(),
            StochasticBackprop_ELBO(estimator="price", hessian="exact"),
            Trace_ELBO(),
        )
    )
    jax.tree.map(partial(close, tolerance=1e-4), path, host)
    assert path["loc"].dtype == jnp.float32
    # The model is linear in its latent: by Price the gradient of the log-scale is exact.
    curvature = (params["w"] ** 2).sum(1) * len(x) / 0.25 + 1
    close(price["log"], curvature - 1, 1e-4)


def test_exact_means_exact_along_inner_plates():
    """Two particles, a plate that the observed site is not in, f quadratic: no variance left."""

    def model(x):
        with numpyro.plate("data", len(x), dim=-1):
            with numpyro.plate("factors", 2, dim=-2):
                z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            mean = (z * jnp.array([[1.0], [-2.0]])).sum(-2, keepdims=True)
            numpyro.sample("x", dist.Normal(mean, 0.5), obs=x[:, 0])

    def guide(x):
        with numpyro.plate("data", len(x), dim=-1), numpyro.plate("factors", 2, dim=-2):
            numpyro.sample("z", dist.Normal(0.3, jnp.exp(param("s")[:, None])))

    def spread(hessian):
        elbo = StochasticBackprop_ELBO(2, estimator="price", hessian=hessian)
        keys, params = random.split(KEY, 8), {"s": PARAMS["s"]}
        found = jax.vmap(lambda key: jax.grad(elbo.loss, 1)(key, params, model, guide, X))
        return jax.jit(found)(keys)["s"]

    exact = spread("exact")
    curvature = 1 + jnp.array([1.0, 4.0]) / 0.25
    expected = 4 * (curvature * jnp.exp(2 * PARAMS["s"]) - 1)
    close(exact, jnp.broadcast_to(expected, (8, 2)))
    assert spread("probes").std(0).min() > 0.1
