"""Wake-sleep and natural gradients for NumPyro programs.

Reading order, the way of one update:

1. ``trace``: run model and guide, per-datum log-weights (``checks``, ``pairing``).
2. ``estimators``: a surrogate whose gradient is the direction.
3. ``graph`` and ``layers``: how parameters enter the sites.
4. ``fisher``: families, evidence, blocks, solvers, memory.
5. ``svi`` and ``natural``: the front ends; then the host's optimiser.
6. ``evaluation`` and ``diagnostics``: what came out.
"""

from .diagnostics import Structure
from .estimators.reweighted import RWS_ELBO
from .estimators.wake_sleep import WakeSleep_ELBO
from .evaluation import LogLikelihood, log_likelihood
from .fisher.families import register_fisher
from .natural import NaturalRWS
from .svi import RWS, Directions, WakeSleep

__version__ = "0.1.0"

__all__ = [
    # front ends
    "NaturalRWS",
    "RWS",
    "WakeSleep",
    # ELBOs for numpyro.infer.SVI
    "RWS_ELBO",
    "WakeSleep_ELBO",
    # extension
    "register_fisher",
    # results
    "Directions",
    "LogLikelihood",
    "Structure",
    "log_likelihood",
]
