"""Sources of captioned images and the stream of batches made from them; numpy only."""

from dalle2_jax.data.arrays import ArraySource, as_source
from dalle2_jax.data.configs import (
    KINDS,
    EmbeddingsConfig,
    FolderConfig,
    MixtureConfig,
    ShapesConfig,
    SourceConfig,
    TfdsConfig,
    WebdatasetConfig,
    make_source,
    source_named,
)
from dalle2_jax.data.embeddings.clip_retrieval import RetrievalSource
from dalle2_jax.data.embeddings.paired import PairedEmbeddings
from dalle2_jax.data.embeddings.source import EmbeddingSource
from dalle2_jax.data.formats.folder import FolderRecords, FolderSource
from dalle2_jax.data.formats.tfds import TfdsRecords
from dalle2_jax.data.formats.webdataset import WebdatasetRecords
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.data.images.records import Record, Records, Rejected, RejectionCounts
from dalle2_jax.data.images.source import ImageSource
from dalle2_jax.data.mixture import MixtureSource
from dalle2_jax.data.prepared import PreparedSource, prepare
from dalle2_jax.data.sources import (
    MissingColumnsError,
    Rejections,
    Source,
    StoredEmbeddings,
    example,
)
from dalle2_jax.data.stream import Batches, fixed_batch, make_stream
from dalle2_jax.data.synthetic.shapes import ShapesSource

__all__ = [
    "KINDS",
    "ArraySource",
    "Batches",
    "EmbeddingSource",
    "EmbeddingsConfig",
    "Filters",
    "FolderConfig",
    "FolderRecords",
    "FolderSource",
    "ImageSource",
    "MissingColumnsError",
    "MixtureConfig",
    "MixtureSource",
    "PairedEmbeddings",
    "PreparedSource",
    "Record",
    "Records",
    "Rejected",
    "RejectionCounts",
    "Rejections",
    "RetrievalSource",
    "ShapesConfig",
    "ShapesSource",
    "Source",
    "SourceConfig",
    "StoredEmbeddings",
    "TfdsConfig",
    "TfdsRecords",
    "WebdatasetConfig",
    "WebdatasetRecords",
    "as_source",
    "example",
    "fixed_batch",
    "make_source",
    "make_stream",
    "prepare",
    "source_named",
]
