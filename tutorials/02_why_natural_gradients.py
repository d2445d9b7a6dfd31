# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Why natural gradients?
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
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_helmholtz as ph
from pyro_helmholtz import datasets

FAST = os.environ.get("TUTORIAL_FAST") == "1"
DREAMS = 2_000 if FAST else 20_000
STEPS = 20 if FAST else 300
POINTS = 2 if FAST else 6
FIGURES = Path("figures")
FIGURES.mkdir(exist_ok=True)

pyro.clear_param_store()
pyro.set_rng_seed(1)

# %% [markdown]
# ## A network of nine units
#
# Two binary units at the top, three below them, four visible ones at the bottom. The model has 27
# parameters and 2⁹ = 512 states. Double precision lets us compare without round-off.

# %%
SIZES = (4, 3, 2)


def network(sizes, dtype=torch.float32):
    """A sigmoid belief network and its guide; every call makes fresh weights."""
    down = nn.ModuleList([nn.Linear(a, b) for b, a in itertools.pairwise(sizes)]).to(dtype)
    up = nn.ModuleList([nn.Linear(b, a) for b, a in itertools.pairwise(sizes)]).to(dtype)
    prior = nn.Parameter(torch.zeros(sizes[-1], dtype=dtype))
    down.register_parameter("prior", prior)

    def model(x):
        pyro.module("down", down)
        logits = prior
        with pyro.plate("data", len(x)):
            for level in range(len(down), 0, -1):
                h = pyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))
                logits = down[level - 1](h)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        h = x
        with pyro.plate("data", len(x)):
            for level, layer in enumerate(up, start=1):
                h = pyro.sample(f"h{level}", dist.Bernoulli(logits=layer(h)).to_event(1))

    return model, guide, down


model, guide, down = network(SIZES, torch.float64)
with torch.no_grad():
    for parameter in down.parameters():
        parameter.copy_(torch.randn_like(parameter))

# %% [markdown]
# ## The Fisher matrix by counting
#
# The Fisher information is the mean of the squared score over everything the model can dream:
# $F = \sum_{x,h} p(x,h)\, s(x,h)\, s(x,h)^\top$ with the score $s = \nabla \log p(x,h)$.
# We can list all 512 states, so we add them up. Nothing here knows about layers or units.

# %%
states = torch.tensor(list(itertools.product([0.0, 1.0], repeat=9)), dtype=torch.float64)
# One row for each unit: the weights to its parents, then its bias.
matrices = [
    down.prior.detach()[:, None],
    *(torch.cat([layer.weight, layer.bias[:, None]], 1).detach() for layer in reversed(down)),
]
shapes = [m.shape for m in matrices]
flat = torch.cat([m.flatten() for m in matrices])


def log_joint(parameters):
    """log p of every state, shape (512,)."""
    top, w1, w0 = (
        p.reshape(shape)
        for p, shape in zip(parameters.split([s.numel() for s in shapes]), shapes, strict=True)
    )
    x, h1, h2 = states.split(SIZES, 1)
    logits = torch.cat(
        [h1 @ w0[:, :-1].T + w0[:, -1], h2 @ w1[:, :-1].T + w1[:, -1], top.T.expand(512, -1)], 1
    )
    return dist.Bernoulli(logits=logits).log_prob(states).sum(1)


scores = torch.autograd.functional.jacobian(log_joint, flat)  # (512, 27)
exact = scores.T @ (log_joint(flat).exp()[:, None] * scores)
print(f"{len(flat)} parameters, probabilities add up to {log_joint(flat).exp().sum():.12f}")

# %% [markdown]
# ## The Fisher matrix by the library
#
# `svi.directions(x)` computes what a step would use and changes nothing. Its `fisher.blocks` hold
# one small matrix for each unit. The option `fisher_samples="dream"` asks for the mean over
# dreams, which is the sum from above, by sampling. `x` only says how many dreams to take.

# %%
svi = ph.NaturalRWS(model, guide, fisher="unit", fisher_samples="dream", num_particles=1)
blocks = svi.directions(torch.zeros(DREAMS, 4, dtype=torch.float64)).fisher.blocks
by_site = {b.site: b for b in blocks if any(name.startswith("down") for name in b.params)}
units = [matrix for site in ("h2", "h1", "x") for matrix in by_site[site].dense()]
sampled = torch.block_diag(*units)
for site in ("h2", "h1", "x"):
    block = by_site[site]
    print(f"site {site}: {block.units} blocks of size {block.size}")

inside = torch.block_diag(*(torch.ones_like(matrix) for matrix in units)).bool()
print(f"largest exact entry outside the blocks: {exact[~inside].abs().max():.1e}")
print(f"largest error inside the blocks:        {(exact - sampled)[inside].abs().max():.1e}")

# %%
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
titles = ("all states, 27 × 27", f"the library's blocks, {DREAMS} dreams")
for ax, matrix, title in zip(axes, (exact, sampled), titles, strict=True):
    shown = ax.imshow(matrix.numpy(), cmap="magma", vmin=0, vmax=float(exact.max()))
    ax.set_title(title)
