"""The time of one step: by hand in JAX, this library's estimators, and NumPyro's RenyiELBO.

    python benchmarks/numpyro_step_time.py --network mnist
    python benchmarks/numpyro_step_time.py --network thesis --folder data/mnist --json times.json
    python benchmarks/numpyro_step_time.py --bars

Every contender's step runs under ``jit`` and ``lax.scan``. All are timed in one run, in turn,
block after block; the ratios are medians of the ratios within a repetition, so that a busy
neighbour slows both sides. The first block's time less a block's is the compile time. A
contender goes on from block to block: what it does only once in many steps shows in the mean,
not in the median. The data are noise, or MNIST with ``--folder``. With ``--bars`` the same
number of steps is timed through ``run`` with and without a progress bar.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpyro
import numpyro.distributions as dist
from common import show
from jax import Array, lax, random
from jax_by_hand import ByHand, make_layers
from numpyro.infer import SVI, RenyiELBO
from rich.table import Table

import numpyro_helmholtz as nh
from numpyro_helmholtz.datasets import load

NETWORKS = {
    "mnist": [784, 200, 100],
    "thesis": [784, 300, 200, 100, 75, 50, 35, 30, 25, 20, 15, 10, 10],
    "12288": [12_288, 1_000],
}
BATCHES = 100
METHODS = ["by-hand", "rws", "renyi", "unit", "kronecker", "diagonal"]


def make_programs(widths: list[int]) -> tuple[Callable, Callable]:
    """Makes a sigmoid belief network and its guide.

    Args:
        widths: the numbers of units, visible layer first.

    Returns:
        ``model(x)`` and ``guide(x)``, with ``x`` of shape ``(n, widths[0])``.
    """
    levels = len(widths) - 1

    def layer(name: str, fan_in: int, fan_out: int) -> Callable:
        def init(key: Array) -> Array:
            bound = 1 / math.sqrt(fan_in)
            return random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound)

        weight = numpyro.param(f"{name}.weight", init)
        bias = numpyro.param(f"{name}.bias", jnp.zeros(fan_out))
        return lambda h: h @ weight + bias

    def model(x: Array) -> None:
        logits = numpyro.param("top", jnp.zeros(widths[-1]))
        with numpyro.plate("data", len(x)):
            for i in range(levels, 0, -1):
                h = numpyro.sample(f"h{i}", dist.Bernoulli(logits=logits).to_event(1))
                logits = layer(f"down{i - 1}", widths[i], widths[i - 1])(h)
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        h = x
        with numpyro.plate("data", len(x)):
            for i in range(1, levels + 1):
                logits = layer(f"up{i}", widths[i - 1], widths[i])(h)
                h = numpyro.sample(f"h{i}", dist.Bernoulli(logits=logits).to_event(1))

    return model, guide


def make_step(name: str, widths: list[int], particles: int, x: Array) -> tuple[Callable, Any]:
    """Makes the pure ``update(state, x)`` of one contender and its first state."""
    key = random.key(0)
    if name == "by-hand":
        return ByHand(particles).update, (make_layers(key, widths), key)
    svi = make_front_end(name, widths, particles)
    return svi.update, svi.init(key, x)


def make_front_end(name: str, widths: list[int], particles: int) -> Any:
    """Makes the object with ``init``, ``update`` and ``run`` of one contender."""
    model, guide = make_programs(widths)
    optim = numpyro.optim.SGD(2e-3)
    if name == "renyi":
        return SVI(model, guide, optim, RenyiELBO(alpha=0.0, num_particles=particles))
    if name == "rws":
        return nh.RWS(model, guide, optim, num_particles=particles)
    natural = nh.NaturalRWS
    return natural(model, guide, optim, num_particles=particles, fisher=name, refresh_every=1)


def timed(block: Callable) -> float:
    """Seconds that a block takes until its result is there."""
    start = time.perf_counter()
    jax.block_until_ready(block())
    return time.perf_counter() - start


class Block:
    """Some steps of one contender under ``lax.scan``; each call goes on where the last ended.

    Args:
        update: ``(state, x) -> (state, loss)``. state: the first.
        x: minibatches, (batches, batch size, width), taken in turn. steps: in a block.
    """

    def __init__(self, update: Callable, state: Any, x: Array, steps: int) -> None:
        self.state, self.x, self.done = state, x, 0

        def scan(state: Any, x: Array, done: Array) -> Any:
            turns = (done + jnp.arange(steps)) % len(x)
            return lax.scan(lambda s, i: update(s, x[i]), state, turns)

        self.steps, self.scan = steps, jax.jit(scan)

    def __call__(self) -> Any:
        self.state, losses = self.scan(self.state, self.x, self.done)
        self.done += self.steps
        return self.state, losses


def minibatches(args: argparse.Namespace, width: int) -> Array:
    """Binary images, (batches, batch size, width): MNIST's where a folder is given."""
    shape = (BATCHES, args.batch_size, width)
    if args.folder:
        images = load("mnist", binarize="threshold", folder=args.folder).train
        return jnp.asarray(images[: BATCHES * args.batch_size], jnp.float32).reshape(shape)
    return random.bernoulli(random.key(args.seed), 0.2, shape).astype(jnp.float32)


