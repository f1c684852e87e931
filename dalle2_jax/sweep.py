"""``python -m dalle2_jax.sweep``: trains a stage under each variation that its config lists.

A config file may have a function ``sweep(which)`` beside ``get_config(which)``. It yields one mapping a run, from
fields to values:

    def sweep(which):
        for lr in (5e-4, 1e-3, 2e-3):
            yield {"optim.lr": lr}

Each run is a system of its own, ``OUT/<number>_<field>=<value>``, trained by the command that its first line prints,
so it resumes, and is sampled, as any other. The other stages are those of ``--system``, linked. A run that fails
does not stop those after it. ``OUT/sweep.json`` has what was varied and what came of it, one object a run.
"""

import argparse
import json
import pathlib
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Mapping
from typing import Any, NamedTuple

from dalle2_jax import entry, workdir
from dalle2_jax.files import write_atomically
from dalle2_jax.types import UsageError, UserError

EXAMPLE = "python -m dalle2_jax.sweep --config configs/shapes.py:decoder --system runs/demo --out runs/sweep"
TRAIN = pathlib.Path(__file__).parents[1] / "train.py"
MEASURES = ("attributes", "retrieval", "digits")


class Run(NamedTuple):
    """One variation: its system's folder, and what it varies."""

    system: pathlib.Path
    overrides: Mapping[str, Any]


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = entry.parser("python -m dalle2_jax.sweep", "Trains a stage under each variation of its config.", EXAMPLE)
    parser.add_argument("--config", required=True, help="FILE:STAGE, a config file with a function sweep")
    parser.add_argument("--out", required=True, type=pathlib.Path, help="folder of the runs, a system each")
    parser.add_argument("--system", type=pathlib.Path, help="the system whose other stages the runs share")
    parser.add_argument("--only", type=int, metavar="N", help="train run N alone, as one task of a job array would")
    parser.add_argument("--measure", choices=MEASURES, help="measure each run by python -m dalle2_jax.evaluation")
    parser.add_argument("--list", action="store_true", help="print the commands and run none")
    return parser


def read_runs(config: str, out: pathlib.Path) -> list[Run]:
    """Returns the runs that a config lists.

    Raises:
      UsageError: there is no such file, or it lists none.
    """
    file, colon, which = config.partition(":")
    if not pathlib.Path(file).is_file() or not colon:
        raise UsageError(f"--config must be FILE:STAGE, a config file and one of its stages, not {config!r}")
    listed = runpy.run_path(file).get("sweep")
    variations = list(listed(which)) if listed else []
    if not variations:
        raise UsageError(f"{file} lists nothing to vary: give it a function sweep(which) that yields {{field: value}}")
    return [Run(out / label(number, overrides), overrides) for number, overrides in enumerate(variations)]


def label(number: int, overrides: Mapping[str, Any]) -> str:
    """Returns a folder name that says what a run varies."""
    words = "_".join(f"{field.rpartition('.')[2]}={value}" for field, value in overrides.items())
    return re.sub(r"[^\w.,=+-]", "", f"{number:02d}_{words}")[:100]


def train_command(config: str, run: Run) -> list[str]:
    """Returns the words that train a run."""
    overrides = [f"--config.{field}={value}" for field, value in run.overrides.items()]
    return [sys.executable, str(TRAIN), "--config", config, "--workdir", str(run.system), *overrides]


def link_stages(system: pathlib.Path, run: Run, stage: str) -> None:
    """Puts links to a system's stages, all but the one that is varied, into a run's folder.

    Raises:
      UserError: there is no such system.
    """
    if not system.is_dir():
        raise UserError(f"there is no system at {system}: train one with train.py --workdir {system}")
    workdir.link_stages(system, run.system, (stage,))


def outcome(run: Run, stage: str, measure: str | None) -> dict[str, float]:
    """Returns what came of a run so far: the mean loss of its last tenth, and what was measured of it."""
    log = run.system / stage / "metrics.jsonl"
    losses = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []
    last = losses[-max(1, len(losses) // 10) :]
    figures = {"loss": sum(last) / len(last)} if last else {}
    results = run.system / str(measure) / "results.json"
    if results.is_file():
        measured = json.loads(results.read_text())
        figures |= measured.get("matched", measured)
    return figures


def table(outcomes: Mapping[str, Mapping[str, float]]) -> str:
    """Returns figures as a table, a run a line."""
    names = list(dict.fromkeys(name for figures in outcomes.values() for name in figures))
    width = max(map(len, outcomes))
    lines = [" ".join([" " * width, *(f"{name:>13}" for name in names)])]
    for run, figures in outcomes.items():
        cells = (f"{figures[name]:13.4f}" if name in figures else f"{'-':>13}" for name in names)
        lines.append(" ".join([f"{run:{width}}", *cells]))
    return "\n".join(lines)


def main() -> None:
    """Runs the command line. UserError when a run failed."""
    options = make_parser().parse_args()
    stage = options.config.partition(":")[2].partition(",")[0]
    runs = read_runs(options.config, options.out)
    if options.only is not None and not 0 <= options.only < len(runs):
        raise UsageError(f"--only {options.only}: the runs are numbered 0 to {len(runs) - 1}")
    failed = []
    for run in runs if options.only is None else [runs[options.only]]:
        commands = [train_command(options.config, run)]
        if options.measure:
            given = ["--system", str(run.system), "--out", str(run.system / options.measure)]
            commands.append([sys.executable, "-m", "dalle2_jax.evaluation", options.measure, *given])
        if not options.list and options.system:
            link_stages(options.system, run, stage)
        for command in commands:
            print(shlex.join(command), flush=True)
            if not options.list and subprocess.run(command, check=False).returncode:
                failed.append(run.system.name)
                break
    if options.list:
        return
    outcomes = {run.system.name: outcome(run, stage, options.measure) for run in runs}
    rows = [{"run": run.system.name, "varied": run.overrides, **outcomes[run.system.name]} for run in runs]
    write_atomically(options.out / "sweep.json", json.dumps(rows, indent=2) + "\n")
    print(table(outcomes))
    if failed:
        raise UserError(f"{len(failed)} of {len(runs)} runs failed: {', '.join(failed)}; what went wrong is above")


if __name__ == "__main__":
    sys.exit(entry.guarded(main))
