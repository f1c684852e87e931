"""How similar generated images are to given ones."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from dalle2_jax.system.cascade import Request

MAX_PSNR = 99.0
"""PSNR of equal images, in dB, and of images that differ less than it states."""

Distance = Callable[[UInt8[np.ndarray, "B H W 3"], UInt8[np.ndarray, "B H W 3"]], Float[np.ndarray, "B"]]
"""A distance of each image to the other of the same index, such as LPIPS."""


def psnr(image: UInt8[np.ndarray, "H W 3"], other: UInt8[np.ndarray, "H W 3"]) -> float:
    """Returns the peak signal-to-noise ratio of two images in dB, 10 log10(255^2 / mean squared error)."""
    error = np.square(image.astype(np.float64) - other).mean()
    return MAX_PSNR if error == 0 else float(min(MAX_PSNR, 10 * np.log10(255.0**2 / error)))


def root_mean_square(
    images: UInt8[np.ndarray, "B H W 3"], others: UInt8[np.ndarray, "B H W 3"]
) -> Float[np.ndarray, "B"]:
    """Returns the root mean squared difference of each image to the other of the same index, in levels of 255."""
    squared = np.square(images.astype(np.float64) - others.astype(np.float64))
    return np.sqrt(squared.reshape(len(images), -1).mean(axis=1))


def describer(
    names: Sequence[str], given: UInt8[np.ndarray, "N H W 3"], lpips: Distance | None
) -> Callable[[Request, UInt8[np.ndarray, "H W 3"]], tuple[str, dict[str, Any]]]:
    """Returns a function that compares a generated image with the given one, for `generation.collect`.

    Args:
      names: a caption for each index.
      given: the image to compare with for each index, of the size of generated ones.
      lpips: the perceptual distance; None for none.

    Returns:
      A function from a request and its image to a caption with the figures, and the figures by name.
    """

    def describe(request: Request, image: UInt8[np.ndarray, "H W 3"]) -> tuple[str, dict[str, Any]]:
        reference = given[request.index]
        figures = {"psnr": psnr(image, reference)}
        caption = f"{names[request.index]}, {figures['psnr']:.1f} dB"
        if lpips is not None:
            figures["lpips"] = float(lpips(image[None], reference[None])[0])
            caption += f", LPIPS {figures['lpips']:.3f}"
        return caption, figures

    return describe
