"""A system of ours as diffusers' folder: UnCLIPPipeline, and with an image tower UnCLIPImageVariationPipeline too.

Diffusers' last version with these pipelines is 0.33.1 (with transformers 4.46.3). What they can say is less than what
a system can be: the prior and the decoder read CLIP's states of the caption and, in place of an absent one, of the
empty caption; CLIP's embeddings are raw; there is one upsampler. Whatever else a stage is, is named in one line.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.prior import PriorConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import ClipTokenizer, Tokenizer, write_clip_tokenizer
from dalle2_jax.types import Params, UserError
from dalle2_jax.weights.clip_hf import hf_text_rules, hf_vision_rules
from dalle2_jax.weights.clip_hf_config import hf_image_processor, hf_text_config, hf_vision_config
from dalle2_jax.weights.diffusers_unet import unet_config_file, unet_rules
from dalle2_jax.weights.karlo import TEXT_PROJ, told_rules
from dalle2_jax.weights.landing import Trees, write_json
from dalle2_jax.weights.priors import prior_config_file, prior_rules, prior_stats
from dalle2_jax.weights.rules import Rule, empty, shapes
from dalle2_jax.weights.tensors import write_safetensors
from dalle2_jax.weights.unclip_scheduler import scheduler_file

VERSION = "0.33.1"
"""Of diffusers, whose form this is."""

VARIATIONS = "image_variations"
"""The folder, beside the components, of the second pipeline."""

_MODEL, _DIFFUSERS_MODEL = "model.safetensors", "diffusion_pytorch_model.safetensors"


class Trained(NamedTuple):
    """A stage on its way out: its config as stored, its network's shape, its averaged weights, its tokenizer."""

    config: Mapping[str, Any]
    model: ClipConfig | PriorConfig | DecoderConfig | UNetConfig
    trees: Trees
    tokenizer: Tokenizer | None


def export_diffusers(folder: Path, stages: Mapping[str, Trained], dtype: Any = np.float32) -> None:
    """Writes the stages of a system into an empty folder, as diffusers loads them.

    It is an UnCLIPPipeline where there is a prior. Where CLIP has an image tower, the same components are an
    UnCLIPImageVariationPipeline, in ``image_variations`` within, or by themselves where there is no prior. CLIP's
    temperature, of which neither makes use, has no place there.

    Args:
        folder: where to.
        stages: clip, decoder, upsampler_1 and, for text to image, prior.
        dtype: of the files' tensors.

    Raises:
        UserError: the stages are not such a system; nothing is written then.
    """
    _check(stages)
    clip, decoder, upsampler = (stages[name] for name in ("clip", "decoder", "upsampler_1"))
    components = {
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", _text_encoder(clip)),
        "tokenizer": ("transformers", "CLIPTokenizer", _tokenizer(clip)),
        "text_proj": ("unclip", "UnCLIPTextProjModel", _text_proj(decoder)),
        "decoder": _unet(decoder, decoder.model.unet, decoder.trees.params["unet"]),
        "decoder_scheduler": _scheduler(decoder, "decoder"),
        "super_res_first": _unet(upsampler, upsampler.model, upsampler.trees.params),
        "super_res_last": _unet(upsampler, upsampler.model, _last(upsampler)),
        "super_res_scheduler": _scheduler(upsampler, "upsampler_1"),
    }
    text, pictures = {}, {}
    if "prior" in stages:
        prior = ("diffusers", "PriorTransformer", _prior(stages["prior"]))
        text = {"prior": prior, "prior_scheduler": _scheduler(stages["prior"], "prior")}
    if clip.model.vision is not None:
        pictures = {
            "image_encoder": ("transformers", "CLIPVisionModelWithProjection", _image_encoder(clip)),
            "feature_extractor": ("transformers", "CLIPImageProcessor", _processor(clip)),
        }
    for name, (_, _, write) in {**components, **text, **pictures}.items():
        (folder / name).mkdir()
        write(folder / name, dtype)
    if text:
        _write_index(folder, "UnCLIPPipeline", {**components, **text})
    if pictures:
        inner = folder / VARIATIONS if text else folder
        if text:
            _link(folder, inner, [*components, *pictures])
        _write_index(inner, "UnCLIPImageVariationPipeline", {**components, **pictures})


