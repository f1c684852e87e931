"""Image preprocessing on the device: uint8 to [-1, 1], resizing, blur, crops."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.errors import UserError


def to_float(image: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Maps 0..255 to [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """Maps [-1, 1] to 0..255, clipped and rounded."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


_FILTERS = {"bicubic": "cubic", "bilinear": "linear", "lanczos": "lanczos3"}
"""Pillow's filters -> the names of ``jax.image.resize``. Both antialias, and both bicubics have a = -0.5."""


def resize(image: Float[Array, "B H W C"], side: int, resample: str = "area") -> Float[Array, "B S S C"]:
    """Resizes square images in [-1, 1] with antialiasing.

    Args:
      image: the images.
      side: of the result, in pixels.
      resample: "area" takes box means for integer factors, else bicubic. The others of ``types.RESAMPLES`` are
        Pillow's filters, within one level of 255 of Pillow: like Pillow, rows and then columns are resized, and clipped
        and rounded to 256 levels after each.
    """
    batch, height, _, channels = image.shape
    if height == side:
        return image
    if resample != "area":
        for shape in ((batch, height, side, channels), (batch, side, side, channels)):
            image = to_float(to_uint8(jax.image.resize(image, shape, _FILTERS[resample], antialias=True)))
        return image
    if height % side == 0:
        factor = height // side
        return image.reshape(batch, side, factor, side, factor, channels).mean(axis=(2, 4))
    return jax.image.resize(image, (batch, side, side, channels), "cubic", antialias=True)


def gaussian_blur(image: Float[Array, "B H W C"], sigma: float) -> Float[Array, "B H W C"]:
    """Blurs with a 3x3 Gaussian kernel, edges repeated (Ramesh et al. 2022, App. C: sigma 0.6, as SR3)."""
    edge, centre = jnp.exp(-0.5 / sigma**2), 1.0
    total = 2 * edge + centre
    padded = jnp.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (edge * (padded[:, :-2] + padded[:, 2:]) + centre * padded[:, 1:-1]) / total
    return (edge * (rows[:, :, :-2] + rows[:, :, 2:]) + centre * rows[:, :, 1:-1]) / total


def crop(image: Float[Array, "B H W C"], corners: Int[Array, "B 2"], side: int) -> Float[Array, "B S S C"]:
    """Crops a side x side square from each image, its upper left corner at (row, column)."""
    return jax.vmap(
        lambda one, corner: jax.lax.dynamic_slice(one, (corner[0], corner[1], 0), (side, side, one.shape[-1]))
    )(image, corners)


def random_corners(key: Key[Array, ""], batch: int, side: int, crop_side: int, grid: int) -> Int[Array, "B 2"]:
    """Samples crop corners on a grid, so that crops consist of full low-resolution pixels."""
    return grid * rng.randint(key, (batch, 2), 0, (side - crop_side) // grid + 1)


def image_channels(in_channels: int, inpaint: bool, conditioning_images: int = 0) -> int:
    """Returns the channels of one image, given the input channels of a network.

    Args:
      in_channels: of the network: the noised image, ``conditioning_images`` more and, for inpainting, the known pixels
        and a mask of one channel.
      inpaint: whether the network is an inpainting network.
      conditioning_images: number of conditioning images.

    Raises:
      UserError: the channels do not divide into as many images.
    """
    count = 1 + conditioning_images + inpaint
    channels, remainder = divmod(in_channels - inpaint, count)
    if remainder or not channels:
        mask = " and a mask" if inpaint else ""
        raise UserError(f"in_channels {in_channels} is not {count} images of the same channels{mask}")
    return channels


def with_known_pixels(x_t: Float[Array, "B H W C"], condition: Mapping[str, jax.Array]) -> Float[Array, "B H W D"]:
    """Returns [x_t, known image, mask] along the channels, the input of GLIDE's inpainting networks.

    Args:
      x_t: the noised image.
      condition: its "known" is the image float32[B, H, W, C] in [-1, 1], and "known_mask", bool[B, H, W, 1], is true
        where it is known. Without them no pixel is known.
    """
    if "known" not in condition:
        return jnp.concatenate([x_t, jnp.zeros_like(x_t), jnp.zeros_like(x_t[..., :1])], axis=-1)
    mask = condition["known_mask"].astype(x_t.dtype)
    return jnp.concatenate([x_t, condition["known"] * mask, mask], axis=-1)
