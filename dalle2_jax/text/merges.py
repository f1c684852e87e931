"""Byte-pair merges: a word's bytes become tokens by merging, again and again, the pair that was learned first.

Source: Sennrich et al., arXiv 1508.07909, over bytes as in Radford et al., "Language models are unsupervised
multitask learners" (2019), section 2.2. In files every byte is written as one printable letter.
"""

import gzip
import heapq
import zlib
from collections.abc import Mapping, Sequence

from dalle2_jax.types import UserError

Merge = tuple[str, str]

_CACHE_SIZE = 65_536  # words; a data set's common words are far fewer


def _byte_letters() -> tuple[str, ...]:
    """Returns the letter of each byte: itself if it is printable Latin-1, else the next from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    spare = iter(range(0x100, 0x200))
    return tuple(chr(byte if byte in printable else next(spare)) for byte in range(256))


BYTE_LETTERS = _byte_letters()
"""The letter of each byte, by the byte."""

LETTERS_BY_ID = tuple(sorted(BYTE_LETTERS))
"""The same letters in the order in which vocabularies number them."""


def read_merges(content: bytes) -> tuple[Merge, ...]:
    """Reads a list of merges, one "left right" a line, plain or gzipped; a first line naming a version is passed.

    Raises:
        UserError: when it is damaged, or no such list.
    """
    try:
        lines = unzipped(content).decode("utf-8").rstrip().split("\n")
    except UnicodeDecodeError:
        raise UserError("the list of merges is not UTF-8 text: get the file again") from None
    skipped = 1 if "#version" in lines[0] else 0
    merges = tuple(tuple(line.split()) for line in lines[skipped:])
    for number, merge in enumerate(merges, skipped + 1):
        if len(merge) != 2:
            raise UserError(f"line {number} of the merges is not two tokens: {lines[number - 1][:60]!r}")
    return merges


def write_merges(merges: Sequence[Merge]) -> bytes:
    """Returns what `read_merges` reads, gzipped; the same merges give the same bytes."""
    text = "\n".join(["#version: 0.2", *(f"{left} {right}" for left, right in merges)]) + "\n"
    return gzip.compress(text.encode(), mtime=0)


def unzipped(content: bytes) -> bytes:
    """Returns the content of a file that may be gzipped.

    Raises:
        UserError: when it is damaged.
    """
    if not content.startswith(b"\x1f\x8b"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error):
        raise UserError("the gzipped file is damaged or cut short: get it again") from None


class BytePairs:
    """Words to ids, with those of the latest words kept.

    Args:
        ids: the id of every token.
        merges: in the order in which they were learned.
        ending: what the letter of a word's last byte carries: ``</w>`` in CLIP, nothing in GPT-2.
        unknown: the id of a byte that has no token; without it every byte must have one.

    Raises:
        UserError: when a byte, or a part or the result of a merge, has no token.
    """

    def __init__(
        self, ids: Mapping[str, int], merges: Sequence[Merge], ending: str = "", unknown: int | None = None
    ) -> None:
        self._inner, self._last = (
            tuple(ids.get(letter + mark, unknown) for letter in BYTE_LETTERS) for mark in ("", ending)
        )
        for letter, *found in zip(BYTE_LETTERS, self._inner, self._last, strict=True):
            if None in found:
                raise UserError(f"the vocabulary lacks the byte {letter!r}, or it with {ending!r}: it is damaged")
        self._pairs: dict[tuple[int, int], tuple[int, int]] = {}
        for rank, (left, right) in enumerate(merges):
            try:
                self._pairs[ids[left], ids[right]] = rank, ids[left + right]
            except KeyError as lacking:
                raise UserError(
                    f"the vocabulary lacks the token {lacking} of merge {rank + 1}, {left!r} and {right!r}: "
                    "the two are of different tokenizers, or damaged"
                ) from None
        self._cache: dict[str, tuple[int, ...]] = {}

    def __call__(self, word: str) -> tuple[int, ...]:
        """Returns the ids of one word, which is any text but the empty one."""
        ids = self._cache.get(word)
        if ids is None:
            if len(self._cache) >= _CACHE_SIZE:
                self._cache.clear()
            *inner, last = word.encode()
            ids = self._cache[word] = self._merged([*(self._inner[byte] for byte in inner), self._last[last]])
        return ids

    def _merged(self, ids: list[int]) -> tuple[int, ...]:
        """Merges the pair of the lowest rank, the leftmost first, while there is one: O(n log n).

        The ids stand in a doubly linked list; the right part of a merge is struck out with -1.
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
                continue  # one of the two has been merged since
            ids[left], ids[right] = token, -1
            after[left] = after[right]
            if after[left] < count:
                before[after[left]] = left
            consider(before[left])
            consider(left)
        return tuple(token for token in ids if token >= 0)
