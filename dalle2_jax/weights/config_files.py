"""Config files of public checkpoints: bounded JSON, read field by field.

For each kind of file an importer declares which fields it reads, which it accepts with one value only, and which have
no effect on trained weights (`Known`). A field in none of the three lists causes a `WeightsWarning`.
"""

import dataclasses
import os
import re
import sys
import warnings
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from dalle2_jax.errors import SystemWarning, WeightsError, printable, shown
from dalle2_jax.reading import open_regular, parse_json

MAX_BYTES = 2**24
"""Largest JSON file that is read. Indexes of published weights have a few megabytes, configs a few kilobytes."""

MAX_SIZE, MAX_LAYERS = 2**22, 1000
"""Largest width, vocabulary or image side, and largest number of layers, that a config may name."""

_MAX_NAME = 160  # characters of a name that error messages show unchanged


def named(name: str) -> str:
    """Returns the name of a field or tensor for an error message; long or unprintable names are cut and quoted."""
    plain = len(name) <= _MAX_NAME and name.isprintable() and name.isascii()
    return name if plain else shown(name)


class WeightsWarning(SystemWarning):
    """Something about a checkpoint that the user should know and that does not stop the import."""


def warn(message: str) -> None:
    """Issues a `WeightsWarning` of one line."""
    warnings.warn(" ".join(message.split()), WeightsWarning, stacklevel=3)


class FieldError(WeightsError):
    """A field of a checkpoint's config file that is wrong or not supported.

    Attributes:
        field: path of the field in the file, as in "text_config.hidden_size".
    """

    def __init__(self, message: str, path: str | Path, field: str):
        super().__init__(message, path)
        self.field = field


def read_json(path: Path) -> Any:
    """Returns the content of a JSON file.

    Raises:
        WeightsError: the file is too large, unreadable, not JSON (as NaN and infinity are not), or nested too deeply.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            if size > MAX_BYTES:
                raise WeightsError(f"{path} has {size:,} bytes: at most {MAX_BYTES:,} are read", path)
            return parse_json(file.read(MAX_BYTES + 1).decode("utf-8"), finite=True)
    except OSError as error:
        raise WeightsError(f"{path} cannot be read ({error.strerror or error})", path) from error
    except ValueError as error:
        reason = printable(error)[:200]
        raise WeightsError(f"{path} is not valid JSON ({reason})", path) from None


def json_object(path: Path) -> dict[str, Any]:
    """Returns the content of a JSON file that must hold an object. WeightsError as `read_json`, or if it does not."""
    content = read_json(path)
    if not isinstance(content, dict):
        raise WeightsError(f"{path} must hold a JSON object, got {shown(content)}", path)
    return content


@dataclasses.dataclass(frozen=True)
class Known:
    """The fields of one kind of config file that an importer knows.

    Attributes:
        read: fields that the importer reads.
        fixed: fields for which only one value is supported, with that value. It is the default of the library that
            wrote the file, so that the file may omit the field.
        irrelevant: regular expression of the fields that have no effect on trained weights.
    """

    read: Collection[str] = ()
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    irrelevant: str = ""

    def __or__(self, other: "Known") -> "Known":
        irrelevant = "|".join(filter(None, (self.irrelevant, other.irrelevant)))
        return Known({*self.read, *other.read}, {**self.fixed, **other.fixed}, irrelevant)


DIFFUSERS = Known(("_class_name",), irrelevant=r"_diffusers_version|_name_or_path|_use_default_values|_commit_hash")
"""Fields of every diffusers config file."""


@dataclasses.dataclass(frozen=True)
class Section:
    """A config file, or a section of one, that is read field by field. Every error names the file and the field.

    Attributes:
        content: the fields.
        file: path of the file.
        path: prefix of the section's fields, as in "text_config."; "" for the file itself.
    """

    content: Mapping[str, Any]
    file: str
    path: str = ""

    def error(self, name: str, problem: str) -> FieldError:
        """Returns the error for a field; ``problem`` follows the field's name in the message."""
        return FieldError(f"{self.file}: {named(self.path + name)} {problem}", self.file, self.path + name)

    def section(self, name: str) -> "Section":
        """Returns the section of this name; an empty one if it is missing or null."""
        content = self.content.get(name)
        if content is not None and not isinstance(content, Mapping):
            raise self.error(name, f"must be a section, got {shown(content)}")
        return Section(content or {}, self.file, f"{self.path}{name}.")

    def check(self, known: Known) -> None:
        """Warns of unknown fields.

        Raises:
            FieldError: a field in ``known.fixed`` has another value.
        """
        for name, value in known.fixed.items():
            given = self.content.get(name, value)
            if given != value or isinstance(given, bool) != isinstance(value, bool):
                raise self.error(name, f"{shown(given)} is not supported: it must be {value!r}")
        names = {*known.read, *known.fixed}
        for name, value in self.content.items():
            if name in names or re.fullmatch(known.irrelevant, name):
                continue
            if value:  # null, false, zero and empty values switch nothing on
                warn(f"{self.file}: unknown field {named(self.path + name)} {shown(value)} is ignored")

    def positive_int(self, name: str, default: int | None = None, most: int = MAX_SIZE) -> int:
        """Returns an integer from 1 to ``most``. FieldError for anything else."""
        value = self.content.get(name, default)
        if type(value) is not int or value < 1:
            raise self.error(name, f"must be an integer of at least 1, got {shown(value)}")
        if value > most:
            raise self.error(name, f"must be at most {most}, got {shown(value)}")
        return value

    def positive_ints(self, name: str, most: int = MAX_SIZE) -> list[int]:
        """Returns an integer from 1 to ``most``, or a list of at most 100 of them, as a list. FieldError otherwise."""
        value = self.content.get(name)
        values: list[Any] = value if isinstance(value, list) else [value]
        if not 0 < len(values) <= 100 or not all(type(number) is int and 0 < number <= most for number in values):
            raise self.error(name, f"must be an integer from 1 to {most}, or a list of them, got {shown(value)}")
        return values

    def number(self, name: str, default: float | None = None, least: float = -sys.float_info.max) -> float:
        """Returns a finite number of at least ``least``. FieldError for anything else."""
        value = self.content.get(name, default)
        if type(value) not in (int, float) or not least <= value <= sys.float_info.max:
            limit = f" of at least {least:g}" if least > -sys.float_info.max else ""
            raise self.error(name, f"must be a number{limit}, got {shown(value)}")
        return float(value)

    def boolean(self, name: str, default: bool) -> bool:
        """Returns a boolean; ``default`` if the field is missing or null. FieldError for anything else."""
        value = self.content.get(name)
        if value is not None and type(value) is not bool:
            raise self.error(name, f"must be true or false, got {shown(value)}")
        return default if value is None else value

    def string(self, name: str, options: Sequence[str] = (), default: str | None = None) -> str:
        """Returns a string, which must be one of ``options`` if any are given. FieldError for anything else."""
        value = self.content.get(name, default)
        if not isinstance(value, str) or (options and value not in options):
            expected = f"one of {', '.join(options)}" if options else "a string"
            raise self.error(name, f"{shown(value)} is not supported: it must be {expected}")
        return value

    def optional_string(self, name: str) -> str | None:
        """Returns a string, or None if the field is missing or null. FieldError for anything else."""
        return self.string(name) if self.content.get(name) is not None else None

    def check_size(self, name: str, given: int, weights: int) -> None:
        """Raises FieldError unless a size in the file equals the size of the weights it describes."""
        if given != weights:
            raise self.error(name, f"is {shown(given)}, but the weights have {weights}")
