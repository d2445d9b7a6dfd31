"""The options of NaturalRWS and the memory of its Fisher matrix."""

import math
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import lax, random

import numpyro_helmholtz as nh
import numpyro_helmholtz.natural
from numpyro_helmholtz.columns import Columns
from numpyro_helmholtz.fisher.blocks import Component, UnitBlock
from numpyro_helmholtz.fisher.memory import Memory
from numpyro_helmholtz.fisher.statistics import Statistics, renewed
from numpyro_helmholtz.parameters import parameters

from .oracles import KEY, close, from_blocks, program
from .programs import SBN, bernoulli, of_params
from .test_fisher import PROGRAMS

FORMS = ["unit", "diagonal", "kronecker"]
SAMPLES = ["lagged", "average", "same", "dream"]
X = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]]).repeat(8, 0)


def natural(rate=0.1, **options):
    sbn = SBN()
    options.setdefault("num_particles", 6)
    return nh.NaturalRWS(sbn.model, sbn.guide, numpyro.optim.SGD(rate), **options), sbn


def steps(svi, state, count, x=X):
    """``count`` updates under ``lax.scan``."""
    body = lambda s, _: svi.update(s, x)  # noqa: E731
    return jax.jit(lambda s: lax.scan(body, s, None, count))(state)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_every_sample_learns(form, samples):
    svi, sbn = natural(fisher=form, fisher_samples=samples)
    state = svi.init(KEY, X)
    before = float(sbn.log_likelihood(svi.get_params(state), X).mean())
    state, losses = steps(svi, state, 60)
    assert bool(jnp.isfinite(losses).all())
    assert float(sbn.log_likelihood(svi.get_params(state), X).mean()) > before + 0.3


@pytest.mark.parametrize("samples", ["lagged", "average"])
@pytest.mark.parametrize("form", FORMS)
def test_programs_with_networks_train(form, samples):
    model, guide, x = program(PROGRAMS["mlp"][0])
    svi = nh.NaturalRWS(model, guide, fisher=form, fisher_samples=samples, num_particles=3)
    state = svi.init(KEY, x)
    before = svi.get_params(state)
    state, losses = steps(svi, state, 3, x)
    assert bool(jnp.isfinite(losses).all())
    assert all(not jnp.array_equal(before[n], p) for n, p in svi.get_params(state).items())


def test_single_precision_stays_single(monkeypatch):
    with jax.enable_x64(False):
        sbn = SBN()
        sbn.values = {n: jnp.asarray(v, jnp.float32) for n, v in sbn.values.items()}
        x = jnp.asarray(X, jnp.float32)
        for form in FORMS:
            svi = nh.NaturalRWS(sbn.model, sbn.guide, fisher=form, num_particles=3)
            state, _ = steps(svi, svi.init(random.PRNGKey(0), x), 2, x)
            for value in jax.tree.leaves((svi.get_params(state), state.memory)):
                assert value.dtype in (jnp.float32, jnp.int32, jnp.uint32)
                assert bool(jnp.isfinite(value).all())


def test_damping_schedule():
    svi, _ = natural(damping=lambda step: 0.5 / (1 + step))
    state, _ = steps(svi, svi.init(KEY, X), 3)
    assert float(svi.directions(state, X).fisher.damping) == pytest.approx(0.125)


@pytest.mark.parametrize("form", FORMS)
def test_much_damping_gives_the_gradient(form):
    svi, _ = natural(fisher=form, damping=1e9)
    state, _ = steps(svi, svi.init(KEY, X), 1)
    found = svi.directions(state, X)
    for name, g in found.gradient.items():
        close(found.natural[name], g, 1e-7)


def divergence(found):
    total = 0.0
    for block in found.fisher.blocks:
        v = block.gather(found.natural)
        total += 0.5 * float((v * block.matvec(v)).sum())
    return total


def test_kl_clip_bounds_the_step():
    found = {}
    for clip in (None, 1e-3, 1e6):
        options = {"fisher": "unit", "fisher_samples": "same", "tolerance": 1e-10}
        svi, _ = natural(damping=0.01, kl_clip=clip, **options)
        found[clip] = svi.directions(svi.init(KEY, X), X)
    assert divergence(found[None]) > 2e-3
    assert divergence(found[1e-3]) == pytest.approx(1e-3, rel=1e-6)
    for name, free in found[None].natural.items():
        close(found[1e6].natural[name], free, 1e-12)
        ratio = jnp.linalg.norm(found[1e-3].natural[name]) / jnp.linalg.norm(free)
        assert 0 < float(ratio) < 1


