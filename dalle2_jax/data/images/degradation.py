"""Degraded low-resolution images for upsamplers to train on: blurred, resized, noisy, compressed.

The pipeline of BSRGAN (Zhang et al. 2021, arXiv 2103.14006, section 3) with the parameters that latent diffusion
releases for its upsamplers (Rombach et al. 2022), which Ramesh et al. 2022 (section 2.1) take for 256 -> 1024. All
but the last step come in random order:

    a quarter of the images at factor 4 are halved first, by cv2 or by Pillow's antialiased cubics; then
    blur      half isotropic, half anisotropic Gaussians ("bsr" has two, "bsr_light" one of a quarter of the width)
    resize    by 1 to twice the factor; or, of the rest, a shifted Gaussian and every n-th pixel
    shrink    to the requested size, always after ``resize``
    noise     Gaussian: 40 % per pixel and channel, 40 % per pixel, 20 % with correlated channels
    compress  JPEG, of 90 % of the images
    compress  JPEG, always, and last

Two differences from the release: its camera step, which is switched off there, is omitted; and the even kernels of the
light variant, which move an image by half a pixel, are one pixel larger here.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from dalle2_jax.data.images import decoding
from dalle2_jax.types import Degrading

FloatImage = Float32[np.ndarray, "H W 3"]
"""RGB in [0, 1]."""

INTERPOLATIONS = (cv2.INTER_LINEAR, cv2.INTER_CUBIC, cv2.INTER_AREA)
"""Interpolations of every resize, with equal probabilities."""

_HALVED_AT, _STRIDE_TAPS, _COMPRESS_RATE = 4, 25, 0.9


@dataclass(frozen=True)
class Recipe:
    """The strength of a degradation.

    Attributes:
        slots: the steps, without "shrink".
        width: factor on the widths of the blurs. At the degradation factor f, the variances of an anisotropic kernel
            are from 0 to (4 + f) * width, the standard deviation of an isotropic one from 0 to (2 + 0.2 f) * width.
        isotropic: kernel sizes in pixels.
        anisotropic: kernel sizes in pixels.
        resize_rate: probability of resizing rather than taking every f-th pixel.
        noise: minimum and maximum standard deviation, in levels of 255.
        quality: minimum and maximum quality of JPEG.
        halve_rate: probability of halving first, at factor 4.
    """

    slots: tuple[str, ...]
    width: float
    isotropic: Sequence[int]
    anisotropic: Sequence[int]
    resize_rate: float
    noise: tuple[int, int]
    quality: tuple[int, int]
    halve_rate: float = 0.25


RECIPES = {
    "bsr": Recipe(
        ("blur", "blur", "resize", "noise", "compress"), 1.0, range(7, 26, 2), range(7, 26, 2), 0.75, (2, 25), (30, 95)
    ),
    "bsr_light": Recipe(
        ("blur", "resize", "noise", "compress"), 0.25, range(5, 8), range(5, 15), 0.8, (1, 2), (80, 95)
    ),
}
"""By ``types.DEGRADATIONS``."""


def degrade(
    image: UInt8[np.ndarray, "H W 3"], factor: int, recipe: Recipe, rng: np.random.Generator
) -> UInt8[np.ndarray, "h w 3"]:
    """Returns the degraded image, ``factor`` times smaller. The sides of ``image`` are multiples of ``factor``."""
    return _jpeg(treated(image, factor, recipe, rng), _between(recipe.quality, rng))


def treated(image: UInt8[np.ndarray, "H W 3"], factor: int, recipe: Recipe, rng: np.random.Generator) -> FloatImage:
    """Returns the image before the last compression: float32[H / factor, W / factor, 3] in [0, 1]."""
    height, width = image.shape[0] // factor, image.shape[1] // factor
    if factor == _HALVED_AT and rng.random() < recipe.halve_rate:
        image, factor = _halved(image, rng), factor // 2
    levels = image.astype(np.float32) / 255
    for name in order(recipe.slots, rng):
        if name == "shrink":
            levels = cv2.resize(levels, (width, height), interpolation=_interpolation(rng))
        else:
            levels = _STEPS[name](levels, factor, recipe, rng)
        levels = levels.clip(0, 1)  # cubics and noise leave [0, 1]
    return levels


def order(slots: Sequence[str], rng: np.random.Generator) -> list[str]:
    """Returns the slots and "shrink" in random order, "resize" never after "shrink"."""
    steps = [[*slots, "shrink"][place] for place in rng.permutation(len(slots) + 1)]
    if "resize" in steps and steps.index("shrink") < steps.index("resize"):
        early, late = steps.index("shrink"), steps.index("resize")
        steps[early], steps[late] = "resize", "shrink"
    return steps


def pair(
    image: UInt8[np.ndarray, "H W 3"], degrading: Degrading, rng: np.random.Generator
) -> dict[str, UInt8[np.ndarray, "h w 3"]]:
    """Returns a random crop and its degraded version: ``{"image": uint8[s, s, 3], "low_res": uint8[s/f, s/f, 3]}``."""
    cut = decoding.crop(image, degrading.crop_side, rng)
    return {"image": cut, "low_res": degrade(cut, degrading.factor, RECIPES[degrading.name], rng)}


# --- steps ------------------------------------------------------------------------------------


def _halved(image: UInt8[np.ndarray, "H W 3"], rng: np.random.Generator) -> UInt8[np.ndarray, "h w 3"]:
    size = (image.shape[1] // 2, image.shape[0] // 2)
    if rng.random() < 0.5:
        return cv2.resize(image, size, interpolation=_interpolation(rng))
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BICUBIC))


def _blur(image: FloatImage, factor: int, recipe: Recipe, rng: np.random.Generator) -> FloatImage:
    return filtered(image, blur_kernel(factor, recipe, rng))


def blur_kernel(factor: int, recipe: Recipe, rng: np.random.Generator) -> Float32[np.ndarray, "K K"]:
    """Samples the kernel of a blur, which sums to 1."""
    if rng.random() < 0.5:
        variances = (4 + factor) * recipe.width * (1 - rng.random(2))  # above 0
        return gaussian_kernel(int(rng.choice(recipe.anisotropic)), *variances, angle=math.pi * rng.random())
    sigma = (2 + 0.2 * factor) * recipe.width * (1 - rng.random())
    return gaussian_kernel(int(rng.choice(recipe.isotropic)), sigma**2, sigma**2)


def gaussian_kernel(
    size: int, along: float, across: float, angle: float = 0.0, centre: float = 0.0
) -> Float32[np.ndarray, "K K"]:
    """Returns a Gaussian of two variances, in pixels^2, that sums to 1.

    Args:
        size: of its side; an even one is made one larger, so that it has a middle.
        along: the variance along the axis that is ``angle`` (radians) from the rows' direction.
        across: the variance across it.
        angle: of the axis.
        centre: how far the Gaussian's middle stands from the kernel's, right and down.
    """
    reach = size // 2
    place = np.arange(-reach, reach + 1) - centre
    x, y = place[None, :], place[:, None]
    ahead, aside = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
    exponent = ahead**2 / along + aside**2 / across
    kernel = np.exp(-0.5 * (exponent - exponent.min()))  # its largest is 1, however narrow
    return (kernel / kernel.sum()).astype(np.float32)


def filtered(image: FloatImage, kernel: Float32[np.ndarray, "K K"]) -> FloatImage:
    """Returns weighted means about each pixel, the image mirrored about its edge pixels."""
    return cv2.filter2D(image, -1, kernel, borderType=cv2.BORDER_REFLECT_101)


def _resize(image: FloatImage, factor: int, recipe: Recipe, rng: np.random.Generator) -> FloatImage:
    if rng.random() >= recipe.resize_rate:
        return strided(image, factor, rng.uniform(0.1, 0.6 * factor))
    times = rng.uniform(1, 2 * factor)
    size = [max(1, int(side / times)) for side in (image.shape[1], image.shape[0])]
    return cv2.resize(image, size, interpolation=_interpolation(rng))


def strided(image: FloatImage, factor: int, sigma: float) -> FloatImage:
    """Returns every ``factor``-th pixel of the image under a Gaussian about the middle of its ``factor``^2 pixels."""
    kernel = gaussian_kernel(_STRIDE_TAPS, sigma**2, sigma**2, centre=(factor - 1) / 2)
    return np.ascontiguousarray(filtered(image, kernel)[::factor, ::factor])


def _noise(image: FloatImage, factor: int, recipe: Recipe, rng: np.random.Generator) -> FloatImage:
    return image + noise(image.shape[:2], recipe.noise, rng)


def noise(size: tuple[int, int], levels: tuple[int, int], rng: np.random.Generator) -> Float32[np.ndarray, "H W #3"]:
    """Samples Gaussian noise: coloured, grey (one channel), or with correlated channels.

    The standard deviation is sampled between ``levels``, in levels of 255. The covariance of correlated channels is the
    maximum level squared times |U' D U|, by entry: D is a diagonal of uniforms, U an orthonormal basis of uniforms.
    """
    level, kind = _between(levels, rng) / 255, rng.random()
    if kind < 0.4:
        return level * rng.standard_normal((*size, 1), np.float32)
    normal = rng.standard_normal((*size, 3), np.float32)
    if kind > 0.6:
        return level * normal
    basis = np.linalg.svd(rng.random((3, 3)))[0]
    covariance = np.abs(basis.T @ np.diag(rng.random(3)) @ basis) * (levels[1] / 255) ** 2
    values, vectors = np.linalg.eigh(covariance)
    root = vectors * np.sqrt(values.clip(0))  # zero to rounding, where they are not positive
    return normal @ root.T.astype(np.float32)


def _compress(image: FloatImage, factor: int, recipe: Recipe, rng: np.random.Generator) -> FloatImage:
    if rng.random() >= _COMPRESS_RATE:
        return image
    return _jpeg(image, _between(recipe.quality, rng)).astype(np.float32) / 255


def _jpeg(image: FloatImage, quality: int) -> UInt8[np.ndarray, "H W 3"]:
    pixels = cv2.cvtColor(np.rint(image * 255).astype(np.uint8), cv2.COLOR_RGB2BGR)
    _, content = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, quality])
    return np.asarray(cv2.imdecode(content, cv2.IMREAD_COLOR_RGB))


_STEPS = {"blur": _blur, "resize": _resize, "noise": _noise, "compress": _compress}


def _interpolation(rng: np.random.Generator) -> int:
    return INTERPOLATIONS[rng.integers(len(INTERPOLATIONS))]


def _between(bounds: tuple[int, int], rng: np.random.Generator) -> int:
    return int(rng.integers(bounds[0], bounds[1] + 1))
