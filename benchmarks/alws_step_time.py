"""The time of one update of ALWS beside one forward and backward pass of the generator.

    python benchmarks/alws_step_time.py
    python benchmarks/alws_step_time.py --threads 2 --channels 64 --json alws_step_time.json
    python benchmarks/alws_step_time.py --backend numpyro

The generator is DCGAN-like, 16 latents to 3 x 32 x 32 pixels. The reference runs it over the same
number of dreams, scores them, and goes back once: the least that any update by dreams costs.
All contenders are timed in one run, in turn; the ratios are medians of the ratios within a
repetition, so that a busy neighbour slows both sides.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

SIDE, COLOURS, LATENTS = 32, 3, 16
METHODS = ["features", "pixels", "random-features", "plain", "adapted"]


def make_contenders(args: argparse.Namespace) -> tuple[dict[str, Callable], Callable]:
    """The reference and the updates by name, and what waits for the device."""
    import pyro
    import pyro.distributions as dist
    import torch
    from torch import nn

    import pyro_helmholtz as ph

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device, c = args.device, args.channels
    data = torch.rand(args.batch, COLOURS, SIDE, SIDE, device=device)

    def make_generator() -> nn.Module:
        return nn.Sequential(
            nn.ConvTranspose2d(LATENTS, 4 * c, 4, 1, 0),
            nn.ReLU(),
            nn.ConvTranspose2d(4 * c, 2 * c, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(2 * c, c, 4, 2, 1),
            nn.ReLU(),
            nn.ConvTranspose2d(c, COLOURS, 4, 2, 1),
        ).to(device)

    def images(generator: nn.Module, z: torch.Tensor) -> torch.Tensor:
        flat = generator(z.reshape(-1, LATENTS, 1, 1))
        return flat.reshape(*z.shape[:-1], COLOURS, SIDE, SIDE)

    def make_update(name: str) -> Callable:
        generator = make_generator()

        def model(x: torch.Tensor) -> None:
            pyro.module(name, generator)
            with pyro.plate("data", len(x)):
                z = pyro.sample("z", dist.Normal(torch.zeros(LATENTS).to(x), 1.0).to_event(1))
                mean = images(generator, z)
                pyro.sample("x", dist.Normal(mean, torch.tensor(0.3).to(x)).to_event(3), obs=x)

        features = None if name == "pixels" else ph.LinearFeatures(300)
        kernel = ph.GaussianKernel(features=features, standardise=features is not None)
        options = {"kernel": kernel}
        if name == "random-features":
            options["gradient_model"] = name
        if name == "plain":
            options["exponential_family"] = False
        if name == "adapted":
            options["adapt"] = 1e-3
        optim = pyro.optim.Adam({"lr": 1e-4})
        svi = ph.ALWS(model, optim, args.sleep, max_plate_nesting=1, **options)
        return lambda: svi.step(data)

    generator = make_generator()

    def reference() -> float:
        z = torch.randn(args.sleep, LATENTS, device=device)
        mean = images(generator, z)
        dream = mean.detach() + 0.3 * torch.randn_like(mean)
        value = dist.Normal(mean, 0.3).log_prob(dream).sum()
        value.backward()
        return value.item()

    steps: dict[str, Callable] = {"reference": reference}
    steps.update({name: make_update(name) for name in args.methods.split(",")})
    return steps, torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def measure(steps: dict[str, Callable], wait: Callable, repetitions: int) -> dict[str, list]:
    """Seconds of each contender in each repetition, after one untimed call."""
    times: dict[str, list] = {name: [] for name in steps}
    for repetition in range(repetitions + 1):
        for name, step in steps.items():
            wait()
            start = time.perf_counter()
            step()
            wait()
            if repetition:
                times[name].append(time.perf_counter() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--backend", choices=["pyro", "numpyro"], default="pyro")
    parser.add_argument("--sleep", type=int, default=2000, help="dreams per update")
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--channels", type=int, default=32, help="width of the generator")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.backend == "numpyro":
        make = importlib.import_module("numpyro_alws_step_time").make_contenders
    else:
        make = make_contenders
    times = measure(*make(args), args.repetitions)
    results = {}
    for name, values in times.items():
        ratios = [t / r for t, r in zip(values, times["reference"], strict=True)]
        results[name] = {"seconds": statistics.median(values), "ratio": statistics.median(ratios)}
        print(f"{name:16s} {results[name]['seconds']:8.3f} s   {results[name]['ratio']:5.2f}")
    if args.json:
        args.json.write_text(json.dumps({"options": vars(args) | {"json": None}, **results}))


if __name__ == "__main__":
    main()
