"""What a data set offers, and data sets by configuration.

A source is random access, so the stream can shuffle, shard and resume it by index alone.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from dalle2_jax.data.embeddings import Embedded, EmbeddingSource
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.folder import FolderRecords, FolderSource
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.paired import PairedSource
from dalle2_jax.data.pictures import MAX_REJECTED, PictureSource, check_arguments
from dalle2_jax.data.records import Records
from dalle2_jax.data.retrieval import RetrievalSource
from dalle2_jax.data.shapes import ShapesSource
from dalle2_jax.data.tfds import TEMPLATES, TfdsRecords
from dalle2_jax.data.webdataset import WebdatasetRecords
from dalle2_jax.types import UserError


@runtime_checkable
class Source(Protocol):
    """A captioned set of pictures, all of one size; picklable."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> dict:
        """Returns ``{"image": uint8[H, W, 3], "captions": tuple[str, ...], "caption": str}``.

        Always the same for an index; ``caption`` is the one of ``captions`` that evaluations use. Where records have
        names, or one may stand in for another, there are ``key`` and ``stands_in`` too.
        """

    def draw(self, index: int, rng: np.random.Generator) -> tuple[UInt8[np.ndarray, "H W 3"], str]:
        """Returns the picture as training sees it (a random crop, say) and one of its captions."""

    def captions(self, limit: int) -> Iterator[str]:
        """Yields captions of at most ``limit`` pictures, for training a tokenizer."""


@dataclass(frozen=True)
class ShapesConfig:
    """The embedded data set; see `ShapesSource`."""

    resolution: int = 64
    max_objects: int = 1
    num_examples: int = 50_000
    seed: int = 0
    jitter: float = 0.2


@dataclass(frozen=True)
class PicturesConfig:
    """Records of pictures at a path, and how a `PictureSource` makes examples of them.

    ``embeddings``: where `embed` wrote what CLIP says of them, for a `PairedSource`; "" for none.
    """

    path: str = ""
    resolution: int = 64
    crop: str = "center"
    filters: Filters = Filters()
    max_rejected: float = MAX_REJECTED
    embeddings: str = ""


