"""Amortised learning by wake-sleep against closed forms, quadrature and enumeration."""

import itertools
import math
import pickle
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random

import numpyro_helmholtz as nh
from numpyro_helmholtz.estimators.alws import ALWS_ELBO
from numpyro_helmholtz.estimators.sleep_phase import no_guide

KEY = random.key(3)
RNG = np.random.default_rng(0)
WEIGHT = jnp.asarray(RNG.normal(size=(2, 3)))
BIAS = jnp.asarray(RNG.normal(size=3))
DATA = jnp.asarray(0.8 * RNG.normal(size=(5, 2)) @ WEIGHT + BIAS + 0.4 * RNG.normal(size=(5, 3)))
NOISE = 0.4
PARAMS = {"weight": WEIGHT, "bias": BIAS, "noise": jnp.log(jnp.full(3, NOISE))}


def factors(x, size=None, scale=1.0):
    """Factor analysis, x = z W + b + noise."""
    weight, bias = numpyro.param("weight", WEIGHT), numpyro.param("bias", BIAS)
    noise = numpyro.param("noise", jnp.full(3, NOISE), constraint=dist.constraints.positive)
    plate = numpyro.plate("data", size or len(x), subsample_size=len(x) if size else None)
    with numpyro.handlers.scale(scale=scale), plate:
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
        numpyro.sample("x", dist.Normal(z @ weight + bias, noise).to_event(1), obs=x)


@jax.jit
@jax.grad
def exact(params):
    """The gradient of the mean log-likelihood."""
    noise = jnp.exp(params["noise"])
    covariance = params["weight"].T @ params["weight"] + jnp.diag(noise**2)
    return dist.MultivariateNormal(params["bias"], covariance).log_prob(DATA).mean()


def flat(tree):
    return jnp.concatenate([jnp.ravel(leaf) for leaf in jax.tree.leaves(tree)])


def run(model, args, params, kwargs=None, samples=None, gamma=None, key=KEY, **options):
    """Surrogate's gradient and the pass, of the estimator alone."""
    estimator = ALWS_ELBO(**options)
    programs = estimator.programs(model, no_guide)

    def objective(params):
        return estimator.run(
            programs, key, params, args, kwargs or {}, samples=samples, gamma=gamma
        )

    (value, done), gradient = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return gradient, done, value


def close(a, b, tolerance=1e-9):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# the formula, on given dreams ------------------------------------------------------------------

DREAMS = {"z": RNG.normal(size=(8, 5, 2)), "x": RNG.normal(size=(8, 5, 3)) + np.asarray(BIAS)}
FORM = {"num_sleep": 40, "ridge": 0.3, "kernel": nh.GaussianKernel(1.7)}


def weights_by_hand(x, targets, ridge=0.3, bandwidth=1.7):
    def gram(a, b):
        return np.exp(-0.5 * ((a[:, None] - b) ** 2).sum(-1) / bandwidth**2)

    return np.linalg.inv(gram(x, x) + ridge * np.eye(len(x))) @ gram(x, targets)


def terms_by_hand(params, z):
    """η = (μ/σ², −1/2σ²), and Ψ = log Z − log p(z)."""
    mean, noise = z @ params["weight"] + params["bias"], jnp.exp(params["noise"])
    natural = mean / noise**2, jnp.broadcast_to(-0.5 / noise**2, mean.shape)
    log_z = (0.5 * mean**2 / noise**2 + jnp.log(noise)).sum(-1)
    return natural, log_z - dist.Normal(0, 1).log_prob(z).sum(-1)


