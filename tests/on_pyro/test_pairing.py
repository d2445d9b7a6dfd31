"""Dreams reach the guide: by identity, by dream_args, by observations=."""

import functools
import inspect
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import pytest
import torch

from pyro_helmholtz import RWS
from pyro_helmholtz.pairing import _parameter_names
from pyro_helmholtz.trace import Programs

X = torch.tensor([0.0, 1.0, 1.0])


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def bernoulli(name, logits, obs=None):
    return pyro.sample(name, dist.Bernoulli(logits=logits), obs=obs)


def body(x, value=None):
    with pyro.plate("data", 3):
        h = bernoulli("h", torch.zeros(3))
        bernoulli("x", 6 * h - 3, obs=x)


def guide_body(x):
    a = pyro.param("a", torch.tensor(1.0))
    with pyro.plate("data", 3):
        bernoulli("h", a * (2 * x - 1))


def dream(model, guide, *args, dream_args=None, **kwargs):
    return Programs(model, guide, 4, dream_args=dream_args).dream(args, kwargs)


def dreamt(found):
    return found.model.nodes["x"]["value"]


def saw(found):
    """The guide's logits on the dream, and what they should be."""
    a = pyro.param("a")
    return found.guide.nodes["h"]["fn"].logits, a * (2 * dreamt(found) - 1)


def test_positional():
    found = dream(body, guide_body, X)
    assert found.args[0] is dreamt(found)
    assert torch.equal(*saw(found))


def test_keyword():
    found = dream(body, guide_body, x=X)
    assert found.kwargs["x"] is dreamt(found)
    assert torch.equal(*saw(found))


def test_inside_lists_tuples_and_dictionaries():
    def model(batch, *, extra):
        body(batch["images"][0])

    def guide(batch, *, extra):
        guide_body(batch["images"][0])

    label = torch.arange(3)
    batch = {"images": [X, label], "n": 3}
    extra = (X, "word")
    found = dream(model, guide, batch, extra=extra)
    assert found.args[0]["images"][0] is dreamt(found)
    assert found.args[0]["images"][1] is label
    assert found.kwargs["extra"][0] is dreamt(found)
    assert found.kwargs["extra"][1] == "word"
    assert batch["images"][0] is X
    assert torch.equal(*saw(found))


def test_dream_args():
    def model(x):
        body(x.view(3))

    def guide(x):
        guide_body(x.view(3))

    def pair(dreams, x):
        return (dreams["x"].view(3, 1),), {}

    x = X.view(3, 1)
    found = dream(model, guide, x, dream_args=pair)
    assert torch.equal(*saw(found))
    RWS(model, guide, num_particles=3, dream_args=pair).step(x)


def test_dream_args_must_return_a_pair():
    with pytest.raises(ValueError, match="dream_args must return"):
        dream(body, guide_body, X, dream_args=lambda dreams, x: dreams["x"])


def test_observations_guide():
    def guide(x, observations=None):
        guide_body(x if observations is None else observations["x"])

    found = dream(body, guide, X)
    assert torch.equal(*saw(found))
    RWS(body, guide, num_particles=3).step(X)


def test_observations_is_the_only_argument():
    def model(observations):
        body(observations["x"])

    def guide(observations):
        guide_body(observations["x"])

    for args, kwargs in (({"x": X},), {}), ((), {"observations": {"x": X}}):
        found = dream(model, guide, *args, **kwargs)
        assert torch.equal(*saw(found))
        RWS(model, guide, num_particles=3).step(*args, **kwargs)


def test_observations_where_identity_fails():
    def model(x, observations=None):
        body(x[torch.arange(3)])

    def guide(x, observations=None):
        guide_body(x if observations is None else observations["x"])

    found = dream(model, guide, X)
    assert torch.equal(*saw(found))


@pytest.mark.parametrize("change", [lambda x: x.view(3), lambda x: x[torch.arange(3)]])
def test_broken_identity_is_an_error(change):
    def model(x):
        body(change(x))

    with pytest.raises(ValueError, match="site 'x' is none of the arguments.*dream_args"):
        dream(model, guide_body, X)


def test_two_sites_of_one_object():
    def model(x):
        with pyro.plate("data", 3):
            h = bernoulli("h", torch.zeros(3))
            bernoulli("x", h, obs=x)
            bernoulli("y", -h, obs=x)

    with pytest.raises(ValueError, match="sites 'x' and 'y' observe the same object"):
        dream(model, guide_body, X)


