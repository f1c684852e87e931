"""Karlo v1-alpha in diffusers' folders: the whole of unCLIP. (``karlo_files`` are the files it was published in.)

UnCLIPPipeline comes without the image tower and UnCLIPImageVariationPipeline without the prior; decoder and upsampler
are in both. The decoder is two components: a U-Net, and ``text_proj``, which makes of CLIP's embeddings what the U-Net
is told. ``super_res_first`` takes all steps of the upsampler but the last, ``super_res_last`` that one.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights import clip_hf, diffusers_unet
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.priors import prior_component
from dalle2_jax.weights.rules import Layout, Rule, dense, leaf, norm, one, under
from dalle2_jax.weights.tensors import Tensor, prefixed
from dalle2_jax.weights.unclip_scheduler import read_scheduler

PIPELINES = ("UnCLIPPipeline", "UnCLIPImageVariationPipeline")

CONDITIONING = {
    "prior": {"drop_text": 0.2, "whiten": True},
    "decoder": {"drop_text": 0.3, "drop_image": 0.1, "empty_caption": True},
}
"""How often Karlo dropped what in training, and in what place of the caption the empty one stands."""

SAMPLING = {"decoder": {"steps": 25, "guidance": 8.0}, "upsampler_1": {"steps": 7}}
"""How the pipelines sample, unless they are told otherwise."""


# --- tables ---------------------------------------------------------------------------------

TEXT_PROJ = {
    "null_image_emb": "learned_classifier_free_guidance_embeddings",
    "image_emb_proj": "clip_image_embeddings_project_to_time_embeddings",
    "image_token_proj": "clip_extra_context_tokens_proj",
    "text_emb_proj": "embedding_proj",
    "text_seq_proj": "encoder_hidden_states_proj",
    "text_seq_norm": "text_encoder_hidden_states_norm",
}
"""Our names of what is made of CLIP's embeddings, and those of diffusers' ``text_proj``."""


def told_rules(config: DecoderConfig, names: Mapping[str, str]) -> list[Rule]:
    """The table of what is made of CLIP's embeddings; ``names`` are `TEXT_PROJ` or Karlo's own."""
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
    """Channel c of token k is row c * count + k: [Dc * count, E] <-> [E, count, Dc]; a bias has no E."""
    return one(
        lambda x: x.reshape(x.shape[0] // count, count, *x.shape[1:]).T,
        lambda x: x.T.reshape(-1, *x.shape[:-2]),
    )


def decoder_rules(config: DecoderConfig) -> list[Rule]:
    """The table of the decoder in diffusers' folders: ``decoder.`` and ``text_proj.`` before the keys of each."""
    unet = diffusers_unet.unet_rules(config.unet, "decoder.")
    return [*under("unet", "", unet), *under("", "text_proj.", told_rules(config, TEXT_PROJ))]


# --- diffusers' folders ---------------------------------------------------------------------


def recognise(source: Source) -> list[Component]:
    """Returns what a folder of UnCLIP's pipelines holds; [] for something else.

    Raises:
        UserError: it is one, and lacks a file, or has what no network here has.
    """
    if not source.path.is_dir() or (source.json("model_index.json") or {}).get("_class_name") not in PIPELINES:
        return []
    _check_folders(source)
    parts = [part for name in ("text", "image") for part in clip_hf.recognise(Source(source.path / f"{name}_encoder"))]
    if not parts or "text" not in parts[0].config:
        raise UserError(f"{source.path / 'text_encoder'} is not a CLIPTextModelWithProjection")
    if (source.path / "prior").is_dir():
        prior = prior_component(source, "prior_scheduler", "Karlo prior", parts[0].config["text"]["vocab_size"])
        conditioning = CONDITIONING["prior"] | prior.config["conditioning"]
        parts.append(dataclasses.replace(prior, config={**prior.config, "conditioning": conditioning}))
    return [*parts, _decoder(source, parts[0].config["text"]), _upsampler(source)]


