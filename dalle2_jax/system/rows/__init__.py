"""Images of several calls in one batch, one stage at a time: what a server samples."""

from dalle2_jax.system.rows.calls import COMMANDS, RowCall, until
from dalle2_jax.system.rows.sampler import Row, RowSampler

__all__ = ["COMMANDS", "Row", "RowCall", "RowSampler", "until"]
