"""Sections of a config as frozen dataclasses, and back: every field is known, of its own type and within its range."""

import dataclasses
import pathlib
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

from dalle2_jax.errors import ConfigError, UserError, choose, shown
from dalle2_jax.models.remat import POLICIES, policy_name
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig
from dalle2_jax.ranges import alternatives

VISION = {"vit": VisionConfig, "resnet": ResNetConfig}
"""The one union of dataclasses in a network's config, by the name that a section gives as ``kind``."""

NAMES = {"dtype": ("float32", "bfloat16"), "mu_dtype": ("float32", "bfloat16"), "remat": POLICIES}
"""Values of every field of one of these names."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a value stands, for errors.

    Attributes:
      root: "config", or the path of a file.
      field: the dotted path from there; "" for the root itself.
    """

    root: str
    field: str = ""

    def __str__(self) -> str:
        return f"{self.root}.{self.field}" if self.field else self.root

    def __truediv__(self, name: str) -> "Place":
        return Place(self.root, f"{self.field}.{name}" if self.field else name)

    def __getitem__(self, index: int) -> "Place":
        return Place(self.root, f"{self.field}[{index}]")

    def error(self, reason: str) -> ConfigError:
        """Returns the error that ``reason`` is wrong with the value here: "<place> <reason>"."""
        return ConfigError(f"{self} {reason}", self.field)

    @contextmanager
    def errors(self) -> Iterator[None]:
        """Turns a UserError about the value here into a ConfigError that names this place."""
        try:
            yield
        except ConfigError:
            raise
        except UserError as error:
            raise ConfigError(f"{self}: {error}", self.field) from error

    def choose(self, what: str, name: Any, options: Mapping[str, Any]) -> Any:
        """Returns options[name]. ConfigError, which offers the nearest name, if there is none."""
        try:
            return choose(what, name, options)
        except UserError as error:
            raise ConfigError(str(error), self.field) from error


def expand(cls: type, section: Mapping[str, Any], where: str, **derived: Any) -> Any:
    """Makes a dataclass of a config section.

    Args:
      cls: a dataclass; nested dataclasses are made of nested sections.
      section: its fields, any of which may be left to the default.
      where: the section's name, for errors; "" for the top of the config.
      **derived: fields that follow from other parts of the system and may not be in the section.

    Raises:
      ConfigError: an unknown field (the message offers the nearest), a value of the wrong type or out of range (NaN and
        infinity are in no range), or one that the dataclass rejects.
    """
    return _expand(cls, section, Place("config", where), derived)


def expand_file(cls: type, content: Mapping[str, Any], path: pathlib.Path) -> Any:
    """Makes a dataclass of a JSON file's content. UserError as `expand`, naming the file."""
    try:
        return _expand(cls, content, Place(str(path)), {})
    except ConfigError as error:
        raise UserError(f"{error}: restore the file") from error


def expand_kind(kinds: Mapping[str, type], section: Mapping[str, Any], where: str) -> Any:
    """Makes the dataclass that the section's ``kind`` names. ConfigError as `expand`, and for an unknown kind."""
    return _expand_kind(kinds, section, Place("config", where))


def flatten(value: Any, kinds: Mapping[str, type] | None = None) -> Any:
    """Returns the section of JSON values from which `expand` makes an equal dataclass; every field is in it.

    Args:
      value: a dataclass.
      kinds: dataclasses that are written with their ``kind``, in addition to `VISION`.
    """
    names = {cls: name for name, cls in {**VISION, **(kinds or {})}.items()}
    hints = typing.get_type_hints(type(value), include_extras=True)
    section = {"kind": names[type(value)]} if type(value) in names else {}
    for field in dataclasses.fields(value):
        if field.init:
            section[field.name] = _flatten_value(hints[field.name], getattr(value, field.name), kinds)
    return section


def _flatten_value(hint: Any, value: Any, kinds: Mapping[str, type] | None) -> Any:
    if dataclasses.is_dataclass(value):
        return flatten(value, kinds)
    if isinstance(value, tuple):
        if any(typing.get_origin(option) is Mapping for option, _ in alternatives(hint)):  # a mapping, stored as pairs
            return {name: _flatten_value(Any, item, kinds) for name, item in value}
        return [_flatten_value(Any, item, kinds) for item in value]
    return value


