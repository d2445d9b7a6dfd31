"""Learning curves of RWS and natural RWS in NumPyro, and the time of one epoch.

    python benchmarks/numpyro_learning.py --time-epoch --folder data/mnist --json epoch.jsonl
    python benchmarks/numpyro_learning.py --folder data/mnist --epochs 20 --seeds 0,1,2 \
        --json learning.jsonl --checkpoint learning.pickle --figure docs/numpyro_learning.png
    python benchmarks/numpyro_learning.py --data mnist14 --layers 100,50,20,10,10 --seconds 90 \
        --every 0.2 --methods rws-sgd,natural --grid rws-sgd=0.1,0.2
    python benchmarks/numpyro_learning.py --data digits --layers 20,10 --epochs 2
    python benchmarks/numpyro_learning.py --draw learning.jsonl --figure docs/numpyro_learning.png

The data are on the device, and all updates between two evaluations are one compiled call
(``lax.scan``), compiled before the clock starts. The clock stands still during evaluation, whose
random keys are apart from those of training. Every method starts from the same parameters for a
seed and sees the data in the same order. The rates of ``--grid`` and ``--lr`` are tried one by
one; ``rws-average`` is SGD with averaged parameters, as the natural estimators have by default;
``natural`` without options runs the library's defaults.

With ``--time-epoch`` whole epochs are timed instead, of all methods in turn, one call each. By
default that is MNIST with the thesis's twelve hidden layers, 1,875 minibatches of 32, K = 10.

With ``--checkpoint`` the state is saved at each evaluation; the same command goes on from it, to
the same results. The device is JAX's first (``JAX_PLATFORMS=cpu`` chooses another).
"""

from __future__ import annotations

import argparse
import math
import pickle
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import optax
from common import append_lines, describe, read_lines, settings, show
from jax import Array, lax, random
from learning_report import draw, learning_table
from numpyro_step_time import NETWORKS, make_programs, timed
from rich.table import Table

import numpyro_helmholtz as nh
from numpyro_helmholtz.datasets import load
from numpyro_helmholtz.quickstart import Batches

RATES: dict[str, list] = {
    "rws-sgd": [0.02, 0.05, 0.1, 0.2],
    "rws-average": [0.2],
    "rws-adam": [0.001, 0.003],
    "natural": [None],
}
SGD_OPTIONS = {"lr": "learning_rate", "momentum": "momentum", "nesterov": "nesterov"}
THESIS = ",".join(map(str, NETWORKS["thesis"][1:]))
# What must be the same for a run to go on from a checkpoint.
IDENTITY = (
    "data",
    "binarize",
    "validate",
    "layers",
    "epochs",
    "seconds",
    "every",
    "batch_size",
    "particles",
    "eval_particles",
    "eval_images",
    "curve_particles",
    "seeds",
)


