"""The main job: RWS and NaturalRWS side by side on real images.

``python -m pyro_helmholtz.quickstart`` trains a sigmoid belief network twice, from the same
start and for the same wall-clock time, once by reweighted wake-sleep and once by its natural
gradient. It prints a table of test log-likelihoods and writes a figure. The network is an
ordinary pair of Pyro programs, with no mark of the estimators that train it:

    h_L ~ Bernoulli(σ(b)),  h_l ~ Bernoulli(σ(W_l h_{l+1} + b_l)),  x ~ Bernoulli(σ(W_0 h_1 + b_0))

and the guide runs the same chain upwards.

``--backend numpyro`` does the same job with ``numpyro_helmholtz``. That package's ``quickstart``
has the network and its training; table, figure and options are written here alone. What happens
once in a process, compilation above all, is done before the clock starts.
"""

from __future__ import annotations

import argparse
import importlib
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro import poutine
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table
from torch import Tensor, nn

import pyro_helmholtz as ph
from pyro_helmholtz import datasets

__all__ = [
    "Result",
    "SigmoidBeliefNetwork",
    "Training",
    "datasets",
    "main",
    "train",
    "training",
]

ESTIMATORS = {"RWS": ph.RWS, "NaturalRWS": ph.NaturalRWS}
CURVE_POINTS = 12
CURVE_IMAGES, CURVE_PARTICLES = 200, 100
FINAL_IMAGES, FINAL_PARTICLES = 500, 1000
SHOWN = 40


