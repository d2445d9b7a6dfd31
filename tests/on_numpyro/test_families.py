"""The Fisher information of every family against the outer product of its scores."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
import pytest
from jax import random
from jax.scipy.special import polygamma

import numpyro_helmholtz as nh
from numpyro_helmholtz.fisher import families, registry
from numpyro_helmholtz.fisher.arguments import argument_names

from .oracles import KEY, arguments, close, natural, program, score_information

A, B, P = jnp.array([-1.3, 0.2, 2.0]), jnp.array([0.6, 1.1, 2.3]), jnp.array([0.1, 0.5, 0.83])
CASES = {
    "bernoulli logits": lambda: dist.Bernoulli(logits=A),
    "bernoulli probs": lambda: dist.Bernoulli(probs=P),
    "geometric logits": lambda: dist.Geometric(logits=A),
    "geometric probs": lambda: dist.Geometric(probs=P),
    "normal": lambda: dist.Normal(A, B),
    "poisson": lambda: dist.Poisson(B),
    "exponential": lambda: dist.Exponential(B),
    "categorical logits": lambda: dist.Categorical(logits=jnp.stack([A, B])),
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
}


def assembled(fn):
    """The information as one (*batch, d, d) matrix over the arguments in order."""
    info, exact, how = families.information(fn)
    names = arguments(fn)
    if set(info) == set(names) and info[names[0]].ndim > len(fn.batch_shape):
        return info[names[0]], exact, how
    matrix = jnp.zeros((*fn.batch_shape, len(names), len(names)))
    for key, value in info.items():
        where = [names.index(n) for n in ((key,) if isinstance(key, str) else key)]
        value = value[..., None, None] if isinstance(key, str) else value
        for i, a in enumerate(where):
            for j, b in enumerate(where):
                matrix = matrix.at[..., a, b].set(value[..., i, j])
    return matrix, exact, how


@pytest.mark.parametrize("name", CASES)
def test_closed_forms_equal_quadrature(name):
    fn = CASES[name]()
    matrix, exact, how = assembled(fn)
    assert exact and how == "closed form"
    close(matrix, score_information(fn), 1e-9)


def test_binomial_and_multinomial_count_their_draws():
    for one, many in (
        (dist.Bernoulli(logits=A), dist.Binomial(7, logits=A)),
        (dist.Bernoulli(probs=P), dist.Binomial(7, probs=P)),
        (dist.Categorical(logits=A[None]), dist.Multinomial(7, logits=A[None])),
        (dist.Categorical(probs=P[None] / P.sum()), dist.Multinomial(7, probs=P[None] / P.sum())),
    ):
        (a,), (b,) = (families.information(fn)[0].values() for fn in (one, many))
        close(b, 7 * a, 1e-12)


def test_categorical_probabilities_agree_along_the_simplex():
    fn = dist.Categorical(probs=jax.nn.softmax(jnp.stack([A, B]), -1))
    matrix, exact, _ = assembled(fn)
    along = jnp.eye(3) - 1 / 3
    close(along @ matrix @ along, along @ score_information(fn) @ along, 1e-12)
    assert exact


def test_laplace_information_is_that_of_both_arguments():
    # The score in loc is a sign: its square is one everywhere.
    info, exact, _ = families.information(dist.Laplace(A, B))
    close(info["loc"], B**-2, 1e-12)
    close(info["scale"], B**-2, 1e-12)
    assert exact


def test_multivariate_normal_location():
    factor = jnp.tril(random.normal(KEY, (3, 3))) + 3 * jnp.eye(3)
    info, _, _ = families.information(dist.MultivariateNormal(A, scale_tril=factor))
    close(info["loc"], jnp.linalg.inv(factor @ factor.T), 1e-10)
    info, _, _ = families.information(dist.LowRankMultivariateNormal(A, factor[:, :1], B))
    close(info["loc"], jnp.linalg.inv(factor[:, :1] @ factor[:, :1].T + jnp.diag(B)), 1e-10)


def test_multivariate_student_t_location():
    """The score ``(ν+p) Σ⁻¹ z / (ν + |z|²)`` is radial: one integral over the length."""
    factor = jnp.tril(random.normal(KEY, (3, 3))) + 3 * jnp.eye(3)
    info, exact, _ = families.information(dist.MultivariateStudentT(4.5, A, factor))
    log_r = np.linspace(-20, 60, 20_001)
    r = np.exp(log_r)
    weight = r**3 * (1 + r**2 / 4.5) ** (-7.5 / 2)
    share = (weight * (7.5 * r / (4.5 + r**2)) ** 2).sum() / weight.sum() / 3
    close(info["loc"], share * jnp.linalg.inv(factor @ factor.T), 1e-9)
    assert exact


@pytest.mark.parametrize("name", ["normal", "gamma"])
def test_kl_route_equals_the_closed_form(name):
    fn = CASES[name]()
    info = families._from_kl(fn, argument_names(fn))
    (value,) = info.values()
    close(value, score_information(fn), 1e-9)


def test_kl_route_of_a_dirichlet():
    fn = dist.Dirichlet(jnp.stack([B, B + 1]))
    info, exact, how = families.information(fn)
    assert exact and "KL" in how
    a = fn.concentration
    truth = polygamma(1, a)[..., None] * jnp.eye(3) - polygamma(1, a.sum(-1))[:, None, None]
    close(info["concentration"], truth, 1e-9)


def test_score_route_is_near_and_inexact():
    fn = dist.Normal(A, B)
    found, exact = families._from_scores(fn, ["loc", "scale"], KEY)
    estimate = found["loc", "scale"]
    assert not exact
    error = jnp.abs(estimate - score_information(fn)) * B[:, None, None] ** 2
    # Standard errors at 512 samples: sqrt(2/512) = 0.06 and sqrt(56/512) = 0.33.
    assert float(error[..., 0, 0].max()) < 0.3 and float(error[..., 1, 1].max()) < 1.4
    _, exact, how = families.information(dist.SoftLaplace(A, B))
    assert not exact and "scores" in how


def test_few_values_are_summed_and_many_are_sampled():
    fn = dist.BetaBinomial(B, 1 + P, 7)
    matrix, exact, how = assembled(fn)
    assert exact and how == "sum over the support"
    close(matrix, score_information(fn), 1e-6)  # JAX's logarithm of beta is good to six digits
    for count in (600, jnp.array([7, 8, 9])):
        _, exact, how = families.information(dist.BetaBinomial(B, 1 + P, count), KEY)
        assert not exact and "scores" in how

    def site(h, w):
        return dist.BetaBinomial(jnp.exp(w.layer("a", h, 2)), 2.0, 5).to_event(1)

    model, guide, x = program(site)
    (row,) = [r for r in natural(model, guide).structure(KEY, x) if r.site == "x"]
    assert row.exact and row.note == "sum over the support"


@pytest.mark.parametrize("value", [-40.0, 40.0, 700.0])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_saturated_units_keep_a_finite_information(value, dtype):
    logits = jnp.array([value], dtype)
    for fn in (
        dist.Bernoulli(logits=logits),
        dist.Categorical(logits=jnp.stack([logits, -logits], -1)),
        dist.VonMises(logits, jnp.abs(logits)),
        dist.VonMises(logits, jnp.abs(logits) * 1e-9),
    ):
        for info in families.information(fn)[0].values():
            assert bool(jnp.isfinite(info).all())
    info = families.information(dist.Bernoulli(logits=jnp.array([20.0], jnp.float32)))[0]["logits"]
    assert float(info[0]) == pytest.approx(2.0611536e-09, rel=1e-4)


def variance_of_cosine(kappa):
    """Of a von Mises variable, by quadrature: the information of its concentration."""
    x = np.linspace(-1, 1, 20001)[1:] * min(np.pi, 14 / np.sqrt(kappa))
    below = -2 * np.sin(x / 2) ** 2  # cos x - 1
    weight = np.exp(kappa * below)
    mean = (weight * below).sum() / weight.sum()
    return (weight * (below - mean) ** 2).sum() / weight.sum()


@pytest.mark.parametrize(("dtype", "error"), [(jnp.float32, 1e-3), (jnp.float64, 1e-9)])
@pytest.mark.parametrize("kappa", [0.5, 3.0, 15.0, 25.0, 400.0, 900.0, 1e4, 1e6])
def test_concentrated_von_mises(kappa, dtype, error):
    fn = dist.VonMises(jnp.zeros((), dtype), jnp.asarray(kappa, dtype))
    found = families.information(fn)[0]["concentration"]
    assert found.dtype == dtype
    assert float(found) == pytest.approx(variance_of_cosine(kappa), rel=error)


@pytest.mark.parametrize(
    ("fn", "name"),
    [
        (lambda one: dist.Normal(A, one), "loc"),
        (lambda one: dist.Laplace(A, one), "loc"),
        (lambda one: dist.Exponential(one), "rate"),
        (lambda one: dist.Poisson(one), "rate"),
        (lambda one: dist.VonMises(A, one), "loc"),
        (lambda one: dist.StudentT(one, 0, one), ("df", "scale")),
        (lambda one: dist.Weibull(one, one), ("scale", "concentration")),
        (lambda one: dist.Gumbel(0, one), ("loc", "scale")),
        (lambda one: dist.HalfNormal(one), "scale"),
        (lambda one: dist.ZeroInflatedPoisson(one / 2, one), ("gate", "rate")),
        (lambda one: dist.Bernoulli(one / 2), "probs"),
        (lambda one: dist.Geometric(one / 2), "probs"),
    ],
)
def test_plain_numbers_as_arguments(fn, name):
    plain = families.information(fn(1))[0][name]
    close(plain, families.information(fn(jnp.ones(())))[0][name], 1e-12)


def test_a_folded_variable_is_not_the_whole_one():
    """Its sign is lost, and with it information; a half-normal's is that of its scale alone."""
    folded = dist.FoldedDistribution(dist.Normal(A, B)).to_event(1)
    assert type(families.unwrap(folded).fn) is dist.FoldedDistribution
    assert families.information(families.unwrap(folded).fn)[0] == {}
    info, exact, _ = families.information(families.unwrap(dist.HalfNormal(B).to_event(1)).fn)
    close(info["scale"], 2 * B**-2, 1e-12)
    assert exact


