"""CLIP with OpenAI's names, which OpenCLIP uses too: state dicts, and OpenAI's TorchScript archives.

Sizes are read from shapes. Shapes do not show the number of heads and the activation. For a state dict alone these are:

| written by                                | head width   | activation |
| ----------------------------------------- | ------------ | ---------- |
| OpenAI                                    | 64           | quick_gelu |
| OpenCLIP, image tower 1280 wide (H)       | 80, text 64  | gelu       |
| 1408 (g), 1664 (bigG), 1792 (e)           | 88, 104, 112 | gelu       |
| OpenCLIP, any other                       | 64           | gelu       |

A state dict of the last row looks the same as OpenAI's: it is read as OpenAI's unless the kind is "open_clip".
"""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.clip import ClipConfig, TextConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.weights.clip.processor import Processor, released_processor
from dalle2_jax.weights.clip.towers import (
    mlp_ratio,
    patch_layout,
    released_tokenizer,
    sections,
)
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.rules import (
    Layout,
    Rule,
    conv,
    dense,
    fused,
    leaf,
    merged_heads,
    norm,
    shapes,
    single,
    stacked,
    to_tensors,
    under,
)
from dalle2_jax.weights.stage_writer import Trees
from dalle2_jax.weights.tensors import Tensor, strip_prefix, write_safetensors

IGNORED = (r"input_resolution|context_length|vocab_size", r".*\.num_batches_tracked", r"(.*\.)?attn_mask")
"""Entries of OpenAI's archives that are no weights: sizes, the counter of batch normalisations, the causal mask."""

HEAD_WIDTH = 64
"""Width of the attention heads of OpenAI's towers."""

_HEAD_WIDTHS = {1280: 80, 1408: 88, 1664: 104, 1792: 112}
"""Width of the attention heads of OpenCLIP's larger image towers, by tower width."""


# --- tables ---------------------------------------------------------------------------------


def openai_rules(config: ClipConfig, text: str = "") -> list[Rule]:
    """Returns the table of a CLIP's parameters.

    Args:
        config: both towers.
        text: prefix of the text tower's keys: "text." in OpenCLIP's models with custom text towers.
    """
    vision = config.tower
    visual = _resnet_rules(vision) if isinstance(vision, ResNetConfig) else _vit_rules(vision)
    tower = [
        *leaf("token_embedding/embedding", "token_embedding.weight"),
        *leaf("positional_embedding", "positional_embedding"),
        *_blocks(config.text.layers, config.text.heads),
        *norm("ln_final", "ln_final"),
        *leaf("proj/kernel", "text_projection"),
    ]
    return [*under("visual", "visual.", visual), *under("text", text, tower), *leaf("logit_scale", "logit_scale")]


def openai_stats(config: ClipConfig) -> list[Rule]:
    """Returns the table of a CLIP's statistics: the running mean and variance of a ResNet's batch normalisations."""
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
        rules += leaf(f"pool/{ours}/kernel", f"attnpool.{key}_proj.weight", _split_heads(vision.heads))
        rules += leaf(f"pool/{ours}/bias", f"attnpool.{key}_proj.bias", _split_heads(vision.heads))
    rules += dense("pool/out", "attnpool.c_proj", merged_heads(vision.heads))
    for ours, convolution, batch_norm in _resnet_norms(vision):
        rules += [*conv(f"{ours}/conv", convolution, bias=False), *norm(f"{ours}/norm", batch_norm)]
    return rules


def _resnet_norms(vision: ResNetConfig) -> list[tuple[str, str, str]]:
    """Returns (our name, OpenAI's convolution, OpenAI's normalisation) of each convolution of a ResNet."""
    names = [(f"stem_{i}", f"conv{i}", f"bn{i}") for i in (1, 2, 3)]
    for stage, blocks in enumerate(vision.layers, start=1):
        for block in range(blocks):
            ours, theirs = f"stage_{stage}_block_{block + 1}", f"layer{stage}.{block}"
            names += [(f"{ours}/conv_{i}", f"{theirs}.conv{i}", f"{theirs}.bn{i}") for i in (1, 2, 3)]
            if block == 0:
                names.append((f"{ours}/downsample", f"{theirs}.downsample.0", f"{theirs}.downsample.1"))
    return names


