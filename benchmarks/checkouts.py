"""Seconds of a target of make in several checkouts, one after the other, as JSON lines: ``make demo`` before and after.

git clone . ../before && git -C ../before checkout a245ff6
python benchmarks/checkouts.py ../before . --target demo --out build/checkouts

Each is installed first, which is not timed. Then the checkouts take turns. Each run has a folder of its own in OUT: its
cache of compiled programs, empty at first, and what the target writes (the variable DEMO of the Makefile).
"""

import argparse
import json
import os
import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import output

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli


def checkout(word: str) -> pathlib.Path:
    """Reads a folder with a Makefile for an argument parser."""
    folder = args.path(word)
    if not (folder / "Makefile").is_file():
        raise argparse.ArgumentTypeError(f"{word} has no Makefile: give a checkout of the repository")
    return folder


def timed(folder: pathlib.Path, target: str, out: pathlib.Path) -> dict[str, str | float]:
    """Runs a target once. Returns the commit and the seconds. Raises UserError with the last line of its errors."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(out / "cache")}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    start = time.perf_counter()
    output(["make", "-C", folder, target, f"DEMO={out}/demo"], environment)
    seconds = time.perf_counter() - start
    commit = output(["git", "-C", folder, "rev-parse", "--short", "HEAD"], os.environ)
    return {"checkout": str(folder), "commit": commit.strip(), "target": target, "seconds": round(seconds, 1)}


def main() -> None:
    """Runs the command line."""
    example = "python benchmarks/checkouts.py ../before . --target demo --out build/checkouts"
    parser = args.make_parser("python benchmarks/checkouts.py", "Times a target of make in checkouts.", example)
    parser.add_argument("folders", nargs="+", type=checkout, help="checkouts of the repository")
    parser.add_argument("--target", default="demo", help="of their Makefiles (default %(default)s)")
    parser.add_argument("--repeats", type=args.positive_int, default=1, help="runs of each (default %(default)s)")
    parser.add_argument("--out", type=args.path, required=True, help="a new folder for what the runs write")
    options = parser.parse_args()
    if options.out.exists():
        parser.error(f"--out {options.out} exists: name a new folder")
    for folder in options.folders:
        output(["make", "-C", folder, "install"], os.environ)
    runs = [folder.resolve() for _ in range(options.repeats) for folder in options.folders]
    for number, folder in enumerate(runs):
        out = options.out.resolve() / f"{number}-{folder.name}"
        out.mkdir(parents=True)
        print(json.dumps(timed(folder, options.target, out)), flush=True)


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
