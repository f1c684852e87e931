"""The U-Nets of diffusers that unCLIP uses: UNet2DConditionModel and UNet2DModel.

Blocks are named by level: ``down_blocks.l`` from full resolution downwards, ``up_blocks.l`` from the lowest resolution
upwards. Each has ``resnets`` and, on levels with attention, ``attentions``. Downsampling and upsampling are residual
blocks too (``downsamplers.0``, ``upsamplers.0``). The architecture is described by a config file.

Supported are blocks that down- and upsample in residual blocks, with attention to [context, self] (diffusers' "Simple"
cross attention, which is GLIDE's). The plain and the transformer blocks of latent diffusion are not.
"""

from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import UserError, WeightsError, shown
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.weights.config_files import DIFFUSERS, Known, Section
from dalle2_jax.weights.rules import (
    Rule,
    conv,
    dense,
    merged_heads,
    norm,
    projections,
    under,
)

_ATTENDS = {"down": "SimpleCrossAttnDownBlock2D", "up": "SimpleCrossAttnUpBlock2D"}
_PLAIN = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
_MIDDLES = {True: "UNetMidBlock2DSimpleCrossAttn", False: "UNetMidBlock2D"}
"""The middle block with and without a context. (With one, UNetMidBlock2D has a single residual block, ours has two.)"""

_FIXED = {
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
}
"""Fields of both classes for which only one value is supported."""

_FIXED_CONDITIONED = {
    "only_cross_attention": False,
    "mid_block_only_cross_attention": None,
    "cross_attention_norm": None,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "addition_embed_type": None,
    "num_class_embeds": None,
    "num_attention_heads": None,
    "resnet_skip_time_act": False,
    "resnet_out_scale_factor": 1.0,
    "time_embedding_act_fn": None,
    "timestep_post_act": None,
    "time_cond_proj_dim": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "class_embeddings_concat": False,
    "dual_cross_attention": False,
    "attention_type": "default",
}
"""Such fields of UNet2DConditionModel."""

_FIXED_PLAIN = {
    "add_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "attn_norm_num_groups": None,
}
"""Such fields of UNet2DModel."""

_READ = (
    *("sample_size", "in_channels", "out_channels", "block_out_channels", "layers_per_block", "mid_block_type"),
    *("down_block_types", "up_block_types", "resnet_time_scale_shift", "time_embedding_dim", "norm_num_groups"),
    "dropout",
)
_UNET = {
    # with and without a context
    True: DIFFUSERS
    | Known(
        (*_READ, "cross_attention_dim", "attention_head_dim", "class_embed_type"),
        {**_FIXED, **_FIXED_CONDITIONED},
        # fields of other block types
        r"downsample_padding|(reverse_)?transformer_layers_per_block|use_linear_projection|upcast_attention"
        r"|addition_time_embed_dim|addition_embed_type_num_heads|projection_class_embeddings_input_dim",
    ),
    False: DIFFUSERS
    | Known(
        _READ,
        {**_FIXED, **_FIXED_PLAIN},
        r"downsample_padding|downsample_type|upsample_type|attention_head_dim|num_train_timesteps",
    ),
}
"""The known fields of both classes."""

_MAX_BLOCKS = 50
"""Largest number of residual blocks of a level."""


# --- the table ------------------------------------------------------------------------------


def unet_rules(config: UNetConfig, prefix: str = "") -> list[Rule]:
    """Returns the table of a U-Net; ``prefix`` (with its dot) precedes every key."""
    last = len(config.channel_mult) - 1
    rules = [
        *conv("conv_in", "conv_in"),
        *dense("time_mlp/fc_1", "time_embedding.linear_1"),
        *dense("time_mlp/fc_2", "time_embedding.linear_2"),
        *_residual("mid_0", "mid_block.resnets.0", False),
        *(_attention(config, "mid_attn", "mid_block.attentions.0", last) if config.middle_attention else ()),
        *_residual("mid_1", "mid_block.resnets.1", False),
        *norm("norm_out", "conv_norm_out"),
        *conv("conv_out", "conv_out"),
    ]
    for level in range(last + 1):
        rules += _level(config, level, f"down_{level}", f"down_blocks.{level}", config.num_res_blocks)
        rules += _level(config, level, f"up_{level}", f"up_blocks.{last - level}", config.num_res_blocks + 1)
        if level < last:
            rules += _residual(f"down_{level}_sample", f"down_blocks.{level}.downsamplers.0", False)
        if level:
            rules += _residual(f"up_{level}_sample", f"up_blocks.{last - level}.upsamplers.0", False)
    return under("", prefix, rules)


