"""From entries to blocks: group the roots that share parameters, and choose each block's form."""

from __future__ import annotations

from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np

from .. import graph, layers
from ..graph import Node, Opaque
from ..layers import Application, Root
from ..parameters import Params, parameters
from ..recipe import Recipe
from ..trace import Programs
from .blocks import Array, Component, UnitBlock
from .evidence import Entry, entries
from .matrix_free import MatrixFreeBlock

Block = UnitBlock | MatrixFreeBlock


@dataclass
class Found:
    """One entry with how parameters enter it.

    Attributes:
        source: number of its program. entry: the information.
        applications: per argument, or None (constant). reason: why it is opaque, or empty.
    """

    source: int
    entry: Entry
    applications: list[Application | None] = field(default_factory=list)
    reason: str = ""


@dataclass
class _Group:
    found: list[Found]
    names: set[str]


def assemble(
    recipes: list[Recipe],
    programs: Programs,
    params: Params,
    uncovered: dict[str, list[str]] | None = None,
) -> list[Block]:
    """The blocks of the Fisher matrix on one batch.

    Args:
        recipes: of the model and the guide. programs: what they run.
        params: unconstrained, where. uncovered: takes the sites that parameters feed for which
            there is no block, by the parameter's name.

    Returns:
        Blocks whose parameters are disjoint. Parameters that no information covers are in
        none: they keep their gradient, and the report says so.
    """
    groups: list[_Group] = []
    for number, recipe in enumerate(recipes):
        roots: dict[int, Root] = {}
        for entry in entries(recipe, programs, params):
            group = _Group([_find(number, entry, roots)], set(entry.names))
            for other in [g for g in groups if g.names & group.names]:
                groups.remove(other)
                group.found = other.found + group.found
                group.names |= other.names
            groups.append(group)
    blocks: list[Block] = []
    for group in groups:
        if all(found.entry.form != "none" for found in group.found):
            blocks.append(_block(group, recipes, programs, params))
        elif uncovered is not None:
            uncovered |= {name: _sites(group, name) for name in group.names}
    return blocks


def _sites(group: _Group, name: str) -> list[str]:
    """The sites that a parameter feeds."""
    return list(dict.fromkeys(f.entry.site for f in group.found if name in f.entry.names))


def _find(source: int, entry: Entry, roots: dict[int, Root]) -> Found:
    """How parameters enter an entry; roots met before are used again."""
    found = Found(source, entry)
    try:
        for argument in entry.arguments:
            application = layers.find(argument) if isinstance(argument, Node) else None
            if application is not None:
                application.root = roots.setdefault(application.root.node.order, application.root)
            found.applications.append(application)
    except Opaque as reason:
        found.reason = str(reason)
    return found


def _block(group: _Group, recipes: list[Recipe], programs: Programs, params: Params) -> Block:
    reason = next((f.reason for f in group.found if f.reason), "")
    if not reason:
        try:
            return _unit_block(group, recipes)
        except Opaque as error:
            reason = str(error)
    return _matrix_free(group, recipes, programs, params, reason)


def _summary(group: _Group) -> tuple[list[str], bool, str]:
    found = [f.entry for f in group.found]
    sites = list(dict.fromkeys(e.site for e in found))
    inexact = [e for e in found if not e.exact]
    how = inexact[0].how if inexact else found[0].how
    return sites, not inexact, how


def _unit_block(group: _Group, recipes: list[Recipe]) -> UnitBlock:
    forms = {f.entry.form for f in group.found}
    if forms == {"scalar"}:
        components, features, coefficients, kind = _scalar_rows(group)
    elif len(forms) == 1:
        components, features, coefficients, kind = _vector_rows(group)
    else:
        raise Opaque("shared between scalar and coupled arguments")
    sites, exact, how = _summary(group)
    # In the parameters' type: a program may go on in another before or after the layer.
    roots = [a.root for f in group.found for a in f.applications if a is not None]
    dtype = jnp.result_type(*(term.leaf.value for root in roots for term in root.terms))
    features, coefficients = features.astype(dtype), coefficients.astype(dtype)
    block = UnitBlock(sites, kind, components, features, coefficients, exact, how)
    # The guide's particles weigh alike.
    block.weighted = any(recipes[f.source].program == "model" for f in group.found)
    return block


