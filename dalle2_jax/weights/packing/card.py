"""The model card of a packed system."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

NAME = "README.md"

SECTION = "## Stages"
"""Heading of the part that is written here; what a given text has from there on is replaced."""


@dataclasses.dataclass(frozen=True)
class PackedStage:
    """One stage of a packed system.

    Attributes:
        name: of the stage.
        step: training steps of its checkpoint.
        config: the config page that it was trained with; "" if unknown.
        parameters: how many values its weights have.
        size: bytes of the file with its weights.
        error: norm of the difference of the packed weights and the original ones, relative to the norm of the latter.
    """

    name: str
    step: int
    config: str
    parameters: int
    size: int
    error: float


def write_card(folder: Path, about: str, stages: Sequence[PackedStage]) -> None:
    """Writes a text about a system, and a table of its stages, to the system's folder."""
    text = about.partition(SECTION)[0].rstrip()
    (folder / NAME).write_text(f"{text}\n\n{_stage_table(stages)}", encoding="utf-8")


def _stage_table(stages: Sequence[PackedStage]) -> str:
    rows = [
        f"| `{each.name}` | {each.step:,} | `{each.config}` | {each.parameters:,} | {each.size / 1e6:.2f} MB "
        f"| {each.error:.1e} |"
        for each in stages
    ]
    heading = "| stage | training steps | config | parameters | file | rounding error of the weights |"
    return "\n".join([SECTION, "", heading, "| --- " * 6 + "|", *rows]) + "\n"
