"""Configs of data sets: the section ``data`` of a config. `data.opening` opens what they describe.

Systems are loaded without the libraries that read data sets, so this module imports none of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from dalle2_jax.data.formats.tfds_metadata import TEMPLATES
from dalle2_jax.data.images.filters import Filters, as_pairs
from dalle2_jax.data.images.rejections import MAX_REJECTED
from dalle2_jax.errors import UserError
from dalle2_jax.ranges import Fraction, PositiveFloat, PositiveInt, Range, Side


@dataclass(frozen=True)
class ShapesConfig:
    """The generated data set of shapes; see `ShapesSource`."""

    resolution: Side = 64
    max_objects: Annotated[int, Range(1, 2)] = 2
    num_examples: PositiveInt = 50_000
    seed: Annotated[int, Range(0, 2**64 - 1)] = 0
    jitter: Annotated[float, Range(0, 0.2)] = 0.2
    unnamed_colours: Fraction = 0.0
    hard_negatives: bool = False


@dataclass(frozen=True)
class ImagesConfig:
    """Records of images at a path, and how an `ImageSource` reads them.

    Attributes:
        path: of the data set.
        resolution: side of the images in pixels.
        crop: "center", "random" or "shift".
        filters: which records are used.
        max_rejected: rejection rate, 0 to 1, above which a run ends.
        embeddings: folder of the stored embeddings of these images, for `PairedEmbeddings`; "" for none.
    """

    path: str = ""
    resolution: Side = 64
    crop: str = "center"
    filters: Filters = Filters()
    max_rejected: Fraction = MAX_REJECTED
    embeddings: str = ""


@dataclass(frozen=True)
class FolderConfig(ImagesConfig):
    """A folder of images with captions; see `FolderRecords`."""


@dataclass(frozen=True)
class EmbeddingsConfig:
    """Stored embeddings instead of images: `EmbeddingSource`, or `RetrievalSource` for clip-retrieval's layout.

    Attributes:
        path: of the folder.
        text_path: folder of the text embeddings, in clip-retrieval's layout; "" if they are in ``path``.
    """

    path: str = ""
    text_path: str = ""


@dataclass(frozen=True)
class TfdsConfig(ImagesConfig):
    """A data set of TFDS, prepared as ArrayRecord; see `TfdsRecords` for the features and the templates.

    ``train`` and ``val`` are the splits of TFDS that are used as these: ``train[:95%]`` and ``train[95%:]``, say.
    """

    train: str = "train"
    val: str = "val"
    image: str = "image"
    text: str = ""
    label: str = ""
    key: str = ""
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True)
class WebdatasetConfig(ImagesConfig):
    """Tar shards of images with captions; see `WebdatasetRecords`."""


@dataclass(frozen=True)
class MixtureConfig:
    """Several data sets at once; see `MixtureSource`.

    Attributes:
        parts: name to configuration, each of the mixture's resolution.
        weights: name to weight, of every part; empty for equal weights.
        resolution: side of all images in pixels.

    Raises:
        UserError: a part is a mixture, has embeddings or another resolution, or the weights do not fit the parts.
    """

    parts: Mapping[str, "SourceConfig"] | tuple = ()
    weights: Mapping[str, PositiveFloat] | tuple = ()
    resolution: Side = 64

    def __post_init__(self) -> None:
        for name in ("parts", "weights"):  # as pairs, so that a configuration can be hashed
            object.__setattr__(self, name, as_pairs(name, getattr(self, name)))
        for name, part in dict(self.parts).items():
            if isinstance(part, MixtureConfig):
                raise UserError(f"part {name} is a mixture itself: name its parts here, with its weight over theirs")
            if isinstance(part, EmbeddingsConfig) or (isinstance(part, ImagesConfig) and part.embeddings):
                raise UserError(f"part {name} has embeddings: a mixture has images only")
            if part.resolution != self.resolution:
                raise UserError(f"part {name} has resolution {part.resolution}, the mixture {self.resolution}")
        if self.weights and [*dict(self.weights)] != [*dict(self.parts)]:
            names = ", ".join(dict(self.parts))
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
"""Configurations by their ``kind`` in a config file."""
