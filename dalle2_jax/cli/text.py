"""``dalle2 text``: trains a tokenizer on captions."""

import argparse
from collections.abc import Iterator
from pathlib import Path

from dalle2_jax.cli import args
from dalle2_jax.errors import UserError
from dalle2_jax.ranges import VocabSize

EXAMPLE = """dalle2 text train --data shapes --vocab_size 400 --out shapes.model
  dalle2 text train --data folder:photos --vocab_size 8000 --out photos.model"""


def make_parser() -> args.Parser:
    """Returns the command's parser."""
    parser = args.make_parser("dalle2 text", "Tokenizers.", EXAMPLE)
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser(
        "train",
        help="train a sentencepiece tokenizer on captions",
        description="Trains a sentencepiece tokenizer on the captions of a data set's train split.",
        epilog=f"example:\n  {EXAMPLE}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    data = "shapes, folder:PATH, webdataset:PATH, tfds:PATH, or a text file with one caption per line"
    train.add_argument("--data", required=True, help=data)
    size = "pieces, including 256 bytes and 4 control tokens"
    train.add_argument("--vocab_size", required=True, type=args.number(VocabSize), help=size)
    train.add_argument("--out", required=True, type=args.path, help="file to write, ending in .model")
    limit = "maximal number of images whose captions are read (default %(default)s)"
    train.add_argument("--limit", type=args.positive_int, default=100_000, help=limit)
    return parser


def main() -> None:
    """Runs the command."""
    options = make_parser().parse_args()
    from tqdm import tqdm

    from dalle2_jax.files import write_atomically
    from dalle2_jax.text.sentencepiece import train_sentencepiece

    captions = tqdm(_captions(options.data, options.limit), desc="reading captions", unit=" captions", leave=False)
    tokenizer = train_sentencepiece(iter(captions), options.vocab_size)
    write_atomically(options.out, tokenizer.to_bytes())
    fewer = f" (the captions support no more than that; --vocab_size is {options.vocab_size})"
    print(f"{options.out}: {tokenizer.vocab_size} pieces{fewer if tokenizer.vocab_size < options.vocab_size else ''}")


def _captions(data: str, limit: int) -> Iterator[str]:
    """Yields the captions of a data set, or the lines of a text file.

    Raises:
      UserError: ``data`` is neither.
    """
    from dalle2_jax.data import source_named
    from dalle2_jax.reading import read_users_text

    path = Path(data)
    if path.is_file():
        return iter(read_users_text(path).splitlines())
    try:
        source = source_named(data, "train", resolution=64)
    except UserError as error:
        raise UserError(f"{error}, or name a text file" if path.suffix else str(error)) from None
    return source.captions(limit)