def test_unwrapping_takes_off_every_wrapper():
    fn = dist.Normal(A, B).mask(jnp.array([True, False, True])).to_event(1).expand([4])
    fn = dist.TransformedDistribution(fn, [dist.transforms.ExpTransform()])
    base = families.unwrap(fn)
    assert type(base.fn).__name__ == "Normal"
    assert len(base.transforms) == 1 and len(base.masks) == 1
    assert families.unwrap(dist.LogNormal(A, B)).fn.loc is not None


# counts -----------------------------------------------------------------------------------------

N, R = np.array([7, 3, 12]), np.array([0.4, 5.0, 2.5])
BOTH = jnp.stack([A, B])
COUNTED = jnp.array([v for v in itertools.product(range(6), repeat=3) if sum(v) == 5], float)
COUNTS = {
    "binomial logits": (lambda v: dist.Binomial(N, logits=v), "logits", A, 13),
    "binomial probs": (lambda v: dist.Binomial(N, probs=v), "probs", P, 13),
    "multinomial logits": (lambda v: dist.Multinomial(5, logits=v), "logits", BOTH, None),
    "multinomial probs": (
        lambda v: dist.Multinomial(5, probs=v / v.sum(-1, keepdims=True)),
        "probs",
        jax.nn.softmax(BOTH),
        None,
    ),
}
# Makes it of count and argument; the arguments' names; a value; its logits.
DISPERSED = {
    "logits": (
        lambda r, v: dist.NegativeBinomial(r, logits=v),
        ("total_count", "logits"),
        A,
        lambda r, v: v,
    ),
    "probs": (
        lambda r, v: dist.NegativeBinomial(r, probs=v),
        ("total_count", "probs"),
        P,
        lambda r, v: jax.scipy.special.logit(v),
    ),
    "rate": (dist.GammaPoisson, ("concentration", "rate"), B, lambda r, v: -jnp.log(v)),
    "mean": (
        lambda r, v: dist.NegativeBinomial2(v, r),
        ("concentration", "mean"),
        B,
        lambda r, v: jnp.log(v / r),
    ),
}


