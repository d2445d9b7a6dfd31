# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Why natural gradients? In NumPyro
#
# A gradient says how the loss changes with the *numbers* in which a model happens to be written.
# The natural gradient says how it changes with the *distribution*. To get it, the gradient is
# multiplied with the inverse of the Fisher information matrix. That matrix has as many rows as the
# model has parameters, so for a large network it looks hopeless.
#
# For a Helmholtz machine it is not. This tutorial shows why, on a network so small that everything
# can be computed exactly. Then it shows what one gains.
#
# Figures go into the folder `figures`. `TUTORIAL_FAST=1` makes everything shorter.

# %%
import itertools
import os
import time
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from jax.scipy.linalg import block_diag

import numpyro_helmholtz as nh
from numpyro_helmholtz import datasets

FAST = os.environ.get("TUTORIAL_FAST") == "1"
DREAMS = 2_000 if FAST else 20_000
STEPS = 20 if FAST else 600
POINTS = 2 if FAST else 6
os.makedirs("figures", exist_ok=True)

# %% [markdown]
# ## A network of nine units
#
# Two binary units at the top, three below them, four visible ones at the bottom. The model has 27
# parameters and 2⁹ = 512 states. Double precision lets us compare without round-off.

# %%
numpyro.enable_x64()
SIZES = (4, 3, 2)


def units(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=obs)


def network(sizes, spread=0.2):
    """A sigmoid belief network and its guide."""

    def param(name, *shape):
        return numpyro.param(name, lambda key: spread * random.normal(key, shape))

    def layer(name, h, size):
        return h @ param(f"{name}.w", h.shape[-1], size) + param(f"{name}.b", size)

    def model(x):
        logits = param("top", sizes[-1])
        with numpyro.plate("data", len(x)):
            for level in range(len(sizes) - 1, 0, -1):
                h = units(f"h{level}", logits)
                logits = layer(f"down{level}", h, sizes[level - 1])
            units("x", logits, obs=x)

    def guide(x):
        h = x
        with numpyro.plate("data", len(x)):
            for level in range(1, len(sizes)):
                h = units(f"h{level}", layer(f"up{level}", h, sizes[level]))

    return model, guide


model, guide = network(SIZES, spread=1.0)

# %% [markdown]
# ## The Fisher matrix by the library
#
# `svi.directions(state, x)` computes what a step would use and changes nothing. Its
# `fisher.blocks` hold one small matrix for each unit. The option `fisher_samples="dream"` asks for
# the mean over what the model dreams. `x` only says how many dreams to take.

# %%
svi = nh.NaturalRWS(model, guide, fisher="unit", fisher_samples="dream", num_particles=1)
nothing = jnp.zeros((DREAMS, 4))
state = svi.init(random.key(1), nothing)
blocks = svi.directions(state, nothing).fisher.blocks
by_params = {block.params[0]: block for block in blocks}
of_model = [by_params[name] for name in ("top", "down2.w", "down1.w")]
matrices = [matrix for block in of_model for matrix in block.dense()]
sampled = block_diag(*matrices)
for block in of_model:
    print(f"site {block.site}: {block.units} blocks of size {block.size}")

# %% [markdown]
# ## The Fisher matrix by counting
#
# The Fisher information is the mean of the squared score over everything the model can dream:
# $F = \sum_{x,h} p(x,h)\, s(x,h)\, s(x,h)^\top$ with the score $s = \nabla \log p(x,h)$.
# We can list all 512 states, so we add them up. Nothing here knows about layers or units. One row
# of parameters belongs to each unit: the weights to its parents, then its bias.

# %%
states = jnp.array(list(itertools.product([0.0, 1.0], repeat=9)))
params = svi.get_params(state)
rows = [params["top"][:, None]]
rows += [jnp.vstack([params[f"down{i}.w"], params[f"down{i}.b"]]).T for i in (2, 1)]
flat = jnp.concatenate([r.ravel() for r in rows])


def log_joint(flat):
    """log p of every state, shape (512,)."""
    ends = np.cumsum([r.size for r in rows])[:-1]
    parts = zip(jnp.split(flat, ends), rows, strict=True)
    top, w2, w1 = (part.reshape(r.shape) for part, r in parts)
    x, h1, h2 = jnp.split(states, (4, 7), axis=1)
    below = [h1 @ w1[:, :-1].T + w1[:, -1], h2 @ w2[:, :-1].T + w2[:, -1]]
    logits = jnp.concatenate([*below, jnp.broadcast_to(top[:, 0], h2.shape)], 1)
    return dist.Bernoulli(logits=logits).log_prob(states).sum(1)


