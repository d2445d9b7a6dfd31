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
        with torch.no_grad():
            for name in list(self._means):
                if name in leaves and _equal(leaves[name], self._means[name]):
                    leaves[name].copy_(self._points[name])
                else:
                    self._forget(name)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, mean in self._means.items():
                    self._points[name].copy_(leaves[name])
                    leaves[name].copy_(mean)

    def _forget(self, name: str) -> None:
        del self._points[name], self._means[name], self._updates[name]

    def take_in(self, leaves: Mapping[str, Tensor]) -> None:
        """Take the parameters that an update has changed into the means."""
        for name, leaf in leaves.items():
            point = leaf.detach()
            if name not in self._means:
                self._points[name], self._means[name] = point.clone(), point.clone()
                self._updates[name] = 0
            self._means[name].lerp_(point, WINDOW / (WINDOW + self._updates[name]))
            self._updates[name] += 1

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


def _equal(leaf: Tensor, mean: Tensor) -> bool:
    alike = (leaf.shape, leaf.dtype, leaf.device) == (mean.shape, mean.dtype, mean.device)
    return alike and torch.equal(leaf, mean)
