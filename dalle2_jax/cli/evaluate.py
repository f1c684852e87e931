"""``dalle2 evaluate``: measures a trained system, or writes the statistics of a data set."""

import argparse
from pathlib import Path
from typing import Any

from dalle2_jax.cli import args, stage_options
from dalle2_jax.cli.sample import PRIORS
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.evaluation.registry import MEASURES, PROTOCOLS, chosen_measures
from dalle2_jax.ranges import BatchSize, Side

STATISTICS = "statistics"
"""The word in place of SYSTEM that writes the statistics of a data set."""

RESOLUTION = 64
"""Side in pixels of the images of statistics, unless the user gives another."""

EXAMPLE = f"""dalle2 evaluate shapes --measures attributes,retrieval --num 64 --out runs/shapes-measures
  dalle2 evaluate runs/demo --measures fd,clip_score --features runs/inception --guidance 1,2,4 --out runs/demo-fd
  dalle2 evaluate {STATISTICS} --data folder:coco --split val --features runs/inception --out coco.npz"""
DIFFUSED = ("prior", "decoder", "upsampler_1", "upsampler_2")

PASSED = (
    *("data", "split", "num", "features", "lpips", "clip", "reference", "guidance", "protocol", "label"),
    *("templates", "stage", "prior", "seed", "batch_size", "trust_system", "out"),
)
"""Options that `dalle2_jax.evaluate` has by the same name."""


def make_parser() -> args.Parser:
    """Returns the command line's parser."""
    width = max(map(len, MEASURES))
    measures = "\n".join(f"  {name:{width}}  {each.summary}" for name, each in MEASURES.items())
    description = f"Measures a trained system.\n\nmeasures:\n{measures}"
    parser = args.make_parser("dalle2 evaluate", description, EXAMPLE)
    parser.add_argument("system", type=subject, help=f"{args.SYSTEM}; or {STATISTICS}, to write those of --data")
    parser.add_argument("--measures", type=measure_names, default=(), help="names separated by commas")
    parser.add_argument("--protocol", choices=[*PROTOCOLS], help="a published protocol: FID over 30,000 COCO captions")
    _add_data(parser)
    out = "folder of the results and samples, where an interrupted command continues"
    parser.add_argument("--out", type=args.path, help=f"{out}; of {STATISTICS}, the file")
    parser.add_argument("--stage", choices=DIFFUSED, help="the stage of bits_per_dim and noise_statistics")
    prior = "which prior, if the system has both (default diffusion)"
    parser.add_argument("--prior", choices=PRIORS, help=prior)
    parser.add_argument("--seed", type=args.seed, default=1, help="random seed (default %(default)s)")
    batch = "images generated at a time (default 64, and 16 for single stages)"
    parser.add_argument("--batch_size", type=args.number(BatchSize), help=batch)
    scales = "guidance scale of the decoder; several separated by commas are a sweep with a plot"
    parser.add_argument("--guidance", type=scales_of, default=(), help=scales)
    parser.add_argument("--noverify", action="store_true", help=args.NOVERIFY)
    stage_options.add_stage_options(parser)
    return parser


def _add_data(parser: argparse.ArgumentParser) -> None:
    text = "the data: shapes, folder:PATH, webdataset:PATH or tfds:PATH (default: what the system was trained on)"
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--data", help=text)
    source.add_argument("--trust_system", action="store_true", help=args.TRUST)
    parser.add_argument("--split", help="val (default), train or another split of the data")
    counts = f"number of examples (default: {MEASURES['attributes'].num} for most measures, all for {STATISTICS})"
    parser.add_argument("--num", type=args.positive_int, help=counts)
    parser.add_argument("--label", help="field of the data's records that is the class, for zero_shot and linear_probe")
    template = "caption of a class for zero_shot, with {} for its name; may be repeated"
    parser.add_argument("--template", dest="templates", action="append", default=[], metavar="TEXT", help=template)
    features = "folder of an imported image network, or a system with a CLIP; may be repeated"
    parser.add_argument("--features", type=args.path, action="append", default=[], metavar="DIR", help=features)
    parser.add_argument("--lpips", type=args.path, metavar="DIR", help="folder of an imported LPIPS")
    clip = "system whose CLIP compares images with captions (default: the measured system)"
    parser.add_argument("--clip", type=args.system, metavar="SYSTEM", help=clip)
    parser.add_argument("--reference", type=args.path, help=f"file of {STATISTICS}, in place of the real images of fd")
    side = f"side in pixels of the images of {STATISTICS} (default {RESOLUTION})"
    parser.add_argument("--resolution", type=args.number(Side), help=side)


def subject(word: str) -> str | Path:
    """Reads a system, or the word `STATISTICS`, for an argument parser; ./statistics is a folder."""
    return word if word == STATISTICS else args.system(word)


def measure_names(word: str) -> tuple[str, ...]:
    """Reads names of measures separated by commas, for an argument parser."""
    try:
        return chosen_measures([name.strip() for name in word.split(",")])
    except UsageError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def scales_of(word: str) -> tuple[float, ...]:
    """Reads numbers separated by commas, for an argument parser."""
    return tuple(args.finite_float(number) for number in word.split(","))


def write_statistics(options: argparse.Namespace) -> None:
    """Writes the statistics of a data set.

    Raises:
      UsageError: the data, the network or the file is not given, or measures are.
    """
    from dalle2_jax import data
    from dalle2_jax.evaluation import features, references

    for name in ("data", "out"):
        if vars(options)[name] is None:
            raise UsageError(f"{STATISTICS} needs --{name}; see dalle2 evaluate --help")
    if options.measures or options.protocol:
        raise UsageError(f"{STATISTICS} are those of data and have no measures: name a system to measure")
    if len(options.features) != 1:
        raise UsageError(f"{STATISTICS} needs one network: give --features DIR once")
    if options.out.is_dir():
        raise UserError(f"{options.out} is a folder: give --out FILE.npz")
    network = features.load(options.features[0])
    source = data.source_named(options.data, options.split or "train", options.resolution or RESOLUTION)
    found = references.statistics_of(network, source, options.num, options.data, progress=True)
    found.save(options.out)
    print(f"{options.out}: {found.n:,} images, {found.dim:,} features of {network.name}")


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    if options.system == STATISTICS:
        write_statistics(options)
        return
    if options.resolution is not None:
        raise UsageError(f"--resolution is of {STATISTICS}: a system's images have their own size")
    from dalle2_jax.evaluation.run import evaluate

    keywords: dict[str, Any] = {name: vars(options)[name] for name in PASSED}
    sampling = stage_options.stage_settings(options, list(stage_options.OPTIONS))
    try:
        measured = evaluate(
            options.system, options.measures, **keywords, sampling=sampling, verify=not options.noverify, progress=True
        )
    except ConfigError as error:
        raise UsageError(stage_options.as_option(error)) from error
    print(measured.table())
