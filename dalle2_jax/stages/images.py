"""Pictures on their way into a stage: uint8 to [-1, 1], resizing, blur, crops, holes. All on the device."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from dalle2_jax import rng
from dalle2_jax.types import UserError

UNKNOWN_RATE = 0.15
"""Share of an inpainting network's training pictures of which nothing is known, so that it still draws from nothing."""


def to_float(image: UInt8[Array, "B H W C"]) -> Float[Array, "B H W C"]:
    """Maps 0..255 to [-1, 1]."""
    return image.astype(jnp.float32) / 127.5 - 1.0


def to_uint8(image: Float[Array, "B H W C"]) -> UInt8[Array, "B H W C"]:
    """Maps [-1, 1] to 0..255, clipped and rounded."""
    return jnp.round((jnp.clip(image, -1.0, 1.0) + 1.0) * 127.5).astype(jnp.uint8)


def resize(image: Float[Array, "B H W C"], side: int) -> Float[Array, "B S S C"]:
    """Resizes square pictures with antialiasing: box means for whole factors, else cubic."""
    batch, height, _, channels = image.shape
    if height == side:
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


def crop(
    image: Float[Array, "B H W C"], corners: Int[Array, "B 2"], side: int
) -> Float[Array, "B S S C"]:
    """Cuts a side x side square from each picture, its upper left corner at (row, column)."""
    return jax.vmap(
        lambda one, corner: jax.lax.dynamic_slice(one, (corner[0], corner[1], 0), (side, side, one.shape[-1]))
    )(image, corners)


def random_corners(key: Key[Array, ""], batch: int, side: int, crop_side: int, grid: int) -> Int[Array, "B 2"]:
    """Draws crop corners on a grid, so that a low-resolution pixel is never cut in two."""
    return grid * jax.random.randint(key, (batch, 2), 0, (side - crop_side) // grid + 1)


def picture_channels(in_channels: int, inpaint: bool, beside: int = 0) -> int:
    """Returns the channels of one picture, of a network that reads ``beside`` others at its side.

    An inpainting network reads one more, and a mask.

    Raises:
      UserError: the channels do not divide so.
    """
    pictures = 1 + beside + inpaint
    channels, left = divmod(in_channels - inpaint, pictures)
    if left or not channels:
        mask = " and a mask" if inpaint else ""
        raise UserError(f"in_channels {in_channels} is not {pictures} pictures of the same channels{mask}")
    return channels


def visible_region(key: Key[Array, ""], batch: int, side: int) -> Bool[Array, "B S S 1"]:
    """Draws what is known of training pictures: all but a box anywhere; nothing of ``UNKNOWN_RATE`` of them.

    Nichol et al. 2021 (GLIDE), section 3.2, erases random regions and does not say of which form.
    """
    sides = jax.random.randint(rng.stream(key, "sides"), (batch, 2), 1, side + 1)
    start = jax.random.uniform(rng.stream(key, "start"), (batch, 2))
    first = jnp.floor(start * (side - sides + 1).astype(jnp.float32)).astype(jnp.int32)
    place = jnp.arange(side, dtype=jnp.int32)[None, None]
    within = (place >= first[:, :, None]) & (place < (first + sides)[:, :, None])  # [B, rows or columns, S]
    erased = within[:, 0, :, None] & within[:, 1, None, :]
    nothing = jax.random.bernoulli(rng.stream(key, "nothing"), UNKNOWN_RATE, (batch, 1, 1))
    return ~(erased | nothing)[..., None]


def beside_known(
    x_t: Float[Array, "B H W C"], condition: Mapping[str, jax.Array]
) -> Float[Array, "B H W D"]:
    """Returns [x_t, known picture, mask] along the channels, as GLIDE's inpainting networks read them.

    The condition's "known" is the picture float32[B, H, W, C] in [-1, 1] and its "known_mask", bool[B, H, W, 1],
    true where it is known. Without them nothing is.
    """
    if "known" not in condition:
        return jnp.concatenate([x_t, jnp.zeros_like(x_t), jnp.zeros_like(x_t[..., :1])], axis=-1)
    mask = condition["known_mask"].astype(x_t.dtype)
    return jnp.concatenate([x_t, condition["known"] * mask, mask], axis=-1)
