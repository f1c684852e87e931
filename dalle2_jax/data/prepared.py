"""The columns that a data set does not store: tokens of its captions, and degraded versions of its images."""

import copy
from collections.abc import Iterator, Sequence

import grain
import numpy as np

from dalle2_jax.data.images import degradation
from dalle2_jax.data.sources import (
    Generators,
    Indices,
    Rejections,
    Source,
    StoredEmbeddings,
    checked_columns,
    example,
    stacked,
)
from dalle2_jax.errors import ConfigError, UserError
from dalle2_jax.text import Tokenizer
from dalle2_jax.types import Degrading, Preprocessing

_TEXT = ("tokens", "mask")


class PreparedSource(Source):
    """A source with the columns ``tokens`` and ``mask`` of its captions, and ``low_res`` of its images.

    Stored tokens are used where they belong to the other columns: to ``text_seq``, or to embeddings without images.
    All other captions are encoded.

    Args:
        source: the data set.
        tokenizer: None adds no tokens.
        context_length: length of the tokens, L; 0 accepts stored tokens of any length.
        degrading: of an upsampler: ``image`` is then a random crop, and ``low_res`` its degraded version.

    Raises:
        UserError: the images are not of the size that ``degrading`` expects.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Tokenizer | None = None,
        context_length: int = 0,
        degrading: Degrading | None = None,
    ) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.context_length, self.degrading = context_length, degrading
        added = (*(_TEXT if tokenizer else ()), *(("low_res",) if degrading else ()))
        self.columns = tuple(dict.fromkeys((*source.columns, *added)))
        self._encodes = tokenizer is not None and not {*_TEXT} <= {*source.columns}
        if degrading:
            _check_size(source, degrading)

    def __len__(self) -> int:
        return len(self.source)

    def __repr__(self) -> str:
        return repr(self.source)

    def select(self, inputs: Sequence[str]) -> "PreparedSource":
        """Returns a source of these columns.

        Raises:
            MissingColumnsError: the source does not have one of them.
            ConfigError: the stored tokens that belong to them have another length than ``context_length``.
        """
        names = checked_columns(self, inputs)
        text = {*_TEXT} & {*names}
        stored = {*_TEXT} <= {*self.source.columns} and (
            self.tokenizer is None or "image" not in names or "text_seq" in names
        )
        if stored:
            self._check_context_length()
        selected = copy.copy(self)
        selected.columns, selected._encodes = names, bool(text) and not stored
        needed = [name for name in names if name != "low_res" and not (selected._encodes and name in text)]
        needed += ["caption"] * selected._encodes + ["image"] * ("low_res" in names)
        selected.source = self.source.select(needed)
        return selected

    def _check_context_length(self) -> None:
        stored = self.source.stored_embeddings
        if stored and self.context_length not in (0, stored.context_length):
            raise ConfigError(
                f"config.text.context_length must be {stored.context_length}, got {self.context_length}: "
                f"{stored.path} holds tokens of that length. Set --config.text.context_length={stored.context_length}",
                "text.context_length",
            )

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch; without ``rngs`` an example's crop and degradation depend on its index alone."""
        columns = self.source.fetch(indices, rngs)
        if self.degrading and "image" in columns:
            rngs = rngs or [np.random.default_rng(index) for index in indices]
            images = zip(columns["image"], rngs, strict=True)
            pairs = [degradation.pair(image, self.degrading, rng) for image, rng in images]
            columns |= stacked(pairs, ("image", "low_res"))
        if self.tokenizer is not None and self._encodes:
            tokens = self.tokenizer.encode(columns["caption"].tolist(), self.context_length)
            columns |= dict(zip(_TEXT, tokens, strict=True))
        return {name: columns[name] for name in self.columns}

    def captions(self, limit: int) -> Iterator[str]:
        """Yields captions of at most ``limit`` examples."""
        return self.source.captions(limit)

    def preprocessed(self, how: Preprocessing) -> "PreparedSource":
        """Returns the source with its images preprocessed as a CLIP reads them."""
        source = copy.copy(self)
        source.source = self.source.preprocessed(how)
        return source

    @property
    def rejections(self) -> Rejections:
        """The records rejected so far."""
        return self.source.rejections

    @property
    def stored_embeddings(self) -> StoredEmbeddings | None:
        """The stored embeddings that the source reads."""
        return self.source.stored_embeddings

    def order(self, seed: int) -> grain.MapDataset:
        """Returns an endless data set of indices, in the order of the source."""
        return self.source.order(seed)


def prepare(
    source: Source,
    tokenizer: Tokenizer | None = None,
    context_length: int = 0,
    degrading: Degrading | None = None,
) -> PreparedSource:
    """Returns a source with tokens and degraded images: see `PreparedSource`."""
    return PreparedSource(source, tokenizer, context_length, degrading)


def _check_size(source: Source, degrading: Degrading) -> None:
    side, expected = example(source.select(["image"]), 0)["image"].shape[0], degrading.image_size
    if side != expected:
        raise UserError(
            f"degradation {degrading.name!r} cuts crops from images of {expected} pixels, and the data's have {side}: "
            f"set config.data.resolution={expected}"
        )