def _level(config: UNetConfig, level: int, path: str, key: str, count: int) -> list[Rule]:
    rules = []
    for i in range(count):
        widens = path.startswith("up") or (
            i == 0 and config.level_channels(level) != config.level_channels(max(level - 1, 0))
        )
        rules += _residual(f"{path}_{i}", f"{key}.resnets.{i}", widens)
        if config.attends(level):
            rules += _attention(config, f"{path}_{i}_attn", f"{key}.attentions.{i}", level)
    return rules


def _residual(path: str, key: str, skip: bool) -> list[Rule]:
    return [
        *norm(f"{path}/norm_1", f"{key}.norm1"),
        *conv(f"{path}/conv_1", f"{key}.conv1"),
        *dense(f"{path}/emb_proj", f"{key}.time_emb_proj"),
        *norm(f"{path}/norm_2", f"{key}.norm2"),
        *conv(f"{path}/conv_2", f"{key}.conv2"),
        *(conv(f"{path}/skip", f"{key}.conv_shortcut") if skip else ()),
    ]


def _attention(config: UNetConfig, path: str, key: str, level: int) -> list[Rule]:
    heads = config.heads(config.level_channels(level))
    return [
        *norm(f"{path}/norm", f"{key}.group_norm"),
        *projections(f"{path}/attn/qkv", [f"{key}.to_{name}" for name in "qkv"], heads),
        *projections(f"{path}/attn/context_kv", [f"{key}.add_{name}_proj" for name in "kv"], heads),
        *dense(f"{path}/attn/out", f"{key}.to_out.0", merged_heads(heads)),
    ]


# --- config files ---------------------------------------------------------------------------


