"""The recorded graph on plain functions: features and coefficients against Jacobians."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax, random

from numpyro_helmholtz import graph, layers

from .oracles import close


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


X, X0 = draw(0, 5, 4, 3), draw(1, 4, 2)
IMAGES = draw(2, 2, 5, 4, 2)
W, V, B, SQUARE = draw(3, 3, 2), draw(4, 2, 3), draw(5, 2), draw(6, 2, 2)
WIDE, GAIN, SCALAR = draw(7, 3, 4), draw(8, 3), draw(9)
KERNEL, KERNEL_T, MAPS = draw(10, 2, 3, 2, 3), draw(11, 2, 3, 3, 2), draw(12, 3)


def conv(p, **options):
    options = {"window_strides": (1, 1), "padding": [(1, 1), (0, 1)]} | options
    dims = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(IMAGES, p["k"], dimension_numbers=dims, **options) + p["c"]


def both(p):
    return jnp.einsum("sbi,ji->sbj", X, p["v"]) + p["b"]


AFFINE = {
    "x @ w + b": (lambda p: X @ p["w"] + p["b"], {"w": W, "b": B}),
    "einsum": (both, {"v": V, "b": B}),
    "two vmaps": (
        lambda p: jax.vmap(jax.vmap(lambda x: p["w"].T @ x + p["b"]))(X),
        {"w": W, "b": B},
    ),
    "matrix times columns": (lambda p: p["v"] @ jnp.swapaxes(X, -1, -2), {"v": V}),
    "column vector": (lambda p: (p["v"] @ X[..., None])[..., 0] + p["b"], {"v": V, "b": B}),
    "scaled skip": (
        lambda p: 2 * (X @ p["w"]) - (3 * X0) @ p["s"] / 2 + p["b"],
        {"w": W, "b": B, "s": SQUARE},
    ),
    "jitted": (
        lambda p: jax.jit(lambda a: jax.nn.relu(a) ** 2 + jnp.sin(a))(X @ p["w"] + p["b"]),
        {"w": W, "b": B},
    ),
    "softplus": (lambda p: jax.nn.softplus(X @ p["w"]) + 0.1, {"w": W}),
    "silu, gelu": (lambda p: jax.nn.gelu(jax.nn.silu(X @ p["w"])), {"w": W}),
    "checkpoint": (lambda p: jax.checkpoint(lambda w: jax.nn.sigmoid(X @ w))(p["w"]), {"w": W}),
    "half": (lambda p: jnp.exp(jnp.split(X @ p["y"], 2, -1)[1]), {"y": WIDE}),
    "permuted": (lambda p: (X @ p["y"])[..., jnp.array([2, 0, 1, 3])], {"y": WIDE}),
    "reversed": (lambda p: (X @ p["y"])[..., ::-1], {"y": WIDE}),
    "convolution": (conv, {"k": KERNEL, "c": MAPS}),
    "strides and dilation": (
        lambda p: conv(p, window_strides=(2, 1), rhs_dilation=(1, 2)),
        {"k": KERNEL, "c": MAPS},
    ),
    "dilated input": (lambda p: conv(p, lhs_dilation=(1, 2)), {"k": KERNEL, "c": MAPS}),
    "transposed": (
        lambda p: lax.conv_transpose(IMAGES, p["k"], (2, 2), "SAME") + p["c"],
        {"k": KERNEL, "c": MAPS},
    ),
    "transposed kernel": (
        lambda p: lax.conv_transpose(IMAGES, p["k"], (2, 2), "SAME", transpose_kernel=True),
        {"k": KERNEL_T},
    ),
    "direct": (lambda p: jnp.exp(jnp.broadcast_to(p["b"], (5, 2))), {"b": B}),
    "gain": (lambda p: X * p["g"], {"g": GAIN}),
}
OPAQUE = {
    "mlp": (lambda p: jnp.tanh(X @ p["w"]) @ p["s"], {"w": W, "s": SQUARE}, "before the last"),
    "tied": (lambda p: jnp.tanh(X @ p["w"]) @ p["w"].T, {"w": W}, "before the last"),
    "scan": (lambda p: lax.scan(lambda c, x: (c, x @ p["w"]), 0.0, X)[1], {"w": W}, "scan"),
    "scalar bias": (lambda p: X @ p["w"] + p["a"], {"w": W, "a": SCALAR}, "several units"),
    "normed weight": (lambda p: X @ (p["w"] / jnp.linalg.norm(p["w"])), {"w": W}, "computed by"),
    "own weights": (
        lambda p: jnp.einsum("sbi,bij->sbj", X, p["u"]),
        {"u": draw(13, 4, 3, 2)},
        "weights of its own",
    ),
    "groups": (
        lambda p: lax.conv_general_dilated(
            IMAGES,
            p["k"],
            (1, 1),
            "SAME",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
            feature_group_count=2,
        ),
        {"k": draw(14, 2, 2, 1, 4)},
        "groups",
    ),
    "twice": (lambda p: X @ p["w"] + X**2 @ p["w"], {"w": W}, "twice"),
}


def recorded(fn, params):
    (node,) = graph.record(fn, dict(sorted(params.items())), params)
    return node


@pytest.mark.parametrize("name", AFFINE)
def test_blocks_equal_those_of_the_jacobian(name):
    fn, params = AFFINE[name]

    @jax.jit
    def compute(params, c):
        node = recorded(fn, params)
        application = layers.find(node)
        root = application.root
        made.append(root)
        u, q = root.features(), root.coefficient(graph.pull(application.chain, c))
        return jnp.einsum("nj,nk,nl->jkl", q, u, u), node.value, jax.jacobian(fn)(params)

    made = []
    c = random.uniform(random.key(1), jax.eval_shape(fn, params).shape)
    blocks, value, jacobian = compute(params, c)
    close(value, fn(params), 1e-14)
    root = made[-1]
    for unit, block in enumerate(blocks):
        parts = [
            np.asarray(jacobian[name]).reshape(c.size, -1)[:, columns.indices()[unit]]
            for name, columns in zip(root.names, root.columns, strict=True)
        ]
        j = np.concatenate(parts, 1)
        close(block, j.T @ (np.asarray(c).reshape(-1, 1) * j), 1e-10)


@pytest.mark.parametrize("name", OPAQUE)
def test_what_is_not_affine_says_why(name):
    fn, params, reason = OPAQUE[name]
    with pytest.raises(graph.Opaque, match=reason):
        layers.find(recorded(fn, params))


def test_equal_equations_are_recorded_once():
    def fn(p):
        h = jnp.tanh(X)
        return [h @ p["w"], jnp.tanh(X) @ p["w"]]

    one, two = graph.record(fn, {"w": W}, {"w": W})
    assert one is two


def test_constants_and_stopped_gradients_are_no_nodes():
    def fn(p):
        return [X @ lax.stop_gradient(p["w"]), X.sum(), (p["w"] > 0).sum()]

    assert not any(isinstance(x, graph.Node) for x in graph.record(fn, {"w": W}, {"w": W}))


def test_kinds():
    def what(name):
        return layers.find(recorded(*AFFINE[name])).root.what

    assert what("einsum") == "affine" and what("convolution") == "convolution"
    assert what("transposed") == what("transposed kernel") == "transposed convolution"
    assert what("gain") == what("direct") == "direct"


def test_relu_keeps_its_own_slope_at_zero():
    node = recorded(lambda p: jax.nn.relu(p["a"]), {"a": jnp.array([-1.0, 0.0, 2.0])})
    close(graph.pull(layers.find(node).chain, jnp.ones(3)), jnp.array([0.0, 0.0, 1.0]), 0)


def test_softmax_is_a_map_of_rows():
    node = recorded(lambda p: jax.nn.softmax(X @ p["w"]), {"w": W})
    link = graph.rowwise_link(node)
    # The foot is the exponential, up to a factor of the row; its slope is itself.
    foot, p = link.foot.value, jax.nn.softmax(X @ W)
    close(foot / foot.sum(-1, keepdims=True), p, 1e-12)
    truth = p[..., None] * jnp.eye(2) - p[..., None] * p[..., None, :]
    close(link.jacobian() * foot[..., None, :], truth, 1e-12)
