"""Priors of diffusers' class PriorTransformer: those of Karlo, Kandinsky 2 and ECLIPSE.

| model         | folder                                             | space    | time token | guidance | clip |
| ------------- | -------------------------------------------------- | -------- | ---------- | -------- | ---- |
| Karlo         | prior/ of UnCLIPPipeline                           | whitened | yes        | 4        | 5    |
| Kandinsky 2.1 | KandinskyPriorPipeline                             | whitened | yes        | 4        | 10   |
| Kandinsky 2.2 | KandinskyV22PriorPipeline                          | whitened | yes        | 4        | 10   |
| ECLIPSE       | a PriorTransformer alone (additional_embeddings 3) | raw      | no         | none     | none |

The column clip is the bound on |x_0| in the published scheduler files, from which it is read. ECLIPSE (Patel et al.
2023, arXiv 2312.04655, section 3.2) predicts the embedding from noise in one evaluation and has no scheduler; its files
hold whitening statistics, which it does not use.

A PriorTransformer alone is a part of a system: its CLIP is a separate checkpoint.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.weights.clip import transformers
from dalle2_jax.weights.clip.transformers_config import TEXT_DEFAULTS
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.config_files import DIFFUSERS, MAX_LAYERS, Known, Section
from dalle2_jax.weights.karlo.scheduler import read_scheduler
from dalle2_jax.weights.rules import (
    Rule,
    dense,
    leading,
    leaf,
    merged_heads,
    norm,
    positive_std,
    projections,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import Tensor

PIPELINES = {"KandinskyPriorPipeline": "Kandinsky 2.1", "KandinskyV22PriorPipeline": "Kandinsky 2.2"}

_FIXED = {
    "time_embed_act_fn": "silu",
    "norm_in_type": None,
    "embedding_proj_norm_type": None,
    "encoder_hid_proj_type": "linear",
    "added_emb_type": "prd",
    "embedding_proj_dim": None,
    "clip_embed_dim": None,
}
"""Fields for which only one value is supported."""

_PRIOR = DIFFUSERS | Known(
    (
        *("num_attention_heads", "attention_head_dim", "num_layers", "embedding_dim", "num_embeddings"),
        *("additional_embeddings", "dropout", "time_embed_dim"),
    ),
    _FIXED,
)

DEFAULTS = {
    "num_attention_heads": 32,
    "attention_head_dim": 64,
    "num_layers": 20,
    "embedding_dim": 768,
    "num_embeddings": 77,
    "additional_embeddings": 4,
}
"""Defaults of diffusers for missing fields."""

STEPS, GUIDANCE = 25, 4.0
"""Default sampling settings of the pipelines."""


def prior_rules(config: PriorConfig) -> list[Rule]:
    """Returns the table of a PriorTransformer's parameters."""
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
    """Returns the table of the whitening statistics."""
    return [*leaf("mean", "clip_mean", leading(1)), *leaf("std", "clip_std", positive_std(1))]


