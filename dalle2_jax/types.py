"""The words every room shares: array aliases, the batch, and the user's error.

Axis glossary (one letter an axis, everywhere in this package):

| letter | axis                    | letter  | axis                          |
| ------ | ----------------------- | ------- | ----------------------------- |
| B      | batch                   | H, W, C | image height, width, channels |
| L      | text length             | D       | network width                 |
| S      | sequence (any tokens)   | N, K    | attention heads, head width   |
| E      | CLIP embedding          | T       | diffusion steps               |
"""

import dataclasses
import difflib
from collections.abc import Callable, Mapping
from typing import Any, TypedDict

import jax
import numpy as np

Array = jax.Array | np.ndarray

Params = Mapping[str, Any]
"""A tree of parameters as Flax Linen keeps it: nested dicts of arrays."""

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_t [B, ...] float32, t [B] int32 network timesteps) -> prediction [B, ...].

Parameters and conditioning are already bound, so guidance and samplers know neither.
"""

Metrics = Mapping[str, jax.Array]
"""Scalars by name."""


class Batch(TypedDict, total=False):
    """What crosses from data to the stages. Every key is optional; a stage asks for its own."""

    image: Array  # uint8[B, H, W, C]; normalised on the device
    low_res: Array  # uint8[B, h, w, C], ``image`` made smaller and worse on the host, where a stage asks for that
    tokens: Array  # int32[B, L]
    mask: Array  # bool[B, L], true on begin, text and end tokens
    image_emb: Array  # float32[B, E], precomputed by CLIP or added by Stage.prepare
    text_emb: Array  # float32[B, E], likewise
    text_seq: Array  # float32[B, L, D], the text transformer's final states, likewise
    null_text_emb: Array  # float32[B, E], of the empty caption, the same in every row, likewise
    null_text_seq: Array  # float32[B, L, D], likewise
    null_mask: Array  # bool[B, L], likewise
    base: Any  # what is borrowed under a LoRA, which Stage.prepare hands to Stage.loss


DEGRADATIONS = ("bsr", "bsr_light")
"""What the host can do to an upsampler's pictures, see ``data.degradation``."""


@dataclasses.dataclass(frozen=True)
class Degrading:
    """What an upsampler asks of its data: crops of ``image``, and each ``factor`` times smaller as ``low_res``."""

    name: str  # of DEGRADATIONS
    image_size: int  # side of the pictures that crops are cut from
    crop_side: int
    factor: int


class UserError(Exception):
    """A mistake that the user can mend. Entry points print its one line and exit with code 1."""


class UsageError(UserError):
    """A wrong word on the command line or in a config. Entry points exit with code 2."""


def choose(what: str, name: str, options: Mapping[str, Any]) -> Any:
    """Returns options[name].

    Raises:
      UsageError: there is none; the message offers the nearest name and lists them all.
    """
    if name in options:
        return options[name]
    near = difflib.get_close_matches(str(name), options, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown {what} {name!r}: {hint}(choose from {', '.join(options)})")
