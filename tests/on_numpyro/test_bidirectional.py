"""The bidirectional machine against enumeration: directions, log p̃*, Z², natural steps."""

import math
import pickle
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro import handlers
from numpyro.infer import SVI

from numpyro_helmholtz import (
    BiHM,
    BiHM_ELBO,
    LogPartition,
    NaturalBiHM,
    bidirectional_log_likelihood,
    log_likelihood,
    log_partition,
)
from numpyro_helmholtz.parameters import parameters
from numpyro_helmholtz.trace import Programs

from .programs import SBN, bernoulli, patterns
from .test_estimators import close, flat, many, mean_and_error, within
from .test_resume import of_params, of_sbn, same

KEY = random.key(3)
X = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
THREE = jnp.concatenate([X, jnp.array([[1.0, 1.0, 0.0]])])
SBN_ = SBN()
NAMES = sorted(SBN_.values)
UP = np.repeat([n.startswith("q") for n in NAMES], [SBN_.values[n].size for n in NAMES])
K = 4


def log_root(params, x):
    """``log p̃*(x) = 2 log Σ_h √(p q)`` per datum by enumeration."""
    h1, h2 = SBN_.latents()
    log_p, log_q = (
        SBN_.log_joint(params, x[:, None], h1, h2),
        SBN_.log_guide(params, x[:, None], h1, h2),
    )
    return 2 * jax.nn.logsumexp((log_p + log_q) / 2, 1)


def gradient(fn):
    return flat(jax.jit(jax.grad(fn))(SBN_.values), NAMES)


def bits(n):
    h = random.bernoulli(KEY, 0.5, (K, n, 3)).astype(int)
    return {"h1": h[..., :2], "h2": h[..., 2:]}


def direction_on(x, samples, model=SBN_.model, guide=SBN_.guide, **options):
    """The estimator's direction and loss on given samples."""
    estimator = BiHM_ELBO(K, max_plate_nesting=1, **options)
    programs = estimator.programs(model, guide)
    programs.wake = partial(Programs.wake, programs, samples=samples)

    def objective(params):
        value, done = estimator.run(programs, KEY, params, (x,), {})
        return value, done.loss

    found, loss = jax.jit(jax.grad(objective, has_aux=True))(SBN_.values)
    return flat(found, NAMES), float(loss)


@pytest.mark.parametrize("baseline", [True, False])
def test_direction_and_loss_on_given_samples(baseline):
    """Weights, directions and loss without the package."""
    h = bits(3)

    def by_hand(params):
        log_p = SBN_.log_joint(params, THREE, h["h1"], h["h2"])
        log_q = SBN_.log_guide(params, THREE, h["h1"], h["h2"])
        root = jnp.exp(lax.stop_gradient(log_p - log_q) / 2)
        w = root / root.sum(0)
        signed = w - 1 / K if baseline else w
        value = (w * log_p + signed * log_q).sum() / len(THREE)
        return value, -2 * jnp.log(root.mean(0)).sum()

    expected, expected_loss = jax.jit(jax.grad(by_hand, has_aux=True))(SBN_.values)
    found, loss = direction_on(THREE, h, baseline=baseline)
    close(found, flat(expected, NAMES))
    assert loss == pytest.approx(float(expected_loss), rel=1e-12)


def test_batches_masks_and_scales():
    h = bits(3)
    whole, loss = direction_on(THREE, h)
    some, some_loss = direction_on(THREE[:2], {n: v[:, :2] for n, v in h.items()})
    last, last_loss = direction_on(THREE[2:], {n: v[:, 2:] for n, v in h.items()})
    close(3 * whole, 2 * some + last)
    assert loss == pytest.approx(some_loss + last_loss, rel=1e-12)

    mask = jnp.array([True, True, False])
    wrapped = (handlers.mask(f, mask=mask) for f in (SBN_.model, SBN_.guide))
    found, found_loss = direction_on(THREE, h, *(handlers.scale(f, scale=7.0) for f in wrapped))
    close(3 * found, 2 * some)
    assert found_loss == pytest.approx(7 * some_loss, rel=1e-12)


