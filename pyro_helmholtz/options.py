"""Checks of options: what no run could use is refused by its name."""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any


def check_counts(least: int = 1, /, **counts: Any) -> None:
    """Refuse what is no whole number, or is too small.

    Args:
        least: the smallest that will do. counts: by the names of the options.

    Raises:
        ValueError: naming the option.
    """
    for name, count in counts.items():
        if isinstance(count, bool) or not isinstance(count, Integral) or count < least:
            raise ValueError(f"{name} must be an int of at least {least}, got {count!r}.")


def checked_scale(sleep_scale: float) -> float:
    """The factor of the sleep direction, where it is one.

    Raises:
        ValueError: a factor that is negative or not finite.
    """
    if not 0 <= sleep_scale < math.inf:
        raise ValueError(f"sleep_scale must be finite and not negative, got {sleep_scale!r}.")
    return float(sleep_scale)
