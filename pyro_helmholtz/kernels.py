"""Kernels on observations, for the regressions of amortised learning by wake-sleep.

A kernel is any callable ``k(x, y)`` of two matrices ``(n, d)`` and ``(m, d)`` that returns the
matrix ``(n, m)``. ``GaussianKernel`` is the one of Wenliang et al. (2020, appendix B.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .options import check_counts

Kernel = Callable[[Tensor, Tensor], Tensor]
MEDIAN_ROWS = 500
TINY_DEVIATION = 1e-6


class LinearFeatures(nn.Module):
    """A linear projection ``x @ W``, random at first; ``adapt`` learns it.

    Args:
        dim: number of features. ``W`` has shape (inputs, dim) and entries N(0, 1/inputs),
            drawn when the first inputs are seen.

    Raises:
        ValueError: ``dim`` below 1.
    """

    weight: nn.Parameter | None

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_counts(dim=dim)
        self.dim = dim
        self.register_parameter("weight", None)

    def forward(self, x: Tensor) -> Tensor:
        """(n, inputs) -> (n, dim)."""
        if self.weight is None:
            draw = torch.randn(x.shape[1], self.dim, dtype=x.dtype, device=x.device)
            self.weight = nn.Parameter(draw / math.sqrt(x.shape[1]))
        return x @ self.weight

    def _load_from_state_dict(self, state: dict, prefix: str, *rest: Any) -> None:
        saved = state.get(prefix + "weight")
        if saved is None:
            self.weight = None  # a state of before the first inputs
        elif self.weight is None:
            self.weight = nn.Parameter(torch.empty_like(saved))
        super()._load_from_state_dict(state, prefix, *rest)


class GaussianKernel:
    """``k(x, y) = exp(−½ |φ(x) − φ(y)|² / σ²)``.

    Args:
        bandwidth: σ > 0. None: the median of the positive distances between the features of
            the first sleep set (of at most 500 of them; 1 if all are alike). It stays there
            unless it is adapted.
        features: φ, a callable from (n, d) to (n, p); None is the identity. The parameters of
            an ``nn.Module`` are adapted with the bandwidth.
        standardise: divide each feature by its standard deviation over the first argument,
            which is the sleep set (batch normalisation). Deviations below 1e-6 of the largest
            count as 1.

    Raises:
        ValueError: a bandwidth that is not positive. TypeError: features that are no callable.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        features: Callable[[Tensor], Tensor] | None = None,
        standardise: bool = False,
    ) -> None:
        if bandwidth is not None and not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ValueError(f"bandwidth must be positive, got {bandwidth!r}.")
        if features is not None and not callable(features):
            raise TypeError(f"features must be callable, got {type(features).__name__}.")
        self.features, self.standardise = features, standardise
        self.log_bandwidth: Tensor | None = None
        self._prepared = False
        if bandwidth is not None:
            self.log_bandwidth = _scalar(math.log(bandwidth))

    def prepare(self, x: Tensor) -> None:
        """Set what the first sleep set (n, d) decides: the projection and the bandwidth."""
        if self._prepared:
            return
        self._prepared = True
        rows = x[spread(min(len(x), MEDIAN_ROWS), len(x), x.device)]
        with torch.no_grad():
            phi = self.embed(rows, rows)[0]
            if self.log_bandwidth is None:
                self.log_bandwidth = _scalar(math.log(median_distance(phi)))

    def embed(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        """Features of all arguments, centred (and scaled) by those of the first."""
        maps = [x, *others] if self.features is None else [self.features(v) for v in (x, *others)]
        for phi, given in zip(maps, (x, *others), strict=True):
            if phi.ndim != 2 or len(phi) != len(given):
                raise ValueError(
                    f"the kernel's features must map {tuple(given.shape)} to one row per input, "
                    f"got shape {tuple(phi.shape)}."
                )
        mean = maps[0].mean(0)
        maps = [phi - mean for phi in maps]
        if not self.standardise:
            return maps
        scale = deviation(maps[0])
        return [phi / scale for phi in maps]

    def scaled(self, x: Tensor, *others: Tensor) -> list[Tensor]:
        """``φ / σ`` of all arguments, centred by those of the first."""
        if self.log_bandwidth is None:
            self.prepare(x)
        assert self.log_bandwidth is not None
        factor = (-self.log_bandwidth).exp().to(x.device)
        return [phi * factor for phi in self.embed(x, *others)]

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        """(n, d), (m, d) -> (n, m)."""
        return _gaussian(*self.scaled(x, y))

    def grams(self, x: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """``k(x, x)`` and ``k(x, targets)``; the features of ``x`` are computed once."""
        a, b = self.scaled(x, targets)
        return _gaussian(a, a), _gaussian(a, b)

    @property
    def bandwidth(self) -> float:
        """σ; NaN before the first sleep set where it was left open."""
        return math.nan if self.log_bandwidth is None else math.exp(self.log_bandwidth.item())

    def parameters(self) -> dict[str, Tensor]:
        """What can be adapted: the log-bandwidth and the parameters of the features."""
        found = {} if self.log_bandwidth is None else {"log_bandwidth": self.log_bandwidth}
        if isinstance(self.features, nn.Module):
            for name, leaf in self.features.named_parameters():
                if leaf.requires_grad:
                    found[f"features.{name}"] = leaf
        return found

    def state_dict(self) -> dict[str, Any]:
        """The bandwidth and the features' state."""
        log_bandwidth = self.log_bandwidth
        state: dict[str, Any] = {
            "log_bandwidth": None if log_bandwidth is None else log_bandwidth.item()
        }
        if isinstance(self.features, nn.Module):
            state["features"] = {k: v.clone() for k, v in self.features.state_dict().items()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        saved = state["log_bandwidth"]
        if saved is not None and self.log_bandwidth is None:
            self.log_bandwidth = _scalar(saved)
        elif saved is not None and self.log_bandwidth is not None:
            with torch.no_grad():
                self.log_bandwidth.fill_(saved)
        else:
            self.log_bandwidth, self._prepared = None, False
        if isinstance(self.features, nn.Module):
            self.features.load_state_dict(state["features"])


def median_distance(phi: Tensor) -> float:
    """The median of the positive distances between the rows; 1 if there are none."""
    distances = torch.nn.functional.pdist(phi)
    positive = distances[distances > 0]
    return float(positive.median()) if len(positive) else 1.0


def deviation(phi: Tensor) -> Tensor:
    """Standard deviations of the columns; 1 where a column hardly varies."""
    variance = phi.var(0, unbiased=False)
    still = variance <= TINY_DEVIATION**2 * variance.max()
    return torch.where(still, torch.ones_like(variance), variance).sqrt()


def spread(count: int, total: int, device: Any = None) -> Tensor:
    """``count`` indices spread evenly over ``range(total)``."""
    return torch.arange(count, device=device) * total // count


def _scalar(value: float) -> Tensor:
    return torch.tensor(float(value), dtype=torch.float64, requires_grad=True)


def _gaussian(a: Tensor, b: Tensor) -> Tensor:
    """``exp(−½ |a_i − b_j|²)``, by one matrix product."""
    inner = torch.addmm(a.square().sum(1, keepdim=True), a, b.T, alpha=-2.0)
    return (inner + b.square().sum(1)).clamp(min=0).mul(-0.5).exp()


__all__ = ["GaussianKernel", "LinearFeatures"]
