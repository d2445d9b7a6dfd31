"""The front ends: optimisers, runs, skipped steps, mutable state, sleep steps, modules."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from flax import linen, nnx
from jax import random
from numpyro.contrib.module import eqx_module, flax_module, nnx_module

from numpyro_helmholtz import RWS, RWS_ELBO, WakeSleep

from .programs import SBN, bernoulli, of_params

KEY = random.key(1)
X = jnp.array([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 0.0, 1.0]])
SBN_ = SBN()


def close(a, b, tolerance=1e-12):
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


OPTIMISERS = {
    "adam": lambda: numpyro.optim.Adam(0.01),
    "clipped": lambda: numpyro.optim.ClippedAdam(0.01, clip_norm=5.0),
    "momentum": lambda: numpyro.optim.Momentum(0.01, 0.9),
    "optax": lambda: optax.sgd(0.01, momentum=0.9, nesterov=True),
    "schedule": lambda: optax.chain(optax.clip(1.0), optax.adam(optax.cosine_decay_schedule(1, 9))),
    "default": lambda: None,
}


@pytest.mark.parametrize("name", OPTIMISERS)
def test_optimisers(name):
    svi = RWS(SBN_.model, SBN_.guide, OPTIMISERS[name](), num_particles=4)
    state = svi.init(KEY, X)
    new, loss = jax.jit(svi.update)(state, X)
    assert jnp.isfinite(loss) and int(new.step) == 1
    before, after = svi.get_params(state), svi.get_params(new)
    assert before.keys() == after.keys() == SBN_.values.keys()
    assert all(not np.array_equal(before[n], after[n]) for n in before)
    jax.tree.map(lambda a, b: None, state, new)  # the same structure, for lax.scan


@pytest.mark.parametrize("steps", [1, 3])
def test_plain_sgd_takes_the_direction(steps):
    svi = RWS(SBN_.model, SBN_.guide, numpyro.optim.SGD(0.1), 4, sleep_steps=steps)
    state = svi.init(KEY, X)
    found = svi.directions(state, X)
    new, loss = jax.jit(svi.update)(state, X)
    assert float(loss) == float(found.loss)
    before, after = svi.get_params(state), svi.get_params(new)
    for name in before:
        moved = before[name] + 0.1 * found.gradient[name]
        same = np.allclose(after[name], moved, rtol=1e-12)
        assert same == (steps == 1 or name[0] != "q")
    assert found.fisher is None and found.natural is found.gradient


@pytest.mark.parametrize("front", [RWS, WakeSleep])
def test_sleep_steps_after_the_first_train_the_guide_alone(front):
    """With momentum, too: the model's velocity rests in them."""
    found = []
    for steps in (1, 4):
        svi = front(SBN_.model, SBN_.guide, optax.sgd(0.1, 0.9), 3, sleep_steps=steps)
        state, _ = jax.jit(svi.update)(svi.init(KEY, X), X)
        found.append(svi.get_params(state))
    for name, value in found[0].items():
        assert np.allclose(value, found[1][name], rtol=1e-12) == (name[0] != "q")


@pytest.mark.parametrize("progress_bar", [True, False])
def test_run_is_the_loop_of_updates(progress_bar):
    svi = RWS(SBN_.model, SBN_.guide, numpyro.optim.Adam(0.01), num_particles=4)
    result = svi.run(KEY, 7, X, progress_bar=progress_bar)
    state = svi.init(KEY, X)
    update = jax.jit(svi.update)
    losses = []
    for _ in range(7):
        state, loss = update(state, X)
        losses.append(loss)
    close(result.losses, jnp.stack(losses))
    jax.tree.map(close, result.params, svi.get_params(state))
    assert int(result.state.step) == 7


