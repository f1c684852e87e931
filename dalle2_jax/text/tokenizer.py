"""What every tokenizer offers, and how captions become rows of a batch."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.types import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Captions to token rows. A tokenizer is picklable, so that it can travel to worker processes."""

    vocab_size: int
    """Rows that an embedding table needs: every token is below it."""

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] and mask bool[B, L], true on begin, text and end tokens.

        A caption too long for L is cut, and its last token is still the end token; "" is begin, end. Tokenizers
        of networks that know no such frame (GLIDE's, class labels) have text alone, and true on it alone.
        """

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions that `encode` would cut."""

    def save(self, directory: str | Path) -> None:
        """Writes what `dalle2_jax.text.load_tokenizer` needs, ``tokenizer.json`` last."""


def pack(
    ids: Sequence[Sequence[int]], context_length: int, begin: int, end: int, pad: int
) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Frames each row of text ids with ``begin`` and ``end``, cuts it to fit and pads it.

    Raises:
        UserError: when ``context_length`` has no room for begin and end.
    """
    if context_length < 2:
        raise UserError(f"context_length {context_length} has no room for the begin and end tokens: use 2 or more")
    tokens = np.full((len(ids), context_length), pad, np.int32)
    mask = np.zeros((len(ids), context_length), bool)
    for row, text in enumerate(ids):
        length = min(len(text) + 2, context_length)
        tokens[row, :length] = (begin, *text[: length - 2], end)
        mask[row, :length] = True
    return tokens, mask
