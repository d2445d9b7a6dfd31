"""The front ends of the bidirectional Helmholtz machine, with and without a Fisher matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from .estimators.bidirectional import BiHM_ELBO
from .natural import DAMPING, FORM, TOLERANCE, NaturalSVI, Schedule
from .svi import HelmholtzSVI


class BiHM(HelmholtzSVI):
    """Bidirectional Helmholtz machine; see ``BiHM_ELBO``.

    Args:
        model, guide, optim, average: see ``HelmholtzSVI``.
        num_particles, baseline, max_plate_nesting, dream_args: see ``BiHM_ELBO``.

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
        baseline: bool = True,
        average: bool = False,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        estimator = BiHM_ELBO(
            num_particles,
            baseline=baseline,
            max_plate_nesting=max_plate_nesting,
            dream_args=dream_args,
        )
        super().__init__(model, guide, optim, estimator, average=average)


class NaturalBiHM(NaturalSVI):
    """Bidirectional Helmholtz machine with natural gradients (Várady 2025, section 5.3.8).

    The Fisher matrices are those of p and of q, block by block: that of p* has no such blocks.
    The model's carries the machine's weights ``w̃ ∝ √w`` of the particles.

    Args:
        model, guide, optim: see ``HelmholtzSVI``.
        num_particles, baseline, max_plate_nesting, dream_args: see ``BiHM_ELBO``.
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
        baseline: bool = True,
        tolerance: float = TOLERANCE,
        kl_clip: float | None = None,
        average: bool | None = None,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        estimator = BiHM_ELBO(
            num_particles,
            baseline=baseline,
            max_plate_nesting=max_plate_nesting,
            dream_args=dream_args,
        )
        super().__init__(
            model,
            guide,
            optim,
            estimator,
            damping=damping,
            fisher=fisher,
            refresh_every=refresh_every,
            fisher_samples=fisher_samples,
            tolerance=tolerance,
            kl_clip=kl_clip,
            average=average,
        )


__all__ = ["BiHM", "NaturalBiHM"]
