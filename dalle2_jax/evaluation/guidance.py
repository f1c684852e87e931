"""Figures over several guidance scales as a JSON file and a plot, as the literature shows FID against CLIP score."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from dalle2_jax.evaluation.figures import Figure, Figures
from dalle2_jax.files import write_atomically, write_png

PLOT, TABLE = "guidance.png", "guidance.json"

_WIDTH, _HEIGHT, _MARGIN = 720, 480, 70
_INK, _LINE = (30, 30, 30), (30, 90, 200)


def write_sweep(found: Mapping[str, Figures], folder: Path) -> None:
    """Writes ``guidance.json``, a list of figures by scale, and ``guidance.png``.

    Args:
      found: MEASURE at guidance SCALE -> figures.
      folder: of the files.
    """
    table = by_scale(found)
    rows = [
        {"guidance": scale, "figures": {name: figure.to_json() for name, figure in figures.items()}}
        for scale, figures in table.items()
    ]
    write_atomically(folder / TABLE, json.dumps(rows, indent=2) + "\n")
    write_png(folder / PLOT, plot(table))


def by_scale(found: Mapping[str, Figures]) -> dict[float, Figures]:
    """Returns guidance scale -> figures by MEASURE/FIGURE."""
    table: dict[float, Figures] = {}
    for label, figures in found.items():
        if parts := re.fullmatch(r"(.*) at guidance (.*)", label):
            row = table.setdefault(float(parts[2]), {})
            row |= {f"{parts[1]}/{name}": figure for name, figure in figures.items()}
    return dict(sorted(table.items()))


def plot(table: Mapping[float, Figures]) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a line chart: the Fréchet distance against the CLIP score, one point a scale.

    Without the one or the other it is the first figure against the scale.
    """
    names = list(next(iter(table.values())))
    distance = next((name for name in names if name.startswith("fd/")), None)
    score = next((name for name in names if name.startswith("clip_score/")), None)
    y = distance or names[0]
    x = score if distance and score else None
    points = [(scale if x is None else row[x].value, row[y], f"{scale:g}") for scale, row in table.items()]
    return _chart(points, "guidance" if x is None else x.rpartition("/")[2], y.rpartition("/")[2])


def _chart(points: list[tuple[float, Figure, str]], x_title: str, y_title: str) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a chart of (x, figure, label) with intervals as vertical bars."""
    ends = [figure.interval or (figure.value, figure.value) for _, figure, _ in points]
    across = _Axis([x for x, _, _ in points], _MARGIN, _WIDTH - _MARGIN // 2)
    up = _Axis([value for pair in ends for value in pair], _HEIGHT - _MARGIN, _MARGIN // 2)
    sheet = Image.new("RGB", (_WIDTH, _HEIGHT), (255, 255, 255))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    pen.line([(_MARGIN, _MARGIN // 2), (_MARGIN, up.start), (across.end, up.start)], fill=_INK)
    for value in across.ticks:
        pen.text((across(value), up.start + 16), f"{value:.4g}", fill=_INK, font=font, anchor="mm")
    for value in up.ticks:
        pen.text((_MARGIN - 8, up(value)), f"{value:.4g}", fill=_INK, font=font, anchor="rm")
    places = [(across(x), up(figure.value)) for x, figure, _ in points]
    pen.line(places, fill=_LINE, width=2)
    for (left, top), (low, high), (_, _, label) in zip(places, ends, points, strict=True):
        pen.line([(left, up(low)), (left, up(high))], fill=_LINE)
        pen.ellipse([left - 3, top - 3, left + 3, top + 3], fill=_LINE)
        pen.text((left + 6, top - 18), label, fill=_INK, font=font)
    pen.text((_WIDTH // 2, _HEIGHT - 26), x_title, fill=_INK, font=font, anchor="mm")
    pen.text((_MARGIN, 6), y_title, fill=_INK, font=font)
    return np.asarray(sheet)


class _Axis:
    """A linear axis over some values.

    Args:
      values: those to show.
      start: pixel of the low end.
      end: pixel of the high end.
    """

    def __init__(self, values: Sequence[float], start: int, end: int):
        self.start, self.end = start, end
        self._low, self._reach = min(values), max(values) - min(values) or 1.0

    def __call__(self, value: float) -> int:
        """Returns the pixel of a value."""
        return round(self.start + (self.end - self.start) * (0.05 + 0.9 * (value - self._low) / self._reach))

    @property
    def ticks(self) -> list[float]:
        """Five values, evenly spaced."""
        return [self._low + self._reach * part / 4 for part in range(5)]
