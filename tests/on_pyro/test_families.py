"""The Fisher information of every family against the outer product of its scores."""

import itertools

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import nn
from torch.distributions import Gumbel
from torch.nn import functional as F

import pyro_helmholtz as ph
from pyro_helmholtz.fisher import families, registry
from pyro_helmholtz.fisher.arguments import argument_names
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
    "half-normal": lambda: dist.HalfNormal(B),
    "cauchy": lambda: dist.Cauchy(A, B),
    "half-cauchy": lambda: dist.HalfCauchy(B),
    "logistic": lambda: dist.Logistic(A, B),
    "gumbel": lambda: dist.Gumbel(A, B),
    "weibull": lambda: dist.Weibull(B, 1.0 + P),
    "student-t": lambda: dist.StudentT(3.0 + B, A, B),
    "zero-inflated poisson": lambda: dist.ZeroInflatedPoisson(rate=B, gate=P),
    "zero-inflated logits": lambda: dist.ZeroInflatedPoisson(B, gate_logits=A),
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
    info, _, _ = families.information(dist.LowRankMultivariateNormal(A, factor[:, :1], B))
    close(info["loc"], torch.linalg.inv(factor[:, :1] @ factor[:, :1].t() + torch.diag(B)), 1e-10)


def test_multivariate_student_t_location():
    """The score ``(ν+p) Σ⁻¹ z / (ν + |z|²)`` is radial: one integral over the length."""
    factor = torch.tril(torch.randn(3, 3, dtype=D)) + 3 * torch.eye(3, dtype=D)
    fn = dist.MultivariateStudentT(torch.tensor(4.5, dtype=D), A, factor)
    info, exact, _ = families.information(fn)
    r = torch.linspace(-20, 60, 20_001, dtype=D).exp()
    weight = r**3 * (1 + r**2 / 4.5) ** (-7.5 / 2)
    share = (weight * (7.5 * r / (4.5 + r**2)) ** 2).sum() / weight.sum() / 3
    close(info["loc"], share * torch.linalg.inv(factor @ factor.t()), 1e-9)
    assert exact


KL = ["bernoulli logits", "normal", "exponential", "gamma", "poisson", "gumbel", "cauchy"]


@pytest.mark.parametrize("name", KL)
def test_kl_route_equals_the_closed_form(name):
    fn = CASES[name]()
    info = families._from_kl(fn, argument_names(fn))
    (value,) = info.values()
    matrix = value if value.ndim > len(fn.batch_shape) else value[..., None, None]
    close(matrix, score_information(fn), 1e-9)


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
    found, exact = families._from_scores(fn, ["loc", "scale"])
    estimate = found["loc", "scale"]
    assert not exact
    error = (estimate - score_information(fn)).abs() * B[:, None, None] ** 2
    # Standard errors at 512 samples: sqrt(2/512) = 0.06 and sqrt(56/512) = 0.33.
    assert float(error[..., 0, 0].max()) < 0.3 and float(error[..., 1, 1].max()) < 1.4
    _, exact, how = families.information(dist.SoftLaplace(A, B))
    assert not exact and "scores" in how


def test_few_values_are_summed_and_many_are_sampled():
    fn = dist.BetaBinomial(B, 1 + P, t(7.0)[0])
    matrix, exact, how = assembled(fn)
    assert exact and how == "sum over the support"
    close(matrix, score_information(fn), 1e-12)
    for count in (t(600.0)[0], t(7.0, 8.0, 9.0)):
        _, exact, how = families.information(dist.BetaBinomial(B, 1 + P, count))
        assert not exact and "scores" in how


def test_a_dirichlet_multinomial_has_scores():
    concentration = torch.stack([B, 1 + B])
    info, exact, how = families.information(dist.DirichletMultinomial(concentration, 9))
    assert info["concentration"].shape == (2, 3, 3)
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


def variance_of_cosine(kappa):
    """Of a von Mises variable, by quadrature: the information of its concentration."""
    x = np.linspace(-1, 1, 20001)[1:] * min(np.pi, 14 / np.sqrt(kappa))
    below = -2 * np.sin(x / 2) ** 2  # cos x - 1
    weight = np.exp(kappa * below)
    mean = (weight * below).sum() / weight.sum()
    return (weight * (below - mean) ** 2).sum() / weight.sum()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-3), (D, 1e-9)])
