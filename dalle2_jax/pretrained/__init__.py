"""Trained systems that come with the package: a folder each, with a model card in its README.md.

They are packed systems (`dalle2_jax.weights.pack`), and are loaded by their name: ``dalle2_jax.load("shapes")``.
"""

import os
import pathlib

FOLDER = pathlib.Path(__file__).parent
"""The folder of the systems."""


def names() -> tuple[str, ...]:
    """Returns the names of the systems that come with the package."""
    return tuple(sorted(path.name for path in FOLDER.iterdir() if _is_system(path)))


def included(name: str) -> pathlib.Path | None:
    """Returns the folder of the system of that name which comes with the package; None if there is none."""
    return FOLDER / name if name in names() else None


def find_system(path: str | os.PathLike[str]) -> pathlib.Path:
    """Returns the folder of a system.

    Args:
      path: a folder, or the name of a system that comes with the package. A folder of that name which holds a system
        takes precedence. "~" is the home folder.

    Returns:
      The folder, which may not exist.
    """
    given = pathlib.Path(path).expanduser()
    found = included(str(given))
    return given if found is None or _is_system(given) else found


def name_of(path: pathlib.Path) -> str | None:
    """Returns the name of the system that comes with the package in a folder; None if it is another folder."""
    found = included(path.name)
    return path.name if found is not None and path.resolve() == found.resolve() else None


def _is_system(path: pathlib.Path) -> bool:
    """Whether a folder holds a stage: its experiment.json, or config.json before version 0.2."""
    return any(path.glob("*/experiment.json")) or any(path.glob("*/config.json"))
