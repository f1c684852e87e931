"""Sweeps: one stage is trained once for each variation that its config page lists.

A page may have a function ``sweep(which)`` next to ``get_config(which)``. It yields one mapping per run, from fields to
values:

    def sweep(which):
        for lr in (5e-4, 1e-3, 2e-3):
            yield {"optim.lr": lr}

Each run is a system of its own, ``OUT/<number>_<field>=<value>``, trained by a ``dalle2 train`` process, so that it can
be resumed and sampled like any other system. A run that fails does not stop the runs after it. ``OUT/sweep.json`` has
one object per run: its fields and its results.
"""

import dataclasses
import json
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from dalle2_jax import signals
from dalle2_jax.config import pages
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import parse_json, read_text
from dalle2_jax.workdir import links

COMMAND = (sys.executable, "-m", "dalle2_jax")


@dataclasses.dataclass(frozen=True)
class Run:
    """One variation.

    Attributes:
      system: the run's folder, a system of its own.
      overrides: field -> value.
    """

    system: pathlib.Path
    overrides: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The results of one run.

    Attributes:
      run: the run.
      figures: "loss" is the mean over the last tenth of the logged steps; the others are the evaluation's.
      failed: whether a command of the run ended with an error, in this call of `sweep`.
    """

    run: Run
    figures: Mapping[str, float]
    failed: bool


def sweep(
    page: str,
    out: pathlib.Path,
    *,
    system: pathlib.Path | None = None,
    only: int | None = None,
    measure: str | None = None,
    execute: Callable[[Sequence[str]], int] | None = None,
) -> list[Outcome]:
    """Trains a stage once for each variation of its config page, and writes ``out``/sweep.json.

    Args:
      page: FILE:STAGE, a config page with a function ``sweep``.
      out: folder of the runs.
      system: the system whose other stages every run links to.
      only: number of the single run to train; None trains all.
      measure: a measure of ``dalle2 evaluate`` that every run is measured by.
      execute: runs a command and returns its exit code; `run_command` by default.

    Returns:
      One outcome per variation, in the page's order.

    Raises:
      UsageError: the page lists no variations, or has no run ``only``.
      UserError: there is no system at ``system``.
    """
    stage = page.partition(":")[2].partition(",")[0]
    runs = read_runs(page, out)
    if only is not None and not 0 <= only < len(runs):
        raise UsageError(f"there is no run {only}: the runs are numbered 0 to {len(runs) - 1}")
    failed = set()
    for number, run in enumerate(runs):
        if only is not None and number != only:
            continue
        if system:
            link_stages(system, run, stage)
        if any((execute or run_command)(command) for command in commands(page, run, measure)):
            failed.add(number)
    outcomes = [Outcome(run, read_figures(run, stage, measure), n in failed) for n, run in enumerate(runs)]
    rows = [{"run": each.run.system.name, "varied": each.run.overrides, **each.figures} for each in outcomes]
    write_atomically(out / "sweep.json", json.dumps(rows, indent=2) + "\n")
    return outcomes


def read_runs(page: str, out: pathlib.Path) -> list[Run]:
    """Returns the runs that a config page lists.

    Raises:
      UsageError: there is no such page, or it lists none.
    """
    file, colon, _ = page.partition(":")
    if not colon:
        raise UsageError(f"--config must be FILE:STAGE, a config page and one of its stages, got {page!r}")
    variations = pages.call_config_page(page, "sweep", absent=[])
    if not variations or not all(isinstance(fields, Mapping) and fields for fields in variations):
        raise UsageError(f"{file} lists nothing to vary: add a function sweep(which) that yields {{field: value}}")
    return [Run(out / label(number, overrides), overrides) for number, overrides in enumerate(variations)]


def label(number: int, overrides: Mapping[str, Any]) -> str:
    """Returns a run's folder name: its number, fields and values."""
    words = "_".join(f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items())
    return re.sub(r"[^\w.,=+-]", "", f"{number:02d}_{words}")[:100]


def commands(page: str, run: Run, measure: str | None) -> list[list[str]]:
    """Returns the commands that train a run and, with ``measure``, evaluate it."""
    overrides = [f"--config.{field}={value}" for field, value in run.overrides.items()]
    result = [[*COMMAND, "train", "--config", page, "--workdir", str(run.system), *overrides]]
    if measure:
        words = ["--measures", measure, "--out", str(run.system / measure)]
        result.append([*COMMAND, "evaluate", str(run.system), *words])
    return result


def link_stages(system: pathlib.Path, run: Run, stage: str) -> None:
    """Links all stages of a system but ``stage`` into a run's folder.

    Raises:
      UserError: there is no such system.
    """
    if not system.is_dir():
        raise UserError(f"there is no system at {system}: train one with dalle2 train --workdir {system}")
    links.link_stages(system, run.system, (stage,))


def run_command(command: Sequence[str]) -> int:
    """Runs a command and returns its exit code. A signal to this process ends the command first, in order."""
    process = subprocess.Popen(command, start_new_session=True)  # Ctrl-C reaches this process only
    with signals.on_exit(process.kill), signals.handled(patient=lambda: True):
        try:
            return process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise


def read_figures(run: Run, stage: str, measure: str | None) -> dict[str, float]:
    """Returns a run's results so far: the mean loss of the last tenth of its logged steps, and its evaluation."""
    log = run.system / stage / "metrics.jsonl"
    losses = [parse_json(line)["loss"] for line in read_text(log).splitlines()] if log.is_file() else []
    last = losses[-max(1, len(losses) // 10) :]
    figures = {"loss": sum(last) / len(last)} if last else {}
    results = run.system / str(measure) / "results.json"
    if results.is_file():
        measured = parse_json(read_text(results))["measures"].get(measure, {})
        figures |= {name: figure["value"] for name, figure in measured.items()}
    return figures
