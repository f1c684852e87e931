"""``python -m dalle2_jax.data``: writes data sets and what CLIP says of them, and shows what is in any."""

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax import entry
from dalle2_jax.data import digits, inspection
from dalle2_jax.data.convert import FORMATS, convert
from dalle2_jax.data.embed import SHARD_SIZE, Task, claim, write_split
from dalle2_jax.data.embeddings import Embedded
from dalle2_jax.data.pictures import MAX_REJECTED
from dalle2_jax.data.sources import Source, source_named
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.text import clip_tokenizer, load_tokenizer
from dalle2_jax.types import UsageError, UserError

COMMANDS = {
    # name: (what it does, more of that, the words of an example)
    "digits": (
        "write 1,797 scans of handwritten digits with captions",
        "They are scikit-learn's, as PNG, no download.",
        "digits",
    ),
    "preview": (
        "draw a contact sheet of a data set with its captions",
        "The first examples, each over one of its captions.",
        "folder:digits --split val --out digits.png",
    ),
    "inspect": (
        "tell sizes, caption lengths, duplicates and bad records of a data set",
        "It reads every record of a split: to do before training.",
        "webdataset:shards --num 10000 --out report",
    ),
    "embed": (
        "write what CLIP says of pictures and captions, for training a prior",
        "It embeds a split with a system's clip on all devices; the same command continues a killed run.",
        "--system runs/demo --data folder:digits --out embeddings",
    ),
    "convert": (
        "write a data set in another format",
        "It writes pictures and captions as ArrayRecord (read as tfds:PATH) or as tar shards.",
        "folder:digits out --to webdataset --splits train val",
    ),
}

WAITS = 7 * 24 * 3600
"""Seconds that a host which has embedded its share waits for the others."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code: 0, or after one line on standard error 1, or 2 for a wrong word."""
    return entry.guarded(lambda: _run(make_parser().parse_args(arguments)))


def _run(options: argparse.Namespace) -> None:
    if options.command == "digits":
        digits.write(options.out)
        print(f"{options.out}: scans of handwritten digits in train/ and val/, with captions")
    elif options.command == "embed":
        count = embed(options)
        told = f"embeddings of {count} pictures" if count is not None else "this host's share of the embeddings"
        print(f"{options.out}: {told}, split {options.split}")
    elif options.command == "convert":
        how = options.resolution, options.max_rejected
        sources = {split: source_named(options.source, split, *how) for split in options.splits}
        counts, left_out = convert(sources, options.out, options.to)
        told = ", ".join(f"{count} pictures of {split}" for split, count in counts.items())
        print(f"{options.out}: {told}" + (f"; left out are {left_out}" if left_out.counts else ""))
    elif options.command == "inspect":
        inspect(options)
    else:
        source = source_named(options.source, options.split, options.resolution, options.max_rejected)
        sheet = contact_sheet(source, range(min(options.num, len(source))))
        write_png(options.out, sheet)
        print(f"{options.out}: the first {min(options.num, len(source))} of {source}")


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


def embed(options: argparse.Namespace) -> int | None:
    """Embeds a split with a system's CLIP on all devices.

    Returns:
        How many pictures the split has; None when other hosts still embed their share.

    Raises:
        UserError: the system has no trained clip, the data cannot be read, or the folder is another CLIP's or holds
            something else.
    """
    _check_out(options.out)
    # The networks are for this command alone: the others start without waiting for them.
    import jax
    from jax.experimental import multihost_utils

    from dalle2_jax import build
    from dalle2_jax.generation import ClipEmbedder
    from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh

    if options.multihost:
        jax.distributed.initialize(shutdown_timeout_seconds=WAITS)
    entry.enable_compilation_cache()
    mesh = make_mesh(MeshConfig(), local=True)
    clip = build.load_system(options.system, mesh, ("clip",))["clip"]
    if clip.tokenizer is None:
        raise UserError(f"the clip of {options.system} was imported without a tokenizer: it cannot read captions")
    task = Task(
        source=_embedded_data(options, clip.stage.model.tower.image_size),
        split=options.split,
        embedder=ClipEmbedder(clip, batch_sharding(mesh), options.batch_size),
        tokenizer=clip.tokenizer,
        context_length=clip.context_length,
        out=options.out,
        states=options.text_seq,
        shard_size=options.shard_size,
        host=jax.process_index(),
        hosts=jax.process_count(),
    )
    if task.host == 0:
        build.write_description(options.system, options.out)
        if task.hosts > 1:
            claim(task)
    multihost_utils.sync_global_devices(f"{options.out} is claimed")
    return write_split(task)


def _check_out(out: Path) -> None:
    """Raises UserError for a folder of something else than embeddings, which more folders would spoil."""
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    # a run that was killed may have left no more than a part of clip, whose contract is written last
    if there - {"clip"} and not (out / "clip" / "contract.json").is_file():
        raise UserError(f"{out} is not empty and holds no embeddings: name a new folder with --out")


