"""The grammar of guided-diffusion's U-Nets, which ADM, GLIDE and Karlo's own files share.

``input_blocks`` are numbered through all levels: the first convolution, then for each level its residual blocks and
what makes the next level smaller. ``output_blocks`` likewise from the last level to the first; the last block of a
level also holds what makes the next one larger. Within a block, sub-block 0 is the residual one, and an attention
comes next where the level has one.

Queries, keys and values are one convolution of one position. Its rows are, for each head, that head's queries, keys
and values (the "legacy" attention order: GLIDE, Karlo and all of ADM's files but one); or all heads' queries, then
all keys, then all values ("new": ``64x64_diffusion.pt``). Nothing in a file tells which.
"""

from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import UserError, choose
from dalle2_jax.weights.rules import Rule, conv, dense, merged_heads, norm, projections, under
from dalle2_jax.weights.tensors import Tensor

_HEADS_FIRST = {"legacy": True, "new": False}


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


def unet_sizes(tensors: Mapping[str, Tensor], image_size: int | None = None) -> dict[str, Any]:
    """Reads a U-Net's shape from its tensors: fields of ``UNetConfig``.

    Three things leave no trace. The side of its pictures: without ``image_size`` it is 2^(levels + 2), as in all of
    the public code's presets. The heads, which are left to the default, 64 channels each. And dropout.

    Args:
      tensors: its own, by key, without a prefix.
      image_size: side of the pictures it was trained on.

    Raises:
      UserError: this is no U-Net of this grammar.
    """
    inputs, outputs = _blocks(tensors, "input_blocks"), _blocks(tensors, "output_blocks")
    needed = ("input_blocks.0.0.weight", "time_embed.0.weight", "out.2.weight", "middle_block.0.in_layers.2.weight")
    larger = [block for block in outputs if _resamples(tensors, block)]
    levels = len(larger) + 1
    if not all(key in tensors for key in needed) or len(inputs) != len(outputs) or len(inputs) % levels:
        raise UserError("these tensors are not a U-Net of guided-diffusion's grammar")
    per_level = len(inputs) // levels  # its residual blocks and, but for the last, what makes it smaller
    first = [f"input_blocks.{1 + level * per_level}" for level in range(levels)]
    channels = tensors["time_embed.0.weight"].shape[1]
    widths = [tensors[f"{block}.0.out_layers.3.weight"].shape[0] for block in first]
    attending = [level for level, block in enumerate(first) if f"{block}.1.qkv.weight" in tensors]
    side = image_size or 2 ** (levels + 2)
    context = [tensor.shape[1] for key, tensor in tensors.items() if key.endswith("encoder_kv.weight")]
    time_dim = tensors["time_embed.0.weight"].shape[0]
    return {
        "image_size": side,
        "in_channels": tensors["input_blocks.0.0.weight"].shape[1],
        "out_channels": tensors["out.2.weight"].shape[0],
        "channels": channels,
        "channel_mult": tuple(width // channels if width % channels == 0 else width / channels for width in widths),
        "num_res_blocks": per_level - 1,
        "attention_resolutions": tuple(side // 2**level for level in attending),
        "context_dim": context[0] if context else None,
        "scale_shift": tensors[f"{first[0]}.0.emb_layers.1.weight"].shape[0] == 2 * widths[0],
        "resblock_updown": not any(key.endswith(".0.op.weight") for key in tensors),
        "middle_attention": "middle_block.1.qkv.weight" in tensors,
        "emb_dim": None if time_dim == 4 * channels else time_dim,
    }


def _blocks(tensors: Mapping[str, Tensor], name: str) -> list[str]:
    """Names of the numbered blocks."""
    return sorted({".".join(key.split(".")[:2]) for key in tensors if key.startswith(f"{name}.")})


def _resamples(tensors: Mapping[str, Tensor], block: str) -> bool:
    """Whether an output block ends in what makes the next level larger."""
    ends = ("in_layers.2.weight", "conv.weight")
    return any(f"{block}.{place}.{end}" in tensors for place in (1, 2) for end in ends)
