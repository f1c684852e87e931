"""Types shared by all packages: array aliases, the batch, and how images are preprocessed.

Axes, one letter each in the whole package:

| letter | axis                    | letter  | axis                          |
| ------ | ----------------------- | ------- | ----------------------------- |
| B      | batch                   | H, W, C | image height, width, channels |
| L      | text length             | D       | network width                 |
| S      | sequence (any tokens)   | N, K    | attention heads, head width   |
| E      | CLIP embedding          | T       | diffusion steps               |
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypedDict

import jax
from jaxtyping import Float

from dalle2_jax.errors import UserError
from dalle2_jax.ranges import PositiveInt

Array = Any
"""A jax or numpy array. Batches hold numpy arrays on the host and jax arrays on the devices."""

PerExample = float | Float[jax.Array, ""] | Float[jax.Array, "B"]
"""A number for all examples of a batch, or one for each."""

Params = Mapping[str, Any]
"""Parameters of a Flax Linen module: nested mappings of arrays."""

Denoiser = Callable[[jax.Array, jax.Array], jax.Array]
"""(x_t [B, ...] float32, t [B] int32 network timesteps) -> prediction [B, ...].

Parameters and conditioning are already bound, so that guidance and samplers are independent of both.
"""


class WeightedMean(NamedTuple):
    """A metric of which a step may have no examples: its mean over steps is the sum of totals over that of weights."""

    total: Array
    weight: Array


Metrics = Mapping[str, jax.Array | WeightedMean]
"""Scalars by name."""


class Batch(TypedDict, total=False):
    """A batch of training data. It has the keys of ``Stage.inputs``, and those that ``Stage.prepare`` adds."""

    image: Array  # uint8[B, H, W, C]; scaled to [-1, 1] on the device
    low_res: Array  # uint8[B, h, w, C], degraded low-resolution copy of ``image`` if ``Stage.degrading`` is set
    tokens: Array  # int32[B, L]
    mask: Array  # bool[B, L], true on begin, text and end tokens
    image_emb: Array  # float32[B, E], CLIP image embedding, precomputed or computed by ``Stage.prepare``
    text_emb: Array  # float32[B, E], CLIP text embedding, precomputed or computed by ``Stage.prepare``
    text_seq: Array  # float32[B, L, D], final states of CLIP's text transformer, precomputed or computed
    null_text_emb: Array  # float32[B, E], text embedding of the empty caption, the same in every row
    null_text_seq: Array  # float32[B, L, D], text states of the empty caption, the same in every row
    null_mask: Array  # bool[B, L], mask of the empty caption, the same in every row


DEGRADATIONS = ("bsr", "bsr_light")
"""Degradations of low-resolution conditioning images that the host computes, see ``data.images.degradation``."""


@dataclasses.dataclass(frozen=True)
class Degrading:
    """The low-resolution conditioning of an upsampler: crops, each with a degraded copy ``factor`` times smaller.

    Attributes:
        name: one of `DEGRADATIONS`.
        image_size: side of the images that crops are taken from, in pixels.
        crop_side: side of the crops, in pixels.
        factor: ratio between the sides of a crop and of its low-resolution copy.
    """

    name: str
    image_size: int
    crop_side: int
    factor: int


RESAMPLES = ("area", "bicubic", "bilinear", "lanczos")
"""Resampling filters of images: "area" is implemented in this package, the others are Pillow's, antialiased."""

RESIZES = ("shortest", "exact")
"""How the two sides of an image are scaled, see `Preprocessing`."""


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """How an image of any size becomes CLIP's square uint8 input; `data.images.preprocess` computes it.

    Attributes:
        resample: one of `RESAMPLES`. "area" averages areas to shrink an image and uses cubic splines to enlarge it.
        resize: "shortest" scales the shorter side to ``size`` and keeps the aspect ratio, "exact" scales both sides.
        size: side after resizing, in pixels; None is the side of CLIP's input.
        crop: side of the square cut from the centre, in pixels; None is ``size``.
        crop_rounding: how half of an odd margin is rounded: "floor" as in transformers, "even" as in torchvision
            (to the nearest even number).

    Raises:
        UserError: a value is unknown, or the crop is larger than the resized image.
    """

    resample: str = "area"
    resize: str = "shortest"
    size: PositiveInt | None = None
    crop: PositiveInt | None = None
    crop_rounding: str = "floor"

    def __post_init__(self) -> None:
        choices = (
            ("resample", self.resample, RESAMPLES),
            ("resize", self.resize, RESIZES),
            ("crop_rounding", self.crop_rounding, ("floor", "even")),
        )
        for name, value, values in choices:
            if value not in values:
                raise UserError(f"preprocessing.{name} {value!r} is unknown: use {' or '.join(values)}")
        for name, value in (("size", self.size), ("crop", self.crop)):
            if value is not None and value < 1:
                raise UserError(f"preprocessing.{name} must be at least 1, got {value}")
        if self.crop is not None and (self.size is None or self.crop > self.size):
            raise UserError(f"preprocessing.crop {self.crop} must be at most preprocessing.size, {self.size}")

    def side(self, clip_side: int) -> int:
        """Returns the side of the preprocessed image, in pixels, for a CLIP whose input has side ``clip_side``."""
        return self.crop or self.size or clip_side

    def at(self, side: int) -> "Preprocessing":
        """Returns this preprocessing if its result has the side ``side``, in pixels, else one whose result has."""
        return self if self.side(side) == side else dataclasses.replace(self, size=None, crop=None)


def complete_contract(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a stored embedding contract, with defaults for fields that older versions did not store.

    Contracts are compared in this form, in which a missing field equals its default.
    """
    preprocessing = stored.get("preprocessing")
    given = preprocessing if isinstance(preprocessing, Mapping) else {}
    return {**stored, "preprocessing": {**dataclasses.asdict(Preprocessing()), **given}}
