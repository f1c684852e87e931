"""Writes docs/reference/configuration.md from the dataclasses that configs are parsed into.

python docs/configuration.py
"""

import dataclasses
import pathlib
import types
import typing
from collections.abc import Mapping
from typing import Any

from field_notes import NOTES

from dalle2_jax import data, stages
from dalle2_jax.config.sections import (
    ArPriorConditioning,
    DecoderConditioning,
    PriorConditioning,
    TokenizerConfig,
    UpsamplerConditioning,
)
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.models.clip import ClipConfig
from dalle2_jax.models.decoder import DecoderConfig
from dalle2_jax.models.priors.ar_prior import ArPriorConfig
from dalle2_jax.models.priors.laion_prior import LaionPriorConfig
from dalle2_jax.models.priors.prior import PriorConfig
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.transformer import TextConfig as TransformerConfig
from dalle2_jax.models.unet import UNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.ranges import MAX_INT, alternatives
from dalle2_jax.training.loop import RunConfig
from dalle2_jax.training.optim import OptimConfig
from dalle2_jax.training.sharding import MeshConfig
from dalle2_jax.types import Preprocessing

PAGE = pathlib.Path(__file__).parent / "reference" / "configuration.md"

HEAD = """\
# Configuration

Every field of a config page, generated from the dataclasses that pages are parsed into. Set a field on the command
line with `--config.SECTION.FIELD=VALUE`, in Python with `d2.experiment(page, **{"SECTION.FIELD": value})`, or in a page
of your own. Fields without a default are required. Unknown fields, wrong types and values out of range are errors that
name the field.

```
python train.py --config configs/shapes.py:clip --workdir runs/short --config.optim.lr=5e-4 --config.total_steps=200
```

This page is written by `python docs/configuration.py`; a test checks that it is current.
"""

GROUPS: Mapping[str, tuple[tuple[str, str, type, tuple[str, ...]], ...]] = {
    # heading: (section, for which stages, dataclass, fields that follow from other parts and cannot be set)
    "Run": (("Top level", "all stages", RunConfig, ()),),
    "Data": tuple((f"`data` of kind `{name}`", "all stages", cls, ()) for name, cls in data.KINDS.items())
    + (("`data.filters`", "kinds with a path", Filters, ()),),
    "Text": (("`text`", "stages that read captions", TokenizerConfig, ()),),
    "Optimizer": (
        ("`optim`", "all stages", OptimConfig, ()),
        ("`mesh`", "all stages", MeshConfig, ()),
        ("`lora`", "fine-tuning with LoRA", stages.LoraConfig, ()),
    ),
    "Diffusion": (
        ("`diffusion`", "prior, decoder, upsamplers", stages.DiffusionConfig, ()),
        ("`sampling`", "prior, decoder, upsamplers", stages.SamplingConfig, ()),
        ("`teacher`", "distilled prior, decoder, upsamplers: how the teacher is sampled", stages.SamplingConfig, ()),
        ("`sampling`", "ar_prior", stages.ArSamplingConfig, ()),
    ),
    "Conditioning": (
        ("`conditioning`", "prior", PriorConditioning, ()),
        ("`conditioning`", "ar_prior", ArPriorConditioning, ()),
        ("`conditioning`", "decoder", DecoderConditioning, ()),
        ("`conditioning`", "upsamplers", UpsamplerConditioning, ()),
    ),
    "CLIP": (
        ("`model`", "clip", ClipConfig, ()),
        ("`model.text`", "clip, ar_prior, decoder", TransformerConfig, ("vocab_size", "context_length")),
        ("`model.vision` of kind `vit`", "clip", VisionConfig, ()),
        ("`model.vision` of kind `resnet`", "clip", ResNetConfig, ()),
        ("`embedding`", "clip", stages.EmbeddingConfig, ()),
        ("`preprocessing`", "clip", Preprocessing, ()),
        ("`objective`", "clip", stages.ContrastiveConfig, ()),
    ),
    "Networks": (
        ("`model`", "prior", PriorConfig, ("embed_dim", "context_length", "vocab_size", "text_width")),
        ("`model` of kind `laion`", "prior", LaionPriorConfig, ("width",)),
        ("`model`", "ar_prior", ArPriorConfig, ("text", "embed_dim")),
        ("`model`", "decoder", DecoderConfig, ("text", "text_width", "num_classes")),
        ("`model.unet` of a decoder, `model` of an upsampler", "decoder, upsamplers", UNetConfig, ()),
    ),
}


def page() -> str:
    """Returns the page."""
    parts = [HEAD]
    for heading, sections in GROUPS.items():
        parts.append(f"## {heading}\n")
        parts += [section(*entry) for entry in sections]
    return "\n".join(parts)


def section(name: str, of: str, cls: type, derived: tuple[str, ...]) -> str:
    """Returns a heading and the table of a dataclass's fields, without the ``derived`` ones."""
    hints = typing.get_type_hints(cls, include_extras=True)
    rows = [
        f"| `{field.name}` | {type_name(hints[field.name])} | {default(field)} | {description(cls, field.name)} |"
        for field in dataclasses.fields(cls)
        if field.init and field.name not in derived
    ]
    table = "\n".join(["| field | type | default | description |", "| --- | --- | --- | --- |", *rows])
    return f"### {name} ({of})\n\n{table}\n"


def type_name(hint: Any) -> str:
    """Returns a type and its range in words."""
    names = [f"{plain(option)}{f' {within}' if within else ''}" for option, within in alternatives(hint)]
    return escaped(" or ".join(dict.fromkeys(names)).replace(f" and at most {MAX_INT}", ""))


def plain(hint: Any) -> str:
    """Returns a type without a range in words."""
    origin, items = typing.get_origin(hint), [item for item in typing.get_args(hint) if item is not Ellipsis]
    if hint is types.NoneType:
        return "None"
    if origin is tuple:
        return f"tuple of {' or '.join(dict.fromkeys(type_name(item) for item in items))}" if items else "tuple"
    if origin is not None and issubclass(origin, Mapping):
        return "mapping"
    return "section" if dataclasses.is_dataclass(hint) else getattr(origin or hint, "__name__", str(hint))


def default(field: dataclasses.Field) -> str:
    """Returns the default of a field, "required" if it has none."""
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "empty"
    value = field.default
    return "its own defaults" if dataclasses.is_dataclass(value) else f"`{value!r}`"


def description(cls: type, name: str) -> str:
    """Returns the description of a field. KeyError if it has none."""
    for base in cls.__mro__:
        if (note := NOTES.get(f"{base.__name__}.{name}")) is not None:
            return note
    return NOTES[name]


def escaped(text: str) -> str:
    """Returns text that is safe in a cell of a table."""
    return text.replace("|", "\\|")


if __name__ == "__main__":
    PAGE.write_text(page())
