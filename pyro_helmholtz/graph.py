"""Read an autograd graph: pull coefficients down a chain of nodes, lift indices up it.

A *chain* leads from a tensor to something that it was made of, through operations in which
every output element depends on exactly one input element: layout changes (view, expand,
slice, …) and elementwise functions. Two maps run along it:

* ``pull(c)`` carries the Fisher coefficient of the output to the input: layout nodes
  rearrange it and sum over broadcast dimensions, an elementwise ``g`` multiplies it by ``g'²``.
* ``lift(values)`` carries values of the input to the output elements that depend on them:
  the transpose of the layout, by differentiating the backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Node = Any

LAYOUT = frozenset(
    "View UnsafeView ReshapeAlias Reshape Expand T Transpose Permute Squeeze Unsqueeze Slice "
    "Select Split SplitWithSizes Unbind Clone Contiguous Alias ToCopy Index IndexSelect Flip "
    "Narrow Movedim Diagonal".split()
)
IN_ORDER = frozenset("View UnsafeView ReshapeAlias Reshape Expand Squeeze Unsqueeze".split())
ELEMENTWISE = frozenset(
    "Exp Exp2 Expm1 Log Log1P Softplus Sigmoid LogSigmoid Tanh Neg Mul Div Pow Sqrt Rsqrt "
    "Reciprocal Relu LeakyRelu Elu Gelu Silu Clamp ClampMin ClampMax Add Sub Rsub Erf Sin Cos "
    "Atan Abs Sinh Cosh".split()
)


def kind(node: Node) -> str:
    """The operation's name without ``Backward0`` and namespaces: ``AddmmBackward0`` → Addmm."""
    name = node.name()
    if name not in _KINDS:
        last = name.rsplit("::", 1)[-1].rstrip("0123456789")
        _KINDS[name] = last.removesuffix("Backward")
    return _KINDS[name]


_KINDS: dict[str, str] = {}


def shape_of(node: Node, nr: int = 0) -> torch.Size:
    """Shape of the node's output number ``nr``."""
    return torch.Size(node._input_metadata[nr].shape)


def leaf_of(node: Node) -> Tensor | None:
    """The leaf that an AccumulateGrad node stands for."""
    return getattr(node, "variable", None)


def root_of(tensor: Tensor) -> tuple[Node, int] | None:
    """Where a tensor's history begins, or None for a constant; leaves included."""
    if tensor.grad_fn is not None:
        return tensor.grad_fn, tensor.output_nr
    if tensor.requires_grad:
        return torch.autograd.graph.get_gradient_edge(tensor).node, 0
    return None


def leaves_below(root: tuple[Node, int] | None) -> dict[int, Tensor]:
    """Every leaf that a node's value depends on, by id."""
    found: dict[int, Tensor] = {}
    stack, seen = ([root[0]] if root else []), set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = leaf_of(node)
        if leaf is not None:
            found[id(leaf)] = leaf
        stack.extend(child for child, _ in node.next_functions if child is not None)
    return found


def children(node: Node, leaves: Mapping[int, str]) -> Iterator[tuple[int, Node, int]]:
    """The (slot, node, output number) of the inputs that depend on a parameter in ``leaves``."""
    for slot, (child, nr) in enumerate(node.next_functions):
        if child is None:
            continue
        leaf = leaf_of(child)
        if leaf is not None and id(leaf) not in leaves:
            continue
        if leaf is None and len(node.next_functions) > 1 and not _depends(child, leaves):
            continue
        yield slot, child, nr


def changes_nothing(node: Node, nr: int, child: tuple[int, Node, int]) -> bool:
    """Whether a layout node passes its one input on as it is, elements and shape."""
    _, below, below_nr = child
    return kind(node) in IN_ORDER and shape_of(node, nr) == shape_of(below, below_nr)


def _depends(node: Node, leaves: Mapping[int, str]) -> bool:
    return any(key in leaves for key in leaves_below((node, 0)))


def normalises(node: Node) -> bool:
    """Whether a node is ``a - logsumexp(a, -1)`` or ``a / sum(a, -1)``.

    So torch makes log-probabilities of logits, and probabilities of weights.
    """
    sums = {"Sub": "Logsumexp", "Div": "Sum"}.get(kind(node))
    if sums is None:
        return False
    first, second = (child for child, _ in node.next_functions)
    if first is None or second is None or kind(second) != sums or not second._saved_keepdim:
        return False
    dims = [signed(d) for d in second._saved_dim]
    return second.next_functions[0][0] is first and dims in ([-1], [len(shape_of(node)) - 1])


def mixing(node: Node) -> Tensor | None:
    """The Jacobian (..., d, d) of a node that mixes the last dimension, or None.

    Softmax, log-softmax, and the division by the sum.
    """
    name = kind(node)
    if name in ("Softmax", "LogSoftmax") and _last(node):
        out = node._saved_result.detach()
        if name == "Softmax":
            return torch.diag_embed(out) - out[..., :, None] * out[..., None, :]
        return (
            torch.eye(out.shape[-1], dtype=out.dtype, device=out.device) - out[..., None, :].exp()
        )
    if name == "Div" and normalises(node):
        total = node._saved_other.detach()
        p = node._saved_self.detach() / total
        eye = torch.eye(p.shape[-1], dtype=p.dtype, device=p.device)
        return (eye - p[..., :, None]) / total[..., None]
    return None