Write = Callable[[Path, Any], None]
"""Writes a component into its folder, its tensors of a dtype."""


def _write_index(folder: Path, pipeline: str, components: Mapping[str, tuple[str, str, Write]]) -> None:
    parts = {name: [library, kind] for name, (library, kind, _) in sorted(components.items())}
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": VERSION, **parts})


def _link(folder: Path, inner: Path, names: Iterable[str]) -> None:
    """The same files in another folder, without their size where the disk allows it."""
    for name in names:
        (inner / name).mkdir(parents=True)
        for file in (folder / name).iterdir():
            try:
                os.link(file, inner / name / file.name)
            except OSError:
                shutil.copyfile(file, inner / name / file.name)


# --- components -----------------------------------------------------------------------------


def _written(file: str, config: Mapping[str, Any], *parts: tuple[Sequence[Rule], Params]) -> Write:
    """Writes config.json, and the tensors of some trees under their tables."""

    def write(folder: Path, dtype: Any) -> None:
        sizes = {key: shape for rules, tree in parts for key, shape in shapes(rules, tree).items()}
        tensors = itertools.chain.from_iterable(empty(rules, tree) for rules, tree in parts)
        write_json(folder / "config.json", config)
        write_safetensors(folder / file, sizes, tensors, dtype)

    return write


def _text_encoder(clip: Trained) -> Write:
    config = hf_text_config(clip.model.text, clip.model.embed_dim, clip.tokenizer)
    return _written(_MODEL, config, (hf_text_rules(clip.model.text), clip.trees.params))


def _image_encoder(clip: Trained) -> Write:
    config = hf_vision_config(clip.model.vision, clip.model.embed_dim)
    return _written(_MODEL, config, (hf_vision_rules(clip.model.vision), clip.trees.params))


def _processor(clip: Trained) -> Write:
    config = hf_image_processor(clip.model.vision.image_size, clip.model.image_mean, clip.model.image_std)
    return lambda folder, dtype: write_json(folder / "preprocessor_config.json", config)


def _tokenizer(clip: Trained) -> Write:
    length = clip.model.text.context_length
    return lambda folder, dtype: write_clip_tokenizer(folder, clip.tokenizer, length)


def _scheduler(stage: Trained, name: str) -> tuple[str, str, Write]:
    config = {"_diffusers_version": VERSION, **scheduler_file(stage.config, f"stage {name}")}
    return "diffusers", "UnCLIPScheduler", lambda folder, dtype: write_json(folder / "scheduler_config.json", config)


def _prior(prior: Trained) -> Write:
    stats = prior.trees.stats
    if not prior.config["conditioning"].get("whiten", False):  # a space that is white already
        dim = prior.model.embed_dim
        stats = {"mean": np.zeros(dim, np.float32), "std": np.ones(dim, np.float32)}
    config = {"_diffusers_version": VERSION, **prior_config_file(prior.model)}
    tables = (prior_rules(prior.model), prior.trees.params), (prior_stats(), stats)
    return _written(_DIFFUSERS_MODEL, config, *tables)


def _text_proj(decoder: Trained) -> Write:
    model = decoder.model
    config = {
        "_class_name": "UnCLIPTextProjModel",
        "_diffusers_version": VERSION,
        "clip_embeddings_dim": model.image_emb_dim,
        "clip_extra_context_tokens": model.image_tokens,
        "cross_attention_dim": model.unet.context_dim,
        "time_embed_dim": model.unet.time_dim,
    }
    return _written(_DIFFUSERS_MODEL, config, (told_rules(model, TEXT_PROJ), decoder.trees.params))


def _unet(stage: Trained, unet: UNetConfig, params: Params) -> tuple[str, str, Write]:
    config = {"_diffusers_version": VERSION, **unet_config_file(unet, f"stage {stage.config['stage']}")}
    return "diffusers", config["_class_name"], _written(_DIFFUSERS_MODEL, config, (unet_rules(unet), params))


