"""Networks of the priors, and the codes of the autoregressive one."""
