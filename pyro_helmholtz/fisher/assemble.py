"""From traces to blocks: group the roots that share parameters, and choose each block's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor

from .. import graph
from ..columns import Opaque
from ..finder import Finder
from ..layers import Application, Root
from ..recipe import Recipe
from ..trace import Programs
from .blocks import Block, Component, Part, UnitBlock
from .evidence import Entry
from .matrix_free import MatrixFreeBlock


@dataclass(slots=True)
class Found:
    """One entry with how parameters enter it.

    Attributes:
        entry: the information. applications: per argument, none where it is opaque.
        reason: why it is opaque, or empty.
    """

    entry: Entry
    applications: list[Application]
    reason: str = ""


@dataclass
class Source:
    """A program's entries on one batch, and how to run the program again on it."""

    entries: list[Entry]
    recipe: Recipe


@dataclass(slots=True)
class _Group:
    found: list[tuple[int, Found]] = field(default_factory=list)
    names: set[str] = field(default_factory=set)


def find(entry: Entry, finder: Finder, roots: dict[tuple, Root]) -> Found:
    """How parameters enter an entry; roots met before are used again."""
    applications = []
    try:
        for key, use in entry.taken:
            shifts = partial(_ignores_shifts, entry)
            application = finder.apply(key, use, shifts, vector=entry.form == "vector")
            application.root = roots.setdefault(application.root.key, application.root)
            applications.append(application)
    except Opaque as reason:
        return Found(entry, [], str(reason))
    return Found(entry, applications)


def _ignores_shifts(entry: Entry) -> bool:
    """Whether adding one number to a whole vector carries no information, as for logits."""
    info = entry.information
    slack = 64 * torch.finfo(info.dtype).eps * float(info.abs().max() if info.numel() else 0.0)
    return bool((info.sum(-1).abs() <= slack).all())


def assemble(
    sources: list[Source],
    tensors: Mapping[str, Tensor],
    programs: Programs,
    finder: Finder,
    uncovered: dict[str, list[str]] | None = None,
) -> list[Block]:
    """The blocks of the Fisher matrix on one batch.

    Args:
        sources: the model's and the guide's entries, graphs alive.
        tensors: the parameters' leaves by name. programs: to run them again.
        finder: what the entries were made with. uncovered: takes the sites that parameters feed
            for which there is no block, by the parameter's name.

    Returns:
        Blocks whose parameters are disjoint. Parameters that no information covers are in
        none: they keep their gradient, and the report says so.
    """
    groups: dict[int, _Group] = {}
    owner: dict[str, _Group] = {}  # of each parameter
    for s, source in enumerate(sources):
        roots: dict[tuple, Root] = {}
        for entry in source.entries:
            found = find(entry, finder, roots)
            names = entry.names  # in order: sets of strings have another in each process
            group = _Group([(s, found)], set(names))
            joined = {id(owner[name]): owner[name] for name in names if name in owner}
            for key, other in joined.items():
                del groups[key]
                group.found = other.found + group.found
                group.names |= other.names
            groups[id(group)] = group
            owner |= dict.fromkeys(group.names, group)
    blocks: list[Block] = []
    for group in groups.values():
        if all(found.entry.form != "none" for _, found in group.found):
            blocks.append(_block(group, sources, tensors, programs))
        elif uncovered is not None:
            uncovered |= {name: _sites(group, name) for name in group.names}
    return blocks


def _sites(group: _Group, name: str) -> list[str]:
    """The sites that a parameter feeds."""
    return list(dict.fromkeys(f.entry.site for _, f in group.found if name in f.entry.names))


def _block(
    group: _Group, sources: list[Source], tensors: Mapping[str, Tensor], programs: Programs
) -> Block:
    reason = next((f.reason for _, f in group.found if f.reason), "")
    if not reason:
        try:
            block = _unit_block(group)
            # The guide's particles weigh alike.
            block.weighted = any(sources[s].recipe.program == "model" for s, _ in group.found)
            return block
        except Opaque as error:
            reason = str(error)
    return _matrix_free(group, sources, tensors, programs, reason)


def _summary(group: _Group) -> tuple[list[str], bool, str]:
    entries = [f.entry for _, f in group.found]
    sites = list(dict.fromkeys(e.site for e in entries))
    inexact = [e for e in entries if not e.exact]
    how = inexact[0].how if inexact else entries[0].how
    return sites, not inexact, how


def _unit_block(group: _Group) -> UnitBlock:
    forms = {f.entry.form for _, f in group.found}
    if forms == {"scalar"}:
        components, parts, kind = _scalar_parts(group)
    elif len(forms) == 1:
        components, parts, kind = _vector_parts(group)
    else:
        raise Opaque("shared between scalar and coupled arguments")
    sites, exact, how = _summary(group)
    return UnitBlock(sites, kind, components, parts, exact, how)