def enumerated(make, values, nodes):
    """E[score scoreᵀ] by a sum over the support: (*batch, d, d)."""
    batch = make(*values).batch_shape
    wide = [jnp.broadcast_to(v, (len(nodes), *v.shape)) for v in values]
    inside = (
        nodes <= N if isinstance(make(*values), dist.BinomialLogits | dist.BinomialProbs) else 1
    )
    nodes = nodes * inside

    def log_prob(wide):
        return make(*wide).log_prob(nodes)

    weight = jnp.exp(log_prob(wide)) * inside
    scores = jax.grad(lambda wide: log_prob(wide).sum())(wide)
    close(weight.sum(0), jnp.ones(batch), 1e-12)
    score = scores[0] if scores[0].ndim > weight.ndim else jnp.stack(scores, -1)
    return jnp.einsum("n...,n...i,n...j->...ij", weight, score, score)


@pytest.mark.parametrize("name", COUNTS)
def test_information_of_counts_equals_enumeration(name):
    make, argument, value, size = COUNTS[name]
    nodes = COUNTED[:, None] if size is None else jnp.arange(float(size))[:, None]
    truth = enumerated(make, [value], nodes)
    info, exact, how = families.information(make(value))
    assert exact and how == "closed form" and list(info) == [argument]
    if "multinomial probs" in name:  # along the simplex
        along = jnp.eye(3) - 1 / 3
        info, truth = {argument: along @ info[argument] @ along}, along @ truth @ along
    elif size is not None:
        truth = truth[..., 0, 0]
    close(info[argument], truth, 1e-8)


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("name", DISPERSED)
def test_information_of_a_negative_binomial_equals_enumeration(name, learned):
    make, arguments, value, logits = DISPERSED[name]
    nodes = jnp.arange(600.0)[:, None]

    def by_logits(r, v):  # NumPyro's log-density of the other forms is good to 1e-7 only
        return dist.NegativeBinomial(r, logits=logits(r, v))

    close(make(R, value).log_prob(nodes[:20]), by_logits(R, value).log_prob(nodes[:20]), 1e-6)
    truth = enumerated(by_logits, [jnp.asarray(R), value], nodes)
    info, exact, how = families.information(make(jnp.asarray(R) if learned else R, value))
    assert exact and how == "closed form"
    if not learned:
        close(info.pop(arguments[1]), truth[..., 1, 1], 1e-8)
    elif name == "mean":  # orthogonal to the concentration
        close(truth[..., 0, 1], jnp.zeros(3), 1e-8)
        for i, argument in enumerate(arguments):
            close(info.pop(argument), truth[..., i, i], 1e-8)
    else:
        close(info.pop(arguments), truth, 1e-8)
    assert not info


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("logit", [-80.0, -3.0, 0.0, 6.0, 80.0])
@pytest.mark.parametrize("count", [1e-4, 0.1, 30.0, 1e6])
def test_a_learned_count_at_extremes(count, logit, dtype):
    """Between that of the count beside unknown logits, and the variance of its score at most."""
    r, logits = jnp.array([count], dtype), jnp.array([logit], dtype)
    ((_, matrix),) = families.information(dist.NegativeBinomial(r, logits=logits))[0].items()
    p = jax.nn.sigmoid(logits)
    assert matrix.dtype == dtype and bool(jnp.isfinite(matrix).all())
    assert bool((matrix[:, 0, 0] >= p / r * (1 - 1e-6)).all())
    most = jnp.minimum(polygamma(1, r), jnp.exp(logits) / r)  # all of x, or of its mean
    assert bool((matrix[:, 0, 0] <= most * (1 + 1e-4)).all())


