"""LoRA: a stage that stays as it is but for low-rank changes of some kernels (Hu et al. 2021, arXiv 2106.09685).

A kernel W is a matrix from its input axes to its output axes, [in, out]. In its place stands

    W' = W + alpha / rank A B,    A [in, rank] ~ N(0, 1 / in),  B [rank, out] = 0 at first    (section 4.1, eq. 3)

(x W here is W x there, so A and B are the paper's, transposed and in their order of use). Only A and B are trained
and saved. B is zero at first, so the first step's output is the base's, exactly. The kernels of a scanned
transformer are a stack [layers, ...], factored layer by layer.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Key

from dalle2_jax import rng
from dalle2_jax.stages.base import Outputs, Stage, Variables
from dalle2_jax.types import Batch, Params, UserError

TARGETS = (
    r"(^|/)attn/(qkv|q|kv|context_kv|out)/kernel$",  # attention, of transformers and of the U-Net
    r"(^|/)blocks/(fc|proj)/kernel$",  # the transformers' MLPs
    r"(^|/)pool/(query|key|value|out)/kernel$",  # the attention that ends CLIP's ResNet
    r"(^|/)(context_kv|caption_context_proj|text_seq_proj|image_token_proj)/kernel$",  # what attention is told
)
"""The kernels that are changed unless a config says otherwise, as regular expressions on parameter paths."""

CONVOLUTIONS = r"/conv_\d/kernel$"
"""What to name for the residual blocks of a U-Net, which a network without attention has alone."""

STACKED = r"(^|/)blocks/"
"""Kernels with a leading axis of layers."""

SPREADING = r"(^|/)(qkv|q|kv|context_kv|query|key|value|fc|image_token_proj)/kernel$"
"""Kernels of one input axis and several output axes; others have one output axis: [N, K, D], [H, W, C, D], [D, E]."""


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Which kernels are changed, at which rank, and how strongly: the change is ``alpha / rank`` A B.

    ``targets`` are regular expressions on parameter paths ("unet/mid_attn/attn/qkv/kernel"); one is enough.

    Raises:
      UserError: a rank below 1, no targets, or one that is no regular expression.
    """

    rank: int = 4
    alpha: float = 4.0
    targets: tuple[str, ...] = TARGETS

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"rank {self.rank} must be at least 1")
        if not self.targets:
            raise UserError("targets names no kernel: leave it out for the attention and MLP kernels")
        for pattern in self.targets:
            try:
                re.compile(pattern)
            except (re.error, TypeError) as error:
                raise UserError(f"target {pattern!r} is no regular expression ({error})") from error


@dataclasses.dataclass(frozen=True)
class LoraStage:
    """A stage whose parameters are the factors of another's kernels: {.., "lora_a": A, "lora_b": B} for "kernel".

    The base's weights are borrowed, under the stage's own name, and those of its statistics that no training changes:
    ``prepare`` hands them to ``loss`` in the batch, as "base". All other statistics are this stage's own.
    """

    inner: Stage
    config: LoraConfig

    @property
    def name(self) -> str:
        """The inner stage's."""
        return self.inner.name

    @property
    def borrows(self) -> tuple[str, ...]:
        """What the inner stage borrows, and the base of its own name."""
        return (*self.inner.borrows, self.name)

    def init(self, key: Key[Array, ""]) -> Variables:
        """Returns fresh factors, and fresh statistics.

        Raises:
          UserError: a target that fits no kernel of the stage.
        """
        inner = self.inner.init(rng.stream(key, "inner"))
        paths = _kernels(inner.params)
        lost = [pattern for pattern in self.config.targets if not any(re.search(pattern, path) for path in paths)]
        given = [pattern for pattern in lost if pattern not in TARGETS]
        if given or len(lost) == len(self.config.targets):
            raise UserError(
                f"config.lora.targets: no kernel of stage {self.name} fits {', '.join(map(repr, given or lost))}; "
                f"its kernels are {', '.join(paths[:4])}, ..; {CONVOLUTIONS!r} fits a U-Net's convolutions"
            )
        return Variables(_fresh(rng.stream(key, "lora"), inner.params, self.config), self._own(inner.stats))

    def borrowed(self, base: Variables) -> Variables:
        """Returns what is borrowed of the base's variables."""
        return Variables(base.params, {name: base.stats[name] for name in self._constant})

    def whole(self, borrowed: Variables, own: Variables) -> Variables:
        """Returns the inner stage's variables: the factors merged, and all statistics."""
        return Variables(merge(borrowed.params, own.params, self.config), {**own.stats, **borrowed.stats})

    def prepare(self, frozen: Mapping[str, Variables], batch: Batch) -> Batch:
        """Adds what the inner stage adds, and what is borrowed of the base."""
        return {**self.inner.prepare(frozen, batch), "base": frozen[self.name]}

    def loss(self, params: Params, stats: Params, key: Key[Array, ""], batch: Batch) -> tuple[jax.Array, Outputs]:
        """The inner stage's loss with the factors merged; the base is a constant."""
        rest = {name: value for name, value in batch.items() if name != "base"}
        loss, outputs = self.inner.loss(*self.whole(batch["base"], Variables(params, stats)), key, rest)
        return loss, Outputs(outputs.metrics, self._own(outputs.stats))

    @property
    def _constant(self) -> tuple[str, ...]:
        return getattr(self.inner, "constant_stats", ())

    def _own(self, stats: Params) -> Params:
        return {name: value for name, value in stats.items() if name not in self._constant}


@functools.partial(jax.jit, static_argnames="config")
def merge(base: Params, factors: Params, config: LoraConfig) -> Params:
    """Returns the base's weights with the factors' changes added, W + alpha / rank A B, in float32.

    Loading, export and training all merge by this. Weights without factors are the base's own.
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


def _fresh(key: Key[Array, ""], params: Params, config: LoraConfig, path: str = "") -> Params:
    """Returns factors for the kernels that ``config`` targets, at their places in the tree."""
    factors = {}
    for name, value in params.items():
        here = f"{path}{name}"
        if isinstance(value, Mapping):
            inner = _fresh(key, value, config, f"{here}/")
            factors |= {name: inner} if inner else {}
        elif name == "kernel" and any(re.search(pattern, here) for pattern in config.targets):
            factors |= _pair(rng.stream(key, here), here, value.shape, config.rank)
    return factors


def _pair(key: Key[Array, ""], path: str, shape: tuple[int, ...], rank: int) -> Params:
    """Returns A and B of one kernel, each axis of which keeps its place and so its sharding rule."""
    layers = 1 if re.search(STACKED, path) else 0
    inputs = layers + 1 if re.search(SPREADING, path) else len(shape) - 1
    spread = math.prod(shape[layers:inputs]) ** -0.5
    return {
        "lora_a": spread * jax.random.normal(key, (*shape[:inputs], rank)),
        "lora_b": jnp.zeros((*shape[:layers], rank, *shape[inputs:])),
    }
