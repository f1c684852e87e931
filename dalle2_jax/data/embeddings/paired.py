"""Images with the stored embeddings of them and of their captions: a decoder trains on both without CLIP in memory."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np

from dalle2_jax.data.embeddings.digests import caption_digest, name_digest, same_image, thumbnail
from dalle2_jax.data.embeddings.source import EmbeddingSource
from dalle2_jax.data.images import decoding
from dalle2_jax.data.images.filters import Filters
from dalle2_jax.data.images.records import Record, Records, Rejected
from dalle2_jax.data.images.rejections import MAX_REJECTED
from dalle2_jax.data.images.source import ImageSource
from dalle2_jax.data.sources import (
    Generators,
    Indices,
    Source,
    StoredEmbeddings,
    checked_columns,
    stacked,
)
from dalle2_jax.data.storage.arrays import DIGESTS, NUMBERS, load_or_build, map_arrays
from dalle2_jax.files import cache_folder

_KINDS = (DIGESTS, NUMBERS)


class PairedEmbeddings(ImageSource):
    """An `ImageSource` whose examples also have the stored embeddings of their record, found by its name.

    Images and embeddings may differ in format, order and resolution. Records without an embedding are rejected, and
    so are those whose captions or image differ from those embedded under their name. Embeddings are of the centre crop
    whatever ``crop`` is.

    Args:
        embeddings: of the same split; the other arguments are those of `ImageSource`.

    Raises:
        UserError: as `ImageSource`, or a shard of the embeddings is damaged.
    """

    def __init__(
        self,
        embeddings: EmbeddingSource,
        records: Records,
        resolution: int = 64,
        crop: str = "center",
        filters: Filters = Filters(),
        max_rejected: float = MAX_REJECTED,
    ) -> None:
        super().__init__(records, resolution, crop, filters, max_rejected)
        self.embeddings, self._of_images = embeddings, self.columns
        self.columns += tuple(name for name in embeddings.columns if name not in self.columns)
        paths = [cache_folder("embeddings") / f"{embeddings.identity}.index"]
        (self._digests, self._rows), self._cached = load_or_build(
            paths, _KINDS, lambda _: True, lambda: (_sorted(embeddings), True)
        )

    def __repr__(self) -> str:
        return f"PairedEmbeddings({self.embeddings!r}, {self.records!r}, {self.resolution}, {self.crop!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self._cached is None:
            return vars(self)
        return {**vars(self), "_digests": None, "_rows": None}  # mapped again after unpickling

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._digests is None and self._cached is not None:
            self._digests, self._rows = map_arrays(self._cached, _KINDS)

    def select(self, inputs: Sequence[str]) -> Source:
        """Returns a source of these columns, which reads only what they need: images, embeddings or both.

        Raises:
            MissingColumnsError: the source does not have one of them.
        """
        names = checked_columns(self, inputs)
        stored = [name for name in names if name not in self._of_images]
        if "image" not in names:
            return self.embeddings.select(names)
        if not stored:
            images = ImageSource(self.records, self.resolution, self.crop, self.filters, self.max_rejected)
            return images.preprocessed(self.preprocessing).select(names)
        selected = copy.copy(self)
        selected.columns, selected.embeddings = names, self.embeddings.select(stored)
        return selected

    @property
    def stored_embeddings(self) -> StoredEmbeddings | None:
        """The stored embeddings of the images."""
        return self.embeddings.stored_embeddings

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch, as `ImageSource.fetch`, with the embeddings of each image and of its caption.

        Raises:
            UserError: no record can be used, or too many are rejected.
        """
        samples = [self.sample(index, rngs[row] if rngs else None) for row, index in enumerate(indices)]
        rows = [self._row(one.record) for one in samples]
        stored = self.embeddings.gather(rows, [one.caption for one in samples])
        columns = stored | stacked([one.example for one in samples], self._of_images)
        return {name: columns[name] for name in self.columns}

    def _resized(self, record: Record) -> np.ndarray | None:
        image = super()._resized(record)
        if image is None:
            return None
        captions, stored = self.embeddings.checksum(self._row(record))
        if captions != caption_digest(record.captions):
            raise Rejected("other captions")
        if not same_image(stored, thumbnail(decoding.crop(image, self.resolution))):
            raise Rejected("other image")
        return image

    def _row(self, record: Record) -> int:
        """Returns the row of a record's embeddings. Raises Rejected if it has none."""
        digest = np.uint64(name_digest(record.name))
        place = int(np.searchsorted(self._digests, digest))
        if place == len(self._digests) or self._digests[place] != digest:
            raise Rejected("not embedded")
        return int(self._rows[place])


def _sorted(embeddings: EmbeddingSource) -> list[np.ndarray]:
    """Returns the digests of the names that occur once, in order, and the row of each."""
    digests = embeddings.digests()
    found, first, count = np.unique(digests, return_index=True, return_counts=True)
    return [found[count == 1], first[count == 1]]