def _embedded_data(options: argparse.Namespace, side: int) -> Source:
    """The pictures to embed: those named, those of a config, or those that CLIP was trained on."""
    from dalle2_jax import build
    from dalle2_jax.workdir import StageFolder

    if options.data:
        source = source_named(options.data, options.split, options.resolution or side, options.max_rejected)
    else:
        config = StageFolder(options.system, "clip").read_json("config.json")
        if options.config:
            file, colon, which = options.config.partition(":")
            if not Path(file).is_file() or not colon:
                raise UserError(f"--config must be FILE:STAGE, a file and one of its stages, not {options.config!r}")
            config = _config(file, which)
        if options.resolution and "resolution" in config.get("data", {}):
            config = {**config, "data": {**config["data"], "resolution": options.resolution}}
        source = build.open_source(config, options.split)
    if isinstance(source, Embedded):
        raise UserError(f"{source} has no pictures to embed: name others with --data or --config")
    return source


def _config(file: str, which: str) -> dict[str, Any]:
    """Returns the config that a file has of a stage. UsageError if it fails."""
    try:
        return runpy.run_path(file)["get_config"](which).to_dict()
    except UserError:
        raise
    except Exception as error:  # whatever a user's program does
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise UsageError(f"the config file cannot be read: {file} ends in {reason}; --config is FILE:STAGE") from error


def _split(word: str) -> str:
    """Reads the name of a split, for an argument parser: it becomes a folder's name too."""
    if word in ("", ".") or ".." in word or {"/", "\\"} & {*word}:
        raise argparse.ArgumentTypeError(f"{word!r} is not the name of a split")
    return word


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    examples = [f"python -m dalle2_jax.data {name} {words}" for name, (*_, words) in COMMANDS.items()]
    parser = entry.parser("python -m dalle2_jax.data", "Data sets.", "\n  ".join(examples))
    commands = parser.add_subparsers(dest="command", required=True)
    added = {}
    for example, (name, (text, more, _)) in zip(examples, COMMANDS.items(), strict=True):
        added[name] = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            epilog=f"example:\n  {example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    for name in ("preview", "inspect", "convert"):
        kinds = "folder:PATH, webdataset:PATH, tfds:PATH"
        added[name].add_argument("source", help=f"shapes, a path, or with its kind: {kinds}")
        side = "of shapes (default %(default)s)" if name != "preview" else "of the pictures (default %(default)s)"
        added[name].add_argument("--resolution", type=entry.positive, default=64, help=f"side {side}")
    for name in ("digits", "convert"):
        added[name].add_argument("out", type=Path, help="folder to write; it must not exist, or be empty")
    for name in ("preview", "inspect", "embed"):
        part = "which part of the data (default %(default)s)"
        added[name].add_argument("--split", type=_split, default="train", help=part)
    for name, what in (("preview", "the data"), ("convert", "the data"), ("embed", "--data")):
        refused = f"share of bad records of {what} above which it ends (default %(default)s)"
        added[name].add_argument("--max_rejected", type=entry.share, default=MAX_REJECTED, help=refused)
    _complete(added["preview"], added["inspect"], added["convert"])
    _complete_embed(added["embed"])
    return parser


def _complete(preview: argparse.ArgumentParser, inspect: argparse.ArgumentParser, convert: argparse.ArgumentParser):
    preview.add_argument("--out", type=Path, required=True, help="PNG file to write")
    preview.add_argument("--num", type=entry.positive, default=24, help="examples to draw (default %(default)s)")
    inspect.add_argument("--out", type=Path, help="folder for report.json and sheet.png (default: print only)")
    inspect.add_argument("--num", type=entry.positive, help="records to read, evenly spread (default: all)")
    inspect.add_argument("--tokenizer", type=Path, help="a sentencepiece .model or a saved tokenizer (default: CLIP's)")
    convert.add_argument("--to", choices=FORMATS, required=True, help="the format")
    convert.add_argument("--splits", type=_split, nargs="+", default=["train"], help="splits to write (default train)")


def _complete_embed(embed: argparse.ArgumentParser) -> None:
    embed.add_argument("--system", type=Path, required=True, help="the system whose clip embeds")
    data = embed.add_mutually_exclusive_group()
    data.add_argument("--data", help="as for preview (default: what clip was trained on)")
    data.add_argument("--config", help="FILE:STAGE, whose section data says what is embedded")
    embed.add_argument("--out", type=Path, required=True, help="folder of the embeddings, of one clip and any splits")
    embed.add_argument("--text_seq", action="store_true", help="keep text states too, for a prior that reads them")
    shard = "pictures a shard, which is held in memory (default %(default)s)"
    embed.add_argument("--shard_size", type=entry.positive, default=SHARD_SIZE, help=shard)
    embed.add_argument("--batch_size", type=entry.positive, default=256, help="pictures at a time, of a host")
    side = "side of the pictures (default: the data's, or clip's)"
    embed.add_argument("--resolution", type=entry.positive, help=side)
    embed.add_argument("--multihost", action="store_true", help="share the work with the other hosts of a pod")


if __name__ == "__main__":
    sys.exit(main())