LEARNED = {
    "fixed": lambda h, w: dist.NegativeBinomial(5.0, logits=w.layer("a", h, 2)),
    "fixed integer": lambda h, w: dist.NegativeBinomial(5, logits=w.layer("a", h, 2)),
    "learned": lambda h, w: dist.NegativeBinomial(
        jax.nn.softplus(w.layer("r", h, 2)), logits=w.layer("a", h, 2)
    ),
    "mean": lambda h, w: dist.NegativeBinomial2(jnp.exp(w.layer("a", h, 2)), 5.0),
    "mean, integer": lambda h, w: dist.NegativeBinomial2(jnp.exp(w.layer("a", h, 2)), 5),
    "mean, learned": lambda h, w: dist.NegativeBinomial2(
        jnp.exp(w.layer("a", h, 2)), jax.nn.softplus(w.layer("r", h, 2))
    ),
}


@pytest.mark.parametrize("name", LEARNED)
def test_the_report_calls_counts_exact(name):
    model, guide, x = program(lambda h, w: LEARNED[name](h, w).to_event(1))
    rows = [row for row in natural(model, guide).structure(KEY, x) if row.site == "x"]
    names = {"a", "r"} if "learned" in name else {"a"}
    assert {n for row in rows for n in row.params} == {f"{n}.{p}" for n in names for p in "wb"}
    assert all(row.exact and row.note.startswith("closed form") for row in rows)
    if name != "mean, learned":  # where the mean that NumPyro keeps is of the concentration too
        assert rows[0].kind == "affine" and rows[0].units == 2