def scaled(family):
    """A model with one parameter that starts far away from its data."""

    def model(x):
        w = numpyro.param("w", jnp.full(3, 2.0))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(jnp.array(0.5)))
            numpyro.sample("x", family(w * (1 + z[..., None])).to_event(1), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(jnp.array(0.5)))

    return model, guide


@pytest.mark.parametrize(
    ("family", "bound"),
    [
        (lambda w: dist.Normal(w, 0.1), nh.natural.KL_CLIP),
        (lambda w: dist.Poisson(jnp.exp(w)), nh.natural.KL_CLIP),
        (lambda w: dist.Bernoulli(logits=2 * w), None),
    ],
)
def test_default_steps_are_bounded_where_a_variable_is_not(family, bound):
    programs, found = scaled(family), {}
    options = {"fisher": "unit", "fisher_samples": "same", "num_particles": 4, "damping": 1e-3}
    for clip in (None, math.inf):
        svi = nh.NaturalRWS(*programs, kl_clip=clip, **options)
        found[clip] = svi.directions(svi.init(KEY, X), X)
    assert divergence(found[math.inf]) > 2 * nh.natural.KL_CLIP
    if bound is None:
        close(found[None].natural["w"], found[math.inf].natural["w"], 1e-12)
    else:
        assert divergence(found[None]) == pytest.approx(bound, rel=0.05)
    svi = nh.NaturalRWS(*programs, numpyro.optim.SGD(0.1), **options)
    with_own = svi.directions(svi.init(KEY, X), X)
    close(with_own.natural["w"], found[math.inf].natural["w"], 1e-12)


def test_the_default_trains_gaussian_latents():
    rng = np.random.default_rng(0)
    pixels = jnp.asarray(rng.random((64, 20)) < 0.3 + 0.5 * (rng.random((64, 1)) < 0.5), float)
    start = {k: jnp.asarray(rng.normal(size=s)) / 5 for k, s in (("d", (5, 20)), ("e", (20, 10)))}

    def model(x):
        weight, bias = numpyro.param("d", start["d"]), numpyro.param("b", jnp.zeros(20))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(5), 1.0).to_event(1))
            numpyro.sample("x", dist.Bernoulli(logits=z @ weight + bias).to_event(1), obs=x)

    def guide(x):
        out = x @ numpyro.param("e", start["e"]) + numpyro.param("c", jnp.zeros(10))
        scale = jax.nn.softplus(out[..., 5:]) + 1e-4
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Normal(out[..., :5], scale).to_event(1))

    svi = nh.NaturalRWS(model, guide)
    losses = np.asarray(steps(svi, svi.init(KEY, pixels), 60, pixels)[1]) / 64
    assert max(losses) < losses[0] + 2
    assert losses[-10:].mean() < losses[0] - 1


def sometimes_observed():
    """A latent that is observed where its value is given; the guide then draws nothing."""

    def model(x, z=None):
        w, a = numpyro.param("w", jnp.ones((12, 3))), numpyro.param("a", jnp.zeros(12))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=a).to_event(1), obs=z)
            numpyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)

    def guide(x, z=None):
        v = numpyro.param("v", jnp.full((3, 12), 0.1))
        if z is None:
            with numpyro.plate("data", len(x)):
                numpyro.sample("z", dist.Bernoulli(logits=x @ v).to_event(1))

    return model, guide


