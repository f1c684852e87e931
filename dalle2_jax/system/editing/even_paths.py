"""Frames of a path that are equally far apart.

Equal steps between two embeddings are not equal steps between the images: an image may stay as it is over half of the
path, and change at once where the decoder takes it for something else. Here the path is divided where its images change
most, and of the images that were generated those are chosen whose neighbours are equally far apart.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8

from dalle2_jax.system.editing.similarity import Distance

Pixels = UInt8[np.ndarray, "N H W 3"]

Decode = Callable[[Float[np.ndarray, "N"]], Pixels]
"""Generates the images at places from 0 to 1 of a path."""

_FINE = 0.4
"""Distance of neighbouring images, over the mean distance of frames, above which the path between them is divided."""

_CLOSEST = 1e-6
"""Places that are closer are not divided: images that differ there show a jump."""

_GENERATED = 20
"""Most images that are generated for each frame."""

_STEPS = 64
"""Distances between frames that are tried."""

_BATCH = 32
"""Pairs of images that are compared at a time, so that a compiled distance has one shape."""


class EvenPath(NamedTuple):
    """The frames of a path.

    Attributes:
      places: of each frame, from 0 to 1.
      images: the frames.
    """

    places: Float[np.ndarray, "F"]
    images: Pixels


def even_path(decode: Decode, frames: int, distance: Distance) -> EvenPath:
    """Returns frames of a path, from its start to its end, whose neighbours are about equally far apart.

    About 5 images are generated for each frame, and more where a path jumps.

    Args:
      decode: generates images of the path.
      frames: how many frames, at least 2.
      distance: of two images.
    """
    places = np.linspace(0.0, 1.0, frames)
    images = decode(places)
    apart = _to_next(images, np.arange(frames - 1), distance)
    while len(places) < _GENERATED * frames:
        too_far = (apart > _FINE * apart.sum() / (frames - 1)) & (np.diff(places) > _CLOSEST)
        if not too_far.any():
            break
        after = np.flatnonzero(too_far) + 1
        between = (places[after - 1] + places[after]) / 2
        places, images = np.insert(places, after, between), np.insert(images, after, decode(between), axis=0)
        halves = np.repeat(too_far, 1 + too_far)  # each divided step is two now; the others are known
        apart = np.repeat(apart, 1 + too_far)
        apart[halves] = _to_next(images, np.flatnonzero(halves), distance)
    chosen = evenly_chosen(_all_distances(images, distance), frames)
    return EvenPath(places[chosen], images[chosen])


def evenly_chosen(apart: Float[np.ndarray, "N N"], frames: int) -> Int[np.ndarray, "F"]:
    """Returns the indices of so many images, the first and the last included, that are most evenly apart.

    Dynamic programming finds, for each of several steps s, the ascending indices i with the least sum of
    (apart[i, i'] - s)^2 over neighbours i, i'. Of these, those with the smallest ratio of the largest distance to the
    mean one are returned.

    Args:
      apart: distances of images i < j along a path, at least as many as frames.
      frames: how many are chosen.
    """
    ahead = np.triu(np.ones(apart.shape, bool), 1)
    best, least = np.linspace(0, len(apart) - 1, frames).astype(int), np.inf
    for step in np.unique(np.quantile(apart[ahead], np.linspace(0.0, 1.0, _STEPS))):
        chosen = _cheapest(np.where(ahead, np.square(apart - step), np.inf), frames)
        taken = apart[chosen[:-1], chosen[1:]]
        ratio = taken.max() / taken.mean() if taken.any() else np.inf
        if ratio < least:
            best, least = chosen, ratio
    return best


def _cheapest(cost: Float[np.ndarray, "N N"], frames: int) -> Int[np.ndarray, "F"]:
    """Returns the ascending indices from the first to the last whose steps have the least sum of costs."""
    total, sources = np.full(len(cost), np.inf), []
    total[0] = 0.0
    for _ in range(frames - 1):
        reached = total[:, None] + cost
        sources.append(reached.argmin(axis=0))
        total = reached.min(axis=0)
    path = [len(cost) - 1]
    for source in reversed(sources):
        path.append(int(source[path[-1]]))
    return np.asarray(path[::-1])


def _all_distances(images: Pixels, distance: Distance) -> Float[np.ndarray, "N N"]:
    """Returns the distance of each image to each later one; 0 elsewhere."""
    apart = np.zeros((len(images), len(images)))
    pairs = np.triu_indices(len(images), 1)
    apart[pairs] = _distances(images, *pairs, distance)
    return apart


def _to_next(images: Pixels, indices: Int[np.ndarray, "P"], distance: Distance) -> Float[np.ndarray, "P"]:
    """Returns the distance of images to the next ones."""
    return _distances(images, indices, indices + 1, distance)


def _distances(
    images: Pixels, indices: Int[np.ndarray, "P"], others: Int[np.ndarray, "P"], distance: Distance
) -> Float[np.ndarray, "P"]:
    """Returns the distances of pairs of images."""
    found = []
    for start in range(0, len(indices), _BATCH):
        rows = np.minimum(np.arange(start, start + _BATCH), len(indices) - 1)
        found.append(np.asarray(distance(images[indices[rows]], images[others[rows]]), np.float64))
    return np.concatenate(found)[: len(indices)]
