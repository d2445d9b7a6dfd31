"""Dreams reach the guide: by identity, by dream_args, by observations=; also under jit."""

from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random

from numpyro_helmholtz import RWS
from numpyro_helmholtz.trace import Programs

KEY = random.key(0)
X = jnp.array([0.0, 1.0, 1.0])
A = {"a": jnp.array(1.0)}


def bernoulli(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits), obs=obs)


def body(x):
    with numpyro.plate("data", 3):
        h = bernoulli("h", jnp.zeros(3))
        bernoulli("x", 6 * h - 3, obs=x)


def guide_body(x):
    a = numpyro.param("a", jnp.array(1.0))
    with numpyro.plate("data", 3):
        bernoulli("h", a * (2 * x - 1))


def dream(model, guide, *args, dream_args=None, **kwargs):
    programs = Programs(model, guide, 4, 1, dream_args=dream_args)
    return programs.dream(KEY, A, args, kwargs)


def check(model, guide, *args, dream_args=None, **kwargs):
    """The guide saw the dream and not the data, eagerly and under ``jit`` and ``run``."""

    def logits(args, kwargs):
        found = dream(model, guide, *args, dream_args=dream_args, **kwargs)
        return found.guide["h"]["fn"].logits, found.model["x"]["value"]

    for run in (logits, jax.jit(logits)):
        saw, dreamt = run(args, kwargs)
        np.testing.assert_allclose(saw, 2.0 * dreamt - 1)
    svi = RWS(model, guide, num_particles=2, dream_args=dream_args)
    assert jnp.isfinite(svi.run(KEY, 2, *args, progress_bar=False, **kwargs).losses).all()


def test_positional_and_keyword():
    check(body, guide_body, X)
    check(body, guide_body, x=X)


def test_inside_lists_tuples_and_dictionaries():
    def model(batch, *, extra):
        body(batch["images"][0])

    def guide(batch, *, extra):
        guide_body(batch["images"][0])

    label = jnp.arange(3)
    batch, extra = {"images": [X, label]}, (X, label)
    found = dream(model, guide, batch, extra=extra)
    assert found.args[0]["images"][1] is label
    np.testing.assert_array_equal(found.kwargs["extra"][0], found.model["x"]["value"])
    assert batch["images"][0] is X
    check(model, guide, batch, extra=extra)


def test_one_object_in_two_places():
    """A run's compiled step keeps what is one object one object."""

    def model(x, target):
        body(target)

    def guide(x, target):
        guide_body(x)

    svi = RWS(model, guide, num_particles=2)
    assert jnp.isfinite(svi.run(KEY, 2, X, X, progress_bar=False).losses).all()
    done, _ = svi._passed(svi.init(KEY, X, X), _arguments(X, X))
    assert len(done.dream.arguments.arrays) == 1


def _arguments(*args):
    from numpyro_helmholtz.arguments import Arguments

    return Arguments.of((args, {}))


def test_dream_args():
    def model(x):
        body(x.reshape(3))

    def guide(x):
        guide_body(x.reshape(3))

    def pair(dreams, x):
        return (dreams["x"].reshape(3, 1),), {}

    check(model, guide, X.reshape(3, 1), dream_args=pair)


def test_dream_args_must_return_a_pair():
    with pytest.raises(ValueError, match="dream_args must return"):
        dream(body, guide_body, X, dream_args=lambda dreams, x: dreams["x"])


def test_observations_guide():
    def model(x, observations=None):
        body(x[jnp.arange(3)])

    def guide(x, observations=None):
        guide_body(x if observations is None else observations["x"])

    check(model, guide, X)


def test_observations_is_the_only_argument():
    def model(observations):
        body(observations["x"])

    def guide(observations):
        guide_body(observations["x"])

    check(model, guide, {"x": X})
    check(model, guide, observations={"x": X})


def test_guide_that_ignores_observations_where_identity_fails_is_an_error():
    def model(x, observations=None):
        body(x + 0.0)

    def guide(x, observations=None):
        guide_body(x)

    with pytest.raises(ValueError, match="ignores the dream of site 'x'"):
        dream(model, guide, X)


