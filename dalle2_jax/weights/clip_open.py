"""OpenCLIP's folders: open_clip_config.json with a state dict of OpenAI's names beside it."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip_openai import HEAD_WIDTH, bare, component, read_sizes, write_state_dict
from dalle2_jax.weights.clip_towers import normalisation
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.landing import Trees, write_json

CONFIG_FILE = "open_clip_config.json"

_TOWER = {
    # every field of a tower that means something here, or nothing for finished weights
    "vision_cfg": "layers width head_width mlp_ratio patch_size image_size image_seq_len patch_dropout".split(),
    "text_cfg": "layers width heads mlp_ratio context_length vocab_size pad_id bos_id eos_id".split(),
}
_USUAL = {
    "pool_type": ("tok", "argmax"),
    "pos_embed_type": ("learnable",),
    "proj_type": ("linear",),
    "text_arch": ("clip",),
}
"""Choices of OpenCLIP's, and those which the towers here have made."""

_OF_OTHER_TOWERS = ("timm_", "hf_", "attn_pooler_")
"""Begin the names of fields that count only if one of `_OTHER_TOWERS` is set."""

_OTHER_TOWERS = ("timm_model_name", "hf_model_name", "hf_tokenizer_name")


def recognise(source: Source) -> list[Component]:
    """Returns the CLIP that an OpenCLIP folder holds; [] where it is something else.

    Raises:
        UserError: it is one, and lacks a tensor, or has parts that are not known here.
    """
    content = source.json(CONFIG_FILE) if source.path.is_dir() else None
    if content is None:
        return []
    where = str(source.path)
    tensors = bare(source.weights("open_clip_model", "open_clip_pytorch_model"))
    config = _configured(read_sizes(tensors, where), content, str(source.path / CONFIG_FILE))
    return [component("CLIP (OpenCLIP)", config, tensors, where)]


def _configured(sizes: ClipConfig, content: Mapping[str, Any], where: str) -> ClipConfig:
    """Says of a CLIP what shapes do not tell: heads, activation and how pictures are normalised."""
    model, pictures = (_section(content, name, where) for name in ("model_cfg", "preprocess_cfg"))
    vision, text = (_section(model, name, where) for name in ("vision_cfg", "text_cfg"))
    for name, section in (("vision_cfg", vision), ("text_cfg", text)):
        _check(section, name, where)
    mean, std = normalisation(pictures, ("mean", "std"), where)
    activation = {"activation": "quick_gelu" if model.get("quick_gelu") else "gelu"}
    resnet = isinstance(sizes.vision, ResNetConfig)
    head_width = _count(vision, "head_width", HEAD_WIDTH, where)
    heads = max(1, sizes.vision.width * (32 if resnet else 1) // head_width)
    return dataclasses.replace(
        sizes,
        vision=dataclasses.replace(sizes.vision, heads=heads, **({} if resnet else activation)),
        text=dataclasses.replace(sizes.text, heads=_count(text, "heads", 8, where), **activation),
        image_mean=mean,
        image_std=std,
    )


def _section(content: Mapping[str, Any], name: str, where: str) -> Mapping[str, Any]:
    section = content.get(name, {})
    if not isinstance(section, Mapping):
        raise UserError(f"{where}: {name} is not a section")
    return section


def _count(section: Mapping[str, Any], key: str, usual: int, where: str) -> int:
    value = section.get(key, usual)
    if type(value) is not int or value < 1:
        raise UserError(f"{where}: {key} must be a whole number of 1 or more, not {value!r}")
    return value


def _check(section: Mapping[str, Any], name: str, where: str) -> None:
    """Refuses what the towers here cannot do; a field that is null, false or zero asks for nothing."""
    for key, value in section.items():
        harmless = key in _TOWER[name] or not value or value in _USUAL.get(key, ())
        if not harmless and (key in _OTHER_TOWERS or not key.startswith(_OF_OTHER_TOWERS)):
            raise UserError(f"{where}: {name}.{key} {value!r} is not known here: plain CLIP towers are")


def export_open_clip(folder: Path, config: ClipConfig, trees: Trees, dtype: Any = np.float32) -> None:
    """Writes a folder that open_clip loads as "local-dir:...".

    Args:
        folder: an empty one.
        config: both towers.
        trees: parameters and statistics.
        dtype: of the file's tensors.

    Raises:
        UserError: OpenCLIP cannot say what this CLIP is.
    """
    write_json(folder / CONFIG_FILE, _described(config))
    write_state_dict(folder / "open_clip_model.safetensors", config, trees, dtype)


def _described(config: ClipConfig) -> dict[str, Any]:
    text, vision = config.text, config.vision
    if vision is None:
        raise UserError("this CLIP has no image tower, and OpenCLIP has none without: export it as hf_clip")
    sizes = {name: getattr(vision, name) for name in ("image_size", "layers", "width")}
    if isinstance(vision, ResNetConfig):
        sizes |= {"patch_size": None, "head_width": vision.width * 32 // vision.heads}
    elif vision.activation != text.activation:
        raise UserError("OpenCLIP has one activation for both towers, this CLIP two: export it as hf_clip")
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
