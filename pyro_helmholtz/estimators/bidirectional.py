"""The bidirectional Helmholtz machine (Bornschein et al. 2016; thesis section 2.3.2)."""

from __future__ import annotations

import math
from collections.abc import Callable

from .reweighted import RWS_ELBO


class BiHM_ELBO(RWS_ELBO):
    """Ascends ``log p̃*(x) = 2 log Σ_h √(p(x,h) q(h|x))`` in θ and φ at once, without dreams.

    The machine's own model is ``p*(x,h) ∝ √(p(x,h) q(x,h))`` with ``q(x) = p*(x)``, so
    ``p*(x) = p̃*(x) / Z²`` (thesis 2.33 to 2.38). Directions of ascent, means over data,
    ``w̃ = softmax_s ½ log w`` per datum, both from one set of samples of the guide::

        θ: mean_b Σ_s w̃ ∇ log p(x_b, h_sb)
        φ: mean_b Σ_s (w̃ − 1/K) ∇ log q(h_sb | x_b)

    This is reweighted wake-sleep without its sleep phase, with √w in place of w.

    The loss is ``−Σ_b scale_b · 2 (logsumexp_s ½ log w − log K)``. On any samples its negative
    lies between the evidence lower bound and the K-particle bound of RWS; its mean is at most
    ``log p̃*(x)``, which is at most both ``log p(x)`` and ``log p*(x)``. ``Z`` depends on the
    parameters but not on the data; ``log_partition`` estimates ``log Z²``.

    Args:
        num_particles: K.
        baseline: the control variate 1/K in the direction of φ.
        max_plate_nesting, dream_args: see ``HelmholtzELBO``; only a Fisher matrix from dreams
            needs the latter.

    Raises:
        ValueError: an option out of its range.
    """

    power = 0.5

    def __init__(
        self,
        num_particles: int = 10,
        *,
        baseline: bool = True,
        max_plate_nesting: float = math.inf,
        dream_args: Callable | None = None,
    ) -> None:
        super().__init__(
            num_particles,
            sleep_weight=0.0,
            baseline=baseline,
            max_plate_nesting=max_plate_nesting,
            dream_args=dream_args,
        )
