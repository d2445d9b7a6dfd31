"""One affine summand of a site's argument: a matrix product, a convolution, or a bias."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import graph
from .columns import Columns, Opaque
from .graph import Chain

MATMUL = {"Mm", "Addmm", "Bmm", "Baddbmm", "Addbmm", "Mv", "Addmv"}


@dataclass(slots=True)
class Term:
    """One summand of a root.

    Attributes:
        kind: the operation. node: its autograd node. chain: from the root to the node's output.
        weight_chain: from the node's weight operand to the leaf. leaf, name: the parameter.
        side: which operand is the weight (0 or 1). factor: constant factor.
    """

    kind: str
    node: Any
    chain: Chain
    weight_chain: Chain
    leaf: Tensor
    name: str
    side: int = 0
    factor: float = 1.0

    def remap(self, f: Callable[[Any], Any]) -> Term:
        """The same term over other nodes, without the ways to and from it: the plan has them."""
        node = f(self.node)
        return Term(self.kind, node, (), (), self.leaf, self.name, self.side, self.factor)

    @property
    def direct(self) -> bool:
        """Whether the leaf itself is the summand."""
        return self.kind not in MATMUL and self.kind != "Convolution"

    @property
    def what(self) -> str:
        """Kind of the application, for the report."""
        if self.direct:
            return "direct"
        if self.kind != "Convolution":
            return "affine"
        return "transposed convolution" if self.node._saved_transposed else "convolution"

    def out_shape(self) -> torch.Size:
        """Shape of the term's own output."""
        if self.direct:
            return self.leaf.shape
        return graph.shape_of(self.node)

    def rows_and_units(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Row and unit of flat indices into the node's output."""
        shape = self.out_shape()
        if self.kind == "Convolution":
            positions = shape[2:].numel()
            return (index // (shape[1] * positions)) * positions + index % positions, (
                index // positions
            ) % shape[1]
        if self.kind in ("Mv", "Addmv"):
            return torch.zeros_like(index), index
        if len(shape) == 2:
            first, second = index // shape[1], index % shape[1]
            return (first, second) if self.side == 1 else (second, first)
        batch, first, second = (
            index // (shape[1] * shape[2]),
            (index // shape[2]) % shape[1],
            index % shape[2],
        )
        if self.side == 1:
            return batch * shape[1] + first, second
        return batch * shape[2] + second, first

    def coefficient(self, value: Tensor) -> Tensor:
        """The pulled coefficient (in the node's output shape) as (rows, units)."""
        if self.kind == "Convolution":
            return value.flatten(2).transpose(1, 2).reshape(-1, value.shape[1])
        if value.ndim == 1:
            return value[None, :]
        if value.ndim == 2:
            return value if self.side == 1 else value.t()
        moved = value if self.side == 1 else value.transpose(1, 2)
        return moved.reshape(-1, moved.shape[-1])

    def features(self) -> Tensor:
        """The constant operand as (rows, columns), in the order of the weight's fan-in."""
        name, node = self.kind, self.node
        if name == "Convolution":
            value = _unfold(node)
        elif name in ("Mv", "Addmv"):
            value = node._saved_vec[None, :]
        else:
            if name == "Addmm":
                operands = ("_saved_mat2", "_saved_mat1")
            elif name == "Baddbmm":
                operands = ("_saved_batch2", "_saved_batch1")
            else:
                operands = ("_saved_mat2", "_saved_self")
            value = getattr(node, operands[self.side])
            if self.side == 0:
                value = value.transpose(-1, -2)
            if value.ndim != 2:
                value = value.reshape(-1, value.shape[-1])
        value = value.detach()
        return value if self.factor == 1.0 else value * self.factor

    def columns(self) -> Columns:
        """Where the leaf's elements stand in the (units, fan-in) matrix."""
        if self.direct:
            raise AssertionError("direct terms have no columns of their own")
        device = self.leaf.device
        head = _weight_shape(self)
        index = graph.lift_index(self.weight_chain, self.leaf.shape, head, device)
        if self.kind == "Convolution":
            if self.node._saved_transposed:
                index = index.transpose(0, 1)
            return Columns.of(self.leaf, index.reshape(index.shape[0], -1))
        if index.ndim == 3:
            if not bool((index == index[:1]).all()):
                raise Opaque("each batch element has weights of its own")
            index = index[0]
        return Columns.of(self.leaf, index if self.side == 0 else index.t())


def _weight_shape(term: Term) -> torch.Size:
    if term.weight_chain:
        link = term.weight_chain[0]
        return graph.shape_of(link.node, link.nr)
    return term.leaf.shape


def _unfold(node: Any) -> Tensor:
    """Features of a convolution: the same convolution with an identity kernel."""
    x, w = node._saved_input.detach(), node._saved_weight.detach()
    transposed = bool(node._saved_transposed)
    kernel = w.shape[2:]
    channels = w.shape[0] if transposed else w.shape[1]
    fan_in = channels * kernel.numel()
    eye = torch.eye(fan_in, dtype=x.dtype, device=x.device).reshape(fan_in, channels, *kernel)
    if transposed:
        eye = eye.transpose(0, 1)
    out = torch.ops.aten.convolution(
        x,
        eye,
        None,
        list(node._saved_stride),
        list(node._saved_padding),
        list(node._saved_dilation),
        transposed,
        list(node._saved_output_padding),
        1,
    )
    return out.flatten(2).transpose(1, 2).reshape(-1, fan_in)
