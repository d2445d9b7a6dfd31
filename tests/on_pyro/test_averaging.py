"""Means of the parameters: what the store holds, and where an update goes on from."""

from functools import partial

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_helmholtz import (
    ALWS,
    RWS,
    BiHM,
    NaturalBiHM,
    NaturalRWS,
    StochasticBackprop,
    WakeSleep,
)

from .programs import snapshot
from .test_resume import PROGRAMS, X, check, of_modules, of_params


def sgd(rate=0.3):
    return pyro.optim.SGD({"lr": rate})


def of_factors():
    def model(x):
        w = pyro.param("w", lambda: 0.5 * torch.randn(2, 3))
        s = pyro.param("s", torch.ones(3), constraint=dist.constraints.positive)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(z @ w, s).to_event(1), obs=x)

    def guide(x):
        v = pyro.param("v", lambda: 0.5 * torch.randn(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(x @ v, 0.7).to_event(1))

    return model, guide


def alws(model, guide, optim, num_particles, **options):
    """With a regression that adapts; of one interface with the others."""
    return ALWS(model, optim, 10 * num_particles, adapt=0.05, held_out=10, **options)


with_posterior = partial(StochasticBackprop, parameter_posterior=5.0, parameter_variance=0.1)


def trained(front, make, steps, **options):
    """The unconstrained parameters after each step."""
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    svi = front(*make(), sgd(), num_particles=4, **options)
    found = []
    for _ in range(steps):
        svi.step(X)
        found.append(snapshot())
    return svi, found


@pytest.mark.parametrize(
    ("front", "make"),
    [(RWS, make) for make in PROGRAMS]
    + [(front, of_modules) for front in (NaturalRWS, WakeSleep, BiHM, NaturalBiHM, alws)]
    + [(front, of_factors) for front in (alws, StochasticBackprop, with_posterior)],
)
def test_the_store_holds_weighted_means_of_the_steps(front, make):
    """The weight of step s in the mean of t steps, ``Π``'s written out, in float64."""
    points = trained(front, make, 12)[1]
    means = trained(front, make, 12, average=True)[1]
    shares = [10 / (10 + t) for t in range(12)]
    for t in (1, 2, 12):
        weights = torch.tensor(shares[:t], dtype=torch.float64)
        for s in range(t):
            weights[s] *= torch.tensor([1 - share for share in shares[s + 1 : t]]).double().prod()
        assert abs(float(weights.sum()) - 1) < 1e-6
        for name, mean in means[t - 1].items():
            expected = sum(w * p[name].double() for w, p in zip(weights, points[:t], strict=True))
            torch.testing.assert_close(mean.double(), expected, rtol=0, atol=1e-5)
    assert any(float((means[-1][n] - points[-1][n]).abs().max()) > 1e-3 for n in means[-1])


@pytest.mark.parametrize(
    ("front", "make"), [(RWS, of_modules), (alws, of_factors), (with_posterior, of_factors)]
)
def test_directions_are_those_of_the_next_update(front, make):
    plain, _ = trained(front, make, 5)
    torch.manual_seed(7)
    expected = plain.directions(X).gradient
    svi, _ = trained(front, make, 5, average=True)
    before = snapshot()
    torch.manual_seed(7)
    for name, value in svi.directions(X).gradient.items():
        assert torch.equal(value, expected[name]), name
    assert all(torch.equal(value, before[name]) for name, value in snapshot().items())


def test_the_loss_and_the_posterior_are_those_of_the_means():
    svi, _ = trained(with_posterior, of_factors, 5, average=True)
    other = with_posterior(*of_factors(), sgd(), num_particles=4)
    other.evaluate_loss(X)  # finds its parameters, the means, in the store
    losses = []
    for front in (svi, other):
        torch.manual_seed(3)
        losses.append(front.evaluate_loss(X))
    assert losses[0] == losses[1]
    leaves = snapshot()
    for name, (mean, variance) in svi.posterior().items():
        assert torch.equal(mean, leaves[name])
        assert torch.equal(variance, leaves["posterior_variance." + name].exp())


@pytest.mark.parametrize(
    ("front", "make"),
    [(RWS, of_params), (NaturalRWS, of_modules), (alws, of_factors), (with_posterior, of_factors)],
)
def test_it_goes_on_bit_for_bit(front, make):
    check(make, lambda m, g: front(m, g, sgd(), num_particles=4, average=True))


@pytest.mark.parametrize(
    ("front", "make"), [(NaturalRWS, of_modules), (alws, of_factors), (with_posterior, of_factors)]
)
def test_a_failing_step_leaves_means_and_points(front, make):
    expected = trained(front, make, 4, average=True)[1][-1]
    svi, found = trained(front, make, 3, average=True)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="x"):
        svi.step(torch.full_like(X, torch.nan))
    assert all(torch.equal(value, found[-1][name]) for name, value in snapshot().items())
    torch.set_rng_state(state)
    svi.step(X)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot().items())


def test_a_regression_that_does_not_adapt_leaves_the_models_update(monkeypatch):
    expected = trained(alws, of_factors, 3, average=True)[1][-1]
    svi, _ = trained(alws, of_factors, 2, average=True)
    run = svi.estimator.run

    def spoilt(*args):
        done = run(*args)
        error = done.fitting_error
        done.fitting_error = lambda: torch.nan * error()
        return done

    monkeypatch.setattr(svi.estimator, "run", spoilt)
    with pytest.raises(FloatingPointError, match="was not adapted"):
        svi.step(X)
    assert all(torch.equal(value, expected[name]) for name, value in snapshot().items())


def test_what_the_user_sets_is_where_it_goes_on():
    svi, _ = trained(RWS, of_params, 3, average=True)
    with torch.no_grad():
        pyro.param("w").unconstrained().fill_(2.0)
    pyro.get_param_store()["b"] = torch.full((3,), -1.0)
    torch.manual_seed(5)
    direction = svi.directions(X).gradient
    torch.manual_seed(5)
    svi.step(X)
    after = snapshot()
    torch.testing.assert_close(after["w"], 2.0 + 0.3 * direction["w"])
    torch.testing.assert_close(after["b"], -1.0 + 0.3 * direction["b"])


def test_a_state_of_the_other_kind_is_refused():
    state = trained(RWS, of_params, 1)[0].state_dict()
    with pytest.raises(ValueError, match="without average=True"):
        RWS(*of_params(), average=True).load_state_dict(state)


def test_natural_estimators_average_with_their_own_optimiser():
    model, guide = of_modules()
    for front in (NaturalRWS, NaturalBiHM):
        assert front(model, guide)._average is not None
        assert front(model, guide, average=False)._average is None
        assert front(model, guide, sgd())._average is None
        assert front(model, guide, sgd(), average=True)._average is not None
    for front in (RWS, StochasticBackprop):
        assert front(model, guide)._average is None
    assert ALWS(model)._average is None
