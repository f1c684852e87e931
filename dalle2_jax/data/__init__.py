"""Sources of captioned pictures and the stream of batches made from them; numpy only."""

from dalle2_jax.data.embeddings import Embedded, EmbeddingSource
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.folder import FolderRecords, FolderSource
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.paired import PairedSource
from dalle2_jax.data.pictures import PictureSource
from dalle2_jax.data.records import Record, Records, Rejected
from dalle2_jax.data.retrieval import RetrievalSource
from dalle2_jax.data.shapes import ShapesSource
from dalle2_jax.data.sources import (
    KINDS,
    EmbeddingsConfig,
    FolderConfig,
    MixtureConfig,
    ShapesConfig,
    Source,
    SourceConfig,
    TfdsConfig,
    WebdatasetConfig,
    make_source,
    source_named,
)
from dalle2_jax.data.stream import fixed_batch, make_stream
from dalle2_jax.data.tfds import TfdsRecords
from dalle2_jax.data.webdataset import WebdatasetRecords

__all__ = [
    "KINDS",
    "Embedded",
    "EmbeddingSource",
    "EmbeddingsConfig",
    "Filters",
    "FolderConfig",
    "FolderRecords",
    "FolderSource",
    "MixtureConfig",
    "MixtureSource",
    "PairedSource",
    "PictureSource",
    "Record",
    "Records",
    "Rejected",
    "RetrievalSource",
    "ShapesConfig",
    "ShapesSource",
    "Source",
    "SourceConfig",
    "TfdsConfig",
    "TfdsRecords",
    "WebdatasetConfig",
    "WebdatasetRecords",
    "fixed_batch",
    "make_source",
    "make_stream",
    "source_named",
]
