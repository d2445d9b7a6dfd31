"""The options of NaturalRWS."""

import math

import pyro
import pyro.distributions as dist
import pytest
import torch

import pyro_helmholtz as ph
import pyro_helmholtz.natural
from pyro_helmholtz import NaturalRWS
from pyro_helmholtz.datasets import load

from .programs import SBN, snapshot

FORMS = ["unit", "diagonal", "kronecker"]
SAMPLES = ["lagged", "average", "same", "dream"]


def data(dtype=torch.float64):
    rows = torch.tensor([[1.0, 1.0, 0.0], [0.0, 0.0, 1.0]], dtype=dtype)
    return rows.repeat(8, 1)


@pytest.fixture(autouse=True)
def _fresh():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)


def natural(sbn, rate=0.1, **options):
    options.setdefault("num_particles", 6)
    return NaturalRWS(sbn.model, sbn.guide, pyro.optim.SGD({"lr": rate}), **options)


@pytest.mark.parametrize("samples", SAMPLES)
@pytest.mark.parametrize("form", FORMS)
def test_every_form_and_every_sample_learns(form, samples):
    sbn, x = SBN(), data()
    svi = natural(sbn, fisher=form, fisher_samples=samples)
    before = float(sbn.log_likelihood(x).mean().detach())
    for _ in range(40):
        svi.step(x)
    assert float(sbn.log_likelihood(x).mean().detach()) > before + 0.3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("form", FORMS)
def test_dtypes(form, dtype):
    sbn, x = SBN(dtype), data(dtype)
    svi = natural(sbn, fisher=form)
    for _ in range(2):
        svi.step(x)
    assert all(v.dtype == dtype for v in svi.directions(x).natural.values())
    assert all(v.dtype == dtype and bool(v.isfinite().all()) for v in snapshot().values())


@pytest.mark.parametrize("form", FORMS)
def test_autocast(form):
    """Half precision inside the layers: blocks and directions are in the parameters' type."""
    down, up = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)

    def layer(module, x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return module(x)

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=layer(down, h)).to_event(1), obs=x)

    def guide(x):
        pyro.module("up", up)
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=layer(up, x)).to_event(1))

    svi = NaturalRWS(model, guide, fisher=form)
    losses = [svi.step(data(torch.float32)) for _ in range(20)]
    assert losses[-1] < losses[0]
    found = svi.directions(data(torch.float32))
    assert all(x.dtype == torch.float32 for x in found.natural.values())
    assert all(block.gather(found.gradient).dtype == torch.float32 for block in found.fisher.blocks)


def test_damping_schedule():
    sbn, x, seen = SBN(), data(), []

    def schedule(step):
        seen.append(step)
        return 0.5 / (1 + step)

    svi = natural(sbn, damping=schedule)
    for _ in range(3):
        svi.step(x)
    assert seen == [0, 1, 2]
    assert svi.directions(x).fisher.damping == pytest.approx(0.125)


@pytest.mark.parametrize("form", FORMS)
def test_much_damping_gives_the_gradient(form):
    sbn, x = SBN(), data()
    svi = natural(sbn, fisher=form, damping=1e9)
    svi.step(x)
    found = svi.directions(x)
    for name, g in found.gradient.items():
        torch.testing.assert_close(found.natural[name], g, rtol=1e-6, atol=1e-9)


def divergence(found):
    total = 0.0
    for block in found.fisher.blocks:
        v = block.gather(found.natural)
        total += 0.5 * float((v * block.matvec(v)).sum())
    return total


def test_kl_clip_bounds_the_step():
    sbn, x = SBN(), data()
    kinds = {}
    for clip in (None, 1e-3, 1e6):
        svi = natural(sbn, fisher="unit", damping=0.01, kl_clip=clip, fisher_samples="same")
        pyro.set_rng_seed(1)
        kinds[clip] = svi.directions(x)
    assert divergence(kinds[None]) > 2e-3
    assert divergence(kinds[1e-3]) == pytest.approx(1e-3, rel=0.05)
    for name, free in kinds[None].natural.items():
        assert torch.equal(kinds[1e6].natural[name], free)
        ratio = kinds[1e-3].natural[name].norm() / free.norm()
        assert 0 < float(ratio) < 1


