"""Means of the parameters: what the store holds, and where an update goes on from."""

import pyro
import pytest
import torch

from pyro_helmholtz import RWS, BiHM, NaturalBiHM, NaturalRWS, WakeSleep

from .programs import snapshot
from .test_resume import PROGRAMS, X, check, of_modules, of_params


def sgd(rate=0.3):
    return pyro.optim.SGD({"lr": rate})


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
    + [(front, of_modules) for front in (NaturalRWS, WakeSleep, BiHM, NaturalBiHM)],
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


def test_directions_are_those_of_the_next_update():
    plain, points = trained(RWS, of_modules, 5)
    torch.manual_seed(7)
    expected = plain.directions(X).gradient
    svi, _ = trained(RWS, of_modules, 5, average=True)
    before = snapshot()
    torch.manual_seed(7)
    for name, value in svi.directions(X).gradient.items():
        assert torch.equal(value, expected[name]), name
    assert all(torch.equal(value, before[name]) for name, value in snapshot().items())


@pytest.mark.parametrize(("front", "make"), [(RWS, of_params), (NaturalRWS, of_modules)])
def test_it_goes_on_bit_for_bit(front, make):
    check(make, lambda m, g: front(m, g, sgd(), num_particles=4, average=True))


def test_a_failing_step_leaves_means_and_points():
    expected = trained(NaturalRWS, of_modules, 4, average=True)[1][-1]
    svi, found = trained(NaturalRWS, of_modules, 3, average=True)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match="x"):
        svi.step(torch.full_like(X, torch.nan))
    assert all(torch.equal(value, found[-1][name]) for name, value in snapshot().items())
    torch.set_rng_state(state)
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
    assert RWS(model, guide)._average is None
