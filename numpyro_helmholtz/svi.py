"""The front ends: ``RWS(model, guide).update(state, x)`` and its kin.

One update: trace → weights → estimator → (Fisher) → the host's optimiser, a pure function of
the state. A front end without a Fisher matrix hands the gradient on as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
from jax import Array, lax, random
from numpyro.infer.svi import SVIRunResult
from tqdm.auto import tqdm

from .arguments import Arguments
from .averaging import Average
from .checks import check_program
from .estimators.base import HelmholtzELBO, Pass
from .estimators.reweighted import RWS_ELBO
from .estimators.wake_sleep import WakeSleep_ELBO
from .optimiser import Optimiser, of_numpyro
from .options import check_counts
from .parameters import apart, constrain, parameters, signature, strong, unconstrain
from .trace import Params, Programs

DEFAULT_LEARNING_RATE = 0.05
CHUNK = 1024  # most updates between two looks at the progress bar
PAUSE = 0.3  # seconds between them


class HelmholtzState(NamedTuple):
    """Everything that the next update depends on; a pytree that can be pickled.

    Attributes:
        optim_state: of the optimiser, parameters included. mutable_state: of mutable sites.
        rng_key: random key. memory: of the Fisher matrix; ``()`` where there is none.
        step: number of updates so far. skipped: number of those left out by ``stable_update``.
        transforms: of the constrained parameters, by name.
        average: an ``Average`` of the parameters, or ``()``.
    """

    optim_state: Any
    mutable_state: Params
    rng_key: Array
    memory: Any
    step: Array
    skipped: Array
    transforms: dict[str, Any]
    average: Any = ()


@dataclass
class Directions:
    """Directions of ascent of one batch, means over data, before the optimiser.

    Attributes:
        gradient: by joined parameter name, in the unconstrained leaf's shape.
        natural: the same after the Fisher matrix; the gradient itself where there is none.
        fisher: the operator between the two, or None. loss: minus the bound.
    """

    gradient: dict[str, Array]
    natural: dict[str, Array]
    fisher: Any
    loss: Array


class HelmholtzSVI:
    """Base of the front ends.

    A front end with a Fisher matrix overrides ``_direction``, and ``_fisher_init`` for the
    memory that goes with it.

    Particles are a batch dimension of the programs. So a latent or a factor outside the data's
    plate makes the weights of all data joint: one of each particle for the whole batch, of the
    sum of its log-weights. Scales, of subsampling too, multiply the finished directions and never
    the weights; so a plate that is subsampled has to hold every site, where weights are needed.
    Sites of the guide that read neither the data nor another site are fitted to the model's prior
    by the sleep phase, of which a warning tells. ``random_flax_module`` is not supported: a
    network that is itself a sample would have to run once for each particle.

    Args:
        model: a NumPyro program with observed sites. guide: one with the same arguments and
            the same latents.
        optim: an optimiser of ``numpyro.optim`` or an optax transformation; None is
            ``default_optimiser``: SGD of rate 0.05, or the natural ones of rate 0.2.
        estimator: the phases of an update. sleep_steps: sleep updates per wake update; those
            after the first train the guide alone (sleep-well). With more than one, the guide's
            parameters and the model's have an optimiser state each.
        average: ``get_params`` gives the mean of every parameter over the last tenth or so of
            the updates, see ``Average``. An update goes on from the point where the last one
            ended.

    Raises:
        TypeError: an optimiser that is neither NumPyro's nor optax's.
        ValueError: an option out of its range.
    """

    untrained = "neither the model nor the guide has parameters to train."

    def __init__(
        self,
        model: Callable,
        guide: Callable,
        optim: Any,
        estimator: HelmholtzELBO,
        *,
        sleep_steps: int = 1,
        average: bool = False,
    ) -> None:
        check_program("model", model)
        check_program("guide", guide)
        check_counts(sleep_steps=sleep_steps)
        self.model, self.guide, self.estimator = model, guide, estimator
        self.optim = self.default_optimiser() if optim is None else of_numpyro(optim)
        self._optimiser = Optimiser(self.optim, apart=sleep_steps > 1)
        self.sleep_steps, self.average = sleep_steps, average
        self.programs: Programs = estimator.programs(model, guide)
        self._jitted = jax.jit(self._chunk, static_argnames="stable")
        self._stepped = jax.jit(self._step, static_argnames="stable")
        self._evaluate = jax.jit(self._bound)
        self._passed = jax.jit(lambda state, arguments: self._pass(state, *arguments.rebuilt()))

    def default_optimiser(self) -> Any:
        """What ``optim=None`` means."""
        return numpyro.optim.SGD(DEFAULT_LEARNING_RATE)

    # the hooks of a Fisher matrix

    def _fisher_init(
        self, rng_key: Array, params: Params, args: tuple, kwargs: dict, mutable: Params
    ) -> Any:
        """The memory before the first update, a pytree of fixed structure and shapes."""
        return ()

    def _direction(self, done: Pass, gradient: Params, memory: Any) -> tuple[Params, Any]:
        """Turn the gradient of ascent into the direction that the optimiser gets.

        Args:
            done: the pass that the gradient comes from. In the extra sleep steps of
                ``sleep_steps`` it holds dreams alone (``done.model`` is None) and the gradient
                the guide's parameters alone.
            gradient: by site name, unconstrained, a mean over data. memory: of earlier passes.

        Returns:
            The direction, in the gradient's structure, and the new memory.
        """
        return gradient, memory

    # updates

    def init(
        self, rng_key: Array, *args: Any, init_params: Params | None = None, **kwargs: Any
    ) -> HelmholtzState:
        """The state before the first update; its arrays are its own and can be donated.

        Args:
            rng_key: random key. args, kwargs: of the programs.
            init_params: constrained starting values by site name, instead of the programs' own.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site; programs
                without parameters.
        """
        rng_key, first_key, fisher_key = random.split(rng_key, 3)
        found = self.programs.inspect(first_key, args, kwargs, start=init_params)
        params = strong(unconstrain(found.transforms, found.params))
        if not jax.tree.leaves(params):
            raise ValueError(self.untrained)
        mutable = strong(found.mutable)
        memory = self._fisher_init(fisher_key, params, args, kwargs, mutable)
        optim_state = self._optimiser.init(params, found.of_guide)
        zero = jnp.zeros((), jnp.int32)
        everything = self._optimiser.everything(optim_state)
        average = Average.start(everything) if self.average else ()
        return apart(
            HelmholtzState(
                optim_state, mutable, rng_key, memory, zero, zero, found.transforms, average
            )
        )

    def update(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """One update of all parameters; pure, to be run inside ``jit`` or ``lax.scan``.

        A memory of earlier minibatches takes the batch's shapes. Before a ``lax.scan`` over
        batches of another size than the state has seen, take one update outside of it.

        Returns:
            The new state, and minus the K-particle bound before the update, on the host's
            scale.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        self._check_data(state, args, kwargs)
        done, gradient = self._pass(state, args, kwargs)
        direction, memory = self._direction(done, gradient, state.memory)
        optim_state = self._ascend(state, direction, done.loss)
        state = state._replace(
            optim_state=optim_state,
            mutable_state={**state.mutable_state, **done.mutable},
            rng_key=random.split(state.rng_key)[0],
            memory=memory,
            step=state.step + 1,
        )
        if self.sleep_steps > 1:
            assert done.rng_key is not None
            keys = random.split(random.fold_in(done.rng_key, 1), self.sleep_steps - 1)
            state, _ = lax.scan(partial(self._sleep_step, args=args, kwargs=kwargs), state, keys)
        if self.average:
            points = self._optimiser.everything(state.optim_state)
            state = state._replace(average=state.average.take_in(points))
        assert done.loss is not None
        return state, done.loss

    def stable_update(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> tuple[Any, Array]:
        """As ``update``; a step whose loss or result is not finite changes nothing.

        Such a step is counted in ``state.skipped``, and its loss is returned as it is. Where its
        batch is of another size than those in the memory, the memory begins anew.
        """
        new, loss = self.update(state, *args, **kwargs)
        finite = jnp.isfinite(loss)
        params = self._optimiser.everything(new.optim_state)
        for leaf in jax.tree.leaves((params, new.mutable_state, new.memory)):
            if jnp.issubdtype(jnp.result_type(leaf), jnp.inexact):
                finite &= jnp.isfinite(leaf).all()
        old = state
        if signature(new.memory) != signature(state.memory):
            old = state._replace(memory=self._empty_memory(state, args, kwargs))
        kept = jax.tree.map(partial(jnp.where, finite), new, old)
        skipped = state.skipped + jnp.where(finite, 0, 1)
        return kept._replace(rng_key=new.rng_key, skipped=skipped), loss

    def _empty_memory(self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The memory before a first update with these arguments."""
        params = self._optimiser.params(state.optim_state)
        return self._fisher_init(state.rng_key, params, args, kwargs, state.mutable_state)

    def _pass(
        self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[Pass, Params]:
        """Run the phases of the next update; the gradient is by site name."""
        run_key, own_key = random.split(random.split(state.rng_key)[1])
        params = self._optimiser.params(state.optim_state)

        def objective(params: Params) -> tuple[Array, Pass]:
            return self.estimator.run(
                self.programs, run_key, params, args, kwargs, state.mutable_state
            )

        (_, done), gradient = jax.value_and_grad(objective, has_aux=True)(params)
        return replace(done, params=params, rng_key=own_key, step=state.step), gradient

    def _sleep_step(
        self, state: HelmholtzState, rng_key: Array, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[HelmholtzState, None]:
        """One update of the guide alone, from dreams."""
        run_key, own_key = random.split(rng_key)
        params = self._optimiser.params(state.optim_state)
        of_guide = self._optimiser.params(state.optim_state, "guide")

        def objective(some: Params) -> tuple[Array, Pass]:
            return self.estimator.sleep(
                self.programs, run_key, {**params, **some}, args, kwargs, state.mutable_state
            )

        (_, done), gradient = jax.value_and_grad(objective, has_aux=True)(of_guide)
        done = replace(done, params=params, rng_key=own_key, step=state.step)
        direction, memory = self._direction(done, gradient, state.memory)
        optim_state = self._ascend(state, direction, jnp.zeros(()))
        return state._replace(optim_state=optim_state, memory=memory), None

    def _ascend(self, state: HelmholtzState, direction: Params, loss: Array | None) -> Any:
        """The optimiser's step."""
        return self._optimiser.ascend(state.optim_state, direction, loss)

    # many updates

    def run(
        self,
        rng_key: Array,
        num_steps: int,
        *args: Any,
        progress_bar: bool = True,
        stable_update: bool = False,
        init_state: HelmholtzState | None = None,
        init_params: Params | None = None,
        **kwargs: Any,
    ) -> SVIRunResult:
        """Many updates on the same arguments, compiled once.

        Args:
            rng_key: random key for ``init``. num_steps: number of updates, at least 1.
            args, kwargs: of the programs. progress_bar: whether to show one.
            stable_update: leave out steps that are not finite, see ``stable_update``.
            init_state: go on from this state, also with batches of another size.
            init_params: see ``init``.

        Returns:
            ``params`` (constrained, by site name), ``state`` and ``losses`` (num_steps,).

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        check_counts(num_steps=num_steps)
        if init_state is None:
            state = self.init(rng_key, *args, init_params=init_params, **kwargs)
        else:
            state = init_state
            self._check_data(state, args, kwargs)
        arguments = Arguments.of((args, kwargs))
        parts: list[Any] = []
        done, count = 0, 1 if progress_bar else CHUNK
        if init_state is not None and self._grows(state, arguments, stable_update):
            # The state of a loop keeps its shapes.
            state, loss = self._stepped(state, arguments, stable=stable_update)
            parts.append(jnp.zeros(1).at[0].set(loss))
            done = 1
        with tqdm(total=num_steps, initial=done, disable=not progress_bar) as bar:
            while done < num_steps:
                count = min(count, num_steps - done, CHUNK)
                start = time.perf_counter()
                state, losses = self._jitted(state, count, arguments, stable=stable_update)
                done += count
                if progress_bar:
                    parts.append(np.asarray(losses)[:count])
                    bar.set_postfix_str(f"loss {parts[-1].mean():.4f}", refresh=False)
                    bar.update(count)
                    seconds = max(time.perf_counter() - start, 1e-6)
                    count = max(1, min(4 * count, int(count * PAUSE / seconds)))
                else:
                    parts.append(losses if count == CHUNK else losses[:count])
        return SVIRunResult(self.get_params(state), state, jnp.concatenate(parts))

    def _grows(self, state: HelmholtzState, arguments: Arguments, stable: bool) -> bool:
        """Whether an update gives the state other shapes; only the memory's can change."""
        if not jax.tree.leaves(state.memory):
            return False
        new, _ = self._stepped.eval_shape(state, arguments, stable=stable)
        return signature(new) != signature(state)

    def _step(
        self, state: HelmholtzState, arguments: Arguments, stable: bool
    ) -> tuple[HelmholtzState, Array]:
        """One update."""
        args, kwargs = arguments.rebuilt()
        return (self.stable_update if stable else self.update)(state, *args, **kwargs)

    def _chunk(
        self, state: HelmholtzState, count: Array, arguments: Arguments, stable: bool
    ) -> tuple[HelmholtzState, Array]:
        """``count`` updates, at most ``CHUNK``, and their losses, shape (CHUNK,)."""

        def body(i: Array, carry: tuple[HelmholtzState, Array]) -> tuple[HelmholtzState, Array]:
            state, losses = carry
            state, loss = self._step(state, arguments, stable)
            return state, losses.at[i].set(loss.astype(losses.dtype))

        return lax.fori_loop(0, count, body, (state, jnp.zeros(CHUNK)))

    # looking

    def get_params(self, state: HelmholtzState) -> Params:
        """Values of all parameters as the programs see them, by site name."""
        return constrain(state.transforms, self._read(state))

    def _read(self, state: HelmholtzState) -> Params:
        """Unconstrained parameters as others see them: the means where there are any."""
        if self.average:
            return state.average.means
        return self._optimiser.params(state.optim_state)

    def evaluate(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> Array:
        """Minus the K-particle bound, on the host's scale; updates nothing.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        self._check_data(state, args, kwargs)
        return self._evaluate(state, Arguments.of((args, kwargs)))

    def directions(self, state: HelmholtzState, *args: Any, **kwargs: Any) -> Directions:
        """The directions that ``update`` would take with these arguments; updates nothing.

        Raises:
            ValueError: a program or data that cannot be trained so, naming the site.
        """
        self._check_data(state, args, kwargs)
        done, gradient = self._passed(state, Arguments.of((args, kwargs)))
        leaves = parameters(gradient)
        assert done.loss is not None
        return Directions(leaves, leaves, None, done.loss)

    def _check_data(self, state: HelmholtzState, args: tuple, kwargs: dict[str, Any]) -> None:
        """Refuse NaN data and the like, where they are concrete."""
        leaves = jax.tree.leaves((state, args, kwargs))
        if not any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
            params = self._optimiser.params(state.optim_state)
            self.programs.inspect(state.rng_key, args, kwargs, params, state.mutable_state)

    def _bound(self, state: HelmholtzState, arguments: Arguments) -> Array:
        args, kwargs = arguments.rebuilt()
        key = random.split(state.rng_key)[1]
        params = self._read(state)
        wake = self.programs.wake(key, params, args, kwargs, mutable=state.mutable_state)
        return -self.estimator.bound(wake)


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
        optim: Any = None,
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
        optim: Any = None,
        num_particles: int = 10,
        *,
        sleep_steps: int = 1,
        average: bool = False,
        **options: Any,
    ) -> None:
        estimator = RWS_ELBO(num_particles, **options)
        super().__init__(model, guide, optim, estimator, sleep_steps=sleep_steps, average=average)


__all__ = ["RWS", "Directions", "HelmholtzSVI", "HelmholtzState", "Pass", "WakeSleep"]