def objective_by_hand(params, scale, families):
    z, x = jnp.asarray(DREAMS["z"].reshape(40, 2)), DREAMS["x"].reshape(40, 3)
    weights = weights_by_hand(x, np.asarray(DATA))
    natural, psi = terms_by_hand(params, z)
    if families:
        first, second = (jnp.einsum("nm,nd->md", weights, eta) for eta in natural)
        values = (first * DATA + second * DATA**2).sum(-1) - psi @ weights
    else:
        noise = jnp.exp(params["noise"])
        mean = z @ params["weight"] + params["bias"]
        joint = dist.Normal(mean, noise).log_prob(x).sum(-1) + dist.Normal(0, 1).log_prob(z).sum(-1)
        values = joint @ weights
    return (scale * values).sum() / jnp.sum(scale)


@pytest.mark.parametrize("families", [True, False])
@pytest.mark.parametrize("case", ["plain", "subsample", "scale of each datum"])
def test_direction_on_given_dreams(families, case):
    scale = jnp.arange(1.0, 6.0) if case == "scale of each datum" else 1.0
    kwargs = {"size": 50 if case == "subsample" else None, "scale": scale}
    gradient, done, value = run(
        factors, (DATA,), PARAMS, kwargs, DREAMS, exponential_family=families, **FORM
    )
    scale = jnp.broadcast_to(scale, (5,))
    expected, slope = jax.value_and_grad(objective_by_hand)(PARAMS, scale, families)
    close(value, expected)
    close(flat(gradient), flat(slope))
    total = scale.sum() * (10 if case == "subsample" else 1)
    base = 15 * scale.mean() * (10 if case == "subsample" else 1) * 0.5 * math.log(2 * math.pi)
    close(done.loss, -total * expected + (base if families else 0))


def test_direct_regression_is_the_plain_form():
    plain, _, _ = run(factors, (DATA,), PARAMS, samples=DREAMS, exponential_family=False, **FORM)
    model = nh.DirectRegression(nh.KernelRegression(nh.GaussianKernel(1.7), 0.3))
    direct, done, _ = run(
        factors, (DATA,), PARAMS, samples=DREAMS, num_sleep=40, gradient_model=model
    )
    close(flat(direct), flat(plain), 1e-12)
    assert bool(jnp.isfinite(done.loss))


def test_held_out_dreams_do_not_enter_the_fit():
    options = {**FORM, "num_sleep": 36, "held_out": 4}
    gradient, done, _ = run(factors, (DATA,), PARAMS, samples=DREAMS, **options)
    held = done.held_out
    z, x = DREAMS["z"].reshape(40, 2), DREAMS["x"].reshape(40, 3)
    out = [5, 15, 25, 35]
    close(held.targets, x[out], 0)
    close(held.inputs, np.delete(x, out, 0), 0)
    natural, psi = terms_by_hand(PARAMS, jnp.asarray(z))
    truth = (natural[0] * x + natural[1] * x**2).sum(-1) - psi
    close(held.truth, truth[jnp.array(out)])
    weights = weights_by_hand(np.delete(x, out, 0), x[out])
    parts = natural[0] @ x[out].T + natural[1] @ (x[out] ** 2).T - psi[:, None]
    predicted = (weights * np.delete(parts, out, 0)).sum(0)
    error = np.mean((predicted - truth[jnp.array(out)]) ** 2) / np.var(truth[jnp.array(out)])
    close(done.report["held_out_error"], error)


def test_noise_that_all_entries_share():
    """A scalar noise is the same model as a vector of equal ones, held-out error included."""

    def shared(x):
        noise = numpyro.param("noise", jnp.asarray(NOISE), constraint=dist.constraints.positive)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
            numpyro.sample("x", dist.Normal(z @ WEIGHT + BIAS, noise).to_event(1), obs=x)

    options = {**FORM, "num_sleep": 36, "held_out": 4, "samples": DREAMS}
    each, expected, _ = run(factors, (DATA,), PARAMS, **options)
    one, found, _ = run(shared, (DATA,), {"noise": jnp.log(NOISE)}, **options)
    close(found.loss, expected.loss)
    close(found.report["held_out_error"], expected.report["held_out_error"])
    close(one["noise"], each["noise"].sum())


