"""Fisher matrices by brute force: Jacobians by autograd, information by quadrature.

Nothing here reads a graph or uses a closed form: the information of a family is the mean of
the outer product of its scores over a quadrature of its support, the Jacobian of a site's
arguments is taken element by element, and the result is one matrix over all parameters.
"""

import itertools
import math

import pyro
import pyro.distributions as dist
import torch
from torch import nn

import pyro_helmholtz as ph


def patterns(n):
    """All 2^n binary vectors, float64."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=torch.float64)


# families ------------------------------------------------------------------------------------


WHOLE = (torch.distributions.Weibull, dist.ZeroInflatedPoisson)  # though they have a base


def unwrapped(fn):
    """The innermost distribution and the masks on the way, each right-aligned to its batch."""
    masks = []
    while True:
        if isinstance(fn, dist.torch_distribution.MaskedDistribution):
            masks.append((torch.as_tensor(fn._mask), len(fn.batch_shape)))
            fn = fn.base_dist
        elif hasattr(fn, "base_dist") and not isinstance(fn, WHOLE):
            fn = fn.base_dist
        else:
            return fn, masks


def arguments(fn):
    """The names of the arguments that a distribution was made with."""
    if isinstance(fn, torch.distributions.Beta | dist.BetaBinomial):
        return ["concentration1", "concentration0"]
    if isinstance(fn, torch.distributions.HalfNormal | torch.distributions.HalfCauchy):
        return ["scale"]
    if isinstance(fn, dist.ZeroInflatedPoisson):
        return [next(n for n in fn.__dict__ if n in ("gate", "gate_logits")), "rate"]
    names = [n for n in fn.arg_constraints if torch.is_tensor(fn.__dict__.get(n))]
    inner = getattr(fn, "_categorical", fn)
    if "logits" in fn.arg_constraints:
        given = inner.__dict__.get("_param")
        if given is None:
            return [next(n for n in inner.__dict__ if n in ("logits", "probs"))]
        names = ["logits" if given is inner.__dict__.get("logits") else "probs"]
    return names


def quadrature(fn, points=4001):
    """Nodes (N, 1, ..., event) and log-weights such that Σ exp(weight + log p) = 1."""
    name = type(fn).__name__
    shape = (-1,) + (1,) * (len(fn.batch_shape) + len(fn.event_shape))
    if fn.has_enumerate_support:
        values = fn.enumerate_support(expand=False)
        return values, torch.zeros(len(values), dtype=torch.float64)
    if name in ("Poisson", "Geometric", "NegativeBinomial", "ZeroInflatedPoisson"):
        values = torch.arange(400, dtype=torch.float64)
        return values.reshape(shape), torch.zeros(400, dtype=torch.float64)
    if name == "VonMises":
        values = torch.linspace(-math.pi, math.pi, 513, dtype=torch.float64)[:-1]
        return values.reshape(shape), torch.full_like(values, math.log(2 * math.pi / 512))
    width = 60.0 if name != "Normal" else 12.0
    t = torch.linspace(-width, width, points, dtype=torch.float64)
    step = math.log(2 * width / (points - 1))
    if name == "Normal":
        spread = float(fn.scale.detach().max()) + float(fn.loc.detach().abs().max())
        return (t * spread).reshape(shape), torch.full_like(t, step + math.log(spread))
    if fn.support is dist.constraints.unit_interval:
        logit = nn.functional.logsigmoid
        return torch.sigmoid(t).clamp(1e-300, 1 - 1e-16).reshape(shape), step + logit(t) + logit(-t)
    if fn.support is dist.constraints.real:
        values = torch.sinh(t * 0.5)  # so far out that the tails of a Cauchy variable are in
        return values.reshape(shape), step + math.log(0.5) + torch.log(torch.cosh(t * 0.5))
    return torch.exp(t).reshape(shape), step + t  # positive support


def score_information(fn):
    """E[score scoreᵀ] of every element, (*batch, d, d), over all arguments in order."""
    names = arguments(fn)
    nodes, log_weights = quadrature(fn)
    batch, event = fn.batch_shape, fn.event_shape
    size = len(log_weights)
    with torch.enable_grad():
        values = []
        for name in names:
            value = getattr(fn, name).detach()
            full = (size, *batch, *value.shape[len(batch) :])
            values.append(value.expand(full).clone().requires_grad_())
        count = {"total_count": fn.total_count} if type(fn) is dist.BetaBinomial else {}
        wide = type(fn)(**dict(zip(names, values, strict=True)), **count, validate_args=False)
        log_p = wide.log_prob(nodes.expand(size, *batch, *event))
        grads = torch.autograd.grad(log_p.sum(), values)
    vector = grads[0].ndim > log_p.ndim
    score = grads[0] if vector else torch.stack(grads, -1)
    weight = (log_weights.reshape(-1, *(1,) * len(batch)) + log_p.detach()).exp()
    total = weight.sum(0)
    assert float((total - 1).abs().max()) < 1e-6, (type(fn), total)
    # Torch's Bessel functions are good to 1e-7 only: scores have mean zero by definition.
    weight = weight / total
    score = torch.where(weight[..., None] > 0, score, 0.0)
    score = score - torch.einsum("n...,n...i->...i", weight, score)
    return torch.einsum("n...,n...i,n...j->...ij", weight, score, score)


# programs ------------------------------------------------------------------------------------


def leaves():
    """Every parameter's unconstrained leaf by name."""
    return dict(sorted(pyro.get_param_store().named_parameters()))


