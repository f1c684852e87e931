"""The decoder: from a CLIP image embedding and a caption to an image (Ramesh et al. 2022, section 2.1).

For classifier-free guidance the image embedding is replaced by a learned one for 10 % of the
examples, and the caption is dropped for 50 %. With ``empty_caption`` a dropped caption is replaced by
CLIP's features of the empty caption (Karlo).

Without an image embedding it is GLIDE, conditioned on a caption (Nichol et al. 2021, section 4.1), or ADM, conditioned
on a class; neither needs CLIP.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle2_jax import rng
from dalle2_jax.errors import UserError
from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.ranges import Fraction
from dalle2_jax.stages import images, known_pixels
from dalle2_jax.stages.base import Variables, apply
from dalle2_jax.stages.clip import CAPTION_FEATURES, NULL_FEATURES, ClipStage, without_captions
from dalle2_jax.stages.diffusion import DiffusionStage
from dalle2_jax.stages.sampling import Condition, Drops
from dalle2_jax.types import Batch, Denoiser, Params


@dataclasses.dataclass(frozen=True)
class DecoderStage(DiffusionStage):
    """Diffuses images of ``model.unet.image_size``, conditioned on image_emb and the caption.

    ``clip`` is None where no embedding of CLIP is part of the condition. With ``inpaint`` the network has the known
    pixels as additional input (``images.with_known_pixels``, ``known_pixels``).

    Raises:
      UserError: channels, ``clip`` or ``empty_caption`` that do not fit the model.
    """

    model: DecoderConfig
    clip: ClipStage | None
    drop_image: Fraction = 0.1
    drop_text: Fraction = 0.5
    empty_caption: bool = False
    inpaint: bool = False

    def __post_init__(self) -> None:
        if self.clip is None and (self.model.image_emb_dim is not None or self.model.text_input == "clip"):
            raise UserError(f"stage {self.name} reads CLIP's embeddings: it needs a clip")
        if self.empty_caption and self.model.text_input != "clip":
            raise UserError("empty_caption uses CLIP's features of the empty caption: it needs model.text_input 'clip'")
        self.check_channels(self.channels, self.model.unet.out_channels, "model.unet.out_channels")

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return images.image_channels(self.model.unet.in_channels, self.inpaint)

    @property
    def conditioned_on(self) -> tuple[str, ...]:
        return () if self.clip is None else ("clip",)

    @property
    def drop_rates(self) -> Mapping[str, float]:
        image = {} if self.model.image_emb_dim is None else {"image": self.drop_image}
        text = {} if self.model.text_input is None else {"text": self.drop_text}
        return {**image, **text}

    @property
    def _text_features(self) -> tuple[str, ...]:
        """The columns that CLIP computes from captions."""
        if self.model.text_input != "clip":
            return ()
        return CAPTION_FEATURES + NULL_FEATURES if self.empty_caption else CAPTION_FEATURES

    @property
    def inpainting_network(self) -> bool:
        """``inpaint``."""
        return self.inpaint

    @property
    def network(self) -> DecoderNetwork:
        return DecoderNetwork(self.model)

    def init_params(self, key: jax.Array) -> Params:
        unet, width = self.model.unet, self.model.image_emb_dim
        length = self.model.text_length or (self.clip.model.text.context_length if self.clip else 1)
        text = {
            "tokens": jnp.zeros((1, length), jnp.int32),
            "label": jnp.zeros((1, length), jnp.int32),
            "clip": jnp.zeros((1, length, self.model.text_width or 0)),
            None: None,
        }[self.model.text_input]
        params = self.network.init(
            key,
            jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels)),
            jnp.zeros(1, jnp.int32),
            width and jnp.zeros((1, width)),
            jnp.zeros((1, self.clip.model.embed_dim)) if self.clip else None,
            text,
            jnp.ones((1, length), bool),
        )["params"]
        if not self.inpaint:
            return params
        return {**params, "unet": known_pixels.silenced(params["unet"], unet, self.channels)}

    def adapted(self, params: Params) -> Params:
        """Returns the weights of a decoder without known pixels, for one with ``inpaint``; others unchanged."""
        if not self.inpaint:
            return params
        return {**params, "unet": known_pixels.widened(params["unet"], self.model.unet, self.channels)}

    @property
    def inputs(self) -> tuple[str, ...]:
        """The image, and what the network is conditioned on."""
        image_emb = () if self.model.image_emb_dim is None else ("image_emb",)
        caption = () if self.model.text_input is None else ("tokens", "mask")
        return ("image", *image_emb, *self._text_features, *caption)

    @property
    def image_size(self) -> int:
        """Side of the generated images, in pixels."""
        return self.model.unet.image_size

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb and the text features that the decoder uses, unless they were precomputed."""
        return batch if self.clip is None else self.clip.complete(frozen.get("clip"), batch, self.inputs)

    def prepare_captions(self, clip: Variables | None, batch: Batch) -> Batch:
        """Adds the text features that the decoder uses; ``clip`` may be None where it uses none."""
        return batch if self.clip is None else self.clip.complete(clip, batch, self._text_features)

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        image = images.resize(images.to_float(batch["image"]), self.model.unet.image_size)
        condition = self.condition(batch)
        if self.inpaint:
            visible = known_pixels.visible_region(rng.stream(key, "known"), image.shape[0], image.shape[1])
            condition = {**condition, "known": image, "known_mask": visible}
        return image, condition

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch that has image_emb and text features, as far as the decoder uses them."""
        condition = {} if self.model.image_emb_dim is None else {"image_emb": batch["image_emb"]}
        if self.model.text_input in ("tokens", "label"):
            condition |= {"text": batch["tokens"], "mask": batch["mask"]}
        elif self.model.text_input == "clip":
            condition |= {"text": batch["text_seq"], "mask": batch["mask"], "text_emb": batch["text_emb"]}
        if self.empty_caption:
            parts = {"null_text": "null_text_seq", "null_mask": "null_mask", "null_text_emb": "null_text_emb"}
            condition |= {name: batch[column] for name, column in parts.items()}
        return condition

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        unet = self.model.unet
        return (unet.image_size, unet.image_size, self.channels)

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        train = dropout_key is not None
        drop_text = drops.get("text")
        if drop_text is not None and self.empty_caption:  # absent captions are replaced by the empty one
            condition, drop_text = {**condition, **without_captions(condition, drop_text)}, None
        encoded = apply(
            self.network,
            params,
            condition.get("image_emb"),
            condition.get("text_emb"),
            condition.get("text"),
            condition.get("mask"),
            drop_image=drops.get("image"),
            drop_text=drop_text,
            method=DecoderNetwork.encode_condition,
        )
        rngs = {"dropout": dropout_key} if train else None

        def denoiser(x_t: jax.Array, t: jax.Array) -> jax.Array:
            x = images.with_known_pixels(x_t, condition) if self.inpaint else x_t
            return apply(self.network, params, x, t, encoded, train=train, rngs=rngs, method=DecoderNetwork.denoise)

        return denoiser