# factor analysis -------------------------------------------------------------------------------


LOADINGS = jnp.asarray(RNG.normal(size=(2, 10)))
WIDE = {"w": LOADINGS, "b": jnp.zeros(10), "s": jnp.log(jnp.full(10, 0.6))}
MANY = jnp.asarray(
    0.9 * RNG.normal(size=(60, 2)) @ LOADINGS + 0.65 * RNG.normal(size=(60, 10)) + 0.2
)


def wide_factors(x):
    w, b = numpyro.param("w", WIDE["w"]), numpyro.param("b", WIDE["b"])
    s = numpyro.param("s", jnp.full(10, 0.6), constraint=dist.constraints.positive)
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
        numpyro.sample("x", dist.Normal(z @ w + b, s).to_event(1), obs=x)


def wide_likelihood(params):
    covariance = params["w"].T @ params["w"] + jnp.diag(jnp.exp(2 * params["s"]))
    return dist.MultivariateNormal(params["b"], covariance).log_prob(MANY).mean()


def error(model, data, params, truth, count=4, **options):
    """Root mean squared relative error of the direction, over keys in one compilation."""
    estimator = ALWS_ELBO(**options)
    programs = estimator.programs(model, no_guide)
    programs.max_plate_nesting = 1

    def one(key):
        objective = lambda params: estimator.run(programs, key, params, (data,), {})[0]  # noqa: E731
        return flat(jax.grad(objective)(params))

    found = jax.jit(lambda keys: lax.map(one, keys))(random.split(KEY, count))
    return float(jnp.sqrt(jnp.square(found - truth).sum(1).mean() / jnp.square(truth).sum()))


def test_more_dreams_are_better_and_so_is_the_natural_form():
    truth = flat(jax.grad(wide_likelihood)(WIDE))
    case = wide_factors, MANY, WIDE, truth
    small, large = (error(*case, num_sleep=n) for n in (60, 900))
    assert large < 0.5 * small
    assert large < 0.8 * error(*case, num_sleep=900, exponential_family=False)


@pytest.mark.parametrize("name", ["kernel", "random-features", "nystrom", "network"])
def test_every_regression_learns_factor_analysis(name):
    case = factors, DATA, PARAMS, flat(exact(PARAMS))
    assert error(*case, num_sleep=1000, ridge=0.05, gradient_model=name) < 0.5


# the softplus model of section 4.1 -------------------------------------------------------------


def softplus_model(x, noise):
    b = numpyro.param("b", jnp.ones(2))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1).to_event(1))
        mean = jax.nn.softplus(z @ b) - (b**2).sum()
        numpyro.sample("x", dist.Normal(mean, noise), obs=x)


def softplus_gradient(b, x, noise):
    """∇ mean log p(x): b·z is N(0, |b|²), so the integral has one dimension."""
    u = jnp.linspace(-9, 9, 6001)

    def total(b):
        mean = jax.nn.softplus(jnp.linalg.norm(b) * u) - (b**2).sum()
        terms = dist.Normal(mean, noise).log_prob(x[:, None]) - 0.5 * u**2
        return jax.nn.logsumexp(terms, 1).mean()

    return jax.grad(total)(b)


def softplus_cosine(estimator, b, noise, key):
    """Between the estimate and the true gradient on data at b = (1, 1)."""
    programs = estimator.programs(softplus_model, no_guide)
    programs.max_plate_nesting = 1
    first, second, third = random.split(key, 3)
    z = random.normal(first, (100, 2))
    x = jax.nn.softplus(z.sum(1)) - 2 + 0.1 * random.normal(second, (100,))
    objective = lambda p: estimator.run(programs, third, p, (x, noise), {})[0]  # noqa: E731
    found, truth = jax.grad(objective)({"b": b})["b"], softplus_gradient(b, x, noise)
    return found @ truth / jnp.linalg.norm(found) / jnp.linalg.norm(truth)


