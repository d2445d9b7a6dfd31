"""Small programs that several test files share."""

import itertools

import pyro
import pyro.distributions as dist
import torch
from torch import nn


def patterns(n, dtype=torch.float64):
    """All binary vectors of length n."""
    return torch.tensor(list(itertools.product([0.0, 1.0], repeat=n)), dtype=dtype)


class SBN:
    """A sigmoid belief network x(3) ← h1(2) ← h2(1), and a guide, in float64."""

    def __init__(self, dtype=torch.float64, spread=1.0):
        self.p1, self.p2 = nn.Linear(2, 3).to(dtype), nn.Linear(1, 2).to(dtype)
        self.q1, self.q2 = nn.Linear(3, 2).to(dtype), nn.Linear(2, 1).to(dtype)
        self.top = nn.Parameter(torch.zeros(1, dtype=dtype))
        self.down = nn.ModuleDict({"p1": self.p1, "p2": self.p2})
        self.down.register_parameter("top", self.top)
        self.up = nn.ModuleDict({"q1": self.q1, "q2": self.q2})
        with torch.no_grad():
            for p in [*self.down.parameters(), *self.up.parameters()]:
                p.copy_(torch.randn(p.shape) * spread)

    def model(self, x):
        pyro.module("down", self.down)
        with pyro.plate("data", len(x)):
            h2 = pyro.sample("h2", dist.Bernoulli(logits=self.top).to_event(1))
            h1 = pyro.sample("h1", dist.Bernoulli(logits=self.p2(h2)).to_event(1))
            pyro.sample("x", dist.Bernoulli(logits=self.p1(h1)).to_event(1), obs=x)

    def guide(self, x):
        pyro.module("up", self.up)
        with pyro.plate("data", len(x)):
            h1 = pyro.sample("h1", dist.Bernoulli(logits=self.q1(x)).to_event(1))
            pyro.sample("h2", dist.Bernoulli(logits=self.q2(h1)).to_event(1))

    def log_joint(self, x, h1, h2):
        """log p(x, h1, h2); the arguments broadcast."""
        value = dist.Bernoulli(logits=self.top).log_prob(h2).sum(-1)
        value = value + dist.Bernoulli(logits=self.p2(h2)).log_prob(h1).sum(-1)
        return value + dist.Bernoulli(logits=self.p1(h1)).log_prob(x).sum(-1)

    def log_guide(self, x, h1, h2):
        """log q(h1, h2 | x)."""
        value = dist.Bernoulli(logits=self.q1(x)).log_prob(h1).sum(-1)
        return value + dist.Bernoulli(logits=self.q2(h1)).log_prob(h2).sum(-1)

    def latents(self):
        """All values of (h1, h2), each (8, ·)."""
        h = patterns(3, self.top.dtype)
        return h[:, :2], h[:, 2:]

    def log_likelihood(self, x):
        """log p(x) per datum by enumeration."""
        h1, h2 = self.latents()
        return self.log_joint(x[:, None], h1, h2).logsumexp(1)


def snapshot():
    """All parameters of the store, copied."""
    return {k: v.detach().clone() for k, v in pyro.get_param_store()._params.items()}
