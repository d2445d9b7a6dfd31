"""Which parameters enter an argument of a site, and how; remembered from step to step."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from . import graph, layers
from .columns import Opaque
from .layers import Application
from .routes import Route

KEPT = 4


@dataclass(slots=True)
class Use:
    """The parameters in one argument.

    Attributes:
        argument: its graph alive. names: of the parameters. application: how they enter, or
            None until ``Finder.apply`` has said it.
    """

    argument: Tensor
    names: list[str]
    application: Application | None = None


@dataclass
class Finder:
    """Finds how parameters enter arguments.

    Attributes:
        leaves: id of each parameter's leaf to its name.
    """

    leaves: Mapping[int, str] = field(default_factory=dict)
    _known: dict[Hashable, list[tuple[Route, Application, list[str]]]] = field(default_factory=dict)

    def start(self, leaves: Mapping[int, str]) -> None:
        """Begin a step with these parameters; others than before make all routes void."""
        if leaves != self.leaves:
            self._known.clear()
        self.leaves = leaves

    def use(self, key: Hashable, argument: Tensor) -> Use:
        """Which parameters enter an argument.

        Args:
            key: the same for the same argument of a program in every step.
            argument: its graph alive.
        """
        if not argument.requires_grad:
            return Use(argument, [])
        for route, template, names in self._known.get(key, ()):
            nodes = route.follow(argument)
            if nodes is not None:
                return Use(argument, names, template.remap(nodes.__getitem__))
        below = graph.leaves_below(graph.root_of(argument))
        return Use(argument, [self.leaves[leaf] for leaf in below if leaf in self.leaves])

    def apply(
        self, key: Hashable, use: Use, shifts: Callable[[], bool], *, vector: bool = False
    ) -> Application:
        """How the parameters enter.

        Args:
            key, use: as for ``use``. shifts, vector: see ``layers.find``.

        Raises:
            Opaque: not as a sum of affine terms; the message says why.
        """
        if not use.names:
            raise Opaque("an argument without parameters")
        if use.application is None:
            route = Route()
            application = layers.find(
                use.argument, self.leaves, route, vector=vector, shifts=vector and shifts()
            )
            use.application = application
            if not route.once:
                known = self._known.setdefault(key, [])
                known.insert(0, (route, application.remap(route.number), use.names))
                del known[KEPT:]
            route.close()
        return use.application
