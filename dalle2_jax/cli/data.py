"""``dalle2 data``: writes, converts, embeds and inspects data sets."""

import argparse
import contextlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

from dalle2_jax.cli import args
from dalle2_jax.errors import UserError
from dalle2_jax.ranges import BatchSize, PositiveInt, Range, Side

if TYPE_CHECKING:
    import numpy as np

    from dalle2_jax.data.sources import Source
    from dalle2_jax.types import Preprocessing

COMMANDS = {
    # name: (summary, details, arguments of an example)
    "digits": (
        "write 1,797 scans of handwritten digits with captions",
        "The scans come with scikit-learn, so nothing is downloaded; they are written as PNG.",
        "digits",
    ),
    "emoji": (
        "write emoji in up to four styles with captions",
        "It fetches npm packages with `npm pack`, or reads their files with --from.",
        "emoji --styles noto,twemoji --from packages",
    ),
    "preview": (
        "write a contact sheet of a data set with its captions",
        "It shows the first examples, each above one of its captions.",
        "folder:digits --split val --out digits.png",
    ),
    "inspect": (
        "report sizes, caption lengths, duplicates and bad records of a data set",
        "It reads every record of a split; run it before training.",
        "webdataset:shards --num 10000 --out report",
    ),
    "embed": (
        "write the CLIP embeddings of images and captions, to train a prior or decoder on",
        "It embeds a split with the CLIP of a system on all devices. The same command continues a killed run.",
        "--system runs/demo --data folder:digits --out embeddings",
    ),
    "convert": (
        "write a data set in another format",
        "It writes images and captions as ArrayRecord (read as tfds:PATH) or as tar shards (webdataset:PATH).",
        "folder:digits out --to webdataset --splits train val",
    ),
}

MAX_PREVIEW = 1000
"""Maximum number of examples on a contact sheet."""

FORMATS = ("arrayrecord", "webdataset")
"""Formats that ``convert`` writes, as in data/tools/convert.py."""

STYLES, EMOJI_SIDES = ("noto", "fluent_3d", "fluent_flat", "twemoji"), (32, 64, 128, 256)
"""Styles of emoji, as in data/emoji/styles.py, and the sizes at which they are written."""

GROUPS = (
    *("smileys-emotion", "people-body", "animals-nature", "food-drink", "travel-places"),
    *("activities", "objects", "symbols", "flags"),
)
"""Groups of emoji, as in data/emoji/concepts.py."""

MAX_REJECTED, SHARD_SIZE = 0.1, 10_000
"""Defaults of data/images/source.py and data/embeddings/write.py."""

SHUTDOWN_TIMEOUT = 7 * 24 * 3600
"""Seconds that a host waits for the others after it has embedded its part."""


def main() -> None:
    """Runs the command."""
    options = make_parser().parse_args()
    run = {
        "digits": write_digits,
        "emoji": write_emoji,
        "preview": preview,
        "inspect": inspect,
        "embed": run_embed,
        "convert": run_convert,
    }
    run[options.command](options)


def write_digits(options: argparse.Namespace) -> None:
    """Writes the handwritten digits of scikit-learn as a data set."""
    from dalle2_jax.data.synthetic import digits

    digits.write(options.out)
    print(f"{options.out}: scans of handwritten digits in train/ and val/, with captions")


def write_emoji(options: argparse.Namespace) -> None:
    """Writes the data set of emoji."""
    from dalle2_jax.data import emoji

    selection = emoji.Selection(options.styles, options.skin_tones, options.flags, options.groups)
    counts = emoji.write(options.out, selection, options.resolution, options.packages, options.tar)
    splits = ", ".join(f"{count} images of {split}" for split, count in counts.items())
    print(f"{options.out}: {splits}, in the styles {', '.join(options.styles)}")


def preview(options: argparse.Namespace) -> None:
    """Writes a contact sheet of the first examples of a split."""
    from dalle2_jax.data.opening import source_named
    from dalle2_jax.files import write_png

    source = source_named(options.source, options.split, options.resolution, options.max_rejected)
    count = min(options.num, len(source))
    write_png(options.out, contact_sheet(source, range(count)))
    print(f"{options.out}: the first {count} of {source}")


