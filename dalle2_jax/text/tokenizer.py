"""The tokenizer protocol, and the padding of token ids to batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.errors import UserError


@runtime_checkable
class Tokenizer(Protocol):
    """Converts captions to rows of tokens. Tokenizers are picklable, because data workers receive them."""

    vocab_size: int
    """Number of tokens: every token id is smaller."""

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] and mask bool[B, L], which is true on begin, text and end tokens.

        A caption longer than L is truncated and still ends in the end token; "" is begin, end. Tokenizers without
        begin and end tokens (GLIDE's, class labels) return text tokens only, with a mask that is true on them.
        """
        ...

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions that `encode` truncates."""
        ...

    def save(self, directory: str | Path) -> None:
        """Writes the files that `dalle2_jax.text.load_tokenizer` reads, ``tokenizer.json`` last."""


def pack(
    ids: Sequence[Sequence[int]], context_length: int, begin: int, end: int, pad: int
) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
    """Adds begin and end tokens to each row of text ids, and truncates or pads it.

    Args:
        ids: text ids of each caption.
        context_length: row length L.
        begin: id of the begin token.
        end: id of the end token.
        pad: id of the pad token.

    Returns:
        Tokens int32[B, L] and mask bool[B, L], which is false on padding.

    Raises:
        UserError: ``context_length`` is less than 2.
    """
    if context_length < 2:
        raise UserError(f"context_length must be at least 2 (begin and end tokens), got {context_length}")
    tokens = np.full((len(ids), context_length), pad, np.int32)
    mask = np.zeros((len(ids), context_length), bool)
    for row, text in enumerate(ids):
        length = min(len(text) + 2, context_length)
        tokens[row, :length] = (begin, *text[: length - 2], end)
        mask[row, :length] = True
    return tokens, mask