@pytest.mark.parametrize("samples", ["lagged", "average"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_some_batches_do_not_have_are_remembered(form, samples):
    options = {"fisher": form, "fisher_samples": samples, "sleep_weight": 0.0}
    svi = nh.NaturalRWS(*sometimes_observed(), numpyro.optim.SGD(0.1), num_particles=3, **options)
    known = (random.uniform(KEY, (len(X), 12)) < 0.5) * 1.0
    step, state = jax.jit(svi.stable_update), svi.init(KEY, X)
    for _ in range(3):
        state, _ = step(state, X)
    before = state.memory
    for _ in range(2):
        state, _ = step(state, X, known)
    after = state.memory
    assert int(state.skipped) == 0
    assert after.held.keys() == before.held.keys()
    assert ("v" in after.held) != ("v" in after.statistics and form == "kronecker")
    for kept in ("held", "statistics"):
        one, two = (jax.tree.leaves(getattr(m, kept).get("v")) for m in (before, after))
        assert all(np.array_equal(a, b) for a, b in zip(one, two, strict=True))
    # The other way round: a block that comes later than the others.
    state = svi.init(KEY, X, known)
    for args in ((X, known), (X,), (X, known), (X,)):
        state, loss = step(state, *args)
        assert bool(jnp.isfinite(loss))
    assert "v" in state.memory.held or "v" in state.memory.statistics


def test_refresh_every():
    svi, _ = natural(fisher="unit", refresh_every=3)
    state = svi.init(KEY, X)
    step = jax.jit(svi.update)
    taken = []
    for _ in range(7):
        state, _ = step(state, X)
        taken.append(np.asarray(state.memory.held["p1.w + p1.b"]["coefficients"]))
    changes = [i for i in range(1, 7) if not np.array_equal(taken[i], taken[i - 1])]
    assert changes == [3, 6]


def matrix(svi, found, state):
    return from_blocks(found.fisher, svi._optimiser.params(state.optim_state))


@pytest.mark.parametrize("name", ["bernoulli logits", "categorical"])
def test_lagged_matrix_is_that_of_the_previous_batch(name):
    model, guide, x = program(PROGRAMS[name][0])

    def front(samples):
        options = {"fisher": "unit", "fisher_samples": samples, "num_particles": 3}
        return nh.NaturalRWS(model, guide, numpyro.optim.SGD(0.0), **options)

    lagged, same = front("lagged"), front("same")
    state = lagged.init(KEY, x)
    first = matrix(lagged, lagged.directions(state, x), state)
    own = same.directions(state._replace(memory=same.init(KEY, x).memory), x)
    close(first, matrix(same, own, state), 1e-14)
    state, _ = jax.jit(lagged.update)(state, x)
    close(matrix(lagged, lagged.directions(state, x), state), first, 1e-14)
    # Another batch of another size: still that of the batch before.
    close(matrix(lagged, lagged.directions(state, x[1:]), state), first, 1e-14)
    state, _ = jax.jit(lagged.update)(state, x[1:])
    later = matrix(lagged, lagged.directions(state, x), state)
    assert float(jnp.abs(later - first).max()) > 1e-4


@pytest.mark.parametrize("name", ["bernoulli logits", "mlp"])
def test_average_is_the_mean_of_the_batches_so_far(name):
    model, guide, x = program(PROGRAMS[name][0])
    options = {"fisher": "unit", "num_particles": 3}
    zero = numpyro.optim.SGD(0.0)
    average = nh.NaturalRWS(model, guide, zero, fisher_samples="average", **options)
    same = nh.NaturalRWS(model, guide, zero, fisher_samples="same", **options)
    state = average.init(KEY, x)
    nothing = same.init(KEY, x).memory
    step = jax.jit(average.update)
    each = []
    for count in range(1, 4):
        own = same.directions(state._replace(memory=nothing), x)
        each.append(matrix(same, own, state))
        state, _ = step(state, x)
        got = matrix(average, average.directions(state, x), state)
        close(got, sum(each) / count, 1e-12)


def test_running_means_of_the_kronecker_form():
    svi, _ = natural(rate=0.0, refresh_every=1)
    same, _ = natural(rate=0.0, fisher_samples="same")
    state = svi.init(KEY, X)
    key = "p1.w + p1.b"
    means = []
    step = jax.jit(svi.update)
    for _ in range(3):
        nothing = same.init(KEY, X).memory
        found = same.directions(state._replace(memory=nothing), X)
        (block,) = [b for b in found.fisher.blocks if b.key == key]
        means.append(np.asarray(block.mean_block()))
        state, _ = step(state, X)
    known = state.memory.statistics[key]
    close(known.mean, sum(means) / 3, 1e-12)
    # The eigenbasis was renewed after two batches.
    v = known.basis.vectors
    close(v @ v.T, np.eye(3), 1e-12)
    mean = (means[0] + means[1]) / 2
    turned = v.T @ mean @ v
    close(turned, np.diag(np.diagonal(turned)), 1e-12)


def test_the_average_takes_in_every_batch_at_first_and_then_every_eighth(monkeypatch):
    monkeypatch.setattr(numpyro_helmholtz.natural, "REFRESH_ALL", 3)
    svi, _ = natural(rate=0.0)
    state = svi.init(KEY, X)
    step = jax.jit(svi.update)
    counts = []
    for _ in range(18):
        state, _ = step(state, X)
        counts.append(int(state.memory.batches))
    assert counts == [1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5]


@pytest.mark.parametrize(
    ("optim", "rate"), [(None, numpyro_helmholtz.natural.LEARNING_RATE), (optax.sgd(0.1), 0.1)]
)
def test_the_default_rate(optim, rate):
    sbn = SBN()
    svi = nh.NaturalRWS(sbn.model, sbn.guide, optim, num_particles=3, average=False)
    state = svi.init(KEY, X)
    natural = svi.directions(state, X).natural
    before, after = svi.get_params(state), svi.get_params(jax.jit(svi.update)(state, X)[0])
    for name, value in after.items():
        close(value, before[name] + rate * natural[name], 1e-10)


def test_the_kronecker_form_is_diagonal_in_the_first_step():
    """One batch says nothing of most directions: noisy first dreams would go their full length."""
    svi, _ = natural()
    found = svi.directions(svi.init(KEY, X), X)
    for block in found.fisher.blocks:
        g, alpha = block.gather(found.gradient), found.fisher.damping
        scales = block.unit_scales()
        diagonal = jnp.diagonal(block.mean_block()) / scales.sum()
        expected = (1 + alpha) * g / (alpha + scales[:, None] * diagonal)
        close(block.gather(found.natural), expected, 1e-10)
        assert "diagonal in the first step" in block.method()


def layer(seed):
    u, q = random.normal(random.key(seed), (4, 5)), random.uniform(random.key(seed), (4, 3))
    columns = Columns((3, 5), None, False, (3, 5))
    return UnitBlock(["x"], "affine", [Component(["w"], [columns])], u, q)


@pytest.mark.parametrize("every", [1, 4])
def test_later_batches_weigh_as_much_as_the_first(every):
    first, other = layer(0), layer(1)
    known = {first.key: Statistics.of(first)}
    for batches in range(1, 64):
        block = first if batches < 16 else other
        known = renewed(known, [block], jnp.asarray(batches), 0.99, every)
    mean = known[first.key].mean
    share = (mean - first.mean_block()) / (other.mean_block() - first.mean_block())
    assert abs(float(jnp.median(share)) - 48 / 64) < 0.03


@pytest.mark.parametrize(("form", "interval"), [("unit", 128), ("kronecker", 32)])
def test_eigenbases_are_found_on_a_schedule(form, interval):
    """More rarely where they only precondition; the Kronecker form solves by them."""
    memory = Memory(form, "lagged" if form == "unit" else "average", mean_every=1)
    u, q = random.normal(random.key(0), (40, 10)), jnp.ones((40, 3))
    columns = Columns((3, 10), None, False, (3, 10))
    component = Component(["w"], [columns])

    def vectors(kept, seed):
        at = UnitBlock(["x"], "affine", [component], u + random.normal(seed, u.shape), q)
        kept = memory.remember(kept, [at])
        return kept, kept.statistics["w"].basis.vectors

    first = memory.start([UnitBlock(["x"], "affine", [component], u, q)])
    _, bases = lax.scan(vectors, first, random.split(random.key(1), 299))
    changes = jnp.any(bases[1:] != bases[:-1], (1, 2))
    early = [n for n in (2, 4, 8, 16, 32, 64, 128) if n < interval]
    found = [int(n) + 2 for n in jnp.flatnonzero(changes)]
    assert found == early + list(range(interval, 300, interval))


def test_dreams_give_the_models_blocks():
    svi, _ = natural(fisher="unit", fisher_samples="dream")
    found = svi.directions(svi.init(KEY, X), X)
    rows = {b.key: b.rows for b in found.fisher.blocks}
    assert rows["p1.w + p1.b"] == len(X) and rows["q2.w + q2.b"] == 6 * len(X)


def data(x):
    """The numbers of an array, those of a random key included."""
    return random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x


@pytest.mark.parametrize("form", FORMS)
def test_a_state_pickles_and_resumes_to_the_same_next_step(form):
    svi, _ = natural(fisher=form)
    state, _ = steps(svi, svi.init(KEY, X), 2)
    copy = pickle.loads(pickle.dumps(jax.device_get(state)))
    fresh, _ = natural(fisher=form)
    one, two = steps(svi, state, 2)[0], steps(fresh, copy, 2)[0]
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(two), strict=True):
        assert np.array_equal(data(a), data(b))


def test_looking_updates_nothing_and_tells_the_next_step():
    svi, _ = natural(fisher="unit")
    state, _ = steps(svi, svi.init(KEY, X), 1)
    found = svi.directions(state, X)
    new, loss = jax.jit(svi.update)(state, X)
    close(loss, found.loss, 1e-12)
    before, after = (parameters(svi.get_params(s)) for s in (state, new))
    for name, x in found.natural.items():
        close(after[name] - before[name], 0.1 * x, 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_structure_prints(form):
    svi, sbn = natural(fisher=form)
    structure = svi.structure(KEY, X)
    text = str(structure)
    for word in ("parameters", "fan-in", "p1.w", "q2.b", "h1", "exact"):
        assert word in text
    assert {p for row in structure for p in row.params} == set(sbn.values)
    (row,) = [row for row in structure if "p1.w" in row.params]
    assert (row.units, row.fan_in, row.site, row.exact) == (3, 3, "x", True)


@pytest.mark.parametrize("form", FORMS)
def test_sleep_options_and_a_changing_batch_size(form):
    svi, _ = natural(fisher=form, sleep_steps=3, sleep_scale=2.0, sleep_weight=0.3)
    state = svi.init(KEY, X)
    for n in (16, 5, 16):
        state, loss = jax.jit(svi.update)(state, X[:n])
        assert bool(jnp.isfinite(loss))
    assert all(bool(jnp.isfinite(v).all()) for v in svi.get_params(state).values())


def test_seeds_run_side_by_side():
    svi, _ = natural()
    keys = random.split(KEY, 3)
    states = jax.vmap(lambda key: svi.init(key, X))(keys)
    states, losses = jax.jit(jax.vmap(lambda s: svi.update(s, X)))(states)
    alone, loss = jax.jit(svi.update)(svi.init(keys[1], X), X)
    close(losses[1], loss, 1e-10)
    close(
        svi._optimiser.params(states.optim_state)["p1.w"][1], svi.get_params(alone)["p1.w"], 1e-10
    )


@pytest.mark.parametrize("fisher", ["unit", "kronecker"])
def test_init_inside_of_a_jit(fisher):
    svi, _ = natural(fisher=fisher)
    inside, alone = jax.jit(lambda key: svi.init(key, X))(KEY), svi.init(KEY, X)
    assert jax.tree.structure(inside) == jax.tree.structure(alone)
    for one, other in zip(jax.tree.leaves(inside), jax.tree.leaves(alone), strict=True):
        assert one.dtype == other.dtype and (one == other).all()


def test_optax_and_the_default_optimiser():
    sbn = SBN()
    for optim in (None, optax.adam(1e-2)):
        svi = nh.NaturalRWS(sbn.model, sbn.guide, optim, num_particles=3)
        state, losses = steps(svi, svi.init(KEY, X), 2)
        assert bool(jnp.isfinite(losses).all())


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"damping": 0.0}, "damping"),
        ({"fisher": "full"}, "fisher="),
        ({"fisher_samples": "old"}, "fisher_samples="),
        ({"refresh_every": 0}, "refresh_every"),
        ({"refresh_every": 2, "fisher_samples": "same"}, "refresh_every must be 1"),
        ({"damping": None}, "damping"),
        ({"damping": "0.1"}, "damping"),
        ({"kl_clip": -1.0}, "kl_clip"),
        ({"tolerance": 0.0}, "tolerance"),
    ],
)
def test_options_out_of_range(options, word):
    with pytest.raises(ValueError, match=word):
        natural(**options)