def test_softplus_gradients_point_along_the_true_ones():
    estimator = ALWS_ELBO(2000, ridge=0.01)
    grid = jnp.array(list(itertools.product((0.6, 1.4), (0.6, 1.4), (0.3, 1.0))))
    cases = grid[:, :2], grid[:, 2], random.split(KEY, len(grid))
    found = jax.jit(lambda c: lax.map(lambda case: softplus_cosine(estimator, *case), c))(cases)
    assert float(found.min()) > 0.95


@pytest.mark.parametrize("b", [(0.2, 0.2), (0.6, 0.6), (1.0, 1.0)])
def test_softplus_gradients_with_little_noise(b):
    """Few dreams are near a datum, so that many are needed; the log joint itself is regressed."""
    draws = np.random.default_rng(0).normal(size=500) * np.linalg.norm(b)
    draws = np.logaddexp(0, draws)
    distances = np.abs(draws[:, None] - draws)[np.triu_indices(500, 1)]
    kernel = nh.GaussianKernel(0.5 * float(np.median(distances)))
    estimator = ALWS_ELBO(
        20_000, gradient_model=nh.Nystrom(200, 0.01, kernel), exponential_family=False
    )
    cosine = jax.jit(lambda b: softplus_cosine(estimator, b, 0.1, KEY))(jnp.array(b))
    assert float(cosine) > 0.95


# a discrete model ------------------------------------------------------------------------------

PRIOR = jnp.array([1.0, 2.0, 1.0]) / 4
TABLE = jnp.array([[1.0, 2.0, 1.0, 4.0], [4.0, 2.0, 1.0, 1.0], [1.0, 1.0, 5.0, 1.0]]) / 8


def discrete(x):
    prior = numpyro.param("prior", jnp.log(PRIOR))
    table = numpyro.param("table", jnp.log(TABLE))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Categorical(logits=prior))
        numpyro.sample("x", dist.Categorical(logits=table[z]), obs=x)


@pytest.mark.parametrize("families", [True, False])
def test_discrete_model_equals_enumeration(families):
    """Dreams in exact proportion: the regression on one-hot x is the posterior mean."""
    counts = np.asarray(PRIOR[:, None] * TABLE * 32).round().astype(int)
    states = [s for s in np.ndindex(3, 4) for _ in range(counts[s])]
    z, x = (jnp.array(v).reshape(8, 4) for v in zip(*states, strict=True))
    data = jnp.array([3, 0, 2, 2])
    params = {"prior": jnp.log(PRIOR), "table": jnp.log(TABLE)}
    gradient, done, _ = run(
        discrete,
        (data,),
        params,
        samples={"z": z, "x": x},
        num_sleep=32,
        ridge=1e-9,
        kernel=nh.GaussianKernel(0.1),
        exponential_family=families,
    )

    def likelihood(params):
        joint = jax.nn.log_softmax(params["prior"])[:, None] + jax.nn.log_softmax(params["table"])
        return jax.nn.logsumexp(joint, 0)[data].mean()

    close(flat(gradient), flat(jax.grad(likelihood)(params)), 1e-7)
    close(done.report["coverage_mean"], 1.0, 1e-7)


# the front end ---------------------------------------------------------------------------------


