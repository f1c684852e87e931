"""What a family's module says of a checkpoint: which stage it is, its config, and how its tensors are renamed."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.text import Tokenizer
from dalle2_jax.types import UserError
from dalle2_jax.weights.rules import Rule
from dalle2_jax.weights.tensors import Tensor, open_tensors


@dataclasses.dataclass(frozen=True)
class Hints:
    """What a state dict leaves open, and a user may know; None is as in the released files of its family.

    Attributes:
        head_channels: of each attention, of GLIDE's and ADM's networks.
        image_size: side of the pictures they were trained on.
        attention_order: of ADM's, "legacy" (a head's q, k, v together) or "new".
        attention: of LAION's prior, "relaxed" or "cosine".
    """

    head_channels: int | None = None
    image_size: int | None = None
    attention_order: str | None = None
    attention: str | None = None


@dataclasses.dataclass(frozen=True)
class Source:
    """A file or folder that somebody wants to import: for a file, the tensors it holds."""

    path: Path
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    hints: Hints = Hints()

    @classmethod
    def open(cls, path: Path, hints: Hints = Hints()) -> "Source":
        """Looks into a file, but not into a folder. UserError where there is none, or it is damaged."""
        if path.is_dir():
            return cls(path, hints=hints)
        if not path.exists():
            raise UserError(f"there is nothing at {path}")
        return cls(path, open_tensors(path), hints)

    def json(self, name: str) -> dict[str, Any] | None:
        """Returns a folder's JSON file, or None where it has none. UserError where it is damaged."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise UserError(f"{path} is not valid JSON ({error})") from error
        if not isinstance(content, dict):
            raise UserError(f"{path} is not a JSON object")
        return content

    def weights(self, *stems: str) -> dict[str, Tensor]:
        """Returns the tensors of a folder's file of one of these stems: "model", "diffusion_pytorch_model".

        Safetensors first, in one file or several; torch's own last.

        Raises:
            UserError: the folder has no such file.
        """
        endings = (".safetensors", ".safetensors.index.json", ".bin", ".bin.index.json")
        names = [f"{stem}{ending}" for ending in endings for stem in stems]
        for name in names:
            if (self.path / name).is_file():
                return open_tensors(self.path / name)
        raise UserError(f"{self.path} holds no weights: {names[0]} is missing")


@dataclasses.dataclass(frozen=True)
class Component:
    """A stage in a public checkpoint, or a part of one (a tower of CLIP, the prior's statistics), not read yet.

    Attributes:
        stage: "clip", "prior", "decoder", "upsampler_1" or "upsampler_2".
        family: what it is, for people: "Karlo prior".
        where: the file or folder, for errors.
        config: the stage's config, as train.py would store it: the sections model, text, diffusion, sampling,
            conditioning and embedding, as far as this part decides them.
        tensors: by key.
        params: the rename table of the stage's parameters.
        stats: and of its statistics.
        ignored: regular expressions of keys that are left out deliberately.
        tokenizer: what the checkpoint brings, if it does.
        embedding: the contract that it was trained under, where that is not ``clip_towers.EMBEDDING``.
        needs: what completes a part, for errors: "the image encoder".
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
    needs: str = ""


def merged(components: Sequence[Component]) -> dict[str, Component]:
    """Joins the parts of each stage.

    Of a part that comes twice (folders of a family repeat some) the first counts, and of a stage that two families
    have: ECLIPSE's prior, and Karlo's.

    Raises:
        UserError: two parts that say different things, or two CLIPs, of which the second has a tower more.
    """
    stages: dict[str, Component] = {}
    for part in components:
        before = stages.get(part.stage)
        if before is None:
            stages[part.stage] = part
        elif not _paths(part) & _paths(before) or (part.stage == "clip" and not _paths(part) <= _paths(before)):
            stages[part.stage] = _joined(before, part)
    return stages


def _paths(part: Component) -> set[str]:
    return {f"params/{rule.path}" for rule in part.params} | {f"stats/{rule.path}" for rule in part.stats}


def _joined(one: Component, other: Component) -> Component:
    where = one.where if one.where == other.where else f"{one.where} and {other.where}"
    twice = sorted(_paths(one) & _paths(other))
    if twice:
        raise UserError(f"{where} both hold stage {one.stage} (its {twice[0]}): give one of them")
    clash = set(one.tensors) & set(other.tensors)
    if clash:
        raise AssertionError(f"parts of {one.stage} share keys: {sorted(clash)[:4]}")
    return dataclasses.replace(
        one,
        family=one.family if one.family == other.family else f"{one.family}, {other.family}",
        where=where,
        config=_deep(one.config, other.config, where, ""),
        tensors={**one.tensors, **other.tensors},
        params=(*one.params, *other.params),
        stats=(*one.stats, *other.stats),
        ignored=(*one.ignored, *other.ignored),
        tokenizer=one.tokenizer or other.tokenizer,
        embedding=one.embedding or other.embedding,
        needs=one.needs and other.needs,
    )


def _deep(one: Mapping[str, Any], other: Mapping[str, Any], where: str, path: str) -> dict[str, Any]:
    """Joins two configs. None gives way to a value."""
    result = dict(one)
    for key, value in other.items():
        before = result.get(key)
        if isinstance(before, Mapping) and isinstance(value, Mapping):
            result[key] = _deep(before, value, where, f"{path}{key}.")
        elif before is None or key not in result:
            result[key] = value
        elif value is not None and value != before:
            raise UserError(f"{where} do not belong together: {path}{key} is {before!r} in one, {value!r} in the other")
    return result
