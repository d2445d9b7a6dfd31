"""Natural gradients: an estimator's direction behind the inverse Fisher matrix.

``x = (1+α)(αI + F)⁻¹ g`` per block (Várady 2025, sections 5.1 to 5.3), with F from earlier
minibatches; the result replaces the gradient before any optimiser of Pyro.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .diagnostics import Structure, describe
from .estimators.base import HelmholtzELBO, Pass
from .estimators.reweighted import RWS_ELBO
from .finder import Finder
from .fisher.assemble import Source, assemble
from .fisher.blocks import Block
from .fisher.evidence import entries
from .fisher.memory import Fisher, Memory
from .layout import Layout
from .options import check_counts
from .recipe import Recipe
from .svi import Directions, HelmholtzSVI, check_gradients, gradient, sgd

Schedule = float | Callable[[int], float]
DAMPING = 0.1
FORM = "kronecker"
TOLERANCE = 1e-2
LEARNING_RATE = 0.2
KL_CLIP = 3.0  # nats per datum, where a variable is unbounded
REFRESH_ALL, REFRESH_EVERY = 300, 8  # steps
MEAN_EVERY = 8  # steps from one mean block to the next, see ``Statistics``


class NaturalSVI(HelmholtzSVI):
    """Base of the front ends with natural gradients, for any estimator.

    The model's Fisher matrix carries the estimator's own weights of the particles, the guide's
    the weights 1/K.

    Args:
        model, guide, optim, estimator, sleep_steps: see ``HelmholtzSVI``.
        damping: α > 0, or a schedule ``fn(step) -> α``.
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

    state_keys = (*HelmholtzSVI.state_keys, "fisher", "steps")

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | None,
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
        self._finder = Finder()
        self._steps = 0
        self._fresh: list[Block] | None = None
        self._fisher: Fisher | None = None
        self._bound = math.inf

    def default_optimiser(self) -> PyroOptim:
        """SGD of rate 0.2, the noise of which the average takes out."""
        return sgd(lr=LEARNING_RATE)

    def _alpha(self) -> float:
        alpha = float(self.damping(self._steps) if callable(self.damping) else self.damping)
        if not alpha > 0:
            raise ValueError(f"the damping schedule gave {alpha} at step {self._steps}.")
        return alpha

    def _update(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        done = self.estimator.run(self.programs, args, kwargs)
        leaves = done.leaves()
        due = self._steps < self._refresh_all or self._steps % self.refresh_every == 0
        due = due or not self.memory.batches
        self._fresh = self._blocks(done, leaves, args, kwargs) if due else None
        direction = gradient(done.surrogate, leaves)
        self._fisher = self._operator(self._fresh)
        self._bound = self._largest(done.wake.layout)
        return float(done.loss), leaves, self._precondition(direction)

    def _operator(self, fresh: list[Block] | None) -> Fisher:
        current = self.memory.batches[-1] if fresh is None else fresh
        return self.memory.fisher(current, self._alpha())

    def _precondition(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self._fisher is not None
        natural = self._fisher.solve(direction)
        return _clipped(direction, natural, self._fisher.damping, self._bound)

    def _largest(self, layout: Layout) -> float:
        """The bound on ``½ xᵀFx``."""
        if self._cautious and not layout.bounded:
            return KL_CLIP
        return math.inf if self.kl_clip is None else self.kl_clip

    def _after(self) -> None:
        if self._fresh is not None:
            self.memory.remember(self._fresh)
        self._fresh = None
        self._steps += 1

    def _blocks(
        self,
        done: Pass,
        leaves: dict[str, Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        uncovered: dict[str, list[str]] | None = None,
    ) -> list[Block]:
        """The blocks of this batch; run before the backward pass frees the graph."""
        wake = done.wake
        self._finder.start({id(leaf): name for name, leaf in leaves.items()})

        def source(program: str, trace: Any, weights: Any, layout: Layout, dreamt: bool) -> Source:
            recipe = Recipe.of(program, trace, args, kwargs, weights, layout, dreamt=dreamt)
            return Source(
                list(entries(trace, weights, layout, self._finder, observed=program == "model")),
                recipe,
            )

        if self.memory.samples == "dream":
            dream = self.programs.dream(args, kwargs, subsample=wake.guide, with_grad=True)
            model = source("model", dream.model, None, dream.layout, True)
        else:
            model = source("model", wake.model, self.estimator.weights(wake), wake.layout, False)
        guide = source("guide", wake.guide, wake.uniform(), wake.layout, False)
        with torch.no_grad():
            return assemble([model, guide], leaves, self.programs, self._finder, uncovered)

    def directions(self, *args: Any, **kwargs: Any) -> Directions:
        """The gradient, the natural direction and the operator between them.

        The Fisher matrix is that of the next step: from earlier minibatches where there are
        any, else from this one. Updates nothing.
        """
        check_gradients()
        self._resume(args, kwargs)
        with self._points():
            done = self.estimator.run(self.programs, args, kwargs)
            leaves = done.leaves()
            fresh = self._blocks(done, leaves, args, kwargs)
            direction = gradient(done.surrogate, leaves)
            fisher = self._operator(fresh)
            bound = self._largest(done.wake.layout)
            natural = _clipped(direction, fisher.solve(direction), fisher.damping, bound)
        return Directions(direction, natural, fisher, float(done.loss))

    def structure(self, *args: Any, **kwargs: Any) -> Structure:
        """Every parameter, the site that it feeds, its block and its solver; print it."""
        check_gradients()
        self._resume(args, kwargs)
        done = self.estimator.run(self.programs, args, kwargs)
        leaves = done.leaves()
        uncovered: dict[str, list[str]] = {}
        fisher = self._operator(self._blocks(done, leaves, args, kwargs, uncovered))
        return describe(fisher.blocks, leaves, uncovered)

    def state_dict(self) -> dict[str, Any]:
        """As the base's, with the Fisher matrix's memory."""
        return super().state_dict() | {"fisher": self.memory.state(), "steps": self._steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As the base's, with the Fisher matrix's memory."""
        super().load_state_dict(state)
        self.memory.load(state["fisher"], self.programs)
        self._steps = state["steps"]


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
        optim: PyroOptim | None = None,
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


def _clipped(
    g: dict[str, Tensor], x: dict[str, Tensor], alpha: float, bound: float
) -> dict[str, Tensor]:
    """Shrink to ``½ xᵀFx ≤ bound``, by ``xᵀFx = (1+α) gᵀx − α xᵀx``."""
    if math.isinf(bound):
        return x
    gx = sum(float((g[n] * x[n]).sum()) for n in x)
    xx = sum(float(x[n].square().sum()) for n in x)
    divergence = 0.5 * ((1 + alpha) * gx - alpha * xx)
    if divergence <= bound:
        return x
    shrink = math.sqrt(bound / divergence)
    return {name: shrink * value for name, value in x.items()}
