"""Imputation: the chain's stationary distribution against enumeration."""

from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_helmholtz import impute

from .programs import patterns

F64 = torch.float64
PRIOR = torch.tensor([0.3, 0.7], dtype=F64)
ON = torch.tensor([[0.8, 0.3, 0.6], [0.2, 0.6, 0.9]], dtype=F64)  # P(x_j = 1 | h)


def joint():
    """p(h, x) of one binary latent and three pixels, shape (2, 8)."""
    x = patterns(3)
    return PRIOR[:, None] * dist.Bernoulli(ON[:, None]).to_event(1).log_prob(x).exp()


def model(x, unused=None):
    with pyro.plate("data", len(x)):
        h = pyro.sample("h", dist.Categorical(PRIOR))
        pyro.sample("x", dist.Bernoulli(ON[h]).to_event(1), obs=x)


def guide(x, unused=None):
    """The exact posterior p(h | x)."""
    posterior = joint() / joint().sum(0)
    index = (x @ torch.tensor([4.0, 2.0, 1.0], dtype=F64)).long()
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Categorical(posterior[:, index].T))


@pytest.fixture(autouse=True)
def fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(3)


SIZE = 20_000


def test_stationary_distribution_is_the_conditional():
    """p(v_m | v_o) for x_1 = 1 observed, and another pattern of holes in the same batch."""
    x = torch.full((2 * SIZE, 3), float("nan"), dtype=F64)
    x[:SIZE, 0] = 1.0
    x[SIZE:, 1:] = torch.tensor([1.0, 0.0], dtype=F64)
    observed = ~torch.isnan(x)
    found = impute(model, guide, x, observed, 40)
    assert torch.equal(found[observed], x[observed])
    p, states = joint().sum(0), patterns(3)
    for rows, fits in [
        (found[:SIZE], states[:, 0] == 1),
        (found[SIZE:], (states[:, 1] == 1) & (states[:, 2] == 0)),
    ]:
        expected = torch.where(fits, p, 0.0) / p[fits].sum()
        index = (rows @ torch.tensor([4.0, 2.0, 1.0], dtype=F64)).long()
        share = torch.bincount(index, minlength=8).double() / SIZE
        error = (expected * (1 - expected) / SIZE).sqrt()
        assert bool(((share - expected).abs() <= 4.5 * error).all())


def test_one_step_from_a_given_start_is_the_kernel():
    """Equation 42, from x = (1, 0, 0) with the last two pixels missing."""
    x = torch.tensor([[1.0, 0.0, 0.0]], dtype=F64).expand(SIZE, 3).clone()
    observed = torch.tensor([True, False, False]).expand(SIZE, 3)
    found = impute(model, guide, x, observed, 1, start=x)
    posterior = joint()[:, 4] / joint()[:, 4].sum()
    expected = (posterior[:, None] * ON[:, 1:]).sum(0)
    error = (expected * (1 - expected) / SIZE).sqrt()
    assert bool(((found[:, 1:].mean(0) - expected).abs() <= 4.5 * error).all())
    assert not torch.equal(found, x) and torch.equal(found[:, 0], x[:, 0])


def test_means_over_the_last_steps():
    x = torch.zeros(300, 3, dtype=F64)
    x[:, 0] = 1.0
    observed = torch.zeros(300, 3, dtype=torch.bool)
    observed[:, 0] = True
    found = impute(model, guide, x, observed, 220, keep=200)
    p, states = joint().sum(0), patterns(3)
    weight = torch.where(states[:, 0] == 1, p, 0.0)
    expected = (weight[:, None] * states).sum(0) / weight.sum()
    assert bool((found[:, 0] == 1).all()) and found[:, 1:].unique().numel() > 20
    assert bool(((found.mean(0) - expected).abs() < 4.5 * found.std(0) / 300**0.5 + 1e-12).all())
    pyro.set_rng_seed(3)
    once = impute(model, guide, x, observed, 5, keep=1)
    pyro.set_rng_seed(3)
    assert torch.equal(once, impute(model, guide, x, observed, 5))