@pytest.mark.parametrize("kappa", [0.5, 3.0, 15.0, 25.0, 400.0, 900.0, 1e4, 1e6])
def test_concentrated_von_mises(kappa, dtype, error):
    fn = dist.VonMises(torch.zeros((), dtype=dtype), torch.tensor(kappa, dtype=dtype))
    found = families.information(fn)[0]["concentration"]
    assert found.dtype == dtype
    assert float(found) == pytest.approx(variance_of_cosine(kappa), rel=error)


def test_a_folded_variable_is_not_the_whole_one():
    """Its sign is lost, and with it information; a half-normal's is that of its scale alone."""
    folded = dist.FoldedDistribution(dist.Normal(A, B)).to_event(1)
    assert type(families.unwrap(folded).fn) is dist.FoldedDistribution
    assert families.information(families.unwrap(folded).fn)[0] == {}
    info, exact, _ = families.information(families.unwrap(dist.HalfNormal(B).to_event(1)).fn)
    close(info["scale"], 2 * B**-2, 1e-12)
    assert exact


def test_unwrapping_takes_off_every_wrapper():
    fn = dist.Normal(A, B).mask(torch.tensor([True, False, True])).to_event(1).expand([4])
    fn = dist.TransformedDistribution(fn, [dist.transforms.ExpTransform()])
    base = families.unwrap(fn)
    assert type(base.fn).__name__ == "Normal"
    assert len(base.transforms) == 1 and len(base.masks) == 1
    assert families.unwrap(dist.LogNormal(A, B)).fn.loc is not None


# counts ---------------------------------------------------------------------------------------

N, R = t(7, 3, 12), t(0.4, 5.0, 2.5)
BOTH = torch.stack([A, B])
COUNTED = torch.tensor(
    [v for v in itertools.product(range(6), repeat=3) if sum(v) == 5], dtype=D
)  # what five draws from three categories may give
COUNTS = {
    "binomial logits": (lambda v: dist.Binomial(N, logits=v), "logits", A, 13),
    "binomial probs": (lambda v: dist.Binomial(N, probs=v), "probs", P, 13),
    "multinomial logits": (lambda v: dist.Multinomial(5, logits=v), "logits", BOTH, None),
    "multinomial probs": (lambda v: dist.Multinomial(5, probs=v), "probs", BOTH.softmax(-1), None),
    "negative binomial logits": (lambda v: dist.NegativeBinomial(R, logits=v), "logits", A, 600),
    "negative binomial probs": (lambda v: dist.NegativeBinomial(R, probs=v), "probs", P, 600),
    "gamma-poisson rate": (lambda v: dist.GammaPoisson(R, v), "rate", B, 600),
}
DISPERSED = {
    "logits": (lambda r, v: dist.NegativeBinomial(r, logits=v), ("total_count", "logits"), A),
    "probs": (lambda r, v: dist.NegativeBinomial(r, probs=v), ("total_count", "probs"), P),
    "rate": (dist.GammaPoisson, ("concentration", "rate"), B),
}


def enumerated(make, values, nodes):
    """E[score scoreᵀ] by a sum over the support: (*batch, d, d)."""
    with torch.enable_grad():
        wide = [v.expand(len(nodes), *v.shape).clone().requires_grad_() for v in values]
        fn = make(*wide)
        inside = nodes <= fn.total_count if isinstance(fn, dist.Binomial) else True
        if torch.is_tensor(inside):
            nodes = torch.where(inside, nodes, 0.0)
        log_p = fn.log_prob(nodes.expand(len(nodes), *fn.batch_shape[1:], *fn.event_shape))
        scores = torch.autograd.grad(log_p.sum(), wide)
    weight = log_p.detach().exp() * inside
    close(weight.sum(0), torch.ones(fn.batch_shape[1:], dtype=D), 1e-12)
    score = scores[0] if scores[0].ndim > log_p.ndim else torch.stack(scores, -1)
    return torch.einsum("n...,n...i,n...j->...ij", weight, score, score)


@pytest.mark.parametrize("name", COUNTS)
def test_information_of_counts_equals_enumeration(name):
    make, argument, value, size = COUNTS[name]
    nodes = COUNTED[:, None] if size is None else torch.arange(size, dtype=D)[:, None]
    truth = enumerated(make, [value], nodes)
    info, exact, how = families.information(make(value))
    assert exact and how == "closed form" and list(info) == [argument]
    if "multinomial probs" in name:  # along the simplex
        along = torch.eye(3, dtype=D) - 1 / 3
        info, truth = {argument: along @ info[argument] @ along}, along @ truth @ along
    elif size is not None:
        truth = truth[..., 0, 0]
    close(info[argument], truth, 1e-8)


