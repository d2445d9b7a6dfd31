"""Small programs that several test files share."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import numpyro
import numpyro.distributions as dist
from jax import random


def patterns(n):
    """All binary vectors of length n."""
    return jnp.array(list(itertools.product([0.0, 1.0], repeat=n)))


def bernoulli(name, logits, obs=None):
    return numpyro.sample(name, dist.Bernoulli(logits=logits).to_event(1), obs=obs)


def log_bernoulli(logits, value):
    return dist.Bernoulli(logits=logits).log_prob(value).sum(-1)


SHAPES = {
    "p1": ((2, 3), (3,)),
    "p2": ((1, 2), (2,)),
    "q1": ((3, 2), (2,)),
    "q2": ((2, 1), (1,)),
}


class SBN:
    """A sigmoid belief network x(3) ← h1(2) ← h2(1), and a guide.

    ``values`` are starting values of the parameters: weights ``p1.w`` and so on, biases
    ``p1.b``, and ``top``.
    """

    def __init__(self, seed=5, spread=1.0):
        rng = np.random.default_rng(seed)
        self.values = {"top": spread * rng.normal(size=1)}
        for name, (weight, bias) in SHAPES.items():
            self.values[f"{name}.w"] = spread * rng.normal(size=weight)
            self.values[f"{name}.b"] = spread * rng.normal(size=bias)
        self.values = {name: jnp.asarray(value) for name, value in self.values.items()}

    def param(self, name):
        return numpyro.param(name, self.values[name])

    def layer(self, name, h):
        return h @ self.param(f"{name}.w") + self.param(f"{name}.b")

    def model(self, x):
        with numpyro.plate("data", len(x)):
            h2 = bernoulli("h2", self.param("top"))
            h1 = bernoulli("h1", self.layer("p2", h2))
            bernoulli("x", self.layer("p1", h1), obs=x)

    def guide(self, x):
        with numpyro.plate("data", len(x)):
            h1 = bernoulli("h1", self.layer("q1", x))
            bernoulli("h2", self.layer("q2", h1))

    @staticmethod
    def log_joint(params, x, h1, h2):
        """log p(x, h1, h2); the arguments broadcast."""
        return (
            log_bernoulli(params["top"], h2)
            + log_bernoulli(h2 @ params["p2.w"] + params["p2.b"], h1)
            + log_bernoulli(h1 @ params["p1.w"] + params["p1.b"], x)
        )

    @staticmethod
    def log_guide(params, x, h1, h2):
        """log q(h1, h2 | x)."""
        return log_bernoulli(x @ params["q1.w"] + params["q1.b"], h1) + log_bernoulli(
            h1 @ params["q2.w"] + params["q2.b"], h2
        )

    @staticmethod
    def latents():
        """All values of (h1, h2), each (8, ·)."""
        h = patterns(3)
        return h[:, :2], h[:, 2:]

    def log_likelihood(self, params, x):
        """log p(x) per datum by enumeration."""
        h1, h2 = self.latents()
        return jax.nn.logsumexp(self.log_joint(params, x[:, None], h1, h2), 1)


def of_params():
    """Plain parameters, one of them constrained."""

    def init(name, *shape):
        return numpyro.param(name, lambda key: 0.5 * random.normal(key, shape))

    def model(x):
        w, b = init("w", 2, 3), init("b", 3)
        top = numpyro.param("top", jnp.full(2, 0.4), constraint=dist.constraints.unit_interval)
        with numpyro.plate("data", len(x)):
            h = numpyro.sample("h", dist.Bernoulli(top).to_event(1))
            bernoulli("x", h @ w + b, obs=x)

    def guide(x):
        v = init("v", 3, 2)
        with numpyro.plate("data", len(x)):
            bernoulli("h", x @ v)

    return model, guide
