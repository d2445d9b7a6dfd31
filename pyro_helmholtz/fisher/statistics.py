"""Running means of a layer: what the Kronecker form and the preconditioner are made of."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import eigenbasis
from .blocks import UnitBlock, mean_scale
from .eigenbasis import EigenBasis, symmetric_eigenvectors

WARM_UP = 16  # batches that the mean blocks take in each
INTERVAL = 32  # batches at least from one eigenbasis to the next
RARELY = 128  # the same where it is but a preconditioner: it may be older


@dataclass
class Statistics:
    """Running means of one layer: its mean block, its units' scales, their eigenbasis.

    A layer with more than ``eigenbasis.WIDE`` inputs keeps the ``eigenbasis.RANK`` largest
    eigenvalues of its mean block instead of the block, which would have too many numbers.

    Attributes:
        mean: (fan-in, fan-in), or its factor (rank, fan-in) with ``meanᵀmean`` the block.
        scales: as ``UnitBlock.unit_scales``. basis: of the mean.
        updates: how many batches came. every: the mean block, dearer than the scales, takes in
            every so many of them. least: batches at least from one eigenbasis to the next.
    """

    mean: Tensor
    scales: Tensor
    basis: EigenBasis
    updates: int = 1
    every: int = 1
    least: int = INTERVAL

    @classmethod
    def of(cls, block: UnitBlock, every: int = 1, least: int = INTERVAL) -> Statistics:
        """Statistics of a layer's first batch."""
        scales = block.unit_scales()
        mean = compressed(block.root()) if block.fan_in > eigenbasis.WIDE else block.mean_block()
        return cls(mean, scales, _basis(mean, scales), every=every, least=least)

    @property
    def fan_in(self) -> int:
        """Number of features."""
        return self.mean.shape[1]

    @property
    def low_rank(self) -> bool:
        """Whether a factor stands for the mean block."""
        return self.fan_in > eigenbasis.WIDE

    def update(self, block: UnitBlock, decay: float) -> None:
        """Take in a batch; the mean and its eigenbasis are renewed on a schedule."""
        keep = min(decay, self.updates / (self.updates + 1))
        self.scales = self.scales.lerp(block.unit_scales(), 1 - keep)
        self.updates += 1
        if self.updates <= WARM_UP:
            self._take_in(block, keep)
        elif self.updates % self.every == 0:
            self._take_in(block, keep**self.every)
        if self._due():
            self.basis = _basis(self.mean, self.scales)

    def _take_in(self, block: UnitBlock, keep: float) -> None:
        if self.low_rank:
            both = [self.mean * keep**0.5, block.root() * (1 - keep) ** 0.5]
            self.mean = compressed(torch.cat(both))
        else:
            rows = block.root()
            self.mean = torch.addmm(self.mean, rows.t(), rows, beta=keep, alpha=1 - keep)

    def _due(self) -> bool:
        """After 1, 2, 4, … batches, then every so often: the wider the layer, the rarer."""
        interval = max(self.least, min(self.mean.shape) * self.every // 16)
        if self.updates < interval:
            return self.updates & (self.updates - 1) == 0
        return self.updates % interval == 0


def compressed(rows: Tensor) -> Tensor:
    """A factor of at most ``RANK`` rows with nearly the same ``rowsᵀrows``: the largest part."""
    if len(rows) <= eigenbasis.RANK:
        return rows
    _, vectors = symmetric_eigenvectors(rows @ rows.t())
    return vectors[:, -eigenbasis.RANK :].t() @ rows


def _basis(mean: Tensor, scales: Tensor) -> EigenBasis:
    """Of the mean block or its factor, divided by the units' scales."""
    total = mean_scale(scales)
    if mean.shape[0] == mean.shape[1]:
        return EigenBasis.of(mean / total)
    return EigenBasis.of_factor(mean / total.sqrt())
