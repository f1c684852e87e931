"""``dalle2 evaluate``: measures a trained system."""

import argparse
import contextlib
import json
from typing import TYPE_CHECKING, Any

from dalle2_jax.cli import args
from dalle2_jax.ranges import BatchSize

if TYPE_CHECKING:
    from dalle2_jax.evaluation.measures import Measured
    from dalle2_jax.system.system import System

EXAMPLE = "dalle2 evaluate attributes --system runs/demo --num 256"
PRIORS = ("diffusion", "ar")
DIFFUSED = ("prior", "decoder", "upsampler_1", "upsampler_2")


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = args.make_parser("dalle2 evaluate", "Measures a trained system.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, count, help_text in (
        ("attributes", 256, "do images of shapes match their captions? (baseline: shuffled captions)"),
        ("retrieval", 64, "does CLIP find each image's caption among those of other images, and the reverse?"),
        ("digits", 200, "is each image of a system trained on digits read as its caption's digit?"),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("--system", required=True, type=args.system, help=args.SYSTEM)
        examples = "how many examples (default %(default)s)"
        command.add_argument("--num", type=args.positive_int, default=count, help=examples)
        command.add_argument("--out", type=args.path, help="folder for results.json and the grid")
        if name != "digits":
            _add_data(command)
            command.add_argument("--split", default="val", help="val (default), train or compositional")
        if name != "retrieval":
            command.add_argument("--seed", type=args.seed, default=1, help="of the samples (default %(default)s)")
            command.add_argument("--batch_size", type=args.number(BatchSize), default=64, help="images at a time")
            prior = "which prior, if the system has both (default diffusion)"
            command.add_argument("--prior", choices=PRIORS, help=prior)
    for name, split, help_text in (
        ("bits_per_dim", "val", "of a stage that generates images: the bound on their negative log-likelihood"),
        (
            "noise_statistics",
            "train",
            "of a diffusion stage: the noise it predicts at each step, which variance analytic needs",
        ),
    ):
        command = commands.add_parser(name, help=help_text, description=help_text)
        command.add_argument("--system", required=True, type=args.system, help=args.SYSTEM)
        command.add_argument("--stage", required=True, choices=DIFFUSED, help="which stage")
        _add_data(command)
        examples = "how many examples (default %(default)s)"
        command.add_argument("--num", type=args.positive_int, default=64, help=examples)
        command.add_argument("--split", default=split, help="train, val, .. (default %(default)s)")
        command.add_argument("--seed", type=args.seed, default=1, help="of the noise (default %(default)s)")
        command.add_argument("--batch_size", type=args.number(BatchSize), default=16, help="examples at a time")
        command.add_argument("--out", type=args.path, help="folder for results.json")
    for command in commands.choices.values():
        command.add_argument("--noverify", action="store_true", help=args.NOVERIFY)
    return parser


def _add_data(command: argparse.ArgumentParser) -> None:
    text = "the data: shapes, folder:PATH, webdataset:PATH or tfds:PATH (default: what the stage was trained on)"
    source = command.add_mutually_exclusive_group()
    source.add_argument("--data", help=text)
    source.add_argument("--trust_system", action="store_true", help=args.TRUST)


def load_system(options: argparse.Namespace) -> "System":
    """Loads the stages that the command measures."""
    from dalle2_jax.system import load
    from dalle2_jax.system.system import load as load_stages

    if options.command == "retrieval":
        stages: tuple[str, ...] = ("clip",)
    elif options.command in ("attributes", "digits"):
        stages = load.cascade_stages(options.system, options.prior)
    else:
        stages = load.needed(options.system, options.stage)
    prior = vars(options).get("prior")
    return load_stages(options.system, stages=stages, prior=prior, verify=not options.noverify)


def measure_rates(options: argparse.Namespace) -> "Measured":
    """Measures attributes, digits or retrieval, and prints the table."""
    from dalle2_jax.evaluation import examples, measures

    num = options.num
    if options.command == "digits":
        measures.check_digits(options.system)
        measured = measures.measure_digits(load_system(options), num, options.seed, options.batch_size, progress=True)
        print(measured.table(f"{num} sampled digits"))
        return measured
    stage = "clip" if options.command == "retrieval" else "decoder"
    source = examples.open_source(options.system, stage, options.split, options.data, options.trust_system)
    if options.command == "retrieval":
        measured = measures.measure_retrieval(load_system(options), source, num)
        print(measured.table(f"CLIP, {measured.counts['image_to_text']} {options.split} examples"))
        return measured
    measures.check_attributes(source, num)
    given = (load_system(options), source, num, options.seed, options.batch_size)
    measured = measures.measure_attributes(*given, progress=True)
    print(measured.table(f"{num} {options.split} captions"))
    return measured


def measure_stage(options: argparse.Namespace) -> dict[str, Any]:
    """Measures bits per dimension or noise statistics of a stage, and prints a line."""
    from dalle2_jax.evaluation import examples, measures

    source = examples.open_source(options.system, options.stage, options.split, options.data, options.trust_system)
    given = (load_system(options), options.stage, source, options.num, options.seed, options.batch_size)
    if options.command == "noise_statistics":
        statistics = measures.measure_noise_statistics(*given)
        path = options.system / options.stage / measures.NOISE_STATISTICS
        print(f"{path}: {options.stage} can be sampled with ddpm and variance analytic")
        return statistics
    bits = measures.measure_bits_per_dim(*given)
    ends, counted = bits["interval"]["total"], f"{options.stage}, {options.num} {options.split} examples"
    interval = f" (95 % interval {ends[0]:.4f} to {ends[1]:.4f})" if ends else ""
    print(f"{counted}: {bits['total']:.4f} bits per dimension at most{interval}; uniform noise has 8")
    return bits


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    from dalle2_jax import lock
    from dalle2_jax.evaluation.measures import image_grid
    from dalle2_jax.files import write_atomically, write_png

    with lock.hold_folder(options.out) if options.out else contextlib.nullcontext():
        if options.command in ("bits_per_dim", "noise_statistics"):
            result, grid = measure_stage(options), None
        else:
            measured = measure_rates(options)
            result, grid = measured.to_json(), image_grid(measured)
        if options.out:
            write_atomically(options.out / "results.json", json.dumps(result, indent=2) + "\n")
        if options.out and grid is not None:
            write_png(options.out / "grid.png", grid)
