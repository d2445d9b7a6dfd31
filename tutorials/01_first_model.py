# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A first model
#
# We write a small model of handwritten digits, train it, look at what the library made of it,
# measure it, draw from it, and save it. It takes about a quarter of a minute.
#
# This file is a script and a notebook at once: run it with Python, or open it as a notebook with
# jupytext. Figures go into the folder `figures`. `TUTORIAL_FAST=1` makes everything shorter.

# %%
import os
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from torch import nn

import pyro_helmholtz as ph
from pyro_helmholtz import datasets

FAST = os.environ.get("TUTORIAL_FAST") == "1"
STEPS = 40 if FAST else 800
PARTICLES = 100 if FAST else 1000
FIGURES = Path("figures")
FIGURES.mkdir(exist_ok=True)

pyro.clear_param_store()
pyro.set_rng_seed(0)

# %% [markdown]
# ## The data
#
# Scikit-learn brings 1,797 images of digits, 8 by 8 pixels. `datasets.load` makes them binary
# once and splits them. Each image is a row of 64 zeros and ones.

# %%
data = datasets.load("digits")
print(f"{len(data.train)} training and {len(data.test)} test images of {data.shape} pixels")

# %% [markdown]
# ## The model and the guide
#
# The model tells how an image might come about. First eight binary units are drawn. They decide
# how likely each of 32 units below is to be on. Those decide about the pixels. Such a network is
# called a sigmoid belief network.
#
# The guide goes the other way. It looks at an image and guesses the units that made it. The model
# and the guide together are a Helmholtz machine.
#
# Both are ordinary Pyro programs. They take the same arguments and use the same names for the
# same units. The data are observed with `obs=x`.

# %%
down = nn.ModuleDict({"h1": nn.Linear(8, 32), "x": nn.Linear(32, 64)})
up = nn.ModuleDict({"h1": nn.Linear(64, 32), "h2": nn.Linear(32, 8)})


def model(x):
    pyro.module("down", down)
    prior = pyro.param("prior", lambda: torch.zeros(8))
    with pyro.plate("data", len(x)):
        h2 = pyro.sample("h2", dist.Bernoulli(logits=prior).to_event(1))
        h1 = pyro.sample("h1", dist.Bernoulli(logits=down["h1"](h2)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=down["x"](h1)).to_event(1), obs=x)


def guide(x):
    pyro.module("up", up)
    with pyro.plate("data", len(x)):
        h1 = pyro.sample("h1", dist.Bernoulli(logits=up["h1"](x)).to_event(1))
        pyro.sample("h2", dist.Bernoulli(logits=up["h2"](h1)).to_event(1))


# %% [markdown]
# ## Training
#
# `NaturalRWS` works as it is. `step` makes one update of all parameters from one minibatch. It
# returns minus the bound on the log-likelihood, summed over the minibatch.

# %%
svi = ph.NaturalRWS(model, guide)


def minibatch(size=32):
    return data.train[torch.randint(len(data.train), (size,))]


losses = []
for step in range(STEPS):
    losses.append(svi.step(minibatch()) / 32)
    if (step + 1) % (STEPS // 4) == 0:
        recent = losses[-STEPS // 4 :]
        print(f"step {step + 1}: loss per image {sum(recent) / len(recent):.2f}")

# %% [markdown]
# ## What did the library see?
#
# Nothing in the programs said which weights belong to which units. The library found that out by
# running them. `structure` prints it, one line for each layer:
#
# * *parameters*: the weights and biases that belong together.
# * *site*: the variables that they feed.
# * *kind*: how they enter. Here every layer is affine: a matrix times the units above, plus a bias.
# * *units* and *size*: there is one block of the Fisher matrix for each unit, of this size.
# * *exact*: whether the Fisher information of the distribution is known exactly.
# * *solver*: how the block is applied to the gradient.

# %%
print(svi.structure(minibatch()))

# %% [markdown]
# ## How good is it?
#
# `log_likelihood` estimates the log-probability of test images that the model has never seen. It
# draws many guesses from the guide and weighs them. The result comes with three warning lights:
#
# * `stderr`: the standard error of the mean over the images.
# * `ess`: the effective sample size. It says how many of the guesses count, for each image.
# * `khat`: the shape of the largest weights. Do not trust an image with a value above 0.7.

# %%
result = ph.log_likelihood(model, guide, data.test, num_particles=PARTICLES, batch=100)
print(f"log-likelihood  {result.mean:.2f} ± {result.stderr:.2f} nats per test image")
print(f"effective size  {result.ess.median():.0f} of {PARTICLES} guesses (median)")
print(f"k-hat           {result.khat.median():.2f} (median)")
print(f"not to trust    {(result.khat > 0.7).float().mean():.0%} of the images")

# %% [markdown]
# For comparison: a model in which every pixel is on or off by itself.

# %%
pixels = dist.Bernoulli(data.train.mean(0).clamp(0.01, 0.99)).to_event(1)
print(f"independent pixels: {pixels.log_prob(data.test).mean():.2f} nats per test image")

# %% [markdown]
# ## Draw from it
#
# `poutine.uncondition` makes the model forget the data. What it draws then are its own images. We
# show the probability of each pixel, which is easier on the eye than black and white.


# %%
def visible_mean(program, x):
    with torch.no_grad():
        return poutine.trace(program).get_trace(x).nodes["x"]["fn"].mean


images = data.test[:10]
samples = visible_mean(poutine.uncondition(model), images)
guessed = poutine.trace(guide).get_trace(images)
reconstructions = visible_mean(poutine.replay(model, trace=guessed), images)

rows = {"data": images, "reconstructions": reconstructions, "samples": samples}
fig, axes = plt.subplots(len(rows), 10, figsize=(8, 3), layout="constrained")
for line, (title, row) in zip(axes, rows.items(), strict=True):
    line[0].set_title(title, fontsize=9, loc="left")
    for ax, image in zip(line, row, strict=True):
        ax.imshow(image.reshape(data.shape).numpy(), cmap="gray_r", vmin=0, vmax=1)
        ax.axis("off")
fig.savefig(FIGURES / "01_samples.png", dpi=110)

# %% [markdown]
# ## Save and resume
#
# `state_dict` holds everything that the next step depends on: the parameters, the optimiser, the
# Fisher matrix's memory and the state of the random numbers. So a resumed run takes the very step
# that the first run would have taken.
#
# The file is a Python pickle. Load only files that you trust.

# %%
x = data.train[:32]
with tempfile.TemporaryDirectory() as folder:
    path = Path(folder) / "state.pt"
    torch.save(svi.state_dict(), path)
    first = svi.step(x)  # the next step of the first run

    # A new start, as after a restart: fresh weights, an empty parameter store.
    pyro.clear_param_store()
    for parameter in (*down.parameters(), *up.parameters()):
        nn.init.normal_(parameter)
    svi = ph.NaturalRWS(model, guide)
    svi.load_state_dict(torch.load(path, weights_only=False))
    second = svi.step(x)

print(f"first run {first:.6f}, resumed run {second:.6f}")
assert first == second

# %% [markdown]
# ## Further
#
# * The next tutorial shows what the natural gradient is and why it pays.
# * `ph.RWS` and `ph.WakeSleep` take the same arguments.
# * Try more layers. Try `pyro.optim.SGD({"lr": 0.02})` as the third argument.
