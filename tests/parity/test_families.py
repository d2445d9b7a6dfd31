"""Fisher information of both packages against arithmetic of fifty digits."""

from decimal import Decimal, localcontext

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from numpyro_helmholtz.fisher import location_scale as in_numpyro
from pyro_helmholtz.fisher import location_scale as in_pyro

from .test_weights import _double

__all__ = ["_double"]
DF = (0.3, 1.0, 4.0, 29.9, 30.1, 60.0, 400.0, 1e4)


def of_df(df):
    """``Σ_k (-1)^k (ν+k)⁻² − (ν+5) / (2ν (ν+1) (ν+3))``, the tail by Boole's summation."""
    with localcontext() as context:
        context.prec = 50
        v, far = Decimal(df), Decimal(df) + 400
        series = sum((-1) ** k / (v + k) ** 2 for k in range(400))
        tail = far**-2 + far**-3 - far**-5 + 3 * far**-7 - 17 * far**-9
        return float(series + tail / 2 - (v + 5) / (2 * v * (v + 1) * (v + 3)))


@pytest.mark.parametrize(("dtype", "error"), [("float64", 1e-8), ("float32", 1e-4)])
def test_degrees_of_freedom(dtype, error):
    """Few, and so many that the two terms agree in all their digits."""
    truth = [of_df(df) for df in DF]
    for found in (
        in_numpyro._of_df(jnp.asarray(DF, dtype)),
        in_pyro._of_df(torch.tensor(DF, dtype=getattr(torch, dtype))),
    ):
        assert str(found.dtype).endswith(dtype)
        np.testing.assert_allclose(np.asarray(found), truth, rtol=error)
