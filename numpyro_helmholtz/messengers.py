"""What happens to the sites of a program while it runs."""

from __future__ import annotations

from typing import Any

import numpyro
from jax import lax
from numpyro.primitives import Messenger

from .checks import is_factor
from .flat_keys import draws_plainly, flat


class Constants(Messenger):
    """Make every sample a constant; enter it outside ``handlers.trace``."""

    def postprocess_message(self, msg: Any) -> None:
        """Cut the gradient of a sample."""
        if msg["type"] == "sample":
            msg["value"] = lax.stop_gradient(msg["value"])
            msg["intermediates"] = []  # they would carry the gradient of the sampler


class Particles(numpyro.plate):
    """K particles in one dimension; parameters and subsamples do not see it."""

    def process_message(self, msg: Any) -> None:
        """Widen a sample site."""
        if msg["type"] == "sample":
            msg["helmholtz_shared"] = len(msg["fn"].batch_shape) < -self.dim
        if msg["type"] in ("sample", "plate", "deterministic"):
            super().process_message(msg)

    def postprocess_message(self, msg: Any) -> None:
        """Nothing: the host's would look for the plate's dimension in parameters."""


class PythonFlow(Messenger):
    """Let sites stand in Python's control flow alone."""

    def process_message(self, msg: Any) -> None:
        """Refuse NumPyro's own.

        Raises:
            ValueError: at its scan or cond.
        """
        if msg["type"] == "control_flow":
            raise ValueError(
                "scan and cond of numpyro.contrib.control_flow cannot run with many particles. "
                "Write the sample sites of the steps in a Python loop."
            )


class Reached(Messenger):
    """Knows the site that a program has come to."""

    at = "before its first site"

    def process_message(self, msg: Any) -> None:
        """It is being drawn or scored."""
        if msg["type"] == "sample":
            self.at = f"at site {msg['name']!r}"

    def postprocess_message(self, msg: Any) -> None:
        """It is done."""
        if msg["type"] == "sample":
            self.at = f"after site {msg['name']!r}"


class FlatDraws(Messenger):
    """Have samples drawn by keys that compile fast; enter it outside ``handlers.seed``."""

    def process_message(self, msg: Any) -> None:
        """Replace the key of a sample."""
        if msg["type"] != "sample" or msg["kwargs"].get("rng_key") is None:
            return
        if draws_plainly(msg["fn"]):
            msg["kwargs"]["rng_key"] = flat(msg["kwargs"]["rng_key"])


class Dreaming(Messenger):
    """Turn observed sites into sampled ones, and remember what was observed."""

    def __init__(self) -> None:
        super().__init__()
        self.observed: dict[str, Any] = {}

    def process_message(self, msg: Any) -> None:
        """Have an observed site drawn.

        Raises:
            ValueError: a factor, naming it.
        """
        if msg["type"] != "sample" or not msg["is_observed"]:
            return
        if is_factor(msg["fn"]):
            raise ValueError(
                f"site {msg['name']!r} is a numpyro.factor: a program with factors cannot dream, "
                "so it has no sleep phase. Use RWS with sleep_weight=0, or write the factor as "
                "an observed sample site."
            )
        self.observed[msg["name"]] = msg["value"]
        msg["helmholtz_dream"] = True
        msg["is_observed"] = False
        msg["value"] = None