def scaled(family):
    """A model with one parameter that starts far away from its data."""

    def model(x):
        w = pyro.param("w", torch.full((3,), 2.0, dtype=torch.float64))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=torch.float64)))
            pyro.sample("x", family(w * (1 + z[..., None])).to_event(1), obs=x)

    def guide(x):
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Bernoulli(0.5 * torch.ones((), dtype=torch.float64)))

    return model, guide


@pytest.mark.parametrize(
    ("family", "bound"),
    [
        (lambda w: dist.Normal(w, 0.1), ph.natural.KL_CLIP),
        (lambda w: dist.Poisson(w.exp()), ph.natural.KL_CLIP),
        (lambda w: dist.Bernoulli(logits=2 * w), None),
    ],
)
def test_default_steps_are_bounded_where_a_variable_is_not(family, bound):
    programs, found = scaled(family), {}
    options = {"fisher": "unit", "fisher_samples": "same", "num_particles": 4, "damping": 1e-3}
    for clip in (None, math.inf):
        pyro.set_rng_seed(1)
        found[clip] = NaturalRWS(*programs, kl_clip=clip, **options).directions(data())
    assert divergence(found[math.inf]) > 2 * ph.natural.KL_CLIP
    if bound is None:
        assert torch.equal(found[None].natural["w"], found[math.inf].natural["w"])
    else:
        assert divergence(found[None]) == pytest.approx(bound, rel=0.05)
    with_own = NaturalRWS(*programs, pyro.optim.SGD({"lr": 0.1}), **options)
    pyro.set_rng_seed(1)
    assert torch.equal(with_own.directions(data()).natural["w"], found[math.inf].natural["w"])


def test_the_default_trains_gaussian_latents():
    pixels = load("digits").train
    decoder, encoder = torch.nn.Linear(5, 64), torch.nn.Linear(64, 10)

    def model(x):
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(5), 1.0).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=decoder(z)).to_event(1), obs=x)

    def guide(x):
        pyro.module("encoder", encoder)
        out = encoder(x)
        scale = torch.nn.functional.softplus(out[..., 5:]) + 1e-4
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(out[..., :5], scale).to_event(1))

    svi = NaturalRWS(model, guide)
    losses = [svi.step(pixels[torch.randint(len(pixels), (32,))]) / 32 for _ in range(60)]
    assert max(losses) < losses[0] + 2
    assert sum(losses[-10:]) / 10 < losses[0] - 10


@pytest.mark.parametrize("samples", ["lagged", "average"])
@pytest.mark.parametrize("form", FORMS)
def test_blocks_that_some_batches_do_not_have_are_remembered(form, samples):
    double = torch.float64

    def model(x, z=None):
        w = pyro.param("w", torch.ones(12, 3, dtype=double))
        a = pyro.param("a", torch.zeros(12, dtype=double))
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Bernoulli(logits=a).to_event(1), obs=z)
            pyro.sample("x", dist.Bernoulli(logits=z @ w).to_event(1), obs=x)

    def guide(x, z=None):
        if z is None:
            v = pyro.param("v", torch.full((3, 12), 0.1, dtype=double))
            with pyro.plate("data", len(x)):
                pyro.sample("z", dist.Bernoulli(logits=x @ v).to_event(1))

    options = {"fisher": form, "fisher_samples": samples, "sleep_weight": 0.0}
    svi = NaturalRWS(model, guide, pyro.optim.SGD({"lr": 0.1}), num_particles=3, **options)
    x, known = data(), (torch.rand(16, 12) < 0.5).double()
    for _ in range(3):
        svi.step(x)
    (before,) = [b for b in svi.memory.batches[-1] if b.params == ["v"]]
    statistics = svi.memory.statistics.get(before.key)
    means = None if statistics is None else statistics.mean.clone()
    for _ in range(2):
        svi.step(x, known)
    (after,) = [b for b in svi.memory.batches[-1] if b.params == ["v"]]
    assert after is before
    if means is not None:
        assert torch.equal(svi.memory.statistics[before.key].mean, means)
    pyro.set_rng_seed(1)
    block = next(b for b in svi.directions(x).fisher.blocks if b.params == ["v"])
    used = {id(part.coefficients) for part in block.parts}
    if samples == "lagged" and form != "kronecker":
        assert used == {id(part.coefficients) for part in before.parts}
    svi.step(x)


