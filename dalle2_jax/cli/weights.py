"""``dalle2 weights``: imports, inspects and exports public checkpoints, and packs systems."""

import argparse
import sys
from typing import Any

from dalle2_jax.cli import args
from dalle2_jax.weights.kinds import (
    ATTENTION_ORDERS,
    ATTENTIONS,
    EXPORT_DTYPES,
    FEATURE_KINDS,
    FORMS,
    IMPORT_DTYPES,
    KINDS,
    PACK_DTYPES,
    TABLE_DTYPES,
)

EXAMPLE = """dalle2 weights inspect karlo-v1-alpha
  dalle2 weights import auto karlo-v1-alpha runs/karlo
  dalle2 weights export diffusers runs/karlo exported
  dalle2 weights pack runs/demo packed"""

_KINDS = ("auto", *KINDS, *FEATURE_KINDS)


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    parser = args.make_parser("dalle2 weights", "Import and export public checkpoints; pack systems.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands.add_parser("import", help="import public checkpoints: stages, or a network for measures"))
    _add_inspect(commands.add_parser("inspect", help="print what checkpoints hold and which systems they fit"))
    _add_export(commands.add_parser("export", help="export a system, or its CLIP, for another library"))
    _add_pack(commands.add_parser("pack", help="copy a system with its averaged weights only, rounded to bfloat16"))
    for command in commands.choices.values():
        command.add_argument("--noverify", action="store_true", help=args.NOVERIFY)
    return parser


def _add_import(command: argparse.ArgumentParser) -> None:
    command.add_argument("kind", choices=_KINDS, help="kind of the sources; auto detects it")
    command.add_argument("source", nargs="+", type=args.path, help="file or folder; the first of equal parts is used")
    folder = "folder of the system, as in runs/karlo; of a feature network, a folder to create, as in runs/vgg16"
    command.add_argument("system", type=args.path, help=folder)
    dtype = "dtype of the stored weights; bfloat16 halves the disk space (default %(default)s)"
    command.add_argument("--dtype", choices=IMPORT_DTYPES, default="float32", help=dtype)
    tokenizer = "folder of a CLIP tokenizer that replaces the one of the checkpoint"
    command.add_argument("--tokenizer", type=args.path, help=tokenizer)
    html_unescape = "replace HTML entities in captions, as in CLIP's training (default yes; transformers 5: no)"
    command.add_argument("--html_unescape", choices=("yes", "no"), default="yes", help=html_unescape)
    table_dtype = "dtype of the noise schedule's tables (default float64; diffusers uses float32)"
    command.add_argument("--table_dtype", choices=TABLE_DTYPES, default="float64", help=table_dtype)
    _add_hints(command)


def _add_inspect(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", nargs="+", type=args.path, help="file or folder")
    command.add_argument("--kind", choices=_KINDS, default="auto", help="kind of the sources (default: detect it)")
    _add_hints(command)


def _add_export(command: argparse.ArgumentParser) -> None:
    forms = "diffusers: UnCLIPPipeline of all stages; the others: the CLIP alone"
    command.add_argument("format", choices=FORMS, help=forms)
    command.add_argument("system", type=args.system, help=args.SYSTEM)
    command.add_argument("folder", type=args.path, help="folder to create")
    dtype = "dtype of the tensors (default %(default)s)"
    command.add_argument("--dtype", choices=EXPORT_DTYPES, default="float32", help=dtype)


def _add_pack(command: argparse.ArgumentParser) -> None:
    command.add_argument("system", type=args.system, help=args.SYSTEM)
    command.add_argument("folder", type=args.path, help="folder to create")
    dtype = "bfloat16 rounds weights of two or more axes; float32 keeps them (default %(default)s)"
    command.add_argument("--dtype", choices=PACK_DTYPES, default="bfloat16", help=dtype)
    stages = "the stages to pack (default: all that are trained)"
    command.add_argument("--stages", nargs="+", default=(), metavar="STAGE", help=stages)
    card = "text file with the model card, which becomes README.md with a new list of stages"
    command.add_argument("--card", type=args.path, help=card)


def _add_hints(command: argparse.ArgumentParser) -> None:
    """Adds the properties of networks that state dicts do not show."""
    group = command.add_argument_group("GLIDE and ADM networks other than the released ones")
    group.add_argument("--head_channels", type=args.positive_int, help="width of an attention head (released: 64)")
    group.add_argument("--image_size", type=args.positive_int, help="side of its images (released: 4 x 2^levels)")
    attention_order = "order of ADM's attention projections (released: new at 64 pixels, else legacy)"
    group.add_argument("--attention_order", choices=ATTENTION_ORDERS, help=attention_order)
    group = command.add_argument_group("priors of DALLE2-pytorch")
    attention = "by version: relaxed before 1.4.3 (as LAION's), cosine from 1.4.3 to 1.8.4"
    group.add_argument("--attention", choices=ATTENTIONS, help=attention)


def _hints(options: argparse.Namespace) -> dict[str, Any]:
    names = ("head_channels", "image_size", "attention_order", "attention")
    return {name: getattr(options, name) for name in names}


def _print_skipped(paths: tuple[Any, ...]) -> None:
    for path in paths:
        print(f"warning: {path} is skipped: it is not a checkpoint of a known family", file=sys.stderr)


def inspect(options: argparse.Namespace) -> None:
    """Prints two lines per component."""
    from dalle2_jax import weights

    found = weights.inspect(options.source, kind=options.kind, **_hints(options))
    _print_skipped(found.skipped)
    for each in found.components:
        dtypes = ", ".join(each.dtypes)
        print(f"{each.path}: {each.family}")
        print(f"  {each.part} {each.stage}, {each.parameters:,} parameters, {dtypes}; {each.compatibility()}")
        if each.completed_by:
            print(f"  incomplete: give {each.completed_by} too")


def import_system(options: argparse.Namespace) -> None:
    """Imports the sources and prints one line per stage."""
    from dalle2_jax import weights

    report = weights.import_weights(
        options.source,
        options.system,
        kind=options.kind,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        html_unescape=options.html_unescape == "yes",
        table_dtype=options.table_dtype,
        progress=True,
        **_hints(options),
    )
    _print_skipped(report.skipped)
    for stage in report.stages:
        print(f"{stage.path}: {stage.family}, {stage.parameters:,} parameters")


def export(options: argparse.Namespace) -> None:
    """Exports a system and prints one line."""
    from dalle2_jax import weights

    report = weights.export(options.system, options.folder, form=options.format, dtype=options.dtype)
    print(f"{report.path}: {', '.join(report.stages)} of {options.system}")


def pack(options: argparse.Namespace) -> None:
    """Packs a system and prints one line per stage."""
    from dalle2_jax import weights

    given = (options.system, options.folder)
    report = weights.pack(*given, stages=options.stages, dtype=options.dtype, card=options.card)
    for stage in report.stages:
        print(
            f"{report.path / stage.name}: step {stage.step:,}, {stage.parameters:,} parameters, "
            f"{stage.size / 1e6:.2f} MB, relative rounding error {stage.error:.1e}"
        )


COMMANDS = {"import": import_system, "inspect": inspect, "export": export, "pack": pack}


def main() -> None:
    """Runs the command line."""
    options = make_parser().parse_args()
    from dalle2_jax import compilation
    from dalle2_jax.workdir import digests

    compilation.enable_compilation_cache()
    with digests.unverified(options.noverify):
        COMMANDS[options.command](options)
