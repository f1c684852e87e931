"""Reads and writes the config files of transformers' CLIP. Missing fields have the defaults of transformers."""

import dataclasses
import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from dalle2_jax.errors import shown
from dalle2_jax.models.clip import TextConfig, VisionConfig
from dalle2_jax.text import ClipTokenizer
from dalle2_jax.weights.clip.towers import mlp_ratio
from dalle2_jax.weights.config_files import MAX_LAYERS, MAX_SIZE, Known, Section
from dalle2_jax.weights.tensors import Tensor, strip_prefix

TEXT_DEFAULTS: dict[str, Any] = {
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
"""Defaults of CLIPTextConfig."""

VISION_DEFAULTS: dict[str, Any] = {
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
"""Defaults of CLIPVisionConfig."""


_PRETRAINED = Known(
    ("model_type",),
    {"pruned_heads": {}},
    r"_name_or_path|_commit_hash|_attn_implementation.*|attn_implementation|auto_map|architectures|transformers_version"
    r"|torch_dtype|dtype|torchscript|use_bfloat16|tf_legacy_loss|return_dict|output_(attentions|hidden_states|scores)"
    r"|(add_)?cross_attention(_hidden_size)?|chunk_size_feed_forward|is_(decoder|encoder_decoder|composition)"
    r"|tie_(encoder_decoder|word_embeddings)|finetuning_task|problem_type|task_specific_params|tokenizer_class|prefix"
    r"|id2label|label2id|num_labels|gradient_checkpointing|use_cache|initializer_(range|factor)|(attention_)?dropout"
    r"|logit_scale_init_value|(bos|pad|sep|decoder_start|forced_bos|forced_eos)_token_id"
    # fields of text generation, which older files have
    r"|(max|min|max_new)_(length|tokens)|do_sample|early_stopping|num_(beams|beam_groups|return_sequences)"
    r"|diversity_penalty|length_penalty|(encoder_)?repetition_penalty|temperature|top_[kp]|typical_p"
    r"|(encoder_)?no_repeat_ngram_size|bad_words_ids|return_dict_in_generate|remove_invalid_values"
    r"|exponential_decay_length_penalty|(begin_)?suppress_tokens",
)
"""Fields of every config file of transformers."""

_CLIP = _PRETRAINED | Known(
    ("projection_dim", "text_config", "vision_config", "text_config_dict", "vision_config_dict", "vision_config_type")
)
_TEXT = _PRETRAINED | Known((*TEXT_DEFAULTS, "eos_token_id"))
_VISION = _PRETRAINED | Known(VISION_DEFAULTS, {"num_channels": 3})

_LAYER = r"encoder\.layers\.(\d+)\."


def read_clip_config(config: Section, tensors: Mapping[str, Tensor]) -> tuple[TextConfig, VisionConfig, int]:
    """Returns the text tower, the image tower and the embedding width in the config file of a CLIPModel.

    Args:
        config: the file.
        tensors: tensors of the weights, with which sizes are compared.

    Raises:
        FieldError: a value of the wrong type, not supported, or different from the weights.
    """
    config.check(_CLIP)
    dim = config.positive_int("projection_dim", TEXT_DEFAULTS["projection_dim"])
    text, vision = (tower_section(config, name) for name in ("text_config", "vision_config"))
    # transformers ignores projection_dim in the sections of the towers
    text, vision = (
        dataclasses.replace(tower, content={**tower.content, "projection_dim": dim}) for tower in (text, vision)
    )
    return read_text_config(text, tensors)[0], read_vision_config(vision, tensors)[0], dim


def tower_section(config: Section, name: str) -> Section:
    """Returns the section of a tower. As in transformers, a section ``name``_dict replaces it."""
    return config.section(f"{name}_dict" if config.content.get(f"{name}_dict") is not None else name)


def read_text_config(section: Section, tensors: Mapping[str, Tensor] = MappingProxyType({})) -> tuple[TextConfig, int]:
    """Returns the text tower and the embedding width in a config file.

    Args:
        section: the section of the text tower.
        tensors: tensors of the weights, with which sizes are compared.

    Raises:
        FieldError: a value of the wrong type, not supported, or different from the weights.
    """
    section.check(_TEXT)
    values = _complete(TEXT_DEFAULTS, section)
    sizes = {
        "vocab_size": ("embeddings.token_embedding.weight", 0),
        "hidden_size": ("embeddings.token_embedding.weight", 1),
        "max_position_embeddings": ("embeddings.position_embedding.weight", 0),
        "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    }
    _check_weights(section, values, sizes, strip_prefix("text_model.", tensors))
    _check_projection(section, values, "text_projection.weight", tensors)
    tower = TextConfig(values["vocab_size"], values["max_position_embeddings"], **_shape(values))
    return tower, values["projection_dim"]


def read_vision_config(
    section: Section, tensors: Mapping[str, Tensor] = MappingProxyType({})
) -> tuple[VisionConfig, int]:
    """Returns the image tower and the embedding width in a config file; arguments and errors as `read_text_config`."""
    section.check(_VISION)
    values = _complete(VISION_DEFAULTS, section)
    side, patch = values["image_size"], values["patch_size"]
    if side % patch:
        raise section.error("image_size", f"{side} is not a multiple of patch_size {patch}")
    sizes = {
        "hidden_size": ("embeddings.class_embedding", 0),
        "patch_size": ("embeddings.patch_embedding.weight", 3),
        "intermediate_size": ("encoder.layers.0.mlp.fc1.weight", 0),
    }
    weights = strip_prefix("vision_model.", tensors)
    _check_weights(section, values, sizes, weights)
    _check_projection(section, values, "visual_projection.weight", tensors)
    positions = weights.get("embeddings.position_embedding.weight")
    if positions is not None and positions.shape[:1] != (1 + (side // patch) ** 2,):
        given = f"{side} has {1 + (side // patch) ** 2} positions with the class token"
        raise section.error("image_size", f"{given}, but the weights have {positions.shape[0]}")
    return VisionConfig(side, patch, **_shape(values)), values["projection_dim"]


def check_end_token(section: Section, tokenizer: ClipTokenizer | None) -> None:
    """Raises FieldError if transformers pools the text tower at another token than the tokenizer's end token.

    Transformers pools at the first ``eos_token_id``; if that is 2, at the largest token, as OpenAI's code does. Stages
    here pool at the end token.
    """
    given = section.content.get("eos_token_id", 2)
    if given == 2 and type(given) is int:
        return
    if tokenizer is not None and (type(given) is not int or given != tokenizer.end):
        expected = f"the tokenizer's end token, {tokenizer.end}, or 2 (pool at the largest token)"
        raise section.error("eos_token_id", f"{shown(given)} is not supported: it must be {expected}")


def _complete(defaults: Mapping[str, Any], section: Section) -> dict[str, Any]:
    most = {"num_hidden_layers": MAX_LAYERS, "image_size": 2**14, "max_position_embeddings": 2**16}
    values: dict[str, Any] = {
        key: section.positive_int(key, default, most.get(key, MAX_SIZE))
        for key, default in defaults.items()
        if isinstance(default, int)
    }
    values["hidden_act"] = section.string("hidden_act", ("gelu", "quick_gelu"), defaults["hidden_act"])
    eps = section.number("layer_norm_eps", defaults["layer_norm_eps"])
    if eps != 1e-5:
        raise section.error("layer_norm_eps", f"{eps!r} is not supported: it must be 1e-05")
    if values["hidden_size"] % values["num_attention_heads"]:
        width, heads = values["hidden_size"], values["num_attention_heads"]
        raise section.error("num_attention_heads", f"{heads} does not divide hidden_size {width}")
    return values


def _check_weights(
    section: Section,
    values: Mapping[str, int],
    sizes: Mapping[str, tuple[str, int]],
    tensors: Mapping[str, Tensor],
) -> None:
    """Raises FieldError for a size that differs from the weights; ``sizes`` maps fields to (key, axis)."""
    for name, (key, axis) in sizes.items():
        if key in tensors and axis < len(tensors[key].shape):
            section.check_size(name, values[name], tensors[key].shape[axis])
    numbers = [match[1] for match in (re.match(_LAYER, key) for key in tensors) if match]
    if numbers:
        section.check_size("num_hidden_layers", values["num_hidden_layers"], len({*numbers}))


def _check_projection(section: Section, values: Mapping[str, int], key: str, tensors: Mapping[str, Tensor]) -> None:
    if key in tensors:
        section.check_size("projection_dim", values["projection_dim"], tensors[key].shape[0])


def _shape(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "width": values["hidden_size"],
        "layers": values["num_hidden_layers"],
        "heads": values["num_attention_heads"],
        "activation": values["hidden_act"],
        "mlp_ratio": mlp_ratio(values["intermediate_size"], values["hidden_size"]),
    }


def hf_text_config(text: TextConfig, embed_dim: int, tokenizer: ClipTokenizer | None) -> dict[str, Any]:
    """Returns the config file of CLIPTextModelWithProjection; without a tokenizer, with OpenAI's special tokens."""
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
