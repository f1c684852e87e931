"""ADM's released files, and the names of guided-diffusion's U-Nets, which GLIDE's and Karlo's files share.

``input_blocks`` are numbered through all levels: the first convolution, then for each level its residual blocks and the
downsampling block. ``output_blocks`` are numbered from the last level to the first; the last block of a level includes
the upsampling. In each block, sub-block 0 is a residual block; on levels with attention, sub-block 1 is an attention.

Queries, keys and values are one convolution of kernel size 1. In the "legacy" attention order (GLIDE, Karlo and all ADM
files but one) its rows are ordered head by head: queries, keys and values of each head. In the "new" order
(``64x64_diffusion.pt``) they are the queries of all heads, then all keys, then all values. A file does not show which.

ADM (Dhariwal & Nichol 2021, arXiv 2105.05233) is class-conditional or unconditional. Its upsamplers read the enlarged
low-resolution image next to x_t.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import WeightsError, choose
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import LabelTokenizer
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.rules import (
    Rule,
    conv,
    dense,
    leaf,
    merged_heads,
    norm,
    projections,
    under,
)
from dalle2_jax.weights.tensors import Tensor

HEAD_CHANNELS = 64
"""Width of an attention head in all released files except `_FOUR_HEADS`."""

UPSCALED = {"crop_fraction": 1.0, "blur_rate": 0.0, "upscale": "linear"}
"""Conditioning of ADM's and GLIDE's upsamplers."""

_HEADS_FIRST = {"legacy": True, "new": False}
_FOUR_HEADS = ((128, 3), (256, 6))
"""(image side, input channels) of ADM's files with four heads per level: 128x128_diffusion.pt, 64_256_upsampler.pt."""


def unet_rules(config: UNetConfig, prefix: str = "", attention_order: str = "legacy") -> list[Rule]:
    """Returns the table of a U-Net.

    Args:
      config: its architecture.
      prefix: prefix of every key, with its dot, as in "model.".
      attention_order: "legacy" or "new".
    """
    heads_first = choose("attention order", attention_order, _HEADS_FIRST)
    rules = [
        *conv("conv_in", "input_blocks.0.0"),
        *dense("time_mlp/fc_1", "time_embed.0"),
        *dense("time_mlp/fc_2", "time_embed.2"),
        *norm("norm_out", "out.0"),
        *conv("conv_out", "out.2"),
        *_middle(config, heads_first),
        *_down(config, heads_first),
        *_up(config, heads_first),
    ]
    return under("", prefix, rules)


def _middle(config: UNetConfig, heads_first: bool) -> list[Rule]:
    rules = _residual("mid_0", "middle_block.0", False)
    if config.middle_attention:
        rules += _attention(config, "mid_attn", "middle_block.1", len(config.channel_mult) - 1, heads_first)
    return rules + _residual("mid_1", f"middle_block.{1 + config.middle_attention}", False)


def _down(config: UNetConfig, heads_first: bool) -> list[Rule]:
    rules, block = [], 1
    for level in range(len(config.channel_mult)):
        if level:
            rules += _resampled(config, f"down_{level - 1}_sample", f"input_blocks.{block}.0", "op")
            block += 1
        for i in range(config.num_res_blocks):
            widens = i == 0 and level > 0 and config.level_channels(level) != config.level_channels(level - 1)
            rules += _residual(f"down_{level}_{i}", f"input_blocks.{block}.0", widens)
            if config.attends(level):
                rules += _attention(config, f"down_{level}_{i}_attn", f"input_blocks.{block}.1", level, heads_first)
            block += 1
    return rules


def _up(config: UNetConfig, heads_first: bool) -> list[Rule]:
    rules, block = [], 0
    for level in reversed(range(len(config.channel_mult))):
        for i in range(config.num_res_blocks + 1):
            rules += _residual(f"up_{level}_{i}", f"output_blocks.{block}.0", True)
            if config.attends(level):
                rules += _attention(config, f"up_{level}_{i}_attn", f"output_blocks.{block}.1", level, heads_first)
            if level and i == config.num_res_blocks:
                key = f"output_blocks.{block}.{1 + config.attends(level)}"
                rules += _resampled(config, f"up_{level}_sample", key, "conv")
            block += 1
    return rules


def _resampled(config: UNetConfig, path: str, key: str, name: str) -> list[Rule]:
    return _residual(path, key, False) if config.resblock_updown else conv(path, f"{key}.{name}")


