"""Particles and subsamples: what would give wrong numbers in silence is refused by name."""

import warnings

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.reparam import LocScaleReparam
from torch import nn
from torch.distributions import constraints

import pyro_helmholtz as ph
from pyro_helmholtz.trace import Programs

X = torch.linspace(-1.0, 2.2, 7)
OPTIM = {"lr": 1e-3}


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def with_three(fn):
    """A model whose data have the mean ``fn(w)`` of three latents in a plate."""

    def model(x):
        with pyro.plate("J", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        with pyro.plate("N", len(x)):
            pyro.sample("x", dist.Normal(fn(w), 1.0), obs=x)

    return model


def three(x):
    loc = pyro.param("loc", 0.3 * torch.ones(3))
    scale = pyro.param("scale", 0.5 * torch.ones(3), constraint=constraints.positive)
    with pyro.plate("J", 3):
        pyro.sample("w", dist.Normal(loc, scale))


MIXED = {
    "sum": lambda w: w.sum(),
    "mean": lambda w: 3 * w.mean(),
    "norm": torch.linalg.norm,
    "first": lambda w: w[0].sum() if w.ndim > 1 else w[0],
}


@pytest.mark.parametrize("fn", MIXED.values(), ids=MIXED)
@pytest.mark.parametrize("front", [ph.RWS, ph.NaturalRWS])
def test_a_program_that_mixes_particles(fn, front):
    svi = front(with_three(fn), three, num_particles=5, sleep_weight=0.0)
    for _ in range(2):  # once is not enough to let it pass
        with pytest.raises(ValueError, match="site 'x' has one distribution for all particles"):
            svi.step(X)
    assert (pyro.param("loc") == 0.3).all()
    with pytest.raises(ValueError, match="site 'x' has one distribution for all particles"):
        ph.log_likelihood(with_three(fn), three, X, num_particles=10)
    ph.RWS(with_three(fn), three, num_particles=1, sleep_weight=0.0).step(X)


def test_a_guide_that_mixes_particles():
    def model(x):
        with pyro.plate("N", len(x)):
            a = pyro.sample("a", dist.Normal(torch.zeros(len(x)), 1.0))
            b = pyro.sample("b", dist.Normal(a, 1.0))
            pyro.sample("x", dist.Normal(b, 1.0), obs=x)

    def guide(x):
        with pyro.plate("N", len(x)):
            a = pyro.sample("a", dist.Normal(x, 1.0))
            pyro.sample("b", dist.Normal(a.mean() + pyro.param("c", torch.zeros(())), 1.0))

    with pytest.raises(ValueError, match="site 'b' has one distribution for all particles"):
        ph.RWS(model, guide, num_particles=5).step(X)


def test_sums_from_the_right_are_as_by_hand():
    model = with_three(lambda w: w.sum(-1, keepdim=True))
    pyro.set_rng_seed(3)
    wake = ph.trace.wake_trace(model, three, (X,), {}, num_particles=4)
    w = wake.guide.nodes["w"]["value"].reshape(4, 3)
    joint = dist.Normal(0.0, 1.0).log_prob(w).sum(1)
    joint = joint + dist.Normal(w.sum(1, keepdim=True), 1.0).log_prob(X).sum(1)
    by_hand = joint - dist.Normal(0.3, 0.5).log_prob(w).sum(1)
    assert torch.allclose(wake.log_weights[:, 0], by_hand, atol=1e-5)


def test_the_first_look_leaves_modules_and_random_numbers_alone():
    norm, layer = nn.BatchNorm1d(3), nn.Linear(3, 3)

    def model(x):
        pyro.module("layer", layer)
        with pyro.plate("N", len(x)):
            h = pyro.sample("h", dist.Normal(torch.zeros(3), 1.0).to_event(1))
            out = norm(layer(h).reshape(-1, 3)).reshape(*h.shape)
            pyro.sample("x", dist.Normal(out, 1.0).to_event(1), obs=x)

    def guide(x):
        pyro.module("layer", layer)
        with pyro.plate("N", len(x)):
            pyro.sample("h", dist.Normal(layer(x), 1.0).to_event(1))

    x = torch.randn(6, 3)

    def numbers(times):
        pyro.clear_param_store()
        pyro.set_rng_seed(5)
        norm.reset_running_stats()
        svi = ph.RWS(model, guide, num_particles=3, max_plate_nesting=1)
        svi.evaluate_loss(x)
        pyro.set_rng_seed(5)
        norm.reset_running_stats()
        for _ in range(times):
            svi.estimator.run(svi.programs, (x,), {})
        return int(norm.num_batches_tracked), torch.rand(())

    # One pass of the wake phase, one dream: what is looked at once again does not count.
    first, second = numbers(1), numbers(1)
    assert first[0] == second[0] == 2
    assert torch.equal(first[1], second[1])


def subsampled(size):
    def model(x):
        m = pyro.sample("m", dist.Normal(0.0, 1.0))
        with pyro.plate("N", len(x), subsample_size=size) as rows:
            pyro.sample("x", dist.Normal(m, 1.0), obs=x[rows])

    def guide(x):
        pyro.sample("m", dist.Normal(pyro.param("a", torch.tensor(0.5)), 0.5))

    return model, guide


@pytest.mark.parametrize("front", [ph.RWS, ph.NaturalRWS, ph.BiHM])
def test_a_subsample_under_a_global_latent(front):
    options = {} if front is ph.BiHM else {"sleep_weight": 0.0}
    svi = front(*subsampled(3), num_particles=5, **options)
    message = r"plate 'N' is subsampled \(3 of 7\), but site 'm' stands outside of it"
    with pytest.raises(ValueError, match=message):
        svi.step(X)
    assert pyro.param("a") == 0.5
    with pytest.raises(ValueError, match=message):
        ph.log_likelihood(*subsampled(3), X, num_particles=10)
    assert torch.isfinite(torch.tensor(front(*subsampled(7), num_particles=5, **options).step(X)))
    ph.StochasticBackprop(*subsampled(3), pyro.optim.SGD(OPTIM)).step(X)


@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_all_particles_are_of_the_same_subsample(at_once):
    def model(x):
        with pyro.plate("N", len(x), subsample_size=3) as rows:
            z = pyro.sample("z", dist.Normal(torch.zeros(3), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x[rows])

    def posterior(x):
        with pyro.plate("N", len(x), subsample_size=3) as rows:
            pyro.sample("z", dist.Normal(x[rows] / 2, 0.5**0.5))

    found = ph.log_likelihood(model, posterior, X, num_particles=100, particles_at_once=at_once)
    exact = dist.Normal(0.0, 2.0**0.5).log_prob(X)
    nearest = (found.values[:, None] - exact).abs().min(1)
    assert nearest.values.max() < 1e-5
    assert len(set(nearest.indices.tolist())) == 3
    assert (found.ess > 99).all()


def learn(guide, layer=None, **options):
    """One step; what it warned of."""

    def model(x, copy):
        with pyro.plate("N", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            y = pyro.sample("y", dist.Normal(z, 1.0))
            pyro.sample("x", dist.Normal(y, 1.0), obs=x)

    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        svi = ph.RWS(model, guide, num_particles=3, **options)
        svi.step(X, X.flip(0).clone())
        svi.step(X, X.flip(0).clone())
    return [str(w.message) for w in found if "dreams" in str(w.message)]


def guide_of(first, second):
    def guide(x, copy):
        a = pyro.param("a", torch.tensor(0.0))
        with pyro.plate("N", len(x)):
            y = pyro.sample("y", dist.Normal(first(a, x, copy), 1.0))
            pyro.sample("z", dist.Normal(second(a, y, x), 1.0))

    return guide


def test_a_guide_that_sees_no_dream():
    of_copy = guide_of(lambda a, x, copy: a * copy, lambda a, y, x: a * y)
    (said,) = learn(of_copy)
    assert "the guide's sites ['y'] follow neither the dreams" in said
    assert learn(of_copy, sleep_weight=0.0) == []
    (said,) = learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: a.expand(len(x))))
    assert "['z']" in said


def test_guides_that_see_their_dreams():
    assert learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: a * y)) == []
    # Where a weight is zero, too; and where there is nothing to train.
    assert learn(guide_of(lambda a, x, copy: a + 0.0 * x, lambda a, y, x: a * y)) == []
    assert learn(guide_of(lambda a, x, copy: a * x, lambda a, y, x: torch.zeros(len(x)))) == []


