"""Typographic attacks on CLIP: a word pasted on an image (Goh et al. 2021; Ramesh et al. 2022, figure 6)."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float, Float64, UInt8
from PIL import Image, ImageDraw, ImageFont

from dalle2_jax.errors import UsageError

MAX_WORD = 100
"""Characters of a pasted word."""

_MARGIN = 0.25
"""Margin of the label around the word, over the word's height."""


def with_word(pixels: UInt8[np.ndarray, "H W 3"], word: str, size: float) -> UInt8[np.ndarray, "H W 3"]:
    """Returns an image with a word in black on a white label in its centre.

    Args:
      pixels: the image.
      word: the word.
      size: width of the label over that of the image, above 0 and at most 1; a short word is at most as high as 40 %
        of the image.

    Raises:
      UsageError: the word is empty, too long, or has more than one line.
    """
    if not word.strip() or len(word) > MAX_WORD or not word.isprintable():
        raise UsageError(f"word must be 1 to {MAX_WORD} characters of one line, got {ascii(word)[:120]}")
    height, width = pixels.shape[:2]
    sheet = Image.fromarray(pixels)
    pen = ImageDraw.Draw(sheet)
    reference = 100.0
    left, top, right, bottom = pen.textbbox((0, 0), word, font=ImageFont.load_default(reference))
    scale = min(size * width / (right - left + 2 * _MARGIN * reference), 0.4 * height / reference)
    font = ImageFont.load_default(max(1.0, reference * scale))
    left, top, right, bottom = pen.textbbox((0, 0), word, font=font)
    margin = _MARGIN * reference * scale
    centre = ((width - (right - left)) / 2, (height - (bottom - top)) / 2)
    box = (centre[0] - margin, centre[1] - margin, centre[0] + right - left + margin, centre[1] + bottom - top + margin)
    pen.rectangle(box, fill="white")
    pen.text((centre[0] - left, centre[1] - top), word, fill="black", font=font)
    return np.asarray(sheet)


def probabilities(
    image_emb: Float[np.ndarray, "N E"], text_emb: Float[np.ndarray, "K E"], log_scale: float
) -> Float64[np.ndarray, "N K"]:
    """Returns CLIP's zero-shot probabilities of labels (Radford et al. 2021, section 3.1).

    Args:
      image_emb: of images.
      text_emb: of the labels.
      log_scale: logarithm of the inverse temperature.
    """
    units = [emb / np.linalg.norm(emb.astype(np.float64), axis=1, keepdims=True) for emb in (image_emb, text_emb)]
    logits = np.exp(log_scale) * (units[0] @ units[1].T)
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return weights / weights.sum(axis=1, keepdims=True)


def ranked(labels: Sequence[str], shares: Float[np.ndarray, "K"]) -> str:
    """Returns labels with their probabilities in percent, the most likely first."""
    order = np.argsort(-shares, kind="stable")
    return ", ".join(f"{labels[place]} {100 * shares[place]:.1f} %" for place in order)
