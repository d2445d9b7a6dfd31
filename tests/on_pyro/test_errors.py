"""Bad input: an error that names the site, and no parameter changes."""

import math
from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro import poutine
from pyro.infer.autoguide import AutoNormal

from pyro_helmholtz import (
    ALWS,
    RWS,
    BiHM,
    NaturalRWS,
    StochasticBackprop,
    WakeSleep,
    log_likelihood,
)

from .programs import snapshot

X = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0]])
FRONT_ENDS = [RWS, NaturalRWS]


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def theta():
    return pyro.param("theta", torch.tensor([0.5, -0.5]))


def phi():
    return pyro.param("phi", torch.tensor([0.2, 0.1]))


def model(x):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=theta() * (2 * h - 1)).to_event(1), obs=x)


def guide(x):
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Bernoulli(logits=phi() * (2 * x - 1)).to_event(1))


def refuses(front, model, guide, x, match, error=ValueError, **options):
    """A first step raises and leaves the parameters as they are."""
    theta(), phi()
    before = snapshot()
    svi = front(model, guide, num_particles=4, **options)
    with pytest.raises(error, match=match):
        svi.step(x)
    after = snapshot()
    assert before.keys() <= after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


both = pytest.mark.parametrize("front", FRONT_ENDS)


@both
def test_guide_lacks_a_latent(front):
    def bad(x):
        phi()

    refuses(front, model, bad, X, "latent site 'h' of the model is missing from the guide")


@both
def test_guide_has_a_latent_too_many(front):
    def bad(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi() * x).to_event(1))
            pyro.sample("extra", dist.Normal(phi()[0], 1.0))

    refuses(front, model, bad, X, "site 'extra' of the guide is no latent of the model")


@both
def test_event_dim_mismatch(front):
    def matrix(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(1, 2)).to_event(2))
            logits = theta() * h.squeeze(-2)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def bad(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi() * x).to_event(1))

    refuses(front, matrix, bad, X, "latent site 'h' has event_dim 1 in the guide but 2")


@both
def test_discrete_against_continuous(front):
    def bad(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(phi() * x, 1.0).to_event(1))

    refuses(front, model, bad, X, "latent site 'h' has support")


@both
def test_outside_the_support(front):
    def positive(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Gamma(torch.ones(2), torch.ones(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=theta() * h).to_event(1), obs=x)

    def bad(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Normal(phi() * x, 1.0).to_event(1))

    refuses(front, positive, bad, X, "'h'")


@both
def test_factor_cannot_dream(front):
    def bad(x):
        model(x)
        pyro.factor("penalty", -theta().square().sum())

    refuses(front, bad, guide, X, "site 'penalty' is a pyro.factor")


@both
@pytest.mark.parametrize("where", ["model", "guide"])
def test_enumeration_marks(front, where):
    marks = {where: {"enumerate": "parallel"}}

    def marked_model(x):
        with pyro.plate("data", len(x)):
            prior = dist.Bernoulli(logits=torch.zeros(3))
            h = pyro.sample("h", prior, infer=marks.get("model"))
            logits = theta() * h[..., None]
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def marked_guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ phi()), infer=marks.get("guide"))

    refuses(front, marked_model, marked_guide, X, f"'h' of the {where} is marked")


class Shifted(dist.TorchDistribution):
    """A distribution that does not declare where its values lie."""

    arg_constraints = {}

    def __init__(self, loc):
        self.loc = loc
        super().__init__(loc.shape, validate_args=False)

    def expand(self, batch_shape, _instance=None):
        return Shifted(self.loc.expand(batch_shape))

    def sample(self, sample_shape=()):
        return self.loc.detach() + torch.randn(*sample_shape, *self.batch_shape)

    def log_prob(self, value):
        return -0.5 * (value - self.loc) ** 2


class Declared(Shifted):
    support = dist.constraints.real

    def expand(self, batch_shape, _instance=None):
        return Declared(self.loc.expand(batch_shape))