def _last(node: Node) -> bool:
    return signed(node._saved_dim) in (-1, len(shape_of(node)) - 1)


def signed(saved: int) -> int:
    """A dimension as autograd saves it, unsigned, as the number that it is."""
    return int(saved) - (1 << 64 if int(saved) >= 1 << 63 else 0)


@dataclass(frozen=True, slots=True)
class Link:
    """One node of a chain: from the node's output ``nr`` to the input in ``slot``.

    Attributes:
        node: the autograd node. nr: which of its outputs. slot: which of its inputs.
        shape: that input's shape. elementwise: whether it has a slope. mixes: whether it has
            a Jacobian over the last dimension, see ``mixing``; ``unmix`` accounts for it.
        special: a backward map that replaces the node's own (the bias of a convolution).
    """

    node: Node
    nr: int
    slot: int
    shape: torch.Size
    elementwise: bool = False
    special: Callable[[Tensor], Tensor] | None = None
    mixes: bool = False

    def remap(self, f: Callable[[Any], Any]) -> Link:
        """The same link over another node."""
        return Link(
            f(self.node),
            self.nr,
            self.slot,
            self.shape,
            self.elementwise,
            self.special,
            self.mixes,
        )

    def back(self, value: Tensor) -> Tensor:
        """The layout's backward map: rearrange, and sum over broadcast dimensions."""
        if self.special is not None:
            value = self.special(value)
        elif not self.elementwise and kind(self.node) in LAYOUT:
            if value.numel() == self.shape.numel() and kind(self.node) in IN_ORDER:
                return value.reshape(self.shape)
            grads: list[Tensor | None] = [None] * len(self.node._input_metadata)
            for i, meta in enumerate(self.node._input_metadata):
                grads[i] = (
                    value
                    if i == self.nr
                    else torch.zeros(tuple(meta.shape), dtype=value.dtype, device=value.device)
                )
            result = self.node(*grads)
            value = result[self.slot] if isinstance(result, tuple) else result
        return value.sum_to_size(self.shape) if value.shape != self.shape else value

    def slope(self) -> Tensor:
        """``g'`` of an elementwise node, in the shape of its output."""
        meta = self.node._input_metadata[self.nr]
        ones = torch.ones(tuple(meta.shape), dtype=meta.dtype, device=meta.device)
        result = self.node(ones)
        return result[self.slot] if isinstance(result, tuple) else result


Chain = tuple[Link, ...]


def remap(chain: Chain, f: Callable[[Any], Any]) -> Chain:
    """The same chain over other nodes."""
    return tuple([link.remap(f) for link in chain]) if chain else chain


def unmix(chain: Chain, information: Tensor) -> Tensor:
    """``Jᵀ I J`` for the links that mix; they stand at the head, behind expansions alone.

    Args:
        chain: of a vector argument. information: (..., d, d) in the head's shape.
    """
    for link in chain:
        if link.mixes:
            jacobian = mixing(link.node)
            assert jacobian is not None
            information = jacobian.transpose(-1, -2) @ information @ jacobian
    return information


def pull(chain: Chain, coefficient: Tensor) -> Tensor:
    """Carry a coefficient from the head of the chain to its foot."""
    if not chain:
        return coefficient
    with torch.no_grad():
        for link in chain:
            if link.elementwise:
                coefficient = coefficient * link.slope().square()
            coefficient = link.back(coefficient)
    return coefficient


def lift(chain: Chain, values: Tensor, head: torch.Size, *, slopes: bool = False) -> Tensor:
    """Carry values from the foot of the chain to the elements of its head.

    Args:
        chain: from head to foot. values: in the foot's shape. head: the head's shape.
        slopes: multiply by the slopes on the way (the Jacobian), else carry values unchanged.
    """
    if not chain:
        return values
    with torch.enable_grad():
        start = torch.zeros(head, dtype=values.dtype, device=values.device, requires_grad=True)
        value = start
        for link in chain:
            if slopes and link.elementwise:
                value = value * link.slope().detach().to(values.dtype)
            value = link.back(value)
        (result,) = torch.autograd.grad(value, start, values)
    return result


def lift_index(chain: Chain, foot: torch.Size, head: torch.Size, device: torch.device) -> Tensor:
    """For each element of the head, the flat index of the foot element it depends on."""
    if not chain:
        return torch.arange(foot.numel(), device=device).reshape(foot)
    # Some nodes take nothing but their own dtype, and float32 holds integers up to 2^24.
    meta = chain[0].node._input_metadata[chain[0].nr]
    dtype = torch.float32 if meta.dtype == torch.float32 else torch.float64
    index = torch.arange(foot.numel(), device=device).reshape(foot)
    high, low = (
        lift(chain, digit.to(dtype), head).round().long()
        for digit in (index // _DIGIT, index % _DIGIT)
    )
    return high * _DIGIT + low


_DIGIT = 1 << 20
