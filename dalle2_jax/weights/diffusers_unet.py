"""The grammar of diffusers' U-Nets, as far as unCLIP uses it: UNet2DConditionModel and UNet2DModel.

Blocks are named by level: ``down_blocks.l`` from full size down, ``up_blocks.l`` from the last level up, each with
``resnets`` and, where it attends, ``attentions``; what changes the size is a residual block too (``downsamplers.0``,
``upsamplers.0``). A config file says the rest.

Read here are blocks whose sizes change in residual blocks, and attention to [context, itself] (their "Simple" cross
attention, which is GLIDE's). The plain and the transformer blocks of latent diffusion are another architecture.
"""

from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import UserError, choose
from dalle2_jax.weights.rules import Rule, conv, dense, merged_heads, norm, projections, under

_ATTENDS = {"down": "SimpleCrossAttnDownBlock2D", "up": "SimpleCrossAttnUpBlock2D"}
_PLAIN = {"down": "ResnetDownsampleBlock2D", "up": "ResnetUpsampleBlock2D"}
_MIDDLES = {True: "UNetMidBlock2DSimpleCrossAttn", False: "UNetMidBlock2D"}
"""By whether there is a context. (With one, UNetMidBlock2D has a single residual block, where ours has two.)"""

_KNOWN = {
    "act_fn": "silu",
    "norm_eps": 1e-5,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_scale_factor": 1,
}
"""What a config of either class may say of these alone: our U-Net has it so."""

_KNOWN_CONDITIONED = {
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
}
"""And of these, in UNet2DConditionModel."""

_KNOWN_PLAIN = {
    "add_attention": False,
    "class_embed_type": None,
    "num_class_embeds": None,
    "attn_norm_num_groups": None,
}
"""And of these, in UNet2DModel."""


# --- the table ------------------------------------------------------------------------------


def unet_rules(config: UNetConfig, prefix: str = "") -> list[Rule]:
    """Returns the table of a U-Net, every key beginning with ``prefix`` (with its dot)."""
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


def check_fields(config: Mapping[str, Any], known: Mapping[str, Any], where: str) -> None:
    """Raises UserError where a config file says of a field in ``known`` what no network here has."""
    for name, value in known.items():
        if config.get(name, value) != value:
            raise UserError(f"{where}: {name} {config[name]!r} is not supported: only {value!r} is")