def test_adaptation_lowers_the_held_out_error():
    kernel = nh.GaussianKernel(6.0, nh.LinearFeatures(3))
    svi = nh.ALWS(factors, numpyro.optim.SGD(1e-9), 200, kernel=kernel, adapt=0.1, adapt_every=2)
    state = svi.init(KEY, DATA)
    before = svi.diagnostics(state)
    assert math.isnan(before["held_out_error"]) and math.isnan(before["coverage_mean"])
    first = svi.run(KEY, 1, DATA, init_state=state, progress_bar=False)
    assert svi.diagnostics(first.state)["bandwidth"] == pytest.approx(6.0)
    result = svi.run(KEY, 59, DATA, init_state=first.state, progress_bar=False)
    start, end = svi.diagnostics(first.state), svi.diagnostics(result.state)
    assert end["held_out_error"] < 0.8 * start["held_out_error"]
    assert end["bandwidth"] != start["bandwidth"] and end["ridge"] != start["ridge"]
    features = svi._gamma(result.state.memory)["learned"]["kernel"]["features"]["weight"]
    assert not bool(
        (features == svi._gamma(state.memory)["learned"]["kernel"]["features"]["weight"]).any()
    )
    assert start["num_sleep"] == 200 and start["affine"] is False
    # Resuming from a saved state is the same, bit for bit.
    saved = pickle.loads(pickle.dumps(jax.tree.map(np.asarray, first.state._replace(rng_key=None))))
    saved = saved._replace(rng_key=first.state.rng_key)
    again = svi.run(KEY, 59, DATA, init_state=saved, progress_bar=False)
    assert bool((again.losses == result.losses).all())
    for a, b in zip(*(jax.tree.leaves(r.state.memory) for r in (again, result)), strict=True):
        assert bool((a == b).all())


def test_training_raises_the_likelihood_and_data_far_away_warn_once():
    far = DATA + 30.0
    svi = nh.ALWS(factors, numpyro.optim.Adam(0.01), 200)
    with pytest.warns(UserWarning, match="cover the data poorly"):
        result = svi.run(KEY, 1, far, progress_bar=False)
    assert svi.diagnostics(result.state)["coverage_mean"] < 0.01
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        svi.run(KEY, 1, far, init_state=result.state, progress_bar=False)
        wide = nh.ALWS(factors, numpyro.optim.Adam(0.02), 200)
        start = {"noise": jnp.full(3, 2.0), "weight": WEIGHT[::-1]}
        state = wide.init(KEY, DATA, init_params=start)
        result = wide.run(KEY, 150, DATA, init_state=state, progress_bar=False)

    def likelihood(params):
        covariance = params["weight"].T @ params["weight"] + jnp.diag(params["noise"] ** 2)
        return float(dist.MultivariateNormal(params["bias"], covariance).log_prob(DATA).mean())

    assert likelihood(result.params) > likelihood(wide.get_params(state)) + 0.5
    assert bool(jnp.isfinite(wide.evaluate(result.state, DATA)))


def test_affine_part_has_a_direction_far_from_the_dreams():
    """Shifted data: the direction of the location, against the closed form."""
    far = MANY[:20] + 6
    covariance = LOADINGS.T @ LOADINGS + 0.36 * jnp.eye(10)
    truth = jnp.linalg.inv(covariance) @ far.mean(0)
    errors = []
    for affine in (False, True):
        found = run(wide_factors, (far,), WIDE, num_sleep=800, affine=affine)[0]["b"]
        errors.append(float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)))
    assert errors[1] < 0.3 < 0.8 < errors[0]


def test_float32_stays_float32():
    def model(x):
        loc = numpyro.param("loc", jnp.zeros(2, jnp.float32))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, jnp.ones(2, jnp.float32)).to_event(1))
            numpyro.sample("x", dist.Normal(z, jnp.float32(0.5)).to_event(1), obs=x)

    with jax.enable_x64(False):
        data = jnp.ones((4, 2))
        single, done, _ = run(model, (data,), {"loc": jnp.zeros(2)}, num_sleep=400)
    assert single["loc"].dtype == jnp.float32 and done.loss.dtype == jnp.float32
    # ∇ log p(x) = (x − loc)/1.25, whose regression is good to some per cent.
    close(single["loc"], jnp.full(2, 0.8), 0.15)


