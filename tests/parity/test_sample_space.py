"""Iterative solves: both packages' errors and bounds on them, against dense solves."""

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
SOLVE = {  # compiled once for all
    in_pyro: in_pyro.in_sample_space,
    in_numpyro: jax.jit(in_numpyro.in_sample_space),
}


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


def dense_solution(u, q, g, damping=DAMPING):
    """(1+α)(αI + F_j)⁻¹ g_j with dense blocks."""
    dense = damping * np.eye(FEATURES) + np.einsum("nj,nk,nl->jkl", q, u, u)
    return np.linalg.solve(dense, (1 + damping) * g[..., None])[..., 0]


def without_last_steps(monkeypatch):
    """Solves that end with an iteration."""
    for package in (in_pyro, in_numpyro):
        monkeypatch.setattr(package, "FAST", 0)
    monkeypatch.setitem(SOLVE, in_numpyro, jax.jit(lambda *a: in_numpyro.in_sample_space(*a)))


def solved(package, arrays, tolerance, iterations, damping=DAMPING):
    """x, its error's bound and the iterations done."""
    made = torch.from_numpy if package is in_pyro else jnp.asarray
    solve, given = SOLVE[package], [made(a) for a in arrays]
    found = solve(*given, damping, tolerance, iterations)
    return np.asarray(found.x), float(found.error), int(found.iterations)


def after(arrays, iterations):
    """As ``solved`` after just so many iterations in both packages."""
    return [solved(package, arrays, 1e-30, iterations) for package in (in_pyro, in_numpyro)]


@pytest.mark.parametrize("kind", ["normal", "binary", "strong factors", "nearly singular"])
def test_the_bound_holds_after_any_number_of_iterations(kind):
    arrays = made(kind)
    exact = dense_solution(*arrays)
    for iterations in range(1, 9):
        found = after(arrays, iterations)
        for x, bound, done in found:
            assert done == iterations
            assert np.linalg.norm(x - exact) <= bound * np.linalg.norm(x)
        (one, _, _), (other, _, _) = found
        if iterations <= 3:  # then rounding makes the ways part where a few factors are strong
            assert np.linalg.norm(one - other) < 1e-8 * np.linalg.norm(one)


@pytest.mark.parametrize("kind", ["normal", "binary", "strong factors", "nearly singular"])
def test_no_iteration_is_done_after_the_bound_is_met(kind, monkeypatch):
    """Most often the bound is not looked at: it must be seen where it is first met."""
    arrays = made(kind)
    without_last_steps(monkeypatch)
    bounds = np.array([[found[1] for found in after(arrays, n)] for n in range(1, 61)])
    for p, package in enumerate((in_pyro, in_numpyro)):
        for tolerance in (0.3, 0.1, 1e-2, 1e-4):
            _, bound, done = solved(package, arrays, tolerance, 100)
            assert done == 1 + np.argmax(bounds[:, p] <= tolerance)
            assert bound == pytest.approx(bounds[done - 1, p], rel=1e-6)


TOLERANCES = (0.1, 1e-2, 1e-3, 1e-4, 1e-6)


@pytest.mark.parametrize("kind", ["normal", "binary", "strong factors", "nearly singular"])
def test_a_last_step_keeps_the_tolerance(kind, monkeypatch):
    arrays = made(kind)
    exact = dense_solution(*arrays)
    found = {p: [solved(p, arrays, t, 100) for t in TOLERANCES] for p in SOLVE}
    without_last_steps(monkeypatch)
    for package, solutions in found.items():
        for tolerance, (x, error, done) in zip(TOLERANCES, solutions, strict=True):
            assert done <= solved(package, arrays, tolerance, 100)[2]
            assert error <= tolerance
            assert np.linalg.norm(x - exact) <= tolerance * np.linalg.norm(x)