def read_unet_config(config: Mapping[str, Any], where: str, image_size: int | None = None) -> dict[str, Any]:
    """Returns the fields of ``UNetConfig`` that a config file describes.

    Args:
      config: of a UNet2DConditionModel or a UNet2DModel; a field that only one value fits may be left out.
      where: the file's name, for errors.
      image_size: of the pictures, where the file does not say (Karlo's second super-resolution network).

    Raises:
      UserError: a value that our U-Net does not have, or that is no such value at all.
    """
    conditioned = config.get("_class_name") == "UNet2DConditionModel"
    check_fields(config, {**_KNOWN, **(_KNOWN_CONDITIONED if conditioned else _KNOWN_PLAIN)}, where)
    widths = _wholes(config, "block_out_channels", where)
    depths = _wholes(config, "layers_per_block", where)
    side = config.get("sample_size") or image_size
    if not isinstance(side, int) or len(set(depths)) > 1:
        raise UserError(f"{where}: pictures that are not square, or levels of different depth, are not supported")
    down, up = (_attending(config, way, len(widths), where) for way in ("down", "up"))
    if down != up or (down and not conditioned):
        raise UserError(f"{where}: attention on levels {down} on the way down but {up} on the way up is not supported")
    shift = config.get("resnet_time_scale_shift", "default")
    choose(f"resnet_time_scale_shift in {where}", shift, dict.fromkeys(("default", "scale_shift")))
    choose(f"mid_block_type in {where}", config.get("mid_block_type", "UNetMidBlock2D"), {_MIDDLES[conditioned]: None})
    heads = set(_wholes(config, "attention_head_dim", where)) if conditioned else set()  # channels of a head
    if len(heads) > 1:  # diffusers gives the way up the levels' numbers in the order of the way down
        raise UserError(f"{where}: heads of another width on each level (attention_head_dim) are not supported")
    time_dim = config.get("time_embedding_dim")
    fields = {
        "image_size": side,
        "in_channels": _wholes(config, "in_channels", where)[0],
        "out_channels": _wholes(config, "out_channels", where)[0],
        "channels": widths[0],
        "channel_mult": tuple(width // widths[0] if width % widths[0] == 0 else width / widths[0] for width in widths),
        "num_res_blocks": depths[0],
        "attention_resolutions": tuple(side // 2**level for level in down),
        "context_dim": _wholes(config, "cross_attention_dim", where)[0] if conditioned else None,
        "scale_shift": shift == "scale_shift",
        "dropout": float(config.get("dropout", 0.0)),
        "middle_attention": conditioned,
        "emb_dim": None if time_dim == 4 * widths[0] else time_dim,
        "norm_groups": config.get("norm_num_groups", 32),
        **({"head_channels": heads.pop()} if conditioned else {}),
    }
    try:
        UNetConfig(**fields)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return fields


def _wholes(config: Mapping[str, Any], name: str, where: str) -> list[int]:
    """A field that is a whole number, or a list of them."""
    value = config.get(name)
    values = value if isinstance(value, list) else [value]
    if not values or not all(type(number) is int and number > 0 for number in values):
        raise UserError(f"{where}: {name} must be whole numbers above 0, not {value!r}")
    return values


def _attending(config: Mapping[str, Any], way: str, levels: int, where: str) -> list[int]:
    """The levels on which the blocks of one way attend."""
    kinds = {_PLAIN[way]: False, _ATTENDS[way]: True}
    types = config.get(f"{way}_block_types") or []
    if len(types) != levels:
        raise UserError(f"{where}: {len(types)} {way}_block_types for {levels} levels")
    attends = [choose(f"{way}_block_types in {where}", kind, kinds) for kind in types]
    return [level for level in range(levels) if attends[level if way == "down" else levels - 1 - level]]


def unet_config_file(unet: UNetConfig, where: str) -> dict[str, Any]:
    """Returns the config file of a U-Net: UNet2DConditionModel where it attends, else UNet2DModel.

    Raises:
      UserError: a feature that neither has; it begins with ``where``.
    """
    for field, plain in (("patch_size", 1), ("input_skip", False), ("resblock_updown", True)):
        if getattr(unet, field) != plain:
            raise UserError(f"{where}: diffusers' U-Nets have no {field} {getattr(unet, field)!r}")
    levels = range(len(unet.channel_mult))
    widths = [unet.level_channels(level) for level in levels]
    attends = [unet.attends(level) for level in levels]
    conditioned = unet.context_dim is not None
    if unet.middle_attention != conditioned or (any(attends) and not conditioned):
        raise UserError(f"{where}: unCLIP's U-Nets have attention in the middle if and only if there is a context")
    types = {way: [(_ATTENDS if attends[level] else _PLAIN)[way] for level in levels] for way in ("down", "up")}
    config = {
        "_class_name": "UNet2DConditionModel" if conditioned else "UNet2DModel",
        **_KNOWN,
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
        return config | _KNOWN_PLAIN
    attends[-1] = True  # in the middle
    heads = {width // unet.heads(width) for width, attending in zip(widths, attends, strict=True) if attending}
    if len(heads) > 1:
        raise UserError(f"{where}: diffusers' U-Nets have heads of one width, not {unet.num_heads} on every level")
    dims = {"attention_head_dim": heads.pop(), "cross_attention_dim": unet.context_dim}
    return config | _KNOWN_CONDITIONED | dims | {"class_embed_type": "identity"}
