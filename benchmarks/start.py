"""CPU seconds and seconds until ``dalle2 sample`` has written its first image, by phase, as JSON lines.

python benchmarks/start.py --system shapes

Each round is a new process. The first one starts with an empty cache of compiled programs, the others find it filled.
CPU seconds are those of all threads, so they hardly depend on what else the machine does.
"""

import os
import pathlib
import resource
import sys
import tempfile
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent))

from common import PACKAGE, emit, output, result

from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli

PHASES = """
import json, sys, time
def mark(): return time.process_time(), time.perf_counter()
system, prompt, num, out = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
marks = {"start": mark()}
import dalle2_jax.cli.sample, dalle2_jax.system.system as module
marks["imports"] = mark()
loaded = module.load(system)
marks["loading"] = mark()
loaded.text2image(prompt, num=num, out=out)
marks["first images"] = mark()
loaded.text2image(prompt, num=num, out=out)
marks["the same images again"] = mark()
names = list(marks)
print(json.dumps({b: [round(y - x, 3) for x, y in zip(marks[a], marks[b])] for a, b in zip(names, names[1:])}))
"""
"""A program that prints, by phase, its CPU seconds and its seconds."""


def main() -> None:
    """Runs the command line."""
    parser = args.make_parser("python benchmarks/start.py", "Times the first image.", "python benchmarks/start.py")
    parser.add_argument("--system", default="shapes", help="folder or name (default %(default)s)")
    parser.add_argument("--prompt", default="a large red circle", help="the caption (default %(default)s)")
    parser.add_argument("--num", type=int, default=4, help="images (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="processes with a filled cache (default %(default)s)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for number in range(1 + options.rounds):
            command, phases = _round(options, pathlib.Path(folder))
            cache = "filled" if number else "empty"
            emit(benchmark="start", system=options.system, num=options.num, cache=cache, command=command, phases=phases)


def _round(options, folder: pathlib.Path) -> tuple[dict[str, float], dict[str, list[float]]]:
    """Returns the CPU seconds and seconds of the whole command, and those of each phase, with the cache in ``folder``.

    The phases are those of another process, which has the whole command's cache before and after it.
    """
    environment = {**os.environ, **PACKAGE, "XDG_CACHE_HOME": str(folder)}
    environment |= {"JAX_COMPILATION_CACHE_DIR": str(folder / "jax")}
    words = ["-m", "dalle2_jax", "sample", "text2image", "--system", options.system, "--prompt", options.prompt]
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    output([sys.executable, *words, "--num", str(options.num), "--out", str(folder / "images")], environment)
    after, seconds = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - start
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    program = [sys.executable, "-c", PHASES]
    phases = result([*program, options.system, options.prompt, options.num, folder / "phases"], environment)
    command = {"cpu_seconds": round(cpu, 2), "seconds": round(seconds, 2)}
    return command, phases


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
