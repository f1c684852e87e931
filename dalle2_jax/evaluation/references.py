"""Features of real images, cached by the images' content, in the user's cache folder; statistics of a data set.

A chunk of `CHUNK` images is one file, named by a hash of its pixels: data of any kind are recognised however they are
named, and an interrupted computation continues.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tqdm
from jaxtyping import Float32, UInt8

from dalle2_jax import data
from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.distances import Moments, Origin, Statistics
from dalle2_jax.evaluation.examples import check_count
from dalle2_jax.evaluation.features import FeatureNetwork, extract
from dalle2_jax.evaluation.samples import folder_name, read_array
from dalle2_jax.files import cache_folder, write_array

CHUNK = 256
"""Images of one file of the cache."""


def chunks(
    source: data.Source, indices: Sequence[int], progress: bool = False
) -> Iterator[UInt8[np.ndarray, "B H W 3"]]:
    """Yields the images of examples, `CHUNK` at a time.

    Raises:
      DataError: the data have no images.
    """
    images = source.select(("image",))
    with tqdm.tqdm(total=len(indices), desc="real images", unit="image", leave=False, disable=not progress) as bar:
        for start in range(0, len(indices), CHUNK):
            chosen = indices[start : start + CHUNK]
            yield images.fetch(chosen)["image"]
            bar.update(len(chosen))


def real_features(
    network: FeatureNetwork, source: data.Source, indices: Sequence[int], progress: bool = False
) -> Float32[np.ndarray, "N D"]:
    """Returns the features of examples, from the cache where they are there.

    Args:
      network: the network.
      source: of images of one size.
      indices: of the examples.
      progress: whether a progress bar is shown.
    """
    return np.concatenate([chunk_features(network, images) for images in chunks(source, indices, progress)])


def chunk_features(
    network: FeatureNetwork, images: UInt8[np.ndarray, "B H W 3"], batch_size: int = 64
) -> Float32[np.ndarray, "B D"]:
    """Returns the features of some images, from the cache if they are there; a damaged file is replaced."""
    path = cache_path(network, images)
    if path.is_file():
        with contextlib.suppress(DataError):
            stored = read_array(path, len(images) * network.dims * 4)
            if stored.dtype == np.float32 and stored.shape == (len(images), network.dims):
                return stored
    found = extract(network, images, batch_size)
    with contextlib.suppress(OSError):  # a user without a cache folder computes them again
        write_array(path, found)
    return found


def cache_path(network: FeatureNetwork, images: UInt8[np.ndarray, "B H W 3"]) -> Path:
    """Returns the file of the features of some images."""
    digest = hashlib.blake2b(np.ascontiguousarray(images).data, digest_size=16)
    digest.update(str(images.shape).encode())
    return cache_folder("features") / folder_name(network) / f"{digest.hexdigest()}.npy"


def origin_of(network: FeatureNetwork, size: int, name: str = "") -> Origin:
    """Returns where features come from, which statistics record.

    Args:
      network: the network.
      size: side of the images before they are prepared for the network, in pixels.
      name: of the data set.
    """
    return Origin(network.name, network.fingerprint, f"center crop, {size}x{size}", name)


def statistics_of(
    network: FeatureNetwork, source: data.Source, num: int | None = None, name: str = "", progress: bool = False
) -> Statistics:
    """Returns the mean and covariance of the features of a data set, which others can compare their images with.

    Args:
      network: the network.
      source: of images of one size.
      num: of images; None for all.
      name: of the data set.
      progress: whether a progress bar is shown.

    Raises:
      UserError: the data have fewer than ``num`` images.
    """
    count = len(source) if num is None else num
    check_count(count, source)
    moments, size = Moments(), 0
    for images in chunks(source, range(count), progress):
        size = images.shape[1]
        moments.update(chunk_features(network, images))
    return moments.statistics(origin_of(network, size, name))
