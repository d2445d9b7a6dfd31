# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # Several devices
#
# A minibatch can be spread over several devices, some images on each. The programs stay as they
# are, and so does the estimator. You only say where the data lie. JAX does the rest: it puts in
# the sums over devices that the loss, the gradient and the Fisher matrix need.
#
# This script shows it on eight devices that JAX simulates on the processor, and checks that eight
# devices take the same step as one. On a machine with several GPUs, leave out the next cell.

# %%
import numpyro

numpyro.set_platform("cpu")
numpyro.set_host_device_count(8)  # sets XLA_FLAGS; must come before anything else runs in JAX
numpyro.enable_x64()  # only so that the comparison is not blurred by round-off

# %%
import os

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import numpyro.distributions as dist
from jax import lax, random
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import numpyro_helmholtz as nh
from numpyro_helmholtz import datasets

FAST = os.environ.get("TUTORIAL_FAST") == "1"
STEPS = 4 if FAST else 40
os.makedirs("figures", exist_ok=True)
print(f"{len(jax.devices())} devices")

# %% [markdown]
# ## A model
#
# A sigmoid belief network with one hidden layer, and its guide. Nothing in them speaks of devices.


# %%
def layer(name, h, size):
    w = numpyro.param(f"{name}.w", lambda key: 0.2 * random.normal(key, (h.shape[-1], size)))
    return h @ w + numpyro.param(f"{name}.b", jnp.zeros(size))


def units(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=obs)


def model(x):
    prior = numpyro.param("prior", jnp.zeros(20))
    with numpyro.plate("data", len(x)):
        h = units("h", prior)
        units("x", layer("down", h, 64), obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        units("h", layer("up", x, 20))


# %% [markdown]
# ## Where the data lie
#
# A `Mesh` gives the devices a shape and its axes a name. Ours has one axis, over the data.
# `PartitionSpec` says which dimension of an array goes along which axis:
#
# * the minibatches, an array (steps, images, pixels), are cut along the images;
# * the state, with parameters and Fisher memory, is on every device in full.
#
# The number of images in a minibatch must be a multiple of the number of devices.

# %%
mesh = Mesh(np.array(jax.devices()), ("data",))
cut = NamedSharding(mesh, PartitionSpec(None, "data"))
everywhere = NamedSharding(mesh, PartitionSpec())

data = datasets.load("digits")
rows = np.random.default_rng(0).integers(len(data.train), size=(STEPS, 32))
batches = jnp.asarray(data.train[rows], float)
batches_cut = jax.device_put(batches, cut)
print(f"on one device {batches.shape}, on each of eight", end=" ")
print(batches_cut.addressable_shards[0].data.shape)

# %% [markdown]
# ## The same step
#
# `directions` computes what a step would use and changes nothing: the gradient, the natural
# direction, and the Fisher matrix between them. We ask once with the images on one device and once
# with the images on eight.

# %%
svi = nh.NaturalRWS(model, guide, fisher="unit")
state = svi.init(random.key(0), batches[0])
state_cut = jax.device_put(state, everywhere)
one = svi.directions(state, batches[0])
eight = svi.directions(state_cut, batches_cut[0])


def gap(a, b):
    """The largest difference, relative to the largest entry."""
    a, b = np.asarray(a), np.asarray(b)
    return np.abs(a - b).max() / np.abs(a).max()


for name in ("down.w", "up.w"):
    print(f"{name}: gradient {gap(one.gradient[name], eight.gradient[name]):.1e}", end=", ")
    print(f"natural direction {gap(one.natural[name], eight.natural[name]):.1e}")
    assert gap(one.natural[name], eight.natural[name]) < 1e-8
for a, b in zip(one.fisher.blocks, eight.fisher.blocks, strict=True):
    print(f"Fisher blocks of {' and '.join(a.params)}: {gap(a.dense(), b.dense()):.1e}")
    assert gap(a.dense(), b.dense()) < 1e-12

# %% [markdown]
# They are equal up to round-off, which comes from the order of the sums. The random numbers are
# the same, too: JAX draws them from the key, however the data are cut.
#
# ## Training
#
# A whole run is one compiled call. It is the call that you would write for one device. This time
# we take the default Fisher matrix, with its running means.

# %%
svi = nh.NaturalRWS(model, guide)
state = svi.init(random.key(0), batches[0])
train = jax.jit(lambda state, batches: lax.scan(svi.update, state, batches))
last, losses = train(state, batches)
last_cut, losses_cut = train(jax.device_put(state, everywhere), batches_cut)

params, params_cut = svi.get_params(last), svi.get_params(last_cut)
worst = max(gap(params[name], params_cut[name]) for name in params)
print(f"after {STEPS} steps: losses {gap(losses, losses_cut):.1e}, parameters {worst:.1e}")
assert worst < 1e-6
print("on how many devices the result is:", len(params_cut["down.w"].sharding.device_set))

# %%
fig, ax = plt.subplots(figsize=(6, 3), layout="constrained")
ax.plot(losses / 32, lw=4, alpha=0.4, label="one device")
ax.plot(losses_cut / 32, "--", label="eight devices")
ax.set(xlabel="step", ylabel="loss per image (nats)")
ax.legend()
fig.savefig("figures/03_devices_numpyro.png", dpi=110)

# %% [markdown]
# Eight simulated devices share one processor, so nothing is faster here. On real devices a step
# pays when the part of each is large: many images in a minibatch, or many particles, or wide
# layers.