@pytest.mark.parametrize("name", DISPERSED)
def test_information_of_a_count_that_is_learned_equals_enumeration(name):
    make, arguments, value = DISPERSED[name]
    truth = enumerated(make, [R, value], torch.arange(600, dtype=D)[:, None])
    info, exact, _ = families.information(make(R.clone().requires_grad_(), value))
    assert exact
    close(info[arguments], truth, 1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, D])
@pytest.mark.parametrize("logit", [-80.0, -3.0, 0.0, 6.0, 80.0])
@pytest.mark.parametrize("count", [1e-4, 0.1, 30.0, 1e6])
def test_a_learned_count_at_extremes(count, logit, dtype):
    """Between that of the count beside unknown logits, and the variance of its score at most."""
    r, logits = torch.tensor([count, count], dtype=dtype), torch.tensor([logit, logit], dtype=dtype)
    fn = dist.NegativeBinomial(r.requires_grad_(), logits=logits)
    ((_, matrix),) = families.information(fn)[0].items()
    r, p = r.detach(), logits.sigmoid()
    assert bool(torch.isfinite(matrix).all())
    assert bool((matrix[:, 0, 0] >= p / r * (1 - 1e-6)).all())
    most = torch.minimum(torch.polygamma(1, r), p / (1 - p) / r)  # all of x, or of its mean
    assert bool((matrix[:, 0, 0] <= most * (1 + 1e-4)).all())


REPORTED = {
    "binomial": lambda h, m: dist.Binomial(5, logits=m["a"](h)).to_event(1),
    "multinomial": lambda h, m: dist.Multinomial(5, logits=m["a"](h)),
    "fixed": lambda h, m: dist.NegativeBinomial(5.0, logits=m["a"](h)).to_event(1),
    "learned": lambda h, m: dist.NegativeBinomial(F.softplus(m["r"](h)), logits=m["a"](h)).to_event(
        1
    ),
    "gamma-poisson": lambda h, m: dist.GammaPoisson(5.0, torch.exp(m["a"](h))).to_event(1),
}


@pytest.mark.parametrize("name", REPORTED)
def test_the_report_calls_counts_exact(name):
    layers = {n: nn.Linear(3, 2) for n in (("a", "r") if name == "learned" else ("a",))}
    pyro.clear_param_store()
    model, guide, x = program(REPORTED[name], layers)
    structure = natural(model, guide, num_particles=2).structure(x)
    rows = [row for row in structure if row.site == "x"]
    names = {f"net$$${n}.{part}" for n in layers for part in ("weight", "bias")}
    assert {n for row in rows for n in row.params} == names
    assert all(row.exact and row.kind == "affine" for row in rows)
    assert all(row.note.startswith("closed form") for row in rows)


# the registry --------------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))
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

    registry._RULES.pop(torch.distributions.MultivariateNormal)
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


def test_constructor_arguments_that_are_no_parameters_are_kept(rules):
    """The total count of Multinomial: n times the information of one draw."""
    registry._RULES.pop(torch.distributions.Multinomial)
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
        lambda o: dist.ZeroInflatedNegativeBinomial(
            t(3.0)[0], logits=o[..., 0], gate_logits=o[..., 1]
        ),
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


def test_a_base_without_information_is_reported_at_its_site():
    """The gate is fixed; what is trained is inside of the distribution that it inflates."""
    layer = nn.Linear(2, 2).double()
    pyro.clear_param_store()

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=t(0.0, 0.0)).to_event(1))
            logits = layer(h)[..., 0]
            fn = dist.ZeroInflatedNegativeBinomial(t(3.0)[0], logits=logits, gate=P[0])
            pyro.sample("x", fn, obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=t(0.0, 0.0)).to_event(1))

    svi = ph.NaturalRWS(model, guide, sleep_weight=0.0)
    rows = svi.structure(t(0.0, 2.0, 1.0, 0.0))
    assert {(row.site, row.solver) for row in rows} == {("x", "plain gradient")}


def test_a_rule_for_other_arguments_than_the_distribution_has(rules):
    class Mine(dist.Normal):
        pass

    @ph.register_fisher(Mine)
    def rule(d):
        return {"location": torch.ones_like(d.loc)}

    with pytest.raises(ValueError, match=r"rule of Mine informs about \['location'\]"):
        families.information(Mine(A, B))


class Narrow(dist.TorchDistribution):
    """A normal distribution that keeps its scale in the shape that it is given in."""

    arg_constraints = {
        "loc": dist.constraints.real,
        "scale": dist.constraints.positive,
    }
    support = dist.constraints.real

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Narrow(self.loc.expand(batch_shape), self.scale)

    def sample(self, sample_shape=()):
        return dist.Normal(self.loc, self.scale).sample(sample_shape)

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


