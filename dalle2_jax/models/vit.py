"""CLIP's vision transformer (Dosovitskiy et al. 2021, with CLIP's extra norm before the first layer)."""

from dataclasses import dataclass

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from dalle2_jax.errors import UserError
from dalle2_jax.models import linear
from dalle2_jax.models.layers import LayerNorm, fold_patches
from dalle2_jax.models.transformer import Transformer, TransformerConfig
from dalle2_jax.ranges import Depth, MlpRatio, Side, Width


@dataclass(frozen=True)
class VisionConfig:
    """A ViT image tower. ``image_size`` is the side of the square image.

    Raises:
      UserError: patches do not tile the image; or as `TransformerConfig`.
    """

    image_size: Side = 224
    patch_size: Side = 16
    width: Width = 768
    layers: Depth = 12
    heads: Depth = 12
    activation: str = "quick_gelu"
    mlp_ratio: MlpRatio = 4.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not a multiple of patch_size {self.patch_size}: change one of them"
            )
        self.transformer(remat="none", dtype="float32")

    def transformer(self, remat: str, dtype: str) -> TransformerConfig:
        """Returns the transformer of this tower."""
        return TransformerConfig(
            self.width, self.layers, self.heads, self.activation, self.mlp_ratio, remat=remat, dtype=dtype
        )


class VisionTransformer(nn.Module):
    """Normalised image [B, H, W, 3] -> embedding float32[B, embed_dim], read at the class token.

    Params: ``patch_embed`` kernel [p*p*3, D] (rows: patch row, patch column, channel; no bias),
    ``class_embedding`` [D], ``positional_embedding`` [1 + patches, D] (class token first),
    ``ln_pre``, ``transformer``, ``ln_post``, ``proj`` kernel [D, E] without bias.
    """

    config: VisionConfig
    embed_dim: int
    remat: str = "none"
    dtype: str = "float32"

    @nn.compact
    def __call__(self, image: Float[Array, "B H W 3"]) -> Float[Array, "B E"]:
        config, normal = self.config, linear.normal
        std = config.width**-0.5
        # a patch's convolution at its own stride is a matrix product over folded patches
        patches = fold_patches(image.astype(self.dtype), config.patch_size)
        batch, count = patches.shape[0], patches.shape[1] * patches.shape[2]
        x = linear.Dense(config.width, use_bias=False, dtype=self.dtype, name="patch_embed")(
            patches.reshape(batch, count, patches.shape[3])
        )
        first = self.param("class_embedding", normal(std), (config.width,)).astype(self.dtype)
        x = jnp.concatenate([jnp.broadcast_to(first, (batch, 1, config.width)), x], axis=1)
        x = x + self.param("positional_embedding", normal(std), (count + 1, config.width)).astype(self.dtype)[None]
        x = LayerNorm(self.dtype, name="ln_pre")(x)
        x = Transformer(config.transformer(self.remat, self.dtype), name="transformer")(x)
        x = LayerNorm(self.dtype, name="ln_post")(x[:, 0])
        proj = linear.Dense(self.embed_dim, use_bias=False, dtype=self.dtype, kernel_init=normal(std), name="proj")
        return proj(x).astype(jnp.float32)