def test_a_sequence_is_one_datum():
    def walk(xs):
        drift = numpyro.param("drift", jnp.array(0.3))
        z = 0.0
        for t, x in enumerate(xs):
            z = numpyro.sample(f"z{t}", dist.Normal(z + drift, 1.0))
            numpyro.sample(f"x{t}", dist.Normal(z, 0.7), obs=x)

    data = jnp.array([0.5, 0.1, 1.4])
    gradient, done, _ = run(walk, (data,), {"drift": jnp.array(0.3)}, num_sleep=1500, ridge=0.01)
    # x is normal: mean t·drift, covariance min(s, t) + 0.49.
    t = jnp.arange(1.0, 4.0)
    precision = jnp.linalg.inv(jnp.minimum(t[:, None], t) + 0.49 * jnp.eye(3))
    truth = t @ precision @ (data - 0.3 * t)
    assert float(gradient["drift"]) == pytest.approx(float(truth), abs=0.12)
    assert done.num_data == 1


def test_a_latent_outside_the_plate_makes_one_datum():
    def shared(xs):
        loc = numpyro.param("loc", jnp.array(0.2))
        z = numpyro.sample("z", dist.Normal(loc, 1.0))
        with numpyro.plate("data", len(xs)):
            numpyro.sample("x", dist.Normal(z, 0.7), obs=xs)

    data = jnp.array([0.9, 0.3, 1.1])
    gradient, done, _ = run(shared, (data,), {"loc": jnp.array(0.2)}, num_sleep=1500, ridge=0.01)
    covariance = jnp.ones((3, 3)) + 0.49 * jnp.eye(3)
    truth = jnp.ones(3) @ jnp.linalg.inv(covariance) @ (data - 0.2)
    assert 3 * float(gradient["loc"]) == pytest.approx(float(truth), abs=0.1)
    assert float(done.num_data) == 3


def test_conditioning_variables_join_the_inputs():
    def regression(x, c):
        slope = numpyro.param("slope", jnp.array(1.5))
        with numpyro.plate("data", len(c)):
            z = numpyro.sample("z", dist.Normal(slope * c, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)

    c = jnp.array([-2.0, 0.0, 1.0, 2.0])
    x = jnp.array([-3.0, 0.5, 1.0, 4.0])
    truth = float((c * (x - 1.5 * c) / 1.25).mean())
    params = {"slope": jnp.array(1.5)}
    found = {
        name: float(
            run(regression, (x, c), params, num_sleep=1600, ridge=0.01, condition=fn)[0]["slope"]
        )
        for name, fn in {"with": lambda x, c: c, "without": None}.items()
    }
    assert found["with"] == pytest.approx(truth, abs=0.1)
    assert abs(found["without"] - truth) > 2 * abs(found["with"] - truth)
    with pytest.raises(ValueError, match="condition must return one row for each of the 4 data"):
        run(regression, (x, c), params, num_sleep=8, condition=lambda x, c: c[:3])


def test_log_prior_counts_once_for_the_whole_data_set():
    def log_prior(params):
        return -3.0 * params["noise"].sum()

    options = {**FORM, "samples": DREAMS}
    without, done, _ = run(factors, (DATA,), PARAMS, {"size": 50}, **options)
    with_it, after, _ = run(factors, (DATA,), PARAMS, {"size": 50}, log_prior=log_prior, **options)
    close(with_it["noise"] - without["noise"], jnp.full(3, -3 * NOISE / 50))  # in log(noise)
    close(with_it["weight"], without["weight"], 0)
    close(after.loss - done.loss, 9 * NOISE)


def test_two_observed_sites_of_which_one_is_no_family():
    def both(x, y):
        loc = numpyro.param("loc", jnp.array(0.1))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, 1.0))
            numpyro.sample("x", dist.Normal(z, 0.5), obs=x)
            numpyro.sample("y", dist.StudentT(5.0, z, 0.5), obs=y)

    x, y = jnp.array([0.4, 1.0]), jnp.array([0.1, 1.6])
    gradient, _, _ = run(both, (x, y), {"loc": jnp.array(0.1)}, num_sleep=1500, ridge=0.01)
    z = jnp.linspace(-9, 9, 4001)
    log_w = (
        dist.Normal(0.1, 1.0).log_prob(z)
        + dist.Normal(z, 0.5).log_prob(x[:, None])
        + dist.StudentT(5.0, z, 0.5).log_prob(y[:, None])
    )
    truth = (jax.nn.softmax(log_w, 1) @ (z - 0.1)).mean()
    assert float(gradient["loc"]) == pytest.approx(float(truth), abs=0.1)


