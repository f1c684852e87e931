"""Class labels as a tokenizer, so that class-conditional networks read them where others read captions."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.files import write_atomically
from dalle2_jax.text.storage import write_description
from dalle2_jax.types import UserError

KIND = "labels"
_FILE = "labels.json"
_NUMBER = re.compile(r"[0-9]{1,9}")


class LabelTokenizer:
    """``count`` classes: the caption "7" is class 7, and any other text no class.

    Raises:
        UserError: when ``count`` is below 1.
    """

    def __init__(self, count: int) -> None:
        if count < 1:
            raise UserError(f"there must be 1 class or more, not {count}")
        self.vocab_size: int = count

    @classmethod
    def from_bytes(cls, content: bytes) -> "LabelTokenizer":
        """Reads what `save` wrote.

        Raises:
            UserError: when it is damaged.
        """
        try:
            count = json.loads(content)["count"]
        except (ValueError, TypeError, KeyError):
            count = None
        if not isinstance(count, int):
            raise UserError("this does not say how many classes there are: it is damaged")
        return cls(count)

    def __repr__(self) -> str:
        return f"LabelTokenizer({self.vocab_size})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, LabelTokenizer) and self.vocab_size == other.vocab_size

    def __hash__(self) -> int:
        return hash(self.vocab_size)

    def save(self, directory: str | Path) -> None:
        """Writes the count and its description into ``directory``, each file whole or not at all."""
        write_atomically(Path(directory) / _FILE, json.dumps({"count": self.vocab_size}) + "\n")
        write_description(directory, KIND, _FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, 1] and mask bool[B, 1]: false, with class 0, on what names no class.

        Raises:
            UserError: when ``context_length`` is not 1.
        """
        if context_length != 1:
            raise UserError(f"a class label is one token: set context_length to 1, not {context_length}")
        labels = [self._label(caption) for caption in captions]
        tokens = np.asarray([label or 0 for label in labels], np.int32)
        mask = np.asarray([label is not None for label in labels], bool)
        return tokens[:, None], mask[:, None]

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns no index: a label is never cut."""
        return []

    def _label(self, caption: str) -> int | None:
        """The class that a caption names, spaces around it aside."""
        number = caption.strip()
        label = int(number) if _NUMBER.fullmatch(number) else self.vocab_size
        return label if label < self.vocab_size else None
