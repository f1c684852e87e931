"""Digests by which images find their stored embeddings, and checksums by which a wrong match is noticed."""

import hashlib
from collections.abc import Iterable

import cv2
import numpy as np
from jaxtyping import UInt8

_SIDE = 8


def name_digest(name: str) -> int:
    """Returns a 64-bit digest of the name of a record."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big")


def caption_digest(captions: Iterable[str]) -> int:
    """Returns a 64-bit digest of captions in their order, with runs of white space as one space."""
    return name_digest("\n".join(" ".join(caption.split()) for caption in captions))


def thumbnail(image: UInt8[np.ndarray, "S S 3"]) -> UInt8[np.ndarray, "8 8 3"]:
    """Returns an image averaged down to 8 x 8 pixels, about the same at any resolution."""
    return cv2.resize(image, (_SIDE, _SIDE), interpolation=cv2.INTER_AREA)


def same_image(one: UInt8[np.ndarray, "8 8 3"], other: UInt8[np.ndarray, "8 8 3"]) -> bool:
    """Returns whether two thumbnails may be of one image, resized, cropped and encoded in different ways.

    They may differ by a tenth of the mean squared difference of two unrelated images, or by 8 levels.
    """
    one, other = one.astype(np.float32), other.astype(np.float32)
    return bool(np.mean((one - other) ** 2) <= max(0.1 * (np.var(one) + np.var(other)), 8**2))
