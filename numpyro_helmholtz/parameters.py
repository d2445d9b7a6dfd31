"""Parameters: unconstrained values by site name, and names for their leaves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from numpyro.distributions import constraints
from numpyro.distributions.transforms import IdentityTransform, biject_to
from numpyro.primitives import Messenger

Params = dict[str, Any]


class Held(Messenger):
    """Give parameter and mutable sites their values.

    Args:
        params: by site name, arrays or pytrees; one that is missing starts as the program has it.
        mutable: by site name. constrained: the values are as the program sees them.
            Otherwise the site's own constraint turns them, ``biject_to(constraint)(value)``.
    """

    def __init__(self, params: Params, mutable: Params, *, constrained: bool) -> None:
        super().__init__()
        self.params, self.mutable, self.constrained = params, mutable, constrained

    def process_message(self, msg: Any) -> None:
        """Set the value of a parameter or of mutable state."""
        if msg["type"] == "mutable" and msg["name"] in self.mutable:
            value = self.mutable[msg["name"]]
            msg["value"] = dict(value) if isinstance(value, dict) else value
        if msg["type"] == "param" and msg["name"] in self.params:
            value = self.params[msg["name"]]
            msg["value"] = value if self.constrained else transform_of(msg)(value)


def transform_of(site: Any) -> Any:
    """The map from a parameter site's unconstrained value to its constrained one."""
    return biject_to(site["kwargs"].get("constraint", constraints.real))


def constraining(*traces: Mapping[str, Any]) -> dict[str, Any]:
    """Transforms of all parameters that have a constraint, by site name; a pytree."""
    found = {
        name: transform_of(site)
        for trace in traces
        for name, site in trace.items()
        if site["type"] == "param"
    }
    return {name: t for name, t in found.items() if not isinstance(t, IdentityTransform)}


def constrain(transforms: Mapping[str, Any], params: Params) -> Params:
    """Unconstrained values as the programs see them."""
    return {n: transforms[n](v) if n in transforms else v for n, v in params.items()}


def unconstrain(transforms: Mapping[str, Any], params: Params) -> Params:
    """The inverse of ``constrain``."""
    return {n: transforms[n].inv(v) if n in transforms else v for n, v in params.items()}


def parameters(params: Params) -> dict[str, Array]:
    """The leaves by joined name, such as ``"net$params.Dense_0.kernel"``."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(params)
    return {jax.tree_util.keystr(p, simple=True, separator="."): leaf for p, leaf in leaves}


def rebuild(leaves: Mapping[str, Any], like: Params) -> Params:
    """The inverse of ``parameters``: leaves by joined name in the structure of ``like``."""
    names = parameters(like)
    return jax.tree.unflatten(jax.tree.structure(like), [leaves[name] for name in names])


def strong(tree: Any) -> Any:
    """Arrays without weak types, so that no update changes the state's types."""

    def one(x: Any) -> Any:
        key = hasattr(x, "dtype") and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
        return x if key else lax.convert_element_type(x, jnp.result_type(x))

    return jax.tree.map(one, tree)


def signature(tree: Any) -> tuple:
    """Equal for trees that one compiled call serves: structure, shapes and types."""
    leaves, structure = jax.tree.flatten(tree)
    return structure, tuple((jnp.shape(x), getattr(x, "dtype", type(x))) for x in leaves)


def apart(tree: Any) -> Any:
    """The same arrays, each in memory of its own."""
    return jax.tree.map(lambda x: jnp.copy(x) if isinstance(x, jax.Array) else x, tree)
