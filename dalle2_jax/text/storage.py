"""How a tokenizer lies on disk: ``tokenizer.json`` names its kind and its file in the same folder."""

import json
from pathlib import Path

from dalle2_jax.files import write_atomically
from dalle2_jax.types import UserError

DESCRIPTION = "tokenizer.json"


def write_description(directory: str | Path, kind: str, file: str) -> None:
    """Writes ``tokenizer.json``; call it after the file it names is in place."""
    content = json.dumps({"kind": kind, "file": file}, indent=2) + "\n"
    write_atomically(Path(directory) / DESCRIPTION, content.encode())


def read_description(directory: str | Path) -> tuple[str, Path]:
    """Returns the kind of the tokenizer saved in ``directory`` and the path of its file.

    Raises:
        UserError: when there is none, or its description cannot be read.
    """
    path = Path(directory) / DESCRIPTION
    try:
        description = json.loads(path.read_text())
        return description["kind"], path.parent / description["file"]
    except FileNotFoundError:
        raise UserError(f"{directory} holds no tokenizer ({DESCRIPTION} is missing)") from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error}): copy it from another stage or train it again") from None
