"""The byte-pair tokenizers of public checkpoints: CLIP's, and GLIDE's, which is GPT-2's.

CLIP (Radford et al., arXiv 2103.00020, section 2.4): 49,408 ids, begin and end tokens the last two. GLIDE
(Nichol et al., arXiv 2112.10741, section 3.1): 50,257 ids, the end token the last one, and used for padding.

The released vocabularies lie beside this file as gzipped lists of merges. ``clip_merges.txt.gz`` holds the first
48,894 merges, those that are used, of ``bpe_simple_vocab_16e6.txt`` from github.com/openai/CLIP (MIT licence).
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

import numpy as np
from jaxtyping import Bool, Int32

from dalle2_jax.files import write_atomically
from dalle2_jax.text.merges import LETTERS_BY_ID, BytePairs, Merge, read_merges, unzipped, write_merges
from dalle2_jax.text.storage import write_description
from dalle2_jax.text.tokenizer import pack
from dalle2_jax.text.words import clip_words, glide_words
from dalle2_jax.types import UserError

CLIP_KIND, GLIDE_KIND = "clip_byte_pair", "glide_byte_pair"
_CLIP_FILE, _GLIDE_FILE = "byte_pair.json.gz", "merges.txt.gz"
BEGIN, END, _WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CLIP_VOCAB_SIZE, GLIDE_VOCAB_SIZE = 49_408, 50_257


class ClipTokenizer:
    """A vocabulary of CLIP's kind.

    Args:
        tokens: the token of every id.
        merges: in the order in which they were learned.
        begin, end, pad: their ids. CLIP itself pads with 0, some Hugging Face folders with the end token; a
            model that is given the mask does not see which.
        literal: tokens that a caption may spell out anywhere, even within a word. Hugging Face has its control
            tokens so, the pad token "!" among them; for OpenAI's tokenizer there are none, and begin and end
            count where they stand as words.
        unknown: the id of a byte that has no token; without it every byte must have one.

    Raises:
        UserError: when the tokens do not fit the merges.
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
    ) -> None:
        self._fields = tuple(tokens), tuple(map(tuple, merges)), begin, end, pad, tuple(literal), unknown
        ids = {token: number for number, token in enumerate(tokens)}
        if not any(token.endswith(_WORD_END) for token in tokens):
            raise UserError(f"no token ends in {_WORD_END}: this is not a tokenizer of CLIP's kind")
        self._special = {word: ids[word] for word in (BEGIN, END, *literal) if word in ids}
        self._literal = re.compile(f"({'|'.join(map(re.escape, literal))})") if literal else None
        self._pairs = BytePairs(ids, merges, _WORD_END, unknown)
        self.begin, self.end, self.pad = begin, end, pad
        self.vocab_size: int = len(tokens)

    @classmethod
    def from_merges(cls, merges: Sequence[Merge]) -> "ClipTokenizer":
        """Numbers tokens as OpenAI does: 256 bytes, the same at a word's end, the merges, begin, end."""
        made = [left + right for left, right in merges]
        tokens = [*LETTERS_BY_ID, *(letter + _WORD_END for letter in LETTERS_BY_ID), *made, BEGIN, END]
        return cls(tokens, merges, begin=len(tokens) - 2, end=len(tokens) - 1)

    @classmethod
    def from_bytes(cls, content: bytes) -> "ClipTokenizer":
        """Reads what `to_bytes` wrote.

        Raises:
            UserError: when it is damaged.
        """
        try:
            fields = json.loads(unzipped(content))
            fields["merges"] = [(left, right) for left, right in (merge.split(" ") for merge in fields["merges"])]
            return cls(**fields)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError("this is not a saved CLIP tokenizer, or it is damaged") from None

    def to_bytes(self) -> bytes:
        """Returns the content of the file that `save` writes."""
        names = ("tokens", "merges", "begin", "end", "pad", "literal", "unknown")
        fields = dict(zip(names, self._fields, strict=True))
        fields["merges"] = [" ".join(merge) for merge in fields["merges"]]
        return gzip.compress(json.dumps(fields).encode(), mtime=0)

    def __repr__(self) -> str:
        return f"ClipTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple:
        return ClipTokenizer, self._fields

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ClipTokenizer) and self._fields == other._fields

    def __hash__(self) -> int:
        return hash(self._fields)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and its description into ``directory``, each file whole or not at all."""
        write_atomically(Path(directory) / _CLIP_FILE, self.to_bytes())
        write_description(directory, CLIP_KIND, _CLIP_FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] (begin, pieces, end, then pad) and mask bool[B, L] (false on pad).

        Raises:
            UserError: when ``context_length`` is below 2.
        """
        return pack([self.ids(caption) for caption in captions], context_length, self.begin, self.end, self.pad)

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions with more pieces than ``context_length`` has room for."""
        return [index for index, caption in enumerate(captions) if len(self.ids(caption)) + 2 > context_length]

    def ids(self, caption: str) -> list[int]:
        """Returns the ids of a caption's pieces, without begin and end."""
        special, pairs = self._special, self._pairs
        ids: list[int] = []
        for word in clip_words(caption, self._literal):
            if word in special:
                ids.append(special[word])
            else:
                ids.extend(pairs(word))
        return ids


