"""Exports a system as a diffusers UnCLIPPipeline, and as an UnCLIPImageVariationPipeline if CLIP has an image tower.

The last version of diffusers with these pipelines is 0.33.1 (with transformers 4.46.3). They support one architecture:

- CLIP: vision transformer, raw embeddings (scale 1), text states as wide as the embeddings, CLIP's tokenizer.
- Prior: diffusion prior that reads CLIP's text states; the empty caption replaces a dropped one.
- Decoder: reads image embeddings, CLIP's text states and its text embedding; learned-range variance; the empty caption
  replaces a dropped one.
- One upsampler: a U-Net that reads a bicubically enlarged image; fixed variance.
- Noise schedules: cosine; x_0 or eps prediction.

Any other property of a stage is an error that names the stage and the property.
"""

import itertools
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.text import ClipTokenizer, Tokenizer, write_clip_tokenizer
from dalle2_jax.types import Params
from dalle2_jax.weights.clip.processor import PROCESSOR_FILE, processor_file
from dalle2_jax.weights.clip.transformers import hf_text_rules, hf_vision_rules
from dalle2_jax.weights.clip.transformers_config import hf_text_config, hf_vision_config
from dalle2_jax.weights.karlo.diffusers import DIFFUSERS_NAMES, conditioning_rules
from dalle2_jax.weights.karlo.diffusers_unet import unet_config_file, unet_rules
from dalle2_jax.weights.karlo.priors import prior_config_file, prior_rules, prior_stats
from dalle2_jax.weights.karlo.scheduler import scheduler_file
from dalle2_jax.weights.rules import Rule, shapes, to_tensors
from dalle2_jax.weights.stage_writer import Trees, write_json
from dalle2_jax.weights.tensors import write_safetensors

VERSION = "0.33.1"
"""Version of diffusers whose layout is written."""

VARIATIONS = "image_variations"
"""Subfolder of the UnCLIPImageVariationPipeline."""

_MODEL, _DIFFUSERS_MODEL = "model.safetensors", "diffusion_pytorch_model.safetensors"


class TrainedStage(NamedTuple):
    """A stage to export.

    Attributes:
        stage: a `ClipStage`, `PriorStage`, `DecoderStage` or `UpsamplerStage`, by its name in the system.
        trees: its averaged weights and its statistics.
        tokenizer: its tokenizer, if it has one.
    """

    stage: Any
    trees: Trees
    tokenizer: Tokenizer | None


def export_diffusers(folder: Path, stages: Mapping[str, TrainedStage], dtype: Any = np.float32) -> None:
    """Writes the stages of a system into an empty folder, as diffusers loads them.

    A system with a prior becomes an UnCLIPPipeline. If CLIP has an image tower, the same components also become an
    UnCLIPImageVariationPipeline: in the subfolder ``image_variations``, or in the folder itself without a prior.
    CLIP's temperature is omitted: neither pipeline uses it.

    Args:
        folder: the folder.
        stages: clip, decoder, upsampler_1 and, for an UnCLIPPipeline, prior.
        dtype: dtype of the tensors in the files.

    Raises:
        WeightsError: the pipelines do not support the stages; nothing is written.
    """
    _check(stages)
    clip, decoder, upsampler = (stages[name] for name in ("clip", "decoder", "upsampler_1"))
    components = {
        "text_encoder": ("transformers", "CLIPTextModelWithProjection", _text_encoder(clip)),
        "tokenizer": ("transformers", "CLIPTokenizer", _tokenizer(clip)),
        "text_proj": ("unclip", "UnCLIPTextProjModel", _text_proj(decoder)),
        "decoder": _unet(decoder, decoder.stage.model.unet, decoder.trees.params["unet"]),
        "decoder_scheduler": _scheduler(decoder, "decoder"),
        "super_res_first": _unet(upsampler, upsampler.stage.model, upsampler.trees.params),
        "super_res_last": _unet(upsampler, upsampler.stage.model, _last(upsampler)),
        "super_res_scheduler": _scheduler(upsampler, "upsampler_1"),
    }
    text, image = {}, {}
    if "prior" in stages:
        prior = ("diffusers", "PriorTransformer", _prior(stages["prior"]))
        text = {"prior": prior, "prior_scheduler": _scheduler(stages["prior"], "prior")}
    if clip.stage.model.vision is not None:
        image = {
            "image_encoder": ("transformers", "CLIPVisionModelWithProjection", _image_encoder(clip)),
            "feature_extractor": ("transformers", "CLIPImageProcessor", _processor(clip)),
        }
    for name, (_, _, write) in {**components, **text, **image}.items():
        (folder / name).mkdir()
        write(folder / name, dtype)
    if text:
        _write_index(folder, "UnCLIPPipeline", {**components, **text})
    if image:
        inner = folder / VARIATIONS if text else folder
        if text:
            _link(folder, inner, [*components, *image])
        _write_index(inner, "UnCLIPImageVariationPipeline", {**components, **image})


