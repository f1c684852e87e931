"""Plans of the paper's stages on accelerators, as the tables of docs/howto/plan.md.

    python benchmarks/plans.py --folder build/plans --row prior:h200 --row clip:v5e --page docs/howto/plan.md
    python benchmarks/plans.py --folder build/plans --smallest prior:h200

compile one row after the other and keep each as JSON; rows that are there are not compiled again. A row is a plan for
`TOPOLOGIES`, or for the smallest slice on which the stage fits. The tables of all rows in the folder are printed, and
written to the page. Without --row and --smallest, all rows are compiled, from the smallest program on: hours on a few
cores.
"""

import json
import pathlib
import shlex
import subprocess
import sys
from collections.abc import Sequence

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import measured

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError
from dalle2_jax.planning.chips import GIB
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

SMALLEST_HEAD = (
    "| stage, batch | slice | devices | micro-batches | peak / available, GiB | utilisation | device-days |\n"
    "| --- | --- | --- | --- | --- | --- | --- |"
)
"""Of the table of the smallest slices."""


def command(row: str, smallest: bool = False) -> list[str]:
    """Returns the words of a row's command, after ``dalle2``."""
    stage, _, chip = row.partition(":")
    words = ["plan", "--config", f"configs/paper.py:{stage}", "--topology"]
    if smallest:
        return [*words, chip, "--search", "smallest"]
    return [*words, TOPOLOGIES[chip], "--mesh", f"fsdp={device_count(TOPOLOGIES[chip])}"]


def file_of(row: str, folder: pathlib.Path, smallest: bool = False) -> pathlib.Path:
    """Returns where a row's plan is."""
    return folder / f"{row.replace(':', '-')}{'-smallest' if smallest else ''}.json"


def compile_row(row: str, folder: pathlib.Path, smallest: bool = False) -> int:
    """Compiles a row unless it is there, and returns the exit code of its command: 0 or 1 with a plan."""
    path = file_of(row, folder, smallest)
    if path.exists():
        return 0
    words = [sys.executable, "-m", "dalle2_jax", *command(row, smallest), "--out", str(path)]
    print(shlex.join(["dalle2", *words[3:]]), file=sys.stderr, flush=True)
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode


def memory_cell(content: dict) -> str:
    """Returns peak and available memory of a plan."""
    memory = content["memory"]
    peak = "more" if memory["peak"] is None else f"{memory['peak'] / GIB:,.1f}"
    return f"{peak} / {memory['available'] / GIB:,.1f}{'' if content['fits'] else ', does not fit'}"


def utilisation_cell(time: dict) -> str:
    """Returns the utilisation from no overlap of work and transfers to all."""
    return f"{time['serial_utilisation']:.0%} to {time['utilisation']:.0%}"


def line(content: dict) -> str:
    """Returns the table's line of a plan. Utilisation and days are from no overlap of work and transfers to all."""
    time = content["time"]
    cells = [f"{content['stage']}, {content['batch_size']:,}", memory_cell(content)]
    if time:
        sent = sum(each["sent_bytes"] for each in content["traffic"]["collectives"].values())
        days = [each / content["devices"] for each in reversed(content["device_days"])]
        cells += [
            f"{sent / GIB:,.1f}",
            ", ".join(f"{time[name]:.2g}" for name in ("compute", "memory", "network")),
            utilisation_cell(time),
            " to ".join(f"{each:,.1f}" for each in days),
        ]
    else:
        cells += ["-"] * 4
    return f"| {' | '.join(cells)} |"


def smallest_line(found: dict) -> str:
    """Returns the table's line of a search for the smallest slice that fits."""
    content = found["plan"]
    cells = [
        f"{content['stage']}, {content['batch_size']:,}",
        content["topology"],
        str(content["devices"]),
        f"{found['settings'].get('optim.accumulate', 1):,}",
        memory_cell(content),
        utilisation_cell(content["time"]),
        " to ".join(f"{each:,.0f}" for each in reversed(content["device_days"])),
    ]
    return f"| {' | '.join(cells)} |"


def read(folder: pathlib.Path, rows: Sequence[str], smallest: bool = False) -> list[dict]:
    """Returns the plans of those rows that are there."""
    paths = [file_of(row, folder, smallest) for row in rows]
    return [json.loads(path.read_text()) for path in paths if path.exists()]


def tables(folder: pathlib.Path) -> str:
    """Returns the plans of a folder: for each slice the command, and a table; then that of the smallest slices."""
    parts = []
    for chip, topology in TOPOLOGIES.items():
        lines = [line(content) for content in read(folder, [f"{stage}:{chip}" for stage in STAGES])]
        if lines:
            repeat = shlex.join(["dalle2", *command(f"STAGE:{chip}")])
            parts.append("\n".join([f"`{repeat}`, {device_count(topology)} devices:\n", HEAD, *lines]))
    found = [content["smallest"] for content in read(folder, ROWS, smallest=True)]
    if found:
        repeat = shlex.join(["dalle2", *command("STAGE:CHIP", smallest=True)])
        lines = [smallest_line(each) for each in found if each]
        parts.append("\n".join([f"`{repeat}`:\n", SMALLEST_HEAD, *lines]))
    return "\n\n".join(parts)


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/plans.py --folder build/plans --row prior:h200"
    parser = args.make_parser("python benchmarks/plans.py", "Compiles the tables of docs/howto/plan.md.", example)
    parser.add_argument("--folder", type=args.path, required=True, help="folder of the plans")
    parser.add_argument("--row", action="append", default=[], metavar="STAGE:CHIP", help="a row; may be repeated")
    smallest = "a row of the smallest slices; may be repeated"
    parser.add_argument("--smallest", action="append", default=[], metavar="STAGE:CHIP", help=smallest)
    parser.add_argument("--page", type=args.path, help="page whose place for plans is replaced")
    options = parser.parse_args()
    unknown = [row for row in options.row + options.smallest if row not in ROWS]
    if unknown:
        raise UsageError(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    if options.page:  # an error now, not after hours
        measured.around(options.page, "plans")
    wanted = [(row, False) for row in options.row] + [(row, True) for row in options.smallest]
    wanted = wanted or [(row, smallest) for smallest in (False, True) for row in ROWS]
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = [row for row, smallest in wanted if compile_row(row, options.folder, smallest) not in (0, 1)]
    measured.publish("plans", tables(options.folder), options.page)
    if failed:
        raise UsageError(f"rows without a plan: {', '.join(failed)}; their errors are above")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
