"""VGG16 (Simonyan and Zisserman 2015) and AlexNet (Krizhevsky 2014) as torchvision has them, and LPIPS on top of them.

LPIPS: Zhang et al. 2018, "The Unreasonable Effectiveness of Deep Features as a Perceptual Metric", eq. 1, with the
weights of version 0.1.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.models.features.layers import conv, dense, max_pool, spatial_mean
from dalle2_jax.models.features.outputs import FeatureOutputs

Image = Float[Array, "B H W C"]

VGG_CHANNELS, VGG_DEPTHS = (64, 128, 256, 512, 512), (2, 2, 3, 3, 3)
"""Channels and number of convolutions of VGG16's five blocks."""

ALEXNET_LAYERS = (
    # channels, kernel, stride, padding, index in torchvision's module; pooled before
    (64, 11, 4, 2, 0, False),
    (192, 5, 1, 2, 3, True),
    (384, 3, 1, 1, 6, True),
    (256, 3, 1, 1, 8, False),
    (256, 3, 1, 1, 10, False),
)

LPIPS_SHIFT, LPIPS_SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)
"""Mean and standard deviation of channels in [-1, 1] that LPIPS normalises by."""

_EPSILON = 1e-10


def vgg_maps(image: Image, channels: tuple[int, ...] = VGG_CHANNELS) -> tuple[Image, ...]:
    """Returns the last feature map of each block, after its ReLU. Call it in a compact method.

    Args:
      image: normalised images.
      channels: channels of each block.
    """
    maps, x, index = [], image, 0
    for block, (width, depth) in enumerate(zip(channels, VGG_DEPTHS, strict=True)):
        if block:
            x, index = max_pool(x, 2, 2), index + 1
        for _ in range(depth):
            x = nn.relu(conv(width, 3, padding=1, name=f"features.{index}")(x))
            index += 2
        maps.append(x)
    return tuple(maps)


def alexnet_maps(image: Image) -> tuple[Image, ...]:
    """Returns the five feature maps after their ReLU. Call it in a compact method."""
    maps, x = [], image
    for width, kernel, strides, padding, index, pooled in ALEXNET_LAYERS:
        x = max_pool(x, 3, 2) if pooled else x
        x = nn.relu(conv(width, kernel, strides, padding, name=f"features.{index}")(x))
        maps.append(x)
    return tuple(maps)


class VggFeatures(nn.Module):
    """Normalised image [B, H, W, 3] of at least 32x32 -> 512 features, the means of the last pooling; no logits.

    Attributes:
      channels: channels of each block.
    """

    channels: tuple[int, ...] = VGG_CHANNELS

    @nn.compact
    def __call__(self, image: Image) -> FeatureOutputs:
        features = spatial_mean(max_pool(vgg_maps(image, self.channels)[-1], 2, 2))
        return FeatureOutputs(features, jnp.zeros((len(features), 0)))


class VggClassifier(nn.Module):
    """Normalised image [B, 224, 224, 3] -> 4,096 features (fc7, after ReLU) and 1,000 logits.

    Attributes:
      channels: channels of each block.
      hidden: units of fc6 and fc7.
      classes: number of classes.
    """

    channels: tuple[int, ...] = VGG_CHANNELS
    hidden: int = 4096
    classes: int = 1000

    @nn.compact
    def __call__(self, image: Image) -> FeatureOutputs:
        x = max_pool(vgg_maps(image, self.channels)[-1], 2, 2)
        x = x.transpose(0, 3, 1, 2).reshape(len(x), -1)  # torch flattens [C, H, W]
        for name in ("classifier.0", "classifier.3"):
            x = nn.relu(dense(self.hidden, name)(x))
        return FeatureOutputs(x, dense(self.classes, "classifier.6")(x))


class Lpips(nn.Module):
    """Image [B, H, W, 3] in [-1, 1] -> embeddings [B, D] whose squared Euclidean distances are LPIPS distances.

    LPIPS is the sum over layers of the spatial mean of w * (y - y')^2, with unit-normalised maps y: the squared
    distance between the maps multiplied by sqrt(w / (height * width)). D depends on the size of the images.

    Attributes:
      network: "vgg16" or "alexnet".
      channels: channels of VGG16's blocks.
    """

    network: str
    channels: tuple[int, ...] = VGG_CHANNELS

    @nn.compact
    def __call__(self, image: Image) -> Float[Array, "B D"]:
        x = (image - _row(LPIPS_SHIFT)) / _row(LPIPS_SCALE)
        maps = alexnet_maps(x) if self.network == "alexnet" else vgg_maps(x, self.channels)
        parts = []
        for number, values in enumerate(maps):
            weight = self.param(f"lin{number}.model.1.weight", nn.initializers.zeros, (values.shape[-1],))
            norm = jnp.sqrt(jnp.sum(jnp.square(values), axis=-1, keepdims=True))
            scale = jnp.sqrt(weight / (values.shape[1] * values.shape[2]))
            scaled = values / (norm + _EPSILON) * scale.reshape(1, 1, 1, -1)
            parts.append(scaled.reshape(len(values), -1))
        return jnp.concatenate(parts, axis=1)


def _row(values: tuple[float, ...]) -> jax.Array:
    return jnp.asarray(values, jnp.float32).reshape(1, 1, 1, -1)
