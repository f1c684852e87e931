"""``python -m dalle2_jax.data``: writes the digits data set, and contact sheets of any data set."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dalle2_jax.data import digits
from dalle2_jax.data.sources import Source, source_named
from dalle2_jax.files import captioned_grid, write_png
from dalle2_jax.types import UserError

_EXAMPLE = """examples:
  python -m dalle2_jax.data digits digits
  python -m dalle2_jax.data preview folder:digits --out digits.png
  python -m dalle2_jax.data preview shapes --split compositional --out shapes.png"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 1 after a one-line error; usage errors exit with 2)."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "digits":
            digits.write(options.out)
            print(f"{options.out}: scans of handwritten digits in train/ and val/, with captions")
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
    preview.add_argument("source", help="shapes, folder:PATH or webdataset:PATH")
    preview.add_argument("--out", type=Path, required=True, help="PNG file to write")
    preview.add_argument("--split", default="train", help="split to draw (default %(default)s)")
    preview.add_argument("--num", type=_positive, default=24, help="examples to draw (default %(default)s)")
    preview.add_argument("--resolution", type=_positive, default=64, help="side of the pictures (default %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