def measure(args: argparse.Namespace, widths: list[int], x: Array) -> dict[str, dict]:
    """Times the contenders in turn: seconds to compile, milliseconds per step."""
    blocks: dict[str, Block] = {}
    results: dict[str, dict] = {}
    for name in args.methods:
        blocks[name] = Block(*make_step(name, widths, args.particles, x[0]), x, args.steps)
        first = timed(blocks[name])
        results[name] = {"compile_s": first - timed(blocks[name]), "ms": []}
        for _ in range(0, args.warm_up, args.steps):
            timed(blocks[name])  # waits: else it would run on into the next one's time
    for _ in range(args.repetitions):
        for name, block in blocks.items():
            results[name]["ms"].append(timed(block) / args.steps * 1e3)
    return results


def measure_bars(args: argparse.Namespace, widths: list[int], x: Array) -> dict[str, dict]:
    """Times ``run`` of the front ends with and without its progress bar."""
    runs: dict[str, Callable] = {}
    for name in args.methods:
        if name == "by-hand":
            continue
        svi = make_front_end(name, widths, args.particles)
        state = svi.init(random.key(0), x[0])
        for bar in (True, False):
            label = f"{name}, {'bar' if bar else 'no bar'}"
            runs[label] = partial(
                svi.run, random.key(0), args.steps, x[0], init_state=state, progress_bar=bar
            )
    results: dict[str, dict] = {}
    for label, run in runs.items():
        first = timed(lambda run=run: run().losses)
        results[label] = {"compile_s": first - timed(lambda run=run: run().losses), "ms": []}
    for _ in range(args.repetitions):
        for label, run in runs.items():
            results[label]["ms"].append(timed(lambda run=run: run().losses) / args.steps * 1e3)
    return results


def report(results: dict[str, dict], args: argparse.Namespace) -> None:
    """Prints the table and writes the JSON file."""
    table = Table(
        title=f"{args.network}: B = {args.batch_size}, S = {args.particles}, "
        f"{jax.default_backend()}, {args.steps} steps in a block"
    )
    bases = [name for name in ("by-hand", "renyi", "rws") if name in results]
    for column in (
        "step",
        "median ms",
        "mean ms",
        "min ms",
        *(f"/ {b}" for b in bases),
        "compile s",
    ):
        table.add_column(column, justify="left" if column == "step" else "right")
    for name, result in results.items():
        result["median"], result["min"] = statistics.median(result["ms"]), min(result["ms"])
        result["mean"] = statistics.fmean(result["ms"])
        cells = [name, *(f"{result[key]:.3f}" for key in ("median", "mean", "min"))]
        for base in bases:
            pairs = zip(result["ms"], results[base]["ms"], strict=True)
            result[f"ratio_to_{base}"] = statistics.median(a / b for a, b in pairs)
            cells.append(f"{result[f'ratio_to_{base}']:.2f}")
        table.add_row(*cells, f"{result['compile_s']:.1f}")
    show(table, 120)
    if args.json:
        settings = {key: value for key, value in vars(args).items() if key != "json"}
        record = {"settings": settings, "jax": jax.__version__, "results": results}
        args.json.write_text(json.dumps(record, indent=1) + "\n")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--network", choices=NETWORKS, default="mnist")
    parser.add_argument("--methods", default=",".join(METHODS), help="contenders, with commas")
    parser.add_argument("--steps", type=int, default=20, help="steps in a timed block")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--warm-up", type=int, default=200, help="steps that are not timed")
    parser.add_argument("--folder", help="MNIST's IDX files, to run on its images, not on noise")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--particles", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bars", action="store_true", help="time run with and without its bar")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.methods = args.methods.split(",")
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"unknown methods {sorted(unknown)}; there are {METHODS}")

    widths = NETWORKS[args.network]
    if args.folder and widths[0] != 784:
        parser.error(f"--folder is for networks of 784 pixels, not of {widths[0]}")
    x = minibatches(args, widths[0])
    report((measure_bars if args.bars else measure)(args, widths, x), args)


if __name__ == "__main__":
    main()