fig.colorbar(shown, ax=axes, shrink=0.8)
fig.savefig(FIGURES / "02_fisher.png", dpi=110)

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
    pyro.clear_param_store()
    pyro.set_rng_seed(2)
    w, b = torch.randn(4, 3, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
    if recode:
        w, b = w / 2, b + w.sum(1) / 2

    def coded(h):
        return 2 * h - 1 if recode else h

    def program(x):
        weight, bias = pyro.param("w", w), pyro.param("b", b)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(3).to(x)).to_event(1))
            logits = coded(h) @ weight.T + bias
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def recogniser(x):
        v = pyro.param("v", torch.zeros(4, 3, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ v).to_event(1))

    svi = ph.NaturalRWS(program, recogniser, fisher="unit", damping=1e-9)
    pyro.set_rng_seed(3)
    directions = svi.directions(torch.bernoulli(torch.full((200, 4), 0.3, dtype=torch.float64)))
    h = coded(torch.tensor(list(itertools.product([0.0, 1.0], repeat=3)), dtype=torch.float64))
    return {
        name: (h @ change["w"].T + change["b"]).flatten()
        for name, change in (("gradient", directions.gradient), ("natural", directions.natural))
    }


zero_one, plus_minus = one_layer(recode=False), one_layer(recode=True)
fig, axes = plt.subplots(1, 2, figsize=(8, 4), layout="constrained")
for ax, name in zip(axes, ("gradient", "natural"), strict=True):
    ax.plot(zero_one[name].numpy(), plus_minus[name].numpy(), ".")
    ax.axline((0, 0), slope=1, color="gray", lw=0.8)
    ax.set(title=name, xlabel="change of log-odds, units 0 and 1", ylabel="units −1 and +1")
    gap = (zero_one[name] - plus_minus[name]).abs().max() / zero_one[name].abs().max()
    print(f"{name}: the two spellings differ by {gap:.1%}")
fig.savefig(FIGURES / "02_invariance.png", dpi=110)

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

# %%
data = datasets.load("digits")
test = data.test[:100]


def learning_curve(make, steps=STEPS, points=POINTS):
    """Steps, seconds of training, and test log-likelihoods on the way."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    model, guide, _ = network((64, 32, 16, 8))
    svi = make(model, guide)
    batches = torch.Generator().manual_seed(0)
    seconds, curve = 0.0, []
    for step in range(1, steps + 1):
        x = data.train[torch.randint(len(data.train), (32,), generator=batches)]
        start = time.perf_counter()
        svi.step(x)
        seconds += time.perf_counter() - start
        if step % (steps // points) == 0:
            value = ph.log_likelihood(model, guide, test, num_particles=100).mean
            curve.append((step, seconds, value))
    return curve


def rws(rate):
    return lambda model, guide: ph.RWS(model, guide, pyro.optim.SGD({"lr": rate}))


learning_curve(rws(0.05), steps=POINTS)  # a rehearsal, so that nobody pays for the start
contenders = {f"RWS, rate {rate}": rws(rate) for rate in (0.05, 0.2, 1.0)}
contenders["NaturalRWS, damping 0.1"] = ph.NaturalRWS  # as it is
contenders["NaturalRWS, damping 0.02"] = partial(ph.NaturalRWS, damping=0.02)
curves = {name: learning_curve(make) for name, make in contenders.items()}

fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True, layout="constrained")
for name, curve in curves.items():
    steps, seconds, values = zip(*curve, strict=True)
    axes[0].plot(steps, values, marker=".", label=name)
    axes[1].plot(seconds, values, marker=".", label=name)
    print(f"{name}: {values[-1]:.2f} nats after {steps[-1]} steps, {seconds[-1]:.1f} s")
axes[0].set(xlabel="steps", ylabel="test log-likelihood (nats)", title="equal steps")
axes[1].set(xlabel="seconds of training", title="equal seconds")
axes[0].legend(fontsize=8)
fig.savefig(FIGURES / "02_learning.png", dpi=110)

# %% [markdown]
# Look at both panels. At its default rate of 0.05 plain RWS hardly leaves the ground. At a rate
# twenty times as large it does well on these small images, and as its steps are cheaper, it is
# hard to beat in seconds. But one has to find that rate, and it is another one for other networks.
# NaturalRWS runs with its default optimiser: SGD of one rate, and averaged parameters.
#
# This is one seed on a small problem, and a standard error of a few tenths of a nat belongs to
# every point. `benchmarks/learning.py` does the comparison with care, on other data too.
#
# ## Damping
#
# How much damping is right? A small value trusts the Fisher matrix more. That matrix comes from
# samples, and from *earlier* minibatches: estimated from the minibatch whose gradient it changes,
# it would cancel exactly what is to be learned. With earlier ones, small values are safe.

# %%
dampings = (0.005, 0.05, 0.5)
reached = []
for alpha in dampings:
    make = partial(ph.NaturalRWS, damping=alpha)
    reached.append(learning_curve(make, steps=STEPS // 2, points=1)[-1][2])
    print(f"damping {alpha}: {reached[-1]:.2f} nats after {STEPS // 2} steps")

fig, ax = plt.subplots(figsize=(5, 3), layout="constrained")
ax.semilogx(dampings, reached, marker="o")
ax.set(xlabel="damping", ylabel="test log-likelihood (nats)", title=f"after {STEPS // 2} steps")
fig.savefig(FIGURES / "02_damping.png", dpi=110)

# %% [markdown]
# With much damping the direction is the gradient, at the same small rate. `damping` also takes a
# schedule: a function from the number of the step to α.
