"""``η·s(x) − log Z + log h(x)`` is ``log p(x)``, for every family in the registry."""

import pyro.distributions as dist
import pytest
import torch

from pyro_helmholtz import ExponentialFamily, register_exponential_family
from pyro_helmholtz.exponential_families import _RULES, exponential_family

F64 = torch.float64
GENERATOR = torch.Generator().manual_seed(0)


def real(*shape):
    return torch.randn(*shape, dtype=F64, generator=GENERATOR)


def positive(*shape):
    return torch.rand(*shape, dtype=F64, generator=GENERATOR) + 0.2


def unit(*shape):
    return 0.1 + 0.8 * torch.rand(*shape, dtype=F64, generator=GENERATOR)


TRIL = torch.linalg.cholesky(torch.eye(3, dtype=F64) + 0.5)
transforms = dist.transforms

FAMILIES = {
    "Normal": dist.Normal(real(4), positive(4)),
    "Normal, independent": dist.Normal(real(4, 3), positive(3)).to_event(1),
    "LogNormal": dist.LogNormal(real(4), positive(4)),
    "HalfNormal": dist.HalfNormal(positive(4)),
    "Bernoulli, logits": dist.Bernoulli(logits=real(4)),
    "Bernoulli, probs": dist.Bernoulli(probs=unit(4)),
    "ContinuousBernoulli": dist.ContinuousBernoulli(logits=real(4)),
    "Binomial": dist.Binomial(torch.tensor([3.0, 4, 5, 6], dtype=F64), logits=real(4)),
    "NegativeBinomial": dist.NegativeBinomial(torch.tensor(3.5, dtype=F64), probs=unit(4)),
    "Geometric": dist.Geometric(probs=unit(4)),
    "Poisson": dist.Poisson(positive(4)),
    "Categorical": dist.Categorical(logits=real(4, 3)),
    "OneHotCategorical": dist.OneHotCategorical(probs=unit(4, 3)),
    "Multinomial": dist.Multinomial(5, probs=unit(4, 3)),
    "Exponential": dist.Exponential(positive(4)),
    "Gamma": dist.Gamma(positive(4), positive(4)),
    "Chi2": dist.Chi2(positive(4)),
    "InverseGamma": dist.InverseGamma(positive(4), positive(4)),
    "Beta": dist.Beta(positive(4), positive(4)),
    "Dirichlet": dist.Dirichlet(positive(4, 3)),
    "VonMises": dist.VonMises(real(4), positive(4)),
    "MultivariateNormal": dist.MultivariateNormal(real(4, 3), scale_tril=TRIL),
    "MultivariateNormal, batch": dist.MultivariateNormal(
        real(4, 3), TRIL @ TRIL.T + torch.diag_embed(positive(4, 3))
    ),
    "LowRankMultivariateNormal": dist.LowRankMultivariateNormal(
        real(4, 3), real(3, 2), positive(3)
    ),
    "transformed": dist.TransformedDistribution(
        dist.Normal(real(4), positive(4)),
        [transforms.SigmoidTransform(), transforms.AffineTransform(1.0, 3.0)],
    ),
    "exp of gamma": dist.TransformedDistribution(
        dist.Gamma(positive(4) + 1, positive(4) + 1),
        [transforms.ComposeTransform([transforms.ExpTransform()])],
    ),
    "expanded": dist.torch_distribution.ExpandedDistribution(
        dist.Normal(real(3), positive(3)), (4, 3)
    ).to_event(1),
    "expanded by one": dist.torch_distribution.ExpandedDistribution(
        dist.Dirichlet(positive(1, 3)), (4,)
    ),
}


def rebuilt(form, x):
    """The log-density of four data from its natural form."""

    def total(values):
        return values.reshape(4, -1).sum(1)

    value = total(form.log_base(x)) - total(form.log_normaliser)
    for eta, s in zip(form.natural, form.statistics(x), strict=True):
        value = value + total((eta * s).expand(s.shape))
    return value


@pytest.mark.parametrize("name", FAMILIES)
def test_the_form_is_the_log_density(name):
    torch.manual_seed(1)
    fn = FAMILIES[name]
    for _ in range(5):
        x = fn.sample()
        form = exponential_family(fn)
        # torch's von Mises has its Bessel function to seven digits
        tolerance = 1e-6 if name == "VonMises" else 1e-10
        torch.testing.assert_close(rebuilt(form, x), fn.log_prob(x), rtol=0, atol=tolerance)


def test_every_rule_has_a_test():
    used = {
        next(c for c in type(d).__mro__ if c in _RULES)
        for fn in FAMILIES.values()
        for d in [getattr(fn, "base_dist", fn), fn]
        if any(c in _RULES for c in type(d).__mro__)
    }
    assert used == set(_RULES)


def test_masks_are_taken_off():
    fn = FAMILIES["Normal"]
    x = fn.sample()
    torch.testing.assert_close(
        rebuilt(exponential_family(fn.mask(torch.tensor(False))), x), fn.log_prob(x)
    )


def test_the_normaliser_is_differentiable_in_the_arguments():
    """∇_η log Z = E[s], by the mean of many draws of one Gamma and by its moments."""
    a, b = (torch.tensor(v, dtype=F64, requires_grad=True) for v in (2.5, 1.5))
    form = exponential_family(dist.Gamma(a, b))
    da, db = torch.autograd.grad(form.log_normaliser, [a, b])
    torch.testing.assert_close(da, torch.digamma(a) - b.log())  # E[log x]
    torch.testing.assert_close(db, -a / b)  # −E[x]


@pytest.mark.parametrize(
    "fn",
    [
        dist.StudentT(3.0),
        dist.Laplace(0.0, 1.0),
        dist.Delta(torch.tensor(0.0)),
        dist.HalfCauchy(torch.tensor(1.0)),
        dist.TransformedDistribution(
            dist.Normal(0.0, 1.0), [transforms.AffineTransform(torch.tensor(1.0), 2.0)]
        ),
    ],
    ids=lambda fn: type(fn).__name__,
)
def test_others_have_none(fn):
    assert exponential_family(fn) is None


def test_the_users_own():
    class Rayleigh(dist.TorchDistribution):
        arg_constraints = {}

        def __init__(self, scale):
            self.scale = scale
            super().__init__(scale.shape)

    @register_exponential_family(Rayleigh)
    def _(d):
        return ExponentialFamily(
            (-0.5 * d.scale**-2,), lambda x: (x.square(),), 2 * d.scale.log(), lambda x: x.log()
        )

    try:
        form = exponential_family(Rayleigh(positive(4)).to_event(1))
        assert form is not None and len(form.natural) == 1
    finally:
        del _RULES[Rayleigh]
    with pytest.raises(TypeError, match="distribution class"):
        register_exponential_family("Normal")