def test_dreams_keep_the_datas_dtype():
    data = X.to(torch.int64)

    def model(x):
        with pyro.plate("data", 3):
            h = bernoulli("h", torch.zeros(3))
            pyro.sample("x", dist.Categorical(logits=torch.stack([h, -h], -1)), obs=x)

    found = dream(model, guide_body, data)
    assert found.args[0].dtype == torch.int64


def test_parameters_of_functions_methods_and_partials():
    class Guide:
        def run(self, x, observations=None):
            pass

        def __call__(self, x, *, observations=None):
            pass

    def plain(x, y, *rest, observations=None, **others):
        local = x
        return local

    @functools.wraps(plain)
    def wrapped(*args, **kwargs):
        return plain(*args, **kwargs)

    guide = Guide()
    for program in (guide.run, guide, functools.partial(plain, 1), wrapped):
        expected = list(inspect.signature(program).parameters)
        assert _parameter_names(program) == expected
    assert _parameter_names(guide.run) == ["x", "observations"]
    assert _parameter_names(plain) == ["x", "y", "observations"]


class Batch(NamedTuple):
    """What a data loader may give."""

    x: torch.Tensor
    label: torch.Tensor


def test_inside_a_named_tuple():
    batch = Batch(X, torch.arange(3))
    found = dream(lambda b: body(b.x), lambda b: guide_body(b.x), batch)
    assert type(found.args[0]) is Batch
    assert found.args[0].x is dreamt(found)
    assert found.args[0].label is batch.label
    assert torch.equal(*saw(found))


class Module(pyro.nn.PyroModule):
    def forward(self, x, observations=None):
        guide_body(2 * x if observations is None else observations["x"])


class Plain(torch.nn.Module):
    def forward(self, observations):
        guide_body(observations["x"])


def test_a_module_that_takes_observations():
    found = dream(lambda x: body(x + 0), Module(), X)
    assert torch.equal(*saw(found))
    found = dream(lambda observations: body(observations["x"]), Plain(), {"x": X})
    assert torch.equal(*saw(found))


def test_dreams_keep_fractions_where_the_data_are_whole_numbers():
    def model(x):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.5)))
            pyro.sample("x", dist.Normal(h, 0.3), obs=x)

    found = dream(model, guide_body, torch.tensor([0, 2, -1]))
    assert (found.args[0] != found.args[0].round()).all()
    assert torch.equal(*saw(found))


def test_dreamt_counts_keep_the_datas_type():
    def model(x):
        with pyro.plate("data", 3):
            h = pyro.sample("h", dist.Bernoulli(torch.full((3,), 0.5)))
            pyro.sample("x", dist.Poisson(2 + h), obs=x)

    found = dream(model, lambda x: guide_body(1.0 * x), torch.tensor([0, 2, 1]))
    assert found.args[0].dtype == torch.long


def chain(reads_argument):
    """Two observed sites, the second of which follows from the first."""
    dropout = torch.nn.Dropout(0.5)

    def model(x, y, count):
        with pyro.plate("data", 3):
            h = bernoulli("h", torch.zeros(3))
            drawn = bernoulli("x", torch.zeros(len(x)), obs=x)
            before = x if reads_argument else drawn
            bernoulli("y", count + before + dropout(h), obs=y)

    def guide(x, y, count):
        a = pyro.param("a", torch.tensor(1.0))
        with pyro.plate("data", 3):
            bernoulli("h", a * (x + y))

    return model, guide


def test_a_model_that_reads_the_argument_it_observes():
    before = pyro.get_param_store()
    svi = RWS(*chain(True), pyro.optim.SGD({"lr": 0.1}))
    with pytest.raises(ValueError, match="site 'y' of the model depends on an argument"):
        svi.step(X, 1 - X, torch.tensor(2.0))
    assert before["a"].item() == 1.0
    assert isinstance(RWS(*chain(True), sleep_weight=0.0).step(X, 1 - X, torch.tensor(2.0)), float)


def test_a_model_that_reads_what_it_draws_and_other_arguments():
    """Also where it draws random numbers that no site records; they are left as they were."""
    model, guide = chain(False)
    args = (X, 1 - X, torch.tensor(2.0))
    found = []
    for checked in ({"arguments"}, set()):
        programs = Programs(model, guide, 4, 1, validated=checked)
        pyro.set_rng_seed(3)
        found.append((programs.dream(args, {}), torch.rand(2)))
    (one, after), (two, later) = found
    assert torch.equal(one.model.nodes["y"]["value"], two.model.nodes["y"]["value"])
    assert torch.equal(after, later)
