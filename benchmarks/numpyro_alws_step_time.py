"""The NumPyro half of ``alws_step_time.py``: call that with ``--backend numpyro``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable


def make_contenders(args: argparse.Namespace) -> tuple[dict[str, Callable], Callable]:
    """The reference and the updates by name, all jitted, and what waits for the device."""
    eigen = "true" if args.threads > 1 else "false"
    os.environ.setdefault("XLA_FLAGS", f"--xla_cpu_multi_thread_eigen={eigen}")

    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as dist
    from alws_step_time import COLOURS, LATENTS, SIDE
    from jax import lax, random

    import numpyro_helmholtz as nh

    c = args.channels
    data = random.uniform(random.key(1), (args.batch, SIDE, SIDE, COLOURS))
    widths = [LATENTS, 4 * c, 2 * c, c, COLOURS]
    strides = [1, 2, 2, 2]

    def start(key: jax.Array) -> list[jax.Array]:
        pairs = zip(random.split(key, 4), widths, widths[1:], strict=False)
        return [random.normal(k, (4, 4, i, o)) / (4 * i) for k, i, o in pairs]

    def images(weights: list[jax.Array], z: jax.Array) -> jax.Array:
        h = z.reshape(-1, 1, 1, LATENTS)
        for i, (weight, stride) in enumerate(zip(weights, strides, strict=True)):
            padding = "VALID" if i == 0 else "SAME"
            shape = ("NHWC", "HWIO", "NHWC")
            h = lax.conv_transpose(h, weight, (stride, stride), padding, dimension_numbers=shape)
            h = jax.nn.relu(h) if i < 3 else h
        return h.reshape(*z.shape[:-1], SIDE, SIDE, COLOURS)

    def model(x: jax.Array) -> None:
        weights = numpyro.param("generator", start)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros(LATENTS), 1.0).to_event(1))
            numpyro.sample("x", dist.Normal(images(weights, z), 0.3).to_event(3), obs=x)

    def make_update(name: str) -> Callable:
        features = None if name == "pixels" else nh.LinearFeatures(300)
        kernel = nh.GaussianKernel(features=features, standardise=features is not None)
        options = {"kernel": kernel}
        if name == "random-features":
            options["gradient_model"] = name
        if name == "plain":
            options["exponential_family"] = False
        if name == "adapted":
            options["adapt"] = 1e-3
        svi = nh.ALWS(model, numpyro.optim.Adam(1e-4), args.sleep, max_plate_nesting=1, **options)
        update = jax.jit(svi.update)
        states = [svi.init(random.key(0), data)]

        def step() -> None:
            states[0], loss = update(states[0], data)
            loss.block_until_ready()

        return step

    @jax.jit
    def reference_step(weights: list[jax.Array], key: jax.Array) -> tuple:
        def value(weights: list[jax.Array]) -> jax.Array:
            first, second = random.split(key)
            mean = images(weights, random.normal(first, (args.sleep, LATENTS)))
            dream = lax.stop_gradient(mean) + 0.3 * random.normal(second, mean.shape)
            return dist.Normal(mean, 0.3).log_prob(dream).sum()

        return jax.value_and_grad(value)(weights)

    weights = start(random.key(0))
    steps: dict[str, Callable] = {
        "reference": lambda: jax.block_until_ready(reference_step(weights, random.key(2)))
    }
    steps.update({name: make_update(name) for name in args.methods.split(",")})
    return steps, lambda: None
