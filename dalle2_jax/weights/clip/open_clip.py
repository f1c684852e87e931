"""OpenCLIP folders: open_clip_config.json, and a state dict with OpenAI's names."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError, shown
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.weights.clip.openai import (
    HEAD_WIDTH,
    component,
    read_sizes,
    strip_module_prefix,
    write_state_dict,
)
from dalle2_jax.weights.clip.processor import Processor, read_preprocess_cfg
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.config_files import Known, Section
from dalle2_jax.weights.stage_writer import Trees, write_json

CONFIG_FILE = "open_clip_config.json"

_TOWER = {
    # fields of a tower that are read, or that have no effect on trained weights
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size image_seq_len patch_dropout".split(),
    "text_cfg": "layers width heads mlp_ratio context_length vocab_size pad_id bos_id eos_id".split(),
}
_FILE = Known(("model_cfg", "preprocess_cfg"), irrelevant="model_type|tags|name|license")
_MODEL = Known(
    ("embed_dim", "quick_gelu", "vision_cfg", "text_cfg"),
    {"multimodal_cfg": None, "init_logit_bias": None},
    "custom_text|init_logit_scale|nonscalar_logit_scale|output_dict|cast_dtype|model_name",
)

_USUAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "text_arch": ("clip",),
}
"""Options of OpenCLIP's towers, with the supported values."""

_OF_OTHER_TOWERS = ("timm_", "hf_", "attn_pooler_")
"""Prefixes of fields that have an effect only if one of `_OTHER_TOWERS` is set."""

_OTHER_TOWERS = ("timm_model_name", "hf_model_name", "hf_tokenizer_name")


def detect(source: Source) -> list[Component]:
    """Returns the CLIP in an OpenCLIP folder; [] for anything else.

    Raises:
        WeightsError: a tensor is missing, or the architecture is not supported.
    """
    content = source.json(CONFIG_FILE) if source.path.is_dir() else None
    if content is None:
        return []
    where, file = str(source.path), Section(content, str(source.path / CONFIG_FILE))
    tensors = strip_module_prefix(source.weights("open_clip_model", "open_clip_pytorch_model"))
    config, processor = _configured(read_sizes(tensors, where), file)
    return [component("CLIP (OpenCLIP)", config, tensors, where, processor)]


def _configured(sizes: ClipConfig, file: Section) -> tuple[ClipConfig, Processor]:
    """Returns the config with the properties that shapes do not show (heads, activation), and the preprocessing."""
    tower = sizes.tower
    file.check(_FILE)
    model = file.section("model_cfg")
    model.check(_MODEL)
    vision, text = model.section("vision_cfg"), model.section("text_cfg")
    for name, section in (("vision_cfg", vision), ("text_cfg", text)):
        _check(section, name)
    _check_sizes(sizes, model, vision, text)
    processor = read_preprocess_cfg(file.section("preprocess_cfg"), tower.image_size)
    activation = {"activation": "quick_gelu" if model.boolean("quick_gelu", False) else "gelu"}
    resnet = isinstance(sizes.tower, ResNetConfig)
    channels = tower.width * (32 if resnet else 1)
    vision_heads = max(1, channels // vision.positive_int("head_width", HEAD_WIDTH))
    text_heads = text.positive_int("heads", 8)
    for section, field, width, heads in (
        (vision, "head_width", channels, vision_heads),
        (text, "heads", sizes.text.width, text_heads),
    ):
        if width % heads:
            raise section.error(field, f"{shown(section.content.get(field))} does not divide width {width}")
    config = dataclasses.replace(
        sizes,
        vision=dataclasses.replace(tower, heads=vision_heads, **({} if resnet else activation)),
        text=dataclasses.replace(sizes.text, heads=text_heads, **activation),
        image_mean=processor.mean,
        image_std=processor.std,
    )
    return config, processor


def _check_sizes(sizes: ClipConfig, model: Section, vision: Section, text: Section) -> None:
    """Raises FieldError for a size in the file that differs from the weights."""
    tower = sizes.tower
    weights = [
        (model, {"embed_dim": sizes.embed_dim}),
        (text, {name: getattr(sizes.text, name) for name in ("width", "layers", "context_length", "vocab_size")}),
        (vision, {"width": tower.width, "image_size": tower.image_size}),
    ]
    if not isinstance(tower, ResNetConfig):
        weights.append((vision, {"layers": tower.layers, "patch_size": tower.patch_size}))
    for section, fields in weights:
        for name, size in fields.items():
            if section.content.get(name) is not None:
                given = section.positive_ints(name)
                section.check_size(name, given[0] if {*given} == {given[0]} else 0, size)


def _check(section: Section, name: str) -> None:
    """Raises FieldError for an unsupported option of a tower; null, false and zero switch nothing on."""
    for key, value in section.content.items():
        harmless = key in _TOWER[name] or not value or (isinstance(value, str) and value in _USUAL.get(key, ()))
        if not harmless and (key in _OTHER_TOWERS or not key.startswith(_OF_OTHER_TOWERS)):
            raise section.error(key, f"{shown(value)} is not supported: only plain CLIP towers are")


def export_open_clip(folder: Path, config: ClipConfig, trees: Trees, dtype: Any = np.float32) -> None:
    """Writes a folder that open_clip loads as "local-dir:FOLDER".

    Args:
        folder: an empty folder.
        config: both towers.
        trees: parameters and statistics.
        dtype: dtype of the tensors in the file.

    Raises:
        WeightsError: OpenCLIP has no such CLIP.
    """
    write_json(folder / CONFIG_FILE, _described(config))
    write_state_dict(folder / "open_clip_model.safetensors", config, trees, dtype)


def _described(config: ClipConfig) -> dict[str, Any]:
    text, vision = config.text, config.vision
    if vision is None:
        raise WeightsError("OpenCLIP requires an image tower, which this CLIP lacks: export it as hf_clip")
    sizes = {name: getattr(vision, name) for name in ("image_size", "layers", "width")}
    if isinstance(vision, ResNetConfig):
        sizes |= {"patch_size": None, "head_width": vision.width * 32 // vision.heads}
    elif vision.activation != text.activation:
        raise WeightsError("OpenCLIP has one activation for both towers, this CLIP has two: export it as hf_clip")
    else:
        sizes |= {name: getattr(vision, name) for name in ("patch_size", "mlp_ratio")}
        sizes["head_width"] = vision.width // vision.heads
    names = ("context_length", "vocab_size", "width", "heads", "layers", "mlp_ratio")
    return {
        "model_cfg": {
            "embed_dim": config.embed_dim,
            "quick_gelu": text.activation == "quick_gelu",
            "vision_cfg": sizes,
            "text_cfg": {name: getattr(text, name) for name in names},
        },
        "preprocess_cfg": {"mean": list(config.image_mean), "std": list(config.image_std)},
    }
