"""Wake-sleep (Hinton, Dayan, Frey and Neal 1995; maths: table of section 2, row WS)."""

from __future__ import annotations

from typing import Any

from jax import Array

from ..options import checked_scale
from ..trace import Params, Programs
from .base import HelmholtzELBO, Pass, score, split, wake_pass


class WakeSleep_ELBO(HelmholtzELBO):
    """θ follows the guide's samples with equal weights, φ follows dreams.

    Directions of ascent, means over data::

        θ: mean_b 1/K Σ_s ∇ log p(x_b, h_sb),   h ~ q
        φ: mean_r ∇ log q(h_r | x_r),           (x, h) ~ p

    Args:
        num_particles: K. sleep_scale: factor of the sleep direction (rescaled sleep).
        max_plate_nesting, dream_args: see ``HelmholtzELBO``.

    Raises:
        ValueError: ``sleep_scale`` negative or not finite.
    """

    def __init__(self, num_particles: int = 1, *, sleep_scale: float = 1.0, **options: Any) -> None:
        super().__init__(num_particles, **options)
        self.sleep_scale = checked_scale(sleep_scale)

    def run(
        self,
        programs: Programs,
        rng_key: Array,
        params: Params,
        args: tuple,
        kwargs: dict[str, Any],
        mutable: Params | None = None,
    ) -> tuple[Array, Pass]:
        """Run the wake and the sleep phase."""
        wake_key, sleep_key = split(rng_key)
        wake = programs.wake(wake_key, params, args, kwargs, mutable=mutable)
        up = score(wake.model, wake.layout, wake.uniform())
        down, slept = self.sleep(programs, sleep_key, params, args, kwargs, mutable, wake)
        return up + down, wake_pass(wake, args, kwargs, slept.dream)
