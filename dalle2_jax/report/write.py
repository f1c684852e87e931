"""Writes a report."""

import datetime
import os
import pathlib
from collections.abc import Sequence

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.report.embed import Budget
from dalle2_jax.report.model import Evaluation, SystemReport
from dalle2_jax.report.page import page
from dalle2_jax.report.read import find_systems, read_system, unique_names
from dalle2_jax.report.results import NAME, read_results

IMAGE_BYTES = 24_000_000
"""Maximum bytes of all images of a report, before their encoding as text."""

MAX_NAMED = 4
"""Maximum number of systems whose names are in the title."""

Path = str | os.PathLike[str]


def write_report(
    runs: Sequence[Path], out: Path, *, results: Sequence[Path] = (), title: str | None = None
) -> list[SystemReport]:
    """Writes what training and evaluation left in the folders of systems as one HTML file.

    The file holds its images and styles, loads nothing and has no scripts. Damaged and missing files are noted in it.

    Args:
      runs: folders of systems, or folders that have systems in them, such as that of a sweep.
      out: the file to write; an existing one is replaced.
      results: results.json of evaluations that lie elsewhere, or their folders. They belong to the first system.
      title: of the page; the names of the systems by default.

    Returns:
      What the report shows of each system.

    Raises:
      UserError: there is no system at a path, or a file of ``results`` cannot be read.
    """
    if not runs:
        raise UserError("a report needs the folder of a system, as in runs/demo")
    target = pathlib.Path(out).expanduser()
    if target.is_dir():
        raise UserError(f"{target} is a folder: name the file to write, as in {target / 'report.html'}")
    paths = find_systems([pathlib.Path(run).expanduser() for run in runs])
    budget = Budget(IMAGE_BYTES)
    extra = tuple(_read_extra(pathlib.Path(path).expanduser(), budget) for path in results)
    systems = [read_system(path, name, budget) for path, name in zip(paths, unique_names(paths), strict=True)]
    if extra:
        first = systems[0]
        evaluations = (*first.evaluations, *extra)
        systems[0] = SystemReport(first.name, first.path, first.stages, evaluations, first.notes)
    remarks = [f"{budget.omitted} images are omitted: those shown fill the page"] if budget.omitted else []
    written = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    write_atomically(target, page(systems, title or _title(systems), written, remarks))
    return systems


def _title(systems: Sequence[SystemReport]) -> str:
    names = [system.name for system in systems]
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return f"Report: {', '.join(names[:MAX_NAMED])}{more}"


def _read_extra(path: pathlib.Path, budget: Budget) -> Evaluation:
    """Returns the evaluation in a results.json, or in a folder that has one."""
    file = path / NAME if path.is_dir() else path
    try:
        return read_results(file, path.name if path.is_dir() else file.parent.name, budget)
    except OSError as error:
        raise UserError(
            f"{file} cannot be read ({error.strerror or error}): name a results.json or its folder"
        ) from error
