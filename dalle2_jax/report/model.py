"""What a report shows, as values: read from folders by `read`, turned into HTML by `page`."""

import dataclasses
import pathlib
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Curve:
    """A metric over training: means over neighbouring steps, at most `curves.MAX_POINTS` of them.

    Attributes:
      steps: increasing.
      values: finite, one for each step.
    """

    steps: tuple[float, ...]
    values: tuple[float, ...]

    def final(self) -> float:
        """Returns the mean of the last tenth of the points."""
        count = max(1, len(self.values) // 10)
        return sum(self.values[-count:]) / count


@dataclasses.dataclass(frozen=True)
class Metrics:
    """The content of a metrics.jsonl.

    Attributes:
      curves: metric -> its curve.
      last_step: the last logged step; 0 without any.
      seconds: of training, without compilation, previews and evaluations; None if no rate was logged.
      rejected: records of the data set that were rejected, by cause.
      notes: sentences about lines that could not be read or were not.
    """

    curves: Mapping[str, Curve]
    last_step: int = 0
    seconds: float | None = None
    rejected: Mapping[str, float] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class EmbeddedImage:
    """An image of the report.

    Attributes:
      caption: shown below it.
      uri: the image as a data URI.
      width: in pixels.
      height: in pixels.
    """

    caption: str
    uri: str
    width: int
    height: int


@dataclasses.dataclass(frozen=True)
class Figure:
    """A measured number: a line of a results.json.

    Attributes:
      name: path in the file, as in "retrieval / image_to_text".
      value: the number.
      n: number of examples; None if unknown.
      interval: its 95 % interval; None if unknown.
      share: whether it is a fraction, shown in percent.
      baseline: the same of a system that ignores what is measured; None without one.
    """

    name: str
    value: float
    n: int | None = None
    interval: tuple[float, float] | None = None
    share: bool = False
    baseline: "Figure | None" = None


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
      name: its folder, or file.
      figures: in the order of the file.
      images: its grid of samples, if there is one.
    """

    name: str
    figures: tuple[Figure, ...]
    images: tuple[EmbeddedImage, ...] = ()


@dataclasses.dataclass(frozen=True)
class StageReport:
    """One stage of a system.

    Attributes:
      name: of the stage.
      config: "section.field" -> value, as JSON.
      metrics: what its training logged.
      samples: image grids, in the order of training.
      provenance: what it was trained with, by name.
      total_steps: of the run; 0 for an imported stage, None if its config cannot be read.
      batch_size: examples per step; None if unknown.
      parameters: number of trained parameters; None if it was not recorded.
      linked: the folder that the stage is a link to; None for a stage of its own.
      notes: sentences about what is damaged or missing.
    """

    name: str
    config: Mapping[str, str]
    metrics: Metrics
    samples: tuple[EmbeddedImage, ...] = ()
    provenance: Mapping[str, str] = dataclasses.field(default_factory=dict)
    total_steps: int | None = None
    batch_size: int | None = None
    parameters: int | None = None
    linked: pathlib.Path | None = None
    notes: tuple[str, ...] = ()

    @property
    def images(self) -> int | None:
        """Number of examples that were trained on, repetitions included."""
        return None if self.batch_size is None else self.metrics.last_step * self.batch_size

    @property
    def state(self) -> str:
        """How far training is, in words."""
        if self.total_steps == 0:
            return "imported"
        if not self.metrics.last_step:
            return "no logged step"
        if self.total_steps is None:
            return f"{self.metrics.last_step:,} steps"
        done = self.metrics.last_step >= self.total_steps
        return "finished" if done else f"unfinished: {self.metrics.last_step:,} of {self.total_steps:,} steps"


@dataclasses.dataclass(frozen=True)
class SystemReport:
    """One system.

    Attributes:
      name: unique in the report.
      path: its folder.
      stages: in the order of the cascade.
      evaluations: by name.
      notes: sentences about what is damaged or missing.
    """

    name: str
    path: pathlib.Path
    stages: tuple[StageReport, ...]
    evaluations: tuple[Evaluation, ...] = ()
    notes: tuple[str, ...] = ()
