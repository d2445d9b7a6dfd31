"""ALWS's direction beside the exact gradient on a grid (Wenliang et al. 2020, section 4.1).

    python benchmarks/alws_gradient.py
    python benchmarks/alws_gradient.py --sleep 5000 --points 9

The model is ``z ~ N(0, I_2), x | z ~ N(softplus(b·z) − |b|², σ²)``; the data are 100 draws at
b = (1, 1), σ = 0.1. The exact gradient is by quadrature, since b·z is N(0, |b|²).
"""

from __future__ import annotations

import argparse
import itertools
import warnings

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor
from torch.nn.functional import softplus

from pyro_helmholtz import ALWS, GaussianKernel

F64 = torch.float64


def exact(b: Tensor, sigma: float, x: Tensor) -> Tensor:
    """The mean gradient in b."""
    b = b.clone().requires_grad_()
    grid = torch.linspace(-8, 8, 8001, dtype=F64)
    mean = softplus(grid * b.norm()) - b.square().sum()
    log_joint = -0.5 * grid.square() - 0.5 * ((x[:, None] - mean) / sigma) ** 2
    return torch.autograd.grad(log_joint.logsumexp(1).mean(), b)[0]


def direction(b: Tensor, sigma: float, x: Tensor, num_sleep: int, ridge: float) -> Tensor:
    """ALWS's, with the settings of the paper's Table 1."""
    pyro.clear_param_store()

    def model(x: Tensor) -> None:
        at = pyro.param("b", b.clone())
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, dtype=F64), 1.0).to_event(1))
            mean = softplus(z @ at) - at.square().sum()
            pyro.sample("x", dist.Normal(mean, torch.tensor(sigma, dtype=F64)), obs=x)

    svi = ALWS(model, num_sleep=num_sleep, ridge=ridge, kernel=GaussianKernel())
    return svi.directions(x).gradient["b"]


def cosines(
    values: list[float], sigmas: list[float], num_sleep: int = 2000, ridge: float = 0.01
) -> dict[tuple[float, float, float], float]:
    """The cosine between the two by (b_1, b_2, σ)."""
    pyro.set_rng_seed(0)
    z = torch.randn(100, 2, dtype=F64)
    x = softplus(z.sum(1)) - 2 + 0.1 * torch.randn(100, dtype=F64)
    found = {}
    for b1, b2, sigma in itertools.product(values, values, sigmas):
        b = torch.tensor([b1, b2], dtype=F64)
        ours = direction(b, sigma, x, num_sleep, ridge)
        found[b1, b2, sigma] = float(torch.cosine_similarity(ours, exact(b, sigma, x), 0))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--sleep", type=int, default=2000)
    parser.add_argument("--points", type=int, default=5, help="of the grid, in each direction")
    parser.add_argument("--ridge", type=float, default=0.01, help="the total ridge")
    parser.add_argument("--sigmas", type=float, nargs="+", default=[0.1, 0.3, 1.0])
    args = parser.parse_args()
    warnings.simplefilter("ignore", UserWarning)  # of coverage, away from b = (1, 1)
    values = torch.linspace(0.2, 1.8, args.points, dtype=F64).tolist()
    found = cosines(values, args.sigmas, args.sleep, args.ridge)
    for sigma in args.sigmas:
        print(f"sigma = {sigma}")
        for b1 in values:
            print("  " + "  ".join(f"{found[b1, b2, sigma]:6.3f}" for b2 in values))
    print(f"least {min(found.values()):.3f}")


if __name__ == "__main__":
    main()
