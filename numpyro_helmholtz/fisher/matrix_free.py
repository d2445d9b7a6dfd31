"""A block of the Fisher matrix for parameters of any form: products by differentiation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..parameters import Params, parameters, rebuild
from ..recipe import Recipe
from ..trace import Programs
from . import solvers
from .evidence import evidence
from .solvers import Solution

Array = Any


@dataclass
class MatrixFreeBlock:
    """``F v = Σ Jᵀ I J v`` by differentiating the program, for parameters of any form.

    Attributes:
        sites: what they feed. names: the parameters. shapes: of their leaves.
        recipes: how to run the programs again on the block's samples; with ``shares`` each
            leaf has a leading dimension of batches. entries: which of each recipe's entries
            count. programs: what the recipes run. at: the parameters where.
        shares: factor of each batch in the sum, or None for one batch.
        exact: the information. how: where it comes from.
        reason: why the block is not one per unit.
    """

    sites: list[str]
    names: list[str]
    shapes: list[tuple[int, ...]]
    recipes: list[Recipe]
    entries: list[list[int]]
    programs: Programs
    at: Params
    shares: Array | None = None
    exact: bool = True
    how: str = "closed form"
    reason: str = ""
    kind: str = "site"
    tolerance: float = 1e-2
    max_iterations: int = 20

    @property
    def site(self) -> str:
        """Names of the sites that the parameters feed."""
        return ", ".join(self.sites)

    @property
    def params(self) -> list[str]:
        """Names of the parameters."""
        return self.names

    @property
    def key(self) -> str:
        """What identifies the block from batch to batch."""
        return " + ".join(self.names)

    @property
    def arrays(self) -> dict[str, Any]:
        """What changes from batch to batch, a pytree."""
        return {"recipes": self.recipes, "at": self.at, "shares": self.shares}

    def with_arrays(self, arrays: Mapping[str, Any]) -> MatrixFreeBlock:
        """The same block with other arrays."""
        return replace(self, **arrays)

    @property
    def units(self) -> int:
        """Number of blocks."""
        return 1

    @property
    def size(self) -> int:
        """Rows of one block."""
        return sum(math.prod(s) for s in self.shapes)

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

    def gather(self, arrays: Mapping[str, Array]) -> Array:
        """Parameters' arrays by name as (1, size)."""
        return jnp.concatenate([arrays[n].reshape(-1) for n in self.names])[None]

    def scatter(self, x: Array) -> dict[str, Array]:
        """The inverse of ``gather``."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            stop = start + math.prod(shape)
            found[name] = x[0, start:stop].reshape(shape)
            start = stop
        return found

    # the operator

    def product(self) -> Callable[[Array], Array]:
        """``v → F v``, everything that does not depend on ``v`` computed once."""
        parts = [
            self._of_recipe(recipe, which)
            for recipe, which in zip(self.recipes, self.entries, strict=True)
        ]
        return lambda v: sum((part(v) for part in parts), jnp.zeros_like(v))

    def _of_recipe(self, recipe: Recipe, which: list[int]) -> Callable[[Array], Array]:
        if self.shares is None:
            return self._of_batch(recipe, which)

        def product(v: Array) -> Array:
            def body(total: Array, batch: tuple[Recipe, Array]) -> tuple[Array, None]:
                share = batch[1].astype(v.dtype)
                return total + share * self._of_batch(batch[0], which)(v), None

            return jax.lax.scan(body, jnp.zeros_like(v), (recipe, self.shares))[0]

        return product

    def _of_batch(self, recipe: Recipe, which: list[int]) -> Callable[[Array], Array]:
        every = parameters(self.at)
        own = self.gather(every)
        chosen = [evidence(recipe, self.programs, self.at)[i] for i in which]

        def outputs(flat: Array) -> list[list[Array]]:
            own = {n: x.astype(every[n].dtype) for n, x in self.scatter(flat).items()}
            at = rebuild(every | own, self.at)
            found = evidence(recipe, self.programs, at)
            return [found[i].arguments for i in which]

        _, push = jax.linearize(outputs, own)
        pull = jax.linear_transpose(push, own)

        def product(v: Array) -> Array:
            moved = push(v)
            weighted = [
                apply_information(entry.form, entry.information, values)
                for entry, values in zip(chosen, moved, strict=True)
            ]
            return pull(weighted)[0]

        return product

    def matvec(self, v: Array) -> Array:
        """``F v``, (1, size) → (1, size): one Jacobian product and one transposed."""
        return self.product()(v)

    def dense(self) -> Array:
        """The block, (1, size, size): one product per column."""
        product = self.product()
        eye = jnp.eye(self.size, dtype=self.gather(parameters(self.at)).dtype)
        return jax.lax.map(lambda row: product(row[None])[0], eye)[None]

    def diagonal(self) -> Array:
        """The diagonal, (1, size)."""
        return jnp.diagonal(self.dense(), axis1=-2, axis2=-1)

    def solve(self, g: Array, damping: Array | float) -> Array:
        """``(1+α)(αI + F)⁻¹ g``, (1, size)."""
        return self.solution(g, damping).x

    def solution(self, g: Array, damping: Array | float) -> Solution:
        """As ``solve``, with the number of iterations and the error."""
        return solvers.conjugate_gradients(
            self.product(), g, damping, None, self.tolerance, self.max_iterations
        )


def apply_information(form: str, info: Array, values: list[Array]) -> list[Array]:
    """``I v`` for one entry, in the values' types."""
    if form == "scalar":
        found = [info * values[0]]
    elif form == "vector":
        found = [(info @ values[0][..., None])[..., 0]]
    else:
        product = (info @ jnp.stack(values, -1)[..., None])[..., 0]
        found = [product[..., i] for i in range(len(values))]
    return [x.astype(value.dtype) for x, value in zip(found, values, strict=True)]