def _check_folders(source: Source) -> None:
    needed = [name for name in (source.json("model_index.json") or {}) if not name.startswith("_")]
    needed = {*needed, "text_encoder", "decoder", "text_proj", "super_res_first"}
    optional = {"tokenizer", "feature_extractor", *(name for name in needed if name.endswith("scheduler"))}
    missing = sorted(name for name in needed - optional if not (source.path / name).is_dir())
    if missing:
        raise UserError(f"{source.path} lacks {', '.join(missing)}: get the whole folder")


def _config(source: Source, name: str) -> tuple[dict[str, Any], str]:
    where = str(source.path / name / "config.json")
    config = source.json(f"{name}/config.json")
    if config is None:
        raise UserError(f"{where} is missing")
    return config, where


def _decoder(source: Source, text: Mapping[str, int]) -> Component:
    unet_file, where = _config(source, "decoder")
    told_file, told_where = _config(source, "text_proj")
    unet = diffusers_unet.read_unet_config(unet_file, where)
    tokens, width = told_file.get("clip_extra_context_tokens", 4), told_file.get("clip_embeddings_dim", 768)
    expected = {"cross_attention_dim": unet["context_dim"], "time_embed_dim": UNetConfig(**unet).time_dim}
    for name, value in expected.items():
        if told_file.get(name) != value:
            raise UserError(f"{told_where}: {name} {told_file.get(name)!r} is not the U-Net's, {value}")
    model = DecoderConfig(UNetConfig(**unet), width, tokens, "clip", text_width=width, text_emb_proj=True)
    tensors: dict[str, Tensor] = {}
    for name in ("decoder", "text_proj"):
        tensors |= prefixed(f"{name}.", Source(source.path / name).weights("diffusion_pytorch_model"))
    return Component(
        stage="decoder",
        family="Karlo decoder",
        where=str(source.path / "decoder"),
        config=decoder_sections(unet, tokens, text, read_scheduler(source, "decoder_scheduler")),
        tensors=tensors,
        params=decoder_rules(model),
    )


def decoder_sections(
    unet: Mapping[str, Any], tokens: int, text: Mapping[str, int], said: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the sections of the decoder's config; ``said`` are those of its scheduler."""
    return {
        "model": {"unet": dict(unet), "image_tokens": tokens, "text_input": "clip", "text_emb_proj": True},
        "text": dict(text),
        "conditioning": dict(CONDITIONING["decoder"]),
        "diffusion": said["diffusion"],
        "sampling": {**said["sampling"], **SAMPLING["decoder"]},
    }


def _upsampler(source: Source) -> Component:
    names = [name for name in ("super_res_first", "super_res_last") if (source.path / name).is_dir()]
    first, last = _config(source, names[0]), _config(source, names[-1])
    unet = diffusers_unet.read_unet_config(*first)
    if diffusers_unet.read_unet_config(*last, unet["image_size"]) != unet:
        raise UserError(f"{last[1]}: the two super-resolution networks differ in shape, which is not supported")
    low_size = _config(source, "decoder")[0]["sample_size"]
    tensors: dict[str, Tensor] = {}
    for name in names:
        weights = Source(source.path / name).weights("diffusion_pytorch_model")
        tensors |= prefixed(f"{name}.", weights)
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
    unet: Mapping[str, Any], low_size: int, last_network: bool, said: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Returns the sections of the upsampler's config; ``said`` are those of its scheduler."""
    size, stride = unet["image_size"], 2 ** (len(unet["channel_mult"]) - 1)
    crop = size // 4
    # Quarter-size crops, as in the paper, unless the network halves a picture more often than they allow.
    fits = size % 4 == 0 and crop % stride == 0 and crop % max(size // low_size, 1) == 0
    return {
        "model": dict(unet),
        "conditioning": {
            "low_size": low_size,
            "last_network": last_network,
            "crop_fraction": 0.25 if fits else 1.0,
        },
        "diffusion": said["diffusion"],
        "sampling": {**said["sampling"], **SAMPLING["upsampler_1"]},
    }