def test_a_subsample_carries_its_scale():
    found = []
    for size in (2, 50):

        def plate(size=size):
            with handlers.substitute(data={"data": jnp.arange(2)}):
                return numpyro.plate("data", size, subsample_size=2)

        def model(x, plate=plate):
            with plate():
                h = bernoulli("h1", SBN_.layer("p2", x[:, :1]))
                bernoulli("x", SBN_.layer("p1", h), obs=x)

        def guide(x, plate=plate):
            with plate():
                bernoulli("h1", SBN_.layer("q1", x))

        svi = BiHM(model, guide, num_particles=K)
        found.append(svi.directions(svi.init(KEY, X), X))
    jax.tree.map(close, found[0].gradient, found[1].gradient)
    assert float(found[1].loss) == pytest.approx(25 * float(found[0].loss), rel=1e-12)


def test_both_directions_tend_to_the_exact_gradient():
    exact = gradient(lambda p: log_root(p, X).mean())
    distance = []
    for k in (20, 5000):
        values = many(partial(BiHM, num_particles=k, max_plate_nesting=1), X, 20, NAMES)
        distance.append(np.sqrt(np.square(values - exact).mean()))
    assert distance[0] > 4 * distance[1]
    mean, error = mean_and_error(values)
    bias = np.abs(exact).max() * 20 / 5000
    assert (np.abs(mean - exact) <= 4.5 * error + bias).all()


def test_two_particles_have_the_enumerated_expectation():
    h1, h2 = SBN_.latents()

    def expectation(params):
        total = 0.0
        for x in X:
            log_p, log_q = SBN_.log_joint(params, x, h1, h2), SBN_.log_guide(params, x, h1, h2)
            root = jnp.exp(lax.stop_gradient(log_p - log_q) / 2)
            prob = jnp.exp(lax.stop_gradient(log_q[:, None] + log_q))
            w = root[:, None] / (root[:, None] + root)
            value = log_p + log_q
            total = total + (prob * (w * value[:, None] + (1 - w) * value)).sum() / len(X)
        return total

    exact, spread = gradient(expectation), []
    for baseline in (True, False):
        front = partial(BiHM, num_particles=2, baseline=baseline)
        found = many(front, X, 3000, NAMES)
        within(found, exact)
        spread.append(float(found[:, UP].var(0).sum()))
    assert spread[0] < 0.8 * spread[1]


def test_order_of_the_bounds():
    x = patterns(3)
    exact = jax.jit(log_root)(SBN_.values, x)
    assert (exact < SBN_.log_likelihood(SBN_.values, x)).all()
    svi = BiHM(SBN_.model, SBN_.guide, num_particles=2)
    state = svi.init(KEY, x)

    def one(key):
        run = Programs(SBN_.model, SBN_.guide, 2, 1)
        log_w = run.wake(key, SBN_.values, (x,), {}).log_weights
        return svi.evaluate(state._replace(rng_key=key), x), log_w

    losses, log_w = jax.jit(jax.vmap(one))(random.split(KEY, 400))
    mine = 2 * (jax.nn.logsumexp(log_w / 2, 1) - math.log(2))
    assert (mine >= log_w.mean(1) - 1e-12).all()
    assert (mine <= jax.nn.logsumexp(log_w, 1) - math.log(2) + 1e-12).all()
    mean, error = mean_and_error(-losses)
    assert mean + 3 * error < float(exact.sum())
    other, other_error = mean_and_error(mine.sum(1))
    assert abs(mean - other) < 4.5 * math.hypot(error, other_error)


def test_as_elbo_of_the_hosts_svi(recwarn):
    svi = BiHM(SBN_.model, SBN_.guide, num_particles=K)
    state = svi.init(KEY, X)
    expected = svi.directions(state, X)
    run_key = random.split(random.split(state.rng_key)[1])[0]
    elbo = BiHM_ELBO(K)

    def loss(params):
        return elbo.loss(run_key, params, SBN_.model, SBN_.guide, X)

    value, grads = jax.jit(jax.value_and_grad(loss))(SBN_.values)
    assert float(value) == pytest.approx(float(expected.loss), rel=1e-12)
    jax.tree.map(lambda g, e: close(g, -2 * e), grads, expected.gradient)
    host = SVI(SBN_.model, SBN_.guide, numpyro.optim.Adam(0.01), loss=elbo)
    host.init(KEY, X)
    assert not [w for w in recwarn if "discrete latent" in str(w.message)]


# natural steps -------------------------------------------------------------------------------


