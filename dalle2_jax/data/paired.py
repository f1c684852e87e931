"""Pictures beside what CLIP said of them and of their captions: a decoder learns from both without CLIP in memory."""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.data import images
from dalle2_jax.data.arrays import cache_folder, kept, map_arrays
from dalle2_jax.data.embeddings import STATES, EmbeddingSource, digest, digest_of, look, look_alike
from dalle2_jax.data.filters import Filters
from dalle2_jax.data.pictures import MAX_REJECTED, PictureSource
from dalle2_jax.data.records import Record, Records, Rejected


class PairedSource(PictureSource):
    """A `PictureSource` whose examples have the stored embeddings of their record too, found by its name.

    The two may be of different forms, orders and resolutions. Pictures that were not embedded are refused, and those
    that have other captions or look otherwise than what was embedded under their name. Embeddings are of the centre
    crop, whatever ``crop`` is.

    Args:
        embeddings: of the same split; all else is as for `PictureSource`.

    Raises:
        UserError: as for `PictureSource`, or when a shard of the embeddings is damaged.
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
        self.embeddings = embeddings
        homes = [cache_folder("embeddings") / f"{embeddings.identity}.index"]
        (self._digests, self._rows), self._home = kept(homes, 2, lambda _: True, lambda: (_sorted(embeddings), True))

    def __repr__(self) -> str:
        return f"PairedSource({self.embeddings!r}, {self.records!r}, {self.resolution}, {self.crop!r})"

    def __getstate__(self) -> dict[str, Any]:
        if self._home is None:
            return vars(self)
        return {**vars(self), "_digests": None, "_rows": None}  # mapped again where they are needed

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._digests is None:
            self._digests, self._rows = map_arrays(self._home, 2)

    @property
    def path(self) -> Path:
        """The folder of the embeddings."""
        return self.embeddings.path

    @property
    def contract(self) -> Mapping[str, Any]:
        """The embedding contract of that folder."""
        return self.embeddings.contract

    def telling(self, names: tuple[str, ...], context_length: int) -> "PairedSource":
        """Returns the source with these rows, of CLIP's, in its batches. UserError if it lacks one."""
        told = copy.copy(self)
        length = context_length if STATES in names else self.embeddings.context_length  # else tokens are made anew
        told.embeddings = self.embeddings.telling(names, length)
        return told

    def alone(self) -> PictureSource:
        """Returns the pictures without the embeddings."""
        return PictureSource(self.records, self.resolution, self.crop, self.filters, self.max_rejected)

    def __getitem__(self, index: int) -> dict:
        """Returns what `PictureSource` does, and the rows of the picture and its fixed caption."""
        picture, record, place = self._usable(index)
        return {**self._example(index, picture, record, place), **self._told(record, record.fixed)}

    def draw(self, index: int, rng: np.random.Generator) -> tuple[dict[str, np.ndarray], str]:
        """Returns the rows of an example, with the picture and the caption that `PictureSource` would draw."""
        image, record, number = self._drawn(index, rng)
        return {"image": image, **self._told(record, number)}, record.captions[number]

    def _fitted(self, record: Record) -> np.ndarray | None:
        picture = super()._fitted(record)
        if picture is None:
            return None
        said, seen = self.embeddings.witness(self._row(record))
        if said != digest_of(record.captions):
            raise Rejected("other captions")
        if not look_alike(seen, look(images.crop(picture, self.resolution))):
            raise Rejected("other picture")
        return picture

    def _told(self, record: Record, caption: int) -> dict[str, np.ndarray]:
        rows = self.embeddings.rows(self._row(record), caption)
        if STATES not in self.embeddings.fields:  # tokens are of the stage that reads them
            del rows["tokens"], rows["mask"]
        return rows

    def _row(self, record: Record) -> int:
        """The row of a record's embeddings. Raises Rejected if it has none."""
        wanted = np.uint64(digest(record.name))
        place = int(np.searchsorted(self._digests, wanted))
        if place == len(self._digests) or self._digests[place] != wanted:
            raise Rejected("not embedded")
        return int(self._rows[place])


def _sorted(embeddings: EmbeddingSource) -> list[np.ndarray]:
    """The digests of the names that are there once, in order, and the row of each."""
    digests = embeddings.digests()
    found, first, count = np.unique(digests, return_index=True, return_counts=True)
    return [found[count == 1], first[count == 1]]
