"""The front ends: ``RWS(model, guide).step(x)`` and its kin.

One update: trace → weights → estimator → (Fisher) → the host's optimiser. A front end without
a Fisher matrix hands the gradient on as it is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import pyro
import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .averaging import Average
from .estimators.base import HelmholtzELBO, Pass, score
from .estimators.reweighted import RWS_ELBO
from .estimators.wake_sleep import WakeSleep_ELBO
from .fisher.memory import Fisher
from .optimiser import JointStep
from .options import check_counts
from .saved import Late, check_kind, check_names, fill, same_random
from .sites import parameters
from .trace import Programs

DEFAULT_LEARNING_RATE = 0.05


@dataclass
class Directions:
    """Directions of ascent of one batch, means over data, before the optimiser.

    Attributes:
        gradient: by parameter name, in the unconstrained leaf's shape.
        natural: the same after the Fisher matrix; the gradient itself where there is none.
        fisher: the operator between the two, or None. loss: minus the bound.
    """

    gradient: dict[str, Tensor]
    natural: dict[str, Tensor]
    fisher: Fisher | None
    loss: float


class HelmholtzSVI:
    """Base of the front ends.

    A latent or a factor outside the data's plate makes the weights of all data joint: one of each
    particle for the whole batch, of the sum of its log-weights. Scales, of subsampling too,
    multiply the finished directions and never the weights; so a plate that is subsampled has to
    hold every site, where weights are needed. Sites of the guide that read neither the data nor
    another site are fitted to the model's prior by the sleep phase, of which a warning tells.

    Args:
        model: a Pyro program with observed sites. guide: one with the same arguments and the
            same latents.
        optim: any ``pyro.optim`` optimiser; None is ``default_optimiser``: SGD of rate 0.05, or
            the natural ones of rate 0.2.
        estimator: the phases of an update. sleep_steps: sleep updates per wake update; those
            after the first train the guide alone (sleep-well).
        average: Pyro's store holds the mean of every parameter over the last tenth or so of the
            updates, see ``Average``. An update goes on from the point where the last one ended.

    Raises:
        TypeError: an optimiser that is not Pyro's.
        ValueError: an option out of its range.
    """

    state_keys: tuple[str, ...] = (
        "parameters",
        "optimiser",
        "optimiser_kind",
        "random",
        "max_plate_nesting",
    )

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | None,
        estimator: HelmholtzELBO,
        *,
        sleep_steps: int = 1,
        average: bool = False,
    ) -> None:
        for name, program in (("model", model), ("guide", guide)):
            if not callable(program):
                raise TypeError(f"the {name} must be a Pyro program, got {program!r}.")
        if optim is None:
            optim = self.default_optimiser()
        if not isinstance(optim, PyroOptim):
            raise TypeError(
                f"optim must be an optimiser of pyro.optim, got {type(optim).__name__}. "
                "For example pyro.optim.SGD({'lr': 0.05})."
            )
        check_counts(sleep_steps=sleep_steps)
        self.model, self.guide, self.optim, self.estimator = model, guide, optim, estimator
        self.sleep_steps = sleep_steps
        self._average = Average() if average else None
        self._joint_step = JointStep()
        self._buffers: dict[str, Tensor] = {}
        self._pending: dict[str, Any] | None = None
        self._later: dict[str, Tensor] = {}  # saved values of parameters that do not exist yet

    def default_optimiser(self) -> PyroOptim:
        """What ``optim=None`` means."""
        return sgd(lr=DEFAULT_LEARNING_RATE)

    @property
    def _optimiser_kind(self) -> str:
        """The name of torch's optimiser, or scheduler, behind Pyro's."""
        return getattr(self.optim, "pt_optim_constructor", type(self.optim)).__name__

    @property
    def programs(self) -> Programs:
        """The model and the guide with this front end's options."""
        return self.estimator.programs(self.model, self.guide)

    def step(self, *args: Any, **kwargs: Any) -> float:
        """One update of all parameters.

        Returns:
            Minus the K-particle bound before the update, on the host's scale.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
            FloatingPointError: a loss or direction that is not finite; nothing has changed,
                or with ``sleep_steps`` above 1 nothing since the last update that was finite.
        """
        check_gradients()
        self._resume(args, kwargs)
        with self._points():
            loss, leaves, directions = self._update(args, kwargs)
            if not math.isfinite(loss):
                self._blame_programs(loss, args, kwargs)
            if not leaves:
                raise ValueError("neither the model nor the guide has parameters to train.")
            self._check_finite(loss, directions)
            self._apply(leaves, directions)
            self._after()
            for _ in range(self.sleep_steps - 1):
                self._sleep_step(args, kwargs)
            if self._average is not None:
                self._average.take_in(leaves)
        return loss

    @contextmanager
    def _points(self) -> Iterator[None]:
        """Have the parameters as updates leave them, not their means."""
        points = nullcontext() if self._average is None else self._average.points()
        with self._late(), points:
            yield

    @contextmanager
    def _late(self) -> Iterator[None]:
        """Have saved values in parameters that the programs use for the first time."""
        with Late(self._later) if self._later else nullcontext():
            yield

    def _blame_programs(self, loss: float, args: tuple, kwargs: dict[str, Any]) -> None:
        """Run once more with the host's validation, which is off after the first step.

        Raises:
            FloatingPointError: what the host says is wrong, without its listing of the values.
        """
        self.programs.validated.clear()
        try:
            with torch.no_grad(), same_random():
                self._first_run(args, kwargs)
        except (ValueError, RuntimeError) as error:
            what = str(error).partition(", but found")[0].partition("\n")[0]
            raise FloatingPointError(
                f"the loss is {loss}; no parameter was changed by this update. {what}"
            ) from error

    def _update(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        done = self.estimator.run(self.programs, args, kwargs)
        leaves = done.leaves()
        return float(done.loss), leaves, gradient(done.surrogate, leaves)

    def _precondition(self, direction: dict[str, Tensor]) -> dict[str, Tensor]:
        return direction

    def _after(self) -> None:
        """What happens once an update has been applied."""

    def _sleep_step(self, args: tuple, kwargs: dict[str, Any]) -> None:
        dream = self.programs.dream(args, kwargs)
        leaves = parameters(dream.guide)
        surrogate = score(dream.guide, dream.layout, None, observed=False)
        scaled = self.estimator.sleep_scale * surrogate
        direction = self._precondition(gradient(scaled, leaves))
        self._check_finite(0.0, direction)
        self._apply(leaves, direction)

    def _check_finite(self, loss: float, direction: Mapping[str, Tensor]) -> None:
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss}; no parameter was changed by this update."
            )
        total = sum(x.sum() for x in direction.values())
        if torch.is_tensor(total) and not bool(torch.isfinite(total)):
            bad = [n for n, x in direction.items() if not bool(torch.isfinite(x).all())]
            if bad:
                raise FloatingPointError(
                    f"the direction of {bad[0]!r} is not finite; "
                    "no parameter was changed by this update."
                )

    def _apply(self, leaves: Mapping[str, Tensor], direction: Mapping[str, Tensor]) -> None:
        """Write minus the direction into the gradients and call the optimiser.

        Through buffers that stay: fresh memory for every gradient is slow.
        """
        buffers = [self._buffer(name, leaf) for name, leaf in leaves.items()]
        moves = [direction[name].reshape(leaf.shape) for name, leaf in leaves.items()]
        with torch.no_grad():
            torch._foreach_copy_(buffers, moves)
            torch._foreach_neg_(buffers)
        for leaf, buffer in zip(leaves.values(), buffers, strict=True):
            leaf.grad = buffer
        self._joint_step(self.optim, list(leaves.values()))
        for leaf in leaves.values():
            leaf.grad = None

    def _buffer(self, name: str, leaf: Tensor) -> Tensor:
        """The memory for a parameter's gradient."""
        buffer = self._buffers.get(name)
        kind = (leaf.shape, leaf.dtype, leaf.device)
        if buffer is None or (buffer.shape, buffer.dtype, buffer.device) != kind:
            if not bool(torch.isfinite(leaf).all()):
                raise ValueError(
                    f"parameter {name!r} is not finite in its unconstrained space: its value lies "
                    "outside its constraint or on its edge. No parameter was changed."
                )
            buffer = self._buffers[name] = torch.empty_like(leaf.detach())
        return buffer

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """Minus the K-particle bound, on the host's scale; updates no parameter.

        Modules in training mode update their buffers as in any run.
        """
        self._resume(args, kwargs)
        with self._late():
            return self.estimator.loss(self.model, self.guide, *args, **kwargs)

    def directions(self, *args: Any, **kwargs: Any) -> Directions:
        """The directions that a step would take on these data; updates nothing."""
        check_gradients()
        self._resume(args, kwargs)
        with self._points():
            done = self.estimator.run(self.programs, args, kwargs)
            direction = gradient(done.surrogate, done.leaves())
        return Directions(direction, direction, None, float(done.loss))

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on: parameters, optimiser, random state.

        Buffers of modules, such as running means, are not included. Files of it are loaded by
        ``torch.load(..., weights_only=False)``.
        """
        if self._pending is not None:
            return self._pending
        store = pyro.get_param_store()
        used = {name: leaf.detach().clone() for name, leaf in store._params.items()}
        waiting = self.optim._state_waiting_to_be_consumed  # of parameters not stepped yet
        state = {
            "kind": self._kind(),
            "parameters": {**self._later, **used},
            "optimiser": deepcopy({**waiting, **self.optim.get_state()}),
            "optimiser_kind": self._optimiser_kind,
            "random": torch.get_rng_state(),
            "max_plate_nesting": self.programs.max_plate_nesting,
        }
        if self._average is not None:
            state["average"] = self._average.state()
        if torch.cuda.is_available():
            state["random_cuda"] = torch.cuda.get_rng_state_all()
        return state

    def _kind(self) -> dict[str, Any]:
        """What must be the same where a state is saved and where it is loaded."""
        kind: dict[str, Any] = {"front_end": type(self).__name__}
        if hasattr(self, "memory"):
            kind["fisher"] = self.memory.form
        return kind

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state: the next step is the one that would have followed.

        Parameters that Pyro's store holds take their saved values now; the others when this
        object next runs the programs, since only then they exist. That run refuses a state of
        programs with other parameters, and warns of parameters that only the state or only the
        programs have.

        Raises:
            ValueError: something that ``state_dict`` of such a front end with such an optimiser
                did not return, or another shape.
        """
        if not isinstance(state, dict) or "parameters" not in state:
            raise ValueError("load_state_dict needs what state_dict returned.")
        kind = self._kind()
        check_kind(state.get("kind", kind), kind)  # earlier versions do not say it
        if missing := [key for key in self.state_keys if key not in state]:
            raise ValueError(
                f"the state lacks {missing[0]!r}, which {type(self).__name__} needs: it was saved "
                "by another front end."
            )
        if state["optimiser_kind"] != self._optimiser_kind:
            raise ValueError(
                f"the state was saved with the optimiser {state['optimiser_kind']}; this object "
                f"has {self._optimiser_kind}."
            )
        if ("average" in state) != (self._average is not None):
            saved = "with" if "average" in state else "without"
            raise ValueError(f"the state was saved {saved} average=True; this object differs.")
        fill(state["parameters"], pyro.get_param_store()._params)
        if self._average is not None:
            self._average.load(state["average"], state["parameters"])
        self._pending = state
        self.programs.max_plate_nesting = state["max_plate_nesting"]
        self.programs.validated.add("arguments")  # the first step looked: no run but its own
        self.optim.optim_objs.clear()
        self.optim._state_waiting_to_be_consumed.clear()
        self.optim.set_state(deepcopy(state["optimiser"]))

    def _resume(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """Fill in pending parameters in place, then set the random state.

        A state that cannot be filled in stays pending: no later call trains without it.
        """
        if self._pending is None:
            return
        state = self._pending
        with torch.no_grad():
            used = self._first_run(args, kwargs)
        leaves = {**pyro.get_param_store()._params, **used}
        check_names(state, used, leaves)
        fill(state["parameters"], leaves)
        self._later = {n: x for n, x in state["parameters"].items() if n not in leaves}
        self._pending = None
        torch.set_rng_state(state["random"])
        if "random_cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])

    def _first_run(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Run the programs, so that their parameters exist."""
        wake = self.programs.wake(args, kwargs)
        return parameters(wake.model, wake.guide)


def sgd(**options: Any) -> PyroOptim:
    """Pyro's SGD, which ``pyro.optim`` defines only when it is imported."""
    return pyro.optim.SGD(options)  # type: ignore[attr-defined]


def check_gradients() -> None:
    """Refuse to look for directions where torch takes no gradients.

    Raises:
        ValueError: inside ``torch.no_grad`` or ``torch.inference_mode``.
    """
    if not torch.is_grad_enabled():
        raise ValueError(
            "directions need gradients, which torch.no_grad or torch.inference_mode turns off here."
        )


def gradient(surrogate: Tensor, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The surrogate's gradient by parameter name; zeros for those that it does not touch."""
    if not surrogate.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        surrogate, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return dict(zip(leaves, grads, strict=True))


class WakeSleep(HelmholtzSVI):
    """Wake-sleep; see ``WakeSleep_ELBO``.

    Args:
        model, guide, optim, sleep_steps, average: see ``HelmholtzSVI``.
        num_particles, sleep_scale, max_plate_nesting, dream_args: see ``WakeSleep_ELBO``.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | None = None,
        num_particles: int = 1,
        *,
        sleep_steps: int = 1,
        average: bool = False,
        **options: Any,
    ) -> None:
        estimator = WakeSleep_ELBO(num_particles, **options)
        super().__init__(model, guide, optim, estimator, sleep_steps=sleep_steps, average=average)


class RWS(HelmholtzSVI):
    """Reweighted wake-sleep; see ``RWS_ELBO``.

    Args:
        model, guide, optim, sleep_steps, average: see ``HelmholtzSVI``.
        num_particles, sleep_weight, sleep_scale, baseline, max_plate_nesting, dream_args: see
            ``RWS_ELBO``.
    """

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: PyroOptim | None = None,
        num_particles: int = 10,
        *,
        sleep_steps: int = 1,
        average: bool = False,
        **options: Any,
    ) -> None:
        estimator = RWS_ELBO(num_particles, **options)
        super().__init__(model, guide, optim, estimator, sleep_steps=sleep_steps, average=average)


__all__ = ["RWS", "Directions", "HelmholtzSVI", "Pass", "WakeSleep"]
