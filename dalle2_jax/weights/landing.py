"""From components to a system's folder: each stage complete, or nothing at all."""

import contextlib
import dataclasses
import fcntl
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax.types import Params, UserError
from dalle2_jax.weights.component import Component
from dalle2_jax.weights.rules import fill, under
from dalle2_jax.workdir import Checkpoints, StageFolder

STEP = 0
"""An imported stage has made no step here."""

_STAGING = ".importing-"


@dataclasses.dataclass(frozen=True)
class Trees:
    """A stage's parameters and statistics: their shapes, or their arrays."""

    params: Params
    stats: Params


def stored_config(component: Component) -> dict[str, Any]:
    """Returns the config.json of an imported stage: what it is, and no more than that."""
    return {"stage": component.stage, "total_steps": STEP, **component.config}


def read(component: Component, abstract: Trees, dtype: Any = np.float32) -> Trees:
    """Reads a component's tensors into trees of these shapes.

    Raises:
        UserError: as ``rules.fill``; for a part alone, saying what it needs.
    """
    rules = [*under("params", "", component.params), *under("stats", "", component.stats)]
    shapes = {"params": abstract.params, "stats": abstract.stats}
    try:
        tree = fill(rules, component.tensors, shapes, component.where, component.ignored, dtype)
    except UserError as error:
        hint = f" ({component.needs} completes it)" if component.needs else ""
        raise UserError(f"{error}{hint}") from error
    return Trees(tree.get("params", {}), tree.get("stats", {}))


def write_stage(folder: StageFolder, component: Component, trees: Trees) -> None:
    """Writes a stage's folder as training would, at step 0; only the averaged weights are there."""
    Checkpoints(folder).save_lean(STEP, {"ema": trees.params, "stats": trees.stats})
    folder.write_json("config.json", stored_config(component))
    folder.write_json("source.json", {"family": component.family, "files": component.where})
    if component.tokenizer is not None:
        component.tokenizer.save(folder.path / "tokenizer")


@contextlib.contextmanager
def staging(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """Gives an empty folder beside a system's stages, and moves the stages made in it into place at the end.

    After an error, or a kill, the system is as it was. What a killed import left is removed by the next one.

    Raises:
        UserError: one of the stages is there already, or the folder cannot be made.
    """
    for name in names:
        if os.path.lexists(root / name):
            raise UserError(f"{root / name} is there already: remove it, or import to another folder")
    created = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        _sweep(root)
        temporary = Path(tempfile.mkdtemp(prefix=_STAGING, dir=root))
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error.strerror}): choose another folder") from error
    with _locked(temporary):
        try:
            yield temporary
            _move(temporary, root, names)
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"{root} cannot be written ({reason}): make room and import again") from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
            if created and not any(root.iterdir()):
                root.rmdir()


def _move(temporary: Path, root: Path, names: Sequence[str]) -> None:
    """Moves all stages into place, or none."""
    moved: list[str] = []
    try:
        for name in names:
            os.rename(temporary / name, root / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.rename(root / name, temporary / name)
        raise


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[bool]:
    """Takes a folder until the end, or that of the process.

    Gives False where another process has it, and on disks that know no locks: nothing is swept there.
    """
    number = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(number, fcntl.LOCK_EX | fcntl.LOCK_NB)
            taken = True
        except OSError:
            taken = False
        yield taken
    finally:
        os.close(number)


def _sweep(root: Path) -> None:
    """Removes what killed imports left: folders that no process has taken."""
    for left in root.glob(f"{_STAGING}*"):
        with contextlib.suppress(FileNotFoundError), _locked(left) as free:
            if free:
                shutil.rmtree(left, ignore_errors=True)


def write_files(target: Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a folder that appears as ``target`` only when it is complete.

    Raises:
        UserError: target exists, or cannot be written.
    """
    if target.exists():
        raise UserError(f"{target} is there already: remove it, or export to another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror}): choose another folder") from error
    try:
        write(temporary)
        os.chmod(temporary, 0o755)  # mkdtemp's 0700 would hide the folder from colleagues
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(f"{target} cannot be written ({error.strerror or error}): make room and try again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a JSON file as public checkpoints have it, in a folder that is not in its place yet."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
