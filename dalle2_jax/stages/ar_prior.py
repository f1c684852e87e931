"""The autoregressive prior: from a caption to a CLIP image embedding, code by code (Ramesh et al. 2022, section 2.2).

The image embedding becomes a sequence of codes (``models.priors.codes``), trained by the cross entropy of each code
given the codes before it, the caption and its CLIP text embedding. A token before the codes encodes the dot product
z_i . z_t; sampling takes one from the top half of those of the training pairs. For classifier-free guidance the
caption is dropped for 10 % of the examples, and with it the dot product, which depends on the text embedding.

Components, buckets and the quantiles of the dot products are statistics of the training embeddings. They are
estimated by ``calibrate`` before the first step, and stored in ``Variables.stats``.
"""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, Int, Key

from dalle2_jax import rng
from dalle2_jax.errors import UserError
from dalle2_jax.models.priors import codes
from dalle2_jax.models.priors.ar_prior import ArPriorConfig, ArPriorNetwork
from dalle2_jax.ranges import CalibrationExamples, Fraction
from dalle2_jax.stages.base import Outputs, StageDefaults, Variables, apply
from dalle2_jax.stages.clip import ClipStage
from dalle2_jax.stages.held_out import cosines, head
from dalle2_jax.stages.sampling import ArSamplingConfig, ArSamplingPlan, Condition, Drops
from dalle2_jax.types import Batch, Metrics, Params, PerExample


@dataclasses.dataclass(frozen=True)
class ArPriorStage(StageDefaults):
    """Predicts the codes of image embeddings, conditioned on the caption and its CLIP text embedding.

    Components and buckets are estimated from ``calibration_examples`` training pairs, rounded up to full batches. The
    components must retain the share ``retained_variance`` of their variance; 0 accepts any number of them.
    """

    model: ArPriorConfig
    clip: ClipStage
    sampling: ArSamplingConfig = ArSamplingConfig()
    drop_text: Fraction = 0.1
    calibration_examples: CalibrationExamples = 65_536
    retained_variance: Fraction = 0.0
    name: str = "ar_prior"

    candidates: ClassVar[int] = 2  # embeddings sampled for each image; the paper has 1, which measures worse

    def __post_init__(self) -> None:
        if self.calibration_examples < self.model.buckets:
            raise UserError(
                f"{self.calibration_examples} calibration_examples cannot fill {self.model.buckets} buckets: take more"
            )

    @property
    def requires(self) -> tuple[str, ...]:
        """CLIP."""
        return ("clip",)

    @property
    def inputs(self) -> tuple[str, ...]:
        """Both embeddings of CLIP, and the caption."""
        return ("image_emb", "text_emb", "tokens", "mask")

    @property
    def calibrates(self) -> bool:
        """Components and buckets are measured before training."""
        return True

    @property
    def network(self) -> ArPriorNetwork:
        return ArPriorNetwork(self.model)

    def init(self, key: jax.Array) -> Variables:
        """Returns initial parameters, and zeros for the statistics that ``calibrate`` measures."""
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
        return self.clip.complete(frozen.get("clip"), batch, self.inputs)

    def prepare_captions(self, clip: Variables | None, batch: Batch) -> Batch:
        """Adds the columns that CLIP computes from the captions, unless they were precomputed."""
        return self.clip.complete(clip, batch, ("text_emb",))

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics of training batches on the devices.

        Raises:
          UserError: embeddings are not finite, or the components retain too little of their variance.
        """

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
        image_emb, count = np.concatenate(embeddings), self.model.components
        stats = codes.fit(image_emb, np.concatenate(dots), count, self.model.buckets)
        required = codes.components_needed(image_emb, self.retained_variance)
        if required > count:
            raise UserError(
                f"config.model.components {count} retain less than the share {self.retained_variance} "
                f"(conditioning.retained_variance) of the variance of the embeddings: set it to {required}"
            )
        return stats

    def loss(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> tuple[jax.Array, Outputs]:
        """Mean cross entropy of a code, in nats.

        Metrics: ``accuracy``, the share of codes predicted correctly, and ``code_error``, the mean squared error of
        the quantised embeddings over the variance of the embeddings (below 1 % in the paper).
        """
        import optax  # for training only

        image_emb = batch["image_emb"]
        target = codes.encode(stats, image_emb)
        dot = codes.encode_dot(stats, image_emb, batch["text_emb"])
        drop = rng.bernoulli(rng.stream(key, "drop_text"), self.drop_text, dot.shape)
        logits = apply(self.network, params, target, dot, **self.condition(batch), drop_text=drop)
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        error = jnp.mean(jnp.square(codes.decode(stats, target) - image_emb))
        variance = jnp.mean(jnp.square(image_emb - stats["mean"][None]))
        metrics = {
            "accuracy": (logits.argmax(axis=-1) == target).astype(jnp.float32).mean(),
            "code_error": error / jnp.maximum(variance, 1e-12),
        }
        return losses.mean(), Outputs(metrics, stats)

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns cosines of embeddings sampled for the first captions of the batch, see `cosines`."""
        batch = head(batch)
        keys = rng.per_image(key, jnp.arange(len(batch["mask"]), dtype=jnp.int32))
        return cosines(self.sample(variables, keys, self.condition(batch), self.plan()), batch)

    def condition(self, batch: Batch) -> Condition:
        """Returns the condition of a batch with text embeddings."""
        return {"text_emb": batch["text_emb"], "text": batch["tokens"], "mask": batch["mask"]}

    def check_sampling(self, config: ArSamplingConfig) -> None:
        """Raises UserError for a ``top_k`` of more codes than there are."""
        if config.top_k is not None and config.top_k > self.model.buckets:
            raise UserError(f"top_k {config.top_k} is more than the {self.model.buckets} codes of stage {self.name}")

    def plan(self, config: ArSamplingConfig | None = None, *, absent: Drops | None = None) -> ArSamplingPlan:
        """Returns the plan of `sample`.

        Args:
          config: how to sample; ``sampling`` of the stage by default.
          absent: {"text": examples without a caption}.
        """
        config = self.sampling if config is None else config
        return ArSamplingPlan(
            config.guidance != 1.0,
            config.guidance,
            config.dot_quantile,
            dict(absent or {}),
            temperature=config.temperature,
            top_p=None if config.top_p == 1.0 else config.top_p,
            top_k=config.top_k,
        )

    def sample(
        self, variables: Variables, keys: Key[Array, "B"], condition: Condition, plan: ArSamplingPlan
    ) -> Float[Array, "B E"]:
        """Samples one image embedding a key: ancestral sampling in one scan, with cached keys and values.

        Args:
          variables: parameters, usually their average, and the statistics of ``calibrate``.
          keys: one an example; the samples depend on no other randomness.
          condition: as ``condition`` returns it.
          plan: as `plan` returns it.
        """
        drop = plan.absent.get("text", jnp.zeros(keys.shape, bool))
        dot_keys = jax.vmap(lambda key: rng.stream(key, "dot"))(keys)
        dot = top_dots(dot_keys, self.model.buckets, plan.dot_quantile)
        if plan.guided:  # both branches in one batched call, the second without the caption, or with the negative one
            second = condition if plan.negative is None else plan.negative
            condition = {name: jnp.concatenate([value, second[name]]) for name, value in condition.items()}
            drop = jnp.concatenate([drop, jnp.full(keys.shape, plan.negative is None)])
            dot = twice(dot)
        code_keys = jax.vmap(lambda key: rng.stream(key, "codes"))(keys)
        call = functools.partial(apply, self.network, variables.params)

        def sample_code(logits: jax.Array, index: int | jax.Array) -> jax.Array:
            if plan.guided:
                conditional, unconditional = jnp.split(logits, 2)
                logits = unconditional + _column(plan.guidance) * (conditional - unconditional)
            logits = truncated(logits / _column(plan.temperature), plan.top_k, plan.top_p)
            step_keys = jax.vmap(rng.at_step, in_axes=(0, None))(code_keys, index)
            return jax.vmap(jax.random.categorical)(step_keys, logits).astype(jnp.int32)

        def advance(carry, index):
            logits, past = carry
            code = sample_code(logits, index)
            return call(past, twice(code) if plan.guided else code, index, method=ArPriorNetwork.step), code

        start = call(dot, **condition, drop_text=drop, method=ArPriorNetwork.encode_prefix)
        last = self.model.components - 1
        (logits, _), sampled = jax.lax.scan(advance, start, jnp.arange(last))
        sampled = jnp.concatenate([sampled, sample_code(logits, last)[None]]).T
        return codes.decode(variables.stats, sampled)


