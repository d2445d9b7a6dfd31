"""Learning curves of natural RWS, RWS and Pyro's RWS on the same networks and data.

    python benchmarks/learning.py --data digits --layers 20,10 --epochs 50
    python benchmarks/learning.py --data mnist14 --layers 100,50,20,10,10 --seconds 90 \
        --methods rws-sgd,rws-adam,natural --grid rws-sgd=0.1,0.2 --seeds 0,1,2 \
        --curve-every 15 --json learning.jsonl
    python benchmarks/learning.py --data mnist --layers 200,100 --epochs 2 --methods natural \
        --natural "damping=0.2,fisher=kronecker,lr=0.05,momentum=0.9,nesterov=True"

Every method starts from the same parameters for a seed and sees the data in the same order. The
clock stands still during evaluation, whose random numbers are apart from those of training. The
rates of ``--grid`` and ``--lr`` are tried one by one; ``rws-average`` is SGD with averaged
parameters, as the natural estimators have by default; ``natural`` without options runs the
library's defaults.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import torch
from common import append_lines, describe, settings, show
from learning_report import learning_table
from pyro.infer import SVI, ReweightedWakeSleep
from step_time import make_programs
from torch import Tensor

import pyro_helmholtz as ph
from pyro_helmholtz.datasets import load

GRID: dict[str, list] = {
    "rws-sgd": [0.1],
    "rws-average": [0.1],
    "rws-nesterov": [0.02],
    "rws-adam": [0.003],
    "pyro-adam": [0.003],
    "natural": [None],
}
SGD_OPTIONS = ("lr", "momentum", "nesterov", "weight_decay", "dampening")


def images(args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """The binary training and test images, shapes ``(n, pixels)``."""
    if args.data != "mnist14":
        name = {} if args.data == "digits" else {"folder": args.folder}
        data = load(args.data, binarize=args.binarize, **name)
        return data.train.to(args.device), data.test.to(args.device)
    data = load("mnist", binarize=None, folder=args.folder)
    pooled = (
        torch.nn.functional.avg_pool2d(grey.reshape(-1, 1, *data.shape), 2).flatten(1)
        for grey in (data.train, data.test)
    )
    train, test = ((grey >= 0.5).float().to(args.device) for grey in pooled)
    return train, test


def optimiser(name: str, options: dict) -> pyro.optim.PyroOptim:
    """Makes an optimiser of ``pyro.optim``, which defines most of them when it is imported."""
    return getattr(pyro.optim, name)(dict(options))


def make_step(method: str, options: dict, model: Callable, guide: Callable, size: int) -> Callable:
    """Makes the ``step(x)`` of a method; its options go to the optimiser and to the estimator."""
    common = {"num_particles": size, "max_plate_nesting": 1}
    if method == "pyro-adam":
        loss = ReweightedWakeSleep(
            vectorize_particles=True, insomnia=0.5, num_sleep_particles=1, **common
        )
        step = SVI(model, guide, optimiser("Adam", options), loss=loss).step
        return lambda x: step(x)[0]
    if method == "rws-adam":
        return ph.RWS(model, guide, optimiser("Adam", options), **common).step
    if method in ("rws-sgd", "rws-average"):
        average = method == "rws-average"
        return ph.RWS(model, guide, optimiser("SGD", options), average=average, **common).step
    if method == "rws-nesterov":
        momentum = {"momentum": 0.9, "nesterov": True}
        return ph.RWS(model, guide, optimiser("SGD", options | momentum), **common).step
    sgd = {key: value for key, value in options.items() if key in SGD_OPTIONS}
    rest = {key: value for key, value in options.items() if key not in SGD_OPTIONS}
    if sgd and "lr" not in sgd:
        raise ValueError(f"the options {sgd} of SGD need an lr beside them")
    optim = optimiser("SGD", sgd) if sgd else None
    return ph.NaturalRWS(model, guide, optim, **(common | rest)).step


def minibatches(x: Tensor, size: int, seed: int) -> Iterator[Tensor]:
    """Yields minibatches for ever, every epoch in a new order; the last rows are left out."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        order = torch.randperm(len(x), generator=generator).to(x.device)
        for start in range(0, len(x) - size + 1, size):
            yield x[order[start : start + size]]


def evaluate(
    model: Callable, guide: Callable, test: Tensor, particles: int, seed: int
) -> ph.LogLikelihood:
    """The test log-likelihood, with random numbers of its own."""
    devices = [test.device] if test.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed + 1_000_000)
        return ph.log_likelihood(
            model,
            guide,
            test,
            num_particles=particles,
            particles_at_once=min(100, particles),
            batch=100,
            max_plate_nesting=1,
        )


