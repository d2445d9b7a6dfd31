"""The host's own traps: each is right here."""

import jax
import jax.numpy as jnp
import numpy as np
import numpyro.distributions as dist
import pytest

from numpyro_helmholtz.sites import site_log_prob

WRAPPERS = {
    "plain": lambda fn: fn,
    "event": lambda fn: fn.expand((2,)).to_event(1),
    "masked": lambda fn: fn.mask(True),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("total", [None, 3])
def test_slope_of_logits_at_zero(total, wrapper):
    """NumPyro's own is wrong there: logits are 0 whenever parents and biases are."""

    def log_prob(logit):
        fn = dist.Bernoulli(logits=logit) if total is None else dist.Binomial(total, logits=logit)
        fn = WRAPPERS[wrapper](fn)
        site = {"name": "x", "fn": fn, "value": jnp.ones(fn.batch_shape + fn.event_shape)}
        return site_log_prob(site).sum()

    def exact(logit):
        mean = (total or 1) * jax.nn.sigmoid(logit)
        return (2 if wrapper == "event" else 1) * (1 - mean)

    for logit in jnp.array([-1.0, 0.0, 1.0]):
        np.testing.assert_allclose(jax.grad(log_prob)(logit), exact(logit), rtol=1e-12)
    np.testing.assert_allclose(log_prob(jnp.array(0.0)), log_prob(jnp.array(1e-12)), rtol=1e-11)
