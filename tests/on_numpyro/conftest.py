"""Tests compare with exact values, so everything here runs in float64."""

from .. import quick_compile  # noqa: F401, I001

import jax
import pytest

jax.config.update("jax_enable_x64", True)


@pytest.fixture(autouse=True, scope="module")
def _forget():
    """Compiled programs of a file are of no use to the next, and take gigabytes in all."""
    yield
    jax.clear_caches()
