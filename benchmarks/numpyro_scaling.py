"""How the time of an update grows with the width, with the particles K and with the depth.

    python benchmarks/numpyro_scaling.py --json scaling.jsonl --figure docs/numpyro_scaling.png
    python benchmarks/numpyro_scaling.py --quick
    python benchmarks/numpyro_scaling.py --axes width --widths 64,128,256 --forms kronecker
    python benchmarks/numpyro_scaling.py --draw scaling.jsonl --figure docs/numpyro_scaling.png

Networks are sigmoid belief networks whose layers, the visible one included, all have the same
width; against the width there is one hidden layer, so that the only matrices are width by width,
one for the model and one for the guide. RWS and the forms of NaturalRWS, all with their default
options, run side by side: blocks of updates in turn, in one compiled call each (``lax.scan``),
compiled before the clock starts. The data are random.

What NaturalRWS does only once in many updates is timed apart and then shared out:

* ``later``: from step 300 on. A block is one period, eight updates of which one takes in a batch.
* ``first``: in the first 300 steps, each of which takes in a batch.
* the eigendecompositions: a block in which they are due less one in which they are not, divided
  by the number of updates between two of them (``later``), or by 300 (``first``).

The time of an update is the block's, per update, plus that share; the table has both. A form at a
size whose estimated time is over ``--max-seconds``, or its memory over ``--max-gib``, is left out,
and the report says so. Exponents are slopes of log time on log size by least squares, over the
upper half of the range (from its geometric middle on) and over the whole of it.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import append_lines, read_lines
from jax import Array, lax, random
from numpyro_step_time import make_programs, timed
from scaling_report import LABELS, draw, label, report

import numpyro_helmholtz as nh
from numpyro_helmholtz.fisher.statistics import WARM_UP
from numpyro_helmholtz.natural import REFRESH_ALL, REFRESH_EVERY

FORMS = ["kronecker", "unit"]
# Exponents for the estimate of the next size's time: of updates, and of eigendecompositions.
GROWTH = {"width": (2.5, 3.0), "particles": (1.0, 1.0), "depth": (1.0, 1.0)}
LEAST = 3  # repetitions of a block
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """One network: ``depth`` hidden layers, all layers ``width`` wide, and K."""

    axis: str
    width: int
    particles: int
    depth: int

    @property
    def value(self) -> int:
        """Where on the axis it stands."""
        return int(getattr(self, self.axis))


class TooDear(Exception):
    """A form at a size that is left out; says why."""


class Contender:
    """RWS or a form of NaturalRWS at one size: compiled, and placed anywhere in its schedule.

    Args:
        name: "rws" or a form. size: of the network. args: the command's.

    Raises:
        TooDear: it needs more memory than ``--max-gib``.
    """

    def __init__(self, name: str, size: Size, args: argparse.Namespace) -> None:
        programs = make_programs([size.width] * (size.depth + 1))
        self.every, self.interval = 1, 0
        self.svi: nh.RWS | nh.NaturalRWS
        if name == "rws":
            self.svi = nh.RWS(*programs, num_particles=size.particles)
        else:
            self.svi = nh.NaturalRWS(*programs, num_particles=size.particles, fisher=name)
            self.every = self.svi.refresh_every
        # Parameters, their mean blocks and eigenbases; before and after an update.
        least = 4 * 2 * size.depth * size.width**2 * (1 if name == "rws" else 3) * 2
        refuse_memory(least, args)
        shape = (args.batch_size, size.width)
        self.x = random.bernoulli(random.key(args.seed), 0.2, shape).astype(jnp.float32)
        self.state = self.svi.init(random.key(args.seed), self.x)
        start = time.perf_counter()
        zero = jnp.zeros((), jnp.int32)
        lowered = jax.jit(self._rounds).lower(self.state, self.x, zero, zero, zero)
        self.compiled = lowered.compile()
        self.compile_s = time.perf_counter() - start
        self.bytes = self._memory()
        refuse_memory(self.bytes, args)
        if isinstance(self.svi, nh.NaturalRWS) and self.state.memory.statistics:
            fan_in = max(s.mean.shape[0] for s in self.state.memory.statistics.values())
            self.interval = max(WARM_UP, fan_in * self.svi.memory.mean_every // 16)
            self._check_interval()

    def _memory(self) -> int:
        """Bytes that the compiled call takes, as XLA says."""
        found = self.compiled.memory_analysis()
        names = ("argument_size_in_bytes", "output_size_in_bytes", "temp_size_in_bytes")
        return sum(getattr(found, name, 0) for name in names)

    def _rounds(self, state: Any, x: Array, step: Array, batches: Array, count: Array) -> Any:
        """So many times the same period of the schedule, of ``REFRESH_EVERY`` updates."""

        def period(_: Array, carry: tuple) -> tuple:
            state = carry[0]._replace(step=step)
            if state.memory:
                state = state._replace(memory=replace(state.memory, batches=batches))
            state, losses = lax.scan(lambda s, _: self.svi.update(s, x), state, None, REFRESH_EVERY)
            return state, losses[-1]

        return lax.fori_loop(0, count, period, (state, jnp.zeros(())))

    def __call__(self, phase: str, rounds: int) -> Array:
        """Goes on by ``rounds`` periods of "first", "later" or "due"; the last loss."""
        step = 0 if phase == "first" else REFRESH_ALL
        # A batch is number `batches` + 1; eigenbases are renewed at multiples of the interval.
        batches = self.interval - (phase == "due") if self.interval else WARM_UP
        place = (jnp.asarray(n, jnp.int32) for n in (step, batches, rounds))
        self.state, loss = self.compiled(self.state, self.x, *place)
        return loss

    def _check_interval(self) -> None:
        """That eigenbases change in the phase "due" alone."""
        for phase, due in (("later", False), ("due", True)):
            old = self._widest_basis()
            self(phase, 1)
            if np.array_equal(old, self._widest_basis()) == due:
                raise RuntimeError(
                    f"an eigenbasis was {'not ' if due else ''}renewed in the phase {phase!r}: "
                    f"the schedule of fisher/statistics.py is not one of {self.interval} batches"
                )

    def _widest_basis(self) -> np.ndarray:
        known = self.state.memory.statistics.values()
        return np.asarray(max(known, key=lambda s: s.mean.shape[0]).basis.values)

    @property
    def phases(self) -> list[str]:
        """Where in the schedule updates differ."""
        return ["later", "first"] if self.every > 1 else ["later"]

    def share(self, phase: str) -> float:
        """Eigendecompositions per update."""
        if not self.interval:
            return 0.0
        if phase == "later":
            return 1 / (self.interval * self.every)
        counts = range(1, REFRESH_ALL + 1)
        early = sum(c & (c - 1) == 0 for c in counts if c < self.interval)
        return (early + REFRESH_ALL // self.interval) / REFRESH_ALL


def refuse_memory(needed: int, args: argparse.Namespace) -> None:
    """Refuses what is over the limit."""
    if needed > args.max_gib * GIB:
        raise TooDear(f"needs {needed / GIB:.3g} GiB, --max-gib is {args.max_gib:g}")


@dataclass
class Timing:
    """The times of one contender at one size.

    Attributes:
        rounds: periods in a block, by phase. ms: of an update, by phase and repetition.
        basis: ms of one renewal of all eigenbases, a difference of minima: it is small beside
            what it is taken from, and a busy neighbour would drown a difference of medians.
        spent: seconds of a period by phase; "due" is one with a renewal.
    """

    rounds: dict[str, int] = field(default_factory=dict)
    ms: dict[str, list[float]] = field(default_factory=dict)
    basis: float = 0.0
    spent: dict[str, float] = field(default_factory=dict)

    def warm_up(self, contender: Contender, args: argparse.Namespace) -> None:
        """Takes in batches, and finds how many periods make a block."""
        deadline = time.perf_counter() + args.max_seconds / 4
        for done in range(args.warm_up // REFRESH_EVERY):
            if time.perf_counter() > deadline and done:
                break
            jax.block_until_ready(contender(contender.phases[-1], 1))
        for phase in contender.phases:
            seconds = min(timed(lambda p=phase: contender(p, 1)) for _ in range(2))
            self.rounds[phase] = max(1, round(args.block_seconds / seconds))
            self.spent[phase] = seconds
            self.ms[phase] = []

    def decompose(self, contender: Contender, args: argparse.Namespace) -> None:
        """Times a period with eigendecompositions against one without."""
        if not contender.interval:
            return
        due, without, deadline = [], [], time.perf_counter() + args.max_seconds / 4
        while not due or (len(due) < args.repetitions and time.perf_counter() < deadline):
            due.append(timed(lambda: contender("due", 1)))
            without.append(timed(lambda: contender("later", 1)))
        self.basis = 1e3 * max(0.0, min(due) - min(without))
        self.spent["due"] = statistics.median(due)

    def take(self, contender: Contender) -> None:
        """One block of each phase."""
        for phase, rounds in self.rounds.items():
            seconds = timed(lambda p=phase, r=rounds: contender(p, r))
            self.ms[phase].append(1e3 * seconds / (rounds * REFRESH_EVERY))

    def estimate(self, ratio: float, axis: str) -> float:
        """Seconds that a size ``ratio`` times as large will take at least, once compiled."""
        update, basis = GROWTH[axis]
        seconds = (LEAST + 2) * sum(s for phase, s in self.spent.items() if phase != "due")
        return seconds * ratio**update + 2 * self.spent.get("due", 0.0) * ratio**basis


def measure(
    size: Size, known: dict[str, tuple[Size, Timing]], args: argparse.Namespace
) -> list[dict]:
    """Times all contenders at one size, in turn.

    Args:
        known: of each contender the largest size so far and its timing; new ones are put there.
    """
    records, contenders, timings = [], {}, {}
    for name in ("rws", *args.forms):
        try:
            if name in known:
                before, timing = known[name]
                needed = timing.estimate(size.value / before.value, size.axis)
                if needed > args.max_seconds:
                    raise TooDear(
                        f"would take {needed:.0f} s, --max-seconds is {args.max_seconds:g}"
                    )
            contenders[name] = Contender(name, size, args)
            timings[name] = Timing()
            timings[name].warm_up(contenders[name], args)
            timings[name].decompose(contenders[name], args)
            known[name] = (size, timings[name])
        except (TooDear, jax.errors.JaxRuntimeError) as reason:  # the latter: out of memory
            contenders.pop(name, None)
            records.append(line(size, name, args) | {"left_out": str(reason).split("\n")[0]})
    deadline = time.perf_counter() + args.max_seconds / 2 * len(contenders)
    for done in range(args.repetitions):
        if done >= LEAST and time.perf_counter() > deadline:
            break
        for name, contender in contenders.items():
            timings[name].take(contender)
    base = timings["rws"].ms["later"] if "rws" in contenders else None
    for name, contender in contenders.items():
        finite = bool(jnp.isfinite(contender("later", 1)))
        for phase in contender.phases:
            record = line(size, name, args) | {"phase": phase, "finite": finite}
            record |= summary(timings[name], phase, contender.share(phase), base)
            record |= {"compile_s": contender.compile_s, "gib": contender.bytes / GIB}
            records.append(record)
    return records


def line(size: Size, name: str, args: argparse.Namespace) -> dict[str, Any]:
    """What every record says."""
    return {
        "axis": size.axis,
        "value": size.value,
        "width": size.width,
        "particles": size.particles,
        "depth": size.depth,
        "batch_size": args.batch_size,
        "contender": name,
        "first_steps": REFRESH_ALL,
        "jax": jax.__version__,
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
    }


def summary(timing: Timing, phase: str, share: float, base: list[float] | None) -> dict[str, Any]:
    """Median and minimum of an update's milliseconds, without and with the decompositions."""
    ms, extra = timing.ms[phase], share * timing.basis
    record = {"block_ms": ms, "block_median": statistics.median(ms), "block_min": min(ms)}
    record |= {"basis_ms": timing.basis, "basis_share": share}
    record |= {"median": record["block_median"] + extra, "min": record["block_min"] + extra}
    if base is not None:
        pairs = zip(ms, base, strict=True)
        record["ratio_to_rws"] = statistics.median((a + extra) / b for a, b in pairs)
    return record


