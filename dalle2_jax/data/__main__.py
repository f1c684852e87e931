"""``python -m dalle2_jax.data``: writes data sets and what CLIP says of them, and shows contact sheets of any."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle2_jax.data import digits, inspection
from dalle2_jax.data.convert import FORMATS, convert
from dalle2_jax.data.embed import Task, write_split
from dalle2_jax.data.embeddings import Embedded
from dalle2_jax.data.sources import Source, source_named
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.text import clip_tokenizer, load_tokenizer
from dalle2_jax.types import UserError

_EXAMPLE = """examples:
  python -m dalle2_jax.data digits digits
  python -m dalle2_jax.data preview folder:digits --out digits.png
  python -m dalle2_jax.data inspect folder:digits --out digits_report
  python -m dalle2_jax.data preview shapes --split compositional --out shapes.png
  python -m dalle2_jax.data convert folder:digits digits_tar --to webdataset
  python -m dalle2_jax.data embed --system runs/demo --out runs/demo_embeddings"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 1 after a one-line error; usage errors exit with 2)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "digits":
            digits.write(options.out)
            print(f"{options.out}: scans of handwritten digits in train/ and val/, with captions")
        elif options.command == "embed":
            count = embed(options)
            print(f"{options.out}: embeddings of {count} pictures, split {options.split}")
        elif options.command == "convert":
            sources = {split: source_named(options.source, split, options.resolution) for split in options.splits}
            counts = convert(sources, options.out, options.to)
            print(f"{options.out}: " + ", ".join(f"{count} pictures of {split}" for split, count in counts.items()))
        elif options.command == "inspect":
            inspect(options)
        else:
            source = source_named(options.source, options.split, options.resolution)
            sheet = contact_sheet(source, range(min(options.num, len(source))))
            write_png(options.out, sheet)
            print(f"{options.out}: the first {min(options.num, len(source))} of {source}")
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def contact_sheet(source: Source, indices: Sequence[int]) -> np.ndarray:
    """Draws examples of a source side by side, each over one of its captions."""
    examples = [source[index] for index in indices]
    return captioned_grid([example["image"] for example in examples], [example["caption"] for example in examples])


def inspect(options: argparse.Namespace) -> None:
    """Prints what a look at every record of a split tells of it, and writes it to a folder if there is one.

    Raises:
        UserError: the data set cannot be opened, or the tokenizer cannot be read.
    """
    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else clip_tokenizer()
    source = source_named(options.source, options.split, options.resolution, max_rejected=1.0)
    found = inspection.inspect(source, tokenizer, options.num)
    print(inspection.summary(found.report))
    if options.out:
        inspection.write(found, options.out)
        print(f"{options.out}: report.json and sheet.png")


def embed(options: argparse.Namespace) -> int:
    """Embeds a split with a system's CLIP on all devices; returns how many pictures it has.

    Raises:
        UserError: the system has no trained clip, the data cannot be read, or the folder is another CLIP's.
    """
    # The networks are for this command alone: the others start without waiting for them.
    from dalle2_jax import build, entry
    from dalle2_jax.generation import ClipEmbedder
    from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh

    entry.enable_compilation_cache()
    mesh = make_mesh(MeshConfig())
    clip = build.load_system(options.system, mesh, ("clip",))["clip"]
    if clip.tokenizer is None:
        raise UserError(f"the clip of {options.system} was imported without a tokenizer: it cannot read captions")
    source = _embedded_data(options, clip.stage.model.tower.image_size)
    build.write_description(options.system, options.out)
    embedder = ClipEmbedder(clip, batch_sharding(mesh), options.batch_size)
    task = Task(
        source, options.split, embedder, clip.tokenizer, clip.context_length, options.out, states=options.text_seq
    )
    return write_split(task)