def test_refresh_every():
    sbn, x = SBN(), data()
    svi = natural(sbn, fisher="unit", fisher_samples="lagged", refresh_every=3)
    taken = []
    for _ in range(7):
        svi.step(x)
        taken.append(id(svi.memory.batches[-1]))
    changes = [i for i in range(1, 7) if taken[i] != taken[i - 1]]
    assert changes == [3, 6]


def test_the_average_takes_in_every_batch_at_first_and_then_every_eighth(monkeypatch):
    monkeypatch.setattr(pyro_helmholtz.natural, "REFRESH_ALL", 3)
    sbn, x = SBN(), data()
    svi = natural(sbn)
    taken = []
    for _ in range(18):
        svi.step(x)
        taken.append(next(iter(svi.memory.statistics.values())).updates)
    assert taken == [1, 2, 3, 3, 3, 3, 3, 3, 4, 4, 4, 4, 4, 4, 4, 4, 5, 5]


@pytest.mark.parametrize("own", [False, True])
def test_the_default_rate(own):
    sbn, x = SBN(), data()
    optim = pyro.optim.SGD({"lr": 0.1}) if own else None
    svi = NaturalRWS(sbn.model, sbn.guide, optim, num_particles=6, average=False)
    svi.step(x)
    pyro.set_rng_seed(1)
    direction = svi.directions(x).natural
    before = snapshot()
    pyro.set_rng_seed(1)
    svi.step(x)
    rate = 0.1 if own else pyro_helmholtz.natural.LEARNING_RATE
    for name, value in snapshot().items():
        torch.testing.assert_close(value, before[name] + rate * direction[name])


def test_the_kronecker_form_is_diagonal_in_the_first_step():
    """One batch says nothing of most directions: noisy first dreams would go their full length."""
    sbn, x = SBN(), data()
    found = natural(sbn).directions(x)
    for block in found.fisher.blocks:
        g, alpha = block.gather(found.gradient), found.fisher.damping
        scales = block.unit_scales()
        diagonal = block.root().square().sum(0) / scales.sum()
        expected = (1 + alpha) * g / (alpha + scales[:, None] * diagonal)
        torch.testing.assert_close(block.gather(found.natural), expected)
        assert "diagonal in the first step" in block.method()


def test_directions_update_nothing():
    sbn, x = SBN(), data()
    svi = natural(sbn)
    svi.step(x)
    before = snapshot()
    svi.directions(x)
    svi.evaluate_loss(x)
    svi.structure(x)
    assert all(torch.equal(v, before[k]) for k, v in snapshot().items())


@pytest.mark.parametrize("form", FORMS)
def test_structure_prints(form):
    sbn, x = SBN(), data()
    structure = natural(sbn, fisher=form).structure(x)
    text = str(structure)
    for word in ("parameters", "fan-in", "down$$$p1.weight", "up$$$q2.bias", "h1", "exact"):
        assert word in text
    assert {p for row in structure for p in row.params} == set(snapshot())
    rows = {row.params: row for row in structure}
    row = next(r for p, r in rows.items() if "down$$$p1.weight" in p)
    assert (row.units, row.fan_in, row.site, row.exact) == (3, 3, "x", True)