@both
@pytest.mark.parametrize("where", ["model", "guide"])
def test_a_distribution_without_a_support(front, where):
    def programs(of_model, of_guide):
        def model(x):
            with pyro.plate("data", len(x)):
                h = pyro.sample("h", of_guide(torch.zeros(3, 2)).to_event(1))
                pyro.sample("x", of_model(theta() * h).to_event(1), obs=x)

        def guide(x):
            with pyro.plate("data", len(x)):
                pyro.sample("h", of_guide(phi() * x).to_event(1))

        return model, guide

    site, kinds = ("x", (Shifted, Declared)) if where == "model" else ("h", (Declared, Shifted))
    refuses(front, *programs(*kinds), X, f"'{site}' of the {where}: Shifted declares no support")
    assert math.isfinite(RWS(*programs(Declared, Declared), num_particles=4).step(X))


@both
@pytest.mark.parametrize("warm", [False, True])
def test_nan_data(front, warm):
    bad = X.clone()
    bad[1, 0] = float("nan")
    svi = front(model, guide, num_particles=4)
    if warm:
        svi.step(X)
    theta(), phi()
    before = snapshot()
    with pytest.raises(ValueError, match="site 'x' has 1 NaN"):
        svi.step(bad)
    assert all(torch.equal(v, before[k]) for k, v in snapshot().items())


@both
def test_nan_data_that_the_guide_does_not_see(front):
    def blind(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi()).to_event(1))

    refuses(front, model, blind, X * float("nan"), "site 'x' has 6 NaN")


@both
def test_empty_batch(front):
    refuses(front, model, guide, X[:0], "empty batch")


@both
def test_wrong_plate(front):
    def bad(x):
        with pyro.plate("batch", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi() * x).to_event(1))

    refuses(front, model, bad, X, r"site 'h' stands in the plates \['batch'\]")


@both
def test_undeclared_batch_dimension(front):
    def bad_model(x):
        h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(3, 2)).to_event(1))
        pyro.sample("x", dist.Bernoulli(logits=theta() * h).to_event(1), obs=x)

    def bad_guide(x):
        pyro.sample("h", dist.Bernoulli(logits=phi() * x).to_event(1))

    refuses(front, bad_model, bad_guide, X, "site 'h' .*belongs to no plate")


def unplated(where):
    """Programs that lack a plate around all sites, or around the data alone."""

    def bad_model(x):
        prior = torch.zeros(len(x), 2) if where == "all" else torch.zeros(2)
        h = pyro.sample("h", dist.Bernoulli(logits=prior).to_event(1))
        logits = theta() * h if where == "all" else theta() * h[..., :1]
        pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def bad_guide(x):
        logits = phi() * x if where == "all" else phi() * x.mean(0)
        pyro.sample("h", dist.Bernoulli(logits=logits).to_event(1))

    return bad_model, bad_guide


FRONTS = [RWS, WakeSleep, BiHM, partial(NaturalRWS, sleep_weight=0.0), StochasticBackprop]


@pytest.mark.parametrize("where", ["all", "x"])
@pytest.mark.parametrize("front", FRONTS)
@pytest.mark.parametrize("particles", [2, 3])
def test_a_missing_plate_where_the_particles_could_pass_for_the_data(front, particles, where):
    """With three particles and three data the shapes fit, and the loss was another."""
    site = "h" if where == "all" else "x"
    message = f"site '{site}' has a batch of shape .*, but .*belongs to no plate"
    programs = unplated(where)
    with pytest.raises(ValueError, match=message):
        front(*programs, num_particles=particles).step(X)
    with pytest.raises(ValueError, match=message):
        front(*programs, num_particles=particles).evaluate_loss(X)
    with pytest.raises(ValueError, match=message):
        log_likelihood(*programs, X, num_particles=particles)


