"""The front end of amortised learning by wake-sleep: ``ALWS(model).step(x)``, without a guide."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from pyro.optim import PyroOptim
from torch import Tensor

from .estimators.alws import ALWS_ELBO, SleepPass
from .estimators.sleep_phase import SleepPhase, no_guide
from .gradient_models import NetworkRegression, ParticleSimulator
from .options import check_counts
from .sites import parameters
from .svi import HelmholtzSVI, gradient

Adapt = float | Callable[[list[Tensor]], torch.optim.Optimizer]
DEFAULT_HELD_OUT = 200
DEFAULT_ADAPT = 1e-3


class ALWS(HelmholtzSVI):
    """Amortised learning by wake-sleep (Wenliang et al. 2020); see ``ALWS_ELBO``.

    An update draws ``num_sleep`` dreams, fits the regression to them, and follows its gradient
    at the data. The model starts well where it is wider than the data: ``diagnostics`` has the
    coverage, and poor coverage warns once.

    Args:
        model: a Pyro program with observed sites. It needs no guide.
        optim: any ``pyro.optim`` optimiser; None is SGD of rate 0.05.
        num_sleep: dreams per update. With M data in the plates that all sites share, the model
            runs with the least number of particles whose dreams suffice. A latent outside these
            plates makes the whole observation one datum.
        ridge: Λ, the **total** ridge: what is added to the diagonal, never times ``num_sleep``.
        kernel, gradient_model, affine, exponential_family, log_prior, condition: see
            ``ALWS_ELBO``. max_plate_nesting: see ``HelmholtzELBO``.
        adapt: learn the regression's own parameters (bandwidth, features, ridge) on held-out
            dreams, after each update: a rate for Adam, or a function from the list of
            parameters to a torch optimiser. None adapts nothing, except that networks and
            simulators are always trained, at rate 1e-3.
        adapt_every: updates per adaptation.
        held_out: dreams, from the same run of the model, that the regression is not fitted to.
            None: 200 where something is adapted, else 0.
        average: see ``HelmholtzSVI``. The dreams are those of the points, where the update is
            taken, and so the regression adapts to them. It has no means itself.

    Raises:
        TypeError: an optimiser or a kernel of the wrong kind.
        ValueError: an option out of its range.
    """

    estimator: ALWS_ELBO
    state_keys = (*HelmholtzSVI.state_keys, "gradient_model", "adapter", "steps", "num_data")

    def __init__(
        self,
        model: Callable,
        optim: PyroOptim | None = None,
        num_sleep: int = 2000,
        *,
        ridge: float = 0.1,
        kernel: Any = None,
        gradient_model: Any = "kernel",
        affine: bool = False,
        exponential_family: bool = True,
        adapt: Adapt | None = None,
        adapt_every: int = 1,
        held_out: int | None = None,
        average: bool = False,
        log_prior: Callable[[dict[str, Tensor]], Tensor] | None = None,
        condition: Callable[..., Tensor] | None = None,
        max_plate_nesting: float = math.inf,
    ) -> None:
        estimator = ALWS_ELBO(
            num_sleep,
            ridge=ridge,
            kernel=kernel,
            gradient_model=gradient_model,
            affine=affine,
            exponential_family=exponential_family,
            held_out=held_out,
            log_prior=log_prior,
            condition=condition,
            max_plate_nesting=max_plate_nesting,
        )
        super().__init__(model, no_guide, optim, estimator, average=average)
        trained = isinstance(estimator.regression, NetworkRegression | ParticleSimulator)
        self.adapt = _check_adapt(DEFAULT_ADAPT if adapt is None and trained else adapt)
        check_counts(adapt_every=adapt_every)
        self.adapt_every = adapt_every
        if self.adapt is not None and not hasattr(estimator.regression, "parameters"):
            raise ValueError(
                f"adapt needs a gradient model with parameters(); {type(gradient_model).__name__} "
                "has none."
            )
        if self.adapt is not None and held_out is None:
            estimator.held_out = DEFAULT_HELD_OUT
        if self.adapt is not None and estimator.held_out < 2:
            raise ValueError(f"adapt needs at least 2 held-out dreams, got held_out={held_out!r}.")
        self._steps = 0
        self._adapter: torch.optim.Optimizer | None = None
        self._saved_adapter: dict[str, Any] | None = None
        self._last: SleepPass | None = None

    @property
    def gradient_model(self) -> Any:
        """The regression, with its kernel."""
        return self.estimator.gradient_model

    @property
    def diagnostics(self) -> dict[str, Any]:
        """What the last run of the model showed; empty before the first.

        ``coverage_mean`` and ``coverage_min`` are the sums of the regression's weights per datum
        (before the affine correction): near 1 where the dreams cover the data, near 0 where the
        direction vanishes. ``held_out_error`` is the mean squared error over the variance of the
        target, NaN where it is not measured. It stays above 0 however good the regression is,
        since the latents vary given x. Further keys: ``bandwidth``, ``ridge`` (the total),
        ``affine``, ``num_sleep``.
        """
        return dict(self.estimator.diagnostics)

    def _update(
        self, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[float, dict[str, Tensor], dict[str, Tensor]]:
        done = self.estimator.run(self.programs, args, kwargs)
        self._last = done
        leaves = done.leaves()
        return float(done.loss), leaves, gradient(done.surrogate, leaves)

    def _after(self) -> None:
        last, self._last = self._last, None
        self._steps += 1
        if self.adapt is None or last is None or self._steps % self.adapt_every:
            return
        if last.fitting_error is None:
            return
        error = last.fitting_error()
        leaves = list(self.estimator.regression.parameters().values())
        adapter = self._make_adapter(leaves)
        grads = torch.autograd.grad(error, leaves, allow_unused=True)
        if not all(g is None or bool(torch.isfinite(g).all()) for g in grads):
            if self._average is not None:  # the base does not come to it
                self._average.take_in(last.leaves())
            raise FloatingPointError(
                "the gradient of the held-out error is not finite: the regression was not "
                "adapted. The model's own update has been made."
            )
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf.grad = grad
        adapter.step()
        adapter.zero_grad()

    def _make_adapter(self, leaves: list[Tensor]) -> torch.optim.Optimizer:
        if self._adapter is None:
            if callable(self.adapt):
                self._adapter = self.adapt(leaves)
            else:
                self._adapter = torch.optim.Adam(leaves, lr=float(self.adapt or 0))
            if self._saved_adapter is not None:
                self._adapter.load_state_dict(deepcopy(self._saved_adapter))
                self._saved_adapter = None
        return self._adapter

    def _first_run(self, args: tuple, kwargs: dict[str, Any]) -> dict[str, Tensor]:
        dream, _ = self.estimator.dreams(SleepPhase(self.programs, args, kwargs))
        return parameters(dream.model)

    def evaluate_loss(self, *args: Any, **kwargs: Any) -> float:
        """``−Σ_m scale_m Ĵ(x_m)``, see ``ALWS_ELBO``; updates nothing. It is no bound."""
        return super().evaluate_loss(*args, **kwargs)

    def state_dict(self) -> dict[str, Any]:
        """Everything that the next step depends on, the regression and its optimiser included."""
        if self._pending is not None:
            return self._pending
        adapter = self._saved_adapter if self._adapter is None else self._adapter.state_dict()
        return {
            **super().state_dict(),
            "gradient_model": deepcopy(getattr(self.gradient_model, "state_dict", dict)()),
            "adapter": deepcopy(adapter),
            "steps": self._steps,
            "num_data": self.estimator.num_data,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state, see ``HelmholtzSVI.load_state_dict``."""
        super().load_state_dict(state)
        if hasattr(self.gradient_model, "load_state_dict"):
            self.gradient_model.load_state_dict(deepcopy(state["gradient_model"]))
        self._adapter, self._saved_adapter = None, deepcopy(state["adapter"])
        self._steps = state["steps"]
        self.estimator.num_data = state["num_data"]


def _check_adapt(adapt: Adapt | None) -> Adapt | None:
    if adapt is None or callable(adapt):
        return adapt
    if not (isinstance(adapt, float | int) and adapt > 0 and math.isfinite(adapt)):
        raise ValueError(
            f"adapt must be a positive rate or a function from parameters to an optimiser, "
            f"got {adapt!r}."
        )
    return float(adapt)


__all__ = ["ALWS"]
