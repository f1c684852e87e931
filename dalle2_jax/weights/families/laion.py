"""LAION's prior: files of DALLE2-pytorch's class DiffusionPrior, of all its versions but a few.

A file holds the network under ``net.``, the tables of its noise schedule and sometimes a CLIP. A trainer's file holds
copies under ``ema_model.`` and ``online_model.``. Differences between versions of the library:

    before 0.16.0     norms are ``gamma`` and an unused ``beta``; no null embeddings
    0.23.3 to 1.8.4   norms are ``g``; ``null_text_embed`` stands in for padding
    1.9 and later     ``null_text_encodings``, ``null_text_embeds``, ``null_image_embed``

Versions in between, of a few days, are not supported: their norms divided by the largest element, and their position
bias was scaled by 1,024. Cosine attention was added in 1.4.3 without a change of names (``models.multi_query``).
"""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from dalle2_jax.errors import WeightsError
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig
from dalle2_jax.weights.component import Component, Source
from dalle2_jax.weights.rules import (
    DENSE,
    Layout,
    Rule,
    dense,
    leading,
    leaf,
    merged_heads,
    single,
    stacked,
    under,
)
from dalle2_jax.weights.tensors import Tensor, strip_prefix

_PREFIXES = ("ema_model.net.", "net.", "online_model.net.", "")
_QUERY = "learned_query"
_LAYERS = "causal_transformer.layers"
_BETAS = "noise_scheduler.betas"
_TIME_TABLE, _TIME_MLP = "to_time_embeds.0.weight", "to_time_embeds.0.1.net"

IGNORED = (
    r"(.*\.)?noise_scheduler\..*",  # determined by the schedule's name and length
    r"(.*\.)?clip\..*",  # a stage of its own
    r".*\.rotary_emb\.freqs",  # constants
    r".*\.beta",  # untrained zeros
    r"(initted|step|(.*\.)?_dummy)",
)
"""Regular expressions of keys that are skipped on purpose; `select_tensors` removes copies of the network."""


_CONTEXT, _VOCAB_SIZE = 77, 49_408
"""Context length and vocabulary of the CLIPs of OpenAI and OpenCLIP, which read the captions for such priors."""

STEPS = 64
"""Number of sampling steps in LAION's examples."""


def detect(source: Source) -> list[Component]:
    """Returns the prior in a DALLE2-pytorch file; [] for anything else.

    A CLIP in the file is ignored, because it is stored in half precision.

    Raises:
      WeightsError: a tensor is missing, or the version or the noise schedule is not supported.
    """
    if _prefix(source.tensors) is None:
        return []
    where = str(source.path)
    tensors = select_tensors(source.tensors, where)
    sizes = laion_sizes(tensors, where, source.hints.attention)
    model = LaionPriorConfig(**sizes)
    return [
        Component(
            stage="prior",
            family="LAION prior",
            where=where,
            config=_sections(sizes, _num_steps(tensors, where)),
            tensors=tensors,
            params=laion_rules(model),
            ignored=IGNORED,
            embedding={"normalisation": "unit", "scale": model.embed_length},
        )
    ]


def _sections(sizes: Mapping[str, Any], num_steps: int) -> dict[str, Any]:
    """Returns the sections of the stage's config. The width is that of the system's CLIP."""
    length = min(_CONTEXT, sizes.get("context_length", _CONTEXT))
    return {
        "model": {"kind": "laion", **{name: value for name, value in sizes.items() if name != "width"}},
        "text": {"context_length": length, "vocab_size": _VOCAB_SIZE},
        "conditioning": {"drop_image": 0.1, "drop_text": 0.1},
        "diffusion": {"schedule": "cosine", "num_steps": num_steps, "prediction": "x0"},
        "sampling": {"name": "ddpm", "steps": min(STEPS, num_steps), "clip_sample": None, "guidance": 1.0},
    }