def _expand_kind(kinds: Mapping[str, type], section: Mapping[str, Any], place: Place) -> Any:
    fields = dict(section)
    kind = fields.pop("kind", "")
    return _expand((place / "kind").choose(f"{place}.kind", kind, kinds), fields, place, {})


def _expand(cls: type, section: Mapping[str, Any], place: Place, derived: Mapping[str, Any]) -> Any:
    if not isinstance(section, Mapping):
        raise place.error(f"must be a section of fields, not {shown(section)}")
    hints = typing.get_type_hints(cls, include_extras=True)
    known = {field.name: field for field in dataclasses.fields(cls) if field.init and field.name not in derived}
    values = dict(derived)
    for key, value in section.items():
        here = place / str(key)
        if key in derived:
            raise here.error("follows from the rest of the system: leave it out")
        here.choose(f"field of {place}", key, known)
        if key == "remat" and hints[key] is str and isinstance(value, bool):  # in configs of earlier versions
            value = policy_name(value)
        values[key] = _convert(hints[key], value, here)
        if key in NAMES and hints[key] is str:
            here.choose(str(here), values[key], dict.fromkeys(NAMES[key]))
    missing = [key for key, field in known.items() if key not in values and _is_required(field)]
    if missing:
        raise ConfigError(f"{place} lacks {', '.join(missing)}", (place / missing[0]).field)
    with place.errors():
        return cls(**values)


def _is_required(field: dataclasses.Field) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def _convert(hint: Any, value: Any, place: Place) -> Any:
    """Returns ``value`` as the type that ``hint`` asks for, its numbers within their ranges."""
    options = alternatives(hint)
    kinds = tuple(typing.get_origin(option) or option for option, _ in options)
    if value is None and type(None) in kinds:
        return None
    if isinstance(value, Mapping):
        return _convert_mapping([option for option, _ in options], value, place)
    if isinstance(value, list | tuple) and tuple in kinds:
        return _convert_items(options[kinds.index(tuple)][0], value, place)
    if isinstance(value, int) and not isinstance(value, bool) and float in kinds and int not in kinds:
        value = float(value) if abs(value) < 2**1023 else float("inf")
    if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
        raise _wrong_type(kinds, value, place)
    for option, within in options:  # only numbers have ranges
        if within is not None and isinstance(value, option) and cast(float, value) not in within:
            raise place.error(f"must be {within}, got {shown(value)}")
    return value


def _wrong_type(kinds: Sequence[type], value: Any, place: Place) -> ConfigError:
    expected = " or ".join("None" if kind is type(None) else kind.__name__ for kind in kinds)
    return place.error(f"must be {expected}, not {shown(value)}")


def _convert_mapping(options: Sequence[Any], value: Mapping[str, Any], place: Place) -> Any:
    """Returns a dataclass if one of ``options`` is one, else a mapping of converted values."""
    nested = [option for option in options if dataclasses.is_dataclass(option)]
    if len(nested) == 1:
        return _expand(cast(type, nested[0]), value, place, {})
    if nested:
        return _expand_kind(VISION, value, place)
    for option in options:
        if typing.get_origin(option) is Mapping:
            of_values = typing.get_args(option)[1]
            if of_values is Any:
                return value
            return {key: _convert(of_values, item, place / str(key)) for key, item in value.items()}
    raise _wrong_type([typing.get_origin(option) or option for option in options], value, place)


def _convert_items(hint: Any, value: Sequence[Any], place: Place) -> tuple:
    """Returns a tuple of converted items, as many as ``hint`` asks for."""
    items = typing.get_args(hint)
    if not items:
        return tuple(value)
    if items[-1] is Ellipsis:
        items = (items[0],) * len(value)
    if len(items) != len(value):
        raise place.error(f"must have {len(items)} values, got {shown(value)}")
    return tuple(_convert(item, one, place[i]) for i, (item, one) in enumerate(zip(items, value, strict=True)))
