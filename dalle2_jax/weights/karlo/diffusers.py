"""Karlo v1-alpha in diffusers folders. (`original` reads the files in which Karlo was first released.)

UnCLIPPipeline has no image tower and UnCLIPImageVariationPipeline has no prior; both have decoder and upsampler.
The decoder consists of a U-Net and of ``text_proj``, which projects CLIP's embeddings to the U-Net's conditioning. The
upsampler takes its last sampling step with ``super_res_last`` and all others with ``super_res_first``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.weights.clip import transformers
from dalle2_jax.weights.clip.transformers_config import TEXT_DEFAULTS
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.config_files import DIFFUSERS, Known, Section, named
from dalle2_jax.weights.karlo import diffusers_unet
from dalle2_jax.weights.karlo.priors import DEFAULTS as PRIOR_DEFAULTS
from dalle2_jax.weights.karlo.priors import prior_component
from dalle2_jax.weights.karlo.scheduler import read_scheduler
from dalle2_jax.weights.rules import Layout, Rule, dense, leaf, norm, single, under
from dalle2_jax.weights.tensors import Tensor, add_prefix

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")

CONDITIONING = {
    "prior": {"drop_text": 0.2, "whiten": True},
    "decoder": {"drop_text": 0.3, "drop_image": 0.1, "empty_caption": True},
}
"""Dropout of the conditioning in Karlo's training, where the empty caption replaces a dropped one."""

SAMPLING = {"decoder": {"steps": 25, "guidance": 8.0}, "upsampler_1": {"steps": 7}}
"""Default sampling settings of the pipelines."""


_TEXT_PROJ_FIELDS = DIFFUSERS | Known(
    ("clip_extra_context_tokens", "clip_embeddings_dim", "time_embed_dim", "cross_attention_dim")
)

_THEIRS = {
    # our field of a U-Net: its name in diffusers' files, if it differs
    **{"image_size": "sample_size", "channels": "block_out_channels", "channel_mult": "block_out_channels"},
    **{"num_res_blocks": "layers_per_block", "norm_groups": "norm_num_groups", "emb_dim": "time_embedding_dim"},
    "scale_shift": "resnet_time_scale_shift",
}


# --- tables ---------------------------------------------------------------------------------

DIFFUSERS_NAMES = {
    "null_image_emb": "learned_classifier_free_guidance_embeddings",
    "image_emb_proj": "clip_image_embeddings_project_to_time_embeddings",
    "image_token_proj": "clip_extra_context_tokens_proj",
    "text_emb_proj": "embedding_proj",
    "text_seq_proj": "encoder_hidden_states_proj",
    "text_seq_norm": "text_encoder_hidden_states_norm",
}
"""Parameters of the decoder's conditioning: our names, and those of diffusers' ``text_proj``."""


def conditioning_rules(config: DecoderConfig, names: Mapping[str, str]) -> list[Rule]:
    """Returns the table of the decoder's conditioning; ``names`` maps our names to those of the checkpoint."""
    count = config.image_tokens
    return [
        *leaf("null_image_emb", names["null_image_emb"]),
        *dense("image_emb_proj", names["image_emb_proj"]),
        *leaf("image_token_proj/kernel", f"{names['image_token_proj']}.weight", _tokens(count)),
        *leaf("image_token_proj/bias", f"{names['image_token_proj']}.bias", _tokens(count)),
        *dense("text_emb_proj", names["text_emb_proj"]),
        *dense("text_seq_proj", names["text_seq_proj"]),
        *norm("text_seq_norm", names["text_seq_norm"]),
    ]


def _tokens(count: int) -> Layout:
    """Returns the layout of the image tokens' projection: [Dc * count, E] <-> [E, count, Dc]; a bias has no E.

    Channel c of token k is row c * count + k.
    """
    return single(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).T,
        lambda x: x.T.reshape(-1, *x.shape[:-2]),
    )


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """Returns the table of the decoder, with the prefixes ``decoder.`` and ``text_proj.`` of its two components."""
    unet = diffusers_unet.unet_rules(config.unet, "decoder.")
    return [*under("unet", "", unet), *under("", "text_proj.", conditioning_rules(config, DIFFUSERS_NAMES))]


