"""Bad input: an error that names the site, and the state is as it was."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
import optax
import pytest
from jax import random
from numpyro.contrib.control_flow import scan
from numpyro.infer.autoguide import AutoDiagonalNormal

from numpyro_helmholtz import (
    ALWS,
    RWS,
    BiHM,
    NaturalRWS,
    StochasticBackprop,
    WakeSleep,
    log_likelihood,
)
from numpyro_helmholtz.trace import Programs

from .programs import bernoulli

KEY = random.key(0)
X = jnp.array([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])


def theta():
    return numpyro.param("theta", jnp.array([0.5, -0.5]))


def phi():
    return numpyro.param("phi", jnp.array([0.2, 0.1]))


def model(x):
    with numpyro.plate("data", len(x)):
        h = bernoulli("h", jnp.zeros(2))
        bernoulli("x", theta() * (2 * h - 1), obs=x)


def guide(x):
    with numpyro.plate("data", len(x)):
        bernoulli("h", phi() * (2 * x - 1))


def refuses(model, guide, x, match, error=ValueError, **options):
    """``init`` raises, and so does the first look at a state that was made elsewhere."""
    svi = RWS(model, guide, num_particles=4, **options)
    with pytest.raises(error, match=match):
        state = svi.init(KEY, x)
        jax.eval_shape(svi.update, state, x)  # the sleep phase runs in an update first


def test_guide_lacks_a_latent():
    def bad(x):
        phi()

    refuses(model, bad, X, "latent site 'h' of the model is missing from the guide")


def test_guide_has_a_latent_too_many():
    def bad(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", phi() * x)
            numpyro.sample("extra", dist.Normal(phi()[0], 1.0))

    refuses(model, bad, X, "site 'extra' of the guide is no latent of the model")


def test_guide_samples_what_the_model_observes():
    def bad(x):
        guide(x)
        with numpyro.plate("data", len(x)):
            bernoulli("x", phi() * x)

    refuses(model, bad, X, "site 'x' of the guide is no latent of the model, which is observed")


def test_event_dim_mismatch():
    def matrix(x):
        with numpyro.plate("data", len(x)):
            prior = dist.Bernoulli(logits=jnp.zeros((1, 2))).to_event(2)
            h = numpyro.sample("h", prior).reshape(-1, 2)[: len(x)]
            bernoulli("x", theta() * h, obs=x)

    refuses(matrix, guide, X, "latent site 'h' has event_dim 1 in the guide but 2")


def test_discrete_against_continuous():
    def bad(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(phi() * x, 1.0).to_event(1))

    refuses(model, bad, X, "latent site 'h' has support")


def test_outside_the_support():
    def positive(x):
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Gamma(jnp.ones(2), jnp.ones(2)).to_event(1))
            bernoulli("x", theta() * h, obs=x)

    def bad(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Normal(phi() * x - 5, 1.0).to_event(1))

    refuses(positive, bad, X, "latent site 'h': the guide draws values with support")


def test_factor_cannot_dream():
    def bad(x):
        model(x)
        numpyro.factor("penalty", -jnp.square(theta()).sum())

    refuses(bad, guide, X, "site 'penalty' is a numpyro.factor")
    svi = RWS(bad, guide, num_particles=4, sleep_weight=0.0)
    jax.eval_shape(svi.update, svi.init(KEY, X), X)


@pytest.mark.parametrize("where", ["model", "guide"])
def test_enumeration_marks(where):
    marks = {where: {"enumerate": "parallel"}}

    def marked_model(x):
        with numpyro.plate("data", len(x)):
            prior = dist.Bernoulli(logits=jnp.zeros(3))
            h = numpyro.sample("h", prior, infer=marks.get("model"))
            bernoulli("x", theta() * h[..., None], obs=x)

    def marked_guide(x):
        with numpyro.plate("data", len(x)):
            numpyro.sample("h", dist.Bernoulli(logits=x @ phi()), infer=marks.get("guide"))

    refuses(marked_model, marked_guide, X, f"'h' of the {where} is marked")


class Shifted(dist.Distribution):
    """A distribution that does not declare where its values lie."""

    arg_constraints = {}

    def __init__(self, loc):
        self.loc = loc
        super().__init__(jnp.shape(loc))

    def sample(self, key, sample_shape=()):
        return self.loc + random.normal(key, (*sample_shape, *self.batch_shape))

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2


class Declared(Shifted):
    support = dist.constraints.real


@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_distribution_without_a_support(where):
    def programs(of_model, of_guide):
        def model(x):
            with numpyro.plate("data", len(x)):
                h = numpyro.sample("h", of_guide(jnp.zeros((3, 2))).to_event(1))
                numpyro.sample("x", of_model(theta() * h).to_event(1), obs=x)

        def guide(x):
            with numpyro.plate("data", len(x)):
                numpyro.sample("h", of_guide(phi() * x).to_event(1))

        return model, guide

    site, kinds = ("x", (Shifted, Declared)) if where == "model" else ("h", (Declared, Shifted))
    refuses(*programs(*kinds), X, f"'{site}' of the {where}: Shifted declares no support")
    svi = RWS(*programs(Declared, Declared), num_particles=4)
    assert jnp.isfinite(svi.update(svi.init(KEY, X), X)[1])


@pytest.mark.parametrize("call", ["update", "stable_update", "evaluate", "directions", "run"])
def test_bad_values(call):
    """NaN data and data outside the support, wherever the data can be looked at."""
    svi = RWS(model, guide, num_particles=4)
    state = svi.init(KEY, X)
    calls = {"run": lambda x: svi.run(KEY, 2, x, init_state=state, progress_bar=False)}
    look = calls.get(call, lambda x: getattr(svi, call)(state, x))
    with pytest.raises(ValueError, match="site 'x' has 1 NaN"):
        look(X.at[1, 0].set(jnp.nan))
    with pytest.raises(ValueError, match="site 'x': 6 values lie outside the support.*Bernoulli"):
        look(jnp.full((3, 2), 0.5))


def test_nan_data_that_the_guide_does_not_see():
    def blind(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", phi())

    refuses(model, blind, X * jnp.nan, "site 'x' has 6 NaN")
    params = {"theta": X[0], "phi": X[0]}
    with pytest.raises(ValueError, match="site 'x' has 6 NaN"):
        log_likelihood(KEY, params, model, blind, X * jnp.nan, num_particles=2)


def test_empty_batch():
    refuses(model, guide, X[:0], "empty batch")


def test_wrong_plate():
    def bad(x):
        with numpyro.plate("batch", len(x)):
            bernoulli("h", phi() * x)

    refuses(model, bad, X, r"site 'h' stands in the plates \['batch'\]")


def test_undeclared_batch_dimension():
    """With K = 3 the dimension could pass for the particles'."""

    def bad_model(x):
        h = bernoulli("h", jnp.zeros((3, 2)))
        bernoulli("x", theta() * h, obs=x)

    def bad_guide(x):
        bernoulli("h", phi() * x)

    svi = RWS(bad_model, bad_guide, num_particles=3)
    with pytest.raises(ValueError, match="site 'h' has a batch of shape .*belongs to no plate"):
        svi.init(KEY, X)
    with pytest.raises(ValueError, match="'h'"):
        Programs(bad_model, bad_guide, 5, 1).wake(KEY, {"theta": X[0], "phi": X[0]}, (X,), {})