def _num_steps(tensors: Mapping[str, Tensor], where: str) -> int:
    """Returns the number of steps of the noise schedule, which must be cosine; 1,000 if the file has no schedule."""
    table = next((tensor for key, tensor in tensors.items() if key.endswith(_BETAS)), None)
    if table is None:
        return tensors[_TIME_TABLE].shape[0] if _TIME_TABLE in tensors else 1000
    betas = np.asarray(table.read(), np.float64)
    levels = np.cos((np.linspace(0, 1, len(betas) + 1) + 0.008) / 1.008 * math.pi / 2) ** 2
    if not np.allclose(betas, np.minimum(1 - levels[1:] / levels[:-1], 0.999), rtol=0, atol=0.01):
        raise WeightsError(f"{where} has another noise schedule than cosine, which is not supported", where)
    return len(betas)


def _prefix(tensors: Mapping[str, Tensor]) -> str | None:
    """Returns the prefix of the network's keys, or None if there is no such network."""
    return next((prefix for prefix in _PREFIXES if f"{prefix}{_QUERY}" in tensors), None)


def select_tensors(tensors: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """Returns the tensors of a file without prefixes and without copies of the network; averaged weights are preferred.

    Args:
      tensors: the tensors of the file, by key.
      where: name of the file, for errors.

    Raises:
      WeightsError: the file has no such network.
    """
    prefix = _prefix(tensors)
    if prefix is None:
        raise WeightsError(f"{where} is not a prior of DALLE2-pytorch: it lacks net.{_QUERY}", where, [f"net.{_QUERY}"])
    copies = [other for other in _PREFIXES if other and f"{other}{_QUERY}" in tensors]
    rest = {key: tensor for key, tensor in tensors.items() if not key.startswith(tuple(copies))}
    return {**(rest if prefix else {}), **strip_prefix(prefix, tensors)}


def laion_sizes(tensors: Mapping[str, Tensor], where: str, attention: str | None = None) -> dict[str, Any]:
    """Returns the fields of ``LaionPriorConfig`` that the shapes of a network's tensors show.

    Shapes do not show the context length of versions before 0.16.0, for which the default is used, and the attention
    of weights with ``null_text_embed``: "relaxed" is assumed, as in LAION's published files.

    Args:
      tensors: the tensors without prefixes, as `select_tensors` returns them.
      where: name of the file, for errors.
      attention: the attention, in place of the assumed one.

    Raises:
      WeightsError: a tensor is missing, or the version is not supported.
    """
    first = f"{_LAYERS}.0"
    layers = sum(key.startswith(_LAYERS) and key.endswith(".0.to_q.weight") for key in tensors)
    try:
        width, head_width = tensors[_QUERY].shape[0], tensors[f"{first}.0.null_kv"].shape[1]
        heads = tensors["causal_transformer.rel_pos_bias.relative_attention_bias.weight"].shape[1]
        mlp_width = tensors[f"{first}.1.5.weight"].shape[1]
        time = _TIME_TABLE if _TIME_TABLE in tensors else f"{_TIME_MLP}.2.bias"
        time_width = tensors[time].shape[-1]
    except KeyError as error:
        what = f"{where} lacks tensor {error.args[0]}: the file is cut short or of another family"
        raise WeightsError(what, where, [error.args[0]]) from None
    sizes = {"width": width, "layers": layers, "heads": heads, "head_width": head_width, "mlp_width": mlp_width}
    nulls, context = _nulls(tensors, where)
    guesses = {"learned": "cosine", "padding": "relaxed", "hidden": "dot"}
    norm = _norm_name(nulls)
    return sizes | {
        **({} if context is None else {"context_length": context}),
        "timesteps": tensors[_TIME_TABLE].shape[0] if _TIME_TABLE in tensors else None,
        "text_tokens": _tokens(tensors, "to_text_embeds.0.bias", width),
        "time_tokens": time_width // width,
        "image_tokens": _tokens(tensors, "to_image_embeds.0.bias", width),
        "normformer": f"{first}.1.3.{norm}" in tensors,
        "rotary": f"{first}.0.rotary_emb.freqs" in tensors,
        "norm_in": f"causal_transformer.init_norm.{norm}" in tensors,
        "norm_out": f"causal_transformer.norm.{norm}" in tensors,
        "final_proj": "causal_transformer.project_out.weight" in tensors,
        "nulls": nulls,
        "attention": attention or guesses[nulls],
    }


def _tokens(tensors: Mapping[str, Tensor], key: str, width: int) -> int:
    """Returns the number of tokens of an embedding: 1 without a projection."""
    return tensors[key].shape[0] // width if key in tensors else 1


def _nulls(tensors: Mapping[str, Tensor], where: str) -> tuple[str, int | None]:
    """Returns the kind of embedding that replaces a dropped caption, and the context length if its shape shows it."""
    for kind, key in (("learned", "null_text_encodings"), ("padding", "null_text_embed")):
        if key in tensors:
            return kind, tensors[key].shape[1]
    if not any(key.endswith(".gamma") for key in tensors):
        what = "is of DALLE2-pytorch 0.16.0 to 0.23.0, whose norms are not supported: use weights of another version"
        raise WeightsError(f"{where} {what}", where)
    return "hidden", None


def _norm_name(nulls: str) -> str:
    return "gamma" if nulls == "hidden" else "g"


def laion_rules(model: LaionPriorConfig) -> list[Rule]:
    """Returns the table of the network, for tensors without prefixes."""
    rules = [
        *leaf("query", _QUERY),
        *_time(model),
        *(dense("text_emb_proj", "to_text_embeds.0") if model.text_tokens > 1 else ()),
        *(dense("image_emb_proj", "to_image_embeds.0") if model.image_tokens > 1 else ()),
        *under("transformer", "causal_transformer.", _transformer(model)),
    ]
    if model.nulls == "learned":
        rules += leaf("null_text", "null_text_encodings", leading(1))
        rules += leaf("null_text_emb", "null_text_embeds", leading(1))
        rules += leaf("null_image_emb", "null_image_embed", leading(1))
    elif model.nulls == "padding":
        rules += leaf("null_text", "null_text_embed", leading(1))
    if model.final_proj:
        rules += dense("out_proj", "causal_transformer.project_out", bias=False)
    return rules


def _time(model: LaionPriorConfig) -> list[Rule]:
    if model.timesteps is not None:
        return leaf("time_embedding/embedding", _TIME_TABLE)
    names = enumerate(("0.0", "1.0", "2"), start=1)
    return [rule for i, name in names for rule in dense(f"time_mlp/fc_{i}", f"{_TIME_MLP}.{name}")]


def _transformer(model: LaionPriorConfig) -> list[Rule]:
    def norm(path: str, key: str) -> list[Rule]:
        return leaf(f"{path}/scale", f"{key}.{_norm_name(model.nulls)}")

    def layer(i: int) -> list[Rule]:
        rules = [
            *norm("ln_1", "0.norm"),
            *dense("attn/q", "0.to_q", _parts(model.heads), bias=False),
            *dense("attn/kv", "0.to_kv", _parts(2), bias=False),
            *leaf("attn/null_kv", "0.null_kv"),
            *dense("attn/out", "0.to_out.0", merged_heads(model.heads), bias=False),
            *norm("attn/ln_out", "0.to_out.1"),
            *norm("ln_2", "1.0"),
            *dense("fc", "1.1", _parts(2), bias=False),
            *(norm("ln_mid", "1.3") if model.normformer else ()),
            *dense("proj", "1.5", DENSE, bias=False),
        ]
        return under("blocks", f"layers.{i}.", rules)

    return [
        *leaf("position_bias", "rel_pos_bias.relative_attention_bias.weight"),
        *(norm("ln_in", "init_norm") if model.norm_in else ()),
        *(norm("ln_out", "norm") if model.norm_out else ()),
        *stacked(*(layer(i) for i in range(model.layers))),
    ]


def _parts(parts: int) -> Layout:
    """Returns the layout of a kernel with several outputs: [parts * K, D] <-> [D, parts, K]."""
    return single(
        lambda x: x.reshape(parts, x.shape[0] // parts, x.shape[1]).transpose(2, 0, 1),
        lambda x: x.transpose(1, 2, 0).reshape(-1, x.shape[0]),
    )