@pytest.mark.parametrize("form", FORMS)
def test_sleep_options(form):
    sbn, x = SBN(), data()
    svi = natural(sbn, fisher=form, sleep_steps=3, sleep_scale=2.0, sleep_weight=0.3)
    for _ in range(3):
        assert svi.step(x) > 0


@pytest.mark.parametrize("form", FORMS)
def test_no_sleep_and_a_changing_batch_size(form):
    sbn, x = SBN(), data()
    svi = natural(sbn, fisher=form, sleep_weight=0.0)
    for n in (16, 5, 1, 16):
        svi.step(x[:n])
    assert all(bool(v.isfinite().all()) for v in snapshot().values())


def test_extra_sleep_steps_carry_the_sleep_scale() -> None:
    """With scale 0 the extra sleep updates leave the guide where the first update put it."""
    import pyro
    import torch

    def after(sleep_steps: int, sleep_scale: float) -> torch.Tensor:
        pyro.clear_param_store()
        torch.manual_seed(3)
        x = torch.bernoulli(torch.full((6, 3), 0.4))

        def model(x: torch.Tensor) -> None:
            w = pyro.param("w", torch.ones(2, 3))
            with pyro.plate("data", len(x)):
                prior = pyro.distributions.Bernoulli(logits=torch.zeros(2)).to_event(1)
                h = pyro.sample("h", prior)
                visible = pyro.distributions.Bernoulli(logits=h @ w).to_event(1)
                pyro.sample("x", visible, obs=x)

        def guide(x: torch.Tensor) -> None:
            v = pyro.param("v", torch.zeros(3, 2))
            with pyro.plate("data", len(x)):
                pyro.sample("h", pyro.distributions.Bernoulli(logits=x @ v).to_event(1))

        svi = ph.RWS(model, guide, sleep_steps=sleep_steps, sleep_scale=sleep_scale)
        svi.step(x)
        return pyro.param("v").detach().clone()

    assert torch.equal(after(4, 0.0), after(1, 0.0))
    assert not torch.equal(after(4, 1.0), after(1, 1.0))


def test_a_shared_block_with_a_missing_gradient_is_solved_as_if_it_were_zero() -> None:
    def model(x):
        weight, bias = pyro.param("weight", torch.ones(3, 2)), pyro.param("bias", torch.ones(3))
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=torch.zeros(2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=h @ weight.t() + bias).to_event(1), obs=x)

    def guide(x):
        weight = pyro.param("weight", torch.ones(3, 2))
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=x @ weight).to_event(1))

    torch.manual_seed(0)
    x = torch.bernoulli(torch.full((8, 3), 0.5))
    svi = ph.NaturalRWS(model, guide, fisher="unit", num_particles=3, max_plate_nesting=1)
    fisher = svi.directions(x).fisher
    (block,) = fisher.blocks
    assert set(block.params) == {"weight", "bias"}
    g = torch.randn(3, 2)
    natural = fisher.solve({"weight": g})
    full = fisher.solve({"weight": g, "bias": torch.zeros(3)})
    assert set(natural) == {"weight"}
    assert torch.equal(natural["weight"], full["weight"])
    assert not torch.allclose(natural["weight"], g)


def deep(factor=False):
    """A guide with two deep sites, whose blocks are matrix-free."""
    up, more = (
        torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).double()
        for _ in range(2)
    )
    down = torch.nn.Linear(4, 3).double()
    zeros = torch.zeros(2, dtype=torch.float64)

    def model(x):
        pyro.module("down", down)
        with pyro.plate("data", len(x)):
            g = pyro.sample("g", dist.Bernoulli(logits=zeros).to_event(1))
            h = pyro.sample("h", dist.Bernoulli(logits=zeros).to_event(1))
            logits = down(torch.cat([g, h], -1))
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)
            if factor:
                pyro.factor("bonus", -logits.square().sum(-1))

    def guide(x):
        pyro.module("up", up)
        pyro.module("more", more)
        with pyro.plate("data", len(x)):
            pyro.sample("g", dist.Bernoulli(logits=up(x)).to_event(1))
            pyro.sample("h", dist.Bernoulli(logits=more(x)).to_event(1))

    return model, guide, up