def truncated(logits: Float[Array, "B Q"], top_k: int | None, top_p: PerExample | None) -> Float[Array, "B Q"]:
    """Returns logits in which codes that are not to be sampled have probability 0; see `ArSamplingConfig`.

    Of the ``top_k`` most likely codes, the fewest most likely ones are kept that together have at least the probability
    ``top_p``. Codes that are as likely as the last of them are kept too.
    """
    if top_k is None and top_p is None:
        return logits
    ordered = jnp.sort(logits, axis=-1, descending=True)[:, :top_k]
    last = ordered[:, -1:]
    if top_p is not None:
        shares = jax.nn.softmax(ordered, axis=-1)
        kept = jnp.cumsum(shares, axis=-1) - shares < _column(top_p)  # always the first
        last = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= last, logits, -jnp.inf)


def top_dots(keys: Key[Array, "B"], buckets: int, quantile: PerExample) -> Int[Array, "B"]:
    """Samples dot product buckets from the training distribution above a quantile.

    Every bucket holds an equal share of the training pairs, so the distribution is uniform over the upper buckets.
    """
    share = jax.vmap(jax.random.uniform)(keys)
    place = quantile + (1.0 - quantile) * share
    return jnp.minimum(jnp.floor(place * buckets).astype(jnp.int32), buckets - 1)


def _column(value: PerExample) -> Float[Array, "B 1"]:
    """Returns a number, or one for each example, ready to be combined with logits."""
    return jnp.asarray(value, jnp.float32).reshape(-1, 1)


def twice(value: Array) -> Array:
    """Returns a batch concatenated with itself."""
    return jnp.concatenate([value, value])
