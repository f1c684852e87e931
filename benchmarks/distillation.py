"""Quality of distilled decoders against their teacher by steps, as JSON lines and a table.

    python benchmarks/distillation.py --teacher runs/demo --students runs/demo-fast runs/demo-fast-2

All systems generate images of the same captions of split "val" from the same seed, with their own priors. The measure
is ``attributes``: the share of images that show everything their caption says, which needs a system of shapes.
"""

import argparse
import pathlib
import sys
from typing import Any

sys.path.insert(0, str(pathlib.Path(__file__).parent))

import common

import dalle2_jax as d2
from dalle2_jax.cli import args
from dalle2_jax.cli.process import run_cli
from dalle2_jax.config.stored import stored_experiment
from dalle2_jax.errors import UserError
from dalle2_jax.evaluation.intervals import in_percent
from dalle2_jax.workdir.folder import StageFolder

SOLVER_STEPS = (10, 15, 20)


def rows(teacher: pathlib.Path, students: list[pathlib.Path]) -> list[tuple[str, pathlib.Path, dict[str, Any]]]:
    """Returns (title, system, settings of the decoder) for each line of the table.

    Raises:
      UserError: a student whose decoder is not distilled.
    """
    solver = {"name": "dpmpp_2m"}
    found = [(f"teacher, dpmpp_2m {n}", teacher, {**solver, "steps": f"logsnr{n}"}) for n in SOLVER_STEPS]
    own: list[tuple[str, pathlib.Path, dict[str, Any]]] = []
    for system in students:
        experiment = stored_experiment(StageFolder(system, "decoder"))
        if experiment is None or not experiment.spec.distilled:
            raise UserError(f"{system} has no distilled decoder: train one by a config decoder,distilled")
        spec: Any = experiment.spec
        steps = spec.sampling.steps
        found.append((f"teacher, ddim {steps}", teacher, {"name": "ddim", "steps": steps}))
        own.append((f"student of {system}, {steps}", system, {}))
    return found + own


def main() -> None:
    """Runs the command line."""
    parser = args.make_parser(
        "python benchmarks/distillation.py", "Measures distilled decoders.", __doc__.splitlines()[2].strip()
    )
    parser.add_argument("--teacher", type=pathlib.Path, required=True, help="the system that was distilled")
    parser.add_argument("--students", type=pathlib.Path, nargs="+", required=True, help="systems of distilled decoders")
    parser.add_argument("--num", type=args.positive_int, default=1024, help="images (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1, help="of captions and noise (default %(default)s)")
    options: argparse.Namespace = parser.parse_args()
    lines = ["| sampling | n | all attributes | colour | shape |", "| --- | --- | --- | --- | --- |"]
    for title, system, settings in rows(options.teacher, options.students):
        sampling = {"decoder": settings} if settings else {}
        measured = d2.evaluate(system, ["attributes"], num=options.num, seed=options.seed, sampling=sampling)
        figures = [measured[f"attributes/{name}"] for name in ("all", "colour", "shape")]
        cells = [in_percent(figure.value, figure.interval or (figure.value,) * 2) for figure in figures]
        values = {name: figure.value for name, figure in zip(("all", "colour", "shape"), figures, strict=True)}
        common.emit(benchmark="distillation", sampling=title, n=figures[0].n, **values)
        lines.append(f"| {title} | {figures[0].n} | " + " | ".join(cells) + " |")
    print("\n".join(lines))


if __name__ == "__main__":
    run_cli.exit_process(run_cli.run_cli(main))
