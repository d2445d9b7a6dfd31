"""Natural gradients: an estimator's direction behind the inverse Fisher matrix.

``x = (1+α)(αI + F)⁻¹ g`` per block (Várady 2025, sections 5.1 to 5.3), with F from earlier
minibatches; the result replaces the gradient before any optimiser.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, random
from numpyro.optim import optax_to_numpyro

from . import branches
from .arguments import Arguments
from .diagnostics import Structure, describe
from .estimators.base import HelmholtzELBO, Pass
from .estimators.reweighted import RWS_ELBO
from .fisher.assemble import Block, assemble
from .fisher.memory import Fisher, Kept, Memory, with_absent
from .later import later
from .layout import Layout
from .options import check_counts
from .parameters import Params, parameters, rebuild, signature
from .recipe import Recipe
from .runner import once
from .svi import Directions, HelmholtzState, HelmholtzSVI

Schedule = float | Callable[[Array], Array]
DAMPING = 0.1
FORM = "kronecker"
TOLERANCE = 1e-2
LEARNING_RATE = 0.2
KL_CLIP = 3.0  # nats per datum, where a variable is unbounded
REFRESH_ALL, REFRESH_EVERY = 300, 8  # steps
MEAN_EVERY = 8  # steps from one mean block to the next, see ``statistics.renewed``


class NaturalSVI(HelmholtzSVI):
    """Base of the front ends with natural gradients, for any estimator.

    The model's Fisher matrix carries the estimator's own weights of the particles, the guide's
    the weights 1/K.

    Args:
        model, guide, optim, estimator, sleep_steps: see ``HelmholtzSVI``.
        damping: α > 0, or a schedule ``fn(step) -> α`` in terms of ``jax.numpy``.
        fisher: "unit" (exact blocks), "diagonal" or "kronecker".
        fisher_samples: "lagged" (the previous minibatch), "average" (several), "same" (the
            present one, for comparison) or "dream" (the model's blocks from dreams). None is
            "average" for the Kronecker form, whose running means cost nothing more, and
            "lagged" for the others.
        refresh_every: take in a minibatch every so many steps (the thesis's K-step). None is 1,
            but for the Kronecker form with "average" every step of the first 300, in which the
            Fisher matrix moves fast, and then every 8.
        tolerance: relative error of iterative solves, as they estimate it.
        kl_clip: largest ``½ xᵀFx``, a bound on the divergence per datum, in nats, of a step of
            rate one; the direction is shrunk to meet it. ``math.inf`` for no bound. None is 3
            with the default optimiser where a variable is unbounded (real numbers, counts), and
            no bound elsewhere: of unbounded variables one batch says little of the next, and
            steps at the large rate would run away.
        average: see ``HelmholtzSVI``. None: with the default optimiser, whose large rate it
            allows, but not with another.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        estimator: HelmholtzELBO,
        *,
        sleep_steps: int = 1,
        damping: Schedule = DAMPING,
        fisher: str = FORM,
        refresh_every: int | None = None,
        fisher_samples: str | None = None,
        tolerance: float = TOLERANCE,
        kl_clip: float | None = None,
        average: bool | None = None,
    ) -> None:
        super().__init__(
            model,
            guide,
            optim,
            estimator,
            sleep_steps=sleep_steps,
            average=optim is None if average is None else average,
        )
        number = hasattr(damping, "__float__")
        if not callable(damping) and not (number and damping > 0):
            raise ValueError(f"damping must be positive or a schedule, got {damping!r}.")
        if fisher_samples is None:
            fisher_samples = "average" if fisher == "kronecker" else "lagged"
        self._refresh_all = 0
        if refresh_every is None:
            averaged = (fisher, fisher_samples) == ("kronecker", "average")
            refresh_every = REFRESH_EVERY if averaged else 1
            self._refresh_all = REFRESH_ALL
        check_counts(refresh_every=refresh_every)
        if fisher_samples == "same" and refresh_every > 1:
            raise ValueError(
                "fisher_samples='same' takes each step's own minibatch: refresh_every must be 1, "
                f"got {refresh_every}."
            )
        if kl_clip is not None and not kl_clip > 0:
            raise ValueError(f"kl_clip must be positive or None, got {kl_clip!r}.")
        self._cautious = optim is None and kl_clip is None
        if not tolerance > 0:
            raise ValueError(f"tolerance must be positive, got {tolerance!r}.")
        self.damping, self.refresh_every, self.kl_clip = damping, refresh_every, kl_clip
        every = max(1, MEAN_EVERY // refresh_every)
        self.memory = Memory(fisher, fisher_samples, tolerance=tolerance, mean_every=every)
        self._begin = once(self._memory)
        self._looked = jax.jit(self._look, static_argnames="made")
        self._made: dict[tuple, _Made] = {}

    def default_optimiser(self) -> Any:
        """SGD of rate 0.2, the noise of which the average takes out."""
        return optax_to_numpyro(optax.sgd(LEARNING_RATE))

    def _alpha(self, step: Any) -> Any:
        return self.damping(step) if callable(self.damping) else self.damping

    # the hooks of the base

    def _fisher_init(
        self, rng_key: Array, params: Params, args: tuple, kwargs: dict, mutable: Params
    ) -> Kept:
        return self._begin(rng_key, params, Arguments.of((args, kwargs)), mutable)

    def _memory(
        self, rng_key: Array, params: Params, arguments: Arguments, mutable: Params
    ) -> Kept:
        args, kwargs = arguments.rebuilt()
        _, done = self.estimator.run(self.programs, rng_key, params, args, kwargs, mutable)
        return self.memory.start(self._blocks(replace(done, params=params, rng_key=rng_key)))

    def _empty_memory(self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]) -> Kept:
        """The memory before a first update, with what is kept of blocks that are not here."""
        return with_absent(super()._empty_memory(state, args, kwargs), state.memory)

    def _direction(self, done: Pass, gradient: Params, memory: Kept) -> tuple[Params, Kept]:
        assert done.step is not None
        blocks = self._blocks_later(done)
        leaves = parameters(gradient)
        taken_in = memory
        if done.model is not None:
            taken_in = self._remember(memory, blocks, done.step)
        fisher = self.memory.fisher(memory, blocks(), self._alpha(done.step), taken_in)
        natural = self._natural(done, leaves, fisher)
        return rebuild(natural, gradient), taken_in

    def _remember(self, memory: Kept, blocks: Callable[[], list[Block]], step: Array) -> Kept:
        def take_in() -> Kept:
            return self.memory.remember(memory, blocks())

        if self.refresh_every == 1:
            return take_in()
        # A batch of another shape is taken in whenever it comes.
        if signature(jax.eval_shape(take_in)) != signature(memory):
            return take_in()
        due = (memory.batches == 0) | (step < self._refresh_all) | (step % self.refresh_every == 0)
        return branches.cond(due, take_in, memory)

    def _natural(self, done: Pass, gradient: dict[str, Array], fisher: Fisher) -> dict[str, Array]:
        """The natural direction, shrunk where its divergence is too large."""
        recipe = done.model or done.dream
        assert recipe is not None
        bound = self._largest(recipe.layout)
        return _clipped(gradient, fisher.solve(gradient), fisher.damping, bound)

    def _largest(self, layout: Layout) -> float:
        """The bound on ``½ xᵀFx``."""
        if self._cautious and not layout.bounded:
            return KL_CLIP
        return math.inf if self.kl_clip is None else self.kl_clip

    def _blocks_later(self, done: Pass) -> Callable[[], list[Block]]:
        """What computes the blocks where it is called: in the branches that need them."""
        made: list[Block] = []

        def arrays() -> list[Any]:
            made[:] = self._blocks(done)
            return [block.arrays for block in made]

        if self.refresh_every == 1:
            arrays()
            return lambda: made
        rest = later(arrays)
        return lambda: [b.with_arrays(a) for b, a in zip(made, rest(), strict=True)]

    def _blocks(self, done: Pass, uncovered: dict[str, list[str]] | None = None) -> list[Block]:
        """The blocks of this batch; those of the guide alone in an extra sleep step."""
        assert done.params is not None
        recipes = [recipe for recipe in (done.model, done.guide) if recipe is not None]
        if not recipes:
            recipes = [recipe for recipe in (done.dream,) if recipe is not None]
        elif self.memory.samples == "dream":
            recipes[0] = self._dreams(done)
        return assemble(recipes, self.programs, done.params, uncovered)

    def _dreams(self, done: Pass) -> Recipe:
        """The model on dreams of its own."""
        assert done.model is not None and done.rng_key is not None and done.params is not None
        args, kwargs = done.model.args, done.model.kwargs
        mutable = done.model.mutable
        key = random.fold_in(done.rng_key, 2)
        dream = self.programs.dream(key, done.params, args, kwargs, mutable=mutable)
        return Recipe.of_dream("model", dream, args, kwargs, mutable)

    # looking

    def directions(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> Directions:
        """The gradient, the natural direction and the operator between them.

        The Fisher matrix is that of the next update: from earlier minibatches where there are
        any, else from this one. Updates nothing.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        self._check_data(state, args, kwargs)
        arguments = Arguments.of((args, kwargs))
        made = self._made.setdefault(signature((state, arguments)), _Made())
        gradient, natural, loss, arrays, damping = self._looked(state, arguments, made=made)
        blocks = [b.with_arrays(a) for b, a in zip(made.blocks, arrays, strict=True)]
        return Directions(gradient, natural, Fisher(blocks, damping), loss)

    def _look(self, state: HelmholtzState, arguments: Arguments, made: _Made) -> tuple:
        """What ``directions`` returns, as arrays; ``made`` takes what is static."""
        args, kwargs = arguments.rebuilt()
        done, gradient = self._pass(state, args, kwargs)
        leaves = parameters(gradient)
        blocks = self._blocks(done, made.uncovered)
        taken_in = self.memory.remember(state.memory, blocks)
        fisher = self.memory.fisher(state.memory, blocks, self._alpha(state.step), taken_in)
        natural = self._natural(done, leaves, fisher)
        made.blocks = fisher.blocks
        arrays = [block.arrays for block in fisher.blocks]
        return leaves, natural, done.loss, arrays, jnp.asarray(fisher.damping)

    def structure(self, rng_key: Array, *args: Any, **kwargs: Any) -> Structure:
        """Every parameter, the site that it feeds, its block and its solver; print it."""
        state = self.init(rng_key, *args, **kwargs)
        made = _Made()
        look = partial(self._look, made=made)
        jax.eval_shape(look, state, Arguments.of((args, kwargs)))
        leaves = parameters(self._optimiser.params(state.optim_state))
        return describe(made.blocks, leaves, made.uncovered)


class NaturalRWS(NaturalSVI):
    """Reweighted wake-sleep with natural gradients.

    Args:
        model, guide, optim, sleep_steps: see ``HelmholtzSVI``.
        num_particles, sleep_weight, sleep_scale, baseline, max_plate_nesting, dream_args: see
            ``RWS_ELBO``.
        damping, fisher, fisher_samples, refresh_every, tolerance, kl_clip, average: see
            ``NaturalSVI``.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any = None,
        num_particles: int = 10,
        *,
        damping: Schedule = DAMPING,
        fisher: str = FORM,
        refresh_every: int | None = None,
        fisher_samples: str | None = None,
        sleep_weight: float = 0.5,
        sleep_steps: int = 1,
        sleep_scale: float = 1.0,
        baseline: bool = True,
        tolerance: float = TOLERANCE,
        kl_clip: float | None = None,
        average: bool | None = None,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        estimator = RWS_ELBO(
            num_particles,
            sleep_weight=sleep_weight,
            sleep_scale=sleep_scale,
            baseline=baseline,
            max_plate_nesting=max_plate_nesting,
            dream_args=dream_args,
        )
        super().__init__(
            model,
            guide,
            optim,
            estimator,
            sleep_steps=sleep_steps,
            damping=damping,
            fisher=fisher,
            refresh_every=refresh_every,
            fisher_samples=fisher_samples,
            tolerance=tolerance,
            kl_clip=kl_clip,
            average=average,
        )


class _Made:
    """The blocks of a compiled call; only what is static in them is of use.

    Attributes:
        blocks: of the Fisher matrix. uncovered: see ``assemble``.
    """

    def __init__(self) -> None:
        self.blocks: Sequence[Block] = ()
        self.uncovered: dict[str, list[str]] = {}


def _clipped(
    g: dict[str, Array], x: dict[str, Array], alpha: Any, bound: float
) -> dict[str, Array]:
    """Shrink to ``½ xᵀFx ≤ bound``, by ``xᵀFx = (1+α) gᵀx − α xᵀx``."""
    if math.isinf(bound):
        return x
    gx = sum((g[n] * x[n]).sum() for n in x)
    xx = sum((x[n] ** 2).sum() for n in x)
    divergence = 0.5 * ((1 + alpha) * gx - alpha * xx)
    over = divergence > bound
    shrink = jnp.where(over, jnp.sqrt(bound / jnp.where(over, divergence, 1)), 1)
    return {name: (shrink * value).astype(value.dtype) for name, value in x.items()}
