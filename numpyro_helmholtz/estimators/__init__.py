"""Estimators of the wake-sleep family; each is also an ELBO for NumPyro's own SVI."""