def test_as_a_loss_of_the_hosts_svi():
    svi = numpyro.infer.SVI(factors, no_guide, numpyro.optim.SGD(0.01), ALWS_ELBO(50, ridge=0.3))
    state = svi.init(KEY, DATA)
    after, loss = jax.jit(svi.update)(state, DATA)
    assert bool(jnp.isfinite(loss))
    moved = [bool((svi.get_params(state)[n] != v).any()) for n, v in svi.get_params(after).items()]
    assert all(moved)


# particles -------------------------------------------------------------------------------------


class Linear:
    """z = (x − b) A + noise C, which can be the exact posterior of factor analysis."""

    def __init__(self, exact):
        inner = jnp.linalg.inv(jnp.eye(2) + WEIGHT @ WEIGHT.T / NOISE**2)
        self.start = {"a": WEIGHT.T @ inner / NOISE**2, "c": jnp.linalg.cholesky(inner).T}
        if not exact:
            self.start = {"a": jnp.zeros((3, 2)), "c": jnp.eye(2)}

    def init(self, rng_key, x, noise):
        return self.start

    def apply(self, params, x, noise):
        return {"z": (x - BIAS) @ params["a"] + noise @ params["c"]}


def test_particles_of_the_posterior_have_the_exact_direction():
    model = nh.ParticleSimulator(Linear(True), 2, 4000)
    estimator = ALWS_ELBO(gradient_model=model)
    programs = estimator.programs(factors, no_guide)

    def objective(params):
        return estimator.run(programs, KEY, params, (DATA,), {})[0]

    found, truth = flat(jax.jit(jax.grad(objective))(PARAMS)), flat(exact(PARAMS))
    assert float(jnp.linalg.norm(found - truth) / jnp.linalg.norm(truth)) < 0.05


def test_particles_are_trained():
    still = numpyro.optim.SGD(1e-12)
    svi = nh.ALWS(factors, still, gradient_model=nh.ParticleSimulator(Linear(False), 2), adapt=0.03)
    data = jnp.concatenate([DATA] * 8)
    result = svi.run(KEY, 150, data, progress_bar=False)
    learned = svi._gamma(result.state.memory)["learned"]
    # At the start the particles ignore x; the posterior mean is linear in it.
    assert float(jnp.linalg.norm(learned["a"] - Linear(True).start["a"])) < 0.3
    found = svi.diagnostics(result.state)
    for name in ("held_out_error", "coverage_mean", "coverage_min", "bandwidth", "ridge"):
        assert math.isnan(found[name])  # there is no regression


def test_particles_of_the_wrong_sites():
    class Wrong(Linear):
        def apply(self, params, x, noise):
            return {"h": noise}

    model = nh.ParticleSimulator(Wrong(True), 2, 2)
    with pytest.raises(ValueError, match="must return the latent sites .'z'."):
        run(factors, (DATA,), PARAMS, gradient_model=model)


# bad input -------------------------------------------------------------------------------------


def masked(x):
    with numpyro.handlers.mask(mask=jnp.arange(5) < 3):
        factors(x)


def factor(x):
    factors(x)
    numpyro.factor("penalty", -1.0)


def delta(x):
    loc = numpyro.param("loc", jnp.array(0.0))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Delta(loc), obs=x[:, 0])