def _scalar_parts(group: _Group) -> tuple[list[Component], list[Part], str]:
    """Rows of all roots one below the other; arguments over one root add up."""
    roots: dict[int, Root] = {}
    coefficients: dict[int, Tensor] = {}
    for _, found in group.found:
        application = found.applications[0]
        value = graph.pull(application.chain, found.entry.information)
        key = id(application.root)
        roots[key] = application.root
        coefficients[key] = coefficients[key] + value if key in coefficients else value
    first, *others = roots.values()
    for root in others:
        if root.names != first.names or not _same_columns(root, first):
            raise Opaque("parameters are shared between unlike layers")
    parts = [_part(root, root.coefficient(coefficients[key])) for key, root in roots.items()]
    kind = first.what if len(roots) == 1 else f"{first.what}, shared by {len(roots)}"
    return [Component(first.names, first.plan.columns)], parts, kind


def _same_columns(one: Root, other: Root) -> bool:
    for a, b in zip(one.plan.columns, other.plan.columns, strict=True):
        if a.transposed != b.transposed or (a.index is None) != (b.index is None):
            return False
        if a.index is not None and b.index is not None and not torch.equal(a.index, b.index):
            return False
    return True


def _vector_parts(group: _Group) -> tuple[list[Component], list[Part], str]:
    """Units that are vectors: one group of rows of the parameters for each."""
    if len(group.found) > 1:
        raise Opaque("coupled arguments share parameters with another site")
    found = group.found[0][1]
    entry = found.entry
    pieces = _components(found)
    first_root = pieces[0][0]
    rows = pieces[0][1]
    for root, row, _, _ in pieces[1:]:
        same = root is first_root or _same_features(root, first_root)
        if not same or not torch.equal(row, rows):
            raise Opaque("coupled arguments with unlike features")
    d = len(pieces)
    units = torch.stack([unit for _, _, unit, _ in pieces], 1)
    groups, which = torch.unique(units, dim=0, return_inverse=True)
    slopes = torch.stack([slope for *_, slope in pieces], 1)
    value = entry.information
    if entry.form == "vector":
        value = graph.unmix(found.applications[0].chain, value)
    info = value.reshape(-1, d, d) * slopes[:, :, None] * slopes[:, None, :]
    size = first_root.plan.num_rows * groups.shape[0]
    q = torch.zeros(size, d, d, dtype=info.dtype, device=info.device)
    q.index_add_(0, rows * groups.shape[0] + which, info)
    coefficients = q.reshape(first_root.plan.num_rows, groups.shape[0], d, d)
    components = [
        Component(root.names, root.plan.columns, groups[:, i])
        for i, (root, *_) in enumerate(pieces)
    ]
    taken = torch.cat([groups[:, i] for i in range(d)])
    if first_root is pieces[-1][0] and taken.unique().numel() != taken.numel():
        raise Opaque("a unit serves two coupled arguments")
    return components, [_part(first_root, coefficients)], first_root.what


def _part(root: Root, coefficients: Tensor) -> Part:
    """In the parameters' type: a program may be in another in the layer (autocast) or after it."""
    dtype = root.terms[0].leaf.dtype
    return Part([piece.to(dtype) for piece in root.pieces()], coefficients.to(dtype))


def _same_features(one: Root, other: Root) -> bool:
    pairs = list(zip(one.pieces(), other.pieces(), strict=False))
    same = len(one.terms) == len(other.terms) and all(a.shape == b.shape for a, b in pairs)
    return same and all(a.data_ptr() == b.data_ptr() or torch.equal(a, b) for a, b in pairs)


def _components(found: Found) -> list[tuple[Root, Tensor, Tensor, Tensor]]:
    """Per component of the vector: its root, and row, unit and slope of each variable."""
    pieces = []
    vector = found.entry.form == "vector"
    for argument, application in zip(found.entry.arguments, found.applications, strict=True):
        root, chain, head = application.root, application.chain, torch.Size(argument.shape)
        element = graph.lift_index(chain, root.shape, head, argument.device)
        dtype = found.entry.information.dtype
        ones = torch.ones(root.shape, dtype=dtype, device=argument.device)
        slope = graph.lift(chain, ones, head, slopes=True) if chain else ones
        columns = range(head[-1]) if vector else [None]
        for k in columns:
            index = (element if k is None else element[..., k]).reshape(-1)
            slopes = (slope if k is None else slope[..., k]).reshape(-1)
            pieces.append((root, root.plan.row[index], root.plan.unit[index], slopes))
    return pieces


def _matrix_free(
    group: _Group,
    sources: list[Source],
    tensors: Mapping[str, Tensor],
    programs: Programs,
    reason: str,
) -> MatrixFreeBlock:
    sites, exact, how = _summary(group)
    names = sorted(group.names)
    recipes = [sources[s].recipe for s in dict.fromkeys(s for s, _ in group.found)]
    shapes = [tensors[name].shape for name in names]
    return MatrixFreeBlock(sites, names, shapes, recipes, programs, exact, how, reason)