# the registry ----------------------------------------------------------------------------------


@pytest.fixture
def rules(monkeypatch):
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))


@pytest.mark.parametrize("wrong", [None, "Normal", dist.Normal(0.0, 1.0), lambda: 0])
def test_register_fisher_refuses_what_is_no_class(rules, wrong):
    with pytest.raises(TypeError, match="register_fisher needs a distribution class"):
        nh.register_fisher(wrong)


def test_register_fisher_returns_the_rule_and_serves_subclasses(rules):
    class Mine(dist.Normal):
        pass

    assert families.information(Mine(A, B))[2] == "closed form"

    @nh.register_fisher(Mine)
    def rule(d):
        """Own text."""
        return {"loc": 7 * jnp.ones_like(d.loc)}

    assert rule.__doc__ == "Own text."
    close(families.information(Mine(A, B))[0]["loc"], 7 * jnp.ones_like(A), 0)
    close(families.information(dist.Normal(A, B))[0]["loc"], B**-2, 1e-12)


def test_a_matrix_argument_without_a_rule_is_an_error_that_says_how_to_give_one(rules):
    class Correlated(dist.MultivariateNormal):
        pass

    registry._RULES.pop(dist.MultivariateNormal)
    with pytest.raises(NotImplementedError, match="@register_fisher"):
        families.information(Correlated(A, scale_tril=jnp.eye(3)))


def test_an_error_of_a_users_rule_reaches_the_user(rules):
    class Mine(dist.Normal):
        pass

    @nh.register_fisher(Mine)
    def rule(d):
        raise RuntimeError("my own mistake")

    model, guide, x = program(lambda h, w: Mine(w.layer("a", h, 2), 1.0).to_event(1))
    with pytest.raises(RuntimeError, match="my own mistake"):
        natural(model, guide).init(KEY, x)


def test_a_rule_for_other_arguments_than_the_distribution_has(rules):
    class Mine(dist.Normal):
        pass

    @nh.register_fisher(Mine)
    def rule(d):
        return {"location": jnp.ones_like(d.loc)}

    with pytest.raises(ValueError, match=r"rule of Mine informs about \['location'\]"):
        families.information(Mine(A, B))