def test_natural_is_the_dense_solve_with_the_machines_weights():
    options = {"fisher": "unit", "fisher_samples": "same", "tolerance": 1e-12, "damping": 0.3}
    svi = NaturalBiHM(SBN_.model, SBN_.guide, num_particles=K, **options)
    state = svi.init(KEY, X)
    found = svi.directions(state, X)
    assert set(found.natural) == set(found.gradient)
    for block in found.fisher.blocks:
        g, dense = block.gather(found.gradient), np.asarray(block.dense())
        expected = [
            1.3 * np.linalg.solve(d + 0.3 * np.eye(len(d)), np.asarray(v))
            for d, v in zip(dense, g, strict=True)
        ]
        close(block.gather(found.natural), np.stack(expected), 1e-9)

    run_key = random.split(random.split(state.rng_key)[1])[0]
    programs = Programs(SBN_.model, SBN_.guide, K, 1)
    wake = programs.wake(random.split(run_key)[0], SBN_.values, (X,), {})
    w = jax.nn.softmax(wake.log_weights / 2, 0)
    h1 = wake.guide["h1"]["value"]
    features = jnp.concatenate([h1, jnp.ones((*h1.shape[:2], 1))], -1)
    mean = jax.nn.sigmoid(h1 @ SBN_.values["p1.w"] + SBN_.values["p1.b"])
    weight = w[..., None] * mean * (1 - mean) / len(X)
    expected = jnp.einsum("sbj,sbi,sbk->jik", weight, features, features)
    block = next(b for b in found.fisher.blocks if "p1.w" in b.params)
    close(block.dense(), expected, 1e-10)


@pytest.mark.parametrize(
    ("front", "make", "options"),
    [
        (BiHM, of_sbn, {}),
        (NaturalBiHM, of_sbn, {}),
        (NaturalBiHM, of_params, {"fisher": "unit", "fisher_samples": "lagged"}),
    ],
)
def test_learns_and_goes_on(front, make, options):
    """Sixty updates, saved and resumed half-way: the same, bit for bit."""
    x = X.repeat(8, 0)

    def fresh():
        return front(*make(), numpyro.optim.SGD(0.1), num_particles=6, **options)

    svi = fresh()
    start = svi.init(KEY, x)
    state = svi.run(KEY, 30, x, init_state=start, progress_bar=False).state
    saved = pickle.dumps(state)
    expected = svi.run(KEY, 30, x, init_state=state, progress_bar=False)
    found = fresh().run(random.key(9), 30, x, init_state=pickle.loads(saved), progress_bar=False)
    same(found.losses, expected.losses)
    same(found.params, expected.params)
    if make is of_sbn:
        before, after = log_root(svi.get_params(start), x), log_root(found.params, x)
        assert float((after - before).mean()) > 0.3


# bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("front", [BiHM, NaturalBiHM])
def test_bad_input_names_the_site(front):
    def guide(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h1", SBN_.layer("q1", x))

    svi = front(SBN_.model, SBN_.guide, num_particles=2)
    state = svi.init(KEY, X)
    bad = jnp.full_like(X, math.nan)
    with pytest.raises(ValueError, match="'x'.*NaN"):
        svi.update(state, bad)
    with pytest.raises(ValueError, match="'h2'.*missing from the guide"):
        front(SBN_.model, guide).init(KEY, X)
    kept, loss = jax.jit(svi.stable_update)(state, bad)
    assert not math.isfinite(float(loss)) and int(kept.skipped) == 1
    same(parameters(svi.get_params(kept)), parameters(svi.get_params(state)))


@pytest.mark.parametrize("make", [BiHM, NaturalBiHM])
def test_bad_options(make):
    with pytest.raises(ValueError, match="num_particles"):
        make(SBN_.model, SBN_.guide, num_particles=0)
    with pytest.raises(TypeError, match="sleep_weight"):
        make(SBN_.model, SBN_.guide, sleep_weight=0.5)
    with pytest.raises(TypeError, match="sleep_scale"):
        BiHM_ELBO(sleep_scale=2.0)
    with pytest.raises(ValueError, match="damping"):
        NaturalBiHM(SBN_.model, SBN_.guide, damping=0.0)


# the normalisation constant ------------------------------------------------------------------

PROGRAMS = (KEY, SBN_.values, SBN_.model, SBN_.guide)


def test_partition_agrees_with_enumeration():
    x = patterns(3)
    values = log_root(SBN_.values, x)
    exact = float(jax.nn.logsumexp(values))
    assert exact < -0.1
    found = {}
    for k in (1, 10):
        found[k] = log_partition(*PROGRAMS, jnp.zeros((2000, 3)), num_dreams=10, num_particles=k)
        assert abs(found[k].value - exact) < 4.5 * found[k].stderr < 0.05
    assert found[10].stderr < found[1].stderr

    options = {"num_particles": 20_000, "particles_at_once": 5_000}
    plain = bidirectional_log_likelihood(*PROGRAMS, x, **options)
    assert np.abs(plain.values - values).max() < 0.05
    close(plain.values, log_likelihood(*PROGRAMS, x, power=0.5, **options).values)
    normal = bidirectional_log_likelihood(*PROGRAMS, x, partition=found[10], **options)
    close(normal.values, plain.values - found[10].value)
    assert float(np.exp(normal.values).sum()) == pytest.approx(1, abs=0.05)


def test_mean_and_standard_error_of_the_ratio():
    r = np.random.default_rng(0).random((50, 7)) * np.arange(1, 8)
    log_r = np.log(r)
    sums = [np.logaddexp.reduce(log_r, 0), np.logaddexp.reduce(2 * log_r, 0)]
    found = LogPartition(np.stack(sums), 50)
    close(found.values, np.log(r.mean(0)))
    close(found.stderrs, r.std(0, ddof=1) / 50**0.5 / r.mean(0), 1e-9)
    assert found.value == pytest.approx(np.log(r.mean()), rel=1e-12)
    assert found.stderr == pytest.approx(r.std(ddof=1) / 350**0.5 / r.mean(), rel=1e-9)
    assert math.isnan(LogPartition(found.sums[:, :1], 1).stderr)


def test_partition_of_each_datum_with_its_own_input():
    """A model that conditions on c has a Z for each c."""

    def model(x, c):
        with numpyro.plate("data", len(x)):
            h = bernoulli("h1", c * jnp.array([1.0, -2.0]))
            bernoulli("x", SBN_.layer("p1", h), obs=x)

    def guide(x, c):
        with numpyro.plate("data", len(x)):
            bernoulli("h1", SBN_.layer("q1", x))

    c = jnp.array([[-1.5], [0.0], [1.5]])
    h, x, v = patterns(2), patterns(3)[:, None], SBN_.values
    exact = []
    for row in c:
        log_p = dist.Bernoulli(logits=row * jnp.array([1.0, -2.0])).log_prob(h).sum(-1)
        log_p = log_p + dist.Bernoulli(logits=h @ v["p1.w"] + v["p1.b"]).log_prob(x).sum(-1)
        log_q = dist.Bernoulli(logits=x @ v["q1.w"] + v["q1.b"]).log_prob(h).sum(-1)
        exact.append(jax.nn.logsumexp(2 * jax.nn.logsumexp((log_p + log_q) / 2, 1)))
    exact = np.array(exact)
    assert exact.max() - exact.min() > 0.1
    for batch, count in ((None, 400), (2, 50)):
        found = log_partition(KEY, v, model, guide, THREE, c, num_dreams=count, batch=batch)
        assert (np.abs(found.values - exact) < 4.5 * found.stderrs).all()
        assert found.values.shape == (3,) and found.stderrs.max() < 2 / count**0.5


def test_partition_is_one_where_the_guide_is_the_posterior():
    def model(x):
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Bernoulli(0.5))
            numpyro.sample("x", dist.Normal(h * 2.0 - 1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Bernoulli(logits=2 * x))

    found = log_partition(KEY, {}, model, guide, jnp.zeros(5), num_dreams=3)
    assert found.value == pytest.approx(0, abs=1e-12)
    assert found.stderr == pytest.approx(0, abs=1e-6)
    assert "LogPartition(value=" in repr(found)


def test_partition_refuses():
    with pytest.raises(ValueError, match="num_dreams"):
        log_partition(*PROGRAMS, X, num_dreams=0)
    with pytest.raises(ValueError, match="num_particles"):
        log_partition(*PROGRAMS, X, num_particles=0)
    with pytest.raises(ValueError, match="no data"):
        log_partition(*PROGRAMS, X[:0])
    mask = jnp.array([True, False])
    masked = (handlers.mask(f, mask=mask) for f in (SBN_.model, SBN_.guide))
    with pytest.raises(ValueError, match="'h2' is masked"):
        log_partition(KEY, SBN_.values, *masked, X)

    def with_factor(x):
        SBN_.model(x)
        numpyro.factor("extra", 0.0)

    with pytest.raises(ValueError, match="'extra'"):
        log_partition(KEY, SBN_.values, with_factor, SBN_.guide, X)
    with pytest.raises(ValueError, match="power"):
        log_likelihood(*PROGRAMS, X, power=0.0)
