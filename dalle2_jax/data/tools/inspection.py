"""Reports on a data set before training: sizes, captions, duplicates and bad records.

Every record is read and decoded as training would do it, at its own size. A bad one is counted, and the rest read on.
"""

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from tqdm import tqdm

from dalle2_jax.data.images.records import REPLACEMENT, Record, Rejected, clean
from dalle2_jax.data.images.source import ImageSource, image_of
from dalle2_jax.data.sources import Source, example
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.text import Tokenizer

CONTEXT_LENGTH = 77
"""Tokens of a caption that CLIP reads, begin and end among them."""

QUANTILES = {"min": 0.0, "5%": 0.05, "25%": 0.25, "median": 0.5, "75%": 0.75, "95%": 0.95, "max": 1.0}

_SHOWN, _CELL = 48, 144
"""Images on the contact sheet, and the pixels of a cell's side."""

_NAMED_GROUPS, _NAMED = 20, 5
"""Groups of duplicates, and records of a group or a cause, that a report names."""

_GRAY = 200


class Inspection(NamedTuple):
    """What was found: ``report`` is plain JSON, ``sheet`` shows images from all over the data set."""

    report: dict[str, Any]
    sheet: UInt8[np.ndarray, "H W 3"]


def inspect(source: Source, tokenizer: Tokenizer, limit: int | None = None) -> Inspection:
    """Reads a data set and reports on it.

    Args:
        source: of a `ImageSource` the records are read, and images keep their sizes; filters do not count.
        tokenizer: what caption lengths are measured with.
        limit: maximum number of records to read, evenly spread over the data set; None for all.

    Raises:
        UserError: when the tokenizer does not take the captions.
    """
    indices = np.arange(len(source))
    if limit is not None and limit < len(source):
        indices = np.linspace(0, len(source) - 1, limit).astype(np.int64)
    tally = _Tally(tokenizer, len(indices))
    for place, index in enumerate(tqdm(indices.tolist(), desc="inspect", unit="record")):
        key = f"record {index}"
        try:
            record = _record(source, index)
            key = record.key
            tally.add(place, record, image_of(record)[0])
        except Rejected as rejection:
            tally.rejected.setdefault(rejection.cause, []).append(key)
    return Inspection(_report(source, tally, len(indices)), tally.sheet())


def write(found: Inspection, folder: str | Path) -> None:
    """Writes ``report.json`` and ``sheet.png``; names of files need not be UTF-8."""
    folder = Path(folder)
    write_atomically(folder / "report.json", clean(json.dumps(found.report, indent=2, ensure_ascii=False)) + "\n")
    write_png(folder / "sheet.png", found.sheet)


def difference_hash(image: UInt8[np.ndarray, "H W 3"]) -> int:
    """Returns 64 bits that survive scaling and compression: where brightness rises from left to right.

    The image is averaged to 8 rows of 9 gray values; a bit is set where a value exceeds its left neighbour.
    """
    gray = cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), (9, 8), interpolation=cv2.INTER_AREA)
    return int.from_bytes(np.packbits(gray[:, 1:] > gray[:, :-1]).tobytes(), "big")


def summary(report: dict[str, Any]) -> str:
    """Returns a report as a few lines for a terminal."""
    lines = [f"{report['good']} good of {report['read']} records read, of {report['records']} in the data set"]
    causes = Counter(report["rejected_at_opening"])
    causes.update({cause: bad["count"] for cause, bad in report["bad"].items()})
    if causes:
        lines.append("bad: " + ", ".join(f"{count} {cause}" for cause, count in causes.most_common()))
    if not report["good"]:
        return "\n".join(lines)
    captions, duplicates = report["captions"], report["duplicates"]
    for name in ("width", "height", "aspect"):
        lines.append(f"{name}: {_spread(report[name])}")
    lines += [
        f"captions an image: {_spread(captions['per_image'])}",
        f"tokens a caption: {_spread(captions['tokens'])}",
        f"{captions['cut_share']:.1%} of {captions['count']} captions are cut at {CONTEXT_LENGTH} tokens; "
        f"{captions['empty']} are empty, {captions['not_utf8']} have bytes that are not UTF-8",
        f"{duplicates['surplus']} images look like an earlier one, in {duplicates['groups']} groups; "
        f"{duplicates['flat']} are flat",
    ]
    return "\n".join(lines)


