"""Public torch checkpoints in and out: a rename table for each, with a checked bijection.

A module here for each family says what a file is (sizes are read from shapes and config files), which sections of a
stage's config it makes, and by which ``rules`` its tensors become the leaves of that stage's parameters and back.
"""

from dalle2_jax.weights.component import Component, merged
from dalle2_jax.weights.rules import Rule, empty, fill
from dalle2_jax.weights.tensors import Tensor, open_tensors, write_safetensors

__all__ = ["Component", "Rule", "Tensor", "empty", "fill", "merged", "open_tensors", "write_safetensors"]
