"""A checkpoint on its way into a system: the source that is read, and the components that are found in it."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.errors import UsageError, WeightsError, choose, shown
from dalle2_jax.text import Tokenizer
from dalle2_jax.weights.config_files import Section, json_object
from dalle2_jax.weights.kinds import ATTENTION_ORDERS, ATTENTIONS
from dalle2_jax.weights.rules import Rule
from dalle2_jax.weights.tensors import Tensor, open_tensors


@dataclasses.dataclass(frozen=True)
class Hints:
    """Properties of a network that its state dict does not show. None: as in the released files of the family.

    Attributes:
        head_channels: width of each attention head of a GLIDE or ADM network.
        image_size: side in pixels of the images a GLIDE or ADM network was trained on.
        attention_order: order of the rows of ADM's projections, "legacy" (head by head) or "new".
        attention: attention of a DALLE2-pytorch prior, "relaxed" (before 1.4.3) or "cosine" (1.4.3 to 1.8.4).

    Raises:
        UsageError: a value out of range.
    """

    head_channels: int | None = None
    image_size: int | None = None
    attention_order: str | None = None
    attention: str | None = None

    def __post_init__(self) -> None:
        for name, value in (("head_channels", self.head_channels), ("image_size", self.image_size)):
            if value is not None and (type(value) is not int or value < 1):
                raise UsageError(f"{name} must be an integer of at least 1, got {shown(value)}")
        if self.attention_order is not None:
            choose("attention order", self.attention_order, dict.fromkeys(ATTENTION_ORDERS))
        if self.attention is not None:
            choose("attention", self.attention, dict.fromkeys(ATTENTIONS))


def make_hints(values: Mapping[str, Any]) -> Hints:
    """Returns `Hints` with the given fields.

    Raises:
        UsageError: an unknown field, or a value out of range.
    """
    for name in values:
        choose("hint", name, dict.fromkeys(field.name for field in dataclasses.fields(Hints)))
    return Hints(**values)


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or folder to import.

    Attributes:
        path: the file or folder.
        tensors: the tensors of a file, by key; none for a folder.
        hints: what the user knows about it.
    """

    path: Path
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    hints: Hints = Hints()

    @classmethod
    def open(cls, path: Path, hints: Hints = Hints()) -> "Source":
        """Opens a file or folder; lists the tensors of a file.

        Raises:
            WeightsError: it does not exist, or the file is damaged.
        """
        if path.is_dir():
            return cls(path, hints=hints)
        if not path.exists():
            raise WeightsError(f"there is no file or folder {path}", path)
        return cls(path, open_tensors(path), hints)

    def json(self, name: str) -> dict[str, Any] | None:
        """Returns the object in a JSON file of the folder, or None if there is no such file.

        Raises:
            WeightsError: the file is damaged.
        """
        path = self.path / name
        return json_object(path) if path.is_file() else None

    def section(self, name: str) -> Section | None:
        """Returns a JSON file of the folder as a `Section`, or None; raises as `json`."""
        content = self.json(name)
        return None if content is None else Section(content, str(self.path / name))

    def weights(self, *stems: str) -> dict[str, Tensor]:
        """Returns the tensors of a weights file in the folder.

        Args:
            *stems: names of the file without suffix, as in "model" or "diffusion_pytorch_model".

        Returns:
            The tensors of the first file that exists: safetensors (one file, then an index) before torch files.

        Raises:
            WeightsError: the folder has no such file, or the file is damaged.
        """
        suffixes = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        names = [f"{stem}{suffix}" for suffix in suffixes for stem in stems]
        for name in names:
            if (self.path / name).is_file():
                return open_tensors(self.path / name)
        raise WeightsError(f"{self.path} holds no weights: {names[0]} is missing", self.path)


@dataclasses.dataclass(frozen=True)
class Component:
    """A stage in a public checkpoint, or a part of one (a tower of CLIP, the statistics of a prior), not read yet.

    Attributes:
        stage: "clip", "prior", "decoder", "upsampler_1" or "upsampler_2".
        family: name of its family for messages, as in "Karlo prior".
        where: its file or folder, for messages.
        config: sections of the stage's config that this part determines: model, text, diffusion, sampling,
            conditioning, embedding and preprocessing.
        tensors: tensors by key.
        params: conversion table of the stage's parameters.
        stats: conversion table of the stage's statistics.
        ignored: regular expressions of keys that are skipped on purpose.
        tokenizer: the tokenizer that belongs to the checkpoint, if it has one.
        embedding: the CLIP embeddings it was trained with, {"normalisation": ..., "scale": ...}; None for raw ones.
        completed_by: name of the part that is missing for a complete stage; "" for a complete one.
    """

    stage: str
    family: str
    where: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    params: Sequence[Rule] = ()
    stats: Sequence[Rule] = ()
    ignored: Sequence[str] = ()
    tokenizer: Tokenizer | None = None
    embedding: Mapping[str, Any] | None = None
    completed_by: str = ""


def merge_parts(components: Sequence[Component]) -> dict[str, Component]:
    """Joins the parts of each stage.

    The first of several equal parts is used (folders of one family share some), and the first of several complete
    stages (the priors of ECLIPSE and Karlo).

    Returns:
        One component per stage name.

    Raises:
        WeightsError: two parts have different configs, or two CLIPs, of which the second has more towers.
    """
    stages: dict[str, Component] = {}
    for part in components:
        first = stages.get(part.stage)
        if first is None:
            stages[part.stage] = part
        elif not _paths(part) & _paths(first) or (part.stage == "clip" and not _paths(part) <= _paths(first)):
            stages[part.stage] = _join(first, part)
    return stages


def _paths(part: Component) -> set[str]:
    return {f"params/{rule.path}" for rule in part.params} | {f"stats/{rule.path}" for rule in part.stats}


def _join(one: Component, other: Component) -> Component:
    where = one.where if one.where == other.where else f"{one.where} and {other.where}"
    duplicates = sorted(_paths(one) & _paths(other))
    if duplicates:
        raise WeightsError(f"{where} both hold stage {one.stage} (its {duplicates[0]}): give one of them", other.where)
    clash = set(one.tensors) & set(other.tensors)
    if clash:
        raise AssertionError(f"parts of {one.stage} share keys: {sorted(clash)[:4]}")
    return dataclasses.replace(
        one,
        family=one.family if one.family == other.family else f"{one.family}, {other.family}",
        where=where,
        config=_merge_configs(one.config, other.config, where, ""),
        tensors={**one.tensors, **other.tensors},
        params=(*one.params, *other.params),
        stats=(*one.stats, *other.stats),
        ignored=(*one.ignored, *other.ignored),
        tokenizer=one.tokenizer or other.tokenizer,
        embedding=one.embedding or other.embedding,
        completed_by=one.completed_by and other.completed_by,
    )


def _merge_configs(one: Mapping[str, Any], other: Mapping[str, Any], where: str, path: str) -> dict[str, Any]:
    """Merges two configs; a value replaces None."""
    result = dict(one)
    for key, value in other.items():
        first = result.get(key)
        if isinstance(first, Mapping) and isinstance(value, Mapping):
            result[key] = _merge_configs(first, value, where, f"{path}{key}.")
        elif first is None:
            result[key] = value
        elif value is not None and value != first:
            what = f"{path}{key} is {first!r} in one, {value!r} in the other"
            raise WeightsError(f"{where} do not belong together: {what}")
    return result