class GlideTokenizer:
    """GPT-2's vocabulary as GLIDE uses it: 256 bytes, the merges, the end token, which pads. No begin token.

    Raises:
        UserError: when the merges do not build on one another.
    """

    def __init__(self, merges: Sequence[Merge]) -> None:
        self._merges = tuple(merges)
        tokens = [*LETTERS_BY_ID, *(left + right for left, right in merges)]
        self._pairs = BytePairs({token: number for number, token in enumerate(tokens)}, merges)
        self.vocab_size: int = len(tokens) + 1
        self.pad: int = len(tokens)

    @classmethod
    def from_bytes(cls, content: bytes) -> "GlideTokenizer":
        """Reads a list of merges such as `to_bytes` or GPT-2's ``vocab.bpe``.

        Raises:
            UserError: when it is damaged.
        """
        return cls(read_merges(content))

    def to_bytes(self) -> bytes:
        """Returns the content of the file that `save` writes."""
        return write_merges(self._merges)

    def __repr__(self) -> str:
        return f"GlideTokenizer(vocab_size={self.vocab_size})"

    def __reduce__(self) -> tuple:
        return GlideTokenizer, (self._merges,)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, GlideTokenizer) and self._merges == other._merges

    def __hash__(self) -> int:
        return hash(self._merges)

    def save(self, directory: str | Path) -> None:
        """Writes the tokenizer and its description into ``directory``, each file whole or not at all."""
        write_atomically(Path(directory) / _GLIDE_FILE, self.to_bytes())
        write_description(directory, GLIDE_KIND, _GLIDE_FILE)

    def encode(
        self, captions: Sequence[str], context_length: int
    ) -> tuple[Int32[np.ndarray, "B L"], Bool[np.ndarray, "B L"]]:
        """Returns tokens int32[B, L] and mask bool[B, L], true on the caption's pieces alone.

        Unlike other tokenizers', rows have neither begin nor end: a caption is cut where L ends, and "" is all pad.

        Raises:
            UserError: when ``context_length`` is below 1.
        """
        if context_length < 1:
            raise UserError(f"context_length {context_length} has no room for a token: use 1 or more")
        tokens = np.full((len(captions), context_length), self.pad, np.int32)
        mask = np.zeros((len(captions), context_length), bool)
        for row, caption in enumerate(captions):
            ids = self.ids(caption)[:context_length]
            tokens[row, : len(ids)] = ids
            mask[row, : len(ids)] = True
        return tokens, mask

    def truncated(self, captions: Sequence[str], context_length: int) -> list[int]:
        """Returns the indices of the captions with more pieces than ``context_length``."""
        return [index for index, caption in enumerate(captions) if len(self.ids(caption)) > context_length]

    def ids(self, caption: str) -> list[int]:
        """Returns the ids of a caption's pieces."""
        pairs = self._pairs
        return [token for word in glide_words(caption) for token in pairs(word)]


def clip_tokenizer(vocab_size: int | None = None) -> ClipTokenizer:
    """Returns the released CLIP tokenizer, or one of its first ``vocab_size`` - 514 merges.

    Raises:
        UserError: when the released vocabulary has no such size.
    """
    return ClipTokenizer.from_merges(_released("clip_merges.txt.gz", vocab_size, 514, CLIP_VOCAB_SIZE))


def glide_tokenizer(vocab_size: int | None = None) -> GlideTokenizer:
    """Returns the released GLIDE tokenizer, or one of its first ``vocab_size`` - 257 merges.

    Raises:
        UserError: when the released vocabulary has no such size.
    """
    return GlideTokenizer(_released("gpt2_merges.txt.gz", vocab_size, 257, GLIDE_VOCAB_SIZE))


def _released(file: str, vocab_size: int | None, fixed: int, whole: int) -> tuple[Merge, ...]:
    """The first merges of a shipped vocabulary, as many as ``vocab_size`` has room for beside ``fixed`` tokens."""
    vocab_size = whole if vocab_size is None else vocab_size
    if not fixed <= vocab_size <= whole:
        raise UserError(f"vocab_size {vocab_size} is not to be had: the released vocabulary gives {fixed} to {whole}")
    return _shipped(file)[: vocab_size - fixed]


@functools.cache
def _shipped(file: str) -> tuple[Merge, ...]:
    return read_merges((resources.files("dalle2_jax.text") / file).read_bytes())