def contact_sheet(source: "Source", indices: Sequence[int]) -> "np.ndarray":
    """Returns an image of some examples of a source side by side, each above one of its captions."""
    from dalle2_jax.data.sources import example
    from dalle2_jax.files import captioned_grid

    examples = [example(source, index) for index in indices]
    return captioned_grid([one["image"] for one in examples], [one["caption"] for one in examples])


def inspect(options: argparse.Namespace) -> None:
    """Prints a report on every record of a split, and writes it to ``--out`` if given.

    Raises:
        UserError: the data set or the tokenizer cannot be read.
    """
    from dalle2_jax.data.opening import source_named
    from dalle2_jax.data.tools import inspection
    from dalle2_jax.text import clip_tokenizer, load_tokenizer

    tokenizer = load_tokenizer(options.tokenizer) if options.tokenizer else clip_tokenizer()
    source = source_named(options.source, options.split, options.resolution, max_rejected=1.0)
    found = inspection.inspect(source, tokenizer, options.num)
    print(inspection.summary(found.report))
    if options.out:
        inspection.write(found, options.out)
        print(f"{options.out}: report.json and sheet.png")


def run_convert(options: argparse.Namespace) -> None:
    """Writes splits of a data set in another format."""
    from dalle2_jax.data.opening import source_named
    from dalle2_jax.data.tools.convert import convert

    images = options.resolution, options.max_rejected
    sources = {split: source_named(options.source, split, *images) for split in options.splits}
    counts, rejections = convert(sources, options.out, options.to)
    written = ", ".join(f"{count} images of {split}" for split, count in counts.items())
    print(f"{options.out}: {written}" + (f"; rejected: {rejections}" if rejections.counts else ""))


def run_embed(options: argparse.Namespace) -> None:
    """Embeds a split, on several hosts with ``--multihost``."""
    count = embed_on_hosts(options) if options.multihost else embed(options)
    what = f"embeddings of {count} images" if count is not None else "this host's part of the embeddings"
    print(f"{options.out}: {what}, split {options.split}")


def embed_on_hosts(options: argparse.Namespace) -> int | None:
    """Embeds this host's part of a split together with the other hosts of a pod; see `embed`."""
    from dalle2_jax.cli.process.supervise import supervise

    supervise()
    from dalle2_jax.training import hosts

    with hosts.joined(options.heartbeat, shutdown=SHUTDOWN_TIMEOUT):
        return embed(options)


