"""Opens data sets: the section ``data`` of a config, or a name on a command line, to a `Source`."""

import dataclasses
import os
from pathlib import Path

from dalle2_jax.data.configs import (
    EmbeddingsConfig,
    FolderConfig,
    MixtureConfig,
    ShapesConfig,
    SourceConfig,
    TfdsConfig,
    WebdatasetConfig,
)
from dalle2_jax.data.embeddings.clip_retrieval import RetrievalSource
from dalle2_jax.data.embeddings.paired import PairedEmbeddings
from dalle2_jax.data.embeddings.source import EmbeddingSource
from dalle2_jax.data.formats.folder import FolderRecords, FolderSource
from dalle2_jax.data.formats.tfds import TfdsRecords
from dalle2_jax.data.formats.tfds_metadata import FEATURES
from dalle2_jax.data.formats.webdataset import WebdatasetRecords
from dalle2_jax.data.images.records import Records
from dalle2_jax.data.images.rejections import MAX_REJECTED
from dalle2_jax.data.images.source import ImageSource, check_arguments
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.sources import Source
from dalle2_jax.data.synthetic.shapes import ShapesSource
from dalle2_jax.errors import UserError


def make_source(config: SourceConfig, split: str) -> Source:
    """Opens a split (``train``, ``val`` …) of the data set that ``config`` describes.

    Raises:
        UserError: when the data set has no such split or cannot be read.
    """
    if isinstance(config, ShapesConfig):
        return ShapesSource(split, **dataclasses.asdict(config))
    if isinstance(config, EmbeddingsConfig):
        return _make_embedded(config, split)
    if isinstance(config, MixtureConfig):
        parts = dict(config.parts)
        weights = dict(config.weights) or dict.fromkeys(parts, 1.0)
        return MixtureSource({name: (make_source(part, split), weights[name]) for name, part in parts.items()})
    images = config.resolution, config.crop, config.filters, config.max_rejected
    check_arguments(config.resolution, config.crop, config.max_rejected)  # before much is read
    if config.embeddings:
        return PairedEmbeddings(EmbeddingSource(config.embeddings, split), _records(config, split), *images)
    if isinstance(config, FolderConfig):
        return FolderSource(config.path, split, *images)
    return ImageSource(_records(config, split), *images)


def _records(config: FolderConfig | TfdsConfig | WebdatasetConfig, split: str) -> Records:
    if isinstance(config, FolderConfig):
        return FolderRecords(config.path, split, config.filters)
    if isinstance(config, WebdatasetConfig):
        return WebdatasetRecords(config.path, split, config.filters)
    slices = {"train": config.train, "val": config.val}
    features = config.image, config.text, config.label, config.key, config.templates
    return TfdsRecords(config.path, slices.get(split, split), *features)


def _make_embedded(config: EmbeddingsConfig, split: str) -> Source:
    layouts = [Path(config.path) / "metadata", Path(config.path) / split / "metadata"]
    if config.text_path or any(layout.is_dir() for layout in layouts):
        return RetrievalSource(config.path, split, config.text_path)
    return EmbeddingSource(config.path, split)


def source_named(name: str, split: str, resolution: int, max_rejected: float = MAX_REJECTED) -> Source:
    """Opens a data set by its name on a command line: ``shapes`` (one or two objects), KIND:PATH or a path alone.

    The content of a path determines its kind; a URL alone is of tar shards. A data set of TFDS must be given with its
    kind: its files determine how they are read, so that untrusted files must not be taken for one. ``max_rejected`` is
    that of `ImageSource`.

    Raises:
        UserError: on any other name, or when the data set cannot be read.
    """
    if name == "shapes":
        return make_source(ShapesConfig(resolution), split)
    kind, _, path = name.partition(":")
    kinds = {"folder": FolderConfig, "webdataset": WebdatasetConfig, "tfds": TfdsConfig}
    if kind not in kinds:
        kind, path = _kind_of(name, split), name
    if kind is None or not path:
        raise UserError(f"unknown data set {name!r}: write shapes, folder:PATH, webdataset:PATH or tfds:PATH")
    return make_source(kinds[kind](path, resolution=resolution, max_rejected=max_rejected), split)


def _kind_of(path: str, split: str) -> str | None:
    """Returns the kind of the data set at a path, None if it is unknown."""
    if path.endswith(".tar") or "://" in path:
        return "webdataset"
    folder = Path(os.path.expanduser(path))
    if not folder.is_dir():
        return None
    if (folder / FEATURES).is_file():
        raise UserError(f"{path} holds {FEATURES}: write tfds:PATH if it is a data set of TFDS, else folder:PATH")
    return "webdataset" if any(any(place.glob("*.tar")) for place in (folder, folder / split)) else "folder"