def prior_sections(model: PriorConfig, vocab_size: int, scheduler: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sections of a prior's config; ``scheduler`` has those that `read_scheduler` returns.

    The widths of CLIP's embeddings and text states are omitted: every prior has those of its system's CLIP.
    """
    derived = ("embed_dim", "context_length", "vocab_size", "text_width")
    return {
        "model": {name: value for name, value in dataclasses.asdict(model).items() if name not in derived},
        "text": {"context_length": model.context_length, "vocab_size": vocab_size},
        **scheduler,
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
    return {"_class_name": "PriorTransformer", "dropout": 0.0, "time_embed_dim": None, **sizes, **_FIXED}


def prior_component(source: Source, scheduler: str, family: str, vocab_size: int) -> Component:
    """Returns the prior in a pipeline's folder.

    Args:
        source: the pipeline's folder, with a subfolder "prior".
        scheduler: name of the scheduler's subfolder.
        family: name of its family.
        vocab_size: vocabulary size of CLIP's tokenizer.
    """
    return _component(Source(source.path / "prior"), source, scheduler, family, vocab_size)


def detect(source: Source) -> list[Component]:
    """Returns the components in a folder of Kandinsky's prior or of a PriorTransformer; [] for anything else.

    Raises:
        WeightsError: a file is missing, or the architecture is not supported.
    """
    if not source.path.is_dir():
        return []
    index, config = source.section("model_index.json"), source.section("config.json")
    family = PIPELINES.get(index.optional_string("_class_name") or "") if index else None
    if family is not None:
        encoders = [transformers.detect(Source(source.path / f"{name}_encoder")) for name in ("text", "image")]
        clip = [component for found in encoders for component in found]
        if not clip:
            raise WeightsError(f"{source.path} lacks the text_encoder of {family}'s prior", source.path)
        return [*clip, prior_component(source, "scheduler", f"{family} prior", clip[0].config["text"]["vocab_size"])]
    if config is None or config.optional_string("_class_name") != "PriorTransformer":
        return []
    pipeline = Source(source.path.parent)
    scheduler = "prior_scheduler" if (pipeline.path / "prior_scheduler").is_dir() else "scheduler"
    return [_component(source, pipeline, scheduler, "prior (PriorTransformer)", TEXT_DEFAULTS["vocab_size"])]


def _component(folder: Source, pipeline: Source, scheduler: str, family: str, vocab_size: int) -> Component:
    config = folder.section("config.json")
    if config is None:
        path = folder.path / "config.json"
        raise WeightsError(f"{path} is missing", path)
    tensors = folder.weights("diffusion_pytorch_model")
    model = _model(config, tensors)
    whiten = model.time_token
    defaults = {"prediction_type": "sample", "clip_sample_range": 5.0}
    settings = read_scheduler(pipeline, scheduler, **defaults) if whiten else _one_step()
    if settings["diffusion"].get("variance") == "learned_range":
        file = Section({}, str(pipeline.path / scheduler / "scheduler_config.json"))
        raise file.error("variance_type", "'learned_range' is not supported for a prior: it must be 'fixed_small_log'")
    if whiten:
        settings["sampling"] |= {"steps": STEPS, "guidance": GUIDANCE}
    sections = prior_sections(model, vocab_size, settings)
    sections["conditioning"] = {"whiten": whiten}
    return Component(
        stage="prior",
        family=family if whiten else "ECLIPSE prior",
        where=str(folder.path),
        config=sections,
        tensors=tensors,
        params=prior_rules(model),
        stats=prior_stats() if whiten else (),
        ignored=() if whiten else ("clip_mean", "clip_std"),
    )


def _model(config: Section, tensors: Mapping[str, Tensor]) -> PriorConfig:
    config.check(_PRIOR)
    most = {"num_layers": MAX_LAYERS, "num_embeddings": 2**16, "num_attention_heads": 2**12}
    sizes = {name: config.positive_int(name, default, most.get(name, 2**16)) for name, default in DEFAULTS.items()}
    width = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    config.number("dropout", 0.0, least=0.0)
    if config.content.get("time_embed_dim") is not None and config.positive_int("time_embed_dim") != width:
        product = f"the width {width} (num_attention_heads x attention_head_dim)"
        raise config.error("time_embed_dim", f"{config.positive_int('time_embed_dim')} differs from {product}")
    if sizes["additional_embeddings"] not in (3, 4):
        raise config.error(
            "additional_embeddings", f"{sizes['additional_embeddings']} is not supported: it must be 4, or 3 (ECLIPSE)"
        )
    _check_weights(config, sizes, width, {key: tensor.shape for key, tensor in tensors.items()})
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


def _check_weights(
    config: Section, sizes: Mapping[str, int], width: int, shapes: Mapping[str, tuple[int, ...]]
) -> None:
    """Raises FieldError for a size in the file that differs from the weights."""
    layers = {key.split(".")[1] for key in shapes if key.startswith("transformer_blocks.")}
    if layers:
        config.check_size("num_layers", sizes["num_layers"], len(layers))
    projection, positions = shapes.get("proj_in.weight", ()), shapes.get("positional_embedding", ())
    if len(projection) == 2:
        config.check_size("embedding_dim", sizes["embedding_dim"], projection[1])
        if width != projection[0]:
            product = f"x attention_head_dim {sizes['attention_head_dim']} is {width}"
            raise config.error(
                "num_attention_heads", f"{sizes['num_attention_heads']} {product}, but the weights have {projection[0]}"
            )
    if len(positions) == 3:
        config.check_size("num_embeddings", sizes["num_embeddings"], positions[1] - sizes["additional_embeddings"])


def _one_step() -> dict[str, dict[str, Any]]:
    """Returns the settings of a prior with one evaluation at t = T - 1: x_0 of DDIM is the network's prediction."""
    return {
        "diffusion": {"schedule": "cosine", "num_steps": 1000, "prediction": "x0"},
        "sampling": {"name": "ddim", "steps": 1, "clip_sample": None, "guidance": 1.0},
    }
