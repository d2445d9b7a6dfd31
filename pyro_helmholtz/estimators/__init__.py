"""Estimators of the wake-sleep family; each is also an ELBO for Pyro's own SVI."""