def narrow(kind):
    """Directions of a layer whose two units share one scale."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)

    def model(x):
        w, s = pyro.param("w", t(1.0, 2.0)), pyro.param("s", t(0.7)[0])
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=t(0.3)[0]))
            fn = kind(z[..., None] * w, s)
            pyro.sample("x", fn.to_event(1 - fn.event_dim), obs=x)

    def guide(x):
        a = pyro.param("a", t(0.1)[0])
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(logits=a * x[:, 0]))

    svi = ph.NaturalRWS(model, guide, fisher="unit", num_particles=3)
    return svi.directions(torch.arange(8.0, dtype=D).reshape(4, 2))


def test_a_rule_in_a_smaller_shape_than_the_batch(rules):
    @ph.register_fisher(Narrow)
    def rule(d):
        return {"loc": d.scale.detach() ** -2, "scale": 2 / d.scale.detach() ** 2}

    found, truth = narrow(Narrow), narrow(dist.Normal)
    assert [b.params for b in found.fisher.blocks] == [b.params for b in truth.fisher.blocks]
    for one, two in zip(found.fisher.blocks, truth.fisher.blocks, strict=True):
        torch.testing.assert_close(one.dense(), two.dense(), rtol=1e-12, atol=0)


def test_a_rule_of_an_argument_whose_constraint_leaves_its_dimensions_open(rules):
    class Open(Narrow):
        arg_constraints = Narrow.arg_constraints | {
            "loc": dist.constraints.dependent(is_discrete=False)
        }

    @ph.register_fisher(Open)
    def rule(d):
        return {"loc": d.scale**-2}

    torch.testing.assert_close(families.information(Open(A, B))[0]["loc"], B**-2)


class Whole(Narrow):
    """The same as one vector, whose constraint does not say so."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        super(Narrow, self).__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Whole(self.loc.expand(*batch_shape, -1), self.scale)

    def log_prob(self, value):
        return super().log_prob(value).sum(-1)


def test_a_rule_of_a_vector_whose_constraint_does_not_say_so(rules):
    @ph.register_fisher(Whole)
    def rule(d):
        return {"loc": torch.eye(2, dtype=D) / d.scale.detach() ** 2}

    (found,) = [b for b in narrow(Whole).fisher.blocks if b.params == ["w"]]
    (truth,) = [b for b in narrow(dist.Normal).fisher.blocks if b.params == ["w"]]
    dense = found.dense().reshape(2, 2)
    torch.testing.assert_close(dense, torch.diag(truth.dense().reshape(2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("key", "shape"), [("loc", (3, 4, 2, 2)), ("loc", (3,)), (("loc", "scale"), (3, 4, 2, 3))]
)
def test_a_rule_of_another_shape_names_the_site(rules, key, shape):
    @ph.register_fisher(Narrow)
    def rule(d):
        return {key: torch.ones(shape, dtype=D)}

    with pytest.raises(ValueError, match="site 'x' of the model: the rule of Narrow gives .* has"):
        narrow(Narrow)


def test_a_rule_of_a_transformed_distribution(monkeypatch):
    """Transforms are taken off where there is none; the location's information is 1/scale²."""
    others = {cls: rule for cls, rule in registry._RULES.items() if cls is not Gumbel}
    monkeypatch.setattr(registry, "_RULES", others)

    class Extreme(dist.Gumbel):
        pass

    start = torch.zeros(3, dtype=D)

    def model(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(torch.full((), 0.5, dtype=D)))
            loc = pyro.param("loc", start) * (1 + h[..., None])
            pyro.sample("x", Extreme(loc, torch.full((), 2.0, dtype=D)).to_event(1), obs=x)

    def guide(x):
        logit = pyro.param("logit", torch.zeros((), dtype=D))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=logit))

    svi = natural(model, guide)
    x = torch.ones(4, 3, dtype=D)
    assert "loc" not in [name for b in svi.directions(x).fisher.blocks for name in b.params]

    @registry.register_fisher(Extreme)
    def rule(d):
        return {"loc": d.scale.detach() ** -2, "scale": 1.8237 * d.scale.detach() ** -2}

    (block,) = [b for b in natural(model, guide).directions(x).fisher.blocks if b.params == ["loc"]]
    share = block.dense().reshape(3) * 4  # E (1 + h)², between 1 and 4
    assert bool((share >= 1).all()) and bool((share <= 4).all())
    assert torch.allclose(share, share[:1].expand(3))
