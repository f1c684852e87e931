"""The `Source` protocol: random access to the columns of a data set.

A stage names the columns that it reads, `Source.select` returns a source of exactly these, and `make_stream` makes
batches of them. B is the number of examples, E the width of CLIP's embeddings, L the text length:

    image           uint8[B, H, W, 3]
    low_res         uint8[B, h, w, 3], the degraded image (`prepare`)
    tokens, mask    int32[B, L], bool[B, L] (`prepare`, or stored with embeddings)
    image_emb       float32[B, E], of stored embeddings, as all below
    text_emb        float32[B, E]
    text_seq        float32[B, L, D], the text transformer's final states
    null_text_emb   float32[B, E], of the empty caption, the same in every row
    null_text_seq   float32[B, L, D]
    null_mask       bool[B, L]
    caption         str[B], as an array of objects, as all below
    captions        tuple[str, ...][B], every caption of the example
    key             str[B], the name of the example in its data set
    substitute      bool[B], whether another example takes the place of one that cannot be used
"""

import copy
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import grain
import numpy as np
from jaxtyping import Int64

from dalle2_jax.errors import DataError
from dalle2_jax.types import Preprocessing

Indices = Sequence[int] | Int64[np.ndarray, "B"]
Generators = Sequence[np.random.Generator]

DESCRIPTIVE = ("caption", "captions", "key", "substitute")
"""Columns that describe examples and are no part of a training batch."""


class MissingColumnsError(DataError):
    """Columns that a stage reads and a data set does not have.

    Attributes:
        missing: names of the columns.
    """

    def __init__(self, message: str, missing: Sequence[str]) -> None:
        super().__init__(message)
        self.missing = tuple(missing)


@dataclass(frozen=True)
class StoredEmbeddings:
    """Where the embeddings of a source are stored, and which CLIP made them.

    Attributes:
        path: the folder, with the description of the CLIP in its sub-folder ``clip``.
        contract: the fields of the embedding contract.
        context_length: length of the stored tokens; None if none are stored.
    """

    path: Path
    contract: Mapping[str, Any]
    context_length: int | None


@dataclass(frozen=True)
class Rejections:
    """The records of a source that were rejected.

    Attributes:
        at_opening: cause to number of the records that were rejected when the data set was opened.
        records: name to cause of those rejected since, by this process and its workers.
        flawed: name to flaw of records that are used in spite of it.
    """

    at_opening: Mapping[str, int] = field(default_factory=dict)
    records: Mapping[str, str] = field(default_factory=dict)
    flawed: Mapping[str, str] = field(default_factory=dict)

    @property
    def counts(self) -> Counter[str]:
        """How many records were rejected, by cause."""
        return Counter(self.at_opening) + Counter(self.records.values())


@runtime_checkable
class Source(Protocol):
    """Random access to a data set; picklable, so that worker processes can read it.

    Subclasses implement ``__len__``, `fetch` and `captions`, and set ``columns``.

    Attributes:
        columns: names of the columns of every batch that `fetch` returns, and so those that `select` accepts.
    """

    columns: tuple[str, ...]

    def __len__(self) -> int: ...

    def fetch(self, indices: Indices, rngs: Generators | None = None) -> dict[str, np.ndarray]:
        """Returns a batch: for each of ``columns`` an array with a row for each index.

        Args:
            indices: of the examples; negative ones count from the end.
            rngs: one generator for each example, for its crop, its caption and so on: then an example does not depend
                on the batch that it is in. None for the fixed form that evaluations use: centre crop, fixed caption.

        Raises:
            IndexError: an index is out of range.
            DataError: the data cannot be read.
        """
        ...

    def captions(self, limit: int) -> Iterator[str]:
        """Yields captions of at most ``limit`` examples, for training a tokenizer."""
        ...

    def select(self, inputs: Sequence[str]) -> "Source":
        """Returns a source whose batches hold exactly these columns.

        Raises:
            MissingColumnsError: the source does not have one of them.
        """
        selected = copy.copy(self)
        selected.columns = checked_columns(self, inputs)
        return selected

    def preprocessed(self, how: Preprocessing) -> "Source":
        """Returns the source with its images preprocessed as a CLIP reads them; rendered images do not change."""
        return self

    @property
    def rejections(self) -> Rejections:
        """The records rejected so far."""
        return Rejections()

    @property
    def stored_embeddings(self) -> StoredEmbeddings | None:
        """The stored embeddings that the source reads; None for a source of images only."""
        return None

    def order(self, seed: int) -> grain.MapDataset:
        """Returns an endless data set of indices: each pass over the source in an order of its own."""
        return grain.MapDataset.range(len(self)).seed(seed).shuffle().repeat()


def example(source: Source, index: int) -> dict[str, Any]:
    """Returns one example of a source in its fixed form: the columns of `Source.fetch` without the axis B."""
    return {name: column[0] for name, column in source.fetch([index]).items()}


def checked_columns(source: Source, inputs: Sequence[str], hint: str = "") -> tuple[str, ...]:
    """Returns the names of columns as a tuple.

    Raises:
        MissingColumnsError: the source does not have one of them; the message ends with ``hint``.
    """
    missing = [name for name in inputs if name not in source.columns]
    if missing:
        hint = hint or f"it has {', '.join(source.columns)}; set config.data to a data set with {missing[0]}"
        raise MissingColumnsError(f"{source} has no {', '.join(missing)}: {hint}", missing)
    return tuple(dict.fromkeys(inputs))


def checked_indices(indices: Indices, count: int) -> Int64[np.ndarray, "B"]:
    """Returns indices as an array, negative ones counted from the end. IndexError if one is out of range."""
    places = np.asarray(indices, np.int64)
    wrong = places[(places < -count) | (places >= count)]
    if len(wrong):
        raise IndexError(f"example {wrong[0]} of {count}")
    return places % max(count, 1)


def stacked(examples: Sequence[Mapping[str, Any]], columns: Sequence[str]) -> dict[str, np.ndarray]:
    """Returns the batch of some examples: these columns of theirs, with an axis B in front."""
    return {name: _column([one[name] for one in examples]) for name in columns}


def _column(values: list[Any]) -> np.ndarray:
    return objects(values) if values and isinstance(values[0], str | tuple) else np.stack(values)


def objects(values: Sequence[Any]) -> np.ndarray:
    """Returns an array of Python objects; ``np.array`` would make a second axis of tuples."""
    column = np.empty(len(values), object)
    for place, value in enumerate(values):
        column[place] = value
    return column