def test_other_arguments_labels_and_a_continuous_site():
    """x ~ N(h + label, 1), h ~ N(0, 1); the label is observed too and stays what it is."""
    label = torch.tensor([0.0, 4.0], dtype=F64).repeat(4000)
    x = torch.zeros(8000, 2, dtype=F64)
    x[:, 0] = label + 1.0
    observed = torch.tensor([True, False]).expand(8000, 2)

    def down(label, image, *, spread):
        pyro.param("parameter", torch.ones(()))
        with pyro.plate("data", len(image)):
            pyro.sample("label", dist.Normal(torch.zeros((), dtype=F64), 9.0), obs=label)
            h = pyro.sample("h", dist.Normal(torch.zeros((), dtype=F64), 1.0))
            loc = (h + label).unsqueeze(-1).expand(-1, 2)
            pyro.sample("x", dist.Normal(loc, spread).to_event(1), obs=image)

    def up(label, image, *, spread):
        with pyro.plate("data", len(image)):
            mean = (image - label.unsqueeze(-1)).sum(-1) / 3
            pyro.sample("h", dist.Normal(mean, 3**-0.5))

    found = impute(down, up, x, observed, 30, label, x, spread=1.0)
    residual = found[:, 1] - label
    assert abs(float(residual.mean()) - 0.5) < 4.5 * float(residual.std()) / 8000**0.5
    assert float(residual.var()) == pytest.approx(1.5, rel=0.1)
    by_name = impute(down, up, x, observed, 2, label=label, image=x, spread=1.0)
    assert by_name.shape == x.shape


def test_integers_images_and_nothing_missing():
    counts = torch.randint(0, 5, (6, 2, 3)).float()

    def down(x):
        with pyro.plate("data", len(x)):
            rate = pyro.sample("rate", dist.Gamma(torch.ones(2, 3), 1.0).to_event(2))
            pyro.sample("x", dist.Poisson(rate).to_event(2), obs=x)

    def up(x):
        with pyro.plate("data", len(x)):
            pyro.sample("rate", dist.Gamma(1 + x, 2.0).to_event(2))

    observed = torch.rand(6, 2, 3) < 0.5
    found = impute(down, up, counts, observed, 3)
    assert found.shape == counts.shape and torch.equal(found, found.round())
    assert torch.equal(found[observed], counts[observed])
    assert torch.equal(impute(down, up, counts, torch.ones_like(observed), 3), counts)


def test_seeds_and_parameters():
    x = patterns(3)
    observed = torch.rand(8, 3) < 0.5
    found = []
    for seed in (1, 1, 2):
        pyro.set_rng_seed(seed)
        found.append(impute(model, guide, x, observed, 4))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not found[0].requires_grad


def reshaped(x, unused=None):
    model(x.clone())


def lonely(x, unused=None):
    with pyro.plate("data", len(x)):
        pyro.sample("other", dist.Normal(0.0, 1.0))


def indifferent(x, unused=None):
    with pyro.plate("data", len(x)):
        pyro.sample("h", dist.Categorical(PRIOR))


X, MASK = patterns(3), torch.ones(8, 3, dtype=torch.bool)
HOLES = X.clone()
HOLES[0, 0] = float("nan")
ERRORS = {
    "mask type": (model, guide, X, MASK.double(), 3, {}, "observed_mask must be bool"),
    "mask shape": (model, guide, X, MASK[:, :2], 3, {}, "observed_mask"),
    "steps": (model, guide, X, MASK, 0, {}, "num_steps"),
    "keep": (model, guide, X, MASK, 3, {"keep": 4}, "keep"),
    "start": (model, guide, X, MASK, 3, {"start": X[:2]}, "start"),
    "observed NaN": (model, guide, HOLES, MASK, 3, {}, "NaN"),
    "no site": (reshaped, guide, X, MASK, 3, {}, "no site observes x.*'x'"),
    "guide": (model, lonely, X, MASK, 3, {}, "'h' of the model is missing"),
    "empty": (model, guide, X[:0], MASK[:0], 3, {}, "data in it"),
    "values": (model, indifferent, X + 2, MASK, 3, {}, "'x'.*outside the support"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_bad_input(case):
    down, up, x, mask, steps, options, message = ERRORS[case]
    with pytest.raises(ValueError, match=message):
        impute(down, up, x, mask, steps, **options)


class Batch(NamedTuple):
    """What a data loader may give."""

    x: torch.Tensor
    label: torch.Tensor


def test_x_inside_a_named_tuple():
    b = Batch(X, torch.zeros(len(X)))
    pyro.set_rng_seed(1)
    found = impute(lambda b: model(b.x), lambda b: guide(b.x), X, MASK, 3, b)
    pyro.set_rng_seed(1)
    assert torch.equal(found, impute(model, guide, X, MASK, 3))


def test_whole_numbers_of_a_continuous_site_are_refused():
    def continuous(x):
        with pyro.plate("data", len(x)):
            pyro.sample("x", dist.Normal(torch.zeros(3), 1.0).to_event(1), obs=x)

    x = torch.arange(6).reshape(2, 3)
    with pytest.raises(ValueError, match="site 'x' draws torch.float32 but x is torch.int64"):
        impute(continuous, lambda x: None, x, x > 2, 2)