@dataclass
class _Tally:
    """The statistics of the records that were read, and the images of the contact sheet."""

    tokenizer: Tokenizer
    total: int
    keys: list[str] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    hashes: list[int] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    empty: int = 0
    not_utf8: int = 0
    rejected: dict[str, list[str]] = field(default_factory=dict)
    shown: list[tuple[np.ndarray, str]] = field(default_factory=list)

    def add(self, place: int, record: Record, image: UInt8[np.ndarray, "H W 3"]) -> None:
        """Takes in a good record, the ``place``-th that was read."""
        self.keys.append(record.key)
        self.sizes.append(image.shape[:2])
        self.hashes.append(difference_hash(image))
        self.counts.append(len(record.captions))
        self.lengths += [_length(self.tokenizer, caption) for caption in record.captions]
        self.empty += sum(not caption.strip() for caption in record.captions)
        self.not_utf8 += sum(REPLACEMENT in caption for caption in record.captions)
        if len(self.shown) * self.total <= place * _SHOWN and len(self.shown) < _SHOWN:
            self.shown.append((_thumbnail(image), record.captions[0]))

    def sheet(self) -> UInt8[np.ndarray, "H W 3"]:
        """Draws the shown images over their first captions."""
        blank = np.full((_CELL, _CELL, 3), _GRAY, np.uint8)
        images, captions = zip(*self.shown or [(blank, "not one image can be used")], strict=True)
        return captioned_grid(images, captions, columns=8)


def _record(source: Source, index: int) -> Record:
    """Returns a record as it is stored, or as it is rendered. Raises Rejected."""
    if isinstance(source, ImageSource):
        return source.records.read(index)
    one = example(source, index)
    return Record(f"{index:08d}", one["image"], one["captions"], {})


def _length(tokenizer: Tokenizer, caption: str) -> int:
    """Returns the number of tokens of an uncut caption, with begin and end."""
    length = CONTEXT_LENGTH
    while tokenizer.truncated([caption], length):
        length *= 2
    return int(tokenizer.encode([caption], length)[1].sum())


def _thumbnail(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S S 3"]:
    """Returns an image in the middle of a gray cell; small ones are enlarged by an integer factor."""
    height, width = image.shape[:2]
    scale = _CELL / max(height, width)
    scale = scale if scale < 1 else int(scale)
    size = (max(1, int(width * scale)), max(1, int(height * scale)))
    small = cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_NEAREST)
    cell = np.full((_CELL, _CELL, 3), _GRAY, np.uint8)
    top, left = (_CELL - size[1]) // 2, (_CELL - size[0]) // 2
    cell[top : top + size[1], left : left + size[0]] = small
    return cell


def _report(source: Source, tally: _Tally, read: int) -> dict[str, Any]:
    report = {
        "source": repr(source),
        "records": len(source),
        "read": read,
        "good": len(tally.keys),
        "rejected_at_opening": dict(source.rejections.counts),
        "bad": {cause: {"count": len(keys), "first": keys[:_NAMED]} for cause, keys in tally.rejected.items()},
    }
    if not tally.keys:
        return report
    heights, widths = np.array(tally.sizes).T
    lengths = np.array(tally.lengths)
    return report | {
        "width": _quantiles(widths),
        "height": _quantiles(heights),
        "shorter_side": _quantiles(np.minimum(heights, widths)),
        "aspect": _quantiles(np.round(widths / heights, 3)),
        "captions": {
            "count": len(lengths),
            "per_image": _quantiles(tally.counts),
            "tokenizer": repr(tally.tokenizer),
            "tokens": _quantiles(lengths),
            "cut_share": float((lengths > CONTEXT_LENGTH).mean()),
            "empty": tally.empty,
            "not_utf8": tally.not_utf8,
        },
        "duplicates": _duplicates(tally.hashes, tally.keys),
    }


def _quantiles(values: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Quantiles that are values of the data set, not between them."""
    found = np.quantile(np.asarray(values), list(QUANTILES.values()), method="inverted_cdf")
    return dict(zip(QUANTILES, found.tolist(), strict=True))


def _duplicates(hashes: Sequence[int], keys: Sequence[str]) -> dict[str, Any]:
    """Images of equal hash. Those without a bit set are flat images, which are not compared."""
    groups = sorted(_groups(hashes), key=len, reverse=True)
    named = [(len(group), [keys[place] for place in group[:_NAMED]]) for group in groups[:_NAMED_GROUPS]]
    return {
        "groups": len(groups),
        "surplus": sum(len(group) - 1 for group in groups),
        "largest": [{"count": count, "first": first} for count, first in named],
        "flat": sum(not one for one in hashes),
    }


def _groups(hashes: Sequence[int]) -> Iterator[list[int]]:
    """Yields the places of each hash that is there more than once."""
    values = np.array(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(values[order])) + 1):
        if len(group) > 1 and values[group[0]]:
            yield group.tolist()


def _spread(quantiles: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in quantiles.items())
