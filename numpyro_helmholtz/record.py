"""Record a program's equations: which values depend on parameters, and through what.

``record`` walks the jaxpr of a function of the parameters. Values that depend on none are
plain arrays, the others are ``Node``s. Calls (``jit``, ``vmap``, checkpoints, custom rules)
are walked through, equal equations are recorded once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal, jaxpr_as_fun

Array = Any

CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_lin": "call_jaxpr",
}
ELEMENTWISE = frozenset(
    "exp exp2 expm1 log log1p logistic tanh neg mul div pow integer_pow sqrt rsqrt cbrt square "
    "max min add add_any sub erf erfc erf_inv sin cos tan asin acos atan atan2 sinh cosh asinh "
    "acosh atanh abs sign select_n clamp lgamma digamma polygamma".split()
)
SMALL = 1 << 20


@dataclass(eq=False)
class Equation:
    """One recorded operation.

    Attributes:
        name: of the primitive. params: its static parameters. operands: nodes and arrays.
        bind: the operation on values. elementwise: whether it maps element to element.
    """

    name: str
    params: dict[str, Any]
    operands: list[Any]
    bind: Callable[..., list[Array]]
    elementwise: bool = False

    def parents(self) -> list[tuple[int, Node]]:
        """(slot, node) of the operands that depend on parameters."""
        return [(i, x) for i, x in enumerate(self.operands) if isinstance(x, Node)]

    def at(self, values: dict[int, Array]) -> list[Array]:
        """The outputs with the operands in some slots replaced."""
        return self.bind(*[values.get(i, value_of(x)) for i, x in enumerate(self.operands)])


@dataclass(eq=False)
class Node:
    """A value that depends on parameters.

    Attributes:
        order: position in the recording. names: of the parameters below.
        value: of the node. equation: that made it, None for a parameter.
        output: which of the equation's outputs. leaf: the parameter's name, or empty.
    """

    order: int
    names: frozenset[str]
    value: Array
    equation: Equation | None = None
    output: int = 0
    leaf: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the value."""
        return tuple(self.value.shape)

    @property
    def kind(self) -> str:
        """Name of the operation."""
        return "parameter" if self.equation is None else self.equation.name

    @property
    def elementwise(self) -> bool:
        """Whether it was made by a function of elements."""
        return self.equation is not None and self.equation.elementwise


def value_of(x: Any) -> Array:
    """The array of a node or of a plain value."""
    return x.value if isinstance(x, Node) else x


@dataclass
class _Recorder:
    known: dict[tuple, list[Any]] = field(default_factory=dict)
    alive: list[Any] = field(default_factory=list)
    order: int = 0

    def leaf(self, name: str, value: Array) -> Node:
        self.order += 1
        return Node(self.order, frozenset([name]), value, leaf=name)

    def run(self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any]) -> list[Any]:
        environment: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
        environment |= dict(zip(jaxpr.invars, args, strict=True))

        def read(var: Any) -> Any:
            return var.val if isinstance(var, Literal) else environment[var]

        for eqn in _needed(jaxpr):
            operands = [read(v) for v in eqn.invars]
            for var, out in zip(eqn.outvars, self.equation(jaxpr, eqn, operands), strict=True):
                environment[var] = out
        return [read(v) for v in jaxpr.outvars]

    def equation(self, jaxpr: Jaxpr, eqn: Any, operands: list[Any]) -> list[Any]:
        name = eqn.primitive.name
        if name in CALLS and not (name.startswith("custom") and _is_elementwise(eqn)):
            inner = eqn.params[CALLS[name]]
            if isinstance(inner, ClosedJaxpr):
                return self.run(inner.jaxpr, inner.consts, operands)
            return self.run(inner, (), operands)
        key = _key(eqn, operands)
        if key not in self.known:
            self.alive.append(operands)
            self.known[key] = self._new(jaxpr, eqn, operands)
        return self.known[key]

    def _new(self, jaxpr: Jaxpr, eqn: Any, operands: list[Any]) -> list[Any]:
        bind = _binder(jaxpr, eqn)
        nodes = [x for x in operands if isinstance(x, Node)]
        values = [value_of(x) for x in operands]
        if not nodes and _is_index(eqn, values):
            with jax.ensure_compile_time_eval():
                return bind(*values)
        outputs = bind(*values)
        if not nodes or eqn.primitive.name == "stop_gradient":
            return outputs
        record = Equation(
            eqn.primitive.name, eqn.params, operands, bind, elementwise=_is_elementwise(eqn)
        )
        names = frozenset().union(*(node.names for node in nodes))
        self.order += 1
        return [
            Node(self.order, names, out, record, i)
            if jnp.issubdtype(out.dtype, jnp.inexact)
            else out
            for i, out in enumerate(outputs)
        ]