def test_reparametrised_sites_are_functions_of_their_parents():
    def model(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("N", len(x)):
            z = pyro.sample("z", dist.Normal(loc, 1.5))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def by_hand(x):
        loc = pyro.param("loc", torch.tensor(0.5))
        with pyro.plate("N", len(x)):
            noise = pyro.sample("z_decentered", dist.Normal(torch.zeros(len(x)), 1.0))
            z = pyro.deterministic("z", loc + 1.5 * noise)
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        slope = pyro.param("slope", torch.tensor(0.1))
        with pyro.plate("N", len(x)):
            pyro.sample("z_decentered", dist.Normal(slope * x, 1.0))

    config = {"z": LocScaleReparam(0.0)}
    for front in (ph.RWS, ph.WakeSleep, ph.NaturalRWS):
        found = []
        for program in (pyro.poutine.reparam(model, config), by_hand):
            pyro.clear_param_store()
            pyro.set_rng_seed(2)
            svi = front(program, guide, num_particles=4)
            losses = [svi.step(X) for _ in range(3)]
            found.append((losses, pyro.param("loc").item(), pyro.param("slope").item()))
        for one, other in zip(found[0][1:], found[1][1:], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
        assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)


def test_scores_that_cannot_be_sampled_name_the_site():
    def model(x):
        locs = pyro.param("locs", torch.tensor([[0.0, 1.0], [2.0, 3.0], [1.0, 1.0]]))
        with pyro.plate("N", len(x)):
            fn = dist.MixtureOfDiagNormals(locs, torch.ones(3, 2), torch.zeros(3))
            pyro.sample("x", fn, obs=x)

    x = torch.randn(5, 2)
    with pytest.raises(NotImplementedError, match="site 'x' of the model: .*MixtureOfDiagNormals"):
        ph.NaturalRWS(model, lambda x: None, sleep_weight=0.0).step(x)
    ph.RWS(model, lambda x: None, sleep_weight=0.0).step(x)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64])
