# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
# ---

# %% [markdown]
# # A latent on a circle
#
# Some causes go round in a circle: the orientation of an edge, the phase of a walk, the time of
# day. It is easy to write a model with such a latent. It is less easy to write its guide, since a
# guide needs a flexible distribution on the circle and a gradient through it.
#
# `ALWS` needs no guide. It learns from dreams: it draws latents and images from the model, and
# regresses from the images to the gradient (amortised learning by wake-sleep, Wenliang et al.
# 2020). So any latent will do that can be drawn. We follow section 4.2 of that paper: a model of
# small wavelets that learns their orientation as an angle.
#
# This file is a script and a notebook at once. `TUTORIAL_FAST=1` makes everything shorter.

# %%
import math
import os
import time
from pathlib import Path

import matplotlib.pyplot as plt
import pyro
import pyro.distributions as dist
import torch
from torch import nn
from tqdm.auto import trange

import pyro_helmholtz as ph

FAST = os.environ.get("TUTORIAL_FAST") == "1"
STEPS, NUM_SLEEP, VAE_STEPS = (20, 200, 20) if FAST else (1000, 500, 5000)
FIGURES = Path("figures")
FIGURES.mkdir(exist_ok=True)

pyro.clear_param_store()
pyro.set_rng_seed(0)

# %% [markdown]
# ## The data
#
# A Gabor wavelet is a plane wave under a Gaussian bump. Ours have 16 by 16 pixels. They differ in
# orientation alone, which is uniform between 0 and π: half a turn gives the same image again.

# %%
grid = torch.linspace(-1, 1, 16)
y, x = torch.meshgrid(grid, grid, indexing="ij")


def gabor(orientation):
    """Orientations (n,) to images (n, 256)."""
    t = orientation[:, None, None]
    across, along = x * t.cos() + y * t.sin(), y * t.cos() - x * t.sin()
    bump = torch.exp(-0.5 * ((across / 0.3) ** 2 + (along / 0.5) ** 2))
    return (bump * torch.cos(2 * math.pi * across / 0.8)).flatten(1)


data = gabor(math.pi * torch.rand(10_000))
valid = gabor(math.pi * torch.rand(500))

# %% [markdown]
# ## The model
#
# An angle, its point on the circle, a small network, and pixel noise whose size is learned. The
# noise is large at first. Then the dreams are spread wider than the data, and the regression is
# asked only about images like those that it has seen.

# %%
net = nn.Sequential(
    nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 256)
)


def circle(angle):
    return torch.stack([angle.cos(), angle.sin()], -1)


def noise(name):
    return pyro.param(name, lambda: torch.tensor(0.3), constraint=dist.constraints.positive)


def model(images):
    pyro.module("net", net)
    with pyro.plate("data", len(images)):
        angle = pyro.sample("angle", dist.Uniform(-math.pi, math.pi))
        pyro.sample("x", dist.Normal(net(circle(angle)), noise("noise")).to_event(1), obs=images)


# %% [markdown]
# ## Training
#
# One line. The kernel compares images after a linear projection to 300 numbers, as in the paper.
# `adapt` learns the projection, the bandwidth and the ridge on dreams that are held out.


# %%
def adam(steps):
    """Adam whose rate falls tenfold over the run, with a lower rate for the noise."""

    def options(name):
        return {"lr": 2e-3 if "noise" in name else 3e-3, "lrd": 0.1 ** (1 / steps)}

    return pyro.optim.ClippedAdam(options)


kernel = ph.GaussianKernel(features=ph.LinearFeatures(300))
alws = ph.ALWS(model, adam(STEPS), NUM_SLEEP, ridge=0.01, kernel=kernel, adapt=0.03, adapt_every=5)


