"""CLIP as OpenAI names it, and OpenCLIP after it: state dicts, and the TorchScript archives that OpenAI ships.

Sizes are read from shapes. Heads and activation no shape tells. For a state dict alone these are:

| who made it                               | head width   | activation |
| ----------------------------------------- | ------------ | ---------- |
| OpenAI                                    | 64           | quick_gelu |
| OpenCLIP, image tower 1280 wide (H)       | 80, text 64  | gelu       |
| 1408 (g), 1664 (bigG), 1792 (e)           | 88, 104, 112 | gelu       |
| OpenCLIP, any other                       | 64           | gelu       |

One of the last row looks as OpenAI's do: it counts as theirs unless the user says "open_clip".
"""

import itertools
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.models.clip import ClipConfig, TextConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip_towers import mlp_ratio, patch_layout, released_tokenizer, sections
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.landing import Trees
from dalle2_jax.weights.rules import (
    Layout,
    Rule,
    conv,
    dense,
    empty,
    fused,
    leaf,
    merged_heads,
    norm,
    one,
    shapes,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import Tensor, within, write_safetensors

IGNORED = (r"input_resolution|context_length|vocab_size", r".*\.num_batches_tracked", r"(.*\.)?attn_mask")
"""Sizes that OpenAI's archives hold among the weights, a count of training steps, and the causal mask."""

HEAD_WIDTH = 64
"""Of every tower of OpenAI's."""

_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Of OpenCLIP's larger image towers, by their width."""


# --- tables ---------------------------------------------------------------------------------


def openai_rules(config: ClipConfig, text: str = "") -> list[Rule]:
    """The table of a CLIP's parameters.

    Args:
        config: both towers.
        text: what stands before the text tower's keys, "text." in OpenCLIP's models with a text tower of choice.
    """
    resnet = isinstance(config.vision, ResNetConfig)
    visual = _resnet_rules(config.vision) if resnet else _vit_rules(config.vision)
    tower = [
        *leaf("token_embedding/embedding", "token_embedding.weight"),
        *leaf("positional_embedding", "positional_embedding"),
        *_blocks(config.text.layers, config.text.heads),
        *norm("ln_final", "ln_final"),
        *leaf("proj/kernel", "text_projection"),
    ]
    return [*under("visual", "visual.", visual), *under("text", text, tower), *leaf("logit_scale", "logit_scale")]


def openai_stats(config: ClipConfig) -> list[Rule]:
    """The table of a CLIP's statistics: the running ones of a ResNet's batch norms."""
    names = _resnet_norms(config.vision) if isinstance(config.vision, ResNetConfig) else []
    return [
        rule
        for ours, _, theirs in names
        for kind in ("mean", "var")
        for rule in leaf(f"visual/{ours}/norm/{kind}", f"visual.{theirs}.running_{kind}")
    ]


def _blocks(layers: int, heads: int) -> list[Rule]:
    block = [
        *norm("ln_1", "ln_1"),
        *leaf("attn/qkv/kernel", "attn.in_proj_weight", fused(3, heads)),
        *leaf("attn/qkv/bias", "attn.in_proj_bias", fused(3, heads, bias=True)),
        *dense("attn/out", "attn.out_proj", merged_heads(heads)),
        *norm("ln_2", "ln_2"),
        *dense("fc", "mlp.c_fc"),
        *dense("proj", "mlp.c_proj"),
    ]
    return stacked(*(under("transformer/blocks", f"transformer.resblocks.{i}.", block) for i in range(layers)))


def _vit_rules(vision: VisionConfig) -> list[Rule]:
    return [
        *leaf("patch_embed/kernel", "conv1.weight", patch_layout(vision.patch_size)),
        *leaf("class_embedding", "class_embedding"),
        *leaf("positional_embedding", "positional_embedding"),
        *norm("ln_pre", "ln_pre"),
        *_blocks(vision.layers, vision.heads),
        *norm("ln_post", "ln_post"),
        *leaf("proj/kernel", "proj"),
    ]


def _resnet_rules(vision: ResNetConfig) -> list[Rule]:
    rules = leaf("pool/positional_embedding", "attnpool.positional_embedding")
    for ours, key in (("query", "q"), ("key", "k"), ("value", "v")):
        rules += leaf(f"pool/{ours}/kernel", f"attnpool.{key}_proj.weight", _apart(vision.heads))
        rules += leaf(f"pool/{ours}/bias", f"attnpool.{key}_proj.bias", _apart(vision.heads))
    rules += dense("pool/out", "attnpool.c_proj", merged_heads(vision.heads))
    for ours, convolution, batch_norm in _resnet_norms(vision):
        rules += [*conv(f"{ours}/conv", convolution, bias=False), *norm(f"{ours}/norm", batch_norm)]
    return rules


def _resnet_norms(vision: ResNetConfig) -> list[tuple[str, str, str]]:
    """Our name of each convolution with its norm, and their names of both."""
    names = [(f"stem_{i}", f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
    for stage, blocks in enumerate(vision.layers, start=1):
        for block in range(blocks):
            ours, theirs = f"stage_{stage}_block_{block + 1}", f"layer{stage}.{block}"
            names += [(f"{ours}/conv_{i}", f"{theirs}.conv{i}", f"{theirs}.bn{i}") for i in (1, 2, 3)]
            if block == 0:
                names.append((f"{ours}/downsample", f"{theirs}.downsample.0", f"{theirs}.downsample.1"))
    return names


def _apart(heads: int) -> Layout:
    """One projection before attention, [N * K, D] <-> [D, N, K]; its bias [N * K] <-> [N, K]."""
    return one(
        lambda x: x.T.reshape(*x.shape[1:], heads, -1),
        lambda x: x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]).T,
    )


# --- sizes ----------------------------------------------------------------------------------


def read_sizes(tensors: Mapping[str, Tensor], where: str, kind: str = "auto") -> ClipConfig:
    """Returns the CLIP that a state dict holds, by the shapes of its tensors and the table above.

    Args:
        tensors: by key.
        where: the file, for errors.
        kind: "openai_clip", "open_clip" or "auto".

    Raises:
        UserError: a tensor that says a size is missing.
    """

    def shape(key: str, axes: int = 2) -> tuple[int, ...]:
        if key not in tensors:
            raise UserError(f"{where} lacks tensor {key}: it is cut short or of another family")
        if len(tensors[key].shape) != axes or 0 in tensors[key].shape:
            raise UserError(f"{where}: {key} {list(tensors[key].shape)} is not CLIP's: it has {axes} axes there")
        return tensors[key].shape

    def layers(prefix: str) -> int:
        found = (re.match(rf"{re.escape(prefix)}(\d+)\.", key) for key in tensors)
        return 1 + max((int(match[1]) for match in found if match), default=-1)

    def ratio(prefix: str, width: int) -> float:
        return mlp_ratio(shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0], width)

    text = text_prefix(tensors)
    vocab_size, text_width = shape(f"{text}token_embedding.weight")
    channels = shape("visual.conv1.weight", 4)[0]
    head_width, activation = _unsaid(channels, kind)
    if "visual.class_embedding" in tensors:
        patch = shape("visual.conv1.weight", 4)[-1]
        vision = VisionConfig(
            image_size=patch * _side(shape("visual.positional_embedding")),
            patch_size=patch,
            width=channels,
            layers=layers("visual.transformer.resblocks."),
            heads=max(1, channels // head_width),
            activation=activation,
            mlp_ratio=ratio("visual.", channels),
        )
    else:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        stages = tuple(layers(f"visual.layer{i}.") for i in (1, 2, 3, 4))
        side = 32 * _side(shape("visual.attnpool.positional_embedding"))
        vision = ResNetConfig(stages, width, max(1, width * 32 // HEAD_WIDTH), side)
    tower = TextConfig(
        vocab_size=vocab_size,
        context_length=shape(f"{text}positional_embedding")[0],
        width=text_width,
        layers=layers(f"{text}transformer.resblocks."),
        heads=max(1, text_width // HEAD_WIDTH),
        activation=activation,
        mlp_ratio=ratio(text, text_width),
    )
    return ClipConfig(shape(f"{text}text_projection")[1], tower, vision)


def text_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Returns what stands before the keys of the text tower: "text." in OpenCLIP's models of mixed towers."""
    return "text." if "text.token_embedding.weight" in tensors else ""


def _side(positions: tuple[int, ...]) -> int:
    """Cells along a side of the picture; one position more belongs to the class token or the mean."""
    return math.isqrt(positions[0] - 1)


def _unsaid(width: int, kind: str) -> tuple[int, str]:
    """The image tower's head width, and the activation."""
    if kind != "openai_clip" and width in _HEAD_WIDTHS:
        return _HEAD_WIDTHS[width], "gelu"
    return HEAD_WIDTH, "gelu" if kind == "open_clip" else "quick_gelu"


# --- recognising ----------------------------------------------------------------------------


def recognise(source: Source, kind: str = "auto") -> list[Component]:
    """Returns the CLIP that a file holds; [] where it is something else.

    Args:
        source: the file.
        kind: as for `read_sizes`.

    Raises:
        UserError: it is a CLIP, and lacks a tensor.
    """
    tensors = bare(source.tensors)
    if "visual.conv1.weight" not in tensors:
        return []
    where = str(source.path)
    family = "CLIP (OpenCLIP)" if kind == "open_clip" else "CLIP (OpenAI)"
    return [component(family, read_sizes(tensors, where, kind), tensors, where)]


def component(family: str, config: ClipConfig, tensors: Mapping[str, Tensor], where: str) -> Component:
    """Returns the component of a CLIP with these names, which all read captions with OpenAI's tokenizer."""
    return Component(
        stage="clip",
        family=family,
        where=where,
        config=sections(config.embed_dim, config.text, config.vision, config.image_mean, config.image_std),
        tensors=tensors,
        params=openai_rules(config, text_prefix(tensors)),
        stats=openai_stats(config),
        ignored=IGNORED,
        tokenizer=released_tokenizer(config.text.vocab_size),
    )


def bare(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the tensors without the "module." that training on several devices puts before every key."""
    inner = within("module.", tensors)
    return inner if len(inner) == len(tensors) else tensors


# --- exporting ------------------------------------------------------------------------------


def export_openai(path: Path, config: ClipConfig, trees: Trees, dtype: Any = np.float32) -> None:
    """Writes a safetensors file with OpenAI's names.

    Raises:
        UserError: OpenAI's code, which reads sizes from shapes, would build another CLIP of it.
    """
    other = _unlike_openai(config)
    if other:
        raise UserError(f"OpenAI's CLIP has {other}: export it as open_clip, which can say so")
    write_state_dict(path, config, trees, dtype)


def write_state_dict(path: Path, config: ClipConfig, trees: Trees, dtype: Any) -> None:
    """Writes the tensors of a CLIP with these names."""
    params, stats = openai_rules(config), openai_stats(config)
    sizes = {**shapes(params, trees.params), **shapes(stats, trees.stats)}
    write_safetensors(path, sizes, itertools.chain(empty(params, trees.params), empty(stats, trees.stats)), dtype)


def _unlike_openai(config: ClipConfig) -> str:
    """What sets a CLIP apart from those that OpenAI's code can build, if anything does."""
    if config.vision is None:
        return "an image tower, which is missing here"
    for name, tower in (("text", config.text), ("image", config.vision)):
        resnet = isinstance(tower, ResNetConfig)
        heads = max(1, tower.width * (32 if resnet else 1) // HEAD_WIDTH)
        if tower.heads != heads:
            return f"heads of {HEAD_WIDTH} channels, so {heads} in this {name} tower, not {tower.heads}"
        if not resnet and tower.activation != "quick_gelu":
            return f"quick_gelu in its {name} tower, not {tower.activation}"
        if not resnet and int(tower.width * tower.mlp_ratio) != 4 * tower.width:
            return f"mlp_ratio 4 in its {name} tower, not {tower.mlp_ratio}"
    return ""
