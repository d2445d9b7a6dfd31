"""The Fisher information of every family against the outer product of its scores."""

import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn

import pyro_helmholtz as ph
from pyro_helmholtz.fisher import families
from tests.oracles import arguments, close, natural, program, score_information

D = torch.float64


def t(*values):
    return torch.tensor(values, dtype=D)


A, B, P = t(-1.3, 0.2, 2.0), t(0.6, 1.1, 2.3), t(0.1, 0.5, 0.83)
CASES = {
    "bernoulli logits": lambda: dist.Bernoulli(logits=A),
    "bernoulli probs": lambda: dist.Bernoulli(probs=P),
    "geometric logits": lambda: dist.Geometric(logits=A),
    "geometric probs": lambda: dist.Geometric(probs=P),
    "normal": lambda: dist.Normal(A, B),
    "poisson": lambda: dist.Poisson(B),
    "exponential": lambda: dist.Exponential(B),
    "categorical logits": lambda: dist.Categorical(logits=torch.stack([A, B])),
    "one-hot logits": lambda: dist.OneHotCategorical(logits=torch.stack([A, B])),
    "von mises": lambda: dist.VonMises(A, B),
    "gamma": lambda: dist.Gamma(1.0 + B, B),
    "beta": lambda: dist.Beta(1.0 + B, 1.5 + P),
}


def assembled(fn):
    """The information as one (*batch, d, d) matrix over the arguments in order."""
    info, exact, how = families.information(fn)
    names = arguments(fn)
    if set(info) == set(names) and info[names[0]].ndim > len(fn.batch_shape):
        return info[names[0]], exact, how
    matrix = torch.zeros(*fn.batch_shape, len(names), len(names), dtype=D)
    for key, value in info.items():
        where = [names.index(n) for n in ((key,) if isinstance(key, str) else key)]
        value = value[..., None, None] if isinstance(key, str) else value
        for i, a in enumerate(where):
            for j, b in enumerate(where):
                matrix[..., a, b] = value[..., i, j]
    return matrix, exact, how


@pytest.mark.parametrize("name", CASES)
def test_closed_forms_equal_quadrature(name):
    fn = CASES[name]()
    matrix, exact, how = assembled(fn)
    assert exact and how == "closed form"
    close(matrix, score_information(fn), 1e-9)


@pytest.mark.parametrize("cls", [dist.Categorical, dist.OneHotCategorical])
def test_categorical_probabilities_agree_along_the_simplex(cls):
    probs = torch.softmax(torch.stack([A, B]), -1)
    fn = cls(probs=probs)
    matrix, exact, _ = assembled(fn)
    along = torch.eye(3, dtype=D) - 1 / 3
    close(along @ matrix @ along, along @ score_information(fn) @ along, 1e-12)
    assert exact


def test_laplace_information_is_that_of_both_arguments():
    # The score in loc is a sign: its square is one everywhere.
    info, exact, _ = families.information(dist.Laplace(A, B))
    close(info["loc"], B**-2, 1e-12)
    close(info["scale"], B**-2, 1e-12)
    assert exact


def test_multivariate_normal_location():
    factor = torch.tril(torch.randn(3, 3, dtype=D)) + 3 * torch.eye(3, dtype=D)
    info, _, _ = families.information(dist.MultivariateNormal(A, scale_tril=factor))
    close(info["loc"], torch.linalg.inv(factor @ factor.t()), 1e-10)


@pytest.mark.parametrize("name", ["bernoulli logits", "normal", "exponential", "gamma", "poisson"])
def test_kl_route_equals_the_closed_form(name):
    fn = CASES[name]()
    info = families._from_kl(fn, families.argument_names(fn))
    (value,) = info.values()
    matrix = value if value.ndim > len(fn.batch_shape) else value[..., None, None]
    close(matrix, score_information(fn), 1e-9)


def test_kl_route_of_an_unregistered_family():
    fn = dist.Gumbel(A, B)
    matrix, exact, how = assembled(fn)
    assert exact and "KL" in how
    euler = 0.5772156649015329
    close(matrix[..., 0, 0], B**-2, 1e-9)
    close(matrix[..., 1, 1], B**-2 * (torch.pi**2 / 6 + (1 - euler) ** 2), 1e-9)
    close(matrix[..., 0, 1].abs(), B**-2 * (1 - euler), 1e-9)


def test_kl_route_of_a_dirichlet():
    fn = dist.Dirichlet(torch.stack([B, B + 1]))
    info, exact, how = families.information(fn)
    assert exact and "KL" in how
    a = fn.concentration
    truth = torch.diag_embed(torch.polygamma(1, a)) - torch.polygamma(1, a.sum(-1))[:, None, None]
    close(info["concentration"], truth, 1e-9)


def test_score_route_is_near_and_inexact():
    pyro.set_rng_seed(0)
    fn = dist.Normal(A, B)
    estimate = families._from_scores(fn, ["loc", "scale"])["loc", "scale"]
    error = (estimate - score_information(fn)).abs() * B[:, None, None] ** 2
    # Standard errors at 512 samples: sqrt(2/512) = 0.06 and sqrt(56/512) = 0.33.
    assert float(error[..., 0, 0].max()) < 0.3 and float(error[..., 1, 1].max()) < 1.4
    _, exact, how = families.information(dist.StudentT(B + 3, A, B))
    assert not exact and "scores" in how


