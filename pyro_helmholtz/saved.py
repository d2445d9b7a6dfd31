"""Saved states: who may load them, and values of parameters that do not exist yet."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any

import pyro
import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor


def same_random() -> AbstractContextManager:
    """Have the random state afterwards as it was, on every device."""
    return torch.random.fork_rng(devices=list(range(torch.cuda.device_count())))


class Late(Messenger):
    """Give parameters their saved values where a program uses them for the first time.

    Args:
        saved: unconstrained values by name; each goes out of it once it is used.
    """

    def __init__(self, saved: dict[str, Tensor]) -> None:
        super().__init__()
        self.saved = saved

    def _pyro_param(self, msg: Any) -> None:
        name = msg["name"]
        if name not in self.saved:
            return
        store = pyro.get_param_store()
        if name not in store._params:
            with same_random():  # a start may be drawn
                msg["fn"](*msg["args"], **msg["kwargs"])
        fill({name: self.saved[name]}, store._params)
        del self.saved[name]


def check_names(
    state: Mapping[str, Any], used: Mapping[str, Tensor], known: Mapping[str, Tensor]
) -> None:
    """Compare the parameters that were trained with those that the programs use in a first run.

    Args:
        state: saved. used: by the programs in this run. known: these and all in the store.

    Raises:
        ValueError: both have some that the other has not: the state is of other programs.
    """
    trained = state["optimiser"].keys() & state["parameters"].keys()
    gone = sorted(trained - used.keys())
    new = sorted(used.keys() - state["parameters"].keys()) if trained else []
    if gone and new:
        raise ValueError(
            f"the state is of other programs: it has trained parameter {gone[0]!r}, which these "
            f"do not use, but not {new[0]!r}, which they use. Load it where the programs are "
            "those that it was saved with."
        )
    for name in new:
        warnings.warn(
            f"parameter {name!r} is not in the state that was loaded: it starts as the program "
            "has it.",
            stacklevel=4,
        )
    for name in gone:
        if name not in known:
            warnings.warn(
                f"the state that was loaded has trained parameter {name!r}, which the programs "
                "did not use in their first run: it takes its saved value when they do.",
                stacklevel=4,
            )


def check_kind(saved: Mapping[str, Any], kind: Mapping[str, Any]) -> None:
    """Compare the front ends that saved a state and that load it.

    Args:
        saved, kind: name and options of either, see ``HelmholtzSVI.state_dict``.

    Raises:
        ValueError: they are not the same.
    """
    if differing := sorted(k for k in saved.keys() | kind if saved.get(k) != kind.get(k)):
        raise ValueError(
            f"the state was saved by another front end: by {_said(saved)}; this object is "
            f"{_said(kind)} and loads states of its own kind. "
            f"Not the same: {', '.join(differing)}."
        )


def _said(kind: Mapping[str, Any]) -> str:
    """The front end with its options, as one would write it."""
    options = ", ".join(f"{k}={v!r}" for k, v in kind.items() if k != "front_end")
    return f"{kind.get('front_end')}({options})"


def fill(saved: Mapping[str, Tensor], leaves: Mapping[str, Tensor]) -> None:
    """Copy saved values into the leaves of the same name."""
    for name in saved.keys() & leaves.keys():
        if leaves[name].shape != saved[name].shape:
            raise ValueError(
                f"parameter {name!r} has shape {tuple(leaves[name].shape)} in the program but "
                f"{tuple(saved[name].shape)} in the saved state."
            )
    with torch.no_grad():
        for name in saved.keys() & leaves.keys():
            leaves[name].copy_(saved[name])