def test_run_goes_on_and_compiles_once():
    svi = RWS(SBN_.model, SBN_.guide, numpyro.optim.Adam(0.01), num_particles=4)
    first = svi.run(KEY, 1030, X, progress_bar=False)
    assert first.losses.shape == (1030,)
    more = svi.run(KEY, 3, X, init_state=first.state, progress_bar=True)
    assert int(more.state.step) == 1033
    assert svi._jitted._cache_size() == 1
    assert first.losses[-100:].mean() < first.losses[:100].mean()


def test_update_in_a_scan_over_batches():
    svi = RWS(SBN_.model, SBN_.guide, numpyro.optim.Adam(0.01), num_particles=4)
    state = svi.init(KEY, X)
    last, losses = jax.jit(lambda s: jax.lax.scan(svi.update, s, jnp.stack([X, 1 - X])))(state)
    for x, loss in zip((X, 1 - X), losses, strict=True):
        state, expected = jax.jit(svi.update)(state, x)
        close(loss, expected)
    jax.tree.map(close, svi.get_params(last), svi.get_params(state))


def test_vmap_over_keys():
    svi = RWS(SBN_.model, SBN_.guide, num_particles=4)
    run = jax.vmap(lambda key: svi.run(key, 3, X, progress_bar=False).losses)
    assert run(random.split(KEY, 2)).shape == (2, 3)


def test_stable_update_skips_and_counts():
    def model(x):
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(3))
            loc = numpyro.param("loc", jnp.zeros(3))
            numpyro.sample("x", dist.Normal(loc * h, 1.0).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", numpyro.param("a", jnp.zeros(3)) * x)

    svi = RWS(model, guide, numpyro.optim.Adam(0.01), num_particles=4)
    state = svi.init(KEY, X)
    step = jax.jit(svi.stable_update)
    bad, loss = step(state, X * jnp.inf)
    assert not jnp.isfinite(loss)
    assert int(bad.skipped) == 1 and int(bad.step) == 0
    jax.tree.map(lambda a, b: close(a, b, 0), bad.optim_state, state.optim_state)
    good, loss = step(bad, X)
    assert jnp.isfinite(loss) and int(good.skipped) == 1 and int(good.step) == 1
    result = svi.run(KEY, 4, X, stable_update=True, progress_bar=False)
    assert int(result.state.skipped) == 0


def test_evaluate_is_minus_the_bound_and_changes_nothing():
    svi = RWS(SBN_.model, SBN_.guide, num_particles=2000)
    state = svi.init(KEY, X)
    exact = -SBN_.log_likelihood(SBN_.values, X).sum()
    assert float(svi.evaluate(state, X)) == pytest.approx(float(exact), abs=0.2)


def test_init_params_and_constraints():
    model, guide = of_params()
    svi = RWS(model, guide, num_particles=2)
    start = {"w": jnp.ones((2, 3)), "top": jnp.array([0.1, 0.9])}
    params = svi.get_params(svi.init(KEY, X, init_params=start))
    close(params["w"], start["w"])
    close(params["top"], start["top"])
    assert params["v"].shape == (3, 2)
    result = svi.run(KEY, 20, X, init_params=start, progress_bar=False)
    assert ((result.params["top"] > 0) & (result.params["top"] < 1)).all()


def test_a_parameter_of_both_programs():
    def model(x):
        w = numpyro.param("w", jnp.ones((3, 3)))
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(3))
            bernoulli("x", h @ w, obs=x)

    def guide(x):
        w = numpyro.param("w", jnp.full((3, 3), 2.0))
        with numpyro.plate("data", len(x)):
            bernoulli("h", x @ w.T)

    svi = RWS(model, guide, num_particles=2, sleep_steps=2)
    state = svi.init(KEY, X)
    close(svi.get_params(state)["w"], jnp.full((3, 3), 2.0))
    new, _ = jax.jit(svi.update)(state, X)
    assert not np.array_equal(svi.get_params(new)["w"], svi.get_params(state)["w"])