def test_a_last_step_saves_an_iteration(monkeypatch):
    """Where conjugate gradients go fast; the same one in both packages."""
    u, q, g = made("normal")
    arrays = (u[:20], q[:20], g)  # far fewer rows than features: they hardly overlap
    found = {p: [solved(p, arrays, t, 100) for t in TOLERANCES[:3]] for p in SOLVE}
    without_last_steps(monkeypatch)
    full = [solved(in_numpyro, arrays, t, 100)[2] for t in TOLERANCES[:3]]
    for ours, theirs, most in zip(*found.values(), full, strict=True):
        assert np.linalg.norm(ours[0] - theirs[0]) < 1e-8 * np.linalg.norm(ours[0])
        assert ours[2] == theirs[2] < most


def preconditioned(package, tolerance):
    """A solve in which all units share the preconditioner, and the relative error."""
    u, q, g = made("normal")
    q = 0.01 + 0.2 * q  # nearly alike: the mean block is near to every unit's
    mean = DAMPING * np.eye(FEATURES) + (u.T * q.mean(1)) @ u
    arrays = (u, q, g, np.linalg.inv(mean))
    given = [torch.from_numpy(a) if package is in_pyro else jnp.asarray(a) for a in arrays]
    rows, weights, gradient, inverse = given
    found = package.conjugate_gradients(
        lambda v: ((v @ rows.T) * weights.T) @ rows,
        gradient,
        DAMPING,
        lambda r: r @ inverse,
        tolerance,
    )
    exact = dense_solution(u, q, g)
    return found, np.linalg.norm(np.asarray(found.x) - exact) / np.linalg.norm(exact)


def test_preconditioned_solves_end_with_a_last_step(monkeypatch):
    found = {p: [preconditioned(p, t) for t in TOLERANCES] for p in SOLVE}
    without_last_steps(monkeypatch)
    full = [preconditioned(in_numpyro, t)[0].iterations for t in TOLERANCES]
    for tolerance, ours, theirs, most in zip(TOLERANCES, *found.values(), full, strict=True):
        assert ours[1] <= tolerance and float(ours[0].error) <= tolerance
        assert np.linalg.norm(np.asarray(ours[0].x) - theirs[0].x) < 1e-8
        assert ours[0].iterations == int(theirs[0].iterations) <= int(most)
    assert sum(ours[0].iterations for ours in found[in_pyro]) < sum(map(int, full))


def test_the_bound_is_close_where_the_residual_stands_along_the_mean():
    """By the residual's length alone it is 1.6 to 5.2 times the error."""
    arrays = made("binary")
    exact = dense_solution(*arrays)
    for iterations in range(1, 9):
        for x, bound, _ in after(arrays, iterations):
            assert bound * np.linalg.norm(x) <= 1.75 * np.linalg.norm(x - exact)
    assert [solved(package, arrays, 1e-2, 100)[2] for package in (in_pyro, in_numpyro)] == [7, 7]


@pytest.mark.parametrize("damping", [1e-3, DAMPING, 100.0])
def test_weights_of_all_sizes_in_float32(damping):
    """Down to those whose inverse overflows; a tolerance that float32 can meet."""
    rng = np.random.default_rng(1)
    u, q, g = made("binary")
    q *= 10.0 ** rng.uniform(-45, 0, size=q.shape)
    q[:, 1] = 10.0 ** rng.uniform(-45, -37, size=ROWS)
    exact = dense_solution(u, q, g, damping)
    arrays = [a.astype(np.float32) for a in (u, q, g)]
    for package in (in_pyro, in_numpyro):
        x, bound, done = solved(package, arrays, 1e-3, 100, damping)
        assert done < 20 and bound <= 1e-3
        assert np.linalg.norm(x - exact) <= 1.1e-3 * np.linalg.norm(exact)
        arrays[1][3, 4] = np.nan
        x, _, done = solved(package, arrays, 1e-3, 100, damping)
        assert np.isnan(x[4]).all() and done < 100
        arrays[1][3, 4] = 0
