"""CLIP as transformers names it: CLIPModel, and either tower with its projection alone.

``recognise`` reads a folder of theirs, `export_hf` writes one. The towers' tables stand alone too, for systems that
keep a tower in a folder of its own (Karlo's text_encoder and image_encoder).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.models.clip import CLIP_IMAGE_MEAN, CLIP_IMAGE_STD, ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.text import ClipTokenizer, Tokenizer, read_clip_tokenizer, write_clip_tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.clip_hf_config import (
    TEXT_DEFAULTS,
    hf_image_processor,
    hf_text_config,
    hf_vision_config,
    read_text_config,
    read_vision_config,
)
from dalle2_jax.weights.clip_towers import INITIAL_LOG_SCALE, normalisation, patch_layout, released_tokenizer, sections
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.landing import Trees, write_json
from dalle2_jax.weights.rules import (
    Rule,
    constant,
    dense,
    empty,
    leaf,
    merged_heads,
    norm,
    projections,
    shapes,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import write_safetensors

IGNORED = (r"(text_model|vision_model)\.embeddings\.position_ids",)
"""0, 1, 2, ...: older files hold them."""

_STEMS = ("model", "pytorch_model")
_TOWERS = ("text_model.", "vision_model.")
_PROCESSOR = "preprocessor_config.json"


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


# --- recognising ----------------------------------------------------------------------------


def recognise(source: Source) -> list[Component]:
    """Returns what a folder of transformers' CLIP holds: both towers, or one; [] where it is something else.

    A file is known by its names, and read with the config.json that lies beside it.

    Raises:
        UserError: it is a CLIP, and its config or its tokenizer cannot be read.
    """
    folder = source if source.path.is_dir() else Source(source.path.parent)
    if folder is not source and not any(key.startswith(_TOWERS) for key in source.tensors):
        return []
    config = folder.json("config.json")
    known = {"clip": _both, "clip_text_model": _text, "clip_vision_model": _vision}
    read = known.get((config or {}).get("model_type"))
    if read is not None:
        return [read(folder, Source(source.path, source.tensors or folder.weights(*_STEMS)), config)]
    if folder is source:
        return []
    raise UserError(f"{source.path} is a CLIP of transformers': its config.json must lie beside it")


def _both(folder: Source, weights: Source, config: Mapping[str, Any]) -> Component:
    where, dim = str(folder.path / "config.json"), config.get("projection_dim", TEXT_DEFAULTS["projection_dim"])
    text, embed_dim = read_text_config({**_nested(config, "text_config"), "projection_dim": dim}, where)
    vision, _ = read_vision_config(_nested(config, "vision_config"), where)
    return Component(
        "clip",
        "CLIP (transformers)",
        str(weights.path),
        sections(embed_dim, text, vision, *_normalisation(folder)),
        weights.tensors,
        [*hf_text_rules(text), *hf_vision_rules(vision), *leaf("logit_scale", "logit_scale")],
        ignored=IGNORED,
        tokenizer=_tokenizer(folder, text.vocab_size),
    )


def _text(folder: Source, weights: Source, config: Mapping[str, Any]) -> Component:
    text, embed_dim = read_text_config(config, str(folder.path / "config.json"))
    return Component(
        "clip",
        "CLIP text encoder (transformers)",
        str(weights.path),
        sections(embed_dim, text, None),
        weights.tensors,
        [*hf_text_rules(text), *constant("logit_scale", INITIAL_LOG_SCALE)],
        ignored=IGNORED,
        tokenizer=_tokenizer(folder, text.vocab_size),
    )


def _vision(folder: Source, weights: Source, config: Mapping[str, Any]) -> Component:
    vision, embed_dim = read_vision_config(config, str(folder.path / "config.json"))
    return Component(
        "clip",
        "CLIP image encoder (transformers)",
        str(weights.path),
        sections(embed_dim, None, vision, *_normalisation(folder)),
        weights.tensors,
        hf_vision_rules(vision),
        ignored=IGNORED,
        needs="the text encoder",
    )


def _nested(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A tower's section; where there is one with "_dict" after its name, that alone counts, as in transformers."""
    section = config.get(f"{name}_dict")
    section = config.get(name) if section is None else section
    return section if isinstance(section, Mapping) else {}


def _normalisation(folder: Source) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and deviation of the pictures, from the folder's processor or the one beside it; else OpenAI's."""
    for place in (folder.path, folder.path.parent / "feature_extractor"):
        content = Source(place).json(_PROCESSOR)
        if content is not None and not content.get("do_normalize", True):
            return (0.0,) * 3, (1.0,) * 3
        if content is not None:
            return normalisation(content, ("image_mean", "image_std"), str(place / _PROCESSOR))
    return CLIP_IMAGE_MEAN, CLIP_IMAGE_STD


def _tokenizer(folder: Source, vocab_size: int) -> Tokenizer | None:
    """The tokenizer in the folder or in the one named so beside it; else OpenAI's.

    Raises:
        UserError: its files are damaged, or it has more or fewer tokens than the text tower.
    """
    for place in (folder.path, folder.path.parent / "tokenizer"):
        if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file():
            tokenizer = read_clip_tokenizer(place)
            if tokenizer.vocab_size != vocab_size:
                has = f"{vocab_size} tokens, its tokenizer in {place} has {tokenizer.vocab_size}"
                raise UserError(f"{folder.path / 'config.json'} gives the text tower {has}")
            return tokenizer
    return released_tokenizer(vocab_size)


# --- exporting ------------------------------------------------------------------------------


def export_hf(
    folder: Path, config: ClipConfig, trees: Trees, tokenizer: Tokenizer | None, dtype: Any = np.float32
) -> None:
    """Writes a folder that transformers loads: CLIPModel, or CLIPTextModelWithProjection where there is no image tower.

    Args:
        folder: an empty one.
        config: the towers.
        trees: parameters.
        tokenizer: of the captions, written too; None leaves it out.
        dtype: of the file's tensors.

    Raises:
        UserError: the image tower is a ResNet, or the tokenizer not CLIP's; transformers has no such CLIP.
    """
    text, vision = config.text, config.vision
    if isinstance(vision, ResNetConfig):
        raise UserError("transformers' CLIP has no ResNet for an image tower: export it as openai_clip or open_clip")
    if tokenizer is not None and not isinstance(tokenizer, ClipTokenizer):
        raise UserError("transformers' CLIP reads the captions of a CLIP tokenizer alone, and this one has another")
    described = hf_text_config(text, config.embed_dim, tokenizer)
    rules, whole = hf_text_rules(text), described
    if vision is not None:
        rules += [*hf_vision_rules(vision), *leaf("logit_scale", "logit_scale")]
        whole = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": INITIAL_LOG_SCALE,
            "text_config": described,
            "vision_config": hf_vision_config(vision, config.embed_dim),
        }
        pictures = hf_image_processor(vision.image_size, config.image_mean, config.image_std)
        write_json(folder / _PROCESSOR, pictures)
    write_json(folder / "config.json", whole)
    if tokenizer is not None:
        write_clip_tokenizer(folder, tokenizer, text.context_length)
    write_safetensors(folder / "model.safetensors", shapes(rules, trees.params), empty(rules, trees.params), dtype)
