"""The byte-pair tokenizers of public checkpoints: CLIP's and GLIDE's (GPT-2's vocabulary).

CLIP (Radford et al., arXiv 2103.00020, section 2.4): 49,408 ids, begin and end tokens the last two. GLIDE
(Nichol et al., arXiv 2112.10741, section 3.1): 50,257 ids, the last one is the end token, which also pads.

The released vocabularies are in this folder as gzipped lists of merges. ``clip_merges.txt.gz`` holds the 48,894 merges
that CLIP uses of ``bpe_simple_vocab_16e6.txt`` from github.com/openai/CLIP (MIT licence).
``gpt2_merges.txt.gz`` is ``vocab.bpe`` from github.com/openai/gpt-2 (modified MIT licence), which GLIDE uses as well.
Both licences are in ``vocabularies_license.txt``.
"""

import functools
import gzip
import json
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import parse_json
from dalle2_jax.text.merges import (
    LETTERS_BY_ID,
    BytePairs,
    Merge,
    decompress,
    read_merges,
    write_merges,
)
from dalle2_jax.text.storage import write_description
from dalle2_jax.text.tokenizer import pack
from dalle2_jax.text.words import clip_words, glide_words

CLIP_KIND, GLIDE_KIND = "clip_byte_pair", "glide_byte_pair"
_CLIP_FILE, _GLIDE_FILE = "byte_pair.json.gz", "merges.txt.gz"
BEGIN, END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_VOCAB_SIZE, GLIDE_VOCAB_SIZE = 49_408, 50_257


class ClipTokenizer:
    """CLIP's tokenizer, with any vocabulary.

    Args:
        tokens: the token of every id.
        merges: the merges by rank.
        begin: id of the begin token.
        end: id of the end token.
        pad: id of the pad token. CLIP pads with 0, some Hugging Face folders with the end token; models that use the
            mask do not depend on it.
        literal: tokens that are recognised anywhere in a caption, even within a word. In Hugging Face's tokenizers
            these are the control tokens, including the pad token "!". OpenAI's tokenizer has none, and recognises
            begin and end tokens as words.
        unknown: id of a byte without a token; None if every byte must have one.
        html_unescape: whether HTML entities in captions ("&amp;") are decoded, as in CLIP's training. The tokenizers
            of transformers 5 do not decode them.

    Raises:
        UserError: tokens and merges do not belong together.
    """

    def __init__(
        self,
        tokens: Sequence[str],
        merges: Sequence[Merge],
        begin: int,
        end: int,
        pad: int = 0,
        literal: Sequence[str] = (),
        unknown: int | None = None,
        html_unescape: bool = True,
    ) -> None:
        pairs = tuple((left, right) for left, right in merges)
        self._fields = tuple(tokens), pairs, begin, end, pad, tuple(literal), unknown, html_unescape
        self.html_unescape = html_unescape
        ids = {token: number for number, token in enumerate(tokens)}
        if not any(token.endswith(_WORD_END) for token in tokens):
            raise UserError(f"no token ends in {_WORD_END}: this is not a CLIP tokenizer")
        self._special = {word: ids[word] for word in (BEGIN, END, *literal) if word in ids}
        self._literal = re.compile(f"({'|'.join(map(re.escape, literal))})") if literal else None
        self._pairs = BytePairs(ids, merges, _WORD_END, unknown)
        self.begin, self.end, self.pad = begin, end, pad
        self.vocab_size: int = len(tokens)

    @classmethod
    def from_merges(cls, merges: Sequence[Merge]) -> "ClipTokenizer":
        """Returns a tokenizer with OpenAI's ids: 256 bytes, the same at the end of a word, the merges, begin, end."""
        made = [left + right for left, right in merges]
        tokens = [*LETTERS_BY_ID, *(letter + _WORD_END for letter in LETTERS_BY_ID), *made, BEGIN, END]
        return cls(tokens, merges, begin=len(tokens) - 2, end=len(tokens) - 1)

    @classmethod
    def from_bytes(cls, content: bytes) -> "ClipTokenizer":
        """Returns the tokenizer in the bytes of `to_bytes`.

        Raises:
            UserError: they are damaged.
        """
        try:
            fields = parse_json(decompress(content))
            if not isinstance(fields.get("html_unescape", True), bool):
                raise ValueError
            fields["merges"] = [(left, right) for left, right in (merge.split(" ") for merge in fields["merges"])]
            numbers = [fields[name] for name in ("begin", "end", "pad")] + [fields.get("unknown") or 0]
            if not all(isinstance(number, int) and 0 <= number < len(fields["tokens"]) for number in numbers):
                raise ValueError("a control token has no id")
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("this is not a saved CLIP tokenizer, or it is damaged") from None

    def with_html_unescape(self, html_unescape: bool) -> "ClipTokenizer":
        """Returns this tokenizer with another ``html_unescape``."""
        return ClipTokenizer(*self._fields[:-1], html_unescape)

    def to_bytes(self) -> bytes:
        """Returns the content of the file that `save` writes."""
        names = ("tokens", "merges", "begin", "end", "pad", "literal", "unknown", "html_unescape")
        fields: dict[str, Any] = dict(zip(names, self._fields, strict=True))
        if self.html_unescape:
            del fields["html_unescape"]  # the default is omitted, so that earlier versions can read the file
        fields["merges"] = [" ".join(merge) for merge in fields["merges"]]
        return gzip.compress(json.dumps(fields).encode(), mtime=0)

    def __repr__(self) -> str:
        return f"ClipTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ClipTokenizer, self._fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipTokenizer) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and its description to a folder; each file is written atomically."""
        write_atomically(Path(directory) / _CLIP_FILE, self.to_bytes())
        write_description(directory, CLIP_KIND, _CLIP_FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] (begin, text, end, pad) and mask bool[B, L] (false on pad).

        Raises:
            UserError: ``context_length`` is less than 2.
        """
        return pack([self.ids(caption) for caption in captions], context_length, self.begin, self.end, self.pad)

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions that are truncated at ``context_length``."""
        return [index for index, caption in enumerate(captions) if len(self.ids(caption)) + 2 > context_length]

    def ids(self, caption: str) -> list[int]:
        """Returns the token ids of a caption, without begin and end."""
        special, pairs = self._special, self._pairs
        ids: list[int] = []
        for word in clip_words(caption, self._literal, self.html_unescape):
            if word in special:
                ids.append(special[word])
            else:
                ids.extend(pairs(word))
        return ids


