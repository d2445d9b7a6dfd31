"""Dreams that the regression of ALWS is not fitted to, and its error on them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from ..kernels import spread
from .sleep_set import SleepSet


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["inputs", "targets", "parts", "truth"],
    meta_fields=[],
)
@dataclass(frozen=True)
class HeldOut:
    """Dreams that the regression is not fitted to, and what it predicts for them; a pytree.

    ``Ĵ(x_l) = Σ_n A_nl Q_nl`` with ``Q_nl = η_n·s(x_l) − Ψ_n`` against ``η_l·s(x_l) − Ψ_l``.

    Attributes:
        inputs: of the training dreams, (N, d). targets: of the held-out ones, (L, d).
        parts: Q, (N, L). truth: (L,).
    """

    inputs: Array
    targets: Array
    parts: Array
    truth: Array

    def error(self, weights: Array) -> Array:
        """The mean squared error of the weights (N, L), over the truth's variance."""
        squares = jnp.square((weights * self.parts).sum(0) - self.truth).mean()
        return squares / jnp.maximum(self.truth.var(), 1e-30)


def split_rows(total: int, num_sleep: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows of the training and of the held-out dreams, both spread evenly over ``total``."""
    count = num_sleep + held_out
    chosen = spread(count, total)
    held = np.zeros(count, bool)
    if held_out:
        held[(2 * np.arange(held_out) + 1) * count // (2 * held_out)] = True
    return chosen[~held], chosen[held]


def held_out_dreams(dreams: SleepSet, train: np.ndarray, held: np.ndarray) -> HeldOut:
    """Read the held-out dreams off the sleep set; constants."""
    psi = dreams.psi
    parts = jnp.broadcast_to(-psi[train, None], (len(train), len(held)))
    truth = -psi[held]
    for term in dreams.terms:
        alike = len(term.natural) == 1
        statistics = term.dreams(held)
        of_train = term.natural if alike else term.natural[train]
        of_held = term.natural if alike else term.natural[held]
        parts = parts + of_train @ statistics.T
        truth = truth + (of_held * statistics).sum(1)
    found = HeldOut(dreams.inputs[train], dreams.inputs[held], parts, truth)
    return lax.stop_gradient(found)