class SigmoidBeliefNetwork:
    """Layers of binary units, each the parent of the one below; the lowest is the data.

    Args:
        sizes: Units of each layer from the data upwards, for example ``(64, 48, 24, 12)``.
        mean: Mean of the data, shape (sizes[0],); gives the first bias of the visible layer.
    """

    def __init__(self, sizes: Sequence[int], mean: Tensor) -> None:
        if len(sizes) < 2 or min(sizes) < 1:
            raise ValueError(f"A network needs at least one hidden layer of units, got {sizes}.")
        below, above = sizes[:-1], sizes[1:]
        self.top = sizes[-1]
        # Number l maps layer l+1 to layer l in the model, and layer l to layer l+1 in the guide.
        self.generative = nn.ModuleList(map(nn.Linear, above, below)).to(mean)
        self.recognition = nn.ModuleList(map(nn.Linear, below, above)).to(mean)
        with torch.no_grad():
            visible = dict(self.generative[0].named_parameters())
            visible["bias"].copy_(mean.clamp(0.01, 0.99).logit())

    def model(self, x: Tensor) -> None:
        """Generate from the top layer down to the data; x: (data, pixels)."""
        pyro.module("generative", self.generative)
        logits = pyro.param("top", x.new_zeros(self.top))
        with pyro.plate("data", len(x)):
            for level in range(len(self.generative), 0, -1):
                h = pyro.sample(f"h{level}", dist.Bernoulli(logits=logits).to_event(1))
                logits = self.generative[level - 1](h)
            pyro.sample("x", dist.Bernoulli(logits=logits).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        """Recognise from the data up to the top layer; x: (data, pixels)."""
        pyro.module("recognition", self.recognition)
        h = x
        with pyro.plate("data", len(x)):
            for level, layer in enumerate(self.recognition, start=1):
                h = pyro.sample(f"h{level}", dist.Bernoulli(logits=layer(h)).to_event(1))

    @torch.no_grad()
    def dream(self, x: Tensor) -> Tensor:
        """Means of the visible layer under the model, as many as x has rows."""
        return _visible_mean(poutine.uncondition(self.model), x)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """Means of the visible layer given hidden units that the guide draws for x."""
        recognised = poutine.trace(self.guide).get_trace(x)
        return _visible_mean(poutine.replay(self.model, trace=recognised), x)


def _visible_mean(program: Any, x: Tensor) -> Tensor:
    visible: Any = poutine.trace(program).get_trace(x).nodes["x"]["fn"]
    return visible.mean


@dataclass
class Result:
    """What one estimator reached.

    Attributes:
        name: the estimator.
        log_likelihood: mean over test images, by importance sampling, in nats.
        stderr: its standard error.
        ess: effective sample size, mean over test images.
        seconds: training time, without the evaluations.
        before: seconds before the clock started: compilation, a rehearsal.
        steps: number of updates.
        curve: pairs of training seconds and a rougher test log-likelihood.
        samples: visible means of dreams, (images, pixels).
        reconstructions: visible means given test images, (images, pixels).
    """

    name: str
    log_likelihood: float = math.nan
    stderr: float = math.nan
    ess: float = math.nan
    seconds: float = 0.0
    before: float = 0.0
    steps: int = 0
    curve: list[tuple[float, float]] = field(default_factory=list)
    samples: np.ndarray = field(default_factory=lambda: np.empty(0))
    reconstructions: np.ndarray = field(default_factory=lambda: np.empty(0))


class Batches:
    """Endless minibatches, shuffled anew at each pass, the same for every estimator."""

    def __init__(self, data: Tensor, size: int, seed: int) -> None:
        self.data, self.size = data, min(size, len(data))
        self.generator = torch.Generator().manual_seed(seed)
        self.order: list[Tensor] = []

    def next(self) -> Tensor:
        """The next minibatch, shape (size, pixels)."""
        if not self.order:
            order = torch.randperm(len(self.data), generator=self.generator)
            whole = len(order) // self.size * self.size
            self.order = list(order[:whole].to(self.data.device).split(self.size))
        return self.data[self.order.pop()]


class Training:
    """One network, one estimator and its minibatches.

    A rehearsal with others takes what a process pays only once (imports, allocators, kernels)
    off the clock of the estimator that happens to come first.

    Args:
        name: the estimator. data: training images, (images, pixels). args: the job's options.
    """

    def __init__(self, name: str, data: Tensor, args: argparse.Namespace) -> None:
        self.device = args.device
        data = data.to(self.device)
        for steps in (3, 0):
            pyro.clear_param_store()
            pyro.set_rng_seed(args.seed)
            self.net = SigmoidBeliefNetwork((data.shape[1], *args.layers), data.mean(0))
            programs = self.net.model, self.net.guide
            self.svi: Any = ESTIMATORS[name](*programs, num_particles=args.particles)
            self.batches = Batches(data, args.batch_size, args.seed)
            for _ in range(steps):
                self.svi.step(self.batches.next())

    def advance(self, seconds: float) -> int:
        """Train for so many seconds; at least one step.

        Returns:
            The number of steps.
        """
        start, steps = time.perf_counter(), 0
        while not steps or time.perf_counter() - start < seconds:
            self.svi.step(self.batches.next())  # returns a float, so the device has finished
            steps += 1
        return steps

    def measure(self, x: Tensor, num_particles: int) -> ph.LogLikelihood:
        """Log-likelihood of images, (images, pixels)."""
        return ph.log_likelihood(
            self.net.model,
            self.net.guide,
            x.to(self.device),
            num_particles=num_particles,
            particles_at_once=100,
            batch=100,
        )

    def pictures(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Visible means of dreams and of reconstructions of x, each (images, pixels)."""
        x = x.to(self.device)
        return self.net.dream(x).cpu().numpy(), self.net.reconstruct(x).cpu().numpy()


@contextmanager
def training(name: str, data: Tensor, args: argparse.Namespace) -> Iterator[Training]:
    """A ``Training`` with a parameter store of its own."""
    with pyro.get_param_store().scope():
        yield Training(name, data, args)


def train(name: str, host: Any, data: Any, args: argparse.Namespace, bar: Progress) -> Result:
    """Train one network by one estimator and measure it.

    Args:
        name: the estimator. host: the quickstart module of the host's package.
        data: its data set. args: the job's options. bar: shows how far it is.
    """
    test = data.test[:FINAL_IMAGES]
    result = Result(name)
    task = bar.add_task(name, total=args.seconds, note="before the clock starts")
    start = time.perf_counter()
    with host.training(name, data.train, args) as trained:
        result.before = time.perf_counter() - start
        for point in range(1, CURVE_POINTS + 1):
            # Closer together at the start, where the curve is steep.
            until = args.seconds * (point / CURVE_POINTS) ** 2
            while result.seconds < until:
                start = time.perf_counter()
                result.steps += trained.advance(min(until - result.seconds, 0.25))
                result.seconds += time.perf_counter() - start
                bar.update(task, completed=result.seconds)
            rough = trained.measure(test[:CURVE_IMAGES], CURVE_PARTICLES)
            result.curve.append((result.seconds, float(rough.mean)))
            note = f"{result.steps} steps, test {float(rough.mean):.2f} nats"
            bar.update(task, note=note)
        final = trained.measure(test, FINAL_PARTICLES)
        result.log_likelihood, result.stderr = float(final.mean), float(final.stderr)
        result.ess = float(final.ess.mean())
        result.samples, result.reconstructions = trained.pictures(test[:SHOWN])
    return result


def table(results: Sequence[Result], data: Any) -> Table:
    """The results, one row for each estimator."""
    before = ", ".join(f"{r.name} {r.before:.1f} s" for r in results)
    shown = Table(
        title=f"{data.name}: {min(len(data.test), FINAL_IMAGES)} test images",
        caption=f"Compilation and rehearsal are not in the training time: {before}.",
    )
    shown.add_column("estimator")
    for heading in ("test log-lik. (nats)", "std. error", f"ESS of {FINAL_PARTICLES}"):
        shown.add_column(heading, justify="right")
    shown.add_column("training (s)", justify="right")
    shown.add_column("steps", justify="right")
    for r in results:
        numbers = (f"{r.log_likelihood:.2f}", f"{r.stderr:.2f}", f"{r.ess:.1f}")
        shown.add_row(r.name, *numbers, f"{r.seconds:.1f}", str(r.steps))
    return shown


def figure(results: Sequence[Result], data: Any, path: Path) -> None:
    """Write learning curves, samples and reconstructions to an image file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [("test images", data.test[:SHOWN])]
    panels += [(f"reconstructions, {r.name}", r.reconstructions) for r in results]
    panels += [(f"samples, {r.name}", r.samples) for r in results]

    fig = Figure(figsize=(9, 3.5 + 1.25 * len(panels)), layout="constrained")
    FigureCanvasAgg(fig)
    axes = fig.subplots(1 + len(panels), 1, height_ratios=[2.8] + [1.0] * len(panels))
    for r in results:
        axes[0].plot(*zip(*r.curve, strict=True), marker=".", label=r.name)
    axes[0].set(xlabel="training time (s)", ylabel="test log-likelihood (nats)", title=data.name)
    axes[0].grid(alpha=0.3)
    axes[0].legend()
    for ax, (title, images) in zip(axes[1:], panels, strict=True):
        ax.imshow(_mosaic(np.asarray(images), data.shape), cmap="gray_r", vmin=0, vmax=1)
        ax.set_title(title, fontsize=9)
        ax.axis("off")
    fig.savefig(path, dpi=120)


def _mosaic(images: np.ndarray, shape: tuple[int, int], rows: int = 2) -> np.ndarray:
    """Images (count, pixels) as one, in so many rows, with a white frame around each."""
    height, width = shape
    columns = math.ceil(len(images) / rows)
    images = np.pad(images, ((0, rows * columns - len(images)), (0, 0)))
    tiles = images.reshape(rows, columns, height, width)
    tiles = np.pad(tiles, ((0, 0), (0, 0), (1, 1), (1, 1)))
    return tiles.swapaxes(1, 2).reshape(rows * (height + 2), columns * (width + 2))


def _sizes(text: str) -> list[int]:
    sizes = [int(size) for size in text.split(",")]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"layers need at least one unit each, got {text!r}")
    return sizes


def _positive(kind: type) -> Any:
    def convert(text: str) -> Any:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"must be positive and finite, got {text!r}")
        return value

    return convert


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m pyro_helmholtz.quickstart",
        description="Train a sigmoid belief network by RWS and by NaturalRWS, side by side.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--data", default="digits", help="digits, mnist, fashion, or a folder of IDX files")
    add("--layers", type=_sizes, help="hidden layers upwards; None: 48,24,12, or 200,100 if large")
    add("--seconds", type=_positive(float), default=35.0, help="training time of each estimator")
    add("--particles", type=_positive(int), default=10, help="particles for each datum")
    add("--batch-size", type=_positive(int), default=32, help="images in a minibatch")
    add("--seed", type=int, default=0, help="of the pixels, the first parameters and the training")
    add("--device", default="cpu", help="a device of the host, such as cpu or cuda:0")
    add("--output", type=Path, default=Path("quickstart-output"), help="folder of the figure")
    add("--backend", choices=["pyro", "numpyro"], default="pyro", help="host language")
    return parser.parse_args(argv)


