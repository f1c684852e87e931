"""LoRA: a stage that is fine-tuned by low-rank changes of some kernels (Hu et al. 2021, arXiv 2106.09685).

A kernel W is a matrix from its input axes to its output axes, [in, out]. It is replaced by

    W' = W + alpha / rank A B,    A [in, rank] ~ N(0, 1 / in),  B [rank, out] = 0 at first    (section 4.1, eq. 3)

(x W here is W x in the paper, so A and B are the paper's, transposed and in their order of use). Only A and B are
trained and saved. B is zero at first, so the initial output is exactly that of the base. The kernels of a scanned
transformer are a stack [layers, ...], factored layer by layer.

In training W' is never computed: a changed layer adds alpha / rank (x A) B to its output (``models.low_rank``), so
that no gradient has the size of a kernel. For sampling and evaluation the weights are merged.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.errors import UserError
from dalle2_jax.models.low_rank import low_rank_changes, with_factors
from dalle2_jax.ranges import PositiveFloat, Width
from dalle2_jax.stages.base import Embeddings, Outputs, Stage, TrainingRules, Variables, unchanged
from dalle2_jax.stages.contract import EmbeddingContract
from dalle2_jax.types import Batch, Degrading, Metrics, Params

TARGETS = (
    r"(^|/)attn/(qkv|q|kv|context_kv|out)/kernel$",  # attention, of transformers and of the U-Net
    r"(^|/)blocks/(fc|proj)/kernel$",  # the transformers' MLPs
    r"(^|/)pool/(query|key|value|out)/kernel$",  # the attention that ends CLIP's ResNet
    r"(^|/)(context_kv|caption_context_proj|text_seq_proj|image_token_proj)/kernel$",  # conditioning of attention
)
"""The kernels that are changed unless a config says otherwise, as regular expressions on parameter paths."""

CONVOLUTIONS = r"/conv_\d/kernel$"
"""A target for the residual blocks of a U-Net: the only kernels of a network without attention."""

SCANNED_KERNELS = r"(^|/)blocks/"
"""Kernels with a leading axis of layers."""

FAN_OUT_KERNELS = r"(^|/)(qkv|q|kv|context_kv|query|key|value|fc|image_token_proj)/kernel$"
"""Kernels with one input axis and several output axes; others have one output axis: [N, K, D], [H, W, C, D], [D, E]."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels are changed, at which rank, and how strongly: the change is ``alpha / rank`` A B.

    ``targets`` are regular expressions on parameter paths ("unet/mid_attn/attn/qkv/kernel"); one is enough.

    Raises:
      UserError: a rank below 1, no targets, or one that is no regular expression.
    """

    rank: Width = 4
    alpha: PositiveFloat = 4.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")
        if not self.targets:
            raise UserError("targets names no kernel: remove it for the attention and MLP kernels")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(f"target {pattern!r} is no regular expression ({error})") from error


@dataclasses.dataclass(frozen=True)
class LoraStage:
    """A stage whose parameters are low-rank factors of another's kernels: {.., "lora_a": A, "lora_b": B} for "kernel".

    The base weights, and the statistics that training does not change, are in ``frozen`` under the stage's own name.
    All other statistics belong to this stage.
    """

    inner: Stage
    config: LoraConfig

    @property
    def name(self) -> str:
        """The inner stage's."""
        return self.inner.name

    @property
    def requires(self) -> tuple[str, ...]:
        """The inner stage's, and the base, which has the stage's own name."""
        return (*self.inner.requires, self.name)

    @property
    def training_rules(self) -> TrainingRules:
        """The inner stage's, without its projection, which applies to weights that a LoRA does not train."""
        return dataclasses.replace(self.inner.training_rules, project=unchanged)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The inner stage's."""
        return self.inner.inputs

    @property
    def constant_stats(self) -> tuple[str, ...]:
        """None: the inner stage's constant statistics are part of the base."""
        return ()

    @property
    def degrading(self) -> Degrading | None:
        """The inner stage's."""
        return self.inner.degrading

    @property
    def calibrates(self) -> bool:
        """Whether the inner stage calibrates."""
        return self.inner.calibrates

    @property
    def image_size(self) -> int | None:
        """The inner stage's."""
        return self.inner.image_size

    @property
    def diffusion_steps(self) -> int | None:
        """The inner stage's."""
        return self.inner.diffusion_steps

    def init(self, key: Key[Array, ""]) -> Variables:
        """Returns initial factors and statistics.

        Raises:
          UserError: a target that matches no kernel of the stage.
        """
        inner = self.inner.init(rng.stream(key, "inner"))
        paths = _kernels(inner.params)
        unmatched = [pattern for pattern in self.config.targets if not any(re.search(pattern, path) for path in paths)]
        given = [pattern for pattern in unmatched if pattern not in TARGETS]
        if given or len(unmatched) == len(self.config.targets):
            raise UserError(
                f"config.lora.targets: no kernel of stage {self.name} fits {', '.join(map(repr, given or unmatched))}; "
                f"its kernels are {', '.join(paths[:4])}, ..; {CONVOLUTIONS!r} fits a U-Net's convolutions"
            )
        return Variables(_initial_factors(rng.stream(key, "lora"), inner.params, self.config), self._own(inner.stats))

    def frozen_part(self, base: Variables) -> Variables:
        """Returns the variables of the base that stay constant: all parameters, and ``inner.constant_stats``."""
        return Variables(base.params, {name: base.stats[name] for name in self.inner.constant_stats})

    def contract(self, params: Params) -> EmbeddingContract | None:
        """Returns the contract of merged weights, as the inner stage."""
        return self.inner.contract(params)

    def adapted(self, params: Params) -> Params:
        """Returns the factors unchanged: they belong to one network."""
        return params

    def merged(self, frozen: Mapping[str, Variables], variables: Variables) -> Variables:
        """Returns the inner stage's variables: the base weights with the change added, and all statistics."""
        base = frozen[self.name]
        stats = {**variables.stats, **self.frozen_part(base).stats}
        return Variables(merge(base.params, variables.params, self.config), stats)

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Returns the batch that the inner stage prepares."""
        return self.inner.prepare(frozen, batch)

    def calibrate(self, frozen: Mapping[str, Variables], batches: Iterator[Batch]) -> Params:
        """Returns the statistics that the inner stage measures."""
        return self._own(self.inner.calibrate(frozen, batches))

    def loss(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> tuple[jax.Array, Outputs]:
        """Returns the inner stage's loss with changed layers; only the factors are differentiated."""
        with low_rank_changes(self.config.alpha / self.config.rank):
            loss, outputs = self.inner.loss(*self._factored(frozen, params, stats), frozen, key, batch)
        return loss, Outputs(outputs.metrics, self._own(outputs.stats))

    @property
    def contrastive(self) -> bool:
        """The inner stage's."""
        return self.inner.contrastive

    def embed(self, params: Params, stats: Params, frozen: Mapping[str, Variables], batch: Batch) -> Embeddings:
        """Returns the inner stage's embeddings with changed layers."""
        with low_rank_changes(self.config.alpha / self.config.rank):
            return self.inner.embed(*self._factored(frozen, params, stats), frozen, batch)

    def contrast(
        self, params: Params, stats: Params, frozen: Mapping[str, Variables], embeddings: Embeddings
    ) -> tuple[jax.Array, Outputs]:
        """Returns the inner stage's loss of embeddings."""
        loss, outputs = self.inner.contrast(*self._factored(frozen, params, stats), frozen, embeddings)
        return loss, Outputs(outputs.metrics, self._own(outputs.stats))

    def measure(
        self, variables: Variables, frozen: Mapping[str, Variables], key: Key[Array, ""], batch: Batch
    ) -> Metrics:
        """Returns the inner stage's measures of the merged weights."""
        return self.inner.measure(self.merged(frozen, variables), frozen, key, batch)

    def _factored(self, frozen: Mapping[str, Variables], params: Params, stats: Params) -> Variables:
        """Returns the base weights with the factors next to their kernels, and all statistics."""
        base = frozen[self.name]
        return Variables(with_factors(base.params, params), {**stats, **self.frozen_part(base).stats})

    def _own(self, stats: Params) -> Params:
        return {name: value for name, value in stats.items() if name not in self.inner.constant_stats}


