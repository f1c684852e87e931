"""`FeatureNetwork`: a network whose features image measures compare."""

import dataclasses
from collections.abc import Callable

import numpy as np
from jaxtyping import Float, Float32, UInt8

from dalle2_jax.errors import UserError
from dalle2_jax.types import Array

INCEPTION = "inception"
"""Name of FID's Inception, the only network whose measures have the names of `_INCEPTION_MEASURES`."""

_INCEPTION_MEASURES = {"FD": "FID", "KID": "KID", "IS": "IS"}


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class FeatureNetwork:
    """An image network with its weights. `features.load` loads one, `features.extract` applies it to a data set.

    Attributes:
      name: "inception", "vgg16", "vgg16_fc7", "efficientnet_lite0", "dinov2_vits14", "dinov2_vitb14" or "clip".
      label: name of the network in the names of measures, as in "VGG16".
      image_size: side in pixels that images are resized to; None if they are not resized.
      min_size: smallest side of images, in pixels.
      dims: number of features D.
      classes: number of classes K; 0 for a network that does not classify.
      fingerprint: hash of the weights, for caches.
      encode: uint8[B, H, W, 3] -> float32[B, D], jitted.
      classify: features float32[B, D] -> logits float32[B, K], jitted; None for a network that does not classify.
      devices: number of devices that a batch is divided over.
    """

    name: str
    label: str
    image_size: int | None
    min_size: int
    dims: int
    classes: int
    fingerprint: str
    encode: Callable[[Array], Array]
    classify: Callable[[Array], Array] | None = None
    devices: int = 1

    def __repr__(self) -> str:
        size = "any size" if self.image_size is None else f"{self.image_size}x{self.image_size}"
        return f"FeatureNetwork({self.name}: {self.dims} features of images of {size}, weights {self.fingerprint})"

    def __call__(self, images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B D"]:
        """Returns the features of a batch of images in RGB. Each new shape [B, H, W] compiles a program."""
        return self.encode(images)

    def logits(self, images: UInt8[Array, "B H W 3"]) -> Float32[Array, "B K"]:
        """Returns the logits of a batch of images.

        Raises:
          UserError: the network does not classify.
        """
        return self.logits_of(self.encode(images))

    def logits_of(self, features: Float[Array, "B D"]) -> Float32[Array, "B K"]:
        """Returns the logits of a batch of features, without computing the features again.

        Raises:
          UserError: the network does not classify.
        """
        if self.classify is None:
            raise UserError(f"{self.name} has no classes: use inception, vgg16_fc7 or efficientnet_lite0")
        return self.classify(np.asarray(features, np.float32))

    def measure_name(self, kind: str) -> str:
        """Returns the name of a measure over this network's features.

        Args:
          kind: "FD" (Fréchet distance), "KID", "IS" or any other, such as "precision".

        Returns:
          "FID", "KID" or "IS" for FID's Inception, whose published figures have these names; else the kind and the
          network, as in "FD-VGG16".
        """
        if self.name == INCEPTION and kind in _INCEPTION_MEASURES:
            return _INCEPTION_MEASURES[kind]
        return f"{kind}-{self.label}"
