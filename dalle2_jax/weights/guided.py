"""ADM's released files, and the grammar of their U-Nets, which GLIDE's and Karlo's own share.

``input_blocks`` are numbered through all levels: the first convolution, then for each level its residual blocks and
what makes the next level smaller. ``output_blocks`` likewise from the last level to the first; the last block of a
level also holds what makes the next one larger. Within a block, sub-block 0 is the residual one, and an attention
comes next where the level has one.

Queries, keys and values are one convolution of one position. Its rows are, for each head, that head's queries, keys
and values (the "legacy" attention order: GLIDE, Karlo and all of ADM's files but one); or all heads' queries, then
all keys, then all values ("new": ``64x64_diffusion.pt``). Nothing in a file tells which.

ADM (Dhariwal & Nichol 2021, arXiv 2105.05233) tells its network a class, or nothing. Its upsamplers read the small
picture beside x_t.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import LabelTokenizer
from dalle2_jax.types import UserError, choose
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.rules import Rule, conv, dense, leaf, merged_heads, norm, projections, under
from dalle2_jax.weights.tensors import Tensor

HEAD_CHANNELS = 64
"""Of each head in all released files but ``_FOUR_HEADS``."""

UPSCALED = {"crop_fraction": 1.0, "blur_rate": 0.0, "upscale": "linear"}
"""How ADM's and GLIDE's upsamplers are conditioned."""

_HEADS_FIRST = {"legacy": True, "new": False}
_FOUR_HEADS = ((128, 3), (256, 6))
"""(side, channels read) of ADM's files with four heads on every level: 128x128_diffusion.pt, 64_256_upsampler.pt."""


def unet_rules(config: UNetConfig, prefix: str = "", attention_order: str = "legacy") -> list[Rule]:
    """Returns the table of a U-Net.

    Args:
      config: its shape.
      prefix: of every key, with its dot: "model.".
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
    """Reads a U-Net's shape from its tensors: fields of ``UNetConfig``.

    Three things leave no trace: heads, dropout, and the side of its pictures.

    Args:
      tensors: its own, by key, without a prefix; others do no harm.
      image_size: side of the pictures it was trained on; None is 2^(levels + 2), as in the public code's presets.
      where: their file, for errors.

    Raises:
      UserError: this is no whole U-Net of this grammar.
    """
    def shape(key: str) -> tuple[int, ...]:
        if key not in tensors:
            raise UserError(f"{where} lacks tensor {key}: it is cut short or of another family")
        return tensors[key].shape

    inputs, outputs = _blocks(tensors, "input_blocks"), _blocks(tensors, "output_blocks")
    levels = 1 + sum(_resamples(tensors, block) for block in outputs)
    per_level, left = divmod(len(inputs), levels)  # its residual blocks and, but for the last, what makes it smaller
    if left or len(inputs) != len(outputs) or per_level < 2:
        raise UserError(f"{where} is not a whole U-Net of guided-diffusion's: it is cut short or of another family")
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


def heads_of(tensors: Mapping[str, Tensor], head_channels: int, where: str) -> dict[str, int]:
    """Returns the field of ``UNetConfig`` that says how many heads each attention has.

    Raises:
      UserError: heads of that width do not fit the network.
    """
    widths = {each.shape[0] // 3 for key, each in tensors.items() if key.endswith(".qkv.weight") and "blocks" in key}
    unfit = sorted(width for width in widths if width % head_channels)
    if unfit:
        raise UserError(
            f"{where} has attention of {unfit[0]} channels, which heads of {head_channels} do not divide, and heads "
            "leave no trace in such a file: say how wide they are by --head_channels"
        )
    return {"head_channels": head_channels}


def _blocks(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """Names of the numbered blocks."""
    return sorted({".".join(key.split(".")[:2]) for key in tensors if key.startswith(f"{name}.")})


def _resamples(tensors: Mapping[str, Tensor], block: str) -> bool:
    """Whether an output block ends in what makes the next level larger."""
    ends = ("in_layers.2.weight", "conv.weight")
    return any(f"{block}.{place}.{end}" in tensors for place in (1, 2) for end in ends)


# --- ADM ------------------------------------------------------------------------------------


def recognise(source: Source) -> list[Component]:
    """Returns the stage that a file of ADM's holds; [] where it is something else.

    Its 64-pixel network is taken to have the new attention order, as the released one has; what is assumed of
    the heads is in the component's ``family``.

    Raises:
      UserError: it is one, but not of this shape.
    """
    tensors, where = source.tensors, str(source.path)
    theirs = ("input_blocks.", "middle_block.", "output_blocks.", "time_embed.", "out.", "label_emb.")
    if "output_blocks.0.0.in_layers.0.weight" not in tensors or not all(key.startswith(theirs) for key in tensors):
        return []
    sizes = unet_sizes(tensors, source.hints.image_size, where)
    side, channels = sizes["image_size"], sizes["in_channels"]
    if channels not in (3, 6):
        raise UserError(f"{where} reads {channels} channels: ADM's networks read 3, or 6 to enlarge a picture")
    width = source.hints.head_channels
    four = width is None and (side, channels) in _FOUR_HEADS
    heads = {"num_heads": 4} if four else heads_of(tensors, width or HEAD_CHANNELS, where)
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
    """Returns ADM's network: told one of ``classes``, or nothing. An upsampler that is told nothing is a U-Net."""
    if classes is None and unet.in_channels == 6:
        return unet
    return DecoderConfig(unet, image_emb_dim=None, text_input=classes and "label", num_classes=classes)


def adm_rules(model: DecoderConfig | UNetConfig, attention_order: str = "legacy") -> list[Rule]:
    """Returns the table of any ADM network."""
    if isinstance(model, UNetConfig):
        return unet_rules(model, attention_order=attention_order)
    rules = under("unet", "", unet_rules(model.unet, attention_order=attention_order))
    return rules + (leaf("label_embedding/embedding", "label_emb.weight") if model.num_classes else [])


def learned_range(schedule: str) -> dict[str, Any]:
    """Returns the section diffusion of ADM's and GLIDE's networks."""
    objective = {"prediction": "eps", "variance": "learned_range", "loss": "hybrid"}
    return {"schedule": schedule, "num_steps": 1000, **objective}


def _sections(model: DecoderConfig | UNetConfig) -> dict[str, Any]:
    """The stage's config. Steps are those of the samples released with the weights."""
    told = isinstance(model, DecoderConfig)
    unet = model.unet if told else model
    diffusion = learned_range("cosine" if unet.image_size == 64 else "linear")
    if unet.out_channels == 3:  # trained without learn_sigma
        diffusion |= {"variance": "fixed_small", "loss": "mse"}
    network = dataclasses.asdict(unet)
    sections = {
        "model": {"unet": network, "image_emb_dim": None, "text_input": model.text_input} if told else network,
        "conditioning": {"drop_text": 0.0} if told else {},
        "diffusion": diffusion,
        "sampling": {"name": "ddpm", "steps": 250},
    }
    if unet.in_channels == 6:
        sections["conditioning"] |= UPSCALED | {"low_size": unet.image_size // 4}
    return {**sections, "text": {"vocab_size": model.num_classes or 1, "context_length": 1}} if told else sections
