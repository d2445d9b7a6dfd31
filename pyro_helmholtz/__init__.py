"""Wake-sleep and natural gradients for Pyro programs.

Reading order, the way of one update:

1. ``trace``: run model and guide, per-datum log-weights (``checks``, ``pairing``).
2. ``estimators``: a surrogate whose gradient is the direction.
3. ``graph`` and ``layers``: how parameters enter the sites.
4. ``fisher``: families, evidence, blocks, solvers, memory.
5. ``svi``, ``natural`` and ``bidirectional``: the front ends; then the host's optimiser.
6. ``evaluation`` and ``diagnostics``: what came out.

Two ways of their own: ``alws`` needs no guide (``sleep_set``: dreams as matrices,
``exponential_families``, ``kernels``, ``regression`` and ``gradient_models``), and
``stochastic_backprop`` lets gradients flow through samples (``reparameterised``, ``price``).
"""

from .alws import ALWS
from .bidirectional import BiHM, NaturalBiHM
from .diagnostics import Structure
from .distributions import GeneralizedExtremeValue, Levy, RankOnePrecisionNormal, Stable
from .estimators.alws import ALWS_ELBO
from .estimators.bidirectional import BiHM_ELBO
from .estimators.reparameterised import StochasticBackprop_ELBO
from .estimators.reweighted import RWS_ELBO
from .estimators.wake_sleep import WakeSleep_ELBO
from .evaluation import LogLikelihood, log_likelihood
from .exponential_families import ExponentialFamily, register_exponential_family
from .fisher.registry import register_fisher
from .gradient_models import (
    DirectRegression,
    GradientModel,
    KernelRegression,
    NetworkRegression,
    Nystrom,
    ParticleSimulator,
    RandomFeatures,
)
from .imputation import impute
from .kernels import GaussianKernel, LinearFeatures
from .natural import NaturalRWS
from .partition import LogPartition, bidirectional_log_likelihood, log_partition
from .stochastic_backprop import StochasticBackprop
from .svi import RWS, Directions, WakeSleep

__version__ = "0.1.0"

__all__ = [
    # front ends
    "ALWS",
    "BiHM",
    "NaturalBiHM",
    "NaturalRWS",
    "RWS",
    "StochasticBackprop",
    "WakeSleep",
    # ELBOs for pyro.infer.SVI
    "ALWS_ELBO",
    "BiHM_ELBO",
    "RWS_ELBO",
    "StochasticBackprop_ELBO",
    "WakeSleep_ELBO",
    # distributions
    "GeneralizedExtremeValue",
    "Levy",
    "RankOnePrecisionNormal",
    "Stable",
    # regressions of ALWS
    "DirectRegression",
    "GaussianKernel",
    "GradientModel",
    "KernelRegression",
    "LinearFeatures",
    "NetworkRegression",
    "Nystrom",
    "ParticleSimulator",
    "RandomFeatures",
    # extension
    "ExponentialFamily",
    "register_exponential_family",
    "register_fisher",
    # results
    "Directions",
    "LogLikelihood",
    "LogPartition",
    "Structure",
    "bidirectional_log_likelihood",
    "impute",
    "log_likelihood",
    "log_partition",
]
