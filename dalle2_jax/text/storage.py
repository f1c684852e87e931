"""Tokenizers on disk: ``tokenizer.json`` names the kind of a tokenizer and its file in the same folder."""

import errno
import json
import os
from pathlib import Path

from dalle2_jax.errors import UserError
from dalle2_jax.files import write_atomically
from dalle2_jax.reading import parse_json, read_bytes

DESCRIPTION = "tokenizer.json"

MAX_BYTES = 2**26
"""Largest tokenizer file that is read, compressed and uncompressed. The largest public ones have a quarter of it."""


def read_file(path: Path) -> bytes:
    """Returns the content of a tokenizer's file.

    Raises:
        FileNotFoundError: the file does not exist.
        UserError: it is not a regular file, is larger than `MAX_BYTES`, or cannot be read.
    """
    try:
        return read_bytes(path, MAX_BYTES)
    except FileNotFoundError:
        raise
    except OSError as error:
        if error.errno == errno.EFBIG:
            raise UserError(f"{path} has more than {MAX_BYTES} bytes: this is not a tokenizer") from None
        raise UserError(f"{path} cannot be read ({error.strerror})") from None


def write_description(directory: str | Path, kind: str, file: str) -> None:
    """Writes ``tokenizer.json``. Call it after writing the file that it names."""
    content = json.dumps({"kind": kind, "file": file}, indent=2) + "\n"
    write_atomically(Path(directory) / DESCRIPTION, content.encode())


def read_description(directory: str | Path) -> tuple[str, Path]:
    """Returns the kind of the tokenizer in a folder and the path of its file.

    Raises:
        UserError: there is no tokenizer, or its description is damaged.
    """
    path = Path(directory) / DESCRIPTION
    try:
        description = parse_json(read_file(path))
        kind, file = description["kind"], description["file"]
        inside = isinstance(file, str) and file == os.path.basename(file) and file not in ("", ".", "..")
        if not isinstance(kind, str) or not inside:
            raise ValueError("kind and file must be names, and the file must be in the same folder")
        return kind, path.parent / file
    except FileNotFoundError:
        raise UserError(f"{directory} has no tokenizer ({DESCRIPTION} is missing)") from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it from another stage or train it again") from None