class Net(linen.Module):
    """Two layers, or one under batch normalisation."""

    size: int
    normalised: bool = False

    @linen.compact
    def __call__(self, x):
        if self.normalised:
            x = linen.BatchNorm(use_running_average=False, momentum=0.5)(x)
        return linen.Dense(self.size)(jnp.tanh(linen.Dense(4)(x)))


def of_flax():
    def model(x):
        net = flax_module("down", Net(3), input_shape=(1, 2))
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(2))
            bernoulli("x", net(h), obs=x)

    def guide(x):
        net = flax_module("up", Net(2), input_shape=(1, 3))
        with numpyro.plate("data", len(x)):
            bernoulli("h", net(x))

    return model, guide


def of_nnx():
    down, up = nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 2, rngs=nnx.Rngs(1))

    def model(x):
        net = nnx_module("down", down)
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(2))
            bernoulli("x", net(h.astype(float)), obs=x)

    def guide(x):
        net = nnx_module("up", up)
        with numpyro.plate("data", len(x)):
            bernoulli("h", net(x))

    return model, guide


def of_equinox():
    import equinox as eqx

    down, up = eqx.nn.Linear(2, 3, key=KEY), eqx.nn.Linear(3, 2, key=KEY)

    def model(x):
        net = eqx_module("down", down)
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(2))
            bernoulli("x", jnp.vectorize(net, signature="(a)->(b)")(h), obs=x)

    def guide(x):
        net = eqx_module("up", up)
        with numpyro.plate("data", len(x)):
            bernoulli("h", jax.vmap(net)(x))

    return model, guide


@pytest.mark.parametrize("make", [of_flax, of_nnx, of_equinox])
def test_modules(make):
    svi = RWS(*make(), numpyro.optim.Adam(0.05), num_particles=8)
    result = svi.run(KEY, 100, X, progress_bar=False)
    assert result.losses[-20:].mean() < result.losses[:20].mean()
    names = svi.directions(result.state, X).gradient.keys()
    if make is of_flax:
        assert "down$params.Dense_0.kernel" in names
    assert all("up$params" in n or "down$params" in n for n in names)


def test_mutable_state_is_carried_with_many_particles():
    def model(x):
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.zeros(2))
            bernoulli("x", h @ numpyro.param("w", jnp.ones((2, 3))), obs=x)

    def guide(x):
        net = flax_module("up", Net(2, True), input_shape=(1, 3), mutable=["batch_stats"])
        with numpyro.plate("data", len(x)):
            bernoulli("h", net(x))

    svi = RWS(model, guide, num_particles=8)
    state = svi.init(KEY, X)
    start = state.mutable_state["up$state"]["batch_stats"]["BatchNorm_0"]["mean"]
    new, _ = jax.jit(svi.update)(state, X)
    found = new.mutable_state["up$state"]["batch_stats"]["BatchNorm_0"]["mean"]
    close(found, 0.5 * start + 0.5 * X.mean(0))
    result = svi.run(KEY, 3, X, progress_bar=False)
    assert result.state.mutable_state.keys() == {"up$state"}
    host = numpyro.infer.SVI(model, guide, numpyro.optim.SGD(0.05), RWS_ELBO(8))
    new, _ = jax.jit(host.update)(host.init(KEY, X), X)
    found = new.mutable_state["up$state"]["batch_stats"]["BatchNorm_0"]["mean"]
    close(found, 0.5 * start + 0.5 * X.mean(0))


def test_float32_stays_float32():
    values = {n: v.astype(jnp.float32) for n, v in SBN_.values.items()}
    svi = RWS(SBN_.model, SBN_.guide, num_particles=4)
    state = svi.init(KEY, X.astype(jnp.float32), init_params=values)
    new, loss = jax.jit(svi.update)(state, X.astype(jnp.float32))
    assert loss.dtype == jnp.float32
    assert {v.dtype for v in svi.get_params(new).values()} == {jnp.dtype(jnp.float32)}