def sizes(args: argparse.Namespace) -> dict[str, list[Size]]:
    """The networks of every axis, the smallest first."""
    k, width = args.particles, args.fixed_width
    every = {
        "width": [Size("width", w, k, 1) for w in sorted(args.widths)],
        "particles": [Size("particles", width, n, args.fixed_depth) for n in sorted(args.ks)],
        "depth": [Size("depth", width, k, d) for d in sorted(args.depths)],
    }
    return {axis: every[axis] for axis in args.axes}


def integers(text: str) -> list[int]:
    """Reads ``"64,128"``."""
    found = [int(part) for part in text.split(",")]
    if min(found) < 1:
        raise ValueError(f"a size below 1 in {text!r}")
    return found


def words(*known: str) -> Callable[[str], list[str]]:
    """Reads some of the known words, with commas."""

    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := set(found) - set(known):
            message = f"there is no {sorted(unknown)}; there are {list(known)}"
            raise argparse.ArgumentTypeError(message)
        return found

    return names


def parse() -> argparse.Namespace:
    """The command's options."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--axes", type=words(*LABELS), default=list(LABELS), help=f"of {','.join(LABELS)}")
    add("--forms", type=words(*FORMS, "diagonal"), default=FORMS, help="of NaturalRWS")
    add("--widths", type=integers, default=[2**n for n in range(6, 14)], help="64 to 8192")
    add("--ks", type=integers, default=[5, 10, 20, 30, 50, 70, 100], help="numbers of particles")
    add("--depths", type=integers, default=[1, 2, 3, 4, 6, 8, 12], help="of hidden layers")
    add("--particles", type=int, default=10, help="K where it is fixed")
    add("--fixed-width", type=int, default=256, help="of all layers against K and the depth")
    add("--fixed-depth", type=int, default=2, help="hidden layers against K")
    add("--batch-size", type=int, default=32)
    add("--repetitions", type=int, default=20, help="blocks of each contender, at most")
    add("--block-seconds", type=float, default=0.1, help="of a block, about; one period at least")
    add("--warm-up", type=int, default=64, help="updates that are not timed, at most")
    add(
        "--max-seconds",
        type=float,
        default=120.0,
        help="of one form at one size once it is compiled, about: those that would take longer are "
        "left out, the others make fewer repetitions, of which there are at least three",
    )
    add("--max-gib", type=float, default=8.0, help="of memory of one form, as XLA counts it")
    add("--seed", type=int, default=0)
    add("--quick", action="store_true", help="by default three small sizes, three repetitions")
    add("--json", type=Path, help="file to append one line for each form and size to")
    add("--figure", type=Path, help="such as docs/numpyro_scaling.png")
    add("--draw", type=Path, metavar="JSON", help="measure nothing; report and draw these lines")
    args = parser.parse_args()
    if not args.quick:
        return args
    small = {"widths": [32, 64, 128], "ks": [2, 4, 8], "depths": [1, 2, 3], "fixed_width": 32}
    parser.set_defaults(**small, repetitions=LEAST, block_seconds=0.02)
    return parser.parse_args()


def main() -> None:
    """Runs the command line."""
    args = parse()
    records: list[dict] = read_lines(args.draw) if args.draw else []
    for axis, networks in ({} if args.draw else sizes(args)).items():
        known: dict[str, tuple[Size, Timing]] = {}
        for size in networks:
            found = measure(size, known, args)
            records += found
            append_lines(args.json, found)
            parts = (
                f"{label(r)} " + (f"{r['median']:.3f} ms" if "median" in r else "left out")
                for r in found
            )
            print(f"{axis} {size.value}: " + "; ".join(parts), flush=True)
    report(records)
    if args.figure:
        draw(records, args.figure)


if __name__ == "__main__":
    main()
