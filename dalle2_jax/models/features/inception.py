"""FID's InceptionV3 (Szegedy et al. 2016) as pytorch-fid has it: TensorFlow's network of 2015-12-05.

It differs from torchvision's in its pooling, which the published FID statistics depend on: average pooling does not
count pixels outside of the image, and the last block pools by maximum. It has 1,008 classes.
"""

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.models.features.layers import (
    Padding,
    Sizes,
    average_pool_same,
    batch_norm,
    conv,
    dense,
    max_pool,
    spatial_mean,
)
from dalle2_jax.models.features.outputs import FeatureOutputs

CLASSES = 1008

Image = Float[Array, "B H W C"]


class _ConvNorm(nn.Module):
    """Convolution without bias, batch normalisation, ReLU."""

    features: int
    kernel: Sizes
    strides: int = 1
    padding: Padding = 0

    @nn.compact
    def __call__(self, x: Image) -> Image:
        x = conv(self.features, self.kernel, self.strides, self.padding, use_bias=False, name="conv")(x)
        return nn.relu(batch_norm("bn")(x))


def _chain(x: Image, *layers: tuple[str, int, Sizes, Padding]) -> Image:
    """Applies `_ConvNorm` layers (name, features, kernel, padding) of stride 1."""
    for name, features, kernel, padding in layers:
        x = _ConvNorm(features, kernel, padding=padding, name=name)(x)
    return x


def _pooled(x: Image, features: int, by_maximum: bool = False) -> Image:
    pooled = max_pool(x, 3, 1, 1) if by_maximum else average_pool_same(x)
    return _ConvNorm(features, 1, name="branch_pool")(pooled)


class _MixedA(nn.Module):
    """35x35 blocks 5b to 5d."""

    pool_features: int

    @nn.compact
    def __call__(self, x: Image) -> Image:
        by_1 = _ConvNorm(64, 1, name="branch1x1")(x)
        by_5 = _chain(x, ("branch5x5_1", 48, 1, 0), ("branch5x5_2", 64, 5, 2))
        by_3 = _chain(x, ("branch3x3dbl_1", 64, 1, 0), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1))
        return jnp.concatenate([by_1, by_5, by_3, _pooled(x, self.pool_features)], axis=-1)


class _ReductionA(nn.Module):
    """35x35 to 17x17, block 6a."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        by_3 = _ConvNorm(384, 3, 2, name="branch3x3")(x)
        double = _chain(x, ("branch3x3dbl_1", 64, 1, 0), ("branch3x3dbl_2", 96, 3, 1))
        double = _ConvNorm(96, 3, 2, name="branch3x3dbl_3")(double)
        return jnp.concatenate([by_3, double, max_pool(x, 3, 2)], axis=-1)


class _MixedB(nn.Module):
    """17x17 blocks 6b to 6e, with factorised 7x7 convolutions."""

    inner: int

    @nn.compact
    def __call__(self, x: Image) -> Image:
        inner, row, column = self.inner, ((1, 7), (0, 3)), ((7, 1), (3, 0))
        by_1 = _ConvNorm(192, 1, name="branch1x1")(x)
        by_7 = _chain(x, ("branch7x7_1", inner, 1, 0), ("branch7x7_2", inner, *row), ("branch7x7_3", 192, *column))
        double = _chain(
            x,
            ("branch7x7dbl_1", inner, 1, 0),
            ("branch7x7dbl_2", inner, *column),
            ("branch7x7dbl_3", inner, *row),
            ("branch7x7dbl_4", inner, *column),
            ("branch7x7dbl_5", 192, *row),
        )
        return jnp.concatenate([by_1, by_7, double, _pooled(x, 192)], axis=-1)


class _ReductionB(nn.Module):
    """17x17 to 8x8, block 7a."""

    @nn.compact
    def __call__(self, x: Image) -> Image:
        by_3 = _ConvNorm(192, 1, name="branch3x3_1")(x)
        by_3 = _ConvNorm(320, 3, 2, name="branch3x3_2")(by_3)
        by_7 = _chain(
            x,
            ("branch7x7x3_1", 192, 1, 0),
            ("branch7x7x3_2", 192, (1, 7), (0, 3)),
            ("branch7x7x3_3", 192, (7, 1), (3, 0)),
        )
        by_7 = _ConvNorm(192, 3, 2, name="branch7x7x3_4")(by_7)
        return jnp.concatenate([by_3, by_7, max_pool(x, 3, 2)], axis=-1)


class _MixedC(nn.Module):
    """8x8 blocks 7b and 7c, whose 3x3 convolutions are split into a row and a column."""

    by_maximum: bool

    @nn.compact
    def __call__(self, x: Image) -> Image:
        by_1 = _ConvNorm(320, 1, name="branch1x1")(x)
        by_3 = self._split(_ConvNorm(384, 1, name="branch3x3_1")(x), "branch3x3_2")
        double = _chain(x, ("branch3x3dbl_1", 448, 1, 0), ("branch3x3dbl_2", 384, 3, 1))
        double = self._split(double, "branch3x3dbl_3")
        return jnp.concatenate([by_1, *by_3, *double, _pooled(x, 192, self.by_maximum)], axis=-1)

    def _split(self, x: Image, name: str) -> tuple[Image, Image]:
        row = _ConvNorm(384, (1, 3), padding=(0, 1), name=f"{name}a")(x)
        return row, _ConvNorm(384, (3, 1), padding=(1, 0), name=f"{name}b")(x)


class Inception(nn.Module):
    """Image [B, 299, 299, 3] in [-1, 1] -> 2,048 features, the means of the last block, and 1,008 logits."""

    @nn.compact
    def __call__(self, image: Image) -> FeatureOutputs:
        x = _ConvNorm(32, 3, 2, name="Conv2d_1a_3x3")(image)
        x = _ConvNorm(32, 3, name="Conv2d_2a_3x3")(x)
        x = max_pool(_ConvNorm(64, 3, padding=1, name="Conv2d_2b_3x3")(x), 3, 2)
        x = _ConvNorm(80, 1, name="Conv2d_3b_1x1")(x)
        x = max_pool(_ConvNorm(192, 3, name="Conv2d_4a_3x3")(x), 3, 2)
        for name, pool_features in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = _MixedA(pool_features, name=f"Mixed_{name}")(x)
        x = _ReductionA(name="Mixed_6a")(x)
        for name, inner in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x = _MixedB(inner, name=f"Mixed_{name}")(x)
        x = _ReductionB(name="Mixed_7a")(x)
        x = _MixedC(by_maximum=False, name="Mixed_7b")(x)
        features = spatial_mean(_MixedC(by_maximum=True, name="Mixed_7c")(x))
        return FeatureOutputs(features, dense(CLASSES, "fc")(features))