class Narrow(dist.Distribution):
    """A normal distribution that keeps its scale in the shape that it is given in."""

    arg_constraints = {"loc": dist.constraints.real, "scale": dist.constraints.positive}
    support = dist.constraints.real

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        super().__init__(jnp.shape(loc))

    def sample(self, key, sample_shape=()):
        return dist.Normal(self.loc, self.scale).sample(key, sample_shape)

    def log_prob(self, value):
        return dist.Normal(self.loc, self.scale).log_prob(value)


def narrow(kind):
    """Directions of a layer whose two units share one scale."""

    def model(x):
        w, s = numpyro.param("w", jnp.array([1.0, 2.0])), numpyro.param("s", jnp.array(0.7))
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Bernoulli(logits=0.3))
            fn = kind(z[..., None] * w, s)
            numpyro.sample("x", fn.to_event(1 - fn.event_dim), obs=x)

    def guide(x):
        a = numpyro.param("a", jnp.array(0.1))
        with numpyro.plate("data", len(x)):
            numpyro.sample("z", dist.Bernoulli(logits=a * x[:, 0]))

    svi, x = natural(model, guide), jnp.arange(8.0).reshape(4, 2)
    return svi.directions(svi.init(KEY, x), x)


def test_a_rule_in_a_smaller_shape_than_the_batch(rules):
    @nh.register_fisher(Narrow)
    def rule(d):
        return {"loc": d.scale**-2, "scale": 2 / d.scale**2}

    found, truth = narrow(Narrow), narrow(dist.Normal)
    assert [b.params for b in found.fisher.blocks] == [b.params for b in truth.fisher.blocks]
    for one, two in zip(found.fisher.blocks, truth.fisher.blocks, strict=True):
        close(one.dense(), two.dense(), 1e-12)


class Whole(Narrow):
    """The same as one vector, whose constraint does not say so."""

    def __init__(self, loc, scale):
        self.loc, self.scale = loc, scale
        super(Narrow, self).__init__(jnp.shape(loc)[:-1], jnp.shape(loc)[-1:])

    def log_prob(self, value):
        return super().log_prob(value).sum(-1)


def test_a_rule_of_a_vector_whose_constraint_does_not_say_so(rules):
    @nh.register_fisher(Whole)
    def rule(d):
        return {"loc": jnp.eye(2) / d.scale**2}

    (found,) = [b for b in narrow(Whole).fisher.blocks if b.params == ["w"]]
    (truth,) = [b for b in narrow(dist.Normal).fisher.blocks if b.params == ["w"]]
    close(found.dense().reshape(2, 2), jnp.diag(truth.dense().reshape(2)), 1e-12)


@pytest.mark.parametrize(
    ("key", "shape"), [("loc", (3, 4, 2, 2)), ("loc", (3,)), (("loc", "scale"), (3, 4, 2, 3))]
)
def test_a_rule_of_another_shape_names_the_site(rules, key, shape):
    @nh.register_fisher(Narrow)
    def rule(d):
        return {key: jnp.ones(shape)}

    with pytest.raises(ValueError, match="site 'x' of the model: the rule of Narrow gives .* has"):
        narrow(Narrow)


class Powered(dist.Distribution):
    """Normal of variance ``scale**power``; the power is no parameter."""

    arg_constraints = {"scale": dist.constraints.positive}
    support = dist.constraints.real

    def __init__(self, scale, power, *, validate_args=None):
        self.scale, self._power = scale, power
        super().__init__(jnp.shape(scale), validate_args=validate_args)

    def sample(self, key, sample_shape=()):
        return dist.Normal(0.0, self.scale ** (self._power / 2)).sample(key, sample_shape)

    def log_prob(self, value):
        return dist.Normal(0.0, self.scale ** (self._power / 2)).log_prob(value)


def test_constructor_arguments_that_are_no_parameters_are_kept():
    info, exact, _ = families.information(Powered(B, 3.0))
    want = 2 * (1.5 / B) ** 2  # standard error sqrt(14/512)
    assert not exact
    close(info["scale"] / want, jnp.ones(3), 0.6)
    fn = dist.DirichletMultinomial(jnp.stack([B, B + 1]), 5, total_count_max=5)
    assert not families.information(fn)[1]


