"""The eigenbasis that all units of a layer share: preconditioner, and Kronecker-like inverse."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .solvers import Operator

SMALL = 64  # no band below this size
WIDE = 2048  # running means of layers with more inputs are of low rank
RANK = 256  # so many eigenvalues then


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
        low, high = self._band(float(scales.max()), damping, slack)
        column = scales[:, None]
        size, rank = self.vectors.shape
        if size == rank and 2 * (high - low) <= rank:
            full = 1 / (damping + column * self.values)
            return lambda g: ((g @ self.vectors) * full) @ self.vectors.t()
        middle = (self.values[low] + self.values[high - 1]) / 2 if high > low else 0.0
        rest = 1 / (damping + column * middle)
        values = torch.cat([self.values[:low], self.values[high:]])
        vectors = torch.cat([self.vectors[:, :low], self.vectors[:, high:]], 1)
        change = 1 / (damping + column * values) - rest
        return lambda g: torch.addmm(g * rest, (g @ vectors) * change, vectors.t())

    def _band(self, scale: float, damping: float, slack: float) -> tuple[int, int]:
        """First and last plus one of the most eigenvalues that may count as one.

        ``s (λ₂ − λ₁)/2 ≤ slack (α + s (λ₂ + λ₁)/2)``. Below full rank the zeros are among them,
        and stay zeros.
        """
        size, rank = self.vectors.shape
        if size > rank or rank <= SMALL or not 0 < slack < 1 or scale <= 0:
            return 0, 0
        top = (2 * slack * damping / scale + (1 + slack) * self.values) / (1 - slack)
        ends = torch.searchsorted(self.values, top, right=True)
        starts = torch.arange(len(ends), device=ends.device)
        low = int((ends - starts).argmax())
        return low, int(ends[low])

    def _coupled(self, scales: Tensor, damping: float, slack: float) -> Operator:
        """Turn the components of each unit into their own eigenbasis, and treat them apart."""
        inner, turn = torch.linalg.eigh(scales)
        units, d = inner.shape
        apart = self.inverse(inner.clamp(min=0).reshape(-1), damping, slack)

        def apply(g: Tensor) -> Tensor:
            turned = turn.transpose(1, 2) @ g.reshape(units, d, -1)
            return (turn @ apart(turned.reshape(units * d, -1)).reshape(units, d, -1)).reshape(
                g.shape
            )

        return apply


def symmetric_eigenvectors(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, ascending.

    Computed in float64: in float32 the host's ``eigh`` can give NaN without an error for
    matrices of low rank, such as pixels that are always dark make them.
    """
    double = matrix.cpu() if matrix.device.type == "mps" else matrix
    values, vectors = torch.linalg.eigh(double.double())
    return values.to(matrix), vectors.to(matrix)
