"""Reads the folders of systems: whatever is damaged becomes a note, and the rest is shown."""

import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dalle2_jax.errors import UserError, printable
from dalle2_jax.report.curves import read_metrics
from dalle2_jax.report.embed import Budget
from dalle2_jax.report.model import EmbeddedImage, Evaluation, Metrics, StageReport, SystemReport
from dalle2_jax.report.results import NAME, read_results
from dalle2_jax.workdir.folder import StageFolder, saved_steps

ORDER = ("clip", "prior", "ar_prior", "decoder", "upsampler_1", "upsampler_2")
"""Stages in the order of the cascade; others follow by name."""

MAX_SYSTEMS, MAX_SAMPLES, MAX_EVALUATIONS = 100, 6, 30
"""Maximum number of systems of a report, of sample grids of a stage, and of evaluations of a system."""

_MAX_FIELDS, _MAX_LETTERS, _MAX_FOLDERS = 1000, 300, 1000


def find_systems(runs: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Returns the systems at some paths: each path itself, or those in it, as in the folder of a sweep.

    Raises:
      UserError: there is no folder, or no system in it, or there are too many.
    """
    found: dict[pathlib.Path, None] = {}
    for run in runs:
        if not run.is_dir():
            raise UserError(f"there is no folder {run}: name the folder of a system, as in runs/demo")
        if StageFolder(run.parent, run.name).exists():
            raise UserError(f"{run} is a stage: name the folder of its system, {run.parent}")
        systems = [run] if stage_names(run) else [folder for folder in _folders(run) if stage_names(folder)]
        if not systems:
            raise UserError(f"{run} is no system, and no system is in it: no folder in it has an experiment.json")
        found |= dict.fromkeys(systems)
    if len(found) > MAX_SYSTEMS:
        raise UserError(f"{len(found)} systems are too many for a report: name at most {MAX_SYSTEMS}")
    return [*found]


def stage_names(root: pathlib.Path) -> list[str]:
    """Returns the names of the stages in a folder, in the order of the cascade."""
    names = [path.name for path in _folders(root) if StageFolder(root, path.name).exists()]
    return sorted(names, key=lambda name: (ORDER.index(name) if name in ORDER else len(ORDER), name))


def _folders(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the sub-folders of a folder, by name."""
    with os.scandir(root) as entries:
        return sorted(root / entry.name for entry in entries if entry.is_dir())[:_MAX_FOLDERS]


def unique_names(paths: Sequence[pathlib.Path]) -> list[str]:
    """Returns a name for each folder: its own, with as many parents as make it unique."""
    whole = [path.resolve().parts for path in paths]
    for depth in range(1, max(map(len, whole), default=0) + 1):
        names = ["/".join(parts[-depth:]) for parts in whole]
        if len({*names}) == len(names):
            return names
    return [str(path) for path in paths]


def read_system(path: pathlib.Path, name: str, budget: Budget) -> SystemReport:
    """Returns what the folder of a system has.

    Args:
      path: of the folder.
      name: in the report.
      budget: embeds its images.
    """
    stages = tuple(read_stage(StageFolder(path, stage), budget) for stage in stage_names(path))
    evaluations: list[Evaluation] = []
    notes: list[str] = []
    for results in find_results(path):
        label = results.parent.relative_to(path).as_posix()
        try:
            evaluations.append(read_results(results, label, budget))
        except (UserError, OSError) as error:
            notes.append(printable(error))
    return SystemReport(name, path, stages, tuple(evaluations), tuple(notes))


def find_results(root: pathlib.Path) -> list[pathlib.Path]:
    """Returns the results of evaluations in a folder, and in two levels of folders below."""

    def below(folder: pathlib.Path, levels: int) -> Iterator[pathlib.Path]:
        if (folder / NAME).is_file():
            yield folder / NAME
        for inner in _folders(folder) if levels else ():
            if not inner.is_symlink() and inner.name not in ("checkpoints", "tensorboard"):
                yield from below(inner, levels - 1)

    return [*below(root, 2)][:MAX_EVALUATIONS]


def read_stage(folder: StageFolder, budget: Budget) -> StageReport:
    """Returns what the folder of a stage has; what cannot be read is a note."""
    notes: list[str] = []
    experiment = _read_json(folder, folder.experiment_file() or "", notes)
    run = _read_json(folder, "run.json", notes)
    batch_size, total_steps = (_positive(experiment.get(name)) for name in ("batch_size", "total_steps"))
    try:
        metrics = read_metrics(folder.path / "metrics.jsonl", batch_size)
    except OSError as error:
        metrics = Metrics({}, notes=(f"metrics.jsonl cannot be read ({error.strerror or printable(error)})",))
    linked = folder.path.is_symlink()
    return StageReport(
        folder.stage,
        flattened(experiment),
        metrics if total_steps != 0 else Metrics(metrics.curves, metrics.last_step, metrics.seconds, metrics.rejected),
        () if linked else _read_samples(folder.path / "samples", budget, notes),
        _provenance(folder, run, notes),
        total_steps,
        batch_size,
        _positive(run.get("parameters")),
        folder.path.resolve() if linked else None,
        tuple(notes),
    )


def flattened(content: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Returns "section.field" -> value as JSON, of at most `_MAX_FIELDS` fields, long values cut."""
    fields: dict[str, str] = {}
    for key, value in content.items():
        name = f"{prefix}{key}"[:_MAX_LETTERS]
        if isinstance(value, Mapping):
            fields |= flattened(value, f"{name}.")
        else:
            shown = json.dumps(value)
            fields[name] = shown if len(shown) <= _MAX_LETTERS else f"{shown[:_MAX_LETTERS]}..."
    return dict([*fields.items()][:_MAX_FIELDS])


def _read_json(folder: StageFolder, name: str, notes: list[str]) -> dict[str, Any]:
    try:
        return (folder.read_json(name) if name else None) or {}
    except (UserError, OSError) as error:
        notes.append(printable(error))
        return {}


def _positive(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53 else None


def _read_samples(folder: pathlib.Path, budget: Budget, notes: list[str]) -> tuple[EmbeddedImage, ...]:
    """Returns the sample grids of a run, evenly spread over its training, the first and the last among them."""
    if not folder.is_dir():
        return ()
    steps = sorted(int(path.stem) for path in folder.glob("*.png") if path.stem.isdecimal() and len(path.stem) < 16)
    count = min(len(steps), MAX_SAMPLES)
    chosen = [steps[round(place * (len(steps) - 1) / max(count - 1, 1))] for place in range(count)]
    images = []
    for step in dict.fromkeys(chosen):
        path = folder / f"{step:08d}.png"
        try:
            image = budget.embed(path, f"step {step:,}")
        except OSError as error:
            notes.append(f"samples/{path.name} cannot be shown ({printable(error.strerror or error)})")
            continue
        images += [image] if image else []
    return tuple(images)


def _provenance(folder: StageFolder, run: Mapping[str, Any], notes: list[str]) -> dict[str, str]:
    """Returns what a stage was made with, by name: what run.json states, and what identifies its weights."""
    facts: dict[str, Any] = {"config page": run.get("config")}
    environment = run.get("environment")
    facts |= environment if isinstance(environment, Mapping) else {}
    facts["training examples"] = run.get("examples")
    facts |= {f"tracker {name}": value for name, value in _mapping(run.get("trackers")).items()}
    changes = run.get("changes")
    facts["changed when it was resumed"] = json.dumps(changes) if changes else None
    facts["CLIP weights"] = _read_json(folder, "contract.json", notes).get("clip")
    facts["fine-tuned from weights"] = _read_json(folder, "base.json", notes).get("weights")
    try:
        steps = saved_steps(folder.path / "checkpoints")
        if steps:
            newest = f"checkpoints/{steps[0]}"
            digest = _read_json(StageFolder(folder.path / "checkpoints", str(steps[0])), "digests.json", notes)
            facts |= {"newest checkpoint": newest, "its digest": digest.get("digest")}
    except OSError as error:
        notes.append(f"checkpoints cannot be read ({error.strerror})")
    return {str(name): str(value)[:_MAX_LETTERS] for name, value in facts.items() if value not in (None, "")}


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
