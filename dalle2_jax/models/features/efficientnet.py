"""EfficientNet-Lite0 (Tan and Le 2019; the "lite" variants of 2020): ReLU6 and no squeeze-and-excitation."""

import flax.linen as nn
from jaxtyping import Array, Float

from dalle2_jax.models.features.layers import batch_norm, conv, dense, relu6, spatial_mean
from dalle2_jax.models.features.outputs import FeatureOutputs

BLOCKS = (
    # repeats, kernel, stride of the first, expansion, output channels
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)
STEM, HEAD, CLASSES = 32, 1280, 1000

Image = Float[Array, "B H W C"]


class _InvertedResidual(nn.Module):
    """1x1 expansion, depthwise convolution, 1x1 projection; plus the input where the shapes agree."""

    features: int
    kernel: int
    strides: int
    expansion: int

    @nn.compact
    def __call__(self, x: Image) -> Image:
        channels = x.shape[-1] * self.expansion
        h = x
        if self.expansion > 1:
            h = relu6(batch_norm("_bn0")(conv(channels, 1, use_bias=False, name="_expand_conv")(h)))
        depthwise = {"feature_group_count": channels, "use_bias": False, "name": "_depthwise_conv"}
        h = relu6(batch_norm("_bn1")(conv(channels, self.kernel, self.strides, "SAME", **depthwise)(h)))
        h = batch_norm("_bn2")(conv(self.features, 1, use_bias=False, name="_project_conv")(h))
        return x + h if h.shape == x.shape else h


class EfficientNetLite0(nn.Module):
    """Image [B, 224, 224, 3] -> 1,280 features, the means of the last convolution, and 1,000 logits."""

    @nn.compact
    def __call__(self, image: Image) -> FeatureOutputs:
        x = relu6(batch_norm("_bn0")(conv(STEM, 3, 2, "SAME", use_bias=False, name="_conv_stem")(image)))
        number = 0
        for repeats, kernel, first_stride, expansion, features in BLOCKS:
            for repeat in range(repeats):
                stride = 1 if repeat else first_stride
                x = _InvertedResidual(features, kernel, stride, expansion, name=f"_blocks.{number}")(x)
                number += 1
        x = relu6(batch_norm("_bn1")(conv(HEAD, 1, use_bias=False, name="_conv_head")(x)))
        features = spatial_mean(x)
        return FeatureOutputs(features, dense(CLASSES, "_fc")(features))
