"""What each technique brings: the train step of a config, one technique after the other, each in a process of its own.

    python benchmarks/ladder.py --config configs/karlo.py:decoder --batch_size 64 --rung bfloat16 --rung remat --rung x2

prints a Markdown table of examples/s, the gain over the rung before, the peak of memory and the share of the
datasheet's peak. Rungs add up, each to those before it. A rung that runs out of memory is reported, and left away in
the following ones.
"""

import itertools
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import PACKAGE, ROOT, load_config, result

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.files import write_atomically

RUNGS = ("bfloat16", "remat", "x2", "x4", "x8")
"""Computation in bfloat16, recomputation of activations, and batches of so many times the first one's size."""


def fields(content: dict, name: str, prefix: str = "model.") -> list[str]:
    """Returns the dotted paths of the fields of a name in a section of a config, at any depth."""
    nested = [fields(value, name, f"{prefix}{key}.") for key, value in content.items() if isinstance(value, dict)]
    return [*([f"{prefix}{name}"] if name in content else []), *itertools.chain(*nested)]


def overrides(spec: str, rungs: list[str], batch_size: int) -> list[str]:
    """Returns the FIELD=VALUE of some rungs together.

    Raises:
      UsageError: the config has no such field.
    """
    content, found = Experiment.from_config(load_config(spec)).to_json()["model"], {}
    plain = {"dtype": '"float32"', "remat": "false"}
    for name, value in plain.items():
        found |= {path: value for path in fields(content, name)}
    for rung in rungs:
        name, value = {"bfloat16": ("dtype", '"bfloat16"'), "remat": ("remat", "true")}.get(rung, ("", ""))
        if rung.startswith("x"):
            batch_size *= int(rung.removeprefix("x"))
        elif not fields(content, name):
            raise UsageError(f"{spec} has no field {name} in its section model, for the rung {rung}")
        else:
            found |= {path: value for path in fields(content, name)}
    return [*(f"{path}={value}" for path, value in found.items()), f"batch_size={batch_size}"]


def measure(spec: str, changes: list[str], steps: int) -> dict:
    """Returns the figures of a train step, measured in a process of its own."""
    words = [sys.executable, "benchmarks/train_step.py", "--config", spec, "--steps", str(steps)]
    words += [part for change in changes for part in ("--set", change)]
    try:
        return result(words, {**os.environ, **PACKAGE}, ROOT)
    except UserError as error:
        if "out of memory" in str(error).lower() or "RESOURCE_EXHAUSTED" in str(error):
            return {}
        raise


def measure_all(spec: str, rungs: list[str], batch_size: int, steps: int) -> list[dict]:
    """Returns the figures of the plain step and of each rung."""
    rows, kept = [], []
    for rung in (None, *rungs):
        tried = kept if rung is None else [*kept, rung]
        found = measure(spec, overrides(spec, tried, batch_size), steps)
        rows.append({"rung": rung or "float32", **found})
        kept = tried if found else kept
    return rows


def table(rows: list[dict]) -> str:
    """Returns the figures as a Markdown table."""
    lines = ["| technique | examples/s | gain | peak GiB | of the datasheet |", "| --- | --- | --- | --- | --- |"]
    before = None
    for row in rows:
        rate = row.get("examples_per_second")
        if rate is None:
            lines.append(f"| {row['rung']} | out of memory | | | |")
            continue
        gain = "" if before is None else f"{rate / before:.2f}"
        share = row["datasheet_utilisation"]
        shown = "-" if share is None else f"{share:.1%}"
        lines.append(f"| {row['rung']} | {rate:.4g} | {gain} | {row['peak_bytes'] / 2**30:.2f} | {shown} |")
        before = rate
    return "\n".join(lines)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/ladder.py --config configs/karlo.py:decoder --batch_size 32 --rung bfloat16 --rung x2"
    parser = args.make_parser("python benchmarks/ladder.py", "Measures techniques one after the other.", example)
    parser.add_argument("--config", required=True, help="FILE:STAGE")
    parser.add_argument("--batch_size", type=args.positive_int, required=True, help="of the first rung")
    parser.add_argument("--rung", choices=RUNGS, action="append", default=[], help="a technique; may be repeated")
    parser.add_argument("--steps", type=args.positive_int, default=10, help="timed steps (default %(default)s)")
    parser.add_argument("--out", type=args.path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    rows = measure_all(options.config, options.rung, options.batch_size, options.steps)
    print(table(rows))
    if options.out:
        write_atomically(options.out, json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
