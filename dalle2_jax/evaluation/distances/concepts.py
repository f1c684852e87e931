"""Which concept an image shows, by the real image that looks most like it: for data of one object in several styles.

    distances = perceptual_distances(samples, real_images, lpips.load("runs/lpips"))
    ranks = rank_concepts(distances, concepts, styles, real_concepts, real_styles)
    print(ranks.top(1).mean(), ranks.top(10).mean(), ranks.same_style.mean())

The distances depend on images alone, so that shuffled captions, as a baseline, need them no second time.
"""

from collections.abc import Sequence
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float, Float32, Int64, UInt8

from dalle2_jax.errors import DataError, printable
from dalle2_jax.evaluation import lpips as perceptual
from dalle2_jax.evaluation.features.extract import checked
from dalle2_jax.evaluation.lpips import Lpips

MEMORY = 2 << 30
"""Bytes of the embeddings that are held at a time."""

PIXEL_SIDE = 32
"""Side that images are resized to for the distance of pixels."""

_BATCH = 16


class ConceptRanks(NamedTuple):
    """How near the real images of the right concept are.

    Attributes:
      nearest: index of the nearest candidate of the same style, int64[N].
      rank: place of the right concept among all concepts of that style, int64[N]; 1 if it is the nearest.
      same_style: whether the nearest candidate of all has the right style, bool[N].
    """

    nearest: Int64[np.ndarray, "N"]
    rank: Int64[np.ndarray, "N"]
    same_style: Bool[np.ndarray, "N"]

    def top(self, count: int) -> Bool[np.ndarray, "N"]:
        """Returns whether the right concept is among the nearest ``count`` ones."""
        return self.rank <= count


def perceptual_distances(
    images: UInt8[np.ndarray, "N H W 3"] | Sequence[np.ndarray],
    candidates: UInt8[np.ndarray, "M H W 3"] | Sequence[np.ndarray],
    lpips: Lpips | None = None,
    memory: int = MEMORY,
) -> Float32[np.ndarray, "N M"]:
    """Returns the distance of each image to each candidate.

    Images are embedded once. Candidates are embedded once if the images' embeddings take half of ``memory`` at most
    (500 images of 64x64 pixels for VGG16 and 2 GiB), and once for each part of the images otherwise.

    Args:
      images: generated images of one size.
      candidates: real images; of the same size, if ``lpips`` is given.
      lpips: LPIPS; None for the root of the mean squared difference of pixels in [0, 1] at 32x32.
      memory: bytes of the embeddings that are held at a time.

    Raises:
      DataError: a set is empty, its images differ in size, or they are not uint8 RGB images.
    """
    ours, theirs = list(checked(images)), list(checked(candidates))
    if lpips is None:
        return _pixel_distances(ours, theirs)
    if ours[0].shape != theirs[0].shape:
        raise DataError(f"LPIPS compares images of equal sizes, got {ours[0].shape} and {theirs[0].shape}")
    origin = lpips.embed(ours[:1], batch_size=_BATCH)  # close to all embeddings, so that less cancels in differences
    height, width = (max(1, memory // (part * origin.nbytes * _BATCH)) * _BATCH for part in (2, 8))
    result = np.empty((len(ours), len(theirs)), np.float32)
    for row in range(0, len(ours), height):
        embedded = lpips.embed(ours[row : row + height], batch_size=_BATCH) - origin
        for column in range(0, len(theirs), width):
            others = lpips.embed(theirs[column : column + width], batch_size=_BATCH) - origin
            result[row : row + height, column : column + width] = perceptual.distances(embedded, others)
    return result


def _pixel_distances(images: list[np.ndarray], candidates: list[np.ndarray]) -> Float32[np.ndarray, "N M"]:
    ours, theirs = _small(images), _small(candidates)
    return np.sqrt(perceptual.distances(ours, theirs) / ours.shape[1])


def _small(images: list[np.ndarray]) -> Float32[np.ndarray, "N D"]:
    side = (PIXEL_SIDE, PIXEL_SIDE)
    resized = [cv2.resize(image, side, interpolation=cv2.INTER_AREA).reshape(-1) for image in images]
    return np.stack(resized).astype(np.float32) / np.float32(255)


def rank_concepts(
    distances: Float[np.ndarray, "N M"],
    concepts: Sequence[str],
    styles: Sequence[str],
    candidate_concepts: Sequence[str],
    candidate_styles: Sequence[str],
) -> ConceptRanks:
    """Returns the rank of each image's concept among the real images.

    A concept is as near as the nearest of its images. Of concepts at one distance none is ahead of the other.

    Args:
      distances: as `perceptual_distances` returns them.
      concepts: the concept of each image's caption, N of them.
      styles: the style of each image's caption, N of them.
      candidate_concepts: the concept of each candidate, M of them.
      candidate_styles: the style of each candidate, M of them.

    Raises:
      DataError: the numbers differ, or a concept has no candidate of its style.
    """
    if distances.shape != (len(concepts), len(candidate_concepts)) or len(concepts) != len(styles):
        raise DataError(f"{len(concepts)} concepts and {len(styles)} styles for distances {distances.shape}")
    if len(candidate_concepts) != len(candidate_styles):
        raise DataError(f"{len(candidate_concepts)} candidates have {len(candidate_styles)} styles")
    wanted, wanted_style = np.asarray(concepts, object), np.asarray(styles, object)
    names, style_names = np.asarray(candidate_concepts, object), np.asarray(candidate_styles, object)
    nearest, rank = np.zeros(len(concepts), np.int64), np.zeros(len(concepts), np.int64)
    for style in dict.fromkeys(styles):
        rows, columns = np.flatnonzero(wanted_style == style), np.flatnonzero(style_names == style)
        nearest[rows], rank[rows] = _rank(distances[np.ix_(rows, columns)], wanted[rows], names[columns], style)
        nearest[rows] = columns[nearest[rows]]
    same_style = style_names[distances.argmin(axis=1)] == wanted_style
    return ConceptRanks(nearest, rank, same_style.astype(bool))


def _rank(
    distances: Float[np.ndarray, "N M"], wanted: np.ndarray, names: np.ndarray, style: str
) -> tuple[Int64[np.ndarray, "N"], Int64[np.ndarray, "N"]]:
    """Returns the nearest candidate of each image and the rank of its concept, among candidates of one style."""
    number = {name: index for index, name in enumerate(dict.fromkeys(names))}
    for name in wanted:
        if name not in number:
            what = f"concept {printable(name)} of style {printable(style)}"
            raise DataError(f"no real image shows {what}: add it to the candidates or omit its caption")
    codes = np.array([number[name] for name in names])
    order = np.argsort(codes, kind="stable")
    starts = np.searchsorted(codes[order], np.arange(len(number)))
    by_concept = np.minimum.reduceat(distances[:, order], starts, axis=1)
    right = by_concept[np.arange(len(wanted)), [number[name] for name in wanted]]
    return distances.argmin(axis=1), 1 + (by_concept < right[:, None]).sum(axis=1)
