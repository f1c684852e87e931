"""``dalle2 plan``: memory, time and cost of a train step, or of sampling, on accelerators that need not be here."""

import argparse
import ast
import os
from pathlib import Path
from typing import Annotated, Any

from dalle2_jax.cli import args
from dalle2_jax.errors import UsageError, UserError
from dalle2_jax.ranges import BatchSize, Range

EXAMPLE = """dalle2 plan --config configs/paper.py:decoder --topology v5p:8x8x8 --mesh fsdp=512
  dalle2 plan --config configs/paper.py:prior --topology h200:2x8 --sample --batch_size 64
  dalle2 plan --config configs/paper.py:clip --topology v5e --search"""

AXES = ("data", "fsdp", "tensor")


class DoesNotFit(UserError):
    """The planned program needs more memory than the devices have."""


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    description = (
        "Compiles the train step of a config ahead of time for accelerators that need not be here, and prints the\n"
        "memory of a device, the work and the time of a step, and the cost of the whole run.\n\n"
        "exit codes: 0 it fits, 1 it does not, 2 that is unknown (a wrong argument, or no compiler)"
    )
    parser = args.make_parser("dalle2 plan", description, EXAMPLE)
    parser.add_argument("--config", required=True, help="FILE:STAGE, a config page and one of its stages")
    topology = (
        "CHIP:SHAPE: v4, v5e, v5p or v6e and a slice, h100 or h200 and HOSTSxGPUS, or cpu and a number of devices"
    )
    parser.add_argument("--topology", required=True, help=f"{topology}; with --search, CHIP alone tries all shapes")
    mesh = "sizes of data, fsdp and tensor, as in data=2,fsdp=4 (default: the config's); -1 is all devices left"
    parser.add_argument("--mesh", type=mesh_sizes, help=mesh)
    parser.add_argument("--batch_size", type=args.number(BatchSize), help="of all devices (default: the config's)")
    field = "another value for a field of the config, as in optim.lr=1e-4; may be repeated"
    parser.add_argument("--set", type=setting, action="append", default=[], metavar="FIELD=VALUE", help=field)
    parser.add_argument("--sample", action="store_true", help="plan the sampling of a batch, not a train step")
    search = "find the smallest slice that fits, and then the fastest plan on it unless 'smallest' follows"
    choices = {"nargs": "?", "choices": ("smallest", "fastest"), "const": "fastest"}
    parser.add_argument("--search", **choices, help=search)
    memory = "GiB of a device that programs can use (default: the chip's)"
    gib = Annotated[float, Range(0.001, 100_000)]
    parser.add_argument("--memory_gib", type=args.number(gib), help=memory)
    full = "compile TPU programs with all optimizations: several times slower, the same memory"
    parser.add_argument("--full", action="store_true", help=full)
    parser.add_argument("--out", type=args.path, metavar="FILE", help="write the plan as JSON")
    return parser


def mesh_sizes(word: str) -> dict[str, int]:
    """Reads data=2,fsdp=4 for an argument parser."""
    sizes = {}
    for part in word.split(","):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.removeprefix("-").isdecimal() or len(size) > 7:
            raise argparse.ArgumentTypeError(f"{part[:100]!r} is not AXIS=SIZE with an axis of {', '.join(AXES)}")
        sizes[axis] = int(size)
    return sizes


def setting(word: str) -> tuple[str, Any]:
    """Reads FIELD=VALUE for an argument parser: the value is a Python literal, or else text."""
    field, equals, value = word.partition("=")
    if not equals or not field:
        raise argparse.ArgumentTypeError(f"{word[:100]!r} is not FIELD=VALUE")
    try:
        return field, ast.literal_eval(value)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return field, value


def main() -> None:
    """Runs the command.

    Raises:
      DoesNotFit: the program needs more memory than the devices have.
      UsageError: a wrong argument, a compiler that is not installed, or CPU devices without ``--memory_gib``.
    """
    options = make_parser().parse_args()
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # accelerators of this machine are not needed
    from dalle2_jax.config.experiment import experiment
    from dalle2_jax.planning import planner
    from dalle2_jax.planning.topology import check_name

    if ":" in options.topology or not options.search:
        check_name(options.topology)
    planned = experiment(options.config, **dict(options.set))
    clip = planner.page_clip(options.config) if "clip" in planned.requires else None
    common = {
        "clip": clip,
        "batch_size": options.batch_size,
        "memory": options.memory_gib and int(options.memory_gib * 2**30),
        "full": options.full,
    }
    if options.search:
        if options.sample or options.mesh:
            raise UsageError("--search finds the mesh of a train step: remove --sample and --mesh")
        _search(planned, options.topology, {**common, "fastest": options.search == "fastest"}, options.out)
    else:
        _plan(planned, options, common)


def _plan(planned: Any, options: argparse.Namespace, common: dict[str, Any]) -> None:
    from dalle2_jax.planning.planner import CannotTell, plan

    result = plan(planned, options.topology, mesh=options.mesh, sample=options.sample, **common)
    print(result.table())
    if options.out:
        result.save(options.out)
    if result.fits is None:
        raise CannotTell(f"{options.topology} has no memory limit: give --memory_gib to compare with the peak above")
    if not result.fits:
        raise DoesNotFit(f"{planned.stage} does not fit on {options.topology}: --search finds what does")


def _search(planned: Any, topology: str, common: dict[str, Any], out: Path | None) -> None:
    import json

    from dalle2_jax.files import write_atomically
    from dalle2_jax.planning.search import Trial, search_plans
    from dalle2_jax.planning.topology import shown_mesh

    def report(trial: Trial) -> None:
        mesh = shown_mesh(trial.plan.mesh.values(), " ")
        changed = "".join(f" {name}={value}" for name, value in trial.overrides.items())
        print(f"{trial.plan.topology} {mesh}{changed}: {'fits' if trial.plan.fits else 'does not fit'}", flush=True)

    result = search_plans(planned, topology, progress=report, **common)
    print(result.table())
    if out:
        write_atomically(out, json.dumps(result.to_json(), indent=2) + "\n")
    if result.smallest is None:
        raise DoesNotFit(f"{planned.stage} fits on no {topology}: give another chip, or a smaller --batch_size")
