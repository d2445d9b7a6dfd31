"""Traces: per-datum log-weights, plates, masks and scales, against sums by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from numpyro import handlers

from numpyro_helmholtz.estimators.base import score
from numpyro_helmholtz.recipe import Recipe
from numpyro_helmholtz.trace import Programs, wake_trace

from .programs import SBN

K = 5
KEY = random.key(0)


def normal(loc, scale=1.0):
    return dist.Normal(jnp.asarray(loc, float), scale)


def wake_of(model, guide, *args, **options):
    return wake_trace(KEY, {}, model, guide, args, {}, num_particles=K, **options)


def value(wake, name):
    return wake.guide[name]["value"]


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


DATA = jnp.linspace(-1, 1, 4)


def simple_model(x):
    with numpyro.plate("data", len(x)):
        z = numpyro.sample("z", normal(0.5))
        numpyro.sample("x", normal(z, 0.7), obs=x)


def simple_guide(x):
    with numpyro.plate("data", len(x)):
        numpyro.sample("z", normal(0.3 * x, 0.9))


def simple_weights(z, x):
    return normal(0.5).log_prob(z) + normal(z, 0.7).log_prob(x) - normal(0.3 * x, 0.9).log_prob(z)


def log_mean(log_w):
    return jax.nn.logsumexp(log_w, 0) - math.log(K)


def test_per_datum_weights_and_bound():
    wake = wake_of(simple_model, simple_guide, DATA)
    expected = simple_weights(value(wake, "z"), DATA)
    assert expected.shape == (K, 4)
    close(wake.log_weights, expected)
    close(wake.bound(), log_mean(expected).sum())
    close(wake.weights(), jax.nn.softmax(expected, 0))
    close(wake.uniform(), jnp.full((K, 4), 1 / K))
    assert wake.layout.num_data == 4


def test_samples_are_constants():
    def guide(x):
        a = numpyro.param("a", jnp.zeros(4))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.TransformedDistribution(normal(a), affine(a)))

    def affine(a):
        return dist.transforms.AffineTransform(a, jnp.exp(a))

    programs = Programs(simple_model, guide, K)

    def of_samples(a):
        wake = programs.wake(KEY, {"a": a}, (DATA,), {})
        return (value(wake, "z") * jnp.arange(4)).sum() + wake.model["x"]["fn"].mean.sum()

    def score_of_guide(a):
        wake = programs.wake(KEY, {"a": a}, (DATA,), {})
        return score(wake.guide, wake.layout, None)

    a = jnp.arange(4.0)
    close(jax.grad(of_samples)(a), jnp.zeros(4), 0)
    z = value(programs.wake(KEY, {"a": a}, (DATA,), {}), "z")

    def by_hand(a):
        return dist.TransformedDistribution(normal(a), affine(a)).log_prob(z).sum() / 4

    close(jax.grad(score_of_guide)(a), jax.grad(by_hand)(a))


def test_nested_plates_shared_by_all_sites():
    x = random.normal(KEY, (3, 4))

    def model(x):
        with numpyro.plate("outer", 4, dim=-1), numpyro.plate("inner", 3, dim=-2):
            z = numpyro.sample("z", normal(0.0))
            numpyro.sample("x", normal(z), obs=x)

    def guide(x):
        with numpyro.plate("outer", 4, dim=-1), numpyro.plate("inner", 3, dim=-2):
            numpyro.sample("z", normal(x))

    wake = wake_of(model, guide, x)
    z = value(wake, "z")
    expected = normal(0.0).log_prob(z) + normal(z).log_prob(x) - normal(x).log_prob(z)
    close(wake.log_weights, expected.reshape(K, 12))
    assert wake.layout.num_data == 12


def test_inner_plate_is_summed_where_a_latent_is_outside():
    x = random.normal(KEY, (3, 4))

    def model(x):
        with numpyro.plate("data", 4, dim=-1):
            z = numpyro.sample("z", normal(0.0))
            with numpyro.plate("pixels", 3, dim=-2):
                numpyro.sample("x", normal(z), obs=x)

    def guide(x):
        with numpyro.plate("data", 4, dim=-1):
            numpyro.sample("z", normal(x.mean(0)))

    wake = wake_of(model, guide, x)
    z = value(wake, "z").reshape(K, 4)
    expected = (
        normal(0.0).log_prob(z)
        + normal(z[:, None]).log_prob(x).sum(1)
        - normal(x.mean(0)).log_prob(z)
    )
    close(wake.log_weights, expected)


def test_latent_outside_the_data_plate_makes_the_weights_joint():
    def model(x):
        z = numpyro.sample("z", normal(0.0))
        with numpyro.plate("data", len(x)):
            numpyro.sample("x", normal(z), obs=x)

    def guide(x):
        numpyro.sample("z", normal(x.mean()))

    wake = wake_of(model, guide, DATA)
    z = value(wake, "z").reshape(K, 1)
    expected = (
        normal(0.0).log_prob(z)
        + normal(z).log_prob(DATA).sum(1, keepdims=True)
        - normal(DATA.mean()).log_prob(z)
    )
    close(wake.log_weights, expected)
    assert wake.layout.num_data == 4


def subsampled_model(x):
    with numpyro.plate("data", 10, subsample_size=4) as i:
        z = numpyro.sample("z", normal(0.5))
        numpyro.sample("x", normal(z, 0.7), obs=x[i])


def subsampled_guide(x):
    with numpyro.plate("data", 10, subsample_size=4) as i:
        numpyro.sample("z", normal(0.3 * x[i], 0.9))


FULL = jnp.linspace(-1, 2, 10)


def test_subsampled_plate():
    wake = wake_of(subsampled_model, subsampled_guide, FULL)
    x = wake.model["x"]["value"]
    close(x, FULL[wake.guide["data"]["value"]], 0)
    expected = simple_weights(value(wake, "z"), x)
    close(wake.log_weights, expected)
    close(wake.bound(), 2.5 * log_mean(expected).sum())
    assert wake.layout.num_data == 10


def test_dreams_can_take_the_wake_phases_subsample():
    def pair(dreams, x):
        return (jnp.zeros(10).at[:4].set(dreams["x"]),), {}

    programs = Programs(subsampled_model, subsampled_guide, K, dream_args=pair)
    indices = {"data": jnp.array([3, 1, 7, 9])}
    dream = programs.dream(KEY, {}, (FULL,), {}, subsample=indices)
    for trace in (dream.model, dream.guide):
        close(trace["data"]["value"], indices["data"], 0)


@pytest.mark.parametrize("kind", ["number", "array", "subsampled", "jit"])
def test_scale_stays_outside_the_exponent(kind):
    scale = 3.0 if kind == "number" else jnp.array([1.0, 2.0, 3.0, 4.0])
    programs = (simple_model, simple_guide)
    data, times = DATA, 1.0
    if kind == "subsampled":
        programs, data, times = (subsampled_model, subsampled_guide), FULL, 2.5
    model, guide = (handlers.scale(p, scale=scale) for p in programs)

    def results(x, scale=scale):
        wake = wake_of(model, guide, x)
        return wake.bound(), wake.log_weights, wake.layout.num_data, value(wake, "z"), x

    run = jax.jit(results) if kind == "jit" else results
    bound, log_weights, num_data, z, _ = run(data)
    x = wake_of(*programs, data).model["x"]["value"]
    expected = simple_weights(z, x)
    close(log_weights, expected)
    close(bound, (times * scale * log_mean(expected)).sum())
    close(num_data, times * 4 * jnp.mean(jnp.asarray(scale)))


@pytest.mark.parametrize("kind", ["handler", "dist"])
def test_masked_entries_contribute_nothing(kind):
    mask = jnp.array([True, False, True, True])

    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", normal(0.5))
            if kind == "handler":
                with handlers.mask(mask=mask):
                    numpyro.sample("x", normal(z, 0.7), obs=x)
            else:
                numpyro.sample("x", normal(z, 0.7).mask(mask), obs=x)

    wake = wake_of(model, simple_guide, DATA)
    z = value(wake, "z")
    expected = (
        normal(0.5).log_prob(z)
        + normal(z, 0.7).log_prob(DATA) * mask
        - normal(0.3 * DATA, 0.9).log_prob(z)
    )
    close(wake.log_weights, expected)


def test_to_event_and_deterministic_and_several_observed_sites():
    x, y = random.normal(KEY, (4, 3)), jnp.arange(4.0)

    def model(x, y):
        with numpyro.plate("data", 4):
            z = numpyro.sample("z", normal(jnp.zeros(2)).to_event(1))
            s = numpyro.deterministic("s", z.sum(-1))
            numpyro.sample("x", normal(s[..., None] * jnp.ones(3)).to_event(1), obs=x)
            numpyro.sample("y", normal(s), obs=y)

    def guide(x, y):
        with numpyro.plate("data", 4):
            numpyro.sample("z", normal(x[:, :2]).to_event(1))

    wake = wake_of(model, guide, x, y)
    z = value(wake, "z")
    s = z.sum(-1)
    expected = (
        normal(0.0).log_prob(z).sum(-1)
        + normal(s[..., None]).log_prob(x).sum(-1)
        + normal(s).log_prob(y)
        - normal(x[:, :2]).log_prob(z).sum(-1)
    )
    close(wake.log_weights, expected)
    dream = Programs(model, guide, K).dream(KEY, {}, (x, y), {})
    assert dream.model["s"]["value"].shape == (4,)
    close(dream.args[0], dream.model["x"]["value"], 0)
    close(dream.args[1], dream.model["y"]["value"], 0)


def test_skip_connection():
    def model(x):
        with numpyro.plate("data", len(x)):
            a = numpyro.sample("a", normal(0.0))
            b = numpyro.sample("b", normal(a))
            numpyro.sample("x", normal(a + 2 * b), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            b = numpyro.sample("b", normal(x))
            numpyro.sample("a", normal(b - x))

    wake = wake_of(model, guide, DATA)
    a, b = value(wake, "a"), value(wake, "b")
    p = normal(0.0).log_prob(a) + normal(a).log_prob(b) + normal(a + 2 * b).log_prob(DATA)
    q = normal(DATA).log_prob(b) + normal(b - DATA).log_prob(a)
    close(wake.log_weights, p - q)


def test_factor_counts_in_the_wake_phase():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", normal(0.5))
            numpyro.sample("x", normal(z, 0.7), obs=x)
            numpyro.factor("bonus", 2.0 * z)

    wake = wake_of(model, simple_guide, DATA)
    z = value(wake, "z")
    close(wake.log_weights, simple_weights(z, DATA) + 2.0 * z)


def test_given_samples():
    z = random.normal(KEY, (K, 4))
    programs = Programs(simple_model, simple_guide, K)
    wake = programs.wake(KEY, {}, (DATA,), {}, samples={"z": z})
    close(wake.log_weights, simple_weights(z, DATA))


def test_first_layer_of_the_guide_is_computed_once_per_datum():
    sbn = SBN()
    x = jnp.ones((7, 3))
    programs = Programs(sbn.model, sbn.guide, K, 1)

    def run(params):
        return programs.wake(KEY, params, (x,), {}).log_weights

    text = str(jax.make_jaxpr(run)(sbn.values))
    assert "f64[7,2] = dot_general" in text
    assert text.count("dot_general") == 4


def test_dream_draws_every_site_and_reaches_the_guide():
    def model(x):
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", normal(0.5))
            m = numpyro.deterministic("m", 2 * z)
            numpyro.sample("x", normal(m, 0.7), obs=x)

    dream = Programs(model, simple_guide, K).dream(KEY, {}, (DATA,), {})
    nodes = dream.model
    assert not np.array_equal(nodes["x"]["value"], DATA)
    assert nodes["m"]["value"].shape == (4,)
    close(nodes["m"]["value"], 2 * nodes["z"]["value"])
    close(dream.args[0], nodes["x"]["value"], 0)
    close(dream.guide["z"]["value"], nodes["z"]["value"], 0)
    close(dream.guide["z"]["fn"].mean, 0.3 * nodes["x"]["value"])


def test_plate_of_the_datas_length_in_the_sleep_phase():
    sbn = SBN()
    x = jnp.ones((2, 3))
    dream = Programs(sbn.model, sbn.guide, 7).dream(KEY, sbn.values, (x,), {})
    assert dream.args[0].shape == x.shape and dream.args[0].dtype == x.dtype
    for name in ("h1", "h2"):
        site = dream.guide[name]
        assert [f.size for f in site["cond_indep_stack"]] == [2]
        assert site["scale"] is None
        assert site["fn"].batch_shape == (2,)


def test_parameter_in_a_plate_does_not_see_the_particles():
    def model(x):
        t = numpyro.param("t", jnp.arange(12.0).reshape(3, 4), event_dim=0)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", normal(t[0]))
            numpyro.sample("x", normal(z), obs=x)

    params = {"t": jnp.ones((3, 4))}
    wake = wake_trace(KEY, params, model, simple_guide, (DATA,), {}, num_particles=K)
    assert wake.model["z"]["fn"].batch_shape == (K, 4)


def test_recipes_run_again_at_any_parameters():
    """Also inside ``jit``, as a pytree; the gradient is that of the site's log-density."""
    sbn = SBN()
    x = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
    programs = Programs(sbn.model, sbn.guide, K)

    @jax.jit
    def recipes(params, x):
        wake = programs.wake(KEY, params, (x,), {})
        dream = programs.dream(KEY, params, (x,), {})
        return (
            Recipe.of_wake("model", wake, wake.weights(), (x,), {}),
            Recipe.of_wake("guide", wake, wake.uniform(), (x,), {}),
            Recipe.of_dream("model", dream, (x,), {}),
            Recipe.of_dream("guide", dream, dream.args, dream.kwargs),
        )

    model, guide, dreamt, recognised = recipes(sbn.values, x)
    other = {name: v + 0.1 for name, v in sbn.values.items()}
    h1, h2 = model.values["h1"], model.values["h2"]

    def score_of(recipe):
        def value(params):
            trace = recipe.run(programs, params)
            return score(trace, recipe.layout, recipe.weights, observed=recipe.observed)

        return jax.jit(jax.grad(value))(other)

    expected = jax.grad(lambda p: (model.weights * sbn.log_joint(p, x, h1, h2)).sum() / 2)(other)
    jax.tree.map(close, score_of(model), expected)
    expected = jax.grad(lambda p: sbn.log_guide(p, x, h1, h2).sum() / 2 / K)(other)
    jax.tree.map(close, score_of(guide), expected)
    values = dreamt.values
    assert set(values) == {"h1", "h2", "x"} and set(recognised.values) == {"h1", "h2"}
    pair = values["h1"], values["h2"]
    close(recognised.args[0], values["x"], 0)
    jitted = dreamt.run(programs, other)
    logits = pair[0] @ other["p1.w"] + other["p1.b"]
    close(jitted["x"]["fn"].mean, jax.nn.sigmoid(logits))
    expected = jax.grad(lambda p: sbn.log_guide(p, values["x"], *pair).sum() / 2)(other)
    jax.tree.map(close, score_of(recognised), expected)


