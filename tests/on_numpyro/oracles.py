"""Fisher matrices by brute force: Jacobians by autodiff, information by quadrature.

Nothing here reads a jaxpr or uses a closed form: the information of a family is the mean of
the outer product of its scores over a quadrature of its support, the Jacobian of a site's
arguments is ``jax.jacobian`` of the program, and the result is one matrix over all parameters.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random

import numpyro_helmholtz as nh
from numpyro_helmholtz.checks import stochastic_sites
from numpyro_helmholtz.layout import site_scale
from numpyro_helmholtz.parameters import parameters

KEY = random.key(7)


# families --------------------------------------------------------------------------------------


def unwrapped(fn):
    """The innermost distribution and the masks on the way, each with its event dimensions."""
    masks = []
    while hasattr(fn, "base_dist") and not isinstance(fn, dist.ZeroInflatedPoisson):
        if isinstance(fn, dist.MaskedDistribution):
            masks.append((jnp.asarray(fn._mask), len(fn.event_shape)))
        fn = fn.base_dist
    return fn, masks


def arguments(fn):
    """The names of the arguments that a distribution was made with."""
    return [
        n
        for n in fn.arg_constraints
        if n in fn.__dict__ and jnp.issubdtype(jnp.result_type(fn.__dict__[n]), jnp.floating)
    ]


def quadrature(fn, points=4001):
    """Nodes (N, 1, ..., event) and log-weights such that Σ exp(weight + log p) = 1."""
    name = type(fn).__name__
    shape = (-1,) + (1,) * (len(fn.batch_shape) + len(fn.event_shape))
    if fn.has_enumerate_support:
        values = fn.enumerate_support(expand=False)
        return values, jnp.zeros(len(values))
    if name in ("Poisson", "GeometricLogits", "GeometricProbs", "ZeroInflatedPoisson"):
        return jnp.arange(400.0).reshape(shape), jnp.zeros(400)
    if name == "VonMises":
        values = jnp.linspace(-math.pi, math.pi, 513)[:-1]
        return values.reshape(shape), jnp.full(512, math.log(2 * math.pi / 512))
    width = 60.0 if name != "Normal" else 12.0
    t = jnp.linspace(-width, width, points)
    step = math.log(2 * width / (points - 1))
    if name == "Normal":
        spread = jnp.max(fn.scale) + jnp.abs(fn.loc).max()
        return (t * spread).reshape(shape), jnp.full_like(t, step) + jnp.log(spread)
    if fn.support is dist.constraints.unit_interval:
        values = jnp.clip(jax.nn.sigmoid(t), 1e-300, 1 - 1e-16)
        return values.reshape(shape), step + jax.nn.log_sigmoid(t) + jax.nn.log_sigmoid(-t)
    if fn.support is dist.constraints.real:
        # So far out that the tails of a Cauchy variable are in.
        log_cosh = jnp.log(jnp.cosh(t * 0.5))
        return jnp.sinh(t * 0.5).reshape(shape), step + math.log(0.5) + log_cosh
    return jnp.exp(t).reshape(shape), step + t  # positive support


def score_information(fn):
    """E[score scoreᵀ] of every element, (*batch, d, d), over all arguments in order."""
    names = arguments(fn)
    nodes, log_weights = quadrature(fn)
    batch, count = fn.batch_shape, len(log_weights)
    vector = fn.arg_constraints[names[0]].event_dim == 1

    def wide(name):
        value = jnp.asarray(getattr(fn, name))
        tail = value.shape[-1:] if vector else ()
        return jnp.broadcast_to(value, (count, *batch, *tail))

    values = [wide(name) for name in names]
    nodes = jnp.broadcast_to(nodes, (count, *batch, *fn.event_shape))

    def log_prob(values):
        total = {"total_count": fn.total_count} if type(fn) is dist.BetaBinomial else {}
        made = type(fn)(**dict(zip(names, values, strict=True)), **total, validate_args=False)
        return made.log_prob(nodes)

    log_p = log_prob(values)
    grads = jax.grad(lambda v: log_prob(v).sum())(values)
    score = grads[0] if vector else jnp.stack(grads, -1)
    weight = jnp.exp(log_weights.reshape(-1, *(1,) * len(batch)) + log_p)
    total = weight.sum(0)
    if not isinstance(total, jax.core.Tracer):
        assert float(jnp.abs(total - 1).max()) < 1e-6, (type(fn), total)
    # Scores have mean zero by definition; the quadrature's small error is taken out.
    weight = weight / total
    score = jnp.where(weight[..., None] > 0, score, 0.0)
    score = score - jnp.einsum("n...,n...i->...i", weight, score)
    return jnp.einsum("n...,n...i,n...j->...ij", weight, score, score)


# programs --------------------------------------------------------------------------------------


def site_fisher(fn, jacobian, site, weight, info):
    """Σ over elements of weight · Jᵀ I J for one site.

    Args:
        jacobian: per argument, (*argument, P). weight: over the site's batch shape, particles
            and data included.
    """
    event = len(site["fn"].event_shape) - len(fn.event_shape)
    element = jnp.asarray(weight * site_scale(site))
    outer = jnp.broadcast_shapes(element.shape, site["fn"].batch_shape)
    element = jnp.broadcast_to(element, outer).reshape(outer + (1,) * event)
    full = outer + fn.batch_shape[len(fn.batch_shape) - event :]
    element = jnp.broadcast_to(element, full)
    for mask, at in unwrapped(site["fn"])[1]:
        element = element * mask.reshape(mask.shape + (1,) * (at - len(fn.event_shape)))
    element = sum_to(element, fn.batch_shape)
    vector = fn.arg_constraints[arguments(fn)[0]].event_dim == 1
    parts = []
    for j in jacobian:
        tail = j.shape[-2:] if vector else j.shape[-1:]
        parts.append(jnp.broadcast_to(j, (*fn.batch_shape, *tail)))
    j = parts[0] if vector else jnp.stack(parts, -2)
    return jnp.einsum("n,nap,nab,nbq->pq", *_flat(element, j, info(fn), len(fn.batch_shape)))


def _flat(element, j, i, ndim):
    lead = element.shape
    i = jnp.broadcast_to(i, (*lead, *i.shape[-2:])).reshape(-1, *i.shape[-2:])
    j = j.reshape(-1, *j.shape[-2:])
    return element.reshape(-1), j, i, j


def sum_to(x, shape):
    """Sum broadcast dimensions away."""
    x = x.sum(tuple(range(x.ndim - len(shape))))
    axes = tuple(i for i, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m)
    return x.sum(axes, keepdims=True)


def naive_weights(wake, data_dims):
    """softmax over particles of Σ log p − Σ log q per datum, right-aligned."""
    ndim = wake.layout.ndim
    total = 0.0
    for trace, sign in ((wake.model, 1.0), (wake.guide, -1.0)):
        for _, site in stochastic_sites(trace):
            value = site["fn"].log_prob(site["value"])
            value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
            keep = {0} | {ndim + d for d in data_dims}
            drop = tuple(d for d in range(ndim) if d not in keep)
            total = total + sign * (value.sum(drop, keepdims=True) if drop else value)
    return jax.nn.softmax(total, 0)


def brute_force(svi, state, args, *, data_dims=(-1,), num_data=None, info=score_information):
    """The whole Fisher matrix of model and guide on the wake samples of the next update."""
    params = svi._optimiser.params(state.optim_state)
    leaves, structure = jax.tree.flatten(params)
    sizes = np.cumsum([leaf.size for leaf in leaves])[:-1]

    def rebuilt(flat):
        parts = jnp.split(flat, sizes)
        return structure.unflatten([p.reshape(q.shape) for p, q in zip(parts, leaves, strict=True)])

    def compute(flat, args):
        done, _ = svi._pass(state, args, {})
        wake = svi.programs.wake(KEY, params, args, {}, samples=done.guide.values)
        weights = naive_weights(wake, data_dims)
        count = num_data or len(args[0])
        uniform = jnp.full_like(weights, 1.0 / svi.programs.num_particles)
        total = 0.0
        for recipe, weight in ((done.model, weights), (done.guide, uniform)):

            def outputs(flat, recipe=recipe):
                trace = recipe.run(svi.programs, rebuilt(flat))
                return [_values(site) for _, site in stochastic_sites(trace)]

            trace = recipe.run(svi.programs, params)
            pairs = zip(stochastic_sites(trace), jax.jacobian(outputs)(flat), strict=True)
            for (_, site), jacobian in pairs:
                fn, _ = unwrapped(site["fn"])
                if jacobian and not (recipe.program == "guide" and site["is_observed"]):
                    total = total + site_fisher(fn, jacobian, site, weight / count, info)
        return total

    flat = np.concatenate([np.asarray(leaf).reshape(-1) for leaf in leaves])
    return jax.jit(compute)(flat, args)


def _values(site):
    fn, _ = unwrapped(site["fn"])
    return [jnp.asarray(getattr(fn, n)) for n in arguments(fn)]


def from_blocks(fisher, params):
    """The whole matrix that the blocks' products stand for."""
    leaves = parameters(params)
    size = sum(leaf.size for leaf in leaves.values())
    cuts = np.cumsum([leaf.size for leaf in leaves.values()])[:-1]

    def product(unit):
        pieces = jnp.split(unit, cuts)
        arrays = {n: p.reshape(leaves[n].shape) for n, p in zip(leaves, pieces, strict=True)}
        out = {n: jnp.zeros_like(leaf) for n, leaf in leaves.items()}
        for block in fisher.blocks:
            out |= block.scatter(block.matvec(block.gather(arrays)))
        return jnp.concatenate([out[n].reshape(-1) for n in leaves])

    return np.asarray(jax.jit(partial(jax.lax.map, product))(np.eye(size))).T


