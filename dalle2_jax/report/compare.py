"""The comparison of several systems: one table, one chart for each stage, and the config fields that differ."""

from collections.abc import Sequence

from dalle2_jax.report import numbers
from dalle2_jax.report.charts import line_chart
from dalle2_jax.report.markup import Markup, table, tag
from dalle2_jax.report.model import StageReport, SystemReport
from dalle2_jax.report.sections import HELD_OUT, STAGE_COLUMNS, stage_row

MAX_LINES = 16
"""Maximum number of curves in a chart; those of further systems are in their own sections."""


def comparison(systems: Sequence[SystemReport]) -> Markup:
    """Returns the section that compares systems."""
    return tag(
        "section",
        tag("h2", "Comparison"),
        _overview(systems),
        _measures(systems),
        tag("div", *_charts(systems), class_="charts"),
        _differences(systems),
        id="comparison",
    )


def stages_by_name(systems: Sequence[SystemReport]) -> dict[str, dict[str, StageReport]]:
    """Returns stage -> system -> the stage, for the stages that systems have of their own, not as links."""
    found: dict[str, dict[str, StageReport]] = {}
    for system in systems:
        for stage in system.stages:
            if stage.linked is None:
                found.setdefault(stage.name, {})[system.name] = stage
    return found


def _overview(systems: Sequence[SystemReport]) -> Markup:
    rows = [[name, *stage_row(stage)] for stages in stages_by_name(systems).values() for name, stage in stages.items()]
    return table(["system", *STAGE_COLUMNS], [[*row] for row in rows])


def _measures(systems: Sequence[SystemReport]) -> Markup | None:
    """Returns a row for each measure, a column for each system; None without measures."""
    found: dict[str, dict[str, str]] = {}
    for system in systems:
        for evaluation in system.evaluations:
            for figure in evaluation.figures:
                measured = found.setdefault(f"{evaluation.name}: {figure.name}", {})
                measured[system.name] = numbers.figure(figure)
    if not found:
        return None
    names = [system.name for system in systems]
    rows = [[measure, *(values.get(name, numbers.MISSING) for name in names)] for measure, values in found.items()]
    return table(["measure [95 % interval]", *names], [[*row] for row in rows])


def _charts(systems: Sequence[SystemReport]) -> list[Markup]:
    """Returns for each stage that several systems have their losses, and their held-out losses if they have any."""
    parts, names = [], [system.name for system in systems]
    for stage, found in stages_by_name(systems).items():
        for metric, title in (("loss", f"{stage}: loss"), (f"{HELD_OUT}loss", f"{stage}: held-out loss")):
            curves = {
                name: each.metrics.curves[metric] for name, each in found.items() if metric in each.metrics.curves
            }
            if len(curves) > 1:
                parts.append(line_chart(title, dict([*curves.items()][:MAX_LINES]), names))
    return parts


def _differences(systems: Sequence[SystemReport]) -> Markup | None:
    """Returns the config fields in which systems differ; None if there are none."""
    rows: list[list[str]] = []
    names = [system.name for system in systems]
    for stage, found in stages_by_name(systems).items():
        fields = dict.fromkeys(field for each in found.values() for field in each.config)
        for field in fields if len(found) > 1 else ():
            values = {
                name: each.config[field] if field in each.config else numbers.MISSING for name, each in found.items()
            }
            if len({*values.values()}) > 1:
                rows.append([f"{stage}: {field}", *(values.get(name, "") for name in names)])
    if not rows:
        return tag("p", "The configs of the same stage do not differ.", class_="soft")
    return tag("div", tag("h3", "Config differences"), table(["field", *names], [[*row] for row in rows], "values"))