def _last(upsampler: Trained) -> Params:
    """The network of the last step: the same as of the others, where there is no second one."""
    return upsampler.trees.stats.get("last", upsampler.trees.params)


# --- what fits ------------------------------------------------------------------------------


def _check(stages: Mapping[str, Trained]) -> None:
    missing = [name for name in ("clip", "decoder", "upsampler_1") if name not in stages]
    if missing:
        raise UserError(f"unCLIP's pipelines need stage {', '.join(missing)}, which this system lacks")
    if "prior" not in stages and stages["clip"].model.vision is None:
        raise UserError("this system has neither a prior nor an image tower: no pipeline of unCLIP's is like that")
    for name, check in (("clip", _check_clip), ("prior", _check_prior), ("decoder", _check_decoder)):
        if name in stages:
            _refuse(name, check(stages[name]))
    _refuse("upsampler_1", _check_upsampler(stages["upsampler_1"], stages["decoder"].model.unet.image_size))
    unknown = sorted(set(stages) - {"clip", "prior", "decoder", "upsampler_1"})
    if unknown:
        raise UserError(f"unCLIP's pipelines have no stage {', '.join(unknown)}: export a system without it")


def _refuse(name: str, wrongs: Mapping[str, Any]) -> None:
    """Raises UserError for the first feature that does not fit, if any is not False."""
    for feature, wrong in wrongs.items():
        if wrong:
            raise UserError(f"stage {name} does not fit unCLIP's pipelines: {feature}")


def _check_clip(clip: Trained) -> dict[str, Any]:
    embedding = {"normalisation": "unit", "scale": 17.2, **clip.config.get("embedding", {})}
    return {
        "they take CLIP's embeddings raw, scaled by 1": embedding != {"normalisation": "raw", "scale": 1.0},
        "its image tower is a ResNet": isinstance(clip.model.vision, ResNetConfig),
        "its tokenizer is not CLIP's": not isinstance(clip.tokenizer, ClipTokenizer),
        "its states are not as wide as its embeddings": clip.model.text.width != clip.model.embed_dim,
    }


def _check_prior(prior: Trained) -> dict[str, Any]:
    model = prior.model
    if not isinstance(model, PriorConfig):
        return {"it is a prior of another architecture": True}
    return {
        "it reads tokens, not CLIP's states": model.text_input != "clip",
        "an absent caption is a learned embedding, not the empty caption": model.learned_null,
        f"activation {model.activation}, not gelu": model.activation != "gelu",
        "it has no final norm": not model.final_norm,
        "it has no time token": not model.time_token,
    }


def _check_decoder(decoder: Trained) -> dict[str, Any]:
    model, conditioning = decoder.model, decoder.config.get("conditioning", {})
    return {
        "it reads no image embedding": model.image_emb_dim is None or not model.image_tokens,
        "it does not read CLIP's states": model.text_input != "clip",
        "it does not read CLIP's text embedding (text_emb_proj)": not model.text_emb_proj,
        "an absent caption is hidden, not the empty caption": not conditioning.get("empty_caption", False),
        "it is an inpainting network": conditioning.get("inpaint", False),
        "its variance is not learned_range": decoder.config["diffusion"].get("variance") != "learned_range",
        "it has no attention": model.unet.context_dim is None,
    }


def _check_upsampler(upsampler: Trained, low_size: int) -> dict[str, Any]:
    model, conditioning = upsampler.model, upsampler.config.get("conditioning", {})
    return {
        "it is told a caption or a class": not isinstance(model, UNetConfig),
        "it is an inpainting network": conditioning.get("inpaint", False),
        "small pictures are enlarged linearly": conditioning.get("upscale", "cubic") != "cubic",
        f"it enlarges other pictures than the decoder's, {low_size} wide": conditioning["low_size"] != low_size,
        "its variance is learned": upsampler.config["diffusion"].get("variance", "fixed_small") != "fixed_small",
    }