ALPHAS = (0.05, 2.0, 1e12)


def check_operators(blocks):
    """``matvec``, ``diagonal``, ``gather``, ``scatter`` and ``solve`` against ``dense``."""
    for block in blocks:
        if hasattr(block, "max_iterations"):
            block.max_iterations = 500
    rng = np.random.default_rng(1)
    vectors = [rng.normal(size=(b.units, b.size)) for b in blocks]

    def solves(block, v):
        return jax.lax.map(lambda alpha: block.solve(v, alpha), np.array(ALPHAS))

    def compute(vectors):
        return [
            (b.dense(), b.matvec(v), b.diagonal(), b.gather(b.scatter(v)), solves(b, v))
            for b, v in zip(blocks, vectors, strict=True)
        ]

    for block, v, found in zip(blocks, vectors, jax.jit(compute)(vectors), strict=True):
        dense, product, diagonal, back, solutions = map(np.asarray, found)
        assert dense.shape == (block.units, block.size, block.size)
        close(product, (dense @ v[..., None])[..., 0], 1e-10)
        close(diagonal, np.diagonal(dense, axis1=1, axis2=2), 1e-10)
        close(dense, dense.swapaxes(1, 2), 1e-10)
        close(back, v, 0)
        for alpha, x in zip(ALPHAS[:-1], solutions, strict=False):
            matrix = alpha * np.eye(block.size) + dense
            close(x, np.linalg.solve(matrix, (1 + alpha) * v[..., None])[..., 0], 1e-8)
        close(solutions[-1], v, 1e-9)