# --- diffusers' folders ---------------------------------------------------------------------


def detect(source: Source) -> list[Component]:
    """Returns the components in a folder of an UnCLIP pipeline; [] for anything else.

    Raises:
        WeightsError: a file is missing, or an architecture is not supported.
    """
    index = source.section("model_index.json") if source.path.is_dir() else None
    if index is None or index.optional_string("_class_name") not in PIPELINES:
        return []
    _check_folders(source, index)
    parts = [
        part for name in ("text", "image") for part in transformers.detect(Source(source.path / f"{name}_encoder"))
    ]
    if not parts or "text" not in parts[0].config:
        path = source.path / "text_encoder"
        raise WeightsError(f"{path} is not a CLIPTextModelWithProjection", path)
    clip = _config(source, "text_encoder")
    if (source.path / "prior").is_dir():
        prior = prior_component(source, "prior_scheduler", "Karlo prior", parts[0].config["text"]["vocab_size"])
        _check_prior(_config(source, "prior"), clip)
        conditioning = CONDITIONING["prior"] | prior.config["conditioning"]
        parts.append(dataclasses.replace(prior, config={**prior.config, "conditioning": conditioning}))
    return [*parts, _decoder(source, clip), _upsampler(source)]


def _check_folders(source: Source, index: Section) -> None:
    """Raises WeightsError if the folder of a component that the pipeline's index lists is missing."""
    invalid = [name for name in index.content if name in (".", "..") or "/" in name or "\0" in name]
    if invalid:
        raise index.error(invalid[0], "is not the name of a component")
    needed = [name for name in index.content if not name.startswith("_")]
    needed = {*needed, "text_encoder", "decoder", "text_proj", "super_res_first"} - {"tokenizer", "feature_extractor"}
    missing = sorted(named(name) for name in needed if not (source.path / name).is_dir())
    if missing:
        raise WeightsError(f"{source.path} lacks {', '.join(missing)}: download the complete folder", source.path)


def _config(source: Source, name: str) -> Section:
    section = source.section(f"{name}/config.json")
    if section is None:
        path = source.path / name / "config.json"
        raise WeightsError(f"{path} is missing", path)
    return section


def _check_prior(prior: Section, clip: Section) -> None:
    """Raises FieldError if the prior's context length or embedding width differs from the text encoder's."""
    for name, theirs in (("num_embeddings", "max_position_embeddings"), ("embedding_dim", "projection_dim")):
        given, expected = (
            prior.positive_int(name, PRIOR_DEFAULTS[name]),
            clip.positive_int(theirs, TEXT_DEFAULTS[theirs]),
        )
        if given != expected:
            raise prior.error(name, f"{given} differs from {theirs} in {clip.file}, {expected}")