def _residual(path: str, key: str, skip: bool) -> list[Rule]:
    return [
        *norm(f"{path}/norm_1", f"{key}.in_layers.0"),
        *conv(f"{path}/conv_1", f"{key}.in_layers.2"),
        *dense(f"{path}/emb_proj", f"{key}.emb_layers.1"),
        *norm(f"{path}/norm_2", f"{key}.out_layers.0"),
        *conv(f"{path}/conv_2", f"{key}.out_layers.3"),
        *(conv(f"{path}/skip", f"{key}.skip_connection") if skip else ()),
    ]


def _attention(config: UNetConfig, path: str, key: str, level: int, heads_first: bool) -> list[Rule]:
    heads = config.heads(config.level_channels(level))
    packing = {"heads": heads, "heads_first": heads_first, "point": True}
    rules = [
        *norm(f"{path}/norm", f"{key}.norm"),
        *projections(f"{path}/attn/qkv", [f"{key}.qkv"], parts=3, **packing),
        *dense(f"{path}/attn/out", f"{key}.proj_out", merged_heads(heads, point=True)),
    ]
    if config.context_dim is not None:
        rules += projections(f"{path}/attn/context_kv", [f"{key}.encoder_kv"], parts=2, **packing)
    return rules


# --- sizes ----------------------------------------------------------------------------------


