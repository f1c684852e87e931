"""Writes imported stages and exports: every folder appears under its final name only when it is complete."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dalle2_jax import lock, signals
from dalle2_jax.config.experiment import Experiment
from dalle2_jax.config.stored import write_experiment
from dalle2_jax.errors import ConfigError, WeightsError
from dalle2_jax.stages import EmbeddingContract
from dalle2_jax.types import Params
from dalle2_jax.weights.component import Component
from dalle2_jax.weights.rules import from_tensors, under
from dalle2_jax.workdir import digests
from dalle2_jax.workdir.checkpoints import Checkpoints
from dalle2_jax.workdir.folder import StageFolder

STEP = 0
"""Training step of an imported stage."""

_STAGING = ".importing-"


@dataclasses.dataclass(frozen=True)
class Trees:
    """Parameters and statistics of a stage: arrays, or their shapes."""

    params: Params
    stats: Params


def imported_experiment(component: Component) -> Experiment:
    """Returns the experiment of an imported stage, which describes the stage and no training.

    Raises:
        WeightsError: the component's config does not describe a valid stage.
    """
    try:
        return Experiment.from_config({"stage": component.stage, "total_steps": STEP, **component.config})
    except ConfigError as error:
        what = f"{component.where} does not describe a valid {component.stage}: {error}"
        raise WeightsError(what, component.where) from error


def read_component(component: Component, abstract: Trees, dtype: Any = np.float32) -> Trees:
    """Reads the tensors of a component.

    Args:
        component: a complete stage.
        abstract: shapes of the stage's parameters and statistics.
        dtype: dtype of the arrays.

    Raises:
        WeightsError: as `rules.from_tensors`; for a part of a stage the message names the missing part.
    """
    rules = [*under("params", "", component.params), *under("stats", "", component.stats)]
    shapes = {"params": abstract.params, "stats": abstract.stats}
    try:
        tree = from_tensors(rules, component.tensors, shapes, component.where, component.ignored, dtype)
    except WeightsError as error:
        if not component.completed_by:
            raise
        what = f"{error}: give {component.completed_by} too"
        raise WeightsError(what, component.where, error.missing, error.unexpected) from error
    return Trees(tree.get("params", {}), tree.get("stats", {}))


def write_stage(
    folder: StageFolder, component: Component, trees: Trees, contract: EmbeddingContract | None = None
) -> None:
    """Writes the folder of an imported stage as training would at step 0, with the averaged weights only.

    Args:
        folder: the folder, which does not exist yet.
        component: what is imported.
        trees: its arrays.
        contract: the embedding contract of the system's CLIP; None for a stage that does not depend on CLIP.
    """
    Checkpoints(folder).save_lean(STEP, {"ema": trees.params, "stats": trees.stats})
    write_experiment(folder, imported_experiment(component))
    folder.write_json("source.json", {"family": component.family, "files": component.where})
    if component.tokenizer is not None:
        component.tokenizer.save(folder.path / "tokenizer")
        folder.record("tokenizer")
    if contract is not None:
        folder.write_json("contract.json", dataclasses.asdict(contract))


@contextlib.contextmanager
def staging(root: Path, names: Sequence[str]) -> Iterator[Path]:
    """Yields an empty folder inside a system, and moves the stages written to it into the system at the end.

    After an error or a kill the system is unchanged. The next import removes the folder of a killed one.

    Args:
        root: folder of the system; created if missing.
        names: the stages that will be written.

    Raises:
        WeightsError: one of the stages exists, or the folder cannot be written.
    """
    for name in names:
        if os.path.lexists(root / name):
            raise WeightsError(f"{root / name} exists: remove it, or import to another folder", root / name)
    created = not root.exists()

    def remove_created() -> None:
        if created and root.is_dir() and not any(root.iterdir()):
            root.rmdir()

    with signals.on_exit(remove_created), contextlib.ExitStack() as stack:
        try:
            root.mkdir(parents=True, exist_ok=True)
            stack.callback(remove_created)
            temporary = stack.enter_context(lock.unfinished(root, _STAGING))
        except OSError as error:
            raise WeightsError(f"{root} cannot be written ({error.strerror}): choose another folder", root) from error
        try:
            yield temporary
            _move(temporary, root, names)
        except OSError as error:
            reason = error.strerror or error
            raise WeightsError(f"{root} cannot be written ({reason}): free space and import again", root) from error


def _move(temporary: Path, root: Path, names: Sequence[str]) -> None:
    """Moves all stages to their final names, or none."""
    moved: list[str] = []
    try:
        for name in names:
            os.rename(temporary / name, root / name)
            moved.append(name)
    except OSError:
        for name in moved:
            os.rename(root / name, temporary / name)
        raise


def write_folder(target: Path, write: Callable[[Path], None]) -> None:
    """Writes a folder that appears as ``target`` only when it is complete, with the digests of its files.

    Args:
        target: the final name.
        write: writes the content into a temporary folder.

    Raises:
        WeightsError: ``target`` exists or cannot be written.
    """
    if target.exists():
        raise WeightsError(f"{target} exists: remove it, or export to another folder", target)
    with contextlib.ExitStack() as stack:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = stack.enter_context(lock.unfinished(target.parent, f".{target.name}."))
        except OSError as error:
            raise WeightsError(
                f"{target} cannot be written ({error.strerror}): choose another folder", target
            ) from error
        try:
            write(temporary)
            digests.write(temporary)
            os.replace(temporary, target)
        except OSError as error:
            reason = error.strerror or error
            raise WeightsError(f"{target} cannot be written ({reason}): free space and export again", target) from error


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Writes an indented JSON file and its parent folders, inside a temporary folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