@both
@pytest.mark.parametrize(("nesting", "where"), [(0, "all"), (1, "all"), (1, "x")])
def test_a_missing_plate_with_the_number_of_plates_given(front, nesting, where):
    svi = front(*unplated(where), num_particles=4, max_plate_nesting=nesting)
    with pytest.raises(ValueError, match="but .*belongs to no plate of it.*pyro.plate"):
        svi.step(X)


@both
def test_batches_that_plates_declare(front):
    """Scalars, masks, subsamples, nested and sequential plates, factors."""

    def some(x):
        theta()
        with pyro.plate("data", len(x)), poutine.mask(mask=x[:, 0] > 0):
            h = pyro.sample("h", dist.Bernoulli(0.5))
        with pyro.plate("few", len(x), subsample=torch.tensor([2, 0, 1])) as rows:
            pyro.sample("y", dist.Normal(theta()[0], 1.0), obs=x[rows, 0])
        for i in pyro.plate("turns", 2):
            pyro.sample(f"t{i}", dist.Normal(theta()[i], 1.0), obs=torch.tensor(0.5))
        with pyro.plate("columns", 2), pyro.plate("rows", len(x), dim=-2):
            pyro.sample("x", dist.Bernoulli(logits=theta()), obs=x)
        pyro.factor("bonus", theta().sum())
        pyro.deterministic("all", torch.ones(7) * h.sum())

    def draws(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi()[0]))

    svi = front(some, draws, num_particles=3, sleep_weight=0.0)
    assert math.isfinite(svi.step(X))


@both
@pytest.mark.parametrize("warm", [False, True])
def test_values_outside_the_observed_support(front, warm):
    def model_only(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=theta() * (2 * h - 1)).to_event(1), obs=x)

    svi = front(model_only, guide, num_particles=4)
    if warm:
        svi.step(X)
    theta(), phi()
    before = snapshot()
    with pytest.raises(ValueError, match="'x'"):
        svi.step(torch.full((3, 2), 0.5))
    assert all(torch.equal(v, before[k]) for k, v in snapshot().items())


@both
def test_no_observed_site(front):
    def bad(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=theta()).to_event(1))

    refuses(front, bad, guide, X, "no observed site")


@both
@pytest.mark.parametrize("warm", [False, True])
def test_infinite_loss_changes_nothing(front, warm):
    """A learnt location that has run away: every weight is zero."""

    def bad(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Normal(theta() * h, 1.0).to_event(1), obs=x)

    svi = front(bad, guide, num_particles=4)
    if warm:
        svi.step(X)
    with torch.no_grad():
        theta().fill_(1e30), phi().fill_(3.0)
    before = snapshot()
    with pytest.raises(FloatingPointError, match="no parameter was changed"):
        svi.step(X)
    assert all(torch.equal(v, before[k]) for k, v in snapshot().items())
    with torch.no_grad():
        theta().fill_(0.1)
    assert torch.isfinite(torch.tensor(svi.step(X)))


