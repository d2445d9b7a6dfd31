"""Reweighted wake-sleep (Bornschein and Bengio 2015; thesis section 2.3.1)."""

from __future__ import annotations

from typing import Any

from ..options import checked_scale
from ..trace import Programs, Wake
from .base import HelmholtzELBO, Pass, score


class RWS_ELBO(HelmholtzELBO):
    """Importance weights per datum in the wake phase, dreams in the sleep phase.

    Directions of ascent, means over data, ``w̃ = softmax_s log w`` per datum::

        θ:      mean_b Σ_s w̃ ∇ log p(x_b, h_sb)
        wake φ: mean_b Σ_s (w̃ − 1/K) ∇ log q(h_sb | x_b)
        sleep φ: mean_r ∇ log q(h_r | x_r)
        φ:      (1 − sleep_weight)·wake φ + sleep_weight·sleep_scale·sleep φ

    Args:
        num_particles: K.
        sleep_weight: share of the sleep phase in φ, between 0 and 1; 0 runs no sleep phase.
        sleep_scale: factor of the sleep direction (rescaled sleep).
        baseline: the control variate 1/K in the wake direction of φ.
        max_plate_nesting, dream_args: see ``HelmholtzELBO``.

    Raises:
        ValueError: ``sleep_weight`` outside [0, 1], ``sleep_scale`` negative or not finite.
    """

    def __init__(
        self,
        num_particles: int = 10,
        *,
        sleep_weight: float = 0.5,
        sleep_scale: float = 1.0,
        baseline: bool = True,
        **options: Any,
    ) -> None:
        if not 0 <= sleep_weight <= 1:
            raise ValueError(f"sleep_weight must be between 0 and 1, got {sleep_weight!r}.")
        super().__init__(num_particles, **options)
        self.sleep_weight = float(sleep_weight)
        self.sleep_scale = checked_scale(sleep_scale)
        self.baseline = baseline

    def run(self, programs: Programs, args: tuple, kwargs: dict[str, Any]) -> Pass:
        """Run the wake phase and, unless its weight is zero, the sleep phase."""
        wake = programs.wake(args, kwargs)
        weights = self.weights(wake)
        surrogate = score(wake.model, wake.layout, weights, terms=wake.log_p)
        if self.sleep_weight < 1:
            signed = self._signed(wake, weights)
            wake_phi = score(wake.guide, wake.layout, signed, terms=wake.log_q)
            surrogate = surrogate + (1 - self.sleep_weight) * wake_phi
        dream = None
        if self.sleep_weight > 0:
            dream = self.sleep(programs, wake, args, kwargs)
            sleep_phi = score(dream.guide, dream.layout, None, observed=False)
            surrogate = surrogate + self.sleep_weight * self.sleep_scale * sleep_phi
        return Pass(-self.bound(wake), surrogate, wake, dream)

    def _signed(self, wake: Wake, weights: dict) -> dict:
        shift = 1.0 / wake.num_particles if self.baseline else 0.0
        return {key: w - shift for key, w in weights.items()}
