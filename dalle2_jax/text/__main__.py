"""``python -m dalle2_jax.text``: trains a tokenizer from captions."""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tqdm import tqdm

from dalle2_jax.data import source_named
from dalle2_jax.text.sentencepiece import train_sentencepiece
from dalle2_jax.files import write_atomically
from dalle2_jax.types import UserError

_EXAMPLE = """example:
  python -m dalle2_jax.text train --data shapes --vocab_size 400 --out shapes.model
  python -m dalle2_jax.text train --data folder:pictures --vocab_size 8000 --out pictures.model"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code (0, or 1 after a one-line error; usage errors exit with 2)."""
    options = _parser().parse_args(arguments)
    try:
        captions = _captions(options.data, options.limit)
        tokenizer = train_sentencepiece(_with_progress(captions), options.vocab_size)
        write_atomically(options.out, tokenizer.to_bytes())
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    fewer = f" (the captions support no more than that of {options.vocab_size})"
    print(f"{options.out}: {tokenizer.vocab_size} pieces{fewer if tokenizer.vocab_size < options.vocab_size else ''}")
    return 0


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="python -m dalle2_jax.text", description="Tokenizers.", epilog=_EXAMPLE, formatter_class=raw
    )
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a sentencepiece tokenizer on captions",
        description="Trains a sentencepiece tokenizer on the captions of a data set's train split.",
        epilog=_EXAMPLE,
        formatter_class=raw,
    )
    said = "shapes, folder:PATH, webdataset:PATH, or a text file with a caption a line"
    train.add_argument("--data", required=True, help=said)
    train.add_argument("--vocab_size", required=True, type=int, help="pieces, counting 256 bytes and 4 control tokens")
    train.add_argument("--out", required=True, type=Path, help="file to write, ending in .model")
    train.add_argument("--limit", type=int, default=100_000, help="most pictures to read (default %(default)s)")
    return parser


def _with_progress(captions: Iterator[str]) -> Iterator[str]:
    yield from tqdm(captions, desc="reading captions", unit=" captions", leave=False)


def _captions(data: str, limit: int) -> Iterator[str]:
    path = Path(data)
    if path.is_file():
        try:
            return iter(path.read_text(encoding="utf-8").splitlines())
        except UnicodeDecodeError:
            raise UserError(f"{path} is not UTF-8 text") from None
    try:
        source = source_named(data, "train", resolution=64)
    except UserError as error:
        raise UserError(f"{error}, or name a text file" if path.suffix else str(error)) from None
    return source.captions(limit)


if __name__ == "__main__":
    sys.exit(main())
