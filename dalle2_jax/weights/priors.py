"""Priors of diffusers' PriorTransformer: Karlo's, Kandinsky 2's, ECLIPSE's.

| whose         | folder                                             | space    | time token | guidance | clip |
| ------------- | -------------------------------------------------- | -------- | ---------- | -------- | ---- |
| Karlo         | prior/ of UnCLIPPipeline                           | whitened | yes        | 4        | 5    |
| Kandinsky 2.1 | KandinskyPriorPipeline                             | whitened | yes        | 4        | 10   |
| Kandinsky 2.2 | KandinskyV22PriorPipeline                          | whitened | yes        | 4        | 10   |
| ECLIPSE       | a PriorTransformer alone (additional_embeddings 3) | raw      | no         | none     | none |

The bounds are those that schedulers' files name; what is read is the file. ECLIPSE (Patel et al. 2023, arXiv
2312.04655, section 3.2) goes from noise to the embedding in one evaluation and has no scheduler; its files hold the
statistics of whitening too, which it does not use.

A PriorTransformer alone is a part of a system: CLIP comes from elsewhere.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.prior import PriorConfig
from dalle2_jax.types import UserError
from dalle2_jax.weights import clip_hf
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.diffusers_unet import check_fields
from dalle2_jax.weights.rules import Rule, dense, leading, leaf, merged_heads, norm, projections, stacked, under
from dalle2_jax.weights.unclip_scheduler import read_scheduler

PIPELINES = {"KandinskyPriorPipeline": "Kandinsky 2.1", "KandinskyV22PriorPipeline": "Kandinsky 2.2"}

_KNOWN = {
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
"""What a config may say of these alone: our prior has it so."""

_DEFAULTS = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
}
"""What diffusers takes for a field that a file leaves out."""

STEPS, GUIDANCE = 25, 4.0
"""How the pipelines sample, unless they are told otherwise."""


def prior_rules(config: PriorConfig) -> list[Rule]:
    """The table of a PriorTransformer's parameters."""
    block = [
        *norm("ln_1", "norm1"),
        *projections("attn/qkv", [f"attn1.to_{name}" for name in "qkv"], config.heads),
        *dense("attn/out", "attn1.to_out.0", merged_heads(config.heads)),
        *norm("ln_2", "norm3"),
        *dense("fc", "ff.net.0.proj"),
        *dense("proj", "ff.net.2"),
    ]
    time = [rule for i in (1, 2) for rule in dense(f"time_mlp/fc_{i}", f"time_embedding.linear_{i}")]
    return [
        *(time if config.time_token else ()),
        *dense("image_emb_proj", "proj_in"),
        *dense("text_emb_proj", "embedding_proj"),
        *dense("text_seq_proj", "encoder_hidden_states_proj"),
        *leaf("positional_embedding", "positional_embedding", leading(1)),
        *leaf("query", "prd_embedding", leading(2)),
        *stacked(*(under("transformer/blocks", f"transformer_blocks.{i}.", block) for i in range(config.layers))),
        *norm("ln_final", "norm_out"),
        *dense("out_proj", "proj_to_clip_embeddings"),
    ]


def prior_stats() -> list[Rule]:
    """The table of the statistics of whitening."""
    return [*leaf("mean", "clip_mean", leading(1)), *leaf("std", "clip_std", leading(1))]