@both
def test_a_parameter_that_has_left_its_distribution_is_named(front):
    """The host's validation is off after the first step; the loss alone would say nothing."""

    def bad(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            scale = pyro.param("scale", torch.tensor(1.0))
            pyro.sample("x", dist.Normal(theta() * h, scale).to_event(1), obs=x)

    svi = front(bad, guide, num_particles=4)
    svi.step(X)
    with torch.no_grad():
        pyro.param("scale").fill_(-0.5)
    before = snapshot()
    with pytest.raises(FloatingPointError, match="no parameter was changed.* scale .* Normal"):
        svi.step(X)
    assert all(torch.equal(v, before[k]) for k, v in snapshot().items())
    with torch.no_grad():
        pyro.param("scale").fill_(0.5)
    assert math.isfinite(svi.step(X))


@both
def test_non_finite_direction_names_the_parameter(front):
    def bad(x):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            root = pyro.param("root", torch.zeros(2)).sqrt()
            pyro.sample("x", dist.Bernoulli(logits=root * h + theta()).to_event(1), obs=x)

    refuses(front, bad, guide, X, "'root' is not finite", FloatingPointError)


@pytest.mark.parametrize("front", [RWS, WakeSleep, NaturalRWS])
@pytest.mark.parametrize("particles", [0, -1, 2.0, "3"])
def test_bad_number_of_particles(front, particles):
    with pytest.raises(ValueError, match="num_particles"):
        front(model, guide, num_particles=particles)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"damping": 0.0}, "damping"),
        ({"damping": -1.0}, "damping"),
        ({"damping": float("nan")}, "damping"),
        ({"fisher": "dense"}, "fisher='dense'"),
        ({"fisher_samples": "latest"}, "fisher_samples='latest'"),
        ({"refresh_every": 0}, "refresh_every"),
        ({"refresh_every": 2, "fisher_samples": "same"}, "refresh_every must be 1"),
        ({"damping": None}, "damping"),
        ({"damping": "0.1"}, "damping"),
        ({"refresh_every": 1.5}, "refresh_every"),
        ({"kl_clip": 0.0}, "kl_clip"),
        ({"tolerance": 0.0}, "tolerance"),
        ({"sleep_weight": 1.5}, "sleep_weight"),
        ({"sleep_weight": -0.1}, "sleep_weight"),
        ({"sleep_scale": -1.0}, "sleep_scale"),
        ({"sleep_scale": float("nan")}, "sleep_scale"),
        ({"sleep_steps": 0}, "sleep_steps"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        NaturalRWS(model, guide, **options)


def test_bad_damping_schedule_changes_nothing():
    refuses(NaturalRWS, model, guide, X, "schedule gave -1", damping=lambda step: -1.0)


@both
def test_bad_programs_and_optimisers(front):
    with pytest.raises(TypeError, match="model must be a Pyro program"):
        front(None, guide)
    with pytest.raises(TypeError, match="guide must be a Pyro program"):
        front(model, 3)
    with pytest.raises(TypeError, match="pyro.optim"):
        front(model, guide, torch.optim.SGD([torch.zeros(1)], lr=0.1))


def test_load_state_dict_refuses_other_things():
    with pytest.raises(ValueError, match="state_dict"):
        RWS(model, guide).load_state_dict({})


def test_load_state_dict_refuses_another_shape():
    svi = RWS(model, guide, num_particles=2)
    svi.step(X)
    state = svi.state_dict()
    state["parameters"]["theta"] = torch.zeros(5)
    before = pyro.param("theta").detach().clone()
    with pytest.raises(ValueError, match="parameter 'theta' has shape"):
        svi.load_state_dict(state)
    assert torch.equal(pyro.param("theta"), before)
    svi.step(X)  # a refused state leaves the front end usable
    pyro.clear_param_store()
    fresh = RWS(model, guide, num_particles=2)
    fresh.load_state_dict(state)  # no parameter exists yet, so the next step finds out
    with pytest.raises(ValueError, match="parameter 'theta' has shape"):
        fresh.step(X)


@pytest.mark.parametrize("front", [*FRONT_ENDS, WakeSleep])
def test_a_factor_or_an_observed_site_in_the_guide(front):
    def factor(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi() * (2 * x - 1)).to_event(1))
            pyro.factor("bonus", phi().sum() * x[:, 0], has_rsample=False)

    def observed(x):
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=phi() * (2 * x - 1)).to_event(1))
            pyro.sample("y", dist.Bernoulli(logits=phi()[0]), obs=x[:, 0])

    refuses(front, model, factor, X, "site 'bonus' of the guide is a pyro.factor")
    refuses(front, model, observed, X, "site 'y' of the guide is observed")


def test_auxiliary_sites_of_an_automatic_guide():
    def normal(x):
        theta()
        mean = pyro.sample("mean", dist.Normal(0.0, 1.0))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    refuses(RWS, normal, AutoNormal(normal), X, "'mean_unconstrained' .* Auxiliary sites")