def _embedded_data(options: argparse.Namespace, side: int) -> Source:
    """The pictures to embed: those named, those of a config, or those that CLIP was trained on."""
    from dalle2_jax import build
    from dalle2_jax.workdir import StageFolder

    if options.data:
        source = source_named(options.data, options.split, options.resolution or side)
    else:
        config = StageFolder(options.system, "clip").read_json("config.json")
        if options.config:
            file, colon, which = options.config.partition(":")
            if not Path(file).is_file() or not colon:
                raise UserError(f"--config must be FILE:STAGE, a file and one of its stages, not {options.config!r}")
            config = runpy.run_path(file)["get_config"](which).to_dict()
        if options.resolution and "resolution" in config.get("data", {}):
            config = {**config, "data": {**config["data"], "resolution": options.resolution}}
        source = build.open_source(config, options.split)
    if isinstance(source, Embedded):
        raise UserError(f"{source} has no pictures to embed: name others with --data or --config")
    return source


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not positive")
    return number


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dalle2_jax.data", description="Data sets.", epilog=_EXAMPLE, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)
    write = commands.add_parser(
        "digits",
        help="write 1,797 scans of handwritten digits with captions",
        description="Writes scikit-learn's 1,797 scans of handwritten digits as PNG with captions, no download.",
        epilog="example:\n  python -m dalle2_jax.data digits digits",
        formatter_class=raw,
    )
    write.add_argument("out", type=Path, help="folder to write; it must not exist, or be empty")
    preview = commands.add_parser(
        "preview",
        help="draw a contact sheet of a data set with its captions",
        description="Draws the first examples of a data set, each over one of its captions.",
        epilog="example:\n  python -m dalle2_jax.data preview folder:digits --split val --out digits.png",
        formatter_class=raw,
    )
    preview.add_argument("source", help="shapes, folder:PATH, webdataset:PATH or tfds:PATH")
    preview.add_argument("--out", type=Path, required=True, help="PNG file to write")
    preview.add_argument("--split", default="train", help="split to draw (default %(default)s)")
    preview.add_argument("--num", type=_positive, default=24, help="examples to draw (default %(default)s)")
    preview.add_argument("--resolution", type=_positive, default=64, help="side of the pictures (default %(default)s)")
    _add_inspect(commands, raw)
    _add_embed(commands, raw)
    _add_convert(commands, raw)
    return parser


def _add_inspect(commands: argparse.Action, raw: type) -> None:
    command = commands.add_parser(
        "inspect",
        help="tell sizes, caption lengths, duplicates and bad records of a data set",
        description="Reads every record of a split and tells what is in it: to do before training.",
        epilog="example:\n  python -m dalle2_jax.data inspect webdataset:shards --num 10000 --out report",
        formatter_class=raw,
    )
    command.add_argument("source", help="shapes, folder:PATH, webdataset:PATH or tfds:PATH")
    command.add_argument("--out", type=Path, help="folder for report.json and sheet.png (default: print only)")
    command.add_argument("--split", default="train", help="split to read (default %(default)s)")
    command.add_argument("--num", type=_positive, help="records to read, evenly spread (default: all)")
    command.add_argument("--tokenizer", type=Path, help="a sentencepiece .model or a saved tokenizer (default: CLIP's)")
    command.add_argument("--resolution", type=_positive, default=64, help="side of shapes (default %(default)s)")


def _add_embed(commands: argparse.Action, raw: type) -> None:
    command = commands.add_parser(
        "embed",
        help="write what CLIP says of pictures and captions, for training a prior",
        description="Embeds a split with a system's CLIP on all devices; the same command continues a killed run.",
        epilog="example:\n  python -m dalle2_jax.data embed --system runs/demo --data folder:digits --out embeddings",
        formatter_class=raw,
    )
    command.add_argument("--system", type=Path, required=True, help="the system whose clip embeds")
    data = command.add_mutually_exclusive_group()
    data.add_argument("--data", help="as for preview (default: what clip was trained on)")
    data.add_argument("--config", help="FILE:STAGE, whose section data says what is embedded")
    command.add_argument("--split", default="train", help="split to embed (default %(default)s)")
    command.add_argument("--out", type=Path, required=True, help="folder of the embeddings, of one clip and any splits")
    command.add_argument("--text_seq", action="store_true", help="keep text states too, for a prior that reads them")
    command.add_argument("--batch_size", type=_positive, default=256, help="pictures at a time (default %(default)s)")
    command.add_argument("--resolution", type=_positive, help="side of the pictures (default: the data's, or clip's)")


def _add_convert(commands: argparse.Action, raw: type) -> None:
    command = commands.add_parser(
        "convert",
        help="write a data set in another format",
        description="Writes pictures and captions as ArrayRecord (read as tfds:PATH) or as tar shards.",
        epilog="example:\n  python -m dalle2_jax.data convert folder:digits out --to webdataset --splits train val",
        formatter_class=raw,
    )
    command.add_argument("source", help="shapes, folder:PATH, webdataset:PATH or tfds:PATH")
    command.add_argument("out", type=Path, help="folder to write; it must not exist, or be empty")
    command.add_argument("--to", choices=FORMATS, required=True, help="the format")
    command.add_argument("--splits", nargs="+", default=["train"], help="splits to write (default train)")
    command.add_argument("--resolution", type=_positive, default=64, help="side of shapes (default %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
