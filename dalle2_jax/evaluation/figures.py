"""`Figure` and `Evaluation`: results of measures, each with the number of examples and its 95 % interval."""

import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

import dalle2_jax
from dalle2_jax.errors import DataError, shown
from dalle2_jax.evaluation import intervals
from dalle2_jax.files import captioned_grid, write_atomically, write_png
from dalle2_jax.reading import parse_json, read_bytes

_MAX_RESULTS = 2**24
"""Maximum bytes of a file of results."""

RESULTS, GRID = "results.json", "grid.png"
"""Names of the files that `Evaluation.save` writes."""

SHUFFLED = "shuffled captions"
"""The baseline of measures that compare an image with its caption."""


@dataclasses.dataclass(frozen=True)
class Figure:
    """One result.

    Attributes:
      value: the result.
      n: the number of examples that it is taken over.
      interval: its 95 % interval; None where a single example has none.
      share: whether it is a fraction of examples, which is shown in percent.
      baseline: the same figure of what it is compared with.
      against: what that is, as in "shuffled captions".
    """

    value: float
    n: int
    interval: intervals.Interval | None = None
    share: bool = False
    baseline: "Figure | None" = None
    against: str = ""

    def compared(self, baseline: "Figure", against: str) -> "Figure":
        """Returns the figure with a baseline."""
        return dataclasses.replace(self, baseline=baseline, against=against)

    def to_json(self) -> dict[str, Any]:
        """Returns the figure as JSON types."""
        written: dict[str, Any] = {"value": self.value, "n": self.n, "interval": self.interval and list(self.interval)}
        written |= {"share": True} if self.share else {}
        return written | ({"baseline": self.baseline.to_json(), "against": self.against} if self.baseline else {})

    @classmethod
    def from_json(cls, written: Mapping[str, Any]) -> "Figure":
        """Returns the figure that `to_json` wrote. ValueError, LookupError or TypeError if it is none."""
        ends, baseline = written["interval"], written.get("baseline")
        return cls(
            value=float(written["value"]),
            n=int(written["n"]),
            interval=None if ends is None else (float(ends[0]), float(ends[1])),
            share=written.get("share") is True,
            baseline=None if baseline is None else cls.from_json(baseline),
            against=str(written.get("against", "")),
        )

    def __str__(self) -> str:
        """Returns the value and its interval, as in "94.9% [91.5, 97.0]" or "12.31 [11.98, 12.70]"."""
        if self.share:
            return intervals.in_percent(self.value, self.interval) if self.interval else f"{100 * self.value:.1f}%"
        ends = f" [{self.interval[0]:.4g}, {self.interval[1]:.4g}]" if self.interval else ""
        return f"{self.value:.4g}{ends}"


Figures = dict[str, Figure]
"""Figures of one measure by name."""


def share_of(hits: Sequence[bool] | np.ndarray) -> Figure:
    """Returns the fraction of true values, with Wilson's interval."""
    value = float(np.mean(hits))
    return Figure(value, len(hits), intervals.wilson(value, len(hits)), share=True)


def mean_of(values: Sequence[float] | np.ndarray) -> Figure:
    """Returns the mean, with its bootstrap interval."""
    array = np.asarray(values, np.float64)
    interval = intervals.bootstrap(lambda rows: float(np.mean(rows)), array) if len(array) > 1 else None
    return Figure(float(array.mean()), len(array), interval)


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Evaluation(Mapping[str, Figure]):
    """The figures of an evaluation by name, as in ``evaluation["attributes/colour"].value``.

    Attributes:
      system: the folder of the system.
      measures: name of the measure -> its figures by name.
      settings: what was measured and how, as JSON types.
      images: the first generated images; None if none were generated.
      captions: of these images.
    """

    system: str
    measures: Mapping[str, Figures]
    settings: Mapping[str, Any]
    images: UInt8[np.ndarray, "N H W 3"] | None = None
    captions: Sequence[str] = ()

    @property
    def figures(self) -> dict[str, Figure]:
        """All figures by MEASURE/FIGURE."""
        return {f"{measure}/{name}": each for measure, found in self.measures.items() for name, each in found.items()}

    def __getitem__(self, name: str) -> Figure:
        return self.figures[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.figures)

    def __len__(self) -> int:
        return len(self.figures)

    def __repr__(self) -> str:
        shown = [f"{name} {figure}" for name, figure in self.figures.items()]
        more = f", and {len(shown) - 3} more" if len(shown) > 3 else ""
        return f"Evaluation({self.system!r}, {len(self)} figures of {', '.join(self.measures)}:\n  " + (
            f"{', '.join(shown[:3])}{more})"
        )

    def table(self) -> str:
        """Returns the figures as a table: name, number of examples, value with interval, baseline."""
        rows = [("figure", "n", "value [95 % interval]", "baseline")]
        for name, figure in self.figures.items():
            baseline = f"{figure.baseline} ({figure.against})" if figure.baseline else ""
            rows.append((name, f"{figure.n:,}", str(figure), baseline))
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = (f"{a:<{widths[0]}}  {b:>{widths[1]}}  {c:<{widths[2]}}  {d}".rstrip() for a, b, c, d in rows)
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of ``results.json``: every figure with "value", "n", "interval" and "baseline"."""
        measures = {
            measure: {name: figure.to_json() for name, figure in found.items()}
            for measure, found in self.measures.items()
        }
        versions = {"dalle2_jax": dalle2_jax.__version__}
        return {"system": self.system, "settings": dict(self.settings), "versions": versions, "measures": measures}

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "Evaluation":
        """Returns the evaluation that `save` wrote to a folder, without its images.

        Raises:
          DataError: the folder has no results, or they are damaged.
        """
        path = Path(folder).expanduser() / RESULTS
        try:
            written: Any = parse_json(read_bytes(path, _MAX_RESULTS))
            measures = {
                str(measure): {str(name): Figure.from_json(figure) for name, figure in found.items()}
                for measure, found in written["measures"].items()
            }
            return cls(str(written["system"]), measures, dict(written["settings"]))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise DataError(f"{path} holds no results of dalle2 evaluate ({shown(str(error))})", path) from error

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Writes ``results.json``, and ``grid.png`` of the first generated images; returns the folder."""
        folder = Path(folder).expanduser()
        write_atomically(folder / RESULTS, json.dumps(self.to_json(), indent=2) + "\n")
        if self.images is not None and len(self.images):
            write_png(folder / GRID, captioned_grid(list(self.images), self.captions, 6))
        return folder