Write = Callable[[Path, Any], None]
"""Writes a component into a folder, with tensors of a dtype."""


def _write_index(folder: Path, pipeline: str, components: Mapping[str, tuple[str, str, Write]]) -> None:
    parts = {name: [library, kind] for name, (library, kind, _) in sorted(components.items())}
    write_json(folder / "model_index.json", {"_class_name": pipeline, "_diffusers_version": VERSION, **parts})


def _link(folder: Path, inner: Path, names: Iterable[str]) -> None:
    """Links files into another folder; copies them if the disk has no hard links."""
    for name in names:
        (inner / name).mkdir(parents=True)
        for file in (folder / name).iterdir():
            try:
                os.link(file, inner / name / file.name)
            except OSError:
                shutil.copyfile(file, inner / name / file.name)


# --- components -----------------------------------------------------------------------------


def _written(file: str, config: Mapping[str, Any], *parts: tuple[Sequence[Rule], Params]) -> Write:
    """Returns a writer of config.json and of a weights file with the tensors of some (table, tree) pairs."""

    def write(folder: Path, dtype: Any) -> None:
        sizes = {key: shape for rules, tree in parts for key, shape in shapes(rules, tree).items()}
        tensors = itertools.chain.from_iterable(to_tensors(rules, tree) for rules, tree in parts)
        write_json(folder / "config.json", config)
        write_safetensors(folder / file, sizes, tensors, dtype)

    return write


def _text_encoder(clip: TrainedStage) -> Write:
    model = clip.stage.model
    assert isinstance(clip.tokenizer, ClipTokenizer)  # see _check_clip
    config = hf_text_config(model.text, model.embed_dim, clip.tokenizer)
    return _written(_MODEL, config, (hf_text_rules(model.text), clip.trees.params))


def _image_encoder(clip: TrainedStage) -> Write:
    model = clip.stage.model
    config = hf_vision_config(model.vision, model.embed_dim)
    return _written(_MODEL, config, (hf_vision_rules(model.vision), clip.trees.params))


def _processor(clip: TrainedStage) -> Write:
    model = clip.stage.model
    config = processor_file(clip.stage.preprocessing, model.vision.image_size, model.image_mean, model.image_std)
    return lambda folder, dtype: write_json(folder / PROCESSOR_FILE, config)


def _tokenizer(clip: TrainedStage) -> Write:
    length, tokenizer = clip.stage.model.text.context_length, clip.tokenizer
    assert isinstance(tokenizer, ClipTokenizer)  # see _check_clip
    return lambda folder, dtype: write_clip_tokenizer(folder, tokenizer, length)


def _scheduler(stage: TrainedStage, name: str) -> tuple[str, str, Write]:
    config = {"_diffusers_version": VERSION, **scheduler_file(stage.stage, f"stage {name}")}
    return "diffusers", "UnCLIPScheduler", lambda folder, dtype: write_json(folder / "scheduler_config.json", config)


def _prior(prior: TrainedStage) -> Write:
    stats = prior.trees.stats
    model = prior.stage.model
    if not prior.stage.whiten:  # the pipeline always whitens
        dim = model.embed_dim
        stats = {"mean": np.zeros(dim, np.float32), "std": np.ones(dim, np.float32)}
    config = {"_diffusers_version": VERSION, **prior_config_file(model)}
    tables = (prior_rules(model), prior.trees.params), (prior_stats(), stats)
    return _written(_DIFFUSERS_MODEL, config, *tables)


def _text_proj(decoder: TrainedStage) -> Write:
    model = decoder.stage.model
    config = {
        "_class_name": "UnCLIPTextProjModel",
        "_diffusers_version": VERSION,
        "clip_embeddings_dim": model.image_emb_dim,
        "clip_extra_context_tokens": model.image_tokens,
        "cross_attention_dim": model.unet.context_dim,
        "time_embed_dim": model.unet.time_dim,
    }
    return _written(_DIFFUSERS_MODEL, config, (conditioning_rules(model, DIFFUSERS_NAMES), decoder.trees.params))


