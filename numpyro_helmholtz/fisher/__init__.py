"""The Fisher information of a program: families → evidence → blocks → memory → solve."""

from . import counts  # noqa: F401  # registers its rules