@pytest.mark.parametrize("samples", ["lagged", "same"])
def test_a_deep_guide_with_extra_sleep_steps(samples):
    """Each solve is at the parameters of its own time: no graph of an earlier one is kept."""
    model, guide, _ = deep()
    options = {"fisher": "unit", "fisher_samples": samples, "sleep_steps": 3}
    options["refresh_every"] = 1 if samples == "same" else 2
    svi = NaturalRWS(model, guide, pyro.optim.SGD({"lr": 0.1}), **options)
    assert all(torch.isfinite(torch.tensor([svi.step(data()) for _ in range(4)])))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.filterwarnings("ignore:.*was not registered in the param store")
def test_parameters_frozen_and_freed_on_the_way(form):
    model, guide, up = deep()
    svi = NaturalRWS(model, guide, fisher=form, fisher_samples="lagged", refresh_every=3)
    for layers in ([], [up[0]], [up[0], up[2]], [up[2]], []):
        for layer in (up[0], up[2]):
            layer.requires_grad_(layer not in layers)
        before = [layer.weight.detach().clone() for layer in layers]
        for _ in range(4):
            svi.step(data())
        for layer, weight in zip(layers, before, strict=True):
            assert torch.equal(layer.weight, weight)


@pytest.mark.parametrize("form", FORMS)
def test_a_guide_in_a_narrower_type_than_the_model(form):
    """The weights of the particles are in the wider type."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        pyro.clear_param_store()
        torch.manual_seed(0)
        sbn = SBN()
        for layer in (sbn.q1, sbn.q2):
            layer.to(dtype)

        def guide(x, sbn=sbn, dtype=dtype):
            pyro.module("up", sbn.up)
            with pyro.plate("data", len(x)):
                logits = sbn.q1(x.to(dtype))
                h1 = pyro.sample("h1", dist.Bernoulli(logits=logits).to_event(1))
                pyro.sample("h2", dist.Bernoulli(logits=sbn.q2(h1)).to_event(1))

        def model(x, sbn=sbn):
            pyro.module("down", sbn.down)
            with pyro.plate("data", len(x)):
                h2 = pyro.sample("h2", dist.Bernoulli(logits=sbn.top).to_event(1)).double()
                h1 = pyro.sample("h1", dist.Bernoulli(logits=sbn.p2(h2)).to_event(1)).double()
                pyro.sample("x", dist.Bernoulli(logits=sbn.p1(h1)).to_event(1), obs=x)

        options = {"sleep_weight": 0.0, "max_plate_nesting": 1, "tolerance": 1e-6}
        svi = NaturalRWS(
            model, guide, num_particles=3, fisher=form, fisher_samples="same", **options
        )
        pyro.set_rng_seed(1)
        found[dtype] = svi.directions(data())
        assert found[dtype].natural["up$$$q1.weight"].dtype == dtype
    assert all(bool(v.isfinite().all()) for v in found[torch.float32].natural.values())


def test_a_factor_has_no_information():
    """The block is that of the draws, whether or not the model has a factor."""
    found = []
    for factor in (False, True):
        pyro.clear_param_store()
        torch.manual_seed(0)
        model, guide, _ = deep(factor)
        options = {"fisher": "unit", "fisher_samples": "same", "sleep_weight": 0.0}
        svi = NaturalRWS(model, guide, num_particles=1, max_plate_nesting=1, **options)
        pyro.set_rng_seed(1)
        (block,) = [b for b in svi.directions(data()).fisher.blocks if b.site == "x"]
        found.append(block.dense())
        assert block.exact
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
