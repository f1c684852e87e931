"""The diffusion prior: from a caption to a CLIP image embedding (Ramesh et al. 2022, section 2.2).

The image embedding itself is diffused, in the contract's space, and the network predicts the
un-noised embedding directly under a plain mean squared error. The text is dropped for 10 % of
the examples.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Key

from dalle2_jax.models.prior import PriorConfig, PriorNetwork
from dalle2_jax.stages.base import Variables
from dalle2_jax.stages.clip import ClipStage
from dalle2_jax.stages.diffusion import Condition, DiffusionStage, Drops, SamplingConfig
from dalle2_jax.types import Batch, Denoiser, Params, UserError


@dataclasses.dataclass(frozen=True)
class PriorStage(DiffusionStage):
    """Diffuses image embeddings, conditioned on the caption and its CLIP text embedding."""

    model: PriorConfig
    clip: ClipStage
    drop_text: float = 0.1

    def __post_init__(self) -> None:
        if self.diffusion.loss != "mse":  # a learned variance has another loss
            raise UserError(
                f"loss {self.diffusion.loss!r} bounds the likelihood of pictures, and the prior draws embeddings, "
                "without a variance: use loss 'mse' and variance 'fixed_small'"
            )

    candidates: ClassVar[int] = 2  # embeddings drawn for each picture, the closest to the caption kept

    @property
    def borrows(self) -> tuple[str, ...]:
        return ("clip",)

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {"text": self.drop_text}

    @property
    def network(self) -> PriorNetwork:
        return PriorNetwork(self.model)

    def init_params(self, key: jax.Array) -> Params:
        length, dim = self.model.context_length, self.model.embed_dim
        tokens = self.model.text_input == "tokens"
        text = jnp.zeros((1, length), jnp.int32) if tokens else jnp.zeros((1, length, self.model.text_width))
        embedding, mask, drop = jnp.zeros((1, dim)), jnp.ones((1, length), bool), jnp.zeros(1, bool)
        return self.network.init(key, embedding, jnp.zeros(1, jnp.int32), embedding, text, mask, drop)["params"]

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb, text_emb and text_seq, unless they were precomputed."""
        text = ("text_emb",) if self.model.text_input == "tokens" else ("text_emb", "text_seq")
        return with_embeddings(self.clip, frozen, batch, text)

    def example(self, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        return batch["image_emb"], self.condition(batch)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch whose captions CLIP has read."""
        text = batch["tokens" if self.model.text_input == "tokens" else "text_seq"]
        return {"text_emb": batch["text_emb"], "text": text, "mask": batch["mask"]}

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        return (self.model.embed_dim,)

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        args = condition["text_emb"], condition["text"], condition["mask"], drops["text"]
        variables = {"params": params}
        if dropout_key is not None:  # training sees the whole sequence; the prior has no dropout
            return lambda x_t, t: self.network.apply(variables, x_t, t, *args)
        # The caption's part of the sequence does not change from step to step.
        cache = self.network.apply(variables, *args, method=PriorNetwork.encode_prefix)
        return lambda x_t, t: self.network.apply(variables, cache, x_t, t, method=PriorNetwork.denoise)

    def draw(
        self,
        variables: Variables,
        keys: Key[Array, "B"],
        condition: Condition,
        config: SamplingConfig,
        scalars: Mapping[str, jax.Array],
        absent: Bool[Array, "B"],
    ) -> Float[Array, "B E"]:
        """As ``sample``, in the cascade's words for any prior; ``scalars`` are those of ``config.split``."""
        return self.sample(variables.params, keys, condition, config, **scalars, absent={"text": absent})


def with_embeddings(
    clip: ClipStage, frozen: Mapping[str, Variables], batch: Batch, text: tuple[str, ...] = ("text_emb",)
) -> Batch:
    """Returns the batch with image_emb, text_emb and text_seq added, unless they were precomputed.

    CLIP reads the captions only if one of the parts named in ``text`` is missing.
    """
    added: Batch = {}
    if "image_emb" not in batch:
        added["image_emb"] = clip.encode_image(frozen["clip"], batch["image"])
    if any(name not in batch for name in text):
        added |= clip.read(frozen["clip"], batch)
    return {**added, **batch}
