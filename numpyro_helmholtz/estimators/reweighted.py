"""Reweighted wake-sleep (Bornschein and Bengio 2015; thesis section 2.3.1)."""

from __future__ import annotations

from typing import Any

from jax import Array

from ..options import checked_scale
from ..trace import Params, Programs
from .base import HelmholtzELBO, Pass, score, split, wake_pass


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

    def run(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
    ) -> tuple[Array, Pass]:
        """Run the wake phase and, unless its weight is zero, the sleep phase."""
        wake_key, sleep_key = split(rng_key)
        wake = programs.wake(wake_key, params, args, kwargs, mutable=mutable)
        weights = self.weights(wake)
        surrogate = score(wake.model, wake.layout, weights)
        if self.sleep_weight < 1:
            signed = weights - 1.0 / wake.num_particles if self.baseline else weights
            wake_phi = score(wake.guide, wake.layout, signed, observed=False)
            surrogate = surrogate + (1 - self.sleep_weight) * wake_phi
        dream = None
        if self.sleep_weight > 0:
            sleep_phi, slept = self.sleep(programs, sleep_key, params, args, kwargs, mutable, wake)
            surrogate = surrogate + self.sleep_weight * sleep_phi
            dream = slept.dream
        return surrogate, wake_pass(wake, args, kwargs, dream, self.power)
