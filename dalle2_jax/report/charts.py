"""Line charts as SVG."""

import dataclasses
import math
from collections.abc import Mapping, Sequence

from dalle2_jax.report.markup import Markup, join, tag
from dalle2_jax.report.model import Curve

WIDTH, HEIGHT = 400, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 12, 10, 28
"""Margins of the plot, in units of the drawing."""

COLOURS = 8
"""Number of colours, the classes "c0" to "c7" of the style sheet; further lines are dashed."""

_LOG_RATIO = 10
"""Ratio of the largest to the smallest value from which the axis is logarithmic."""


@dataclasses.dataclass(frozen=True)
class Axis:
    """A scale from values to [0, 1].

    Attributes:
      low: value at 0.
      high: value at 1, above ``low``.
      log: whether it is logarithmic; both are then positive.
    """

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Returns where a value is, within [0, 1]."""
        low, high, value = (
            (math.log10(each) for each in (self.low, self.high, max(value, self.low)))
            if self.log
            else (
                self.low,
                self.high,
                value,
            )
        )
        return min(max((value - low) / (high - low), 0.0), 1.0)

    def ticks(self) -> list[float]:
        """Returns round values on the axis."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            every = max(1, len(powers) // 5)
            factors = (1, 2, 5) if len(powers) <= 3 else (1,)
            values = [factor * 10.0**power for power in powers[::every] for factor in factors]
        else:
            step = 10 ** math.floor(math.log10((self.high - self.low) / 4))
            step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 5)
            first = math.ceil(self.low / step - 1e-9)
            values = [number * step for number in range(first, first + 7)]
        reach = 1e-9 * (self.high - self.low)
        return [value for value in values if self.low - reach <= value <= self.high + reach]


def value_axis(curves: Sequence[Curve]) -> Axis:
    """Returns the axis of some curves' values: logarithmic where positive values span a wide range."""
    values = [value for curve in curves for value in curve.values]
    low, high = min(values), max(values)
    if low > 0 and high / low >= _LOG_RATIO:
        return Axis(low, high, log=True)
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return Axis(0.0 if 0 <= low < 0.3 * high else low - margin, high + margin)


def line_chart(title: str, lines: Mapping[str, Curve], order: Sequence[str] = ()) -> Markup:
    """Returns a figure with a chart of curves over the steps of training, and its legend.

    Args:
      title: shown above.
      lines: name -> curve. Curves without points are omitted.
      order: names in the order of colours, so that a name has the same colour in several charts; that of ``lines`` by
        default.
    """
    lines = {name: curve for name, curve in lines.items() if curve.values}
    if not lines:
        return Markup("")
    curves = [*lines.values()]
    start, end = min(curve.steps[0] for curve in curves), max(curve.steps[-1] for curve in curves)
    across, up = Axis(start, end if end > start else start + 1), value_axis(curves)
    numbers = {name: (order or [*lines]).index(name) for name in lines}
    plotted = [_line(numbers[name], name, curve, across, up) for name, curve in lines.items()]
    chart = tag(
        "svg",
        _grid(across, up),
        *plotted,
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=f"{title}: {', '.join(lines)} over steps",
    )
    legend = [tag("span", tag("i", class_=_style(number)), name) for name, number in numbers.items()]
    scale = tag("small", " log scale") if up.log else None
    caption = tag(
        "figcaption", tag("b", title), scale, tag("div", *legend, class_="legend") if len(lines) > 1 else None
    )
    return tag("figure", caption, chart, class_="chart")


def _style(number: int) -> str:
    return f"c{number % COLOURS}" + (" dashed" if number // COLOURS % 2 else "")


def _x(place: float) -> float:
    return _LEFT + place * (WIDTH - _LEFT - _RIGHT)


def _y(place: float) -> float:
    return HEIGHT - _BOTTOM - place * (HEIGHT - _TOP - _BOTTOM)


def _line(number: int, name: str, curve: Curve, across: Axis, up: Axis) -> Markup:
    """Returns a curve as a polyline; a single point as a dot."""
    points = [(_x(across.place(s)), _y(up.place(v))) for s, v in zip(curve.steps, curve.values, strict=True)]
    last = f"{name}: {compact(curve.values[-1])} at step {compact(curve.steps[-1])}"
    x, y = points[-1]
    dot = tag("circle", tag("title", last), cx=f"{x:.1f}", cy=f"{y:.1f}", r=3, class_=f"dot {_style(number)}")
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return join(tag("polyline", points=path, class_=f"curve {_style(number)}"), dot)


def _grid(across: Axis, up: Axis) -> Markup:
    """Returns the lines and numbers of both axes."""
    parts = []
    for value in up.ticks():
        y = _y(up.place(value))
        parts.append(tag("line", x1=_LEFT, x2=WIDTH - _RIGHT, y1=f"{y:.1f}", y2=f"{y:.1f}"))
        parts.append(tag("text", compact(value), x=_LEFT - 6, y=f"{y + 4:.1f}", text_anchor="end"))
    for value in across.ticks():
        x = _x(across.place(value))
        anchor = "end" if across.place(value) > 0.95 else "middle"
        parts.append(tag("text", compact(value), x=f"{x:.1f}", y=HEIGHT - 8, text_anchor=anchor))
    return tag("g", *parts, class_="axes")


def compact(value: float) -> str:
    """Returns a number in few characters, as in "1.2k", "0.013" and "3e-05"."""
    size = abs(value)
    for limit, suffix in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if size >= limit:
            return f"{value / (limit if suffix != 'k' else 1e3):.3g}{suffix}" if size < 1e12 else f"{value:.2g}"
    return f"{value:.4g}" if size >= 1e-3 or not size else f"{value:.2g}"