# batches of another size ----------------------------------------------------------------------


def test_a_stable_update_with_another_batch_size():
    """A step that is not finite changes no parameter and empties the memory."""
    svi = nh.NaturalRWS(*of_params(), fisher="unit", num_particles=3)
    step, plain = jax.jit(svi.stable_update), jax.jit(svi.update)
    first, _ = step(svi.init(KEY, X), X)
    fresh = svi.init(KEY, X[:5]).memory
    good, _ = step(first, X[:5])
    expected = svi.get_params(plain(first, X[:5])[0])
    for name, value in svi.get_params(good).items():
        close(value, expected[name], 1e-12)
    bad, loss = step(first, X[:5] * jnp.nan)
    assert not bool(jnp.isfinite(loss)) and int(bad.skipped) == 1
    for name, value in svi.get_params(bad).items():
        close(value, svi.get_params(first)[name], 0)
    jax.tree.map(np.testing.assert_array_equal, bad.memory, fresh)
    assert int(good.memory.batches) == 2
    # As usable as a new one: the next step has its own batch's matrix.
    other = bad._replace(memory=fresh)
    one, two = svi.directions(bad, X[:5]), svi.directions(other, X[:5])
    for name, value in one.natural.items():
        close(value, two.natural[name], 0)
        assert bool(jnp.isfinite(value).all())
        assert not np.array_equal(value, one.gradient[name])