@pytest.mark.parametrize("value", [-40.0, 40.0, 700.0])
@pytest.mark.parametrize("dtype", [torch.float32, D])
def test_saturated_units_keep_a_finite_information(value, dtype):
    logits = torch.tensor([value], dtype=dtype)
    for fn in (
        dist.Bernoulli(logits=logits),
        dist.Categorical(logits=torch.stack([logits, -logits], -1)),
        dist.VonMises(logits, logits.abs()),
        dist.VonMises(logits, logits.abs() * 1e-9),
    ):
        for info in families.information(fn)[0].values():
            assert bool(torch.isfinite(info).all())
    info = families.information(dist.Bernoulli(logits=torch.tensor([20.0])))[0]["logits"]
    assert float(info) == pytest.approx(2.0611536e-09, rel=1e-4)


def test_unwrapping_takes_off_every_wrapper():
    fn = dist.Normal(A, B).mask(torch.tensor([True, False, True])).to_event(1).expand([4])
    fn = dist.TransformedDistribution(fn, [dist.transforms.ExpTransform()])
    base = families.unwrap(fn)
    assert type(base.fn).__name__ == "Normal"
    assert len(base.transforms) == 1 and len(base.masks) == 1
    assert families.unwrap(dist.LogNormal(A, B)).fn.loc is not None


# the registry --------------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(families, "_RULES", dict(families._RULES))
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


@pytest.mark.parametrize("wrong", [None, "Normal", dist.Normal(0.0, 1.0), lambda: 0])
def test_register_fisher_refuses_what_is_no_class(rules, wrong):
    with pytest.raises(TypeError, match="register_fisher needs a distribution class"):
        ph.register_fisher(wrong)


def test_register_fisher_returns_the_rule_and_serves_subclasses(rules):
    class Mine(dist.Normal):
        pass

    assert families.information(Mine(A, B))[2] == "closed form"

    @ph.register_fisher(Mine)
    def rule(d):
        """Own text."""
        return {"loc": 7 * torch.ones_like(d.loc)}

    assert rule.__doc__ == "Own text."
    close(families.information(Mine(A, B))[0]["loc"], 7 * torch.ones_like(A), 0)
    close(families.information(dist.Normal(A, B))[0]["loc"], B**-2, 1e-12)


def test_a_matrix_argument_without_a_rule_is_an_error_that_says_how_to_give_one(rules):
    class Correlated(dist.MultivariateNormal):
        pass

    families._RULES.pop(torch.distributions.MultivariateNormal)
    with pytest.raises(NotImplementedError, match="@register_fisher"):
        families.information(Correlated(A, scale_tril=torch.eye(3, dtype=D)))


def test_an_error_of_a_users_rule_reaches_the_user(rules):
    class Mine(dist.Normal):
        pass

    @ph.register_fisher(Mine)
    def rule(d):
        raise RuntimeError("my own mistake")

    model, guide, x = program(
        lambda h, m: Mine(m["a"](h), torch.ones((), dtype=D)).to_event(1), {"a": nn.Linear(3, 2)}
    )
    with pytest.raises(RuntimeError, match="my own mistake"):
        natural(model, guide).step(x)


def test_constructor_arguments_that_are_no_parameters_are_kept():
    """The total count of Multinomial: n times the information of one draw."""
    logits = torch.stack([A, B])
    with pyro.validation_enabled():
        info, exact, _ = families.information(dist.Multinomial(7, logits=logits))
    p = logits.softmax(-1)
    want = 7 * (torch.diag_embed(p) - p[..., None] * p[..., None, :])
    assert not exact
    close(info["logits"], want, 0.25 * float(want.abs().max()))


def test_one_of_two_parametrisations():
    fn = dist.ContinuousBernoulli(logits=A)
    assert fn.probs.shape == A.shape  # the host keeps it from now on
    info, exact, _ = families.information(fn)
    close(info["logits"], fn.variance, 1e-6)
    assert exact


def test_a_support_that_moves_has_no_information_from_the_divergence():
    info, exact, _ = families.information(dist.Uniform(A, A + B))
    assert not exact
    assert all(bool((v.diagonal(dim1=-2, dim2=-1) >= 0).all()) for v in info.values())


@pytest.mark.parametrize(
    "make",
    [
        lambda o: dist.OrderedLogistic(o[..., 0], t(-1.0, 0.0, 1.0)),
        lambda o: dist.ZeroInflatedPoisson(o[..., 0].exp(), gate_logits=o[..., 1]),
        lambda o: dist.LowRankMultivariateNormal(o, torch.ones(2, 1, dtype=D), t(1.0, 1.0)),
    ],
)
def test_a_family_without_information_is_an_error_that_names_the_site(make):
    pyro.clear_param_store()
    layer = nn.Linear(2, 2).double()

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=t(0.0, 0.0)).to_event(1))
            pyro.sample("x", make(layer(h)), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=t(0.0, 0.0)).to_event(1))

    event = make(torch.zeros(2, dtype=D)).event_shape
    x = torch.zeros(4, *event, dtype=D if event else torch.long)
    before = layer.weight.detach().clone()
    with pytest.raises(NotImplementedError, match="site 'x' of the model: .*@register_fisher"):
        ph.NaturalRWS(model, guide, sleep_weight=0.0).step(x)
    assert torch.equal(layer.weight, before)
    ph.RWS(model, guide, sleep_weight=0.0).step(x)


def test_a_rule_for_other_arguments_than_the_distribution_has(rules):
    class Mine(dist.Normal):
        pass

    @ph.register_fisher(Mine)
    def rule(d):
        return {"location": torch.ones_like(d.loc)}

    with pytest.raises(ValueError, match=r"rule of Mine informs about \['location'\]"):
        families.information(Mine(A, B))
