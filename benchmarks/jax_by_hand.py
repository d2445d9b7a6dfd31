"""Reweighted wake-sleep on a sigmoid belief network, by hand in plain JAX: the yardstick."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax, random

Params = dict[str, Any]


def make_layers(rng_key: Array, widths: Sequence[int]) -> Params:
    """Makes the parameters of a sigmoid belief network and of its recognition network.

    Args:
        rng_key: random key.
        widths: the numbers of units, visible layer first.

    Returns:
        ``down``, pairs (weight, bias) from layer i + 1 to layer i; ``top``, the logits of the
        top layer's prior, shape ``(widths[-1],)``; ``up``, pairs from layer i to layer i + 1.
    """
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    keys = random.split(rng_key, 2 * len(pairs))

    def layer(key: Array, fan_in: int, fan_out: int) -> tuple[Array, Array]:
        bound = 1 / math.sqrt(fan_in)
        return random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound), jnp.zeros(
            fan_out
        )

    down = [layer(k, above, below) for k, (below, above) in zip(keys, pairs, strict=False)]
    up = [
        layer(k, below, above) for k, (below, above) in zip(keys[len(pairs) :], pairs, strict=True)
    ]
    return {"down": down, "top": jnp.zeros(widths[-1]), "up": up}


class ByHand:
    """One RWS step, the best that straightforward JAX does.

    Directions are means over data: wake-theta ``sum_s w grad log p``, wake-phi
    ``sum_s (w - 1/S) grad log q``, sleep-phi on B dreams, and phi half of each.

    Args:
        num_particles: the number S of particles for each datum.
        lr: the rate of gradient ascent.
    """

    def __init__(self, num_particles: int = 10, lr: float = 2e-3) -> None:
        self.num_particles, self.lr = num_particles, lr

    def update(self, state: tuple[Params, Array], x: Array) -> tuple[tuple[Params, Array], Array]:
        """Takes one step on ``x``, shape ``(B, visible)``; returns minus the bound's sum."""
        params, rng_key = state
        rng_key, key = random.split(rng_key)
        (_, loss), gradient = jax.value_and_grad(self.objective, has_aux=True)(params, key, x)
        params = jax.tree.map(lambda p, g: p - self.lr * g, params, gradient)
        return (params, rng_key), loss

    def objective(self, params: Params, rng_key: Array, x: Array) -> tuple[Array, Array]:
        """The scalar whose gradient is minus the directions of ascent, and the loss."""
        size, n = self.num_particles, len(x)
        up, down, top = params["up"], params["down"], params["top"]
        keys = iter(random.split(rng_key, 2 * len(up) + 1))

        # Wake: the first recognition layer is computed once for each datum.
        hidden: list[Array] = []
        log_q: Any = 0.0
        for i, (weight, bias) in enumerate(up):
            logits = (hidden[-1] if i else x) @ weight + bias
            shape = (size, n, logits.shape[-1])
            hidden.append(draw(next(keys), logits, shape))
            log_q = log_q + log_bernoulli(logits, hidden[-1])
        log_p = log_bernoulli(top, hidden[-1])
        for i, (weight, bias) in enumerate(down):
            log_p = log_p + log_bernoulli(hidden[i] @ weight + bias, hidden[i - 1] if i else x)
        log_w = lax.stop_gradient(log_p - log_q)
        weights = jax.nn.softmax(log_w, 0)
        loss = (math.log(size) - jax.nn.logsumexp(log_w, 0)).sum()
        wake_theta = (weights * log_p).sum() / n
        wake_phi = ((weights - 1 / size) * log_q).sum() / n

        # Sleep: as many dreams as data.
        dream = [draw(next(keys), top, (n, len(top)))]
        for weight, bias in reversed(down):
            logits = dream[-1] @ weight + bias
            dream.append(draw(next(keys), logits, logits.shape))
        dream.reverse()
        sleep_phi: Any = 0.0
        for (weight, bias), below, above in zip(up, dream[:-1], dream[1:], strict=True):
            sleep_phi = sleep_phi + log_bernoulli(below @ weight + bias, above).sum()
        return -(wake_theta + 0.5 * (wake_phi + sleep_phi / n)), loss


def draw(rng_key: Array, logits: Array, shape: tuple[int, ...]) -> Array:
    """Binary values, constants in the gradient."""
    sample = random.uniform(rng_key, shape) < jax.nn.sigmoid(logits)
    return lax.stop_gradient(sample.astype(logits.dtype))


def log_bernoulli(logits: Array, value: Array) -> Array:
    """The log-probability of ``value``, summed over the last dimension."""
    softplus = jnp.maximum(logits, 0) + jnp.log1p(jnp.exp(-jnp.abs(logits)))
    return (value * logits - softplus).sum(-1)
