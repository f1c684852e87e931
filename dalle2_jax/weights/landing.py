"""From components to a system's folder: each stage complete, or nothing at all."""

import contextlib
import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dalle2_jax.types import Params, UserError
from dalle2_jax.weights.component import Component
from dalle2_jax.weights.rules import fill, under
from dalle2_jax.workdir import Checkpoints, StageFolder

STEP = 0
"""An imported stage has made no step here."""


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
def staging(root: Path, names: Iterator[str] | list[str]) -> Iterator[Path]:
    """Gives an empty folder beside a system's stages, and moves the stages made in it into place at the end.

    After an error, or a kill, the system is as it was.

    Raises:
        UserError: one of the stages is there already, or the folder cannot be made.
    """
    for name in names:
        if (root / name).exists():
            raise UserError(f"{root / name} is there already: remove it, or import to another folder")
    created = not root.exists()
    try:
        root.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=".importing-", dir=root))
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error.strerror}): choose another folder") from error
    try:
        yield temporary
        for name in names:
            os.replace(temporary / name, root / name)
    except OSError as error:
        raise UserError(f"{root} cannot be written ({error.strerror or error}): make room and import again") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if created and not any(root.iterdir()):
            root.rmdir()


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


def shapes_of(tree: Any) -> Any:
    """Returns a tree's shapes."""
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree)
