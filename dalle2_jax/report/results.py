"""Reads results.json, the result of an evaluation, in any version: numbers at any depth, with n and interval."""

import dataclasses
import math
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from dalle2_jax.errors import UserError
from dalle2_jax.reading import open_regular, parse_json
from dalle2_jax.report.embed import Budget
from dalle2_jax.report.model import Evaluation, Figure

NAME, GRIDS = "results.json", "*.png"
MAX_FIGURES, MAX_GRIDS = 200, 3
_MAX_BYTES = 2**24
_BESIDES = ("n", "interval", "share", "baseline")
"""Keys that describe the numbers next to them."""

_LISTS = ("figures", "measures")
"""Keys that are no part of a figure's name."""


def read_results(path: pathlib.Path, name: str, budget: Budget) -> Evaluation:
    """Returns the figures of a results.json, and the images in its folder.

    Raises:
      UserError: the file is damaged or has no figures.
      OSError: it cannot be read.
    """
    with open_regular(path, _MAX_BYTES, follow=False) as file:
        content = file.read()
    try:
        found = [*_figures(parse_json(content), ())]
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON ({error})") from error
    if not found:
        raise UserError(f"{path} has no figures: it is not the result of an evaluation")
    found = _paired(found)
    images = []
    for grid in sorted(path.parent.glob(GRIDS))[:MAX_GRIDS]:
        try:
            embedded = budget.embed(grid, grid.stem)
        except OSError:
            continue
        images += [embedded] if embedded else []
    return Evaluation(name, tuple(found[:MAX_FIGURES]), tuple(images))


def _figures(content: Any, path: tuple[str, ...]) -> Iterator[Figure]:
    """Yields the figures of a JSON value: objects with "value", and numbers next to "n" or "interval"."""
    if not isinstance(content, Mapping):
        return
    if (figure := _described(content, " / ".join(path))) is not None:
        yield figure
        return
    n, intervals = (content.get(key) for key in ("n", "interval"))
    for key, value in content.items():
        if key in _BESIDES:
            continue
        inner = path if key in _LISTS else (*path, str(key)[:100])
        if isinstance(value, Mapping):
            sides = {"n": n, "interval": intervals.get(key) if isinstance(intervals, Mapping) else None}
            yield from _figures({**{name: side for name, side in sides.items() if side is not None}, **value}, inner)
        elif _is_number(value) and (n is not None or intervals is not None):
            interval = intervals.get(key) if isinstance(intervals, Mapping) else None
            count = n.get(key) if isinstance(n, Mapping) else n
            yield Figure(" / ".join(inner), float(value), _count(count), _interval(interval))


def _paired(figures: list[Figure]) -> list[Figure]:
    """Returns the figures with those of shuffled captions as baselines, as versions before 0.3 wrote them apart."""
    named = {figure.name: figure for figure in figures}
    pairs = {
        name: named[f"shuffled / {name.removeprefix('matched / ')}"]
        for name in named
        if name.startswith("matched / ") and f"shuffled / {name.removeprefix('matched / ')}" in named
    }
    baselines = {other.name for other in pairs.values()}
    return [
        dataclasses.replace(
            figure, name=figure.name.removeprefix("matched / "), share=True, baseline=_share(pairs[figure.name])
        )
        if figure.name in pairs
        else figure
        for figure in figures
        if figure.name not in baselines
    ]


def _share(figure: Figure) -> Figure:
    return dataclasses.replace(figure, share=True)


def _described(content: Mapping[str, Any], name: str) -> Figure | None:
    """Returns the figure of an object with "value"; None for another object."""
    value: Any = content.get("value")
    if not _is_number(value):
        return None
    baseline = content.get("baseline")
    other = _described(baseline, name) if isinstance(baseline, Mapping) else None
    share = content.get("share") is True
    return Figure(name, float(value), _count(content.get("n")), _interval(content.get("interval")), share, other)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _count(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _interval(value: Any) -> tuple[float, float] | None:
    if isinstance(value, list) and len(value) == 2 and all(map(_is_number, value)):
        low, high = map(float, value)
        return (low, high) if math.isfinite(low) and math.isfinite(high) else None
    return None
