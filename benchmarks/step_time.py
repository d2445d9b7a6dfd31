"""The time of one step: by hand, this library's estimators, and Pyro's own RWS.

    python benchmarks/step_time.py --network mnist
    python benchmarks/step_time.py --network thesis --folder data/mnist --json step_time.json
    python benchmarks/step_time.py --network 12288 --methods rws,kronecker --warm-up 2 --steps 1

All contenders are timed in one run, in turn, block after block, with the threads pinned; the
ratios are medians of the ratios within a repetition, so that a busy neighbour slows both sides.
The data are noise, or MNIST with ``--folder``. The first steps are not timed: in them the
natural gradients find several eigenbases.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pyro
import pyro.distributions as dist
import torch
from by_hand import ByHand, make_layers
from pyro.infer import SVI, ReweightedWakeSleep
from rich.console import Console
from rich.table import Table
from torch import Tensor

import pyro_helmholtz as ph
from pyro_helmholtz.datasets import load

NETWORKS = {
    "mnist": [784, 200, 100],
    "thesis": [784, 300, 200, 100, 75, 50, 35, 30, 25, 20, 15, 10, 10],
    "12288": [12_288, 1_000],
}
BATCHES = 100
METHODS = ["by-hand", "rws", "pyro", "unit", "kronecker", "diagonal"]


def make_programs(
    widths: list[int], device: str | torch.device = "cpu", prefix: str = ""
) -> tuple[Callable, Callable]:
    """Makes a sigmoid belief network and its guide, with fresh parameters.

    Args:
        widths: the numbers of units, visible layer first.
        device: where the parameters live.
        prefix: put before the names in the parameter store, so that several can live there.

    Returns:
        ``model(x, observations=None)`` and ``guide(x, observations=None)``, with ``x`` of shape
        ``(n, widths[0])``. The guide reads a dream from ``observations["x"]`` where it is given.
    """
    down, prior, up = make_layers(widths, device)
    down.register_parameter("prior", prior)

    def model(x: Tensor, observations: dict | None = None) -> None:
        pyro.module(prefix + "model", down)
        with pyro.plate("data", len(x)):
            h = pyro.sample(f"h{len(down)}", dist.Bernoulli(logits=down.prior).to_event(1))
            for i in range(len(down) - 1, 0, -1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=down[i](h)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=down[0](h)).to_event(1), obs=x)

    def guide(x: Tensor, observations: dict | None = None) -> None:
        pyro.module(prefix + "guide", up)
        h = observations["x"] if observations else x
        with pyro.plate("data", len(x)):
            for i, layer in enumerate(up, start=1):
                h = pyro.sample(f"h{i}", dist.Bernoulli(logits=layer(h)).to_event(1))

    return model, guide


def make_step(
    name: str, widths: list[int], particles: int, device: str, sleep_particles: int = 1
) -> Callable:
    """Makes the ``step(x)`` of one contender; ``sleep_particles`` is for Pyro's RWS."""
    if name == "by-hand":
        return ByHand(widths, particles, device=device).step
    model, guide = make_programs(widths, device, prefix=f"{name}_")
    optim = pyro.optim.SGD({"lr": 2e-3})  # type: ignore[attr-defined]
    if name == "pyro":
        loss = ReweightedWakeSleep(
            num_particles=particles,
            vectorize_particles=True,
            insomnia=0.5,
            num_sleep_particles=sleep_particles,
            max_plate_nesting=1,
        )
        return SVI(model, guide, optim, loss=loss).step
    if name == "rws":
        return ph.RWS(model, guide, optim, num_particles=particles, max_plate_nesting=1).step
    return ph.NaturalRWS(
        model,
        guide,
        optim,
        num_particles=particles,
        fisher=name,
        refresh_every=1,
        max_plate_nesting=1,
    ).step


def peak_memory(device: str) -> float:
    """The peak memory in MiB: of the device since the last reset, or of this process so far."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    unit = 2**20 if platform.system() == "Darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def minibatches(args: argparse.Namespace, width: int) -> Tensor:
    """Binary images, (batches, batch size, width): MNIST's where a folder is given."""
    if args.folder:
        images = load("mnist", binarize="threshold", folder=args.folder).train
        used = images[: BATCHES * args.batch_size]
    else:
        used = torch.bernoulli(torch.full((BATCHES * args.batch_size, width), 0.2))
    return used.reshape(BATCHES, args.batch_size, width).to(args.device)


def measure(steps: dict[str, Callable], x: Tensor, args: argparse.Namespace) -> dict[str, dict]:
    """Times the contenders in turn; milliseconds per step for each repetition, and memory."""
    cuda = args.device.startswith("cuda")
    clock = time.process_time if args.processor_time else time.perf_counter
    turns = {name: itertools.cycle(x) for name in steps}

    def block(name: str, count: int) -> float:
        start = clock()
        for _ in range(count):
            steps[name](next(turns[name]))
        if cuda:
            torch.cuda.synchronize()
        return (clock() - start) / count * 1e3

    results: dict[str, dict] = {}
    for name in steps:
        if cuda:
            torch.cuda.reset_peak_memory_stats(args.device)
        block(name, args.warm_up)
        results[name] = {"peak_mib": peak_memory(args.device), "ms": []}
    for _ in range(args.repetitions):
        for name in steps:
            results[name]["ms"].append(block(name, args.steps))
    return results


def report(results: dict[str, dict], args: argparse.Namespace) -> None:
    """Prints the table and writes the JSON file."""
    table = Table(
        title=f"{args.network}: B = {args.batch_size}, S = {args.particles}, "
        f"{args.device}, {torch.get_num_threads()} threads"
    )
    for column in ("step", "median ms", "min ms", "/ by hand", "/ pyro", "/ rws", "peak MiB"):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, result in results.items():
        result["median"] = statistics.median(result["ms"])
        result["min"] = min(result["ms"])
        cells = [name, f"{result['median']:.2f}", f"{result['min']:.2f}"]
        for base in ("by-hand", "pyro", "rws"):
            if base in results:
                pairs = zip(result["ms"], results[base]["ms"], strict=True)
                result[f"ratio_to_{base}"] = statistics.median(a / b for a, b in pairs)
                cells.append(f"{result[f'ratio_to_{base}']:.2f}")
            else:
                cells.append("–")
        table.add_row(*cells, f"{result['peak_mib']:.0f}")
    console = Console()
    if not console.is_terminal:  # a file or a pipe: no need to fold at 80 columns
        console = Console(width=120)
    console.print(table)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "torch": torch.__version__, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="mnist")
    parser.add_argument("--methods", default=",".join(METHODS), help="contenders, with commas")
    parser.add_argument("--steps", type=int, default=5, help="steps in a timed block")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=200, help="steps that are not timed")
    parser.add_argument("--folder", help="MNIST's IDX files, to run on its images, not on noise")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument(
        "--sleep-particles",
        type=int,
        default=1,
        help="dreams for each datum in Pyro's RWS; 1 as in all others, its own default is S",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="of all threads together, which a busy machine disturbs less; for one thread",
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    names = args.methods.split(",")
    if unknown := set(names) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; there are {METHODS}")

    torch.set_num_threads(args.threads)
    pyro.set_rng_seed(args.seed)
    widths = NETWORKS[args.network]
    if args.folder and widths[0] != 784:
        parser.error(f"--folder is for networks of 784 pixels, not of {widths[0]}")
    x = minibatches(args, widths[0])
    options = (widths, args.particles, args.device, args.sleep_particles)
    steps = {name: make_step(name, *options) for name in names}
    report(measure(steps, x, args), args)


if __name__ == "__main__":
    main()
