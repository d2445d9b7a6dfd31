"""Fisher blocks of programs against brute force, in float64."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import lax, random
from numpyro import handlers

import numpyro_helmholtz as nh
from numpyro_helmholtz import branches
from numpyro_helmholtz.fisher import eigenbasis, families, registry, solvers
from numpyro_helmholtz.fisher.blocks import UnitBlock
from numpyro_helmholtz.parameters import parameters

from .oracles import KEY, check, close, from_blocks, natural, program
from .programs import bernoulli, log_bernoulli, patterns

DRAWS = np.random.default_rng(11)


def draw(*shape):
    return jnp.asarray(DRAWS.normal(size=shape))


def kinds(directions):
    return {p: b.kind for b in directions.fisher.blocks for p in b.params}


# exactness by enumeration ----------------------------------------------------------------------


class AllStates(dist.BernoulliLogits):
    """Every state once, along the particles, each with the same probability."""

    def __init__(self, table, shape=(2,)):
        self.table = table
        super().__init__(logits=jnp.zeros(shape), validate_args=False)

    def expand(self, batch_shape):
        return AllStates(self.table, batch_shape)

    def sample(self, key, sample_shape=()):
        if len(self.batch_shape) < 3:  # a run without particles
            return jnp.zeros(self.batch_shape)
        return jnp.broadcast_to(self.table, self.batch_shape)


STARTS = {
    "prior": draw(2),
    "mid.w": draw(2, 2),
    "mid.b": draw(2),
    "low.w": draw(2, 3),
    "low.b": draw(3),
    "skip": draw(2, 3),
}


def conditionals(p, h2, h1):
    low = h1 @ p["low.w"] + p["low.b"] + h2 @ p["skip"]
    return p["prior"], h2 @ p["mid.w"] + p["mid.b"], low


def exact_network():
    """A sigmoid belief network with a skip, and a guide that enumerates its latents."""
    table = patterns(4)[:, None]

    def model(x, scale):
        p = {name: numpyro.param(name, value) for name, value in STARTS.items()}
        with numpyro.plate("data", len(x)), handlers.scale(scale=scale):
            h2 = bernoulli("h2", p["prior"]).astype(float)
            h1 = bernoulli("h1", h2 @ p["mid.w"] + p["mid.b"]).astype(float)
            bernoulli("x", conditionals(p, h2, h1)[2], obs=x)

    def guide(x, scale):
        with numpyro.plate("data", len(x)), handlers.scale(scale=scale):
            numpyro.sample("h2", AllStates(table[..., :2]).to_event(1))
            numpyro.sample("h1", AllStates(table[..., 2:]).to_event(1))

    return model, guide, len(table)


def log_joint(p, x, h1, h2):
    logits = conditionals(p, h2, h1)
    return sum(log_bernoulli(a, v) for a, v in zip(logits, (h2, h1, x), strict=True))


def test_model_blocks_are_the_joint_fisher_matrix_by_enumeration():
    model, guide, states = exact_network()
    x, every = patterns(3), patterns(7)

    def one(p, v):
        return log_joint(p, v[:3], v[3:5], v[5:])

    log_p, grads = jax.vmap(jax.value_and_grad(one), (None, 0))(STARTS, every)
    scores = np.concatenate([np.asarray(grads[n]).reshape(128, -1) for n in sorted(grads)], 1)
    p = np.exp(log_p)
    assert abs(p.sum() - 1) < 1e-12
    truth = np.einsum("n,ni,nj->ij", p, scores, scores)
    # Data drawn from the model itself: every x once, scaled by its probability.
    svi = natural(model, guide, num_particles=states, sleep_weight=0.0)
    scale = jnp.asarray(p.reshape(8, -1).sum(1) * len(x))
    state = svi.init(KEY, x, scale)
    directions = svi.directions(state, x, scale)
    got = from_blocks(directions.fisher, STARTS)
    close(got, truth, 1e-9)
    # What lies outside the blocks is zero in the truth, not only in ours.
    outside = (np.asarray(got) == 0) & ~np.eye(len(truth), dtype=bool)
    assert np.abs(truth[outside]).max() < 1e-12 and outside.mean() > 0.4
    # The direction is the gradient of log p(x): zero in expectation under the model.
    for g in directions.gradient.values():
        close(g, jnp.zeros_like(g), 1e-10)


def test_model_blocks_on_data_use_the_exact_posterior():
    model, guide, states = exact_network()
    x = patterns(3)[jnp.array([1, 6, 6])]
    svi = natural(model, guide, num_particles=states, sleep_weight=0.0)
    scale = jnp.ones(3)
    directions = svi.directions(svi.init(KEY, x, scale), x, scale)
    (block,) = [b for b in directions.fisher.blocks if b.site == "x"]
    h = patterns(4)
    h2, h1 = h[:, :2], h[:, 2:]
    truth = 0.0
    for datum in x:
        posterior = jax.nn.softmax(log_joint(STARTS, datum, h1, h2))
        low = conditionals(STARTS, h2, h1)[2]
        c = jax.nn.sigmoid(low) * jax.nn.sigmoid(-low)
        order = {"low.w": h1, "skip": h2, "low.b": jnp.ones((len(h), 1))}
        u = jnp.concatenate([order[n] for n in block.params], 1)
        truth = truth + jnp.einsum("s,sj,sa,sb->jab", posterior, c, u, u) / 3
    close(block.dense(), truth, 1e-10)


# families in programs --------------------------------------------------------------------------


def halves(a):
    return jnp.split(a, 2, -1)


def normal_halves(h, w):
    loc, raw = halves(w.layer("a", h, 4))
    return dist.Normal(loc, jax.nn.softplus(raw)).to_event(1)


def gamma_two(h, w):
    a = jax.nn.softplus(w.layer("a", h, 2)) + 0.4
    return dist.Gamma(a, jnp.exp(w.layer("b", h, 2))).to_event(1)


def gamma_one(h, w):
    a, b = halves(w.layer("a", h, 4))
    return dist.Gamma(jax.nn.softplus(a) + 0.4, jnp.exp(b)).to_event(1)


def beta_one(h, w):
    a, b = halves(jax.nn.softplus(w.layer("a", h, 4)) + 1.5)
    return dist.Beta(a, b).to_event(1)


def reshaped(h, w):
    return w.layer("a", h, 6).reshape(*h.shape[:-1], 2, 3)


def logits(h, w):
    return dist.Bernoulli(logits=w.layer("a", h, 2)).to_event(1)


def tied(h, w):
    v = w("a.w", 3, 2)
    return dist.Bernoulli(logits=jnp.tanh(h @ v) @ v.T).to_event(1)


def normed(h, w):
    v = w("a.w", 3, 2)
    return dist.Bernoulli(logits=h @ (v / jnp.linalg.norm(v, axis=0))).to_event(1)


def mlp(h, w):
    return dist.Bernoulli(logits=w.layer("b", jnp.tanh(w.layer("a", h, 2)), 2)).to_event(1)


def positive_scale(h, w):
    scale = numpyro.param("scale", 0.7 * jnp.ones(2), constraint=dist.constraints.positive)
    return dist.Normal(w.layer("a", h, 2), scale).to_event(1)


SIGMOID = dist.transforms.SigmoidTransform()
PROGRAMS = {
    "bernoulli logits": (logits, "affine"),
    "bernoulli probs": (
        lambda h, w: dist.Bernoulli(probs=jax.nn.sigmoid(w.layer("a", h, 2))).to_event(1),
        "affine",
    ),
    "normal loc": (lambda h, w: dist.Normal(w.layer("a", h, 2), 0.5).to_event(1), "affine"),
    "normal scale exp": (
        lambda h, w: dist.Normal(0.0, jnp.exp(w.layer("a", h, 2))).to_event(1),
        "affine",
    ),
    "normal half log": (
        lambda h, w: dist.Normal(w.layer("a", h, 2), jnp.exp(0.5 * w.layer("b", h, 2))).to_event(1),
        "affine",
    ),
    "normal halves": (normal_halves, "affine"),
    "positive scale": (positive_scale, "affine"),
    "poisson": (lambda h, w: dist.Poisson(jnp.exp(w.layer("a", h, 2))).to_event(1), "affine"),
    "geometric": (lambda h, w: dist.Geometric(logits=w.layer("a", h, 2)).to_event(1), "affine"),
    "categorical": (lambda h, w: dist.Categorical(logits=w.layer("a", h, 4)), "affine"),
    "categorical reshaped": (
        lambda h, w: dist.Categorical(logits=reshaped(h, w)).to_event(1),
        "affine",
    ),
    "categorical softmax": (
        lambda h, w: dist.Categorical(probs=jax.nn.softmax(w.layer("a", h, 3))),
        "affine",
    ),
    "categorical log-softmax": (
        lambda h, w: dist.Categorical(logits=jax.nn.log_softmax(w.layer("a", h, 3))),
        "affine",
    ),
    "von mises": (
        lambda h, w: dist.VonMises(w.layer("a", h, 2), jnp.exp(w.layer("b", h, 2))).to_event(1),
        "affine",
    ),
    "gamma two": (gamma_two, "affine"),
    "gamma one": (gamma_one, "affine"),
    "beta one": (beta_one, "affine"),
    "beta half": (
        lambda h, w: dist.Beta(jax.nn.softplus(w.layer("a", h, 2)) + 1.0, 2.0).to_event(1),
        "affine",
    ),
    "exponential": (
        lambda h, w: dist.Exponential(jnp.exp(w.layer("a", h, 2))).to_event(1),
        "affine",
    ),
    "half-normal": (
        lambda h, w: dist.HalfNormal(jnp.exp(w.layer("a", h, 2))).to_event(1),
        "affine",
    ),
    "student-t": (
        lambda h, w: dist.StudentT(
            2.5, w.layer("a", h, 2), jax.nn.softplus(w.layer("b", h, 2)) + 0.5
        ).to_event(1),
        "affine",
    ),
    "weibull": (
        lambda h, w: dist.Weibull(
            jnp.exp(w.layer("a", h, 2)), jax.nn.softplus(w.layer("b", h, 2)) + 0.5
        ).to_event(1),
        "affine",
    ),
    "zero-inflated poisson": (
        lambda h, w: dist.ZeroInflatedPoisson(
            jax.nn.sigmoid(w.layer("b", h, 2)), jnp.exp(w.layer("a", h, 2))
        ).to_event(1),
        "affine",
    ),
    "lognormal": (lambda h, w: dist.LogNormal(w.layer("a", h, 2), 0.7).to_event(1), "affine"),
    "transformed": (
        lambda h, w: dist.TransformedDistribution(
            dist.Normal(w.layer("a", h, 2), 0.7), [SIGMOID]
        ).to_event(1),
        "affine",
    ),
    "masked elements": (
        lambda h, w: (
            dist.Bernoulli(logits=w.layer("a", h, 3))
            .mask(jnp.array([True, False, True]))
            .to_event(1)
        ),
        "affine",
    ),
    "skip": (
        lambda h, w: dist.Bernoulli(
            logits=w.layer("a", h[..., :2], 2) - 2 * w.layer("b", h, 2, bias=False)
        ).to_event(1),
        "affine",
    ),
    "positions": (
        lambda h, w: dist.Bernoulli(logits=w.layer("a", jnp.stack([h, 1 - h], -2), 2)).to_event(2),
        "affine",
    ),
    "mlp": (mlp, "site"),
    "tied": (tied, "site"),
    "normed weight": (normed, "site"),
    "shared shift": (
        lambda h, w: dist.Bernoulli(logits=w.layer("a", h, 2, bias=False) + w("a.shift")).to_event(
            1
        ),
        "site",
    ),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_program_equals_brute_force(name):
    site, kind = PROGRAMS[name]
    model, guide, x = program(site)
    directions = check(natural(model, guide), x)
    of = kinds(directions)
    assert {k for n, k in of.items() if n[:2] in ("a.", "b.")} == {kind}
    assert of["prior"] == "direct" and of["up.w"] == "affine"
    assert set(of) == set(directions.gradient)
    assert all(block.exact for block in directions.fisher.blocks)
    names = [p for b in directions.fisher.blocks for p in b.params]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("name", ["categorical reshaped", "gamma two", "skip"])
def test_conjugate_gradients_equal_a_dense_solve(name, monkeypatch):
    monkeypatch.setattr(solvers, "CHOLESKY_SIZE", 0)
    check(natural(*program(PROGRAMS[name][0])[:2]), program(PROGRAMS[name][0])[2])


@pytest.mark.parametrize("large", [0, 1 << 60])
def test_solves_over_rows_equal_a_dense_solve(large, monkeypatch):
    """Wide layers: fewer rows than features, rows of no weight, the eigenbasis."""
    monkeypatch.setattr(solvers, "LARGE", large)
    model, guide, x = program(logits, latents=12, batch=4)
    svi = natural(model, guide, num_particles=8)
    found = check(svi, x)
    methods = {b.method() for b in found.fisher.blocks}
    assert any("conjugate gradients to" in m for m in methods)
    wide, narrow, y = program(logits, latents=2, batch=2)

    def guide(x):
        features = jnp.concatenate([jnp.cos(i * x.astype(float)) for i in range(20)], -1)
        with numpyro.plate("data", len(x)):
            v = numpyro.param("v", lambda key: random.normal(key, (features.shape[-1], 2)))
            bernoulli("h", features @ v)

    found = check(natural(wide, guide, num_particles=1), y)
    assert any("over samples" in b.method() for b in found.fisher.blocks)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rows", [1, 7, 30, 60])
def test_the_space_of_the_samples_gives_the_dense_solution(rows, dtype):
    """Within the bound; features with a mean, rows and a unit of no weight, no weight at all."""
    rng = np.random.default_rng(rows)
    u = (rng.uniform(size=(rows, 40)) < 0.6) * 1.0
    q, g = rng.uniform(size=(rows, 5)), rng.normal(size=(5, 40))
    q[0], q[:, 1] = 0, 0
    in_sample_space = jax.jit(solvers.in_sample_space, static_argnums=5)
    for damping in (1e-2, 0.2, 100.0):
        exact = np.linalg.solve(
            damping * np.eye(40) + np.einsum("nj,nk,nl->jkl", q, u, u), (1 + damping) * g[..., None]
        )[..., 0]
        given = [jnp.asarray(x, dtype) for x in (u, q, g)]

        def error(x, exact=exact):
            return np.linalg.norm(x - exact) / np.linalg.norm(exact)

        for tolerance in (1e-1, 1e-2, 1e-3):
            found = in_sample_space(*given, damping, tolerance, 100)
            assert error(found.x) <= found.error + 1e-5 <= tolerance + 1e-5
        if dtype == np.float64:
            assert error(in_sample_space(*given, damping, 1e-12, 500).x) < 1e-9
        nothing = in_sample_space(given[0], 0 * given[1], given[2], damping, 1e-2, 100)
        close(nothing.x, (1 + damping) / damping * given[2], 1e-6)


def test_a_mean_of_the_features_costs_no_iterations():
    rng = np.random.default_rng(0)
    u = (rng.uniform(size=(320, 300)) < 0.5) * 1.0
    q, g = rng.uniform(size=(320, 8)) / 1280, rng.normal(size=(8, 300))
    found = []
    for dtype in (np.float32, np.float64):
        given = [jnp.asarray(x, dtype) for x in (u, q, g)]
        found.append(int(solvers.in_sample_space(*given, 0.1).iterations))
    assert found[0] == found[1] <= 5


@pytest.mark.parametrize("d", [1, 2])
@pytest.mark.parametrize("fan_in", [24, 12])
@pytest.mark.parametrize(("active", "taken"), [(4, 0), (9, 1), (14, 2), (30, 3)])
def test_idle_rows_are_left_out_within_the_tolerance(d, fan_in, active, taken, monkeypatch):
    """In the space of the rows, in the eigenbasis, and with coupled units."""
    monkeypatch.setattr(solvers, "LARGE", 0)
    chosen = []

    def switch(index, ways, operand):
        chosen.append(int(index))
        return ways[chosen[-1]](operand)

    monkeypatch.setattr(branches, "switch", switch)
    rng = np.random.default_rng(0)
    u = rng.normal(size=(40, fan_in))
    weight = rng.permutation(np.where(np.arange(40) < active, 0.1, 1e-8))
    root = rng.normal(size=(40, 6, d, d)) + np.eye(d)
    q = weight[:, None, None, None] * (root @ root.swapaxes(2, 3))
    f = np.einsum("ngij,nk,nl->gikjl", q, u, u).reshape(6, d * fan_in, -1)
    q = q[..., 0, 0] if d == 1 else q
    block = UnitBlock(["x"], "affine", [None] * d, jnp.asarray(u), jnp.asarray(q), tolerance=1e-3)
    g = rng.normal(size=(6, d * fan_in))
    exact = np.linalg.solve(0.1 * np.eye(d * fan_in) + f, 1.1 * g[..., None])[..., 0]
    x = block.solve(jnp.asarray(g), 0.1)
    # In the eigenbasis the tolerance is on the residual.
    assert 0 < np.linalg.norm(x - exact) < 1e-2 * np.linalg.norm(exact)
    assert chosen == [taken]


@pytest.mark.parametrize("name", ["categorical reshaped", "gamma one", "mlp"])
@pytest.mark.parametrize("fisher", ["unit", "diagonal", "kronecker"])
def test_large_damping_gives_the_gradient(name, fisher):
    model, guide, x = program(PROGRAMS[name][0])
    svi = natural(model, guide, fisher=fisher, damping=lambda step: jnp.where(step < 0, 0, 1e12))
    d = svi.directions(svi.init(KEY, x), x)
    for key in d.gradient:
        close(d.natural[key], d.gradient[key], 1e-9)
    if fisher == "diagonal" and name != "mlp":
        for block in d.fisher.blocks:
            g = block.gather(d.gradient)
            diagonal = jnp.diagonal(block.dense(), axis1=1, axis2=2)
            close(block.solve(g, 0.3), 1.3 * g / (0.3 + diagonal), 1e-12)


def test_kronecker_solve_is_the_shared_eigenbasis():
    model, guide, x = program(logits)
    svi = natural(model, guide, fisher="kronecker")
    d = svi.directions(svi.init(KEY, x), x)
    (block,) = [b for b in d.fisher.blocks if b.site == "x"]
    u, q = np.asarray(block.features), np.asarray(block.coefficients)
    mean = np.einsum("nj,na,nb->ab", q, u, u) / q.sum()
    g, alpha = np.asarray(block.gather(d.gradient)), float(d.fisher.damping)
    for j, s in enumerate(q.sum(0)):
        truth = np.linalg.solve(alpha * np.eye(4) + s * mean, (1 + alpha) * g[j])
        close(block.gather(d.natural)[j], truth, 1e-10)


@pytest.mark.parametrize("coupled", [False, True])
@pytest.mark.parametrize("spread", [0.0, 0.3, 3.0])
def test_the_band_of_eigenvalues_keeps_its_promise(coupled, spread):
    rng = np.random.default_rng(0)
    size, units = 96, 6
    q, _ = np.linalg.qr(rng.normal(size=(size, size)))
    values = np.sort(0.2 * np.exp(spread * rng.normal(size=size)))
    values[-2:] = 5.0, 40.0
    basis = eigenbasis.EigenBasis(jnp.asarray(values), jnp.asarray(q))
    scales, g = rng.uniform(size=units), rng.normal(size=(units, size))
    blocks = np.zeros(0)
    if coupled:
        root = rng.normal(size=(3, 2, 2)) / 2
        blocks, g = root @ root.swapaxes(1, 2), g.reshape(3, 2 * size)
    inverse = jax.jit(basis.inverse, static_argnums=3)
    matrix = (q * values) @ q.T
    for slack in (0.0, 0.05, 0.2):
        if coupled:
            dense = [np.kron(b, matrix) + 0.2 * np.eye(2 * size) for b in blocks]
            scale = jnp.asarray(blocks)
        else:
            dense = [s * matrix + 0.2 * np.eye(size) for s in scales]
            scale = jnp.asarray(scales)
        exact = np.stack([np.linalg.solve(a, b) for a, b in zip(dense, g, strict=True)])
        x = np.asarray(inverse(jnp.asarray(g), scale, 0.2, slack))
        error = np.linalg.norm(x - exact) / np.linalg.norm(exact)
        assert error <= max(slack, 1e-10)
        if spread == 0.3 and slack == 0.2:
            assert error > 1e-3  # else nothing counted as one


# layers ----------------------------------------------------------------------------------------


NHWC = ("NHWC", "HWIO", "NHWC")
CONVOLUTIONS = {
    "conv": (
        lambda x, k: lax.conv_general_dilated(x, k, (1, 1), "VALID", dimension_numbers=NHWC),
        (3, 3, 2),
        (2, 2, 2, 3),
    ),
    "stride and padding": (
        lambda x, k: lax.conv_general_dilated(
            x, k, (2, 2), [(1, 1), (1, 1)], dimension_numbers=NHWC
        ),
        (4, 3, 2),
        (3, 3, 2, 3),
    ),
    "transposed": (
        lambda x, k: lax.conv_transpose(x, k, (2, 2), "SAME"),
        (2, 2, 2),
        (3, 3, 2, 3),
    ),
    "one dimension": (
        lambda x, k: lax.conv_general_dilated(
            x, k, (1,), "VALID", dimension_numbers=("NHC", "HIO", "NHC")
        ),
        (4, 2),
        (2, 2, 3),
    ),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_equal_brute_force(name):
    apply, shape, kernel = CONVOLUTIONS[name]

    def site(h, w):
        maps = apply(h.reshape(-1, *shape), w("a.k", *kernel)) + w("a.c", kernel[-1])
        maps = maps.reshape(*h.shape[:-1], *maps.shape[1:])
        return dist.Bernoulli(logits=maps).to_event(len(shape))

    model, guide, x = program(site, latents=math.prod(shape), batch=2)
    d = check(natural(model, guide, num_particles=2), x, tolerance=1e-10)
    (block,) = [b for b in d.fisher.blocks if b.site == "x"]
    assert block.kind == ("transposed convolution" if name == "transposed" else "convolution")
    assert (block.units, block.size) == (3, math.prod(kernel[:-1]) + 1)


def test_one_layer_at_two_sites():
    v, c, up = draw(2, 2), draw(2), draw(2, 4)
    x = jnp.asarray(DRAWS.integers(0, 2, (4, 2)), float)

    def model(x):
        v_, c_ = numpyro.param("v", v), numpyro.param("c", c)
        with numpyro.plate("data", len(x)):
            a = bernoulli("a", jnp.zeros(2)).astype(float)
            b = bernoulli("b", a @ v_ + c_).astype(float)
            bernoulli("x", b @ v_ + c_, obs=x)

    def guide(x):
        a, b = halves(x @ numpyro.param("up", up))
        with numpyro.plate("data", len(x)):
            bernoulli("a", a)
            bernoulli("b", b)

    d = check(natural(model, guide), x)
    (block,) = [b for b in d.fisher.blocks if "v" in b.params]
    assert block.site == "b, x" and block.kind == "affine, shared by 2" and block.units == 2


def test_skip_from_the_datum_and_from_the_particles():
    low, top, skip, down = draw(3, 4), draw(2, 2), draw(3, 2), draw(2, 3)
    x = jnp.asarray(DRAWS.integers(0, 2, (4, 3)), float)

    def model(x):
        with numpyro.plate("data", len(x)):
            h = bernoulli("a", jnp.zeros(2)) + bernoulli("b", jnp.zeros(2))
            bernoulli("x", h.astype(float) @ numpyro.param("down", down), obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)):
            a = bernoulli("a", (x @ numpyro.param("low", low))[..., :2])
            logits = a.astype(float) @ numpyro.param("top", top)
            bernoulli("b", logits + x @ numpyro.param("skip", skip))

    d = check(natural(model, guide), x)
    (block,) = [b for b in d.fisher.blocks if "skip" in b.params]
    assert block.kind == "affine" and (block.units, block.size) == (2, 5)
    # The first layer sees each datum once, not once for each particle.
    (block,) = [b for b in d.fisher.blocks if "low" in b.params]
    assert block.rows == 4


# plates, scales and masks ----------------------------------------------------------------------


def plated(mask=None, scale=1.0):
    net, up, prior = draw(2, 3), draw(3, 2), draw(2)

    def model(x):
        net_, prior_ = numpyro.param("net", net), numpyro.param("prior", prior)
        with numpyro.plate("data", len(x)), handlers.scale(scale=scale):
            h = bernoulli("h", prior_).astype(float)
            with handlers.mask(mask=True if mask is None else mask):
                bernoulli("x", h @ net_, obs=x)

    def guide(x):
        with numpyro.plate("data", len(x)), handlers.scale(scale=scale):
            bernoulli("h", x @ numpyro.param("up", up))

    return natural(model, guide)


def test_masked_data():
    check(plated(mask=jnp.array([True, False, True, True, False])), patterns(3)[:5])


def test_scale_common_and_per_datum():
    x = patterns(3)[:4]
    check(plated(scale=2.5), x, num_data=10.0, tolerance=1e-13)
    weights = jnp.array([0.5, 1.0, 2.0, 0.1])
    check(plated(scale=weights), x, num_data=float(weights.sum()))


def test_nested_plates():
    net, up = draw(2, 2), draw(2, 2)
    x = jnp.asarray(DRAWS.integers(0, 2, (3, 4, 2)), float)

    def model(x):
        net_ = numpyro.param("net", net)
        with numpyro.plate("data", 4, dim=-1):
            h = bernoulli("h", jnp.zeros(2)).astype(float)
            with numpyro.plate("views", 3, dim=-2):
                bernoulli("x", h @ net_, obs=x)

    def guide(x):
        with numpyro.plate("data", 4, dim=-1):
            bernoulli("h", x.mean(0) @ numpyro.param("up", up))

    check(natural(model, guide), x, num_data=4)


def test_a_latent_outside_the_data_plate():
    net, loc = draw(2, 2), draw(2)
    x = jnp.asarray(DRAWS.integers(0, 2, (3, 2)), float)

    def model(x):
        g = numpyro.sample("g", dist.Normal(jnp.zeros(2), 1.0).to_event(1))
        with numpyro.plate("data", 3):
            bernoulli("x", g @ numpyro.param("net", net), obs=x)

    def guide(x):
        numpyro.sample("g", dist.Normal(numpyro.param("loc", loc), 1.0).to_event(1))

    check(natural(model, guide), x, data_dims=(), num_data=3)


# expanded distributions ------------------------------------------------------------------------


SIMPLEX = dist.transforms.StickBreakingTransform()
FOLD = dist.transforms.ReshapeTransform((3, 1), (3,))
THIRD = jnp.array([True, False, True])
EXPANDED = {
    "normal": lambda v: dist.Normal(v, 0.5 + 0 * v),
    "gamma": lambda v: dist.Gamma(jnp.exp(v), 1 + v * v),
    "log-normal": lambda v: dist.LogNormal(v, 0.5 + 0 * v),
    "categorical": lambda v: dist.Categorical(logits=v[..., None] * jnp.arange(3)),
    "half-normal": lambda v: dist.HalfNormal(1 + 0 * v),
    "student-t": lambda v: dist.StudentT(3 + 0 * v, 0 * v, 1 + 0 * v),
    "uniform": lambda v: dist.Uniform(0 * v, 1 + 0 * v),
    "truncated normal": lambda v: dist.TruncatedNormal(0 * v, 1 + 0 * v, low=0 * v),
}
WRAPPED = {
    "event": lambda fn: fn.to_event(1),
    "mask": lambda fn: fn.mask(THIRD).to_event(1),
    "mask of the event": lambda fn: fn.to_event(1).mask(jnp.array([True, False, True, True])),
    "another size": lambda fn: dist.TransformedDistribution(fn.to_event(1), SIMPLEX),
    "another shape": lambda fn: dist.TransformedDistribution(fn.to_event(1), FOLD),
    "masked shape": lambda fn: dist.TransformedDistribution(fn.to_event(1), FOLD).mask(
        jnp.array([True, False, True, True])
    ),
}


@pytest.mark.parametrize(
    ("family", "wrapper"),
    [(family, "event") for family in list(EXPANDED)[1:]] + [("normal", name) for name in WRAPPED],
)
def test_expanded_scalars_inform_as_arrays_of_full_shape(family, wrapper):
    """An expanded scalar stands for every element of every datum."""
    wrap = WRAPPED[wrapper]
    start, loc, up = draw(), draw(), draw(3)
    trained = family in ("normal", "gamma", "log-normal", "categorical")

    def fisher(shape):
        def full(v):
            return jnp.broadcast_to(v, shape)

        def model(x):
            v, loc_ = numpyro.param("v", start), numpyro.param("loc", loc)
            fn = EXPANDED[family](full(v if trained else 0.3))
            prior = dist.Normal(full(loc_), full(1.0))
            if not shape:
                fn, prior = fn.expand([3]), prior.expand([3])
            with numpyro.plate("data", 4):
                numpyro.sample("z", prior.to_event(1))
                numpyro.sample("x", wrap(fn), obs=x)

        def guide(x):
            with numpyro.plate("data", 4):
                numpyro.sample("z", dist.Normal(numpyro.param("up", up), 1.0).to_event(1))

        x = wrap(EXPANDED[family](jnp.full((4, 3), 0.3))).sample(random.key(3))
        svi = natural(model, guide)
        state = svi.init(KEY, x)
        return from_blocks(svi.directions(state, x).fisher, svi.get_params(state))

    found, truth = fisher(()), fisher((4, 3))
    close(found, truth, 1e-10)
    assert float(truth[0, 0]) == pytest.approx(3.0, rel=1e-10)
    elements = {"mask": 2, "mask of the event": 2.25, "masked shape": 2.25}.get(wrapper, 3)
    if family == "normal":
        assert float(truth[-1, -1]) == pytest.approx(4.0 * elements, rel=1e-10)


# routes to the information ---------------------------------------------------------------------


def test_score_route_is_reported_as_inexact():
    model, guide, x = program(lambda h, w: dist.SoftLaplace(w.layer("a", h, 2), 1.0).to_event(1))
    svi = natural(model, guide)
    d = svi.directions(svi.init(KEY, x), x)
    (block,) = [b for b in d.fisher.blocks if "a.w" in b.params]
    assert not block.exact and "scores" in block.how
    rows = {row.params: row for row in svi.structure(KEY, x)}
    assert not rows[tuple(block.params)].exact
    assert all(b.exact for b in d.fisher.blocks if b is not block)


class Shifted(dist.Distribution):
    """A normal that the library does not know."""

    arg_constraints = {"where": dist.constraints.real}
    support = dist.constraints.real

    def __init__(self, where, validate_args=None):
        self.where = where
        super().__init__(jnp.shape(where), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        return self.where + 0.5 * random.normal(key, (*sample_shape, *self.batch_shape))

    def log_prob(self, value):
        return dist.Normal(self.where, 0.5).log_prob(value)


def test_register_fisher_makes_a_users_distribution_exact(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
    model, guide, x = program(lambda h, w: Shifted(w.layer("a", h, 2)).to_event(1))
    svi = natural(model, guide)
    before = {row.site: row for row in svi.structure(KEY, x)}
    assert not before["x"].exact

    @nh.register_fisher(Shifted)
    def rule(d):
        return {"where": jnp.full_like(d.where, 4.0)}

    info = lambda fn: 4.0 * jnp.ones((*fn.batch_shape, 1, 1))  # noqa: E731
    truth = families.information

    def oracle(fn):
        if isinstance(fn, Shifted):
            return info(fn)
        assert isinstance(fn, dist.BernoulliLogits)
        return truth(fn)[0]["logits"][..., None, None]

    d = check(natural(model, guide), x, info=oracle)
    assert next(b for b in d.fisher.blocks if b.site == "x").exact


def test_solve_keeps_the_gradient_of_what_has_no_block():
    model, guide, x = program(logits)
    svi = natural(model, guide)
    d = svi.directions(svi.init(KEY, x), x)
    extra = dict(d.gradient) | {"other": jnp.ones(3)}
    close(d.fisher.solve(extra)["other"], jnp.ones(3), 0)
    assert set(parameters(svi.get_params(svi.init(KEY, x)))) == set(d.gradient)
