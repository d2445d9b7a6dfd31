"""Distributions against dense algebra, SciPy and the implicit derivative of the cdf."""

import math

import pyro
import pyro.distributions as dist
import pytest
import scipy.stats as st
import torch
from torch.distributions import kl_divergence

from pyro_helmholtz import GeneralizedExtremeValue, Levy, RankOnePrecisionNormal, Stable
from pyro_helmholtz.fisher.families import information

F64 = torch.float64


def rank_one(*batch, d=4, seed=0):
    torch.manual_seed(seed)
    loc, u = torch.randn(*batch, d, dtype=F64), 2 * torch.randn(*batch, d, dtype=F64)
    return RankOnePrecisionNormal(loc, u, torch.rand(*batch, d, dtype=F64) + 0.2)


def dense(d):
    return torch.distributions.MultivariateNormal(d.loc, precision_matrix=d.precision_matrix)


def close(a, b, tolerance=1e-12):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("batch", [(), (3,), (2, 3)])
def test_rank_one_equals_dense_algebra(batch):
    d = rank_one(*batch)
    full = dense(d)
    assert d.batch_shape == batch and d.event_shape == (4,)
    close(d.covariance_matrix @ d.precision_matrix, torch.eye(4, dtype=F64).expand(*batch, 4, 4))
    close(d.covariance_matrix, full.covariance_matrix)
    close(d.variance, torch.diagonal(full.covariance_matrix, dim1=-2, dim2=-1))
    close(d.log_det, torch.logdet(full.covariance_matrix))
    close(d.entropy(), full.entropy())
    x = torch.randn(5, *batch, 4, dtype=F64)
    close(d.log_prob(x), full.log_prob(x))
    columns = [d.root(e.expand(d.loc.shape)) for e in torch.eye(4, dtype=F64)]
    root = torch.stack(columns, -1)
    close(root @ root.mT, d.covariance_matrix)


def test_rank_one_draws():
    d = rank_one(2)
    pyro.set_rng_seed(3)
    x = d.rsample((5,))
    pyro.set_rng_seed(3)
    close(x, d.loc + d.root(torch.randn(5, 2, 4, dtype=F64)))
    many = d.sample((200_000,))
    close(many.mean(0), d.mean, 0.02)
    centred = many - d.mean
    found = torch.einsum("sbi,sbj->bij", centred, centred) / len(many)
    close(found, d.covariance_matrix, 0.05)


def test_rank_one_without_factor_and_with_a_strong_one():
    loc, diag = torch.zeros(3, dtype=F64), torch.tensor([0.5, 1.0, 4.0], dtype=F64)
    plain = RankOnePrecisionNormal(loc, torch.zeros(3, dtype=F64), diag)
    v = torch.randn(3, dtype=F64)
    close(plain.root(v), v / diag.sqrt())
    close(plain.log_prob(v), dist.Normal(loc, diag.rsqrt()).to_event(1).log_prob(v))
    factor = torch.zeros(3, dtype=F64, requires_grad=True)
    (slope,) = torch.autograd.grad(RankOnePrecisionNormal(loc, factor, diag).root(v).sum(), factor)
    assert bool(torch.isfinite(slope).all())
    strong = RankOnePrecisionNormal(loc, torch.tensor([1e6, 1.0, 1.0], dtype=F64), diag)
    assert 0 < float(strong.variance[0]) < 1e-10
    assert bool(torch.isfinite(strong.root(v)).all())


def test_rank_one_gradients():
    torch.manual_seed(1)
    args = [torch.randn(2, 3, dtype=F64, requires_grad=True) for _ in range(3)]
    v, x = torch.randn(2, 3, dtype=F64), torch.randn(2, 3, dtype=F64)

    def both(loc, u, log_d):
        d = RankOnePrecisionNormal(loc, u, log_d.exp())
        return d.root(v), d.log_prob(x), d.entropy()

    assert torch.autograd.gradcheck(both, args)


def test_rank_one_takes_linear_memory():
    size = 300_000  # a matrix of it would take 720 GB
    d = RankOnePrecisionNormal(torch.zeros(size), torch.randn(size), torch.ones(size))
    x = d.rsample()
    assert bool(torch.isfinite(d.log_prob(x) + d.entropy())) and d.variance.shape == (size,)


def test_rank_one_expands_broadcasts_and_validates():
    d = rank_one()
    wide = d.expand((6, 2))
    assert wide.batch_shape == (6, 2) and wide.rsample().shape == (6, 2, 4)
    close(wide.log_prob(d.loc), d.log_prob(d.loc).expand(6, 2))
    both = RankOnePrecisionNormal(torch.zeros(5, 1, 3), torch.ones(3), torch.ones(2, 3))
    assert both.batch_shape == (5, 2)
    with pyro.plate("data", 6):
        assert pyro.sample("z", rank_one(6)).shape == (6, 4)
    with pytest.raises(ValueError, match="precision_diag"):
        RankOnePrecisionNormal(torch.zeros(2), torch.ones(2), -torch.ones(2), validate_args=True)
    with pytest.raises(ValueError, match="one-dimensional"):
        RankOnePrecisionNormal(0.0, 1.0, 1.0)


def test_rank_one_kl_and_fisher():
    d = rank_one(3)
    loc, scale = torch.randn(3, 4, dtype=F64), torch.rand(3, 4, dtype=F64) + 0.5
    normal = dist.Normal(loc, scale).to_event(1)
    full = torch.distributions.MultivariateNormal(loc, torch.diag_embed(scale**2))
    close(kl_divergence(d, normal), kl_divergence(dense(d), full))
    with pytest.raises(NotImplementedError):
        kl_divergence(d, dist.Laplace(loc, scale).to_event(1))
    found, exact, _ = information(d)
    assert exact
    loc = d.loc.clone().requires_grad_()
    moved = torch.distributions.MultivariateNormal(loc, precision_matrix=d.precision_matrix)
    hessian = torch.autograd.functional.hessian(
        lambda m: kl_divergence(
            dense(d),
            torch.distributions.MultivariateNormal(m, precision_matrix=d.precision_matrix),
        ).sum(),
        moved.loc.detach(),
    )
    for b in range(3):
        close(found["loc"][b], hessian[b, :, b], 1e-10)