def _decoder(source: Source, clip: Section) -> Component:
    unet_file, proj_file = _config(source, "decoder"), _config(source, "text_proj")
    unet = diffusers_unet.read_unet_config(unet_file)
    proj_file.string("_class_name", ("UnCLIPTextProjModel",), "UnCLIPTextProjModel")
    proj_file.check(_TEXT_PROJ_FIELDS)
    tokens, width = (
        proj_file.positive_int("clip_extra_context_tokens", 4, 2**12),
        proj_file.positive_int("clip_embeddings_dim", 768),
    )
    embed_dim = clip.positive_int("projection_dim", TEXT_DEFAULTS["projection_dim"])
    for name, given, whose, value in (
        (
            "cross_attention_dim",
            proj_file.positive_int("cross_attention_dim"),
            "that of the U-Net",
            unet["context_dim"],
        ),
        ("time_embed_dim", proj_file.positive_int("time_embed_dim"), "that of the U-Net", UNetConfig(**unet).time_dim),
        ("clip_embeddings_dim", width, f"projection_dim in {clip.file}", embed_dim),
    ):
        if given != value:
            raise proj_file.error(name, f"{given} differs from {whose}, {value}")
    model = DecoderConfig(UNetConfig(**unet), width, tokens, "clip", text_width=width, text_emb_proj=True)
    tensors: dict[str, Tensor] = {}
    for name in ("decoder", "text_proj"):
        tensors |= add_prefix(f"{name}.", Source(source.path / name).weights("diffusion_pytorch_model"))
    projection = tensors.get("text_proj.clip_extra_context_tokens_proj.weight")
    if projection is not None and len(projection.shape) == 2:
        proj_file.check_size("clip_extra_context_tokens", tokens, projection.shape[0] // unet["context_dim"])
    text = {
        "context_length": clip.positive_int("max_position_embeddings", TEXT_DEFAULTS["max_position_embeddings"]),
        "vocab_size": clip.positive_int("vocab_size", TEXT_DEFAULTS["vocab_size"]),
    }
    return Component(
        stage="decoder",
        family="Karlo decoder",
        where=str(source.path / "decoder"),
        config=decoder_sections(unet, tokens, text, read_scheduler(source, "decoder_scheduler")),
        tensors=tensors,
        params=decoder_rules(model),
    )


def decoder_sections(
    unet: Mapping[str, Any], tokens: int, text: Mapping[str, int], scheduler: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the sections of the decoder's config; ``scheduler`` has those that `read_scheduler` returns."""
    return {
        "model": {"unet": dict(unet), "image_tokens": tokens, "text_input": "clip", "text_emb_proj": True},
        "text": dict(text),
        "conditioning": dict(CONDITIONING["decoder"]),
        "diffusion": scheduler["diffusion"],
        "sampling": {**scheduler["sampling"], **SAMPLING["decoder"]},
    }


def _upsampler(source: Source) -> Component:
    names = [name for name in ("super_res_first", "super_res_last") if (source.path / name).is_dir()]
    first, last = _config(source, names[0]), _config(source, names[-1])
    unet = diffusers_unet.read_unet_config(first)
    other = diffusers_unet.read_unet_config(last, unet["image_size"])
    if other != unet:
        field = next(name for name in unet if unet[name] != other.get(name))
        raise last.error(
            _THEIRS.get(field, field), f"differs from {first.file}: both networks must have the same shape"
        )
    low_size = _config(source, "decoder").positive_int("sample_size")
    tensors: dict[str, Tensor] = {}
    for name in names:
        weights = Source(source.path / name).weights("diffusion_pytorch_model")
        tensors |= add_prefix(f"{name}.", weights)
    rules = {name: diffusers_unet.unet_rules(UNetConfig(**unet), f"{name}.") for name in names}
    return Component(
        stage="upsampler_1",
        family="Karlo super-resolution",
        where=str(source.path / names[0]),
        config=upsampler_sections(unet, low_size, len(names) == 2, read_scheduler(source, "super_res_scheduler")),
        tensors=tensors,
        params=rules["super_res_first"],
        stats=under("last", "", rules.get("super_res_last", ())),
    )


def upsampler_sections(
    unet: Mapping[str, Any], low_size: int, last_network: bool, scheduler: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the sections of the upsampler's config; ``scheduler`` has those that `read_scheduler` returns."""
    size, stride = unet["image_size"], 2 ** (len(unet["channel_mult"]) - 1)
    crop = size // 4
    # Quarter-size crops as in the paper, unless the network downsamples more often than their side allows.
    fits = size % 4 == 0 and crop % stride == 0 and crop % max(size // low_size, 1) == 0
    return {
        "model": dict(unet),
        "conditioning": {
            "low_size": low_size,
            "last_network": last_network,
            "crop_fraction": 0.25 if fits else 1.0,
        },
        "diffusion": scheduler["diffusion"],
        "sampling": {**scheduler["sampling"], **SAMPLING["upsampler_1"]},
    }