def prior_sections(model: PriorConfig, vocab_size: int, said: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sections of a prior's config; ``said`` are those of its scheduler.

    The widths of CLIP's embeddings and states are CLIP's to say, as in any prior's config.
    """
    derived = ("embed_dim", "context_length", "vocab_size", "text_width")
    return {
        "model": {name: value for name, value in dataclasses.asdict(model).items() if name not in derived},
        "text": {"context_length": model.context_length, "vocab_size": vocab_size},
        **said,
    }


def prior_config_file(model: PriorConfig) -> dict[str, Any]:
    """Returns the config file of a PriorTransformer."""
    sizes = {
        "num_attention_heads": model.heads,
        "attention_head_dim": model.width // model.heads,
        "num_layers": model.layers,
        "embedding_dim": model.embed_dim,
        "num_embeddings": model.context_length,
        "additional_embeddings": 1 + model.tail,
    }
    return {"_class_name": "PriorTransformer", "dropout": 0.0, "time_embed_dim": None, **sizes, **_KNOWN}


def prior_component(source: Source, scheduler: str, family: str, vocab_size: int) -> Component:
    """Returns the prior in a pipeline's folder.

    Args:
        source: the pipeline's folder, whose "prior" it is.
        scheduler: the name of its scheduler's folder.
        family: for people.
        vocab_size: of CLIP's tokenizer.
    """
    return _component(Source(source.path / "prior"), source, scheduler, family, vocab_size)


def recognise(source: Source) -> list[Component]:
    """Returns what a folder of Kandinsky's prior, or of a PriorTransformer alone, holds; [] for something else.

    Raises:
        UserError: it is one, and has what no prior here has, or lacks a file.
    """
    if not source.path.is_dir():
        return []
    family = PIPELINES.get((source.json("model_index.json") or {}).get("_class_name"))
    if family is not None:
        encoders = [clip_hf.recognise(Source(source.path / f"{name}_encoder")) for name in ("text", "image")]
        clip = [component for found in encoders for component in found]
        if not clip:
            raise UserError(f"{source.path} lacks the text_encoder of {family}'s prior")
        return [*clip, prior_component(source, "scheduler", f"{family} prior", clip[0].config["text"]["vocab_size"])]
    if (source.json("config.json") or {}).get("_class_name") != "PriorTransformer":
        return []
    beside = Source(source.path.parent)
    scheduler = "prior_scheduler" if (beside.path / "prior_scheduler").is_dir() else "scheduler"
    return [_component(source, beside, scheduler, "prior (PriorTransformer)", clip_hf.TEXT_DEFAULTS["vocab_size"])]


def _component(folder: Source, pipeline: Source, scheduler: str, family: str, vocab_size: int) -> Component:
    where = str(folder.path / "config.json")
    config = folder.json("config.json")
    if config is None:
        raise UserError(f"{where} is missing")
    model = _model(config, where)
    whiten = model.time_token
    defaults = {"prediction_type": "sample", "clip_sample_range": 5.0}
    said = read_scheduler(pipeline, scheduler, **defaults) if whiten else _one_step()
    if said["diffusion"].get("variance") == "learned_range":
        raise UserError(f"{pipeline.path / scheduler}: a prior of variance 'learned_range' is not known here")
    if whiten:
        said["sampling"] |= {"steps": STEPS, "guidance": GUIDANCE}
    sections = prior_sections(model, vocab_size, said)
    sections["conditioning"] = {"whiten": whiten}
    return Component(
        stage="prior",
        family=family if whiten else "ECLIPSE prior",
        where=str(folder.path),
        config=sections,
        tensors=folder.weights("diffusion_pytorch_model"),
        params=prior_rules(model),
        stats=prior_stats() if whiten else (),
        ignored=() if whiten else ("clip_mean", "clip_std"),
    )


def _model(config: Mapping[str, Any], where: str) -> PriorConfig:
    check_fields(config, _KNOWN, where)
    sizes = {name: config.get(name, default) for name, default in _DEFAULTS.items()}
    for name, value in sizes.items():
        if type(value) is not int or value < 1:
            raise UserError(f"{where}: {name} must be a whole number of 1 or more, not {value!r}")
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    if config.get("time_embed_dim") not in (None, width):
        raise UserError(f"{where}: time_embed_dim {config['time_embed_dim']!r} is not the width {width}")
    if sizes["additional_embeddings"] not in (3, 4):
        raise UserError(f"{where}: additional_embeddings {sizes['additional_embeddings']} is neither 4 nor ECLIPSE's 3")
    return PriorConfig(
        width=width,
        layers=sizes["num_layers"],
        heads=sizes["num_attention_heads"],
        embed_dim=sizes["embedding_dim"],
        context_length=sizes["num_embeddings"],
        text_input="clip",
        text_width=sizes["embedding_dim"],
        learned_null=False,
        time_token=sizes["additional_embeddings"] == 4,
    )


def _one_step() -> dict[str, dict[str, Any]]:
    """One evaluation at the noisiest step: DDIM's x_0 there is what the network says."""
    return {
        "diffusion": {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"},
        "sampling": {"name": "ddim", "steps": 1, "clip": None, "guidance": 1.0},
    }
