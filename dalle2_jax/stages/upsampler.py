"""The upsamplers: from a low-resolution image to a larger one (Ramesh et al. 2022, section 2.1 and App. C).

The low-resolution image is upsampled and concatenated to the noised image. In training it is corrupted, because the
generated images that it is applied to have errors of their own: by a Gaussian blur, by degradations on the host, or by
noise whose level is an input of the network (noise conditioning augmentation: Ho et al. 2022, Cascaded Diffusion
Models; Saharia et al. 2022, Imagen, section 2.3). The paper's upsamplers have no attention and no caption, so that the
network trains on crops of a quarter of the side and runs at full size. Those of GLIDE and ADM have the network of a
decoder: with attention, conditioned on the caption or the class (Nichol et al. 2021, section 4.1; Dhariwal & Nichol
2021, section 3).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Annotated, Any, NamedTuple, cast

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import diffusion, rng
from dalle2_jax.errors import UserError, choose
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.models.unet import UNet, UNetConfig
from dalle2_jax.ranges import Fraction, Range, Side
from dalle2_jax.stages import images, known_pixels
from dalle2_jax.stages.base import Variables, apply
from dalle2_jax.stages.diffusion import DiffusionStage
from dalle2_jax.stages.sampling import Condition, Drops, SamplingPlan
from dalle2_jax.types import DEGRADATIONS, Batch, Degrading, Denoiser, Params


class Networks(NamedTuple):
    """The parameters of a stage with a ``last_network`` in sampling."""

    first: Params
    last: Params  # for the step at t = 0


@dataclasses.dataclass(frozen=True)
class UpsamplerStage(DiffusionStage):
    """Diffuses images of ``unet.image_size`` conditioned on images of ``low_size``.

    Attributes:
      model: a U-Net, or the network of a decoder for an upsampler conditioned on a caption (``text_input`` "tokens") or
        a class ("label").
      low_size: side of the low-resolution image, in pixels.
      crop_fraction: side of a training crop over the side of the image (1/4 in the paper).
      blur_sigma: standard deviation of the 3x3 Gaussian blur, in low-resolution pixels.
      blur_rate: share of examples that are blurred.
      degradation: one of ``types.DEGRADATIONS``, computed on the host, which also crops; it replaces the blur.
      noise_augmentation: maximum level of noise on the upsampled image, as a share of the steps of the schedule; the
        level of each example is uniform up to it.
      sample_noise: the level in sampling.
      upscale: interpolation of the low-resolution image: "cubic", or "linear" (GLIDE, ADM).
      drop_text: share of examples for which the caption or class is dropped.
      inpaint: whether the network has the known pixels as additional input (``images.with_known_pixels``).
      last_network: whether a second network of the same shape takes the sampling step at t = 0. Karlo's was fine-tuned
        with a GAN loss; it is ``stats["last"]``, and is not trained here.
    """

    model: UNetConfig | DecoderConfig
    low_size: Side
    crop_fraction: Annotated[float, Range(0, 1, exclusive_min=True)] = 0.25
    blur_sigma: Annotated[float, Range(0.01, 100)] = 0.6
    blur_rate: Fraction = 1.0
    degradation: str = ""
    noise_augmentation: Fraction = 0.0
    sample_noise: Fraction = 0.0
    upscale: str = "cubic"
    drop_text: Fraction = 0.0
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
        if isinstance(self.model, DecoderConfig) and (
            self.model.image_emb_dim or self.model.text_input not in ("tokens", "label")
        ):
            raise UserError(f"{self.name}: an upsampler is conditioned on tokens or a label, not on embeddings of CLIP")
        # The low-resolution image is concatenated to the noised one.
        channels = images.image_channels(self.unet.in_channels, self.inpaint, conditioning_images=1)
        self.check_channels(channels, self.unet.out_channels, "model.out_channels")
        size, crop = self.unet.image_size, self.crop_side
        if size % self.low_size:
            raise UserError(f"{self.name}: image_size {size} is not a multiple of low_size {self.low_size}")
        if crop % self.unet.stride or crop % self.factor:
            divisors = f"{self.unet.stride} and {self.factor}"
            raise UserError(f"{self.name}: crops of {crop} pixels do not divide by {divisors}")

    @property
    def reads_text(self) -> bool:
        """Whether the network is conditioned on a caption or class."""
        return isinstance(self.model, DecoderConfig)

    @property
    def unet(self) -> UNetConfig:
        """The configuration of the U-Net."""
        return self.model.unet if isinstance(self.model, DecoderConfig) else self.model

    @property
    def factor(self) -> int:
        """Ratio between the side of the result and of the low-resolution image."""
        return self.unet.image_size // self.low_size

    @property
    def crop_side(self) -> int:
        """Side of a training crop, in pixels of the result."""
        return round(self.unet.image_size * self.crop_fraction)

    @property
    def degrading(self) -> Degrading | None:
        """The degradation on the host; None for the blur."""
        if not self.degradation:
            return None
        return Degrading(self.degradation, self.unet.image_size, self.crop_side, self.factor)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The image, its low-resolution version where the host makes it, and the caption or class."""
        low_res = ("low_res",) if self.degradation else ()
        return ("image", *low_res, *(("tokens", "mask") if self.reads_text else ()))

    @property
    def image_size(self) -> int:
        """Side of the generated images, in pixels."""
        return self.unet.image_size

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {"text": self.drop_text} if self.reads_text else {}

    @property
    def constant_stats(self) -> tuple[str, ...]:
        """The last network is not trained."""
        return ("last",) if self.last_network else ()

    @property
    def inpainting_network(self) -> bool:
        """``inpaint``."""
        return self.inpaint

    @property
    def network(self) -> UNet | DecoderNetwork:
        return DecoderNetwork(self.model) if isinstance(self.model, DecoderConfig) else UNet(self.model)

    def init_params(self, key: jax.Array) -> Params:
        side = self.crop_side
        x, t = jnp.zeros((1, side, side, self.unet.in_channels)), jnp.zeros(1, jnp.int32)
        text = (None, None, *self._empty_text(1).values()) if self.reads_text else ()
        level: dict[str, Any] = {"noise_level": t} if self.noise_augmentation else {}
        params = self.network.init(key, x, t, *text, **level)["params"]
        return self._with_unet(params, known_pixels.silenced) if self.inpaint else params

    def adapted(self, params: Params) -> Params:
        """Returns the weights of an upsampler without known pixels, for one with ``inpaint``; others unchanged."""
        return self._with_unet(params, known_pixels.widened) if self.inpaint else params

    def _with_unet(self, params: Params, change: Callable[[Params, UNetConfig, int], Params]) -> Params:
        """Returns the parameters with those of the U-Net changed."""
        channels = images.image_channels(self.unet.in_channels, True, conditioning_images=1)
        if not self.reads_text:
            return change(params, self.unet, channels)
        return {**params, "unet": change(params["unet"], self.unet, channels)}

    def init(self, key: jax.Array) -> Variables:
        params, stats = super().init(key)
        if self.last_network:
            stats = {**stats, "last": self.init_params(rng.stream(key, "last"))}
        return Variables(params, stats)

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        """Returns x_0 and the condition, see ``DiffusionStage``; a batch with ``low_res`` is not cropped or degraded.

        Raises:
          UserError: ``image`` and ``low_res`` have other sizes than this stage's crops.
        """
        image, low_res = self._given(batch) if "low_res" in batch else self._blurred(key, batch)
        condition = self.low_res_condition(low_res, batch)
        if self.noise_augmentation:
            max_level = self._level(self.noise_augmentation)
            level = rng.randint(rng.stream(key, "noise_level"), image.shape[:1], 0, max_level + 1)
            noise = rng.per_row(jax.random.normal, rng.stream(key, "augmentation"), image.shape)
            condition = self._noised(condition, level, noise)
        if self.inpaint:
            visible = known_pixels.visible_region(rng.stream(key, "known"), image.shape[0], self.crop_side)
            condition = {**condition, "known": image, "known_mask": visible}
        return image, condition

    def _given(self, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns crops and their low-resolution versions as computed on the host."""
        sides = batch["image"].shape[1], batch["low_res"].shape[1]
        required = self.crop_side, self.crop_side // self.factor
        if sides != required:
            raise UserError(
                f"stage {self.name} trains on crops of {required[0]} pixels made of {required[1]}, "
                f"not of {sides[0]} made of {sides[1]}"
            )
        return images.to_float(batch["image"]), images.to_float(batch["low_res"])

    def _blurred(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, jax.Array]:
        """Returns crops and their low-resolution versions, a share of which is blurred."""
        image = images.resize(images.to_float(batch["image"]), self.unet.image_size)
        corner_key, blur_key = rng.stream(key, "corners"), rng.stream(key, "blur")
        corners = images.random_corners(corner_key, image.shape[0], image.shape[1], self.crop_side, self.factor)
        image = images.crop(image, corners, self.crop_side)
        low_res = images.resize(image, self.crop_side // self.factor)
        blurred = rng.bernoulli(blur_key, self.blur_rate, (image.shape[0], 1, 1, 1))
        return image, jnp.where(blurred, images.gaussian_blur(low_res, self.blur_sigma), low_res)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of low-resolution images, or of images at full size that are resized.

        Args:
          batch: "low_res" float32[B, h, w, C] in [-1, 1], or "image" uint8[B, H, W, C]; with ``reads_text`` the
            captions, which are empty if missing.
        """
        if "low_res" in batch:
            low_res = jnp.asarray(batch["low_res"])
        else:
            low_res = images.resize(images.to_float(jnp.asarray(batch["image"])), self.low_size)
        return self.low_res_condition(low_res, batch if "tokens" in batch else None)

    def low_res_condition(self, low_res: jax.Array, batch: Batch | None = None) -> Condition:
        """Returns the condition of low-resolution images float32[B, h, w, 3] in [-1, 1].

        With ``reads_text``, "tokens" and "mask" are taken from ``batch``; without a batch the caption is empty.
        """
        size, height, width, channels = low_res.shape
        shape = (size, height * self.factor, width * self.factor, channels)
        condition = {"low_res": jax.image.resize(low_res, shape, self.upscale)}
        if self.noise_augmentation:
            condition["noise_level"] = jnp.zeros(size, jnp.int32)
        if not self.reads_text:
            return condition
        text = self._empty_text(size) if batch is None else {"text": batch["tokens"], "mask": batch["mask"]}
        return {**condition, **text}

    def _noised(self, condition: Condition, level: Int[Array, "B"], noise: Float[Array, "B H W C"]) -> Condition:
        """Returns the condition with the low-resolution image noised to t = level - 1; level 0 adds no noise."""
        clean = condition["low_res"]
        noised = diffusion.q_sample(self.schedule, clean, jnp.maximum(level - 1, 0), noise)
        low_res = jnp.where((level > 0)[:, None, None, None], noised, clean)
        return {**condition, "low_res": low_res, "noise_level": level}

    def _empty_text(self, size: int) -> Condition:
        """Returns text and mask of captions without tokens."""
        shape = (size, cast(DecoderConfig, self.model).text_length or 0)
        return {"text": jnp.zeros(shape, jnp.int32), "mask": jnp.zeros(shape, bool)}

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        return condition["low_res"].shape[1:]

    def sample(
        self, variables: Variables, keys: Key[Array, "B"], condition: Condition, plan: SamplingPlan
    ) -> Float[Array, "B *shape"]:
        """Samples one image a key, with ``sample_noise`` on the condition; see ``DiffusionStage.sample``."""
        params = Networks(variables.params, variables.stats["last"]) if self.last_network else variables.params
        if self.sample_noise:
            noise_keys = jax.vmap(lambda key: rng.stream(key, "augmentation"))(keys)
            level = jnp.full(keys.shape, self._level(self.sample_noise), jnp.int32)
            condition = self._noised(condition, level, rng.normal(noise_keys, condition["low_res"].shape[1:]))
        return self.sample_x_0(params, keys, condition, plan)

    def _level(self, share: float) -> int:
        return round(share * self.diffusion.num_steps)

    def bind(
        self, params: Params | Networks, condition: Condition, drops: Drops, dropout_key: jax.Array | None
    ) -> Denoiser:
        if isinstance(params, Networks):
            first, last = (self.bind(each, condition, drops, dropout_key) for each in params)
            # All examples of a batch are sampled at the same timestep.
            return lambda x_t, t: jax.lax.cond(t[0] == 0, last, first, x_t, t)
        call = self._bound_network(params, condition, drops, dropout_key)

        def denoiser(x_t: jax.Array, t: jax.Array) -> jax.Array:
            x = images.with_known_pixels(x_t, condition) if self.inpaint else x_t
            return call(jnp.concatenate([x, condition["low_res"]], axis=-1), t)

        return denoiser

    def _bound_network(
        self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None
    ) -> Callable[[jax.Array, jax.Array], jax.Array]:
        """Returns the network as a function of its input channels and t, with the caption or class bound."""
        rngs = None if dropout_key is None else {"dropout": dropout_key}
        how: dict[str, Any] = {"train": rngs is not None, "rngs": rngs, "noise_level": condition.get("noise_level")}
        call = functools.partial(apply, self.network, params)
        if not self.reads_text:
            return functools.partial(call, **how)
        text, mask = condition["text"], condition["mask"]
        encoded = call(None, None, text, mask, drop_text=drops["text"], method=DecoderNetwork.encode_condition)
        return lambda x, t: call(x, t, encoded, **how, method=DecoderNetwork.denoise)