@functools.partial(jax.jit, static_argnames="config")
def merge(base: Params, factors: Params, config: LoraConfig) -> Params:
    """Returns the base weights with the change added, W + alpha / rank A B, in float32.

    Weights without factors are returned unchanged.
    """
    return _merge(base, factors, config)


def _merge(base: Params, factors: Params, config: LoraConfig) -> Params:
    merged = dict(base)
    if "lora_a" in factors:
        change = _product(factors["lora_a"], factors["lora_b"], base["kernel"].ndim)
        merged["kernel"] = base["kernel"] + config.alpha / config.rank * change
    for name, inner in factors.items():
        if isinstance(inner, Mapping):
            merged[name] = _merge(base[name], inner, config)
    return merged


def _product(a: Float[Array, "..."], b: Float[Array, "..."], dimensions: int) -> Float[Array, "..."]:
    """A [layers, *in, rank] times B [layers, rank, *out], with or without the layers: [layers, *in, *out]."""
    layers = a.ndim + b.ndim - 2 - dimensions
    stacked = tuple(range(layers))
    contraction = (((a.ndim - 1,), (layers,)), (stacked, stacked))
    return jax.lax.dot_general(a, b, contraction, precision=jax.lax.Precision.HIGHEST)


def _kernels(params: Params, path: str = "") -> list[str]:
    """Returns the paths of all kernels."""
    found = []
    for name, value in params.items():
        if isinstance(value, Mapping):
            found += _kernels(value, f"{path}{name}/")
        elif name == "kernel":
            found.append(f"{path}{name}")
    return found


def _initial_factors(key: Key[Array, ""], params: Params, config: LoraConfig, path: str = "") -> Params:
    """Returns initial factors for the kernels that ``config`` targets, at the same paths."""
    factors = {}
    for name, value in params.items():
        here = f"{path}{name}"
        if isinstance(value, Mapping):
            inner = _initial_factors(key, value, config, f"{here}/")
            factors |= {name: inner} if inner else {}
        elif name == "kernel" and any(re.search(pattern, here) for pattern in config.targets):
            factors |= _initial_pair(rng.stream(key, here), here, value.shape, config.rank)
    return factors


def _initial_pair(key: Key[Array, ""], path: str, shape: tuple[int, ...], rank: int) -> Params:
    """Returns A and B of one kernel; their axes are in the kernel's order, so the same sharding rules apply."""
    layers = 1 if re.search(SCANNED_KERNELS, path) else 0
    inputs = layers + 1 if re.search(FAN_OUT_KERNELS, path) else len(shape) - 1
    std = math.prod(shape[layers:inputs]) ** -0.5
    return {
        "lora_a": std * jax.random.normal(key, (*shape[:inputs], rank)),
        "lora_b": jnp.zeros((*shape[:layers], rank, *shape[inputs:])),
    }