def read_unet_config(config: Section, image_size: int | None = None) -> dict[str, Any]:
    """Returns the fields of ``UNetConfig`` in a config file.

    Args:
      config: config file of a UNet2DConditionModel or a UNet2DModel.
      image_size: side of the images if the file has none (Karlo's second super-resolution network).

    Raises:
      FieldError: a value of the wrong type or not supported.
    """
    conditioned = config.string("_class_name", ("UNet2DConditionModel", "UNet2DModel")) == "UNet2DConditionModel"
    config.check(_UNET[conditioned])
    if conditioned and config.content.get("class_embed_type") != "identity":
        given = shown(config.content.get("class_embed_type"))
        raise config.error("class_embed_type", f"{given} is not supported: it must be 'identity'")
    widths = config.positive_ints("block_out_channels", 2**16)
    depths = config.positive_ints("layers_per_block", _MAX_BLOCKS)
    if len(widths) > 16:
        raise config.error("block_out_channels", f"has {len(widths)} levels: at most 16 are supported")
    side = config.content.get("sample_size") or image_size
    if type(side) is not int or not 0 < side <= 2**14 or len({*depths}) > 1:
        name = "layers_per_block" if len({*depths}) > 1 else "sample_size"
        what = "images must be square, and levels of equal depth"
        raise config.error(name, f"{shown(config.content.get(name))} is not supported: {what}")
    down, up = (_attending(config, way, len(widths)) for way in ("down", "up"))
    if down != up or (down and not conditioned):
        raise config.error("up_block_types", f"have attention on levels {up}, but down_block_types on levels {down}")
    shift = config.string("resnet_time_scale_shift", ("default", "scale_shift"), "default")
    config.string("mid_block_type", (_MIDDLES[conditioned],), "UNetMidBlock2D")
    heads = {*config.positive_ints("attention_head_dim", 2**16)} if conditioned else set()  # channels of a head
    if len(heads) > 1:  # diffusers assigns the values to the up blocks in the order of the down blocks
        raise config.error("attention_head_dim", "must be the same on all levels")
    time_dim = config.content.get("time_embedding_dim")
    time_dim = None if time_dim is None else config.positive_int("time_embedding_dim", most=2**18)
    fields = {
        "image_size": side,
        "in_channels": _first(config, "in_channels"),
        "out_channels": _first(config, "out_channels"),
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        "num_res_blocks": depths[0],
        "attention_resolutions": tuple(side // 2**level for level in down),
        "context_dim": _first(config, "cross_attention_dim") if conditioned else None,
        "scale_shift": shift == "scale_shift",
        "dropout": config.number("dropout", 0.0, least=0.0),
        "middle_attention": conditioned,
        "emb_dim": None if time_dim == 4 * widths[0] else time_dim,
        "norm_groups": config.positive_int("norm_num_groups", 32),
        **({"head_channels": heads.pop()} if conditioned else {}),
    }
    _check_divides(config, fields)
    return fields


def _first(config: Section, name: str) -> int:
    """Returns an integer, or the first of a list of them."""
    return config.positive_ints(name)[0]


def _check_divides(config: Section, fields: Mapping[str, Any]) -> None:
    """Raises FieldError for groups or heads that do not divide the channels of a level."""
    try:
        UNetConfig(**fields)
    except UserError as error:
        widths, groups = config.content["block_out_channels"], fields["norm_groups"]
        indivisible = any(width % groups for width in (widths if isinstance(widths, list) else [widths]))
        name, size = ("norm_num_groups", groups) if indivisible else ("attention_head_dim", fields.get("head_channels"))
        raise config.error(name, f"{size} does not divide block_out_channels {shown(widths)}") from error


def _attending(config: Section, way: str, levels: int) -> list[int]:
    """Returns the levels with attention; ``way`` is "down" or "up"."""
    name, kinds = f"{way}_block_types", {_PLAIN[way]: False, _ATTENDS[way]: True}
    types = config.content.get(name)
    if not isinstance(types, list) or len(types) != levels:
        raise config.error(name, f"must be a list of {levels} block types, one per level, got {shown(types)}")
    for kind in types:
        if not isinstance(kind, str) or kind not in kinds:
            raise config.error(name, f"{shown(kind)} is not supported: it must be {' or '.join(kinds)}")
    attends = [kinds[kind] for kind in types]
    return [level for level in range(levels) if attends[level if way == "down" else levels - 1 - level]]


_PLAIN_FIELDS = (("patch_size", 1), ("input_skip", False), ("resblock_updown", True), ("context_attention", "joined"))
"""Fields of a U-Net, each with the only value that diffusers has."""


def unet_config_file(unet: UNetConfig, where: str) -> dict[str, Any]:
    """Returns the config file of a U-Net: a UNet2DConditionModel with a context, a UNet2DModel without.

    Raises:
      WeightsError: diffusers has no such U-Net; the message begins with ``where``.
    """
    for field, plain in _PLAIN_FIELDS:
        if getattr(unet, field) != plain:
            raise WeightsError(f"{where}: diffusers' U-Nets do not support {field} {getattr(unet, field)!r}")
    levels = range(len(unet.channel_mult))
    widths = [unet.level_channels(level) for level in levels]
    attends = [unet.attends(level) for level in levels]
    conditioned = unet.context_dim is not None
    if unet.middle_attention != conditioned or (any(attends) and not conditioned):
        what = "attention requires a context, and a context requires attention in the middle"
        raise WeightsError(f"{where}: in diffusers' U-Nets {what} (middle_attention)")
    types = {way: [(_ATTENDS if attends[level] else _PLAIN)[way] for level in levels] for way in ("down", "up")}
    config = {
        "_class_name": "UNet2DConditionModel" if conditioned else "UNet2DModel",
        **_FIXED,
        "sample_size": unet.image_size,
        "in_channels": unet.in_channels,
        "out_channels": unet.out_channels,
        "block_out_channels": widths,
        "layers_per_block": unet.num_res_blocks,
        "down_block_types": types["down"],
        "up_block_types": types["up"][::-1],
        "norm_num_groups": unet.norm_groups,
        "resnet_time_scale_shift": "scale_shift" if unet.scale_shift else "default",
        "time_embedding_dim": unet.emb_dim,
        "dropout": unet.dropout,
        "mid_block_type": _MIDDLES[conditioned],
    }
    if not conditioned:
        return config | _FIXED_PLAIN
    attends[-1] = True  # the middle block
    heads = {width // unet.heads(width) for width, attending in zip(widths, attends, strict=True) if attending}
    if len(heads) > 1:
        raise WeightsError(f"{where}: diffusers' U-Nets have heads of one width, not num_heads {unet.num_heads}")
    dims = {"attention_head_dim": heads.pop(), "cross_attention_dim": unet.context_dim}
    return config | _FIXED_CONDITIONED | dims | {"class_embed_type": "identity"}
