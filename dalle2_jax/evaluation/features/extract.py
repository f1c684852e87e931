"""Features of a data set, computed in batches of one shape."""

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice

import jax
import numpy as np
import tqdm
from jaxtyping import Float32, UInt8

from dalle2_jax.errors import DataError
from dalle2_jax.evaluation.features.network import FeatureNetwork


def extract(
    network: FeatureNetwork,
    images: UInt8[np.ndarray, "N H W 3"] | Iterable[np.ndarray],
    batch_size: int = 64,
    progress: bool = False,
) -> Float32[np.ndarray, "N D"]:
    """Returns the features of images of one size.

    The last batch is padded, so that one program is compiled. Logits are ``network.logits_of`` of the features.

    Args:
      network: the network.
      images: uint8[N, H, W, 3], or single images uint8[H, W, 3], in RGB; they are read one batch at a time.
      batch_size: images at a time, rounded up to a multiple of the network's devices.
      progress: whether to show a progress bar.

    Raises:
      DataError: there are no images, they differ in size, or one is no uint8 RGB image, is too small, or has NaN.
    """
    size = -(-batch_size // network.devices) * network.devices
    total = len(images) if isinstance(images, Sized) else None
    title = f"{network.name} features"
    with tqdm.tqdm(total=total, desc=title, unit="image", leave=False, disable=not progress) as bar:
        return batched(network, checked(images, network.min_size), size, bar)


def batched(
    encode: Callable[[np.ndarray], jax.Array], images: Iterable[np.ndarray], batch_size: int, bar: tqdm.tqdm
) -> Float32[np.ndarray, "N D"]:
    """Returns ``encode`` of images of one size, in batches of one size.

    Args:
      encode: uint8[B, H, W, 3] -> float32[B, D].
      images: at least one.
      batch_size: images at a time.
      bar: advances by the images of each batch.
    """
    found: list[np.ndarray] = []
    pending: list[tuple[jax.Array, int]] = []  # the host prepares a batch while the devices compute the one before
    for batch in _batches(images, batch_size):
        padded = np.concatenate([batch, np.repeat(batch[-1:], batch_size - len(batch), axis=0)])
        pending.append((encode(padded), len(batch)))
        if len(pending) > 1:
            found.append(_collect(pending.pop(0), bar))
    found += [_collect(each, bar) for each in pending]
    return np.concatenate(found)


def _batches(images: Iterable[np.ndarray], size: int) -> Iterator[np.ndarray]:
    remaining = iter(images)
    while batch := list(islice(remaining, size)):
        yield np.stack(batch)


def _collect(computed: tuple[jax.Array, int], bar: tqdm.tqdm) -> Float32[np.ndarray, "B D"]:
    values, count = computed
    bar.update(count)
    return np.asarray(values, np.float32)[:count]


def checked(images: Iterable[np.ndarray], min_size: int = 1) -> Iterator[UInt8[np.ndarray, "H W 3"]]:
    """Yields images after checking that they are uint8 RGB images of one size.

    Args:
      images: the images.
      min_size: smallest side, in pixels.

    Raises:
      DataError: there are none, or one is not as the first, is too small or has NaN; the message has its number.
    """
    first: tuple[int, ...] | None = None
    for number, image in enumerate(images):
        array = np.asarray(image)
        if array.dtype != np.uint8:
            raise DataError(f"image {number} {_unsupported(array)}: give uint8 from 0 to 255")
        if array.ndim != 3 or array.shape[2] != 3:
            raise DataError(f"image {number} has shape {array.shape}: give RGB images [H, W, 3]")
        if first is None:
            first = array.shape
            if min(first[:2]) < min_size:
                raise DataError(f"images are {_size(first)}, the network needs at least {min_size}x{min_size} pixels")
        elif array.shape != first:
            what = f"image {number} is {_size(array.shape)}, those before are {_size(first)}"
            raise DataError(f"{what}: resize them to one size")
        yield array
    if first is None:
        raise DataError("there are no images to compute features of")


def _unsupported(array: np.ndarray) -> str:
    """Returns what is wrong with an array that is not uint8."""
    if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
        return "has values that are not finite (NaN or infinity)"
    return f"has {array.dtype} values"


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[1]}x{shape[0]}"
