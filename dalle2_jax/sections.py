"""From a section of a config to a frozen dataclass: every field is known, and of its own type."""

import dataclasses
import types
import typing
from collections.abc import Mapping
from typing import Any

from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.types import UsageError, UserError, choose

VISION = {"vit": VisionConfig, "resnet": ResNetConfig}
"""The one field of any dataclass that may be of several, by the name that a section gives as ``kind``."""

DTYPES = ("float32", "bfloat16")
"""What every field called ``dtype`` may say."""


def expand(cls: type, section: Mapping[str, Any], where: str, **derived: Any) -> Any:
    """Makes a dataclass of a config section.

    Args:
      cls: a dataclass; nested dataclasses are made of nested sections.
      section: its fields, any of which may be left to the default.
      where: the section's name, for errors; "" for the top of the config.
      **derived: fields that follow from other parts of the system and may not be in the section.

    Raises:
      UsageError: an unknown field (offers the nearest), a value of the wrong type, or one that the
        dataclass refuses.
    """
    name = f"config.{where}".rstrip(".")
    hints = typing.get_type_hints(cls)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in derived}
    values = dict(derived)
    for key, value in section.items():
        if key in derived:
            raise UsageError(f"{name}.{key} follows from the rest of the system: leave it out")
        choose(f"field of {name}", key, known)
        values[key] = _convert(hints[key], value, f"{where}.{key}".lstrip("."))
        if key == "dtype":
            choose(f"{name}.{key}", values[key], dict.fromkeys(DTYPES))
    missing = [key for key, field in known.items() if key not in values and _is_required(field)]
    if missing:
        raise UsageError(f"{name} lacks {', '.join(missing)}")
    try:
        return cls(**values)
    except UserError as error:
        raise UsageError(f"{name}: {error}") from error


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Returns ``value`` as the type that ``hint`` asks for."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    if value is None and type(None) in options:
        return None
    if isinstance(value, Mapping):
        nested = [option for option in options if dataclasses.is_dataclass(option)]
        if len(nested) == 1:
            return expand(nested[0], value, where)
        if nested:
            return expand_kind(VISION, value, where)
    kinds = tuple(typing.get_origin(option) or option for option in options)
    if isinstance(value, list | tuple) and tuple in kinds:
        return tuple(value)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        return float(value)
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
        raise UsageError(f"config.{where} must be {expected}, not {value!r}")
    return value


def expand_kind(kinds: Mapping[str, type], section: Mapping[str, Any], where: str) -> Any:
    """Makes the dataclass that the section's ``kind`` names. UsageError as `expand`, and for an unknown kind."""
    fields = dict(section)
    kind = fields.pop("kind", "")
    return expand(choose(f"config.{where}.kind", kind, kinds), fields, where)
