"""The config files of transformers' CLIP, both ways. What a file leaves out is transformers' default."""

from collections.abc import Mapping, Sequence
from typing import Any

from dalle2_jax.models.clip import TextConfig, VisionConfig
from dalle2_jax.text import ClipTokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip_towers import mlp_ratio

TEXT_DEFAULTS = {
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
"""Of CLIPTextConfig."""

VISION_DEFAULTS = {
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
"""Of CLIPVisionConfig."""


def read_text_config(section: Mapping[str, Any], where: str) -> tuple[TextConfig, int]:
    """Returns the text tower that a config file describes, and the width of its embeddings.

    Args:
        section: of a config file; whatever it leaves out is transformers' default.
        where: the file's name, for errors.

    Raises:
        UserError: a value that is no number, or that the networks here do not have.
    """
    values = _complete(TEXT_DEFAULTS, section, where)
    tower = TextConfig(values["vocab_size"], values["max_position_embeddings"], **_shape(values))
    return tower, values["projection_dim"]


def read_vision_config(section: Mapping[str, Any], where: str) -> tuple[VisionConfig, int]:
    """Returns the image tower that a config file describes, and the width of its embeddings; as `read_text_config`."""
    values = _complete(VISION_DEFAULTS, section, where)
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


def hf_text_config(text: TextConfig, embed_dim: int, tokenizer: ClipTokenizer | None) -> dict[str, Any]:
    """Returns the config file of CLIPTextModelWithProjection. Without a tokenizer the tokens lie as in OpenAI's."""
    begin, end, pad = text.vocab_size - 2, text.vocab_size - 1, 0
    if tokenizer is not None:
        begin, end, pad = tokenizer.begin, tokenizer.end, tokenizer.pad
    return {
        "architectures": ["CLIPTextModelWithProjection"],
        "model_type": "clip_text_model",
        **_described(text, embed_dim),
        "vocab_size": text.vocab_size,
        "max_position_embeddings": text.context_length,
        "bos_token_id": begin,
        "eos_token_id": end,
        "pad_token_id": pad,
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