def train(
    method: str, options: dict, seed: int, data: tuple[Tensor, Tensor], args: argparse.Namespace
) -> dict[str, Any]:
    """Trains once; returns a record for the JSON file."""
    x, test = data[0], data[1][: args.eval_images]
    pyro.clear_param_store()
    pyro.set_rng_seed(seed)
    widths = [x.shape[1], *map(int, args.layers.split(","))]
    model, guide = make_programs(widths, args.device)
    step = make_step(method, options, model, guide, args.particles)

    per_epoch = len(x) // args.batch_size
    limit = math.inf if args.epochs is None else math.ceil(args.epochs * per_epoch)
    record: dict[str, Any] = {
        "method": method,
        "options": options,
        "seed": seed,
        "curve": [],
        "error": None,
    }
    seconds, steps, next_point = 0.0, 0, args.curve_every or math.inf
    try:
        for batch in minibatches(x, args.batch_size, seed):
            if steps >= limit or (args.seconds is not None and seconds >= args.seconds):
                break
            start = time.perf_counter()
            loss = step(batch)
            seconds += time.perf_counter() - start
            steps += 1
            if not math.isfinite(loss):
                raise FloatingPointError(f"the loss of step {steps} is {loss}")
            if seconds >= next_point:
                next_point += args.curve_every * math.ceil(
                    (seconds - next_point + 1e-9) / args.curve_every
                )
                point = evaluate(model, guide, test, args.curve_particles, seed)
                record["curve"].append([seconds, steps, point.mean])
        final = evaluate(model, guide, test, args.eval_particles, seed)
        record |= {"log_p": final.mean, "stderr": final.stderr}
        record |= {"ess": final.ess.mean().item()}
        record |= {"khat_above_0.7": (final.khat > 0.7).double().mean().item()}
    except (ArithmeticError, ValueError, RuntimeError) as error:  # a run that diverges
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    record |= {"seconds": seconds, "steps": steps, "epochs": steps / per_epoch}
    return record


def report(records: list[dict], args: argparse.Namespace) -> None:
    """Prints one row for each setting, the mean over its seeds."""
    budget = f"{args.epochs:g} epochs" if args.epochs is not None else f"{args.seconds:g} s"
    title = f"{args.data}, {args.layers}, {budget}, {len(args.seeds)} seeds"
    show(learning_table(records, title))


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", choices=["digits", "mnist14", "mnist"], default="digits")
    parser.add_argument("--folder", help="where MNIST's IDX files are")
    parser.add_argument(
        "--validate",
        action="store_true",
        help="to choose settings: test on a fifth of the training images, train on the others",
    )
    parser.add_argument("--binarize", choices=["threshold", "sample"], default="threshold")
    parser.add_argument("--layers", default="100,50,20,10,10", help="hidden layers, bottom first")
    parser.add_argument(
        "--methods", default="rws-sgd,rws-average,rws-nesterov,rws-adam,pyro-adam,natural"
    )
    parser.add_argument("--lr", help="rates for every method, with commas")
    parser.add_argument("--grid", action="append", default=[], metavar="METHOD=LR,LR")
    parser.add_argument(
        "--natural",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="options of NaturalRWS and of its SGD, key=value with commas; may be repeated",
    )
    parser.add_argument("--seeds", default="0")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float)
    budget.add_argument("--seconds", type=float, help="of training, evaluation excluded")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--eval-particles", type=int, default=1_000)
    parser.add_argument("--eval-images", type=int, default=2_000)
    parser.add_argument("--curve-every", type=float, help="seconds of training between points")
    parser.add_argument("--curve-particles", type=int, default=50)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="file to append one line for each run to")
    args = parser.parse_args()
    if args.epochs is None and args.seconds is None:
        args.epochs = 5.0
    try:
        runs = settings(args, GRID)
    except ValueError as error:
        parser.error(str(error))
    args.seeds = [int(seed) for seed in args.seeds.split(",")]

    torch.set_num_threads(args.threads)
    data = images(args)
    if args.validate:
        held_out = len(data[0]) // 5
        data = data[0][:-held_out], data[0][-held_out:]
    if len(data[0]) < args.batch_size:
        parser.error(f"--batch-size {args.batch_size} is more than the {len(data[0])} images")
    keys = (
        "data",
        "layers",
        "batch_size",
        "particles",
        "eval_particles",
        "threads",
        "device",
        "validate",
    )
    shared = {key: getattr(args, key) for key in keys} | {"eval_images": args.eval_images}
    # Two steps of every method that nobody counts: first calls import and allocate.
    brief = {"epochs": 2 * args.batch_size / len(data[0]), "seconds": None, "eval_particles": 1}
    for method, options in dict(runs).items():
        train(method, options, 0, data, argparse.Namespace(**(vars(args) | brief)))
    records = []
    for seed in args.seeds:
        for method, options in runs:
            record = train(method, options, seed, data, args)
            records.append(record)
            result = record["error"] or f"{record['log_p']:.2f} in {record['seconds']:.1f} s"
            print(f"{method} ({describe(options)}), seed {seed}: {result}", flush=True)
            append_lines(args.json, [shared | record])
    report(records, args)


if __name__ == "__main__":
    main()