def unobserved(x):
    numpyro.sample("z", dist.Normal(numpyro.param("loc", jnp.array(0.0)), 1.0))


def improper(x):
    loc = numpyro.sample("loc", dist.ImproperUniform(dist.constraints.real, (), ()))
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(loc, 1.0).expand([3]).to_event(1), obs=x)


def no_parameters(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(jnp.zeros(3), 1.0).to_event(1), obs=x)


def overflowing(x):
    scale = numpyro.param("scale", jnp.array(1e308))
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        numpyro.sample(
            "x", dist.Normal((10 * scale * z)[..., None], jnp.ones(3)).to_event(1), obs=x
        )


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (masked, "site '.' is masked"),
        (factor, "site 'penalty' is a numpyro.factor"),
        (delta, "observed site 'x' is a Delta"),
        (unobserved, "no observed site"),
        (improper, "site 'loc' is an ImproperUniform"),
        (no_parameters, "no parameters to train"),
        (overflowing, "observed site 'x': the model dreams .* not finite"),
    ],
)
def test_models_that_cannot_be_trained(model, message):
    with pytest.raises(ValueError, match=message):
        nh.ALWS(model, num_sleep=10).init(KEY, DATA)


def test_bad_data_and_kernels():
    svi = nh.ALWS(factors, num_sleep=10)
    state = svi.init(KEY, DATA)
    for bad, message in ((DATA.at[0].set(jnp.nan), "'x' has 3 NaN"), (DATA[:0], "empty batch")):
        with pytest.raises(ValueError, match=message):
            svi.update(state, bad)
    with pytest.raises(ValueError, match="check the kernel"):
        nh.ALWS(factors, num_sleep=10, kernel=lambda x, y: x @ y.T * jnp.nan).init(KEY, DATA)
    with pytest.raises(ValueError, match="the kernel must map"):
        nh.ALWS(factors, num_sleep=10, kernel=lambda x, y: x).init(KEY, DATA)
    # A step that is not finite is left out.
    poor = state._replace(
        memory=state.memory._replace(
            learned=jax.tree.map(lambda v: v * jnp.nan, state.memory.learned)
        )
    )
    after, _ = jax.jit(svi.stable_update)(poor, DATA)
    assert int(after.skipped) == 1
    for name, value in svi.get_params(after).items():
        assert bool((value == svi.get_params(state)[name]).all())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sleep": 1}, "num_sleep must be an int of at least 2"),
        ({"ridge": 0.0}, "ridge must be positive"),
        ({"adapt": -1.0}, "adapt must be a positive rate"),
        ({"adapt": 0.1, "held_out": 1}, "adapt needs at least 2 held-out"),
        ({"adapt_every": 0}, "adapt_every must be an int of at least 1"),
        ({"held_out": -1}, "held_out must be an int of at least 0"),
        ({"gradient_model": "krr"}, "gradient_model must be one of"),
        ({"gradient_model": nh.Nystrom(), "ridge": 0.2}, "Give them to the Nystrom itself"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        nh.ALWS(factors, **options)
    with pytest.raises(TypeError, match="condition must be callable"):
        nh.ALWS(factors, condition=3)


class OnlyOne(nh.GradientModel):
    """A regression of the user's own that counts on the sizes of the sleep set."""

    def solve(self, x, targets, gamma=None):
        """One dream for each datum: weights (N, M) and their sums (M,)."""
        assert x.shape == targets.shape == (12, 1)
        return jnp.eye(12), jnp.ones(12)


def test_the_first_look_at_a_regression_has_the_sizes_of_a_step():
    def model(x):
        loc = numpyro.param("loc", 0.0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(loc, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    svi = nh.ALWS(model, num_sleep=12, gradient_model=OnlyOne())
    x = jnp.arange(12.0)
    _, loss = svi.update(svi.init(random.key(0), x), x)
    assert jnp.isfinite(loss)
