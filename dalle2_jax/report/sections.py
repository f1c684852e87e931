"""The parts of a report on one system: its stages with curves, samples, config and provenance, and its evaluations."""

from collections.abc import Mapping, Sequence

from dalle2_jax.report import numbers
from dalle2_jax.report.charts import compact, line_chart
from dalle2_jax.report.markup import Markup, join, table, tag
from dalle2_jax.report.model import Curve, EmbeddedImage, Evaluation, Figure, StageReport, SystemReport

HELD_OUT = "val/"
"""Prefix of the metrics of held-out examples."""

TITLES = {
    "loss": "Loss",
    "loss_quartile": "Loss by quartile of t, least noise first",
    "mse": "Squared error",
    "vlb": "Variational bound, bits",
    "cosine": "Cosine of sampled embeddings",
    "image_to_text": "Recall from image to caption",
    "text_to_image": "Recall from caption to image",
    "accuracy": "Accuracy of codes",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "ema_decay": "Decay of averaged weights",
    "examples_per_second": "Examples per second",
    "data_wait": "Share of time waiting for data",
}
"""Charts by their first metric, in order; other metrics follow under their own names."""


def chart_name(metric: str) -> str:
    """Returns the chart that a metric belongs to, a key of `TITLES` or the metric itself."""
    name = metric.removeprefix(HELD_OUT)
    for group in ("loss_quartile", "cosine", "image_to_text", "text_to_image"):
        if name.startswith(group):
            held_out = metric.startswith(HELD_OUT) and group == "loss_quartile"
            return f"{HELD_OUT}{group}" if held_out else group
    return name


def charts(curves: Mapping[str, Curve]) -> Markup:
    """Returns a chart for each group of metrics."""
    groups: dict[str, list[str]] = {}
    for metric in curves:
        groups.setdefault(chart_name(metric), []).append(metric)
    order = [name for title in TITLES for name in (title, f"{HELD_OUT}{title}")]
    known = [name for name in order if name in groups]
    parts = []
    for name in (*known, *sorted({*groups} - {*known})):
        title = TITLES.get(name.removeprefix(HELD_OUT), name)
        title = f"Held-out {title[0].lower()}{title[1:]}" if name.startswith(HELD_OUT) else title
        parts.append(line_chart(title, {_line_name(metric, name): curves[metric] for metric in groups[name]}))
    return tag("div", *parts, class_="charts")


def _line_name(metric: str, group: str) -> str:
    """Returns the name of a curve in the legend of its chart."""
    plain = metric.removeprefix(HELD_OUT)
    if plain == group:
        return "held out" if metric.startswith(HELD_OUT) else "training"
    rest = plain.removeprefix(group.removeprefix(HELD_OUT)).strip("_").replace("_", " ")
    return rest if group.startswith(HELD_OUT) or not metric.startswith(HELD_OUT) else f"{rest}, held out"


def final(stage: StageReport, metric: str) -> str:
    """Returns the mean of a metric over the last tenth of training."""
    curve = stage.metrics.curves.get(metric)
    return numbers.MISSING if curve is None else compact(curve.final())


STAGE_COLUMNS = ("stage", "state", "steps", "examples", "parameters", "training time", "final loss", "held-out loss")


def stage_row(stage: StageReport) -> list[str]:
    """Returns the cells of `STAGE_COLUMNS`."""
    return [
        stage.name,
        "linked" if stage.linked else stage.state,
        numbers.count(stage.metrics.last_step or None),
        numbers.count(stage.images or None),
        numbers.count(stage.parameters),
        numbers.duration(stage.metrics.seconds),
        final(stage, "loss"),
        final(stage, f"{HELD_OUT}loss"),
    ]


