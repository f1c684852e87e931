"""The upsamplers: from a small picture to a larger one (Ramesh et al. 2022, section 2.1 and App. C).

The low-resolution picture is upsampled, corrupted in training, and concatenated to the noised
picture: what the upsampler is given in a cascade has flaws of its own. It is corrupted by a
Gaussian blur, by the host's degradations, or by noise whose level the network is told (noise
conditioning augmentation: Ho et al. 2022, Cascaded Diffusion Models; Saharia et al. 2022, Imagen,
section 2.3). The paper's upsamplers have no attention and no caption, so that the network trains
on quarter-size crops and runs at full size. Those of GLIDE and ADM are decoders besides: they have
attention, and are told the caption or the class (Nichol et al. 2021, section 4.1; Dhariwal &
Nichol 2021, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import diffusion, rng
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.stages import images
from dalle2_jax.stages.base import Variables
from dalle2_jax.stages.diffusion import Condition, DiffusionStage, Drops
from dalle2_jax.types import DEGRADATIONS, Batch, Degrading, Denoiser, Params, UserError, choose


class Networks(NamedTuple):
    """The parameters that a stage with a ``last_network`` is sampled with, in place of one network's."""

    first: Params
    last: Params  # for the step at t = 0


@dataclasses.dataclass(frozen=True)
class UpsamplerStage(DiffusionStage):
    """Diffuses pictures of ``unet.image_size`` given ones of ``low_size``.

    ``model`` is a U-Net, or a decoder's network for an upsampler that is told a caption
    (``text_input`` "tokens") or a class ("label"), dropped for ``drop_text`` of the examples.
    ``crop_fraction`` is the side of a training crop over the picture's (1/4 in the paper).
    ``blur_sigma`` is the 3x3 Gaussian's; ``blur_rate`` the share of examples it is applied to.
    ``degradation`` takes the blur's place: one of ``types.DEGRADATIONS``, done by the host, which also cuts the crops.
    ``noise_augmentation`` is the greatest level of noise on the upsampled picture, as a share of the schedule's steps,
    drawn anew for each example; ``sample_noise`` the level in sampling.
    ``upscale`` is how the small picture is made larger: "cubic", or "linear" (GLIDE, ADM).
    ``inpaint``: the network also sees what is known of the large picture (``images.beside_known``).
    ``last_network``: a second network of the same shape takes the sampling step at t = 0. Karlo's was
    fine-tuned with a GAN's loss; this objective leaves it as it is, in ``stats["last"]``.
    """

    model: UNetConfig | DecoderConfig
    low_size: int
    crop_fraction: float = 0.25
    blur_sigma: float = 0.6
    blur_rate: float = 1.0
    degradation: str = ""
    noise_augmentation: float = 0.0
    sample_noise: float = 0.0
    upscale: str = "cubic"
    drop_text: float = 0.0
    inpaint: bool = False
    last_network: bool = False

    def __post_init__(self) -> None:
        choose("upscale", self.upscale, dict.fromkeys(("cubic", "linear")))
        if self.degradation:
            choose("degradation", self.degradation, dict.fromkeys(DEGRADATIONS))
        if not 0 <= self.sample_noise <= self.noise_augmentation <= 1:
            raise UserError(
                f"{self.name}: sample_noise {self.sample_noise} must be from 0 to noise_augmentation "
                f"{self.noise_augmentation}, and that at most 1"
            )
        if self.is_told and (self.model.image_emb_dim or self.model.text_input not in ("tokens", "label")):
            raise UserError(f"{self.name}: an upsampler is told tokens or a label, and nothing of CLIP's")
        # The low-resolution picture stands beside the noised one.
        channels = images.picture_channels(self.unet.in_channels, self.inpaint, beside=1)
        self.check_channels(channels, self.unet.out_channels, "model.out_channels")
        size, crop = self.unet.image_size, self.crop_side
        if size % self.low_size:
            raise UserError(f"{self.name}: image_size {size} is not a multiple of low_size {self.low_size}")
        if crop % self.unet.stride or crop % self.factor:
            divisors = f"{self.unet.stride} and {self.factor}"
            raise UserError(f"{self.name}: crops of {crop} pixels do not divide by {divisors}")

    @property
    def is_told(self) -> bool:
        """Whether it is told more than the small picture."""
        return isinstance(self.model, DecoderConfig)

    @property
    def unet(self) -> UNetConfig:
        """The U-Net, whatever it is told."""
        return self.model.unet if self.is_told else self.model

    @property
    def factor(self) -> int:
        """How many times larger the result is."""
        return self.unet.image_size // self.low_size

    @property
    def crop_side(self) -> int:
        """Side of a training crop, in pixels of the result."""
        return round(self.unet.image_size * self.crop_fraction)

    @property
    def degrading(self) -> Degrading | None:
        """What the host does to the pictures; None leaves them to the blur."""
        if not self.degradation:
            return None
        return Degrading(self.degradation, self.unet.image_size, self.crop_side, self.factor)

    @property
    def borrows(self) -> tuple[str, ...]:
        return ()

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {"text": self.drop_text} if self.is_told else {}

    @property
    def constant_stats(self) -> tuple[str, ...]:
        """The last network is not trained with the first."""
        return ("last",) if self.last_network else ()

    @property
    def network(self) -> UNet | DecoderNetwork:
        return DecoderNetwork(self.model) if self.is_told else UNet(self.model)

    def init_params(self, key: jax.Array) -> Params:
        side = self.crop_side
        x, t = jnp.zeros((1, side, side, self.unet.in_channels)), jnp.zeros(1, jnp.int32)
        told = (None, None, *self._nothing(1).values()) if self.is_told else ()
        level = {"noise_level": t} if self.noise_augmentation else {}
        return self.network.init(key, x, t, *told, **level)["params"]

    def init(self, key: jax.Array) -> Variables:
        params, stats = super().init(key)
        if self.last_network:
            stats = {**stats, "last": self.init_params(rng.stream(key, "last"))}
        return Variables(params, stats)

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        """See ``DiffusionStage``. A batch with ``low_res`` is cropped and degraded already.

        Raises:
          UserError: it is, to other sizes than this stage's.
        """
        image, low_res = self._given(batch) if "low_res" in batch else self._blurred(key, batch)
        condition = self.condition(low_res, batch)
        if self.noise_augmentation:
            most = self._level(self.noise_augmentation)
            level = jax.random.randint(rng.stream(key, "noise_level"), image.shape[:1], 0, most + 1)
            condition = self._noised(condition, level, jax.random.normal(rng.stream(key, "augmentation"), image.shape))
        if self.inpaint:
            seen = images.visible_region(rng.stream(key, "known"), image.shape[0], self.crop_side)
            condition = {**condition, "known": image, "known_mask": seen}
        return image, condition

    def _given(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns crops and their small pictures as the host made them."""
        sides = batch["image"].shape[1], batch["low_res"].shape[1]
        wanted = self.crop_side, self.crop_side // self.factor
        if sides != wanted:
            raise UserError(
                f"stage {self.name} trains on crops of {wanted[0]} pixels made of {wanted[1]}, "
                f"not of {sides[0]} made of {sides[1]}"
            )
        return images.to_float(batch["image"]), images.to_float(batch["low_res"])

    def _blurred(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns crops and their small pictures, a share of them blurred."""
        image = images.resize(images.to_float(batch["image"]), self.unet.image_size)
        corner_key, blur_key = rng.stream(key, "corners"), rng.stream(key, "blur")
        corners = images.random_corners(corner_key, image.shape[0], image.shape[1], self.crop_side, self.factor)
        image = images.crop(image, corners, self.crop_side)
        low_res = images.resize(image, self.crop_side // self.factor)
        blurred = jax.random.bernoulli(blur_key, self.blur_rate, (image.shape[0], 1, 1, 1))
        return image, jnp.where(blurred, images.gaussian_blur(low_res, self.blur_sigma), low_res)

    def condition(self, low_res: jax.Array, batch: Batch | None = None) -> Condition:
        """Returns the condition of small pictures float32[B, h, w, 3] in [-1, 1].

        An upsampler that is told takes ``tokens`` and ``mask`` from ``batch``; without one it is told nothing.
        """
        size, height, width, channels = low_res.shape
        shape = (size, height * self.factor, width * self.factor, channels)
        condition = {"low_res": jax.image.resize(low_res, shape, self.upscale)}
        if self.noise_augmentation:
            condition["noise_level"] = jnp.zeros(size, jnp.int32)
        if not self.is_told:
            return condition
        told = self._nothing(size) if batch is None else {"text": batch["tokens"], "mask": batch["mask"]}
        return {**condition, **told}

    def _noised(self, condition: Condition, level: Int[Array, "B"], noise: Float[Array, "B H W C"]) -> Condition:
        """Returns the condition, the picture noised as x_t at t = level - 1 is; at level 0 it is as it was."""
        clean = condition["low_res"]
        noised = diffusion.q_sample(self.schedule, clean, jnp.maximum(level - 1, 0), noise)
        low_res = jnp.where((level > 0)[:, None, None, None], noised, clean)
        return {**condition, "low_res": low_res, "noise_level": level}

    def _nothing(self, size: int) -> Condition:
        """What is told where nothing is: no position of a caption holds anything."""
        shape = (size, self.model.text_length)
        return {"text": jnp.zeros(shape, jnp.int32), "mask": jnp.zeros(shape, bool)}

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        return condition["low_res"].shape[1:]

    def draw(
        self, variables: Variables, keys: Key[Array, "B"], condition: Condition, *args: Any, **around: Any
    ) -> jax.Array:
        """As every diffusion stage does; at ``sample_noise``, and the last network at t = 0 where there is one."""
        if self.last_network:
            variables = Variables(Networks(variables.params, variables.stats["last"]), {})
        if self.sample_noise:
            own = jax.vmap(lambda key: rng.stream(key, "augmentation"))(keys)
            level = jnp.full(keys.shape, self._level(self.sample_noise), jnp.int32)
            condition = self._noised(condition, level, rng.normal(own, condition["low_res"].shape[1:]))
        return super().draw(variables, keys, condition, *args, **around)

    def _level(self, share: float) -> int:
        return round(share * self.diffusion.num_steps)

    def bind(
        self, params: Params | Networks, condition: Condition, drops: Drops, dropout_key: jax.Array | None
    ) -> Denoiser:
        if isinstance(params, Networks):
            first, last = (self.bind(each, condition, drops, dropout_key) for each in params)
            # A batch is sampled at one timestep.
            return lambda x_t, t: jax.lax.cond(t[0] == 0, last, first, x_t, t)
        call = self._network_told(params, condition, drops, dropout_key)

        def denoiser(x_t: jax.Array, t: jax.Array) -> jax.Array:
            x = images.beside_known(x_t, condition) if self.inpaint else x_t
            return call(jnp.concatenate([x, condition["low_res"]], axis=-1), t)

        return denoiser

    def _network_told(
        self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Returns the network of all its input channels and t, told the caption or class if it is told any."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        how = {"train": rngs is not None, "rngs": rngs, "noise_level": condition.get("noise_level")}
        apply = functools.partial(self.network.apply, {"params": params})
        if not self.is_told:
            return functools.partial(apply, **how)
        text, mask = condition["text"], condition["mask"]
        told = apply(None, None, text, mask, drop_text=drops["text"], method=DecoderNetwork.encode_condition)
        return lambda x, t: apply(x, t, told, **how, method=DecoderNetwork.denoise)
