"""ALWS's direction beside the exact gradient on a grid (Wenliang et al. 2020, section 4.1).

    python benchmarks/alws_gradient.py
    python benchmarks/alws_gradient.py --seed 1 --points 9
    python benchmarks/alws_gradient.py --regression kernel --natural --sleep 2000 --width 1

The model is ``z ~ N(0, I_2), x | z ~ N(softplus(b·z) − |b|², σ²)``; the data are 100 draws at
b = (1, 1), σ = 0.1. The exact gradient is by quadrature, since b·z is N(0, |b|²).

By default the log joint is regressed (not its natural form) with half the median distance as the
bandwidth, on Nyström's form, which affords 20,000 dreams. The last command above has 2,000 dreams,
the natural form and the median distance. The likelihood depends on |b| alone, and near |b| = √2
the exact gradient is almost 0: there the cosine is that of noise unless the dreams are many.
"""

from __future__ import annotations

import argparse
import itertools
import warnings
from typing import NamedTuple

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_helmholtz import ALWS, GaussianKernel, KernelRegression, Nystrom

F64 = torch.float64


def exact(b: Tensor, sigma: float, x: Tensor) -> Tensor:
    """The mean gradient in b."""
    b = b.clone().requires_grad_()
    grid = torch.linspace(-8, 8, 8001, dtype=F64)
    mean = softplus(grid * b.norm()) - b.square().sum()
    log_joint = -0.5 * grid.square() - 0.5 * ((x[:, None] - mean) / sigma) ** 2
    return torch.autograd.grad(log_joint.logsumexp(1).mean(), b)[0]


class Setting(NamedTuple):
    """Of the regression: dreams, total ridge, bandwidth in median distances."""

    num_sleep: int = 20000
    ridge: float = 0.01
    width: float = 0.5
    regression: str = "nystrom"
    natural: bool = False


def bandwidth(b: Tensor, sigma: float, width: float) -> float:
    """``width`` times the median distance of 500 dreams."""
    dreams = softplus(b.norm() * torch.randn(500, dtype=F64)) - b.square().sum()
    dreams = dreams + sigma * torch.randn(500, dtype=F64)
    return width * float(torch.nn.functional.pdist(dreams[:, None]).median())


def direction(b: Tensor, sigma: float, x: Tensor, setting: Setting) -> Tensor:
    """ALWS's mean direction in b."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        at = pyro.param("b", b.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            mean = softplus(z @ at) - at.square().sum()
            pyro.sample("x", dist.Normal(mean, torch.tensor(sigma, dtype=F64)), obs=x)

    kernel = GaussianKernel(bandwidth(b, sigma, setting.width))
    regression = {
        "kernel": lambda: KernelRegression(kernel, setting.ridge),
        "nystrom": lambda: Nystrom(200, setting.ridge, kernel),
    }[setting.regression]()
    svi = ALWS(
        model,
        num_sleep=setting.num_sleep,
        gradient_model=regression,
        exponential_family=setting.natural,
    )
    return svi.directions(x).gradient["b"]


def cosines(
    values: list[float], sigmas: list[float], setting: Setting, seed: int = 0
) -> dict[tuple[float, float, float], float]:
    """The cosine between the two by (b_1, b_2, σ)."""
    pyro.set_rng_seed(seed)
    z = torch.randn(100, 2, dtype=F64)
    x = softplus(z.sum(1)) - 2 + 0.1 * torch.randn(100, dtype=F64)
    found = {}
    for b1, b2, sigma in itertools.product(values, values, sigmas):
        b = torch.tensor([b1, b2], dtype=F64)
        ours = direction(b, sigma, x, setting)
        found[b1, b2, sigma] = float(torch.cosine_similarity(ours, exact(b, sigma, x), 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sleep", type=int, default=20000, help="dreams")
    parser.add_argument("--points", type=int, default=5, help="of the grid, in each direction")
    parser.add_argument("--ridge", type=float, default=0.01, help="the total ridge")
    parser.add_argument("--width", type=float, default=0.5, help="bandwidth in median distances")
    parser.add_argument("--regression", choices=["nystrom", "kernel"], default="nystrom")
    parser.add_argument("--natural", action="store_true", help="the natural form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of coverage, away from b = (1, 1)
    values = torch.linspace(0.2, 1.8, args.points, dtype=F64).tolist()
    setting = Setting(args.sleep, args.ridge, args.width, args.regression, args.natural)
    found = cosines(values, args.sigmas, setting, args.seed)
    for sigma in args.sigmas:
        print(f"sigma = {sigma}")
        for b1 in values:
            print("  " + "  ".join(f"{found[b1, b2, sigma]:6.3f}" for b2 in values))
    print(f"least {min(found.values()):.3f}")


if __name__ == "__main__":
    main()
