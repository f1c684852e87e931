"""Sections become dataclasses, and every mistake in a section is one line that names its field."""

import dataclasses

import pytest

from dalle2_jax.config.parse import expand, expand_kind
from dalle2_jax.errors import UsageError, UserError
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
    ("section", "message"),
    [
        ({"rat": 1.0}, "unknown field of config.outer 'rat': did you mean 'rate'"),
        ({"inner": {"sizes": 3}}, "unknown field of config.outer.inner 'sizes': did you mean 'size'"),
        ({"needed": 1.5}, "config.outer.needed must be int, not 1.5"),
        ({"needed": True}, "config.outer.needed must be int, not True"),
        ({"needed": None}, "config.outer.needed must be int, not None"),
        ({"on": 1}, "config.outer.on must be bool, not 1"),
        ({"rate": "1"}, "config.outer.rate must be float, not '1'"),
        ({"bound": "1"}, "config.outer.bound must be float or None, not '1'"),
        ({"name": 3}, "config.outer.name must be str, not 3"),
        ({"sides": 3}, "config.outer.sides must be tuple, not 3"),
        ({"inner": 3}, "config.outer.inner must be Inner, not 3"),
        ({"inner": {"dtype": "bfloat61"}}, "unknown config.outer.inner.dtype 'bfloat61': did you mean 'bfloat16'"),
        ({"tower": {"kind": "vitt"}}, "unknown config.outer.tower.kind 'vitt': did you mean 'vit'"),
        ({"tower": {"width": 8}}, "unknown config.outer.tower.kind ''"),
        ({"tower": {"kind": "vit", "widht": 8}}, "unknown field of config.outer.tower 'widht': did you mean 'width'"),
        ({"name": "rejected"}, "config.outer: name 'rejected' is rejected"),
    ],
)
def test_expand_rejects(section, message):
    with pytest.raises(UsageError) as caught:
        expand(Outer, {**GOOD, **section}, "outer")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_expand_names_what_is_missing():
    with pytest.raises(UsageError, match="config.outer lacks inner, needed"):
        expand(Outer, {}, "outer")


def test_expand_derived_fields():
    """What follows from the rest of the system comes from there, and nowhere else."""
    assert expand(Inner, {"dtype": "bfloat16"}, "inner", size=7) == Inner(7, "bfloat16")
    with pytest.raises(UsageError, match="config.inner.size follows from the rest of the system: leave it out"):
        expand(Inner, {"size": 7}, "inner", size=7)
    with pytest.raises(UsageError) as caught:
        expand(Inner, {"sizee": 7}, "inner", size=7)
    assert "'size'" not in str(caught.value)  # not offered, for it would be rejected


def test_expand_at_the_top_of_a_config():
    with pytest.raises(UsageError, match="unknown field of config 'siz': did you mean 'size'"):
        expand(Inner, {"siz": 1}, "")
    with pytest.raises(UsageError, match="config.size must be int"):
        expand(Inner, {"size": "1"}, "")


def test_expand_kind_leaves_the_section_alone():
    section = {"kind": "inner", "size": 4}
    assert expand_kind({"inner": Inner}, section, "data") == Inner(4)
    assert section == {"kind": "inner", "size": 4}