def test_recipe_in_a_scan_and_with_arguments_that_are_no_arrays():
    def model(x, name, *, size):
        with numpyro.plate(name, size):
            z = numpyro.sample("z", normal(0.5))
            numpyro.sample("x", normal(z, 0.7), obs=x)

    def guide(x, name, *, size):
        with numpyro.plate(name, size):
            numpyro.sample("z", normal(x))

    programs = Programs(model, guide, K)

    @jax.jit
    def recipe(key):
        wake = programs.wake(key, {}, (DATA, "data"), {"size": 4})
        return Recipe.of_wake("guide", wake, wake.uniform(), (DATA, "data"), {"size": 4})

    start = recipe(KEY)
    last, _ = jax.lax.scan(lambda r, key: (recipe(key), None), start, random.split(KEY, 3))
    assert last.args[1] == "data" and last.kwargs == {"size": 4}
    trace = last.run(programs, {})
    close(trace["z"]["value"], last.values["z"], 0)


def test_dropout_keys_are_replayed():
    def guide(x):
        with numpyro.plate("data", len(x)):
            keep = random.bernoulli(numpyro.prng_key(), 0.5, x.shape)
            numpyro.sample("z", normal(keep * x))
            numpyro.prng_key()

    programs = Programs(simple_model, guide, K)
    x = random.normal(KEY, (4,))
    wake = programs.wake(KEY, {}, (x,), {})
    trace = Recipe.of_wake("guide", wake, wake.uniform(), (x,), {}).run(programs, {})
    close(trace["z"]["fn"].mean, wake.guide["z"]["fn"].mean, 0)


def test_a_plate_of_global_latents_is_no_plate_of_data():
    def model(x):
        with numpyro.plate("components", 3):
            mu = numpyro.sample("mu", normal(jnp.zeros(3)))
        with numpyro.plate("data", 4), numpyro.plate("pixels", 2, dim=-2):
            numpyro.sample("x", normal(mu.sum(-1, keepdims=True)), obs=x)

    def guide(x):
        with numpyro.plate("components", 3):
            numpyro.sample("mu", normal(jnp.zeros(3)))

    x = random.normal(KEY, (2, 4))
    assert wake_of(model, guide, x).layout.num_data == 8
    programs = Programs(model, guide, K)
    assert programs.dream(KEY, {}, (x,), {}).layout.num_data == 8
