"""Dreams that the regression of ALWS is not fitted to, and its error on them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..kernels import spread
from .sleep_set import SleepSet


@dataclass
class HeldOut:
    """Dreams that the regression is not fitted to, and what it predicts for them.

    ``Ĵ(x_l) = Σ_n A_nl Q_nl`` with ``Q_nl = η_n·s(x_l) − Ψ_n`` against ``η_l·s(x_l) − Ψ_l``.

    Attributes:
        inputs: of the training dreams, (N, d). targets: of the held-out ones, (L, d).
        parts: Q, (N, L). truth: (L,).
    """

    inputs: Tensor
    targets: Tensor
    parts: Tensor
    truth: Tensor

    def error(self, weights: Tensor) -> Tensor:
        """The mean squared error of the weights (N, L), over the truth's variance."""
        squares = ((weights * self.parts).sum(0) - self.truth).square().mean()
        return squares / self.truth.var(unbiased=False).clamp(min=1e-30)


def split_rows(total: int, num_sleep: int, held_out: int, device: Any) -> tuple[Tensor, Tensor]:
    """The rows of the training and of the held-out dreams, both spread evenly over ``total``."""
    count = num_sleep + held_out
    chosen = spread(count, total, device)
    if not held_out:
        return chosen, chosen[:0]
    places = (2 * torch.arange(held_out, device=device) + 1) * count
    held = torch.zeros(count, dtype=torch.bool, device=device)
    held[places // (2 * held_out)] = True
    return chosen[~held], chosen[held]


def held_out_dreams(dreams: SleepSet, train: Tensor, held: Tensor) -> HeldOut:
    """Read the held-out dreams off the sleep set; constants."""
    psi = dreams.psi.detach()
    parts = -psi[train, None].expand(-1, len(held))
    truth = -psi[held]
    for term in dreams.terms:
        natural, statistics = term.natural.detach(), term.dreams(held)
        of_train = natural[train] if len(natural) > 1 else natural
        of_held = natural[held] if len(natural) > 1 else natural
        parts = parts + of_train @ statistics.T
        truth = truth + (of_held * statistics).sum(1)
    return HeldOut(dreams.inputs[train], dreams.inputs[held], parts, truth)