def unet_sizes(
    tensors: Mapping[str, Tensor], image_size: int | None = None, where: str = "this file"
) -> dict[str, Any]:
    """Returns the fields of ``UNetConfig`` that the shapes of a U-Net's tensors show: all but heads and dropout.

    Args:
      tensors: the tensors, by key without a prefix; others are ignored.
      image_size: side of its training images; None for 2^(levels + 2), as in the presets of guided-diffusion.
      where: name of the file, for errors.

    Raises:
      WeightsError: it is not a complete U-Net of guided-diffusion.
    """

    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise WeightsError(f"{where} lacks tensor {key}: the file is cut short or of another family", where, [key])
        return tensors[key].shape

    inputs, outputs = _blocks(tensors, "input_blocks"), _blocks(tensors, "output_blocks")
    levels = 1 + sum(_resamples(tensors, block) for block in outputs)
    per_level, remainder = divmod(len(inputs), levels)  # first convolution or downsampling, and residual blocks
    if remainder or len(inputs) != len(outputs) or per_level < 2:
        what = "is not a complete U-Net of guided-diffusion: the file is cut short or of another family"
        raise WeightsError(f"{where} {what}", where)
    first = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    time_dim, channels = shape("time_embed.0.weight")
    widths = [shape(f"{block}.0.out_layers.3.weight")[0] for block in first]
    attending = [level for level, block in enumerate(first) if f"{block}.1.qkv.weight" in tensors]
    side = image_size or 2 ** (levels + 2)
    context = [tensor.shape[1] for key, tensor in tensors.items() if key.endswith("encoder_kv.weight")]
    return {
        "image_size": side,
        "in_channels": shape("input_blocks.0.0.weight")[1],
        "out_channels": shape("out.2.weight")[0],
        "channels": channels,
        "channel_mult": tuple(width // channels if width % channels == 0 else width / channels for width in widths),
        "num_res_blocks": per_level - 1,
        "attention_resolutions": tuple(side // 2**level for level in attending),
        "context_dim": context[0] if context else None,
        "scale_shift": shape(f"{first[0]}.0.emb_layers.1.weight")[0] == 2 * widths[0],
        "resblock_updown": not any(key.endswith(".0.op.weight") for key in tensors),
        "middle_attention": "middle_block.1.qkv.weight" in tensors,
        "emb_dim": None if time_dim == 4 * channels else time_dim,
    }


def heads_of(tensors: Mapping[str, Tensor], head_channels: int, where: str) -> dict[str, Any]:
    """Returns the field of ``UNetConfig`` for attention heads of a width.

    Raises:
      WeightsError: the width does not divide the channels of an attention.
    """
    widths = {each.shape[0] // 3 for key, each in tensors.items() if key.endswith(".qkv.weight") and "blocks" in key}
    indivisible = sorted(width for width in widths if width % head_channels)
    if indivisible:
        raise WeightsError(
            f"{where}: attention of {indivisible[0]} channels cannot have heads of {head_channels} channels: give "
            "head_channels, which the file does not show",
            where,
        )
    return {"head_channels": head_channels}


def _blocks(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """Returns the names of the numbered blocks."""
    return sorted({".".join(key.split(".")[:2]) for key in tensors if key.startswith(f"{name}.")})


def _resamples(tensors: Mapping[str, Tensor], block: str) -> bool:
    """Returns whether an output block includes upsampling."""
    ends = ("in_layers.2.weight", "conv.weight")
    return any(f"{block}.{place}.{end}" in tensors for place in (1, 2) for end in ends)


# --- ADM ------------------------------------------------------------------------------------


def detect(source: Source) -> list[Component]:
    """Returns the stage in an ADM file; [] for anything else.

    A class-conditional network of 64 pixels is assumed to have the new attention order, as the released one has. The
    component's ``family`` states the assumed heads and order.

    Raises:
      WeightsError: a tensor is missing, or the architecture is not supported.
    """
    tensors, where = source.tensors, str(source.path)
    theirs = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
    if "output_blocks.0.0.in_layers.0.weight" not in tensors or not all(key.startswith(theirs) for key in tensors):
        return []
    sizes = unet_sizes(tensors, source.hints.image_size, where)
    side, channels = sizes["image_size"], sizes["in_channels"]
    if channels not in (3, 6):
        what = f"must have 3 input channels, or 6 for an upsampler, got {channels}"
        raise WeightsError(f"{where}: an ADM network {what}", where)
    width = source.hints.head_channels
    four = width is None and (side, channels) in _FOUR_HEADS
    heads: dict[str, Any] = {"num_heads": 4} if four else heads_of(tensors, width or HEAD_CHANNELS, where)
    classes = tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else None
    order = source.hints.attention_order or ("new" if (side, channels) == (64, 3) and classes else "legacy")
    model = adm_model(UNetConfig(**sizes, **heads, dropout=0.1 if side == 64 else 0.0), classes)
    assumed = "4 heads" if "num_heads" in heads else f"heads of {heads['head_channels']} channels"
    return [
        Component(
            stage="decoder" if channels == 3 else "upsampler_1",
            family=f"ADM {'upsampler ' if channels == 6 else ''}{side} ({assumed}, {order} attention order)",
            where=where,
            config=_sections(model),
            tensors=tensors,
            params=adm_rules(model, order),
            tokenizer=LabelTokenizer(classes or 1) if isinstance(model, DecoderConfig) else None,
        )
    ]


def adm_model(unet: UNetConfig, classes: int | None) -> DecoderConfig | UNetConfig:
    """Returns the config of an ADM network; ``classes`` None is unconditional (for an upsampler, a plain U-Net)."""
    if classes is None and unet.in_channels == 6:
        return unet
    text_input = None if classes is None else "label"
    return DecoderConfig(unet, image_emb_dim=None, text_input=text_input, num_classes=classes)


def adm_rules(model: DecoderConfig | UNetConfig, attention_order: str = "legacy") -> list[Rule]:
    """Returns the table of any ADM network."""
    if isinstance(model, UNetConfig):
        return unet_rules(model, attention_order=attention_order)
    rules = under("unet", "", unet_rules(model.unet, attention_order=attention_order))
    return rules + (leaf("label_embedding/embedding", "label_emb.weight") if model.num_classes else [])


def learned_range(schedule: str) -> dict[str, Any]:
    """Returns the section diffusion of ADM's and GLIDE's networks for a noise schedule."""
    objective = {"prediction": "eps", "variance": "learned_range", "loss": "hybrid"}
    return {"schedule": schedule, "num_steps": 1000, **objective}


def _sections(model: DecoderConfig | UNetConfig) -> dict[str, Any]:
    """Returns the sections of the stage's config; steps are those of the samples released with the weights."""
    unet = model.unet if isinstance(model, DecoderConfig) else model
    diffusion = learned_range("cosine" if unet.image_size == 64 else "linear")
    if unet.out_channels == 3:  # trained without learn_sigma
        diffusion |= {"variance": "fixed_small", "loss": "mse"}
    network = dataclasses.asdict(unet)
    sections: dict[str, Any] = {
        "model": network,
        "conditioning": UPSCALED | {"low_size": unet.image_size // 4} if unet.in_channels == 6 else {},
        "diffusion": diffusion,
        "sampling": {"name": "ddpm", "steps": 250},
    }
    if isinstance(model, DecoderConfig):
        sections["model"] = {"unet": network, "image_emb_dim": None, "text_input": model.text_input}
        sections["conditioning"] = {"drop_text": 0.0, **sections["conditioning"]}
        sections["text"] = {"vocab_size": model.num_classes or 1, "context_length": 1}
    return sections
