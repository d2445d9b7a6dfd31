"""Kernels on observations, for the regressions of amortised learning by wake-sleep.

A kernel is any callable ``k(x, y)`` of two matrices ``(n, d)`` and ``(m, d)`` that returns the
matrix ``(n, m)``. ``GaussianKernel`` is the one of Wenliang et al. (2020, appendix B.2). A kernel
with parameters of its own has ``init(rng_key, x) -> params`` and takes them as a third argument.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, random

from .options import check_counts

Params = dict[str, Any]
Kernel = Callable[..., Array]
MEDIAN_ROWS = 500
TINY_DEVIATION = 1e-6


class LinearFeatures:
    """A linear projection ``x @ W``, random at first; ``adapt`` learns it.

    Args:
        dim: number of features. ``W`` has shape (inputs, dim) and entries N(0, 1/inputs).

    Raises:
        ValueError: ``dim`` below 1.
    """

    def __init__(self, dim: int) -> None:
        check_counts(dim=dim)
        self.dim = dim

    def init(self, rng_key: Array, x: Array) -> Params:
        """``{"weight": W}`` for inputs x (n, inputs)."""
        draw = random.normal(rng_key, (x.shape[1], self.dim), x.dtype)
        return {"weight": draw / math.sqrt(x.shape[1])}

    def apply(self, params: Params, x: Array) -> Array:
        """(n, inputs) -> (n, dim)."""
        return x @ params["weight"]


class GaussianKernel:
    """``k(x, y) = exp(−½ |φ(x) − φ(y)|² / σ²)``.

    Args:
        bandwidth: σ > 0. None: the median of the positive distances between the features of
            the first sleep set (of at most 500 of them; 1 if all are alike). It stays there
            unless it is adapted.
        features: φ, from (n, d) to (n, p); None is the identity. An object with
            ``init(rng_key, x) -> params`` and ``apply(params, x)``, such as ``LinearFeatures``
            or a flax.linen module, is adapted with the bandwidth; any other callable is fixed.
        standardise: divide each feature by its standard deviation over the first argument,
            which is the sleep set (batch normalisation). Deviations below 1e-6 of the largest
            count as 1.

    Raises:
        ValueError: a bandwidth that is not positive. TypeError: features that are no callable.
    """

    def __init__(
        self,
        bandwidth: float | None = None,
        features: Any = None,
        standardise: bool = False,
    ) -> None:
        if bandwidth is not None and not (bandwidth > 0 and math.isfinite(bandwidth)):
            raise ValueError(f"bandwidth must be positive, got {bandwidth!r}.")
        if not (features is None or callable(features) or is_module(features)):
            raise TypeError(f"features must be callable, got {type(features).__name__}.")
        self.bandwidth, self.features, self.standardise = bandwidth, features, standardise

    def init(self, rng_key: Array, x: Array) -> Params:
        """What a first sleep set (n, d) decides, all of which can be adapted.

        Returns:
            ``"log_bandwidth"`` and, where φ has any, the parameters ``"features"``.
        """
        params: Params = {}
        if is_module(self.features):
            params["features"] = self.features.init(rng_key, x)
        if self.bandwidth is None:
            rows = x[spread(min(len(x), MEDIAN_ROWS), len(x))]
            bandwidth = median_distance(self.embed(params, rows)[0])
        else:
            bandwidth = jnp.asarray(self.bandwidth, x.dtype)
        return {"log_bandwidth": jnp.log(bandwidth), **params}

    def embed(self, params: Params, x: Array, *others: Array) -> list[Array]:
        """Features of all arguments, centred (and scaled) by those of the first.

        Raises:
            ValueError: features of another shape than (rows, p).
        """
        maps = [self._map(params, value) for value in (x, *others)]
        mean = maps[0].mean(0)
        maps = [phi - mean for phi in maps]
        if not self.standardise:
            return maps
        scale = deviation(maps[0])
        return [phi / scale for phi in maps]

    def _map(self, params: Params, x: Array) -> Array:
        if self.features is None:
            return x
        module = is_module(self.features)
        phi = self.features.apply(params["features"], x) if module else self.features(x)
        if phi.ndim != 2 or len(phi) != len(x):
            raise ValueError(
                f"the kernel's features must map {x.shape} to one row per input, "
                f"got shape {phi.shape}."
            )
        return phi

    def scaled(self, params: Params, x: Array, *others: Array) -> list[Array]:
        """``φ / σ`` of all arguments, centred by those of the first."""
        factor = jnp.exp(-params["log_bandwidth"])
        return [phi * factor.astype(phi.dtype) for phi in self.embed(params, x, *others)]

    def grams(self, x: Array, targets: Array, params: Params) -> tuple[Array, Array]:
        """``k(x, x)`` and ``k(x, targets)``; the features of ``x`` are computed once."""
        a, b = self.scaled(params, x, targets)
        return _gaussian(a, a), _gaussian(a, b)

    def __call__(self, x: Array, y: Array, params: Params | None = None) -> Array:
        """(n, d), (m, d) -> (n, m); without ``params`` those that ``init`` gives for x."""
        params = self.init(random.key(0), x) if params is None else params
        return _gaussian(*self.scaled(params, x, y))


def is_module(features: Any) -> bool:
    """Whether a map has parameters: ``init(rng_key, x)`` and ``apply(params, x)``."""
    return all(callable(getattr(features, name, None)) for name in ("init", "apply"))


def median_distance(phi: Array) -> Array:
    """The (lower) median of the positive distances between the rows; 1 if there are none."""
    first, second = np.triu_indices(len(phi), 1)
    squares = jnp.square(phi).sum(1)
    squared = squares[:, None] + squares - 2 * phi @ phi.T
    # Round-off of the matrix product: nothing below it is a distance.
    noise = 8 * jnp.finfo(phi.dtype).eps * jnp.max(squares, initial=0.0)
    found = jnp.sort(jnp.where(squared > noise, squared, jnp.inf)[first, second])
    count = jnp.isfinite(found).sum()
    middle = found[jnp.maximum((count - 1) // 2, 0)] if len(found) else jnp.inf
    return jnp.where(count > 0, jnp.sqrt(middle), 1.0).astype(phi.dtype)


def deviation(phi: Array) -> Array:
    """Standard deviations of the columns; 1 where a column hardly varies."""
    variance = phi.var(0)
    still = variance <= TINY_DEVIATION**2 * variance.max()
    return jnp.sqrt(jnp.where(still, 1.0, variance))


def spread(count: int, total: int) -> np.ndarray:
    """``count`` indices spread evenly over ``range(total)``."""
    return np.arange(count) * total // count


def _gaussian(a: Array, b: Array) -> Array:
    """``exp(−½ |a_i − b_j|²)``, by one matrix product."""
    squared = jnp.square(a).sum(1)[:, None] + jnp.square(b).sum(1) - 2 * a @ b.T
    return jnp.exp(-0.5 * jax.nn.relu(squared))


__all__ = ["GaussianKernel", "LinearFeatures"]