def test_a_memory_begun_anew_takes_in_the_next_batch():
    """Whether it is one that is taken in by its number or not."""
    svi, _ = natural(fisher="kronecker", refresh_every=8)
    update = jax.jit(svi.update)
    empty = svi.init(KEY, X).memory
    state, _ = update(svi.init(KEY, X), X)
    state = update(state, X)[0]._replace(memory=empty)
    found = svi.directions(state, X)
    other = svi.directions(state._replace(step=jnp.zeros((), jnp.int32)), X)
    for name, value in found.natural.items():
        close(value, other.natural[name], 1e-10)
    after, _ = update(state, X)
    assert int(after.memory.batches) == 1
    for name, value in svi.get_params(after).items():
        close(value, svi.get_params(state)[name] + 0.1 * found.natural[name], 1e-10)


def test_a_run_goes_on_with_another_batch_size():
    svi = nh.NaturalRWS(*of_params(), fisher="unit", num_particles=3)
    update = jax.jit(svi.update)
    start, _ = update(svi.init(KEY, X), X)
    found = svi.run(KEY, 3, X[:5], init_state=start, stable_update=True)
    state, losses = start, []
    for _ in range(3):
        state, loss = update(state, X[:5])
        losses.append(loss)
    close(found.losses, jnp.stack(losses), 1e-12)
    assert int(found.state.step) == 4 and int(found.state.skipped) == 0
    for name, value in svi.get_params(state).items():
        close(found.params[name], value, 1e-12)


