"""Errors that users can fix, and the pieces their messages are made of. Imports nothing heavy."""

import contextlib
import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class UserError(Exception):
    """An error that the user can fix. Commands print its message as one line and exit with code 1."""


class UsageError(UserError):
    """A wrong argument on the command line or in a config. Commands exit with code 2."""


class ConfigError(UsageError):
    """A config field, or a setting with a field's name, that is unknown, missing, of the wrong type or out of range.

    Attributes:
      field: the field's path, as in "optim.lr"; "" when the error is not about one field.
    """

    def __init__(self, message: str, field: str = ""):
        super().__init__(message)
        self.field = field


class ContractError(UserError):
    """Two stages, or a stage and stored embeddings, that do not share one embedding space.

    Attributes:
      differences: field of the embedding contract -> (the one's value, the other's value).
    """

    def __init__(self, message: str, differences: Mapping[str, tuple[Any, Any]]):
        super().__init__(message)
        self.differences = dict(differences)


class DataError(UserError):
    """A data set, or an image or array given in its place, that cannot be read.

    Attributes:
      path: the file or folder; None for data in memory.
    """

    def __init__(self, message: str, path: str | Path | None = None):
        super().__init__(message)
        self.path = path


class WeightsError(UserError):
    """A public checkpoint that cannot be imported, or a system that cannot be exported.

    Attributes:
      path: the file or folder; None if there is none.
      missing: names of tensors that the network needs and the file lacks.
      unexpected: names of tensors in the file that the network has no place for.
    """

    def __init__(
        self,
        message: str,
        path: str | Path | None = None,
        missing: Sequence[str] = (),
        unexpected: Sequence[str] = (),
    ):
        super().__init__(message)
        self.path, self.missing, self.unexpected = path, tuple(missing), tuple(unexpected)


class TemporaryError(UserError):
    """A failure outside this process, such as a lost host, after which the same command continues. Exit code 75."""


class Interrupted(UserError):
    """A signal ended a run in order: a checkpoint was written if there was anything to keep.

    Attributes:
      number: the signal. Commands exit with code 128 + ``number``.
    """

    def __init__(self, message: str, number: int):
        super().__init__(message)
        self.number = number


class SystemWarning(UserWarning):
    """A defect of a system or its input that sampling works around. Commands print its message as one line."""


def shown(value: Any) -> str:
    """Returns a value for an error message, cut to a part of a line."""
    try:
        text = repr(value)
    except ValueError:  # Python prints no integers of more than 4,300 digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= 100 else f"{text[:97]}..."


def printable(text: object) -> str:
    """Returns text as one line that is safe to print: characters that act on a terminal become escapes as "\\x1b".

    For text that comes from files, such as the name of a record.
    """
    line = " ".join(str(text).split())
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in line)


def choose(what: str, name: str, options: Mapping[str, Any]) -> Any:
    """Returns options[name].

    Raises:
      UsageError: there is none; the message offers the nearest name and lists them all.
    """
    with contextlib.suppress(TypeError):  # a list or dict is in no mapping
        if name in options:
            return options[name]
    near = difflib.get_close_matches(str(name)[:100], options, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UsageError(f"unknown {what} {shown(name)}: {hint}(choose from {', '.join(options)})")
