"""The autoregressive prior: from a caption to a CLIP image embedding, code by code (Ramesh et al. 2022, section 2.2).

The image embedding becomes a sequence of codes (``stages.codes``), learned under the cross entropy of
each code given those before it, the caption and its CLIP text embedding. A token before the codes says
how large the dot product z_i . z_t is; a sample asks for one from the top half of the training pairs'.
For classifier-free guidance all that comes from the caption is dropped for 10 % of the examples, the
dot product too: it would tell of a text embedding that is not there.

Components, buckets and the dot products' quantiles are statistics of the training embeddings. They are
estimated once, by ``calibrate``, before the first step, and lie in ``Variables.stats`` from then on.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.models.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.stages import codes
from dalle2_jax.stages.base import Outputs, Variables
from dalle2_jax.stages.clip import ClipStage
from dalle2_jax.stages.diffusion import Condition
from dalle2_jax.types import Batch, Params, UserError


@dataclasses.dataclass(frozen=True)
class ArSamplingConfig:
    """How codes are drawn.

    ``guidance`` is the scale of classifier-free guidance on the logits (1: none). The dot product asked
    for is drawn from the training pairs' above their quantile ``dot_quantile`` (the paper swept 0.5, 0.7,
    0.85 and 0.95, and found 0.5 the best).
    """

    guidance: float = 1.0
    dot_quantile: float = 0.5

    def __post_init__(self) -> None:
        if not 0.0 <= self.dot_quantile < 1.0:
            raise UserError(f"sampling.dot_quantile {self.dot_quantile} must be at least 0 and below 1")

    def split(self) -> tuple["ArSamplingConfig", dict[str, float]]:
        """Returns what decides the compiled program, and the numbers that the program takes."""
        program = ArSamplingConfig(guidance=self.guidance if self.guidance == 1.0 else 2.0)
        return program, {"guidance": self.guidance, "dot_quantile": self.dot_quantile}


@dataclasses.dataclass(frozen=True)
class ArPriorStage:
    """Predicts the codes of image embeddings, conditioned on the caption and its CLIP text embedding.

    ``calibration_examples`` training pairs, rounded up to whole batches, decide components and buckets.
    """

    model: ArPriorConfig
    clip: ClipStage
    sampling: ArSamplingConfig = ArSamplingConfig()
    drop_text: float = 0.1
    calibration_examples: int = 65_536
    name: str = "ar_prior"

    calibrates: ClassVar[bool] = True
    said: ClassVar[tuple[str, ...]] = ("image_emb", "text_emb")  # what prepare asks of CLIP
    candidates: ClassVar[int] = 1  # embeddings drawn for each picture: the dot product token does the choosing

    def __post_init__(self) -> None:
        if self.calibration_examples < self.model.buckets:
            raise UserError(
                f"{self.calibration_examples} calibration_examples cannot fill {self.model.buckets} buckets: take more"
            )

    @property
    def borrows(self) -> tuple[str, ...]:
        """CLIP alone."""
        return ("clip",)

    @property
    def network(self) -> ArPriorNetwork:
        return ArPriorNetwork(self.model)

    def init(self, key: jax.Array) -> Variables:
        """Returns fresh parameters, and zeros where ``calibrate``'s statistics belong."""
        model, length = self.model, self.model.text.context_length
        params = self.network.init(
            key,
            jnp.zeros((1, model.components), jnp.int32),
            jnp.zeros(1, jnp.int32),
            jnp.zeros((1, model.embed_dim)),
            jnp.zeros((1, length), jnp.int32),
            jnp.ones((1, length), bool),
            jnp.zeros(1, bool),
        )["params"]
        return Variables(params, codes.empty(model.embed_dim, model.components, model.buckets))

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds image_emb, text_emb and text_seq, unless they were precomputed."""
        return self.clip.complete(frozen.get("clip"), batch, self.said)

    def read(self, clip: Variables | None, batch: Batch) -> Batch:
        """As ``prepare``, of the captions alone."""
        return self.clip.complete(clip, batch, ("text_emb",))

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics of training batches on the devices. UserError if CLIP's embeddings are unfit."""

        @jax.jit
        def measure(frozen: Mapping[str, Variables], batch: Batch) -> tuple[jax.Array, jax.Array]:
            batch = self.prepare(frozen, batch)
            return batch["image_emb"], jnp.sum(batch["image_emb"] * batch["text_emb"], axis=-1)

        embeddings, dots, seen = [], [], 0
        while seen < self.calibration_examples:
            rows = multihost_utils.process_allgather(measure(frozen, next(batches)), tiled=True)
            embeddings.append(rows[0])
            dots.append(rows[1])
            seen += len(rows[1])
        return codes.fit(np.concatenate(embeddings), np.concatenate(dots), self.model.components, self.model.buckets)

    def loss(self, params: Params, stats: Params, key: jax.Array, batch: Batch) -> tuple[jax.Array, Outputs]:
        """Mean cross entropy of a code, in nats.

        Metrics: ``accuracy``, the share of codes guessed right, and ``code_error``, the mean squared error
        of the embeddings that the codes stand for over the embeddings' variance (below 1 % in the paper).
        """
        image_emb = batch["image_emb"]
        target = codes.encode(stats, image_emb)
        dot = codes.encode_dot(stats, image_emb, batch["text_emb"])
        drop = jax.random.bernoulli(rng.stream(key, "drop_text"), self.drop_text, dot.shape)
        logits = self.network.apply({"params": params}, target, dot, **self.condition(batch), drop_text=drop)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        lost = jnp.mean(jnp.square(codes.decode(stats, target) - image_emb))
        variance = jnp.mean(jnp.square(image_emb - stats["mean"][None]))
        metrics = {
            "accuracy": (logits.argmax(axis=-1) == target).astype(jnp.float32).mean(),
            "code_error": lost / jnp.maximum(variance, 1e-12),
        }
        return losses.mean(), Outputs(metrics, stats)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch whose captions CLIP has read."""
        return {"text_emb": batch["text_emb"], "text": batch["tokens"], "mask": batch["mask"]}

    def sample(
        self,
        variables: Variables,
        keys: Key[Array, "B"],
        condition: Condition,
        config: ArSamplingConfig,
        guidance: Float[Array, ""] | float | None = None,
        dot_quantile: Float[Array, ""] | float | None = None,
        *,
        absent: Mapping[str, Bool[Array, "B"]] | None = None,
    ) -> Float[Array, "B E"]:
        """Draws an image embedding for each key, by ancestral sampling in one scan over cached keys and values.

        Args:
          variables: parameters, usually their average, and the statistics of ``calibrate``.
          keys: one an image; it alone decides the draw.
          condition: as ``condition`` returns it.
          config: static. Whether there is guidance follows from ``config.guidance``.
          guidance: takes the place of ``config.guidance``; may be traced, so changing it compiles nothing.
          dot_quantile: takes the place of ``config.dot_quantile``, likewise.
          absent: {"text": images that go without a caption}.
        """
        scale = config.guidance if guidance is None else guidance
        quantile = config.dot_quantile if dot_quantile is None else dot_quantile
        drop = (absent or {}).get("text", jnp.zeros(keys.shape, bool))
        dot = top_dots(jax.vmap(lambda key: rng.stream(key, "dot"))(keys), self.model.buckets, quantile)
        guided = config.guidance != 1.0
        if guided:  # both branches in one batched call, the second without the caption
            condition = {name: twice(value) for name, value in condition.items()}
            drop = jnp.concatenate([drop, jnp.ones(keys.shape, bool)])
        code_keys = jax.vmap(lambda key: rng.stream(key, "codes"))(keys)
        apply = functools.partial(self.network.apply, {"params": variables.params})

        def draw(logits: jax.Array, index: int | jax.Array) -> jax.Array:
            if guided:
                told, untold = jnp.split(logits, 2)
                logits = untold + jnp.asarray(scale, jnp.float32) * (told - untold)
            now = jax.vmap(rng.at_step, in_axes=(0, None))(code_keys, index)
            return jax.vmap(jax.random.categorical)(now, logits).astype(jnp.int32)

        def advance(carry, index):
            logits, past = carry
            code = draw(logits, index)
            read = twice(code) if guided else code
            return apply(past, read, index, method=ArPriorNetwork.step), code

        dot = twice(dot) if guided else dot
        start = apply(dot, **condition, drop_text=drop, method=ArPriorNetwork.encode_prefix)
        last = self.model.components - 1
        (logits, _), drawn = jax.lax.scan(advance, start, jnp.arange(last))
        drawn = jnp.concatenate([drawn, draw(logits, last)[None]]).T
        return codes.decode(variables.stats, drawn)

    def draw(
        self,
        variables: Variables,
        keys: Key[Array, "B"],
        condition: Condition,
        config: ArSamplingConfig,
        scalars: Mapping[str, jax.Array],
        absent: Bool[Array, "B"],
    ) -> Float[Array, "B E"]:
        """As ``sample``, in the cascade's words for any prior; ``scalars`` are those of ``config.split``."""
        return self.sample(variables, keys, condition, config, **scalars, absent={"text": absent})


def top_dots(keys: Key[Array, "B"], buckets: int, quantile: float | Float[Array, ""]) -> Int[Array, "B"]:
    """Draws dot product buckets from the training distribution above a quantile.

    Every bucket holds an equal share of the training pairs, so the draw is uniform over the upper ones.
    """
    share = jax.vmap(jax.random.uniform)(keys)
    place = quantile + (1.0 - quantile) * share
    return jnp.minimum(jnp.floor(place * buckets).astype(jnp.int32), buckets - 1)


def twice(value: Array) -> Array:
    """Repeats a batch after itself."""
    return jnp.concatenate([value, value])
