"""A tokenizer of class labels, for class-conditional networks."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.ranges import MAX_INT
from dalle2_jax.reading import parse_json
from dalle2_jax.text.storage import write_description

KIND = "labels"
_FILE = "labels.json"
_NUMBER = re.compile(r"[0-9]{1,9}")


class LabelTokenizer:
    """Converts the caption "7" to class 7. Captions that are not a number below ``count`` have no class.

    Args:
        count: number of classes.

    Raises:
        UserError: ``count`` is less than 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UserError(f"the number of classes must be at least 1, got {count}")
        self.vocab_size: int = count

    @classmethod
    def from_bytes(cls, content: bytes) -> "LabelTokenizer":
        """Returns the tokenizer in a file that `save` wrote.

        Raises:
            UserError: the file is damaged.
        """
        try:
            count = parse_json(content)["count"]
        except (ValueError, TypeError, KeyError):
            count = None
        if not isinstance(count, int) or count > MAX_INT:
            raise UserError("the file is damaged: it has no valid count of classes")
        return cls(count)

    def __repr__(self) -> str:
        return f"LabelTokenizer({self.vocab_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelTokenizer) and self.vocab_size == other.vocab_size

    def __hash__(self) -> int:
        return hash(self.vocab_size)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and its description to a folder; each file is written atomically."""
        write_atomically(Path(directory) / _FILE, json.dumps({"count": self.vocab_size}) + "\n")
        write_description(directory, KIND, _FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, 1] and mask bool[B, 1]; captions without a class are class 0 with a false mask.

        Raises:
            UserError: ``context_length`` is not 1.
        """
        if context_length != 1:
            raise UserError(f"context_length must be 1 for class labels, got {context_length}")
        labels = [self._label(caption) for caption in captions]
        tokens = np.asarray([label or 0 for label in labels], np.int32)
        mask = np.asarray([label is not None for label in labels], bool)
        return tokens[:, None], mask[:, None]

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns []: labels are never truncated."""
        return []

    def _label(self, caption: str) -> int | None:
        """Returns the class of a caption, or None; surrounding spaces are ignored."""
        number = caption.strip()
        label = int(number) if _NUMBER.fullmatch(number) else self.vocab_size
        return label if label < self.vocab_size else None
