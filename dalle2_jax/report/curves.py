"""Reads metrics.jsonl: of any size, in bounded time and memory, past damaged lines."""

import math
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from dalle2_jax.reading import open_regular, parse_json
from dalle2_jax.report.model import Curve, Metrics

MAX_POINTS = 400
"""Maximum number of points of a curve; neighbours are averaged."""

MAX_METRICS = 100
"""Maximum number of metrics of a stage."""

_WHOLE = 2**25
"""Bytes of a file that is read whole. Of a larger one `_PIECES` pieces of `_PIECE` bytes are read, evenly spread."""

_PIECES, _PIECE, _LINE = 1024, 2**15, 2**15


def read_metrics(path: pathlib.Path, batch_size: int | None) -> Metrics:
    """Returns the content of a metrics.jsonl; no curves if there is none.

    Args:
      path: of the file. A link is not followed.
      batch_size: examples per step, to compute seconds from rates; None if unknown.

    Raises:
      OSError: it cannot be read.
    """
    try:
        file = open_regular(path, follow=False)
    except FileNotFoundError:
        return Metrics({}, notes=("no metrics.jsonl",))
    reader = _Reader(batch_size)
    with file:
        size = os.fstat(file.fileno()).st_size
        for line in _lines(file, size):
            reader.add(line)
    notes = [f"metrics.jsonl has {size:,} bytes, of which {_PIECES * _PIECE:,} were read"] if size > _WHOLE else []
    return reader.result(notes)


def _lines(file: BinaryIO, size: int) -> Iterator[bytes]:
    """Yields the lines of a file, or of pieces of a large one. The first line of a piece may be incomplete."""
    if size <= _WHOLE:
        while line := file.readline(_LINE):
            yield line
        return
    for number in range(_PIECES):
        start = (size - _PIECE) * number // (_PIECES - 1)
        file.seek(start)
        lines = file.read(_PIECE).split(b"\n")
        yield from lines[1 if start else 0 : None if number == _PIECES - 1 else -1]


class _Reader:
    """Collects lines."""

    def __init__(self, batch_size: int | None):
        self._batch_size = batch_size
        self._points: dict[str, _Points] = {}
        self._rejected: Mapping[str, float] = {}
        self._last, self._seconds, self._damaged, self._omitted = 0, 0.0, 0, 0

    def add(self, line: bytes) -> None:
        """Adds a line; a damaged one is counted."""
        if not line.strip():
            return
        try:
            content = parse_json(line)
            step = content["step"]
            if isinstance(step, bool) or not isinstance(step, int) or not 0 <= step < 2**53:
                raise ValueError("no step")
        except (ValueError, KeyError, TypeError):
            self._damaged += 1
            return
        for name, value in content.items():
            if name != "step" and _is_finite(value):
                self._add_value(str(name), step, float(value))
        self._add_time(content, step)
        if isinstance(content.get("rejected"), dict):
            counts = content["rejected"].items()
            self._rejected = {str(cause): count for cause, count in counts if _is_finite(count)}
        self._last = max(self._last, step)

    def _add_value(self, name: str, step: int, value: float) -> None:
        if name not in self._points and len(self._points) >= MAX_METRICS:
            self._omitted += 1
            return
        self._points.setdefault(name, _Points()).add(step, value)

    def _add_time(self, content: Mapping[str, Any], step: int) -> None:
        rate: Any = content.get("examples_per_second")
        if self._batch_size and _is_finite(rate) and rate > 0 and step > self._last:
            self._seconds += (step - self._last) * self._batch_size / rate

    def result(self, notes: list[str]) -> Metrics:
        """Returns what was read."""
        if self._damaged:
            notes.append(f"metrics.jsonl has {self._damaged:,} lines that are not metrics of a step")
        if self._omitted:
            notes.append(f"metrics.jsonl has more than {MAX_METRICS} metrics: the others are omitted")
        if not self._last:
            notes.append("metrics.jsonl has no logged step")
        curves = {name: points.curve() for name, points in self._points.items()}
        seconds = self._seconds if 0 < self._seconds < math.inf else None
        return Metrics(curves, self._last, seconds, self._rejected, tuple(notes))


def _is_finite(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 1e300  # an int of any size compares; NaN does not


class _Points:
    """The points of a curve: when there are too many, every two neighbours become their mean."""

    def __init__(self) -> None:
        self._sums: list[tuple[float, float]] = []
        self._counts: list[int] = []
        self._stride = 1

    def add(self, step: int, value: float) -> None:
        """Adds a point."""
        if self._counts and self._counts[-1] < self._stride:
            steps, values = self._sums[-1]
            self._sums[-1], self._counts[-1] = (steps + step, values + value), self._counts[-1] + 1
            return
        if len(self._counts) == MAX_POINTS:
            pairs = range(0, MAX_POINTS, 2)
            self._sums = [
                (self._sums[i][0] + self._sums[i + 1][0], self._sums[i][1] + self._sums[i + 1][1]) for i in pairs
            ]
            self._counts = [self._counts[i] + self._counts[i + 1] for i in pairs]
            self._stride *= 2
        self._sums.append((step, value))
        self._counts.append(1)

    def curve(self) -> Curve:
        """Returns the curve, in the order of its steps."""
        points = sorted(
            (steps / count, values / count) for (steps, values), count in zip(self._sums, self._counts, strict=True)
        )
        return Curve(tuple(step for step, _ in points), tuple(value for _, value in points))
