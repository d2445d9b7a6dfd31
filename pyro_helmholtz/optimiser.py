"""Step Pyro's optimisers for all parameters at once.

``PyroOptim`` keeps one torch optimiser per parameter and steps them one by one, which for a
deep program takes longer than the arithmetic. Where all of them are alike, one optimiser over
all parameters steps instead. It works on the very state of the single ones, so that Pyro's
``get_state`` and ``save`` see every change and the result is the same.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor
from torch.optim import Optimizer


class JointStep:
    """One step of a ``PyroOptim`` on parameters whose ``.grad`` is set.

    Schedulers, clipping and settings that differ between parameters are left to the host.
    """

    def __init__(self) -> None:
        self._joint: Optimizer | None = None

    def __call__(self, optim: PyroOptim, leaves: list[Tensor]) -> None:
        """Step on ``leaves``, once each."""
        options = _common_options(optim, leaves)
        if options is None:
            optim(leaves)
            return
        objects = optim.optim_objs
        joint = self._joint
        if joint is None or type(joint) is not type(objects[leaves[0]]):
            joint = self._joint = type(objects[leaves[0]])(leaves)
        joint.param_groups[0].update(options, params=leaves)
        joint.state.clear()
        for leaf in leaves:
            if known := objects[leaf].state.get(leaf):
                joint.state[leaf] = known
        joint.step()
        for leaf, state in joint.state.items():
            if state:
                objects[leaf].state[leaf] = state


def _common_options(optim: PyroOptim, leaves: list[Tensor]) -> dict[str, Any] | None:
    """The settings that all leaves share, or None where the host must step them."""
    objects = optim.optim_objs
    common: dict[str, Any] | None = None
    for leaf in leaves:
        known = objects.get(leaf)
        if known is None or type(known) not in _ALIKE or optim.grad_clip[leaf] is not None:
            return None
        if len(known.param_groups) != 1:
            return None
        options = {k: v for k, v in known.param_groups[0].items() if k != "params"}
        if common is None:
            common = options
        elif options != common or type(known) is not type(objects[leaves[0]]):
            return None
    return common


_ALIKE = (
    torch.optim.SGD,
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.Adagrad,
    torch.optim.RMSprop,
)