def test_statistics_of_exact_blocks_come_and_go_with_the_batch_size():
    """Blocks with few rows for their features need none."""
    model, guide, x = program(lambda h, w: PROGRAMS["bernoulli logits"][0](h, w), latents=9)
    svi = nh.NaturalRWS(model, guide, fisher="unit", num_particles=3)
    x = x.repeat(8, 0)
    state = svi.init(KEY, x[:2])
    counts = []
    for size in (2, 32, 2):
        state, loss = jax.jit(svi.stable_update)(state, x[:size])
        counts.append(len(state.memory.statistics))
        assert bool(jnp.isfinite(loss)) and int(state.skipped) == 0
    assert counts[0] == counts[2] < counts[1]


# parameters of both programs, and of several types --------------------------------------------


def tied(dtype=float):
    """One weight in both programs: the guide's turned over."""

    def weight():
        return numpyro.param("w", jnp.array([[0.5, -1.0, 0.3], [0.2, 0.8, -0.6]], dtype))

    def model(x):
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.array([0.3, -0.2]))
            bernoulli("x", h.astype(dtype) @ weight(), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", x.astype(dtype) @ weight().T)

    return model, guide


@pytest.mark.parametrize("samples", ["lagged", "average"])
def test_a_batch_may_come_in_another_type(samples):
    """The first one, which ``init`` saw otherwise, or a later one: a matrix-free block keeps it."""
    options = {"fisher": "unit", "fisher_samples": samples}
    svi = nh.NaturalRWS(*tied(), numpyro.optim.SGD(0.1), 3, **options)
    losses = []
    for types in ([int, float, int, float], [float] * 4):
        state = svi.init(KEY, X)
        for dtype in types:
            state, loss = svi.update(state, X.astype(dtype))
            losses.append(float(loss))
    close(np.array(losses[:4]), np.array(losses[4:]), 1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_extra_sleep_steps_with_a_parameter_of_both_programs(form):
    """The guide alone has a unit block; that of both programs is matrix-free."""
    svi = nh.NaturalRWS(*tied(), numpyro.optim.SGD(0.1), 3, fisher=form, sleep_steps=2)
    state, loss = jax.jit(svi.update)(svi.init(KEY, X), X)
    assert bool(jnp.isfinite(loss))
    key = random.key(5)
    (new, _), (_, done) = jax.jit(
        lambda s: (
            svi._sleep_step(s, key, (X,), {}),
            svi.estimator.sleep(
                svi.programs, random.split(key)[0], svi.get_params(s), (X,), {}, {}
            ),
        )
    )(state)
    w, x = svi.get_params(state)["w"], done.dream.args[0]
    h = done.dream.values["h"].astype(float)
    p = jax.nn.sigmoid(x @ w.T)
    g = (h - p).T @ x / len(x)
    if form == "unit":
        blocks = jnp.einsum("nj,nk,nl->jkl", p * (1 - p), x, x) / len(x)
        natural = np.linalg.solve(0.1 * np.eye(3) + blocks, 1.1 * g[..., None])[..., 0]
        close((svi.get_params(new)["w"] - w) / 0.1, natural, 1e-9)
    else:
        moved = (svi.get_params(new)["w"] - w) / 0.1
        assert bool(jnp.isfinite(moved).all()) and float((moved * g).sum()) > 0


NARROW, WIDE = jnp.dtype(jnp.float32), jnp.dtype(jnp.float64)


def typed(narrow, draws=WIDE):
    """The model's weight, not its bias, and the whole guide in a narrower type than the data."""
    w, v = jnp.array([[0.5, -1.0, 0.3], [0.2, 0.8, -0.6]]), jnp.ones((3, 2))

    def model(x):
        weight, bias = numpyro.param("w", w.astype(narrow)), numpyro.param("b", jnp.ones(3))
        with numpyro.plate("data", len(x)):
            h = bernoulli("h", jnp.array([0.3, -0.2]))
            bernoulli("x", h @ weight + bias, obs=x)

    def guide(x):
        weight, bias = (numpyro.param(n, a.astype(narrow)) for n, a in (("v", v), ("c", v[0])))
        with numpyro.plate("data", len(x)):
            bernoulli("h", (x.astype(narrow) @ weight + bias).astype(draws))

    return model, guide


def in_types(form, *types):
    """A front end for ``typed``, its state and its directions."""
    options = {"fisher": form, "num_particles": 3, "kl_clip": 0.5, "tolerance": 1e-6}
    svi = nh.NaturalRWS(*typed(*types), damping=lambda step: 0.1 + 0.0 * step, **options)
    state = svi.init(KEY, X)
    return svi, state, svi.directions(state, X)


@pytest.mark.parametrize("form", FORMS)
def test_programs_in_several_types(form):
    """Directions are in the parameters' own types."""
    svi, state, found = in_types(form, NARROW)
    expected = in_types(form, WIDE)[2].natural
    types = {"w": NARROW, "b": WIDE, "v": NARROW, "c": NARROW}
    for name, value in found.natural.items():
        assert value.dtype == found.gradient[name].dtype == types[name]
        close(value, expected[name], 1e-5)
    new, losses = steps(svi, state, 2)
    assert bool(jnp.isfinite(losses).all())
    assert all(bool(jnp.isfinite(v).all()) for v in svi.get_params(new).values())


def test_draws_in_a_narrower_type():
    _, _, found = in_types("kronecker", NARROW, NARROW)  # the particles are others
    for name, value in found.natural.items():
        assert value.dtype == found.gradient[name].dtype
        assert float((value * found.gradient[name]).sum()) > 0


@pytest.mark.parametrize("samples", ["lagged", "average"])
def test_a_matrix_free_block_in_a_narrower_type(samples):
    svi = nh.NaturalRWS(*tied(jnp.float32), num_particles=3, fisher_samples=samples)
    state, losses = steps(svi, svi.init(KEY, X), 2)
    assert bool(jnp.isfinite(losses).all())
    assert svi.get_params(state)["w"].dtype == jnp.float32
