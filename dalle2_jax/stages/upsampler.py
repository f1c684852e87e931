"""The upsamplers: from a small picture to a larger one (Ramesh et al. 2022, section 2.1 and App. C).

Unconditional but for the low-resolution picture, which is upsampled, corrupted in training with
a Gaussian blur, and concatenated to the noised picture. No attention and no caption, so that
the network trains on quarter-size crops and runs at full size.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle2_jax import rng
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import images
from dalle2_jax.stages.diffusion import Condition, DiffusionStage, Drops
from dalle2_jax.types import Batch, Denoiser, Params, UserError


@dataclasses.dataclass(frozen=True)
class UpsamplerStage(DiffusionStage):
    """Diffuses pictures of ``model.image_size`` given ones of ``low_size``.

    ``crop_fraction`` is the side of a training crop over the picture's (1/4 in the paper).
    ``blur_sigma`` is the 3x3 Gaussian's; ``blur_rate`` the share of examples it is applied to.
    """

    model: UNetConfig
    low_size: int
    crop_fraction: float = 0.25
    blur_sigma: float = 0.6
    blur_rate: float = 1.0

    def __post_init__(self) -> None:
        # The low-resolution picture stands beside the noised one.
        self.check_channels(self.model.in_channels // 2, self.model.out_channels, "model.out_channels")
        size, crop = self.model.image_size, self.crop_side
        if size % self.low_size:
            raise UserError(f"{self.name}: image_size {size} is not a multiple of low_size {self.low_size}")
        if crop % self.model.stride or crop % self.factor:
            divisors = f"{self.model.stride} and {self.factor}"
            raise UserError(f"{self.name}: crops of {crop} pixels do not divide by {divisors}")

    @property
    def factor(self) -> int:
        """How many times larger the result is."""
        return self.model.image_size // self.low_size

    @property
    def crop_side(self) -> int:
        """Side of a training crop, in pixels of the result."""
        return round(self.model.image_size * self.crop_fraction)

    @property
    def borrows(self) -> tuple[str, ...]:
        return ()

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {}

    @property
    def network(self) -> UNet:
        return UNet(self.model)

    def init_params(self, key: jax.Array) -> Params:
        side = self.crop_side
        x = jnp.zeros((1, side, side, self.model.in_channels))
        return self.network.init(key, x, jnp.zeros(1, jnp.int32))["params"]

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        image = images.resize(images.to_float(batch["image"]), self.model.image_size)
        corner_key, blur_key = rng.stream(key, "corners"), rng.stream(key, "blur")
        corners = images.random_corners(corner_key, image.shape[0], image.shape[1], self.crop_side, self.factor)
        image = images.crop(image, corners, self.crop_side)
        low_res = images.resize(image, self.crop_side // self.factor)
        blurred = jax.random.bernoulli(blur_key, self.blur_rate, (image.shape[0], 1, 1, 1))
        low_res = jnp.where(blurred, images.gaussian_blur(low_res, self.blur_sigma), low_res)
        return image, self.condition(low_res)

    def condition(self, low_res: jax.Array) -> Condition:
        """Returns the condition of small pictures float32[B, h, w, 3] in [-1, 1]."""
        batch, height, width, channels = low_res.shape
        shape = (batch, height * self.factor, width * self.factor, channels)
        return {"low_res": jax.image.resize(low_res, shape, "cubic")}

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        return condition["low_res"].shape[1:]

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        variables, train = {"params": params}, dropout_key is not None
        rngs = {"dropout": dropout_key} if train else None

        def denoiser(x_t: jax.Array, t: jax.Array) -> jax.Array:
            x = jnp.concatenate([x_t, condition["low_res"]], axis=-1)
            return self.network.apply(variables, x, t, train=train, rngs=rngs)

        return denoiser
