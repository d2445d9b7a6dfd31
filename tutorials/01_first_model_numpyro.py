# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A first model, in NumPyro
#
# We write a small model of handwritten digits, train it, look at what the library made of it,
# measure it, draw from it, and save it. It takes less than a minute. Most of that is compilation.
#
# This file is a script and a notebook at once: run it with Python, or open it as a notebook with
# jupytext. Figures go into the folder `figures`. `TUTORIAL_FAST=1` makes everything shorter.

# %%
import os
import pickle

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import lax, random
from numpyro import handlers

import numpyro_helmholtz as nh
from numpyro_helmholtz import datasets

FAST = os.environ.get("TUTORIAL_FAST") == "1"
EPOCHS = 1 if FAST else 20
PARTICLES = 100 if FAST else 1000
os.makedirs("figures", exist_ok=True)

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
# Both are ordinary NumPyro programs. They take the same arguments and use the same names for the
# same units. The data are observed with `obs=x`. The weights are plain parameters here; networks
# of flax and equinox work too.


# %%
def layer(name, h, size):
    """An affine map of the units h, with small random weights at the start."""
    w = numpyro.param(f"{name}.w", lambda key: 0.2 * random.normal(key, (h.shape[-1], size)))
    b = numpyro.param(f"{name}.b", jnp.zeros(size))
    return h @ w + b


def units(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=obs)


def model(x):
    prior = numpyro.param("prior", jnp.zeros(8))
    with numpyro.plate("data", len(x)):
        h2 = units("h2", prior)
        h1 = units("h1", layer("down.h1", h2, 32))
        units("x", layer("down.x", h1, 64), obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        h1 = units("h1", layer("up.h1", x, 32))
        units("h2", layer("up.h2", h1, 8))


# %% [markdown]
# ## Training
#
# `NaturalRWS` works as it is. `init` makes a state, `update` makes one update of all parameters
# from one minibatch. `update` is a pure function: state in, state out. So it runs inside `jit`
# and `lax.scan`. We let one compiled call do a whole epoch. The images stay on the device, and
# nothing waits for Python between the steps.
#
# The loss is minus the bound on the log-likelihood, summed over the minibatch.
#
# When every step sees the same arguments, `svi.run(key, steps, x)` does all this for you, with a
# progress bar.

# %%
svi = nh.NaturalRWS(model, guide)
images = jnp.asarray(data.train)
state = svi.init(random.key(0), images[:32])


@jax.jit
def epoch(state, order):
    """One update for each row of `order`, which holds the numbers of 32 images."""

    def step(state, rows):
        state, loss = svi.update(state, images[rows])
        return state, loss / 32

    return lax.scan(step, state, order)


for number in range(EPOCHS):
    order = random.permutation(random.key(number), len(images))
    state, losses = epoch(state, order[: len(order) // 32 * 32].reshape(-1, 32))
    if (number + 1) % max(EPOCHS // 4, 1) == 0:
        print(f"epoch {number + 1}: loss per image {losses.mean():.2f}")

# %% [markdown]
# ## What did the library see?
#
# Nothing in the programs said which weights belong to which units. The library found that out
# from the equations that JAX records. `structure` prints it, one line for each layer:
#
# * *parameters*: the weights and biases that belong together.
# * *site*: the variables that they feed.
# * *kind*: how they enter. Here every layer is affine: a matrix times the units above, plus a bias.
# * *units* and *size*: there is one block of the Fisher matrix for each unit, of this size.
# * *exact*: whether the Fisher information of the distribution is known exactly.
# * *solver*: how the block is applied to the gradient.

# %%
print(svi.structure(random.key(0), images[:32]))

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
params = svi.get_params(state)
test = jnp.asarray(data.test)
result = nh.log_likelihood(
    random.key(1), params, model, guide, test, num_particles=PARTICLES, particles_at_once=50
)
print(f"log-likelihood  {result.mean:.2f} ± {result.stderr:.2f} nats per test image")
print(f"effective size  {jnp.median(result.ess):.0f} of {PARTICLES} guesses (median)")
print(f"k-hat           {jnp.median(result.khat):.2f} (median)")
print(f"not to trust    {(result.khat > 0.7).mean():.0%} of the images")

# %% [markdown]
# For comparison: a model in which every pixel is on or off by itself.

# %%
pixels = dist.Bernoulli(images.mean(0).clip(0.01, 0.99)).to_event(1)
print(f"independent pixels: {pixels.log_prob(test).mean():.2f} nats per test image")

# %% [markdown]
# ## Draw from it
#
# `handlers.uncondition` makes the model forget the data. What it draws then are its own images.
# We show the probability of each pixel, which is easier on the eye than black and white.


# %%
def run(program, x):
    """The trace of a program with the trained parameters."""
    program = handlers.seed(handlers.substitute(program, params), random.key(2))
    return handlers.trace(program).get_trace(x)


shown = test[:10]
samples = run(handlers.uncondition(model), shown)["x"]["fn"].mean
reconstructions = run(handlers.replay(model, run(guide, shown)), shown)["x"]["fn"].mean

rows = {"data": shown, "reconstructions": reconstructions, "samples": samples}
fig, axes = plt.subplots(len(rows), 10, figsize=(8, 3), layout="constrained")
for line, (title, row) in zip(axes, rows.items(), strict=True):
    line[0].set_title(title, fontsize=9, loc="left")
    for ax, image in zip(line, row, strict=True):
        ax.imshow(np.reshape(image, data.shape), cmap="gray_r", vmin=0, vmax=1)
        ax.axis("off")
fig.savefig("figures/01_samples_numpyro.png", dpi=110)

# %% [markdown]
# ## Save and resume
#
# The state holds everything that the next step depends on: the parameters, the optimiser, the
# Fisher matrix's memory and the random key. It can be pickled. So a resumed run takes the very
# steps that the first run would have taken.
#
# Load only pickles that you trust.

# %%
saved = pickle.dumps(state)
rows = jnp.arange(32).reshape(1, 32)
_, first = epoch(state, rows)  # the next step of the first run
_, second = epoch(pickle.loads(saved), rows)

print(f"first run {first[0]:.6f}, resumed run {second[0]:.6f}")
assert first[0] == second[0]

# %% [markdown]
# ## Further
#
# * The next tutorial shows what the natural gradient is and why it pays.
# * The third one trains on several devices.
# * `nh.RWS` and `nh.WakeSleep` take the same arguments.
# * Try more layers. Try `optax.adam(0.01)` as the third argument.
