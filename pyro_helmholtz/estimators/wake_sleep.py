"""Wake-sleep (Hinton, Dayan, Frey and Neal 1995; maths: table of section 2, row WS)."""

from __future__ import annotations

from typing import Any

from ..options import checked_scale
from ..trace import Programs
from .base import HelmholtzELBO, Pass, score


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

    def run(self, programs: Programs, args: tuple, kwargs: dict[str, Any]) -> Pass:
        """Run the wake and the sleep phase."""
        wake = programs.wake(args, kwargs)
        dream = self.sleep(programs, wake, args, kwargs)
        up = score(wake.model, wake.layout, wake.uniform(), terms=wake.log_p)
        down = score(dream.guide, dream.layout, None, observed=False)
        return Pass(-wake.bound(), up + self.sleep_scale * down, wake, dream)