def _scalar_rows(group: _Group) -> tuple[list[Component], Array, Array, str]:
    """Rows of all roots one below the other; arguments over one root add up."""
    roots: dict[int, Root] = {}
    coefficients: dict[int, Array] = {}
    for found in group.found:
        application = found.applications[0]
        assert application is not None
        value = graph.pull(application.chain, found.entry.information)
        key = id(application.root)
        roots[key] = application.root
        coefficients[key] = coefficients[key] + value if key in coefficients else value
    first = next(iter(roots.values()))
    for root in roots.values():
        alike = root.names == first.names and all(
            a.same(b) for a, b in zip(root.columns, first.columns, strict=True)
        )
        if not alike:
            raise Opaque("parameters are shared between unlike layers")
    features = [root.features() for root in roots.values()]
    pulled = [root.coefficient(coefficients[key]) for key, root in roots.items()]
    if len(roots) == 1:
        kind, u, q = first.what, features[0], pulled[0]
    else:
        kind = f"{first.what}, shared by {len(roots)}"
        u, q = jnp.concatenate(features), jnp.concatenate(pulled)
    return [Component(list(first.names), list(first.columns))], u, q, kind


def _vector_rows(group: _Group) -> tuple[list[Component], Array, Array, str]:
    """Units that are vectors: one group of rows of the parameters for each."""
    if len(group.found) > 1:
        raise Opaque("coupled arguments share parameters with another site")
    found = group.found[0]
    pieces = _components(found)
    first, rows = pieces[0][0], pieces[0][1]
    for root, row, _, _ in pieces[1:]:
        same = root is first or root.feature_key == first.feature_key
        if not same or not np.array_equal(row, rows):
            raise Opaque("coupled arguments with unlike features")
    d = len(pieces)
    units = np.stack([unit for _, _, unit, _ in pieces], 1)
    groups, which = np.unique(units, axis=0, return_inverse=True)
    taken = groups.reshape(-1)
    if first is pieces[-1][0] and np.unique(taken).size != taken.size:
        raise Opaque("a unit serves two coupled arguments")
    info = found.entry.information.reshape(-1, d, d)
    slopes = _stack_slopes([slope for *_, slope in pieces], len(rows), info.dtype)
    if slopes is not None:
        info = info * slopes[:, :, None] * slopes[:, None, :]
    place = rows * len(groups) + which.reshape(-1)
    info = _place(info, place, first.num_rows * len(groups))
    components = [
        Component(list(root.names), list(root.columns), groups[:, i])
        for i, (root, *_) in enumerate(pieces)
    ]
    q = info.reshape(first.num_rows, len(groups), d, d)
    return components, first.features(), q, first.what


def _stack_slopes(slopes: list[Array | None], count: int, dtype: np.dtype) -> Array | None:
    """(count, d), or None where every slope is one."""
    if all(slope is None for slope in slopes):
        return None
    return jnp.stack([jnp.ones(count, dtype) if s is None else s for s in slopes], 1)


def _place(info: Array, place: np.ndarray, size: int) -> Array:
    """Matrices summed into their places; without a scatter where each has its own."""
    if np.array_equal(place, np.arange(size)):
        return info
    if place.size == size and np.unique(place).size == size:
        return info[np.argsort(place)]
    return jnp.zeros((size, *info.shape[1:]), info.dtype).at[place].add(info)


def _components(found: Found) -> list[tuple[Root, np.ndarray, np.ndarray, Array | None]]:
    """Per component of the vector: its root, and row, unit and slope of each variable."""
    pieces = []
    for argument, application in zip(found.entry.arguments, found.applications, strict=True):
        assert application is not None
        root, chain = application.root, application.chain
        element = graph.lift_index(chain, root.node.shape)
        slope = graph.lift_slopes(chain)
        if slope is not None:
            slope = jnp.broadcast_to(slope, argument.shape)
        columns: list = [...]
        if found.entry.form == "vector":
            columns = [(..., k) for k in range(argument.shape[-1])]
        for k in columns:
            index = element[k].reshape(-1)
            slopes = None if slope is None else slope[k].reshape(-1)
            pieces.append((root, root.row[index], root.unit[index], slopes))
    return pieces


def _matrix_free(
    group: _Group, recipes: list[Recipe], programs: Programs, params: Params, reason: str
) -> MatrixFreeBlock:
    sites, exact, how = _summary(group)
    names = sorted(group.names)
    used: dict[int, list[int]] = {}
    for found in group.found:
        used.setdefault(found.source, []).append(found.entry.number)
    leaves = parameters(params)
    return MatrixFreeBlock(
        sites,
        names,
        [tuple(leaves[name].shape) for name in names],
        [recipes[s] for s in used],
        list(used.values()),
        programs,
        params,
        exact=exact,
        how=how,
        reason=reason,
    )
