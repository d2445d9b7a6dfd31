"""Directions against enumeration; the estimators as ELBOs of NumPyro's SVI."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import pytest
from jax import random
from numpyro import handlers
from numpyro.infer import SVI

from numpyro_helmholtz import RWS, RWS_ELBO, WakeSleep, WakeSleep_ELBO
from numpyro_helmholtz.estimators.base import score
from numpyro_helmholtz.trace import Programs

from .programs import SBN, bernoulli, patterns

KEY = random.key(3)
X = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
SBN_ = SBN()
DOWN = ["p1.b", "p1.w", "p2.b", "p2.w", "top"]
UP = ["q1.b", "q1.w", "q2.b", "q2.w"]


def flat(grads, names):
    return jnp.concatenate([grads[name].reshape(-1) for name in names])


def gradient_of(fn, names):
    """The gradient of a scalar function of the parameters."""
    return flat(jax.jit(jax.grad(fn))(SBN_.values), names)


def draws(front, x, n):
    """Gradients of n passes by parameter name, shape (n, ...)."""
    svi = front(SBN_.model, SBN_.guide)
    state = svi.init(KEY, x)

    def one(key):
        return svi.directions(state._replace(rng_key=key), x).gradient

    return jax.jit(jax.vmap(one))(random.split(KEY, n))


def many(front, x, n, names):
    found = draws(front, x, n)
    return np.concatenate([np.reshape(found[name], (n, -1)) for name in names], 1)


def mean_and_error(values):
    return values.mean(0), values.std(0) / len(values) ** 0.5


def within(values, expected, errors=4.5):
    mean, error = mean_and_error(values)
    assert (np.abs(mean - expected) <= errors * error + 1e-9).all(), (mean - expected) / error


def rws(k, **options):
    return partial(RWS, num_particles=k, max_plate_nesting=1, **options)


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def test_theta_tends_to_the_exact_gradient():
    exact = gradient_of(lambda p: SBN_.log_likelihood(p, X).mean(), DOWN)
    distance = []
    for k in (2, 50, 5000):
        values = many(rws(k, sleep_weight=0.0), X, 20, DOWN)
        distance.append(np.sqrt(np.square(values - exact).mean()))
    assert distance[0] > 2 * distance[1] > 4 * distance[2]
    mean, error = mean_and_error(values)
    bias = np.abs(exact).max() * 20 / 5000
    assert (np.abs(mean - exact) <= 4.5 * error + bias).all()


def pairs_expectation(params, log_of):
    """E over two particles by enumeration of ``Σ_s w̃_s log_of``: all pairs of latents."""
    h1, h2 = SBN_.latents()
    total = 0.0
    for x in X:
        log_p, log_q = SBN_.log_joint(params, x, h1, h2), SBN_.log_guide(params, x, h1, h2)
        log_w = jax.lax.stop_gradient(log_p - log_q)
        prob = jnp.exp(jax.lax.stop_gradient(log_q[:, None] + log_q[None, :]))
        pair = jnp.stack(jnp.broadcast_arrays(log_w[:, None], log_w[None, :]))
        share = jax.nn.softmax(pair, 0)
        value = log_of(log_p, log_q)
        total = total + (prob * (share[0] * value[:, None] + share[1] * value[None, :])).sum()
    return total / len(X)


def test_fixed_k_has_the_importance_sampling_expectation():
    expected_p = gradient_of(partial(pairs_expectation, log_of=lambda p, q: p), DOWN)
    expected_q = gradient_of(partial(pairs_expectation, log_of=lambda p, q: q), UP)
    for names, expected in ((DOWN, expected_p), (UP, expected_q)):
        within(many(rws(2, sleep_weight=0.0), X, 4000, names), expected)


def test_baseline_changes_only_the_variance():
    on = many(rws(4, sleep_weight=0.0), X, 2000, UP)
    off = many(rws(4, sleep_weight=0.0, baseline=False), X, 2000, UP)
    (a, ea), (b, eb) = mean_and_error(on), mean_and_error(off)
    assert (np.abs(a - b) <= 4.5 * np.sqrt(ea**2 + eb**2)).all()
    assert on.var(0).sum() < 0.8 * off.var(0).sum()


@pytest.mark.parametrize("front", [rws(2, sleep_weight=1.0), WakeSleep])
def test_sleep_direction(front):
    h1, h2 = SBN_.latents()
    x = patterns(3)[:, None]
    weight = jnp.exp(SBN_.log_joint(SBN_.values, x, h1, h2))
    assert float(weight.sum()) == pytest.approx(1.0)
    exact = gradient_of(lambda p: (weight * SBN_.log_guide(p, x, h1, h2)).sum(), UP)
    within(many(front, X, 4000, UP), exact)


def test_wake_sleep_theta():
    h1, h2 = SBN_.latents()
    q = jnp.exp(SBN_.log_guide(SBN_.values, X[:, None], h1, h2))
    exact = gradient_of(lambda p: (q * SBN_.log_joint(p, X[:, None], h1, h2)).sum(1).mean(), DOWN)
    within(many(partial(WakeSleep, num_particles=10), X, 1000, DOWN), exact)


def wake_directions(x, samples):
    k = samples["h1"].shape[0]
    programs = Programs(SBN_.model, SBN_.guide, k, 1)

    def objective(params):
        wake = programs.wake(KEY, params, (x,), {}, samples=samples)
        w = wake.weights()
        theta = score(wake.model, wake.layout, w)
        return theta + score(wake.guide, wake.layout, w - 1 / k, observed=False)

    return jax.jit(jax.grad(objective))(SBN_.values)


def test_one_batch_or_two():
    x = patterns(3)[:6]
    bits = random.bernoulli(KEY, 0.5, (5, 6, 3)).astype(int)
    h = {"h1": bits[..., :2], "h2": bits[..., 2:]}
    whole = wake_directions(x, h)
    first = wake_directions(x[:3], {n: v[:, :3] for n, v in h.items()})
    second = wake_directions(x[3:], {n: v[:, 3:] for n, v in h.items()})
    jax.tree.map(lambda w, a, b: close(w, (a + b) / 2), whole, first, second)


@pytest.mark.parametrize("sleep_weight", [0.0, 0.5, 1.0])
def test_uniform_scale_leaves_the_direction(sleep_weight):
    found = []
    for model, guide in [
        (SBN_.model, SBN_.guide),
        (handlers.scale(SBN_.model, scale=7.0), handlers.scale(SBN_.guide, scale=7.0)),
    ]:
        svi = rws(4, sleep_weight=sleep_weight)(model, guide)
        found.append(svi.directions(svi.init(KEY, X), X))
    jax.tree.map(close, found[0].gradient, found[1].gradient)
    assert float(found[1].loss) == pytest.approx(7 * float(found[0].loss), rel=1e-12)


def test_subsample_scale_leaves_the_direction():
    def programs(size):
        def model(x):
            with handlers.substitute(data={"data": jnp.arange(2)}):
                data = numpyro.plate("data", size, subsample_size=2)
            with data:
                h2 = bernoulli("h2", SBN_.param("top"))
                h1 = bernoulli("h1", SBN_.layer("p2", h2))
                bernoulli("x", SBN_.layer("p1", h1), obs=x)

        def guide(x):
            with handlers.substitute(data={"data": jnp.arange(2)}):
                data = numpyro.plate("data", size, subsample_size=2)
            with data:
                h1 = bernoulli("h1", SBN_.layer("q1", x))
                bernoulli("h2", SBN_.layer("q2", h1))

        return model, guide

    found = []
    for size in (2, 50):
        svi = rws(4, sleep_weight=0.0)(*programs(size))
        found.append(svi.directions(svi.init(KEY, X), X))
    jax.tree.map(close, found[0].gradient, found[1].gradient)
    assert float(found[1].loss) == pytest.approx(25 * float(found[0].loss), rel=1e-12)


ELBOS = {
    "rws": (RWS_ELBO, RWS),
    "wake-sleep": (WakeSleep_ELBO, WakeSleep),
}


@pytest.mark.parametrize("name", ELBOS)
def test_as_elbo_of_the_hosts_svi(name, recwarn):
    """Same key, same samples: the loss, and its gradient minus the direction times B."""
    make, front = ELBOS[name]
    svi = front(SBN_.model, SBN_.guide, num_particles=4)
    state = svi.init(KEY, X)
    expected = svi.directions(state, X)
    run_key = random.split(random.split(state.rng_key)[1])[0]
    elbo = make(4)

    def loss(params):
        return elbo.loss(run_key, params, SBN_.model, SBN_.guide, X)

    value, grads = jax.jit(jax.value_and_grad(loss))(SBN_.values)
    assert float(value) == pytest.approx(float(expected.loss), rel=1e-12)
    jax.tree.map(lambda g, e: close(g, -2 * e), grads, expected.gradient)
    host = SVI(SBN_.model, SBN_.guide, numpyro.optim.Adam(0.01), loss=elbo)
    result = host.run(KEY, 3, X, progress_bar=False)
    assert np.isfinite(result.losses).all()
    assert not [w for w in recwarn if "discrete latent" in str(w.message)]


def test_elbo_with_constrained_parameters():
    """The host differentiates through its own constraints."""
    from .programs import of_params

    model, guide = of_params()
    x = jnp.ones((4, 3))
    svi = RWS(model, guide, numpyro.optim.SGD(0.1), num_particles=4)
    state = svi.init(KEY, x)
    direction = svi.directions(state, x).gradient
    run_key = random.split(random.split(state.rng_key)[1])[0]
    params = svi.optim.get_params(state.optim_state)

    def loss(params):
        params = {n: state.transforms[n](v) if n == "top" else v for n, v in params.items()}
        return RWS_ELBO(4).loss(run_key, params, model, guide, x)

    jax.tree.map(lambda g, e: close(g, -4 * e), jax.jit(jax.grad(loss))(params), direction)


def test_sleep_weight_mixes_and_sleep_scale_multiplies():
    found = {}
    for key in [(0.0, 1.0), (1.0, 1.0), (0.25, 1.0), (0.25, 8.0)]:
        svi = rws(4, sleep_weight=key[0], sleep_scale=key[1])(SBN_.model, SBN_.guide)
        found[key] = flat(svi.directions(svi.init(KEY, X), X).gradient, UP)
    wake, sleep = found[0.0, 1.0], found[1.0, 1.0]
    close(found[0.25, 1.0], 0.75 * wake + 0.25 * sleep)
    close(found[0.25, 8.0], 0.75 * wake + 2.0 * sleep)