def check(svi, *args, data_dims=(-1,), num_data=None, info=score_information, tolerance=1e-8):
    """Directions whose Fisher matrix equals brute force, with every operator checked."""
    state = svi.init(KEY, *args)
    directions = svi.directions(state, *args)
    check_operators(directions.fisher.blocks)
    truth = brute_force(svi, state, args, data_dims=data_dims, num_data=num_data, info=info)
    close(
        from_blocks(directions.fisher, svi._optimiser.params(state.optim_state)), truth, tolerance
    )
    return directions


def close(value, expected, tolerance):
    """Largest deviation relative to the largest entry (or 1)."""
    value, expected = np.asarray(value), np.asarray(expected)
    assert value.shape == expected.shape
    scale = max(1.0, float(np.abs(expected).max())) if expected.size else 1.0
    error = float(np.abs(value - expected).max()) if expected.size else 0.0
    assert error <= tolerance * scale, error


def natural(model, guide, **options):
    """``NaturalRWS`` with exact blocks of the present batch, tight solves and no bound."""
    options = {
        "num_particles": 3,
        "fisher": "unit",
        "fisher_samples": "same",
        "tolerance": 1e-12,
        "kl_clip": math.inf,
    } | options
    return nh.NaturalRWS(model, guide, **options)


class Weights:
    """Parameters by name, drawn once: ``w("a", 3, 2)`` is a ``numpyro.param``."""

    def __init__(self, seed=0):
        self.rng, self.values = np.random.default_rng(seed), {}

    def __call__(self, name, *shape):
        if name not in self.values:
            self.values[name] = self.rng.normal(size=shape)
        return numpyro.param(name, jnp.asarray(self.values[name]))

    def layer(self, name, h, outputs, *, bias=True):
        """An affine layer."""
        a = h @ self(f"{name}.w", h.shape[-1], outputs)
        return a + self(f"{name}.b", outputs) if bias else a


def program(site, *, latents=3, batch=4, seed=0):
    """A model with one Bernoulli layer under ``site(h, w)``, a guide, and data.

    Args:
        site: ``(h, w) -> distribution``, h of shape (..., data, latents), w a ``Weights``.
    """
    w = Weights(seed)

    def model(x):
        top = w("prior", latents)
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Bernoulli(logits=top).to_event(1))
            numpyro.sample("x", site(h.astype(float), w), obs=x)

    with numpyro.handlers.block(), numpyro.handlers.seed(rng_seed=0):
        h = random.bernoulli(random.key(3), 0.5, (batch, latents)).astype(float)
        fn = site(h, w)
        x = fn.sample(random.key(4), () if fn.batch_shape == (batch,) else (batch,))
        x = x.reshape(batch, *fn.event_shape)

    def guide(x):
        features = jnp.tanh(x.reshape(len(x), -1).astype(float))
        with numpyro.plate("data", len(x)):
            logits = w.layer("up", features, latents)
            numpyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide, x
