"""Keys that draw the same bits as JAX's own, in one dimension: they compile fast.

XLA compiles the loop of a threefry draw once for each site and each run of a program. On CPUs
its time grows with the number of dimensions, and in a deep program it was most of all. A draw
in one dimension, reshaped, has the same bits and takes a third of that time.
"""

from __future__ import annotations

import math
from typing import Any

import numpyro.distributions as dist
from jax import Array, random
from jax.extend.random import define_prng_impl

THREEFRY = "threefry2x32"

# What draws by bits alone. Some samplers, such as those of Poisson and gamma variables, look
# at the kind of their key.
PLAIN = frozenset(
    {
        dist.BernoulliLogits,
        dist.BernoulliProbs,
        dist.CategoricalLogits,
        dist.CategoricalProbs,
        dist.Exponential,
        dist.Laplace,
        dist.Normal,
        dist.Uniform,
    }
)
WRAPPERS = frozenset(
    {
        dist.ExpandedDistribution,
        dist.Independent,
        dist.MaskedDistribution,
        dist.TransformedDistribution,
    }
)


def _key(data: Array) -> Array:
    return random.wrap_key_data(data, impl=THREEFRY)


def _bits(data: Array, width: int, shape: tuple[int, ...]) -> Array:
    return random.bits(_key(data), (math.prod(shape),), f"uint{width}").reshape(shape)


FLAT = define_prng_impl(
    key_shape=(2,),
    seed=lambda seed: random.key_data(random.key(seed, impl=THREEFRY)),
    split=lambda data, shape: random.key_data(random.split(_key(data), shape)),
    random_bits=_bits,
    fold_in=lambda data, number: random.key_data(random.fold_in(_key(data), number)),
    name="flat_threefry2x32",
    tag="flat",
)


def flat(key: Array) -> Array:
    """A threefry key as one that draws the same bits in one dimension; others as they are."""
    if random.key_impl(key) != THREEFRY:
        return key
    return random.wrap_key_data(random.key_data(key), impl=FLAT)


def draws_plainly(fn: Any) -> bool:
    """Whether a distribution is known to sample alike by keys of any kind."""
    while type(fn) in WRAPPERS:
        fn = fn.base_dist
    return type(fn) in PLAIN
