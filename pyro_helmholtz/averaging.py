"""Means of the parameters over the updates (Polyak and Juditsky 1992).

Stochastic ascent at a constant rate ends in a cloud around the optimum, the wider the larger the
rate. The mean of the cloud is nearer to the optimum than any point of it, so that the rate may
stay large. Between updates Pyro's store holds the means, which is what everybody reads; an
update goes on from the point where the last one ended.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pyro
import torch
from torch import Tensor

WINDOW = 10


class Average:
    """The mean of every parameter's unconstrained value, of late updates above all.

    ``x̄ ← x̄ + (x − x̄) w/(w + t)`` after t updates, with w = 10: polynomial-decay averaging
    (Shamir and Zhang 2013, section 4), in which about the last tenth of all updates counts.
    A parameter that something else has changed between two updates goes on from there, and its
    mean starts anew.
    """

    def __init__(self) -> None:
        self._points: dict[str, Tensor] = {}  # where the last update ended
        self._means: dict[str, Tensor] = {}
        self._updates: dict[str, int] = {}

    @contextmanager
    def points(self) -> Iterator[None]:
        """Have the points in Pyro's store, and the means again afterwards, come what may."""
        leaves = pyro.get_param_store()._params
        for name in list(self._means):
            if not (name in leaves and _equal(leaves[name], self._means[name])):
                self._forget(name)
        used = {name: leaves[name] for name in self._means}
        _copy(used, self._points)
        try:
            yield
        finally:
            used = {name: leaves[name] for name in self._means}
            _copy(self._points, used)
            _copy(used, self._means)

    def _forget(self, name: str) -> None:
        del self._points[name], self._means[name], self._updates[name]

    def take_in(self, leaves: Mapping[str, Tensor]) -> None:
        """Take the parameters that an update has changed into the means."""
        alike: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        for name, leaf in leaves.items():
            point = leaf.detach()
            if name not in self._means:
                self._points[name], self._means[name] = point.clone(), point.clone()
                self._updates[name] = 0
            means, points = alike.setdefault(self._updates[name], ([], []))
            means.append(self._means[name])
            points.append(point)
            self._updates[name] += 1
        for updates, (means, points) in alike.items():
            torch._foreach_lerp_(means, points, WINDOW / (WINDOW + updates))

    def state(self) -> dict[str, Any]:
        """What the next update depends on, beside the means, which are in Pyro's store."""
        return {
            "points": {name: point.clone() for name, point in self._points.items()},
            "updates": dict(self._updates),
        }

    def load(self, state: Mapping[str, Any], means: Mapping[str, Tensor]) -> None:
        """Go on from a saved state and the saved parameters."""
        self._points = {name: point.clone() for name, point in state["points"].items()}
        self._means = {name: means[name].clone() for name in self._points}
        self._updates = dict(state["updates"])


def _copy(to: Mapping[str, Tensor], source: Mapping[str, Tensor]) -> None:
    """Copy tensors of the same names in one go."""
    if to:
        with torch.no_grad():
            torch._foreach_copy_(list(to.values()), [source[name] for name in to])


def _equal(leaf: Tensor, mean: Tensor) -> bool:
    alike = (leaf.shape, leaf.dtype, leaf.device) == (mean.shape, mean.dtype, mean.device)
    return alike and torch.equal(leaf, mean)
