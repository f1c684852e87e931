"""Sections of a stage's config that are no class of another package: ``text`` and ``conditioning``.

A class ``*Conditioning`` has the fields of its stage with that stage's defaults and ranges (tests/config/test_ranges.py
compares them); what the fields mean is documented in ``dalle2_jax.stages``.
"""

import dataclasses
from typing import Annotated

from dalle2_jax.ranges import CalibrationExamples, Fraction, Length, Range, Side, VocabSize


@dataclasses.dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer of a run: ``path`` names a stored one; without it, one of ``kind`` is made.

    "sentencepiece" is trained on the data's captions; "clip" and "glide" are those of the public models; for "labels",
    captions are the numbers of ``vocab_size`` classes.
    """

    kind: str = "sentencepiece"
    vocab_size: VocabSize = 400
    context_length: Length = 77
    path: str = ""


@dataclasses.dataclass(frozen=True)
class PriorConditioning:
    """How the diffusion prior's image and text conditioning is dropped, and whether its target is whitened."""

    drop_text: Fraction = 0.1
    drop_image: Fraction = 0.1
    whiten: bool = False
    calibration_examples: CalibrationExamples = 65_536


@dataclasses.dataclass(frozen=True)
class ArPriorConditioning:
    """How the autoregressive prior's text conditioning is dropped, and what its codes are calibrated on."""

    drop_text: Fraction = 0.1
    calibration_examples: CalibrationExamples = 65_536
    retained_variance: Fraction = 0.0


@dataclasses.dataclass(frozen=True)
class DecoderConditioning:
    """How the decoder's image and text conditioning is dropped, and whether it is an inpainting model."""

    drop_image: Fraction = 0.1
    drop_text: Fraction = 0.5
    empty_caption: bool = False
    inpaint: bool = False


@dataclasses.dataclass(frozen=True)
class UpsamplerConditioning:
    """The low-resolution image of an upsampler, how it is degraded in training, and how captions are dropped."""

    low_size: Side
    crop_fraction: Annotated[float, Range(0, 1, exclusive_min=True)] = 0.25
    blur_sigma: Annotated[float, Range(0.01, 100)] = 0.6
    blur_rate: Fraction = 1.0
    degradation: str = ""
    noise_augmentation: Fraction = 0.0
    sample_noise: Fraction = 0.0
    upscale: str = "cubic"
    drop_text: Fraction = 0.0
    inpaint: bool = False
    last_network: bool = False