def test_dreamt_counts_may_be_larger_than_the_datas_type(dtype):
    def model(x):
        with pyro.plate("N", len(x)):
            pyro.sample("x", dist.Poisson(40_000.0), obs=x)

    dream = Programs(model, lambda x: None, 1, 1).dream((torch.ones(5, dtype=dtype),), {})
    assert (dream.args[0] > 39_000).all()
    assert dream.args[0].dtype == torch.int64


def test_an_index_that_would_find_particles():
    def model(x):
        with pyro.plate("J", 4):
            a = pyro.sample("a", dist.Normal(torch.zeros(4), 1.0))
        with pyro.plate("N", len(x)):
            pyro.sample("x", dist.Normal(a[[3, 2, 1, 0]], 1.0), obs=x)

    def guide(x):
        with pyro.plate("J", 4):
            pyro.sample("a", dist.Normal(pyro.param("loc", torch.zeros(4)), 1.0))

    for count in (4, 5):  # as many as there are of both, or more
        svi = ph.RWS(model, guide, num_particles=count, sleep_weight=0.0)
        with pytest.raises((ValueError, IndexError), match="at site 'x'|after site 'a'"):
            svi.step(X[:4])


def test_errors_tell_where_a_program_was():
    def model(x):
        w = pyro.sample("w", dist.ImproperUniform(constraints.real, (), ()))
        with pyro.plate("N", len(x)):
            pyro.sample("x", dist.Normal(w, 1.0), obs=x)

    def guide(x):
        pyro.sample("w", dist.Normal(pyro.param("m", torch.tensor(0.0)), 1.0))

    with pytest.raises(NotImplementedError, match=r"at site 'w'; the model was to dream.*sleep_w"):
        ph.RWS(model, guide).step(X)
    ph.RWS(model, guide, sleep_weight=0.0).step(X)

    def product(x):
        with pyro.plate("J", 3):
            w = pyro.sample("w", dist.Normal(0.0, 1.0))
        mean = torch.ones(len(x), 3) @ w
        with pyro.plate("N", len(x)):
            pyro.sample("x", dist.Normal(mean, 1.0), obs=x)

    with pytest.raises(RuntimeError, match=r"after site 'w'; the program ran with 5 particles"):
        ph.RWS(product, three, num_particles=5, sleep_weight=0.0).step(X)


def test_dropout_mixes_no_particles():
    encoder = nn.Sequential(nn.Linear(1, 4), nn.Dropout(0.5), nn.Linear(4, 1))

    def model(x):
        with pyro.plate("N", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(len(x)), 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        with pyro.plate("N", len(x)):
            pyro.sample("z", dist.Normal(encoder(x[:, None])[:, 0], 1.0))

    assert ph.RWS(model, guide, num_particles=5).step(X) > 0
    assert ph.log_likelihood(model, guide, X, num_particles=5).mean < 0
