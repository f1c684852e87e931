"""How a tokenizer lies on disk: ``tokenizer.json`` names its kind and its file in the same folder."""

import json
import os
import tempfile
from pathlib import Path

from dalle2_jax.types import UserError

DESCRIPTION = "tokenizer.json"


def write_atomically(path: str | Path, content: bytes) -> None:
    """Writes a file so that it appears under its name only when complete; makes its folder if needed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # mkstemp's 0600 would hide the file from colleagues
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


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
