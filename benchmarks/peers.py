"""Compares this package with diffusers on one machine: both sides alternate, call by call, in one run.

    python benchmarks/peers.py --peer .venv-parity/bin/python --out build/peers.json

The peer is a Python with the extra ``parity`` (torch, diffusers). The networks are Karlo's at a size for a CPU: a U-Net
of 108 M parameters at 64x64 and a prior of 27 M. Both sides take a GPU if there is one, else all threads of the CPU. A
ratio is their median over ours: above 1 ours is faster. Each section runs in a process of its own on each side, so that
peaks of memory are those of the section.
"""

import json
import os
import pathlib
import statistics
import subprocess
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import program

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.files import write_atomically

HERE = pathlib.Path(__file__).parent
SECTIONS = {"decoder": ("forward", "step"), "prior": ("forward", "step"), "sample": ("sample",)}
"""Section -> its calls."""


class Side:
    """One process that runs calls on request."""

    def __init__(self, python: str, program: str, section: str, options: list[str]):
        self._name = program
        words = [python, str(HERE / program), section, *options]
        environment = {**os.environ, "PYTHONPATH": str(HERE.parent)}
        self._process = subprocess.Popen(
            words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.facts = self._answer()

    def run(self, call: str) -> dict:
        """Runs a call once; returns its seconds."""
        self._process.stdin.write(f"{call}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> float:
        """Ends the process and returns its peak memory, MB."""
        self._process.stdin.close()
        return self._answer()["peak_mb"]

    def _answer(self) -> dict:
        line = self._process.stdout.readline()
        if not line:
            raise UserError(f"{self._name} ended with exit code {self._process.wait()}: its error is above")
        return json.loads(line)


def measure(section: str, peer: str, repeats: int, ours: list[str], theirs: list[str]) -> dict:
    """Returns the figures of one section."""
    sides = {"ours": Side(sys.executable, "peers_ours.py", section, ours)}
    sides["theirs"] = Side(peer, "peers_torch.py", section, theirs)
    times = {(name, call): [] for name in sides for call in SECTIONS[section]}
    for turn in range(repeats):
        for call in SECTIONS[section]:
            for name in (*sides,) if turn % 2 else (*sides,)[::-1]:
                times[name, call].append(sides[name].run(call))
    result = {name: {"facts": side.facts, "peak_mb": side.close()} for name, side in sides.items()}
    for (name, call), found in times.items():
        seconds = [each["seconds"] for each in found]
        cpu = statistics.median(each["cpu_seconds"] for each in found)
        spread = {"min": min(seconds), "median": statistics.median(seconds), "max": max(seconds)}
        result[name][call] = {**spread, "cpu_seconds": cpu}
    return result


def table(results: dict) -> str:
    """Returns the figures as a Markdown table."""
    lines = [
        "| work | theirs | ours | ratio | peak memory, theirs / ours |",
        "| --- | --- | --- | --- | --- |",
    ]
    for section, sides in results.items():
        peaks = f"{sides['theirs']['peak_mb']:,.0f} / {sides['ours']['peak_mb']:,.0f} MB"
        for call in SECTIONS[section]:
            theirs, ours = sides["theirs"][call], sides["ours"][call]
            what = section if call == section else f"{section}, {call}"
            lines.append(
                f"| {what} | {_span(theirs)} | {_span(ours)} | {theirs['median'] / ours['median']:.2f} | {peaks} |"
            )
    return "\n".join(lines)


def _span(found: dict) -> str:
    return f"{found['median']:.3g} s ({found['min']:.3g} to {found['max']:.3g})"


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/peers.py --peer .venv-parity/bin/python --repeats 10 --out build/peers.json"
    parser = args.make_parser("python benchmarks/peers.py", "Compares this package with diffusers.", example)
    parser.add_argument("--peer", type=program, required=True, help="a Python that has torch and diffusers")
    parser.add_argument("--sections", default=",".join(SECTIONS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--repeats", type=args.positive_int, default=5, help="calls a side (default %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the computation")
    parser.add_argument("--compile", action="store_true", help="let PyTorch compile its networks")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the program")
    parser.add_argument("--out", type=args.path, metavar="FILE", help="write the figures as JSON")
    options = parser.parse_args()
    unknown = [name for name in options.sections.split(",") if name not in SECTIONS]
    if unknown:
        raise UsageError(f"unknown section {unknown[0]!r}: choose from {', '.join(SECTIONS)}")
    common = ["--dtype", options.dtype, *(["--tiny"] if options.tiny else [])]
    theirs = [*common, *(["--compile"] if options.compile else [])]
    results = {
        section: measure(section, options.peer, options.repeats, common, theirs)
        for section in options.sections.split(",")
    }
    print(table(results))
    if options.out:
        content = {"load": os.getloadavg(), "cpus": os.cpu_count(), "options": theirs, "sections": results}
        write_atomically(options.out, json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