def _host(backend: str) -> Any:
    """The quickstart module of a host's package; the other host need not be installed."""
    try:
        return importlib.import_module(f"{backend}_helmholtz.quickstart")
    except ImportError as error:
        extras = f"pip install '.[{backend},tutorials]'"
        raise SystemExit(f"--backend {backend} needs its host: {extras} ({error})") from error


def main(argv: Sequence[str] | None = None) -> list[Result]:
    """Run the job.

    Args:
        argv: Command line without the program's name; by default the process's own.

    Returns:
        One result for each estimator.
    """
    args = _arguments(argv)
    host = _host(args.backend)
    console = Console()
    data = host.datasets.load(args.data, seed=args.seed)
    pixels = data.train.shape[1]
    args.layers = args.layers or ([48, 24, 12] if pixels < 256 else [200, 100])
    layers = "-".join(map(str, (pixels, *args.layers)))
    console.print(f"Sigmoid belief network {layers}, {len(data.train)} training images")
    columns = (TextColumn("{task.description:>10}"), BarColumn(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as bar:
        results = [train(name, host, data, args, bar) for name in ESTIMATORS]
    console.print(table(results, data))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"{Path(data.name).resolve().name}.png"
    figure(results, data, path)
    console.print(f"Figure: {path}", soft_wrap=True)
    return results


if __name__ == "__main__":
    main()
