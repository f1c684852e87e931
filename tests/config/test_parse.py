"""Sections become dataclasses, and every mistake in a section is one line that names its field."""

import dataclasses

import pytest
from raised import mentions

from dalle2_jax.config.parse import expand, expand_kind
from dalle2_jax.errors import ConfigError, UsageError, UserError
from dalle2_jax.models.resnet import ResNetConfig
from dalle2_jax.models.vit import VisionConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    """A section within a section."""

    size: int = 2
    dtype: str = "float32"


@dataclasses.dataclass(frozen=True)
class Outer:
    """One field of every type that configs use; ``inner`` and ``needed`` are required."""

    inner: Inner
    needed: int
    rate: float = 0.5
    name: str = "a"
    on: bool = False
    sides: tuple[int, ...] = ()
    bound: float | None = 1.0
    steps: int | str = 50
    tower: VisionConfig | ResNetConfig = VisionConfig()

    def __post_init__(self) -> None:
        if self.name == "rejected":
            raise UserError("name 'rejected' is rejected: use another")


GOOD = {"inner": {"size": 3}, "needed": 1}


def test_expand_takes_defaults_and_nested_sections():
    assert expand(Outer, GOOD, "outer") == Outer(Inner(3), 1)
    assert expand(Inner, {}, "inner") == Inner()
    assert hash(expand(Outer, GOOD, "outer"))


@pytest.mark.parametrize(
    ("field", "given", "taken"),
    [
        ("rate", 1, 1.0),  # an int where a float is asked for
        ("rate", 0.25, 0.25),
        ("bound", None, None),
        ("bound", 2, 2.0),
        ("sides", [32, 16], (32, 16)),  # a list, as JSON has
        ("sides", (), ()),
        ("steps", 20, 20),
        ("steps", "fast27", "fast27"),
        ("on", True, True),
        ("tower", {"kind": "vit", "width": 8, "heads": 2}, VisionConfig(width=8, heads=2)),
        ("tower", {"kind": "resnet", "layers": [1, 1]}, ResNetConfig(layers=(1, 1))),
    ],
)
def test_expand_converts(field, given, taken):
    value = getattr(expand(Outer, {**GOOD, field: given}, "outer"), field)
    assert value == taken and type(value) is type(taken)


@pytest.mark.parametrize(
    ("section", "field", "facts"),
    [
        ({"rat": 1.0}, "rat", ["'rat'", "'rate'"]),
        ({"inner": {"sizes": 3}}, "inner.sizes", ["'sizes'", "'size'"]),
        ({"needed": 1.5}, "needed", ["int", 1.5]),
        ({"needed": True}, "needed", ["int", True]),
        ({"needed": None}, "needed", ["int", None]),
        ({"on": 1}, "on", ["bool", 1]),
        ({"rate": "1"}, "rate", ["float", "'1'"]),
        ({"bound": "1"}, "bound", ["float", None, "'1'"]),
        ({"name": 3}, "name", ["str", 3]),
        ({"sides": 3}, "sides", ["tuple", 3]),
        ({"inner": 3}, "inner", ["Inner", 3]),
        ({"inner": {"dtype": "bfloat61"}}, "inner.dtype", ["'bfloat61'", "'bfloat16'"]),
        ({"tower": {"kind": "vitt"}}, "tower.kind", ["'vitt'", "'vit'"]),
        ({"tower": {"width": 8}}, "tower.kind", ["''", "vit", "resnet"]),
        ({"tower": {"kind": "vit", "widht": 8}}, "tower.widht", ["'widht'", "'width'"]),
        ({"name": "rejected"}, "", ["config.outer", "name", "'rejected'"]),
    ],
)
def test_expand_rejects(section, field, facts):
    with pytest.raises(ConfigError, check=mentions(*facts, field=f"outer.{field}".rstrip("."))):
        expand(Outer, {**GOOD, **section}, "outer")


def test_expand_names_what_is_missing():
    with pytest.raises(ConfigError, check=mentions("config.outer", "inner", "needed", field="outer.inner")):
        expand(Outer, {}, "outer")


def test_expand_derived_fields():
    """What follows from the rest of the system comes from there, and nowhere else."""
    assert expand(Inner, {"dtype": "bfloat16"}, "inner", size=7) == Inner(7, "bfloat16")
    with pytest.raises(ConfigError, check=mentions("follows", field="inner.size")):
        expand(Inner, {"size": 7}, "inner", size=7)
    with pytest.raises(UsageError) as caught:
        expand(Inner, {"sizee": 7}, "inner", size=7)
    assert "'size'" not in str(caught.value)  # not offered, for it would be rejected


def test_expand_at_the_top_of_a_config():
    with pytest.raises(ConfigError, check=mentions("'siz'", "'size'", field="siz")):
        expand(Inner, {"siz": 1}, "")
    with pytest.raises(ConfigError, check=mentions("int", field="size")):
        expand(Inner, {"size": "1"}, "")


def test_expand_kind_leaves_the_section_alone():
    section = {"kind": "inner", "size": 4}
    assert expand_kind({"inner": Inner}, section, "data") == Inner(4)
    assert section == {"kind": "inner", "size": 4}
