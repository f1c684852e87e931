"""Pictures on their way into a stage: uint8 to [-1, 1], resizing, blur, crops. All on the device."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key, UInt8


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
