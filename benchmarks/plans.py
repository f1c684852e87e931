"""Plans of the paper's stages on accelerators, as the tables of docs/howto/plan.md.

    python benchmarks/plans.py --folder build/plans --row prior:h200 --row clip:v5e --page docs/howto/plan.md

compiles one row after the other and keeps each as JSON; rows that are there are not compiled again. The tables of all
rows in the folder are printed, and written to the page. Without --row, all rows are compiled, from the smallest program
on: hours on a few cores.
"""

import json
import pathlib
import shlex
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import measured

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError
from dalle2_jax.planning.search import device_count

STAGES = ("prior", "ar_prior", "clip", "upsampler_2", "upsampler_1", "decoder")
"""From the smallest program on: transformers are one loop, U-Nets are not."""

TOPOLOGIES = {"h200": "h200:8x8", "v5p": "v5p:4x4x4", "v4": "v4:4x4x8", "v6e": "v6e:8x16", "v5e": "v5e:16x16"}
"""Chip -> the slice of its rows."""

ROWS = tuple(f"{stage}:{chip}" for chip in TOPOLOGIES for stage in STAGES)

HEAD = (
    "| stage, batch | peak / available, GiB | sent in a step, GiB | roofline, s: compute, memory, network "
    "| utilisation | days |\n| --- | --- | --- | --- | --- | --- |"
)
"""Of a table. Memory and what is sent are those of one device, days those of the whole slice."""


def command(row: str) -> list[str]:
    """Returns the words of a row's command, after ``dalle2``."""
    stage, _, chip = row.partition(":")
    topology = TOPOLOGIES[chip]
    words = ["plan", "--config", f"configs/paper.py:{stage}", "--topology", topology]
    return [*words, "--mesh", f"fsdp={device_count(topology)}"]


def compile_row(row: str, folder: pathlib.Path) -> int:
    """Compiles a row unless it is there, and returns the exit code of its command: 0 or 1 with a plan."""
    path = folder / f"{row.replace(':', '-')}.json"
    if path.exists():
        return 0
    words = [sys.executable, "-m", "dalle2_jax", *command(row), "--out", str(path)]
    print(shlex.join(["dalle2", *words[3:]]), file=sys.stderr, flush=True)
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode


def line(content: dict) -> str:
    """Returns the table's line of a plan. Utilisation and days are from no overlap of work and transfers to all."""
    memory, time, gib = content["memory"], content["time"], 2**30
    peak = "more" if memory["peak"] is None else f"{memory['peak'] / gib:,.1f}"
    sizes = f"{peak} / {memory['available'] / gib:,.1f}{'' if content['fits'] else ', does not fit'}"
    cells = [f"{content['stage']}, {content['batch_size']:,}", sizes]
    if time:
        sent = sum(each["sent_bytes"] for each in content["traffic"]["collectives"].values())
        days = [each / content["devices"] for each in reversed(content["device_days"])]
        cells += [
            f"{sent / gib:,.1f}",
            ", ".join(f"{time[name]:.2g}" for name in ("compute", "memory", "network")),
            f"{time['serial_utilisation']:.0%} to {time['utilisation']:.0%}",
            " to ".join(f"{each:,.1f}" for each in days),
        ]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def tables(folder: pathlib.Path) -> str:
    """Returns the plans of a folder: for each slice the command, and a table."""
    parts = []
    for chip, topology in TOPOLOGIES.items():
        rows = [folder / f"{stage}-{chip}.json" for stage in STAGES]
        lines = [line(json.loads(path.read_text())) for path in rows if path.exists()]
        if lines:
            repeat = shlex.join(["dalle2", *command(f"STAGE:{chip}")])
            parts.append("\n".join([f"`{repeat}`, {device_count(topology)} devices:\n", HEAD, *lines]))
    return "\n\n".join(parts)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/plans.py --folder build/plans --row prior:h200"
    parser = args.make_parser("python benchmarks/plans.py", "Compiles the tables of docs/howto/plan.md.", example)
    parser.add_argument("--folder", type=args.path, required=True, help="folder of the plans")
    parser.add_argument("--row", action="append", default=[], metavar="STAGE:CHIP", help="a row; may be repeated")
    parser.add_argument("--page", type=args.path, help="page whose place for plans is replaced")
    options = parser.parse_args()
    unknown = [row for row in options.row if row not in ROWS]
    if unknown:
        raise UsageError(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = [row for row in options.row or ROWS if compile_row(row, options.folder) not in (0, 1)]
    measured.publish("plans", tables(options.folder), options.page)
    if failed:
        raise UsageError(f"rows without a plan: {', '.join(failed)}; their errors are above")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
