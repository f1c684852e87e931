"""``dalle2 sweep``: trains a stage once for each variation that its config page lists (see config/sweep.py)."""

import shlex
from collections.abc import Mapping, Sequence

from dalle2_jax.cli import args
from dalle2_jax.errors import UserError

EXAMPLE = "dalle2 sweep --config configs/shapes.py:decoder --system runs/demo --out runs/sweep"
MEASURES = ("attributes", "digits", "emoji", "retrieval", "prior", "ablation", "cmmd", "clip_score")


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    description = (
        "Trains a stage once for each variation that its config page lists in a function sweep(which).\n"
        "OUT/sweep.json has one object per run: its fields, its loss and its measures."
    )
    parser = args.make_parser("dalle2 sweep", description, EXAMPLE)
    parser.add_argument("--config", required=True, help="FILE:STAGE, a config page with a function sweep")
    parser.add_argument("--out", required=True, type=args.path, help="folder of the runs; each run is a system")
    parser.add_argument("--system", type=args.system, help="the system whose other stages the runs share")
    parser.add_argument("--only", type=int, metavar="N", help="train only run N, as one task of a job array does")
    parser.add_argument("--measure", choices=MEASURES, help="a measure of dalle2 evaluate for each run")
    parser.add_argument("--list", action="store_true", help="print the commands without running them")
    return parser


def main() -> None:
    """Runs the command. UserError if a run failed."""
    options = make_parser().parse_args()
    from dalle2_jax.config import sweep

    if options.list:
        runs = sweep.read_runs(options.config, options.out)
        for run in runs if options.only is None else runs[options.only : options.only + 1]:
            for command in sweep.commands(options.config, run, options.measure):
                print(shlex.join(command))
        return
    outcomes = sweep.sweep(
        options.config,
        options.out,
        system=options.system,
        only=options.only,
        measure=options.measure,
        execute=_announced,
    )
    print(table({outcome.run.system.name: outcome.figures for outcome in outcomes}))
    failed = [outcome.run.system.name for outcome in outcomes if outcome.failed]
    if failed:
        raise UserError(f"{len(failed)} of {len(outcomes)} runs failed: {', '.join(failed)}; their errors are above")


def _announced(command: Sequence[str]) -> int:
    from dalle2_jax.config import sweep

    print(shlex.join(command), flush=True)
    return sweep.run_command(command)


def table(figures: Mapping[str, Mapping[str, float]]) -> str:
    """Returns the results as a table with one line per run."""
    names = list(dict.fromkeys(name for row in figures.values() for name in row))
    width = max(map(len, figures))
    lines = [" ".join([" " * width, *(f"{name:>13}" for name in names)])]
    for run, row in figures.items():
        cells = (f"{row[name]:13.4f}" if name in row else f"{'-':>13}" for name in names)
        lines.append(" ".join([f"{run:{width}}", *cells]))
    return "\n".join(lines)