def embed(options: argparse.Namespace) -> int | None:
    """Embeds a split with a system's CLIP on all devices.

    Returns:
        The number of images in the split; None while other hosts still embed their part.

    Raises:
        UserError: the system has no trained clip, the data cannot be read, or ``--out`` holds something else or the
            embeddings of another CLIP.
    """
    _check_out(options.out)
    import jax
    from jax.experimental import multihost_utils

    from dalle2_jax import compilation, lock
    from dalle2_jax.data.embeddings.write import Task, claim, write_split
    from dalle2_jax.stages import ClipStage
    from dalle2_jax.system import ClipEmbedder, load
    from dalle2_jax.training import hosts
    from dalle2_jax.training.sharding import MeshConfig, batch_sharding, make_mesh
    from dalle2_jax.workdir import digests

    compilation.enable_compilation_cache()
    mesh = make_mesh(MeshConfig(), local=True)
    with digests.unverified(options.noverify):
        clip = load.load_system(options.system, mesh, ("clip",))["clip"]
    if clip.tokenizer is None or clip.contract is None:
        raise UserError(f"the clip of {options.system} has no tokenizer to read captions with: import one with it")
    task = Task(
        source=_embedded_data(options, clip.contract.preprocessing, cast(ClipStage, clip.stage).model.tower.image_size),
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
    with lock.hold_folder(options.out) if task.host == 0 else contextlib.nullcontext():
        if task.host == 0:
            load.write_description(options.system, options.out)
            if task.hosts > 1:
                claim(task)
        hosts.wait_for_all(f"{options.out} is claimed")
        multihost_utils.sync_global_devices(f"{options.out} is claimed")
        count = write_split(task)
        if task.hosts > 1:
            jax.distributed.shutdown()  # hold the lock until all hosts are done
        return count


def _check_out(out: Path) -> None:
    """Raises UserError if a folder holds anything but embeddings."""
    there = {path.name for path in out.iterdir() if not path.name.startswith(".")} if out.is_dir() else set()
    # a killed run may have left only a part of clip, whose contract is written last
    if there - {"clip"} and not (out / "clip" / "contract.json").is_file():
        raise UserError(f"{out} is not empty and holds no embeddings: give a new folder with --out")


def _embedded_data(options: argparse.Namespace, how: "Preprocessing", clip_side: int) -> "Source":
    """Returns the images to embed: of ``--data``, of a config, or those that CLIP was trained on.

    For an imported CLIP they are preprocessed as it expects, at its own size unless ``--resolution`` is given.

    Args:
        options: of the command line.
        how: CLIP's preprocessing.
        clip_side: side of CLIP's input.
    """
    from dalle2_jax.config.experiment import experiment
    from dalle2_jax.data.opening import source_named
    from dalle2_jax.system import stored_data

    own = how.resample != "area"
    side = options.resolution or (how.side(clip_side) if own else None)
    if options.data:
        source = source_named(options.data, options.split, side or how.side(clip_side), options.max_rejected)
    elif options.config:
        changes = {"resolution": side} if side else {}
        source = stored_data.open_changed(experiment(options.config), options.split, **changes)
    else:
        changes = {"resolution": side} if side else {}
        source = stored_data.open_stored_source(options.system, "clip", options.split, options.trust_system, **changes)
    if "image" not in source.columns:
        raise UserError(f"{source} has no images to embed: name others with --data or --config")
    return source if how.resample == "area" else source.preprocessed(how)


def _split(word: str) -> str:
    """Returns the name of a split, which is also the name of a folder, for an argument parser."""
    if word in ("", ".") or ".." in word or {"/", "\\"} & {*word}:
        raise argparse.ArgumentTypeError(f"{word!r} is not the name of a split, such as train")
    return word


def make_parser() -> argparse.ArgumentParser:
    """Returns the command line's parser."""
    examples = [f"dalle2 data {name} {words}" for name, (*_, words) in COMMANDS.items()]
    parser = args.make_parser("dalle2 data", "Data sets.", "\n  ".join(examples))
    commands = parser.add_subparsers(dest="command", required=True)
    added = {}
    for command, (name, (text, more, _)) in zip(examples, COMMANDS.items(), strict=True):
        added[name] = commands.add_parser(
            name,
            help=text,
            description=f"{text[0].upper()}{text[1:]}. {more}",
            epilog=f"example:\n  {command}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
    for name in ("preview", "inspect", "convert"):
        kinds = "folder:PATH, webdataset:PATH, tfds:PATH"
        added[name].add_argument("source", help=f"shapes, or a path, optionally with its format: {kinds}")
        side = "of shapes (default %(default)s)" if name != "preview" else "of the images (default %(default)s)"
        added[name].add_argument("--resolution", type=args.number(Side), default=64, help=f"side in pixels {side}")
    for name in ("digits", "emoji", "convert"):
        added[name].add_argument("out", type=args.path, help="folder to write; it must not exist, or be empty")
    for name in ("preview", "inspect", "embed"):
        part = "split of the data (default %(default)s)"
        added[name].add_argument("--split", type=_split, default="train", help=part)
    for name, what in (("preview", "the data"), ("convert", "the data"), ("embed", "--data")):
        rate = f"rate of bad records of {what}, 0 to 1, above which the command fails (default %(default)s)"
        added[name].add_argument("--max_rejected", type=args.fraction, default=MAX_REJECTED, help=rate)
    _add_emoji(added["emoji"])
    _add_preview_inspect_convert(added["preview"], added["inspect"], added["convert"])
    _add_embed(added["embed"])
    return parser


def _names_of(known: Sequence[str]) -> Callable[[str], tuple[str, ...]]:
    """Returns a reader of different names, separated by commas, for an argument parser."""

    def names(word: str) -> tuple[str, ...]:
        found = tuple(word.split(","))
        if {*found} - {*known} or len({*found}) < len(found):
            raise argparse.ArgumentTypeError(f"{word!r} is not a list of different names of {','.join(known)}")
        return found

    return names


def _add_emoji(emoji: argparse.ArgumentParser) -> None:
    for name, known in (("styles", STYLES), ("groups", GROUPS)):
        which = f"{name} to write (default {','.join(known)})"
        emoji.add_argument(f"--{name}", type=_names_of(known), default=known, help=which)
    side = "side of the images in pixels (default %(default)s)"
    emoji.add_argument("--resolution", type=int, choices=EMOJI_SIDES, default=64, help=side)
    emoji.add_argument("--skin_tones", action="store_true", help="add people and hands in five skin tones")
    emoji.add_argument("--flags", action="store_true", help="add the flags of countries and regions")
    files = "folder of the .tgz files that `npm pack` writes (default: fetch them)"
    emoji.add_argument("--from", dest="packages", metavar="DIR", type=args.path, help=files)
    emoji.add_argument("--tar", action="store_true", help="write tar shards instead of a folder of images")


def _add_preview_inspect_convert(
    preview: argparse.ArgumentParser, inspect: argparse.ArgumentParser, convert: argparse.ArgumentParser
) -> None:
    preview.add_argument("--out", type=args.path, required=True, help="PNG file to write")
    num = "number of examples (default %(default)s)"
    preview.add_argument("--num", type=args.number(Annotated[int, Range(1, MAX_PREVIEW)]), default=24, help=num)
    inspect.add_argument("--out", type=args.path, help="folder for report.json and sheet.png (default: print only)")
    inspect.add_argument("--num", type=args.positive_int, help="records to read, evenly spaced (default: all)")
    tokenizer = "a sentencepiece .model or a saved tokenizer (default: CLIP's)"
    inspect.add_argument("--tokenizer", type=args.path, help=tokenizer)
    convert.add_argument("--to", choices=FORMATS, required=True, help="format to write")
    convert.add_argument("--splits", type=_split, nargs="+", default=["train"], help="splits to write (default train)")


def _add_embed(embed: argparse.ArgumentParser) -> None:
    embed.add_argument("--system", type=args.system, required=True, help="system whose CLIP computes the embeddings")
    data = embed.add_mutually_exclusive_group()
    data.add_argument("--data", help="as for preview (default: the data that CLIP was trained on, see --trust_system)")
    data.add_argument("--config", help="FILE:STAGE: embed the data of this config")
    data.add_argument("--trust_system", action="store_true", help=args.TRUST)
    out = "folder of the embeddings, for one CLIP and any number of splits"
    embed.add_argument("--out", type=args.path, required=True, help=out)
    embed.add_argument("--text_seq", action="store_true", help="also write text states, for a prior that reads them")
    shard = "images per shard, which is held in memory (default %(default)s)"
    embed.add_argument("--shard_size", type=args.number(BatchSize), default=SHARD_SIZE, help=shard)
    embed.add_argument("--batch_size", type=args.number(BatchSize), default=256, help="images per step, on each host")
    side = "side of the images in pixels (default: that of the data, or of CLIP)"
    embed.add_argument("--resolution", type=args.number(Side), help=side)
    embed.add_argument("--noverify", action="store_true", help=args.NOVERIFY)
    embed.add_argument("--multihost", action="store_true", help="share the work with the other hosts of a pod")
    lost = "seconds without a sign of life after which a host of --multihost is lost (default %(default)s)"
    embed.add_argument("--heartbeat", type=args.number(PositiveInt), default=args.HEARTBEAT, help=lost)