def images(args: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """The binary training and test images, shapes ``(n, pixels)``."""
    folder = {} if args.data == "digits" else {"folder": args.folder}
    if args.data != "mnist14":
        data = load(args.data, binarize=args.binarize, **folder)
        return data.train, data.test
    data = load("mnist", binarize=None, **folder)
    rng = np.random.default_rng(0)

    def small(grey: np.ndarray) -> np.ndarray:
        pooled = grey.reshape(-1, 14, 2, 14, 2).mean((2, 4)).reshape(-1, 196)
        sampled = args.binarize == "sample"
        ones = rng.random(pooled.shape) < pooled if sampled else pooled >= 0.5
        return ones.astype(np.float32)

    return small(data.train), small(data.test)


class Method:
    """A method with its options: compiled, and started from any seed.

    Args:
        name: the method. options: of the optimiser and of the estimator.
        programs: model and guide. data: training images on the device. steps: in one call.
    """

    def __init__(
        self,
        name: str,
        options: dict,
        programs: tuple,
        data: Array,
        steps: int,
        args: argparse.Namespace,
    ) -> None:
        self.svi = make_front_end(name, options, programs, args.particles)
        self.data, self.size = data, args.batch_size
        state, rows = self.start(0), np.zeros((steps, self.size), np.int32)
        began = time.perf_counter()
        self._call = jax.jit(self._many).lower(state, data, rows).compile()
        self.compile_s = time.perf_counter() - began

    def start(self, seed: int) -> Any:
        """The state before the first step."""
        return self.svi.init(random.key(seed), self.data[: self.size])

    def _many(self, state: Any, data: Array, rows: Array) -> tuple[Any, Array]:
        return lax.scan(lambda state, row: self.svi.update(state, data[row]), state, rows)

    def advance(self, state: Any, rows: np.ndarray) -> tuple[Any, Array]:
        """As many steps as there are rows, each the numbers of a minibatch; their losses."""
        return self._call(state, self.data, jnp.asarray(rows, jnp.int32))


def make_front_end(name: str, options: dict, programs: tuple, particles: int) -> Any:
    """Makes the object with ``init`` and ``update``."""
    common = {"num_particles": particles, "max_plate_nesting": 1}
    if name == "rws-adam":
        return nh.RWS(*programs, numpyro.optim.Adam(options["lr"]), **common)
    sgd = {SGD_OPTIONS[key]: value for key, value in options.items() if key in SGD_OPTIONS}
    if sgd and "lr" not in options:
        raise ValueError(f"the options {sgd} of SGD need an lr beside them")
    optim = optax.sgd(**sgd) if sgd else None
    if name in ("rws-sgd", "rws-average"):
        return nh.RWS(*programs, optim, average=name == "rws-average", **common)
    rest = {key: value for key, value in options.items() if key not in SGD_OPTIONS}
    return nh.NaturalRWS(*programs, optim, **(common | rest))


def evaluate(
    programs: tuple, params: dict, test: Array, particles: int, seed: int
) -> nh.LogLikelihood:
    """The test log-likelihood, with a random key of its own."""
    return nh.log_likelihood(
        random.key(seed + 1_000_000),
        params,
        *programs,
        test,
        num_particles=particles,
        particles_at_once=min(100, particles),
        batch=min(100, len(test)),
        max_plate_nesting=1,
    )


class Checkpoint:
    """What has been done, in a file that is written anew after each evaluation.

    Args:
        path: the file, or None for none. identity: what must be the same to go on.

    Raises:
        ValueError: the file is of another command.
    """

    def __init__(self, path: Path | None, identity: dict) -> None:
        self.path, self.identity = path, identity
        self.done: list[dict] = []
        self.running: dict | None = None
        if path is None or not path.exists():
            return
        saved = pickle.loads(path.read_bytes())
        if other := [key for key in identity if saved["identity"].get(key) != identity[key]]:
            raise ValueError(f"{path} is of another command: it differs in {', '.join(other)}")
        self.done, self.running = saved["done"], saved["running"]

    def save(self) -> None:
        """Writes the file; one that is half written never takes its name."""
        if self.path is None:
            return
        kept = {"identity": self.identity, "done": self.done, "running": self.running}
        half = self.path.with_name(self.path.name + ".part")
        half.write_bytes(pickle.dumps(kept))
        half.replace(self.path)


def train(
    method: Method,
    record: dict,
    programs: tuple,
    test: Array,
    args: argparse.Namespace,
    checkpoint: Checkpoint,
) -> None:
    """Trains once, or goes on; fills in the record for the JSON file."""
    seed, per_epoch = record["seed"], len(method.data) // args.batch_size
    steps = chunk_steps(args, per_epoch)
    limit = math.inf if args.epochs is None else math.ceil(args.epochs * per_epoch)
    if checkpoint.running is None:
        batches, state = Batches(len(method.data), args.batch_size, seed), method.start(seed)
        checkpoint.running = {"record": record, "state": state, "batches": batches}
    else:
        record |= checkpoint.running["record"]
        state, batches = checkpoint.running["state"], checkpoint.running["batches"]
    try:
        while record["steps"] < limit and not over(record["seconds"], args.seconds):
            if not record["curve"]:
                add_point(record, programs, method.svi.get_params(state), test, args)
            rows = batches.next(steps)
            began = time.perf_counter()
            state, losses = jax.block_until_ready(method.advance(state, rows))
            record["seconds"] += time.perf_counter() - began
            record["steps"] += steps
            record["epochs"] = record["steps"] / per_epoch
            if not np.isfinite(losses).all():
                step = record["steps"] - steps + int(np.argmin(np.isfinite(losses))) + 1
                raise FloatingPointError(f"the loss of step {step} is not finite")
            add_point(record, programs, method.svi.get_params(state), test, args)
            checkpoint.running = {"record": dict(record), "state": state, "batches": batches}
            checkpoint.save()
        final = evaluate(programs, method.svi.get_params(state), test, args.eval_particles, seed)
        record |= {"log_p": final.mean, "stderr": final.stderr}
        record |= {"ess": float(final.ess.mean())}
        record |= {"khat_above_0.7": float((np.asarray(final.khat) > 0.7).mean())}
    except (ArithmeticError, ValueError) as error:  # a run that diverges
        record["error"] = f"{type(error).__name__}: {error}".splitlines()[0]
    checkpoint.running = None


def over(seconds: float, limit: float | None) -> bool:
    """Whether the time is up."""
    return limit is not None and seconds >= limit


def chunk_steps(args: argparse.Namespace, per_epoch: int) -> int:
    """Updates between two evaluations."""
    return max(1, round(args.every * per_epoch))


def add_point(
    record: dict, programs: tuple, params: dict, test: Array, args: argparse.Namespace
) -> None:
    """Evaluates; adds seconds, steps, test log p and its standard error to the curve."""
    found = evaluate(programs, params, test, args.curve_particles, record["seed"])
    record["curve"].append([record["seconds"], record["steps"], found.mean, found.stderr])
    name = f"{record['method']} ({describe(record['options'])}), seed {record['seed']}"
    text = f"{name}: {record['epochs']:.2f} epochs, {record['seconds']:.1f} s, {found.mean:.2f}"
    print(text, file=sys.stderr, flush=True)


def learn(runs: list, data: tuple, args: argparse.Namespace, checkpoint: Checkpoint) -> list[dict]:
    """Every setting with every seed; JSON lines as they come."""
    x, test = jnp.asarray(data[0]), jnp.asarray(data[1][: args.eval_images])
    programs = make_programs([x.shape[1], *map(int, args.layers.split(","))])
    methods: dict[str, Method] = {}
    todo = [(name, options, seed) for seed in args.seeds for name, options in runs]
    for name, options, seed in todo[len(checkpoint.done) :]:
        key = f"{name} {describe(options)}"
        if key not in methods:
            steps = chunk_steps(args, len(x) // args.batch_size)
            methods[key] = Method(name, options, programs, x, steps, args)
        record: dict[str, Any] = {"method": name, "options": options, "seed": seed, "curve": []}
        record |= {"error": None, "seconds": 0.0, "steps": 0, "epochs": 0.0}
        train(methods[key], record, programs, test, args, checkpoint)
        record["compile_s"] = methods[key].compile_s
        result = record["error"] or f"{record['log_p']:.2f} in {record['seconds']:.1f} s"
        print(f"{name} ({describe(options)}), seed {seed}: {result}", flush=True)
        append_lines(args.json, [shared(args) | record])
        checkpoint.done.append(record)
        checkpoint.save()
    return [shared(args) | record for record in checkpoint.done]


def shared(args: argparse.Namespace) -> dict[str, Any]:
    """What every JSON line says."""
    keys = ("data", "binarize", "validate", "layers", "batch_size", "particles")
    found = {key: getattr(args, key) for key in (*keys, "eval_particles", "eval_images")}
    found |= {"jax": jax.__version__, "backend": jax.default_backend()}
    return found | {"device": jax.devices()[0].device_kind}


def time_epochs(runs: list, data: tuple, args: argparse.Namespace) -> None:
    """Times epochs, one call each, of one setting of each method; table and JSON lines."""
    x = jnp.asarray(data[0])
    programs = make_programs([x.shape[1], *map(int, args.layers.split(","))])
    steps = len(x) // args.batch_size
    names = {name: options for name, options in runs}
    methods = {n: Method(n, options, programs, x, steps, args) for n, options in names.items()}
    states = {name: method.start(args.seeds[0]) for name, method in methods.items()}
    seconds: dict[str, list[float]] = {name: [] for name in methods}
    batches = Batches(len(x), args.batch_size, args.seeds[0])

    def epoch(name: str, rows: np.ndarray) -> Array:
        states[name], losses = methods[name].advance(states[name], rows)
        return losses

    for _ in range(args.repetitions):
        rows = batches.next(steps)
        for name in methods:
            seconds[name].append(timed(lambda n=name, r=rows: epoch(n, r)))
    table = Table(
        title=f"seconds of an epoch: {args.data}, {args.layers}, {steps} steps, "
        f"B = {args.batch_size}, K = {args.particles}, {jax.devices()[0].device_kind}"
    )
    base = next(iter(methods))
    columns = ("first", "median", "min", "ms / step", f"/ {base}", "compile s")
    for column in ("method", "options", *columns):
        table.add_column(column, justify="right" if column in columns else "left")
    for name, times in seconds.items():
        ratio = statistics.median(a / b for a, b in zip(times, seconds[base], strict=True))
        median = statistics.median(times)
        cells = [f"{value:.2f}" for value in (times[0], median, min(times))]
        cells += [f"{1e3 * median / steps:.2f}", f"{ratio:.2f}", f"{methods[name].compile_s:.1f}"]
        table.add_row(name, describe(names[name]), *cells)
        record = {"method": name, "options": names[name], "steps": steps, "epoch_s": times}
        record |= {"median": median, "min": min(times), f"ratio_to_{base}": ratio}
        record |= {"compile_s": methods[name].compile_s}
        append_lines(args.json, [shared(args) | record])
    show(table)


def report(records: list[dict]) -> None:
    """Prints one row for each setting, the mean over its seeds."""
    first, seeds = records[0], {record["seed"] for record in records}
    title = f"{first['data']}, {first['layers']}, {len(seeds)} seeds, {first['device']}"
    show(learning_table(records, title))


def make_parser() -> argparse.ArgumentParser:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--time-epoch", action="store_true", help="time whole epochs, evaluate nothing")
    add("--repetitions", type=int, default=3, help="epochs of each method with --time-epoch")
    add("--data", choices=["mnist", "mnist14", "digits"], default="mnist")
    add("--folder", help="where MNIST's IDX files are")
    add(
        "--validate",
        action="store_true",
        help="to choose settings: test on a fifth of the training images, train on the others",
    )
    add("--binarize", choices=["threshold", "sample"], default="threshold")
    add("--layers", default=THESIS, help=f"hidden layers, bottom first; {THESIS} by default")
    add("--methods", default=",".join(RATES), help=f"of {', '.join(RATES)}, with commas")
    add("--lr", help="rates for every method, with commas")
    add(
        "--grid",
        action="append",
        default=[],
        metavar="METHOD=LR,LR",
        help=f"rates of a method, may be repeated; by default {RATES}",
    )
    add(
        "--natural",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="options of NaturalRWS and of its SGD, key=value with commas; may be repeated",
    )
    add("--seeds", default="0", help="with commas")
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epochs", type=float, help="5 by default")
    budget.add_argument("--seconds", type=float, help="of training; the last call is finished")
    add("--every", type=float, default=1.0, help="epochs between two evaluations: one call")
    add("--batch-size", type=int, default=32)
    add("--particles", type=int, default=10)
    add("--eval-particles", type=int, default=1_000, help="of the last evaluation")
    add("--eval-images", type=int, default=2_000)
    add("--curve-particles", type=int, default=100, help="of the evaluations before")
    add("--checkpoint", type=Path, help="file to save to at each evaluation and to go on from")
    add("--json", type=Path, help="file to append one line for each run to")
    add("--figure", type=Path, help="such as docs/numpyro_learning.png")
    add("--draw", type=Path, metavar="JSON", help="train nothing; report and draw these lines")
    return parser


def main() -> None:
    """Runs the command line."""
    parser = make_parser()
    args = parser.parse_args()
    if args.epochs is None and args.seconds is None:
        args.epochs = 5.0
    try:
        runs = settings(args, RATES)
        args.seeds = [int(seed) for seed in args.seeds.split(",")]
    except ValueError as error:
        parser.error(str(error))
    if args.draw:
        records = [record for record in read_lines(args.draw) if "curve" in record]
    else:
        data = images(args)
        if args.validate:
            held_out = len(data[0]) // 5
            data = data[0][:-held_out], data[0][-held_out:]
        if len(data[0]) < args.batch_size:
            parser.error(f"--batch-size {args.batch_size} is more than the {len(data[0])} images")
        if args.time_epoch:
            time_epochs(runs, data, args)
            return
        identity = {key: getattr(args, key) for key in IDENTITY} | {"runs": runs}
        try:
            checkpoint = Checkpoint(args.checkpoint, identity)
        except ValueError as error:
            parser.error(str(error))
        records = learn(runs, data, args, checkpoint)
    report(records)
    if args.figure:
        draw(records, args.figure)


if __name__ == "__main__":
    main()