@pytest.mark.parametrize("nesting", [math.inf, 0])
@pytest.mark.parametrize("front", [BiHM, partial(NaturalRWS, sleep_weight=0.0)])
@pytest.mark.parametrize("particles", [2, 3])
def test_data_without_a_plate(front, particles, nesting):
    """The distribution has no batch, the data have: three, as many as the particles."""

    def bad_model(x):
        h = bernoulli("h", jnp.zeros(2))
        bernoulli("x", theta() * h[..., :1], obs=x)

    def bad_guide(x):
        bernoulli("h", phi() * x.mean(0))

    svi = front(bad_model, bad_guide, num_particles=particles, max_plate_nesting=nesting)
    with pytest.raises(ValueError, match="site 'x' has a batch of shape .*belongs to no plate"):
        svi.init(KEY, X)


def test_no_observed_site():
    def bad(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", theta())

    refuses(bad, guide, X, "no observed site")


def test_a_parameter_that_init_has_not_seen():
    def growing(x):
        model(x)
        if len(x) > 3:
            numpyro.param("late", jnp.zeros(2))

    svi = RWS(growing, guide, num_particles=2)
    state = svi.init(KEY, X)
    with pytest.raises(ValueError, match="parameter 'late' of the programs is not among"):
        svi.evaluate(state, jnp.ones((4, 2)))


@pytest.mark.parametrize("front", [RWS, ALWS])
def test_control_flow_over_sites(front):
    """The first look says it, before anybody wonders about the shapes of the steps."""

    def chain(x, obs):
        def step(carry, at):
            z = numpyro.sample("z", dist.Normal(carry, 1.0))
            numpyro.sample("x", dist.Normal(z + theta()[0], 1.0), obs=at if obs else None)
            return z, None

        scan(step, 0.0, x)

    programs = [lambda x: chain(x, True)] + [lambda x: chain(x, False)] * (front is RWS)
    with pytest.raises(ValueError, match="Python loop"):
        front(*programs).init(KEY, X[:, 0])


@pytest.mark.parametrize("front", [RWS, WakeSleep])
@pytest.mark.parametrize("particles", [0, -1, 2.0, "3"])
def test_bad_number_of_particles(front, particles):
    with pytest.raises(ValueError, match="num_particles"):
        front(model, guide, num_particles=particles)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"sleep_weight": 1.5}, "sleep_weight"),
        ({"sleep_weight": -0.1}, "sleep_weight"),
        ({"sleep_scale": -1.0}, "sleep_scale"),
        ({"sleep_scale": float("nan")}, "sleep_scale"),
        ({"sleep_steps": 0}, "sleep_steps"),
        ({"sleep_steps": 1.5}, "sleep_steps"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        RWS(model, guide, **options)


def test_bad_programs_and_optimisers():
    with pytest.raises(TypeError, match="model must be a NumPyro program"):
        RWS(None, guide)
    with pytest.raises(TypeError, match="guide must be a NumPyro program"):
        RWS(model, 3)
    for optim in (0.1, numpyro.optim.Minimize(), optax.sgd):
        with pytest.raises(TypeError, match="SGD"):
            RWS(model, guide, optim)
    with pytest.raises(ValueError, match="num_steps"):
        RWS(model, guide).run(KEY, 0, X)


def test_a_factor_or_an_observed_site_in_the_guide():
    def factor(x):
        guide(x)
        with numpyro.plate("data", len(x)):
            numpyro.factor("bonus", phi().sum() * x[:, 0])

    def observed(x):
        guide(x)
        with numpyro.plate("data", len(x)):
            numpyro.sample("y", dist.Bernoulli(logits=phi()[0]), obs=x[:, 0])

    refuses(model, factor, X, "site 'bonus' of the guide is a numpyro.factor")
    refuses(model, observed, X, "site 'y' of the guide is observed")


def normal(x, point=False):
    mean = numpyro.sample("mean", dist.Normal(theta()[0], 1.0))
    if point:
        numpyro.sample("copy", dist.Delta(theta()[1]), obs=-0.5)
    with numpyro.plate("data", len(x)):
        numpyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])