scores = jax.jacobian(log_joint)(flat)  # (512, 27)
exact = scores.T @ (jnp.exp(log_joint(flat))[:, None] * scores)
print(f"{len(flat)} parameters, probabilities add up to {jnp.exp(log_joint(flat)).sum():.12f}")

inside = block_diag(*(jnp.ones_like(matrix) for matrix in matrices)) == 1
print(f"largest exact entry outside the blocks: {jnp.abs(exact[~inside]).max():.1e}")
print(f"largest error inside the blocks:        {jnp.abs((exact - sampled)[inside]).max():.1e}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
titles = ("all states, 27 × 27", f"the library's blocks, {DREAMS} dreams")
for ax, matrix, title in zip(axes, (exact, sampled), titles, strict=True):
    shown = ax.imshow(np.asarray(matrix), cmap="magma", vmin=0, vmax=float(exact.max()))
    ax.set_title(title)
fig.colorbar(shown, ax=axes, shrink=0.8)
fig.savefig("figures/02_fisher_numpyro.png", dpi=110)

# %% [markdown]
# Outside the blocks the exact matrix is zero. So the blocks are the whole matrix, and not an
# approximation of it. The reason: given the units above, each unit is drawn by itself, and the
# score of one unit has mean zero whatever the others do. What is left inside the blocks differs
# only because dreams are random. More dreams make it smaller.
#
# A block has as many rows as its unit has parents, plus one. For 784 pixels below 200 units that
# is 984 small matrices and not one with 158,000 rows.
#
# ## Two spellings of one model
#
# Let units be −1 and +1 where they were 0 and 1. If we change the weights with them, the model is
# the same: it gives every image the same probability. Should one step of training not be the same
# too? We write one layer both ways and ask for the direction of a step. Then we look at how this
# step would change the log-odds of four pixels, for each of the eight states of the units above.


# %%
def one_layer(recode):
    """The same distribution, written with units in {0, 1} or in {−1, +1}."""
    rng = np.random.default_rng(2)
    w, b = jnp.asarray(rng.normal(size=(3, 4))), jnp.asarray(rng.normal(size=4))
    x = jnp.asarray(rng.random((200, 4)) < 0.3, float)
    if recode:
        w, b = w / 2, b + w.sum(0) / 2

    def coded(h):
        return 2 * h - 1 if recode else h

    def program(x):
        weight, bias = numpyro.param("w", w), numpyro.param("b", b)
        with numpyro.plate("data", len(x)):
            h = units("h", jnp.zeros(3))
            units("x", coded(h) @ weight + bias, obs=x)

    def recogniser(x):
        v = numpyro.param("v", jnp.zeros((4, 3)))
        with numpyro.plate("data", len(x)):
            units("h", x @ v)

    svi = nh.NaturalRWS(program, recogniser, fisher="unit", damping=1e-9)
    directions = svi.directions(svi.init(random.key(3), x), x)
    h = coded(jnp.array(list(itertools.product([0.0, 1.0], repeat=3))))
    return {
        name: np.ravel(h @ change["w"] + change["b"])
        for name, change in (("gradient", directions.gradient), ("natural", directions.natural))
    }


zero_one, plus_minus = one_layer(recode=False), one_layer(recode=True)
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for ax, name in zip(axes, ("gradient", "natural"), strict=True):
    ax.plot(zero_one[name], plus_minus[name], ".")
    ax.axline((0, 0), slope=1, color="gray", lw=0.8)
    ax.set(title=name, xlabel="change of log-odds, units 0 and 1", ylabel="units −1 and +1")
    gap = abs(zero_one[name] - plus_minus[name]).max() / abs(zero_one[name]).max()
    print(f"{name}: the two spellings differ by {gap:.1%}")
fig.savefig("figures/02_invariance_numpyro.png", dpi=110)

# %% [markdown]
# The gradient takes two different steps, the natural gradient takes one. It does not depend on the
# spelling. That is the invariance. It is why its learning rate needs less tuning.
#
# It holds when the damping is zero. Damping adds a constant α to the diagonal of every block, which
# is a choice of spelling again. The direction is $(1+α)(αI+F)^{-1}g$: a large α gives the gradient
# back, a small one comes close to the natural gradient.
#
# ## Does it pay?
#
# A step along the natural gradient costs more than a plain one. So we compare twice: after equal
# steps, and after equal seconds. The data are scikit-learn's digits, the network has three hidden
# layers. Plain RWS depends on its learning rate, so it gets three of them. The natural gradient
# depends on its damping, so it gets two: its default and a smaller one.
#
# All steps between two points of a curve are one compiled call. It is compiled before the clock
# starts. Single precision is enough here.

# %%
numpyro.enable_x64(False)
data = datasets.load("digits")
images, test = jnp.asarray(data.train), jnp.asarray(data.test[:100])
model, guide = network((64, 32, 16, 8))


def learning_curve(make, steps=STEPS, points=POINTS):
    """Steps, seconds of training, and test log-likelihoods on the way."""
    svi = make(model, guide)
    state = svi.init(random.key(0), images[:32])
    batches = np.random.default_rng(0).integers(len(images), size=(points, steps // points, 32))

    @jax.jit
    def train(state, batches):
        return lax.scan(lambda state, rows: svi.update(state, images[rows]), state, batches)

    jax.block_until_ready(train(state, batches[0]))  # compiles; its result is thrown away
    seconds, curve = 0.0, []
    for point, some in enumerate(batches, start=1):
        start = time.perf_counter()
        state, _ = jax.block_until_ready(train(state, some))
        seconds += time.perf_counter() - start
        found = nh.log_likelihood(
            random.key(1), svi.get_params(state), model, guide, test, num_particles=100
        )
        curve.append((point * len(some), seconds, found.mean))
    return curve


def rws(rate):
    return lambda model, guide: nh.RWS(model, guide, numpyro.optim.SGD(rate))


rates = (0.2,) if FAST else (0.05, 0.2, 1.0)
contenders = {f"RWS, rate {rate}": rws(rate) for rate in rates}
contenders["NaturalRWS, damping 0.1"] = nh.NaturalRWS  # as it is
if not FAST:
    contenders["NaturalRWS, damping 0.02"] = partial(nh.NaturalRWS, damping=0.02)
curves = {name: learning_curve(make) for name, make in contenders.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for name, curve in curves.items():
    steps, seconds, values = zip(*curve, strict=True)
    axes[0].plot(steps, values, marker=".", label=name)
    axes[1].plot(seconds, values, marker=".", label=name)
    print(f"{name}: {values[-1]:.2f} nats after {steps[-1]} steps, {seconds[-1]:.2f} s")
axes[0].set(xlabel="steps", ylabel="test log-likelihood (nats)", title="equal steps")
axes[1].set(xlabel="seconds of training", title="equal seconds")
axes[0].legend(fontsize=8)
fig.savefig("figures/02_learning_numpyro.png", dpi=110)

# %% [markdown]
# Look at both panels. At its default rate of 0.05 plain RWS lags behind. At a rate twenty times as
# large it keeps up with NaturalRWS on these small images, and its steps are cheaper. But one has
# to find that rate, and it is another one for other networks. NaturalRWS runs with its default
# optimiser: SGD of one rate, and averaged parameters.
#
# This is one seed on a small problem, and a standard error of a few tenths of a nat belongs to
# every point. Steps of so small a network take about a millisecond, so the seconds depend on what
# else the computer does.
#
# On MNIST, where steps are dear, it looks like this (784-200-100, four epochs, three seeds, one
# core; `benchmarks/numpyro_learning.py`). Natural gradients lead per epoch, and are ahead of plain
# RWS at a rate found by trying in seconds too. With averaged parameters plain RWS comes level in
# seconds. Adam is behind all three:
#
# ![Learning curves on MNIST](../docs/numpyro_learning.png)
#
# On a deep network the natural gradient pays more. Here are twelve hidden layers, from 300 units
# down to 10, and one epoch. One of the three seeds fell back by two nats at the end:
#
# ![Learning curves on MNIST, twelve layers](../docs/numpyro_learning_twelve.png)
#
# ## Damping
#
# How much damping is right? A small value trusts the Fisher matrix more. That matrix comes from
# samples, and from *earlier* minibatches: estimated from the minibatch whose gradient it changes,
# it would cancel exactly what is to be learned. With earlier ones, small values are safe.

# %%
dampings = (0.5,) if FAST else (0.005, 0.05, 0.5)
reached = []
for alpha in dampings:
    make = partial(nh.NaturalRWS, damping=alpha)
    reached.append(learning_curve(make, steps=STEPS // 2, points=1)[-1][2])
    print(f"damping {alpha}: {reached[-1]:.2f} nats after {STEPS // 2} steps")

fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.semilogx(dampings, reached, marker="o")
ax.set(xlabel="damping", ylabel="test log-likelihood (nats)", title=f"after {STEPS // 2} steps")
fig.savefig("figures/02_damping_numpyro.png", dpi=110)

# %% [markdown]
# Differences of a few tenths of a nat mean nothing here. On these images a hundredfold change of
# the damping matters little. With much more of it the direction is the gradient, at the same
# small rate. `damping` also takes a schedule: a function from the number of the step to α, in
# terms of `jax.numpy`.
