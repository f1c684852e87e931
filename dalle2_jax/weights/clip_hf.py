"""CLIP as transformers names it: CLIPModel, and either tower with its projection alone.

Both ways: ``recognise`` reads a folder of theirs, `export_hf` writes one. The towers' tables and their config files
stand alone too, for systems that keep a tower in a folder of its own (Karlo's text_encoder and image_encoder).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, TextConfig, VisionConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip import INITIAL_LOG_SCALE, mlp_ratio, patch_layout, sections
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.rules import Rule, constant, dense, leaf, merged_heads, norm, projections, stacked, under
from dalle2_jax.weights.tensors import Tensor

IGNORED = (r"(text_model|vision_model)\.embeddings\.position_ids",)
"""0, 1, 2, ...: older files hold them."""

_TEXT = {
    "vocab_size": 49408,
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "max_position_embeddings": 77,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""What transformers takes for a field that a config file leaves out (CLIPTextConfig)."""

_VISION = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 32,
    "projection_dim": 512,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
}
"""And for the image tower (CLIPVisionConfig)."""

_STEMS = ("model", "pytorch_model")


# --- tables ---------------------------------------------------------------------------------


def hf_text_rules(text: TextConfig) -> list[Rule]:
    """The table of CLIPTextModelWithProjection, for the leaves under ``text``."""
    tower = [
        *leaf("token_embedding/embedding", "embeddings.token_embedding.weight"),
        *leaf("positional_embedding", "embeddings.position_embedding.weight"),
        *_blocks(text.layers, text.heads),
        *norm("ln_final", "final_layer_norm"),
    ]
    return [*under("text", "text_model.", tower), *dense("text/proj", "text_projection", bias=False)]


def hf_vision_rules(vision: VisionConfig) -> list[Rule]:
    """The table of CLIPVisionModelWithProjection, for the leaves under ``visual``. (Their name is "pre_layrnorm".)"""
    tower = [
        *leaf("patch_embed/kernel", "embeddings.patch_embedding.weight", patch_layout(vision.patch_size)),
        *leaf("class_embedding", "embeddings.class_embedding"),
        *leaf("positional_embedding", "embeddings.position_embedding.weight"),
        *norm("ln_pre", "pre_layrnorm"),
        *_blocks(vision.layers, vision.heads),
        *norm("ln_post", "post_layernorm"),
    ]
    return [*under("visual", "vision_model.", tower), *dense("visual/proj", "visual_projection", bias=False)]


def _blocks(layers: int, heads: int) -> list[Rule]:
    block = [
        *norm("ln_1", "layer_norm1"),
        *projections("attn/qkv", [f"self_attn.{name}_proj" for name in "qkv"], heads),
        *dense("attn/out", "self_attn.out_proj", merged_heads(heads)),
        *norm("ln_2", "layer_norm2"),
        *dense("fc", "mlp.fc1"),
        *dense("proj", "mlp.fc2"),
    ]
    return stacked(*(under("transformer/blocks", f"encoder.layers.{i}.", block) for i in range(layers)))


# --- config files ---------------------------------------------------------------------------


def read_text_config(section: Mapping[str, Any], where: str) -> tuple[TextConfig, int]:
    """Returns the text tower that a config file describes, and the width of its embeddings.

    Args:
        section: of a config file; whatever it leaves out is transformers' default.
        where: the file's name, for errors.

    Raises:
        UserError: a value that is no number, or that the networks here do not have.
    """
    values = _complete(_TEXT, section, where)
    tower = TextConfig(values["vocab_size"], values["max_position_embeddings"], **_shape(values))
    return tower, values["projection_dim"]


def read_vision_config(section: Mapping[str, Any], where: str) -> tuple[VisionConfig, int]:
    """Returns the image tower that a config file describes, and the width of its embeddings; as `read_text_config`."""
    values = _complete(_VISION, section, where)
    try:
        tower = VisionConfig(values["image_size"], values["patch_size"], **_shape(values))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return tower, values["projection_dim"]


def _complete(defaults: Mapping[str, Any], section: Mapping[str, Any], where: str) -> dict[str, Any]:
    values = {key: section.get(key, default) for key, default in defaults.items()}
    for key, value in values.items():
        if isinstance(defaults[key], int) and (type(value) is not int or value < 1):
            raise UserError(f"{where}: {key} must be a whole number of 1 or more, not {value!r}")
    if values["hidden_act"] not in ("gelu", "quick_gelu"):
        raise UserError(f"{where}: hidden_act {values['hidden_act']!r} is not known here: gelu and quick_gelu are")
    if values["layer_norm_eps"] != 1e-5:
        raise UserError(f"{where}: layer_norm_eps {values['layer_norm_eps']!r} is not known here: every norm has 1e-05")
    return values


