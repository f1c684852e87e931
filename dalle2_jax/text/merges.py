"""Byte-pair encoding of words: the adjacent pair with the lowest rank is merged until no pair is left.

Source: Sennrich et al., arXiv 1508.07909, over bytes as in Radford et al., "Language models are unsupervised
multitask learners" (2019), section 2.2. Files write every byte as one printable character.
"""

import gzip
import heapq
import io
import zlib
from collections.abc import Mapping, Sequence

from dalle2_jax.errors import UserError
from dalle2_jax.text.storage import MAX_BYTES

Merge = tuple[str, str]

_CACHE_SIZE = 65_536  # words; a data set has far fewer common words


def _byte_letters() -> tuple[str, ...]:
    """Returns the character of each byte: itself if it is printable Latin-1, else the next one from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


BYTE_LETTERS = _byte_letters()
"""The character of each byte."""

LETTERS_BY_ID = tuple(sorted(BYTE_LETTERS))
"""The characters in the order of their ids in vocabularies."""


def read_merges(content: bytes) -> tuple[Merge, ...]:
    """Reads a list of merges, one "left right" per line, plain or gzipped. A version line at the start is skipped.

    Raises:
        UserError: the content is damaged or not a list of merges.
    """
    try:
        lines = decompress(content).decode("utf-8").rstrip().split("\n")
    except UnicodeDecodeError:
        raise UserError("the list of merges is not UTF-8 text: download the file again") from None
    skipped = 1 if "#version" in lines[0] else 0
    merges: list[Merge] = []
    for number, line in enumerate(lines[skipped:], skipped + 1):
        merge = line.split()
        if len(merge) != 2:
            raise UserError(f"line {number} of the merges must have two tokens, got {line[:60]!r}")
        merges.append((merge[0], merge[1]))
    return tuple(merges)


def write_merges(merges: Sequence[Merge]) -> bytes:
    """Returns merges as a gzipped list that `read_merges` reads; equal merges give equal bytes."""
    text = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]) + "\n"
    return gzip.compress(text.encode(), mtime=0)


def decompress(content: bytes) -> bytes:
    """Returns the content of a file that may be gzipped.

    Raises:
        UserError: it is damaged, or larger than `MAX_BYTES`.
    """
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(content)) as file:
            text = file.read(MAX_BYTES + 1)
    except (OSError, EOFError, zlib.error):
        raise UserError("the gzipped file is damaged or cut short: download it again") from None
    if len(text) > MAX_BYTES:
        raise UserError(f"the gzipped file has more than {MAX_BYTES} bytes: it is not a tokenizer")
    return text


class BytePairs:
    """Converts words to token ids, with a cache.

    Args:
        ids: id of every token.
        merges: the merges by rank.
        ending: suffix of the last character of a word: ``</w>`` in CLIP, "" in GPT-2.
        unknown: id of a byte without a token; None if every byte must have one.

    Raises:
        UserError: a byte, or a part or the result of a merge, has no token.
    """

    def __init__(
        self, ids: Mapping[str, int], merges: Sequence[Merge], ending: str = "", unknown: int | None = None
    ) -> None:
        self._inner: list[int] = []
        self._last: list[int] = []
        for letter in BYTE_LETTERS:
            inner, last = ids.get(letter, unknown), ids.get(letter + ending, unknown)
            if inner is None or last is None:
                raise UserError(f"the vocabulary is damaged: it lacks the byte {letter!r}, with or without {ending!r}")
            self._inner.append(inner)
            self._last.append(last)
        self._pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(merges):
            try:
                self._pairs[ids[left], ids[right]] = rank, ids[left + right]
            except KeyError as lacking:
                raise UserError(
                    f"the vocabulary lacks the token {lacking} of merge {rank + 1}, {left!r} and {right!r}: "
                    "they belong to different tokenizers, or are damaged"
                ) from None
        self._cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, word: str) -> tuple[int, ...]:
        """Returns the ids of a non-empty word."""
        ids = self._cache.get(word)
        if ids is None:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            *inner, last = word.encode()
            ids = self._cache[word] = self._merged([*(self._inner[byte] for byte in inner), self._last[last]])
        return ids

    def _merged(self, ids: list[int]) -> tuple[int, ...]:
        """Merges pairs by rank, the leftmost first, in O(n log n).

        The ids form a doubly linked list; the right part of a merge is marked with -1.
        """
        count = len(ids)
        before, after = list(range(-1, count - 1)), list(range(1, count + 1))
        waiting: list[tuple[int, int, tuple[int, int], int]] = []

        def consider(left: int) -> None:
            if left >= 0 and after[left] < count:
                pair = ids[left], ids[after[left]]
                if pair in self._pairs:
                    rank, token = self._pairs[pair]
                    heapq.heappush(waiting, (rank, left, pair, token))

        for left in range(count - 1):
            consider(left)
        while waiting:
            _, left, pair, token = heapq.heappop(waiting)
            right = after[left]
            if right >= count or (ids[left], ids[right]) != pair:
                continue  # one of the two was merged since it was queued
            ids[left], ids[right] = token, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            consider(before[left])
            consider(left)
        return tuple(token for token in ids if token >= 0)