SHAPES = [-0.7, -0.2, -1e-3, -1e-8, 0.0, 1e-8, 5e-3, 0.05, 0.3, 0.45]


@pytest.mark.parametrize("xi", SHAPES)
def test_extreme_values_equal_scipy(xi):
    d = GeneralizedExtremeValue(torch.tensor(0.5, dtype=F64), 1.5, xi)
    theirs = st.genextreme(-xi, 0.5, 1.5)
    x = torch.tensor(theirs.ppf([0.01, 0.2, 0.5, 0.9, 0.99]))
    tolerance = 1e-10 if abs(xi) > 1e-7 or xi == 0 else 1e-7  # SciPy loses digits near 0
    close(d.log_prob(x), torch.tensor(theirs.logpdf(x)), tolerance)
    close(d.cdf(x), torch.tensor(theirs.cdf(x)), tolerance)
    close(d.icdf(d.cdf(x)), x, 1e-9)
    moments = 1e-11 if abs(xi) > 1e-2 else 1e-6
    close(d.mean, torch.tensor(float(theirs.mean()), dtype=F64), moments)
    close(d.variance, torch.tensor(float(theirs.var()), dtype=F64), 10 * moments)
    close(d.entropy(), torch.tensor(float(theirs.entropy()), dtype=F64), 1e-8)


def test_extreme_values_off_the_support_and_moments_that_are_infinite():
    d = GeneralizedExtremeValue(torch.zeros(2, dtype=F64), 1.0, torch.tensor([0.5, -0.5]))
    outside = torch.tensor([-3.0, 3.0], dtype=F64)
    quiet = GeneralizedExtremeValue(d.loc, d.scale, d.concentration, validate_args=False)
    assert bool((quiet.log_prob(outside) == -math.inf).all())
    assert quiet.cdf(outside).tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="support"):
        GeneralizedExtremeValue(0.0, 1.0, 0.5, validate_args=True).log_prob(torch.tensor(-3.0))
    one = torch.tensor(1.0)
    assert GeneralizedExtremeValue(0.0, 1.0, one).mean == math.inf
    assert GeneralizedExtremeValue(0.0, 1.0, one / 2).variance == math.inf
    with pytest.raises(ValueError, match="scale"):
        GeneralizedExtremeValue(0.0, -1.0, 0.5, validate_args=True)


def test_levy_equals_scipy():
    d, theirs = Levy(torch.tensor(0.5, dtype=F64), 1.5), st.levy(0.5, 1.5)
    x = torch.tensor(theirs.ppf([0.01, 0.2, 0.5, 0.9, 0.99]))
    close(d.log_prob(x), torch.tensor(theirs.logpdf(x)))
    close(d.cdf(x), torch.tensor(theirs.cdf(x)))
    close(d.icdf(d.cdf(x)), x, 1e-10)
    close(d.entropy(), torch.tensor(float(theirs.entropy()), dtype=F64), 1e-8)
    assert d.mean == math.inf and d.variance == math.inf
    below = torch.tensor(0.2, dtype=F64)
    quiet = Levy(d.loc, d.scale, validate_args=False)
    assert quiet.log_prob(below) == -math.inf and quiet.cdf(below) == 0


SCALARS = {
    "gev": (GeneralizedExtremeValue, (0.5, 1.5, 0.2)),
    "gev, negative": (GeneralizedExtremeValue, (0.5, 1.5, -0.4)),
    "gumbel limit": (GeneralizedExtremeValue, (0.5, 1.5, 0.0)),
    "levy": (Levy, (0.5, 1.5)),
    "logistic": (dist.Logistic, (0.5, 1.5)),
    "weibull": (dist.Weibull, (1.5, 2.5)),
}


@pytest.mark.parametrize("name", SCALARS)
def test_draws_follow_the_cdf_and_their_gradient_is_the_implicit_one(name):
    make, values = SCALARS[name]
    args = [torch.tensor(v, dtype=F64, requires_grad=True) for v in values]
    d = make(*args)
    pyro.set_rng_seed(11)
    many = d.rsample((20_000,)).detach()
    assert st.kstest(d.cdf(many).detach().numpy(), "uniform").pvalue > 1e-3
    x = d.rsample()
    slopes = torch.autograd.grad(x, args, retain_graph=True)  # the transforms share it
    at = x.detach()
    implicit = torch.autograd.grad(-d.cdf(at), args, allow_unused=True)
    for slope, change in zip(slopes, implicit, strict=True):
        close(slope, change / d.log_prob(at).exp().detach(), 1e-8)


@pytest.mark.parametrize("make", [SCALARS["gev"], SCALARS["levy"]])
def test_scalar_families_expand_and_stand_in_plates(make):
    family, values = make
    d = family(*values).expand((3, 2))
    assert d.batch_shape == (3, 2) and d.rsample((5,)).shape == (5, 3, 2)
    assert d.log_prob(d.sample()).shape == (3, 2)
    assert family(*values).to_event(0).batch_shape == ()
    with pyro.plate("data", 4):
        assert pyro.sample("x", family(*values)).shape == (4,)


def test_stable_is_the_hosts():
    assert Stable is dist.Stable and Stable.has_rsample
