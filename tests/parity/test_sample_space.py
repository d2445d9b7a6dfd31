"""Solves in the space of the samples: both packages' bound on the error, against dense solves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from numpyro_helmholtz.fisher import solvers as in_numpyro
from pyro_helmholtz.fisher import solvers as in_pyro

from .test_weights import _double

__all__ = ["_double"]
ROWS, FEATURES, UNITS = 60, 45, 12
DAMPING = 0.1
JITTED = jax.jit(in_numpyro.in_sample_space)  # compiled once for all


def made(kind):
    """Features (rows, features), coefficients (rows, units), gradients (units, features)."""
    rng = np.random.default_rng(0)
    u = rng.normal(size=(ROWS, FEATURES))
    if kind == "binary":
        u = (rng.uniform(size=u.shape) < rng.uniform(size=FEATURES)) * 1.0
    elif kind == "strong factors":
        u = 0.3 * u + 3 * rng.normal(size=(ROWS, 4)) @ rng.normal(size=(4, FEATURES))
    elif kind == "nearly singular":
        u = rng.normal(size=(ROWS, 5)) @ rng.normal(size=(5, FEATURES)) + 1e-3 * u
    q = 0.05 * rng.uniform(size=(ROWS, UNITS))
    q[:, 0], q[:5] = 0, 0  # a unit and rows without weight
    g = rng.normal(size=(UNITS, ROWS)) @ (u * rng.uniform(size=(ROWS, 1))) / ROWS
    return u, q, g


def dense_solution(u, q, g):
    """(1+α)(αI + F_j)⁻¹ g_j with dense blocks."""
    dense = DAMPING * np.eye(FEATURES) + np.einsum("nj,nk,nl->jkl", q, u, u)
    return np.linalg.solve(dense, (1 + DAMPING) * g[..., None])[..., 0]


def solved(package, arrays, tolerance, iterations):
    """x, its error's bound and the iterations done."""
    if package is in_pyro:
        solve, given = in_pyro.in_sample_space, [torch.from_numpy(a) for a in arrays]
    else:
        solve, given = JITTED, [jnp.asarray(a) for a in arrays]
    found = solve(*given, DAMPING, tolerance, iterations)
    return np.asarray(found.x), float(found.error), int(found.iterations)


def after(arrays, iterations, monkeypatch):
    """As ``solved`` after just so many iterations in both packages, with the closer bound."""
    monkeypatch.setattr(in_pyro, "NEAR", np.inf)
    return [solved(package, arrays, 1e-30, iterations) for package in (in_pyro, in_numpyro)]


@pytest.mark.parametrize("kind", ["normal", "binary", "strong factors", "nearly singular"])
def test_the_bound_holds_after_any_number_of_iterations(kind, monkeypatch):
    arrays = made(kind)
    exact = dense_solution(*arrays)
    for iterations in range(1, 9):
        found = after(arrays, iterations, monkeypatch)
        for x, bound, done in found:
            assert done == iterations
            assert np.linalg.norm(x - exact) <= bound * np.linalg.norm(x)
        (one, _, _), (other, _, _) = found
        if iterations <= 3:  # then rounding makes the ways part where a few factors are strong
            assert np.linalg.norm(one - other) < 1e-8 * np.linalg.norm(one)


def test_the_bound_is_close_where_the_residual_stands_along_the_mean(monkeypatch):
    """By the residual's length alone it is 1.6 to 5.2 times the error."""
    arrays = made("binary")
    exact = dense_solution(*arrays)
    with monkeypatch.context() as patch:
        for iterations in range(1, 9):
            for x, bound, _ in after(arrays, iterations, patch):
                assert bound * np.linalg.norm(x) <= 1.75 * np.linalg.norm(x - exact)
    closer = [solved(package, arrays, 1e-2, 100)[2] for package in (in_pyro, in_numpyro)]
    monkeypatch.setattr(in_pyro, "NEAR", 0)
    assert closer == [7, 7] and solved(in_pyro, arrays, 1e-2, 100)[2] == 8