def test_a_subclass_with_arguments_of_its_own():
    """A Gamma's rule says nothing of the degrees of freedom."""
    info, exact, _ = families.information(dist.Chi2(B))
    close(info["df"], polygamma(1, B / 2) / 4, 1e-9)
    assert exact


def test_a_support_that_moves_has_no_exact_information():
    info, exact, _ = families.information(dist.Uniform(A, A + B))
    (matrix,) = info.values()
    assert not exact and bool((jnp.diagonal(matrix, axis1=-2, axis2=-1) >= 0).all())


def test_arguments_that_are_python_numbers():
    def site(h, w):
        return dist.Normal(0, jnp.exp(w.layer("a", h, 2))).to_event(1)

    model, guide, x = program(site)

    def centred(x):
        model(x)
        numpyro.sample("more", dist.Normal(0, 1), obs=0.3)

    rows = {row.site: row for row in natural(centred, guide, sleep_weight=0.0).structure(KEY, x)}
    assert rows["x"].params == ("a.w", "a.b") and rows["x"].exact


@pytest.mark.parametrize(
    "make",
    [
        lambda o: dist.OrderedLogistic(o[..., 0], jnp.array([-1.0, 0.0, 1.0])),
        lambda o: dist.BetaProportion(jax.nn.sigmoid(o[..., 0]), 2.0 + o[..., 1] ** 2),
    ],
)
def test_a_family_without_information_is_an_error_that_names_the_site(make):
    model, guide, x = program(lambda h, w: make(w.layer("a", h, 2)))
    with pytest.raises(NotImplementedError, match="site 'x' of the model: .*@register_fisher"):
        natural(model, guide).init(KEY, x)
    nh.RWS(model, guide).init(KEY, x)


@pytest.mark.parametrize(
    "make",
    [
        lambda o: dist.ZeroInflatedDistribution(dist.Poisson(3.0), gate_logits=o[..., 0]),
        lambda o: dist.ZeroInflatedDistribution(dist.Poisson(3.0), gate=jax.nn.sigmoid(o[..., 1])),
    ],
)
def test_zero_inflated_families_have_scores(make):
    model, guide, x = program(lambda h, w: make(w.layer("a", h, 2)))
    (row,) = [r for r in natural(model, guide).structure(KEY, x) if r.site == "x"]
    assert not row.exact and "scores" in row.note


def test_a_rule_of_a_transformed_distribution(monkeypatch):
    """Transforms are taken off where there is none; the location's information is 1/scale²."""
    monkeypatch.setattr(registry, "_RULES", dict(registry._RULES))

    class Extreme(dist.TransformedDistribution):
        arg_constraints = {"loc": dist.constraints.real}
        reparametrized_params = ["loc"]
        pytree_data_fields = ("loc",)

        def __init__(self, loc, *, validate_args=None):
            self.loc = loc
            base = dist.Gumbel(jnp.zeros_like(loc), 2.0)
            super().__init__(base, dist.transforms.AffineTransform(loc, 1.0))

    def model(x):
        loc = numpyro.param("loc", jnp.zeros(3))
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Bernoulli(jnp.array(0.5)))
            numpyro.sample("x", Extreme(loc * (1 + h[..., None])).to_event(1), obs=x)

    def guide(x):
        logit = numpyro.param("logit", jnp.zeros(()))
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Bernoulli(logits=logit))

    x = jnp.ones((4, 3))

    def blocks():
        svi = natural(model, guide)
        return {tuple(b.params): b for b in svi.directions(svi.init(KEY, x), x).fisher.blocks}

    assert ("loc",) not in blocks()

    @registry.register_fisher(Extreme)
    def rule(d):
        return {"loc": jnp.full_like(d.loc, 0.25)}

    share = blocks()["loc",].dense().reshape(3) * 4  # E (1 + h)², between 1 and 4
    assert bool((share >= 1).all()) and bool((share <= 4).all())
    close(share, jnp.broadcast_to(share[0], 3), 1e-12)