def _split_heads(heads: int) -> Layout:
    """Returns the layout of one attention projection: [N * K, D] <-> [D, N, K]; a bias [N * K] <-> [N, K]."""
    return single(
        lambda x: x.T.reshape(*x.shape[1:], heads, -1),
        lambda x: x.reshape(*x.shape[:-2], x.shape[-2] * x.shape[-1]).T,
    )


# --- sizes ----------------------------------------------------------------------------------


def read_sizes(tensors: Mapping[str, Tensor], where: str, kind: str = "auto") -> ClipConfig:
    """Returns the config of the CLIP in a state dict, from the shapes of its tensors and the table above.

    Args:
        tensors: the tensors, by key.
        where: name of the file, for errors.
        kind: "openai_clip", "open_clip" or "auto".

    Raises:
        WeightsError: a tensor from which a size is read is missing or has another rank.
    """

    def shape(key: str, axes: int = 2) -> tuple[int, ...]:
        if key not in tensors:
            raise WeightsError(f"{where} lacks tensor {key}: the file is cut short or of another family", where, [key])
        if len(tensors[key].shape) != axes or 0 in tensors[key].shape:
            raise WeightsError(f"{where}: {key} {list(tensors[key].shape)} must have {axes} non-empty axes", where)
        return tensors[key].shape

    def ratio(prefix: str, width: int) -> float:
        return mlp_ratio(shape(f"{prefix}transformer.resblocks.0.mlp.c_fc.weight")[0], width)

    def side(key: str) -> int:
        if (cells := _side(shape(key))) < 1:
            raise WeightsError(f"{where}: {key} {list(shape(key))} has no position of an image patch", where)
        return cells

    text, channels = text_prefix(tensors), shape("visual.conv1.weight", 4)[0]
    vocab_size, text_width = shape(f"{text}token_embedding.weight")
    head_width, activation = _heads_and_activation(channels, kind)
    if "visual.class_embedding" in tensors:
        patch = shape("visual.conv1.weight", 4)[-1]
        vision = VisionConfig(
            image_size=patch * side("visual.positional_embedding"),
            patch_size=patch,
            width=channels,
            layers=_layers(tensors, "visual.transformer.resblocks."),
            heads=_heads(channels, head_width, where),
            activation=activation,
            mlp_ratio=ratio("visual.", channels),
        )
    else:
        width = shape("visual.layer1.0.conv1.weight", 4)[0]
        stages = tuple(_layers(tensors, f"visual.layer{i}.") for i in (1, 2, 3, 4))
        pixels = 32 * side("visual.attnpool.positional_embedding")
        vision = ResNetConfig(stages, width, max(1, width * 32 // HEAD_WIDTH), pixels)
    tower = TextConfig(
        vocab_size=vocab_size,
        context_length=shape(f"{text}positional_embedding")[0],
        width=text_width,
        layers=_layers(tensors, f"{text}transformer.resblocks."),
        heads=_heads(text_width, HEAD_WIDTH, where),
        activation=activation,
        mlp_ratio=ratio(text, text_width),
    )
    return ClipConfig(shape(f"{text}text_projection")[1], tower, vision)


def _layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """Returns the number of layers whose keys begin with a prefix."""
    return len({key.removeprefix(prefix).split(".")[0] for key in tensors if key.startswith(prefix)})


def _heads(width: int, head_width: int, where: str) -> int:
    """Returns the number of attention heads; a tower narrower than a head has one."""
    if width > head_width and width % head_width:
        raise WeightsError(
            f"{where} has a tower of width {width}, which is not a multiple of the head width {head_width}", where
        )
    return max(1, width // head_width)


def text_prefix(tensors: Mapping[str, Tensor]) -> str:
    """Returns the prefix of the text tower's keys: "text." in OpenCLIP's models with custom text towers."""
    return "text." if "text.token_embedding.weight" in tensors else ""


def _side(positions: tuple[int, ...]) -> int:
    """Returns the number of patches along a side of the image; the first position is the class token or the mean."""
    return math.isqrt(positions[0] - 1)


def _heads_and_activation(width: int, kind: str) -> tuple[int, str]:
    """Returns the head width of the image tower, and the activation, which no shape shows."""
    if kind != "openai_clip" and width in _HEAD_WIDTHS:
        return _HEAD_WIDTHS[width], "gelu"
    return HEAD_WIDTH, "gelu" if kind == "open_clip" else "quick_gelu"


# --- detection ----------------------------------------------------------------------------


def detect(source: Source, kind: str = "auto") -> list[Component]:
    """Returns the CLIP in a file; [] for anything else.

    Args:
        source: the file.
        kind: as for `read_sizes`.

    Raises:
        WeightsError: it is a CLIP, but a tensor is missing.
    """
    tensors = strip_module_prefix(source.tensors)
    if "visual.conv1.weight" not in tensors:
        return []
    where = str(source.path)
    family = "CLIP (OpenCLIP)" if kind == "open_clip" else "CLIP (OpenAI)"
    return [component(family, read_sizes(tensors, where, kind), tensors, where)]


def component(
    family: str, config: ClipConfig, tensors: Mapping[str, Tensor], where: str, processor: Processor | None = None
) -> Component:
    """Returns the component of a CLIP with OpenAI's names.

    Args:
        family: name of its family.
        config: both towers.
        tensors: the tensors, by key.
        where: the file or folder.
        processor: preprocessing of images; None for OpenAI's.
    """
    processor = processor or released_processor(config.tower.image_size)
    return Component(
        stage="clip",
        family=family,
        where=where,
        config=sections(config.embed_dim, config.text, config.vision, processor),
        tensors=tensors,
        params=openai_rules(config, text_prefix(tensors)),
        stats=openai_stats(config),
        ignored=IGNORED,
        tokenizer=released_tokenizer(config.text.vocab_size),
    )


def strip_module_prefix(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """Returns the tensors without the prefix "module." of torch's data-parallel training, if all keys have it."""
    inner = strip_prefix("module.", tensors)
    return inner if len(inner) == len(tensors) else tensors


# --- exporting ------------------------------------------------------------------------------


def export_openai(path: Path, config: ClipConfig, trees: Trees, dtype: Any = np.float32) -> None:
    """Writes a safetensors file with OpenAI's names.

    Raises:
        WeightsError: OpenAI's code, which derives the architecture from shapes, would build another one.
    """
    other = _unlike_openai(config)
    if other:
        raise WeightsError(f"OpenAI's CLIP has {other}: export it as open_clip")
    write_state_dict(path, config, trees, dtype)


def write_state_dict(path: Path, config: ClipConfig, trees: Trees, dtype: Any) -> None:
    """Writes the tensors of a CLIP with OpenAI's names."""
    params, stats = openai_rules(config), openai_stats(config)
    sizes = {**shapes(params, trees.params), **shapes(stats, trees.stats)}
    write_safetensors(
        path, sizes, itertools.chain(to_tensors(params, trees.params), to_tensors(stats, trees.stats)), dtype
    )


def _unlike_openai(config: ClipConfig) -> str:
    """Returns the first property that differs from the CLIPs that OpenAI's code can build; "" if there is none."""
    if config.vision is None:
        return "an image tower, which this CLIP lacks"
    for name, tower in (("text", config.text), ("image", config.vision)):
        resnet = isinstance(tower, ResNetConfig)
        heads = max(1, tower.width * (32 if resnet else 1) // HEAD_WIDTH)
        if tower.heads != heads:
            return f"heads of width {HEAD_WIDTH}, that is {heads} in this {name} tower, not {tower.heads}"
        if not resnet and tower.activation != "quick_gelu":
            return f"quick_gelu in its {name} tower, not {tower.activation}"
        if not resnet and int(tower.width * tower.mlp_ratio) != 4 * tower.width:
            return f"mlp_ratio 4 in its {name} tower, not {tower.mlp_ratio}"
    return ""
