"""Held-out log-likelihoods against enumeration, closed forms and arviz."""

import math

import arviz
import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import monitoring, random

from numpyro_helmholtz import evaluation
from numpyro_helmholtz.evaluation import log_likelihood
from numpyro_helmholtz.imputation import impute
from numpyro_helmholtz.partition import log_partition

from .programs import SBN, patterns

KEY = random.key(0)
SBN_ = SBN()
RNG = np.random.default_rng(0)


def close(a, b, tolerance=1e-7):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


def within_four_errors(result, exact):
    error = np.sqrt(np.maximum(1 / result.ess - 1 / result.num_particles, 0))
    return (np.abs(result.values - exact) <= 4 * error + 1e-9).all()


def stub(monkeypatch, log_weights, by_row=False):
    """Makes the programs' log-weights those of ``log_weights``, taken from the top."""
    state = {"done": 0}

    def weigher(model, guide, num_particles, nesting):
        def weigh(key, params, mutable, arguments, subsample):
            start = state["done"]
            state["done"] = start + num_particles
            if state["done"] >= len(log_weights):
                state["done"] = 0
            columns = slice(None)
            if by_row:
                columns = np.asarray(arguments.rebuilt()[0][0], int)
            return log_weights[start : start + num_particles][:, columns], subsample

        return weigh

    monkeypatch.setattr(evaluation, "_weigher", weigher)
    return {"max_plate_nesting": 1, "num_particles": len(log_weights)}


def estimate(*args, **options):
    return log_likelihood(KEY, {}, None, None, *args, **options)


def test_agrees_with_enumeration():
    x = patterns(3)
    result = log_likelihood(
        KEY,
        SBN_.values,
        SBN_.model,
        SBN_.guide,
        x,
        num_particles=20_000,
        particles_at_once=3_000,
    )
    exact = SBN_.log_likelihood(SBN_.values, x)
    assert result.values.dtype == jnp.float64
    assert within_four_errors(result, exact)
    assert np.abs(result.values - exact).max() < 0.1
    assert result.mean == pytest.approx(float(result.values.mean()))
    assert result.stderr == pytest.approx(float(result.values.std(ddof=1)) / math.sqrt(8))
    assert result.num_particles == 20_000
    assert "n_data=8" in repr(result)


@pytest.mark.parametrize("exact_guide", [True, False])
def test_agrees_with_the_linear_gaussian_closed_form(exact_guide):
    weight, offset, sigma = RNG.normal(size=(3, 2)), RNG.normal(size=3), 0.7
    precision = np.eye(2) + weight.T @ weight / sigma**2
    x = 2 * RNG.normal(size=(6, 3))

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(z @ weight.T + offset, sigma).to_event(1), obs=x)

    def guide(x):
        mean = (x - offset) @ weight @ np.linalg.inv(precision) / sigma**2
        with numpyro.plate("data", len(x)):
            scale = 1.0 if exact_guide else 0.5
            prior = dist.MultivariateNormal(mean, precision_matrix=precision * scale)
            numpyro.sample("z", prior)

    covariance = weight @ weight.T + sigma**2 * np.eye(3)
    exact = dist.MultivariateNormal(offset, covariance).log_prob(x)
    result = log_likelihood(
        KEY, {}, model, guide, x, num_particles=2_000, particles_at_once=300, batch=4
    )
    if exact_guide:
        close(result.values, exact)
        close(result.ess, np.full(6, 2_000.0))
    else:
        assert within_four_errors(result, exact)
        assert (result.khat < 0.7).all()


@pytest.mark.parametrize("num_particles", [1, 3, 24, 25, 60, 226, 1_000, 3_001])
def test_chunks_equal_one_pass_and_arviz(monkeypatch, num_particles):
    log_weights = 3 * RNG.normal(size=(num_particles, 4)) - 700
    log_weights[:, 1] *= 2
    options = stub(monkeypatch, log_weights)
    whole = estimate(particles_at_once=num_particles, **options)
    pieces = estimate(particles_at_once=7, **options)
    for name in ("values", "ess", "khat"):
        close(getattr(pieces, name), getattr(whole, name))
    close(whole.values, jax.nn.logsumexp(log_weights, 0) - math.log(num_particles))
    weights = jax.nn.softmax(log_weights, 0)
    close(whole.ess, 1 / (weights**2).sum(0))
    if num_particles == 1:
        assert (whole.khat == math.inf).all()
        return
    _, khat = arviz.psislw(log_weights.T)
    close(pieces.khat, khat)
    tail = math.ceil(min(num_particles / 5, 3 * math.sqrt(num_particles)))
    assert pieces.tail.shape == (4, tail + 1)


def test_zero_weights_count_as_zero(monkeypatch):
    log_weights = RNG.normal(size=(200, 2)).astype(np.float32)
    log_weights[::2] = -math.inf
    result = estimate(particles_at_once=1, **stub(monkeypatch, log_weights))
    close(result.values, jax.nn.logsumexp(log_weights, 0) - math.log(200), 1e-6)
    assert np.isfinite(result.ess).all()
    assert result.values.dtype == jnp.float32


