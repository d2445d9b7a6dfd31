"""NumPyro's side of the quickstart: the network and its training.

``python -m pyro_helmholtz.quickstart --backend numpyro`` does the job, with the table, the figure
and the options that both hosts share. The network is an ordinary pair of NumPyro programs, with
no mark of the estimators that train it:

    h_L ~ Bernoulli(σ(b)),  h_l ~ Bernoulli(σ(h_{l+1} W_l + b_l)),  x ~ Bernoulli(σ(h_1 W_0 + b_0))

and the guide runs the same chain upwards. The data are on the device, and many steps run in one
compiled call. It is compiled before the clock starts.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import Array, lax, random
from numpyro import handlers

import numpyro_helmholtz as nh
from numpyro_helmholtz import datasets

__all__ = ["SigmoidBeliefNetwork", "Training", "datasets", "training"]

ESTIMATORS = {"RWS": nh.RWS, "NaturalRWS": nh.NaturalRWS}
CHUNK = 1024  # most steps in one compiled call


class SigmoidBeliefNetwork:
    """Layers of binary units, each the parent of the one below; the lowest is the data.

    Args:
        sizes: Units of each layer from the data upwards, for example ``(64, 48, 24, 12)``.
        mean: Mean of the data, shape (sizes[0],); gives the first bias of the visible layer.
    """

    def __init__(self, sizes: Sequence[int], mean: Array) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"A network needs at least one hidden layer of units, got {sizes}.")
        self.sizes, self.dtype = sizes, mean.dtype
        mean = jnp.clip(mean, 0.01, 0.99)
        self.visible = jnp.log(mean) - jnp.log1p(-mean)

    def _layer(self, name: str, h: Array, size: int, bias: Array | None = None) -> Array:
        """An affine map of h, (..., fan-in), to ``size`` logits; starts as torch's Linear does."""
        bound = 1 / math.sqrt(h.shape[-1])

        def start(*shape: int) -> Callable[[Array], Array]:
            return lambda key: random.uniform(key, shape, self.dtype, -bound, bound)

        w = numpyro.param(f"{name}.w", start(h.shape[-1], size))
        return h @ w + numpyro.param(f"{name}.b", start(size) if bias is None else bias)

    def model(self, x: Array) -> None:
        """Generate from the top layer down to the data; x: (data, pixels)."""
        logits = numpyro.param("top", jnp.zeros(self.sizes[-1], self.dtype))
        with numpyro.plate("data", len(x)):
            for level in range(len(self.sizes) - 1, 0, -1):
                h = numpyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))
                below = level - 1
                bias = None if below else self.visible
                logits = self._layer(f"generative{below}", h, self.sizes[below], bias)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Array) -> None:
        """Recognise from the data up to the top layer; x: (data, pixels)."""
        h = x
        with numpyro.plate("data", len(x)):
            for level, size in enumerate(self.sizes[1:], start=1):
                logits = self._layer(f"recognition{level - 1}", h, size)
                h = numpyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))

    def dream(self, rng_key: Array, params: dict[str, Array], x: Array) -> Array:
        """Means of the visible layer under the model, as many as x has rows."""
        return _visible_mean(handlers.uncondition(self.model), rng_key, params, x)

    def reconstruct(self, rng_key: Array, params: dict[str, Array], x: Array) -> Array:
        """Means of the visible layer given hidden units that the guide draws for x."""
        recognised = _trace(self.guide, rng_key, params, x)
        return _visible_mean(handlers.replay(self.model, recognised), rng_key, params, x)


def _trace(program: Callable, rng_key: Array, params: dict[str, Array], x: Array) -> Any:
    seeded = handlers.seed(handlers.substitute(program, params), rng_key)
    return handlers.trace(seeded).get_trace(x)


def _visible_mean(program: Callable, rng_key: Array, params: dict, x: Array) -> Array:
    return _trace(program, rng_key, params, x)["x"]["fn"].mean


class Batches:
    """Endless minibatches, shuffled anew at each pass, the same for every estimator."""

    def __init__(self, count: int, size: int, seed: int) -> None:
        self.count, self.size = count, min(size, count)
        self.rng = np.random.default_rng(seed)
        self.ready: np.ndarray = np.empty((0, self.size), int)

    def next(self, number: int) -> np.ndarray:
        """Row numbers of the next minibatches, shape (number, size)."""
        whole = self.count // self.size
        while len(self.ready) < number:
            order = self.rng.permutation(self.count)[: whole * self.size]
            self.ready = np.concatenate([self.ready, order.reshape(whole, self.size)])
        taken, self.ready = self.ready[:number], self.ready[number:]
        return taken


class Training:
    """One network, one estimator and its minibatches.

    A rehearsal, with steps that are thrown away, compiles the call that makes many steps.

    Args:
        name: the estimator. data: training images, (images, pixels). args: the job's options.
    """

    def __init__(self, name: str, data: np.ndarray, args: argparse.Namespace) -> None:
        self.data = jnp.asarray(data)
        self.net = SigmoidBeliefNetwork((data.shape[1], *args.layers), self.data.mean(0))
        programs = self.net.model, self.net.guide
        self.svi = ESTIMATORS[name](*programs, num_particles=args.particles)
        self.batches = Batches(len(data), args.batch_size, args.seed)
        self.key, key = random.split(random.key(args.seed))
        first = self.data[: self.batches.size]
        self.state = self.svi.init(key, first)
        self._chunk = jax.jit(self._steps)
        self.pace = 0.01  # seconds a step, a guess that the first call corrects
        for _ in range(2):
            jax.block_until_ready(self._call(np.zeros((3, self.batches.size))))

    def _steps(self, state: Any, data: Array, rows: Array, count: Array) -> Any:
        """``count`` updates in one compiled call; rows: of the minibatches, (CHUNK, size)."""

        def body(i: Array, state: Any) -> Any:
            return self.svi.update(state, data[rows[i]])[0]

        return lax.fori_loop(0, count, body, state)

    def advance(self, seconds: float) -> int:
        """Train for about so many seconds; at least one step.

        Returns:
            The number of steps.
        """
        start = time.perf_counter()
        count = max(1, min(CHUNK, round(seconds / self.pace)))
        self.state = jax.block_until_ready(self._call(self.batches.next(count)))
        self.pace = (time.perf_counter() - start) / count
        return count

    def _call(self, batches: np.ndarray) -> Any:
        """The state after one step for each of at most CHUNK minibatches."""
        rows = np.zeros((CHUNK, self.batches.size), np.int32)
        rows[: len(batches)] = batches
        return self._chunk(self.state, self.data, rows, len(batches))

    def measure(self, x: np.ndarray, num_particles: int) -> nh.LogLikelihood:
        """Log-likelihood of images, (images, pixels)."""
        return nh.log_likelihood(
            self.key,
            self.svi.get_params(self.state),
            self.net.model,
            self.net.guide,
            jnp.asarray(x),
            num_particles=num_particles,
            particles_at_once=100,
            batch=100,
        )

    def pictures(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Visible means of dreams and of reconstructions of x, each (images, pixels)."""
        params = self.svi.get_params(self.state)
        ways = (self.net.dream, self.net.reconstruct)
        dreams, again = (np.asarray(way(self.key, params, jnp.asarray(x))) for way in ways)
        return dreams, again


@contextmanager
def training(name: str, data: np.ndarray, args: argparse.Namespace) -> Iterator[Training]:
    """A ``Training`` on the wanted device."""
    platform, _, number = args.device.partition(":")
    with jax.default_device(jax.devices(platform)[int(number or 0)]):
        yield Training(name, data, args)
