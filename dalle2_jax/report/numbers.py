"""Numbers in words, for tables."""

from dalle2_jax.report.charts import compact
from dalle2_jax.report.model import Figure

MISSING = "–"
"""Stands for a number that is not known."""


def count(value: int | None) -> str:
    """Returns a whole number with separators."""
    return MISSING if value is None else f"{value:,}"


def duration(seconds: float | None) -> str:
    """Returns a time, as in "45 s", "12 min" and "3 h 20 min"."""
    if seconds is None:
        return MISSING
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60:,} h {minutes % 60} min"


def figure(measured: Figure | None) -> str:
    """Returns a figure with its interval, as in "94.9 % [91.5, 97.0]"."""
    if measured is None:
        return MISSING
    if measured.share:
        value = f"{100 * measured.value:.1f} %"
        ends = None if measured.interval is None else [f"{100 * end:.1f}" for end in measured.interval]
    else:
        value, ends = compact(measured.value), None
        if measured.interval is not None:
            ends = [compact(end) for end in measured.interval]
    return value if ends is None else f"{value} [{', '.join(ends)}]"
