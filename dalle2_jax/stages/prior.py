"""The diffusion prior: from a caption to a CLIP image embedding (Ramesh et al. 2022, section 2.2).

The image embedding is diffused in the space of the embedding contract, and the network predicts the un-noised
embedding directly, with a mean squared error (their eq. 2). The text is dropped for 10 % of the examples: it is
replaced by learned embeddings or, without ``model.learned_null``, by CLIP's features of the empty caption (Karlo).
LAION's prior drops the noised image embedding too, for another 10 %.

The networks differ in the parts of the condition that are dropped, and in the norm of the embeddings they diffuse.
LAION's diffuses unit embeddings times sqrt(E) = ``embed_length``,

    x_0 = z_i embed_length / scale                                                              (1)

where the contract's embeddings are unit embeddings times ``scale``.

With ``whiten`` the diffused embeddings have mean 0 and standard deviation 1 in each dimension (Karlo, Kandinsky),

    x_0 = (z_i - mean) / std,        z_i = mean + std x_0                                       (2)

mean and std of the training embeddings are statistics of the stage: estimated by ``calibrate`` before the first step,
or imported with the weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.errors import UserError
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.models.priors.prior import PriorConfig, PriorNetwork
from dalle2_jax.ranges import CalibrationExamples, Fraction
from dalle2_jax.stages.base import Variables, apply
from dalle2_jax.stages.clip import (
    CAPTION_FEATURES,
    NULL_FEATURES,
    ClipStage,
    empty_captions,
    without_captions,
)
from dalle2_jax.stages.diffusion import DiffusionStage
from dalle2_jax.stages.held_out import cosines, head
from dalle2_jax.stages.sampling import Condition, Drops, SamplingPlan
from dalle2_jax.types import Batch, Denoiser, Metrics, Params

_NETWORKS = {PriorConfig: PriorNetwork, LaionPriorConfig: LaionPriorNetwork}


@dataclasses.dataclass(frozen=True)
class PriorStage(DiffusionStage):
    """Diffuses image embeddings, conditioned on the caption and its CLIP text embedding.

    With ``whiten``, mean and std are estimated from ``calibration_examples`` training examples, rounded up to full
    batches.

    Raises:
      UserError: a loss, a number of steps or an embedding contract that does not fit the model.
    """

    model: PriorConfig | LaionPriorConfig
    clip: ClipStage
    drop_text: Fraction = 0.1
    drop_image: Fraction = 0.1  # only for networks that drop the noised image embedding
    whiten: bool = False
    calibration_examples: CalibrationExamples = 65_536

    def __post_init__(self) -> None:
        if self.diffusion.loss != "mse":  # a learned variance has another loss
            raise UserError(
                f"loss {self.diffusion.loss!r} is a bound on the likelihood of images, and the prior samples "
                "embeddings: use loss 'mse' and variance 'fixed_small'"
            )
        if self.calibration_examples < 2:
            raise UserError(f"calibration_examples {self.calibration_examples} must be at least 2")
        timesteps = self.model.timesteps
        if timesteps is not None and timesteps < self.diffusion.num_steps:
            raise UserError(
                f"stage {self.name} has a table of {timesteps} timesteps (model.timesteps), "
                f"so diffusion.num_steps may not be {self.diffusion.num_steps}"
            )
        if self.model.embed_length and not self.whiten and self.clip.embedding.normalisation != "unit":
            raise UserError(
                f"stage {self.name} samples unit embeddings, and this clip has raw ones: it needs a clip with "
                f"embedding.normalisation 'unit', scale {self.model.embed_length:.6g}, or conditioning.whiten True"
            )

    candidates: ClassVar[int] = 2  # embeddings sampled for each image, of which the closest to the caption is used

    @property
    def conditioned_on(self) -> tuple[str, ...]:
        return ("clip",)

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {name: {"image": self.drop_image, "text": self.drop_text}[name] for name in self.model.drops}

    @property
    def network(self) -> PriorNetwork | LaionPriorNetwork:
        return _NETWORKS[type(self.model)](self.model)

    @property
    def _text_features(self) -> tuple[str, ...]:
        """The columns that CLIP computes from captions."""
        features = CAPTION_FEATURES if self._reads_states else ("text_emb",)
        return features + (NULL_FEATURES if self._reads_empty else ())

    @property
    def _reads_empty(self) -> bool:
        """Whether a dropped caption is replaced by the empty one."""
        return "text" in self.model.drops and not self.model.learned_null

    @property
    def _gain(self) -> float:
        """Ratio between the norm of x_0 and the norm of the contract's embeddings, eq. (1)."""
        if self.whiten or not self.model.embed_length:
            return 1.0
        return self.model.embed_length / self.clip.embedding.scale

    @property
    def inputs(self) -> tuple[str, ...]:
        """The embeddings of CLIP that the network reads, and the caption."""
        return ("image_emb", *self._text_features, "tokens", "mask")

    @property
    def _reads_states(self) -> bool:
        return self.model.text_input == "clip"

    def init_params(self, key: jax.Array) -> Params:
        length, dim = self.model.context_length, self.model.embed_dim
        shape = (1, length, self.model.text_width) if self._reads_states else (1, length)
        text = jnp.zeros(shape, jnp.float32 if self._reads_states else jnp.int32)
        embedding, mask = jnp.zeros((1, dim)), jnp.ones((1, length), bool)
        return self.network.init(key, embedding, jnp.zeros(1, jnp.int32), embedding, text, mask)["params"]

    def init_stats(self) -> Params:
        """Returns the initial statistics; with ``whiten``, zeros for the mean and std that ``calibrate`` measures."""
        whitening = {name: jnp.zeros(self.model.embed_dim) for name in ("mean", "std")} if self.whiten else {}
        return {**super().init_stats(), **whitening}

    @property
    def calibrates(self) -> bool:
        """Whether mean and std have to be measured."""
        return self.whiten

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics, with mean and std of training batches.

        Sums are in float64, of the differences from the first embedding, which is accurate where the mean is large.

        Raises:
          UserError: embeddings that are not finite, or do not vary in every dimension.
        """
        embed = jax.jit(lambda frozen, batch: self.prepare(frozen, batch)["image_emb"])
        seen, first, total, squares = 0, *np.zeros((3, self.model.embed_dim))
        while seen < self.calibration_examples:
            rows = multihost_utils.process_allgather(embed(frozen, next(batches)), tiled=True).astype(np.float64)
            first = first if seen else rows[0]
            total, squares = total + (rows - first).sum(axis=0), squares + np.square(rows - first).sum(axis=0)
            seen += len(rows)
        variance = squares / seen - np.square(total / seen)
        if not np.isfinite(variance).all() or variance.min() <= 0:
            raise UserError(
                "CLIP's embeddings of the training data are not finite or do not vary in every dimension, "
                "so they cannot be whitened: train clip again, or use conditioning.whiten False"
            )
        whitening = {"mean": first + total / seen, "std": np.sqrt(variance)}
        return {**super().init_stats(), **{name: value.astype(np.float32) for name, value in whitening.items()}}

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb and the text features that CLIP computes, unless they were precomputed."""
        return self.clip.complete(frozen.get("clip"), batch, self.inputs)

    def prepare_captions(self, clip: Variables | None, batch: Batch) -> Batch:
        """Adds the text features that CLIP computes, unless they were precomputed."""
        return self.clip.complete(clip, batch, self._text_features)

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns cosines of embeddings sampled for the first captions of the batch, see `cosines`."""
        batch = head(batch)
        keys = rng.per_image(key, jnp.arange(len(batch["mask"]), dtype=jnp.int32))
        return cosines(self.sample(variables, keys, self.condition(batch), self.plan(self.sampling_in_training)), batch)

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        x_0 = batch["image_emb"]
        if self.whiten:
            x_0 = (x_0 - stats["mean"][None]) / stats["std"][None]
        return x_0 * self._gain, self.condition(batch)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch with text features."""
        text = batch["text_seq" if self._reads_states else "tokens"]
        mask, hidden = batch["mask"], self.model.hidden_token
        mask = mask if hidden is None else mask & (batch["tokens"] != hidden)
        condition = {"text_emb": batch["text_emb"], "text": text, "mask": mask}
        if self._reads_empty:
            empty = batch["null_text_seq"] if self._reads_states else empty_captions(text, batch["mask"])[0]
            condition |= {"null_text_emb": batch["null_text_emb"], "null_text": empty, "null_mask": batch["null_mask"]}
        return condition

    def sample_shape(self, condition: Condition) -> tuple[int, ...]:
        return (self.model.embed_dim,)

    def bind(self, params: Params, condition: Condition, drops: Drops, dropout_key: jax.Array | None) -> Denoiser:
        drop = drops.get("text")
        if drop is not None and self._reads_empty:
            condition, drop = without_captions(condition, drop), None
        args = condition["text_emb"], condition["text"], condition["mask"], drop
        noised = {"drop_image": drops["image"]} if "image" in drops else {}
        if dropout_key is not None:  # training evaluates the full sequence; the prior has no dropout
            return lambda x_t, t: apply(self.network, params, x_t, t, *args, **noised)
        # The caption's part of the sequence does not change from step to step.
        cache = apply(self.network, params, *args, method="encode_prefix")
        return lambda x_t, t: apply(self.network, params, cache, x_t, t, **noised, method="denoise")

    def sample(
        self, variables: Variables, keys: Key[Array, "B"], condition: Condition, plan: SamplingPlan
    ) -> Float[Array, "B E"]:
        """Samples one image embedding a key, in the space of the embedding contract; see ``DiffusionStage.sample``."""
        x_0 = self.sample_x_0(variables.params, keys, condition, plan) / self._gain
        if not self.whiten:
            return x_0
        return variables.stats["mean"][None] + variables.stats["std"][None] * x_0
