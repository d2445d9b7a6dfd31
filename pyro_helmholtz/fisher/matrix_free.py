"""A Fisher block of parameters of any form, as products with Jacobians.

``F v = Σ Jᵀ I J v`` by differentiating the program once forward and once backward: exact for
deep networks inside a site, weights that are computed, and whatever else has no unit blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..finder import Finder
from ..recipe import Recipe
from ..sites import parameters
from ..trace import Programs
from . import solvers
from .evidence import entries
from .solvers import Solution

Tensors = Mapping[str, Tensor]


@dataclass
class Pieces:
    """A graph for matrix-free products: outputs, their weighted information, the leaves."""

    outputs: list[list[Tensor]]
    forms: list[str]
    informations: list[Tensor]
    leaves: list[Tensor]


@dataclass
class MatrixFreeBlock:
    """``F v = Σ Jᵀ I J v`` by differentiating the program, for parameters of any form.

    Attributes:
        sites: what they feed. names: the parameters. shapes: of their leaves.
        recipes: how to run the programs again on the block's samples. Of their entries those
            count that one of the parameters enters. programs: what the recipes run.
        reason: why the block is not one per unit. share: factor of the sum over batches.
    """

    sites: list[str]
    names: list[str]
    shapes: list[torch.Size]
    recipes: list[Recipe]
    programs: Programs | None
    exact: bool = True
    how: str = "closed form"
    reason: str = ""
    kind: str = "site"
    tolerance: float = 1e-2
    max_iterations: int = 20
    share: float = 1.0
    _pieces: list[tuple[Pieces, list[Tensor], list[Tensor]]] = field(default_factory=list)

    @property
    def site(self) -> str:
        """Names of the sites that the parameters feed."""
        return ", ".join(self.sites)

    @property
    def params(self) -> list[str]:
        """Names of the parameters."""
        return self.names

    @property
    def key(self) -> tuple[str, ...]:
        """What identifies the block from batch to batch."""
        return tuple(self.names)

    def leaf_shapes(self) -> dict[str, torch.Size]:
        """Shape of each parameter by name."""
        return dict(zip(self.names, self.shapes, strict=True))

    @property
    def units(self) -> int:
        """Number of blocks."""
        return 1

    @property
    def size(self) -> int:
        """Rows of one block."""
        return sum(s.numel() for s in self.shapes)

    @property
    def fan_in(self) -> int:
        """Number of features, the bias included."""
        return self.size

    def method(self) -> str:
        """The solver's name, for the structure report."""
        return (
            f"matrix-free conjugate gradients to {self.tolerance:g}, "
            f"at most {self.max_iterations} products"
        )

    def gather(self, tensors: Tensors) -> Tensor:
        """Parameters' tensors by name as (1, size)."""
        return torch.cat([tensors[n].reshape(-1) for n in self.names])[None]

    def scatter(self, x: Tensor) -> dict[str, Tensor]:
        """The inverse of ``gather``."""
        parts = x[0].split([s.numel() for s in self.shapes])
        return {n: p.reshape(s) for n, p, s in zip(self.names, parts, self.shapes, strict=True)}

    def _pieces_of(self, recipe: Recipe) -> Pieces:
        assert self.programs is not None
        trace = recipe.run(self.programs)
        tensors = parameters(trace)
        finder = Finder({id(leaf): name for name, leaf in tensors.items()})
        found = entries(trace, recipe.weights, recipe.layout, finder, observed=recipe.observed)
        own = set(self.names)
        chosen = [entry for entry in found if not own.isdisjoint(entry.names)]
        return Pieces(
            [entry.arguments for entry in chosen],
            [entry.form for entry in chosen],
            [entry.information for entry in chosen],
            [
                tensors.get(n, torch.zeros(s, requires_grad=True))
                for n, s in zip(self.names, self.shapes, strict=True)
            ],
        )

    def __getstate__(self) -> dict:
        return self.__dict__ | {"programs": None, "_pieces": []}

    def _prepared(self) -> list[tuple[Pieces, list[Tensor], list[Tensor]]]:
        """Graphs with their dummy cotangents and the gradient that is linear in them."""
        if not self._pieces:
            for recipe in self.recipes:
                with torch.enable_grad():
                    pieces = self._pieces_of(recipe)
                    outputs = [o for group in pieces.outputs for o in group]
                    dummies = [torch.zeros_like(o, requires_grad=True) for o in outputs]
                    linear = torch.autograd.grad(
                        outputs,
                        pieces.leaves,
                        dummies,
                        create_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                self._pieces.append((pieces, dummies, list(linear)))
        return self._pieces

    def matvec(self, v: Tensor) -> Tensor:
        """``F v``, (1, size) → (1, size): one Jacobian product and one transposed."""
        tangents = list(self.scatter(v).values())
        total = torch.zeros_like(v)
        for pieces, dummies, linear in self._prepared():
            moved = torch.autograd.grad(
                linear,
                dummies,
                tangents,
                retain_graph=True,
                materialize_grads=True,
                allow_unused=True,
            )
            cotangents: list[Tensor] = []
            at = 0
            for group, form, info in zip(
                pieces.outputs, pieces.forms, pieces.informations, strict=True
            ):
                part = moved[at : at + len(group)]
                at += len(group)
                cotangents += apply_information(form, info, list(part))
            outputs = [o for group in pieces.outputs for o in group]
            back = torch.autograd.grad(
                outputs,
                pieces.leaves,
                cotangents,
                retain_graph=True,
                allow_unused=True,
                materialize_grads=True,
            )
            total += torch.cat([b.reshape(-1) for b in back])[None]
        return total * self.share

    def dense(self) -> Tensor:
        """The block, (1, size, size): one product per column."""
        eye = torch.eye(self.size, dtype=self._dtype(), device=self._device())
        return torch.cat([self.matvec(row[None]) for row in eye])[None]

    def diagonal(self) -> Tensor:
        """The diagonal, (1, size)."""
        return self.dense().diagonal(dim1=-2, dim2=-1)

    def _dtype(self) -> torch.dtype:
        return self._prepared()[0][0].leaves[0].dtype

    def _device(self) -> torch.device:
        return self._prepared()[0][0].leaves[0].device

    def solve(self, g: Tensor, damping: float) -> Tensor:
        """``(1+α)(αI + F)⁻¹ g``, (1, size)."""
        return self.solution(g, damping).x

    def solution(self, g: Tensor, damping: float) -> Solution:
        """As ``solve``, with the number of iterations and the error."""
        return solvers.conjugate_gradients(
            self.matvec, g, damping, None, self.tolerance, self.max_iterations
        )

    def release(self) -> None:
        """Forget the graphs."""
        self._pieces.clear()


def apply_information(form: str, info: Tensor, values: list[Tensor]) -> list[Tensor]:
    """``I v`` for one entry."""
    if form == "scalar":
        return [info * values[0]]
    if form == "vector":
        return [(info @ values[0][..., None])[..., 0]]
    stacked = torch.stack(values, -1)
    return list((info @ stacked[..., None])[..., 0].unbind(-1))