def test_auxiliary_sites_of_an_automatic_guide():
    refuses(normal, AutoDiagonalNormal(normal), X, "'_auto_latent' .* Auxiliary sites")


def test_a_point_mass_at_a_parameter():
    """No score reaches the parameters of a Delta: they would stay where they are in silence."""

    def delta(x):
        numpyro.sample("mean", dist.Delta(phi()[0]))

    def wide(x):
        numpyro.sample("mean", dist.Normal(phi()[0], 1.0))

    refuses(normal, delta, X, "site 'mean' of the guide is a Delta")
    refuses(lambda x: normal(x, point=True), wide, X, "site 'copy' of the model is a Delta")
    constant = RWS(normal, lambda x: numpyro.sample("mean", dist.Delta(x.mean())))
    assert jnp.isfinite(constant.evaluate(constant.init(KEY, X), X))
    moved = StochasticBackprop(normal, delta)
    state = moved.init(KEY, X)
    gradient = moved.directions(state, X).gradient["phi"]
    # of log N(m | θ, 1) + Σ log N(x | m, 1), a mean over the data, in m = φ_0
    exact = (theta()[0] - phi()[0] + (X[:, 0] - phi()[0]).sum()) / len(X)
    assert jnp.allclose(gradient, jnp.array([exact, 0.0]))


@pytest.mark.parametrize("value", [0.0, -1.0, jnp.nan, jnp.inf])
def test_a_start_that_no_optimiser_can_move_from(value):
    def bad(x, scale=value):
        model(x)
        numpyro.param("scale", jnp.array([1.0, scale]), constraint=dist.constraints.positive)

    refuses(bad, guide, X, "parameter 'scale' starts at 1 values .* constraint")
    svi = RWS(lambda x: bad(x, 2.0), guide, num_particles=2)
    with pytest.raises(ValueError, match="parameter 'scale' starts at 2 values"):
        svi.init(KEY, X, init_params={"scale": jnp.array([value, value])})


def test_programs_without_parameters():
    def plain(x):
        with numpyro.plate("data", len(x)):
            bernoulli("x", bernoulli("h", jnp.zeros(2)), obs=x)

    def draws(x):
        with numpyro.plate("data", len(x)):
            bernoulli("h", x)

    refuses(plain, draws, X, "neither the model nor the guide has parameters to train")
    with pytest.raises(ValueError, match="neither the model nor the guide has parameters"):
        NaturalRWS(plain, draws).init(KEY, X)
    with pytest.raises(ValueError, match="the model has no parameters to train"):
        ALWS(plain).init(KEY, X)
