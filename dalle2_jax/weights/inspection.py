"""Describes checkpoints: what they hold, and which systems their stages belong to."""

import dataclasses
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.weights.clip.towers import EMBEDDING
from dalle2_jax.weights.component import Component, Hints, make_hints
from dalle2_jax.weights.detect import Found, detect
from dalle2_jax.weights.features import folder
from dalle2_jax.weights.features.table import NETWORKS
from dalle2_jax.weights.rules import Rule

_EMBEDDING_LEAVES = ("out_proj/bias", "null_image_emb", "transformer/blocks/attn/ln_out/scale")
"""Leaves whose last axis is the image embedding: of a prior, of a decoder, of LAION's prior."""


@dataclasses.dataclass(frozen=True)
class ComponentSummary:
    """A stage in a checkpoint, or a part of one.

    Attributes:
        path: its file or folder.
        family: name of its family, as in "Karlo prior".
        stage: name of the stage, or of the feature network, as in "vgg16".
        parameters: number of parameters and statistics.
        dtypes: dtypes of its tensors in the file.
        embed_dim: width of the CLIP embeddings that it produces or takes; None if it takes none.
        embedding: {"normalisation": ..., "scale": ...} of these embeddings.
        complete: whether it is a complete stage, or a part that cannot be imported alone.
        completed_by: name of the missing part of an incomplete stage, where it is known.
    """

    path: str
    family: str
    stage: str
    parameters: int
    dtypes: tuple[str, ...]
    embed_dim: int | None
    embedding: Mapping[str, Any]
    complete: bool
    completed_by: str

    @property
    def part(self) -> str:
        """What the component becomes: "stage" or "network"."""
        return "network" if self.stage in NETWORKS else "stage"

    def compatibility(self) -> str:
        """Returns one line on the systems that the component belongs to."""
        embedding = f"{self.embed_dim} dimensions ({format_embedding(self.embedding)})"
        if self.stage in NETWORKS:
            return "a network for measures of images, not a stage"
        if self.stage == "clip":
            return f"produces embeddings of {embedding}"
        if not self.complete:
            return f"a part of a {self.stage}"
        if self.embed_dim is not None:
            return f"requires a CLIP of {embedding}"
        return "requires no CLIP or prior" if self.stage == "decoder" else "requires no CLIP: fits any system"


@dataclasses.dataclass(frozen=True)
class Inspection:
    """What was found in files and folders.

    Attributes:
        components: the components, in the order in which they were found.
        skipped: weights files of no known family.
    """

    components: tuple[ComponentSummary, ...]
    skipped: tuple[Path, ...]


def inspect(
    sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]], *, kind: str = "auto", **hints: Any
) -> Inspection:
    """Describes the checkpoints in files and folders, without reading their weights.

    Args:
        sources: a file or folder, or several.
        kind: one of ``kinds.KINDS`` or ``kinds.FEATURE_KINDS``, or "auto" to detect it.
        **hints: fields of `component.Hints`.

    Raises:
        WeightsError: a source holds no checkpoint of a known family, or a damaged one.
        UsageError: an unknown kind or hint.
    """
    paths = source_paths(sources)
    network = folder.find(paths, kind)
    if network is not None:
        return Inspection((_summarise_network(network),), ())
    found = find(paths, kind, make_hints(hints))
    return Inspection(tuple(map(summarise, found.components)), tuple(found.unknown))


def source_paths(sources: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> list[Path]:
    """Returns one or several sources as paths."""
    paths = [Path(sources)] if isinstance(sources, str | os.PathLike) else [*map(Path, sources)]
    return [path.expanduser() for path in paths]


def find(paths: Sequence[Path], kind: str, hints: Hints) -> Found:
    """Returns the components of all sources; errors as `inspect`."""
    found = [detect(path, kind, hints) for path in paths]
    return Found(
        [part for each in found for part in each.components], [path for each in found for path in each.unknown]
    )


def summarise(component: Component) -> ComponentSummary:
    """Returns the summary of a component."""
    return ComponentSummary(
        path=component.where,
        family=component.family,
        stage=component.stage,
        parameters=count_parameters(component),
        dtypes=tuple(sorted({tensor.dtype for tensor in component.tensors.values()})),
        embed_dim=embedding_width(component),
        embedding=component.config["embedding"]
        if "embedding" in component.config
        else component.embedding or EMBEDDING,
        complete=is_complete(component),
        completed_by=component.completed_by,
    )


def _summarise_network(network: folder.FoundNetwork) -> ComponentSummary:
    tensors = [network.tensors[key] for key in folder.check(network)]
    return ComponentSummary(
        path=network.where,
        family=network.published.family,
        stage=network.name,
        parameters=folder.count_parameters(network),
        dtypes=tuple(sorted({tensor.dtype for tensor in tensors})),
        embed_dim=None,
        embedding=EMBEDDING,
        complete=True,
        completed_by="",
    )


def is_complete(component: Component) -> bool:
    """Returns whether a component determines its whole stage: an image tower or statistics alone do not."""
    return "model" in component.config and (component.stage != "clip" or "text" in component.config)


def count_parameters(component: Component) -> int:
    """Returns the number of a component's parameters and statistics."""
    return sum(_size(component, rule) for rule in (*component.params, *component.stats))


def _size(component: Component, rule: Rule) -> int:
    shapes = (component.tensors[key].shape if key in component.tensors else () for key in rule.keys)
    return sum(map(math.prod, shapes))


def embedding_width(component: Component) -> int | None:
    """Returns the width of the CLIP embeddings that a component produces or takes; None if it takes none."""
    if component.stage == "clip":
        return component.config["model"]["embed_dim"]
    for rule in component.params:
        if rule.path in _EMBEDDING_LEAVES and rule.keys[0] in component.tensors:
            return component.tensors[rule.keys[0]].shape[-1]
    return None


def format_embedding(embedding: Mapping[str, Any]) -> str:
    """Returns the normalisation and scale of CLIP embeddings for a message, as in "unit x 17.2"."""
    return f"{embedding['normalisation']} x {embedding['scale']:.6g}"
