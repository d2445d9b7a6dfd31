"""How programs are run: samples are constants, observed sites may dream, particles broadcast.

The host asks every handler at every statement, which for a deep program takes longer than the
arithmetic. These handlers therefore do several things at once and look at the type of a
statement themselves.
"""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from pyro import poutine
from pyro.distributions import Unit
from pyro.poutine.broadcast_messenger import BroadcastMessenger
from pyro.poutine.indep_messenger import CondIndepStackFrame, IndepMessenger
from pyro.poutine.messenger import Messenger
from pyro.poutine.trace_messenger import TraceMessenger

from .checks import PARTICLES, RAW, is_deterministic, located


class Detached(Messenger):
    """Make every sample a constant; enter it outside ``poutine.trace``."""

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            draw(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            detach(msg)


class Particles(IndepMessenger):
    """The plate of the particles; enter it outside ``poutine.trace``.

    Args:
        count: K. dim: the plate's dimension. constant: make samples constants, as ``Detached``.
    """

    def __init__(self, count: int, dim: int, *, constant: bool) -> None:
        super().__init__(PARTICLES, count, dim)
        self.constant, self._reach = constant, -dim
        self._frame = CondIndepStackFrame(PARTICLES, dim, count, 0, count)

    def _process_message(self, msg: Any) -> None:
        msg["cond_indep_stack"] = (self._frame, *msg["cond_indep_stack"])
        if msg["type"] != "sample":
            return
        msg["helmholtz_shared"] = len(getattr(msg["fn"], "batch_shape", ())) < self._reach
        if not (msg["done"] or _is_broad(msg)):
            BroadcastMessenger._pyro_sample(msg)
        if self.constant:
            draw(msg)

    def _postprocess_message(self, msg: Any) -> None:
        if self.constant and msg["type"] == "sample":
            detach(msg)


class Recorder(TraceMessenger):
    """``poutine.trace`` of a program that takes samples from an earlier trace where it can.

    Args:
        samples: the earlier trace, as for ``poutine.replay``, or None.
    """

    def __init__(self, samples: poutine.Trace | None = None) -> None:
        super().__init__()
        self._samples: dict[str, Any] = dict(samples.nodes) if samples is not None else {}
        self.at = "before its first site"

    def _process_message(self, msg: Any) -> None:
        if msg["type"] != "sample":
            return
        self.at = f"at site {msg['name']!r}"
        if msg["is_observed"]:
            return
        known = self._samples.get(msg["name"])
        if known is None:
            return
        if known["type"] != "sample" or known["is_observed"]:
            raise RuntimeError(f"site {msg['name']} must be sampled in trace")
        msg["done"], msg["value"], msg["infer"] = True, known["value"], known["infer"]

    def _postprocess_message(self, msg: Any) -> None:
        kind, name = msg["type"], msg["name"]
        if kind == "sample":
            self.at = f"after site {name!r}"
        if kind != "param" and (kind != "sample" or msg["infer"].get("_do_not_trace")):
            return
        known = self.trace.nodes.get(name)
        if known is None or known["type"] == kind == "param":
            # Not by add_node: it makes sets of neighbours, which a flat trace never fills.
            self.trace.nodes[name] = msg.copy()
        else:
            self.trace.add_node(name, **msg)  # the host says what is wrong


class Dreaming(Messenger):
    """Turn observed sites into sampled ones, and remember what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, torch.Tensor] = {}

    def _process_message(self, msg: Any) -> None:
        if msg["type"] == "sample":
            self._pyro_sample(msg)

    def _postprocess_message(self, msg: Any) -> None:
        pass

    def _pyro_sample(self, msg: Any) -> None:
        if (
            not msg["is_observed"]
            or is_deterministic(msg)
            or type(msg["fn"]).__name__ == "_Subsample"
        ):
            return
        if isinstance(msg["fn"], Unit):
            raise ValueError(
                f"site {msg['name']!r} is a pyro.factor: a program with factors cannot dream, "
                "so it has no sleep phase. Use RWS with sleep_weight=0, or write the factor as "
                "an observed sample site."
            )
        self.observed[msg["name"]] = msg["value"]
        msg["helmholtz_dream"] = True
        msg["is_observed"] = False
        msg["value"] = None
        msg["done"] = False


def record(
    fn: Any, args: tuple, kwargs: dict[str, Any], samples: Any = None, situation: str = ""
) -> poutine.Trace:
    """The trace of a program that takes samples from an earlier trace where it can.

    Its errors are told with the site it had come to and the situation, where one is given.
    """
    recorder = Recorder(samples)
    try:
        recorder(fn)(*args, **kwargs)
    except RAW as error:
        found = located(error, recorder.at, situation) if situation else error
        if found is error:
            raise
        raise found from error
    return recorder.trace


def draw(msg: Any) -> None:
    """Sample a site where this is faster than the host; it samples the others."""
    if msg["value"] is None and not msg["done"] and not msg["args"]:
        msg["value"] = _quick_sample(msg["fn"])


def detach(msg: Any) -> None:
    """Make a site's sample a constant."""
    value = msg["value"]
    if torch.is_tensor(value) and value.requires_grad and not is_deterministic(msg):
        msg["value"] = value.detach()


def _is_broad(msg: Any) -> bool:
    """Whether the distribution already has the size of every plate."""
    shape = getattr(msg["fn"], "batch_shape", ())
    return all(
        frame.dim is None or (len(shape) >= -frame.dim and shape[frame.dim] == frame.size)
        for frame in msg["cond_indep_stack"]
    )


def bernoulli_under(fn: Any) -> Any:
    """The Bernoulli distribution below event dimensions and expansions, or None."""
    while type(fn) in _WRAPPERS:
        fn = fn.base_dist
    return fn if type(fn) is dist.Bernoulli else None


_WRAPPERS = (dist.Independent, dist.ExpandedDistribution)


def _quick_sample(fn: Any) -> torch.Tensor | None:
    """A sample of Bernoulli sites, three times as fast as ``torch.bernoulli`` on the CPU.

    None for every other distribution: the host samples it.
    """
    base = bernoulli_under(fn)
    if base is None:
        return None
    with torch.no_grad():
        logits = base.__dict__.get("logits")
        probs = base.probs if logits is None else torch.sigmoid(logits)
        noise = torch.rand(fn.batch_shape + fn.event_shape, dtype=probs.dtype, device=probs.device)
        return noise.lt_(probs)
