"""Known pixels as input of an inpainting network: which are known in training, and how its first layer starts.

Nichol et al. 2021 (GLIDE), section 3.2: the network has the known pixels and their mask as additional input channels,
whose weights start at zero, and is trained with random regions erased. Their shapes are not specified; here each
training image has one of three, so that a trained network fills boxes and strokes, and extends images:

  box      a box of any size anywhere is erased
  stroke   a brush is moved along a path of random points
  border   all is erased but a box that touches none or some of the edges, as in outpainting
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dalle2_jax import rng
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import Params

UNKNOWN_RATE = 0.15
"""Share of training images without known pixels, so that an inpainting network can also generate from noise alone."""

_POINTS = 5
"""Points of a stroke's path."""

_MIN_RADIUS, _MAX_RADIUS = 0.03, 0.12
"""Radius of a brush over the side of the image."""

_MAX_BORDER = 0.7
"""Width of an erased border over the side of the image."""


def visible_region(key: Key[Array, ""], batch: int, side: int) -> Bool[Array, "B S S 1"]:
    """Samples the known pixels of training images: all but a shape, or with probability `UNKNOWN_RATE` none."""
    kind = rng.randint(rng.stream(key, "kind"), (batch, 1, 1), 0, 3)
    box, stroke = (erase(rng.stream(key, name), batch, side) for name, erase in (("box", boxes), ("stroke", strokes)))
    erased = jnp.select([kind == 0, kind == 1], [box, stroke], borders(rng.stream(key, "border"), batch, side))
    nothing = rng.bernoulli(rng.stream(key, "nothing"), UNKNOWN_RATE, (batch, 1, 1))
    return ~(erased | nothing)[..., None]


def boxes(key: Key[Array, ""], batch: int, side: int) -> Bool[Array, "B S S"]:
    """Samples boxes of any height and width, anywhere."""
    sides = rng.randint(rng.stream(key, "sides"), (batch, 2), 1, side + 1)
    start = rng.per_row(jax.random.uniform, rng.stream(key, "start"), (batch, 2))
    first = jnp.floor(start * (side - sides + 1).astype(jnp.float32)).astype(jnp.int32)
    return _box(first, first + sides, side)


def strokes(key: Key[Array, ""], batch: int, side: int) -> Bool[Array, "B S S"]:
    """Samples strokes: all pixels whose distance from a path of straight lines is at most a radius."""
    points = side * rng.per_row(jax.random.uniform, rng.stream(key, "points"), (batch, _POINTS, 2))
    share = rng.per_row(jax.random.uniform, rng.stream(key, "radius"), (batch, 1, 1))
    share = _MIN_RADIUS + (_MAX_RADIUS - _MIN_RADIUS) * share
    centres = jnp.arange(side, dtype=jnp.float32) + 0.5
    grid = jnp.stack(jnp.meshgrid(centres, centres, indexing="ij"), axis=-1)[None]  # [1, S, S, 2]
    distance = jnp.full((batch, side, side), jnp.inf)
    for start, end in zip(points.swapaxes(0, 1)[:-1], points.swapaxes(0, 1)[1:], strict=True):
        line, offset = (end - start)[:, None, None], grid - start[:, None, None]
        place = jnp.sum(offset * line, axis=-1) / jnp.maximum(jnp.sum(line * line, axis=-1), 1e-6)
        nearest = jnp.clip(place, 0.0, 1.0)[..., None] * line
        distance = jnp.minimum(distance, jnp.linalg.norm(offset - nearest, axis=-1))
    return distance <= jnp.maximum(share * side, 0.75)  # at least a pixel


def borders(key: Key[Array, ""], batch: int, side: int) -> Bool[Array, "B S S"]:
    """Samples borders of random widths on one to four sides of the image."""
    chosen = rng.bernoulli(rng.stream(key, "sides"), 0.4, (batch, 4))
    one = jax.nn.one_hot(rng.randint(rng.stream(key, "one"), (batch,), 0, 4), 4, dtype=bool)
    width = _MAX_BORDER * side * rng.per_row(jax.random.uniform, rng.stream(key, "width"), (batch, 4))
    margins = jnp.where(chosen | one, jnp.ceil(width), 0.0).astype(jnp.int32)
    return ~_box(margins[:, :2], side - margins[:, 2:], side)


def _box(first: Array, end: Array, side: int) -> Bool[Array, "B S S"]:
    """Returns true in a box for each example: rows and columns from ``first`` to before ``end``, int32[B, 2]."""
    position = jnp.arange(side, dtype=jnp.int32)[None, None]
    within = (position >= first[:, :, None]) & (position < end[:, :, None])  # [B, rows or columns, S]
    return within[:, 0, :, None] & within[:, 1, None, :]


def silenced(params: Params, unet: UNetConfig, channels: int) -> Params:
    """Returns the parameters of a U-Net whose first layer ignores the known pixels and their mask.

    Args:
      params: of the U-Net. Its input channels are those of `images.with_known_pixels`, then any others.
      unet: its config.
      channels: of an image.
    """
    kernel = _by_channel(params["conv_in"]["kernel"], unet.in_channels)
    kernel = kernel.at[..., channels : 2 * channels + 1, :].set(0.0)
    return _with_kernel(params, kernel)


def widened(params: Params, unet: UNetConfig, channels: int) -> Params:
    """Returns the parameters of a U-Net without known pixels, for one with them; others are returned unchanged.

    Both compute the same: the new weights are zero.

    Args:
      params: of a U-Net with ``unet.in_channels`` input channels, or with ``channels`` + 1 fewer.
      unet: the config of the U-Net with known pixels.
      channels: of an image.
    """
    before = unet.in_channels - channels - 1
    if params["conv_in"]["kernel"].shape[2] != before * unet.patch_size**2:
        return params
    kernel = _by_channel(params["conv_in"]["kernel"], before)
    params = _with_kernel(params, _inserted(kernel, channels, channels + 1, axis=-2))
    if "input_skip" not in params:
        return params
    skip = {name: _inserted(array, channels, channels, axis=-1) for name, array in params["input_skip"].items()}
    return {**params, "input_skip": skip}


def _by_channel(kernel: Float[Array, "3 3 C D"], in_channels: int) -> Float[Array, "3 3 P C2 D"]:
    """Returns the kernel of a first layer with an axis for the pixels of a patch and one for their channels."""
    return kernel.reshape(*kernel.shape[:2], -1, in_channels, kernel.shape[-1])


def _with_kernel(params: Params, kernel: Float[Array, "3 3 P C2 D"]) -> Params:
    first = {**params["conv_in"], "kernel": kernel.reshape(*kernel.shape[:2], -1, kernel.shape[-1])}
    return {**params, "conv_in": first}


def _inserted(array: Array, place: int, count: int, axis: int) -> Array:
    """Returns an array with ``count`` zeros before ``place`` on an axis."""
    before, after = jnp.split(array, [place], axis=axis)
    shape = list(array.shape)
    shape[axis] = count
    return jnp.concatenate([before, jnp.zeros(shape, array.dtype), after], axis=axis)