def _shape(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "activation": values["hidden_act"],
        "mlp_ratio": mlp_ratio(values["intermediate_size"], values["hidden_size"]),
    }


def hf_text_config(text: TextConfig, embed_dim: int) -> dict[str, Any]:
    """Returns the config file of CLIPTextModelWithProjection. The last two tokens are begin and end, as OpenAI's."""
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_described(text, embed_dim),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "bos_token_id": text.vocab_size - 2,
        "eos_token_id": text.vocab_size - 1,
        "pad_token_id": 1,
    }


def hf_vision_config(vision: VisionConfig, embed_dim: int) -> dict[str, Any]:
    """Returns the config file of CLIPVisionModelWithProjection."""
    return {
        "architectures": ["CLIPVisionModelWithProjection"],
        "model_type": "clip_vision_model",
        **_described(vision, embed_dim),
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
        "num_channels": 3,
    }


def _described(tower: TextConfig | VisionConfig, embed_dim: int) -> dict[str, Any]:
    return {
        "hidden_size": tower.width,
        "intermediate_size": int(tower.width * tower.mlp_ratio),
        "num_hidden_layers": tower.layers,
        "num_attention_heads": tower.heads,
        "projection_dim": embed_dim,
        "hidden_act": tower.activation,
        "layer_norm_eps": 1e-5,
        "attention_dropout": 0.0,
    }


def hf_image_processor(image_size: int, mean: Sequence[float], std: Sequence[float]) -> dict[str, Any]:
    """Returns preprocessor_config.json: the shorter side to ``image_size`` (bicubic), the middle of it, normalised."""
    return {
        "image_processor_type": "CLIPImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": image_size},
        "resample": 3,
        "do_center_crop": True,
        "crop_size": {"height": image_size, "width": image_size},
        "do_convert_rgb": True,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


# --- recognising ----------------------------------------------------------------------------


def recognise(source: Source) -> list[Component]:
    """Returns what a folder of transformers' CLIP holds: both towers, or one; [] where it is something else.

    Raises:
        UserError: it is one, and its weights or its config cannot be read.
    """
    if not source.path.is_dir():
        return []
    config = source.json("config.json")
    known = {"clip": _both, "clip_text_model": _text, "clip_vision_model": _vision}
    read = known.get((config or {}).get("model_type"))
    return [] if read is None else [read(source, config, str(source.path / "config.json"))]


def _both(source: Source, config: Mapping[str, Any], where: str) -> Component:
    embed_dim = config.get("projection_dim", 512)
    text, _ = read_text_config(_nested(config, "text_config"), where)
    vision, _ = read_vision_config(_nested(config, "vision_config"), where)
    return _component(
        source,
        "CLIP (transformers)",
        sections(embed_dim, text, vision, *_normalisation(source)),
        [*hf_text_rules(text), *hf_vision_rules(vision), *leaf("logit_scale", "logit_scale")],
    )


def _text(source: Source, config: Mapping[str, Any], where: str) -> Component:
    text, embed_dim = read_text_config(config, where)
    rules = [*hf_text_rules(text), *constant("logit_scale", INITIAL_LOG_SCALE)]
    return _component(source, "CLIP text encoder (transformers)", sections(embed_dim, text, None), rules)


def _vision(source: Source, config: Mapping[str, Any], where: str) -> Component:
    vision, embed_dim = read_vision_config(config, where)
    family, sized = "CLIP image encoder (transformers)", sections(embed_dim, None, vision, *_normalisation(source))
    return _component(source, family, sized, hf_vision_rules(vision), needs="the text encoder")


def _component(source: Source, family: str, config: Mapping[str, Any], rules: list[Rule], needs: str = "") -> Component:
    tensors: Mapping[str, Tensor] = source.weights(*_STEMS)
    return Component("clip", family, str(source.path), config, tensors, rules, ignored=IGNORED, needs=needs)


def _nested(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A tower's section; where there is one with "_dict" after its name, that alone counts, as in transformers."""
    section = config.get(f"{name}_dict")
    section = config.get(name) if section is None else section
    return section if isinstance(section, Mapping) else {}


def _normalisation(source: Source) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pictures, from the folder's processor or the one beside it; else OpenAI's."""
    beside = Source(source.path.parent / "feature_extractor")
    content = source.json("preprocessor_config.json") or beside.json("preprocessor_config.json") or {}
    return content.get("image_mean", CLIP_IMAGE_MEAN), content.get("image_std", CLIP_IMAGE_STD)
