"""Images as feature networks read them: uint8 of any size to normalised float32 of one size, on the device."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation of ImageNet's images in [0, 1], by which torchvision's networks normalise."""


@dataclasses.dataclass(frozen=True)
class Preparation:
    """How images become the input of a network.

    Attributes:
      size: side in pixels that images are resized to; None leaves their size.
      mean: subtracted from channels in [0, 1].
      std: divides the result.
      resample: "linear" or "cubic" (a = -0.5).
      antialias: whether shrinking averages over the area of a new pixel, as Pillow does. torch's ``interpolate``, which
        pytorch-fid uses, does not.
    """

    size: int | None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    resample: str = "cubic"
    antialias: bool = True

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float[Array, "B h w 3"]:
        """Returns the input of the network."""
        x = images.astype(jnp.float32) / 255.0
        if self.size is not None and x.shape[1:3] != (self.size, self.size):
            shape = (len(x), self.size, self.size, 3)
            x = jax.image.resize(x, shape, self.resample, antialias=self.antialias)
            x = jnp.clip(x, 0.0, 1.0)  # cubic splines overshoot at edges
        return (x - _row(self.mean)) / _row(self.std)


def _row(values: tuple[float, float, float]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3)
