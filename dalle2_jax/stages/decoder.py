"""The decoder: from a CLIP image embedding and a caption to a picture (Ramesh et al. 2022, section 2.1).

For classifier-free guidance the image embedding is replaced by a learned one for 10 % of the
examples, and the caption dropped for 50 %.
"""

import dataclasses
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from dalle2_jax.models.decoder import DecoderConfig, DecoderNetwork
from dalle2_jax.stages import images
from dalle2_jax.stages.base import Variables
from dalle2_jax.stages.clip import ClipStage
from dalle2_jax.stages.diffusion import Condition, DiffusionStage, Drops
from dalle2_jax.types import Batch, Denoiser, Params


@dataclasses.dataclass(frozen=True)
class DecoderStage(DiffusionStage):
    """Diffuses pictures of ``model.unet.image_size``, conditioned on image_emb and the caption."""

    model: DecoderConfig
    clip: ClipStage
    drop_image: float = 0.1
    drop_text: float = 0.5

    def __post_init__(self) -> None:
        unet = self.model.unet
        self.check_channels(unet.in_channels, unet.out_channels, "model.unet.out_channels")

    @property
    def borrows(self) -> tuple[str, ...]:
        return ("clip",)

    @property
    def drop_rates(self) -> Mapping[str, float]:
        text = {} if self.model.text_input is None else {"text": self.drop_text}
        return {"image": self.drop_image, **text}

    @property
    def network(self) -> DecoderNetwork:
        return DecoderNetwork(self.model)

    def init_params(self, key: jax.Array) -> Params:
        unet, clip = self.model.unet, self.clip.model
        length = (self.model.text if self.model.text_input == "tokens" else clip.text).context_length
        text = {
            "tokens": jnp.zeros((1, length), jnp.int32),
            "clip": jnp.zeros((1, length, clip.text.width)),
            None: None,
        }[self.model.text_input]
        return self.network.init(
            key,
            jnp.zeros((1, unet.image_size, unet.image_size, unet.in_channels)),
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, clip.embed_dim)),
            jnp.zeros((1, clip.embed_dim)),
            text,
            jnp.ones((1, length), bool),
            drop_image=jnp.zeros(1, bool),
            drop_text=jnp.zeros(1, bool),
        )["params"]

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb, and what CLIP says of the caption where the decoder reads it."""
        added: Batch = {}
        if "image_emb" not in batch:
            added["image_emb"] = self.clip.encode_image(frozen["clip"], batch["image"])
        if self.model.text_input == "clip" and not ("text_emb" in batch and "text_seq" in batch):
            added |= self.clip.read(frozen["clip"], batch)
        return {**added, **batch}

    def example(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        image = images.resize(images.to_float(batch["image"]), self.model.unet.image_size)
        return image, self.condition(batch)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch that has image_emb and its captions."""
        condition = {"image_emb": batch["image_emb"]}
        if self.model.text_input == "tokens":
            condition |= {"text": batch["tokens"], "mask": batch["mask"]}
        elif self.model.text_input == "clip":
            condition |= {"text": batch["text_seq"], "mask": batch["mask"], "text_emb": batch["text_emb"]}
        return condition

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        unet = self.model.unet
        return (unet.image_size, unet.image_size, unet.in_channels)

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        variables, train = {"params": params}, dropout_key is not None
        told = self.network.apply(
            variables,
            condition["image_emb"],
            condition.get("text_emb"),
            condition.get("text"),
            condition.get("mask"),
            drop_image=drops["image"],
            drop_text=drops.get("text"),
            method=DecoderNetwork.encode_condition,
        )
        rngs = {"dropout": dropout_key} if train else None
        return lambda x_t, t: self.network.apply(
            variables, x_t, t, told, train=train, rngs=rngs, method=DecoderNetwork.denoise
        )