@dataclass(frozen=True)
class FolderConfig(PicturesConfig):
    """A folder of pictures with captions; see `FolderRecords`."""


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Embeddings in place of pictures, as `EmbeddingSource` or, in clip-retrieval's layout, `RetrievalSource` has them.

    ``text_path``: of clip-retrieval's layout, where the text embeddings are; "" if they lie beside the others.
    """

    path: str = ""
    text_path: str = ""


@dataclass(frozen=True)
class TfdsConfig(PicturesConfig):
    """A data set of TFDS, prepared as ArrayRecord; see `TfdsRecords` for the features and the templates.

    ``train`` and ``val`` are the splits of it that are used as such: ``train[:95%]`` and ``train[95%:]``, say.
    """

    train: str = "train"
    val: str = "val"
    image: str = "image"
    text: str = ""
    label: str = ""
    key: str = ""
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True)
class WebdatasetConfig(PicturesConfig):
    """Tar shards of pictures with captions; see `WebdatasetRecords`."""


@dataclass(frozen=True)
class MixtureConfig:
    """Several data sets at once; see `MixtureSource`.

    Attributes:
        parts: name to configuration, each of the mixture's resolution.
        weights: name to weight, of every part; without any, each part counts as much as any other.
        resolution: of all pictures.

    Raises:
        UserError: when there are no parts, or they do not agree with the rest.
    """

    parts: Mapping[str, "SourceConfig"] | tuple = ()
    weights: Mapping[str, float] | tuple = ()
    resolution: int = 64

    def __post_init__(self) -> None:
        for name in ("parts", "weights"):  # as pairs, so that a configuration can be hashed
            object.__setattr__(self, name, tuple(sorted(dict(getattr(self, name)).items())))
        for name, part in self.parts:
            if isinstance(part, MixtureConfig):
                raise UserError(f"part {name} is a mixture itself: name its parts here, with its weight over theirs")
            if isinstance(part, EmbeddingsConfig) or getattr(part, "embeddings", ""):
                raise UserError(f"part {name} has embeddings: a mixture is of pictures alone")
            if part.resolution != self.resolution:
                raise UserError(f"part {name} has resolution {part.resolution}, the mixture {self.resolution}")
        if self.weights and [name for name, _ in self.weights] != [name for name, _ in self.parts]:
            names = ", ".join(name for name, _ in self.parts)
            raise UserError(f"weights must name every part and nothing else: {names}")


SourceConfig = ShapesConfig | FolderConfig | WebdatasetConfig | TfdsConfig | EmbeddingsConfig | MixtureConfig

KINDS: dict[str, type] = {
    "shapes": ShapesConfig,
    "folder": FolderConfig,
    "tfds": TfdsConfig,
    "embeddings": EmbeddingsConfig,
    "webdataset": WebdatasetConfig,
    "mixture": MixtureConfig,
}
"""Configurations by the name that a config file gives as ``kind``."""


def make_source(config: SourceConfig, split: str) -> Source | Embedded:
    """Opens a split (``train``, ``val`` …) of the data set that ``config`` describes.

    Raises:
        UserError: when the data set has no such split or cannot be read.
    """
    if isinstance(config, ShapesConfig):
        return ShapesSource(
            split, config.resolution, config.seed, config.max_objects, config.num_examples, config.jitter
        )
    if isinstance(config, EmbeddingsConfig):
        return _make_embedded(config, split)
    if isinstance(config, MixtureConfig):
        weights = dict(config.weights) or {name: 1.0 for name, _ in config.parts}
        return MixtureSource({name: (make_source(part, split), weights[name]) for name, part in config.parts})
    how = config.resolution, config.crop, config.filters, config.max_rejected
    check_arguments(config.resolution, config.crop, config.max_rejected)  # before much is read
    if config.embeddings:
        return PairedSource(EmbeddingSource(config.embeddings, split), _records(config, split), *how)
    if isinstance(config, FolderConfig):
        return FolderSource(config.path, split, *how)
    return PictureSource(_records(config, split), *how)


def _records(config: FolderConfig | TfdsConfig | WebdatasetConfig, split: str) -> Records:
    if isinstance(config, FolderConfig):
        return FolderRecords(config.path, split, config.filters)
    if isinstance(config, WebdatasetConfig):
        return WebdatasetRecords(config.path, split, config.filters)
    slices = {"train": config.train, "val": config.val}
    features = config.image, config.text, config.label, config.key, config.templates
    return TfdsRecords(config.path, slices.get(split, split), *features)


def _make_embedded(config: EmbeddingsConfig, split: str) -> Embedded:
    layouts = [Path(config.path) / "metadata", Path(config.path) / split / "metadata"]
    if config.text_path or any(layout.is_dir() for layout in layouts):
        return RetrievalSource(config.path, split, config.text_path)
    return EmbeddingSource(config.path, split)


def source_named(name: str, split: str, resolution: int, max_rejected: float = MAX_REJECTED) -> Source:
    """Opens a data set by its name on a command line: ``shapes`` (one or two objects), KIND:PATH or a path alone.

    What lies at a path tells its kind; a URL alone is of tar shards. ``max_rejected`` is as in `PictureSource`.

    Raises:
        UserError: on any other name, or when the data set cannot be read.
    """
    if name == "shapes":
        return make_source(ShapesConfig(resolution, max_objects=2), split)
    kind, _, path = name.partition(":")
    kinds = {"folder": FolderConfig, "webdataset": WebdatasetConfig, "tfds": TfdsConfig}
    if kind not in kinds:
        kind, path = _kind_of(name, split), name
    if kind is None or not path:
        raise UserError(f"unknown data set {name!r}: write shapes, folder:PATH, webdataset:PATH or tfds:PATH")
    return make_source(kinds[kind](path, resolution=resolution, max_rejected=max_rejected), split)


def _kind_of(path: str, split: str) -> str | None:
    """The kind of data set that lies at a path, None if that cannot be told."""
    if path.endswith(".tar") or "://" in path:
        return "webdataset"
    folder = Path(path).expanduser()
    if not folder.is_dir():
        return None
    if (folder / "features.json").is_file():
        return "tfds"
    return "webdataset" if any(any(place.glob("*.tar")) for place in (folder, folder / split)) else "folder"