def _unet(stage: TrainedStage, unet: UNetConfig, params: Params) -> tuple[str, str, Write]:
    config = {"_diffusers_version": VERSION, **unet_config_file(unet, f"stage {stage.stage.name}")}
    return "diffusers", config["_class_name"], _written(_DIFFUSERS_MODEL, config, (unet_rules(unet), params))


def _last(upsampler: TrainedStage) -> Params:
    """Returns the network of the last sampling step; an upsampler with one network uses it for all steps."""
    return upsampler.trees.stats.get("last", upsampler.trees.params)


# --- checks ---------------------------------------------------------------------------------


def _check(stages: Mapping[str, TrainedStage]) -> None:
    missing = [name for name in ("clip", "decoder", "upsampler_1") if name not in stages]
    if missing:
        raise WeightsError(f"diffusers' pipelines need stage {', '.join(missing)}, which this system lacks")
    if "prior" not in stages and stages["clip"].stage.model.vision is None:
        raise WeightsError("diffusers' pipelines need a prior or an image tower, and this system has neither")
    for name, check in (("clip", _check_clip), ("prior", _check_prior), ("decoder", _check_decoder)):
        if name in stages:
            _reject(name, check(stages[name]))
    low_size = stages["decoder"].stage.model.unet.image_size
    _reject("upsampler_1", _check_upsampler(stages["upsampler_1"], low_size))
    unknown = sorted(set(stages) - {"clip", "prior", "decoder", "upsampler_1"})
    if unknown:
        raise WeightsError(f"diffusers' pipelines have no stage {', '.join(unknown)}: export a system without it")


def _reject(name: str, problems: Mapping[str, bool]) -> None:
    """Raises WeightsError for the first problem that a stage has."""
    for problem, present in problems.items():
        if present:
            raise WeightsError(f"diffusers' pipelines do not support stage {name}: {problem}")


def _check_clip(clip: TrainedStage) -> dict[str, bool]:
    model, embedding = clip.stage.model, clip.stage.embedding
    return {
        "embedding must be raw with scale 1": (embedding.normalisation, embedding.scale) != ("raw", 1.0),
        "its image tower is a ResNet": isinstance(model.vision, ResNetConfig),
        "its tokenizer is not a CLIP tokenizer (text.kind clip)": not isinstance(clip.tokenizer, ClipTokenizer),
        "model.text.width must equal model.embed_dim": model.text.width != model.embed_dim,
    }


def _check_prior(prior: TrainedStage) -> dict[str, bool]:
    model = prior.stage.model
    if not isinstance(model, PriorConfig):
        return {"model.kind must be unclip": True}
    return {
        "model.text_input must be clip": model.text_input != "clip",
        "model.learned_null must be false": model.learned_null,
        "model.activation must be gelu": model.activation != "gelu",
        "model.final_norm must be true": not model.final_norm,
        "model.time_token must be true": not model.time_token,
    }


def _check_decoder(decoder: TrainedStage) -> dict[str, bool]:
    stage, model = decoder.stage, decoder.stage.model
    return {
        "it reads no image embedding": model.image_emb_dim is None or not model.image_tokens,
        "model.text_input must be clip": model.text_input != "clip",
        "model.text_emb_proj must be true": not model.text_emb_proj,
        "conditioning.empty_caption must be true": not stage.empty_caption,
        "conditioning.inpaint must be false": stage.inpaint,
        "diffusion.variance must be learned_range": stage.diffusion.variance != "learned_range",
        "model.unet.context_dim must be set": model.unet.context_dim is None,
    }


def _check_upsampler(upsampler: TrainedStage, low_size: int) -> dict[str, bool]:
    stage = upsampler.stage
    return {
        "it is conditioned on a caption or a class": not isinstance(stage.model, UNetConfig),
        "conditioning.inpaint must be false": stage.inpaint,
        "conditioning.upscale must be cubic": stage.upscale != "cubic",
        f"conditioning.low_size must be the decoder's image_size, {low_size}": stage.low_size != low_size,
        "diffusion.variance must be fixed_small": stage.diffusion.variance != "fixed_small",
    }
