"""CLIP in the layout of transformers: CLIPModel, or one tower with its projection.

`detect` reads a folder, `export_hf` writes one. The towers have separate tables, because some pipelines store each
tower in its own folder (text_encoder and image_encoder).
"""

from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError, shown
from dalle2_jax.models.clip import ClipConfig, TextConfig, VisionConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.text import (
    ClipTokenizer,
    Tokenizer,
    read_clip_tokenizer,
    write_clip_tokenizer,
)
from dalle2_jax.types import Preprocessing
from dalle2_jax.weights.clip.processor import (
    PROCESSOR_FILE,
    Processor,
    processor_file,
    read_processor,
    released_processor,
)
from dalle2_jax.weights.clip.towers import (
    INITIAL_LOG_SCALE,
    patch_layout,
    released_tokenizer,
    sections,
)
from dalle2_jax.weights.clip.transformers_config import (
    check_end_token,
    hf_text_config,
    hf_vision_config,
    read_clip_config,
    read_text_config,
    read_vision_config,
    tower_section,
)
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.config_files import Section
from dalle2_jax.weights.rules import (
    Rule,
    constant,
    dense,
    leaf,
    merged_heads,
    norm,
    projections,
    shapes,
    stacked,
    to_tensors,
    under,
)
from dalle2_jax.weights.stage_writer import Trees, write_json
from dalle2_jax.weights.tensors import write_safetensors

IGNORED = (r"(text_model|vision_model)\.embeddings\.position_ids",)
"""Constants 0, 1, 2, ... in older files."""

_STEMS = ("model", "pytorch_model")
_TOWERS = ("text_model.", "vision_model.")


# --- tables ---------------------------------------------------------------------------------


def hf_text_rules(text: TextConfig) -> list[Rule]:
    """Returns the table of CLIPTextModelWithProjection, for the leaves under ``text``."""
    tower = [
        *leaf("token_embedding/embedding", "embeddings.token_embedding.weight"),
        *leaf("positional_embedding", "embeddings.position_embedding.weight"),
        *_blocks(text.layers, text.heads),
        *norm("ln_final", "final_layer_norm"),
    ]
    return [*under("text", "text_model.", tower), *dense("text/proj", "text_projection", bias=False)]