@pytest.mark.parametrize("change", [lambda x: x.reshape(1, 3)[0], lambda x: x[jnp.arange(3)]])
def test_broken_identity_is_an_error(change):
    def model(x):
        body(change(x))

    for run in (dream, jax.jit(dream, static_argnums=(0, 1))):
        with pytest.raises(ValueError, match="site 'x' is none of the arguments.*dream_args"):
            run(model, guide_body, X)
    svi = RWS(model, guide_body, num_particles=2, sleep_weight=0.0)
    jax.eval_shape(svi.update, svi.init(KEY, X), X)


def test_two_sites_of_one_object():
    def model(x):
        with numpyro.plate("data", 3):
            h = bernoulli("h", jnp.zeros(3))
            bernoulli("x", h, obs=x)
            bernoulli("y", -h, obs=x)

    with pytest.raises(ValueError, match="sites 'x' and 'y' observe the same object"):
        dream(model, guide_body, X)


@pytest.mark.parametrize("data", [X.astype(jnp.int8), X.astype(bool), np.array([0.0, 1.0, 1.0])])
def test_dreams_keep_the_datas_dtype(data):
    found = dream(body, lambda x: guide_body(1.0 * x), data)
    assert found.args[0].dtype == data.dtype


def test_dreams_keep_fractions_where_the_data_are_whole_numbers():
    def model(x):
        with numpyro.plate("data", 3):
            h = bernoulli("h", jnp.zeros(3))
            numpyro.sample("x", dist.Normal(h, 0.3), obs=x)

    whole = jnp.array([0, 2, -1])
    check(model, guide_body, whole)
    found = dream(model, guide_body, whole).args[0]
    assert (found != found.round()).all()


class Batch(NamedTuple):
    """What a data loader may give."""

    x: jax.Array
    label: jax.Array


@jax.tree_util.register_dataclass
@dataclass
class Record:
    """Another pytree."""

    x: jax.Array
    label: jax.Array


@pytest.mark.parametrize("kind", [Batch, Record])
def test_inside_named_tuples_and_other_pytrees(kind):
    batch = kind(X, jnp.arange(3))
    found = dream(lambda b: body(b.x), lambda b: guide_body(b.x), batch)
    assert type(found.args[0]) is kind and found.args[0].label is batch.label
    check(lambda b: body(b.x), lambda b: guide_body(b.x), batch)


def chain(reads_argument):
    """Two observed sites, the second of which follows from the first."""

    def model(x, y, count):
        with numpyro.plate("data", 3):
            bernoulli("h", jnp.zeros(3))
            drawn = bernoulli("x", jnp.zeros_like(x), obs=x)
            before = x if reads_argument else drawn
            noise = random.normal(numpyro.prng_key(), x.shape)
            bernoulli("y", count + jax.jit(jnp.tanh)(before) + noise, obs=y)

    def guide(x, y, count):
        a = numpyro.param("a", jnp.array(1.0))
        with numpyro.plate("data", 3):
            bernoulli("h", a * (x + y))

    return model, guide


@pytest.mark.parametrize("jit", [False, True])
def test_a_model_that_reads_the_argument_it_observes(jit):
    args = (X, 1 - X, jnp.array(2.0))
    svi = RWS(*chain(True), numpyro.optim.SGD(0.1))
    state = svi.init(KEY, *args)
    with pytest.raises(ValueError, match="site 'y' of the model depends on an argument"):
        (jax.jit(svi.update) if jit else svi.update)(state, *args)
    svi = RWS(*chain(True), numpyro.optim.SGD(0.1), sleep_weight=0.0)
    assert jnp.isfinite(svi.update(svi.init(KEY, *args), *args)[1])


@pytest.mark.parametrize("jit", [False, True])
def test_a_model_that_reads_what_it_draws_and_other_arguments(jit):
    args = (X, 1 - X, jnp.array(2.0))
    svi = RWS(*chain(False), numpyro.optim.SGD(0.1))
    update = jax.jit(svi.update) if jit else svi.update
    assert jnp.isfinite(update(svi.init(KEY, *args), *args)[1])
