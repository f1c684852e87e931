"""Sources of captioned images and the stream of batches made from them; numpy only.

Names are imported when they are first used: a system is loaded and sampled without the libraries that read data sets.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dalle2_jax.data.arrays import ArraySource as ArraySource
    from dalle2_jax.data.arrays import as_source as as_source
    from dalle2_jax.data.configs import KINDS as KINDS
    from dalle2_jax.data.configs import EmbeddingsConfig as EmbeddingsConfig
    from dalle2_jax.data.configs import FolderConfig as FolderConfig
    from dalle2_jax.data.configs import MixtureConfig as MixtureConfig
    from dalle2_jax.data.configs import ShapesConfig as ShapesConfig
    from dalle2_jax.data.configs import SourceConfig as SourceConfig
    from dalle2_jax.data.configs import TfdsConfig as TfdsConfig
    from dalle2_jax.data.configs import WebdatasetConfig as WebdatasetConfig
    from dalle2_jax.data.embeddings.clip_retrieval import RetrievalSource as RetrievalSource
    from dalle2_jax.data.embeddings.paired import PairedEmbeddings as PairedEmbeddings
    from dalle2_jax.data.embeddings.source import EmbeddingSource as EmbeddingSource
    from dalle2_jax.data.formats.folder import FolderRecords as FolderRecords
    from dalle2_jax.data.formats.folder import FolderSource as FolderSource
    from dalle2_jax.data.formats.tfds import TfdsRecords as TfdsRecords
    from dalle2_jax.data.formats.webdataset import WebdatasetRecords as WebdatasetRecords
    from dalle2_jax.data.images.filters import Filters as Filters
    from dalle2_jax.data.images.records import Record as Record
    from dalle2_jax.data.images.records import Records as Records
    from dalle2_jax.data.images.records import Rejected as Rejected
    from dalle2_jax.data.images.records import RejectionCounts as RejectionCounts
    from dalle2_jax.data.images.source import ImageSource as ImageSource
    from dalle2_jax.data.mixture import MixtureSource as MixtureSource
    from dalle2_jax.data.opening import make_source as make_source
    from dalle2_jax.data.opening import source_named as source_named
    from dalle2_jax.data.prepared import PreparedSource as PreparedSource
    from dalle2_jax.data.prepared import prepare as prepare
    from dalle2_jax.data.sources import MissingColumnsError as MissingColumnsError
    from dalle2_jax.data.sources import Rejections as Rejections
    from dalle2_jax.data.sources import Source as Source
    from dalle2_jax.data.sources import StoredEmbeddings as StoredEmbeddings
    from dalle2_jax.data.sources import example as example
    from dalle2_jax.data.stream import Batches as Batches
    from dalle2_jax.data.stream import fixed_batch as fixed_batch
    from dalle2_jax.data.stream import make_stream as make_stream
    from dalle2_jax.data.synthetic.shapes import ShapesSource as ShapesSource

_NAMES = {
    "ArraySource": "arrays",
    "Batches": "stream",
    "EmbeddingSource": "embeddings.source",
    "EmbeddingsConfig": "configs",
    "Filters": "images.filters",
    "FolderConfig": "configs",
    "FolderRecords": "formats.folder",
    "FolderSource": "formats.folder",
    "ImageSource": "images.source",
    "KINDS": "configs",
    "MissingColumnsError": "sources",
    "MixtureConfig": "configs",
    "MixtureSource": "mixture",
    "PairedEmbeddings": "embeddings.paired",
    "PreparedSource": "prepared",
    "Record": "images.records",
    "Records": "images.records",
    "Rejected": "images.records",
    "RejectionCounts": "images.records",
    "Rejections": "sources",
    "RetrievalSource": "embeddings.clip_retrieval",
    "ShapesConfig": "configs",
    "ShapesSource": "synthetic.shapes",
    "Source": "sources",
    "SourceConfig": "configs",
    "StoredEmbeddings": "sources",
    "TfdsConfig": "configs",
    "TfdsRecords": "formats.tfds",
    "WebdatasetConfig": "configs",
    "WebdatasetRecords": "formats.webdataset",
    "as_source": "arrays",
    "example": "sources",
    "fixed_batch": "stream",
    "make_source": "opening",
    "make_stream": "stream",
    "prepare": "prepared",
    "source_named": "opening",
}
"""Name -> the module of this package that defines it."""

__all__ = [*_NAMES]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    """Imports a public name when it is first used (PEP 562)."""
    if name not in _NAMES:
        raise AttributeError(f"module 'dalle2_jax.data' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"dalle2_jax.data.{_NAMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
