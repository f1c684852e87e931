"""The diffusion prior: from a caption to a CLIP image embedding (Ramesh et al. 2022, section 2.2).

The image embedding itself is diffused, in the contract's space, and the network predicts the
un-noised embedding directly under a plain mean squared error. The text is dropped for 10 % of
the examples: learned embeddings take its place, or, without ``model.learned_null``, what CLIP says
of the empty caption (Karlo). Of LAION's prior the noised image embedding is dropped too, for another 10 %.

The networks differ in what their configs say: which parts they go without, and in what length they
want embeddings. LAION's has unit ones times sqrt(E) = ``embed_length``,

    x_0 = z_i embed_length / scale                                                              (1)

in a contract of unit embeddings times ``scale``.

With ``whiten`` what is diffused has mean 0 and deviation 1 in each dimension (Karlo, Kandinsky),

    x_0 = (z_i - mean) / std,        z_i = mean + std x_0                                       (2)

mean and deviation of the training embeddings being statistics of the stage: estimated once, by
``calibrate``, before the first step, or imported with the weights.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float

from dalle2_jax.models.laion_prior import LaionPriorConfig, LaionPriorNetwork
from dalle2_jax.models.prior import PriorConfig, PriorNetwork
from dalle2_jax.stages.base import Variables
from dalle2_jax.stages.clip import READ, READ_EMPTY, ClipStage, empty_captions, without_captions
from dalle2_jax.stages.diffusion import Condition, DiffusionStage, Drops
from dalle2_jax.types import Batch, Denoiser, Params, UserError

_NETWORKS = {PriorConfig: PriorNetwork, LaionPriorConfig: LaionPriorNetwork}


@dataclasses.dataclass(frozen=True)
class PriorStage(DiffusionStage):
    """Diffuses image embeddings, conditioned on the caption and its CLIP text embedding.

    ``calibration_examples`` training pictures, rounded up to whole batches, decide what is white.

    Raises:
      UserError: a loss, a number of steps or CLIP's contract that does not fit the model.
    """

    model: PriorConfig | LaionPriorConfig
    clip: ClipStage
    drop_text: float = 0.1
    drop_image: float = 0.1  # of networks that can go without the noised embedding
    whiten: bool = False
    calibration_examples: int = 65_536

    def __post_init__(self) -> None:
        if self.diffusion.loss != "mse":  # a learned variance has another loss
            raise UserError(
                f"loss {self.diffusion.loss!r} bounds the likelihood of pictures, and the prior draws embeddings, "
                "without a variance: use loss 'mse' and variance 'fixed_small'"
            )
        if self.calibration_examples < 2:
            raise UserError(f"calibration_examples {self.calibration_examples} must be at least 2")
        known = self.model.timesteps
        if known is not None and known < self.diffusion.num_steps:
            raise UserError(
                f"stage {self.name} has a table of {known} timesteps (model.timesteps), "
                f"so diffusion.num_steps may not be {self.diffusion.num_steps}"
            )
        if self.model.embed_length and not self.whiten and self.clip.embedding.normalisation != "unit":
            raise UserError(
                f"stage {self.name} draws embeddings of unit length, and this clip hands on raw ones: it needs a clip "
                f"with embedding.normalisation 'unit', scale {self.model.embed_length:.6g}, or conditioning.whiten True"
            )

    candidates: ClassVar[int] = 2  # embeddings drawn for each picture, the closest to the caption kept

    @property
    def borrows(self) -> tuple[str, ...]:
        return ("clip",)

    @property
    def drop_rates(self) -> Mapping[str, float]:
        return {name: {"image": self.drop_image, "text": self.drop_text}[name] for name in self.model.drops}

    @property
    def network(self) -> PriorNetwork | LaionPriorNetwork:
        return _NETWORKS[type(self.model)](self.model)

    @property
    def _read(self) -> tuple[str, ...]:
        """What the prior is told of CLIP's reading."""
        return (READ if self._reads_states else ("text_emb",)) + (READ_EMPTY if self._reads_empty else ())

    @property
    def _reads_empty(self) -> bool:
        """Whether an absent caption is the empty one."""
        return "text" in self.model.drops and not self.model.learned_null

    @property
    def _gain(self) -> float:
        """Equation 1: how much longer what is diffused is than the contract's embeddings."""
        if self.whiten or not self.model.embed_length:
            return 1.0
        return self.model.embed_length / self.clip.embedding.scale

    @property
    def said(self) -> tuple[str, ...]:
        """What ``prepare`` asks of CLIP, and a batch of precomputed embeddings has to have."""
        return ("image_emb", *self._read)

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
        """Returns the first statistics; with ``whiten``, zeros where ``calibrate``'s mean and std belong."""
        white = {name: jnp.zeros(self.model.embed_dim) for name in ("mean", "std")} if self.whiten else {}
        return {**super().init_stats(), **white}

    @property
    def calibrates(self) -> bool:
        """Whether mean and std have to be measured."""
        return self.whiten

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics, mean and std measured on training batches. UserError if CLIP's embeddings are unfit.

        Sums are in float64, of embeddings less the first, so that nothing is lost where the mean is large.
        """
        embed = jax.jit(lambda frozen, batch: self.prepare(frozen, batch)["image_emb"])
        first, seen = None, 0
        total = squares = np.zeros(self.model.embed_dim)
        while seen < self.calibration_examples:
            rows = multihost_utils.process_allgather(embed(frozen, next(batches)), tiled=True).astype(np.float64)
            first = rows[0] if first is None else first
            total, squares = total + (rows - first).sum(axis=0), squares + np.square(rows - first).sum(axis=0)
            seen += len(rows)
        variance = squares / seen - np.square(total / seen)
        if not np.isfinite(variance).all() or variance.min() <= 0:
            raise UserError(
                "CLIP's embeddings of the training data are not finite or do not vary in every dimension, "
                "so they cannot be whitened: train clip again, or use conditioning.whiten False"
            )
        white = {"mean": first + total / seen, "std": np.sqrt(variance)}
        return {**super().init_stats(), **{name: value.astype(np.float32) for name, value in white.items()}}

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb and what CLIP says of the captions, unless they were precomputed."""
        return self.clip.complete(frozen.get("clip"), batch, self.said)

    def read(self, clip: Variables | None, batch: Batch) -> Batch:
        """As ``prepare``, of the captions alone."""
        return self.clip.complete(clip, batch, self._read)

    def example(self, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Condition]:
        x_0 = batch["image_emb"]
        if self.whiten:
            x_0 = (x_0 - stats["mean"][None]) / stats["std"][None]
        return x_0 * self._gain, self.condition(batch)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch whose captions CLIP has read."""
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
        drop, variables = drops.get("text"), {"params": params}
        if self._reads_empty:
            condition, drop = without_captions(condition, drop), None
        args = condition["text_emb"], condition["text"], condition["mask"], drop
        noised = {"drop_image": drops["image"]} if "image" in drops else {}
        if dropout_key is not None:  # training sees the whole sequence; the prior has no dropout
            return lambda x_t, t: self.network.apply(variables, x_t, t, *args, **noised)
        # The caption's part of the sequence does not change from step to step.
        cache = self.network.apply(variables, *args, method="encode_prefix")
        return lambda x_t, t: self.network.apply(variables, cache, x_t, t, **noised, method="denoise")

    def draw(self, variables: Variables, *args: Any, **around: Any) -> Float[Array, "B E"]:
        """As every diffusion stage does, in the contract's space."""
        drawn = super().draw(variables, *args, **around) / self._gain
        if not self.whiten:
            return drawn
        return variables.stats["mean"][None] + variables.stats["std"][None] * drawn
