"""The time of one step of a variational autoencoder, against NumPyro's ``Trace_ELBO``.

    python benchmarks/numpyro_vae_step_time.py
    python benchmarks/numpyro_vae_step_time.py --particles 10 --methods host,path,price
    python benchmarks/numpyro_vae_step_time.py --learn 2000 --folder data/mnist --seeds 0,1,2

Every contender's step runs under ``jit`` and ``lax.scan``. All are timed in one run, in turn,
block after block; the ratios to the host are medians of the ratios within a repetition, so that a
busy neighbour slows both sides. ``--learn`` trains each of them for that many steps on MNIST
instead, from the same parameters and on the same minibatches, and prints the test ELBO of each
seed.
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
from jax import Array, lax, random
from numpyro.infer import SVI, Trace_ELBO
from numpyro_step_time import timed

import numpyro_helmholtz as nh
from numpyro_helmholtz.datasets import load

OPTIONS: dict[str, dict[str, str]] = {
    "host": {},
    "path": {},
    "price": {"estimator": "price"},
    "price-exact": {"estimator": "price", "hessian": "exact"},
    "path-closed": {"entropy": "closed"},
    "path-rank-one": {},
}


def make_programs(pixels: int, hidden: int, latent: int, rank_one: bool) -> tuple:
    """Makes a variational autoencoder with smooth activations, as Price's theorem needs them.

    Returns:
        ``model(x)`` and ``guide(x)``, with ``x`` of shape ``(n, pixels)``.
    """

    def linear(name: str, fan_in: int, fan_out: int) -> Callable:
        def init(key: Array) -> Array:
            bound = 1 / math.sqrt(fan_in)
            return random.uniform(key, (fan_in, fan_out), minval=-bound, maxval=bound)

        weight = numpyro.param(f"{name}.weight", init)
        bias = numpyro.param(f"{name}.bias", jnp.zeros(fan_out))
        return lambda h: h @ weight + bias

    def model(x: Array) -> None:
        first, last = linear("decoder1", latent, hidden), linear("decoder2", hidden, pixels)
        with numpyro.plate("data", len(x)):
            z = numpyro.sample("z", dist.Normal(jnp.zeros((len(x), latent)), 1.0).to_event(1))
            logits = last(jax.nn.softplus(first(z)))
            numpyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(x: Array) -> None:
        heads = 3 if rank_one else 2
        first, last = linear("encoder1", pixels, hidden), linear("encoder2", hidden, heads * latent)
        with numpyro.plate("data", len(x)):
            loc, log_scale, *rest = jnp.split(last(jax.nn.softplus(first(x))), heads, -1)
            if rank_one:
                q: Any = nh.RankOnePrecisionNormal(loc, rest[0], jnp.exp(-2 * log_scale))
            else:
                q = dist.Normal(loc, jnp.exp(log_scale)).to_event(1)
            numpyro.sample("z", q)

    return model, guide


def make_front_end(name: str, args: argparse.Namespace) -> Any:
    """The object with ``init`` and ``update`` of one contender."""
    model, guide = make_programs(784, args.hidden, args.latent, "rank-one" in name)
    optim = numpyro.optim.Adam(args.rate)
    if name == "host":
        return SVI(model, guide, optim, Trace_ELBO(num_particles=args.particles))
    options: dict[str, Any] = dict(OPTIONS[name])
    return nh.StochasticBackprop(
        model, guide, optim, args.particles, max_plate_nesting=1, **options
    )


def measure(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """Milliseconds of each block, the ratio to the first contender within a repetition."""
    x = random.bernoulli(random.key(args.seed), 0.2, (args.batch_size, 784)).astype(jnp.float32)
    blocks: dict[str, Callable] = {}
    results: dict[str, dict] = {}
    for name in names:
        svi = make_front_end(name, args)
        state = svi.init(random.key(args.seed), x)

        @jax.jit
        def scan(state: Any, x: Array, svi: Any = svi) -> Any:
            return lax.scan(lambda s, _: svi.update(s, x), state, None, args.steps)[1]

        blocks[name] = partial(scan, state, x)
        first = timed(blocks[name])
        results[name] = {"compile_s": first - timed(blocks[name]), "ms": []}
    for repetition in range(args.repetitions):
        for name in names if repetition % 2 else reversed(names):
            results[name]["ms"].append(1e3 * timed(blocks[name]) / args.steps)
    for result in results.values():
        times, base = result["ms"], results[names[0]]["ms"]
        result["median_ms"], result["min_ms"] = statistics.median(times), min(times)
        pairs = zip(times, base, strict=True)
        result["median_ratio"] = statistics.median(a / b for a, b in pairs)
        result["min_ratio"] = min(times) / min(base)
    return results


def learn(names: list[str], args: argparse.Namespace) -> dict[str, dict]:
    """The test ELBO after ``--learn`` steps, by seed."""
    data = load("mnist", folder=args.folder)
    train, test = jnp.asarray(data.train), jnp.asarray(data.test)
    results: dict[str, dict] = {name: {"elbo": [], "seconds": []} for name in names}
    for name in names:
        svi = make_front_end(name, args)
        programs = make_programs(784, args.hidden, args.latent, "rank-one" in name)
        evaluation = jax.jit(
            lambda key, params, p=programs: Trace_ELBO().loss(key, params, *p, test)
        )

        @jax.jit
        def run(state: Any, train: Array, key: Array, svi: Any = svi) -> Any:
            def step(state: Any, key: Array) -> tuple[Any, Array]:
                index = random.randint(key, (args.batch_size,), 0, len(train))
                return svi.update(state, train[index])

            return lax.scan(step, state, random.split(key, args.learn))[0]

        for seed in args.seeds:
            key, order = random.split(random.key(seed))
            state = svi.init(key, train[: args.batch_size])
            if name != "host":  # the same start as the host's
                start = make_front_end("host", args) if "rank-one" not in name else svi
                host = start.init(key, train[: args.batch_size])
                params = start.get_params(host)
                state = svi.init(key, train[: args.batch_size], init_params=params)
            began = time.perf_counter()
            state = jax.block_until_ready(run(state, train, order))
            results[name]["seconds"].append(time.perf_counter() - began)
            params = svi.get_params(state)
            losses = [evaluation(random.key(1000 + i), params) for i in range(4)]
            results[name]["elbo"].append(-float(sum(losses)) / 4 / len(test))
    return results


def report(results: dict[str, dict]) -> None:
    """One line for each contender."""
    for name, result in results.items():
        cells = []
        for key, value in result.items():
            if key == "ms":
                continue
            values = value if isinstance(value, list) else [value]
            cells.append(f"{key} " + " ".join(f"{v:.3f}" for v in values))
        print(f"{name:14s} " + "   ".join(cells))
        if len(result.get("elbo", [])) > 1:
            elbo = result["elbo"]
            spread = statistics.stdev(elbo) / math.sqrt(len(elbo))
            print(f"{'':14s} mean {statistics.mean(elbo):.3f} ± {spread:.3f}")


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--methods", default="host,path,price", help=f"of {list(OPTIONS)}; ratios to the first"
    )
    parser.add_argument("--steps", type=int, default=20, help="steps in a timed block")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--particles", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=400)
    parser.add_argument("--latent", type=int, default=20)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--learn", type=int, default=0, metavar="STEPS")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--folder", type=Path, help="of the MNIST files")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.seeds = [int(seed) for seed in args.seeds.split(",")]
    names = args.methods.split(",")
    if unknown := set(names) - set(OPTIONS):
        parser.error(f"unknown methods {sorted(unknown)}; there are {list(OPTIONS)}")
    results = learn(names, args) if args.learn else measure(names, args)
    report(results)
    if args.json:
        settings = {key: str(value) for key, value in vars(args).items()}
        args.json.write_text(
            json.dumps({"settings": settings, "results": results}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