def system_section(system: SystemReport, number: int) -> Markup:
    """Returns the section of a system.

    Args:
      system: what is shown.
      number: of the section, for links to it.
    """
    return tag(
        "section",
        tag("h2", system.name),
        tag("p", str(system.path), class_="soft"),
        *notes(system.notes),
        table(list(STAGE_COLUMNS), [list(stage_row(stage)) for stage in system.stages]),
        tag(
            "p",
            "Losses are means over the last tenth of training. Times exclude compilation, previews and evaluations.",
            class_="soft",
        ),
        *(evaluation_section(evaluation) for evaluation in system.evaluations),
        *(stage_section(stage) for stage in system.stages),
        id=f"system-{number}",
    )


def notes(sentences: Sequence[str]) -> list[Markup]:
    """Returns a paragraph for each note."""
    return [tag("p", sentence, class_="note") for sentence in sentences]


def stage_section(stage: StageReport) -> Markup:
    """Returns the section of a stage; of a linked one, where it is."""
    heading = tag("h3", stage.name, tag("small", f" {stage.state}"))
    if stage.linked is not None:
        return join(heading, tag("p", f"A link to {stage.linked}.", class_="soft"), *notes(stage.notes))
    rejected = [[cause, compact(number)] for cause, number in stage.metrics.rejected.items()]
    return join(
        heading,
        *notes((*stage.notes, *stage.metrics.notes)),
        charts(stage.metrics.curves) if stage.metrics.curves else None,
        image_grids("Samples during training", stage.samples),
        _folded("Rejected records", ["cause", "records"], rejected),
        _folded("Config", ["field", "value"], [[name, value] for name, value in stage.config.items()]),
        _folded("Provenance", ["what", "value"], [[name, value] for name, value in stage.provenance.items()]),
    )


def _folded(title: str, head: list[str], rows: list[list[str]]) -> Markup | None:
    """Returns a table that opens on a click; None without rows."""
    if not rows:
        return None
    return tag("details", tag("summary", f"{title} ({len(rows)})"), table([*head], [[*row] for row in rows], "values"))


def image_grids(title: str, images: Sequence[EmbeddedImage]) -> Markup | None:
    """Returns images side by side; None without images."""
    if not images:
        return None
    figures = [
        tag(
            "figure",
            tag("img", src=image.uri, width=image.width, height=image.height, alt=f"{title}: {image.caption}"),
            tag("figcaption", image.caption),
        )
        for image in images
    ]
    return join(tag("h4", title), tag("div", *figures, class_="grids"))


def evaluation_section(evaluation: Evaluation) -> Markup:
    """Returns the figures of an evaluation as a table, and its images."""
    baselines = any(figure.baseline for figure in evaluation.figures)
    rows = []
    for figure in evaluation.figures:
        row = [figure.name, numbers.figure(figure), interval_bar(figure), numbers.count(figure.n)]
        rows.append(row + [numbers.figure(figure.baseline)] * baselines)
    head = ["measure", "value [95 % interval]", "", "n", *["baseline"] * baselines]
    return join(
        tag("h3", f"Evaluation: {evaluation.name}"),
        table([*head], rows),
        image_grids("Images", evaluation.images),
    )


def interval_bar(figure: Figure) -> Markup | None:
    """Returns a drawing of a figure in [0, 1] with its interval, and of its baseline; None for another figure."""
    low, high = figure.interval or (figure.value, figure.value)
    if figure.interval is None or not 0 <= low <= high <= 1 or not 0 <= figure.value <= 1:
        return None
    base = figure.baseline
    mark = None
    if base is not None and 0 <= base.value <= 1:
        mark = tag("line", x1=f"{_bar(base.value)}", x2=f"{_bar(base.value)}", y1=1, y2=13, class_="base")
    return tag(
        "svg",
        tag("line", x1=_bar(0), x2=_bar(1), y1=7, y2=7),
        tag("line", x1=_bar(low), x2=_bar(high), y1=7, y2=7, class_="reach"),
        mark,
        tag("circle", cx=_bar(figure.value), cy=7, r=4, class_="point"),
        viewBox="0 0 130 14",
        class_="bar",
        role="img",
        aria_label=f"{numbers.figure(figure)} on a scale from 0 to 1",
    )


def _bar(value: float) -> str:
    return f"{5 + 120 * value:.1f}"
