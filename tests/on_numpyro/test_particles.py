"""Particles and subsamples: what would give wrong numbers in silence is refused by name."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro.distributions import constraints
from numpyro.infer import SVI, Trace_ELBO
from numpyro.infer.autoguide import AutoGuideList, AutoNormal

import numpyro_helmholtz as nh
from numpyro_helmholtz.trace import Programs, wake_trace

from .oracles import KEY

X = jnp.linspace(-1.0, 2.2, 7)


def with_three(fn):
    """A model whose data have the mean ``fn(w)`` of three latents in a plate."""

    def model(x):
        with numpyro.plate("J", 3):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Normal(fn(w), 1.0), obs=x)

    return model


def three(x):
    loc = numpyro.param("loc", 0.3 * jnp.ones(3))
    scale = numpyro.param("scale", 0.5 * jnp.ones(3), constraint=constraints.positive)
    with numpyro.plate("J", 3):
        numpyro.sample("w", dist.Normal(loc, scale))


MIXED = {
    "sum": lambda w: w.sum(),
    "mean": lambda w: 3 * w.mean(),
    "norm": jnp.linalg.norm,
    "first": lambda w: w[0].sum() if w.ndim > 1 else w[0],
}


@pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)
def test_a_program_that_mixes_particles(fn):
    params = {"loc": 0.3 * jnp.ones(3), "scale": 0.5 * jnp.ones(3)}
    message = "site 'x' has one distribution for all particles"
    for front in (nh.RWS, nh.NaturalRWS):
        svi = front(with_three(fn), three, num_particles=5, sleep_weight=0.0)
        for _ in range(2):  # once is not enough to let it pass
            with pytest.raises(ValueError, match=message):
                svi.update(svi.init(KEY, X), X)
    with pytest.raises(ValueError, match=message):
        nh.log_likelihood(KEY, params, with_three(fn), three, X, num_particles=10)
    alone = nh.RWS(with_three(fn), three, num_particles=1, sleep_weight=0.0)
    alone.update(alone.init(KEY, X), X)


def test_a_guide_that_mixes_particles():
    def model(x):
        with numpyro.plate("N", len(x)):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
            b = numpyro.sample("b", dist.Normal(a, 1.0))
            numpyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with numpyro.plate("N", len(x)):
            a = numpyro.sample("a", dist.Normal(x, 1.0))
            numpyro.sample("b", dist.Normal(a.mean() + numpyro.param("c", 0.0), 1.0))

    svi = nh.RWS(model, guide, num_particles=5)
    with pytest.raises(ValueError, match="site 'b' has one distribution for all particles"):
        svi.update(svi.init(KEY, X), X)


def test_sums_from_the_right_are_as_by_hand():
    model = with_three(lambda w: w.sum(-1, keepdims=True))
    params = {"loc": 0.3 * jnp.ones(3), "scale": 0.5 * jnp.ones(3)}
    wake = wake_trace(KEY, params, model, three, (X,), {}, num_particles=4)
    w = wake.guide["w"]["value"].reshape(4, 3)
    joint = dist.Normal(0.0, 1.0).log_prob(w).sum(1)
    joint = joint + dist.Normal(w.sum(1, keepdims=True), 1.0).log_prob(X).sum(1)
    by_hand = joint - dist.Normal(0.3, 0.5).log_prob(w).sum(1)
    assert np.allclose(wake.log_weights[:, 0], by_hand, atol=1e-5)


def subsampled(size):
    def model(x):
        m = numpyro.sample("m", dist.Normal(0.0, 1.0))
        with numpyro.plate("N", len(x), subsample_size=size):
            rows = numpyro.subsample(x, event_dim=0)
            numpyro.sample("x", dist.Normal(m, 1.0), obs=rows)

    def guide(x):
        numpyro.sample("m", dist.Normal(numpyro.param("a", 0.5), 0.5))

    return model, guide


@pytest.mark.parametrize("front", [nh.RWS, nh.NaturalRWS, nh.BiHM])
def test_a_subsample_under_a_global_latent(front):
    options = {} if front is nh.BiHM else {"sleep_weight": 0.0}
    svi = front(*subsampled(3), num_particles=5, **options)
    message = r"plate 'N' is subsampled \(3 of 7\), but site 'm' stands outside of it"
    with pytest.raises(ValueError, match=message):
        svi.update(svi.init(KEY, X), X)
    with pytest.raises(ValueError, match=message):
        nh.log_likelihood(KEY, {"a": 0.5}, *subsampled(3), X, num_particles=10)
    svi = front(*subsampled(7), num_particles=5, **options)
    assert jnp.isfinite(svi.update(svi.init(KEY, X), X)[1])
    svi = nh.StochasticBackprop(*subsampled(3), numpyro.optim.SGD(1e-3))
    svi.update(svi.init(KEY, X), X)


@pytest.mark.parametrize("at_once", [7, 100])
def test_all_particles_are_of_the_same_subsample(at_once):
    def model(x):
        with numpyro.plate("N", len(x), subsample_size=3):
            rows = numpyro.subsample(x, event_dim=0)
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            numpyro.sample("x", dist.Normal(z, 1.0), obs=rows)

    def posterior(x):
        with numpyro.plate("N", len(x), subsample_size=3):
            rows = numpyro.subsample(x, event_dim=0)
            numpyro.sample("z", dist.Normal(rows / 2, 0.5**0.5))

    found = nh.log_likelihood(
        KEY, {}, model, posterior, X, num_particles=100, particles_at_once=at_once
    )
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(X)
    gap = np.abs(found.values[:, None] - exact)
    assert gap.min(1).max() < 1e-5
    assert len(set(gap.argmin(1).tolist())) == 3
    assert (found.ess > 99).all()


def learn(guide, **options):
    """What the first steps warned of."""

    def model(x, copy):
        with numpyro.plate("N", len(x)):
            z = numpyro.sample("z", dist.Normal(0.0, 1.0))
            y = numpyro.sample("y", dist.Normal(z, 1.0))
            numpyro.sample("x", dist.Normal(y, 1.0), obs=x)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        svi = nh.RWS(model, guide, num_particles=3, **options)
        svi.run(KEY, 2, X, X[::-1], progress_bar=False)
    return [str(w.message) for w in found if "dreams" in str(w.message)]


def guide_of(first, second):
    def guide(x, copy):
        a = numpyro.param("a", 0.0)
        with numpyro.plate("N", len(x)):
            y = numpyro.sample("y", dist.Normal(first(a, x, copy), 1.0))
            numpyro.sample("z", dist.Normal(second(a, y, x), 1.0))

    return guide


def test_a_guide_that_sees_no_dream():
    of_copy = guide_of(lambda a, x, copy: a * copy, lambda a, y, x: a * y)
    (said,) = learn(of_copy)
    assert "the guide's sites ['y'] follow neither the dreams" in said
    assert learn(of_copy, sleep_weight=0.0) == []
    (said,) = learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: a))
    assert "['z']" in said


def test_guides_that_see_their_dreams():
    assert learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: a * y)) == []
    # Where a weight is zero, too; and where there is nothing to train.
    assert learn(guide_of(lambda a, x, copy: a + 0.0 * x, lambda a, y, x: a * y)) == []
    assert learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: 0.0)) == []


@pytest.mark.parametrize("dtype", ["uint8", "int16", "int32"])
def test_dreamt_counts_may_be_larger_than_the_datas_type(dtype):
    def model(x):
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Poisson(40_000.0), obs=x)

    def guide(x):
        with numpyro.plate("N", len(x)):
            numpyro.deterministic("seen", x)

    x = jnp.ones(5, dtype)
    dream = Programs(model, guide, 1, 1, constrained=True).dream(KEY, {}, (x,), {})
    assert (dream.args[0] > 39_000).all()


@pytest.mark.parametrize("make", [AutoNormal, lambda model: AutoGuideList(model)])
def test_an_automatic_guide_serves_several_front_ends(make):
    def model(x):
        m = numpyro.sample("m", dist.Normal(0.0, 5.0))
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Normal(m, 1.0), obs=x)

    guide = make(model)
    if isinstance(guide, AutoGuideList):
        guide.append(AutoNormal(model))
    first = nh.StochasticBackprop(model, guide, numpyro.optim.SGD(1e-2))
    first.run(KEY, 2, X, progress_bar=False)
    second = nh.RWS(model, guide, num_particles=3, sleep_weight=0.0)
    second.run(KEY, 2, X, progress_bar=False)
    first.init(KEY, X[:4])
    host = SVI(model, guide, numpyro.optim.SGD(1e-2), Trace_ELBO())
    host.run(random.key(1), 2, X, progress_bar=False)
    leaves = jax.tree.leaves(second.init(KEY, X).optim_state)
    assert all(isinstance(leaf, jax.Array | np.ndarray | int) for leaf in leaves)


def test_an_index_that_would_find_particles():
    def model(x):
        with numpyro.plate("J", 4):
            a = numpyro.sample("a", dist.Normal(0.0, 1.0))
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Normal(a[jnp.array([3, 2, 1, 0])], 1.0), obs=x)

    def guide(x):
        with numpyro.plate("J", 4):
            numpyro.sample("a", dist.Normal(numpyro.param("loc", jnp.zeros(4)), 1.0))

    for count in (4, 5):  # as many as there are of both, or more
        svi = nh.RWS(model, guide, num_particles=count, sleep_weight=0.0)
        with pytest.raises(ValueError, match="'x'|after site 'a'"):
            svi.update(svi.init(KEY, X[:4]), X[:4])


def test_errors_tell_where_a_program_was():
    def model(x):
        w = numpyro.sample("w", dist.ImproperUniform(constraints.real, (), ()))
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        numpyro.sample("w", dist.Normal(numpyro.param("m", 0.0), 1.0))

    svi = nh.RWS(model, guide)
    with pytest.raises(NotImplementedError, match=r"at site 'w'; the model was to dream.*sleep_w"):
        svi.update(svi.init(KEY, X), X)

    def product(x):
        with numpyro.plate("J", 3):
            w = numpyro.sample("w", dist.Normal(0.0, 1.0))
        mean = jnp.ones((len(x), 3)) @ w
        with numpyro.plate("N", len(x)):
            numpyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    svi = nh.RWS(product, three, num_particles=5, sleep_weight=0.0)
    with pytest.raises(TypeError, match=r"after site 'w'; the program ran with 5 particles"):
        svi.update(svi.init(KEY, X), X)