@pytest.mark.parametrize("front", [*FRONT_ENDS, WakeSleep])
def test_a_point_mass_at_a_parameter(front):
    """No score reaches the parameters of a Delta: they would stay where they are in silence."""

    def normal(x, point=False):
        mean = pyro.sample("mean", dist.Normal(theta()[0], 1.0))
        if point:
            pyro.sample("copy", dist.Delta(theta()[1]), obs=torch.tensor(-0.5))
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x[:, 0])

    def delta(x):
        pyro.sample("mean", dist.Delta(phi()[0]))

    def wide(x):
        pyro.sample("mean", dist.Normal(phi()[0], 1.0))

    refuses(front, normal, delta, X, "site 'mean' of the guide is a Delta")
    refuses(front, lambda x: normal(x, point=True), wide, X, "site 'copy' of the model is a Delta")
    constant = front(normal, lambda x: pyro.sample("mean", dist.Delta(x.mean())))
    assert math.isfinite(constant.evaluate_loss(X))


@both
def test_data_of_a_type_that_the_distribution_does_not_take(front):
    def floating(x):
        guide(x.float())

    refuses(front, model, floating, X.long(), "site 'x': .* Long", RuntimeError)


@pytest.mark.parametrize(("one", "other", "key"), [(RWS, NaturalRWS, "fisher"), (RWS, ALWS, "gr")])
def test_a_state_of_another_front_end_changes_nothing(one, other, key):
    svi = one(model, guide)
    svi.step(X)
    state = svi.state_dict()
    svi.step(X)
    before = snapshot()
    fresh = other(model) if other is ALWS else other(model, guide, average=False)
    with pytest.raises(ValueError, match="saved by another front end: by RWS"):
        fresh.load_state_dict(state)
    del state["kind"]  # as of an earlier version
    with pytest.raises(ValueError, match=f"lacks '{key}.*another front end"):
        fresh.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in snapshot().items())


@both
def test_programs_without_parameters(front):
    def fixed(x, obs=None):
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            if obs is not None:
                pyro.sample("x", dist.Bernoulli(logits=h).to_event(1), obs=obs)

    with pytest.raises(ValueError, match="parameters to train"):
        front(lambda x: fixed(x, x), fixed).step(X)


@both
def test_a_parameter_on_the_edge_of_its_constraint(front):
    """No gradient moves it, and its mean over the updates would be NaN."""

    def edge(x):
        scale = pyro.param("scale", torch.zeros(2), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            logits = theta() * (2 * h - 1) + scale
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    refuses(front, edge, guide, X, "parameter 'scale' is not finite in its unconstrained space")


@both
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_steps_where_torch_takes_no_gradients(front, mode):
    svi = front(model, guide)
    svi.step(X)
    before = snapshot()
    for method in (svi.step, svi.directions):
        with mode(), pytest.raises(ValueError, match="need gradients"):
            method(X)
    with mode():
        assert math.isfinite(svi.evaluate_loss(X))
    assert all(torch.equal(before[name], value) for name, value in snapshot().items())


def test_a_block_that_has_no_inverse_is_named():
    """The slope of |h|^0.7 at 0 is infinite."""

    def ill(x):
        w = pyro.param("w", torch.zeros(2))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            logits = (h * w).abs() ** 0.7
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    with pytest.raises(FloatingPointError, match="site 'x', parameters w: "):
        NaturalRWS(ill, guide, fisher="unit", fisher_samples="same").step(X)


def test_a_state_of_another_optimiser_changes_nothing():
    svi = RWS(model, guide)
    svi.step(X)
    state = svi.state_dict()
    svi.step(X)
    before = snapshot()
    fresh = RWS(model, guide, pyro.optim.Adam({"lr": 0.01}))
    with pytest.raises(ValueError, match="optimiser SGD; this object has Adam"):
        fresh.load_state_dict(state)
    assert all(torch.equal(before[name], value) for name, value in snapshot().items())
