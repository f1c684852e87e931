"""Where the time of a train step of `peers.py` goes, by kind of operation, here and in PyTorch.

    python benchmarks/peers_operations.py --peer .venv-parity/bin/python

Each side traces a few steps with its own profiler. Seconds of a kind are its share of the traced time, of the median
step without a trace.
"""

import pathlib
import re
import statistics
import sys
from collections import defaultdict

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import program
from peers import Side

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli

KINDS = ("convolutions", "matrix products", "optimizer", "copies and layout", "norms and other element-wise work")

MOVING = "bitcast|broadcast|concatenate|constant|copy|pad|reshape|reverse|slice|transpose"

OURS = (
    # pattern over "opcodes instruction op_name" of an instruction of the compiled step, kind; the first match wins
    (r"^\S*\bconvolution\b", 0),
    (r"^\S*\bdot\b", 1),
    (r"^\S+ \S+ jit\(\w+\)/(?!.*jvp\()", 2),
    (rf"^(({MOVING})(,|\b))+ ", 3),
)

THEIRS = (
    # pattern over the name of an operation of PyTorch, kind
    (r"conv", 0),
    (r"mm|matmul|linear|scaled_dot_product", 1),
    (r"Optimizer|_foreach|addcmul|addcdiv|lerp_|sqrt|mul_$", 2),
    (r"copy|contiguous|clone|cat|transpose|permute|to_copy|upsample|index|slice|select", 3),
)


def kind_of(name: str, rules: tuple[tuple[str, int], ...]) -> str:
    """Returns the kind of an operation."""
    return KINDS[next((kind for pattern, kind in rules if re.search(pattern, name)), len(KINDS) - 1)]


def by_kind(durations: dict[str, float], rules: tuple[tuple[str, int], ...], seconds: float) -> dict[str, float]:
    """Returns the seconds of each kind of which a step has some in all."""
    found, total = defaultdict(float), sum(durations.values())
    for name, duration in durations.items():
        found[kind_of(name, rules)] += seconds * duration / total
    return dict(found)


def table(theirs: dict[str, float], ours: dict[str, float]) -> str:
    """Returns the seconds of both sides as a Markdown table."""
    lines = ["| operations | PyTorch, s | here, s |", "| --- | --- | --- |"]
    rows = [(kind, theirs.get(kind, 0.0), ours.get(kind, 0.0)) for kind in KINDS]
    rows.append(("all", sum(theirs.values()), sum(ours.values())))
    return "\n".join([*lines, *(f"| {kind} | {one:.2f} | {other:.2f} |" for kind, one, other in rows)])


def measure(program: str, python: str, section: str, options: list[str]) -> tuple[dict[str, float], float]:
    """Returns the traced durations of a side by operation, and the median seconds of three steps."""
    side = Side(python, program, section, options)
    seconds = statistics.median(side.run("step")["seconds"] for _ in range(3))
    durations = side.run("operations")["result"]
    side.close()
    return durations, seconds


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/peers_operations.py --peer .venv-parity/bin/python --section prior"
    text = "Compares a train step with that of diffusers, by kind of operation."
    parser = args.make_parser("python benchmarks/peers_operations.py", text, example)
    parser.add_argument("--peer", type=program, required=True, help="a Python that has torch and diffusers")
    parser.add_argument("--section", choices=("decoder", "prior"), default="decoder", help="the network")
    parser.add_argument("--tiny", action="store_true", help="tiny networks, to try the program")
    parser.add_argument(
        "--largest", type=int, default=0, metavar="N", help="print the N largest operations of each side"
    )
    options = parser.parse_args()
    words = ["--operations", *(["--tiny"] if options.tiny else [])]
    found = {}
    for name, script, python, rules in (
        ("theirs", "peers_torch.py", options.peer, THEIRS),
        ("ours", "peers_ours.py", sys.executable, OURS),
    ):
        durations, seconds = measure(script, python, options.section, words)
        found[name] = by_kind(durations, rules, seconds)
        total = sum(durations.values())
        for operation, duration in sorted(durations.items(), key=lambda item: -item[1])[: options.largest]:
            print(f"{name} {duration / total:6.1%} {kind_of(operation, rules)}: {operation[:150]}")
    print(table(found["theirs"], found["ours"]))


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