class GlideTokenizer:
    """GLIDE's tokenizer: 256 bytes, GPT-2's merges, and the end token, which pads. It has no begin token.

    Args:
        merges: the merges by rank.

    Raises:
        UserError: a part of a merge has no token.
    """

    def __init__(self, merges: Sequence[Merge]) -> None:
        self._merges = tuple(merges)
        tokens = [*LETTERS_BY_ID, *(left + right for left, right in merges)]
        self._pairs = BytePairs({token: number for number, token in enumerate(tokens)}, merges)
        self.vocab_size: int = len(tokens) + 1
        self.pad: int = len(tokens)

    @classmethod
    def from_bytes(cls, content: bytes) -> "GlideTokenizer":
        """Returns the tokenizer of a list of merges: the bytes of `to_bytes`, or GPT-2's ``vocab.bpe``.

        Raises:
            UserError: the list is damaged.
        """
        return cls(read_merges(content))

    def to_bytes(self) -> bytes:
        """Returns the content of the file that `save` writes."""
        return write_merges(self._merges)

    def __repr__(self) -> str:
        return f"GlideTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple[Any, ...]:
        return GlideTokenizer, (self._merges,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GlideTokenizer) and self._merges == other._merges

    def __hash__(self) -> int:
        return hash(self._merges)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and its description to a folder; each file is written atomically."""
        write_atomically(Path(directory) / _GLIDE_FILE, self.to_bytes())
        write_description(directory, GLIDE_KIND, _GLIDE_FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] and mask bool[B, L], which is true on text tokens.

        Unlike those of other tokenizers, rows have no begin and end tokens: captions are truncated at L, and "" is
        padding only.

        Raises:
            UserError: ``context_length`` is less than 1.
        """
        if context_length < 1:
            raise UserError(f"context_length must be at least 1, got {context_length}")
        tokens = np.full((len(captions), context_length), self.pad, np.int32)
        mask = np.zeros((len(captions), context_length), bool)
        for row, caption in enumerate(captions):
            ids = self.ids(caption)[:context_length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions with more than ``context_length`` tokens."""
        return [index for index, caption in enumerate(captions) if len(self.ids(caption)) > context_length]

    def ids(self, caption: str) -> list[int]:
        """Returns the token ids of a caption."""
        pairs = self._pairs
        return [token for word in glide_words(caption) for token in pairs(word)]


def clip_tokenizer(vocab_size: int | None = None) -> ClipTokenizer:
    """Returns the released CLIP tokenizer, or one with its first ``vocab_size`` - 514 merges.

    Raises:
        UserError: ``vocab_size`` is not between 514 and the released size.
    """
    return ClipTokenizer.from_merges(_released("clip_merges.txt.gz", vocab_size, 514, CLIP_VOCAB_SIZE))


def glide_tokenizer(vocab_size: int | None = None) -> GlideTokenizer:
    """Returns the released GLIDE tokenizer, or one with its first ``vocab_size`` - 257 merges.

    Raises:
        UserError: ``vocab_size`` is not between 257 and the released size.
    """
    return GlideTokenizer(_released("gpt2_merges.txt.gz", vocab_size, 257, GLIDE_VOCAB_SIZE))


def _released(file: str, vocab_size: int | None, fixed: int, full: int) -> tuple[Merge, ...]:
    """Returns the first merges of a released vocabulary, of which ``fixed`` tokens are not merges."""
    vocab_size = full if vocab_size is None else vocab_size
    if not fixed <= vocab_size <= full:
        raise UserError(f"vocab_size must be from {fixed} to {full} (the released vocabulary), got {vocab_size}")
    return _shipped(file)[: vocab_size - fixed]


@functools.cache
def _shipped(file: str) -> tuple[Merge, ...]:
    return read_merges((resources.files("dalle2_jax.text") / file).read_bytes())
