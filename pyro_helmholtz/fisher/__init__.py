"""The Fisher information of a program: families → evidence → blocks → memory → solve."""

from . import closed_forms, counts, location_scale  # noqa: F401  # register their rules