def train(svi, steps, watch):
    """Returns the processor's seconds."""
    start = time.process_time()
    for step in (bar := trange(steps, mininterval=1)):
        svi.step(data[torch.randint(len(data), (400,))])
        if (step + 1) % (steps // 10) == 0:
            bar.set_postfix_str(watch())
    return time.process_time() - start


# %% [markdown]
# What do we watch? The loss of `ALWS` is no bound. But there is one latent, and it is an angle. So
# the log-likelihood is an integral over one dimension. A sum over 2,000 angles is exact enough to
# choose settings by, on images that are not trained on.


# %%
def log_likelihood(images):
    """Mean log p(x), by quadrature over the angle."""
    with torch.no_grad():
        means = net(circle(2 * math.pi * torch.arange(2000) / 2000)).double()
        scale = pyro.param("noise").double()
    log_prob = -0.5 * (torch.cdist(images.double(), means) / scale) ** 2
    log_prob = log_prob - 256 * (scale.log() + 0.5 * math.log(2 * math.pi))
    return float((log_prob.logsumexp(1) - math.log(2000)).mean())


def watch():
    seen = alws.diagnostics
    return (
        f"log p {log_likelihood(valid):.1f}, noise {pyro.param('noise').item():.3f}, "
        f"coverage {seen['coverage_min']:.2f}, bandwidth {seen['bandwidth']:.1f}"
    )


seconds = train(alws, STEPS, watch)
print(f"ALWS: {STEPS} steps in {seconds:.0f} s on one core; {watch()}")

# %% [markdown]
# ## For comparison: a variational autoencoder
#
# A Gaussian guide needs a Gaussian latent: two dimensions for the circle to lie in. Everything else
# is the same: generator, optimiser, rates, noise at the start, size of the minibatch. A step costs
# a fifth as much, so it gets five times as many.

# %%
vae_net = nn.Sequential(
    nn.Linear(2, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 256)
)
encoder = nn.Sequential(
    nn.Linear(256, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 4)
)


def vae_model(images):
    pyro.module("vae_net", vae_net)
    with pyro.plate("data", len(images)):
        z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
        pyro.sample("x", dist.Normal(vae_net(z), noise("vae_noise")).to_event(1), obs=images)


def vae_guide(images):
    pyro.module("encoder", encoder)
    with pyro.plate("data", len(images)):
        loc, log_scale = encoder(images).chunk(2, -1)
        pyro.sample("z", dist.Normal(loc, log_scale.exp()).to_event(1))


def watch_vae():
    with torch.no_grad():
        loss = vae.evaluate_loss(valid) / len(valid)
    return f"bound {-loss:.1f}, noise {pyro.param('vae_noise').item():.3f}"


vae = ph.StochasticBackprop(vae_model, vae_guide, adam(VAE_STEPS))
seconds = train(vae, VAE_STEPS, watch_vae)
print(f"VAE: {VAE_STEPS} steps in {seconds:.0f} s on one core; {watch_vae()}")

# %% [markdown]
# ## Does a turn of the latent turn the wavelet?
#
# The paper's measure. Go round the latent circle once at even speed, and turn the wavelet by π at
# even speed. Choose where to begin and which way round so that the squared distances between the
# generated and the true images are smallest in total. Then look at the distance at each
# orientation. It should be small, and flat. For the VAE we go round a circle of radius 1, as the
# paper does, and round the circle of the radius that suits it best.

# %%
orientations = math.pi * torch.arange(180) / 180
turn = circle(2 * math.pi * torch.arange(360) / 360)  # two places to each orientation


def errors(generate):
    """Squared distances (180,) at the best beginning and direction, and the images (180, 256)."""
    with torch.no_grad():
        images, truth = generate(turn), gabor(orientations)
    ways = [
        (begin + sign * torch.arange(180) * 2) % 360 for begin in range(360) for sign in (1, -1)
    ]
    found = torch.stack([(images[way] - truth).square().sum(1) for way in ways])
    best = int(found.mean(1).argmin())
    return found[best], images[ways[best]]


radii = [1.0] if FAST else [0.5 + 0.1 * i for i in range(21)]
at_radius = {r: errors(lambda z, r=r: vae_net(r * z)) for r in radii}
best_radius = min(radii, key=lambda r: float(at_radius[r][0].mean()))
results = {
    "ALWS": errors(net),
    "VAE, radius 1": at_radius[1.0],
    f"VAE, radius {best_radius:.1f}": at_radius[best_radius],
}
print(f"squared distances; for scale, the wavelets' own power is {data.square().sum(1).mean():.1f}")
for name, (found, _) in results.items():
    print(
        f"{name:15}: mean {found.mean():.3f}, least {found.min():.3f}, largest {found.max():.3f}, "
        f"deviation over mean {found.std() / found.mean():.2f}"
    )

# %%
shown = torch.arange(0, 180, 18)
rows = {"data": gabor(orientations)} | {name: images for name, (_, images) in results.items()}
fig = plt.figure(figsize=(8, 2 + len(rows)), layout="constrained")
top, bottom = fig.subfigures(2, 1, height_ratios=[len(rows), 2.2])
for line, (title, images) in zip(top.subplots(len(rows), len(shown)), rows.items(), strict=True):
    line[0].set_title(title, fontsize=9, loc="left")
    for ax, image in zip(line, images[shown], strict=True):
        ax.imshow(image.reshape(16, 16).numpy(), cmap="gray", vmin=-1, vmax=1)
        ax.axis("off")
ax = bottom.subplots()
for name, (found, _) in results.items():
    ax.plot(orientations * 180 / math.pi, found, label=name)
ax.set(xlabel="orientation (degrees)", ylabel="squared distance", ylim=(0, None))
ax.legend(fontsize=8)
fig.savefig(FIGURES / "04_circle.png", dpi=80)

# %% [markdown]
# ## What came out
#
# `OMP_NUM_THREADS=1 python tutorials/04_circular_latents.py`, seed 0, 10,000 images, minibatches of
# 400; processor's seconds on one busy core.
#
# | | steps | seconds | mean squared distance | least | largest | deviation over mean |
# | --- | --- | --- | --- | --- | --- | --- |
# | ALWS, 500 dreams | 1,000 | 44 | 0.032 | 0.005 | 0.079 | 0.70 |
# | VAE, radius 1 | 5,000 | 48 | 1.142 | 0.171 | 2.010 | 0.45 |
# | VAE, radius 1.9 | 5,000 | 48 | 0.051 | 0.000 | 0.195 | 0.87 |
#
# ![Wavelets along the circle, and squared distances](../docs/04_circular_latents.png)
#
# * One turn of the latent is half a turn of the wavelet. The error is small at every orientation,
#   between 0.04 % and 0.6 % of the wavelet's power (13.3): flat at this scale, though relative to
#   its own mean it varies. With seed 1 the mean is 0.039, the largest 0.097.
# * The 10,000 orientations of the data are random, so even a model that fits their distribution
#   exactly goes round at a slightly uneven speed. That alone makes a mean of 0.003 to 0.011 and a
#   largest error of 0.03 to 0.06 (five draws of such data).
# * On the unit circle the VAE's wavelets change their length, as in the paper, and its error is 36
#   times as large. But that is a matter of radius: the VAE has laid its circle at a radius near 2,
#   and there its error is 1.6 times that of `ALWS`. One has to know where to look. The circular
#   latent has no such choice.
# * Larger minibatches even the speed out: with 100 images in place of 400, and 6,000 steps for the
#   VAE, the means were 0.163 (`ALWS`, 0.190 with seed 1) and 0.080 (VAE, its best radius).
# * The noise must not shrink too fast. With a rate of 0.01 it fell to 0.012 in 450 steps. The
#   log-likelihood was far higher (814) and the error 0.456: once each image has a sharp posterior,
#   hardly anything pulls the speed even. So the likelihood cannot choose this rate. We chose it by
#   the measure itself, between 0.002 and 0.01, with minibatches of 100. The VAE got the same rate
#   and more steps; its noise went down to 0.006, and its bound on the log-likelihood up to 1,057.