def jacobian(fn, tensors):
    """d arguments / d parameters: (elements, d, P)."""
    values = [getattr(fn, name) for name in arguments(fn)]
    shape = tuple(fn.batch_shape)
    if len(values) == 1 and values[0].ndim > len(shape):
        outputs = values[0].reshape(-1)
        d = values[0].shape[-1]
    else:
        d = len(values)
        outputs = torch.stack([v.expand(shape) for v in values], -1).reshape(-1)
    size = sum(t.numel() for t in tensors)
    if not outputs.requires_grad:
        return outputs.new_zeros(outputs.numel() // d, d, size)
    rows = []
    for output in outputs:
        grads = torch.autograd.grad(
            output, tensors, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows).reshape(-1, d, size)


def site_fisher(site, weight, tensors, info=score_information):
    """Σ over elements of weight · Jᵀ I J for one site.

    Args:
        weight: over the site's batch shape, particles and data included.
    """
    fn, masks = unwrapped(site["fn"])
    outer = site["fn"].batch_shape
    inner = fn.batch_shape
    event = len(inner) - len(outer)
    if event < 0:
        inner, event = (1,) * -event + tuple(inner), 0
    element = weight * torch.as_tensor(site["scale"], dtype=weight.dtype)
    if site["mask"] is not None:
        element = element * site["mask"]
    element = element.expand(torch.broadcast_shapes(element.shape, outer))
    element = element.reshape(element.shape + (1,) * event)
    full = (
        element.shape[: element.ndim - event] + inner[len(inner) - event :]
        if event
        else (element.shape)
    )
    element = element.expand(full)
    for mask, at in masks:
        element = element * mask.reshape(mask.shape + (1,) * (len(inner) - at))
    element = element.sum_to_size(inner).reshape(-1)
    j = jacobian(fn, tensors)
    i = info(fn).reshape(-1, j.shape[1], j.shape[1])
    return torch.einsum("n,nap,nab,nbq->pq", element, j, i, j)


def naive_weights(wake, data_dims):
    """softmax over particles of Σ log p − Σ log q per datum, right-aligned."""
    ndim = wake.layout.ndim
    total = 0.0
    for trace, sign in ((wake.model, 1.0), (wake.guide, -1.0)):
        for _, site in sites(trace):
            value = site["fn"].log_prob(site["value"]).detach()
            if site["mask"] is not None:
                value = value * site["mask"]
            value = value.reshape((1,) * (ndim - value.ndim) + value.shape)
            keep = {0} | {ndim + d for d in data_dims}
            drop = [d for d in range(ndim) if d not in keep]
            total = total + sign * (value.sum(drop, keepdim=True) if drop else value)
    return total.softmax(0)


def sites(trace):
    """Sample sites with a probability."""
    for name, site in trace.nodes.items():
        if site["type"] == "sample" and type(site["fn"]).__name__ != "_Subsample":
            yield name, site


def brute_force(svi, args, *, data_dims=(-1,), num_data=None, seed=0, info=score_information):
    """The whole Fisher matrix of model and guide on the wake samples of ``seed``."""
    pyro.set_rng_seed(seed)
    wake = svi.programs.wake(args, {})
    tensors = list(leaves().values())
    weights = naive_weights(wake, data_dims)
    count = num_data or len(args[0])
    uniform = torch.full_like(weights, 1.0 / svi.programs.num_particles)
    total = 0.0
    for trace, weight in ((wake.model, weights), (wake.guide, uniform)):
        for _, site in sites(trace):
            total = total + site_fisher(site, weight / count, tensors, info)
    return total


def from_blocks(fisher):
    """The whole matrix that the blocks' products stand for."""
    shapes = {name: leaf.shape for name, leaf in leaves().items()}
    size = sum(s.numel() for s in shapes.values())
    columns = []
    for unit in torch.eye(size, dtype=torch.float64):
        pieces = unit.split([s.numel() for s in shapes.values()])
        tensors = {n: p.reshape(s) for (n, s), p in zip(shapes.items(), pieces, strict=True)}
        out = {n: torch.zeros(s, dtype=torch.float64) for n, s in shapes.items()}
        for block in fisher.blocks:
            out |= block.scatter(block.matvec(block.gather(tensors)))
        columns.append(torch.cat([out[n].reshape(-1) for n in shapes]))
    return torch.stack(columns, 1)


def check_operator(block):
    """``matvec``, ``diagonal``, ``gather``, ``scatter`` and ``solve`` against ``dense``."""
    dense = block.dense()
    assert dense.shape == (block.units, block.size, block.size)
    v = torch.randn(block.units, block.size, dtype=torch.float64)
    close(block.matvec(v), (dense @ v[..., None])[..., 0], 1e-10)
    close(block.diagonal(), dense.diagonal(dim1=1, dim2=2), 1e-10)
    close(dense, dense.transpose(1, 2), 1e-10)
    close(block.gather(block.scatter(v)), v, 0)
    if hasattr(block, "max_iterations"):
        block.max_iterations = 500
    eye = torch.eye(block.size, dtype=torch.float64)
    for alpha in (0.05, 0.2, 2.0):
        exact = torch.linalg.solve(alpha * eye + dense, (1 + alpha) * v)
        close(block.solve(v, alpha), exact, 1e-8)
    close(block.solve(v, 1e12), v, 1e-9)


def check(svi, *args, data_dims=(-1,), num_data=None, info=score_information, tolerance=1e-8):
    """Directions whose Fisher matrix equals brute force, with every operator checked."""
    svi.directions(*args)  # finds out the nesting, so that the seed gives the same samples
    pyro.set_rng_seed(0)
    directions = svi.directions(*args)
    fisher = directions.fisher
    for block in fisher.blocks:
        check_operator(block)
    truth = brute_force(svi, args, data_dims=data_dims, num_data=num_data, info=info)
    close(from_blocks(fisher), truth, tolerance)
    return directions


def close(value, expected, tolerance):
    """Largest deviation relative to the largest entry (or 1)."""
    scale = max(1.0, float(expected.abs().max())) if expected.numel() else 1.0
    assert value.shape == expected.shape
    error = float((value - expected).abs().max()) if expected.numel() else 0.0
    assert error <= tolerance * scale, error


def natural(model, guide, **options):
    """``NaturalRWS`` with exact blocks of the present batch, tight solves and no bound."""
    options = {
        "num_particles": 3,
        "fisher": "unit",
        "fisher_samples": "same",
        "tolerance": 1e-12,
        "kl_clip": math.inf,
    } | options
    return ph.NaturalRWS(model, guide, **options)


def program(site, modules, *, latents=3, batch=4):
    """A model with one Bernoulli layer under ``site(h, modules)``, a guide, and data.

    Args:
        site: ``(h, modules) -> distribution``, h of shape (..., data, latents).
        modules: a dict of torch modules, trained with the model.
    """
    for module in modules.values():
        module.reset_parameters()  # those made at import knew no seed
    held = nn.ModuleDict(modules).double()
    prior = nn.Parameter(torch.randn(latents, dtype=torch.float64))

    def model(x):
        if modules:
            pyro.module("net", held)
        top = pyro.param("prior", prior)
        with pyro.plate("data", len(x)):
            h = pyro.sample("h", dist.Bernoulli(logits=top).to_event(1))
            pyro.sample("x", site(h, held), obs=x)

    with torch.no_grad():
        x = site(torch.randint(0, 2, (batch, latents)).double(), held).sample()
        if x.shape[0] != batch:
            x = site(torch.zeros(batch, latents).double(), held).expand((batch,)).sample()
    up = nn.Linear(x[0].numel(), latents).double()

    def guide(x):
        pyro.module("up", up)
        features = torch.tanh(x.reshape(len(x), -1).double())
        with pyro.plate("data", len(x)):
            pyro.sample("h", dist.Bernoulli(logits=up(features)).to_event(1))

    return model, guide, x
