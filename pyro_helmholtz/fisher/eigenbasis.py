"""The eigenbasis that all units of a layer share: preconditioner, and Kronecker-like inverse."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .solvers import Operator

SMALL = 64  # no band below this size
WIDE = 2048  # running means of layers with more inputs are of low rank
RANK = 256  # so many eigenvalues then
GRID = 1.1  # between the scales at which the band is another


@dataclass
class _Band:
    """What an inverse needs beside the scales.

    Attributes:
        key: the ratio of scale to damping, and the slack, that it was made for.
        middle: of the band. values, vectors: outside it; vectors is None without a band.
    """

    key: tuple[float, float]
    middle: float
    values: Tensor
    vectors: Tensor | None


@dataclass
class EigenBasis:
    """The eigenbasis of a layer's mean block ``C = Uᵀ diag(q̄) U / Σ q̄``.

    ``P_j⁻¹ = V diag(1/(α + s_j λ)) Vᵀ`` with the unit's scale ``s_j = Σ_n Q_nj``; for coupled
    units ``s_j`` is a (d, d) matrix with an eigenbasis of its own.

    Attributes:
        values, vectors: (rank,), (size, rank), ascending; other eigenvalues are zero.
    """

    values: Tensor
    vectors: Tensor
    _kept: _Band | None = field(default=None, repr=False, compare=False)

    @classmethod
    def of(cls, mean_block: Tensor) -> EigenBasis:
        """Of a symmetric mean block, (size, size)."""
        values, vectors = symmetric_eigenvectors(mean_block)
        return cls(values.clamp(min=0), vectors)

    @classmethod
    def of_factor(cls, rows: Tensor) -> EigenBasis:
        """Of the mean block ``rowsᵀrows``, from fewer rows than columns, (rank, size)."""
        values, left = symmetric_eigenvectors(rows @ rows.t())
        tiny = values[-1].clamp(min=1e-30) * torch.finfo(values.dtype).eps * len(values)
        keep = values > tiny
        values, left = values[keep], left[:, keep]
        return cls(values, (rows.t() @ left) / values.sqrt())

    @classmethod
    def of_features(cls, diagonal: Tensor) -> EigenBasis:
        """Of the mean block's diagonal alone, (size,)."""
        values, order = diagonal.sort()
        return cls(values, torch.eye(len(values)).to(values)[:, order])

    def inverse(self, scales: Tensor, damping: float, slack: float) -> Operator:
        """``P_j⁻¹`` as a function of (units, d·size).

        Eigenvalues in a band that the damping hardly tells apart count as one: then the
        inverse is a multiple of the identity but for the others, and costs
        units·size·others instead of units·size².

        Args:
            scales: (units,) or (units, d, d). damping: α > 0.
            slack: largest relative change of ``1/(α + s λ)`` by the band.
        """
        if scales.ndim == 3:
            return self._coupled(scales, damping, slack)
        size, rank = self.vectors.shape
        if size == rank and rank <= SMALL:
            return self._whole(scales, damping)
        band = self._outside(float(scales.max()), damping, slack)
        if band.vectors is None:
            return self._whole(scales, damping)
        vectors = band.vectors
        rest = 1 / (damping + scales[:, None] * band.middle)
        change = torch.outer(scales, band.values).add_(damping).reciprocal_().sub_(rest)
        return lambda g: (g * rest).addmm_((g @ vectors).mul_(change), vectors.t())

    def _whole(self, scales: Tensor, damping: float) -> Operator:
        """The inverse without a band, of full rank."""
        inverse = torch.outer(scales, self.values).add_(damping).reciprocal_()
        return lambda g: (g @ self.vectors).mul_(inverse) @ self.vectors.t()

    def _outside(self, scale: float, damping: float, slack: float) -> _Band:
        """What stands outside the band, kept until the band is another."""
        key = (_above(scale / damping), slack)
        if self._kept is None or self._kept.key != key:
            self._kept = self._split(key, *self._band(scale, damping, slack))
        return self._kept

    def _split(self, key: tuple[float, float], low: int, high: int) -> _Band:
        size, rank = self.vectors.shape
        if size == rank and 2 * (high - low) <= rank:
            return _Band(key, 0.0, self.values, None)
        if high == low:
            return _Band(key, 0.0, self.values, self.vectors)
        middle = float(self.values[low] + self.values[high - 1]) / 2
        values = torch.cat([self.values[:low], self.values[high:]])
        vectors = torch.cat([self.vectors[:, :low], self.vectors[:, high:]], 1)
        return _Band(key, middle, values, vectors)

    def __getstate__(self) -> dict[str, Any]:
        """Without what can be had again."""
        return self.__dict__ | {"_kept": None}

    def _band(self, scale: float, damping: float, slack: float) -> tuple[int, int]:
        """First and last plus one of the most eigenvalues that may count as one.

        ``s (λ₂ − λ₁)/2 ≤ slack (α + s (λ₂ + λ₁)/2)``. Below full rank the zeros are among them,
        and stay zeros.
        """
        size, rank = self.vectors.shape
        ratio = _above(scale / damping)
        if size > rank or rank <= SMALL or not 0 < slack < 1 or not ratio:
            return 0, 0
        top = 2 * slack / ratio + (1 + slack) * self.values
        top /= 1 - slack
        ends = torch.searchsorted(self.values, top, right=True)
        starts = torch.arange(len(ends), device=ends.device)
        low = int((ends - starts).argmax())
        return low, int(ends[low])

    def _coupled(self, scales: Tensor, damping: float, slack: float) -> Operator:
        """Turn the components of each unit into their own eigenbasis, and treat them apart."""
        inner, turn = symmetric_eigenvectors(scales)
        units, d = inner.shape
        apart = self.inverse(inner.clamp(min=0).reshape(-1), damping, slack)

        def apply(g: Tensor) -> Tensor:
            turned = turn.transpose(1, 2) @ g.reshape(units, d, -1)
            return (turn @ apart(turned.reshape(units * d, -1)).reshape(units, d, -1)).reshape(
                g.shape
            )

        return apply


def _above(ratio: float) -> float:
    """The next larger ratio of a grid: a band that holds for it holds for all below it."""
    return GRID ** math.ceil(math.log(ratio, GRID)) if 0 < ratio < math.inf else 0.0


def symmetric_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, ascending.

    Computed in float64: in float32 the host's ``eigh`` can give NaN without an error for
    matrices of low rank, such as pixels that are always dark make them.
    """
    double = matrix.cpu() if matrix.device.type == "mps" else matrix
    values, vectors = torch.linalg.eigh(double.double())
    return values.to(matrix), vectors.to(matrix)