def test_batch_gives_the_same_data_in_the_same_order(monkeypatch):
    log_weights = RNG.normal(size=(50, 7))
    options = stub(monkeypatch, log_weights, by_row=True)
    rows = jnp.arange(7.0)
    whole = estimate(rows, **options)
    parts = estimate(rows, batch=3, particles_at_once=20, **options)
    for name in ("values", "ess", "khat"):
        close(getattr(parts, name), getattr(whole, name))


def test_batch_slices_every_array_as_long_as_the_first():
    seen = set()

    def model(x, pair, *, labels, table, name):
        seen.add((len(x), len(pair[0]), len(labels), len(table)))
        with numpyro.plate(name, len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z + labels + pair[0], 1.0), obs=x)

    def guide(x, pair, *, labels, table, name):
        with numpyro.plate(name, len(x)):
            numpyro.sample("z", dist.Normal((x - labels - pair[0]) / 2, math.sqrt(0.5)))

    x, labels, extra = RNG.normal(size=(3, 5))
    result = log_likelihood(
        KEY,
        {},
        model,
        guide,
        x,
        (extra,),
        labels=labels,
        table=jnp.zeros(4),
        name="data",
        num_particles=30,
        batch=2,
        max_plate_nesting=1,
        progress=True,
    )
    close(result.values, dist.Normal(labels + extra, math.sqrt(2)).log_prob(x))
    assert seen == {(2, 2, 2, 4), (1, 1, 1, 4)}


@pytest.mark.parametrize("nesting", [1, math.inf])
def test_a_second_call_compiles_nothing(nesting):
    compiled = []

    def count(name, duration, **rest):
        compiled.append(name.endswith("backend_compile_duration"))

    evaluation._weigher.cache_clear()
    data = patterns(3), 1 - patterns(3)
    options = {"num_particles": 25, "particles_at_once": 10, "max_plate_nesting": nesting}
    counts = []
    monitoring.register_event_duration_secs_listener(count)
    try:
        for x in data:
            compiled.clear()
            log_likelihood(KEY, SBN_.values, SBN_.model, SBN_.guide, x, **options)
            counts.append(sum(compiled))
    finally:
        monitoring.unregister_event_duration_listener(count)
    assert counts[0] > 0 and counts[1] == 0
    with pytest.raises(ValueError, match="observed site 'x'.*NaN"):
        log_likelihood(KEY, SBN_.values, SBN_.model, SBN_.guide, patterns(3) * math.nan)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_particles": 0}, "num_particles must be an int of at least 1"),
        ({"num_particles": 2.5}, "num_particles must be an int of at least 1, got 2.5"),
        ({"particles_at_once": 0}, "particles_at_once must be an int of at least 1"),
        ({"batch": 0}, "batch must be an int of at least 1"),
    ],
)
def test_counts_below_one_are_errors(options, message):
    with pytest.raises(ValueError, match=message):
        log_likelihood(KEY, SBN_.values, SBN_.model, SBN_.guide, patterns(3), **options)


def test_empty_data_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match="no data"):
        log_likelihood(KEY, SBN_.values, SBN_.model, SBN_.guide, patterns(3)[:0])
    options = stub(monkeypatch, np.zeros((5, 0)))
    with pytest.raises(ValueError, match="no datum"):
        estimate(**options)
    with pytest.raises(ValueError, match="needs an array"):
        estimate(batch=2, **options)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_errors(monkeypatch, value):
    log_weights = np.zeros((40, 3))
    log_weights[33, 2] = value
    options = stub(monkeypatch, log_weights)
    with pytest.raises(ValueError, match=rf"datum 2 is {value} \(1 of 3 data"):
        estimate(particles_at_once=10, **options)


def test_data_that_the_model_excludes_are_an_error(monkeypatch):
    log_weights = np.zeros((40, 3))
    log_weights[:, 1] = -math.inf
    with pytest.raises(ValueError, match="all 40 log-weights of datum 1 are -inf"):
        estimate(**stub(monkeypatch, log_weights))


def test_batch_with_weights_that_do_not_separate_is_an_error():
    def model(x):
        z = numpyro.sample("z", dist.Normal(0.0, 1.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        numpyro.sample("z", dist.Normal(0.0, 1.0))

    with pytest.raises(ValueError, match="do not separate by datum"):
        log_likelihood(KEY, {}, model, guide, RNG.normal(size=5), batch=2, num_particles=10)


class Unhashable:
    """A callable such as an Equinox module."""

    __hash__ = None

    def __init__(self, program):
        self.program = program

    def __call__(self, x):
        self.program(x)


def test_programs_that_cannot_be_hashed():
    x = patterns(3)[:4]
    given = (KEY, SBN_.values, Unhashable(SBN_.model), Unhashable(SBN_.guide), x)
    plain = (*given[:2], SBN_.model, SBN_.guide, x)
    for method, options in (
        (log_likelihood, {"num_particles": 5}),
        (log_partition, {"num_dreams": 2, "num_particles": 3}),
    ):
        close(method(*given, **options).values, method(*plain, **options).values)
    found = [impute(*programs, x > 0, 2) for programs in (given, plain)]
    np.testing.assert_array_equal(*found)
