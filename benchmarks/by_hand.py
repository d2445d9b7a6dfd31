"""Reweighted wake-sleep on a sigmoid belief network, by hand in plain torch: the yardstick."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def make_layers(
    widths: Sequence[int], device: str | torch.device = "cpu"
) -> tuple[nn.ModuleList, nn.Parameter, nn.ModuleList]:
    """Makes the parameters of a sigmoid belief network and of its recognition network.

    Args:
        widths: the numbers of units, visible layer first.
        device: where the parameters live.

    Returns:
        The generative layers, ``down[i]`` from layer i + 1 to layer i; the logits of the top
        layer's prior, shape ``(widths[-1],)``; the recognition layers, ``up[i]`` from layer i to
        layer i + 1.
    """
    pairs = list(zip(widths[:-1], widths[1:], strict=True))
    down = nn.ModuleList(nn.Linear(above, below) for below, above in pairs)
    up = nn.ModuleList(nn.Linear(below, above) for below, above in pairs)
    return down.to(device), nn.Parameter(torch.zeros(widths[-1], device=device)), up.to(device)


class ByHand:
    """One RWS step, the best that straightforward torch does.

    Directions are means over data: wake-theta ``sum_s w grad log p``, wake-phi
    ``sum_s (w - 1/S) grad log q``, sleep-phi on B dreams, and phi half of each.

    Args:
        widths: the numbers of units, visible layer first.
        num_particles: the number S of particles for each datum.
        lr: the rate of gradient ascent.
        device: where everything runs.
    """

    def __init__(
        self,
        widths: Sequence[int],
        num_particles: int = 10,
        lr: float = 2e-3,
        device: str | torch.device = "cpu",
    ):
        self.num_particles = num_particles
        self.down, self.prior, self.up = make_layers(widths, device)
        params = [*self.down.parameters(), self.prior, *self.up.parameters()]
        self.optim = torch.optim.SGD(params, lr=lr)

    def step(self, x: Tensor) -> float:
        """Takes one step on ``x``, shape ``(B, visible)``; returns minus the bound's sum."""
        loss, objective = self.objective(x)
        self.optim.zero_grad(set_to_none=True)
        objective.backward()
        self.optim.step()
        return loss.item()

    def objective(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and the scalar whose gradient is minus the directions of ascent."""
        size, n = self.num_particles, len(x)

        # Wake: the first recognition layer is computed once for each datum.
        logits = self.up[0](x).expand(size, -1, -1)
        hidden: list[Tensor] = []
        log_q = x.new_zeros(())
        for i in range(len(self.up)):
            if i:
                logits = self.up[i](hidden[-1])
            with torch.no_grad():
                h = (torch.rand_like(logits) < logits.sigmoid()).to(logits.dtype)
            hidden.append(h)
            log_q = log_q + log_bernoulli(logits, h)
        log_p = log_bernoulli(self.prior.expand_as(hidden[-1]), hidden[-1])
        for i in range(len(self.down)):
            below = hidden[i - 1] if i else x.expand(size, -1, -1)
            log_p = log_p + log_bernoulli(self.down[i](hidden[i]), below)
        with torch.no_grad():
            log_w = log_p - log_q
            weights = log_w.softmax(0)
            loss = (math.log(size) - log_w.logsumexp(0)).sum()
        wake_theta = (weights * log_p).sum() / n
        wake_phi = ((weights - 1 / size) * log_q).sum() / n

        # Sleep: as many dreams as data.
        with torch.no_grad():
            logits = self.prior.expand(n, -1)
            dream = [torch.bernoulli(logits.sigmoid())]
            for layer in reversed(self.down):
                dream.append(torch.bernoulli(layer(dream[-1]).sigmoid()))
            dream.reverse()
        sleep_phi = torch.zeros((), device=x.device)
        for layer, below, above in zip(self.up, dream[:-1], dream[1:], strict=True):
            sleep_phi = sleep_phi + log_bernoulli(layer(below), above).sum()
        return loss, -(wake_theta + 0.5 * (wake_phi + sleep_phi / n))


def log_bernoulli(logits: Tensor, value: Tensor) -> Tensor:
    """The log-probability of ``value``, summed over the last dimension."""
    return -F.binary_cross_entropy_with_logits(logits, value, reduction="none").sum(-1)