def record(fn: Callable[[Any], Any], leaves: dict[str, Array], params: Any) -> list[Any]:
    """Evaluate ``fn(params)`` and record it.

    Args:
        fn: a function of a pytree of parameters. params: where. leaves: the same, flat by
            name, in the order of ``jax.tree.leaves``.

    Returns:
        The flat outputs: nodes, or plain arrays where no parameter enters.
    """
    closed = jax.make_jaxpr(fn)(params)
    recorder = _Recorder()
    args = [recorder.leaf(name, value) for name, value in leaves.items()]
    return recorder.run(closed.jaxpr, closed.consts, args)


def _needed(jaxpr: Jaxpr) -> list[Any]:
    """The equations that the outputs depend on."""
    wanted = {v for v in jaxpr.outvars if not isinstance(v, Literal)}
    kept = []
    for eqn in reversed(jaxpr.eqns):
        if any(v in wanted for v in eqn.outvars):
            kept.append(eqn)
            wanted |= {v for v in eqn.invars if not isinstance(v, Literal)}
    return kept[::-1]


def _key(eqn: Any, operands: list[Any]) -> tuple:
    """Equal for equations that compute the same."""
    inputs = tuple(
        (type(x), str(np.asarray(x).dtype), np.asarray(x).item())
        if np.ndim(x) == 0 and not isinstance(x, jax.Array | Node)
        else id(x)
        for x in operands
    )
    params = tuple(sorted((k, v) for k, v in eqn.params.items()))
    try:
        hash(params)
    except TypeError:
        return (id(eqn), inputs)
    return (eqn.primitive.name, params, inputs)


def _binder(jaxpr: Jaxpr, eqn: Any) -> Callable[..., list[Array]]:
    """The equation as a function of all its operands."""
    primitive = eqn.primitive
    if not primitive.name.startswith("custom"):

        def bind(*values: Array) -> list[Array]:
            out = primitive.bind(*values, **eqn.params)
            return list(out) if primitive.multiple_results else [out]

        return bind

    # A custom rule can only be called from a jaxpr.
    places = {v: i for i, v in enumerate(eqn.invars) if not isinstance(v, Literal)}
    alone = jaxpr.replace(constvars=[], invars=list(places), eqns=[eqn], outvars=list(eqn.outvars))
    call = jaxpr_as_fun(ClosedJaxpr(alone, ()))
    return lambda *values: list(call(*[values[i] for i in places.values()]))


def _is_elementwise(eqn: Any) -> bool:
    """Whether the first output's elements are functions of single elements of the inputs."""
    if eqn.primitive.name in ELEMENTWISE:
        return True
    if not eqn.primitive.name.startswith("custom") or eqn.primitive.name not in CALLS:
        return False
    inner = eqn.params[CALLS[eqn.primitive.name]]
    inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
    shape = eqn.outvars[0].aval.shape
    shapes = {v.aval.shape for e in inner.eqns for v in e.outvars} - {()}
    return shapes <= {shape} and all(_maps_elements(e) for e in inner.eqns)


def _maps_elements(eqn: Any) -> bool:
    name = eqn.primitive.name
    if name in CALLS and not name.startswith("custom"):
        inner = eqn.params[CALLS[name]]
        inner = inner.jaxpr if isinstance(inner, ClosedJaxpr) else inner
        return all(_maps_elements(e) for e in inner.eqns)
    plain = "eq ne lt le gt ge and or not is_finite convert_element_type stop_gradient copy"
    plain += " broadcast_in_dim"
    return _is_elementwise(eqn) or name in plain.split()


def _is_index(eqn: Any, values: list[Any]) -> bool:
    """Whether an equation computes small constant indices, needed while structure is read."""
    return all(not isinstance(v, jax.core.Tracer) for v in values) and all(
        v.aval.size <= SMALL
        and hasattr(v.aval, "dtype")
        and (jnp.issubdtype(v.aval.dtype, jnp.integer) or v.aval.dtype == bool)
        for v in eqn.outvars
    )
