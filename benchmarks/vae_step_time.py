"""The time of one step of a variational autoencoder, against Pyro's ``Trace_ELBO``.

    python benchmarks/vae_step_time.py
    python benchmarks/vae_step_time.py --particles 10 --methods host,path,price --json vae.json
    python benchmarks/vae_step_time.py --learn 2000 --folder data/mnist --seeds 0,1,2

All contenders are timed in one run, in turn, block after block; the ratios to the host are medians
of the ratios within a repetition, so that a busy neighbour slows both sides. The time that the
process itself was given is printed too (cpu); it suffers less from neighbours. ``--learn`` trains
each of them for that many steps on MNIST instead, from the same parameters and on the same
minibatches, and prints the test ELBO of each seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from pyro.infer import SVI, Trace_ELBO
from torch import Tensor, nn

import pyro_helmholtz as ph
from pyro_helmholtz.datasets import load

METHODS = ("host", "path", "price", "price-exact", "path-closed", "path-rank-one")


class Vae(nn.Module):
    """784-400-20 by default, with smooth activations, since Price's theorem needs them."""

    def __init__(self, pixels: int, hidden: int, latent: int, rank_one: bool) -> None:
        super().__init__()
        self.latent, self.rank_one = latent, rank_one
        heads = 3 if rank_one else 2
        self.encoder = nn.Sequential(
            nn.Linear(pixels, hidden), nn.Softplus(), nn.Linear(hidden, heads * latent)
        )
        self.decoder = nn.Sequential(
            nn.Linear(latent, hidden), nn.Softplus(), nn.Linear(hidden, pixels)
        )

    def programs(self, prefix: str) -> tuple[Callable, Callable]:
        """The model and the guide; the prefix keeps several in one parameter store apart."""

        def model(x: Tensor) -> None:
            pyro.module(prefix + "decoder", self.decoder)
            with pyro.plate("data", len(x)):
                zeros = x.new_zeros(len(x), self.latent)
                z = pyro.sample("z", dist.Normal(zeros, 1.0).to_event(1))
                pyro.sample("x", dist.Bernoulli(logits=self.decoder(z)).to_event(1), obs=x)

        def guide(x: Tensor) -> None:
            pyro.module(prefix + "encoder", self.encoder)
            with pyro.plate("data", len(x)):
                loc, log_scale, *rest = self.encoder(x).split(self.latent, -1)
                if self.rank_one:
                    q = ph.RankOnePrecisionNormal(loc, rest[0], (-2 * log_scale).exp())
                else:
                    q = dist.Normal(loc, log_scale.exp()).to_event(1)
                pyro.sample("z", q)

        return model, guide


def make_step(name: str, args: argparse.Namespace, seed: int) -> tuple[Callable, Callable]:
    """``step(x)`` and ``evaluate(x)`` of one contender, from parameters that the seed fixes."""
    pyro.set_rng_seed(seed)
    vae = Vae(784, args.hidden, args.latent, "rank-one" in name).to(args.device)
    model, guide = vae.programs(f"{name}-{seed}-")
    optim = pyro.optim.Adam({"lr": args.rate})  # type: ignore[attr-defined]
    evaluation = Trace_ELBO(max_plate_nesting=1)
    common = {"num_particles": args.particles, "max_plate_nesting": 1}
    if name == "host":
        loss = Trace_ELBO(vectorize_particles=True, **common)
        step = SVI(model, guide, optim, loss=loss).step
    else:
        options = {
            "path": {},
            "path-rank-one": {},
            "path-closed": {"entropy": "closed"},
            "price": {"estimator": "price"},
            "price-exact": {"estimator": "price", "hessian": "exact"},
        }[name]
        step = ph.StochasticBackprop(model, guide, optim, **common, **options).step
    return step, lambda x: evaluation.loss(model, guide, x) / len(x)


def measure(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Milliseconds of each block, the ratio to the host within a repetition."""
    x = torch.bernoulli(torch.full((args.batch_size, 784), 0.2)).to(args.device)
    steps = {name: make_step(name, args, args.seed)[0] for name in names}
    times: dict[str, list[float]] = {name: [] for name in names}
    work: dict[str, list[float]] = {name: [] for name in names}
    for repetition in range(args.repetitions + 1):
        for name in names if repetition % 2 else reversed(names):
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            start, busy = time.perf_counter(), time.process_time()
            for _ in range(args.steps):
                steps[name](x)
            if args.device.startswith("cuda"):
                torch.cuda.synchronize()
            if repetition:  # the first one warms up
                times[name].append(1000 * (time.perf_counter() - start) / args.steps)
                work[name].append(1000 * (time.process_time() - busy) / args.steps)
    results = {}
    for name in names:
        pairs = zip(times[name], times[names[0]], strict=True)
        results[name] = {
            "median_ms": statistics.median(times[name]),
            "min_ms": min(times[name]),
            "median_ratio": statistics.median(a / b for a, b in pairs),
            "min_ratio": min(times[name]) / min(times[names[0]]),
            "cpu_ms": statistics.median(work[name]),
            "cpu_ratio": statistics.median(work[name]) / statistics.median(work[names[0]]),
        }
    return results


def learn(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """The test ELBO after ``--learn`` steps, by seed."""
    data = load("mnist", folder=args.folder)
    train, test = data.train.to(args.device), data.test.to(args.device)
    results: dict[str, dict] = {name: {"elbo": [], "seconds": []} for name in names}
    for seed in args.seeds:
        for name in names:
            step, evaluate = make_step(name, args, seed)
            order = torch.Generator().manual_seed(seed)
            start = time.perf_counter()
            for _ in range(args.learn):
                index = torch.randint(len(train), (args.batch_size,), generator=order)
                step(train[index])
            results[name]["seconds"].append(time.perf_counter() - start)
            pyro.set_rng_seed(1000)
            with torch.no_grad():
                results[name]["elbo"].append(-sum(evaluate(test) for _ in range(4)) / 4)
    return results


def report(results: dict[str, dict]) -> None:
    """One line for each contender."""
    for name, result in results.items():
        cells = []
        for key, value in result.items():
            values = value if isinstance(value, list) else [value]
            cells.append(f"{key} " + " ".join(f"{v:.2f}" for v in values))
        print(f"{name:14s}", "   ".join(cells))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--methods", default="host,path,price", help=f"of {', '.join(METHODS)}")
    parser.add_argument("--steps", type=int, default=10, help="steps in a timed block")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3, help="of Adam")
    parser.add_argument("--learn", type=int, default=0, help="train for so many steps instead")
    parser.add_argument("--folder", help="where the files of MNIST are")
    parser.add_argument("--seeds", default="0,1,2", help="for --learn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    names = args.methods.split(",")
    if unknown := set(names) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; there are {METHODS}")
    torch.set_num_threads(args.threads)
    pyro.set_rng_seed(args.seed)
    results = learn(names, args) if args.learn else measure(names, args)
    report(results)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
