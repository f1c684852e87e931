"""Plans of the paper's stages on accelerators, as the table of docs/pod.md: one command a row, which anyone can repeat.

    python benchmarks/plans.py --folder build/plans --row prior:h200 --row clip:v5e

compiles one row after the other and keeps each as JSON; rows that are there are not compiled again. The table of all
rows in the folder is printed. Without --row, all rows are compiled, from the smallest program on: hours on a few cores.
"""

import json
import pathlib
import shlex
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError

STAGES = ("prior", "ar_prior", "clip", "upsampler_2", "upsampler_1", "decoder")
"""From the smallest program on: transformers are one loop, U-Nets are not."""

TOPOLOGIES = {"h200": "h200:8x8", "v5p": "v5p:4x4x4", "v4": "v4:4x4x8", "v6e": "v6e:8x16", "v5e": "v5e:16x16"}
"""Chip -> the slice of its rows."""

DEVICES = {"h200:8x8": 64, "v5p:4x4x4": 64, "v4:4x4x8": 128, "v6e:8x16": 128, "v5e:16x16": 256}

ROWS = tuple(f"{stage}:{chip}" for chip in TOPOLOGIES for stage in STAGES)

HEAD = """| stage | topology | mesh | GiB of a device: peak / state / available | utilisation | days |
| --- | --- | --- | --- | --- | --- |"""


def command(row: str) -> list[str]:
    """Returns the words of a row's command, after ``dalle2``."""
    stage, _, chip = row.partition(":")
    topology = TOPOLOGIES[chip]
    words = ["plan", "--config", f"configs/paper.py:{stage}", "--topology", topology]
    return [*words, "--mesh", f"fsdp={DEVICES[topology]}"]


def compile_row(row: str, folder: pathlib.Path) -> int:
    """Compiles a row unless it is there, and returns the exit code of its command: 0 or 1 with a plan."""
    path = folder / f"{row.replace(':', '-')}.json"
    if path.exists():
        return 0
    words = [sys.executable, "-m", "dalle2_jax", *command(row), "--out", str(path)]
    print(shlex.join(["dalle2", *words[3:]]), file=sys.stderr, flush=True)
    return subprocess.run(words, stdout=subprocess.DEVNULL).returncode


def line(row: str, content: dict) -> str:
    """Returns the table's line of a plan, and the one with its command."""
    memory, time, gib = content["memory"], content["time"], 2**30
    state = sum(memory[name] for name in ("parameters", "averages", "optimizer"))
    peak = "-" if memory["peak"] is None else f"{memory['peak'] / gib:,.1f}"
    verdict = "" if content["fits"] else " (does not fit)"
    mesh = " ".join(f"{axis}={size}" for axis, size in content["mesh"].items() if size > 1)
    used, days = "-", "-"
    if time:
        low, high = (each / content["devices"] for each in content["device_days"])
        used = f"{time['serial_utilisation']:.0%} to {time['utilisation']:.0%}"
        days = f"{low:,.1f} to {high:,.1f}"
    sizes = f"{peak} / {state / gib:,.1f} / {memory['available'] / gib:,.1f}{verdict}"
    repeat = f"`{shlex.join(['dalle2', *command(row)])}`"
    cells = f"| {content['stage']} | {content['topology']} | {mesh} | {sizes} | {used} | {days} |"
    return f"{cells}\n| {repeat} | | | | | |"


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/plans.py --folder build/plans --row prior:h200"
    parser = args.make_parser("python benchmarks/plans.py", "Compiles the table of docs/pod.md.", example)
    parser.add_argument("--folder", type=args.path, required=True, help="folder of the plans")
    parser.add_argument("--row", action="append", default=[], metavar="STAGE:CHIP", help="a row; may be repeated")
    options = parser.parse_args()
    unknown = [row for row in options.row if row not in ROWS]
    if unknown:
        raise UsageError(f"unknown row {unknown[0]!r}: choose from {', '.join(ROWS)}")
    options.folder.mkdir(parents=True, exist_ok=True)
    failed = [row for row in options.row or ROWS if compile_row(row, options.folder) not in (0, 1)]
    found = {row: options.folder / f"{row.replace(':', '-')}.json" for row in ROWS}
    print(HEAD, *(line(row, json.loads(path.read_text())) for row, path in found.items() if path.exists()), sep="\n")
    if failed:
        raise UsageError(f"rows without a plan: {', '.join(failed)}; their errors are above")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