def hf_vision_rules(vision: VisionConfig) -> list[Rule]:
    """Returns the table of CLIPVisionModelWithProjection, for the leaves under ``visual``."""
    tower = [
        *leaf("patch_embed/kernel", "embeddings.patch_embedding.weight", patch_layout(vision.patch_size)),
        *leaf("class_embedding", "embeddings.class_embedding"),
        *leaf("positional_embedding", "embeddings.position_embedding.weight"),
        *norm("ln_pre", "pre_layrnorm"),  # spelled so in transformers
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


# --- detection ----------------------------------------------------------------------------


def detect(source: Source) -> list[Component]:
    """Returns the CLIP, or the tower of one, in a folder or file of transformers; [] for anything else.

    A file is detected by its keys and read with the config.json in its folder.

    Raises:
        WeightsError: it is a CLIP, but its config or tokenizer is damaged or not supported.
    """
    folder = source if source.path.is_dir() else Source(source.path.parent)
    if folder is not source and not any(key.startswith(_TOWERS) for key in source.tensors):
        return []
    config = folder.section("config.json")
    kind = config.optional_string("model_type") if config else None
    known = {"clip": _both, "clip_text_model": _text, "clip_vision_model": _vision}
    if config is not None and kind in known:
        return [known[kind](folder, Source(source.path, source.tensors or folder.weights(*_STEMS)), config)]
    if folder is source:
        return []
    if config is None:
        what = f"{source.path} is a CLIP of transformers, but there is no config.json in its folder"
        raise WeightsError(what, source.path)
    raise config.error("model_type", f"{shown(kind)} is not supported: it must be one of {', '.join(known)}")


def _both(folder: Source, weights: Source, config: Section) -> Component:
    text, vision, embed_dim = read_clip_config(config, weights.tensors)
    tokenizer = _tokenizer(folder, text.vocab_size)
    check_end_token(tower_section(config, "text_config"), tokenizer)
    return Component(
        "clip",
        "CLIP (transformers)",
        str(weights.path),
        sections(embed_dim, text, vision, _processor(folder, vision.image_size)),
        weights.tensors,
        [*hf_text_rules(text), *hf_vision_rules(vision), *leaf("logit_scale", "logit_scale")],
        ignored=IGNORED,
        tokenizer=tokenizer,
    )


def _text(folder: Source, weights: Source, config: Section) -> Component:
    text, embed_dim = read_text_config(config, weights.tensors)
    tokenizer = _tokenizer(folder, text.vocab_size)
    check_end_token(config, tokenizer)
    return Component(
        "clip",
        "CLIP text encoder (transformers)",
        str(weights.path),
        sections(embed_dim, text, None),
        weights.tensors,
        [*hf_text_rules(text), *constant("logit_scale", INITIAL_LOG_SCALE)],
        ignored=IGNORED,
        tokenizer=tokenizer,
    )


def _vision(folder: Source, weights: Source, config: Section) -> Component:
    vision, embed_dim = read_vision_config(config, weights.tensors)
    return Component(
        "clip",
        "CLIP image encoder (transformers)",
        str(weights.path),
        sections(embed_dim, None, vision, _processor(folder, vision.image_size)),
        weights.tensors,
        hf_vision_rules(vision),
        ignored=IGNORED,
        completed_by="the text encoder",
    )


def _processor(folder: Source, side: int) -> Processor:
    """Returns the preprocessing in the folder or in a sibling folder; by default that of the released CLIPs."""
    siblings = (folder.path.parent / name for name in ("feature_extractor", "image_processor"))
    for place in (folder.path, *siblings):
        section = Source(place).section(PROCESSOR_FILE)
        if section is not None:
            return read_processor(section, side)
    return released_processor(side, "floor")


def _tokenizer(folder: Source, vocab_size: int) -> ClipTokenizer | None:
    """Returns the tokenizer in the folder or in its sibling ``tokenizer``; by default OpenAI's.

    Raises:
        WeightsError: it is damaged, or its vocabulary size is not that of the text tower.
    """
    for place in (folder.path, folder.path.parent / "tokenizer"):
        if (place / "vocab.json").is_file() or (place / "tokenizer.json").is_file():
            tokenizer = read_clip_tokenizer(place)
            if tokenizer.vocab_size != vocab_size:
                what = f"has vocab_size {vocab_size}, the tokenizer in {place} has {tokenizer.vocab_size} tokens"
                raise WeightsError(f"{folder.path / 'config.json'} {what}", place)
            return tokenizer
    return released_tokenizer(vocab_size)


# --- exporting ------------------------------------------------------------------------------


def export_hf(
    folder: Path,
    config: ClipConfig,
    trees: Trees,
    tokenizer: Tokenizer | None,
    dtype: Any = np.float32,
    preprocessing: Preprocessing | None = None,
) -> None:
    """Writes a folder that transformers loads: CLIPModel, or CLIPTextModelWithProjection without an image tower.

    Args:
        folder: an empty folder.
        config: the towers.
        trees: parameters.
        tokenizer: the tokenizer to write; None for none.
        dtype: dtype of the tensors in the file.
        preprocessing: preprocessing of images; None for the default of `Preprocessing`.

    Raises:
        WeightsError: the image tower is a ResNet, or the tokenizer is not a CLIP tokenizer.
    """
    text, vision = config.text, config.vision
    if isinstance(vision, ResNetConfig):
        raise WeightsError(
            "transformers has no CLIP with a ResNet as image tower: export it as openai_clip or open_clip"
        )
    if tokenizer is not None and not isinstance(tokenizer, ClipTokenizer):
        raise WeightsError(
            "transformers requires a CLIP tokenizer, which this CLIP lacks: train one with text.kind clip"
        )
    text_config = hf_text_config(text, config.embed_dim, tokenizer)
    rules, content = hf_text_rules(text), text_config
    if vision is not None:
        rules += [*hf_vision_rules(vision), *leaf("logit_scale", "logit_scale")]
        content = {
            "architectures": ["CLIPModel"],
            "model_type": "clip",
            "projection_dim": config.embed_dim,
            "logit_scale_init_value": INITIAL_LOG_SCALE,
            "text_config": text_config,
            "vision_config": hf_vision_config(vision, config.embed_dim),
        }
        how = preprocessing or Preprocessing()
        images = processor_file(how, vision.image_size, config.image_mean, config.image_std)
        write_json(folder / PROCESSOR_FILE, images)
    write_json(folder / "config.json", content)
    if tokenizer is not None:
        write_clip_tokenizer(folder, tokenizer, text.context_length)
    write_safetensors(folder / "model.safetensors", shapes(rules, trees.params), to_tensors(rules, trees.params), dtype)
